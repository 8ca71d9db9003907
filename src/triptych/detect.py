"""Trained weights -> which layout their rows have, with the evidence, or "cannot tell".

evidence.py has the statistics, hypotheses.py the layouts that fit, verdict.py the rule. COLUMNS neighbouring columns of the weight are
looked at and a bounded number of rows of each part, so that the cost is O(rows * COLUMNS) to read and
O(hypotheses * WINDOWS * WINDOW^2 * COLUMNS) to judge, whatever the width: 2 s for 12288 x 4096 on one thread. Where more than
MANY are left, a smaller look drops all but the best, unless the weight itself is as small.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from .errors import LayoutError, SizeError
from .evidence import COLUMNS, TINY, Evidence, Floats, Reading
from .head_size import LOOK, Likeness, shuns
from .hypotheses import GATE_UP, KV, ORDERS, QKV, Hypothesis, head_dims, hypotheses
from .rotary import Rotary, rotary
from .rowmap import Rows
from .verdict import CONFIDENT, UNKNOWN, WEAK, Case, Ranked, Verdict, decide

__all__ = ["CONFIDENT", "GATE_UP", "KV", "ORDERS", "QKV", "UNKNOWN", "WEAK", "Verdict", "detect", "pool"]

LIKELY = 3
"""Ways to set rows side by side for which forming heads is looked at."""
MANY = 32
"""Ways to set rows side by side that are looked at closely."""
SMALL_COLUMNS, SMALL_WINDOW, SMALL_WINDOWS = 96, 128, 2
SMALL_BIAS = 0.1
"""Without rotary embedding training does not move k's bias. When one bias is so much smaller than the other, it is k's."""


def detect(
    weight: Any,
    o: Any = None,
    bias: Any = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    axis: int = 0,
    *,
    parts: str = QKV,
    q: Any = None,
    **sizes: int,
) -> Verdict:
    """Which layout a fused weight has, by its values alone.

    Args:
        weight: [rows, in], or with axis=1 [in, rows]; NumPy or torch, of any float dtype.
        o: the output projection of the same layer, [out, h * d], or with axis=1 [h * d, out]. With it no number of heads is needed.
            For gate and up: the down projection.
        bias: [rows]; only tells q from k where they have the same size.
        heads, kv_heads: how many, where known.
        parts: "q|k|v", "k|v" or "gate|up".
        q: for "k|v", the query projection, [h * d, in], or with axis=1 [in, h * d].
    Returns: a verdict: "confident", "weak" (shown, not to be acted upon) or "cannot tell".
    Raises LayoutError for tensors that are no matrices or parts of another name, SizeError for a bias of another length and for `sizes`: a
        layout is what is asked for, and has no axes yet.
    """
    if sizes:
        try_ = ", ".join(f"{word}={sizes[axis]}" for axis, word in (("h", "heads"), ("g", "kv_heads")) if axis in sizes)
        found = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
        raise SizeError("detect takes heads and kv_heads, no sizes of axes", found=found, try_=try_ or "heads=12, kv_heads=4")
    for name, tensor in (("weight", weight), ("o", o), ("q", q)):
        if tensor is not None and not hasattr(tensor, "shape"):
            raise LayoutError("this is no tensor", tensor=name, found=type(tensor).__name__, expected="a NumPy array or a torch tensor",
                              try_="tt.detect_checkpoint(PATH) reads a file")  # fmt: skip
        if tensor is not None and len(tensor.shape) != 2:
            raise LayoutError("statistics need a matrix", tensor=name, found=f"shape {tuple(tensor.shape)}", expected="two axes")
    rows, columns = int(weight.shape[axis]), int(weight.shape[1 - axis])
    if bias is not None and tuple(bias.shape) != (rows,):
        raise SizeError("the bias does not belong to the weight", expected=f"({rows},)", found=str(tuple(bias.shape)))
    width = None if o is None else int(o.shape[1 - axis])
    if q is not None and (int(q.shape[1 - axis]) != columns or width not in (None, int(q.shape[axis]))):
        raise SizeError("q does not belong to the weight", expected=f"{width or 'any'} rows of {columns}", found=str(tuple(q.shape)))
    case = Case(rows, columns, width if q is None else int(q.shape[axis]), heads, kv_heads, parts, q is not None)
    matrix = _sample(weight, axis)
    out, query = (None if one is None else _sample(one, on) for one, on in ((o, 1 - axis), (q, axis)))
    if not all(one is None or np.isfinite(one).all() for one in (matrix, out, query)):
        return Verdict(None, None, UNKNOWN, 0.0, (), ("the weights hold NaN or infinity",), case)
    evidence = Evidence(matrix, out, query, o is None or int(o.shape[axis]) == columns, parts == GATE_UP)
    ranked = _ranked(evidence, case)
    verdict = decide(ranked, case, 1)
    if verdict.ranked and parts != GATE_UP:
        verdict = replace(verdict, rotary=_rotary(evidence, verdict))
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
            sums[one.hypothesis] = sums[one.hypothesis].plus(one) if one.hypothesis in sums else one
    pooled = decide(list(sums.values()), layers[0].case, len(layers))
    turns = [verdict.rotary for verdict in layers if verdict.rotary is not None and verdict.layout in (None, pooled.layout)]
    together = turns[0] if turns else None
    for turn in turns[1:]:
        together = turn if together is None else together.plus(turn)
    return replace(pooled, rotary=together if pooled.layout is not None else None)


class _Way(NamedTuple):
    """A hypothesis, how it reads the rows, by head too where that is another order; and the numbers of Ranked by which it is compared."""

    hypothesis: Hypothesis
    reading: Reading
    by_head: Reading | None
    alignment: int
    outputs: int
    clique: int


@lru_cache(maxsize=4)
def _ways(case: Case) -> tuple[_Way, ...]:
    """All hypotheses, each reading once."""
    found = dict[bytes, _Way]()
    numbers: tuple[dict[bytes, int], ...] = ({}, {}, {})
    for hypothesis in hypotheses(case.rows, case.width, case.heads, case.kv_heads, case.kind):
        reading = by_head = _read(hypothesis, case.apart)
        if hypothesis.ratio == 1:  # so that all that set the same rows side by side share the statistics of q and k
            reading = _sorted(by_head, np.argsort(by_head.k))
        q, k, v, o, _ = _sorted(reading, np.argsort(reading.v))
        query = np.sort(q, axis=0) if q is not None and not case.apart else np.zeros((1, len(k)), np.int64)
        side, out = v.tobytes() + query.tobytes() + k.tobytes(), v.tobytes() + np.sort(o, axis=0).tobytes()
        both = np.sort(np.concatenate([query, k[None]]), axis=0) if case.kind != KV else k[None]
        group = both[:, np.argsort(both[0])].tobytes() if case.kind == GATE_UP else v.tobytes() + both.tobytes()
        sizes = str(query.shape).encode()  # the same rows in turn, but in other parts
        keys = (side + out + sizes, out + sizes, group + out + sizes) if case.apart else (side + sizes, out + sizes, group + sizes)
        ids = [table.setdefault(key, len(table)) for table, key in zip(numbers, keys, strict=True)]
        labels = by_head.k.tobytes() if hypothesis.d else b""
        other = None if np.array_equal(by_head.k, reading.k) else by_head
        found.setdefault(side + out + labels, _Way(hypothesis, reading, other, *ids))
    return tuple(found.values())


def _read(hypothesis: Hypothesis, apart: bool) -> Reading:
    """How a hypothesis reads the rows; without q where it is neither in the weight nor given apart."""
    reading = hypothesis.reading()
    return reading._replace(q=None) if hypothesis.kind == KV and not apart else reading


def _sorted(reading: Reading, order: Rows) -> Reading:
    q, k, v, o, d = reading
    return Reading(None if q is None else q[:, order], k[order], v[order], o[:, order], d)


def _ranked(evidence: Evidence, case: Case) -> list[Ranked]:
    ways = _ways(case)
    if len(ways) > MANY and max(len(evidence.weight) // 3 / SMALL_WINDOW, evidence.weight.shape[1] / SMALL_COLUMNS) > 1:
        o, query = (None if one is None else one[:, :SMALL_COLUMNS].copy() for one in (evidence.o, evidence.query))
        few = evidence.weight[:, :SMALL_COLUMNS].copy()
        quick = Evidence(few, o, query, evidence.shared, evidence.mlp, SMALL_WINDOW, SMALL_WINDOWS)
        nats = [quick.of(way.reading, way.by_head) for way in ways]
        best = dict.fromkeys(ways[i].alignment for i in sorted(range(len(ways)), key=lambda i: -nats[i].qk - nats[i].vo))
        kept = set(list(best)[:MANY])
        ways = tuple(way for way in ways if way.alignment in kept)
    ranked = [Ranked(way.hypothesis, *evidence.of(way.reading, way.by_head), way.alignment, way.outputs, way.clique) for way in ways]
    return ranked if case.kind == GATE_UP else _with_heads(evidence, ranked)


def _with_heads(evidence: Evidence, ranked: list[Ranked]) -> list[Ranked]:
    """With what forming heads explains, for the likeliest layouts and those that set the same rows side by side."""
    best = dict.fromkeys(one.alignment for one in sorted(ranked, key=lambda one: -one.nats))
    likeness = dict[int, Likeness]()
    out = []
    for one in ranked:
        if one.alignment in list(best)[:LIKELY]:
            reading = _read(one.hypothesis, evidence.query is not None)
            order = np.argsort(reading.k)
            if one.alignment not in likeness:
                likeness[one.alignment] = Likeness(Evidence(evidence.weight, None, evidence.query).rows(_sorted(reading, order), LOOK))
            heads = _heads(np.argsort(order), reading.d)
            explained = tuple((d, likeness[one.alignment].explains(rows)) for d, rows in heads.items())
            likely = max(explained, key=lambda pair: pair[1], default=(0, 0.0))[0]
            apart = shuns(evidence.weight[reading.v[order][:LOOK]], heads[likely]) if likely and evidence.o is not None else 0.0
            one = one._replace(order=evidence.norms(reading) + apart, heads=explained)
        out.append(one)
    return out


def _heads(places: Rows, d: int) -> dict[int, Rows]:
    """[heads, dims] positions among the first LOOK, for a head dim or all likely ones. places: of each dim of each head, by row."""
    stop, found = min(len(places), LOOK), {}
    for size in (d,) if d else tuple(dict.fromkeys((*head_dims(len(places)), len(places)))):
        rows = [np.sort(head[head < stop]) for head in places.reshape(-1, size)]
        length = max(map(len, rows))
        if length > 1:
            found[size] = np.stack([head for head in rows if len(head) == length])
    return found


def _rotary(evidence: Evidence, verdict: Verdict) -> Rotary | None:
    """The order of rotary pairs under the best layout, where its head dim is known."""
    hypothesis = verdict.ranked[0].hypothesis
    d, reading = hypothesis.d, hypothesis.reading()
    if not d and verdict.sizes is not None and "h" in verdict.sizes:
        d = len(reading.k) // verdict.sizes["h"]
    if not d or reading.q is None or (hypothesis.kind == KV and evidence.query is None) or len(reading.k) % d:
        return None
    query = evidence.weight if evidence.query is None else evidence.query
    q = query[reading.q].reshape(len(reading.q), -1, d, query.shape[1]).swapaxes(0, 1)
    return rotary(q, evidence.weight[reading.k].reshape(-1, d, query.shape[1]))


def _by_bias(verdict: Verdict, bias: Floats) -> Verdict:
    """The verdict, with what the bias says of which is q and which is k where that is a convention."""
    if verdict.layout is None or verdict.case.kind != QKV or verdict.ranked[0].hypothesis.ratio > 1:
        return verdict
    reading = verdict.ranked[0].hypothesis.reading()
    q, k = (float(np.sqrt((bias[rows] ** 2).mean())) for rows in (reading.q, reading.k))
    if min(q, k) >= SMALL_BIAS * max(q, k):
        return verdict
    agrees = "as named here" if k < q else "the other way round: what is called q here may be k"
    times = max(q, k) / (min(q, k) + TINY)
    return replace(verdict, reasons=(*verdict.reasons, f"one bias is {times:.0f} times smaller, as k's often is: {agrees}"))


def _sample(tensor: Any, axis: int) -> Floats:
    """[rows, columns] of a matrix whose packed axis is `axis`, each less its share of the mean row: what all rows share looks like a match.

    The mean itself would not do: taken off short rows, it is what these then share.
    """
    picked = _floats(tensor[:, :COLUMNS] if axis == 0 else tensor[:COLUMNS])
    rows: Floats = np.ascontiguousarray(picked if axis == 0 else picked.T)
    norms = np.sqrt(np.einsum("ij,ij->i", rows, rows))[:, None]
    rows = rows - norms * (rows / (norms + TINY)).mean(axis=0)
    return rows


def _floats(tensor: Any) -> Floats:
    if not isinstance(tensor, np.ndarray) and hasattr(tensor, "detach"):
        tensor = tensor.detach().cpu().float().numpy()
    return np.asarray(tensor).astype(np.float32)
