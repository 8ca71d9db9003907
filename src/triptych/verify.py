"""The proof: every row of every output tensor is the row of the input that has its label, found by a slow listing of its own.

Nothing of the code that makes row maps, plans or runs them is used: from the two layouts alone, each row of each side is labelled one by
one with part, head and dim, and the bytes of equal labels are compared. All other tensors must be there under their names, byte for byte.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import axes
from .checkpoint import Checkpoint, open_checkpoint
from .errors import FormatError, MismatchError
from .formats import Tensor, open_file
from .layout import Axis, Factor, Layout
from .packed import BY_STAMP, Packed
from .pieces import base_names, in_bytes, target_of
from .sizes import Sizes, bind

CHUNK = 1 << 21


@dataclass(frozen=True)
class Proof:
    """What was compared: `rows` rows of `projections` projections by label, `tensors` other tensors, `size` bytes in all."""

    path: str
    out: str
    projections: int
    rows: int
    tensors: int
    size: int

    def to_dict(self) -> dict[str, Any]:
        return {"version": 1, "equal": True, **vars(self)}

    def __str__(self) -> str:
        return (
            f"{self.out}: equal to {self.path}; {self.rows} rows of {self.projections} projections compared by label, "
            f"{self.tensors} other tensors byte for byte, {in_bytes(self.size)} in all"
        )


class Label(NamedTuple):
    """What one row is."""

    part: str
    head: int
    dim: int

    def __str__(self) -> str:
        return f"part {self.part or '(one)'}, head {self.head}, dim {self.dim}"


class Entry(NamedTuple):
    """One row of a listing: its labels (several where parts are one tensor), and whether it is declared to hold zero."""

    labels: tuple[Label, ...]
    zero: bool


def verify(
    path: str | Path,
    out: str | Path,
    to: str | Layout | None = None,
    *,
    layouts: Mapping[str, str] | None = None,
    records: str | Path | None = None,
    **sizes: int,
) -> Proof:
    """Prove that the checkpoint `out` holds what `path` holds, row by row, byte by byte.

    Args:
        path, layouts, records, sizes: the input, as for `inspect`. out: the output; its stamp says how its rows lie.
        to: the target of the conversion (LAYOUT, `split`, `fused:LAYOUT`), when the stamp alone shall not be believed.
    Raises MismatchError at the first row that differs, with its tensor, part, head and dim; FormatError and others as `inspect` does.
    """
    target = target_of(to) if to is not None else None
    wanted = target.layout if target else None
    before = open_checkpoint(path, layouts or {}, sizes, [wanted] if wanted else [], records)
    after = open_checkpoint(out, {}, sizes, [packed.layout for packed in before.projections] + ([wanted] if wanted else []))
    if target and target.split and any(packed.fused and packed.kind == "attention" for packed in after.projections):
        raise MismatchError("the output has fused projections", expected="separate ones")
    if wanted is not None:
        _must_have(after, wanted, sizes)
    there = {packed.link: packed for packed in after.projections}
    _must_know(before, after)
    pairs = [(packed, there[packed.name]) for packed in before.projections if packed.name in there]
    with ExitStack() as stack:
        old, new = (_Reader(side, stack) for side in (before, after))
        rows = sum(_prove_projection(source, target, old, new) for source, target in pairs)
        apart = _prove_others(pairs, old, new)
    return Proof(str(path), str(out), len(pairs), rows, apart, before.stored.size)


def _must_have(after: Checkpoint, wanted: Layout, given: Mapping[str, int]) -> None:
    """Every fused projection with the parts of `wanted` has that layout, and there is one."""
    fused = [packed for packed in after.projections if packed.fused and set(base_names(packed.layout)) == set(base_names(wanted))]
    if not fused:
        raise MismatchError("the output has no fused projection with these parts", expected=wanted)
    for packed in fused:
        sizes = bind(wanted, **{**packed.sizes, **{name: size for name, size in given.items() if name in wanted.axes}})
        one, two = (listing(layout, known) for layout, known in ((wanted, sizes), (packed.layout, packed.sizes)))
        if len(one) != len(two) or any(a.labels != b.labels for a, b in zip(one, two, strict=True) if not b.zero):
            raise MismatchError("the output has another layout", tensor=packed.name, expected=wanted, found=packed.layout)


def _must_know(before: Checkpoint, after: Checkpoint) -> None:
    """Every projection that the output was stamped with is known in the input."""
    known = {packed.name for packed in before.projections}
    for packed in after.projections:
        if packed.source == BY_STAMP and packed.link not in known:
            raise MismatchError("a converted projection is not known in the input", tensor=packed.link, found=f"{packed.layout} (stamp)",
                                try_="declare the input's layout as for the conversion: --layout 'NAME_GLOB=LAYOUT'")  # fmt: skip


# The slow evaluator


@lru_cache(maxsize=64)
def listing(layout: Layout, sizes: Sizes) -> tuple[Entry, ...]:
    """Every row of a sized layout, one by one, slowest axis first.

    >>> [str(entry.labels[0]) for entry in listing(Layout("h (q|k)"), bind("h (q|k)", h=2))]
    ['part q, head 0, dim 0', 'part k, head 0, dim 0', 'part q, head 1, dim 0', 'part k, head 1, dim 0']
    """
    return tuple(_entry(names, zero, at, sizes) for names, zero, at in _walk(layout.factors, sizes))


def _walk(factors: tuple[Factor, ...], sizes: Sizes) -> Iterator[tuple[tuple[str, ...], bool, tuple[tuple[str, int], ...]]]:
    """(dotted names, declared zero, (axis, index) from the outermost in) of every row."""
    if not factors:
        yield ("",), False, ()
    elif isinstance(factors[0], Axis):
        axis = factors[0].name
        for index in range(sizes[axis]):
            for names, zero, at in _walk(factors[1:], sizes):
                yield names, zero, ((axis, index), *at)
    else:
        for branch in factors[0].branches:
            for names, zero, at in _walk((*branch.factors, *factors[1:]), sizes):
                mine = branch.names or ("",)
                yield tuple(".".join(filter(None, (one, two))) for one in mine for two in names), zero or branch.zero, at


def _entry(names: tuple[str, ...], zero: bool, at: tuple[tuple[str, int], ...], sizes: Sizes) -> Entry:
    index, order = dict(at), [axis for axis, _ in at]
    head = dim = 0
    for axis in axes.head_axes(order):
        head = head * sizes[axis] + index[axis]
    for axis in axes.dim_axes(order):
        dim = dim * sizes[axis] + index[axis]
    return Entry(tuple(Label(name, head, dim) for name in names), zero)


class Origin(NamedTuple):
    """Where every row of one output tensor must come from: number of the source tensor (-1: it holds zero) and row in it."""

    tensors: NDArray[np.int64]
    rows: NDArray[np.int64]


@lru_cache(maxsize=16)
def origins(sources: tuple[Layout, ...], targets: tuple[Layout, ...], old: Sizes, new: Sizes) -> tuple[Origin, ...] | str:
    """The origin of every row of every target by equal labels, or a sentence when the labels of the two sides differ."""
    have: dict[Label, tuple[int, int]] = {}
    for number, layout in enumerate(sources):
        for row, entry in enumerate(listing(layout, old)):
            for label in () if entry.zero else entry.labels:
                if label in have:
                    return f"{label} stands twice in the input"
                have[label] = number, row
    used: set[Label] = set()
    out = []
    for layout in targets:
        tensors, rows = [], []
        for entry in listing(layout, new):
            found = {have.get(label) for label in entry.labels} if not entry.zero else {(-1, 0)}
            place = found.pop()
            if place is None or found:
                return f"{entry.labels[0]} of the output " + ("is not in the input" if place is None else "is two rows of the input")
            used |= set() if entry.zero else set(entry.labels)
            tensors.append(place[0])
            rows.append(place[1])
        out.append(Origin(np.array(tensors, np.int64), np.array(rows, np.int64)))
    missing = next((label for label in have if label not in used), None)
    return f"{missing} of the input is not in the output" if missing else tuple(out)


# Comparing bytes


class _Reader:
    """Reads byte ranges of the tensors of one checkpoint."""

    def __init__(self, checkpoint: Checkpoint, stack: ExitStack) -> None:
        self.tensors, self.root, self.stack = checkpoint.stored.tensors, checkpoint.stored.root, stack
        self.fds: dict[str, int] = {}

    def read(self, tensor: Tensor, start: int, size: int) -> NDArray[np.uint8]:
        if tensor.file not in self.fds:
            self.fds[tensor.file] = open_file(self.root / tensor.file)
            self.stack.callback(os.close, self.fds[tensor.file])
        raw = bytearray(size)
        done = 0
        while done < size:
            got = os.preadv(self.fds[tensor.file], [memoryview(raw)[done:]], tensor.start + start + done)
            if not got:
                raise FormatError("the file ended while it was read", tensor=tensor.name, file=tensor.file)
            done += got
        return np.frombuffer(raw, np.uint8)


def _prove_projection(source: Packed, target: Packed, old: _Reader, new: _Reader) -> int:
    """Compare one projection; how many rows it has. Raises MismatchError."""
    sources, targets = tuple(piece.layout for piece in source.pieces), tuple(piece.layout for piece in target.pieces)
    found = origins(sources, targets, source.sizes, target.sizes)
    if isinstance(found, str):
        before, after = (f"{side.layout} with {side.sizes.of(side.layout)}" for side in (source, target))
        raise MismatchError("input and output do not hold the same rows", tensor=target.name, expected=before, found=f"{after}: {found}")
    tensors = tuple(old.tensors[piece.tensor] for piece in source.pieces)
    for tensor, layout in zip(tensors, sources, strict=True):
        _prove_zeros(tensor, [row for row, entry in enumerate(listing(layout, source.sizes)) if entry.zero], source.axis, old)
    for piece, origin in zip(target.pieces, found, strict=True):
        _Proving(new.tensors[piece.tensor], piece.layout, target, tensors, source.axis, origin, old, new).prove()
    return sum(len(origin.rows) for origin in found)


def _prove_zeros(tensor: Tensor, rows: Sequence[int], axis: int, reader: _Reader) -> None:
    outer, inner = _around(tensor, axis)
    for block in range(outer):
        for row in rows:
            if reader.read(tensor, (block * tensor.shape[axis] + row) * inner, inner).any():
                raise MismatchError("a row that is declared zero is not, and is not in the output", tensor=tensor.name, where=f"row {row}")


def _around(tensor: Tensor, axis: int) -> tuple[int, int]:
    """How many slices stand before the packed axis, and the bytes of one row of a slice."""
    outer, rows = math.prod(tensor.shape[:axis]), tensor.shape[axis]
    return outer, tensor.size // (outer * rows) if outer * rows else 0


class _Proving(NamedTuple):
    """One output tensor and the tensors that its rows come from."""

    tensor: Tensor
    layout: Layout
    packed: Packed
    sources: tuple[Tensor, ...]
    axis: int
    origin: Origin
    old: _Reader
    new: _Reader

    def prove(self) -> None:
        """Compare every row with the row that it comes from. Raises MismatchError."""
        tensor, first, rows, axis = self.tensor, self.sources[0], len(self.origin.rows), self.axis
        shape = (*first.shape[:axis], rows, *first.shape[axis + 1 :])
        if (tensor.dtype, tensor.shape, self.packed.axis) != (first.dtype, shape, axis):
            raise MismatchError("dtype or shape differ", tensor=tensor.name, expected=f"{first.dtype} {shape}, packed axis {axis}",
                                found=f"{tensor.dtype} {tensor.shape}, packed axis {self.packed.axis}")  # fmt: skip
        outer, inner = _around(tensor, axis)
        if not tensor.size:
            return
        if outer > 1 and max(rows, *(source.shape[axis] for source in self.sources)) * inner <= CHUNK:
            step = max(1, CHUNK // (rows * inner))
            for block in range(0, outer, step):
                self._bands(block, min(step, outer - block), inner)
            return
        step = max(1, CHUNK // inner)
        for block in range(outer):
            for start in range(0, rows, step):
                self._rows(block, start, min(start + step, rows), inner)

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

    def _rows(self, block: int, start: int, stop: int, inner: int) -> None:
        """Rows `start` to `stop` of one slice; rows that follow each other in a source are read at once."""
        origin, rows = self.origin, len(self.origin.rows)
        found = self.new.read(self.tensor, (block * rows + start) * inner, (stop - start) * inner).reshape(1, stop - start, inner)
        expected = np.zeros_like(found)
        breaks = np.flatnonzero((np.diff(origin.tensors[start:stop]) != 0) | (np.diff(origin.rows[start:stop]) != 1)) + start + 1
        for a, b in pairwise([start, *breaks.tolist(), stop]):
            if origin.tensors[a] >= 0:
                source = self.sources[origin.tensors[a]]
                at = (block * source.shape[self.axis] + int(origin.rows[a])) * inner
                expected[0, a - start : b - start] = self.old.read(source, at, (b - a) * inner).reshape(b - a, inner)
        self._compare(expected, found, start)

    def _compare(self, expected: NDArray[np.uint8], found: NDArray[np.uint8], start: int) -> None:
        if np.array_equal(expected, found):
            return
        row = start + int(np.flatnonzero((expected != found).any(axis=(0, 2)))[0])
        label = listing(self.layout, self.packed.sizes)[row].labels[0]
        number = int(self.origin.tensors[row])
        whence = f"the bytes of row {self.origin.rows[row]} of {self.sources[number].name}" if number >= 0 else "zeros"
        raise MismatchError("a row of the output is not the row of the input", tensor=self.tensor.name,
                            where=f"row {row}: {label}   ({self.layout})", expected=whence, found="other bytes")  # fmt: skip


def _prove_others(pairs: Sequence[tuple[Packed, Packed]], old: _Reader, new: _Reader) -> int:
    """Compare all tensors that are in no projection; how many there are. Raises MismatchError."""
    before, after = ({piece.tensor for pair in pairs for piece in pair[side].pieces} for side in (0, 1))
    rest_old, rest_new = (
        {name: t for name, t in reader.tensors.items() if name not in gone} for reader, gone in ((old, before), (new, after))
    )
    for name in [*rest_old, *rest_new]:
        if name not in rest_new or name not in rest_old:
            where = "output" if name in rest_old else "input"
            raise MismatchError(
                f"a tensor is missing in the {where}", tensor=name, found=f"{len(rest_old)} tensors before, {len(rest_new)} after"
            )
    for name, tensor in rest_old.items():
        copy = rest_new[name]
        if (tensor.dtype, tensor.shape) != (copy.dtype, copy.shape):
            raise MismatchError(
                "dtype or shape differ", tensor=name, expected=f"{tensor.dtype} {tensor.shape}", found=f"{copy.dtype} {copy.shape}"
            )
        for at in range(0, tensor.size, CHUNK):
            size = min(CHUNK, tensor.size - at)
            one, two = old.read(tensor, at, size), new.read(copy, at, size)
            if not np.array_equal(one, two):
                byte = at + int(np.flatnonzero(one != two)[0])
                raise MismatchError("a tensor that should be unchanged differs", tensor=name, where=f"byte {byte} of its data",
                                    expected=f"0x{one[byte - at]:02x}", found=f"0x{two[byte - at]:02x}")  # fmt: skip
    return len(rest_old)
