"""Which tensors of two checkpoints belong together: by name, by the names that a family or a stamp gives, else by their rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .checkpoint import Checkpoint
from .digests import Numbers, Rows
from .formats import Tensor
from .layout import Layout
from .packed import Packed
from .pieces import alone, stem, together
from .ranges import Ranges, in_order
from .sizes import Sizes
from .values import PRECISION

SAMPLE = 64
"""Rows of a tensor that are looked for in others."""
SHORT = 16
"""Rows of fewer bytes are equal by chance."""


@dataclass(frozen=True)
class Unit:
    """Tensors that are compared as one, their rows one after the other; `layout`, `sizes`, `source` where somebody says how they lie."""

    tensors: tuple[Tensor, ...]
    axis: int = 0
    layout: Layout | None = None
    sizes: Sizes | None = None
    source: str = ""

    @property
    def name(self) -> str:
        return " + ".join(tensor.name for tensor in self.tensors)

    @property
    def declared(self) -> str:
        """Layout, sizes and who says so; empty where nobody does."""
        return f"{self.layout}   with {self.sizes.of(self.layout)}   ({self.source})" if self.layout and self.sizes else ""


Couple = tuple[Unit, Unit]


def couples(a: Checkpoint, b: Checkpoint, old: Ranges, new: Ranges) -> tuple[list[Couple], list[str], list[str]]:
    """Units of a with their partners in b, in the order of a; names of tensors of a and of b that have none."""
    left, right = dict(a.stored.tensors), dict(b.stored.tensors)
    units = [
        {piece.tensor: _alone(packed, i, side) for packed in side.projections for i, piece in enumerate(packed.pieces)} for side in (a, b)
    ]
    found: list[Couple] = []

    def take(mine: Unit, theirs: Unit) -> None:
        found.append((mine, theirs))
        for tensor in mine.tensors:
            del left[tensor.name]
        for tensor in theirs.tensors:
            del right[tensor.name]

    def unit(side: int, name: str) -> Unit:
        return units[side].get(name) or Unit(((left, right)[side][name],))

    for mine, theirs in _by_projection(a, b):
        if all(t.name in left for t in mine.tensors) and all(t.name in right for t in theirs.tensors):
            take(mine, theirs)
    for name in [name for name in left if name in right]:
        take(unit(0, name), unit(1, name))
    for one, two in list(_by_ending(left, right)):
        take(unit(0, one), unit(1, two))
    for ones, twos in list(_by_rows(left, right, old, new)):
        take(*(unit(side, some[0].name) if len(some) == 1 else Unit(tuple(some)) for side, some in enumerate((ones, twos))))
    stems = {stem(mine.name)[0]: stem(theirs.name)[0] for mine, theirs in found if len(mine.tensors) == len(theirs.tensors) == 1}
    for name in list(left):
        begin, suffix = stem(name)
        if begin in stems and (other := stems[begin] + suffix) in right:
            take(unit(0, name), unit(1, other))
    for one, two in list(_by_content(left.values(), right.values(), old, new)):
        take(unit(0, one), unit(1, two))
    order = {name: i for i, name in enumerate(a.stored.tensors)}
    return sorted(found, key=lambda couple: order[couple[0].tensors[0].name]), list(left), list(right)


def _alone(packed: Packed, number: int, side: Checkpoint) -> Unit:
    piece = packed.pieces[number]
    return Unit((side.stored.tensors[piece.tensor],), packed.axis, piece.layout, packed.sizes, packed.source)


def _whole(packed: Packed, side: Checkpoint) -> Unit:
    layout = together([piece.layout for piece in packed.pieces])
    return Unit(tuple(side.stored.tensors[piece.tensor] for piece in packed.pieces), packed.axis, layout, packed.sizes, packed.source)


def _by_projection(a: Checkpoint, b: Checkpoint) -> Iterator[Couple]:
    """Projections that are one tensor on one side and several on the other, or that a stamp gives another name."""
    known = [{name: packed for packed in side.projections for name in (packed.link, packed.name)} for side in (a, b)]
    for packed in a.projections:
        other = known[1].get(packed.name) or known[1].get(packed.link)
        if other is not None and [piece.tensor for piece in packed.pieces] != [piece.tensor for piece in other.pieces]:
            yield _whole(packed, a), _whole(other, b)
    for side, other_side, turned in ((a, b, False), (b, a, True)):
        for packed in side.projections:
            names = list(dict.fromkeys(name for _, name in packed.parts))
            if packed.fused and len(names) > 1 and all(name in other_side.stored.tensors for name in names):
                apart = together([alone(packed.layout, part) for part in dict(packed.parts)])
                tensors = tuple(other_side.stored.tensors[name] for name in names)
                mine, theirs = _whole(packed, side), Unit(tensors, packed.axis, apart, packed.sizes, "by its name")
                yield (theirs, mine) if turned else (mine, theirs)


def _by_ending(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Names of which one is the other with words before it (`model.`, `transformer.`), where only one fits."""
    endings: dict[str, list[str]] = {}
    for name in right:
        for i in [-1, *(i for i, letter in enumerate(name) if letter == ".")]:
            endings.setdefault(name[i + 1 :], []).append(name)
    taken: set[str] = set()
    for name, tensor in left.items():
        fits = set(endings.get(name, ()))
        for i, letter in enumerate(name):
            if letter == "." and name[i + 1 :] in right:
                fits.add(name[i + 1 :])
        fits = {other for other in fits if "." in min(name, other, key=len) and right[other].shape == tensor.shape} - taken
        if len(fits) == 1:
            taken |= fits
            yield name, fits.pop()


