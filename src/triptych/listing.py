"""The slow evaluator of the proof: every row of a layout, one by one, and which row of the input each row of the output must be.

It shares no code with the row maps that conversions are made of, nor with what they know of rotary order: dim i of a head is told by its
pair. Of P pairs, "half" order has component c of pair p at c * P + p, "interleaved" at 2 * p + c; the label always counts the first way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import axes
from .layout import Axis, Factor, Layout, Sum
from .sizes import Sizes


class Label(NamedTuple):
    """What one row is."""

    part: str
    head: int
    dim: int

    def __str__(self) -> str:
        return f"part {self.part or '(one)'}, head {self.head}, dim {self.dim}"


class Turn(NamedTuple):
    """How the dims of q and k are paired by a rotary embedding: `dims` of a head (None: all), the first ones or the `last`, in `order`.

    A layout that names the pairs (`c p`, `p c`) is told by them, but where another order is `asked` for it is read with them exchanged.
    """

    order: str
    dims: int | None = None
    last: bool = False
    asked: bool = False


ORDERS = "half", "interleaved"
TURNED = frozenset(["rot", "rope"])
"""Parts of a head that are turned, where a layout tells them from the rest."""


def turn_of(words: str | None) -> Turn | None:
    """What a record or a stamp says of the rotary order; None where it says nothing of it.

    >>> turn_of("partial interleaved: last 8 of 24 dims"), turn_of("q_rope_proj")
    (Turn(order='interleaved', dims=8, last=True, asked=False), None)
    """
    kind, colon, rest = (words or "").partition(": ")
    order, told = kind.removeprefix("partial "), rest.split(" ")
    if order not in ORDERS or (colon and not (len(told) == 5 and told[0] in ("first", "last") and told[1].isdecimal())):
        return None
    return Turn(order, int(told[1]), told[0] == "last") if colon else Turn(order)


class Entry(NamedTuple):
    """One row of a listing: its labels (several where parts are one tensor), and whether it is declared to hold zero."""

    labels: tuple[Label, ...]
    zero: bool


def listing(layout: Layout, sizes: Sizes, turn: Turn | None = None) -> tuple[Entry, ...]:
    """Every row of a sized layout, one by one, slowest axis first; with a `turn`, dims of q and k are told by their pairs.

    >>> from .sizes import bind
    >>> [str(entry.labels[0]) for entry in listing(Layout("h (q|k)"), bind("h (q|k)", h=2))]
    ['part q, head 0, dim 0', 'part k, head 0, dim 0', 'part q, head 1, dim 0', 'part k, head 1, dim 0']
    >>> [entry.labels[0].dim for entry in listing(Layout("(q h d)"), bind("(q h d)", h=1, d=6), Turn("interleaved"))]
    [0, 3, 1, 4, 2, 5]
    """
    return _listed(layout, sizes, turn)


@lru_cache(maxsize=64)
def _listed(layout: Layout, sizes: Sizes, turn: Turn | None) -> tuple[Entry, ...]:
    rows, told = list(_walk(layout.factors, sizes)), _turned_words(layout)
    if turn is not None and turn.asked:
        others = _walk(_exchanged(layout.factors), sizes)
        rows = [other if _order(row[2]) not in (None, turn.order) and _turns(row[0], told) else row
                for row, other in zip(rows, others, strict=True)]  # fmt: skip
    return tuple(_entry(names, zero, at, sizes, turn, told) for names, zero, at in rows)


def _turned_words(layout: Layout) -> frozenset[str]:
    """Parts with one of these words in their names are turned."""
    named = any(TURNED & set(part.split(".")) for part in layout.parts)
    return TURNED if named else frozenset("qk")


def _turns(names: tuple[str, ...], told: frozenset[str]) -> bool:
    return any(told & set(name.split(".")) for name in names)


def _exchanged(factors: tuple[Factor, ...]) -> tuple[Factor, ...]:
    """The factors with c and p in each other's place."""
    out: list[Factor] = []
    for factor in factors:
        if isinstance(factor, Axis):
            out.append(Axis({"c": "p", "p": "c"}.get(factor.name, factor.name)))
        else:
            out.append(Sum(tuple(replace(branch, factors=_exchanged(branch.factors)) for branch in factor.branches)))
    return tuple(out)


def _order(at: tuple[tuple[str, int], ...]) -> str | None:
    """The order in which a row's own axes name its pair."""
    names = [axis for axis, _ in at]
    return ORDERS[names.index("p") < names.index("c")] if "c" in names and "p" in names else None


