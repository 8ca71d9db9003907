"""The proof where one side, or both, are ranks of a tensor-parallel model: what the ranks hold is what the whole holds, row by row.

Which rows of the whole a rank must hold follows from the table in its folder and the equations of docs/sharding.md, stated here once more
with the slow listing: no code that divides or joins is used.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import formats, ranges, stamp
from .checkpoint import Checkpoint, open_checkpoint
from .errors import FormatError, LayoutError, MismatchError
from .formats import Stored, Tensor
from .layout import Layout, count
from .listing import Entry, Label, Origin, listing
from .pieces import listed
from .ranges import Ranges
from .rowproof import Proof, Rows, beside, prove_same, prove_zeros
from .sizes import Sizes, bind

TABLE, VERSION = "triptych-shard.json", 1
HEADS, EVEN, VOCAB = "heads", "even", "vocab"
MAX_ROWS = 1 << 22
Index = NDArray[np.int64]


class Cut(NamedTuple):
    """How a tensor is divided along an axis, by its table: `layout` and `sizes` of the whole; one element for `block` rows."""

    role: str
    axis: int
    layout: Layout
    sizes: Sizes
    block: int
    period: int


class World(NamedTuple):
    """How many ranks there are, what they do with too few kv heads, the multiple that fills a vocabulary."""

    ranks: int
    kv: str
    pad: int


@dataclass(frozen=True)
class Ranked:
    """The folders of all ranks; how each tensor is divided (None: all of it is on every rank)."""

    path: Path
    stored: tuple[Stored, ...]
    world: World
    cuts: Mapping[str, Cut | None]


def ranks_below(path: str | Path) -> list[str]:
    """The folders of ranks in a folder, if it is one of ranks."""
    folder = Path(path)
    entries = [entry.name for entry in folder.iterdir() if entry.is_dir()] if folder.is_dir() else []
    return [name for name in entries if re.fullmatch(r"rank-\d{1,6}-of-\d{1,6}", name) and (folder / name / TABLE).exists()]


# Reading the tables


def _read(path: Path) -> Ranked:
    there = ranks_below(path)
    folders = [f"rank-{rank}-of-{len(there)}" for rank in range(len(there))]
    if set(folders) != set(there):
        raise FormatError(
            "the ranks are not complete", where=str(path), expected=f"{listed(folders)}: one set", found=listed(sorted(there))
        )
    tables = [formats.read_json(path / name / TABLE) for name in folders]
    for rank, table in enumerate(tables):
        if table != {**tables[0], "rank": rank} or table.get("version") != VERSION or table.get("world") != len(folders):
            raise FormatError("the tables of the ranks differ, or are of another version", file=f"{folders[rank]}/{TABLE}")
    stored = tuple(formats.read(path / name) for name in folders)
    try:
        return Ranked(path, stored, *_told(tables[0], stored))
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, LayoutError) as error:
        found = str(error).partition("\n")[0] or type(error).__name__
        raise FormatError("the table of a rank is damaged", file=f"{folders[0]}/{TABLE}", found=reprlib.repr(found)) from None


def _told(table: Mapping[str, Any], stored: Sequence[Stored]) -> tuple[World, dict[str, Cut | None]]:
    cuts = [_cut(told) for told in table["cuts"]]
    names = list(stored[0].tensors)
    numbers = {name: table["tensors"][name if name in table["tensors"] else _star(name)] for name in names}
    found = {name: None if number is None else cuts[number] for name, number in numbers.items()}
    for name, cut in found.items():
        own = [one.tensors[name].shape for one in stored]
        if cut is not None and _whole_rows(cut) > sum(shape[cut.axis] for shape in own):
            raise ValueError(f"fewer rows than the table says of {name}")
    world = World(len(stored), table["kv"], table["pad"])
    if (
        world.kv not in ("replicate", "rows")
        or type(world.pad) is not int
        or world.pad < 1
        or any(set(one.tensors) != set(names) for one in stored)
    ):
        raise ValueError("kv, pad, or the tensors of a rank")
    return world, found


def _cut(told: Mapping[str, Any]) -> Cut:
    layout = Layout(told["layout"])
    cut = Cut(told["role"], told["axis"], layout, bind(layout, **told["sizes"]), told.get("block", 1), told.get("period", 0))
    numbers = (cut.axis, cut.block, cut.period)
    if cut.role not in (HEADS, EVEN, VOCAB) or any(type(number) is not int or number < 0 for number in numbers) or cut.block < 1:
        raise ValueError("a cut")
    if count(layout.factors, cut.sizes) > MAX_ROWS * cut.block or (cut.block > 1 and cut.period < 1):
        raise ValueError("a cut with too many rows, or without a period")
    return cut


def _star(name: str) -> str:
    return ".".join("*" if word.isascii() and word.isdigit() else word for word in name.split("."))


# Which rows a rank holds


def _whole_rows(cut: Cut) -> int:
    rows = count(cut.layout.factors, cut.sizes)
    return rows if cut.block == 1 else rows // cut.period * -(-cut.period // cut.block)


@lru_cache(maxsize=256)
def held(cut: Cut, world: World, rank: int) -> Index:
    """[rows of a rank] the row of the whole that each is; -1 for padding. Raises MismatchError where the equations have no answer.

    >>> qkv = Layout("(q h|k g|v g) d")
    >>> held(Cut("heads", 0, qkv, bind(qkv, h=4, g=2, d=1), 1, 0), World(4, "replicate", 1), 3).tolist()
    [3, 5, 7]
    """
    if cut.block > 1:
        return _blocks(cut, held(cut._replace(block=1, period=0), world, rank))
    rows = count(cut.layout.factors, cut.sizes)
    if cut.role == VOCAB:
        filled = -(-rows // world.pad) * world.pad
        share = _share(filled, world.ranks, "rows of a vocabulary")
        return np.array([row if row < rows else -1 for row in range(rank * share, (rank + 1) * share)], np.int64)
    if _is_raw(cut, world):
        share = _share(rows, world.ranks, "rows")
        return np.arange(rank * share, (rank + 1) * share, dtype=np.int64)
    places = {label: row for row, entry in enumerate(listing(cut.layout, cut.sizes)) for label in entry.labels}
    return np.array([places[label] for label in _labels(cut, world, rank)], np.int64)


def _share(number: int, ranks: int, what: str) -> int:
    if number % ranks:
        raise MismatchError(f"{number} {what} cannot be shared by {ranks} ranks", equation=f"{number} % {ranks} = {number % ranks}")
    return number // ranks


def _heads(cut: Cut) -> dict[str, int]:
    """Part -> how many heads it has."""
    most: dict[str, int] = {}
    for entry in listing(cut.layout, cut.sizes):
        for label in entry.labels:
            most[label.part] = max(most.get(label.part, 0), label.head + 1)
    return most


def _is_kv(part: str) -> bool:
    return part.split(".")[0] in ("k", "v")


def _is_raw(cut: Cut, world: World) -> bool:
    """Whether an equal run of rows goes to each rank, through heads: too few kv heads, and the policy that cuts them."""
    few = any(_is_kv(part) and heads % world.ranks for part, heads in _heads(cut).items()) if cut.role == HEADS else False
    return few and world.kv == "rows"


def local(cut: Cut, world: World) -> tuple[Entry, ...]:
    """What a rank's own tensor lists: the layout at the sizes of one rank, which is one block of its share of heads, or of dims."""
    sizes = cut.sizes
    if world.ranks == 1:
        return listing(cut.layout, sizes)
    given = {axis: sizes[axis] for axis in cut.layout.axes}
    if cut.role == EVEN:
        slowest = {next((axis for axis in path.axes if axis not in path.heads), "") for path in cut.layout.paths}
        given |= {axis: _share(given[axis], world.ranks, f"of {axis}") for axis in slowest if axis}
        return listing(cut.layout, bind(cut.layout, **given))
    free = {"n"} if cut.layout.n_is_free else set()
    given = {axis: size for axis, size in given.items() if axis in free or axis not in ("h", "g", "t", "m", "n", "r")}
    given |= {"h": _share(sizes["h"], world.ranks, "query heads")} if "h" in sizes else {}
    given |= {"g": max(1, sizes["g"] // world.ranks)} if "g" in sizes else {}
    given |= {"t": 1} if {"t", "m"} & set(cut.layout.axes) else {}
    return listing(cut.layout, bind(cut.layout, **given))


def _labels(cut: Cut, world: World, rank: int) -> Iterator[Label]:
    """What the rows of a rank are in the whole: heads, or dims, from the first that the rank holds on."""
    whole, mine = _heads(cut), local(cut, world)
    dims: dict[str, int] = {}
    for entry in mine:
        for label in entry.labels:
            dims[label.part] = max(dims.get(label.part, 0), label.dim + 1)
    for entry in mine:
        part, head, dim = entry.labels[0]
        if cut.role == EVEN:
            yield Label(part, head, dim + rank * dims[part])
        elif whole[part] % world.ranks == 0:
            yield Label(part, head + rank * (whole[part] // world.ranks), dim)
        elif _is_kv(part) and world.ranks % whole[part] == 0:
            yield Label(part, head + rank // (world.ranks // whole[part]), dim)
        else:
            raise MismatchError(f"{whole[part]} heads of {part} cannot be shared by {world.ranks} ranks", layout=cut.layout)


def _blocks(cut: Cut, rows: Index) -> Index:
    """Elements of which each speaks of `block` rows: those of a rank must be whole ones of the whole."""
    each = -(-cut.period // cut.block)
    elements = rows // cut.period * each + rows % cut.period // cut.block
    firsts = elements[:: cut.block]
    for number, first in enumerate(firsts):
        if (elements[number * cut.block : (number + 1) * cut.block] != first).any():
            raise MismatchError(f"a block of {cut.block} rows crosses a boundary", layout=cut.layout, where=f"element {number} of a rank")
    return np.asarray(firsts, np.int64)


# Comparing


class _Side(NamedTuple):
    """Input or output: what is read; by name the tensors of all holders; how they are divided, where they are; what is known of layouts."""

    word: str
    stored: tuple[Stored, ...]
    reader: Ranges
    tensors: Mapping[str, tuple[Tensor, ...]]
    ranked: Ranked | None
    known: Mapping[str, tuple[int, tuple[Entry, ...], str]]

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


def prove_ranks(
    path: str | Path, out: str | Path, layouts: Mapping[str, str], records: str | Path | None, sizes: Mapping[str, int]
) -> Proof:
    """Prove that ranks hold what a checkpoint holds, or a checkpoint what ranks hold, or ranks what other ranks hold."""
    sides = []
    for word, place in (("input", path), ("output", out)):
        if ranks_below(place):
            sides.append(_of_ranks(word, _read(Path(place))))
        else:
            mine = word == "input"
            sides.append(_of_whole(word, open_checkpoint(place, layouts if mine else {}, sizes if mine else {}, (), records)))
    old, new = sides
    for name in [*old.tensors, *new.tensors]:
        if name not in new.tensors or name not in old.tensors:
            raise MismatchError(f"a tensor is missing in the {new.word if name in old.tensors else old.word}", tensor=name,
                                found=f"{len(old.tensors)} tensors before, {len(new.tensors)} after")  # fmt: skip
    for side in sides:
        _prove_stamps(side)
    with old.reader, new.reader:
        rows = ranges.in_order(lambda name: _prove(name, old, new), old.tensors)
    known = [number for number in rows if number is not None]
    notes = dict.fromkeys(note for one in new.stored for note in beside(old.stored[0], one))
    size = sum(tensor.size for held_by in old.tensors.values() for tensor in held_by)
    return Proof(str(path), str(out), len(known), sum(known), len(rows) - len(known), size, tuple(notes))


def _of_whole(word: str, found: Checkpoint) -> _Side:
    known = {piece.tensor: (one.axis, listing(piece.layout, one.sizes), f"{piece.layout} with {one.sizes.of(piece.layout)}")
             for one in found.projections for piece in one.pieces}  # fmt: skip
    tensors = {name: (tensor,) for name, tensor in found.stored.tensors.items()}
    return _Side(word, (found.stored,), Ranges(found.stored), tensors, None, known)


def _of_ranks(word: str, found: Ranked) -> _Side:
    known = {name: (cut.axis, listing(cut.layout, cut.sizes), f"{cut.layout} with {cut.sizes.of(cut.layout)}")
             for name, cut in found.cuts.items() if cut is not None and cut.block == 1}  # fmt: skip
    folders = [one.path.name for one in found.stored]
    tensors = {name: tuple(one.tensors[name]._replace(file=f"{folder}/{one.tensors[name].file}")
                           for folder, one in zip(folders, found.stored, strict=True)) for name in found.cuts}  # fmt: skip
    stored = tuple(replace(one, others=tuple(other for other in one.others if other.name != TABLE)) for one in found.stored)
    return _Side(word, stored, Ranges(replace(stored[0], root=found.path)), tensors, found, known)


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
                raw = cut.block > 1 or cut.role == VOCAB or _is_raw(cut, side.ranked.world)
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
        (axis, mine, before), (axis_there, theirs, after) = old.known[name], new.known[name]
        if axis != axis_there or not _lists(mine, theirs):
            raise MismatchError("input and output give a tensor different layouts", tensor=name, expected=f"{before}, axis {axis}",
                                found=f"{after}, axis {axis_there}")  # fmt: skip
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
    total = _whole_rows(cut)
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
