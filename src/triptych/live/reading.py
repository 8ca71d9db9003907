"""Rows that a tensor holds -> the layout under which they are one whole part, or words for what they are."""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import axes, catalog
from ..errors import SizeError
from ..layout import Layout
from ..rowmap import Part, parts
from ..sizes import Sizes, bind

Rows = NDArray[np.int64]
MAX_RUNS = 3
MAX_SIZINGS = 64


class Grid(NamedTuple):
    """`rows` over those axes of a tensor along which they differ; elsewhere they repeat. Negative: no row, see `Shadow.rows`.

    `holes`: elements without a row stand where others have one.
    """

    axes: tuple[int, ...]
    rows: Rows
    holes: bool

    @property
    def is_rows(self) -> bool:
        return bool((self.rows >= 0).all())

    @property
    def order(self) -> Rows:
        """Each row once, in order of first appearance: repeated heads (k and v under GQA) count once.

        With more axes than heads and dims, rows are repeated for another reason (tokens read as heads), and all are given.
        """
        flat = self.rows.ravel()
        _, first = np.unique(flat, return_index=True)
        return flat if len(first) == len(flat) or self.rows.ndim > 2 else flat[np.sort(first)]


def grid_of(labels: NDArray[np.int32]) -> Grid:
    """The axes of an array of labels along which they differ, and the labels over those axes."""
    axes, few, holes = [], labels, False
    for axis in range(labels.ndim):
        if few.shape[axis] == 1 or few.strides[axis] == 0:
            few = few[(slice(None),) * axis + (slice(0, 1),)]
            continue
        top = few.max(axis, keepdims=True)
        if bool(((few == top) | (few == -1)).all()):
            holes = holes or bool((few != top).any())
            few = top
        else:
            axes.append(axis)
    return Grid(tuple(axes), few.reshape([few.shape[a] for a in axes]).astype(np.int64), holes)


@dataclass(frozen=True)
class Fit:
    """A tensor is the whole `part` of `layout`, in head order. `flipped`: its axes are (dims, heads)."""

    layout: Layout
    sizes: Sizes
    part: str
    shape: tuple[int, int]
    rank: int
    flipped: bool = False

    def rows(self) -> Rows:
        """[heads, dims] the row numbers."""
        return next(part for part in parts(self.layout, self.sizes) if self.part in part.path.names).rows()


_ROLES = {
    "q": re.compile(r"^(w|b|x|my)?(q|query|queries|qs)\d*$"),
    "k": re.compile(r"^(w|b|x|my)?(k|key|keys|ks)\d*$"),
    "v": re.compile(r"^(w|b|x|my)?(v|value|values|val|vals|vs)\d*$"),
    "gate": re.compile(r"^gates?$"),
    "up": re.compile(r"^up$"),
}


