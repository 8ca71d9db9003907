"""split, fuse, repack on NumPy arrays and torch tensors. Values are moved, never decoded; views where a view exists."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from .arrays import (
    Tensor,
    bits,
    empty_like,
    normal_axis,
    overlaps,
    shape_of,
    strided,
    tracks_gradients,
    window,
)
from .errors import LayoutError, SizeError
from .layout import Layout, count
from .rowmap import ZERO, RowMap, between, from_indices, parts
from .sizes import Sizes, bind
from .weave import close_axis, open_axis, tree_of

MAX_STRIDED_BLOCKS = 64


class Parts(tuple[Tensor, ...]):
    """The parts of a split, in the order q, k, v, gate, up, others; also by name: `parts.q`, `parts["q.rot"]`."""

    names: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> Tensor:
        if name in self.names:
            return tuple.__getitem__(self, self.names.index(name))
        raise AttributeError(f"no part {name!r}; there are {', '.join(self.names)}")

    def __getitem__(self, key: Any) -> Any:
        return self.__getattr__(key) if isinstance(key, str) else tuple.__getitem__(self, key)  # a part may be called `count` or `index`

    def __reduce__(self) -> tuple[object, ...]:
        return _named, (self.names, tuple(self))


@lru_cache(maxsize=256)
def _kind(names: tuple[str, ...]) -> type[Parts]:
    return type("Parts", (Parts,), {"names": names})


def _named(names: tuple[str, ...], tensors: tuple[Tensor, ...]) -> Parts:
    return _kind(names)(tensors)


def split(tensor: Tensor, layout: Layout | str, axis: int = -1, **sizes: int) -> Parts:
    """The parts of a packed axis, which becomes two axes (heads, dims): [..., rows] -> [..., heads, dims] for each part.

    Args:
        tensor: an activation [..., rows], or with axis=0 a weight [rows, in] or a bias [rows]; NumPy or torch, any dtype, any strides.
        layout: how the rows lie.
        axis: the packed axis.
        sizes: any that determine the layout together with the row count.
    Returns: a tuple in the order q, k, v, gate, up, then others as they appear; also by name. A part is a *view* whenever its
        heads lie at one stride and its dims at one stride. That holds for every part with one head axis and one dim axis; two
        head axes (`q` of `g (q r|k|v) d` with g, r > 1; tiled `r g`) or two dim axes out of order (`p c`) need a *copy*.
        Gradients flow through either.
    Raises SizeError when the rows do not fill the layout.

    >>> q, k, v = split(np.arange(12), "h (q|k|v) d", h=2)
    >>> q.tolist(), k.tolist()
    ([[0, 1], [6, 7]], [[2, 3], [8, 9]])
    """
    try:
        shape, cut, kind, order = _QUICK[(layout, axis, type(tensor), tensor.shape, *sizes.items())]
    except (KeyError, TypeError, AttributeError):
        return _split(tensor, layout, axis, sizes)
    pieces = tensor.view(*shape).unbind(cut)  # star: torch parses ints faster than a tuple
    return kind(pieces if order is None else [pieces[i] for i in order])


def fuse(
    tensors: Mapping[str, Tensor] | Sequence[Tensor], layout: Layout | str, axis: int = -1, out: Tensor | None = None, **sizes: int
) -> Tensor:
    """The inverse of `split`: parts [..., heads, dims] -> [..., rows], laid out as `layout`.

    Args:
        tensors: by part name, or in the order in which `split` returns them. Parts declared zero (k=0) may be left out;
            of aliased parts (k=v) one is enough.
        axis: the place of the packed axis in the result; each part has (heads, dims) there.
        out: where to write; then nothing is allocated and `out` is returned.
        sizes: needed only where the shapes leave them open.
    Returns: a new tensor, or `out`. Gradients flow through.
    Raises LayoutError for missing or surplus parts and for parts of several dtypes, SizeError for shapes that do not fit.

    >>> fuse({"q": np.array([[0, 1]]), "k": np.array([[2, 3]]), "v": np.array([[4, 5]])}, "h (q|k|v) d").tolist()
    [0, 1, 2, 3, 4, 5]
    """
    layout = Layout(layout)
    named = _by_name(tensors, layout)
    some = next(iter(named.values()))
    axis = normal_axis(axis, some.ndim - 1, some.shape)
    bound = bind(layout, **{**_sizes_of(layout, named, axis), **sizes})
    batch = (*some.shape[:axis], *some.shape[axis + 2 :])
    for part in parts(layout, bound):
        for name in part.path.names:
            if name in named and shape_of(named[name]) != (*batch[:axis], *part.shape, *batch[axis:]):
                raise SizeError(
                    "a part does not fit the layout",
                    tensor=name,
                    layout=f"{layout} with {bound.of(layout)}",
                    expected=(*batch[:axis], *part.shape, *batch[axis:]),
                    found=shape_of(named[name]),
                )
    if other := next((name for name, part in named.items() if part.dtype != some.dtype), None):
        raise LayoutError("parts have different dtypes", tensor=other, expected=some.dtype, found=named[other].dtype)
    tree = tree_of(layout, bound)
    if out is None:
        return close_axis(iter([named.get(leaf.name) for leaf in tree.leaves]), axis, tree.root, batch, some)
    wanted = (*batch[:axis], count(layout.factors, bound), *batch[axis:])
    if shape_of(out) != wanted or out.dtype != some.dtype:
        raise SizeError("`out` does not fit", expected=f"{wanted} {some.dtype}", found=f"{shape_of(out)} {out.dtype}")
    views: list[Tensor] = []
    open_axis(out, axis, tree.root, views, merge=False)
    for view, leaf in zip(views, tree.leaves, strict=True):
        if named.get(leaf.name) is None:
            view[...] = 0
        else:
            view[...] = leaf.unmerge(named[leaf.name], axis)
    return out


def repack(tensor: Tensor, source: Layout | str, target: Layout | str, axis: int = -1, out: Tensor | None = None, **sizes: int) -> Tensor:
    """Rows laid out as `source`, laid out as `target`; same values, same dtype, other order.

    Args:
        axis: the packed axis: 0 for a weight [rows, in] or a bias, -1 for an activation or a Conv1D weight [in, rows].
        out: where to write, not overlapping `tensor`; at the speed of a copy, where a fresh tensor costs several times that.
    Returns: a new tensor, or `out`. Gradients flow through when `out` is not given.
    Raises IncompatibleError when the layouts label different rows, SizeError when the rows do not fill them,
        LayoutError when rows that `source` declares zero (k=0) are not zero.

    >>> repack(np.arange(6), "h (q|k|v) d", "(q|k|v) h d", h=2).tolist()
    [0, 3, 1, 4, 2, 5]
    """
    source, target = Layout(source), Layout(target)
    axis = normal_axis(axis, tensor.ndim, tensor.shape)
    bound = _bound((source, target), shape_of(tensor), axis, sizes)
    for part in parts(source, bound):
        if part.path.zero and bool((bits(move(tensor, from_indices(part.rows().ravel(), tensor.shape[axis]), axis)) != 0).any()):
            raise LayoutError(
                "rows that the layout declares zero are not zero",
                layout=f"{source} with {bound.of(source)}",
                found=f"part {part.path.names[0]} holds other values",
                try_=f"write {part.path.names[0]} without =0",
            )
    return move(tensor, between(source, target, bound), axis, out)


def move(tensor: Tensor, rows: RowMap, axis: int = 0, out: Tensor | None = None) -> Tensor:
    """Apply a row map along `axis`: result row i is source row `rows.indices[i]`, or zero. For orders that no layout can say.

    Returns: a new tensor, or `out`, which must not overlap `tensor`. Gradients flow through when `out` is not given.
    Raises SizeError for another number of rows.
    """
    axis = normal_axis(axis, tensor.ndim, tensor.shape)
    shape = shape_of(tensor)
    wanted = (*shape[:axis], rows.rows_out, *shape[axis + 1 :])
    if shape[axis] != rows.rows_in:
        raise SizeError("the map does not fit", expected=f"{rows.rows_in} rows", found=f"{shape}   -> {shape[axis]} rows")
    if out is not None and (shape_of(out) != wanted or out.dtype != tensor.dtype):
        raise SizeError("`out` does not fit", expected=f"{wanted} {tensor.dtype}", found=f"{shape_of(out)} {out.dtype}")
    if out is not None and overlaps(tensor, out):
        raise LayoutError("`out` shares memory with the source", try_="give another tensor: rows would be overwritten before they are read")
    if tracks_gradients(tensor):
        if out is not None:
            raise LayoutError("`out` and gradients exclude each other", try_="leave `out` away, or work under torch.no_grad()")
        return _gather(tensor, rows, axis)
    result = out if out is not None else empty_like(tensor, wanted)
    source, target = bits(tensor), bits(result)
    if sum(block.rows for block in rows.blocks) < rows.rows_out:
        target[...] = 0
    if len(rows.blocks) > MAX_STRIDED_BLOCKS:
        for at, into, length in rows.runs.tolist():
            if into >= 0:
                window(target, axis, at, length)[...] = window(source, axis, into, length)
        return result
    for block in rows.blocks:
        sizes = [dim.size for dim in block.dims] or [1]
        strided(target, axis, block.out, sizes, [dim.out for dim in block.dims] or [1])[...] = strided(
            source, axis, block.into, sizes, [dim.into for dim in block.dims] or [1]
        )
    return result


_QUICK: dict[tuple[object, ...], tuple[tuple[int, ...], int, type[Parts], tuple[int, ...] | None]] = {}
"""Calls of `split` on torch tensors that come down to one view and one unbind: exact call -> (view shape, unbind axis, kind, order)."""


def _split(tensor: Tensor, layout: Layout | str, axis: int, sizes: Mapping[str, int]) -> Parts:
    """`split` with all checks, for any layout."""
    shape = shape_of(tensor)
    at = normal_axis(axis, len(shape), shape)
    value = Layout(layout)
    tree = tree_of(value, _bound((value,), shape, at, sizes))
    root = tree.root
    if tree.quick and not isinstance(tensor, np.ndarray):
        if len(_QUICK) > 4096:
            _QUICK.clear()
        order = None if tree.order == tuple(range(len(tree.leaves))) else tree.order
        full = (*shape[:at], *root.shape, *shape[at + 1 :])
        _QUICK[(layout, axis, type(tensor), tensor.shape, *sizes.items())] = (full, at + root.cut, _kind(value.parts), order)
    views: list[Tensor] = []
    open_axis(tensor, at, root, views)
    return _kind(value.parts)([views[i] for i in tree.order])


def _bound(layouts: Sequence[Layout], shape: tuple[int, ...], axis: int, sizes: Mapping[str, int]) -> Sizes:
    """The sizes of layouts that fill an axis; where they fill another one, the error says which."""
    try:
        return bind(*layouts, rows=shape[axis], **sizes)
    except SizeError as error:
        for other in range(len(shape)):
            if other != axis and shape[other] != shape[axis] and _fills(layouts, shape[other], sizes):
                try_ = f"axis={other}: its {shape[other]} rows fit"
                raise SizeError(error.what, **{**error.fields, "try": None}, try_=try_) from None
        raise


def _fills(layouts: Sequence[Layout], rows: int, sizes: Mapping[str, int]) -> bool:
    try:
        bind(*layouts, rows=rows, **sizes)
    except SizeError:
        return False
    return True


def _by_name(tensors: Mapping[str, Tensor] | Sequence[Tensor], layout: Layout) -> dict[str, Tensor]:
    """Parts by the first name of their path, complete."""
    if not isinstance(tensors, Mapping):
        if len(tensors) != len(layout.parts):
            raise LayoutError(
                "another number of parts", layout=str(layout), expected=", ".join(layout.parts), found=f"{len(tensors)} tensors"
            )
        tensors = dict(zip(layout.parts, tensors, strict=True))
    surplus = [name for name in tensors if name not in layout.parts]
    missing = [p.names[0] for p in layout.paths if not p.zero and not any(name in tensors for name in p.names)]
    if surplus or missing:
        raise LayoutError(
            "parts do not match the layout", layout=str(layout), expected=", ".join(layout.parts), found=", ".join(tensors) or "none"
        )
    named = {}
    for path in layout.paths:
        given = [tensors[name] for name in path.names if name in tensors]
        for other in given[1:]:
            if shape_of(other) != shape_of(given[0]) or not bool((bits(other) == bits(given[0])).all()):
                raise LayoutError(
                    f"{' and '.join(path.names)} are one tensor in this layout", layout=str(layout), found="two tensors that differ"
                )
        if given:
            named[path.names[0]] = given[0]
    if not named:
        raise LayoutError("at least one part must be given", layout=str(layout), found="none")
    return named


def _sizes_of(layout: Layout, named: Mapping[str, Tensor], axis: int) -> dict[str, int]:
    """The sizes that the parts' shapes tell: a single axis, or a full product such as heads = g * r = h."""
    found: dict[str, int] = {}
    for path in layout.paths:
        if path.names[0] not in named:
            continue
        for axes_, size in zip((path.heads, path.dims), shape_of(named[path.names[0]])[axis : axis + 2], strict=True):
            axis_ = _PRODUCT_NAMES.get(axes_) or (axes_[0] if len(axes_) == 1 else None)
            if axis_:
                found.setdefault(axis_, size)
    return found


_PRODUCT_NAMES = {("g", "r"): "h", ("t", "n", "r"): "h", ("m", "n", "r"): "h", ("t", "n"): "g", ("m", "n"): "g", ("c", "p"): "d"}


def _gather(tensor: Tensor, rows: RowMap, axis: int) -> Tensor:
    """The same by index_select, which autograd can follow; zeros come from an extra row at the end."""
    torch = sys.modules["torch"]
    index = torch.from_numpy(rows.indices.copy()).to(tensor.device)
    if rows.indices.min(initial=0) == ZERO:
        shape = shape_of(tensor)
        tensor = torch.cat((tensor, tensor.new_zeros((*shape[:axis], 1, *shape[axis + 1 :]))), axis)
        index = torch.where(index == ZERO, rows.rows_in, index)
    return tensor.index_select(axis, index)
