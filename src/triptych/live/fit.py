"""An index map -> the layout that says it: the expression that gives every row the part, head and dim it was seen to have."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import axes, catalog
from ..errors import TriptychError
from ..layout import Layout, Row
from ..rowmap import parts as placed
from ..sizes import Sizes, bind

Grid = NDArray[np.int64]


class Fit(NamedTuple):
    """A layout and its sizes."""

    layout: Layout
    sizes: Sizes


def fit(rows: Sequence[Row], likely: Iterable[str] = ()) -> Fit | None:
    """The layout in which row i is `rows[i]`: in its usual spelling, else built from the strides; None when none says it.

    A part in two roles is named `k=v`. Args: likely: layouts to try before the usual ones.

    >>> found = fit(Layout("h (q|k|v) d").rows(h=3, d=4))
    >>> str(found.layout), found.sizes.of(found.layout)
    ('h (q|k|v) d', 'h=3 d=4')
    >>> str(fit(Layout("t (k n|q n r) d").rows(t=2, n=3, r=5, d=4)).layout)
    't (k n|q n r) d'
    """
    grids = _grids(rows)
    if grids is None:
        return None
    for layout in (*map(Layout, likely), *(entry.layout for entry in catalog.entries())):
        if {_spelled(path.names) for path in layout.paths} == set(grids):
            for sizes in _solutions(layout, grids, len(rows)):
                if agrees(layout, sizes, grids):
                    return Fit(layout, sizes)
    return _built(grids, len(rows))


def agrees(layout: Layout, sizes: Sizes, grids: Mapping[str, Grid]) -> bool:
    """Whether every part of the sized layout lies where `grids` says."""
    return all(np.array_equal(part.rows(), grids.get(_spelled(part.path.names), np.empty((0, 0)))) for part in placed(layout, sizes))


def _spelled(names: tuple[str, ...]) -> str:
    return "=".join(names)


def _grids(rows: Sequence[Row]) -> dict[str, Grid] | None:
    """Row numbers of each part, [heads, dims]; None when a head or dim is missing or stands twice."""
    labels = [(row.part, row.head, row.dim) for row in rows]
    grids = {}
    for part in dict.fromkeys(row.part for row in rows):
        ours = [(head, dim, i) for i, (name, head, dim) in enumerate(labels) if name == part]
        heads, dims = (len({label[i] for label in ours}) for i in (0, 1))
        grid = np.full((heads, dims), -1, np.int64)
        if len(ours) != heads * dims or any(head >= heads or dim >= dims for head, dim, _ in ours):
            return None
        for head, dim, i in ours:
            grid[head, dim] = i
        if (grid < 0).any():
            return None
        grids[part] = grid
    return grids


def _solutions(layout: Layout, grids: Mapping[str, Grid], rows: int) -> Iterator[Sizes]:
    """Sizes that give every part of the layout as many heads and dims as seen; an axis that may have several values is tried with each."""
    wanted = []
    for path in layout.paths:
        heads, dims = grids[_spelled(path.names)].shape
        wanted += [(path.heads, heads), (path.dims, dims)]
    yield from _solve(layout, wanted, {}, rows)


def _solve(layout: Layout, wanted: list[tuple[tuple[str, ...], int]], known: dict[str, int], rows: int) -> Iterator[Sizes]:
    known = dict(known)
    if "c" in layout.axes:
        known["c"] = 2
    moved = True
    while moved:
        moved = False
        for names, product in wanted:
            open_ = [name for name in names if name not in known]
            rest = product
            for name in names:
                rest = rest // known[name] if name in known and rest % known[name] == 0 else rest if name not in known else -1
            if rest < 1 or (not open_ and rest != 1):
                return
            if len(open_) == 1:
                known[open_[0]], moved = rest, True
    missing = [(names, product) for names, product in wanted if any(name not in known for name in names)]
    if missing:
        names, product = missing[0]
        name = next(n for n in names if n not in known)
        for value in (v for v in range(2, product) if product % v == 0):
            yield from _solve(layout, wanted, {**known, name: value}, rows)
        return
    try:
        yield bind(layout, rows=rows, **{axis: known[axis] for axis in layout.axes})
    except TriptychError:
        return


# the general search


@dataclass(frozen=True)
class _Step:
    """One digit of a head or dim number: `size` steps of `stride` rows; `axis` is its name."""

    size: int
    stride: int
    head: bool
    axis: str = ""


@dataclass(frozen=True)
class _Placed:
    part: str
    start: int
    steps: tuple[_Step, ...]  # slowest stride first

    @property
    def stop(self) -> int:
        return self.start + sum((step.size - 1) * step.stride for step in self.steps) + 1


def _built(grids: Mapping[str, Grid], rows: int) -> Fit | None:
    items = []
    for part, grid in grids.items():
        steps = _steps(grid)
        if steps is None:
            return None
        items.append((part, int(grid[0, 0]), steps))
    named = _named(items, {part: grid.shape for part, grid in grids.items()})
    text = _text(named, rows)
    if text is None:
        return None
    sizes = {step.axis: step.size for item in named for step in item.steps if step.axis not in axes.ALIASES}
    clash = any(sizes[step.axis] != step.size for item in named for step in item.steps)
    try:
        layout = Layout(" ".join(text) if not (len(text) == 1 and text[0].startswith("(") and "|" in text[0]) else text[0][1:-1])
        bound = bind(layout, rows=rows, **sizes)
    except TriptychError:
        return None
    return Fit(layout, bound) if not clash and agrees(layout, bound, grids) else None


def _steps(grid: Grid) -> list[_Step] | None:
    """The digits of head, then of dim, in counting order; None when the rows do not lie in strides."""
    heads, dims = _digits(grid[:, 0] - grid[0, 0]), _digits(grid[0] - grid[0, 0])
    if heads is None or dims is None or not np.array_equal(grid, grid[:, :1] + grid[:1] - grid[0, 0]):
        return None
    return [_Step(size, stride, True) for size, stride in heads] + [_Step(size, stride, False) for size, stride in dims]


def _digits(offsets: Grid) -> list[tuple[int, int]] | None:
    """(size, stride) of the digits that count through `offsets`, slowest first."""
    n = len(offsets)
    if n == 1:
        return []
    stride = int(offsets[1])
    run = 1
    while run < n and offsets[run] == run * stride:
        run += 1
    if stride < 1:
        return None
    for size in range(run, 1, -1):
        slow = offsets[::size]
        if n % size == 0 and np.array_equal(offsets, (slow[:, None] + np.arange(size) * stride).ravel()):
            digits = _digits(slow)
            return None if digits is None else [*digits, (size, stride)]
    return None


def _named(items: list[tuple[str, int, list[_Step]]], shapes: Mapping[str, tuple[int, ...]]) -> list[_Placed]:
    """Names for the digits: heads by the legend of `axes`, dims `d`, or `dk` and the like where parts differ."""
    h = shapes.get("q", (0, 0))[0]
    h = h or max(shape[0] for shape in shapes.values())
    g = min((shape[0] for part, shape in shapes.items() if part.split("=")[0] in ("k", "v")), default=h)
    blocks = any(sum(s.head for s in steps) == 2 and shapes[part][0] == g for part, _, steps in items)
    usual = Counter(shape[1] for shape in shapes.values() if shape[1] > 1).most_common(1)
    d = usual[0][0] if usual else 1
    alike = len({shape[1] for shape in shapes.values()}) == 1
    taken: dict[str, int] = {}
    result = []
    for part, start, steps in items:
        heads, dims = [s for s in steps if s.head], [s for s in steps if not s.head]
        named = _named_heads(heads, shapes[part][0], h, g, blocks)
        if len(dims) == 1:
            name = ("d" if alike or dims[0].size == d else "d" + part[0]) if heads or h > 1 else "f" if dims[0].size == d else "n" + part[0]
            named.append(replace(dims[0], axis=_free(name, dims[0].size, taken)))
        else:
            names = ("c", "p") if len(dims) == 2 and dims[0].size == 2 else tuple("x" + str(i) for i in range(len(dims)))
            named += [replace(step, axis=_free(name, step.size, taken)) for step, name in zip(dims, names, strict=True)]
        result.append(_Placed(part, start, tuple(sorted(named, key=lambda step: -step.stride))))
    return result


def _free(name: str, size: int, taken: dict[str, int]) -> str:
    """`name`, with a number after it when another size has it."""
    for suffix in itertools.chain([""], map(str, itertools.count(2))):
        if taken.setdefault(name + suffix, size) == size:
            return name + suffix
    raise AssertionError


def _named_heads(steps: list[_Step], heads: int, h: int, g: int, blocks: bool) -> list[_Step]:
    sizes = [step.size for step in steps]
    r = h // g if h % g == 0 else 1
    if len(sizes) == 1:
        name = "h" if heads == h else "g" if heads == g else "r" if heads == r else "x"
        return [replace(steps[0], axis=name)]
    if len(sizes) == 2 and not blocks and sizes == [g, r]:
        names: tuple[str, ...] = ("g", "r")
    elif len(sizes) == 2 and heads == h and r > 1 and sizes[1] % r == 0:
        t, inner = steps
        n = sizes[1] // r
        if n == 1:
            return [replace(t, axis="g"), replace(inner, axis="r")]
        return [replace(t, axis="t"), replace(inner, size=n, stride=inner.stride * r, axis="n"), replace(inner, size=r, axis="r")]
    else:
        names = ("t", "n", "r")[: len(sizes)] if len(sizes) <= 3 else tuple(f"x{i}" for i in range(len(sizes)))
    return [replace(step, axis=name) for step, name in zip(steps, names, strict=True)]


def _text(items: list[_Placed], rows: int) -> list[str] | None:
    """The factors of a product that places `items` in `rows` rows; None when there is no such nest."""
    if len(items) == 1:
        inner = _axes(items[0], rows)
        return None if inner is None else [f"({items[0].part})", *inner] if items[0].part else inner
    groups: list[list[_Placed]] = []
    stop = -1
    for item in sorted(items, key=lambda item: item.start):
        if item.start >= stop:
            groups.append([])
        groups[-1].append(item)
        stop = max(stop, item.stop)
    if len(groups) == 1:
        return _common(items, rows)
    starts = [group[0].start for group in groups] + [rows]
    branches = []
    for group, start, stop in zip(groups, starts, starts[1:], strict=False):
        moved = [replace(item, start=item.start - start) for item in group]
        if len(group) == 1:
            inner = _axes(moved[0], stop - start)
            branches.append(None if inner is None else [group[0].part, *inner])
        else:
            nested = _text(moved, stop - start)
            branches.append(None if nested is None else ["_", *nested])
    if starts[0] != 0 or any(branch is None for branch in branches):
        return None
    words = [branch for branch in branches if branch is not None]
    shared: list[str] = []
    while all(len(branch) > 1 for branch in words) and len({branch[-1] for branch in words}) == 1 and not words[0][-1].startswith("("):
        shared.insert(0, words[0][-1])
        words = [branch[:-1] for branch in words]
    return [f"({'|'.join(' '.join(branch) for branch in words)})", *shared]


def _common(items: list[_Placed], rows: int) -> list[str] | None:
    """Parts that interleave must share their outermost axis."""
    outer = [item.steps[0] for item in items if item.steps]
    if len(outer) != len(items) or len({(step.size, step.stride) for step in outer}) != 1 or outer[0].size * outer[0].stride != rows:
        return None
    names = {step.axis for step in outer}
    if len({step.head for step in outer}) != 1:
        return None
    name = outer[0].axis if len(names) == 1 else "g" if names == {"h", "g"} else None
    inner = _text([replace(item, steps=item.steps[1:]) for item in items], outer[0].stride)
    return None if name is None or inner is None else [name, *inner]


def _axes(item: _Placed, rows: int) -> list[str] | None:
    """The axes of a part that fills `rows` rows alone."""
    names = []
    for step in item.steps:
        if step.size * step.stride != rows:
            return None
        names.append(step.axis)
        rows = step.stride
    return names if rows == 1 and item.start == 0 else None
