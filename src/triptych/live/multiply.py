"""Products: a parameter starts new rows, rows that meet rows are scores, scores weigh values into outputs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .carry import alike, factors
from .labels import KIND, MIX, OUT, ROW, SCORE, SCORE_HALF, STRONG, TOKEN, Attention, kind, row, rows_only
from .ledger import Ledger
from .meet import meet
from .watch import Call


def product(ledger: Ledger, call: Call) -> list[Tensor | None]:
    """a [.., m, k] @ b [.., k, n] [+ bias]: what the two are tells which product it is; a labelled bias then meets the result."""
    a, b, bias = factors(call)
    if a.is_complex() or b.is_complex():
        return []
    shape = (*a.shape[:-1], b.shape[-1])
    labels = _contracted(ledger, a, b)
    if labels is None:
        return []
    labels = labels.reshape(shape)
    other = ledger.labels(bias) if bias is not None else None
    if other is not None and other.numel():
        labels = meet(ledger, "add", labels, other.expand(shape))
    return [labels.reshape(call.outs[0].shape)]


def _contracted(ledger: Ledger, a: Tensor, b: Tensor) -> Tensor | None:
    if 0 in a.shape or 0 in b.shape:
        return None
    b_weak = ledger.is_weak(b)
    if b_weak or ledger.is_weak(a):
        return _projected(ledger, a, b, b_weak)
    la, lb = ledger.labels(a), ledger.labels(b)
    if la is None or lb is None:
        one = shared(la, [-1]) if la is not None else shared(lb, [-2]) if lb is not None else None
        return None if one is None else one.expand(*a.shape[:-1], b.shape[-1])
    la, lb = (la.unsqueeze(0), lb.unsqueeze(0)) if la.dim() == 2 else (la, lb)
    scores = [_has(x, SCORE) for x in (la, lb)]
    if scores == [True, True]:
        return la if la.shape == (*la.shape[:-1], lb.shape[-1]) else None
    if scores[0]:
        return _weighed(ledger, la, lb)
    if scores[1]:
        swapped = _weighed(ledger, lb.transpose(1, 2), la.transpose(1, 2))
        return None if swapped is None else swapped.transpose(1, 2)
    return _scored(ledger, la, lb.transpose(1, 2))


def _has(labels: Tensor, which: int) -> bool:
    return bool(((labels > 0) & (kind(labels) == which)).any())


def shared(labels: Tensor, dims: list[int]) -> Tensor:
    """With size 1 along `dims`: the row that all have there which have one, without its token, MIX where they differ."""
    return alike(rows_only(labels), dims, lambda: MIX)


def _projected(ledger: Ledger, a: Tensor, b: Tensor, b_weak: bool) -> Tensor | None:
    """A product with a parameter: one new row for every line of it that is summed over."""
    weight, other = (b.transpose(-1, -2), a) if b_weak else (a, b.transpose(-1, -2))
    lines = ledger.labels(weight.select(-1, 0))
    assert lines is not None
    if weight.shape[-1] > 1:
        second = ledger.labels(weight.select(-1, 1))
        assert second is not None
        steps = torch.unique((second - lines)[lines > 0]).tolist()
        for first in ledger.starts(lines) if len(steps) == 1 else ():
            ledger.log.contracted.setdefault(first, abs(steps[0]))
    inputs = ledger.labels(other)
    shape = (*other.shape[:-1], weight.shape[-2])
    if inputs is not None:
        if _has(inputs, SCORE):
            same = inputs if b_weak else inputs.transpose(-1, -2)
            return same if same.shape == (*a.shape[:-1], b.shape[-1]) else None
        _feeds(ledger, inputs, lines)
        _closes(ledger, inputs, lines)
    count = math.prod(other.shape[:-1])
    places = torch.arange(count).reshape(*other.shape[:-1], 1) & 0xFFFF
    labels = torch.where(lines > 0, lines & ROW, 0).unsqueeze(-2).expand(shape) + (places << TOKEN)
    return labels if b_weak else labels.transpose(-1, -2)


def _feeds(ledger: Ledger, inputs: Tensor, lines: Tensor) -> None:
    """Notes the first input vector that is all rows."""
    vectors = inputs.reshape(-1, inputs.shape[-1])
    pure = ((vectors > 0) & (kind(vectors) == STRONG)).all(1)
    if bool(pure.any()):
        vector = row(vectors[int(pure.nonzero()[0])])
        for first in ledger.starts(lines):
            ledger.log.fed.setdefault(first, vector)


def _closes(ledger: Ledger, inputs: Tensor, lines: Tensor) -> None:
    """Notes the input vector with the most outputs of attention."""
    vectors = torch.where((inputs > 0) & (kind(inputs) == OUT), inputs & ((1 << KIND) - 1), -1).reshape(-1, inputs.shape[-1])
    outs = (vectors >= 0).sum(1)
    if bool(outs.any()):
        for first in ledger.starts(lines):
            ledger.log.closing.setdefault(first, vectors[int(outs.argmax())])


def _scored(ledger: Ledger, q: Tensor, k: Tensor) -> Tensor | None:
    """q [b, m, d] and k [b, n, d] meet: the result [b, m, n] knows which vectors."""
    log = ledger.log
    if not (_has(q, STRONG) and _has(k, STRONG)) or len(log.attentions) > 0xFFF:
        log.unclear = log.unclear or any(bool((x == MIX).any()) for x in (q, k))
        return None
    number = len(log.attentions)
    log.attentions.append(Attention(q.clone(), k.clone()))
    of_q = torch.arange(q.shape[0] * q.shape[1]).view(q.shape[0], -1, 1) & SCORE_HALF
    of_k = torch.arange(k.shape[0] * k.shape[1]).view(k.shape[0], 1, -1) & SCORE_HALF
    return (SCORE << KIND) + (number << 44) + (of_q << 22) + of_k


def _weighed(ledger: Ledger, scores: Tensor, v: Tensor) -> Tensor | None:
    """Scores [b, i, j] weigh v [b, j, d]."""
    ours = (scores > 0) & (kind(scores) == SCORE)
    number = int(((scores[ours] >> 44) & 0xFFF)[0])
    ours &= ((scores >> 44) & 0xFFF) == number
    seen = ledger.log.attentions[number]
    if not _has(v, STRONG):
        return None
    of_q = torch.where(ours, (scores >> 22) & SCORE_HALF, -1)
    of_k = torch.where(ours, scores & SCORE_HALF, -1)
    over_k = not bool(((of_k.amax(-1, keepdim=True) != of_k) & ours).any()) and scores.shape[-1] > 1
    if over_k:
        of_q, of_k = of_k, of_q
    labels = ledger.output((*scores.shape[:2], v.shape[-1]))
    if seen.v is None:
        seen.v = v.clone()
        if over_k:
            seen.q, seen.k = seen.k, seen.q
        seen.q_of, seen.k_of = of_q.amax(2), of_k.amax(1)
        seen.out, seen.out_shape = int(labels[0, 0, 0]) & ((1 << KIND) - 1), tuple(labels.shape)
        seen.pairs = torch.stack([of_q[ours], of_k[ours]])
    return labels


def grouped(ledger: Ledger, call: Call) -> list[Tensor | None]:
    """Tokens [n, in], each times the matrix of its expert, [experts, in, rows]; the rows of the first expert stand for all."""
    data, weight = call.values["self"], call.values["mat2"]
    return [_projected(ledger, data, weight[0], True)] if ledger.is_weak(weight) and weight.dim() == 3 else []


def convolution(ledger: Ledger, call: Call) -> list[Tensor | None]:
    """A kernel starts a row for every output channel; over each channel by itself it leaves them what they are, which is noted."""
    data, weight, out = call.values["input"], call.values["weight"], call.outs[0]
    if not ledger.is_weak(weight):
        return []
    inputs, transposed = ledger.labels(data), call.values["transposed"]
    lines = ledger.labels(weight[:, 0].flatten(1)[:, 0] if not transposed else weight[0].flatten(1)[:, 0])
    assert lines is not None
    if inputs is not None and not transposed and weight.shape[1] == 1 and weight.shape[0] == data.shape[1] > 1:
        channels = shared(inputs, [0, *range(2, inputs.dim())])
        if bool((channels > 0).any()):
            ledger.log.mixed[ledger.starts(lines)[0]] = (row(channels.flatten()), row(lines))
            return [channels.expand(out.shape)]
    if transposed or lines.shape[0] != out.shape[1]:
        return []
    if inputs is not None and all(n == 1 for n in weight.shape[2:]):
        _feeds(ledger, inputs.movedim(1, -1), lines)
    places = torch.arange(out.numel() // out.shape[1]).view(out.shape[0], 1, *out.shape[2:]) & 0xFFFF
    return [row(lines).view(1, -1, *([1] * (out.dim() - 2))) + 1 + (places << TOKEN)]
