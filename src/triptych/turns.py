"""How a matrix is turned from [in, out] to [out, in] or back: tiles of the output that are filled from strips of whole source lines.

The output is a matrix of lines, the source one of lines the other way. One axis is packed: its rows go from place to place in runs. The
other is plain. A tile is filled strip by strip: lines of the source are read, and their transpose is put where it belongs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .steps import Nest, starts

TILE = 5 << 20
"""Bytes of the output that are put together in memory."""
STRIP = 2 << 20
"""Bytes of source lines that are read at a time."""
PAD = 64
"""Bytes between two lines of a strip: lines a power of two apart would push each other out of the cache."""
CALL = 15_000
"""Bytes that are read in the time of one call to the system."""
MAX_LINES = 256

Run = tuple[int, int, int]
"""First place in the output, first place in the source, how many."""


class Turn(NamedTuple):
    """A turned tensor: `lines` lines of `length` items. `packed` is the axis of the output whose places the runs of the feeds permute."""

    item: int
    lines: int
    length: int
    packed: int
    pitches: tuple[int, ...]
    runs: tuple[tuple[Run, ...], ...]


class Strip(NamedTuple):
    """`lines` lines of source `feed`, from line `first`, of each the items `start` to `stop`, and where their transpose goes in a tile."""

    feed: int
    first: int
    lines: int
    start: int
    stop: int
    runs: tuple[Run, ...]


class Tile(NamedTuple):
    """Output lines `top` to `bottom`, of each the items `left` to `right`."""

    top: int
    bottom: int
    left: int
    right: int


@lru_cache(maxsize=64)
def turn(nests: tuple[tuple[Nest, ...], ...], sizes: tuple[int, ...], size: int) -> Turn | None:
    """A step of `size` bytes from feeds of `sizes` bytes as a turned matrix, or None when it is none."""
    every = [n for feed in nests for n in feed]
    item = every[0].width if every else 0
    if item not in (1, 2, 4, 8) or any(n.width != item or not n.dims for n in every):
        return None
    return _turned(nests, sizes, size, item, 0) or _turned(nests, sizes, size, item, 1)


def _turned(nests: tuple[tuple[Nest, ...], ...], sizes: tuple[int, ...], size: int, item: int, packed: int) -> Turn | None:
    side = -1 if packed == 0 else 0
    plain = next(n for feed in nests for n in feed).dims[side][0]
    if any(whole % (plain * item) for whole in (size, *sizes)):
        return None
    line = plain * item if packed == 0 else size // plain
    pitches = tuple(whole // plain if packed == 0 else plain * item for whole in sizes)
    unit_out, unit_in = (line, item) if packed == 0 else (item, plain * item)
    runs: list[tuple[Run, ...]] = []
    for pitch, feed in zip(pitches, nests, strict=True):
        found: list[Run] = []
        for n in feed:
            rest = n.dims[:-1] if packed == 0 else n.dims[1:]
            outs, ins = (n.out, *(to for _, to, _ in rest)), (n.into, *(of for _, _, of in rest))
            if n.dims[side] != (plain, item if packed == 0 else line, pitch if packed == 0 else item):
                return None
            if any(to % unit_out for to in outs) or any(of % unit_in for of in ins):
                return None
            outer = [dim for dim in rest if dim[1:] != (unit_out, unit_in)]
            count = math.prod(k for k, to, of in rest if (to, of) == (unit_out, unit_in))
            places = zip(starts(n.out, outer, 1).tolist(), starts(n.into, outer, 2).tolist(), strict=True)
            found += [(out // unit_out, into // unit_in, count) for out, into in places]
        runs.append(tuple(sorted(found)))
    return Turn(item, size // line, line // item, packed, pitches, tuple(runs))


@lru_cache(maxsize=64)
def tile_of(turned: Turn) -> tuple[int, int]:
    """(lines, items of a line) of a tile: what is read too much, and how many calls it takes, weighed against each other."""
    item, column, length = turned.item, turned.lines, turned.length
    best, least = (1, 1), math.inf
    for parts in range(1, column + 1):
        lines = -(-column // parts)
        items = min(length, TILE // item // lines)
        if not items or lines * item > STRIP - 2 * PAD:
            continue
        read = min(column / lines, 1 + CALL / (lines * item))
        cost = read + (0 if items == length else CALL / (items * item))
        if cost < least:
            best, least = (lines, items), cost
        if items == length:
            break
    return best


def tiles(turned: Turn) -> Iterator[Tile]:
    """The whole output, tile by tile."""
    lines, items = tile_of(turned)
    for top in range(0, turned.lines, lines):
        for left in range(0, turned.length, items):
            yield Tile(top, min(top + lines, turned.lines), left, min(left + items, turned.length))


def strips(turned: Turn, tile: Tile) -> Iterator[Strip]:
    """What fills one tile; places in the runs are those of the tile and of the strip."""
    low, high = (tile.top, tile.bottom) if turned.packed == 0 else (tile.left, tile.right)
    for feed, (pitch, runs) in enumerate(zip(turned.pitches, turned.runs, strict=True)):
        mine = [
            (max(out, low) - low, into + max(low - out, 0), min(out + count, high) - max(out, low))
            for out, into, count in runs
            if out < high and out + count > low
        ]
        if turned.packed == 0 and mine:
            yield from _across(feed, mine, pitch, turned.item, tile)
        elif mine:
            start, stop = _whole(tile.top, tile.bottom, pitch, turned.item)
            yield from _along(feed, sorted((into, out, count) for out, into, count in mine), pitch, turned.item, start, stop)


def stride(size: int) -> int:
    """Bytes from one line of a strip to the next, for lines of `size` bytes."""
    return size + (PAD if (size + PAD) % 512 else 2 * PAD)


def _whole(start: int, stop: int, pitch: int, item: int) -> tuple[int, int]:
    """A part of every line, or the lines as a whole where that is read sooner than line by line."""
    return (0, pitch // item) if pitch - (stop - start) * item < CALL and pitch <= STRIP - 2 * PAD else (start, stop)


def _most(items: int, item: int) -> int:
    return max(1, min(MAX_LINES, STRIP // stride(items * item)))


def _across(feed: int, runs: list[Run], pitch: int, item: int, tile: Tile) -> Iterator[Strip]:
    """Strips whose lines run across the packed axis: all lines, of each what lies between the first and the last run."""
    start, stop = min(into for _, into, _ in runs), max(into + count for _, into, count in runs)
    groups = [runs] if (stop - start) * item <= STRIP - 2 * PAD else [[run] for run in runs]
    for group in groups:
        start, stop = min(into for _, into, _ in group), max(into + count for _, into, count in group)
        start, stop = _whole(start, stop, pitch, item)
        placed, most = tuple((out, into - start, count) for out, into, count in group), _most(stop - start, item)
        for first in range(tile.left, tile.right, most):
            yield Strip(feed, first, min(most, tile.right - first), start, stop, placed)


def _along(feed: int, runs: list[Run], pitch: int, item: int, start: int, stop: int) -> Iterator[Strip]:
    """Strips whose lines are those of the packed axis, here as (source, output, count): lines that lie near each other."""
    most, near = _most(stop - start, item), CALL // pitch
    first, last = 0, 0
    some: list[Run] = []
    for run in runs:
        into, out, count = run
        while count:
            if some and (into - first >= most or into > last + near):
                yield Strip(feed, first, last - first, start, stop, tuple(some))
                some = []
            if not some:
                first = last = into
            taken = min(count, first + most - into)
            some.append((out, into - first, taken))
            last = max(last, into + taken)
            into, out, count = into + taken, out + taken, count - taken
    if some:
        yield Strip(feed, first, last - first, start, stop, tuple(some))


def put(turned: Turn, tile: Tile, strip: Strip, lines: NDArray[Any], out: NDArray[Any]) -> None:
    """Fill a tile [lines, items] from the lines [count, items] of a strip."""
    if turned.packed == 0:
        at = strip.first - tile.left
        for place, into, count in strip.runs:
            np.copyto(out[place : place + count, at : at + strip.lines], lines[:, into : into + count].T)
        return
    mine = slice(tile.top - strip.start, tile.bottom - strip.start)
    for place, into, count in strip.runs:
        np.copyto(out[:, place : place + count], lines[into : into + count, mine].T)
