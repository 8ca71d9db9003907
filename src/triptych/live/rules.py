"""What each kind of operation does to exact labels. A rule gives the labels of every output, None for "no labels".

Views need no rule: labels belong to storages. Everything unknown mixes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .carry import alike, factors
from .carry import moved as carried
from .carry import reduced as remaining
from .marks import NOTHING, packed
from .operations import CHANNEL_NORMS, SUMS, Effect
from .watch import Call

Labels = Sequence[Tensor | None]


class Book(Protocol):
    """What a rule may ask of the shadow: labels of tensors, numbers for mixtures."""

    def read(self, tensor: Tensor) -> Tensor | None: ...
    def kind_of(self, tensor: Tensor) -> str: ...
    def mixture(self, op: str) -> int: ...
    def found(self, bias: Tensor, rows: Tensor) -> None: ...


def blend(book: Book, call: Call, out: Tensor) -> Tensor:
    """Every element of `out` mixed by this operation."""
    return torch.full((1,) * out.dim(), book.mixture(call.operation.plain), dtype=torch.int32, device="cpu").expand(out.shape)


def nothing(size: Sequence[int]) -> Tensor:
    """Labels of elements that hold no row."""
    return torch.full((1,) * len(size), NOTHING, dtype=torch.int32, device="cpu").expand(tuple(size))


# -- element by element ------------------------------------------------------------------------------------------------


def same(book: Book, call: Call) -> Labels:
    """A copy: clone, cast, dropout."""
    labels = book.read(next(call.inputs()))
    return [None if labels is None else labels.expand(call.outs[0].shape)]


def copied(book: Book, call: Call) -> Labels:
    """`copy_`: the labels of the source, whatever was there."""
    source, out = call.tensor("src"), call.outs[0]
    labels = None if source is None else book.read(source)
    return [nothing(out.shape) if labels is None else labels.expand(out.shape)]


def erased(book: Book, call: Call) -> Labels:
    """Constants and random numbers."""
    return [nothing(out.shape) for out in call.outs]


def pointwise(book: Book, call: Call) -> Labels:
    """One labelled operand keeps its labels; of two, those that are equal. A bias keeps the label of what it is added to."""
    out, total, kind = call.outs[0], None, ""
    floating = out.dtype.is_floating_point or out.is_complex()
    for operand in call.inputs():
        labels = book.read(operand)
        if labels is None or out.dtype == torch.bool or (operand.dtype.is_floating_point and not floating):
            continue
        labels, this = labels.expand(out.shape), book.kind_of(operand)
        if total is None:
            total, kind = labels, this
        elif (kind == "bias") != (this == "bias") and call.name in SUMS:
            total = with_bias(book, total, labels) if this == "bias" else with_bias(book, labels, total)
            kind = "activation"
        else:
            total = combined(book, call, total, labels)
    return [total] * len(call.outs)


def combined(book: Book, call: Call, a: Tensor, b: Tensor) -> Tensor:
    """Labels, of one shape, of elements made of two: kept where they agree or one is nothing, a mixture elsewhere."""
    one, two = packed(a, b)
    total = torch.where(one == NOTHING, two, one)
    clash = (one != two) & (one != NOTHING) & (two != NOTHING)
    if bool(clash.any()):
        first = torch.where((one > 0) & (two < 0), two, one)  # what is mixed already stays what it was
        total = torch.where(clash, torch.where(first < 0, first, book.mixture(call.operation.plain)), total)
    return total.expand(a.shape)


def with_bias(book: Book, rows: Tensor, bias: Tensor) -> Tensor:
    """The labels of rows to which a bias is added, or of the bias where they have none; the book compares the two."""
    book.found(bias, rows)
    few, one = packed(rows, bias)
    return torch.where(few == NOTHING, one, few).expand(rows.shape)


# -- moves and linear maps ---------------------------------------------------------------------------------------------


def moved(book: Book, call: Call) -> Labels:
    """The same operation on the labels."""

    def read(tensor: Tensor) -> Tensor:
        labels = book.read(tensor)
        return nothing(tensor.shape) if labels is None else labels

    return carried(call, read) or mixed(book, call)


def linear(book: Book, call: Call) -> Labels:
    """a @ b [+ bias]: the label that one operand has all along the contracted axis."""
    a, b, extra = factors(call)
    left, right = book.read(a), book.read(b)
    wide, size = (*a.shape[:-1], b.shape[-1]), call.outs[0].shape
    from_left = None if left is None else constant(book, call, left, [-1]).expand(wide)
    from_right = None if right is None else constant(book, call, right, [-2]).expand(wide)
    weights = [book.kind_of(t) == "weight" for t in (a, b)]
    if from_left is None or from_right is None:
        total = from_left if from_right is None else from_right
    elif weights[0] != weights[1]:
        total = from_left if weights[0] else from_right
    else:
        total = blend(book, call, call.outs[0])
    total = None if total is None else total.reshape(size)
    bias = None if extra is None else book.read(extra)
    if extra is not None and bias is not None:
        bias = bias.expand(size)
        if total is None:
            total = bias
        elif book.kind_of(extra) == "bias":
            total = with_bias(book, total, bias)
        else:
            total = combined(book, call, total, bias)
    return [total]


def convolution(book: Book, call: Call) -> Labels:
    """A labelled kernel labels its output channels; a depthwise one passes the labels of its input on."""
    out, groups, transposed = call.outs[0], call.values["groups"], call.values["transposed"]
    weight, source, bias = (None if (t := call.tensor(name)) is None else book.read(t) for name in ("weight", "input", "bias"))
    shape = [1, -1] + [1] * (out.dim() - 2)
    if weight is not None and not (transposed and groups > 1):
        channel = 1 if transposed else 0
        total = constant(book, call, weight, [i for i in range(weight.dim()) if i != channel]).reshape(shape).expand(out.shape)
    elif weight is None and source is not None and not transposed and groups == source.size(1):
        kept = constant(book, call, source, list(range(2, source.dim())))
        total = kept.repeat_interleave(out.size(1) // groups, 1).expand(out.shape)
    else:
        return mixed(book, call)
    return [total if bias is None else with_bias(book, total, bias.view(shape).expand(out.shape))]


# -- along axes --------------------------------------------------------------------------------------------------------


def constant(book: Book, call: Call, labels: Tensor, dims: Sequence[int]) -> Tensor:
    """`alike`, with a mixture of this operation."""
    return alike(labels, dims, lambda: book.mixture(call.operation.plain))


def reduced(book: Book, call: Call) -> Labels:
    """sum, mean, amax, ...: labels stay where they are the same along the reduced axes."""
    source, out = next(call.inputs()), call.outs[0]
    if "other" in call.values:
        return pointwise(book, call)
    labels = book.read(source)
    if labels is None or out.dtype == torch.bool:
        return [None] * len(call.outs)
    kept = remaining(call, labels, lambda: book.mixture(call.operation.plain))
    return [kept if o.dtype.is_floating_point == source.dtype.is_floating_point else None for o in call.outs]


def spread(book: Book, call: Call) -> Labels:
    """softmax, cumsum, norms: the shape stays; labels stay where they are the same along the axes worked on."""
    source, out = next(call.inputs()), call.outs[0]
    labels = book.read(source)
    if labels is None:
        return mixed(book, call)
    if "normalized_shape" in call.values:
        dims = list(range(source.dim() - len(call.values["normalized_shape"]), source.dim()))
    elif "group" in call.values:
        dims = list(range(1, source.dim()))
    elif call.name in CHANNEL_NORMS:
        dims = [i for i in range(source.dim()) if i != 1]
    else:
        dims = [call.values["dim"]]
    kept = constant(book, call, labels, dims) if source.dim() else labels
    return [kept.expand(out.shape)] + [blend(book, call, o) for o in call.outs[1:]]


def mixed(book: Book, call: Call) -> Labels:
    """Whatever is not known: every output is a mixture, except yes/no and index outputs."""
    floating = any(t.dtype.is_floating_point or t.is_complex() for t in call.inputs() if book.read(t) is not None)
    return [
        blend(book, call, o) if o.dtype.is_floating_point or o.is_complex() or (not floating and o.dtype != torch.bool) else None
        for o in call.outs
    ]


RULES: dict[Effect, Callable[[Book, Call], Labels]] = {
    "moves": moved,
    "same": same,
    "copies": copied,
    "erases": erased,
    "multiplies": linear,
    "convolves": convolution,
    "reduces": reduced,
    "spreads": spread,
    "softmax": spread,
    "pointwise": pointwise,
    "attends": mixed,
    "?": mixed,
}
