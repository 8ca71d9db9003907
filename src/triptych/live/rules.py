"""What each kind of operation does to labels. A rule gets a Call and returns the labels of every output, None for "no labels".

Views need no rule: labels belong to storages. Everything unknown mixes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .marks import NOTHING, packed

Labels = Sequence[Tensor | None]


class Book(Protocol):
    """What a rule may ask of the shadow: labels of inputs, numbers for mixtures."""

    def read(self, tensor: Tensor) -> Tensor | None: ...
    def kind_of(self, tensor: Tensor) -> str: ...
    def mixture(self, op: str) -> int: ...
    def found(self, bias: Tensor, rows: Tensor) -> None: ...


@dataclass(frozen=True)
class Call:
    """One operation: its arguments by name, the tensors it returned, and those arguments it wrote to."""

    func: Any
    name: str
    values: Mapping[str, Any]
    outs: Sequence[Tensor]
    written: tuple[str, ...]
    book: Book

    @property
    def op(self) -> str:
        """The name as a user knows it."""
        return _USER_NAMES.get(self.name) or _plain(self.name)

    def read(self, name: str) -> Tensor | None:
        value = self.values.get(name)
        return self.book.read(value) if isinstance(value, Tensor) else None

    def inputs(self) -> Iterator[Tensor]:
        """All tensors that are read."""
        for name, value in self.values.items():
            if name not in self.written or name == "self":
                yield from tensors_in(value)

    def blend(self, out: Tensor) -> Tensor:
        """Every element of `out` mixed by this operation."""
        return torch.full((1,) * out.dim(), self.book.mixture(self.op), dtype=torch.int32, device="cpu").expand(out.shape)


def tensors_in(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def nothing(size: Sequence[int]) -> Tensor:
    """Labels of elements that hold no row."""
    return torch.full((1,) * len(size), NOTHING, dtype=torch.int32, device="cpu").expand(tuple(size))


# -- element by element ------------------------------------------------------------------------------------------------


def same(call: Call) -> Labels:
    """A copy: clone, cast, dropout."""
    labels = call.book.read(next(call.inputs()))
    return [None if labels is None else labels.expand(call.outs[0].shape)]


def copied(call: Call) -> Labels:
    """`copy_`: the labels of the source, whatever was there."""
    labels, out = call.read("src"), call.outs[0]
    return [nothing(out.shape) if labels is None else labels.expand(out.shape)]


def erased(call: Call) -> Labels:
    """Constants and random numbers."""
    return [nothing(out.shape) for out in call.outs]


def pointwise(call: Call) -> Labels:
    """One labelled operand keeps its labels; of two, those that are equal. A bias keeps the label of what it is added to."""
    out, total, kind = call.outs[0], None, ""
    floating = out.dtype.is_floating_point or out.is_complex()
    for operand in call.inputs():
        labels = call.book.read(operand)
        if labels is None or out.dtype == torch.bool or (operand.dtype.is_floating_point and not floating):
            continue
        labels, this = labels.expand(out.shape), call.book.kind_of(operand)
        if total is None:
            total, kind = labels, this
        elif (kind == "bias") != (this == "bias") and call.name in ("add", "sub", "rsub"):
            total = with_bias(call, total, labels) if this == "bias" else with_bias(call, labels, total)
            kind = "activation"
        else:
            total = combined(call, total, labels)
    return [total] * len(call.outs)


def combined(call: Call, a: Tensor, b: Tensor) -> Tensor:
    """Labels, of one shape, of elements made of two: kept where they agree or one is nothing, a mixture elsewhere."""
    one, two = packed(a, b)
    total = torch.where(one == NOTHING, two, one)
    clash = (one != two) & (one != NOTHING) & (two != NOTHING)
    if bool(clash.any()):
        first = torch.where((one > 0) & (two < 0), two, one)  # what is mixed already stays what it was
        total = torch.where(clash, torch.where(first < 0, first, call.book.mixture(call.op)), total)
    return total.expand(a.shape)


def with_bias(call: Call, rows: Tensor, bias: Tensor) -> Tensor:
    call.book.found(bias, rows)
    few, one = packed(rows, bias)
    return torch.where(few == NOTHING, one, few).expand(rows.shape)


# -- moving elements ---------------------------------------------------------------------------------------------------


def moved(call: Call) -> Labels:
    """The same operation on the labels."""
    if call.values.get("accumulate") or call.values.get("reduce"):
        return mixed(call)
    data = MOVES.get(call.name, ("self",))

    def labels_of(name: str, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [labels_of(name, item) for item in value] if any(isinstance(item, Tensor) for item in value) else value
        if name not in data:
            return value.cpu() if isinstance(value, Tensor) else value
        if not isinstance(value, Tensor):
            return NOTHING
        labels = call.book.read(value)
        if labels is None:
            return nothing(value.shape).clone() if name in call.written else nothing(value.shape)
        return labels.clone() if name in call.written else labels

    given = {name: labels_of(name, value) for name, value in call.values.items()}
    if "out" in call.written:
        given["out"] = torch.empty(call.outs[0].shape, dtype=torch.int32, device="cpu")
    result = call.func(**given)
    return list(result) if isinstance(result, (list, tuple)) else [result]


# -- linear maps -------------------------------------------------------------------------------------------------------


def linear(call: Call) -> Labels:
    """a @ b [+ bias]: the label that one operand has all along the contracted axis."""
    first, second, extra = _LINEAR[call.name]
    a, b = call.values[first], call.values[second]
    left, right = call.book.read(a), call.book.read(b)
    if call.name in ("mv", "addmv", "dot"):
        right = None if right is None else right.unsqueeze(-1)
    if call.name == "dot":
        left = None if left is None else left.unsqueeze(-2)
    size = tuple(call.outs[0].shape)
    wide = {"mv": (*size, 1), "addmv": (*size, 1), "dot": (1, 1)}.get(call.name, size)
    from_left = None if left is None else constant(call, left, [-1]).expand(wide)
    from_right = None if right is None else constant(call, right, [-2]).expand(wide)
    weights = [call.book.kind_of(t) == "weight" for t in (a, b)]
    if from_left is None or from_right is None:
        total = from_left if from_right is None else from_right
    elif weights[0] != weights[1]:
        total = from_left if weights[0] else from_right
    else:
        total = call.blend(call.outs[0]).reshape((1,) * len(wide)).expand(wide)
    total = None if total is None else total.reshape(size) if wide != size else total
    bias = call.read(extra)
    if bias is not None:
        bias = bias.expand(size)
        if total is None:
            total = bias
        elif call.book.kind_of(call.values[extra]) == "bias":
            total = with_bias(call, total, bias)
        else:
            total = combined(call, total, bias)
    return [total]


_LINEAR = {
    "mm": ("self", "mat2", ""),
    "_int_mm": ("self", "mat2", ""),
    "_scaled_mm": ("self", "mat2", "bias"),
    "addmm": ("mat1", "mat2", "self"),
    "_addmm_activation": ("mat1", "mat2", "self"),
    "bmm": ("self", "mat2", ""),
    "baddbmm": ("batch1", "batch2", "self"),
    "mv": ("self", "vec", ""),
    "addmv": ("mat", "vec", "self"),
    "dot": ("self", "tensor", ""),
}


def convolution(call: Call) -> Labels:
    """A labelled kernel labels its output channels; a depthwise one passes the labels of its input on."""
    out, groups, transposed = call.outs[0], call.values["groups"], call.values["transposed"]
    weight, source = call.read("weight"), call.read("input")
    shape = [1, -1] + [1] * (out.dim() - 2)
    if weight is not None and not (transposed and groups > 1):
        channel = 1 if transposed else 0
        total = constant(call, weight, [i for i in range(weight.dim()) if i != channel]).reshape(shape).expand(out.shape)
    elif weight is None and source is not None and not transposed and groups == source.size(1):
        kept = constant(call, source, list(range(2, source.dim())))
        total = kept.repeat_interleave(out.size(1) // groups, 1).expand(out.shape)
    else:
        return mixed(call)
    bias = call.read("bias")
    return [total if bias is None else with_bias(call, total, bias.view(shape).expand(out.shape))]


# -- along axes --------------------------------------------------------------------------------------------------------


def constant(call: Call, labels: Tensor, dims: Sequence[int]) -> Tensor:
    """`labels` with size 1 along `dims`: the label that all have there which have one, or a mixture."""
    (few,) = packed(labels)
    dims = [dim % labels.dim() for dim in dims]
    if few.numel() and any(few.size(dim) > 1 for dim in dims):
        none, limit = few == NOTHING, torch.iinfo(torch.int32).max
        low = few.masked_fill(none, limit).amin(dims, keepdim=True)
        high = few.masked_fill(none, -limit).amax(dims, keepdim=True)
        few = low.masked_fill(low == limit, NOTHING)
        if bool((low < high).any()):
            few = few.masked_fill(low < high, call.book.mixture(call.op))
    elif not few.numel():
        few = few.new_zeros([1 if i in dims else n for i, n in enumerate(few.shape)])
    return few.expand([1 if i in dims else n for i, n in enumerate(labels.shape)])


def reduced(call: Call) -> Labels:
    """sum, mean, amax, ...: labels stay where they are the same along the reduced axes."""
    source, out = next(call.inputs()), call.outs[0]
    if "other" in call.values:
        return pointwise(call)
    labels = call.book.read(source)
    if labels is None or out.dtype == torch.bool:
        return [None] * len(call.outs)
    dim = call.values.get("dim")
    dims = [dim] if isinstance(dim, int) else list(dim or range(source.dim()))
    kept = constant(call, labels, dims) if source.dim() else labels
    if out.dim() < kept.dim():
        for axis in sorted((d % source.dim() for d in dims), reverse=True):
            kept = kept.squeeze(axis)
    return [kept if o.dtype.is_floating_point == source.dtype.is_floating_point else None for o in call.outs]


def spread(call: Call) -> Labels:
    """softmax, cumsum, norms: the shape stays; labels stay where they are the same along the axes worked on."""
    source, out = next(call.inputs()), call.outs[0]
    labels = call.book.read(source)
    if labels is None:
        return mixed(call)
    if "normalized_shape" in call.values:
        dims = list(range(source.dim() - len(call.values["normalized_shape"]), source.dim()))
    elif "group" in call.values:
        dims = list(range(1, source.dim()))
    elif call.name in NORMS:
        dims = [i for i in range(source.dim()) if i != 1]
    else:
        dims = [call.values["dim"]]
    kept = constant(call, labels, dims) if source.dim() else labels
    return [kept.expand(out.shape)] + [call.blend(o) for o in call.outs[1:]]


def mixed(call: Call) -> Labels:
    """Whatever is not known: every output is a mixture, except yes/no and index outputs."""
    floating = any(t.dtype.is_floating_point or t.is_complex() for t in call.inputs() if call.book.read(t) is not None)
    return [
        call.blend(o) if o.dtype.is_floating_point or o.is_complex() or (not floating and o.dtype != torch.bool) else None
        for o in call.outs
    ]


# -- which operation follows which rule --------------------------------------------------------------------------------

MOVES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("cat", "stack"), ("tensors",)),
    **dict.fromkeys(("index", "_unsafe_index", "index_select", "gather", "take", "flip", "roll", "repeat", "masked_select"), ("self",)),
    **dict.fromkeys(("tril", "triu", "im2col", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "diag_embed"), ("self",)),
    **{f"{kind}_pad{n}d": ("self",) for kind in ("reflection", "replication") for n in (1, 2, 3)},
    **dict.fromkeys(("constant_pad_nd", "masked_fill", "index_fill"), ("self", "value")),
    **dict.fromkeys(("slice_scatter", "select_scatter", "diagonal_scatter", "as_strided_scatter"), ("self", "src")),
    **dict.fromkeys(("index_put", "_unsafe_index_put", "_index_put_impl"), ("self", "values")),
    **dict.fromkeys(("index_copy", "masked_scatter"), ("self", "source")),
    "where": ("self", "other"),
    "scatter": ("self", "src", "value"),
    "embedding": ("weight",),
}
"""Operations that only move elements -> the arguments that hold the elements; the others say where they go."""

NORMS = {"native_layer_norm", "_fused_rms_norm", "rms_norm", "native_group_norm", "native_batch_norm"}
NORMS |= {"_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "_batch_norm_with_update"}
_REDUCE = {"sum", "mean", "amax", "amin", "prod", "var", "std", "logsumexp", "linalg_vector_norm", "norm", "max", "min", "nansum"}
_SPREAD = {"_softmax", "_log_softmax", "_safe_softmax", "cumsum", "cumprod", "logcumsumexp", *NORMS}
_SAME = {"clone", "_to_copy", "lift_fresh_copy", "native_dropout", "_fused_dropout"}
_ERASE = {"fill", "zero", "normal", "uniform", "random", "bernoulli", "exponential", "log_normal", "cauchy", "geometric"}

_USER_NAMES = {
    **dict.fromkeys(_LINEAR, "matmul"),
    "linalg_vector_norm": "norm",
    "_log_softmax": "log_softmax",
    "_native_batch_norm_legit": "batch_norm",
    "_native_batch_norm_legit_no_training": "batch_norm",
}


def _plain(name: str) -> str:
    if "scaled_dot_product" in name or "flash_attention" in name or "efficient_attention" in name:
        return "scaled_dot_product_attention"
    return name.lstrip("_").removeprefix("native_").removeprefix("fused_").removeprefix("safe_")


def rule_for(name: str, is_pointwise: bool) -> Callable[[Call], Labels]:
    """The rule of an aten operation, by its name without namespace, overload or trailing underscore."""
    if name in MOVES or (name.endswith("_copy") and name not in _SAME):
        return moved
    if name in _SAME:
        return same
    if name == "copy":
        return copied
    if name in _ERASE or name.endswith("_like") or name.startswith("new_"):
        return erased
    if name in _LINEAR:
        return linear
    if name in ("convolution", "_convolution"):
        return convolution
    if name in _REDUCE:
        return reduced
    if name in _SPREAD:
        return spread
    return pointwise if is_pointwise else mixed
