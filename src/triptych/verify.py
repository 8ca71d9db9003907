"""The proof: every row of every output tensor is the row of the input that has its label, found by a slow listing of its own.

Nothing of the code that makes row maps, plans or runs them is used: from the two layouts alone, each row of each side is labelled one by
one with part, head and dim, and the bytes of equal labels are compared. All other tensors must be there under their names, byte for byte.
Files beside the weights (config.json, tokenizer) are compared too: what differs is named, not refused, since people change them.
"""

from __future__ import annotations

import filecmp
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import axes, ranges
from .beside import LINEAR, NORM, neighbours, norms
from .checkpoint import Checkpoint, open_checkpoint
from .errors import MismatchError
from .formats import Other, Stored, Tensor
from .layout import Layout
from .listing import Origin, listing, origins
from .packed import BY_STAMP, Packed
from .pieces import base_names, in_bytes, listed, target_of
from .ranges import Ranges
from .rope import named, names_pairs, rope_of, sizes_of
from .sizes import bind

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


class Proved(NamedTuple):
    """A proof with what it is about: both sides, and the projections of the one with those of the other."""

    proof: Proof
    before: Checkpoint
    after: Checkpoint
    pairs: tuple[tuple[Packed, Packed], ...]


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
    return prove(path, out, to, layouts=layouts, records=records, **sizes).proof


def prove(
    path: str | Path,
    out: str | Path,
    to: str | Layout | None = None,
    *,
    layouts: Mapping[str, str] | None = None,
    records: str | Path | None = None,
    **sizes: int,
) -> Proved:
    """As `verify`, with what the proof is about."""
    target = target_of(to) if to is not None else None
    wanted = target.layout if target else None
    before = open_checkpoint(path, layouts or {}, sizes, [wanted] if wanted else [], records)
    after = open_checkpoint(out, {}, sizes, [packed.layout for packed in before.projections] + ([wanted] if wanted else []))
    if target and target.split and any(packed.fused and packed.kind == "attention" for packed in after.projections):
        raise MismatchError("the output has fused projections", expected="separate ones")
    if wanted is not None:
        _must_have(after, wanted, sizes)
    there = {packed.link: packed for packed in after.projections}
    known = (*before.projections, *_beside_projections(before, after))
    _must_know(known, after)
    pairs = tuple((_with_pairs(packed, there[packed.name]), there[packed.name]) for packed in known if packed.name in there)
    with Ranges(before.stored) as old, Ranges(after.stored) as new:
        rows = sum(ranges.in_order(lambda pair: _prove_projection(*pair, old, new), pairs))
        apart = _prove_others(pairs, old, new)
    proof = Proof(str(path), str(out), len(pairs), rows, apart, before.stored.size, tuple(_beside(before.stored, after.stored)))
    return Proved(proof, before, after, pairs)


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


def _must_know(known: Iterable[Packed], after: Checkpoint) -> None:
    """Every projection that the output was stamped with is known in the input."""
    names = {packed.name for packed in known}
    for packed in after.projections:
        if packed.source == BY_STAMP and packed.link not in names:
            raise MismatchError("a converted projection is not known in the input", tensor=packed.link, found=f"{packed.layout} (stamp)",
                                try_="declare the input's layout as for the conversion: --layout 'NAME_GLOB=LAYOUT'")  # fmt: skip


def _beside_projections(before: Checkpoint, after: Checkpoint) -> Iterator[Packed]:
    """Norms and other weights of the input that the output was stamped with, since they changed with a projection."""
    names, tensors = {packed.name for packed in before.projections}, before.stored.tensors
    stamped = [packed for packed in after.projections if packed.source == BY_STAMP and packed.link not in names]
    for kind in dict.fromkeys((packed.kind, packed.axis) for packed in stamped if packed.kind in (NORM, LINEAR)):
        found = norms(before.projections, tensors) if kind[0] == NORM else neighbours(before.projections, tensors, 1 - kind[1])
        yield from (packed for packed in found if any((one.link, one.kind, one.axis) == (packed.name, *kind) for one in stamped))


