"""The tree of views that opens a packed axis into the parts of a layout, and the way back; `weave` joins several such trees for good."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from .arrays import Tensor, join, permute, unbind, window, zeros_like
from .layout import Factor, Layout, Path, Sum, count
from .sizes import Sizes


@dataclass(frozen=True, slots=True)
class Leaf:
    """One part after all cuts: axes `shape` in row order; `perm` puts them into counting order; `final` is (heads, dims)."""

    name: str
    shape: tuple[int, ...]
    perm: tuple[int, ...]
    final: tuple[int, int]

    @property
    def counted(self) -> tuple[int, ...]:
        """`shape` in counting order."""
        return tuple(self.shape[i] for i in self.perm)

    @property
    def ordered(self) -> bool:
        return self.perm == tuple(range(len(self.perm)))

    def merge(self, view: Tensor, axis: int) -> Tensor:
        """[..., *shape, ...] -> [..., heads, dims, ...]; a view if the strides allow it."""
        if not self.ordered:
            view = permute(view, axis, self.perm)
        if self.counted != self.final:
            at = axis + len(self.shape)
            view = view.reshape((*view.shape[:axis], *self.final, *view.shape[at:]))
        return view

    def unmerge(self, part: Tensor, axis: int) -> Tensor:
        """[..., heads, dims, ...] -> [..., *shape, ...]; always a view: axes are only cut."""
        if self.counted != self.final:
            part = part.reshape((*part.shape[:axis], *self.counted, *part.shape[axis + 2 :]))
        if not self.ordered:
            part = permute(part, axis, tuple(self.perm.index(i) for i in range(len(self.perm))))
        return part


@dataclass(frozen=True, slots=True)
class Node:
    """One step of opening a packed axis: cut axis `at` into `shape`, then take the pieces of axis `cut`."""

    at: int
    shape: Any  # tuple[int, ...], or None when there is nothing to cut
    cut: int
    pieces: tuple[tuple[int, int, Node], ...]  # (start, width, what follows)
    single: bool  # all pieces are one wide and lose the axis
    leaf: Leaf | None


@dataclass(frozen=True, slots=True)
class Tree:
    """How a packed axis is opened into its parts."""

    root: Node
    leaves: tuple[Leaf, ...]
    order: tuple[int, ...]  # for every part handed out, its leaf

    @property
    def quick(self) -> bool:
        """Whether the parts are what one cut of the axis and one unbind give."""
        plain = (child.leaf is not None and child.leaf.shape == child.leaf.final and child.leaf.ordered for _, _, child in self.root.pieces)
        return self.root.single and self.root.shape is not None and all(plain)


@dataclass(frozen=True, slots=True)
class Weave:
    """Tensors of some layouts -> one tensor of another, all decisions taken: reshapes, permutations and joins only. `weave` makes it.

    For code that runs at every step of a model: nothing is looked up, torch.compile can follow it, gradients flow through.
    """

    sources: tuple[Node, ...]
    order: tuple[int, ...]  # for every leaf of the target, its leaf among those of all sources
    target: Node

    def __call__(self, tensors: Sequence[Tensor], axis: int = -1) -> Tensor:
        """[..., rows] of every source -> [..., rows] of the target; a view when one leaf alone allows it."""
        axis = axis % tensors[0].ndim
        views: list[Tensor] = []
        for tensor, node in zip(tensors, self.sources, strict=True):
            open_axis(tensor, axis, node, views)
        batch = (*tensors[0].shape[:axis], *tensors[0].shape[axis + 1 :])
        return close_axis(iter([views[i] for i in self.order]), axis, self.target, batch, tensors[0], view=True)


@lru_cache(maxsize=1024)
def weave(sources: tuple[Layout, ...], target: Layout, sizes: Sizes) -> Weave:
    """How tensors laid out as `sources` become one laid out as `target`, which may want only some of their parts.

    No part may have two roles (k=v) or be declared zero (k=0).

    >>> import numpy as np
    >>> from .sizes import bind
    >>> join = weave((Layout("(q h d)"), Layout("(k h d)")), Layout("h (q|k) d"), bind("h (q|k) d", h=2, d=1))
    >>> join([np.array([0, 1]), np.array([2, 3])]).tolist()
    [0, 2, 1, 3]
    """
    trees = [tree_of(layout, sizes) for layout in sources]
    wanted = tree_of(target, sizes)
    have = [leaf.name for tree in trees for leaf in tree.leaves]
    return Weave(tuple(tree.root for tree in trees), tuple(have.index(leaf.name) for leaf in wanted.leaves), wanted.root)


@lru_cache(maxsize=1024)
def tree_of(layout: Layout, sizes: Sizes) -> Tree:
    """How an axis laid out as `layout` is opened, with all sizes in it."""
    leaves: list[Leaf] = []
    root = _node(layout.factors, 0, layout.factors, sizes, iter(layout.paths), leaves)
    at = {name: i for i, path in enumerate(layout.paths) for name in path.names}
    return Tree(root, tuple(leaves), tuple(at[name] for name in layout.parts))


def _node(factors: tuple[Factor, ...], at: int, fresh: tuple[Factor, ...], sizes: Sizes, paths: Iterator[Path], leaves: list[Leaf]) -> Node:
    """The step that opens `factors`, of which `fresh` still stand as one axis at `at`."""
    widths = tuple(count((factor,), sizes) for factor in fresh)
    shape = None if len(widths) == 1 else widths
    cut = next((i for i, factor in enumerate(factors) if isinstance(factor, Sum)), None)
    if cut is None:
        leaf = _leaf(next(paths), tuple(count((factor,), sizes) for factor in factors))
        leaves.append(leaf)
        return Node(at, shape, 0, (), False, leaf)
    branches = factors[cut].branches  # type: ignore[union-attr]
    single = all(not branch.factors for branch in branches)
    pieces = []
    start = 0
    for branch in branches:
        width = count(branch.factors, sizes)
        inner = (*factors[:cut], *branch.factors, *factors[cut + 1 :])
        child = _node(inner, cut, branch.factors, sizes, paths, leaves)
        pieces.append((start, width, replace(child, shape=None) if single else child))
        start += width
    return Node(at, shape, cut, tuple(pieces), single, None)


def _leaf(path: Path, shape: tuple[int, ...]) -> Leaf:
    counted = (*path.heads, *path.dims)
    size = dict(zip(path.axes, shape, strict=True))
    heads, dims = math.prod(size[a] for a in path.heads), math.prod(size[a] for a in path.dims)
    return Leaf(path.names[0], shape, tuple(path.axes.index(a) for a in counted), (heads, dims))


def open_axis(tensor: Tensor, axis: int, node: Node, views: list[Tensor], merge: bool = True) -> None:
    """Append a view of every leaf, or with `merge` its [..., heads, dims, ...] form. Cutting axes never copies."""
    if node.shape is not None:
        at = axis + node.at
        shape = tensor.shape
        tensor = tensor.reshape((*shape[:at], *node.shape, *shape[at + 1 :]))
    if node.leaf is not None:
        views.append(node.leaf.merge(tensor, axis) if merge else tensor)
    elif node.single:
        for piece, (_, _, child) in zip(unbind(tensor, axis + node.cut), node.pieces, strict=True):
            open_axis(piece, axis, child, views, merge)
    else:
        for start, width, child in node.pieces:
            open_axis(window(tensor, axis + node.cut, start, width), axis, child, views, merge)


def close_axis(tensors: Iterator[Tensor], axis: int, node: Node, batch: tuple[int, ...], like: Tensor, view: bool = False) -> Tensor:
    """The way back: leaves in order -> packed axis. A missing (zero) leaf becomes zeros. With `view`, a single piece is not copied."""
    if node.leaf is not None:
        part = next(tensors)
        tensor = zeros_like(like, (*batch[:axis], *node.leaf.shape, *batch[axis:])) if part is None else node.leaf.unmerge(part, axis)
    else:
        pieces = [close_axis(tensors, axis, child, batch, like, view) for _, _, child in node.pieces]
        tensor = pieces[0] if view and len(pieces) == 1 and not node.single else join(pieces, axis + node.cut, node.single)
    if node.shape is None:
        return tensor
    at = axis + node.at
    shape = tensor.shape
    return tensor.reshape((*shape[:at], math.prod(node.shape), *shape[at + len(node.shape) :]))
