"""Two tensors that should be equal: which row of one is which row of the other, and the two layouts that explain it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from ..catalog import Candidate, checked
from ..errors import LayoutError, MismatchError
from ..layout import Layout
from ..pairs import (
    NONE,
    Explanation,
    Index,
    kind_of,
    known_from_order,
    known_from_shape,
    others,
    reorderings,
    shared_parts,
    spelled_rotary,
)
from ..sizes import Sizes
from .match import FEW_ROWS, Matrix, Pair, Precision, Tensor, precision
from .turn import from_fused, moved, moves, numbers, places_of, to_order_of

SAMPLE = 64
"""Elements compared before an exchange of axes is tried on all of them."""
MANY = 1 << 16
"""Rows beyond which two axes are not taken for rows, and all pairs of rows are not compared unless some of a few agree."""
FEW = 8
"""Samples below which the nearest row says nothing."""

ROW_AXES = {
    1: ((0,),),
    2: ((0,), (1,)),
    3: ((2,), (1, 2), (1,), (0, 1), (0,)),
    4: ((2, 3), (3,), (1, 3), (0,)),
    5: ((2, 3, 4), (3, 4), (4,), (0,)),
}
"""By number of axes: which of them hold the rows, the usual first: weights [rows, in], activations [b, s, rows], [b, s, h, d], ..."""


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What `diagnose` found; `print` shows it in a few lines.

    kind: "equal"; "shape" (same values in the same order, other axes); "layout", "rotary", "heads", "parts swapped" (the same rows in
        another order); "transposed" (axes exchanged); "permuted" (the same rows in an order that no known layout explains); "partly"
        (two readings of one fused tensor that share some rows); "different".
    layout_a, layout_b, sizes: read so, the two hold the same labels in the same places; None where there is no explanation.
    part_a, part_b: for "partly": which part of the fused tensor each of them is.
    matched, total: rows of a that are rows of b, compared in full; rows of a.
    indices: [total] the row of b for every row of a, -1 for none.
    fix: PyTorch lines that turn `b` into a's order, or for "partly" that read a's rows out of the fused `weight`; empty if there are none.
    also: other explanations that these tensors cannot tell from this one.
    difference: the largest difference between matched rows.
    """

    kind: str
    matched: int
    total: int
    indices: Index = field(repr=False)
    layout_a: Layout | None = None
    layout_b: Layout | None = None
    sizes: Sizes | None = None
    part_a: str | None = None
    part_b: str | None = None
    fix: str = ""
    also: tuple[str, ...] = ()
    difference: float = 0.0
    what: str = ""
    lines: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def equal(self) -> bool:
        return self.kind == "equal"

    def __str__(self) -> str:
        return str(self._error())

    def _error(self) -> MismatchError:
        lines = {"try_" if label == "try" else label: text for label, text in self.lines.items()}
        return MismatchError(f"{self.kind}: {self.what}", **lines)

    def to_dict(self) -> dict[str, object]:
        names = ("kind", "what", "matched", "total", "layout_a", "layout_b", "part_a", "part_b", "fix", "also", "difference")
        values = {name: getattr(self, name) for name in names}
        plain = {name: str(value) if isinstance(value, Layout) else value for name, value in values.items()}
        return {**plain, "also": list(self.also), "sizes": dict(self.sizes) if self.sizes else None}


def diagnose(a: Tensor, b: Tensor, *, tolerance: float | None = None, **sizes: int) -> Diagnosis:
    """Explain why two tensors that should be equal are not: by value, from the rows (features) that they hold.

    Args:
        a, b: activations [b, s, heads, dim] or [b, s, rows], weights [rows, in] (either way round), biases [rows]; NumPy or torch, any
            real dtype. They may differ by rounding: by that of the coarser dtype and of another order of summation.
        tolerance: the difference to allow instead, relative to a value and to the size of its row.
        sizes: those that are known (h, g, d, f, ...). Without them they are guessed from the shapes and from the order of the rows.
    Returns: a Diagnosis. No tensor is changed or kept.
    Raises LayoutError for values that are not real numbers, SizeError for sizes that contradict each other.

    >>> weight = np.random.default_rng(0).standard_normal((384, 16))
    >>> other = weight.reshape(4, 3, 32, 16).swapaxes(0, 1).reshape(384, 16)
    >>> print(diagnose(weight, other, h=4, d=32))
    layout: the same 384 rows in another order
      a        h (q|k|v) d   with h=4 d=32   (GPT-NeoX, BLOOM, Persimmon, Megatron v2+)
      b        (q|k|v) h d   with h=4 d=32   (GPT-2, MPT, ViT, nn.MultiheadAttention)
      try      b = b.view(3, 4, 32, -1).transpose(0, 1).reshape(384, -1)
    """
    case = _case(a, b, tolerance, sizes)
    same_axes = [pair for pair in case.pairs if pair.a.axes == pair.b.axes]
    return (
        _in_place(case, same_axes)
        or _reshaped(case)
        or _reordered(case, same_axes)
        or _transposed(case)
        or _reordered(case, [pair for pair in case.pairs if pair not in same_axes])
        or _matched(case)
    )


