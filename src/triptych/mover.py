"""Moves the bytes of one step: reads scattered straight into their permuted place of one reused buffer, then few large writes.

Four ways, chosen by the shape of the nests alone and cached, since all layers of a checkpoint share them:

    whole    one run: read and write window by window
    windows  long runs: a window is contiguous in the output (many reads, one write) or in the source (one read, several writes),
             whichever takes fewer system calls
    tiles    short runs: read a band of both sides' rows, permute it in memory, write it
    turns    a matrix from [in, out] to [out, in] or back: tiles of the output, filled from strips of source lines (turns.py)
"""

from __future__ import annotations

import errno
import math
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .errors import FormatError
from .steps import Feed, Nest, Step, starts
from .turns import STRIP, TILE, Strip, Turn, put, stride, strips, tiles, turn

WINDOW = 1 << 20
PORTION = 8 << 20
"""Bytes that are begun to be brought to the disk at a time."""
SHORT = 2048
"""Runs shorter than this many bytes on average are permuted in memory where that is possible."""
LINE = 64
BRIDGE = 24 << 10
"""Gaps in a source up to so many bytes are read with what lies around them, and forgotten: sooner done than another call."""
FEW = 6
"""Calls for each window that are few enough."""
MAX_RUNS = 1 << 16
MAX_VECTORS = 1024

Tick = Callable[[int], None]
Ints = NDArray[np.int64]


class Read(NamedTuple):
    """One scatter read: from byte `at` of source `feed` into the slices of the buffer; (-n, 0) are n bytes that nobody needs."""

    feed: int
    at: int
    slices: tuple[tuple[int, int], ...]
    size: int


class Window(NamedTuple):
    """One filling of the buffer: reads, then writes of (output byte, slice of the buffer)."""

    reads: tuple[Read, ...]
    writes: tuple[tuple[int, int, int], ...]


class Tiles(NamedTuple):
    """`bands` bands of the output, `width` bytes each, that need the bands of `widths` bytes of the feeds; `step` of them at a time."""

    bands: int
    width: int
    widths: tuple[int, ...]
    step: int
    nests: tuple[tuple[int, Nest], ...]


