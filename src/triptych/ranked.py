"""The proof where one side, or both, are ranks of a tensor-parallel model: what the ranks hold is what the whole holds, row by row.

How they were divided follows from the tables in their folders, or, for ranks that others wrote, from the shapes of the whole beside them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import ranges, stamp
from .checkpoint import Checkpoint, open_checkpoint
from .errors import MismatchError, PlanError
from .formats import Stored, Tensor
from .listing import Entry, Origin, listing
from .packed import Packed, Piece
from .pieces import listed
from .ranges import Ranges
from .rank_rows import EVEN, HEADS, TABLE, VOCAB, Cut, Index, Ranked, held, is_raw, local, ranks_below, read, whole_rows
from .rank_sets import Found, find
from .rank_shapes import Beside, by_shapes
from .rowproof import Proof, Rows, beside, prove_same, prove_zeros
from .sizes import bind


class _Side(NamedTuple):
    """Input or output: what is read; by name the tensors of all holders; how they are divided, where they are; cuts of known layouts."""

    word: str
    stored: tuple[Stored, ...]
    reader: Ranges
    tensors: Mapping[str, tuple[Tensor, ...]]
    ranked: Ranked | None
    known: Mapping[str, Cut]

    def cut(self, name: str) -> Cut | None:
        return self.ranked.cuts[name] if self.ranked else None

    def holders(self, name: str, axis: int) -> list[tuple[Tensor, Index]]:
        """Every tensor of this name, with the rows of the whole that it must hold."""
        cut = self.cut(name)
        out = []
        for rank, tensor in enumerate(self.tensors[name]):
            if axis >= len(tensor.shape):
                raise MismatchError("a tensor has no such axis", tensor=name, expected=f"axis {axis}", found=f"shape {tensor.shape}")
            rows = held(cut, self.ranked.world, rank) if cut and self.ranked else np.arange(tensor.shape[axis], dtype=np.int64)
            if len(rows) != tensor.shape[axis]:
                raise MismatchError(f"a tensor of the {self.word} has another number of rows than its share", tensor=name, file=tensor.file,
                                    expected=f"{len(rows)} along axis {axis}", found=f"shape {tensor.shape}")  # fmt: skip
            out.append((tensor, rows))
        return out


def are_ranks(place: str | Path) -> bool:
    """Whether a folder holds ranks, with tables or as others wrote them."""
    return bool(ranks_below(place)) or find(Path(place)) is not None


def prove_ranks(
    path: str | Path, out: str | Path, layouts: Mapping[str, str], records: str | Path | None, sizes: Mapping[str, int]
) -> Proof:
    """Prove that ranks hold what a checkpoint holds, or a checkpoint what ranks hold, or ranks what other ranks hold.

    Raises PlanError where both sides are ranks without a table: nothing says then what the whole is.
    """

    def side(word: str, place: str | Path, layouts: Mapping[str, str], sizes: Mapping[str, int]) -> _Side | Found:
        if ranks_below(place):
            return _of_ranks(word, read(Path(place)))
        return find(Path(place)) or _of_whole(word, open_checkpoint(place, layouts, sizes, (), records))

    old, new = side("input", path, layouts, sizes), side("output", out, {}, {})
    if isinstance(old, Found):
        if isinstance(new, Found):
            raise PlanError("nothing says what these ranks are as a whole", where=f"{path} and {out}", try_="merge those of one side",
                            expected="one checkpoint, or ranks of `triptych shard`, on one side")  # fmt: skip
        old = _of_ranks("input", by_shapes(old, _beside(new)))
    elif isinstance(new, Found):
        new = _of_ranks("output", by_shapes(new, _beside(old)))
    for name in [*old.tensors, *new.tensors]:
        if name not in new.tensors or name not in old.tensors:
            raise MismatchError(f"a tensor is missing in the {new.word if name in old.tensors else old.word}", tensor=name,
                                found=f"{len(old.tensors)} tensors before, {len(new.tensors)} after")  # fmt: skip
    for one in (old, new):
        _prove_stamps(one)
    with old.reader, new.reader:
        rows = ranges.in_order(lambda name: _prove(name, old, new), old.tensors)
    known = [number for number in rows if number is not None]
    notes = dict.fromkeys(note for one in new.stored for note in beside(old.stored[0], one))
    size = sum(tensor.size for held_by in old.tensors.values() for tensor in held_by)
    return Proof(str(path), str(out), len(known), sum(known), len(rows) - len(known), size, tuple(notes))


def _of_whole(word: str, found: Checkpoint) -> _Side:
    known = {piece.tensor: _cut(one, piece) for one in found.projections for piece in one.pieces}
    tensors = {name: (tensor,) for name, tensor in found.stored.tensors.items()}
    return _Side(word, (found.stored,), Ranges(found.stored), tensors, None, known)


def _cut(one: Packed, piece: Piece) -> Cut:
    """How a tensor of a projection is divided where it is: by heads if it has any, else every part for itself."""
    by_heads = one.kind != "mlp" and any(path.heads for path in one.layout.paths)
    sizes = bind(piece.layout, **{axis: one.sizes[axis] for axis in piece.layout.axes})
    return Cut(HEADS if by_heads else EVEN, one.axis, piece.layout, sizes, 1, 0)


def _of_ranks(word: str, found: Ranked) -> _Side:
    known = {name: cut for name, cut in found.cuts.items() if cut is not None and cut.block == 1}
    tensors = {name: tuple(one.tensors[name]._replace(file=home + one.tensors[name].file)
                           for home, one in zip(found.homes, found.stored, strict=True)) for name in found.cuts}  # fmt: skip
    stored = tuple(replace(one, others=tuple(other for other in one.others if other.name != TABLE)) for one in found.stored)
    return _Side(word, stored, Ranges(replace(stored[0], root=found.path)), tensors, found, known)


def _beside(side: _Side) -> Beside:
    """What a side knows of the whole, for ranks without a table on the other."""
    cuts = dict(side.known) if side.ranked is None else {name: cut for name, cut in side.ranked.cuts.items() if cut is not None}
    shapes = {name: tensors[0].shape for name, tensors in side.tensors.items()}
    if side.ranked is not None:
        shapes |= {name: (*shapes[name][: cut.axis], whole_rows(cut), *shapes[name][cut.axis + 1 :]) for name, cut in cuts.items()}
    return Beside(shapes, cuts)


def _prove_stamps(side: _Side) -> None:
    """The stamp of a rank, where there is one, lists what the rank must hold."""
    if side.ranked is None:
        return
    for rank, one in enumerate(side.ranked.stored):
        for file in one.files:
            for name, told in stamp.decode(file).items():
                cut = side.cut(name)
                if cut is None:
                    continue
                raw = cut.block > 1 or cut.role == VOCAB or is_raw(cut, side.ranked.world)
                if raw or not _lists(listing(told.layout, told.sizes), local(cut, side.ranked.world)):
                    raise MismatchError("the stamp of a rank does not say what it must hold", tensor=name, where=f"rank {rank}",
                                        expected="no stamp" if raw else f"its share of {cut.layout} with {cut.sizes.of(cut.layout)}",
                                        found=f"{told.layout} with {told.sizes.of(told.layout)}")  # fmt: skip


def _lists(one: Sequence[Entry], two: Sequence[Entry]) -> bool:
    return len(one) == len(two) and all(a.zero == b.zero and (a.zero or a.labels == b.labels) for a, b in zip(one, two, strict=True))


def _prove(name: str, old: _Side, new: _Side) -> int | None:
    """Compare a tensor of all holders; how many rows were compared by label, None where no heads are known. Raises MismatchError."""
    cut = old.cut(name) or new.cut(name)
    if cut is None:
        first, *more = old.tensors[name]
        for other in more:
            prove_same(first, other, old.reader, old.reader)
        for other in new.tensors[name]:
            prove_same(first, other, old.reader, new.reader)
        return None
    if name in old.known and name in new.known and cut.block == 1:
        mine, theirs = old.known[name], new.known[name]
        if mine.axis != theirs.axis or not _lists(listing(mine.layout, mine.sizes), listing(theirs.layout, theirs.sizes)):
            expected, found = (f"{one.layout} with {one.sizes.of(one.layout)}, axis {one.axis}" for one in (mine, theirs))
            raise MismatchError("input and output give a tensor different layouts", tensor=name, expected=expected, found=found)
    sources, targets = old.holders(name, cut.axis), new.holders(name, cut.axis)
    _prove_alike(name, sources)
    origin = _owners(name, sources, cut, old.word)
    _owners(name, targets, cut, new.word)
    tensors = tuple(tensor for tensor, _ in sources)
    for tensor, rows in sources:
        prove_zeros(tensor, np.flatnonzero(rows < 0).tolist(), cut.axis, old.reader)
    for reader, some in ((old.reader, sources[1:]), (new.reader, targets)):
        for tensor, rows in some:
            mine_of = Origin(np.where(rows < 0, -1, origin.tensors[rows]), origin.rows[rows])

            def label(row: int, rows: Index = rows, tensor: Tensor = tensor) -> str:
                return f"{_said(cut, int(rows[row]))}   in {tensor.file}"

            Rows(tensor, tensors, cut.axis, cut.axis, mine_of, old.reader, reader, label).prove()
    return sum(len(rows) for _, rows in targets) if cut.role == HEADS else None


def _prove_alike(name: str, holders: Iterable[tuple[Tensor, Index]]) -> None:
    kinds = {(tensor.dtype, len(tensor.shape)) for tensor, _ in holders}
    if len(kinds) > 1:
        raise MismatchError("the ranks hold a tensor in several dtypes or shapes", tensor=name, found=listed(map(str, kinds)))


def _owners(name: str, holders: Sequence[tuple[Tensor, Index]], cut: Cut, word: str) -> Origin:
    """Of every row of the whole the first holder that has it, and where. Raises MismatchError for a row that none has."""
    total = whole_rows(cut)
    owner, place = np.full(total, -1, np.int64), np.zeros(total, np.int64)
    for number, (_, rows) in reversed(list(enumerate(holders))):
        real = np.flatnonzero(rows >= 0)
        if len(real) and rows[real].max() >= total:
            raise MismatchError("a tensor has other rows than the whole", tensor=name, expected=f"{total} rows", found=f"{len(rows)} rows")
        owner[rows[real]], place[rows[real]] = number, real
    if (owner < 0).any():
        missing = int(np.flatnonzero(owner < 0)[0])
        raise MismatchError(f"a row is nowhere in the {word}", tensor=name, where=f"row {missing} of {total}: {_said(cut, missing)}")
    return Origin(owner, place)


def _said(cut: Cut, row: int) -> str:
    if row < 0:
        return "padding"
    return f"{listing(cut.layout, cut.sizes)[row].labels[0]}   ({cut.layout})" if cut.block == 1 else f"element {row} of the whole"
