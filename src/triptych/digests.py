"""One number for every row of a tensor in a file, read once, window by window: equal rows have equal numbers.

The number is a sum of the row's words, each times a random odd factor. It is a hint: whoever draws a conclusion compares the bytes too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from . import ranges
from .formats import Tensor
from .pairs import NONE, Index, Mask
from .ranges import Bytes, Ranges
from .values import decode, encode

Numbers = NDArray[np.uint64]


@dataclass(frozen=True)
class Rows:
    """Tensors one after the other, as rows along an axis; `dtype`: rounded into it first, or as they lie.

    `unit`: bytes that are one word of a row, where rows shall be compared with those along another axis; 0: as many as there are.
    """

    reader: Ranges
    tensors: tuple[Tensor, ...]
    axis: int = 0
    dtype: str | None = None
    unit: int = 0

    @property
    def rows(self) -> int:
        return sum(tensor.shape[self.axis] for tensor in self.tensors)

    @property
    def outer(self) -> int:
        """Slices before the axis."""
        return math.prod(self.tensors[0].shape[: self.axis])

    @property
    def samples(self) -> int:
        """Numbers in a row."""
        first = self.tensors[0]
        return math.prod(first.shape) // max(1, first.shape[self.axis])

    @property
    def size(self) -> int:
        """Bytes of a row of one slice, as they lie."""
        first = self.tensors[0]
        return first.size // max(1, self.outer * first.shape[self.axis])

    def windows(self, tensor: Tensor) -> list[tuple[int, int, int, int]]:
        """(slice, end, row, end) of pieces of at most a chunk, in the order of the bytes; a row of a slice is never cut."""
        rows, size = tensor.shape[self.axis], max(1, self.size)
        if self.outer > 1 and rows * size <= ranges.CHUNK:
            step = max(1, ranges.CHUNK // max(1, rows * size))
            return [(at, min(at + step, self.outer), 0, rows) for at in range(0, self.outer, step)]
        step = max(1, ranges.CHUNK // size)
        return [(at, at + 1, row, min(row + step, rows)) for at in range(self.outer) for row in range(0, rows, step)]

    def read(self, tensor: Tensor, window: tuple[int, int, int, int]) -> Bytes:
        """[slices, rows, bytes] of a window, rounded."""
        first, last, start, stop = window
        at = (first * tensor.shape[self.axis] + start) * self.size
        raw = self.reader.read(tensor, at, (last - first) * (stop - start) * self.size).reshape(last - first, stop - start, self.size)
        return raw if self.dtype is None else encode(decode(raw, tensor.dtype), self.dtype)

    def rows_at(self, rows: Index, block: int) -> Bytes:
        """[rows, bytes] of some rows of one slice, rounded; neighbours are read at once."""
        out = np.empty((len(rows), self.size), np.uint8)
        starts = np.cumsum([0, *(tensor.shape[self.axis] for tensor in self.tensors)])
        number = np.searchsorted(starts, rows, "right") - 1
        breaks = np.flatnonzero((np.diff(rows) != 1) | (np.diff(number) != 0)) + 1
        for a, b in zip([0, *breaks.tolist()], [*breaks.tolist(), len(rows)], strict=True):
            if a < b:
                tensor = self.tensors[number[a]]
                at = (block * tensor.shape[self.axis] + int(rows[a] - starts[number[a]])) * self.size
                self.reader.into(tensor, at, out[a:b])
        return out if self.dtype is None else encode(decode(out, self.tensors[0].dtype), self.dtype)

    def edge(self) -> bytes:
        """The first number of every row of a matrix, sorted by its bytes: the same where the rows are, in whatever order they stand."""
        tensor = self.tensors[0]
        item = tensor.size // math.prod(tensor.shape)
        raw = np.empty((tensor.shape[self.axis], item), np.uint8)
        if self.axis == 1:
            self.reader.into(tensor, 0, raw)
        else:
            for row in range(len(raw)):
                self.reader.into(tensor, row * self.size, raw[row])
        found = raw if self.dtype is None else encode(decode(raw, tensor.dtype), self.dtype)
        return b"".join(sorted(number.tobytes() for number in found))

    def whole(self) -> Bytes:
        """[rows, bytes] of one tensor, all of it."""
        tensor = self.tensors[0]
        raw = self.read(tensor, (0, self.outer, 0, tensor.shape[self.axis]))
        return raw.swapaxes(0, 1).reshape(raw.shape[1], -1)

    @cached_property
    def numbers(self) -> Numbers:
        """[rows] one number each."""
        return np.concatenate([self._numbers(tensor) for tensor in self.tensors])

    def _numbers(self, tensor: Tensor) -> Numbers:
        found = np.zeros(tensor.shape[self.axis], np.uint64)
        if not tensor.size:
            return found
        for first, last, start, stop in self.windows(tensor):
            words = _words(self.read(tensor, (first, last, start, stop)), self.unit)
            weights = _weights(self.outer, words.shape[2])[first:last]
            if self.outer == 1:
                found[start:stop] = np.einsum("rw,w->r", words[0], weights[0])
            else:
                found[start:stop] += np.einsum("srw,sw->r", words, weights)
        return found


def _words(raw: Bytes, unit: int) -> Numbers:
    """[slices, rows, words] of bytes: as many a word as fill the row, with the upper half of eight folded in."""
    size = next(size for size in (unit or 8, 8, 4, 2, 1) if size <= 8 and raw.shape[2] % size == 0)
    words: Numbers = np.ascontiguousarray(raw).view(f"<u{size}")
    if size == 8:
        return words ^ (words >> np.uint64(32))
    return words.astype(np.uint64)


@lru_cache(maxsize=8)
def _weights(outer: int, words: int) -> Numbers:
    """[slices, words], the same one after the other however they are cut."""
    flat = np.random.default_rng(0).integers(0, 1 << 64, outer * words, np.uint64, endpoint=False) | np.uint64(1)
    return flat.reshape(outer, words)


@dataclass(frozen=True)
class Digested:
    """Two sides with rows of one size: a pair for `pairs.reorderings`."""

    a: Rows
    b: Rows

    def looks(self, rows: Index, partners: Index) -> Mask:
        found: Mask = self.a.numbers[rows] == self.b.numbers[partners]
        return found

    def agree(self, index: Index, until_failure: bool = False) -> tuple[Mask, float]:
        good: Mask = (self.a.numbers == self.b.numbers[index]) & (index != NONE)
        return (np.zeros(len(good), bool) if until_failure and not good.all() else good), 0.0

    @cached_property
    def matched(self) -> tuple[Index, float]:
        """Rows with equal numbers, in place where they can be, else the first with the first; one to one."""
        ours, theirs = self.a.numbers, self.b.numbers
        out = np.full(len(ours), NONE, np.int64)
        here = np.flatnonzero(ours[: len(theirs)] == theirs[: len(ours)])
        out[here] = here
        left, spare = np.setdiff1d(np.arange(len(ours)), here), np.setdiff1d(np.arange(len(theirs)), here)
        _, known = np.unique(np.concatenate([ours[left], theirs[spare]]), return_inverse=True)
        mine, yours = (_ranked(some) for some in (known[: len(left)], known[len(left) :]))
        _, i, j = np.intersect1d(mine, yours, assume_unique=True, return_indices=True)
        out[left[i]] = spare[j]
        return out, 0.0

    def differing(self, index: Index) -> Index:
        """Rows of a that are not, byte for byte, the rows `index` of b (NONE: not asked for)."""
        bad = np.zeros(self.a.rows, bool)
        if self.a.outer != self.b.outer:
            ours, theirs = (side.whole() for side in (self.a, self.b))
            asked = np.flatnonzero(index != NONE)
            bad[asked] = (ours[asked] != theirs[index[asked]]).any(axis=1)
            return np.flatnonzero(bad)
        base = 0
        for tensor in self.a.tensors:
            for first, last, start, stop in self.a.windows(tensor):
                rows = np.arange(start, stop) + base
                asked = rows[index[rows] != NONE]
                if not len(asked):
                    continue
                ours = self.a.read(tensor, (first, last, start, stop))[:, asked - base - start]
                for block in range(first, last):
                    bad[asked] |= (ours[block - first] != self.b.rows_at(index[asked], block)).any(axis=1)
            base += tensor.shape[self.a.axis]
        return np.flatnonzero(bad)


def _ranked(known: Index) -> Index:
    """Numbers that are all different: which one, and how many equal ones stand before it."""
    order = np.argsort(known, kind="stable")
    ordered = known[order]
    first = np.flatnonzero(np.diff(ordered, prepend=-1))
    out = np.empty(len(known), np.int64)
    out[order] = (ordered << 32) + np.arange(len(known)) - np.repeat(first, np.diff(np.append(first, len(known))))
    return out
