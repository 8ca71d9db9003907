"""Pairs of layouts that explain which row of one tensor is which row of the other. Integers only; the values are asked through `Pair`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from .catalog import HEAD_DIMS, Candidate, candidates
from .errors import SizeError
from .layout import Factor, Layout, Sum, count
from .rowmap import Block, Rows, from_indices, parts
from .sizes import Sizes

Index = NDArray[np.int64]
Mask = NDArray[np.bool_]
NONE = -1
"""In an index: this row has no partner."""

SAMPLE = 64
"""Rows looked at before a pair of layouts is tried on all of them."""
ENOUGH = 4
"""Different row maps found after which the search ends."""
GUESSES = 12
"""Head dims tried when none is given."""

PIECES = 64
"""Rows that lie in more strided pieces than this, and in pieces of less than this many rows, are in no order."""

Known = Mapping[str, int]


class Side(Protocol):
    """One tensor as rows, each of `samples` values."""

    @property
    def rows(self) -> int: ...
    @property
    def samples(self) -> int: ...


class Pair(Protocol):
    """Two tensors whose rows can be compared: values in memory (live/match.py) or digests of files (digests.py)."""

    @property
    def a(self) -> Side: ...
    @property
    def b(self) -> Side: ...
    @property
    def matched(self) -> tuple[Index, float]:
        """([rows of a] the row of b that each row of a is, or NONE; the largest difference)."""

    def looks(self, rows: Index, partners: Index) -> Mask:
        """Whether a's `rows` and b's `partners` seem to be the same: broadcast over index arrays. A hint, no proof."""

    def agree(self, index: Index, until_failure: bool = False) -> tuple[Mask, float]:
        """([rows of a] whether row i of a and row index[i] of b agree, the largest difference among those that do)."""


class Explanation(NamedTuple):
    """Read as `a`, the first tensor holds the labels that the second holds, read as `b`: its row i is row partners[i] of the other.

    `part_a` and `part_b`: the tensors are these parts of a fused tensor laid out so; None: they are the whole.
    """

    a: Candidate
    b: Candidate
    partners: Index
    difference: float = 0.0
    part_a: str | None = None
    part_b: str | None = None

    def __str__(self) -> str:
        sides = [f"part {part} of {c.layout}" if part else str(c.layout) for c, part in ((self.a, self.part_a), (self.b, self.part_b))]
        return f"a {sides[0]}, b {sides[1]}, {self.sizes.of(self.a.layout, self.b.layout)}"

    @property
    def sizes(self) -> Sizes:
        """Those of both sides."""
        return Sizes({**self.b.sizes, **self.a.sizes})


def known_from_shape(shape: Sequence[int], given: Known) -> Iterator[dict[str, int]]:
    """What sizes to try for rows that stand on axes of this shape: those given, then those that the axes suggest."""
    if given:
        yield dict(given)
    hints: list[dict[str, int]] = []
    if len(shape) == 2:
        hints = [{"h": shape[0], "d": shape[1]}, {"h": shape[0]}]
    elif len(shape) == 3:
        hints = [{"g": shape[0], "r": shape[1], "d": shape[2]}, {"h": shape[1], "d": shape[2]}]
    for hint in hints:
        merged = {**hint, **given}
        if merged != given:
            yield merged


def known_from_order(index: Index, given: Known) -> Iterator[dict[str, int]]:
    """Sizes to try when none are known: the head dim divides the stretches of rows that stay together."""
    rows, blocks = len(index), _blocks(index)
    if "d" in given or "f" in given or not blocks:
        return
    if not given and rows % 2 == 0:
        yield {"f": rows // 2}
    sizes = {dim.size for block in blocks for dim in block.dims if dim.into == dim.out == 1}
    together = [math.gcd(*sizes)] if sizes else []
    nested = sorted({n * dim.size for block in blocks for dim in block.dims for n in (1, 2)}, reverse=True)
    guesses = [d for d in dict.fromkeys([*together, *HEAD_DIMS, *nested]) if d > 1 and rows % d == 0]
    guesses.sort(key=lambda d: bool(together) and together[0] % d != 0)
    for d in guesses[:GUESSES]:
        yield {**given, "d": d}


def _blocks(index: Index) -> tuple[Block, ...]:
    """The order of the rows as strided blocks; none when they lie in more pieces than any two layouts give."""
    blocks = from_indices(index, int(index.max(initial=0)) + 1).blocks
    return blocks if len(blocks) <= max(PIECES, len(index) // PIECES) else ()


def reorderings(pair: Pair, attempts: Iterable[Known]) -> list[Explanation]:
    """Pairs of known layouts of all rows under which the tensors agree in every value, the most usual first.

    Sizes are attempted in order; the first at which there are any pairs end the search.
    """
    for known in attempts:
        found = list(_reorderings(pair, _candidates(pair.a.rows, known)))
        if found:
            exact = [e for e in found if not e.difference]
            return exact or found
    return []


def _candidates(rows: int | None, known: Known) -> list[Candidate]:
    try:
        return list(candidates(rows, **known))
    except SizeError:
        return []


def _reorderings(pair: Pair, options: list[Candidate]) -> Iterator[Explanation]:
    seen: dict[bytes, tuple[Index, float] | None] = {}
    ways = 0
    for _, i, j, group, places in sorted(_alike(pair, options), key=lambda found: found[:3]):
        index = np.empty(pair.a.rows, np.int64)
        index[places[i]] = places[j]
        key = index.tobytes()
        if key not in seen:
            if ways == ENOUGH:
                continue
            good, difference = pair.agree(index, until_failure=True)
            seen[key] = (index, difference) if good.all() else None
            ways += bool(good.all())
        if held := seen[key]:
            yield Explanation(group[i], group[j], *held)


def _alike(pair: Pair, options: list[Candidate]) -> Iterator[tuple[int, int, int, list[Candidate], Rows]]:
    """(rank, i, j, candidates, their [candidates, rows] row of every label): pairs of layouts that fit the sums."""
    groups: dict[object, list[tuple[int, Candidate]]] = {}
    for rank, option in enumerate(options):
        if option.layout.parts == ("",) and option.who.startswith("nobody"):  # a way to read rows, not to store them
            continue
        labels = sorted((part.path.names, part.shape) for part in parts(option.layout, option.sizes))
        groups.setdefault(tuple(labels), []).append((rank, option))
    some = np.random.default_rng(1).permutation(pair.a.rows)[:SAMPLE]
    for group in groups.values():
        if len(group) < 2:
            continue
        places = np.stack([_places(option) for _, option in group])
        for i in range(len(group)):
            left = np.arange(len(group))
            for few in (some[:4], some):
                left = left[pair.looks(np.broadcast_to(places[i, few], (len(left), len(few))), places[left][:, few]).all(1)]
            for j in left.tolist():
                if i != j and pair.looks(places[i], places[j]).all():
                    yield group[i][0] + group[j][0], i, j, [option for _, option in group], places


def _places(option: Candidate) -> Rows:
    """[rows] where each label lies, labels in one order for all layouts that have the same ones."""
    ordered = sorted(parts(option.layout, option.sizes), key=lambda part: part.path.names)
    return np.concatenate([part.rows().ravel() for part in ordered])


class _Reading(NamedTuple):
    option: Candidate
    part: str | None
    rows: Rows


def shared_parts(pair: Pair, attempts: Iterable[Known]) -> list[Explanation]:
    """Two readings of one fused tensor that share exactly the rows that were matched by value: a is a part of one, b of the other.

    Where a row is a single value some agree by chance: then a tenth of the matches may be others.
    """
    for known in attempts if _blocks(pair.matched[0]) or pair.a.samples == 1 else ():
        fused: dict[int, dict[bytes, _Reading]] = {}
        for option in _candidates(None, known):
            total = count(option.layout.factors, option.sizes)
            here = fused.setdefault(total, {})
            for reading in [*_readings(option), _Reading(option, None, np.arange(total))]:
                here.setdefault(reading.rows.tobytes(), reading)
        found = [e for total, readings in fused.items() for e in _overlaps(pair, total, list(readings.values()))]
        if found:
            return sorted(found, key=lambda e: (e.part_a != e.part_b, not e.a.who or not e.b.who))
    return []


def _readings(option: Candidate) -> Iterator[_Reading]:
    sized = parts(option.layout, option.sizes)
    if len(sized) > 1:
        for part in sized:
            yield _Reading(option, part.path.names[0], part.rows().ravel())


def _overlaps(pair: Pair, total: int, readings: list[_Reading]) -> Iterator[Explanation]:
    ours = [r for r in readings if len(r.rows) == pair.a.rows]
    theirs = [r for r in readings if len(r.rows) == pair.b.rows]
    if not ours or not theirs:
        return
    back = np.full((len(theirs), total), NONE, np.int64)
    for row, reading in zip(back, theirs, strict=True):
        row[reading.rows] = np.arange(pair.b.rows)
    index, difference = pair.matched
    some = np.random.default_rng(1).permutation(pair.a.rows)[:SAMPLE]
    matches = (index != NONE).sum()
    for a in ours:
        few = back[:, a.rows[some]]
        likely = (few == NONE) | pair.looks(np.broadcast_to(some, few.shape), few) if pair.a.samples == 1 else few == index[some]
        for j in np.flatnonzero(likely.all(1)).tolist():
            b, expected = theirs[j], back[j, a.rows]
            options = (a.option if a.part else b.option, b.option if b.part else a.option)  # the whole is laid out as its part says
            if np.array_equal(expected, index):
                yield Explanation(*options, index, difference, a.part, b.part)
            elif pair.a.samples == 1 and (expected != NONE).sum() >= max(2, 0.9 * matches):
                good, apart = pair.agree(expected)
                if np.array_equal(good, expected != NONE):
                    yield Explanation(*options, expected, apart, a.part, b.part)


def kind_of(found: Explanation) -> str:
    """ "layout", "rotary", "heads" or "parts swapped"."""
    if _sorted(found.a.layout.factors) == _sorted(found.b.layout.factors):
        return "parts swapped"
    sides = [sorted(parts(c.layout, c.sizes), key=lambda part: part.path.names) for c in (found.a, found.b)]
    grids = [(x.rows(), y.rows()) for x, y in zip(*sides, strict=True)]
    if all(np.array_equal(np.sort(x, 1), np.sort(y, 1)) for x, y in grids):
        return "rotary"
    if all(np.array_equal(np.sort(x[:, 0]), np.sort(y[:, 0])) and np.array_equal(x - x[:, :1], y - y[:, :1]) for x, y in grids):
        return "heads"
    return "layout"


def _sorted(factors: tuple[Factor, ...]) -> str:
    """The text of a layout without the order of its parts."""
    texts = []
    for factor in factors:
        if isinstance(factor, Sum):
            texts.append("|".join(sorted(" ".join([*branch.names, _sorted(branch.factors)]) for branch in factor.branches)))
        else:
            texts.append(str(factor))
    return f"({' '.join(texts)})"


def spelled_rotary(layout: Layout) -> Layout:
    """The layout with its head dim cut, as it stands beside one with another rotary order: `h d` is `h c p`."""
    return Layout(re.sub(r"\bd\b", "c p", str(layout)))


def others(found: list[Explanation]) -> list[Explanation]:
    """Those beside the first that say something else, in use both: not the same under other part names, with one rotary order more,
    or with an output gate of which the first knows nothing."""
    first = found[0]
    seen = {_outline(first)}
    out = []
    for other in found[1:]:
        in_use = all(c.who and not c.who.startswith("nobody") for c in (other.a, other.b))
        pairs = [str(c.layout).count("p c") for c in (other.a, other.b)]
        added = pairs[0] == pairs[1] > str(first.a.layout).count("p c")
        added |= _gated(other) and not _gated(first)
        if in_use and not added and _outline(other) not in seen:
            seen.add(_outline(other))
            out.append(other)
    return out


def _gated(found: Explanation) -> bool:
    return any({"q", "gate"} <= {*c.layout.parts} for c in (found.a, found.b))


def _outline(found: Explanation) -> str:
    """The pair with its parts numbered in order of appearance."""
    text = f"{found.part_a} {found.a.layout} / {found.part_b} {found.b.layout}"
    for i, path in enumerate(found.a.layout.paths):
        text = re.sub(rf"\b{path.names[0]}\b", f"#{i}", text) if path.names[0] else text
    return text
