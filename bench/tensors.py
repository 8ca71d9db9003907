"""split against the hand-written view, repack against memcpy. Prints medians of rounds in which all rivals run in turn.

python bench/tensors.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import einops
import numpy as np
import torch

import triptych as tt

ROUNDS = 15


def medians(rivals: dict[str, Callable[[], object]], calls: int) -> dict[str, float]:
    """Seconds per call; every round runs each rival `calls` times, so that a slow moment hits all alike."""
    for rival in rivals.values():
        rival()
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(ROUNDS):
        for name, rival in rivals.items():
            start = time.perf_counter()
            for _ in range(calls):
                rival()
            times[name].append((time.perf_counter() - start) / calls)
    return {name: statistics.median(values) for name, values in times.items()}


def splitting() -> None:
    print("split of an activation [2, 5, 6144] into q, k, v: microseconds a call, and what is added to the hand-written line")
    x = torch.randn(2, 5, 6144)
    for text, by_hand, pattern in (
        ("h (q|k|v) d", lambda: x.view(2, 5, 16, 3, 128).unbind(-2), "b s (h k d) -> k b s h d"),
        ("(q|k|v) h d", lambda: x.view(2, 5, 3, 16, 128).unbind(-3), "b s (k h d) -> k b s h d"),
    ):
        layout = tt.Layout(text)
        result = medians(
            {
                "view.unbind": by_hand,
                "tt.split": lambda layout=layout: tt.split(x, layout, h=16, d=128),
                "einops": lambda pattern=pattern: einops.rearrange(x, pattern, k=3, h=16).unbind(0),
            },
            2000,
        )
        base = result["view.unbind"]
        print(f"  {text:<14}" + "   ".join(f"{name} {t * 1e6:5.2f} (+{(t - base) * 1e6:.2f})" for name, t in result.items()))


def repacking() -> None:
    print("repack of a weight [12288, 4096] into `out`, one thread: time / memcpy of the same bytes (copy_ of the whole tensor)")
    for dtype in (torch.bfloat16, torch.float32):
        weight = torch.zeros(12288, 4096, dtype=dtype).random_(0, 100)
        out = torch.empty_like(weight)
        for source, target, sizes in (
            ("h (q|k|v) d", "(q|k|v) h d", {"h": 32, "d": 128}),
            ("(q|k|v) h d", "h (q|k|v) d", {"h": 32, "d": 128}),
            ("g (q r|k|v) d", "(q h|k g|v g) d", {"g": 16, "r": 4, "d": 128}),
            ("(q|k|v) h c p", "(q|k|v) h p c", {"h": 32, "p": 64}),
        ):
            result = medians(
                {
                    "memcpy": lambda out=out, weight=weight: out.copy_(weight),
                    "repack": lambda a=source, b=target, s=sizes, w=weight, o=out: tt.repack(w, a, b, axis=0, out=o, **s),
                },
                1,
            )
            print(f"  {dtype!s:<15} {source:<14} -> {target:<16} {result['repack'] / result['memcpy']:.2f}")
        as_numpy = weight.view(torch.uint8).numpy()
        target_numpy = np.empty_like(as_numpy)
        result = medians(
            {
                "memcpy": lambda a=as_numpy, o=target_numpy: np.copyto(o, a),
                "repack": lambda a=as_numpy, o=target_numpy: tt.repack(a, "h (q|k|v) d", "(q|k|v) h d", axis=0, out=o, h=32),
            },
            1,
        )
        print(f"  {dtype!s:<15} the same as a NumPy array{'':<10} {result['repack'] / result['memcpy']:.2f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    splitting()
    repacking()