def assert_same_rows(a: Tensor, b: Tensor, *, tolerance: float | None = None, **sizes: int) -> None:
    """Like torch.testing.assert_close, with the answer of `diagnose` as its message.

    Raises MismatchError (an AssertionError) unless the tensors have one shape and are equal up to rounding.

    >>> assert_same_rows(np.arange(6), np.arange(6))
    """
    found = diagnose(a, b, tolerance=tolerance, **sizes)
    if not found.equal:
        raise found._error()


@dataclass(frozen=True)
class _Case:
    """Both tensors and all ways to see their rows that leave them the same number of samples."""

    a: Tensor
    b: Tensor
    known: dict[str, int]
    precision: Precision
    rounded: str
    pairs: list[Pair]

    def pair(self, a: Tensor, b: Tensor) -> Pair:
        axes = ROW_AXES[a.ndim][0]
        return Pair(Matrix(a, axes, self.rounded), Matrix(b, axes, self.rounded), self.precision)


def _case(a: Tensor, b: Tensor, tolerance: float | None, sizes: dict[str, int]) -> _Case:
    a, b = _tensor(a), _tensor(b)
    how = precision(a, b, tolerance)
    rounded = how.name if tolerance is None else ""
    known = checked(sizes)
    mine, yours = ([Matrix(tensor, rows, rounded) for rows in ROW_AXES[tensor.ndim]] for tensor in (a, b))
    seen = [[m for m in side if len(m.axes) == 1 or m.rows <= MANY] for side in (mine, yours)]
    pairs = [Pair(x, y, how) for x, y in itertools.product(*seen) if x.samples == y.samples]
    return _Case(a, b, known, how, rounded, pairs)


def _tensor(value: Tensor) -> Tensor:
    tensor = value.detach() if hasattr(value, "detach") else np.asarray(value)
    if tensor.ndim not in ROW_AXES or math.prod(tensor.shape) == 0:
        raise LayoutError("a tensor without rows to compare", expected="1 to 5 axes, none empty", found=tuple(tensor.shape))
    return tensor


def _in_place(case: _Case, pairs: list[Pair]) -> Diagnosis | None:
    """Equal as they stand."""
    if tuple(case.a.shape) != tuple(case.b.shape):
        return None
    pair = pairs[0] if pairs else case.pair(case.a, case.b)
    good, difference = pair.agree(np.arange(pair.a.rows), until_failure=True)
    if not good.all():
        return None
    rows = len(good)
    at = "" if case.a.dtype == case.b.dtype else f" at {case.precision.name} precision"
    what = f"all {rows} rows agree{at}, the largest difference is {difference:.1e}" if difference else f"all {rows} rows are equal{at}"
    return Diagnosis("equal", rows, rows, np.arange(rows), difference=difference, what=what)


def _reshaped(case: _Case) -> Diagnosis | None:
    """The same values in the same order, with other axes."""
    shape_a, shape_b = tuple(case.a.shape), tuple(case.b.shape)
    if shape_a == shape_b or math.prod(shape_a) != math.prod(shape_b):
        return None
    pair = case.pair(case.a, case.b.reshape(shape_a))
    good, difference = pair.agree(np.arange(pair.a.rows), until_failure=True)
    if not good.all():
        return None
    fix = f"b = b.reshape{shape_a}"
    return _whole(case, "shape", pair, difference, "the same values in the same order, with other axes", fix)


