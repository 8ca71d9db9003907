"""split, fuse, repack: values, views, dtypes, bit patterns, gradients, errors. The oracle is the slow listing or einops."""

from __future__ import annotations

import itertools
import pickle

import einops
import ml_dtypes
import numpy as np
import pytest
import torch

import triptych as tt
from triptych.rowmap import Digit, from_indices, parts

from .strategies import ALL, GQA, sizes_for


def gathered(tensor: torch.Tensor, layout: tt.Layout, part: str, axis: int, sizes: dict[str, int]) -> torch.Tensor:
    """[..., heads, dims, ...] of one part, picked row by row from the listing."""
    rows = [(row.head, row.dim, i) for i, row in enumerate(layout.rows(**sizes)) if row.part == part]
    heads, dims = max(r[0] for r in rows) + 1, max(r[1] for r in rows) + 1
    index = [i for _, _, i in sorted(rows)]
    return tensor.index_select(axis, torch.tensor(index)).unflatten(axis, (heads, dims))


@pytest.mark.parametrize(("axis", "batch"), [(-1, (2, 3)), (0, (5,)), (1, (2, 4))])
@pytest.mark.parametrize("text", ALL)
def test_split_and_fuse_against_the_listing(text: str, axis: int, batch: tuple[int, ...]) -> None:
    layout = tt.Layout(text)
    sizes = sizes_for(layout)
    place = axis % (len(batch) + 1)
    tensor = torch.randn(*batch[:place], layout.size(**sizes), *batch[place:])
    split = tt.split(tensor, layout, axis, **sizes)
    of_numpy = tt.split(tensor.numpy(), layout, axis, **sizes)
    for name, part, same in zip(layout.parts, split, of_numpy, strict=True):
        assert torch.equal(part, gathered(tensor, layout, name, place, sizes))
        assert np.array_equal(same, part.numpy())
        assert split[name] is part
    assert torch.equal(tt.fuse(split, layout, axis, **sizes), tensor)
    assert np.array_equal(tt.fuse(of_numpy, layout, axis, **sizes), tensor.numpy())
    out = torch.full_like(tensor, 7)
    assert tt.fuse(dict(zip(layout.parts, split, strict=True)), layout, axis, out, **sizes) is out
    assert torch.equal(out, tensor)


def test_einops_agrees() -> None:
    weight = torch.randn(4 * 3 * 5, 7)
    q, k, v = tt.split(weight, "h (q|k|v) d", axis=0, h=4)
    ours, theirs = torch.stack((q, k, v)), einops.rearrange(weight, "(h three d) i -> three h d i", three=3, h=4)
    assert torch.equal(ours, theirs)
    moved = einops.rearrange(weight, "(h three d) i -> (three h d) i", three=3, h=4)
    assert torch.equal(tt.repack(weight, "h (q|k|v) d", "(q|k|v) h d", axis=0, h=4), moved)


def one_stride(digits: tuple[Digit, ...]) -> bool:
    """Whether a number that counts through these digits steps evenly through the rows."""
    digits = tuple(digit for digit in digits if digit.size > 1)
    return all(a.stride == b.size * b.stride for a, b in itertools.pairwise(digits))


@pytest.mark.parametrize("axis", [-1, 0])
def test_split_is_a_view_exactly_where_a_view_exists(axis: int) -> None:
    seen = []
    for text in ALL:
        layout = tt.Layout(text)
        sizes = sizes_for(layout)
        rows = layout.size(**sizes)
        tensor = torch.randn(rows, 4) if axis == 0 else torch.randn(4, rows)
        split, of_numpy = tt.split(tensor, layout, axis, **sizes), tt.split(tensor.numpy(), layout, axis, **sizes)
        for part in parts(layout, tt.bind(layout, **sizes)):
            view = one_stride(part.heads) and one_stride(part.dims)
            for name in part.path.names:
                place = tensor.data_ptr() + part.start * tensor.stride(axis) * tensor.element_size()
                assert (split[name].data_ptr() == place) is view, (text, name)
                assert np.shares_memory(of_numpy[name], tensor.numpy()) is view, (text, name)
            seen.append(view)
    assert seen.count(True) > 50 and seen.count(False) > 20


