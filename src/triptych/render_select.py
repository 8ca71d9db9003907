"""Taking one part out of a packed tensor by slices and indices, as the text of an expression."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .layout import Layout, count
from .render_ops import Frame, Place, Slot, at_sum, first_sum, reshaped, runs_of, slice_of
from .sizes import Sizes


def selections(layout: Layout, sizes: Sizes, source: str, frame: Frame, places: Sequence[dict[str, Place]]) -> Iterator[Select]:
    """How each part is taken out of `source`, in the order of `Layout.paths`. `places`: where the axes of each part count."""
    total = count(layout.factors, sizes)
    for start, size, factors in _segments(layout.factors, sizes, 0):
        text = source + ("" if size == total else frame.index([slice_of(start, size, total)]))
        yield from _selections(_whole(text, [factors], True), places, sizes, frame)


def _segments(factors: Slot, sizes: Sizes, start: int) -> Iterator[tuple[int, int, Slot]]:
    """(first row, rows, product) of every stretch that lies in one piece, in the order of `Layout.paths`."""
    lead, branches, rest = at_sum(factors)
    if not branches or count(lead, sizes) > 1:
        yield start, count(factors, sizes), factors
        return
    for branch in branches:
        inside = (*branch.factors, *rest)
        yield from _segments(inside, sizes, start)
        start += count(inside, sizes)


class Select(NamedTuple):
    """Indexing in progress: `text[entries]` has the axes `slots`; slot i begins at step `at[i][1]` of entry `at[i][0]`."""

    text: str
    entries: tuple[str, ...]
    at: tuple[tuple[int, int], ...]
    slots: tuple[Slot, ...]
    raw: bool

    def done(self, frame: Frame) -> Select:
        """The index written out."""
        if set(self.entries) <= {":"}:
            return self
        return _whole(self.text + frame.index(self.entries), self.slots, False)


def _whole(text: str, slots: Sequence[Slot], raw: bool) -> Select:
    return Select(text, (":",) * len(slots), tuple((i, 0) for i in range(len(slots))), tuple(slots), raw)


def _selections(state: Select, places: Sequence[dict[str, Place]], sizes: Sizes, frame: Frame) -> Iterator[Select]:
    """Every part inside, in the order of `Layout.paths`."""
    i = first_sum(state.slots)
    if i is None:
        yield state.done(frame)
        return
    if len(state.slots[i]) > 1:
        state = state.done(frame)
        slots = (*state.slots[:i], *runs_of(state.slots[i], places, sizes), *state.slots[i + 1 :])
        text = state.text + reshaped([count(s, sizes) for s in state.slots], [count(s, sizes) for s in slots], frame, state.raw)
        state = _whole(text, slots, False)
        i = first_sum(slots)
        assert i is not None
    _, branches, _ = at_sum(state.slots[i])
    place, start = state.at[i]
    total = count(state.slots[i], sizes) if state.entries[place] == ":" else -1
    for branch in branches:
        size = count(branch.factors, sizes)
        inside = ([((place, start), branch.factors)]) if size > 1 else []
        kept = [*zip(state.at[:i], state.slots[:i], strict=True), *inside, *zip(state.at[i + 1 :], state.slots[i + 1 :], strict=True)]
        entry = slice_of(start, size, total) if size > 1 else str(start)
        entries = (*state.entries[:place], entry, *state.entries[place + 1 :])
        yield from _selections(
            Select(state.text, entries, tuple(a for a, _ in kept), tuple(slot for _, slot in kept), False), places, sizes, frame
        )
        start += size
