"""One decode step over a cache, and q alone: against transformers' caches with SDPA, torch.cat, and a weight sliced beforehand.

Prints medians of rounds in which all rivals run in turn, on one thread, as ratios; the last column says whether a target is met. Seconds
are those of this thread on a core (on an idle machine the same as by the clock), so that other work on the machine counts less.

python bench/decode.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.pytorch_utils import Conv1D

from triptych import FusedAttention, KVCache, Layout, attend, project

HEADS, DIM = 32, 64
LENGTHS = (512, 2048, 8192)
ROUNDS = 15
Step = Callable[[], object]


def medians(rivals: dict[str, tuple[Step, Step]], rounds: int = ROUNDS, calls: int = 1) -> dict[str, float]:
    """Seconds per step; what undoes it (the second) is not counted. The rivals run in turn, in each round from another one on, so that
    none runs twice in a row and finds its own numbers in the processor's cache."""
    times: dict[str, list[float]] = {name: [] for name in rivals}
    order = list(rivals)
    for number in range(rounds + 1):
        order = order[1:] + order[:1]
        for name in order:
            step, undo = rivals[name]
            spent = 0.0
            for _ in range(calls):
                start = time.thread_time()
                step()
                spent += time.thread_time() - start
                undo()
            if number:
                times[name].append(spent / calls)
    return {name: statistics.median(values) for name, values in times.items()}


