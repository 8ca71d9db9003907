"""The slow evaluator of the proof: every row of a layout, one by one, and which row of the input each row of the output must be.

It shares no code with the row maps that conversions are made of.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import axes
from .layout import Axis, Factor, Layout
from .sizes import Sizes


class Label(NamedTuple):
    """What one row is."""

    part: str
    head: int
    dim: int

    def __str__(self) -> str:
        return f"part {self.part or '(one)'}, head {self.head}, dim {self.dim}"


class Entry(NamedTuple):
    """One row of a listing: its labels (several where parts are one tensor), and whether it is declared to hold zero."""

    labels: tuple[Label, ...]
    zero: bool


@lru_cache(maxsize=64)
def listing(layout: Layout, sizes: Sizes) -> tuple[Entry, ...]:
    """Every row of a sized layout, one by one, slowest axis first.

    >>> from .sizes import bind
    >>> [str(entry.labels[0]) for entry in listing(Layout("h (q|k)"), bind("h (q|k)", h=2))]
    ['part q, head 0, dim 0', 'part k, head 0, dim 0', 'part q, head 1, dim 0', 'part k, head 1, dim 0']
    """
    return tuple(_entry(names, zero, at, sizes) for names, zero, at in _walk(layout.factors, sizes))


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


def _entry(names: tuple[str, ...], zero: bool, at: tuple[tuple[str, int], ...], sizes: Sizes) -> Entry:
    index, order = dict(at), [axis for axis, _ in at]
    head = dim = 0
    for axis in axes.head_axes(order):
        head = head * sizes[axis] + index[axis]
    for axis in axes.dim_axes(order):
        dim = dim * sizes[axis] + index[axis]
    return Entry(tuple(Label(name, head, dim) for name in names), zero)


class Origin(NamedTuple):
    """Where every row of one output tensor must come from: number of the source tensor (-1: it holds zero) and row in it."""

    tensors: NDArray[np.int64]
    rows: NDArray[np.int64]


@lru_cache(maxsize=16)
def origins(sources: tuple[Layout, ...], targets: tuple[Layout, ...], old: Sizes, new: Sizes) -> tuple[Origin, ...] | str:
    """The origin of every row of every target by equal labels, or a sentence when the labels of the two sides differ."""
    have: dict[Label, tuple[int, int]] = {}
    for number, layout in enumerate(sources):
        for row, entry in enumerate(listing(layout, old)):
            for label in () if entry.zero else entry.labels:
                if label in have:
                    return f"{label} stands twice in the input"
                have[label] = number, row
    used: set[Label] = set()
    out = []
    for layout in targets:
        tensors, rows = [], []
        for entry in listing(layout, new):
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
