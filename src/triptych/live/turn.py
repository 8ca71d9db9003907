"""PyTorch lines that turn one tensor into the order, orientation and shape of another; exchanges of axes to try."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ..layout import Layout
from ..pairs import Index
from ..render_code import convert_lines, part_line
from ..sizes import Sizes
from .match import Matrix, Tensor

SHORT = 64
"""An index list up to this length is written out."""


class Move(NamedTuple):
    """Axes cut into `cut` unless None, exchanged to `order`, and cut into `joined` unless None; `text` says it in PyTorch."""

    text: str
    cut: tuple[int, ...] | None
    order: tuple[int, ...]
    joined: tuple[int, ...] | None


def moves(shape_a: tuple[int, ...], shape_b: tuple[int, ...]) -> Iterator[Move]:
    """Exchanges of axes that give `shape_a`: plain, of axes cut another way, or with the result cut another way."""
    plain: list[Move] = []
    before: list[Move] = []
    after: list[Move] = []
    for order in itertools.permutations(range(len(shape_b))):
        if list(order) != sorted(order):
            fits = tuple(shape_b[i] for i in order) == shape_a
            (plain if fits else after).append(_move(None, order, None if fits else shape_a))
    for order in itertools.permutations(range(len(shape_a))):
        cut = tuple(shape_a[order.index(i)] for i in range(len(order)))
        if list(order) != sorted(order) and cut != shape_b:
            before.append(_move(cut, order, None))
    yield from (*plain, *before, *after)


def _move(cut: tuple[int, ...] | None, order: tuple[int, ...], joined: tuple[int, ...] | None) -> Move:
    return Move(_chain(cut, order, joined), cut, order, joined)


def _chain(cut: Sequence[int] | None, order: tuple[int, ...], joined: Sequence[int] | None) -> str:
    text = f".reshape{tuple(cut)}" if cut else ""
    moved = [i for i, axis in enumerate(order) if i != axis]
    if moved == [0, 1] and len(order) == 2:
        text += ".T"
    elif len(moved) == 2:
        text += f".transpose({moved[0]}, {moved[1]})"
    elif moved:
        text += f".permute{order}"
    return text + (f".reshape{tuple(joined)}" if joined else "")


def places_of(move: Move, shape_b: tuple[int, ...], flat: Index) -> Index:
    """The element of b (flat) that the move puts at element `flat` of its result."""
    cut = move.cut or shape_b
    at = np.unravel_index(flat, tuple(cut[i] for i in move.order))
    return np.ravel_multi_index([at[move.order.index(i)] for i in range(len(cut))], cut)


def moved(tensor: Tensor, move: Move) -> Tensor:
    """The move done; a copy where axes are cut across."""
    tensor = tensor.reshape(move.cut) if move.cut else tensor
    tensor = tensor.transpose(move.order) if isinstance(tensor, np.ndarray) else tensor.permute(move.order)
    return tensor.reshape(move.joined) if move.joined else tensor


def to_order_of(a: Matrix, b: Matrix, layouts: tuple[Layout, Layout, Sizes] | None, index: Index) -> str:
    """Lines that turn `b` into a's rows and shape: through layouts (a's, b's, sizes), else by an index list."""
    lines = [*_table(b)]
    bias = len(b.tensor.shape) == 1
    axis = 0 if b.rows_first else -1
    if layouts:
        ours, theirs, sizes = layouts
        lines += convert_lines(theirs, ours, sizes, source="b", axis=axis, bias=bias)
    else:
        listed = f"torch.tensor({index.tolist()})" if len(index) <= SHORT else "torch.from_numpy(diagnosis.indices)"
        lines.append(f"b = b.index_select({axis}, {listed})")
    return "\n".join([*lines, *_back(a, b)])


def _table(b: Matrix) -> Iterator[str]:
    """b as [rows, -1] or [-1, rows], contiguous."""
    chain = _chain(None, b.order, None)
    if len(b.order) > 2 or chain:
        yield f"b = b{chain}.reshape{(b.rows, -1) if b.rows_first else (-1, b.rows)}"
    elif not (b.tensor.flags.c_contiguous if isinstance(b.tensor, np.ndarray) else b.tensor.is_contiguous()):
        yield "b = b.contiguous()"


def _back(a: Matrix, b: Matrix) -> Iterator[str]:
    """From there to a's shape."""
    chain = "" if a.rows_first == b.rows_first else ".T"
    shape = tuple(a.tensor.shape)
    if len(shape) > 2 or len(shape) != min(2, len(b.order)):
        back = tuple(a.order.index(i) for i in range(len(shape)))
        chain += f".reshape{tuple(shape[i] for i in a.order)}" + _chain(None, back, None)
    if chain:
        yield f"b = b{chain}"


def from_fused(layout: Layout, sizes: Sizes, part: str | None, name: str) -> str:
    """The line that reads a part's rows out of the fused weight; the whole weight if `part` is None."""
    return f"{name} = " + (part_line(layout, sizes, part) if part else "weight")


def numbers(rows: Index) -> str:
    """Row numbers as ranges, at most six.

    >>> numbers(np.array([0, 1, 2, 5]))
    '0-2, 5'
    """
    breaks = [0, *(i for i in range(1, len(rows)) if rows[i] != rows[i - 1] + 1), len(rows)]
    spans = [(int(rows[i]), int(rows[j - 1])) for i, j in itertools.pairwise(breaks)]
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in spans[:6]]
    return ", ".join(texts) + (", ..." if len(spans) > 6 else "")
