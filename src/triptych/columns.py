"""What every row is, and the few columns of a strip that show it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import rowmap
from .drawing import GAP, Cell, Strip
from .layout import Layout, count
from .sizes import Sizes

COLUMNS = 12
"""A strip has about as many columns; more are left out in the middle."""

Ints = NDArray[np.int64]


class Labels(NamedTuple):
    """For every row the index of its part, its head and its dim."""

    parts: tuple[rowmap.Part, ...]
    part: Ints
    head: Ints
    dim: Ints


def labels(layout: Layout, sizes: Sizes) -> Labels:
    """[rows] each.

    >>> from .sizes import bind
    >>> labels(Layout("h (q|k) d"), bind("h (q|k) d", h=2, d=2)).part.tolist()
    [0, 0, 1, 1, 0, 0, 1, 1]
    """
    parts = rowmap.parts(layout, sizes)
    part, head, dim = (np.zeros(count(layout.factors, sizes), np.int64) for _ in range(3))
    for i, one in enumerate(parts):
        rows = one.rows()
        part[rows] = i
        head[rows] = np.arange(rows.shape[0])[:, None]
        dim[rows] = np.arange(rows.shape[1])
    return Labels(parts, part, head, dim)


def name_of(part: rowmap.Part) -> str:
    """`q`, `k=v` for one tensor in two roles, `k=0` for rows that hold zero, `rows` where the layout names no part."""
    return "=".join(part.path.names) + ("=0" if part.path.zero else "") or "rows"


def strip(lines: Sequence[tuple[str, Labels]], blocks: int, wrong: NDArray[np.bool_] | None = None) -> Strip:
    """Columns of rows that go on in all lines; `blocks`: the first line repeats so often; `wrong` rows are marked in the last line."""
    starts, lengths = _runs([table for _, table in lines])
    chosen = _chosen(starts, lengths, [table for _, table in lines], blocks)
    cells: list[list[Cell]] = [[] for _ in lines]
    for run in chosen:
        for i, (_, table) in enumerate(lines):
            if run is None:
                cells[i].append(Cell(GAP))
                continue
            row = int(starts[run])
            bad = wrong is not None and i == len(lines) - 1 and bool(wrong[row])
            cells[i].append(Cell(_label(table, row, int(lengths[run])), name_of(table.parts[table.part[row]]), bad))
    return Strip(
        tuple("" if run is None else str(starts[run]) for run in chosen),
        tuple((name, tuple(line)) for (name, _), line in zip(lines, cells, strict=True)),
    )


def _runs(tables: Sequence[Labels]) -> tuple[Ints, Ints]:
    """(starts, lengths) of the longest runs of rows with one part and head and rising dims in every table."""
    breaks = np.zeros(len(tables[0].part) - 1, bool)
    for table in tables:
        breaks |= (np.diff(table.part) != 0) | (np.diff(table.head) != 0) | (np.diff(table.dim) != 1)
    starts = np.concatenate([[0], np.flatnonzero(breaks) + 1])
    return starts, np.diff(np.append(starts, len(tables[0].part)))


def _label(table: Labels, row: int, length: int) -> str:
    """`q0` for a whole head, `q0:5` for one dim of it, `q0:0-15` for some; `q` where q has no heads, `h0` where no part is named."""
    part = table.parts[table.part[row]]
    name = "=".join(part.path.names) or ("h" if part.path.heads else "rows")
    text = name + (str(table.head[row]) if part.path.heads else "") + ("=0" if part.path.zero else "")
    first = int(table.dim[row])
    if length == part.shape[1]:
        return text
    return f"{text}:{first}" if length == 1 else f"{text}:{first}-{first + length - 1}"


def _chosen(starts: Ints, lengths: Ints, tables: Sequence[Labels], blocks: int) -> list[int | None]:
    """Which runs to show, None for a gap: all, or sequences of heads by their ends, or the first and last blocks."""
    runs = len(starts)
    if runs <= COLUMNS:
        return list(range(runs))
    goes_on = np.diff(lengths) == 0
    for table in tables:
        part, head, dim = table.part[starts], table.head[starts], table.dim[starts]
        goes_on &= (np.diff(part) == 0) & (np.diff(head) == 1) & (np.diff(dim) == 0)
    sequences = np.concatenate([[0], np.flatnonzero(~goes_on) + 1, [runs]])

    def ends(first: int, last: int) -> list[int]:
        """Runs `first` to `last`, of a sequence longer than three only its two ends."""
        cuts = [first, *(int(s) for s in sequences[(sequences > first) & (sequences < last)]), last]
        return [run for a, b in itertools.pairwise(cuts) for run in ([a, b - 1] if b - a > 3 else range(a, b))]

    if len(sequences) <= COLUMNS + 2 and len(short := _joined(ends(0, runs))) <= COLUMNS + 1:
        return short
    per = runs // blocks
    if blocks > 1 and runs % blocks == 0 and per < COLUMNS**2:
        for picked in ((0, 1, blocks - 1), (0, blocks - 1)):
            for shorten in (False, True):
                spans = [(block * per, block * per + per) for block in picked]
                shown = _joined([run for a, b in spans for run in (ends(a, b) if shorten else range(a, b))])
                if len(shown) <= COLUMNS + 1:
                    return shown
    few = len(sequences) <= 2 * COLUMNS
    front, back = ends(0, runs if few else int(sequences[COLUMNS])), ends(0 if few else int(sequences[-COLUMNS]), runs)
    return _joined([*front[: COLUMNS - 4], *back[-3:]])


def _joined(runs: Sequence[int]) -> list[int | None]:
    """The runs with a gap wherever two or more are missing between neighbours."""
    out: list[int | None] = []
    for run in runs:
        last = out[-1] if out else None
        if last is not None and run > last + 1:
            out.append(None if run > last + 2 else last + 1)
        out.append(run)
    return out
