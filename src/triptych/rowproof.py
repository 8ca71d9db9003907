"""Bytes compared row by row: every row of a tensor against the row that it must come from, and whole tensors against whole ones.

Knows no layout: where each row must come from is told by the listing (`Origin`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import ranges
from .errors import MismatchError
from .formats import Other, Stored, Tensor
from .listing import Origin
from .pieces import in_bytes, listed
from .ranges import Ranges

SHORT, WHOLE = 8192, 1 << 26
"""Runs shorter than this many bytes on average are gathered in memory, where the tensors that they come from have at most so many."""


@dataclass(frozen=True)
class Proof:
    """What was compared: `rows` rows of `projections` projections by label, `tensors` other tensors, `size` bytes in all.

    `notes`: what differs beside the tensors.
    """

    path: str
    out: str
    projections: int
    rows: int
    tensors: int
    size: int
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {"version": 1, "equal": True, **vars(self), "notes": list(self.notes)}

    def __str__(self) -> str:
        told = (
            f"{self.out}: equal to {self.path}; {self.rows} rows of {self.projections} projections compared by label, "
            f"{self.tensors} other tensors byte for byte, {in_bytes(self.size)} in all"
        )
        return "\n".join([told, *(f"  note: {note}" for note in self.notes)])


# Rows


def prove_zeros(tensor: Tensor, rows: Sequence[int], axis: int, reader: Ranges) -> None:
    """That some rows hold nothing but zero bytes. Raises MismatchError."""
    outer, inner = _around(tensor, axis)
    for block in range(outer):
        for row in rows:
            if reader.read(tensor, (block * tensor.shape[axis] + row) * inner, inner).any():
                raise MismatchError("a row that is declared zero is not, and is not in the output", tensor=tensor.name, where=f"row {row}")


def _around(tensor: Tensor, axis: int) -> tuple[int, int]:
    """How many slices stand before the packed axis, and the bytes of one row of a slice."""
    outer, rows = math.prod(tensor.shape[:axis]), tensor.shape[axis]
    return outer, tensor.size // (outer * rows) if outer * rows else 0


class Rows(NamedTuple):
    """One output tensor, the tensors that its rows come from, and the packed axis of each side.

    `label` says what a row of the output is, `hint` what to do where one differs.
    """

    tensor: Tensor
    sources: tuple[Tensor, ...]
    axis: int
    packed: int
    origin: Origin
    old: Ranges
    new: Ranges
    label: Callable[[int], str]
    hint: str | None = None

    def prove(self) -> None:
        """Compare every row with the row that it comes from. Raises MismatchError."""
        tensor, first, rows, axis = self.tensor, self.sources[0], len(self.origin.rows), self.axis
        packed = self.packed
        turned = packed != axis and len(first.shape) == 2
        shape = (*first.shape[:axis], rows, *first.shape[axis + 1 :])
        shape = shape[::-1] if turned else shape
        if (tensor.dtype, tensor.shape) != (first.dtype, shape) or (packed != axis and not turned):
            raise MismatchError("dtype or shape differ", tensor=tensor.name, expected=f"{first.dtype} {shape}, packed axis {axis}",
                                found=f"{tensor.dtype} {tensor.shape}, packed axis {packed}")  # fmt: skip
        if turned and tensor.size:
            self._turned()
            return
        outer, inner = _around(tensor, axis)
        if not tensor.size:
            return
        band = max(rows, sum(source.shape[axis] for source in self.sources)) * inner
        if band <= ranges.CHUNK or (band <= WHOLE and rows * inner < SHORT * len(self._runs(0, rows))):
            step = max(1, ranges.CHUNK // band)
            for block in range(0, outer, step):
                self._bands(block, min(step, outer - block), inner)
            return
        step = max(1, ranges.CHUNK // inner)
        rooms = np.empty((2, min(step, rows) * inner), np.uint8)
        for block in range(outer):
            for start in range(0, rows, step):
                self._rows(block, start, min(start + step, rows), inner, rooms)

    def _turned(self) -> None:
        """A matrix stored [in, out] that was [out, in], or the other way round: both whole, row by row as the input holds them."""
        rows = len(self.origin.rows)
        item = self.tensor.size // math.prod(self.tensor.shape)
        found = self.new.read(self.tensor, 0, self.tensor.size).reshape(*self.tensor.shape, item).swapaxes(0, 1)
        wholes = [self.old.read(one, 0, one.size).reshape(*one.shape, item) for one in self.sources]
        for start in range(0, rows, step := max(1, ranges.CHUNK * rows // self.tensor.size)):
            window = slice(start, start + step)
            theirs = found[window] if self.axis == 0 else found[:, window].swapaxes(0, 1)
            expected = np.zeros_like(theirs)
            for number, whole in enumerate(wholes):
                mine = self.origin.tensors[window] == number
                picked = self.origin.rows[window][mine]
                expected[mine] = whole[picked] if self.axis == 0 else whole[:, picked].swapaxes(0, 1)
            shape = (1, len(theirs), -1)
            self._compare(expected.reshape(shape), np.ascontiguousarray(theirs).reshape(shape), start)

    def _runs(self, start: int, stop: int) -> list[tuple[int, int]]:
        """(first, end) of the rows between `start` and `stop` that follow each other in a source."""
        origin = self.origin
        breaks = np.flatnonzero((np.diff(origin.tensors[start:stop]) != 0) | (np.diff(origin.rows[start:stop]) != 1)) + start + 1
        return list(pairwise([start, *breaks.tolist(), stop]))

    def _bands(self, block: int, some: int, inner: int) -> None:
        """Slices `block` to `block + some`, with all their rows."""
        rows = len(self.origin.rows)
        found = self.new.read(self.tensor, block * rows * inner, some * rows * inner).reshape(some, rows, inner)
        expected = np.zeros_like(found)
        for number, source in enumerate(self.sources):
            whole = source.shape[self.axis]
            band = self.old.read(source, block * whole * inner, some * whole * inner).reshape(some, whole, inner)
            mine = self.origin.tensors == number
            expected[:, mine] = band[:, self.origin.rows[mine]]
        self._compare(expected, found, 0)

    def _rows(self, block: int, start: int, stop: int, inner: int, rooms: NDArray[np.uint8]) -> None:
        """Rows `start` to `stop` of one slice; rows that follow each other in a source are read at once."""
        origin, rows = self.origin, len(self.origin.rows)
        expected, found = rooms[:, : (stop - start) * inner]
        self.new.into(self.tensor, (block * rows + start) * inner, found)
        for a, b in self._runs(start, stop):
            run = expected[(a - start) * inner : (b - start) * inner]
            if origin.tensors[a] < 0:
                run[:] = 0
                continue
            source = self.sources[origin.tensors[a]]
            self.old.into(source, (block * source.shape[self.axis] + int(origin.rows[a])) * inner, run)
        self._compare(expected.reshape(1, -1, inner), found.reshape(1, -1, inner), start)

    def _compare(self, expected: NDArray[np.uint8], found: NDArray[np.uint8], start: int) -> None:
        if ranges.same(expected, found):
            return
        row = start + int(np.flatnonzero((expected != found).any(axis=(0, 2)))[0])
        number = int(self.origin.tensors[row])
        whence = f"the bytes of row {self.origin.rows[row]} of {self.sources[number].name}" if number >= 0 else "zeros"
        raise MismatchError("a row of the output is not the row of the input", tensor=self.tensor.name,
                            where=f"row {row}: {self.label(row)}", expected=whence, found="other bytes", try_=self.hint)  # fmt: skip


# Whole tensors and files


def prove_same(tensor: Tensor, copy: Tensor, old: Ranges, new: Ranges) -> None:
    """That a tensor is there byte for byte. Raises MismatchError."""
    if (tensor.dtype, tensor.shape) != (copy.dtype, copy.shape):
        raise MismatchError("dtype or shape differ", tensor=tensor.name, expected=f"{tensor.dtype} {tensor.shape}",
                            found=f"{copy.dtype} {copy.shape}")  # fmt: skip
    if apart := ranges.first_difference(old, tensor, new, copy):
        byte, expected, found = apart
        raise MismatchError("a tensor that should be unchanged differs", tensor=tensor.name, where=f"byte {byte} of its data",
                            expected=f"0x{expected:02x}", found=f"0x{found:02x}")  # fmt: skip


def beside(before: Stored, after: Stored) -> Iterator[str]:
    """What is to say of the files beside the weights, where both sides are folders."""
    if not before.is_folder or not after.is_folder:
        return
    mine, theirs = ({other.name: other for other in stored.others} for stored in (before, after))
    sorts = {
        "not in the output": [name for name in mine if name not in theirs],
        "only in the output": [name for name in theirs if name not in mine],
        "not the same in the output": [name for name in mine if name in theirs and not _same_file(before, after, mine[name], theirs[name])],
    }
    for what, names in sorts.items():
        if names:
            yield f"{what}: {listed(names, 6)}"


def _same_file(before: Stored, after: Stored, one: Other, two: Other) -> bool:
    sides = [Tensor(other.name, "U8", (other.size,), other.name, 0, other.size) for other in (one, two)]
    with Ranges(before) as old, Ranges(after) as new:
        return one.size == two.size and ranges.first_difference(old, sides[0], new, sides[1]) is None
