"""Evidence for every layout that fits -> which one it is and how sure, or "cannot tell". docs/detection.md measures the thresholds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from .hypotheses import GATE_UP, KV, QKV, Hypothesis, hypotheses
from .layout import Layout
from .rotary import Rotary
from .sizes import Sizes

CONFIDENT, WEAK, UNKNOWN = "confident", "weak", "cannot tell"
MIN_COLUMNS = 32
MIN_LEAD, MIN_RATIO, MIN_EACH, MIN_LAW = 16.0, 1.3, 6.0, 6.0
"""Nats ahead of the runner-up, times as many as it, nats of q against k and of v against o alone, and nats by norms alone."""
NARROW = 64
"""Columns with which the cosines of v and o may say nothing, and norms and heads tell the order of v instead."""
MIN_QK = 12.0
"""Nats of q against k where o says more: the likeness of any two rows of one head is worth some."""
MIN_LAW_AGAINST = 18.0
"""Nats by norms alone, where the other statistics would rather have another row for k."""
MIN_APART = 1.1
"""The same ratio for layouts that set the same rows side by side: a head dim shares much with its half and double."""
MIN_FORMED = 12.0
"""Nats that one way to form heads must explain more than another."""
MIN_HEADS = 4
"""Heads that a size must make to be told: two or three are no more than steps."""
MIN_SIZE_RATIO = 1.5
"""Times as many nats as the next head size: one that is a multiple of the true one explains much of the same."""
MAX_UNMATCHED = 8.0
"""Times as many nats as a layout has, that forming heads may explain: more is likeness of rows that the layout does not match."""
NOTABLE = 0.25
"""Without o, a layout with this share of what is believed of the best one's q against k is asked for its norms too."""
LAW_TIMES, DOUBTED = 8.0, 0.125
"""Where query heads share a kv head they resemble each other, too: q against k counts up to so many times what norms say for this k, and
this share of it besides."""
MIN_LAYERS = 4
"""Layers that must be pooled before fewer kv heads than query heads are believed without an output projection or a number of heads."""
SHOWN = 5


class Case(NamedTuple):
    """What was looked at. Verdicts of one case can be pooled."""

    rows: int
    columns: int
    width: int | None
    heads: int | None
    kv_heads: int | None
    kind: str = QKV
    apart: bool = False
    """Whether q was given apart."""


class Ranked(NamedTuple):
    """One layout with its evidence in nats: q against k, v against o; for gate and up, gate against up and up against down.

    law: by norms. order: what else tells the order of v's rows: norms of v and o, heads whose rows do not repeat each other. heads: what
    forming heads in this way explains, for each size. Equal numbers of `alignment` mean the same rows of q, k and v side by side; of
    `outputs`, the same rows of v and columns of o; of `clique`, the same but for who is k among q and k.
    """

    hypothesis: Hypothesis
    qk: float
    vo: float
    law: float
    alignment: int
    outputs: int
    clique: int
    heads: tuple[tuple[int, float], ...] = ()
    order: float = 0.0

    @property
    def layout(self) -> Layout:
        return self.hypothesis.layout

    @property
    def sizes(self) -> Sizes:
        return self.hypothesis.sizes

    @property
    def believed(self) -> float:
        """Nats of q against k, as far as the norms bear them out where several query heads might be k."""
        return self.qk if self.hypothesis.ratio == 1 else min(self.qk, LAW_TIMES * self.law + DOUBTED * self.qk)

    @property
    def nats(self) -> float:
        return self.believed + self.vo

    @property
    def placed(self) -> float:
        """What O says of the order of rows."""
        return self.vo + self.order

    @property
    def formed(self) -> float:
        """Nats that the likeliest heads explain."""
        return max((nats for _, nats in self.heads), default=0.0)

    def above(self, other: Ranked) -> tuple[float, float]:
        """What tells it from another that sets the same rows side by side, and the other from it: o, and heads where o agrees."""
        return self.placed + max(self.formed - other.formed, 0.0), other.placed

    def plus(self, other: Ranked) -> Ranked:
        """Of two layers together."""
        heads = dict(self.heads)
        for d, nats in other.heads:
            heads[d] = heads.get(d, 0.0) + nats
        sums = self.qk + other.qk, self.vo + other.vo, self.law + other.law
        return Ranked(self.hypothesis, *sums, self.alignment, self.outputs, self.clique, tuple(heads.items()), self.order + other.order)

    def to_dict(self) -> dict[str, Any]:
        told = {"layout": str(self.layout), "sizes": {axis: self.sizes[axis] for axis in self.layout.axes}}
        return {**told, "nats": round(self.nats, 1), "qk": round(self.qk, 1), "vo": round(self.vo, 1), "law": round(self.law, 1)}


