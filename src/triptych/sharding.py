"""Which rows of a tensor each rank of a tensor-parallel model holds, in which order, and how its own tensor is laid out. Integers only.

Every rank holds whole heads, or an equal run of every part's dims, or a run of the vocabulary; the order inside a rank is that of the
layout, at the sizes of the rank. So one function of (cut, ranks, rank) says all: splitting, joining and changing the number of ranks
are computed from it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from .errors import PlanError
from .layout import Axis, Layout, count
from .rowmap import ZERO, Block, Dim, Part, Rows, from_indices, parts
from .sizes import Sizes, bind

HEADS, EVEN, VOCAB = "heads", "even", "vocab"
ROLES = (HEADS, EVEN, VOCAB)
REPLICATE, ROWS = "replicate", "rows"
POLICIES = (REPLICATE, ROWS)
KV_HEADS = frozenset("tmng")
MAX_ROWS = 1 << 22
RUN = Layout("f")
"""Rows without heads or parts."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """How many ranks there are and what they do where heads or rows do not suffice.

    `kv`: with fewer kv heads than ranks, `replicate` gives several ranks the same head, `rows` cuts through the heads of one group.
    `pad`: the vocabulary is filled with rows of zeros to a multiple of this.
    """

    world: int
    kv: str = REPLICATE
    pad: int = 1


@dataclass(frozen=True, slots=True)
class Cut:
    """How one axis of a tensor is divided: in whole `heads`, `even` runs of every part's dims, or as a `vocab`.

    `layout` and `sizes` are those of the whole tensor. With `block` > 1 one element along the axis speaks of `block` rows so laid out (a
    scale of a block, a word of packed numbers); `period` is the number of rows after which the blocks begin anew.
    """

    role: str
    axis: int
    layout: Layout
    sizes: Sizes
    block: int = 1
    period: int = 0

    @property
    def rows(self) -> int:
        """Rows of the whole tensor along the axis."""
        rows = count(self.layout.factors, self.sizes)
        return rows if self.block == 1 else rows // self.period * -(-self.period // self.block)

    def to_dict(self) -> dict[str, Any]:
        told = {"role": self.role, "axis": self.axis, "layout": str(self.layout)}
        told["sizes"] = {axis: self.sizes[axis] for axis in dict.fromkeys("t" if axis == "m" else axis for axis in self.layout.axes)}
        return told if self.block == 1 else {**told, "block": self.block, "period": self.period}


def even(rows: int, axis: int = 0) -> Cut:
    """A cut of an axis in equal runs: a plain column-parallel or row-parallel weight."""
    return Cut(EVEN, axis, RUN, bind(RUN, f=rows))


def vocab(rows: int, axis: int = 0) -> Cut:
    """A cut of a vocabulary."""
    return Cut(VOCAB, axis, RUN, bind(RUN, f=rows))


def along(role: str, axis: int, layout: Layout, sizes: Mapping[str, int]) -> Cut:
    """A cut with the sizes that its layout uses and no others, so that equal cuts are equal."""
    return Cut(role, axis, layout, bind(layout, **{name: sizes[name] for name in layout.axes}))


def has_heads(layout: Layout) -> bool:
    """Whether any part has heads; a projection without any is held whole by every rank."""
    return any(path.heads for path in layout.paths)


# What a rank holds


@lru_cache(maxsize=512)
def held(cut: Cut, ranks: Ranks, rank: int) -> Rows:
    """[rows of the rank] the row of the whole that each row of a rank's tensor is, or ZERO for padding. Read-only.

    Raises PlanError where heads or rows do not divide, or a block of scales crosses a boundary.

    >>> from .sizes import bind
    >>> qkv = Layout("(q h|k g|v g) d")
    >>> held(Cut(HEADS, 0, qkv, bind(qkv, h=4, g=2, d=1)), Ranks(4), 3).tolist()
    [3, 5, 7]
    """
    if cut.rows > MAX_ROWS:
        raise PlanError("too many rows to divide one by one", layout=cut.layout, found=f"{cut.rows} rows", expected=f"at most {MAX_ROWS}")
    if cut.block > 1:
        found = _scales(cut, ranks, rank)
    elif cut.role == VOCAB:
        found = _vocab(cut, ranks, rank)
    elif cut.role == HEADS and is_raw(cut, ranks):
        found = _raw(cut, ranks, rank)
    else:
        found = _parts(cut, ranks, rank)
    found.flags.writeable = False
    return found


def local(cut: Cut, ranks: Ranks) -> tuple[Layout, Sizes] | None:
    """Layout and sizes of a rank's own tensor; None where a rank holds no whole heads.

    >>> from .sizes import bind
    >>> qkv = Layout("t (q n r|k n|v n) d")
    >>> print(local(Cut(HEADS, 0, qkv, bind(qkv, h=16, g=4, t=4, d=8)), Ranks(2))[1])
    t=1 n=2 r=4 d=8 g=2 h=8
    """
    if cut.role == HEADS and is_raw(cut, ranks):
        return None
    return cut.layout, _local_sizes(cut, ranks)


def is_raw(cut: Cut, ranks: Ranks) -> bool:
    """Whether kv heads are cut through: fewer of them than ranks, under the policy that cuts raw rows."""
    kv = [math.prod(digit.size for digit in part.heads) for part in parts(cut.layout, cut.sizes) if _is_kv(part)]
    return ranks.kv == ROWS and any(heads % ranks.world for heads in kv)


def _is_kv(part: Part) -> bool:
    """Whether a part belongs to the kv heads, which several ranks may share."""
    return {name.split(".")[0] for name in part.path.names} <= {"k", "v"} and set(part.path.heads) <= KV_HEADS


def _local_sizes(cut: Cut, ranks: Ranks) -> Sizes:
    """The sizes of a rank's tensor: a rank is one tensor-parallel block, with its share of heads or dims."""
    sizes, world, used = cut.sizes, ranks.world, cut.layout.axes
    if world == 1:
        return sizes
    if cut.role == EVEN:
        slowest = {part.path.dims[0] for part in parts(cut.layout, sizes)}
        return bind(cut.layout, **{axis: sizes[axis] // world if axis in slowest else sizes[axis] for axis in used})
    given = {axis: sizes[axis] for axis in used}
    groups = max(1, sizes.get("g", 1) // world)
    given |= {"h": sizes["h"] // world} if "h" in used else {}
    given |= {"g": groups} if "g" in used else {}
    given |= {axis: 1 for axis in "tm" if axis in used}
    given |= {"n": groups} if "n" in used and not cut.layout.n_is_free else {}
    given |= {"r": max(1, sizes["h"] // world) // groups} if "r" in used else {}
    return bind(cut.layout, **given)


def _parts(cut: Cut, ranks: Ranks, rank: int) -> Rows:
    """Whole heads, or runs of dims, of every part."""
    shares = [_share(cut, part, ranks, rank) for part in parts(cut.layout, cut.sizes)]
    mine = parts(cut.layout, _local_sizes(cut, ranks))
    found = np.empty(sum(math.prod(part.shape) for part in mine), np.int64)
    for own, (rows, first) in zip(mine, shares, strict=True):
        heads, dims = own.shape
        found[own.rows()] = rows[first : first + heads] if cut.role == HEADS else rows[:, first : first + dims]
    return found


def _share(cut: Cut, part: Part, ranks: Ranks, rank: int) -> tuple[Rows, int]:
    """All rows [heads, dims] of a part of the whole, and the first head (or dim) that a rank holds of it."""
    (heads, dims), world = part.shape, ranks.world
    what = part.path.names[0] or "row"
    if cut.role == EVEN:
        slowest = part.path.dims[0] if part.path.dims else None
        size = cut.sizes[slowest] if slowest else 0
        if part.path.heads or not size or size % world:
            raise _does_not_divide(cut, f"{size} of {slowest or what}", world, f"{size} = {world} * {size // world} + {size % world}")
        return part.rows(), rank * (dims // world)
    if heads % world == 0:
        return part.rows(), rank * (heads // world)
    if _is_kv(part) and world % heads == 0:
        return part.rows(), rank // (world // heads)
    if not part.path.heads:
        raise PlanError("a part of a projection has no heads to divide", part=what, layout=cut.layout, try_="--rule 'NAME_GLOB=copy'")
    if _is_kv(part):
        raise _does_not_divide(cut, f"{heads} kv heads", world, f"{heads} divides neither into {world} nor {world} into {heads}")
    raise _does_not_divide(cut, f"{heads} heads of {what}", world, f"{heads} = {world} * {heads // world} + {heads % world}")


def _does_not_divide(cut: Cut, what: str, world: int, equation: str) -> PlanError:
    return PlanError(f"{what} cannot be shared by {world} ranks", layout=f"{cut.layout} with {cut.sizes.of(cut.layout)}", equation=equation)


def _raw(cut: Cut, ranks: Ranks, rank: int) -> Rows:
    """An equal run of rows, through heads: only where the rows of every group lie together, and every group has as many ranks."""
    rows, world, first = cut.rows, ranks.world, cut.layout.factors[0]
    alone = len(cut.layout.paths) == 1
    groups = cut.sizes.get("g", 1)
    if not alone and not (isinstance(first, Axis) and first.name == "g"):
        raise PlanError("raw rows are cut only where every group's rows lie together", layout=cut.layout,
                        expected="g (q r|k|v) d, or separate q, k and v", try_="convert it first, or --kv replicate")  # fmt: skip
    if world % groups:
        raise _does_not_divide(cut, f"{groups} kv heads", world, f"{groups} divides neither into {world} nor {world} into {groups}")
    for part in parts(cut.layout, cut.sizes):
        if not _is_kv(part) and part.shape[0] % world:
            raise _does_not_divide(cut, f"{part.shape[0]} heads of {part.path.names[0]}", world, f"{part.shape[0]} % {world} > 0")
    if rows % world:
        raise _does_not_divide(cut, f"{rows} rows", world, f"{rows} = {world} * {rows // world} + {rows % world}")
    return np.arange(rank * (rows // world), (rank + 1) * (rows // world), dtype=np.int64)


def _vocab(cut: Cut, ranks: Ranks, rank: int) -> Rows:
    rows, world = cut.rows, ranks.world
    padded = -(-rows // ranks.pad) * ranks.pad
    if padded % world:
        found = f"{padded} = {world} * {padded // world} + {padded % world}"
        raise PlanError(f"a vocabulary of {padded} rows cannot be shared by {world} ranks", found=found,
                        try_=f"--pad-vocab-to {math.lcm(ranks.pad, world)}")  # fmt: skip
    mine = np.arange(rank * (padded // world), (rank + 1) * (padded // world), dtype=np.int64)
    return np.where(mine < rows, mine, ZERO)


def _scales(cut: Cut, ranks: Ranks, rank: int) -> Rows:
    """Scales or packed words, each of one block of rows: blocks move whole, or not at all."""
    block, period = cut.block, cut.period
    if ranks.world == 1:
        return np.arange(cut.rows, dtype=np.int64)
    rows = held(replace(cut, block=1, period=0), ranks, rank)
    edges = np.flatnonzero(np.diff(rows) != 1) + 1
    starts, stops = np.concatenate([[0], edges]), np.append(edges, len(rows))
    inside = rows[starts] % period
    ends = rows[stops - 1] % period + 1
    whole = (rows[starts] >= 0) & (starts % block == 0) & (inside % block == 0) & (rows[starts] // period == rows[stops - 1] // period)
    whole &= (ends % block == 0) | ((ends == period) & (stops == len(rows)))
    if not whole.all():
        raise _crossing(cut, ranks, rank, int(np.flatnonzero(~whole)[0]), starts, stops, rows)
    first = rows[::block]
    return np.asarray(first // period * -(-period // block) + first % period // block, np.int64)


def _crossing(cut: Cut, ranks: Ranks, rank: int, run: int, starts: Rows, stops: Rows, rows: Rows) -> PlanError:
    """Names the first boundary that lies inside a block."""
    block = cut.block
    begin, end = int(rows[starts[run]]), int(rows[stops[run] - 1])
    at = begin if begin % cut.period % block or starts[run] % block else end + 1
    near, inside = at % cut.period // block * block, at % cut.period % block
    found = f"row {at} = {near} + {inside}" if inside else f"row {at} becomes row {int(starts[run])} of the rank, inside a block"
    return PlanError(
        f"a block of {block} rows crosses a boundary",
        layout=f"{cut.layout} with {cut.sizes.of(cut.layout)}",
        where=f"rank {rank} of {ranks.world} holds rows {begin} to {end}: {label(cut, begin)}",
        expected=f"boundaries at multiples of {block} rows, of which one element speaks",
        found=found,
        try_="fewer ranks, or weights without blocks",
    )


def label(cut: Cut, row: int) -> str:
    """What a row of the whole is: part, head and dim."""
    for part in parts(cut.layout, cut.sizes):
        head, dim = np.nonzero(part.rows() == row)
        if len(head):
            return f"{part.path.names[0] or 'row'}, head {head[0]}, dim {dim[0]}"
    return "padding"


# From some ranks to others


class Taken(NamedTuple):
    """What one rank takes: blocks of rows by the rank they come from, counted from the first rows of both; rows that hold zero."""

    rows: int
    blocks: tuple[tuple[int, tuple[Block, ...]], ...]
    zeros: tuple[Block, ...]


class Twin(NamedTuple):
    """Rows that two ranks hold, of which the first one's are taken: result row of `second` is source row of `first`."""

    first: int
    second: int
    blocks: tuple[Block, ...]


class Passage(NamedTuple):
    """From the ranks `before` to the ranks `after`: what each takes, what must be equal, padding left out (by rank), widths before.

    `often`: whether any row goes to more than one rank.
    """

    taken: tuple[Taken, ...]
    twins: tuple[Twin, ...]
    padding: tuple[tuple[int, tuple[Block, ...]], ...]
    rows: tuple[int, ...]
    often: bool


@lru_cache(maxsize=256)
def passage(cut: Cut, before: Ranks, after: Ranks) -> Passage:
    """How the tensors of `before` become those of `after`: the maps of both, composed. Splitting and joining are the ends with one rank.

    >>> found = passage(even(4), Ranks(2), Ranks(1)).taken[0]
    >>> found.rows, [rank for rank, blocks in found.blocks]
    (4, [0, 1])
    """
    old = [held(cut, before, rank) for rank in range(before.world)]
    owner, place = np.full(cut.rows, ZERO, np.int64), np.full(cut.rows, ZERO, np.int64)
    twins: list[Twin] = []
    for rank, rows in enumerate(old):
        real = np.flatnonzero(rows >= 0)
        first = owner[rows[real]]
        for other in np.unique(first[first >= 0]).tolist():
            again = real[first == other]
            index = np.full(len(rows), ZERO, np.int64)
            index[again] = place[rows[again]]
            twins.append(Twin(other, rank, from_indices(index, len(old[other])).blocks))
        new = real[first < 0]
        owner[rows[new]], place[rows[new]] = rank, new
    if (owner < 0).any():
        raise PlanError("no rank holds a row", layout=cut.layout, where=label(cut, int(np.flatnonzero(owner < 0)[0])))
    taken = []
    uses = np.zeros(cut.rows, np.int64)
    for rank in range(after.world):
        rows = held(cut, after, rank)
        there = rows >= 0
        uses[rows[there]] += 1
        index = np.where(there, place[rows], ZERO)
        whence = np.where(there, owner[rows], ZERO)
        sources = np.unique(whence[there]).tolist()
        blocks = tuple((s, from_indices(np.where(whence == s, index, ZERO), len(old[s])).blocks) for s in sources)
        taken.append(Taken(len(rows), blocks, _runs(~there)))
    padding = tuple((rank, gaps) for rank, rows in enumerate(old) if (gaps := _runs(rows < 0)))
    return Passage(tuple(taken), tuple(twins), padding, tuple(map(len, old)), bool((uses > 1).any()))


def _runs(marks: np.ndarray[Any, np.dtype[np.bool_]]) -> tuple[Block, ...]:
    """The runs of marked rows."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], marks, [False]]).astype(np.int8))).tolist()
    return tuple(Block(a, a, (Dim(b - a, 1, 1),)) for a, b in zip(edges[::2], edges[1::2], strict=True))


def cut_of(told: Mapping[str, Any]) -> Cut:
    """The cut that `to_dict` wrote. Raises KeyError, TypeError or LayoutError when it is none."""
    layout = Layout(told["layout"])
    sizes = bind(layout, **{str(axis): size for axis, size in told["sizes"].items()})
    axis, block, period = told["axis"], told.get("block", 1), told.get("period", 0)
    rows = count(layout.factors, sizes)
    if told["role"] not in ROLES or not all(type(number) is int for number in (axis, block, period)) or axis < 0 or block < 1:
        raise TypeError("not a cut")
    if block > 1 and (period < 1 or rows % period):
        raise TypeError("not a period")
    return Cut(told["role"], axis, layout, sizes, block, period)
