"""Every packing of the field can be said in the language, and means what its model means."""

from __future__ import annotations

import numpy as np
import pytest

import triptych as tt
from triptych import axes
from triptych.rowmap import parts

from .packings import PACKINGS, Packing, listing

each = pytest.mark.parametrize("packing", PACKINGS, ids=[f"{p.number} {p.layout}" for p in PACKINGS])


def test_the_table_is_complete() -> None:
    numbers = [p.number for p in PACKINGS]
    assert set(numbers) == {str(n) for n in range(1, 48)} | {f"G{n}" for n in range(1, 8)}
    assert numbers.count("41") == numbers.count("43") == 2


@each
def test_sizes_differ_pairwise(packing: Packing) -> None:
    sizes = axes.resolve({axes.ALIASES.get(k, k): v for k, v in packing.sizes.items()}, [], tt.Layout(packing.layout).n_is_free)
    assert len(set(sizes.values())) == len(sizes)


@each
def test_the_listing_is_the_one_written_by_hand(packing: Packing) -> None:
    layout = tt.Layout(packing.layout)
    assert [tuple(row) for row in layout.rows(**packing.sizes)] == listing(packing.rows)
    assert layout.size(**packing.sizes) == len(listing(packing.rows))
    assert tt.Layout(str(layout)) == layout


@each
def test_the_strided_parts_are_the_same_rows(packing: Packing) -> None:
    layout = tt.Layout(packing.layout)
    at = {label: row for row, label in enumerate(listing(packing.rows))}
    seen = 0
    for part in parts(layout, tt.bind(layout, **packing.sizes)):
        rows = part.rows()
        for head, dim in np.ndindex(rows.shape):
            assert rows[head, dim] == at[part.path.names[0], head, dim]
        seen += rows.size
    assert seen == len(at)


@each
def test_split_reads_the_stored_orientation(packing: Packing) -> None:
    written = listing(packing.rows)
    shape = [2] * packing.ndim
    shape[packing.axis] = len(written)
    along = [1] * packing.ndim
    along[packing.axis] = -1
    stored = np.broadcast_to(np.arange(len(written)).reshape(along), shape)
    layout = tt.Layout(packing.layout)
    pieces = tt.split(stored, layout, axis=packing.axis, **packing.sizes)
    for names, piece in zip(layout.parts, pieces, strict=True):
        first = next(path.names[0] for path in layout.paths if names in path.names)
        rows = np.moveaxis(piece, (packing.axis, packing.axis + 1), (0, 1)).reshape(*piece.shape[packing.axis : packing.axis + 2], -1)
        for head, dim in np.ndindex(rows.shape[:2]):
            assert {written[row] for row in rows[head, dim]} == {(first, head, dim)}


def test_aliased_parts_have_both_names() -> None:
    assert tt.Layout("(k=v) g d").parts == ("k", "v")
    assert tt.Layout("(q=k) h d").parts == ("q", "k")
    k, v = tt.split(np.arange(6), "(k=v) g d", g=2)
    assert np.array_equal(k, v)


def test_the_oracle_can_fail() -> None:
    wrong = [tuple(row) for row in tt.Layout("h (q|v|k) d").rows(h=2, d=3)]
    assert wrong != listing(next(p.rows for p in PACKINGS if p.number == "3"))