def _whole(case: _Case, kind: str, pair: Pair, difference: float, what: str, fix: str) -> Diagnosis:
    shapes = tuple(case.a.shape), tuple(case.b.shape)
    lines = dict(zip("ab", map(str, shapes), strict=True))
    rows = pair.a.rows
    return Diagnosis(kind, rows, rows, np.arange(rows), fix=fix, difference=difference, what=what, lines={**lines, "try": fix})


def _reordered(case: _Case, pairs: list[Pair]) -> Diagnosis | None:
    """All rows of one are the rows of the other, in an order that two layouts explain."""
    for pair in pairs:
        if pair.a.rows != pair.b.rows or (pair.few == NONE).any():
            continue
        found = reorderings(pair, known_from_shape(pair.a.shape, case.known))
        if not found and not {"d", "f"} & set(case.known) and (pair.matched[0] != NONE).all():
            found = reorderings(pair, known_from_order(pair.matched[0], case.known))
        if found:
            return _explained(pair, found)
    return None


def _explained(pair: Pair, found: list[Explanation]) -> Diagnosis:
    best = found[0]
    kind = kind_of(best)
    layouts = best.a.layout, best.b.layout
    if kind == "rotary":
        layouts = spelled_rotary(layouts[0]), spelled_rotary(layouts[1])
    what = {
        "layout": "in another order",
        "rotary": "with the rotary pairs of each head in another order",
        "heads": "with the heads in another order",
        "parts swapped": "with the parts in another order",
    }[kind]
    turned = ", and rows and columns exchanged" if pair.a.rows_first != pair.b.rows_first else ""
    fix = to_order_of(pair.a, pair.b, (best.a.layout, best.b.layout, best.sizes), best.partners)
    lines = {side: _side(layout, c, None) for side, layout, c in zip("ab", layouts, (best.a, best.b), strict=True)}
    also = tuple(map(str, others(found)))
    return Diagnosis(
        kind=kind,
        matched=pair.a.rows,
        total=pair.a.rows,
        indices=best.partners,
        layout_a=layouts[0],
        layout_b=layouts[1],
        sizes=best.sizes,
        fix=fix,
        also=also,
        difference=best.difference,
        what=f"the same {pair.a.rows} rows {what}{turned}",
        lines={**lines, **_also(also), "try": fix},
    )