def _with_pairs(source: Packed, target: Packed) -> Packed:
    """The projection as the input holds it, its rotary pairs named as its record tells them, where the stamp tells another order."""
    rope = rope_of(source.rope) if source.rope and source.rope != target.rope else None
    if rope is None or any(names_pairs(piece.layout) for piece in source.pieces):
        return source
    pieces = tuple(replace(piece, layout=named(piece.layout, rope)) for piece in source.pieces)
    layout = named(source.layout, rope)
    used = {axis for one in (layout, *(piece.layout for piece in pieces)) for axis in one.axes}
    sizes = {**source.sizes, **sizes_of(source.layout, rope, source.sizes)}
    known = {axis: size for axis, size in sizes.items() if axis in used or axis in axes.ATOMS}
    return replace(source, pieces=pieces, layout=layout, sizes=bind(layout, *(piece.layout for piece in pieces), **known))


# Comparing bytes


def _prove_projection(source: Packed, target: Packed, old: Ranges, new: Ranges) -> int:
    """Compare one projection; how many rows it has. Raises MismatchError."""
    _must_match(source, target)
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


def _must_match(source: Packed, target: Packed) -> None:
    """A stamp tells of the projection what the input tells of it. Raises MismatchError."""
    if target.source != BY_STAMP:
        return
    order = rope_of(target.rope) if target.rope else None
    changed = order is not None and any(_order(piece.layout) == order.order for piece in target.pieces)
    sides: list[dict[str, object]] = [{"rotary order": one.rope if not changed else None, "kind": one.kind} for one in (source, target)]
    if source.fused and target.fused:
        for side, one in zip(sides, (source, target), strict=True):
            side["names of parts"] = {part: name for part, name in one.parts if name != one.name}
    for word, expected in sides[0].items():
        if expected != sides[1][word]:
            raise MismatchError(f"the stamp tells another {word}", tensor=target.name, expected=expected, found=sides[1][word])


def _order(layout: Layout) -> str | None:
    """The rotary order that a layout names."""
    for path in layout.paths:
        if "c" in path.axes and "p" in path.axes:
            return "half" if path.axes.index("c") < path.axes.index("p") else "interleaved"
    return None


def _prove_zeros(tensor: Tensor, rows: Sequence[int], axis: int, reader: Ranges) -> None:
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
    old: Ranges
    new: Ranges

    def prove(self) -> None:
        """Compare every row with the row that it comes from. Raises MismatchError."""
        tensor, first, rows, axis = self.tensor, self.sources[0], len(self.origin.rows), self.axis
        turned = self.packed.axis != axis and len(first.shape) == 2
        shape = (*first.shape[:axis], rows, *first.shape[axis + 1 :])
        shape = shape[::-1] if turned else shape
        if (tensor.dtype, tensor.shape) != (first.dtype, shape) or (self.packed.axis != axis and not turned):
            raise MismatchError("dtype or shape differ", tensor=tensor.name, expected=f"{first.dtype} {shape}, packed axis {axis}",
                                found=f"{tensor.dtype} {tensor.shape}, packed axis {self.packed.axis}")  # fmt: skip
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
        label = listing(self.layout, self.packed.sizes)[row].labels[0]
        number = int(self.origin.tensors[row])
        whence = f"the bytes of row {self.origin.rows[row]} of {self.sources[number].name}" if number >= 0 else "zeros"
        raise MismatchError("a row of the output is not the row of the input", tensor=self.tensor.name,
                            where=f"row {row}: {label}   ({self.layout})", expected=whence, found="other bytes")  # fmt: skip


def _prove_others(pairs: Sequence[tuple[Packed, Packed]], old: Ranges, new: Ranges) -> int:
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
    ranges.in_order(lambda tensor: _prove_same(tensor, rest_new[tensor.name], old, new), rest_old.values())
    return len(rest_old)


def _prove_same(tensor: Tensor, copy: Tensor, old: Ranges, new: Ranges) -> None:
    if (tensor.dtype, tensor.shape) != (copy.dtype, copy.shape):
        raise MismatchError("dtype or shape differ", tensor=tensor.name, expected=f"{tensor.dtype} {tensor.shape}",
                            found=f"{copy.dtype} {copy.shape}")  # fmt: skip
    if apart := ranges.first_difference(old, tensor, new, copy):
        byte, expected, found = apart
        raise MismatchError("a tensor that should be unchanged differs", tensor=tensor.name, where=f"byte {byte} of its data",
                            expected=f"0x{expected:02x}", found=f"0x{found:02x}")  # fmt: skip


def _beside(before: Stored, after: Stored) -> Iterator[str]:
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
    return one.size == two.size and filecmp.cmp(before.root / one.name, after.root / two.name, shallow=False)
