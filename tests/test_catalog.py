"""The catalog: every entry is sound, and `candidates` finds every layout that fits, the usual first, none twice."""

from __future__ import annotations

import itertools
from functools import cache

import pytest

import triptych as tt
from triptych.catalog import ROTATED, candidates, checked, entries

from .packings import PACKINGS

FREE = {"f": 11, "dk": 4, "dv": 9, "dn": 8, "dr": 13, "dl": 17}


@cache
def listed(layout: tt.Layout, sizes: tt.Sizes) -> tuple[tt.Row, ...]:
    return tuple(layout.rows(**{axis: sizes[axis] for axis in layout.axes}))


def known_for(layout: tt.Layout) -> dict[str, int]:
    """Sizes that determine the layout, no two equal: 6 kv heads in 2 blocks, 5 query heads each unless q and k are alike, dims 14."""
    used = set(layout.axes)
    known = {axis: FREE[axis] for axis in layout.axes if axis in FREE}
    if {"h", "g", "r", "t", "m", "n"} & used:
        known |= {"h": 6} if {"q", "k"} <= set(layout.parts) and "r" not in used and not {"h", "g"} <= used else {"g": 6, "r": 5}
    if {"t", "m"} & used:
        known |= {"t": 2}
    if layout.n_is_free:
        known |= {"n": 3, "p": 7}
    elif {"d", "p"} & used:
        known |= {"d": 14}
    return known


def texts(rows: int | None = None, **sizes: int) -> list[str]:
    return [str(c.layout) for c in candidates(rows, **sizes)]


@pytest.mark.parametrize("entry", entries(), ids=lambda e: str(e.layout))
def test_an_entry_is_found_from_its_rows_and_sizes(entry: object) -> None:
    layout = entry.layout  # type: ignore[attr-defined]
    known = known_for(layout)
    bound = tt.bind(layout, **known)
    rows = layout.size(**{axis: bound[axis] for axis in layout.axes})
    found = [c for c in candidates(rows, **known) if listed(c.layout, c.sizes) == listed(layout, bound)]
    assert len(found) == 1
    assert entries().index((found[0].layout, found[0].who)) <= entries().index((entry.layout, entry.who))  # type: ignore[attr-defined]


def test_the_usual_layouts_come_first() -> None:
    assert texts(384, h=4, d=32)[:2] == ["(q|k|v) h d", "h (q|k|v) d"]
    assert texts(6144, h=32, d=128)[:2] == ["(q h|k g|v g) d", "g (q r|k|v) d"]
    assert texts(6144, h=32, g=8)[:2] == ["(q h|k g|v g) d", "g (q r|k|v) d"]
    assert texts(8192, f=4096)[:3] == ["(gate|up) f", "f (gate|up)", "(up|gate) f"]
    assert texts(4096, h=32, d=128)[0] == "h d"
    assert texts(2048, g=8, h=32, d=128)[:2] == ["(k|v) g d", "g (k|v) d"]
    assert texts(h=6, dk=4, dv=9)[0] == "h (q dk|k dk|v dv)"


def test_sizes_are_completed_and_guessed() -> None:
    assert {str(c.sizes.of(c.layout)) for c in candidates(6144, h=32, d=128) if str(c.layout) == "g (q r|k|v) d"} == {"g=8 r=4 d=128"}
    grouped = [c.sizes["g"] for c in candidates(h=24, d=10) if str(c.layout) == "g (q r|k|v) d"]
    assert grouped == [8, 4, 2, 3, 6, 12]  # g=1 is (q h|k g|v g) d, g=24 is h (q|k|v) d
    assert [c.sizes["m"] for c in candidates(3 * 24 * 10, h=24, d=10) if str(c.layout) == "m (q|v|k) n d"] == [2, 3, 4, 6, 8, 12]
    first = itertools.takewhile(lambda c: str(c.layout) == "(q|k|v) h d", candidates(3 * 24 * 10))
    unknown = [c.sizes["d"] for c in first]
    assert unknown[:3] == [80, 48, 16]
    assert set(unknown) == {d for d in range(1, 241) if 240 % d == 0}
    partly = [(c.sizes["p"], c.sizes["n"]) for c in candidates(960, h=15, d=64) if str(c.layout) == "h (rot p c|pass n)"]
    assert partly == [(16, 32), (8, 48), (24, 16), (4, 56)]


@pytest.mark.parametrize("known", [{"h": 6, "d": 14}, {"h": 6, "g": 2, "d": 14}, {"h": 6, "g": 3, "p": 7, "t": 3}, {"f": 11}])
def test_no_two_candidates_put_every_label_on_the_same_row(known: dict[str, int]) -> None:
    listings = [listed(c.layout, c.sizes) for c in candidates(**known)]
    assert len(set(listings)) == len(listings) > 2


def test_every_candidate_fills_the_rows() -> None:
    for found in itertools.islice(candidates(420), 400):
        assert found.layout.size(**{a: found.sizes[a] for a in found.layout.axes}) == 420


def test_a_size_must_mean_something_to_the_layout() -> None:
    assert all("f" not in c.layout.axes for c in candidates(384, h=4))
    assert all("q" not in c.layout.parts for c in candidates(384, f=192))
    assert not any("dk" in c.layout.axes for c in candidates(384, h=4, d=32))
    assert "(q|k|v) h d" not in texts(h=32, g=8, d=128)  # one k head for each q head is not what the sizes say


def test_nothing_fits() -> None:
    assert texts(7, h=4, d=32) == []
    assert texts(h=4) == ["g (b r|a r)"] * 3  # the only one without dims


@pytest.mark.parametrize(
    ("known", "what"),
    [
        ({"head": 4}, "unknown axis"),
        ({"h": 0}, "positive whole number"),
        ({"h": 4.5}, "positive whole number"),
        ({"h": 6, "g": 4}, "multiple of g"),
        ({"t": 2, "m": 3}, "two sizes for one axis"),
    ],
)
def test_bad_sizes_are_errors(known: dict[str, int], what: str) -> None:
    with pytest.raises(tt.SizeError, match=what):
        checked(known)
    with pytest.raises(tt.SizeError, match=what):
        list(candidates(384, **known))


def test_the_usual_packings_are_in_the_catalog() -> None:
    """Those of one projection for attention or gate and up; the others are fusions with layers of their own."""
    known = {str(e.layout) for e in entries()}
    missing = {p.number for p in PACKINGS if str(tt.Layout(p.layout)) not in known}
    assert not missing & {str(n) for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 15, 19, 20, 36, 37, 38, 41, 42, 47)} - {
        "6",
        "16",
        "41",
        "47",
    }
    assert not missing & {"G1", "G2", "G3", "G5", "G6"}


def test_rotated_entries_keep_v() -> None:
    for text in ROTATED:
        layout = next(e.layout for e in entries() if e.who.startswith("rotary") and e.layout.axes[0] == tt.Layout(text).axes[0])
        by_part = {path.names[0]: path.dims for path in layout.paths}
        assert (by_part["q"], by_part["k"], by_part["v"]) == (("c", "p"), ("c", "p"), ("d",))
