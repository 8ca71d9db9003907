"""Two tensors seen as rows: which row of one is which row of the other, what explains the order, and what else differs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import ranges
from .catalog import Candidate
from .digests import Digested
from .errors import LayoutError
from .layout import Layout
from .packed import same_rows
from .pairs import NONE, Explanation, Index, Mask, kind_of, known_from_order, others, reorderings
from .partners import Unit
from .pieces import listed
from .ranges import Bytes
from .rowmap import between, parts
from .sizes import Sizes, bind
from .values import PRECISION, WRITTEN, decode, encode

EQUAL, DECLARED, ORDER, SCALED, DTYPE, DIFFERENT = "equal", "declared", "order", "scaled", "dtype", "different"
ONLY_A, ONLY_B = "only in a", "only in b"
KINDS = (EQUAL, DECLARED, ORDER, SCALED, DTYPE, DIFFERENT, ONLY_A, ONLY_B)
FEW = 8
"""Rows of which the factor is looked at before it is of all; runs of rows that are listed."""


@dataclass(frozen=True)
class TensorDiff:
    """One tensor of a, or several that are one in b, and the other way round.

    kind: "equal"; "declared" (the same bytes, but record or stamp give them another layout); "order" (the same rows in another order);
        "scaled"; "dtype" (the same numbers in another dtype, or rounded to one); "different";
        "only in a", "only in b". rows: how many there are; differing: how many are not the same after all that is said.
    layout_a, layout_b, sizes: read so, both hold the same labels. order: what kind of order it is: "layout", "rotary", "heads",
        "parts swapped"; None where no known layouts explain it.
    """

    a: tuple[str, ...]
    b: tuple[str, ...]
    kind: str
    text: str = ""
    rows: int = 0
    differing: int = 0
    order: str | None = None
    layout_a: Layout | None = None
    layout_b: Layout | None = None
    sizes: Sizes | None = None

    def to_dict(self) -> dict[str, Any]:
        told = {key: getattr(self, key) for key in ("kind", "text", "rows", "differing", "order")}
        layouts = {key: None if getattr(self, key) is None else str(getattr(self, key)) for key in ("layout_a", "layout_b")}
        return {"a": list(self.a), "b": list(self.b), **told, **layouts, "sizes": None if self.sizes is None else dict(self.sizes)}


class Order(NamedTuple):
    """A row of b for every row of a, and the layouts that say so, if any."""

    rows: Index
    found: Explanation | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """Two units seen as rows."""

    names: tuple[tuple[str, ...], tuple[str, ...]]
    mine: Unit
    theirs: Unit
    pair: Digested
    note: str = ""

    def told(self, known: Sequence[Mapping[str, int]], hints: dict[int, list[Order]]) -> TensorDiff:
        """What is to say of them. `hints`, by number of rows: orders that explained others; a new one is added."""
        pair, rows = self.pair, self.pair.a.rows
        as_is = np.arange(rows)
        options = [Order(as_is, None), *self._declared(), *hints.get(rows, [])]
        fits = [int(pair.agree(option.rows)[0].sum()) for option in options]
        best = options[int(np.argmax(fits))]
        if max(fits) < rows and np.array_equal(np.sort(pair.a.numbers), np.sort(pair.b.numbers)):
            best = self._searched(known)
        elif 2 * max(fits) < rows:
            best = options[0]
        good, _ = pair.agree(best.rows)
        bad = pair.differing(np.where(good, best.rows, NONE))
        differing = rows - int(good.sum()) + len(bad)
        good[bad] = False
        if np.array_equal(best.rows, as_is):
            return self._in_place(good, differing)
        if not any(best is option for option in options):
            hints.setdefault(rows, []).insert(0, best)
        kind = DIFFERENT if differing else ORDER
        text = self._order_text(best)
        if differing:
            text += f"\n{differing} of {rows} rows are not the same even so{self._first(~good)}"
        how = kind_of(best.found) if best.found else None
        layouts = (best.found.a.layout, best.found.b.layout, best.found.sizes) if best.found else ()
        return TensorDiff(*self.names, kind, text + self._noted(), rows, differing, how, *layouts)

    def holds_as_declared(self) -> bool:
        """Whether the order that both declarations give turns the rows of a into those of b."""
        return any(bool(self.pair.agree(order.rows)[0].all()) for order in self._declared())

    def _noted(self) -> str:
        return f"\n{self.note}" if self.note else ""

    def _declared(self) -> Iterator[Order]:
        """The order that the layouts of both sides give."""
        mine, theirs = self.mine, self.theirs
        if mine.layout is None or theirs.layout is None or mine.sizes is None or theirs.sizes is None:
            return
        one, two = (
            Candidate(layout, known, who)
            for layout, known, who in ((mine.layout, mine.sizes, mine.source), (theirs.layout, theirs.sizes, theirs.source))
        )
        if any(mine.sizes[axis] != theirs.sizes[axis] for axis in set(mine.layout.axes) & set(theirs.layout.axes)):
            return
        try:
            sizes = bind(mine.layout, theirs.layout, **{**theirs.sizes, **mine.sizes})
            rows = between(mine.layout, theirs.layout, sizes).indices
        except LayoutError:
            return
        if len(rows) != self.pair.b.rows or rows.max(initial=0) >= self.pair.a.rows:
            return
        index = np.full(self.pair.a.rows, NONE, np.int64)
        index[rows[rows >= 0]] = np.flatnonzero(rows >= 0)
        yield Order(index, Explanation(one, two, index))

    def _searched(self, known: Sequence[Mapping[str, int]]) -> Order:
        """An order that two layouts in use explain, else the one that the rows have."""
        index = self.pair.matched[0]
        attempts = [*known, *(one for side in (self.mine, self.theirs) if side.sizes for one in [dict(side.sizes)])]
        guess = "the sizes are guessed from the order itself: give them, -s h=HEADS -s g=KV_HEADS, if they are others"
        for some, notes in ((attempts, ()), (known_from_order(index, {}), (guess,))):
            found = reorderings(self.pair, some)
            if found:
                layouts = {str(side.layout) for side in (self.mine, self.theirs)}
                found += [other for one in found if (other := _in_pairs(one)) is not None]
                first = max(found, key=lambda one: (str(one.a.layout) in layouts) + (str(one.b.layout) in layouts))
                also = others([first, *(other for other in found if other is not first)])[:2]
                return Order(first.partners, first, (*(f"or, these rows cannot tell: {other}" for other in also), *notes))
        return Order(index, None)

    def _order_text(self, best: Order) -> str:
        if best.found is None:
            return f"the same rows in an order that no known layout explains: {self._heads(best.rows) or _runs(best.rows)}"
        sides = [(letter, one) for letter, one in (("a", best.found.a), ("b", best.found.b))]
        what = {"rotary": "the rotary order", "heads": "the order of the heads", "parts swapped": "parts are swapped"}.get(
            kind_of(best.found)
        )
        lines = [f"the same rows in another order{f': {what}' if what else ''}"]
        for letter, one in sides:
            unit = self.mine if letter == "a" else self.theirs
            against = f"   but its {unit.source} says {unit.layout}" if unit.layout and unit.source and not _says(unit, one) else ""
            lines.append(f"{letter} is {one.layout}   with {one.sizes.of(one.layout)}" + (f"   ({one.who})" if one.who else "") + against)
        return "\n".join([*lines, *best.notes])

    def _heads(self, index: Index) -> str:
        """Whole heads that stand elsewhere, where the layout is known and nothing else has moved."""
        unit = self.mine if self.mine.layout else self.theirs
        if unit.layout is None or unit.sizes is None:
            return ""
        grids = [(part.path.names[0], part.rows()) for part in parts(unit.layout, unit.sizes)]
        places = {rows.tobytes(): f"{name or 'head'} {head}" for name, grid in grids for head, rows in enumerate(grid)}
        moved = []
        for rows, place in places.items():
            now = places.get(index[np.frombuffer(rows, np.int64)].tobytes())
            if now is None:
                return ""
            moved += [f"head {place} is {now} in b"] if now != place else []
        return listed(moved, FEW)

    def _in_place(self, good: Mask, differing: int) -> TensorDiff:
        """Rows compared one by one where they stand."""
        rows = len(good)
        if not differing:
            kind = EQUAL if not self.note else DTYPE if "transposed" not in self.note else ORDER
            several = "the same rows one after the other" if len(self.names[0]) != len(self.names[1]) else ""
            return TensorDiff(*self.names, kind, several or self.note or "equal", rows)
        if scaled := self._scaled(good):
            return TensorDiff(*self.names, SCALED, scaled + self._noted(), rows, 0)
        if not self.note and (rounded := self._rounded(good)):
            return TensorDiff(*self.names, DTYPE, rounded + self._noted(), rows, 0)
        elsewhere = int((self.pair.matched[0][~good] != NONE).sum())
        text = f"{differing} of {rows} rows differ{self._first(~good)}"
        text += f"; {elsewhere} of them stand elsewhere in b" if elsewhere and self.pair.a.samples > 1 else ""
        text += "; in bits only, the numbers are equal (NaN payloads, signs of zero)" if self._in_bits_only(good) else ""
        return TensorDiff(*self.names, DIFFERENT, text + self._noted(), rows, differing)

    def _first(self, bad: Mask) -> str:
        row = int(np.flatnonzero(bad)[0])
        unit = self.mine
        if unit.layout is None or unit.sizes is None:
            return f", the first is row {row}"
        part, head, dim = unit.layout.rows(**{axis: unit.sizes[axis] for axis in unit.layout.axes})[row]
        return f", the first is row {row}: part {part or '(one)'}, head {head}, dim {dim}"

    def _pieces(self, good: Mask, whole: bool) -> Iterator[tuple[Bytes, Bytes]]:
        """Rows that differ, of a and b: a few, then all, piece by piece (`whole`: at once)."""
        bad, size = np.flatnonzero(~good), max(1, self.pair.a.size)
        step = max(1, len(bad) if whole else ranges.CHUNK // size)
        for rows in (bad[:FEW], *(bad[at : at + step] for at in range(0, len(bad), step))):
            yield self.pair.a.rows_at(rows, 0), self.pair.b.rows_at(rows, 0)

    @property
    def _dtype(self) -> str:
        """That of the numbers as they are compared, or nothing where numbers cannot be had row by row."""
        a, b = self.pair.a, self.pair.b
        dtype = a.dtype or a.tensors[0].dtype
        return dtype if a.outer == b.outer == 1 and dtype in WRITTEN else ""

    def _scaled(self, good: Mask) -> str:
        """By which factors the rows that differ are scaled, or nothing when they are not."""
        if not self._dtype:
            return ""
        found, single = [], self.pair.a.samples == 1
        for ours, theirs in self._pieces(good, single):
            factors = _factors(ours, theirs, self._dtype, single)
            if factors is None:
                return ""
            found.append(factors)
        factors, bad = np.concatenate(found[1:]), np.flatnonzero(~good)
        where = "" if len(bad) == len(good) else f" ({self._parts(bad) or f'{len(bad)} of {len(good)} rows'})"
        if np.ptp(factors) <= 2.0 ** (3 - PRECISION[self._dtype]) * np.abs(factors).max():
            return f"b is a times {np.median(factors):.6g}{where}"
        return f"every row has a factor of its own, {factors.min():.6g} to {factors.max():.6g}{where}"

    def _rounded(self, good: Mask) -> str:
        """Into which narrower dtype the numbers of one side were rounded to be those of the other, or nothing."""
        for narrow in WRITTEN[WRITTEN.index(self._dtype) + 1 :] if self._dtype else ():
            for one, two, turned in (("b", "a", False), ("a", "b", True)):
                pieces = (pair[::-1] if turned else pair for pair in self._pieces(good, False))
                if not self._in_bits_only(good) and all(
                    np.array_equal(_through(ours, self._dtype, narrow), theirs) for ours, theirs in pieces
                ):
                    return f"{one} is {two} rounded to {narrow}, in {self._dtype}"
        return ""

    def _in_bits_only(self, good: Mask) -> bool:
        """Whether the numbers of the rows that differ are equal."""
        dtype = self._dtype
        return bool(dtype) and all(np.array_equal(decode(x, dtype), decode(y, dtype), equal_nan=True) for x, y in self._pieces(good, False))

    def _parts(self, rows: Index) -> str:
        """The parts that these rows are, when they are whole parts."""
        if self.mine.layout is None or self.mine.sizes is None:
            return ""
        wanted, names = set(rows.tolist()), []
        for part in parts(self.mine.layout, self.mine.sizes):
            mine = set(part.rows().ravel().tolist())
            if mine <= wanted:
                names.append("=".join(part.path.names))
                wanted -= mine
        return "" if wanted else "the rows of " + ", ".join(names)


def _says(unit: Unit, found: Candidate) -> bool:
    """Whether a unit is declared to lie as it was found to, or nobody declares anything."""
    return unit.layout is None or unit.sizes is None or same_rows(unit.layout, unit.sizes, found.layout, found.sizes)


def same_layout(mine: Unit, theirs: Unit) -> bool:
    """Whether no two declarations of the layout contradict each other."""
    if theirs.layout is None or theirs.sizes is None:
        return True
    return _says(mine, Candidate(theirs.layout, theirs.sizes, theirs.source))


def _in_pairs(found: Explanation) -> Explanation | None:
    """The same order with the head dim spelled as rotary pairs on both sides, which changes no row."""
    if any("d" not in one.layout.axes or one.sizes["d"] % 2 for one in (found.a, found.b)):
        return None
    spelled = ((one, Layout(re.sub(r"\bd\b", "p c", str(one.layout)))) for one in (found.a, found.b))
    a, b = (
        Candidate(layout, bind(layout, **{**one.sizes, "c": 2}), one.who if one.who.startswith("nobody") else "") for one, layout in spelled
    )
    return found._replace(a=a, b=b)


def _through(raw: Bytes, dtype: str, narrow: str) -> Bytes:
    """The bytes of numbers that were rounded to a narrower dtype and back."""
    return encode(decode(encode(decode(raw, dtype), narrow), narrow), dtype)


def _factors(a: Bytes, b: Bytes, dtype: str, together: bool) -> NDArray[np.float64] | None:
    """Factors of rows of b over rows of a, or None unless every number is the product, rounded. `together`: one for all."""
    ours, theirs = (decode(side, dtype).astype(np.float64) for side in (a, b))
    if together:
        ours, theirs = ours.reshape(1, -1), theirs.reshape(1, -1)
    with np.errstate(all="ignore"):
        factors = (ours * theirs).sum(1) / np.square(ours).sum(1)
        reach = 2.0 ** (1 - PRECISION[dtype]) * np.abs(theirs) + np.abs(theirs).max(1, keepdims=True) * 2.0 ** (-3 - PRECISION[dtype])
        good = np.abs(theirs - factors[:, None] * ours) <= reach
    apart = np.abs(factors - 1) > 2.0 ** (2 - PRECISION[dtype])
    if ours.shape[1] < 2 or not good.all() or not (np.isfinite(factors) & (factors != 0) & apart).all():
        return None
    return np.asarray(factors, np.float64)


def _runs(index: Index) -> str:
    """Which rows stand elsewhere."""
    moved = np.flatnonzero(index != np.arange(len(index)))
    breaks = np.flatnonzero((np.diff(moved) != 1) | (np.diff(index[moved]) != 1)) + 1
    runs = np.split(moved, breaks)
    if len(runs) > FEW:
        return f"{len(moved)} of {len(index)} rows have moved, in {len(runs)} runs"
    return ", ".join(f"{_span(run[0], run[-1])} of a is {_span(index[run[0]], index[run[-1]])} of b" for run in runs)


def _span(first: int, last: int) -> str:
    return f"row {first}" if first == last else f"rows {first}-{last}"
