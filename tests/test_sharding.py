"""What each rank holds, against vLLM's, Megatron's and flash-attention's own rules restated; and the laws of the maps."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import triptych as tt
from tests import sharding_oracle as oracle
from tests import strategies
from triptych import sharding
from triptych.errors import PlanError
from triptych.rowmap import ZERO
from triptych.sharding import EVEN, HEADS, REPLICATE, ROWS, Cut, Ranks, along, even, held, local, passage, vocab
from triptych.sizes import bind

H, D, DV = 48, 3, 5  # query heads that 1, 2, 3, 4, 8, 16 divide; head dims of k and of v differ
KV = (1, 2, 8)
TP = (1, 2, 3, 4, 8, 16)


def rows_by_label(text: str, **sizes: int) -> dict[tuple[str, int, int], int]:
    """Row of every (part, head, dim), from the slow listing."""
    return {(row.part, row.head, row.dim): i for i, row in enumerate(tt.Layout(text).rows(**sizes))}


def matrices(text: str, parts: tuple[str, ...] = ("q", "k", "v"), **sizes: int) -> list[np.ndarray]:
    """For every part its rows [heads * dims, 1], each the number of the row of the fused tensor that it is."""
    where = rows_by_label(text, **sizes)
    return [np.array([where[key] for key in sorted(k for k in where if k[0] == part)])[:, None] for part in parts]


def by_label(cut: Cut, ranks: Ranks, rank: int, parts: tuple[str, ...] = ("q", "k", "v")) -> list[np.ndarray]:
    """The same matrices for a rank, read from its own tensor with its own layout."""
    own = local(cut, ranks)
    assert own is not None
    mine = held(cut, ranks, rank)
    where = rows_by_label(str(own[0]), **own[1])
    return [np.array([mine[where[key]] for key in sorted(k for k in where if k[0] == part)])[:, None] for part in parts]


def refused(function: object, *args: object) -> bool:
    try:
        function(*args)
    except AssertionError:
        return True
    return False


FUSED = [
    "(q h|k g|v g) d",
    "g (q r|k|v) d",
    "(v g|q h|k g) d",
    "(q r g|k g|v g) d",
    "g d (q r|k|v)",
    "q h d|k g d|v g dv",
    "g (q r d|k d|v dv)",
]


@pytest.mark.parametrize(("kv", "tp"), [*itertools.product(KV, TP)])
@pytest.mark.parametrize("text", FUSED)
def test_fused_rows_are_those_of_vllm(text: str, kv: int, tp: int) -> None:
    sizes = bind(text, h=H, g=kv, d=D, **({"dv": DV} if "dv" in text else {}))
    cut = along(HEADS, 0, tt.Layout(text), sizes)
    q, k, v = matrices(text, **sizes)
    for rank in range(tp):
        if refused(oracle.vllm_qkv, q, k, v, H, kv, tp, rank):
            with pytest.raises(PlanError, match="kv heads cannot be shared by 3 ranks"):
                held(cut, Ranks(tp), rank)
            continue
        expected = oracle.vllm_qkv(q, k, v, H, kv, tp, rank)
        for mine, theirs in zip(by_label(cut, Ranks(tp), rank), expected, strict=True):
            assert np.array_equal(mine, theirs)
        if text == "(q h|k g|v g) d":  # and in vLLM's own order
            assert np.array_equal(held(cut, Ranks(tp), rank), np.concatenate(expected)[:, 0])


@pytest.mark.parametrize(("kv", "tp"), [*itertools.product(KV, TP)])
@pytest.mark.parametrize("policy", [REPLICATE, ROWS])
def test_separate_rows_are_those_of_vllm_or_raw(kv: int, tp: int, policy: str) -> None:
    """Apart, q, k and v are three column-parallel tensors; `rows` cuts k and v as any other, where there are too few heads."""
    for text, heads, dims in (("(q h d)", H, D), ("(k g d)", kv, D), ("(v g dv)", kv, DV)):
        cut = along(HEADS, 0, tt.Layout(text), {"h": H, "g": kv, "d": D, "dv": DV})
        whole = oracle.grid(heads * dims, 1)
        for rank in range(tp):
            if kv % tp and tp % kv and text != "(q h d)":
                with pytest.raises(PlanError, match="cannot be shared"):
                    held(cut, Ranks(tp, policy), rank)
                continue
            if text == "(q h d)":
                expected = oracle.vllm_column(whole, tp, rank)
            elif policy == REPLICATE or kv % tp == 0:
                expected = oracle.vllm_qkv(oracle.grid(H * D, 1), whole, whole, H, kv, tp, rank)[1]
            elif (heads * dims) % tp:
                with pytest.raises(PlanError, match="rows cannot be shared"):
                    held(cut, Ranks(tp, policy), rank)
                continue
            else:
                expected = oracle.megatron_column(whole, tp, rank)
            assert np.array_equal(held(cut, Ranks(tp, policy), rank)[:, None], expected)


@pytest.mark.parametrize(("kv", "tp"), [*itertools.product(KV, TP)])
def test_raw_rows_are_those_of_megatron(kv: int, tp: int) -> None:
    d = 16  # so that 16 ranks divide a group
    text = "g (q r|k|v) d"
    cut = along(HEADS, 0, tt.Layout(text), bind(text, h=H, g=kv, d=d))
    master = oracle.grid((H + 2 * kv) * d, 1)
    q, k, v = matrices(text, h=H, g=kv, d=d)
    for rank in range(tp):
        if refused(oracle.megatron_qkv, master, H, kv, tp, rank):
            with pytest.raises(PlanError, match="cannot be shared by 3 ranks"):
                held(cut, Ranks(tp, ROWS), rank)
            continue
        assert np.array_equal(held(cut, Ranks(tp, ROWS), rank)[:, None], oracle.megatron_qkv(master, H, kv, tp, rank))
        assert (local(cut, Ranks(tp, ROWS)) is None) == (kv < tp)
        if kv < tp:  # what a rank computes with after the gathering is what vLLM gives it at once
            shards = [held(cut, Ranks(tp, ROWS), r)[:, None] for r in range(tp)]
            for mine, theirs in zip(oracle.megatron_gathered(shards, H, kv, rank), oracle.vllm_qkv(q, k, v, H, kv, tp, rank), strict=True):
                assert np.array_equal(mine, theirs)


@pytest.mark.parametrize(("kv", "tp"), [*itertools.product((8, H), TP)])
def test_whole_heads_are_those_of_flash_attention(kv: int, tp: int) -> None:
    """It also divides unevenly, which no engine that we know loads: refused here."""
    text = "(q h|k g|v g) d"
    cut = along(HEADS, 0, tt.Layout(text), bind(text, h=H, g=kv, d=D))
    fused = oracle.grid((H + 2 * kv) * D, 1)
    for rank in range(tp):
        if kv % tp:
            continue
        assert np.array_equal(held(cut, Ranks(tp), rank)[:, None], oracle.flash_qkv(fused, H, kv, tp, rank))


@pytest.mark.parametrize("tp", TP)
def test_mlp_and_columns(tp: int) -> None:
    f, columns = 48, 48 * D
    gate_up = oracle.grid(2 * f, 1)
    for text in ("(gate|up) f", "(up|gate) f"):
        cut = along(EVEN, 0, tt.Layout(text), bind(text, f=f))
        for rank in range(tp):
            mine = held(cut, Ranks(tp), rank)[:, None]
            assert np.array_equal(mine, oracle.vllm_merged(gate_up, 2, tp, rank))
            assert np.array_equal(mine, oracle.flash_gated(gate_up, tp, rank))
    interleaved = along(EVEN, 0, tt.Layout("f (gate|up)"), {"f": f})
    weight = oracle.grid(7, columns)
    for rank in range(tp):
        pairs = oracle.vllm_column(gate_up.reshape(f, 2), tp, rank)
        assert np.array_equal(held(interleaved, Ranks(tp), rank), pairs.ravel())
        taken = weight[:, held(even(columns, 1), Ranks(tp), rank)]
        assert np.array_equal(taken, oracle.vllm_row(weight, tp, rank))
        assert np.array_equal(taken, oracle.megatron_column(weight, tp, rank, 1))
        assert np.array_equal(taken, oracle.flash_last(weight, tp, rank, D))


@pytest.mark.parametrize(("rows", "pad", "tp"), [(101, 64, 4), (101, 1, 1), (130, 64, 3), (64, 64, 8), (97, 16, 16), (3, 64, 2)])
def test_vocabulary(rows: int, pad: int, tp: int) -> None:
    for rank in range(tp):
        expected = oracle.vllm_vocab(oracle.grid(rows, 1), pad, tp, rank, ZERO)
        assert np.array_equal(held(vocab(rows), Ranks(tp, pad=pad), rank)[:, None], expected)
    assert sum((held(vocab(rows), Ranks(tp, pad=pad), rank) >= 0).sum() for rank in range(tp)) == rows


def test_a_vocabulary_that_does_not_divide_names_the_padding() -> None:
    with pytest.raises(PlanError, match="101 rows cannot be shared by 4 ranks") as error:
        held(vocab(101), Ranks(4), 0)
    assert error.value.fields["try"] == "--pad-vocab-to 4"


def test_heads_of_latent_attention_and_of_linear_attention() -> None:
    text = "h (k dn|v dv)"
    cut = along(HEADS, 0, tt.Layout(text), {"h": 6, "dn": 4, "dv": 3})
    assert np.array_equal(held(cut, Ranks(3), 1), np.arange(14, 28))
    text = "g (q dk|k dk|v r dv|z r dv)"
    cut = along(HEADS, 0, tt.Layout(text), bind(text, g=4, h=12, dk=2, dv=5))
    assert np.array_equal(held(cut, Ranks(2), 1), np.arange(2 * 34, 4 * 34))
    with pytest.raises(PlanError, match="4 heads of q cannot be shared by 8 ranks"):  # vLLM divides key heads, it never shares them
        held(cut, Ranks(8), 0)
    assert not sharding.has_heads(tt.Layout("(latent lat|rope dr)"))


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_blocks_of_one_rank_each(tp: int) -> None:
    """`t (...)`: four blocks in the file, any number of ranks; each rank's own tensor is one block, or the file as it is for one."""
    text = "t (q n r d|k n d|v n dv)"
    sizes = bind(text, t=4, g=8, h=32, d=D, dv=DV)
    cut = along(HEADS, 0, tt.Layout(text), sizes)
    q, k, v = matrices(text, **sizes)
    for rank in range(tp):
        for mine, theirs in zip(by_label(cut, Ranks(tp), rank), oracle.vllm_qkv(q, k, v, 32, 8, tp, rank), strict=True):
            assert np.array_equal(mine, theirs)
    rows = (32 + 8) * D + 8 * DV
    if tp == 4:
        assert np.array_equal(held(cut, Ranks(4), 1), np.arange(rows // 4, rows // 2))
    if tp == 1:
        assert np.array_equal(held(cut, Ranks(1), 0), np.arange(rows))
    with pytest.raises(PlanError, match="raw rows are cut only where every group's rows lie together"):
        held(cut, Ranks(16, ROWS), 0)


# Scales, one for each block of rows


MIMO = {"t": 4, "g": 8, "h": 64, "d": 192, "dv": 128}  # a block: 3072 rows of q, 384 of k, 256 of v


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_scales_go_with_their_blocks(tp: int) -> None:
    text = "t (q n r d|k n d|v n dv)"
    cut = along(HEADS, 0, tt.Layout(text), bind(text, **MIMO))
    rows = cut.rows
    assert rows == 4 * (3072 + 384 + 256)
    scales = Cut(HEADS, 0, cut.layout, cut.sizes, 128, rows)
    block_of = np.arange(rows) // 128
    for rank in range(tp):
        mine = held(scales, Ranks(tp), rank)
        assert len(mine) == oracle.vllm_block_scale_rows(len(held(cut, Ranks(tp), rank)), 128)
        for local_row, whole in enumerate(held(cut, Ranks(tp), rank)):
            assert mine[local_row // 128] == block_of[whole]


def test_scales_that_cross_a_boundary_are_refused() -> None:
    text = "t (q n r d|k n d|v n dv)"
    cut = along(HEADS, 0, tt.Layout(text), bind(text, **MIMO))
    scales = Cut(HEADS, 0, cut.layout, cut.sizes, 128, cut.rows)
    held(cut, Ranks(8), 1)  # the weight alone could
    with pytest.raises(PlanError, match="a block of 128 rows crosses a boundary") as error:
        held(scales, Ranks(8), 1)
    assert error.value.fields["where"] == "rank 1 of 8 holds rows 3264 to 3455: k, head 1, dim 0"
    assert error.value.fields["found"] == "row 3264 = 3200 + 64"


def test_blocks_that_begin_anew_in_every_part_of_the_file() -> None:
    """A block of 192 rows has two scales, the second for 64 rows: four parts have eight scales, not the six of 768 rows."""
    text = "t (q n r d|k n d|v n d)"
    cut = along(HEADS, 0, tt.Layout(text), bind(text, t=4, g=4, h=4, d=64))
    scales = Cut(HEADS, 0, cut.layout, cut.sizes, 128, 192)
    assert scales.rows == 8
    assert [held(scales, Ranks(4), rank).tolist() for rank in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert held(scales, Ranks(1), 0).tolist() == list(range(8))
    with pytest.raises(PlanError, match="crosses a boundary"):
        held(scales, Ranks(2), 0)


# From ranks to ranks


def moved(cut: Cut, before: Ranks, after: Ranks) -> list[list[int]]:
    """What each rank after holds of the whole, carried from the ranks before along the blocks of the passage."""
    found = passage(cut, before, after)
    old = [held(cut, before, rank) for rank in range(before.world)]
    out = []
    for taken in found.taken:
        rows = np.full(taken.rows, ZERO - 1)
        for block in taken.zeros:
            rows[block.out : block.out + block.rows] = ZERO
        for source, blocks in taken.blocks:
            for block in blocks:
                at, into = np.array([block.out]), np.array([block.into])
                for dim in block.dims:
                    at = (at[:, None] + np.arange(dim.size) * dim.out).ravel()
                    into = (into[:, None] + np.arange(dim.size) * dim.into).ravel()
                assert (rows[at] == ZERO - 1).all()
                rows[at] = old[source][into]
        out.append(rows.tolist())
    return out


PAIRS = [
    (Ranks(1, pad=24), Ranks(4, pad=8)),
    (Ranks(4, pad=8), Ranks(6, pad=48)),
    (Ranks(6, pad=6), Ranks(1)),
    (Ranks(8, ROWS, 16), Ranks(2, pad=2)),
    (Ranks(4, pad=4), Ranks(8, ROWS, 64)),
    (Ranks(2, pad=2), Ranks(12, pad=12)),
]


@pytest.mark.parametrize(("before", "after"), PAIRS)
@pytest.mark.parametrize("groups", [1, 2])
def test_from_any_ranks_to_any_others(before: Ranks, after: Ranks, groups: int) -> None:
    text = "g (q r|k|v) d"
    for cut in (along(HEADS, 0, tt.Layout(text), bind(text, g=groups, h=24, d=8)), even(48), vocab(50)):
        assert moved(cut, before, after) == [held(cut, after, rank).tolist() for rank in range(after.world)]


def test_what_ranks_have_in_common_is_named() -> None:
    text = "(q h|k g|v g) d"
    cut = along(HEADS, 0, tt.Layout(text), bind(text, h=8, g=2, d=D))
    found = passage(cut, Ranks(8), Ranks(1))
    assert [(twin.first, twin.second) for twin in found.twins] == [(0, 1), (0, 2), (0, 3), (4, 5), (4, 6), (4, 7)]
    for twin in found.twins:
        one, two = (held(cut, Ranks(8), rank) for rank in (twin.first, twin.second))
        assert sum(block.rows for block in twin.blocks) == 2 * D  # k and v
        for block in twin.blocks:
            assert one[block.into] == two[block.out]
    assert passage(cut, Ranks(2), Ranks(1)).twins == ()


def test_reshard_is_refused_where_heads_do_not_divide() -> None:
    text = "(q h|k g|v g) d"
    cut = along(HEADS, 0, tt.Layout(text), bind(text, h=24, g=4, d=D))
    with pytest.raises(PlanError, match="4 kv heads cannot be shared by 6 ranks") as error:
        passage(cut, Ranks(4), Ranks(6))
    assert error.value.fields["equation"] == "4 divides neither into 6 nor 6 into 4"
    cut = along(HEADS, 0, tt.Layout(text), bind(text, h=16, g=2, d=D))
    with pytest.raises(PlanError, match="16 heads of q cannot be shared by 6 ranks"):
        passage(cut, Ranks(4), Ranks(6))


@given(st.sampled_from(strategies.MHA + strategies.GQA + strategies.PARTIAL), st.sampled_from([1, 2, 3, 4, 6, 8, 12]))
def test_every_row_is_held_as_often_as_it_should_be(text: str, tp: int) -> None:
    layout = tt.Layout(text)
    sizes = {axis: {"h": 12, "g": 4, "t": 2, "m": 2, "n": 2, "r": 3, "d": 6, "c": 2, "p": 3, "u": 5}[axis] for axis in layout.axes}
    if layout.n_is_free or not {"g", "r", "n"} & set(layout.axes):
        sizes |= {"n": 5} if layout.n_is_free else {}
        sizes |= {"g": 12} if "g" in sizes else {}
    bound = bind(layout, **sizes)
    cut = along(HEADS, 0, layout, bound)
    heads = {name: part.shape[0] for part in sharding.parts(layout, bound) for name in part.path.names}
    fits = {name: n % tp == 0 or (name in "kv" and n < 12 and tp % n == 0) for name, n in heads.items()}
    if not all(fits.values()):
        with pytest.raises(PlanError, match="cannot be shared"):
            [held(cut, Ranks(tp), rank) for rank in range(tp)]
        return
    times = np.bincount(np.concatenate([held(cut, Ranks(tp), rank) for rank in range(tp)]), minlength=cut.rows)
    for part in sharding.parts(layout, bound):
        assert (times[part.rows()] == max(1, tp // part.shape[0])).all()
    own = local(cut, Ranks(tp))
    assert own is not None
    assert own[0].size(**own[1]) == len(held(cut, Ranks(tp), 0))


def test_a_cut_is_text_and_back() -> None:
    text = "m (q|v|k) n d"
    for cut in (
        along(HEADS, 1, tt.Layout(text), bind(text, m=4, n=2, d=3)),
        even(12),
        vocab(7),
        Cut(HEADS, 0, tt.Layout("h d"), bind("h d", h=4, d=64), 128, 256),
    ):
        assert sharding.cut_of(cut.to_dict()) == cut
    for damaged in (
        {"role": "odd"},
        {"axis": -1},
        {"axis": True},
        {"block": 0},
        {"block": 128, "period": 0},
        {"block": 128, "period": 5},
        {"sizes": {"f": 0}},
        {"layout": "("},
    ):
        with pytest.raises((TypeError, KeyError, tt.LayoutError)):
            sharding.cut_of({**even(12).to_dict(), **damaged})


def test_too_many_rows() -> None:
    with pytest.raises(PlanError, match="too many rows to divide one by one"):
        held(even(1 << 23), Ranks(2), 0)


def test_a_part_without_heads_is_refused() -> None:
    cut = along(HEADS, 0, tt.Layout("_ (q|k|v) h d|mlp x"), {"h": 4, "d": 2, "x": 6})
    with pytest.raises(PlanError, match="a part of a projection has no heads to divide"):
        held(cut, Ranks(2), 0)
