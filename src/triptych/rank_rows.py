"""Which rows of the whole each rank of a tensor-parallel model must hold: by the tables in the folders of the ranks, and by equations.

The equations of docs/sharding.md, stated here once more with the slow listing: no code that divides or joins is used.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import formats
from .errors import FormatError, LayoutError, MismatchError
from .formats import Stored
from .layout import Layout, count
from .listing import Entry, Label, listing
from .pieces import listed
from .sizes import Sizes, bind

TABLE, VERSION = "triptych-shard.json", 1
HEADS, EVEN, VOCAB = "heads", "even", "vocab"
POLICIES = ("replicate", "rows")
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
    """What all ranks store, and in which folders (with a slash); how each tensor is divided (None: all of it is on every rank)."""

    path: Path
    stored: tuple[Stored, ...]
    homes: tuple[str, ...]
    world: World
    cuts: Mapping[str, Cut | None]


def ranks_below(path: str | Path) -> list[str]:
    """The folders of ranks in a folder, if it is one of ranks."""
    folder = Path(path)
    entries = [entry.name for entry in folder.iterdir() if entry.is_dir()] if folder.is_dir() else []
    return [name for name in entries if re.fullmatch(r"rank-\d{1,6}-of-\d{1,6}", name) and (folder / name / TABLE).exists()]


# Reading the tables


def read(path: Path) -> Ranked:
    """The ranks with what their tables say. Raises FormatError."""
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
        return Ranked(path, stored, tuple(f"{name}/" for name in folders), *_told(tables[0], stored))
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
        if cut is not None and whole_rows(cut) > sum(shape[cut.axis] for shape in own):
            raise ValueError(f"fewer rows than the table says of {name}")
    world = World(len(stored), table["kv"], table["pad"])
    if world.kv not in POLICIES or type(world.pad) is not int or world.pad < 1 or any(set(one.tensors) != set(names) for one in stored):
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


def whole_rows(cut: Cut) -> int:
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
    if is_raw(cut, world):
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


def is_raw(cut: Cut, world: World) -> bool:
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
