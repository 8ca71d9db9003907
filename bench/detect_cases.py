"""Real trained layers in many layouts, and controls of which nothing may be said: what `detect` answers, one JSON line a group of cases.

Lines are written as they come; a run that was interrupted goes on where it stopped. They count only for the code that made them.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Callable, Iterator
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tests import weights

import triptych as tt
from triptych.detect import CONFIDENT, Verdict, detect, pool
from triptych.rowmap import parts

ROOT = Path(__file__).parent.parent
LINES = ROOT / ".bench" / "detect.jsonl"
CODE = ("evidence", "head_size", "hypotheses", "rotary", "verdict", "detect")
"""Modules that make a verdict: another version of them makes old lines void."""
ONE_TO_ONE = (
    "(q|k|v) h d", "(q|v|k) h d", "(v|q|k) h d", "h (q|k|v) d", "h (q|v|k) d", "h (v|q|k) d", "h d (q|k|v)", "t (q|k|v) n d",
    "t (q|v|k) n d", "(q|k|v) d h", "d (q|k|v) h", "d h (q|k|v)",
)  # fmt: skip
GROUPED = (
    "(q h|k g|v g) d", "(q h|v g|k g) d", "(v g|q h|k g) d", "(k g|q h|v g) d", "(k g|v g|q h) d", "g (q r|k|v) d", "g (q r|v|k) d",
    "g (v|q r|k) d", "g (k|v|q r) d", "(q r g|k g|v g) d", "q d h|k d g|v d g", "g d (q r|k|v)",
)  # fmt: skip
WITH_O = ("q h d|_ g (k|v) d",)
"""Compared only where O is given."""
KEY_VALUE = ("(k|v) g d", "(v|k) g d", "g (k|v) d")
MLP = ("(gate|up) f", "(up|gate) f", "f (gate|up)", "t (up|gate) f")
OUTSIDE = ("_ (q|k) h d|v d h", "_ h (q|k) d|v h d", "q h d|_ h (k|v) d", "q h d|k d h|v h d", "q d h|k h d|v h d")
OUTSIDE_GROUPED = (
    "_ g (q r|k) d|v g d", "_ g (q r|v) d|k g d", "q r g d|_ g (k|v) d", "q h d|k d g|v g d",
    "q h d|k g d|v d g", "q d h|k g d|v g d",
)  # fmt: skip
"""Layouts that `detect` does not compare."""
BLOCKS = {"t (q|k|v) n d": 2, "t (q|v|k) n d": 4, "t (up|gate) f": 4}
LAYERS = {"smollm2": (0, 3, 4, 6, 9, 10, 12, 14, 15, 17, 19, 20, 23, 25, 26, 29), "antiberty": (0, 2, 4, 5, 7)}
"""Layers that are looked at, where not all are."""
MODES = {"with O": "the output projection is given, the number of heads is not", "W alone": "only the number of heads is"}
SHOWN = ("SCEPTR_large", "h (q|k|v) d", "with O")
"""The case of which the page shows all hypotheses."""
BLOCK = 50
"""Controls to a line."""


class Group(NamedTuple):
    """All layers of a net in one layout. `kind`: the parts it has."""

    net: str
    layout: str
    mode: str
    kind: str = "q|k|v"

    def __call__(self) -> list[dict[str, Any]]:
        found, layers = [], []
        for layer in chosen(net_of(self.net)):
            verdict, seconds = judged(self, layer)
            found.append(verdict)
            layers.append({"layer": layer, "seconds": round(seconds, 3), **said(verdict, self), **rivals(verdict, self)})
        vote = pool(found)
        turn = None if vote.rotary is None else {**vote.rotary.to_dict(), "layers": vote.rotary.layers}
        shown = (self.net, self.layout, self.mode) == SHOWN
        ranked = [(str(one.layout), one.sizes.of(one.layout), one.qk, one.vo) for one in found[0].ranked] if shown else []
        whole = {"layers": layers, "vote": said(vote, self), "rotary": turn, "ranked": ranked}
        return [{"columns": int(net_of(self.net).layers[0]["q"].shape[1]), **self._asdict(), **whole}]


class Controls(NamedTuple):
    """Some of the controls of one name."""

    name: str
    start: int

    def __call__(self) -> list[dict[str, Any]]:
        cases = controls()[self.name][self.start : self.start + BLOCK]
        found = [(case, verdict) for case in cases if (verdict := case()) is not None and verdict.confidence == CONFIDENT]
        wrong = [[type(case).__name__, list(case), str(verdict.layout), round(verdict.evidence, 1)] for case, verdict in found]
        return [{"control": self.name, "start": self.start, "cases": len(cases), "wrong": wrong}]


def collect(jobs: int, quick: bool) -> list[dict[str, Any]]:
    """All lines of this version of the code; those that are missing are made, in `jobs` processes. quick: a seventh of them."""
    work: list[Group | Controls] = [*groups()]
    work += [Controls(name, start) for name, cases in controls().items() for start in range(0, len(cases), BLOCK)]
    random.Random(0).shuffle(work)
    if quick:
        work = work[::7]
    LINES.parent.mkdir(exist_ok=True)
    version = hashlib.sha256(b"".join((ROOT / "src" / "triptych" / f"{name}.py").read_bytes() for name in CODE)).hexdigest()[:12]
    there = [line for line in map(json.loads, LINES.read_text().splitlines()) if line["code"] == version] if LINES.exists() else []
    done = {line["key"] for line in there}
    missing = [one for one in work if repr(one) not in done]
    with LINES.open("a") as out, get_context("fork").Pool(jobs) as workers:
        for i, made in enumerate(workers.imap_unordered(_made, missing)):
            for line in made:
                there.append({"code": version, **line})
                out.write(json.dumps(there[-1]) + "\n")
            out.flush()
            if i % 20 == 19:
                print(f"{i + 1} of {len(missing)}", flush=True)
    wanted = {repr(one) for one in work}
    return [line for line in there if line["key"] in wanted]


def _made(one: Group | Controls) -> list[dict[str, Any]]:
    return [{"key": repr(one), **line} for line in one()]


def groups() -> Iterator[Group]:
    """Every net in every layout."""
    for net in weights.nets():
        for layout in ONE_TO_ONE if net.heads == net.kv_heads else (*GROUPED, *WITH_O):
            yield from (Group(net.name, layout, mode) for mode in MODES if mode == "with O" or layout not in WITH_O)
        if net.name == "smollm2":
            yield from (Group(net.name, layout, "with Q and O", "k|v") for layout in KEY_VALUE)
            yield from (Group(net.name, layout, mode, "gate|up") for layout in MLP for mode in ("with down", "alone"))


def net_of(name: str) -> weights.Net:
    return next(net for net in weights.nets() if net.name == name)


def chosen(net: weights.Net) -> tuple[int, ...]:
    return LAYERS.get(net.name, tuple(range(len(net.layers))))


def sizes(net: weights.Net, layout: str) -> dict[str, int]:
    axes = tt.Layout(layout).axes
    known = {"h": net.heads, "g": net.kv_heads, "d": net.head_dim, "r": net.heads // net.kv_heads}
    if layout in BLOCKS:
        known |= {"t": BLOCKS[layout], "n": net.heads // BLOCKS[layout]}
    if "f" in axes:
        known |= {"f": len(net.layers[0]["up"]) // (BLOCKS[layout] if "t" in axes else 1)}
    return {axis: known[axis] for axis in axes}


def fused(net: weights.Net, layer: int, layout: str) -> np.ndarray:
    """[rows, in] of a layer in a layout."""
    table = net.layers[layer]
    if "gate" in layout:
        whole = np.concatenate([table["gate"], table["up"]])
        return tt.repack(whole, "(gate|up) t f" if "t" in sizes(net, layout) else "(gate|up) f", layout, axis=0, **sizes(net, layout))
    names = "kv" if "q" not in layout else "qkv"
    tensors = {name: table[name].reshape(-1, net.head_dim, table[name].shape[1]).transpose(2, 0, 1) for name in names}
    return np.ascontiguousarray(tt.fuse(tensors, layout, **sizes(net, layout)).T)


def judged(group: Group, layer: int) -> tuple[Verdict, float]:
    """The verdict on one layer, and its CPU seconds."""
    net = net_of(group.net)
    table, weight = net.layers[layer], fused(net, layer, group.layout)
    start = time.process_time()
    if group.kind == "gate|up":
        found = detect(weight, table["down"] if group.mode == "with down" else None, parts=group.kind)
    elif group.kind == "k|v":
        found = detect(weight, table["o"], parts=group.kind, q=table["q"])
    elif group.mode == "with O":
        found = detect(weight, table["o"])
    else:
        found = detect(weight, heads=net.heads)
    return found, time.process_time() - start


def said(found: Verdict, group: Group) -> dict[str, Any]:
    best = str(found.ranked[0].layout) if found.ranked else None
    right = is_right(found, net_of(group.net), group.layout)
    reason = found.reasons[0] if found.reasons and found.confidence != CONFIDENT else ""
    return {"confidence": found.confidence, "right": right, "lead": round(found.evidence, 1), "best": best, "reason": reason}


def is_right(found: Verdict, net: weights.Net, layout: str) -> bool:
    """Whether the best layout is the true one, heads included where a number of heads is told."""
    if not found.ranked or not _same(found.ranked[0].layout, found.ranked[0].sizes, net, layout):
        return False
    told = found.sizes or {}
    return all(told.get(axis, number) == number for axis, number in (("h", net.heads), ("g", net.kv_heads)))


def _same(found: tt.Layout, bound: tt.Sizes, net: weights.Net, layout: str) -> bool:
    return rows(found, bound) == _true_rows(net.name, layout)


@cache
def _true_rows(net: str, layout: str) -> dict[str, bytes]:
    return rows(tt.Layout(layout), tt.bind(layout, **sizes(net_of(net), layout)))


def rows(layout: tt.Layout, bound: tt.Sizes) -> dict[str, bytes]:
    return {part.path.names[0]: part.rows().tobytes() for part in parts(layout, bound)}


def rivals(found: Verdict, group: Group) -> dict[str, Any]:
    """Nats of the true layout, where it was weighed, and of the best one that sets other rows side by side."""
    net = net_of(group.net)
    true = next((one for one in found.ranked if _same(one.layout, one.sizes, net, group.layout)), None)
    if true is None:
        return {"true": None, "other": None}
    others = (one.nats for one in found.ranked if one.alignment != true.alignment and one.clique != true.clique)
    return {"true": round(true.nats, 1), "other": round(max(others, default=0.0), 1)}


# What nothing may be said of


class Untrained(NamedTuple):
    seed: int

    def __call__(self) -> Verdict:
        """Plain; uniform; parts of other scales; rows with a common direction; heads of other scales; with O, or the heads known."""
        rng = np.random.default_rng(self.seed)
        d = (32, 32, 32, 48, 64)[self.seed % 5]
        weight, o = rng.standard_normal((3 * d, d), np.float32), rng.standard_normal((d, d), np.float32)
        kind = self.seed // 5 % 5
        if kind == 1:
            weight, o = rng.uniform(-1, 1, weight.shape).astype(np.float32), rng.uniform(-1, 1, o.shape).astype(np.float32)
        elif kind == 2:
            weight[:d] *= 3
            weight[2 * d :] *= 0.5
        elif kind == 3:
            weight += 0.5 * rng.standard_normal((1, d), np.float32)
            o += 0.5 * rng.standard_normal((d, 1), np.float32)
        elif kind == 4:
            scale = rng.gamma(2, 1, (3 * d // 8, 1, 1)).astype(np.float32)
            weight = (weight.reshape(-1, 8, d) * scale).reshape(weight.shape)
        return detect(weight, heads=d // 8) if self.seed % 3 == 0 else detect(weight, o)


class Shuffled(NamedTuple):
    seed: int

    def __call__(self) -> Verdict:
        net = _wide()[self.seed % len(_wide())]
        layer = self.seed // len(_wide()) % len(net.layers)
        weight = fused(net, layer, "(q|k|v) h d")[np.random.default_rng(self.seed).permutation(3 * net.heads * net.head_dim)]
        return detect(weight, heads=net.heads) if self.seed % 3 == 0 else detect(weight, net.layers[layer]["o"])


class Foreign(NamedTuple):
    """The output projection of another layer. None where the best layout is the true one all the same."""

    net: str
    layer: int
    step: int

    def __call__(self) -> Verdict | None:
        net = net_of(self.net)
        layout = (ONE_TO_ONE if net.heads == net.kv_heads else GROUPED)[self.layer % 6]
        found = detect(fused(net, self.layer, layout), net.layers[(self.layer + self.step) % len(net.layers)]["o"])
        return None if is_right(found, net, layout) else found


class Outside(NamedTuple):
    """A layout that is not compared."""

    net: str
    layer: int
    layout: str
    with_o: bool

    def __call__(self) -> Verdict:
        net = net_of(self.net)
        weight = fused(net, self.layer, self.layout)
        return detect(weight, net.layers[self.layer]["o"]) if self.with_o else detect(weight, heads=net.heads)


def _wide() -> list[weights.Net]:
    return [net for net in weights.nets() if 32 <= net.layers[0]["q"].shape[1] <= 128]


def _some(step: int = 1) -> list[tuple[weights.Net, int]]:
    """Nets and layers, few of the large ones."""
    return [(net, i) for net in weights.nets() for i in range(len(net.layers)) if len(net.layers) <= 4 or i % 4 == step]


@cache
def controls() -> dict[str, list[Callable[[], Verdict | None]]]:
    outside = [(net, layer, layout) for net, layer in _some() for layout in (OUTSIDE if net.heads == net.kv_heads else OUTSIDE_GROUPED)]
    return {
        "random initialisations, 32 to 64 columns": [Untrained(seed) for seed in range(5000)],
        "real rows, shuffled": [Shuffled(seed) for seed in range(500)],
        "O of another layer (confident and wrong of W)": [Foreign(net.name, i, step) for net, i in _some() for step in (1, 2)],
        "layouts that are not compared, with O": [Outside(net.name, *rest, True) for net, *rest in outside],
        OUTSIDE_ALONE: [Outside(net.name, *rest, False) for net, *rest in outside[::3]],
    }


OUTSIDE_ALONE = "layouts that are not compared, W alone"
"""The control that is known to fail: without O nothing tells that the true layout is missing."""
