"""One tensor's axes as PyTorch methods: the shortest view, transpose and flatten from what they hold to what they should. Text only."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from . import rowmap
from .errors import LayoutError
from .layout import Axis, Branch, Factor, Sum
from .sizes import Sizes


class Place(NamedTuple):
    """A digit of the head number (group 0) or dim number (group 1): it counts `size` steps of `weight`."""

    group: int
    weight: int
    size: int


Dim = tuple[Place, ...]  # one axis of a tensor: digits, slowest first; () has size 1
Slot = tuple[Factor, ...]  # one axis of a tensor: a product of a layout, not yet opened


@dataclass(frozen=True, slots=True)
class Frame:
    """What stands around the packed axis, as written in a view: `before` (None: any number of axes) and `after` it."""

    before: tuple[str, ...] | None
    after: tuple[str, ...]

    def at(self, i: int, n: int) -> int:
        """Axis `i` of the `n` that the packed axis became: counted from the left in a weight, from the right elsewhere."""
        return i if self.before == () else i - n

    def shape(self, sizes: Sequence[int]) -> str:
        if not self.after and self.before == () and len(sizes) == 1:
            return "-1"
        return ", ".join([*(self.before or ()), *map(str, sizes), *self.after])

    def index(self, entries: Sequence[str]) -> str:
        """An index over the packed axes: without the `:` at the end of a weight, or at the start behind batch axes."""
        used = [i for i, entry in enumerate(entries) if entry != ":"]
        return f"[{', '.join(entries[: used[-1] + 1] if self.before == () else ['...', *entries[used[0] :]])}]"


def slice_of(start: int, size: int, total: int) -> str:
    """Rows `start` to `start + size` of `total` as an index."""
    return ":" if size == total else f"{start or ''}:{start + size}"


def frame_of(axis: int, bias: bool = False) -> Frame:
    """The surroundings of the packed axis in a weight [out, in] (axis 0), a weight [in, out] (axis -1) or a bias."""
    if axis not in (0, -1):
        raise LayoutError("the packed axis of a weight is the first or the last", expected="axis=0 or axis=-1", found=f"axis={axis}")
    return Frame((), ()) if bias else Frame((), ("-1",)) if axis == 0 else Frame(("-1",), ())


def by_axis(part: rowmap.Part) -> dict[str, Place]:
    """Axis name -> the digit it is."""
    out: dict[str, Place] = {}
    for group, digits in enumerate((part.heads, part.dims)):
        weight = 1
        for digit in reversed(digits):
            out[digit.axis] = Place(group, weight, digit.size)
            weight *= digit.size
    return out


def heads_dims(part: rowmap.Part) -> tuple[Dim, Dim]:
    """The two axes [heads, dims] that a part is handed out with."""
    places = by_axis(part)
    heads, dims = (tuple(places[d.axis] for d in digits if d.size > 1) for digits in (part.heads, part.dims))
    return heads, dims


def long(dim: Dim) -> Dim:
    """Without the digits of size 1, which hold nothing."""
    return tuple(place for place in dim if place.size > 1)


def _total(dim: Dim) -> int:
    return math.prod(place.size for place in dim)


def _refined(dims: Sequence[Dim], others: Sequence[Dim]) -> list[Dim] | None:
    """`dims` with every digit cut where `others` cut; None when the cuts cross."""
    cuts = {(p.group, w) for dim in [*dims, *others] for p in dim for w in (p.weight, p.weight * p.size)}
    out = []
    for dim in dims:
        pieces: list[Place] = []
        for place in dim:
            inside = sorted(w for g, w in cuts if g == place.group and place.weight < w < place.weight * place.size)
            steps = [place.weight, *inside, place.weight * place.size]
            if any(high % low for low, high in itertools.pairwise(steps)):
                return None
            pieces += reversed([Place(place.group, low, high // low) for low, high in itertools.pairwise(steps)])
        out.append(tuple(pieces))
    return out


def first_sum(slots: Sequence[Slot]) -> int | None:
    """The first slot that has parts in it."""
    return next((i for i, slot in enumerate(slots) if any(isinstance(factor, Sum) for factor in slot)), None)


def is_one_part(factors: Slot) -> bool:
    """Whether no sum in it has two branches."""
    sums = [factor.branches for factor in factors if isinstance(factor, Sum)]
    return all(len(branches) == 1 and is_one_part(branches[0].factors) for branches in sums)


def at_sum(factors: Slot) -> tuple[Slot, tuple[Branch, ...], Slot]:
    """(axes before the first sum, its branches, what follows); no branches when there is no sum."""
    for i, factor in enumerate(factors):
        if isinstance(factor, Sum):
            return factors[:i], factor.branches, factors[i + 1 :]
    return factors, (), ()


def runs_of(factors: Slot, places: Sequence[dict[str, Place]], sizes: Sizes) -> list[Slot]:
    """A product as the fewest slots: axes that count on in every part share one, a sum has its own, axes of size 1 have none."""
    out: list[Slot] = []
    for factor in factors:
        if isinstance(factor, Axis) and sizes[factor.name] == 1:
            continue
        last = out[-1][-1] if out else None
        if isinstance(factor, Axis) and isinstance(last, Axis) and _count_on(last.name, factor.name, places):
            out[-1] = (*out[-1], factor)
        else:
            out.append((factor,))
    return out


def _count_on(slow: str, fast: str, places: Sequence[dict[str, Place]]) -> bool:
    pairs = [(digits[slow], digits[fast]) for digits in places if slow in digits and fast in digits]
    return all(one.group == two.group and one.weight == two.weight * two.size for one, two in pairs)


def arranged(have: Sequence[Dim], want: Sequence[Dim], frame: Frame, raw: bool = False) -> str:
    """The methods that turn axes `have` into axes `want`; `raw`: the tensor is contiguous and has one packed axis."""
    have, want = [long(dim) for dim in have], [long(dim) for dim in want]
    ours, theirs = _refined(have, want), _refined(want, have)
    if ours is None or theirs is None:
        whole = [tuple(Place(g, 1, math.prod(p.size for dim in have for p in dim if p.group == g)) for g in (0, 1))]
        return arranged(have, whole, frame, raw) + arranged(whole, want, frame)
    position = {place: i for i, place in enumerate(p for dim in theirs for p in dim)}
    ends = set(itertools.accumulate(len(dim) for dim in theirs))
    pieces: list[list[Place]] = []
    for dim in ours:
        for i, place in enumerate(dim):
            if i and position[place] == position[dim[i - 1]] + 1 and position[place] not in ends:
                pieces[-1].append(place)
            else:
                pieces.append([place])
    order = sorted(range(len(pieces)), key=lambda i: position[pieces[i][0]])
    old, new, cut = [_total(d) for d in ours], [_total(d) for d in theirs], [_total(tuple(p)) for p in pieces]
    if order == sorted(order):
        return reshaped(old, new, frame, raw)
    return reshaped(old, cut, frame, raw) + permuted(order, frame) + reshaped([cut[i] for i in order], new, frame)


def reshaped(old: list[int], new: list[int], frame: Frame, raw: bool = False) -> str:
    """The shortest method from sizes `old` to sizes `new`; a view where only axes are split."""
    if old == new:
        return ""
    if raw and frame.before is not None:
        return f".view({frame.shape(new)})"
    i, j = 0, 0
    while i < min(len(old), len(new)) and old[i] == new[i]:
        i += 1
    while j < min(len(old), len(new)) - i and old[-1 - j] == new[-1 - j]:
        j += 1
    gone, come = old[i : len(old) - j], new[i : len(new) - j]
    if not gone and len(come) == 1:
        return f".unsqueeze({frame.at(i, len(new))})"
    if len(gone) == 1 and come:
        split = f".unflatten({frame.at(i, len(old))}, ({', '.join(map(str, come))}))"
        return split if frame.before is None else f".view({frame.shape(new)})"
    if frame.before == ():
        return f".reshape({frame.shape(new)})"
    if not come and not i and len(gone) == 1:
        return f".squeeze({frame.at(0, len(old))})"
    if len(come) <= 1:
        more = (-1, 0) if not come and i else (0, 1) if not come else (0, 0)  # axes of size 1 go into a neighbour
        first, last = frame.at(i + more[0], len(old)), frame.at(i + len(gone) - 1 + more[1], len(old))
        return f".flatten({first}, {last})" if last != -1 else f".flatten({first})"
    if frame.before is not None:
        return f".reshape({frame.shape(new)})"
    middle = [*old[:i], math.prod(gone), *old[len(old) - j :]]
    return reshaped(old, middle, frame) + reshaped(middle, new, frame)


def permuted(order: list[int], frame: Frame) -> str:
    """The shortest method that puts axis `order[i]` in place i."""
    n = len(order)
    moved = [i for i in range(n) if order[i] != i]
    if len(moved) == 2:
        return f".transpose({', '.join(str(frame.at(i, n)) for i in moved)})"
    for source, target in itertools.permutations(range(n), 2):
        trial = [i for i in range(n) if i != source]
        trial.insert(target, source)
        if trial == order:
            return f".movedim({frame.at(source, n)}, {frame.at(target, n)})"
    if frame.before is None:
        sources, targets = ([frame.at(k, n) for k in ks] for ks in ([order[i] for i in moved], moved))
        return f".movedim({tuple(sources)}, {tuple(targets)})"
    k = len(frame.before)
    return f".permute({', '.join(map(str, [*range(k), *(k + i for i in order), *range(k + n, k + n + len(frame.after))]))})"


def nested(rows: rowmap.RowMap, frame: Frame) -> str:
    """The whole map as one view, permute and reshape, if it is one."""
    blocks = list(rows.blocks)
    if not rows.is_permutation or blocks[0].into:
        return ""
    for i in range(len(blocks) - 1, 0, -1):
        if joined := _end_to_end(blocks[i - 1], blocks[i]):
            blocks[i - 1 : i + 1] = [joined]
    first, second = blocks[0], blocks[min(1, len(blocks) - 1)]
    step = rowmap.Dim(len(blocks), second.out - first.out, second.into - first.into)
    if any(b != rowmap.Block(first.out + i * step.out, first.into + i * step.into, first.dims) for i, b in enumerate(blocks)):
        return ""
    dims: list[rowmap.Dim] = []
    for dim in sorted([step, *first.dims], key=lambda dim: -dim.out):
        if dims and dims[-1].out == dim.size * dim.out and dims[-1].into == dim.size * dim.into:
            dim = rowmap.Dim(dims.pop().size * dim.size, dim.out, dim.into)
        if dim.size > 1:
            dims.append(dim)
    opened = sorted(dims, key=lambda dim: -dim.into)
    order = [opened.index(dim) for dim in dims]
    return f".view({frame.shape([d.size for d in opened])}){permuted(order, frame)}.reshape({frame.shape([rows.rows_out])})"


def _end_to_end(one: rowmap.Block, two: rowmap.Block) -> rowmap.Block | None:
    """Two blocks as one with a longer outer axis: the heads of q and, behind them, those of k."""
    if not one.dims or not two.dims or one.dims[1:] != two.dims[1:] or one.dims[0][1:] != two.dims[0][1:]:
        return None
    size, out, into = one.dims[0]
    if (two.out, two.into) != (one.out + size * out, one.into + size * into):
        return None
    return rowmap.Block(one.out, one.into, (rowmap.Dim(size + two.dims[0].size, out, into), *one.dims[1:]))
