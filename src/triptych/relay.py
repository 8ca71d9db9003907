"""From layouts to bytes: the row map between tensors that belong together, cut where tensors begin, as strided nests of bytes."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .errors import SizeError
from .layout import Layout, count
from .pieces import together
from .rowmap import Block, Dim, between
from .sizes import Sizes
from .steps import Nest, nest

MAX_ROWS = 1 << 22


class Cut(NamedTuple):
    """Rows of one output tensor: blocks by number of the source tensor, counted from the first rows of both; rows that no source fills."""

    rows: int
    blocks: tuple[tuple[int, tuple[Block, ...]], ...]
    zeros: tuple[Block, ...]


class Relay(NamedTuple):
    """All output tensors, and by number of the source tensor the rows that go nowhere (those that its layout declares zero)."""

    cuts: tuple[Cut, ...]
    unused: tuple[tuple[int, tuple[Block, ...]], ...]


@lru_cache(maxsize=256)
def relay(sources: tuple[Layout, ...], targets: tuple[Layout, ...], sizes: Sizes) -> Relay:
    """How tensors laid out as `sources` become tensors laid out as `targets`. Raises IncompatibleError when they label other rows.

    >>> from .sizes import bind
    >>> apart = Layout("(q h d)"), Layout("(k h d)")
    >>> [cut.blocks for cut in relay((Layout("h (q|k) d"),), apart, bind(*apart, h=2, d=3)).cuts][1]
    ((0, (Block(out=0, into=3, dims=(Dim(size=2, out=3, into=6), Dim(size=3, out=1, into=1))),)),)
    """
    begin_in, begin_out = (_begins(side, sizes) for side in (sources, targets))
    if max(begin_in[-1], begin_out[-1]) > MAX_ROWS:
        raise SizeError(
            "too many rows in one projection", layout=together(targets), found=f"{begin_in[-1]} rows", expected=f"at most {MAX_ROWS}"
        )
    rows = between(together(sources), together(targets), sizes)
    blocks: dict[tuple[int, int], list[Block]] = {}
    for block in rows.blocks:
        t, s = bisect_right(begin_out, block.out) - 1, bisect_right(begin_in, block.into) - 1
        blocks.setdefault((t, s), []).append(Block(block.out - begin_out[t], block.into - begin_in[s], block.dims))
    origin = rows.indices
    filled, used = origin >= 0, np.zeros(rows.rows_in, bool)
    used[origin[filled]] = True
    cuts = []
    for t, (start, stop) in enumerate(itertools.pairwise(begin_out)):
        mine = tuple((s, tuple(found)) for (at, s), found in sorted(blocks.items()) if at == t)
        cuts.append(Cut(stop - start, mine, _gaps(filled[start:stop])))
    unused = ((s, _gaps(used[start:stop])) for s, (start, stop) in enumerate(itertools.pairwise(begin_in)))
    return Relay(tuple(cuts), tuple((s, gaps) for s, gaps in unused if gaps))


def _begins(layouts: tuple[Layout, ...], sizes: Sizes) -> list[int]:
    return list(itertools.accumulate((count(layout.factors, sizes) for layout in layouts), initial=0))


def _gaps(marks: NDArray[np.bool_]) -> tuple[Block, ...]:
    """The runs of rows that are not marked."""
    edges = np.flatnonzero(np.diff(np.concatenate([[True], marks, [True]]).astype(np.int8))).tolist()
    return tuple(Block(a, a, (Dim(b - a, 1, 1),)) for a, b in zip(edges[::2], edges[1::2], strict=True))


def in_nests(blocks: tuple[Block, ...], outer: int, inner: int, rows_out: int, rows_in: int) -> tuple[Nest, ...]:
    """Blocks of rows along an axis with `outer` slices before it and `inner` bytes behind it, as bytes; none where there are no bytes."""
    return tuple(_nest(block, outer, inner, rows_out, rows_in) for block in blocks) if outer * inner else ()


def _nest(block: Block, outer: int, inner: int, rows_out: int, rows_in: int) -> Nest:
    small = nest(block.out * inner, block.into * inner, inner, [(n, out * inner, into * inner) for n, out, into in block.dims])
    if outer == 1:
        return small
    if small.width == rows_out * inner == rows_in * inner:
        return Nest(0, 0, outer * small.width)
    return small._replace(dims=((outer, rows_out * inner, rows_in * inner), *small.dims))


def in_turned_nests(blocks: tuple[Block, ...], wide: int, item: int, rows_out: int, rows_in: int, axis: int) -> tuple[Nest, ...]:
    """Blocks of rows of `wide` items, `item` bytes each, of a matrix packed along its other axis; the output is packed along `axis`."""
    if not wide * item:
        return ()
    if axis == 0:  # rows of the output are columns of the source
        return tuple(
            nest(b.out * wide * item, b.into * item, item,
                 [*((n, out * wide * item, into * item) for n, out, into in b.dims), (wide, item, rows_in * item)])
            for b in blocks
        )  # fmt: skip
    return tuple(
        nest(b.out * item, b.into * wide * item, item,
             [(wide, rows_out * item, item), *((n, out * item, into * wide * item) for n, out, into in b.dims)])
        for b in blocks
    )  # fmt: skip
