"""Tensors that a user would take for the same thing, but that hold different rows."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ..layout import Layout
from ..rowmap import parts
from .entries import Entry
from .reading import Fit, Reader, Rows, role_of


class Pair(NamedTuple):
    """Two entries of one part and kind with different rows; `a` was bound first."""

    part: str
    a: Entry
    b: Entry


def conflicts(entries: Sequence[Entry], fits: Mapping[int, Fit | None], reader: Reader, truth: Layout | None) -> list[Pair]:
    """One pair for every part that is held as different rows, activations before weights and biases.

    Rows that were only moved on from those of another tensor (a copy in another order) are no conflict with it.
    """
    groups: dict[tuple[str, str], dict[bytes, list[Entry]]] = {}
    sizes = _part_sizes([fit for fit in fits.values() if fit is not None])
    shapes: set[tuple[str, str, tuple[int, ...]]] = set()
    others: list[tuple[str, Entry]] = []
    for entry in entries:
        fit, named = fits.get(entry.index), role_of(entry.name.text)
        role = named or (fit.part if fit else None)
        if role is None or not entry.grid.is_rows:
            continue
        if fit is not None or len(entry.grid.order) == sizes.get(role) == entry.grid.rows.size:
            groups.setdefault((entry.kind, role), {}).setdefault(rows_of(entry, fit).tobytes(), []).append(entry)
            shapes.add((entry.kind, role, entry.shape))
        elif named:
            others.append((named, entry))
    for role, entry in others:  # no whole part, but taken for one
        if (entry.kind, role, entry.shape) in shapes:
            groups[entry.kind, role].setdefault(entry.grid.rows.tobytes(), []).append(entry)
    above = _ancestors(entries)
    found: list[Pair] = []
    for kind in ("activation", "weight", "bias"):
        for (this, role), by_rows in groups.items():
            if this != kind or len(by_rows) < 2 or any(pair.part == role for pair in found):
                continue
            ordered = sorted(by_rows.values(), key=lambda group: group[0].index)
            chief = next((group for group in ordered if truth is not None and _layout(fits, group[0]) == truth), ordered[0])
            for other in ordered:
                if other is chief:
                    continue
                couples = itertools.product(filter(_is_claim, chief), filter(_is_claim, other))
                pairs = [(a, b) for a, b in couples if _comparable(a, b, [*chief, *other], above)]
                if pairs:
                    a, b = max(pairs, key=_worth)
                    found.append(Pair(role, a, b) if a.index < b.index else Pair(role, b, a))
    return found


def rows_of(entry: Entry, fit: Fit | None) -> Rows:
    """The rows of a tensor in the order of its heads and dims."""
    return fit.rows().ravel() if fit else entry.grid.order


def _layout(fits: Mapping[int, Fit | None], entry: Entry) -> Layout | None:
    fit = fits.get(entry.index)
    return fit.layout if fit else None


def _part_sizes(fits: Sequence[Fit]) -> dict[str, int]:
    """How many rows each part has, under the layouts seen."""
    return {name: part.shape[0] * part.shape[1] for fit in fits for part in parts(fit.layout, fit.sizes) for name in part.path.names}


def _ancestors(entries: Sequence[Entry]) -> list[set[int]]:
    out: list[set[int]] = []
    for entry in entries:
        out.append(set(entry.sources).union(*(out[i] for i in entry.sources if i < entry.index)))
    return out


def _is_claim(entry: Entry) -> bool:
    """Whether a tensor says that it is a part: by heads, or by its name. A nameless flat block of rows does not."""
    return _has_heads(entry) or role_of(entry.name.text) is not None


def _comparable(a: Entry, b: Entry, holders: Sequence[Entry], above: Sequence[set[int]]) -> bool:
    """Whether two tensors were come by independently: not both moved on from one of `holders`, which have the rows of either.

    A flat tensor has no heads yet: heads that were cut from it in two orders contradict each other all the same.
    """
    if _has_heads(a) == _has_heads(b):
        holders = [one for one in holders if _has_heads(one) == _has_heads(a)]
    return not any(_comes_from(a, one, above) and _comes_from(b, one, above) for one in holders)


def _has_heads(entry: Entry) -> bool:
    return len(entry.grid.axes) > 1


def _comes_from(entry: Entry, other: Entry, above: Sequence[set[int]]) -> bool:
    """Whether one tensor is another, or the same rows moved on from it."""
    if entry is other:
        return True
    return other.index in above[entry.index] and bool(np.array_equal(np.sort(entry.grid.order), np.sort(other.grid.order)))


def _worth(pair: tuple[Entry, Entry]) -> tuple[int, ...]:
    """Which two a user would compare: of one shape, per head, by plain names of the traced function, bound last."""
    a, b = pair
    return (
        int(a.shape == b.shape),
        sum(e.grid.rows.size == len(e.grid.order) for e in pair),
        min(len(a.grid.axes), 2) + min(len(b.grid.axes), 2),
        -a.name.depth - b.name.depth,
        sum(e.name.text.isidentifier() and e.name.text != "returned" for e in pair),
        a.index + b.index,
    )