class Mover:
    """One worker's buffers: of its 7 MiB the first of every three are used, but for matrices that are turned."""

    def __init__(self) -> None:
        self._out, self._in = mmap.mmap(-1, TILE), mmap.mmap(-1, STRIP)
        self.out, self.scratch = memoryview(self._out), memoryview(self._in)

    def move(self, step: Step, sources: Sequence[int], target: int, base: int, tick: Tick) -> None:
        """Fill one output tensor, whose data begin at byte `base` of the file `target`, from the open files of its feeds.

        `tick` is called with the number of bytes written, window by window. Zero rows are left as the fresh file has them: zero.
        """
        for feed, fd in zip(step.feeds, sources, strict=True):
            if feed.nests == ((0, 0, step.size, ()),):
                self.copy(feed.file, fd, feed.start, step.size, target, base, tick)
                return
        shape = tuple(feed.nests for feed in step.feeds), tuple(feed.size for feed in step.feeds), step.size
        if turned := turn(*shape):
            self._turn(turned, step, sources, target, base, tick)
            return
        if bands := tiling(*shape):
            self._tiles(bands, step, sources, target, base, tick)
            return
        for shift_out, shift_in, windows in _schedules(shape[0]):
            for window in windows:
                for read in window.reads:
                    feed = step.feeds[read.feed]
                    slices = [self.out[a:b] if a >= 0 else self.scratch[: b - a] for a, b in read.slices]
                    read_into(sources[read.feed], slices, feed.start + shift_in + read.at, read.size, feed.file)
                for at, a, b in window.writes:
                    write(target, self.out[a:b], base + shift_out + at)
                    tick(b - a)

    def copy(self, file: str, source: int, start: int, size: int, target: int, base: int, tick: Tick) -> None:
        """`size` bytes from byte `start` of a source file, as they are."""
        for at in range(0, size, WINDOW):
            part = self.out[: min(WINDOW, size - at)]
            read_into(source, [part], start + at, len(part), file)
            write(target, part, base + at)
            tick(len(part))

    def _tiles(self, tiles: Tiles, step: Step, sources: Sequence[int], target: int, base: int, tick: Tick) -> None:
        for first in range(0, tiles.bands, tiles.step):
            some = min(tiles.step, tiles.bands - first)
            places, at = [], 0
            for feed, fd, width in zip(step.feeds, sources, tiles.widths, strict=True):
                read_into(fd, [self.scratch[at : at + some * width]], feed.start + first * width, some * width, feed.file)
                places.append(at)
                at += -(-some * width // LINE) * LINE
            out = self.out[: some * tiles.width]
            if step.zeros:
                np.frombuffer(out, np.uint8)[:] = 0
            for number, n in tiles.nests:
                dims = ((some, tiles.width, tiles.widths[number]), *n.dims)
                unit = math.gcd(8, n.out, n.into, n.width, places[number], *(x for _, to, of in dims for x in (to, of)))
                shape = (*(size for size, _, _ in dims), n.width // unit)
                new = np.ndarray(shape, f"u{unit}", self.out, n.out, (*(to for _, to, _ in dims), unit))
                old = np.ndarray(shape, f"u{unit}", self.scratch, places[number] + n.into, (*(of for _, _, of in dims), unit))
                np.copyto(new, old)
            write(target, out, base + first * tiles.width)
            tick(len(out))

    def _turn(self, turned: Turn, step: Step, sources: Sequence[int], target: int, base: int, tick: Tick) -> None:
        for tile in tiles(turned):
            rows, width = tile.bottom - tile.top, (tile.right - tile.left) * turned.item
            out = np.ndarray((rows, tile.right - tile.left), f"u{turned.item}", self.out)
            if step.zeros:
                out[:] = 0
            for strip in strips(turned, tile):
                put(turned, tile, strip, self._strip(turned, strip, step.feeds[strip.feed], sources[strip.feed]), out)
            at = base + (tile.top * turned.length + tile.left) * turned.item
            lines, pitch = (1, rows * width) if width == turned.length * turned.item else (rows, turned.length * turned.item)
            for line in range(lines):
                part = self.out[line * width : line * width + rows * width // lines]
                for skip in range(0, len(part), WINDOW):
                    write(target, part[skip : skip + WINDOW], at + line * pitch + skip)
                    tick(len(part[skip : skip + WINDOW]))

    def _strip(self, turned: Turn, strip: Strip, feed: Feed, source: int) -> NDArray[Any]:
        """[lines, items] of a strip, a view of the buffer."""
        pitch, size = turned.pitches[strip.feed], (strip.stop - strip.start) * turned.item
        step, at = stride(size), feed.start + strip.first * pitch + strip.start * turned.item
        parts = [self.scratch[i * step : i * step + size] for i in range(strip.lines)]
        if size == pitch:
            read_into(source, parts, at, strip.lines * size, feed.file)
        else:
            for i, part in enumerate(parts):
                read_into(source, [part], at + i * pitch, size, feed.file)
        return np.ndarray((strip.lines, size // turned.item), f"u{turned.item}", self.scratch, 0, (step, turned.item))


# Reading and writing whole ranges


def read_into(fd: int, parts: list[memoryview], at: int, size: int, file: str) -> None:
    """Fill `parts` one after the other with `size` bytes of an open file from byte `at`. Raises FormatError when the file ends before."""
    try:
        got = os.preadv(fd, parts, at)
        while got != size:  # a short read: go on behind it
            skip, rest = got, []
            for part in parts:
                rest.append(part[min(skip, len(part)) :])
                skip = max(0, skip - len(part))
            more = os.preadv(fd, [part for part in rest if len(part)], at + got)
            if not more:
                raise FormatError(
                    "the file ended while it was read", file=file, expected=f"{size} bytes at byte {at}", found=f"{got} bytes"
                )
            got += more
    except OSError as error:
        raise FormatError("the file cannot be read", file=file, found=error.strerror) from None


def write(fd: int, part: memoryview, at: int) -> None:
    """Write a whole buffer at byte `at`."""
    done = os.pwrite(fd, part, at)
    while done < len(part):
        more = os.pwrite(fd, part[done:], at + done)
        if not more:
            raise OSError(errno.EIO, "nothing more could be written")
        done += more


def hasten(fd: int, at: int, size: int) -> None:
    """Have the system begin to bring a written range to the disk, while more is made: a sync after it has little left to wait for.

    In portions so small that what is on its way has not arrived, and stays in memory: what had arrived would be dropped from it.
    """
    with suppress(AttributeError, OSError):  # a hint, which macOS lacks
        for skip in range(0, size, PORTION):
            os.posix_fadvise(fd, at + skip, min(PORTION, size - skip), os.POSIX_FADV_DONTNEED)


# Tiles


@lru_cache(maxsize=64)
def tiling(nests: tuple[tuple[Nest, ...], ...], sizes: tuple[int, ...], size: int) -> Tiles | None:
    """How to move a step by bands, or None when its runs are long or no band fits the buffers."""
    every = [(number, n) for number, feed in enumerate(nests) for n in feed]
    runs = sum(math.prod(k for k, _, _ in n.dims) for _, n in every)
    if not every or size // runs >= SHORT:
        return None
    count = every[0][1].dims[0][0] if every[0][1].dims else 1
    widths = tuple(whole // count for whole in sizes)
    banded = all(n.dims and n.dims[0] == (count, size // count, widths[number]) for number, n in every)
    if not banded or size % count or any(whole % count for whole in sizes):
        count, widths = 1, sizes
    width = size // count
    step = min(WINDOW // width, (2 * WINDOW - LINE * len(widths)) // sum(widths), count)
    if step < 1:
        return None
    inner = tuple((number, n._replace(dims=n.dims[1:]) if banded and count > 1 else n) for number, n in every)
    return Tiles(count, width, widths, step, inner)


# Windows


def _schedules(nests: tuple[tuple[Nest, ...], ...]) -> Iterator[tuple[int, int, tuple[Window, ...]]]:
    """(shift of the output, shift of the source, windows), together the whole step, in bounded memory."""
    runs = sum(math.prod(k for k, _, _ in n.dims) for feed in nests for n in feed)
    if runs <= MAX_RUNS:
        if runs:
            yield 0, 0, windows(nests)
        return
    for number, feed in enumerate(nests):
        for n in feed:
            for out, into, small in _cut(n):
                yield out, into, windows((*[()] * number, (small,)))


def _cut(n: Nest) -> Iterator[tuple[int, int, Nest]]:
    """A nest as nests of at most MAX_RUNS runs, with the shift of their output and of their source."""
    runs = math.prod(k for k, _, _ in n.dims)
    if runs <= MAX_RUNS:
        yield 0, 0, n
        return
    size, to, of = n.dims[0]
    step = max(1, MAX_RUNS * size // runs)
    for first in range(0, size, step):
        some = min(step, size - first)
        part = n._replace(dims=((some, to, of), *n.dims[1:]) if some > 1 else n.dims[1:])
        for out, into, small in _cut(part):
            yield out + first * to, into + first * of, small


@lru_cache(maxsize=16)
def windows(nests: tuple[tuple[Nest, ...], ...]) -> tuple[Window, ...]:
    """The reads and writes that move the nests of all feeds, counted from the first bytes of output and source tensors."""
    feeds, outs, intos, sizes = [], [], [], []
    for number, feed in enumerate(nests):
        for n in feed:
            out, into = starts(n.out, n.dims, 1), starts(n.into, n.dims, 2)
            cuts = -(-n.width // WINDOW)
            if cuts > 1:  # runs longer than the buffer
                steps = np.arange(cuts, dtype=np.int64) * WINDOW
                out, into = (out[:, None] + steps).ravel(), (into[:, None] + steps).ravel()
            length = np.tile(np.minimum(WINDOW, n.width - np.arange(cuts, dtype=np.int64) * WINDOW), len(out) // cuts)
            feeds.append(np.full(len(out), number, np.int64))
            outs.append(out)
            intos.append(into)
            sizes.append(length)
    runs = np.stack([np.concatenate(column) for column in (feeds, outs, intos, sizes)], axis=1)
    one = _by_output(runs)
    if _calls(one) <= FEW * len(one):
        return one
    return min(one, _by_source(runs), key=_calls)


def _calls(found: tuple[Window, ...]) -> int:
    return sum(len(window.reads) + len(window.writes) for window in found)


def _by_output(runs: Ints) -> tuple[Window, ...]:
    """Windows contiguous in the output: reads to everywhere, one write."""
    found = []
    for group in _groups(runs[np.argsort(runs[:, 1], kind="stable")], 1, False):
        first = group[0][1]
        places = [(feed, into, out - first, size) for feed, out, into, size in group]
        found.append(Window(_reads(places), ((first, 0, sum(run[3] for run in group)),)))
    return tuple(found)


def _by_source(runs: Ints) -> tuple[Window, ...]:
    """Windows contiguous in a source: one read to everywhere, writes of what lies together in the output."""
    found = []
    for group in _groups(runs[np.lexsort((runs[:, 2], runs[:, 0]))], 2, True):
        places: list[tuple[int, int, int, int]] = []
        writes: list[tuple[int, int, int]] = []
        at = 0
        for feed, out, into, size in sorted(group, key=lambda run: run[1]):
            places.append((feed, into, at, size))
            if writes and writes[-1][0] + writes[-1][2] - writes[-1][1] == out:
                writes[-1] = (writes[-1][0], writes[-1][1], at + size)
            else:
                writes.append((out, at, at + size))
            at += size
        found.append(Window(_reads(places), tuple(writes)))
    return tuple(found)


def _groups(runs: Ints, column: int, same_feed: bool) -> Iterator[list[tuple[int, int, int, int]]]:
    """Consecutive runs that touch each other in one column and fill one window at most."""
    group: list[tuple[int, int, int, int]] = []
    total = 0
    for row in runs.tolist():
        run = (row[0], row[1], row[2], row[3])
        if group and (group[-1][column] + group[-1][3] != run[column] or total + run[3] > WINDOW or (same_feed and group[-1][0] != run[0])):
            yield group
            group, total = [], 0
        group.append(run)
        total += run[3]
    if group:
        yield group


def _reads(places: list[tuple[int, int, int, int]]) -> tuple[Read, ...]:
    """Scatter reads for (feed, source byte, buffer byte, size): what touches in the source, or almost, is one read."""
    found: list[Read] = []
    slices: list[tuple[int, int]] = []
    of, first, stop = -1, 0, 0
    for feed, into, at, size in sorted(places):
        gap = into - stop
        if feed != of or not 0 <= gap <= BRIDGE or len(slices) >= MAX_VECTORS - 1:
            if slices:
                found.append(Read(of, first, tuple(slices), stop - first))
            of, first, slices = feed, into, []
        elif gap:
            slices.append((-gap, 0))
        if slices and slices[-1][1] == at > 0:
            slices[-1] = (slices[-1][0], at + size)
        else:
            slices.append((at, at + size))
        stop = into + size
    return (*found, Read(of, first, tuple(slices), stop - first))
