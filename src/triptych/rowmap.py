"""Layout + sizes -> strided blocks of rows; maps between layouts, inverted, composed, coalesced to runs. Integers only, cached."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .errors import IncompatibleError, LayoutError, SizeError
from .layout import Axis, Factor, Layout, Path, count, with_brackets
from .sizes import Sizes

Rows = NDArray[np.int64]
Nest = tuple[int, int, "tuple[Dim, ...]"]
MAX_ROWS = 1 << 31
ZERO = -1
"""In an index list: this row has no source and is filled with zeros."""


class Dim(NamedTuple):
    """`size` steps of `out` rows in the result and `into` rows in the source."""

    size: int
    out: int
    into: int


class Digit(NamedTuple):
    """One axis of a part: its name, size, and the distance in rows between neighbours."""

    axis: str
    size: int
    stride: int


@dataclass(frozen=True, slots=True)
class Part:
    """Where one part lies: row of (head, dim) = start + sum of index * stride over `digits`, which stand in row order.

    `heads` and `dims` are the same digits in counting order, slowest first.
    """

    path: Path
    start: int
    digits: tuple[Digit, ...]

    @property
    def heads(self) -> tuple[Digit, ...]:
        return self._pick(self.path.heads)

    @property
    def dims(self) -> tuple[Digit, ...]:
        return self._pick(self.path.dims)

    @property
    def shape(self) -> tuple[int, int]:
        """(heads, dims)."""
        return math.prod(d.size for d in self.heads), math.prod(d.size for d in self.dims)

    def rows(self) -> Rows:
        """[heads, dims] row numbers."""
        grid = np.full((1, 1), self.start, np.int64)
        for digits, place in ((self.heads, 0), (self.dims, 1)):
            steps = np.zeros(1, np.int64)
            for digit in digits:
                steps = (steps[:, None] + np.arange(digit.size, dtype=np.int64) * digit.stride).ravel()
            grid = grid + (steps[:, None] if place == 0 else steps[None, :])
        return grid

    def _pick(self, names: tuple[str, ...]) -> tuple[Digit, ...]:
        by_name = {digit.axis: digit for digit in self.digits}
        return tuple(by_name[name] for name in names)


@lru_cache(maxsize=1024)
def parts(layout: Layout, sizes: Sizes) -> tuple[Part, ...]:
    """Every part of a sized layout, in the order of `layout.paths`.

    >>> from .sizes import bind
    >>> [(p.path.names[0], p.start, p.shape) for p in parts(Layout("h (q|k|v) d"), bind("h (q|k|v) d", h=4, d=32))]
    [('q', 0, (4, 32)), ('k', 32, (4, 32)), ('v', 64, (4, 32))]
    """
    if count(layout.factors, sizes) > MAX_ROWS:
        raise SizeError(
            "too many rows",
            layout=f"{layout} with {sizes.of(layout)}",
            found=f"{count(layout.factors, sizes)} rows",
            expected=f"at most {MAX_ROWS}",
        )
    placed = _place(layout.factors, sizes)
    return tuple(Part(path, start, digits) for path, (start, digits) in zip(layout.paths, placed, strict=True))


def _place(factors: tuple[Factor, ...], sizes: Sizes) -> list[tuple[int, tuple[Digit, ...]]]:
    """(start, digits) of every path through a product, in the order of `Layout.paths`."""
    if not factors:
        return [(0, ())]
    first, rest = factors[0], factors[1:]
    below = count(rest, sizes)
    if isinstance(first, Axis):
        return [(start, (Digit(first.name, sizes[first.name], below), *digits)) for start, digits in _place(rest, sizes)]
    out = []
    offset = 0
    for branch in first.branches:
        out += [(start + offset, digits) for start, digits in _place((*branch.factors, *rest), sizes)]
        offset += count((*branch.factors, *rest), sizes)
    return out


@dataclass(frozen=True)
class Block:
    """A strided nest: result row `out + sum(i * dim.out)` is source row `into + sum(i * dim.into)`; slowest result stride first."""

    out: int
    into: int
    dims: tuple[Dim, ...]

    @property
    def rows(self) -> int:
        return math.prod(dim.size for dim in self.dims)


@dataclass(frozen=True)
class RowMap:
    """result[i] = source[map(i)]: `blocks` with disjoint results; result rows in no block are zero.

    `rows_out` and `rows_in` are the two row counts. Two maps are equal when they send every row to the same place.
    """

    rows_out: int
    rows_in: int
    blocks: tuple[Block, ...]

    @cached_property
    def indices(self) -> Rows:
        """[rows_out] source row of every result row, or ZERO."""
        out = np.full(self.rows_out, ZERO, np.int64)
        for block in self.blocks:
            at, into = np.array([block.out], np.int64), np.array([block.into], np.int64)
            for dim in block.dims:
                steps = np.arange(dim.size, dtype=np.int64)
                at = (at[:, None] + steps * dim.out).ravel()
                into = (into[:, None] + steps * dim.into).ravel()
            out[at] = into
        out.flags.writeable = False
        return out

    @cached_property
    def runs(self) -> Rows:
        """[n, 3] (result row, source row, length) of the longest runs, by result row; source ZERO fills with zeros."""
        return _runs(self.indices)

    @property
    def is_identity(self) -> bool:
        return self.rows_in == self.rows_out and len(self.runs) == 1 and int(self.runs[0, 1]) == 0

    @property
    def is_permutation(self) -> bool:
        """Every source row used exactly once, and no zeros."""
        return self.rows_in == self.rows_out and bool((np.bincount(self.indices[self.indices >= 0], minlength=self.rows_in) == 1).all())

    def invert(self) -> RowMap:
        """The map the other way. Raises LayoutError unless every source row is used exactly once."""
        if not self.is_permutation:
            raise LayoutError(
                "only a map that uses every row exactly once can be inverted", found=f"{self.rows_in} rows to {self.rows_out}"
            )
        flipped = (Block(b.into, b.out, _coalesce(Dim(d.size, d.into, d.out) for d in b.dims)) for b in self.blocks)
        return RowMap(self.rows_in, self.rows_out, tuple(sorted(flipped, key=lambda b: b.out)))

    def then(self, after: RowMap) -> RowMap:
        """First this map, then `after` on its result. Raises LayoutError when the row counts do not meet."""
        if self.rows_out != after.rows_in:
            raise LayoutError("maps do not meet", expected=f"{after.rows_in} rows", found=f"{self.rows_out} rows")
        padded = np.append(self.indices, ZERO)
        return from_indices(padded[after.indices], self.rows_in)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RowMap):
            return NotImplemented
        return self.rows_in == other.rows_in and np.array_equal(self.indices, other.indices)

    def __hash__(self) -> int:
        return hash((self.rows_in, self.indices.tobytes()))


def from_indices(indices: Sequence[int] | Rows, rows_in: int) -> RowMap:
    """A map from a raw index list: the escape for orders that are no product of axes. ZERO fills a row with zeros.

    >>> from_indices([4, 5, 0, 1, 2, 3], 6).blocks
    (Block(out=0, into=4, dims=(Dim(size=2, out=1, into=1),)), Block(out=2, into=0, dims=(Dim(size=4, out=1, into=1),)))
    """
    index = np.asarray(indices, np.int64).copy()
    if index.ndim != 1 or (len(index) and (index.min() < ZERO or index.max() >= rows_in)):
        raise LayoutError(
            "an index list holds row numbers",
            expected=f"0 to {rows_in - 1}",
            found=f"{index.min()} to {index.max()}" if index.size else "none",
        )
    runs: list[Nest] = [(int(o), int(i), (Dim(int(n), 1, 1),)) for o, i, n in _runs(index) if i != ZERO]
    while len(nested := _nest(runs)) < len(runs):
        runs = nested
    return RowMap(len(index), rows_in, tuple(Block(o, i, _coalesce(dims)) for o, i, dims in runs))


def _runs(index: Rows) -> Rows:
    """[n, 3] (result row, source row, length): the longest runs of an index list."""
    if not len(index):
        return np.empty((0, 3), np.int64)
    together = np.where(index[1:] == ZERO, index[:-1] == ZERO, (index[1:] == index[:-1] + 1) & (index[:-1] != ZERO))
    starts = np.flatnonzero(np.concatenate([[True], ~together]))
    lengths = np.diff(np.append(starts, len(index)))
    return np.stack([starts, index[starts], lengths], axis=1)


def _nest(runs: list[Nest]) -> list[Nest]:
    """Fold neighbours of one shape at one distance into an outer dim."""
    out: list[Nest] = []
    at = 0
    while at < len(runs):
        start, into, dims = runs[at]
        end = at + 1
        if end < len(runs) and runs[end][2] == dims and runs[end][1] >= into:  # torch knows no negative stride
            step_out, step_in = runs[end][0] - start, runs[end][1] - into
            while end < len(runs) and runs[end] == (start + (end - at) * step_out, into + (end - at) * step_in, dims):
                end += 1
            dims = (Dim(end - at, step_out, step_in), *dims)
        out.append((start, into, dims))
        at = end
    return out


@lru_cache(maxsize=1024)
def between(source: Layout, target: Layout, sizes: Sizes) -> RowMap:
    """The map that turns rows laid out as `source` into rows laid out as `target`, both at `sizes`.

    Aliased rows (k=v) feed every role they have; rows declared zero are dropped from the source and filled in the result.
    Raises IncompatibleError when the labels differ.

    >>> from .sizes import bind
    >>> neox, gpt2 = Layout("h (q|k|v) d"), Layout("(q|k|v) h d")
    >>> between(neox, gpt2, bind(neox, gpt2, h=4, d=32)).blocks[1]
    Block(out=128, into=32, dims=(Dim(size=4, out=32, into=96), Dim(size=32, out=1, into=1)))
    """
    have = {name: part for part in parts(source, sizes) if not part.path.zero for name in part.path.names}
    wanted = {name: part for part in parts(target, sizes) if not part.path.zero for name in part.path.names}
    _check_labels(source, target, sizes, have, wanted)
    blocks: list[Block] = []
    for part in dict.fromkeys(wanted.values()):
        feeds = list(dict.fromkeys(have[name] for name in part.path.names))
        if len(feeds) > 1:
            roles = " and ".join(part.path.names)
            raise IncompatibleError(
                f"{roles} are one tensor here and {len(feeds)} there",
                layout=f"{source}   -> {target}",
                try_=f"if they are equal, drop one first: convert from a layout that says {'='.join(part.path.names)}",
            )
        blocks += _blocks(part, feeds[0])
    return RowMap(count(target.factors, sizes), count(source.factors, sizes), tuple(sorted(blocks, key=lambda b: b.out)))


def _check_labels(source: Layout, target: Layout, sizes: Sizes, have: dict[str, Part], wanted: dict[str, Part]) -> None:
    found = ", ".join(_grid(name, part) for name, part in have.items() if name not in wanted or wanted[name].shape != part.shape)
    expected = ", ".join(_grid(name, part) for name, part in wanted.items() if name not in have or have[name].shape != part.shape)
    if found or expected:
        meant = with_brackets(source) or with_brackets(target) or (_GROUPED.get(str(target)) if _is_grouped(have) else None)
        raise IncompatibleError(
            "the two layouts do not label the same rows",
            layout=f"{source}   -> {target}   with {sizes.of(source, target)}",
            found=found or "nothing more",
            expected=expected or "nothing more",
            try_=f"did you mean {meant}?" if meant else "both sides need the same parts, heads and dims",
        )


_GROUPED = {"(q|k|v) h d": "(q h|k g|v g) d", "h (q|k|v) d": "g (q r|k|v) d"}


def _is_grouped(have: dict[str, Part]) -> bool:
    """Whether k and v have fewer heads than q."""
    return {"q", "k", "v"} == set(have) and have["k"].shape[0] == have["v"].shape[0] < have["q"].shape[0]


def _grid(name: str, part: Part) -> str:
    heads, dims = part.shape
    return f"{name or 'rows'} {heads} x {dims}"


def _blocks(target: Part, source: Part) -> list[Block]:
    """One strided nest when the two numberings of heads and dims have a common refinement, else runs from the index list."""
    dims: list[Dim] = []
    for ours, theirs in ((target.heads, source.heads), (target.dims, source.dims)):
        refined = _refine(ours, theirs)
        if refined is None:
            index = np.full(int(target.rows().max()) + 1, ZERO, np.int64)
            index[target.rows().ravel()] = source.rows().ravel()
            return list(from_indices(index, int(index.max()) + 1).blocks)
        dims += refined
    return [Block(target.start, source.start, _coalesce(dims))]


def _refine(target: Sequence[Digit], source: Sequence[Digit]) -> list[Dim] | None:
    """Digits of one number, cut two ways, as digits that both share; None when the cuts cross."""
    ours = [(d.size, d.stride) for d in reversed(target) if d.size > 1]
    theirs = [(d.size, d.stride) for d in reversed(source) if d.size > 1]
    out = []
    while ours and theirs:
        (a, step_a), (b, step_b) = ours.pop(0), theirs.pop(0)
        size = min(a, b)
        if a % size or b % size:
            return None
        out.append(Dim(size, step_a, step_b))
        if a > size:
            ours.insert(0, (a // size, step_a * size))
        if b > size:
            theirs.insert(0, (b // size, step_b * size))
    return out


def _coalesce(dims: Iterable[Dim]) -> tuple[Dim, ...]:
    """Sort by result stride, slowest first, and join neighbours that step alike on both sides."""
    ordered = sorted((d for d in dims if d.size > 1), key=lambda d: -d.out)
    out: list[Dim] = []
    for dim in ordered:
        if out and out[-1].out == dim.out * dim.size and out[-1].into == dim.into * dim.size:
            dim = Dim(dim.size * out.pop().size, dim.out, dim.into)
        out.append(dim)
    return tuple(out)