class Shape(nn.Module):
    """What transformers' attention function asks of a module."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = HEADS // groups
        self.is_causal = True


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=k.shape[1] != q.shape[1])


def rivals(groups: int, length: int, dtype: torch.dtype) -> dict[str, tuple[Step, Step]]:
    """Each adds one token to a cache of `length` and attends to all."""
    torch.manual_seed(0)
    past_k, past_v = (torch.randn(1, groups, length, DIM).to(dtype) for _ in "kv")
    q, k, v = (torch.randn(1, heads, 1, DIM).to(dtype) for heads in (HEADS, groups, groups))
    ours, dynamic = KVCache(max_length=length + 64), DynamicCache()
    static = StaticCache(LlamaConfig(num_hidden_layers=1, num_attention_heads=HEADS, num_key_value_heads=groups), max_cache_len=length + 64)
    cat: list[Tensor] = [past_k, past_v]
    for cache in (ours, dynamic, static):
        cache.update(past_k, past_v, 0)
    seen = (torch.arange(length + 64) <= length)[None, None, None]
    shape = Shape(groups)
    grown: list[Tensor] = []

    def joined() -> Tensor:
        grown[:] = [torch.cat([cat[0], k], 2), torch.cat([cat[1], v], 2)]
        return sdpa(q, *grown)

    def back() -> None:
        static.layers[0].cumulative_length -= 1

    found: dict[str, tuple[Step, Step]] = {
        "ours": (lambda: attend(q, *ours.update(k, v)), lambda: ours.rollback(1)),
        "DynamicCache": (lambda: sdpa(q, *dynamic.update(k, v, 0)), lambda: dynamic.crop(-1)),
        "StaticCache": (lambda: sdpa(q, *static.update(k, v, 0), seen), back),
        "Static, packed": (lambda: sdpa_attention_forward(shape, q, *static.update(k, v, 0), seen)[0], back),
        "torch.cat": (joined, grown.clear),
    }
    exact = sdpa(q.double(), torch.cat([past_k, k], 2).double(), torch.cat([past_v, v], 2).double())
    for name, (step, undo) in found.items():
        out: Any = step()
        undo()
        out = out.transpose(1, 2) if out.shape[1] == 1 and out.shape[2] == HEADS else out
        assert (out.double() - exact).abs().max() < 0.02, name
    return found


def decoding() -> None:
    print(f"One token added to a cache and attended, {HEADS} query heads of {DIM}, batch 1: our time in ms, and as a part of each rival's")
    print(
        f"  {'':<26}{'ours':>8}" + "".join(f"{'/ ' + name:>17}" for name in ("DynamicCache", "StaticCache", "Static, packed", "torch.cat"))
    )
    for groups, label, limit in ((8, "GQA 32/8", 0.15), (HEADS, "MHA 32", 0.6)):
        for dtype in (torch.bfloat16, torch.float32):
            for length in LENGTHS:
                result = medians(rivals(groups, length, dtype), calls=max(1, 2048 // length))
                ours = result.pop("ours")
                parts = {name: ours / theirs for name, theirs in result.items()}
                asked = (groups == 8 and dtype == torch.bfloat16) or (groups == HEADS and length == 8192)
                verdict = ("met" if parts["DynamicCache"] <= limit else "MISSED") + f" (at most {limit})" if asked else ""
                line = f"  {label:<9} {str(dtype).removeprefix('torch.'):<9} {length:<6}{ours * 1e3:>8.2f}"
                print(line + "".join(f"{part:>17.3f}" for part in parts.values()) + f"  {verdict}", flush=True)


def updating() -> None:
    print("\nOne token added, nothing else: microseconds, GQA 32/8, bfloat16")
    for length in (*LENGTHS, 32768):
        cache, k = KVCache(max_length=length + 64), torch.zeros(1, 8, 1, DIM, dtype=torch.bfloat16)
        past = torch.zeros(1, 8, length, DIM, dtype=torch.bfloat16)
        dynamic = DynamicCache()
        for each in (cache, dynamic):
            each.update(past, past, 0)
        pair: dict[str, tuple[Step, Step]] = {
            "ours": (lambda c=cache, k=k: c.update(k, k), lambda c=cache: c.rollback(1)),  # type: ignore[misc]
            "dynamic": (lambda c=dynamic, k=k: c.update(k, k, 0), lambda c=dynamic: c.crop(-1)),  # type: ignore[misc]
        }
        result = medians(pair, calls=20)
        print(f"  {length:<8} ours {result['ours'] * 1e6:7.1f}   DynamicCache {result['dynamic'] * 1e6:9.1f}", flush=True)


def nothing() -> None:
    pass


def q_alone() -> None:
    print("\nq alone, hidden 2048, q of 16 heads of 128: time / F.linear with a weight sliced beforehand (at most 1.1);")
    print("`project`, at last the method `q_only`, and as control F.linear with another sliced weight: what differs from 1 there is noise")
    cases = [
        *((text, {"h": 16, "d": 128}) for text in ("(q|k|v) h d", "h (q|k|v) d", "h d (q|k|v)", "(q|k|v) d h", "(q|k|v) h p c")),
        *((text, {"g": 4, "r": 4, "d": 128}) for text in ("(q h|k g|v g) d", "g (q r|k|v) d", "g d (q r|k|v)", "(q r g|k g|v g) d")),
        ("t (q n r|k n|v n) d", {"t": 2, "n": 2, "r": 4, "d": 128}),
        ("m (q|v|k) n d", {"m": 4, "n": 4, "d": 128}),
        ("h (q|k|v) (rot c p|pass n)", {"h": 16, "p": 32, "n": 64}),
    ]
    worst = 0.0
    print(
        f"  {'':<28}"
        + "".join(f"{f'{tokens} {dtype}':>16}" for dtype in ("bf16", "fp32") for tokens in (1, 256))
        + "   q_only, 1 bf16   control, 1 bf16"
    )
    for text, sizes in cases:
        for kind in (nn.Linear, Conv1D) if text == "(q|k|v) h d" else (nn.Linear,):
            row = []
            for dtype in (torch.bfloat16, torch.float32):
                attention = FusedAttention(text, 2048, dtype=dtype, rotary=False, **sizes)
                rows = Layout(text).size(**sizes)
                fused = attention.fused if kind is nn.Linear else Conv1D(rows, 2048).to(dtype)
                weight, again, bias = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype), torch.randn(2048).to(dtype)
                for tokens in (1, 256):
                    x = torch.randn(1, tokens, 2048).to(dtype)
                    four: dict[str, tuple[Step, Step]] = {
                        "sliced": (lambda x=x, w=weight, b=bias: F.linear(x, w, b), nothing),  # type: ignore[misc]
                        "project": (lambda x=x, f=fused, t=text, s=sizes: project(f, x, "q", t, **s), nothing),  # type: ignore[misc]
                        "q_only": (lambda x=x, a=attention: a.q_only(x), nothing),  # type: ignore[misc]
                        "control": (lambda x=x, w=again, b=bias: F.linear(x, w, b), nothing),  # type: ignore[misc]
                    }
                    result = medians(four, rounds=80 if tokens == 1 else 5)
                    row.append(result["project"] / result["sliced"])
                    if tokens == 1 and dtype == torch.bfloat16:
                        method, control = result["q_only"] / result["sliced"], result["control"] / result["sliced"]
            worst = max(worst, *row, method)
            print(
                f"  {text + (' Conv1D' if kind is Conv1D else ''):<28}"
                + "".join(f"{part:>16.2f}" for part in row)
                + f"{method:>17.2f}{control:>18.2f}",
                flush=True,
            )
    print(f"  largest {worst:.2f}: {'met' if worst <= 1.1 else 'MISSED'}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with torch.no_grad():
        decoding()
        updating()
        q_alone()