def _side(layout: Layout, option: Candidate, part: str | None) -> str:
    sizes = Sizes({"c": 2, "p": option.sizes.get("d", 0) // 2, **option.sizes})
    who = f"   ({option.who})" if option.who else ""
    return f"{f'part {part} of ' if part else ''}{layout}   with {sizes.of(layout)}{who}"


def _also(also: tuple[str, ...]) -> dict[str, str]:
    more = f"\nand {len(also) - 3} more" if len(also) > 3 else ""
    return {"also": "\n".join(also[:3]) + f"{more}\nthe values cannot tell which"} if also else {}


def _transposed(case: _Case) -> Diagnosis | None:
    """Axes exchanged, or cut in another order: `view(b, h, s, d)` for `view(b, s, h, d).transpose(1, 2)`."""
    shape_a, shape_b = tuple(case.a.shape), tuple(case.b.shape)
    if math.prod(shape_a) != math.prod(shape_b):
        return None
    some = np.random.default_rng(2).integers(0, math.prod(shape_a), SAMPLE)
    for move in moves(shape_a, shape_b):
        places = places_of(move, shape_b, some)
        few = case.pair(_elements(case.a, some), _elements(case.b, places))
        if not few.agree(np.arange(SAMPLE), until_failure=True)[0].all():
            continue
        pair = case.pair(case.a, moved(case.b, move))
        good, difference = pair.agree(np.arange(pair.a.rows), until_failure=True)
        if good.all():
            what = "the same values with the axes in another order"
            return _whole(case, "transposed", pair, difference, what, f"b = b{move.text}")
    return None


def _elements(tensor: Tensor, flat: Index) -> Tensor:
    return tensor[tuple(i.tolist() for i in np.unravel_index(flat, tuple(tensor.shape)))]


def _matched(case: _Case) -> Diagnosis:
    """No two layouts of all rows: say which rows have a partner, and whether two readings of one fused tensor explain that."""
    if not case.pairs:
        rows = case.pair(case.a, case.a).a.rows
        lines = {"a": str(tuple(case.a.shape)), "b": str(tuple(case.b.shape))}
        what = "no samples in common, by which to compare rows"
        return Diagnosis("different", 0, rows, np.full(rows, NONE), what=what, lines=lines)
    likely = [pair for i, pair in enumerate(case.pairs) if (pair.few != NONE).any() or (i == 0 and max(pair.a.rows, pair.b.rows) <= MANY)]
    if not likely:
        nothing = f"none of {FEW_ROWS} rows of a, taken at random, is a row of b"
        return _different(case, case.pairs[0], np.full(case.pairs[0].a.rows, NONE), nothing=nothing)
    pair = _most_rows_shared(likely)
    index, difference = pair.matched
    if (index == NONE).all():
        return _different(case, pair, index, difference)
    found = shared_parts(pair, _known_of_part(case, pair, index))
    if found:
        return _shared(found)
    if (index == NONE).any() or pair.a.rows != pair.b.rows:
        return _different(case, pair, index, difference)
    fix = to_order_of(pair.a, pair.b, None, index)
    at = f" with {Sizes(case.known)}" if case.known else ""
    what = f"the same {len(index)} rows in an order that no known layout explains{at}"
    return Diagnosis("permuted", len(index), len(index), index, fix=fix, difference=difference, what=what, lines={"try": fix})


def _most_rows_shared(pairs: list[Pair]) -> Pair:
    """The first choice of row axes under which half of the rows have a partner, else that under which most have."""
    shares = []
    for pair in pairs:
        shares.append((pair.matched[0] != NONE).mean())
        if shares[-1] >= 0.5:
            return pair
    return pairs[shares.index(max(shares))]


def _shared(found: list[Explanation]) -> Diagnosis:
    best = found[0]
    alone = np.flatnonzero(best.partners == NONE)
    total = len(best.partners)
    count = total - len(alone)
    fix, other = (from_fused(c.layout, c.sizes, part, name) for c, part, name in ((best.a, best.part_a, "b"), (best.b, best.part_b, "a")))
    also = tuple(map(str, others(found)))
    lines = {"a": _side(best.a.layout, best.a, best.part_a), "b": _side(best.b.layout, best.b, best.part_b)}
    if count < total:
        lines["rows"] = f"{numbers(alone)} of a have no partner"
    return Diagnosis(
        kind="partly" if count < total else "layout",
        matched=count,
        total=total,
        indices=best.partners,
        layout_a=best.a.layout,
        layout_b=best.b.layout,
        sizes=best.sizes,
        part_a=best.part_a,
        part_b=best.part_b,
        fix=fix,
        also=also,
        difference=best.difference,
        what=f"{count} of {total} rows are shared" if count < total else f"the same {total} rows of a fused tensor, read in another order",
        lines={**lines, **_also(also), "try": f"{fix}  # as a reads it\n{other}  # as b reads it"},
    )


def _known_of_part(case: _Case, pair: Pair, index: Index) -> Iterator[Mapping[str, int]]:
    for known in itertools.chain(known_from_shape(pair.a.shape, case.known), known_from_order(index, case.known)):
        yield {"h": pair.a.rows // known["d"], **known} if pair.a.rows % known.get("d", pair.a.rows + 1) == 0 else known


def _different(case: _Case, pair: Pair, index: Index, difference: float = 0.0, nothing: str = "no row of a is a row of b") -> Diagnosis:
    count, total = int((index != NONE).sum()), len(index)
    alone = np.flatnonzero(index == NONE)
    placed = bool((index == np.arange(total))[index != NONE].all())
    lines = {"a": f"{tuple(pair.a.tensor.shape)}   -> {total} rows", "b": f"{tuple(pair.b.tensor.shape)}   -> {pair.b.rows} rows"}
    what = f"{count} of {total} rows of a are rows of b" if count else nothing
    if count:
        lines["rows"] = f"{numbers(alone)} of a have no partner" + (", the others stand in the same place in both" if placed else "")
    if pair.a.samples == 1 and count:
        lines["rows"] += "; single values can be equal by chance"
    nearest = 0.0 if count or pair.a.samples < FEW else pair.distance()
    if 0 < nearest < 0.1:
        lines["try"] = f"tolerance={2 * nearest:.1g}: the nearest rows are apart by {nearest:.1g} of their size"
    if count and not placed and not case.known:
        lines["try"] = "the sizes that are known: h=, g=, d="
    return Diagnosis("different", count, total, index, difference=difference, what=what, lines=lines)