def role_of(name: str) -> str | None:
    """The part that a variable's name speaks of, if it is just one.

    >>> role_of("manual_q"), role_of("keyStates"), role_of("query_key_value"), role_of("parts[0]")
    ('q', 'k', None, None)
    """
    words = re.split(r"[^a-z0-9]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower())
    roles = {role for word in words for role, pattern in _ROLES.items() if pattern.match(word)}
    return roles.pop() if len(roles) == 1 else None


class Held(NamedTuple):
    """What one tensor holds, and its names."""

    grid: Grid
    names: tuple[str, ...]

    @property
    def roles(self) -> set[str]:
        return {role for name in self.names if (role := role_of(name))}


class Reader:
    """Knows the layouts that could be meant at the sizes that best explain all tensors of a trace.

    Args: total: rows of the fused tensor. held: what its tensors hold. hints: sizes that the module names, as far as it does.
        truth: the layout that is known to be right; `truth_sizes` are those at which it fits, if any.
    """

    def __init__(self, total: int, held: Sequence[Held], hints: Mapping[str, int], truth: Layout | None) -> None:
        self.total, self.truth = total, truth
        self._table: dict[_Key, list[Fit]] = {}
        wanted = [one for one in _distinct(held) if one.grid.is_rows and 0 < len(one.grid.order) < total]
        best, most = 0.0, sum(1.0 for one in wanted if one.roles)
        self.truth_sizes: Sizes | None = None
        for found in itertools.islice(_sizings(total, [one.grid for one in wanted], hints, truth), MAX_SIZINGS):
            sized = next((candidate.sizes for candidate in found if candidate.layout == truth), None)
            self.truth_sizes = self.truth_sizes or sized
            table = dict(_fits(found, [one.grid for one in wanted]))
            score = sum(_worth(one, table.get(_key(one.grid), [])) for one in wanted)
            if score > best:
                best, self._table, self.truth_sizes = score, table, sized or self.truth_sizes
            if best >= most > 0:
                break
        self._roles: dict[bytes, set[str]] = {}
        for one in wanted:
            self._roles.setdefault(one.grid.order.tobytes(), set()).update(one.roles)
        self._votes: Counter[Layout] = Counter()
        for one in wanted:
            roles = self._roles[one.grid.order.tobytes()]
            self._votes.update({fit.layout for fit in self.fits(one.grid) if not roles or fit.part in roles})

    def fits(self, grid: Grid) -> list[Fit]:
        """Every way in which the rows are one whole part in head order."""
        return self._table.get(_key(grid), []) if grid.is_rows else []

    def best(self, held: Held) -> Fit | None:
        """The likeliest of them: the true layout, the part that their names speak of, what explains most tensors, the most usual."""
        roles = held.roles or self._roles.get(held.grid.order.tobytes(), set())
        ranks = {
            (fit.layout != self.truth, bool(roles) and fit.part not in roles, -self._votes[fit.layout], fit.rank): fit
            for fit in reversed(self.fits(held.grid))
        }
        return ranks[min(ranks)] if ranks else None


_Key = tuple[bytes, tuple[int, int]]


def _key(grid: Grid) -> _Key:
    return grid.rows.tobytes(), _shape(grid)


def _shape(grid: Grid) -> tuple[int, int]:
    shape = grid.rows.shape
    return (math.prod(shape[:-1]), shape[-1]) if len(shape) > 1 else (1, int(grid.rows.size))


def _distinct(held: Sequence[Held]) -> list[Held]:
    """Tensors with the same rows as one, with all their names."""
    out: dict[_Key, Held] = {}
    for one in held:
        names = out[_key(one.grid)].names if _key(one.grid) in out else ()
        out[_key(one.grid)] = Held(one.grid, (*names, *one.names))
    return list(out.values())


def _worth(held: Held, fits: Sequence[Fit]) -> float:
    """What it says for a choice of sizes that it explains a tensor: much when the name speaks of that part."""
    if not fits:
        return 0.0
    return float(any(fit.part in held.roles for fit in fits)) if held.roles else 0.1


def _sizings(total: int, grids: Sequence[Grid], hints: Mapping[str, int], truth: Layout | None) -> Iterator[list[catalog.Candidate]]:
    """Lists of candidate layouts, one for each guess at the sizes: what is known, then what tensors of [heads, dims] show."""
    shown = dict.fromkeys(shape for grid in grids for shape in _head_shapes(grid))
    pairs = sorted(shown, key=lambda shape: shape[0] > shape[1])
    guesses: list[dict[str, int]] = [dict(hints)] if "d" in hints or "h" in hints else []
    guesses += [{"h": heads, "d": dims} for heads, dims in pairs] + [{"g": heads, "d": dims} for heads, dims in pairs]
    for guess in dict.fromkeys(tuple(g.items()) for g in guesses):
        sizes = dict(guess)
        with contextlib.suppress(SizeError):
            found = (
                [*_sized(truth, total, sizes), *catalog.candidates(total, **sizes)] if truth else list(catalog.candidates(total, **sizes))
            )
            if found:
                yield found
    if truth is not None:
        yield list(_sized(truth, total, {}))
    else:
        for heads in dict.fromkeys(heads for heads, _ in pairs):
            yield from _free_sized(total, heads, sorted({dims for _, dims in pairs}))
    yield list(itertools.islice(catalog.candidates(total, h=1), 1))


def _head_shapes(grid: Grid) -> Iterator[tuple[int, int]]:
    """What (heads, dims) could be: the axes of a tensor, or the runs of a flat one."""
    if grid.rows.ndim > 1:
        yield _shape(grid)
    elif grid.rows.ndim:
        runs = np.diff(np.flatnonzero(np.diff(grid.rows, prepend=-2, append=-2) != 1))
        if len(runs) > 1 and (runs == runs[0]).all():
            yield len(runs), int(runs[0])


def _sized(layout: Layout, total: int, sizes: Mapping[str, int]) -> Iterator[catalog.Candidate]:
    """The layout at these sizes, as far as it has them; any number of blocks."""
    used = {axis: size for axis, size in sizes.items() if axis in ("h", "g", "d") or axis in layout.axes}
    blocks = [{"t": t} for t in range(1, used.get("h", 0) + 1)] if {"t", "m"} & set(layout.axes) and "t" not in used else [{}]
    for block in blocks:
        with contextlib.suppress(SizeError):
            yield catalog.Candidate(layout, bind(layout, rows=total, **used, **block), "")


def _free_sized(total: int, heads: int, dims: Sequence[int]) -> Iterator[list[catalog.Candidate]]:
    """Layouts whose parts have dims of their own (dk, dv, dn, ...), which are taken from tensors."""
    for layout, who in catalog.entries():
        free = [axis for axis in layout.axes if axis not in axes.RESERVED]
        if not 1 < len(free) < 4 or "d" in layout.axes:
            continue
        for values in itertools.permutations(dims, len(free)):
            for name in ("h", "g"):
                with contextlib.suppress(SizeError):
                    yield [
                        catalog.Candidate(layout, bind(layout, rows=total, **{name: heads}, **dict(zip(free, values, strict=True))), who)
                    ]


def _fits(found: Sequence[catalog.Candidate], grids: Sequence[Grid]) -> Iterator[tuple[_Key, list[Fit]]]:
    """What each grid is under the candidate layouts."""
    for grid in grids:
        order, shape = grid.order, _shape(grid)
        fits = []
        for rank, (layout, sizes, _) in enumerate(found):
            for part in parts(layout, sizes):
                heads, dims = part.shape
                if heads * dims != len(order) or part.path.zero:
                    continue
                flipped = shape == (dims, heads) and heads != dims and heads > 1
                if _same(part, grid.rows.reshape(shape).T.ravel() if flipped else order):
                    fits += [Fit(layout, sizes, name, (heads, dims), rank, flipped) for name in part.path.names]
        if fits:
            yield _key(grid), fits


def _same(part: Part, order: Rows) -> bool:
    return int(order[0]) == part.start and bool((order == part.rows().ravel()).all())


# -- words -------------------------------------------------------------------------------------------------------------


def in_words(rows: Rows, total: int, layout: Layout | None, sizes: Sizes | None) -> str:
    """What these rows are under a layout: `q rows of heads 0 and 1, k rows of head 0`; without one, `rows 0-31, 96-127`."""
    if len(rows) == total and len(np.unique(rows)) == total:
        return f"all {total} rows, " + ("in order" if bool((np.diff(rows) == 1).all()) else "reordered")
    if layout is None or sizes is None:
        return run_text(rows)
    texts = []
    by_name = {name: part for part in parts(layout, sizes) for name in part.path.names}
    for name in layout.parts:
        grid = by_name[name].rows()
        held = np.isin(grid, rows)
        whole, some = np.flatnonzero(held.all(1)), np.flatnonzero(held.any(1) & ~held.all(1))
        if len(whole) == grid.shape[0] > 1:
            texts.append(f"all {name} rows")
        elif len(whole):
            texts.append(f"{name} rows of {_heads(whole)}")
        if len(some):
            counts = {int(n) for n in held[some].sum(1)}
            texts.append(f"{counts.pop() if len(counts) == 1 else 'some'} of the {grid.shape[1]} {name} rows of {_heads(some)}")
    return ", ".join(texts)


def _heads(heads: Sequence[int] | NDArray[np.intp]) -> str:
    numbers = [int(h) for h in heads]
    if len(numbers) == 1:
        return f"head {numbers[0]}"
    if len(numbers) > 3 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"heads {numbers[0]} to {numbers[-1]}"
    if len(numbers) > 4:
        return "heads " + ", ".join(map(str, numbers[:4])) + ", ..."
    return "heads " + ", ".join(map(str, numbers[:-1])) + f" and {numbers[-1]}"


def run_text(rows: Rows) -> str:
    """`rows 0-31, 96-127, ...`"""
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    runs = [(int(run[0]), int(run[-1])) for run in np.split(rows, breaks)[: MAX_RUNS + 1]]
    texts = [str(a) if a == b else f"{a}-{b}" for a, b in runs[:MAX_RUNS]]
    return ("row " if len(rows) == 1 else "rows ") + ", ".join(texts) + (", ..." if len(runs) > MAX_RUNS else "")