@dataclass(frozen=True)
class Verdict:
    """What weights say of their layout.

    `layout` and `sizes` are None when it cannot be told; `sizes` also when only the order of the parts can. `evidence` is how many nats
    the answer is ahead of the runner-up. `ranked` has the layouts that were weighed, the best first. `rotary` is the order of rotary
    pairs, where q and k could be told apart and the weights show one.
    """

    layout: Layout | None
    sizes: Sizes | None
    confidence: str
    evidence: float
    ranked: tuple[Ranked, ...] = field(repr=False)
    reasons: tuple[str, ...]
    case: Case
    layers: int = 1
    rotary: Rotary | None = None

    def to_dict(self) -> dict[str, Any]:
        sizes = None if self.layout is None or self.sizes is None else {axis: self.sizes[axis] for axis in self.layout.axes}
        return {
            "layout": None if self.layout is None else str(self.layout),
            "sizes": sizes,
            "confidence": self.confidence,
            "evidence": round(self.evidence, 1),
            "rotary": None if self.rotary is None else self.rotary.to_dict(),
            "layers": self.layers,
            "ranked": [one.to_dict() for one in self.ranked[:SHOWN]],
            "reasons": list(self.reasons),
        }

    def __str__(self) -> str:
        said = "" if self.layout is None else f"{self.layout}  " + (f"{self.sizes.of(self.layout)}  " if self.sizes is not None else "")
        of = f" of {self.layers} layers" if self.layers > 1 else ""
        lines = [said + self.confidence + (f": {self.evidence:.0f} nats{of} ahead" if self.layout else "")]
        first, second = ("gate-up", "up-down") if self.case.kind == GATE_UP else ("q-k", "v-o")
        lines += [f"{one.nats:10.0f} nats  {one.layout}   {first} {one.qk:.0f}, {second} {one.vo:.0f}" for one in self.ranked[:2]]
        lines += [f"  {reason}" for reason in self.reasons]
        return "\n".join([*lines, *([f"  {self.rotary}"] if self.rotary is not None else [])])


def decide(ranked: Sequence[Ranked], case: Case, layers: int) -> Verdict:
    """The rule.

    The best set of rows that belong together wins; norms say which of them is k (or up). Two layouts are compared by what they
    differ in: those that agree on v and o by q against k alone, those that set the same rows side by side by how they form heads and by o.
    """
    if not ranked:
        width = "" if case.width is None else f" beside an output projection of {case.width} columns"
        parts = "gate and up" if case.kind == GATE_UP else "k and v" if case.kind == KV else "q, k and v"
        return Verdict(None, None, UNKNOWN, 0.0, (), (f"no layout of {parts} has {case.rows} rows{width}",), case, layers)
    top = max(ranked, key=lambda one: one.nats)
    choices = _choices(ranked, top.clique)
    best = choices[0]
    ordered = (best, *sorted((one for one in ranked if one is not best), key=lambda one: -one.nats))
    doubts, lead = _doubts(best, top, ordered[1:], case, layers)
    if doubts:
        return Verdict(None, None, UNKNOWN, lead, ordered, tuple(doubts), case, layers)
    weak = _weak(choices, ordered[1:], case, MIN_LAW if top.alignment == best.alignment else MIN_LAW_AGAINST)
    hypothesis, known, told = head_dim(best, case)
    reasons = [*weak, *told]
    if case.kind == QKV and hypothesis.ratio == 1:
        reasons.append("q and k have one size and one role in the loss: that q comes first is a convention")
    sizes = hypothesis.sizes if known else None
    return Verdict(hypothesis.layout, sizes, WEAK if weak else CONFIDENT, lead, ordered, tuple(reasons), case, layers)


def _choices(ranked: Sequence[Ranked], clique: int) -> list[Ranked]:
    """For every choice of k (or up) among rows that belong together the likeliest heads, unless o says otherwise; the best first."""
    alike: dict[int, list[Ranked]] = {}
    for one in ranked:
        if one.clique == clique:
            alike.setdefault(one.alignment, []).append(one)
    found = []
    for some in alike.values():
        placed = max(one.placed for one in some) - MIN_LEAD
        found.append(max((one for one in some if one.placed > placed), key=lambda one: one.placed + one.formed))
    return sorted(found, key=lambda one: -one.law)


