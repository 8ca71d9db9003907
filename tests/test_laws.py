"""Laws that hold for every layout and every ordered pair, against the slow listing."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import triptych as tt
from triptych.rowmap import between, from_indices, parts

from .strategies import ALL, GQA, MHA, OTHER, PARTIAL, bound_sizes, random_layouts, sizes_for

PAIRS = [pair for group in (MHA, GQA, PARTIAL[:4]) for pair in itertools.permutations(group, 2)]
PAIRS += [(a, b) for a, b in itertools.permutations(OTHER, 2) if sorted(tt.Layout(a).parts) == sorted(tt.Layout(b).parts)]


def listing(layout: tt.Layout, sizes: dict[str, int]) -> list[tt.Row]:
    return layout.rows(**{axis: sizes[axis] for axis in layout.axes})


def expected_indices(a: tt.Layout, b: tt.Layout, sizes: dict[str, int]) -> list[int]:
    place = {row: i for i, row in enumerate(listing(a, sizes))}
    return [place[row] for row in listing(b, sizes)]


def test_there_are_enough_layouts_and_pairs() -> None:
    assert len(set(ALL)) >= 40
    assert len(PAIRS) > 300


@pytest.mark.parametrize("text", ALL)
def test_sizes_hide_no_error(text: str) -> None:
    layout = tt.Layout(text)
    sizes = sizes_for(layout)
    told = [sizes[a] for a in layout.axes if a not in ("c", "t", "m")]
    assert len(set(told)) == len(told)


@pytest.mark.parametrize("text", ALL)
def test_listing_is_a_bijection_and_parts_agree(text: str) -> None:
    layout = tt.Layout(text)
    sizes = sizes_for(layout)
    rows = layout.rows(**sizes)
    assert len(set(rows)) == len(rows) == layout.size(**sizes)
    for part in parts(layout, tt.bind(layout, **sizes)):
        where = part.rows()
        for head, dim in itertools.product(range(part.shape[0]), range(part.shape[1])):
            assert rows[where[head, dim]] == (part.path.names[0], head, dim)


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_every_pair_at_every_index(a: str, b: str) -> None:
    one, two = tt.Layout(a), tt.Layout(b)
    sizes = sizes_for(one, two)
    rows = between(one, two, tt.bind(one, two, **sizes))
    expected = expected_indices(one, two, sizes)
    assert rows.indices.tolist() == expected
    assert sum(block.rows for block in rows.blocks) == len(expected)
    assert rows.invert() == between(two, one, tt.bind(one, two, **sizes))
    assert rows.then(rows.invert()).is_identity
    assert from_indices(expected, len(expected)) == rows
    assert [i + k for _, i, n in rows.runs.tolist() for k in range(n)] == expected


@given(st.data())
def test_random_pairs_at_random_sizes(data: st.DataObject) -> None:
    one, two = (tt.Layout(text) for text in data.draw(st.sampled_from(PAIRS)))
    sizes = data.draw(bound_sizes(one, two))
    rows = between(one, two, tt.bind(one, two, **sizes))
    expected = expected_indices(one, two, sizes)
    assert rows.indices.tolist() == expected
    tensor = torch.randint(-128, 127, (3, len(expected), 2), dtype=torch.int8)
    assert torch.equal(tt.repack(tensor, one, two, 1, **sizes), tensor[:, expected])


@given(random_layouts(), st.data())
def test_random_layouts(layout: tt.Layout, data: st.DataObject) -> None:
    assert tt.Layout(str(layout)) == layout
    numbers = data.draw(st.permutations(range(1, 7)))
    sizes = {axis: 2 if axis == "c" else numbers[i] for i, axis in enumerate(layout.axes)}
    rows = layout.rows(**sizes)
    assert len(set(rows)) == len(rows) == layout.size(**sizes)
    tensor = np.arange(2 * len(rows)).reshape(2, len(rows))
    split = tt.split(tensor, layout, **sizes)
    for name, part in zip(layout.parts, split, strict=True):
        for i, row in enumerate(rows):
            if row.part == name:
                assert (part[:, row.head, row.dim] == tensor[:, i]).all()
    assert np.array_equal(tt.fuse(split, layout, **sizes), tensor)


@given(st.data())
def test_maps_compose(data: st.DataObject) -> None:
    a, b, c = (tt.Layout(text) for text in data.draw(st.permutations(GQA).map(lambda x: x[:3])))
    sizes = tt.bind(a, b, c, **data.draw(bound_sizes(a, b, c)))
    assert between(a, b, sizes).then(between(b, c, sizes)) == between(a, c, sizes)


@given(st.permutations(range(9)), st.permutations(range(9)))
def test_index_lists_are_a_group(one: list[int], two: list[int]) -> None:
    a, b = from_indices(one, 9), from_indices(two, 9)
    assert a.then(b).indices.tolist() == [one[i] for i in two]
    assert a.then(a.invert()).is_identity
    assert a.invert().invert() == a


@pytest.mark.parametrize("text", ALL)
def test_one_unknown_is_solved(text: str) -> None:
    layout = tt.Layout(text)
    sizes = sizes_for(layout)
    full = tt.bind(layout, **sizes)
    for axis in layout.axes:
        if axis == "c":
            continue
        known = {k: v for k, v in sizes.items() if k != axis}
        solved = tt.bind(layout, rows=layout.size(**sizes), **known)
        assert all(solved[a] == full[a] for a in layout.axes), axis


@pytest.mark.parametrize(("a", "b"), [("(q g r|k g|v g) d", "(q h|k g|v g) d"), ("(q h|k g|v g) d", "g (q r|k|v) d")])
def test_two_spellings_of_one_model(a: str, b: str) -> None:
    sizes = tt.bind(a, b, h=30, g=6, d=14)
    one, two = tt.Layout(a), tt.Layout(b)
    same = between(one, two, sizes).is_identity
    assert same is (b == "(q h|k g|v g) d")


def test_mqa_is_mha_with_one_kv_head() -> None:
    one, two = tt.Layout("(q h|k|v) d"), tt.Layout("(q h|k g|v g) d")
    assert between(one, two, tt.bind(one, two, h=7, g=1, d=4)).is_identity
    with pytest.raises(tt.IncompatibleError, match="do not label the same rows"):
        between(one, two, tt.bind(one, two, h=6, g=2, d=4))