def _by_rows(
    left: Mapping[str, Tensor], right: Mapping[str, Tensor], old: Ranges, new: Ranges
) -> Iterator[tuple[Sequence[Tensor], Sequence[Tensor]]]:
    """Matrices that hold the same rows: one and one, or one and those that it is made of."""
    sides = [[tensor for tensor in some.values() if len(tensor.shape) > 1 and tensor.size] for some in (left, right)]
    dtypes = {tensor.dtype for side in sides for tensor in side}
    common = None if len(dtypes) < 2 else min(dtypes & set(PRECISION), key=PRECISION.__getitem__, default=None)
    if common is not None and common.startswith("F8"):
        common = "BF16"
    kinds = [{tensor.shape[1:] for tensor in side} for side in sides]
    wanted = [
        [t for t in side if t.shape[1:] in kinds[1 - i] and (common is None or t.dtype in PRECISION) and t.size >= SHORT * t.shape[0]]
        for i, side in enumerate(sides)
    ]
    readers = (old, new)
    rows = [
        [Rows(reader, (t,), 0, common if t.dtype != common else None) for t in side] for reader, side in zip(readers, wanted, strict=True)
    ]
    numbers = [in_order(lambda one: one.numbers, side) for side in rows]
    taken = _same_content(wanted, numbers)
    for i, j in taken:
        yield [wanted[0][i]], [wanted[1][j]]
    done = [{pair[side] for pair in taken} for side in (0, 1)]
    home: dict[int, int] = {}
    for i, some in enumerate(numbers[0]):
        for number in np.unique(some).tolist() if i not in done[0] else ():
            home[number] = i if number not in home else -1
    links: dict[int, set[int]] = {}
    for j, some in enumerate(numbers[1]):
        sample = some[np.unique(np.linspace(0, len(some) - 1, SAMPLE).astype(int))].tolist() if j not in done[1] else []
        votes = [home[number] for number in sample if home.get(number, -1) >= 0]
        for i in set(votes):
            if votes.count(i) * 4 >= len(sample) // len(set(votes)):
                links.setdefault(j, set()).add(i)
    for ones, twos in _groups(links, wanted, numbers):
        yield [wanted[0][i] for i in ones], [wanted[1][j] for j in twos]


def _by_content(left: Iterable[Tensor], right: Iterable[Tensor], old: Ranges, new: Ranges) -> Iterator[tuple[str, str]]:
    """Tensors of one dtype and shape with the same rows in any order."""
    kinds = [{(tensor.dtype, tensor.shape) for tensor in side} for side in (left, right)]
    sides = [[t for t in side if t.shape and (t.dtype, t.shape) in kinds[0] & kinds[1]] for side in (left, right)]
    numbers = [[Rows(reader, (tensor,)).numbers for tensor in side] for reader, side in zip((old, new), sides, strict=True)]
    for i, j in _same_content(sides, numbers):
        yield sides[0][i].name, sides[1][j].name


def _same_content(sides: Sequence[Sequence[Tensor]], numbers: Sequence[Sequence[Numbers]]) -> list[tuple[int, int]]:
    """Tensors of one shape whose rows are the same in some order, unless all are alike; of several alike the first with the first."""
    keys = [[(t.shape, np.sort(some).tobytes()) for t, some in zip(*side, strict=True)] for side in zip(sides, numbers, strict=True)]
    places: dict[object, list[int]] = {}
    for j, key in reversed(list(enumerate(keys[1]))):
        places.setdefault(key, []).append(j)
    return [(i, places[key].pop()) for i, key in enumerate(keys[0]) if places.get(key) and not constant(numbers[0][i])]


def constant(numbers: Numbers) -> bool:
    """Whether all rows of a tensor are one row: any other tensor may have it by chance."""
    return len(numbers) > 1 and bool((numbers == numbers[0]).all())


def _groups(
    links: Mapping[int, set[int]], sides: Sequence[Sequence[Tensor]], numbers: Sequence[Sequence[Numbers]]
) -> Iterator[tuple[list[int], list[int]]]:
    """One of a with one or several of b, or several of a with one of b, of as many rows, in the order in which they stand in the one."""
    of_a: dict[int, list[int]] = {}
    uses = Counter(i for some in links.values() for i in some)
    for j, some in links.items():
        if len(some) == 1:
            of_a.setdefault(next(iter(some)), []).append(j)
        elif all(uses[i] == 1 for i in some):
            ones = _in_order_of(numbers[1][j], {i: numbers[0][i] for i in some})
            if sum(sides[0][i].shape[0] for i in ones) == sides[1][j].shape[0]:
                yield ones, [j]
    for i, found in of_a.items():
        twos = _in_order_of(numbers[0][i], {j: numbers[1][j] for j in found})
        if uses[i] == len(found) and sum(sides[1][j].shape[0] for j in twos) == sides[0][i].shape[0]:
            yield [i], twos


def _in_order_of(whole: Numbers, parts: Mapping[int, Numbers]) -> list[int]:
    """Parts by where their first row stands in the whole."""
    place = {number: row for row, number in reversed(list(enumerate(whole.tolist())))}
    return sorted(parts, key=lambda key: min((place.get(number, len(place)) for number in parts[key].tolist()), default=0))