def _doubts(best: Ranked, top: Ranked, rivals: Sequence[Ranked], case: Case, layers: int) -> tuple[list[str], float]:
    """Why it cannot be told, and the nats of the lead over the nearest rival."""
    lead, ratio, near = math.inf, math.inf, best
    for one in rivals:
        if one.alignment == best.alignment:
            ours, theirs = best.above(one)
        elif one.clique == best.clique:
            continue
        elif one.outputs == best.outputs:
            ours, theirs = top.believed, one.believed
        else:
            ours, theirs = top.nats, one.nats
        if ours - theirs < lead:
            lead, near = ours - theirs, one
        times = MIN_RATIO / MIN_APART if one.alignment == best.alignment else 1.0
        ratio = min(ratio, times * ours / theirs if theirs > 0 else math.inf)
    lead = min(lead, top.nats)
    doubts = []
    if case.columns < MIN_COLUMNS:
        doubts.append(f"{case.columns} columns are too few: with less than {MIN_COLUMNS} untrained weights can look trained")
    if lead <= MIN_LEAD:
        doubts.append(f"the best layout is {max(lead, 0.0):.0f} nats ahead of {near.layout}, and {MIN_LEAD:.0f} are needed")
    elif ratio <= MIN_RATIO:
        doubts.append(f"the best layout has {ratio:.2f} times the nats of another, and {MIN_RATIO} times are needed")
    if case.kind == QKV and case.width is None and best.hypothesis.ratio > 1:
        law = max((one.law for one in rivals if one.alignment != best.alignment and one.believed > NOTABLE * best.believed), default=0.0)
        if law > best.law + MIN_LAW:
            doubts.append(f"the norms of another layout agree better, by {law - best.law:.0f} nats")
        if any(one.clique != best.clique and one.qk * one.law > best.qk * best.law for one in rivals):
            doubts.append("another layout has more from q against k, and not much less from norms")
    if case.kind == QKV and case.width is None and case.heads is None and best.hypothesis.ratio > 1 and layers < MIN_LAYERS:
        doubts.append(f"fewer kv heads than query heads: give the output projection, the number of heads, or {MIN_LAYERS} layers to pool")
    return doubts, lead


def _weak(choices: Sequence[Ranked], rivals: Sequence[Ranked], case: Case, needed: float) -> list[str]:
    """Why it is not to be acted upon."""
    best, reasons = choices[0], []
    law = max((one.law for one in choices[1:]), default=-math.inf)
    if best.law - law < (MIN_LAW if case.kind == GATE_UP else needed):
        which = "gate from up" if case.kind == GATE_UP else "k from a query head"
        reasons.append(f"norms tell {which} by {max(best.law - law, 0.0):.0f} nats only, and {needed:.0f} are needed")
    pairs = [("gate against up", best.qk, MIN_EACH), ("up against down", best.vo, MIN_EACH)] if case.kind == GATE_UP else []
    pairs = pairs or [("q against k", best.qk, MIN_QK), ("v against o", best.placed if case.columns <= NARROW else best.vo, MIN_EACH)]
    if case.columns > NARROW and best.hypothesis.ratio > 1:
        pairs.append(("the order of v", best.order, MIN_EACH))
    if case.kind == QKV and case.width is not None:
        reasons += _outside(best, rivals)
    if case.kind != QKV or case.width is not None:
        said, nats, least = min(pairs, key=lambda pair: pair[1] / pair[2])
        if nats < least:
            reasons.append(f"{said} says only {nats:.0f} nats where {least:.0f} are needed: the layout may not be among those compared")
    return reasons


def _outside(best: Ranked, rivals: Sequence[Ranked]) -> list[str]:
    """Signs that the true layout is not among those compared: parts of it fit one of them, other parts another."""
    reasons = []
    alike = [one for one in rivals if one.alignment == best.alignment and not _halves(one.hypothesis, best.hypothesis)]
    formed = max((one.formed for one in alike), default=0.0)
    if formed > best.formed + MIN_FORMED and formed > MIN_RATIO * best.formed:
        reasons.append(f"v and o form heads in one way, q and k in another that explains {formed - best.formed:.0f} nats more")
    if (other := max((one.believed for one in rivals if one.clique != best.clique), default=0.0)) > best.believed:
        reasons.append(f"q against k says {best.believed:.0f} nats, and for another layout {other:.0f}")
    if best.formed > MAX_UNMATCHED * (best.qk + best.vo):
        said = f"heads explain {best.formed:.0f} nats, and the layout only {best.qk + best.vo:.0f}"
        reasons.append(f"{said}: it may not be among those compared")
    return reasons


def _halves(one: Hypothesis, other: Hypothesis) -> bool:
    """Whether heads of one are parts of the other's, as the two halves of a rotated head are."""
    return bool(one.d and other.d) and one.layout == other.layout and other.d % one.d == 0


def head_dim(best: Ranked, case: Case) -> tuple[Hypothesis, bool, list[str]]:
    """The layout with the head dim that the weights tell, whether they tell one, and why."""
    found = best.hypothesis
    if found.d or case.kind == GATE_UP:
        return found, True, []
    order = sorted(best.heads, key=lambda one: -one[1])
    (d, first), (other_d, second) = (*order, (0, 0.0), (0, 0.0))[:2]
    reading = found.reading()
    if first - second > MIN_FORMED and first > MIN_SIZE_RATIO * second and len(reading.k) >= MIN_HEADS * d:
        for other in hypotheses(case.rows, case.width, len(reading.k) // d, kind=case.kind):
            found_so = other.reading()
            if all(np.array_equal(a, b) for a, b in ((found_so.k, reading.k), (found_so.v, reading.v), (found_so.o, reading.o))):
                return other, True, [f"heads of {d} rows explain {first:.0f} nats, of {other_d} rows {second:.0f}"]
    return found, False, ["the size of the heads cannot be told" + (f"; {d} rows is the likeliest" if d else "")]
