"""Elements that are worked on one by one, and what is written down where labelled ones meet: gates, rotations, biases."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .labels import ACTIVE, KIND, MIX, OUT, STRONG, WEAK, kind, row, token
from .ledger import Ledger
from .operations import ACTIVATIONS, PRODUCTS, SUMS
from .watch import Call


def pointwise(ledger: Ledger, call: Call) -> list[Tensor | None]:
    """The labels of the one operand that has any, or of the stronger one; an activation function is noted on rows."""
    tensors, out = list(call.inputs()), call.outs[0]
    if not (out.is_floating_point() or out.is_complex()):
        return []
    if any(t.is_complex() for t in (*tensors, out)):
        return [_complex(ledger, call.name, tensors, out)]
    if call.name == "addcmul" and len(tensors) == 3:
        base = ledger.labels(tensors[0])
        base = base.expand(out.shape) if base is not None else None
        return [_folded(ledger, "add", [(base, False), (_elementwise(ledger, "mul", tensors[1:], out), False)])]
    labels = _elementwise(ledger, call.name, tensors, out)
    if labels is not None and call.name in ACTIVATIONS:
        labels = torch.where((labels > 0) & (kind(labels) == STRONG), labels | ACTIVE, labels)
    return [labels]


def _elementwise(ledger: Ledger, name: str, tensors: list[Tensor], out: Tensor) -> Tensor | None:
    """Labels of the result. A parameter that works on data without labels gives none, and a product with zero has none."""
    known = [ledger.labels(t) for t in tensors]
    weak = [labels is not None and ledger.is_weak(t) for t, labels in zip(tensors, known, strict=True)]
    data = any(t.dim() and labels is None for t, labels in zip(tensors, known, strict=True))
    sides: list[tuple[Tensor | None, bool]] = []
    zeros = []
    for t, labels, is_weak in zip(tensors, known, weak, strict=True):
        if is_weak and data:
            labels = None
        if labels is None and name in PRODUCTS and t.numel() > 1:
            zeros.append(t == 0)
        narrow = out.dim() > 0 and out.shape[-1] > 1 and (t.dim() == 0 or t.shape[-1] == 1)
        sides.append((None if labels is None else labels.expand(out.shape) if labels.dim() <= out.dim() else labels, narrow))
    result = _folded(ledger, name, sides)
    for zero in zeros:
        if result is not None and bool(zero.any()):
            result = result.masked_fill(zero, 0)
    return result


def _folded(ledger: Ledger, name: str, sides: Iterable[tuple[Tensor | None, bool]]) -> Tensor | None:
    """The labels of several operands of one shape, one after the other; with each, whether it was narrow: one number a vector."""
    result, narrow = None, False
    for labels, thin in sides:
        if labels is None:
            continue
        result, narrow = (labels, thin) if result is None else (meet(ledger, name, result, labels, narrow, thin), narrow and thin)
    return result


def meet(ledger: Ledger, name: str, a: Tensor, b: Tensor, a_thin: bool = False, b_thin: bool = False) -> Tensor:
    """Where two labelled operands meet: scores and outputs win over rows, rows over parameters, the wide operand over the narrow."""
    ka, kb = kind(a), kind(b)
    both = (a > 0) & (b > 0)
    rows = both & (ka == STRONG) & (kb == STRONG)
    same = rows & (row(a) == row(b))
    differ = rows & ~same
    log = ledger.log
    if name in PRODUCTS:
        for x, y, kx, ky in ((a, b, ka, kb), (b, a, kb, ka)):
            gate = both & (kx == STRONG) & (ky == OUT)
            if bool(gate.any()):
                log.gates.append(torch.stack([row(x[gate]), y[gate] & ((1 << KIND) - 1)]))
        if bool(differ.any()):
            (log.products if a_thin == b_thin else log.spread).append(torch.stack([a[differ], b[differ]]))
    biased = both & (((ka == STRONG) & (kb == WEAK)) | ((ka == WEAK) & (kb == STRONG)))
    if name in SUMS and bool(biased.any()):
        strong = torch.where(ka == STRONG, a, b)[biased]
        log.biases.append(torch.stack([row(strong), row(torch.where(ka == WEAK, a, b)[biased])]))
    result = torch.where(_rank(b, kb) > _rank(a, ka), b, a)
    result = torch.where(same & ((b & ACTIVE) != 0), a | ACTIVE, result)
    if bool(differ.any()) and a_thin != b_thin:
        return torch.where(differ, b if a_thin else a, result)
    if name in SUMS and bool(differ.any()):
        turned = differ & (token(a) == token(b)) & (ledger.owners(a) == ledger.owners(b))
        if bool(turned.any()):
            log.rotations.append(torch.stack([row(a[turned]), row(b[turned])]))
            result = torch.where(turned, MIX, result)
    return result


def _rank(labels: Tensor, kinds: Tensor) -> Tensor:
    """none < parameter < mixture < row < attention output < score."""
    order = torch.tensor([3, 4, 5, 1])
    return torch.where(labels > 0, order[kinds.clamp(0, 3)], torch.where(labels < 0, 2, 0))


def _complex(ledger: Ledger, name: str, tensors: list[Tensor], out: Tensor) -> Tensor | None:
    """Complex numbers carry two labels each; a factor without labels turns them where its imaginary part is not zero."""
    known = [(t, labels) for t in tensors if (labels := ledger.labels(t)) is not None]
    if name == "complex":
        return torch.stack([labels.expand(out.shape) for _, labels in known], -1) if len(known) == 2 else None
    if len(known) != 1 or not known[0][0].is_complex() or not out.is_complex():
        return None
    source, labels = known[0]
    labels = labels.expand(*out.shape, 2)
    factors = [t for t in tensors if t is not source and t.is_complex()]
    if name in PRODUCTS and factors:
        turn = (factors[0].imag != 0).expand(out.shape)
        if bool(turn.any()):
            pairs = labels[turn]
            pairs = pairs[(pairs > 0).all(1)]
            ledger.log.rotations += [row(pairs).T, row(pairs.flip(1)).T]
        labels = torch.where(turn.unsqueeze(-1), MIX, labels)
    return labels
