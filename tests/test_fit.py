"""fit: the row labels of a layout give the layout back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.strategies import ALL, bound_sizes, random_layouts
from triptych import catalog
from triptych.layout import Layout, Row
from triptych.live.fit import _built, _grids, fit
from triptych.sizes import bind

SIZES = {"h": 6, "g": 2, "r": 3, "t": 2, "d": 8, "c": 2, "p": 4, "dk": 5, "dv": 7, "dn": 11, "dr": 4, "dl": 9, "f": 13, "n": 10}
BLOCKS = {"t": 2, "n": 3, "r": 5, "d": 8, "c": 2, "p": 4}
KNOWN = [entry.layout for entry in catalog.entries() if "=" not in str(entry.layout)]


def labels(layout: Layout) -> list[Row]:
    blocks = "t" in layout.axes or "m" in layout.axes
    sizes = {axis: (BLOCKS if blocks else SIZES)[{"m": "t"}.get(axis, axis)] for axis in layout.axes}
    return layout.rows(**bind(layout, **sizes))


def test_sizes_are_all_different() -> None:
    assert len({SIZES[a] for a in ("h", "g", "r", "d", "dk", "dv", "dn", "dr", "dl", "f")}) == 10 and len(set(BLOCKS.values())) == 5


@pytest.mark.parametrize("layout", KNOWN, ids=str)
def test_every_known_layout_is_found_again(layout: Layout) -> None:
    rows = labels(layout)
    found = fit(rows)
    assert found is not None
    assert found.layout.rows(**found.sizes) == rows
    if layout.parts != ("",) and "t" not in layout.axes:
        assert found.layout == layout


@pytest.mark.parametrize(
    "text",
    [
        "h (q|k|v) d",
        "(q|k|v) h d",
        "g (q r|k|v) d",
        "t (k n|q n r|v n) d",
        "g (q r|gate r|k|v) d",
        "_ g (q r|k|v) d|gate h",
        "h d (q|k|v)",
        "(q|k|v) d h",
        "(k|v) h d",
        "f (gate|up)",
        "(v h|q h|k g) d",
    ],
)
def test_the_general_search_needs_no_list(text: str) -> None:
    rows = labels(Layout(text))
    grids = _grids(rows)
    assert grids is not None
    found = _built(grids, len(rows))
    assert found is not None and found.layout.rows(**found.sizes) == rows


@settings(max_examples=60)
@given(st.data())
def test_what_is_found_says_the_same(data: st.DataObject) -> None:
    layout = data.draw(st.one_of(st.sampled_from(ALL).map(Layout), random_layouts().filter(lambda layout: "x" not in layout.axes)))
    rows = layout.rows(**data.draw(bound_sizes(layout)))
    found = fit(rows)
    assert found is None or found.layout.rows(**found.sizes) == rows


def test_a_tensor_in_two_roles() -> None:
    found = fit([Row("k=v", head, dim) for head in range(3) for dim in range(5)])
    assert found is not None and str(found.layout) == "(k=v) h d"


def test_a_scrambled_map_has_no_layout() -> None:
    rows = labels(Layout("h (q|k|v) d"))
    order = np.random.default_rng(0).permutation(len(rows))
    assert fit([rows[i] for i in order]) is None
    rows[0], rows[1] = rows[1], rows[0]
    assert fit(rows) is None


def test_a_label_that_stands_twice_has_no_layout() -> None:
    assert fit([Row("q", 0, 0), Row("q", 0, 0)]) is None
    assert fit([Row("q", 0, 0), Row("q", 0, 2)]) is None
