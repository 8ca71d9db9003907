"""Labels through an operation, whatever they say: moved along, found alike along axes, and the factors of a product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .marks import NOTHING, packed
from .operations import FACTORS, MOVES
from .watch import Call

_FLOATS_ONLY = frozenset(("im2col",))
_FLOAT = {torch.int32: torch.float32, torch.int64: torch.float64}


def moved(call: Call, read: Callable[[Tensor], Tensor]) -> list[Tensor] | None:
    """The same operation on the labels; None for one that also adds.

    `read` gives a tensor's labels, in its shape, or for complex numbers with an axis of 2 more; so are those of the result.
    """
    if call.values.get("accumulate") or call.values.get("reduce"):
        return None
    data = (*MOVES.get(call.name, ("self",)), "out")
    as_floats = call.name in _FLOATS_ONLY or any(out.is_complex() for out in call.outs)

    def labels_of(name: str, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [labels_of(name, item) for item in value] if any(isinstance(item, Tensor) for item in value) else value
        if name not in data:
            return value.cpu() if isinstance(value, Tensor) else value
        if not isinstance(value, Tensor):
            return NOTHING
        labels = read(value)
        paired = labels.dim() > value.dim()
        labels = labels.clone() if name in call.written or paired else labels
        labels = labels.view(_FLOAT[labels.dtype]) if as_floats else labels  # the same bits
        return torch.view_as_complex(labels) if paired else labels

    result = call.func(**{name: labels_of(name, value) for name, value in call.values.items()})
    results = list(result) if isinstance(result, (list, tuple)) else [result]
    return [_bits(one) for one in results] if as_floats else results


def _bits(labels: Tensor) -> Tensor:
    labels = torch.view_as_real(labels) if labels.is_complex() else labels
    return labels.view(torch.int32 if labels.dtype == torch.float32 else torch.int64)


def alike(labels: Tensor, dims: Sequence[int], mixture: Callable[[], int]) -> Tensor:
    """`labels` with size 1 along `dims`: the label that all have there which have one, or a mixture."""
    (few,) = packed(labels)
    dims = [dim % labels.dim() for dim in dims]
    if few.numel() and any(few.size(dim) > 1 for dim in dims):
        none, limit = few == NOTHING, torch.iinfo(few.dtype).max
        low = few.masked_fill(none, limit).amin(dims, keepdim=True)
        high = few.masked_fill(none, -limit).amax(dims, keepdim=True)
        few = low.masked_fill(low == limit, NOTHING)
        if bool((low < high).any()):
            few = few.masked_fill(low < high, mixture())
    elif not few.numel():
        few = few.new_zeros([1 if i in dims else n for i, n in enumerate(few.shape)])
    return few.expand([1 if i in dims else n for i, n in enumerate(labels.shape)])


def reduced(call: Call, labels: Tensor, mixture: Callable[[], int]) -> Tensor:
    """`alike` along the axes `dim` of a reduction, which the result may lack; along all when it names none."""
    if not labels.dim():
        return labels
    dim = call.values.get("dim")
    dims = [dim] if isinstance(dim, int) else list(dim or range(labels.dim()))
    kept = alike(labels, dims, mixture)
    if call.outs[0].dim() < kept.dim():
        for axis in sorted((d % labels.dim() for d in dims), reverse=True):
            kept = kept.squeeze(axis)
    return kept


def factors(call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of a product of matrices: a [.., m, k] and b [.., k, n], vectors made matrices of one row or column, and what is added to it."""
    first, second, extra = FACTORS[call.name]
    a, b = call.values[first], call.values[second]
    return a if a.dim() > 1 else a.unsqueeze(0), b if b.dim() > 1 else b.unsqueeze(1), call.tensor(extra)
