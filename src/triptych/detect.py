"""Trained weights -> which layout their rows have, with the evidence, or "cannot tell". The statistics are in evidence.py."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from .errors import LayoutError, SizeError
from .evidence import COLUMNS, TINY, Evidence, Floats
from .hypotheses import Hypothesis, hypotheses
from .layout import Layout
from .sizes import Sizes

CONFIDENT, WEAK, UNKNOWN = "confident", "weak", "cannot tell"
MIN_COLUMNS = 32
MIN_LEAD, MIN_RATIO, MIN_EACH = 12.0, 1.3, 6.0
"""Nats ahead of the runner-up, times as many as it, and nats of q against k and of v against o alone."""
MIN_LAYERS = 4
"""Layers that must be pooled before fewer kv heads than query heads are believed without an output projection or a number of heads."""
SMALL_BIAS = 0.1
"""Without rotary embedding training does not move k's bias. When one bias is so much smaller than the other, it is k's."""
SHOWN = 5


class Case(NamedTuple):
    """What was looked at. Verdicts of one case can be pooled."""

    rows: int
    columns: int
    width: int | None
    heads: int | None
    kv_heads: int | None


class Ranked(NamedTuple):
    """One layout with its evidence in nats: q against k, v against o; and what its numbering of heads explains, for each head dim tried."""

    hypothesis: Hypothesis
    qk: float
    vo: float
    heads: tuple[float, ...]
    alignment: int

    @property
    def layout(self) -> Layout:
        return self.hypothesis.layout

    @property
    def sizes(self) -> Sizes:
        return self.hypothesis.sizes

    @property
    def nats(self) -> float:
        return self.qk + self.vo

    @property
    def apart(self) -> float:
        """What tells it from others of the same alignment."""
        return self.vo + max(self.heads)

    def to_dict(self) -> dict[str, Any]:
        told = {"layout": str(self.layout), "sizes": {axis: self.sizes[axis] for axis in self.layout.axes}}
        return {**told, "nats": round(self.nats, 1), "qk": round(self.qk, 1), "vo": round(self.vo, 1)}


@dataclass(frozen=True)
class Verdict:
    """What weights say of their layout.

    `layout` and `sizes` are None when it cannot be told; `sizes` also when only the order of the parts can. `evidence` is how many nats
    the answer is ahead of the runner-up. `ranked` has every layout that fits, the best first.
    """

    layout: Layout | None
    sizes: Sizes | None
    confidence: str
    evidence: float
    ranked: tuple[Ranked, ...] = field(repr=False)
    reasons: tuple[str, ...]
    case: Case
    layers: int = 1

    def to_dict(self) -> dict[str, Any]:
        sizes = None if self.layout is None or self.sizes is None else {axis: self.sizes[axis] for axis in self.layout.axes}
        return {
            "layout": None if self.layout is None else str(self.layout),
            "sizes": sizes,
            "confidence": self.confidence,
            "evidence": round(self.evidence, 1),
            "layers": self.layers,
            "ranked": [one.to_dict() for one in self.ranked[:SHOWN]],
            "reasons": list(self.reasons),
        }

    def __str__(self) -> str:
        said = "" if self.layout is None else f"{self.layout}  " + (f"{self.sizes.of(self.layout)}  " if self.sizes is not None else "")
        of = f" of {self.layers} layers" if self.layers > 1 else ""
        lines = [said + self.confidence + (f": {self.evidence:.0f} nats{of} ahead" if self.layout else "")]
        lines += [f"{one.nats:10.0f} nats  {one.layout}   q-k {one.qk:.0f}, v-o {one.vo:.0f}" for one in self.ranked[:2]]
        return "\n".join([*lines, *(f"  {reason}" for reason in self.reasons)])


def detect(weight: Any, o: Any = None, bias: Any = None, heads: int | None = None, kv_heads: int | None = None, axis: int = 0) -> Verdict:
    """Which layout a fused q, k, v weight has, by its values alone.

    Args:
        weight: [rows, in], or with axis=1 [in, rows]; NumPy or torch, of any float dtype.
        o: the output projection of the same layer, [out, h * d], or with axis=1 [h * d, out]. With it no number of heads is needed.
        bias: [rows]; only tells q from k where they have the same size.
        heads, kv_heads: how many, where known.
    Returns: a verdict: "confident", "weak" (shown, not to be acted upon) or "cannot tell".
    Raises LayoutError for tensors that are no matrices, SizeError for a bias of another length.
    """
    for name, tensor in (("weight", weight), ("o", o)):
        if tensor is not None and len(tensor.shape) != 2:
            raise LayoutError("statistics need a matrix", tensor=name, found=f"shape {tuple(tensor.shape)}", expected="two axes")
    rows, columns = int(weight.shape[axis]), int(weight.shape[1 - axis])
    if bias is not None and tuple(bias.shape) != (rows,):
        raise SizeError("the bias does not belong to the weight", expected=f"({rows},)", found=str(tuple(bias.shape)))
    case = Case(rows, columns, None if o is None else int(o.shape[1 - axis]), heads, kv_heads)
    picked = _pick(columns)
    matrix = _sample(weight, axis, picked)
    out = None if o is None else _sample(o, 1 - axis, picked if int(o.shape[axis]) == columns else _pick(int(o.shape[axis])))
    if not np.isfinite(matrix).all() or (out is not None and not np.isfinite(out).all()):
        return Verdict(None, None, UNKNOWN, 0.0, (), ("the weights hold NaN or infinity",), case)
    evidence = Evidence(matrix, out, o is None or int(o.shape[axis]) == columns)
    ranked, groups = [], dict[bytes, int]()
    for hypothesis in hypotheses(rows, case.width, heads, kv_heads):
        reading = hypothesis.reading()
        nats = evidence.of(reading)
        ranked.append(Ranked(hypothesis, nats.qk, nats.vo, nats.heads, groups.setdefault(reading.alignment, len(groups))))
    verdict = _decide(ranked, case, 1)
    return verdict if bias is None else _by_bias(verdict, _floats(bias))


def pool(verdicts: Iterable[Verdict]) -> Verdict:
    """One verdict for layers of one model that all have the same layout: their evidence is added up.

    Raises LayoutError for no verdict, or verdicts over weights of different shapes.
    """
    layers = list(verdicts)
    cases = {verdict.case for verdict in layers}
    if len(cases) != 1:
        found = "; ".join(f"{case.rows} x {case.columns}" for case in sorted(cases, key=str)) or "none"
        raise LayoutError("only verdicts over weights of one shape can be pooled", found=found)
    sums: dict[Hypothesis, Ranked] = {}
    for verdict in layers:
        for one in verdict.ranked:
            before = sums.get(one.hypothesis)
            if before is not None:
                heads = tuple(a + b for a, b in zip(before.heads, one.heads, strict=True))
                one = one._replace(qk=before.qk + one.qk, vo=before.vo + one.vo, heads=heads)
            sums[one.hypothesis] = one
    return _decide(list(sums.values()), layers[0].case, len(layers))


def _decide(ranked: Sequence[Ranked], case: Case, layers: int) -> Verdict:
    """The rule. Layouts of one alignment share its nats of q against k, and are told apart by v against o and by the numbering of heads."""
    if not ranked:
        width = "" if case.width is None else f" beside an output projection of {case.width} columns"
        return Verdict(None, None, UNKNOWN, 0.0, (), (f"no layout of q, k and v has {case.rows} rows{width}",), case, layers)
    ordered = _ordered(ranked)
    best = ordered[0]
    rival = max((one.nats for one in ordered if one.alignment != best.alignment), default=0.0)
    mate = max((one.apart for one in ordered[1:] if one.alignment == best.alignment), default=-math.inf)
    lead = min(best.nats - rival, best.apart - mate)
    doubts = _doubts(best, rival, lead, case, layers)
    if doubts:
        return Verdict(None, None, UNKNOWN, lead, ordered, tuple(doubts), case, layers)
    confidence, reasons = CONFIDENT, []
    if case.width is not None and min(best.qk, best.vo) < MIN_EACH:
        pair, nats = ("q against k", best.qk) if best.qk < best.vo else ("v against o", best.vo)
        confidence = WEAK
        reasons.append(f"{pair} says only {nats:.0f} nats where {MIN_EACH:.0f} are needed: the true layout may not be among those compared")
    hypothesis, known = _head_dim(best, case, reasons)
    if _equal_size(hypothesis):
        reasons.append("q and k have one size and one role in the loss: that q comes first is a convention")
    return Verdict(hypothesis.layout, hypothesis.sizes if known else None, confidence, lead, ordered, tuple(reasons), case, layers)


def _ordered(ranked: Sequence[Ranked]) -> tuple[Ranked, ...]:
    """The best alignment first, and in it the best layout."""
    qk: dict[int, float] = {}
    for one in ranked:
        qk[one.alignment] = max(one.qk, qk.get(one.alignment, -math.inf))
    lifted = [one._replace(qk=qk[one.alignment]) for one in ranked]
    group: dict[int, float] = {}
    for one in lifted:
        group[one.alignment] = max(one.nats, group.get(one.alignment, -math.inf))
    return tuple(sorted(lifted, key=lambda one: (-group[one.alignment], one.alignment, -one.apart)))


def _doubts(best: Ranked, rival: float, lead: float, case: Case, layers: int) -> list[str]:
    doubts = []
    if case.columns < MIN_COLUMNS:
        doubts.append(f"{case.columns} columns are too few: with less than {MIN_COLUMNS} untrained weights can look trained")
    if lead <= MIN_LEAD:
        doubts.append(f"the best layout is {max(lead, 0.0):.0f} nats ahead of the next, and {MIN_LEAD:.0f} are needed")
    elif best.nats <= MIN_RATIO * rival:
        doubts.append(f"the best layout has {best.nats:.0f} nats and another {rival:.0f}: less than {MIN_RATIO} times as many")
    if case.width is None and case.heads is None and not _equal_size(best.hypothesis) and layers < MIN_LAYERS:
        doubts.append(f"fewer kv heads than query heads: give the output projection, the number of heads, or {MIN_LAYERS} layers to pool")
    return doubts


def _equal_size(hypothesis: Hypothesis) -> bool:
    return "r" not in hypothesis.layout.axes and not {"h", "g"} <= set(hypothesis.layout.axes)


def _head_dim(best: Ranked, case: Case, reasons: list[str]) -> tuple[Hypothesis, bool]:
    """The layout with the head dim that the weights tell, and whether they tell one."""
    if best.hypothesis.d:
        return best.hypothesis, True
    dims = best.hypothesis.dims
    order = sorted(range(len(dims)), key=lambda i: -best.heads[i])
    first, second = best.heads[order[0]], best.heads[order[1]] if len(order) > 1 else 0.0
    d = dims[order[0]]
    if first - second > MIN_LEAD and first > MIN_RATIO * second:
        same = best.hypothesis.reading().alignment
        for other in hypotheses(case.rows, case.width, case.rows // 3 // d):
            if _equal_size(other) and other.reading().alignment == same:
                reasons.append(f"heads of {d} rows explain {first:.0f} nats, of {dims[order[1]]} rows {second:.0f}")
                return other, True
    reasons.append(f"the size of the heads cannot be told; {d} rows is the likeliest")
    return best.hypothesis, False


def _by_bias(verdict: Verdict, bias: Floats) -> Verdict:
    """The verdict, with what the bias says of which is q and which is k where that is a convention."""
    if verdict.layout is None or not _equal_size(verdict.ranked[0].hypothesis):
        return verdict
    reading = verdict.ranked[0].hypothesis.reading()
    q, k = (float(np.sqrt((bias[rows] ** 2).mean())) for rows in (reading.q, reading.k))
    if min(q, k) >= SMALL_BIAS * max(q, k):
        return verdict
    agrees = "as named here" if k < q else "the other way round: what is called q here may be k"
    times = max(q, k) / (min(q, k) + TINY)
    return replace(verdict, reasons=(*verdict.reasons, f"one bias is {times:.0f} times smaller, as k's often is: {agrees}"))


def _pick(columns: int) -> list[int]:
    """Which columns are looked at: always the same ones."""
    if columns <= COLUMNS:
        return list(range(columns))
    found: list[int] = sorted(np.random.default_rng(0).choice(columns, COLUMNS, replace=False).tolist())
    return found


def _sample(tensor: Any, axis: int, columns: Sequence[int]) -> Floats:
    """[rows, columns] of a matrix whose packed axis is `axis`, less the mean row: what all rows share looks like a match."""
    picked = _floats(tensor[:, columns] if axis == 0 else tensor[columns])
    rows: Floats = np.ascontiguousarray(picked if axis == 0 else picked.T)
    rows = rows - rows.mean(axis=0)
    return rows


def _floats(tensor: Any) -> Floats:
    if not isinstance(tensor, np.ndarray) and hasattr(tensor, "detach"):
        tensor = tensor.detach().cpu().float().numpy()
    return np.asarray(tensor).astype(np.float32)
