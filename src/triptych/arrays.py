"""The few operations on NumPy arrays and torch tensors that `tensors.py` needs, each in one spelling for both. Torch is never imported."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from .errors import LayoutError, SizeError

Tensor = Any
"""numpy.ndarray or torch.Tensor."""


def normal_axis(axis: int, ndim: int, shape: tuple[int, ...]) -> int:
    """An axis counted from the first one. Raises SizeError where there is none."""
    if not -ndim <= axis < ndim:
        raise SizeError("no such axis", expected=f"{-ndim} to {ndim - 1}", found=f"axis {axis} of {tuple(shape)}")
    return axis % ndim


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """The shape of a tensor. Raises LayoutError for what is none."""
    try:
        return tuple(tensor.shape)
    except AttributeError:
        raise LayoutError("this is no tensor", found=type(tensor).__name__, expected="a NumPy array or a torch tensor") from None


def permute(tensor: Tensor, axis: int, perm: tuple[int, ...]) -> Tensor:
    """A view in which the axes from `axis` on stand in the order `perm`."""
    order = (*range(axis), *(axis + i for i in perm), *range(axis + len(perm), tensor.ndim))
    return tensor.transpose(order) if isinstance(tensor, np.ndarray) else tensor.permute(order)


def unbind(tensor: Tensor, axis: int) -> Sequence[Tensor]:
    """Views of the slices along an axis, which they lose."""
    if isinstance(tensor, np.ndarray):
        return [tensor[(slice(None),) * axis + (i,)] for i in range(tensor.shape[axis])]
    return tensor.unbind(axis)  # type: ignore[no-any-return]


def window(tensor: Tensor, axis: int, start: int, length: int) -> Tensor:
    """A view of `length` slices along an axis."""
    if isinstance(tensor, np.ndarray):
        return tensor[(slice(None),) * axis + (slice(start, start + length),)]
    return tensor.narrow(axis, start, length)


def join(pieces: Sequence[Tensor], axis: int, new_axis: bool) -> Tensor:
    """A new tensor of all pieces one after the other along an axis, or along a new one."""
    if isinstance(pieces[0], np.ndarray):
        return np.stack(pieces, axis) if new_axis else np.concatenate(pieces, axis)
    torch = sys.modules["torch"]
    return torch.stack(tuple(pieces), axis) if new_axis else torch.cat(tuple(pieces), axis)


def zeros_like(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return np.zeros(shape, like.dtype) if isinstance(like, np.ndarray) else like.new_zeros(shape)


def empty_like(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return np.empty(shape, like.dtype) if isinstance(like, np.ndarray) else like.new_empty(shape)


def bits(tensor: Tensor) -> Tensor:
    """The same memory as integers, so that copies and comparisons see bits; 16-byte and integer values stay as they are."""
    if tensor.dtype.itemsize > 8:
        return tensor
    if isinstance(tensor, np.ndarray):
        return tensor.view(f"u{tensor.dtype.itemsize}")
    torch = sys.modules["torch"]
    plain = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize]
    return tensor.detach().view(plain)


def strided(tensor: Tensor, axis: int, start: int, sizes: Sequence[int], steps: Sequence[int]) -> Tensor:
    """A view of `axis` as a nest of steps, in rows, from row `start`."""
    shape = shape_of(tensor)
    shape = (*shape[:axis], *sizes, *shape[axis + 1 :])
    if isinstance(tensor, np.ndarray):
        strides = (*tensor.strides[:axis], *(step * tensor.strides[axis] for step in steps), *tensor.strides[axis + 1 :])
        return np.lib.stride_tricks.as_strided(window(tensor, axis, start, 1), shape, strides)
    unit = tensor.stride(axis)
    strides = (*tensor.stride()[:axis], *(step * unit for step in steps), *tensor.stride()[axis + 1 :])
    return tensor.as_strided(shape, strides, tensor.storage_offset() + start * unit)


def tracks_gradients(tensor: Tensor) -> bool:
    return bool(getattr(tensor, "requires_grad", False)) and bool(sys.modules["torch"].is_grad_enabled())


def overlaps(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors may share memory."""
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and np.may_share_memory(a, b)
    spans = []
    for tensor in (a, b):
        reach = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
        spans.append((tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.dtype.itemsize))
    return bool(a.device == b.device and spans[0][0] < spans[1][1] and spans[1][0] < spans[0][1])