def _walk(factors: tuple[Factor, ...], sizes: Sizes) -> Iterator[tuple[tuple[str, ...], bool, tuple[tuple[str, int], ...]]]:
    """(dotted names, declared zero, (axis, index) from the outermost in) of every row."""
    if not factors:
        yield ("",), False, ()
    elif isinstance(factors[0], Axis):
        axis = factors[0].name
        for index in range(sizes[axis]):
            for names, zero, at in _walk(factors[1:], sizes):
                yield names, zero, ((axis, index), *at)
    else:
        for branch in factors[0].branches:
            for names, zero, at in _walk((*branch.factors, *factors[1:]), sizes):
                mine = branch.names or ("",)
                yield tuple(_dotted(one, two) for one in mine for two in names), zero or branch.zero, at


def _dotted(*names: str) -> str:
    """The words of nested parts: q, k, v and the like first, in whatever order they nest."""
    words = [word for name in names for word in name.split(".") if word]
    return ".".join(sorted(words, key=lambda word: word not in axes.FIRST_PARTS))


def _entry(
    names: tuple[str, ...], zero: bool, at: tuple[tuple[str, int], ...], sizes: Sizes, turn: Turn | None, told: frozenset[str]
) -> Entry:
    index, order = dict(at), [axis for axis, _ in at]
    head, dim, dims = 0, 0, 1
    for axis in axes.head_axes(order):
        head = head * sizes[axis] + index[axis]
    for axis in axes.dim_axes(order):
        dim, dims = dim * sizes[axis] + index[axis], dims * sizes[axis]
    if turn is None or _order(at) is not None:
        return Entry(tuple(Label(name, head, dim) for name in names), zero)
    return Entry(tuple(_paired(Label(name, head, dim), dims, turn, told) if _turns((name,), told) else Label(name, head, dim)
                       for name in names), zero)  # fmt: skip


def _paired(label: Label, dims: int, turn: Turn, told: frozenset[str]) -> Label:
    """The label of one of the `dims` of a head that its layout does not tell by pairs: counted by its pair, or among those that pass."""
    if turn.dims is None or told is TURNED:
        return label._replace(dim=_canonical(label.dim, dims, turn.order))
    inside = label.dim - (dims - turn.dims) * turn.last
    if 0 <= inside < turn.dims:
        return Label(_dotted(label.part, "rot"), label.head, _canonical(inside, turn.dims, turn.order))
    return Label(_dotted(label.part, "pass"), label.head, label.dim - turn.dims * (not turn.last))


def _canonical(place: int, dims: int, order: str) -> int:
    """The number of a dim by component and pair. `place`: where it stands among the `dims` that are turned."""
    return place if order == "half" else place % 2 * (dims // 2) + place // 2


class Origin(NamedTuple):
    """Where every row of one output tensor must come from: number of the source tensor (-1: it holds zero) and row in it."""

    tensors: NDArray[np.int64]
    rows: NDArray[np.int64]


@lru_cache(maxsize=16)
def origins(
    sources: tuple[Layout, ...], targets: tuple[Layout, ...], old: Sizes, new: Sizes, turns: tuple[Turn | None, Turn | None] = (None, None)
) -> tuple[Origin, ...] | str:
    """The origin of every row of every target by equal labels, or a sentence when the labels of the two sides differ.

    `turns`: how the dims of the sources, and of the targets, are paired.
    """
    have: dict[Label, tuple[int, int]] = {}
    for number, layout in enumerate(sources):
        for row, entry in enumerate(listing(layout, old, turns[0])):
            for label in () if entry.zero else entry.labels:
                if label in have:
                    return f"{label} stands twice in the input"
                have[label] = number, row
    used: set[Label] = set()
    out = []
    for layout in targets:
        tensors, rows = [], []
        for entry in listing(layout, new, turns[1]):
            found = {have.get(label) for label in entry.labels} if not entry.zero else {(-1, 0)}
            place = found.pop()
            if place is None or found:
                return f"{entry.labels[0]} of the output " + ("is not in the input" if place is None else "is two rows of the input")
            used |= set() if entry.zero else set(entry.labels)
            tensors.append(place[0])
            rows.append(place[1])
        out.append(Origin(np.array(tensors, np.int64), np.array(rows, np.int64)))
    missing = next((label for label in have if label not in used), None)
    return f"{missing} of the input is not in the output" if missing else tuple(out)