def test_grouped_queries_are_a_copy_and_their_keys_a_view() -> None:
    tensor = torch.randn(2, 6 * (5 + 2) * 4)
    q, k, v = tt.split(tensor, "g (q r|k|v) d", g=6, r=5)
    storage = tensor.untyped_storage().data_ptr()
    assert [t.untyped_storage().data_ptr() == storage for t in (q, k, v)] == [False, True, True]


def test_order_of_parts_is_q_k_v() -> None:
    q, k, v = tt.split(torch.arange(4 * 3 * 2), "m (q|v|k) n d", m=4, n=1, d=2)
    assert (q[0, 0], k[0, 0], v[0, 0]) == (0, 4, 2)
    up, gate = torch.arange(6).view(2, 3)
    assert torch.equal(tt.split(torch.arange(6), "(up|gate) f")[0][0], gate) and torch.equal(
        tt.split(torch.arange(6), "(up|gate) f").up[0], up
    )


DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8, torch.int32,
          torch.int64, torch.bool, torch.complex64, torch.complex128]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_pattern_survives(dtype: torch.dtype) -> None:
    one, two = tt.Layout("g (q r|k|v) d"), tt.Layout("(q r g|k g|v g) p c")
    sizes = {"g": 3, "r": 5, "d": 8, "c": 2, "p": 4}
    rows, width = one.size(g=3, r=5, d=8), dtype.itemsize
    raw = torch.randint(0, 256, (rows, 6 * width), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    if dtype == torch.bool:
        raw %= 2
    raw[0] = 255 if dtype != torch.bool else 1  # a NaN with every payload bit set, for the floats
    tensor = raw.view(dtype)
    place = {row: i for i, row in enumerate(one.rows(g=3, r=5, d=8))}
    index = torch.tensor([place[row] for row in two.rows(g=3, r=5, p=4)])
    assert torch.equal(tt.repack(tensor, one, two, axis=0, **sizes).view(torch.uint8), raw[index])
    out = torch.zeros_like(tensor)
    tt.repack(tensor, one, two, axis=0, out=out, **sizes)
    assert torch.equal(out.view(torch.uint8), raw[index])
    back = tt.fuse(tt.split(tensor, one, axis=0, g=3, d=8), one, axis=0)
    assert torch.equal(back.view(torch.uint8), raw)


@pytest.mark.parametrize(
    "dtype", [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.float16, np.uint16, np.dtype(">f4"), np.complex128], ids=str
)
def test_numpy_bit_patterns(dtype: np.dtype) -> None:
    raw = np.random.default_rng(0).integers(0, 256, (2 * 3 * 5, 7 * np.dtype(dtype).itemsize), np.uint8)
    tensor = raw.view(dtype)
    index = np.arange(30).reshape(2, 3, 5).transpose(1, 0, 2).ravel()
    assert np.array_equal(tt.repack(tensor, "h (q|k|v) d", "(q|k|v) h d", axis=0, h=2).view(np.uint8), raw[index])


@pytest.mark.parametrize("target", GQA[1:])
def test_strided_input_and_strided_out(target: str) -> None:
    source = tt.Layout("(q h|k g|v g) d")
    sizes = {**sizes_for(source, tt.Layout(target)), "g": 6, "h": 30, "d": 14}
    rows = 42 * 14
    big = torch.randn(3, 2 * rows, 5)
    tensor = big[:, ::2].transpose(0, 2)
    expected = tt.repack(tensor.contiguous(), source, target, axis=1, **sizes)
    out = torch.zeros(5, 2, rows, 3)[:, 1].transpose(1, 2).transpose(1, 2)
    assert not out.is_contiguous() and not tensor.is_contiguous()
    assert torch.equal(tt.repack(tensor, source, target, axis=1, out=out, **sizes), expected)
    assert torch.equal(out, expected)


def test_gradients_flow() -> None:
    weight = torch.randn(6 * 7 * 4, 3, dtype=torch.float64, requires_grad=True)
    factor = torch.randn(6 * 7 * 4, 3, dtype=torch.float64)
    moved = tt.repack(weight, "g (q r|k|v) d", "(q h|k g|v g) d", axis=0, g=6, r=5)
    (moved * factor).sum().backward()
    assert torch.equal(weight.grad, tt.repack(factor, "(q h|k g|v g) d", "g (q r|k|v) d", axis=0, g=6, r=5))
    weight.grad = None
    q, k, v = tt.split(weight, "g (q r|k|v) d", axis=0, g=6, r=5)
    (tt.fuse((q * 2, k * 3, v * 5), "g (q r|k|v) d", axis=0) * factor).sum().backward()
    scale = tt.fuse((torch.full_like(q, 2), torch.full_like(k, 3), torch.full_like(v, 5)), "g (q r|k|v) d", axis=0)
    assert torch.equal(weight.grad, scale * factor)
    assert torch.autograd.gradcheck(
        lambda w: tt.repack(w, "(q|v) h d", "(q|k=0|v) h d", axis=0, h=3), weight[:24].detach().requires_grad_()
    )


def test_gradients_and_out_exclude_each_other() -> None:
    weight = torch.randn(12, 2, requires_grad=True)
    with pytest.raises(tt.LayoutError, match="gradients exclude each other"):
        tt.repack(weight, "h (q|k|v) d", "(q|k|v) h d", axis=0, h=2, out=torch.empty(12, 2))
    with torch.no_grad():
        tt.repack(weight, "h (q|k|v) d", "(q|k|v) h d", axis=0, h=2, out=torch.empty(12, 2))


def test_aliases_and_zeros() -> None:
    tensor = torch.randn(2 * 3 * 5, 4)
    shared = tt.split(tensor, "(q|k=v) h d", axis=0, h=3)
    assert shared.k is shared.v or torch.equal(shared.k, shared.v)
    assert torch.equal(tt.fuse({"q": shared.q, "v": shared.v}, "(q|k=v) h d", axis=0), tensor)
    full = tt.repack(tensor, "(q|k=v) h d", "h (q|k|v) d", axis=0, h=3)
    assert torch.equal(tt.split(full, "h (q|k|v) d", axis=0, h=3).v, shared.k)
    with pytest.raises(tt.LayoutError, match="k and v are one tensor"):
        tt.fuse({"q": shared.q, "k": shared.k, "v": shared.k + 1}, "(q|k=v) h d", axis=0)
    bias = torch.randn(2 * 3 * 5)
    with_zero = tt.repack(bias, "(q|v) h d", "h (q|k=0|v) d", h=3)
    q, k, v = tt.split(with_zero, "h (q|k|v) d", h=3)
    assert torch.equal(k, torch.zeros(3, 5)) and torch.equal(torch.cat((q.flatten(), v.flatten())), bias)
    assert torch.equal(tt.fuse({"q": q, "v": v}, "h (q|k=0|v) d"), with_zero)
    assert torch.equal(tt.fuse({"q": q, "v": v}, "h (q|k=0|v) d", out=torch.ones(45)), with_zero)
    assert torch.equal(tt.repack(with_zero, "h (q|k=0|v) d", "(q|v) h d", h=3), bias)
    with pytest.raises(tt.LayoutError, match="declares zero are not zero"):
        tt.repack(torch.ones(45), "h (q|k=0|v) d", "(q|v) h d", h=3)
    with pytest.raises(tt.LayoutError, match="declares zero are not zero"):  # a bit would be lost
        tt.repack(torch.tensor([1.0, -0.0, 2.0]), "(q|k=0|v) d", "(q|v) d", d=1)


def test_raw_index_lists() -> None:
    order = [5, 3, 0, 1, 2, 4]
    tensor = torch.randn(2, 6)
    assert torch.equal(tt.move(tensor, from_indices(order, 6), axis=1), tensor[:, order])
    many = torch.randperm(500).tolist()
    tensor = torch.randn(500, 3)
    assert torch.equal(tt.move(tensor, from_indices(many, 500)), tensor[many])
    assert np.array_equal(tt.move(tensor.numpy(), from_indices([-1, *many], 500)), np.concatenate([np.zeros((1, 3)), tensor.numpy()[many]]))


def test_parts_pickle_and_name_what_is_missing() -> None:
    split = tt.split(np.arange(12), "h (q|k|v) d", h=2)
    again = pickle.loads(pickle.dumps(split))
    assert np.array_equal(again.q, split.q) and again.names == ("q", "k", "v")
    with pytest.raises(AttributeError, match="no part 'z'; there are q, k, v"):
        _ = split.z


def test_a_part_with_the_name_of_a_method_of_tuples() -> None:
    split = tt.split(np.arange(6), "(count|index|names) d", d=2)
    assert [split[name].tolist() for name in split.names] == [[[0, 1]], [[2, 3]], [[4, 5]]]


def test_compile_and_vmap() -> None:
    tensor = torch.randn(3, 2, 24)
    q = torch.vmap(lambda x: tt.split(x, "h (q|k|v) d", h=4)[0])(tensor)
    assert torch.equal(q, tt.split(tensor, "h (q|k|v) d", h=4).q)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: tt.split(torch.randn(2, 13), "h (q|k|v) d", h=2), "no size of d gives 13 rows"),
        (lambda: tt.split(torch.randn(2, 12), "h (q|k|v) d", h=2, d=3), "rows do not fill the layout"),
        (lambda: tt.split(torch.randn(2, 12), "h (q|k|v) d", h=2, x=3), "unknown axis 'x'"),
        (lambda: tt.split(torch.randn(2, 12), "h (q|k|v) d", axis=2, h=2), "no such axis"),
        (lambda: tt.split(torch.randn(2, 12), "h (q|k|v) d", h=[2]), "must be a positive whole number"),
        (lambda: tt.fuse((torch.randn(2, 3), torch.randn(2, 3)), "h (q|k|v) d"), "another number of parts"),
        (lambda: tt.fuse({"q": torch.randn(2, 3)}, "h (q|k) d"), "parts do not match"),
        (lambda: tt.fuse({"q": torch.randn(2, 3), "k": torch.randn(2, 4)}, "h (q|k) d"), "a part does not fit"),
        (lambda: tt.fuse({"q": torch.randn(2, 3), "k": torch.randn(2, 3)}, "h (q|k) d", out=torch.empty(13)), "`out` does not fit"),
        (lambda: tt.fuse({}, "(k=0)"), "at least one part"),
        (lambda: tt.fuse((np.zeros((2, 3), "f4"), np.zeros((2, 3), "f8")), "h (q|k) d"), "parts have different dtypes"),
        (lambda: tt.fuse((torch.randn(2, 3), np.zeros((2, 3), "f4")), "h (q|k) d"), "parts have different dtypes"),
        (lambda: tt.repack(torch.randn(12), "h (q|k|v) d", "h (q|k) d", h=2), "do not label the same rows"),
        (
            lambda: tt.repack(torch.randn(12), "h (q|k|v) d", "(q|k|v) h d", h=2, out=torch.empty(12, dtype=torch.float64)),
            "`out` does not fit",
        ),
        (lambda: tt.move(torch.randn(12), from_indices([0], 11)), "the map does not fit"),
        (lambda: from_indices([0, 5], 5), "an index list holds row numbers"),
    ],
)
def test_bad_input_has_our_error(call: object, match: str) -> None:
    with pytest.raises(tt.LayoutError, match=match) as caught:
        call()  # type: ignore[operator]
    assert len(str(caught.value).splitlines()) <= 6


def test_out_may_not_overlap_its_source() -> None:
    tensor = torch.randn(12, 2)
    with pytest.raises(tt.LayoutError, match="shares memory"):
        tt.repack(tensor, "h (q|k|v) d", "(q|k|v) h d", axis=0, h=2, out=tensor)


def test_another_axis_that_fits_is_named() -> None:
    weight = np.arange(60).reshape(12, 5)
    for call in (lambda: tt.repack(weight, "h (q|k|v) d", "(q|k|v) h d", h=2), lambda: tt.split(weight, "h (q|k|v) d", h=2)):
        with pytest.raises(tt.SizeError) as caught:
            call()
        assert caught.value.fields["try"] == "axis=0: its 12 rows fit"
    with pytest.raises(tt.SizeError) as caught:
        tt.split(weight, "h (q|k|v) d", h=7)
    assert "axis" not in str(caught.value.fields.get("try"))


def test_a_list_is_no_tensor() -> None:
    with pytest.raises(tt.LayoutError, match="no tensor"):
        tt.split([1, 2, 3], "(q|k|v) d")
