"""Runs a model with labels beside the data: every element knows which row of which parameter produced it.

The labels follow an element through whatever keeps its place: views, copies, biases, norms, scaling, clipping, activations.
A product with a parameter starts new labels. What is multiplied by an exact zero is gone, so a rotation by the angle 0 changes nothing.
Written down on the way: attention (which rows meet which), rotations, gates, biases, and what feeds what.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import carry
from .labels import MIX, SCORE, STRONG, kind, row, rows_only
from .ledger import Ledger
from .meet import pointwise
from .multiply import convolution, grouped, product, shared
from .operations import Effect, operation
from .watch import Call

Labels = Sequence[Tensor | None]


class Follow:
    """The book of a `Watch`: notes in a ledger what every operation does to rows."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def knows(self, tensor: Tensor) -> bool:
        return not self.ledger.blind and self.ledger.knows(tensor)

    def follow(self, call: Call) -> None:
        """Notes what one operation, which has just run, did."""
        rule = _BY_NAME.get(call.name) or _RULES[call.effect]
        results = [*rule(self.ledger, call), *[None] * len(call.outs)]
        for tensor, labels in zip(call.outs, results, strict=False):
            if tensor.is_floating_point() or tensor.is_complex():
                self.ledger.put(tensor, labels)

    def lost(self, func: Any, error: Exception) -> None:
        """Half a reading is none."""
        raise error


class Still(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context in which every sine is 0 and every cosine 1, so that nothing is rotated."""

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        angle = operation(func).name
        return torch.zeros_like(out) if angle == "sin" else torch.ones_like(out) if angle == "cos" else out


def _moved(ledger: Ledger, call: Call) -> Labels:
    return carry.moved(call, ledger.labels_or_zeros) or []


def _same(ledger: Ledger, call: Call) -> Labels:
    """A copy, also by `copy_`: the labels of the source, whatever was there."""
    source, out = call.tensor("src"), call.outs[0]
    source = next(call.inputs()) if source is None else source
    labels = ledger.labels(source) if source.is_complex() == out.is_complex() else None
    return [None if labels is None else labels.expand(*out.shape, *labels.shape[source.dim() :])]


def _erased(ledger: Ledger, call: Call) -> Labels:
    return []


def _softmax(ledger: Ledger, call: Call) -> Labels:
    """Labels stay; noted are the attention whose scores these are, or the rows that went through it themselves."""
    labels = ledger.labels(call.values["self"])
    if labels is None:
        return []
    scores = labels[(labels > 0) & (kind(labels) == SCORE)]
    for number in torch.unique((scores >> 44) & 0xFFF).tolist():
        ledger.log.attentions[number].softmax = True
    if not len(scores) and bool((strong := (labels > 0) & (kind(labels) == STRONG)).any()):
        ledger.log.softened.append(torch.unique(row(labels[strong])))
    return [labels]


def _attended(ledger: Ledger, call: Call) -> Labels:
    q, k, v = (call.values[name] for name in ("query", "key", "value"))
    ledger.attention(q, k, v, call.outs[0], True)
    return [ledger.labels(call.outs[0])]


def _other(ledger: Ledger, call: Call) -> Labels:
    """A reduction keeps a label that all its elements share; whatever else keeps the shape keeps the labels."""
    source = next((t for t in call.inputs() if ledger.labels(t) is not None), None)
    if source is None or not call.outs or not call.outs[0].is_floating_point() or ledger.is_weak(source):
        return []
    labels, out = ledger.labels_or_zeros(source), call.outs[0]
    if out.shape == labels.shape:
        return [labels]
    if "dim" in call.values and labels.dim():
        reduced = carry.reduced(call, rows_only(labels), lambda: MIX)
        return [reduced] if reduced.shape == out.shape else []
    if out.dim() == labels.dim() >= 3 and out.shape[:2] == labels.shape[:2]:
        return [shared(labels, list(range(2, labels.dim()))).expand(out.shape)]
    return []


_RULES: dict[Effect, Callable[[Ledger, Call], Labels]] = {
    "moves": _moved,
    "same": _same,
    "copies": _same,
    "erases": _erased,
    "multiplies": product,
    "convolves": convolution,
    "reduces": _other,
    "spreads": _other,
    "softmax": _softmax,
    "attends": _attended,
    "pointwise": pointwise,
    "?": _other,
}
_BY_NAME: dict[str, Callable[[Ledger, Call], Labels]] = {
    **dict.fromkeys(("_grouped_mm", "grouped_mm"), grouped),
    **dict.fromkeys(("embedding", "_embedding_bag"), _erased),  # rows looked up in a table are inputs
    "masked_fill": _same,  # a score that is masked is still a score of that query and that key
}
