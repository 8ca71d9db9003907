"""Diagnose: found by value, named by layout, mended by the printed lines; and nothing claimed that is not so."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tracemalloc
from collections.abc import Sequence

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import triptych as tt
from triptych.live.diagnose import Diagnosis

MHA = (
    "(q|k|v) h d",
    "h (q|k|v) d",
    "h d (q|k|v)",
    "t (q|k|v) n d",
    "m (q|v|k) n d",
    "(q|k|v) d h",
    "(k|v|q) h d",
    "h (v|k|q) d",
    "q h p c|k h p c|v h d",
    "h (q p c|k p c|v d)",
    "(q|k|v) h p c",
)
GQA = (
    "(q h|k g|v g) d",
    "g (q r|k|v) d",
    "t (q n r|k n|v n) d",
    "(q r g|k g|v g) d",
    "g (k|v|q r) d",
    "(k g|q h|v g) d",
    "q h p c|k g p c|v g d",
    "g (q r p c|k p c|v d)",
)
SIZES = {"t": 2, "m": 2, "n": 3, "g": 6, "r": 5, "h": 30, "d": 14, "c": 2, "p": 7}
ALONE = ("h d", "h p c", "r g d")
KV = ("(k|v) g d", "g (k|v) d", "g d (k|v)", "(v|k) g d")
MLP = ("(gate|up) f", "f (gate|up)", "(up|gate) f", "f (up|gate)")
SMALL_MHA = SIZES | {"h": 6, "r": 1}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def order(a: str, b: str, sizes: dict[str, int]) -> list[int]:
    """For every row laid out as `a`, the same row laid out as `b`: from the slow listings."""
    ours, theirs = ([tuple(row) for row in tt.Layout(text).rows(**pick(text, sizes))] for text in (a, b))
    at = {label: row for row, label in enumerate(theirs)}
    return [at[label] for label in ours]


def pick(text: str, sizes: dict[str, int]) -> dict[str, int]:
    return {axis: sizes[axis] for axis in tt.Layout(text).axes}


def laid_out(tensor: Tensor, a: str, b: str, sizes: dict[str, int], axis: int = 0) -> Tensor:
    """Rows laid out as `a`, laid out as `b`."""
    return tensor.index_select(axis, torch.tensor(order(b, a, sizes)))


def mended(found: Diagnosis, b: Tensor, **more: object) -> Tensor:
    names: dict[str, object] = {"torch": torch, "b": b, "diagnosis": found, **more}
    exec(found.fix, names)
    result = names["b"]
    assert isinstance(result, Tensor)
    return result


def same_map(found: Diagnosis, expected: Sequence[int]) -> bool:
    return found.indices.tolist() == list(expected)


PAIRS = [
    *((a, b, SMALL_MHA, {"h": 6, "d": 14}) for a, b in itertools.permutations(MHA, 2)),
    *((a, b, SIZES, {"h": 30, "g": 6, "d": 14}) for a, b in itertools.permutations(GQA, 2)),
    *((a, b, SIZES, {"h": 30, "g": 6, "d": 14}) for a, b in itertools.permutations(ALONE, 2)),
    *((a, b, SIZES, {"g": 6, "d": 14}) for a, b in itertools.permutations(KV, 2)),
    *((a, b, {"f": 11}, {}) for a, b in itertools.permutations(MLP, 2)),
]


@pytest.mark.parametrize("group", range(10))
def test_every_pair_of_known_layouts_is_found_and_mended(group: int) -> None:
    """The map is that of the slow listings; the layouts named give that map; the lines give `a` back bit for bit."""
    for a, b, sizes, known in PAIRS[group::10]:
        expected = order(a, b, sizes)
        if expected == sorted(expected):
            continue
        one = random(len(expected), 9)
        two = laid_out(one, a, b, sizes)
        found = tt.diagnose(one, two, **known)
        assert same_map(found, expected), (a, b)
        assert (found.matched, found.total) == (len(expected), len(expected))
        assert found.kind in ("layout", "rotary", "heads", "parts swapped")
        assert found.sizes is not None
        assert order(str(found.layout_a), str(found.layout_b), {**found.sizes, "m": 2, "c": 2, "p": 7}) == expected
        assert torch.equal(mended(found, two), one), (a, b, found.fix)


@pytest.mark.parametrize(
    ("a", "b", "kind"),
    [
        ("h (q|k|v) d", "(q|k|v) h d", "layout"),
        ("(q|k|v) h d", "(q|k|v) d h", "layout"),
        ("(q|k|v) h d", "(k|v|q) h d", "parts swapped"),
        ("h (q|k|v) d", "h (v|k|q) d", "parts swapped"),
        ("q h p c|k h p c|v h d", "(q|k|v) h d", "rotary"),
        ("h (q|k|v) d", "h (q p c|k p c|v d)", "rotary"),
        ("q h p c|k h p c|v h d", "h (q|k|v) d", "layout"),
    ],
)
def test_the_kind_says_what_is_exchanged(a: str, b: str, kind: str) -> None:
    one = random(3 * 6 * 14, 5)
    assert tt.diagnose(one, laid_out(one, a, b, SMALL_MHA), h=6, d=14).kind == kind


def test_tiled_heads() -> None:
    one = random((30 + 12) * 14, 5)
    found = tt.diagnose(one, laid_out(one, "(q h|k g|v g) d", "(q r g|k g|v g) d", SIZES), h=30, g=6, d=14)
    assert (found.kind, str(found.layout_b)) == ("heads", "(q r g|k g|v g) d")
    query = random(30 * 14, 5)
    found = tt.diagnose(laid_out(query, "h d", "r g d", SIZES), query, h=30, g=6, d=14)
    assert (found.kind, str(found.layout_a), str(found.layout_b)) == ("heads", "r g d", "h d")


def test_rotary_layouts_are_spelled_side_by_side() -> None:
    one = random(6 * 14, 5)
    found = tt.diagnose(one, laid_out(one, "h d", "h p c", SMALL_MHA), h=6, d=14)
    assert (found.kind, str(found.layout_a), str(found.layout_b)) == ("rotary", "h c p", "h p c")


def test_partial_rotary() -> None:
    sizes = {"h": 3, "p": 4, "c": 2, "n": 8}
    one = random(3 * 16, 5)
    found = tt.diagnose(one, laid_out(one, "h (rot c p|pass n)", "h (rot p c|pass n)", sizes), h=3, d=16)
    assert (found.kind, str(found.layout_a), str(found.layout_b)) == ("rotary", "h (rot c p|pass n)", "h (rot p c|pass n)")
    assert torch.equal(mended(found, laid_out(one, "h (rot c p|pass n)", "h (rot p c|pass n)", sizes)), one)


# -- the puzzle ------------------------------------------------------------------------------------------------------


def puzzle(
    heads: int = 4, size: int = 32, batch: int = 2, seq: int = 5, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """(query by head from the fused activation, query from the first third of the weight, the fused weight)."""
    width = heads * size
    weight, bias = (random(3 * width, width, seed=1) / width**0.5).to(dtype), random(3 * width, seed=2).to(dtype)
    x = random(batch, seq, width, seed=3).to(dtype)
    q, _, _ = F.linear(x, weight, bias).view(batch, seq, heads, 3 * size).split(size, dim=-1)
    manual = F.linear(x, weight.chunk(3)[0], bias.chunk(3)[0]).view(batch, seq, heads, size)
    return q, manual, weight


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_puzzle(dtype: torch.dtype) -> None:
    q, manual, weight = puzzle(dtype=dtype)
    found = tt.diagnose(q, manual)
    assert (found.kind, found.matched, found.total) == ("partly", 64, 128)
    assert (str(found.layout_a), found.part_a) == ("h (q|k|v) d", "q")
    assert (str(found.layout_b), found.part_b) == ("(q|k|v) h d", "q")
    assert found.indices.tolist() == [*range(32), *range(96, 128), *[-1] * 64]
    by_head = [row for row, label in enumerate(tt.Layout("h (q|k|v) d").rows(h=4, d=32)) if label.part == "q"]
    assert torch.equal(mended(found, manual, weight=weight), weight[by_head])


def test_the_puzzle_in_print() -> None:
    q, manual, _ = puzzle()
    assert str(tt.diagnose(q, manual)) == (
        "partly: 64 of 128 rows are shared\n"
        "  a        part q of h (q|k|v) d   with h=4 d=32   (GPT-NeoX, BLOOM, Persimmon, Megatron v2+)\n"
        "  b        part q of (q|k|v) h d   with h=4 d=32   (GPT-2, MPT, ViT, nn.MultiheadAttention)\n"
        "  rows     64-127 of a have no partner\n"
        "  try      b = weight.view(4, 3, 32, -1)[:, 0].reshape(128, -1)  # as a reads it\n"
        "           a = weight[:128]  # as b reads it"
    )


@pytest.mark.parametrize("known", [{}, {"h": 4}, {"d": 32}, {"h": 4, "d": 32}])
def test_the_puzzle_with_rows_in_one_axis(known: dict[str, int]) -> None:
    q, manual, _ = puzzle()
    found = tt.diagnose(q.flatten(-2), manual.flatten(-2), **known)
    assert (found.kind, str(found.layout_a), str(found.layout_b)) == ("partly", "h (q|k|v) d", "(q|k|v) h d")


def test_the_puzzle_for_one_token() -> None:
    """A row is then a single value: some agree by chance, and the two computations round differently."""
    q, manual, _ = puzzle(batch=1, seq=1)
    found = tt.diagnose(q, manual)
    assert (found.kind, found.matched, str(found.layout_a), str(found.layout_b)) == ("partly", 64, "h (q|k|v) d", "(q|k|v) h d")


def test_the_puzzle_at_another_size() -> None:
    q, manual, _ = puzzle(heads=12, size=20)
    found = tt.diagnose(q, manual)
    assert (found.kind, found.matched, str(found.layout_a), str(found.layout_b)) == ("partly", 80, "h (q|k|v) d", "(q|k|v) h d")


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_readings_of_grouped_heads(part: str) -> None:
    """One fused tensor read as Falcon's and as Phi-3's: every part shares some rows with its other reading."""
    fused = random(7, (30 + 12) * 14)
    one, two = (tt.split(fused, text, h=30, g=6, d=14)[part] for text in ("g (q r|k|v) d", "(q h|k g|v g) d"))
    found = tt.diagnose(one, two, h=30, g=6, d=14)
    assert (found.kind, found.part_a, found.part_b) == ("partly", part, part)
    assert {str(found.layout_a), str(found.layout_b)} == {"g (q r|k|v) d", "(q h|k g|v g) d"}
    if part == "v":  # the last head of v alone is in the same place: it may be the one way or the other
        assert found.also == ("a part v of g (q r|k|v) d, b part v of (q h|k g|v g) d, g=6 r=5 d=14 h=30",)
    else:
        assert (str(found.layout_a), found.also) == ("g (q r|k|v) d", ())
    rows = [[i for i, label in enumerate(tt.Layout(text).rows(**pick(text, SIZES))) if label.part == part] for text in (GQA[1], GQA[0])]
    assert same_map(found, [rows[1].index(row) if row in rows[1] else -1 for row in rows[0]])


def test_a_part_against_the_whole() -> None:
    fused = random(7, 384)
    found = tt.diagnose(fused, tt.split(fused, "h (q|k|v) d", h=4).k.flatten(-2), h=4, d=32)
    assert (found.kind, found.matched, found.total, found.part_a, found.part_b) == ("partly", 128, 384, None, "k")
    assert str(found.layout_a) == str(found.layout_b) == "h (q|k|v) d"


def test_the_answer_once_accepted() -> None:
    """view(b, s, 3 * d, heads) has the right set of rows in every token, and every head has the wrong ones."""
    _, manual, _ = puzzle()
    mend = manual.reshape(2, 5, 32, 4).transpose(-1, -2)
    assert torch.equal(mend.flatten(-2).sort(-1).values, manual.flatten(-2).sort(-1).values)
    found = tt.diagnose(mend, manual)
    assert (found.kind, found.fix) == ("transposed", "b = b.reshape(2, 5, 32, 4).transpose(2, 3)")
    assert torch.equal(mended(found, manual), mend)
    scrambled = tt.diagnose(mend.flatten(-2), manual.flatten(-2), h=4, d=32)
    assert (scrambled.kind, str(scrambled.layout_a), str(scrambled.layout_b)) == ("layout", "(q|k|v) d h", "(q|k|v) h d")


# -- orientation and shape -------------------------------------------------------------------------------------------


def test_transposed() -> None:
    one = random(84, 20)
    found = tt.diagnose(one, one.T)
    assert (found.kind, found.fix) == ("transposed", "b = b.T")
    square = random(24, 24)
    assert tt.diagnose(square, square.T).kind == "transposed"
    x = random(2, 5, 6, 14)
    for other in (x.transpose(1, 2), x.permute(2, 0, 1, 3), x.reshape(2, 6, 5, 14).transpose(1, 2)):
        found = tt.diagnose(x, other)
        assert found.kind == "transposed"
        assert torch.equal(mended(found, other), x)


def test_a_view_instead_of_a_transpose() -> None:
    x = random(2, 5, 6, 14)
    right, wrong = x.transpose(1, 2), x.reshape(2, 6, 5, 14)
    found = tt.diagnose(right, wrong)
    assert (found.kind, found.fix) == ("transposed", "b = b.reshape(2, 5, 6, 14).transpose(1, 2)")
    assert torch.equal(mended(found, wrong), right)


def test_another_layout_and_the_other_orientation() -> None:
    one = random(3 * 6 * 14, 20)
    two = laid_out(one, "h (q|k|v) d", "(q|k|v) h d", SMALL_MHA).T
    found = tt.diagnose(one, two, h=6, d=14)
    assert (found.kind, str(found.layout_a), str(found.layout_b)) == ("layout", "h (q|k|v) d", "(q|k|v) h d")
    assert "rows and columns exchanged" in str(found)
    assert torch.equal(mended(found, two), one)
    assert torch.equal(mended(tt.diagnose(two, one, h=6, d=14), one), two)


@pytest.mark.parametrize("shape", [(3 * 6 * 14,), (2, 5, 3 * 6 * 14), (20, 3 * 6 * 14), (3, 3 * 6 * 14, 4), (2, 5, 18, 14)])
def test_rows_are_found_on_every_axis(shape: tuple[int, ...]) -> None:
    """Biases, activations with rows in one axis or two, and stacks of expert weights."""
    axis = -1 if len(shape) != 3 or shape[1] == 5 else 1
    one = random(*shape)
    flat = one.flatten(-2) if len(shape) == 4 else one
    two = laid_out(flat, "h (q|k|v) d", "(q|k|v) h d", SMALL_MHA, axis=flat.ndim - 1 if axis == -1 else axis).reshape(shape)
    found = tt.diagnose(one, two, h=6, d=14)
    assert (found.kind, str(found.layout_a), str(found.layout_b)) == ("layout", "h (q|k|v) d", "(q|k|v) h d")
    assert torch.equal(mended(found, two), one)


def test_the_same_values_in_another_shape() -> None:
    x = random(2, 5, 6, 14)
    found = tt.diagnose(x, x.flatten(-2))
    assert (found.kind, found.equal, found.fix) == ("shape", False, "b = b.reshape(2, 5, 6, 14)")
    assert torch.equal(mended(found, x.flatten(-2)), x)


def test_nothing_in_common() -> None:
    found = tt.diagnose(random(84, 20), random(7, 11))
    assert (found.kind, found.matched) == ("different", 0)
    assert "no samples in common" in str(found)


# -- rounding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(3 * 6 * 14, 20), (3 * 6 * 14,)])
def test_one_side_rounded(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    one = random(*shape)
    two = laid_out(one, "h (q|k|v) d", "(q|k|v) h d", SMALL_MHA).to(dtype)
    for x, y, layout in ((one, two, "h (q|k|v) d"), (two, one, "(q|k|v) h d")):
        found = tt.diagnose(x, y, h=6, d=14)
        assert (found.kind, str(found.layout_a), found.matched) == ("layout", layout, 252)
    assert tt.diagnose(one, one.to(dtype)).equal


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_the_finer_side_is_rounded_before_it_is_compared(dtype: object) -> None:
    """So that a rounded copy matches exactly, and biases of few digits stay apart: on NumPy arrays and torch tensors alike."""
    one = np.random.default_rng(0).standard_normal(252, dtype=np.float32)
    two = one[order("(q|k|v) h d", "h (q|k|v) d", SMALL_MHA)].astype(dtype)
    for x, y in ((one, two), (two, one), (torch.from_numpy(one), two)):
        assert (tt.diagnose(x, y, h=6, d=14).kind, tt.diagnose(x, y, h=6, d=14).difference) == ("layout", 0)


def test_rounding_that_the_dtype_does_not_show() -> None:
    one = random(3 * 6 * 14, 20)
    two = laid_out(one, "h (q|k|v) d", "(q|k|v) h d", SMALL_MHA).bfloat16().float()
    assert tt.diagnose(one, two, h=6, d=14).kind == "layout"
    assert tt.diagnose(one, one.bfloat16().float()).equal
    whole = torch.arange(84.0)[:, None] + torch.zeros(20)
    assert not tt.diagnose(whole, whole + torch.full((84, 20), 1e-3)).equal  # small whole numbers are not bfloat16


@pytest.mark.parametrize(("shape", "layout"), [((2, 5), "g (q r|k|v) d"), ((1, 1), "g (q r|k|v) d")])
def test_another_order_of_summation(shape: tuple[int, int], layout: str) -> None:
    """The same projection summed in float32 over two halves and at once: no element need be equal."""
    weight, x = random((30 + 12) * 14, 64), random(*shape, 64, seed=4)
    moved = laid_out(weight, layout, "(q h|k g|v g) d", SIZES)
    one = F.linear(x, weight)
    two = sum(F.linear(x[..., i : i + 4], moved[:, i : i + 4]) for i in range(0, 64, 4))
    assert isinstance(two, Tensor)
    assert not torch.equal(laid_out(two, "(q h|k g|v g) d", layout, SIZES, axis=-1), one)
    found = tt.diagnose(one, two, h=30, g=6, d=14)
    assert (found.kind, str(found.layout_a), str(found.layout_b)) == ("layout", layout, "(q h|k g|v g) d")
    assert 0 < found.difference < 1e-4


def test_both_sides_computed_in_bfloat16() -> None:
    weight, x = random(252, 64).bfloat16(), random(2, 5, 64, seed=4).bfloat16()
    moved = laid_out(weight, "h (q|k|v) d", "(q|k|v) h d", SMALL_MHA)
    found = tt.diagnose(F.linear(x, weight), (x.float() @ moved.float().T).bfloat16(), h=6, d=14)
    assert (found.kind, str(found.layout_a)) == ("layout", "h (q|k|v) d")


def test_a_tolerance_for_more() -> None:
    one = random(252, 20)
    two = laid_out(one, "h (q|k|v) d", "(q|k|v) h d", SMALL_MHA) + 1e-3 * random(252, 20, seed=5)
    strict = tt.diagnose(one, two, h=6, d=14)
    assert (strict.kind, strict.matched) == ("different", 0)
    assert "tolerance=0.002: the nearest rows are apart by 0.0009 of their size" in str(strict)
    assert tt.diagnose(one, two, h=6, d=14, tolerance=0.01).kind == "layout"


# -- what cannot be told, and what must not be claimed ---------------------------------------------------------------


def test_a_k_bias_of_zeros() -> None:
    bias = random(252)
    bias[84:168] = 0
    by_head = laid_out(bias, "(q|k|v) h d", "h (q|k|v) d", SMALL_MHA)
    found = tt.diagnose(by_head, bias, h=6, d=14)
    assert (found.kind, str(found.layout_a), str(found.layout_b)) == ("layout", "h (q|k|v) d", "(q|k|v) h d")
    assert torch.equal(mended(found, bias), by_head)


def test_few_different_values() -> None:
    """A bias of nine values: the rows cannot be told apart one by one, the layouts still can."""
    bias = torch.randint(0, 9, (252,), generator=torch.Generator().manual_seed(0)).float()
    found = tt.diagnose(laid_out(bias, "(q|k|v) h d", "h (q|k|v) d", SMALL_MHA), bias, h=6, d=14)
    assert (found.kind, str(found.layout_a), str(found.layout_b), found.also) == ("layout", "h (q|k|v) d", "(q|k|v) h d", ())


def test_ambiguity_is_said() -> None:
    """Three heads: by head and by part are then inverse to each other and to themselves."""
    sizes = {"h": 3, "d": 14}
    one = random(126, 20)
    found = tt.diagnose(one, laid_out(one, "h (q|k|v) d", "(q|k|v) h d", sizes), **sizes)
    assert {str(found.layout_a), str(found.layout_b)} == {"(q|k|v) h d", "h (q|k|v) d"}
    assert found.also == (f"a {found.layout_b}, b {found.layout_a}, h=3 d=14",)
    assert "the values cannot tell which" in str(found)


def test_equal_rows_leave_it_open() -> None:
    """k and v equal: that k and v are exchanged cannot be seen."""
    half = random(28, 5)
    one = torch.cat([random(28, 5, seed=1), half, half])
    assert tt.diagnose(one, laid_out(one, "(q|k|v) h d", "(q|v|k) h d", {"h": 2, "d": 14}), h=2, d=14).equal
    found = tt.diagnose(one, laid_out(one, "(q|k|v) h d", "h (q|v|k) d", {"h": 2, "d": 14}), h=2, d=14)
    assert (found.kind, str(found.layout_a), str(found.layout_b)) == ("layout", "(q|k|v) h d", "h (q|k|v) d")
    assert torch.equal(mended(found, laid_out(one, "(q|k|v) h d", "h (q|v|k) d", {"h": 2, "d": 14})), one)


@pytest.mark.parametrize("rows", [50, 300])
def test_an_order_that_is_no_layout(rows: int) -> None:
    one = random(rows, 20)
    one[7] = one[11] = one[20]
    shuffled = one[torch.randperm(rows, generator=torch.Generator().manual_seed(1))]
    found = tt.diagnose(one, shuffled)
    assert (found.kind, found.matched, found.layout_a) == ("permuted", rows, None)
    assert sorted(found.indices.tolist()) == list(range(rows))
    assert torch.equal(mended(found, shuffled), one)
    assert tt.diagnose(one[:, 0], shuffled[:, 0]).kind == "permuted"


def test_rows_without_a_partner_are_named() -> None:
    one = random(252, 20)
    two = one.clone()
    two[[3, 5, 6, 7, 100]] += 1
    found = tt.diagnose(one, two, h=6, d=14)
    assert (found.kind, found.matched, found.total) == ("different", 247, 252)
    assert "3, 5-7, 100 of a have no partner, the others stand in the same place in both" in str(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_one_wrong_element_is_seen(dtype: torch.dtype) -> None:
    """Also behind a layout: all rows are compared in full before a layout is claimed."""
    one = random(252, 300).to(dtype)
    two = one.clone()
    two[100, 200] += 0.1
    found = tt.diagnose(one, two, h=6, d=14)
    assert (found.kind, found.matched) == ("different", 251)
    found = tt.diagnose(one, laid_out(two, "h (q|k|v) d", "(q|k|v) h d", SMALL_MHA), h=6, d=14)
    assert (found.kind, found.matched, found.indices[100], found.layout_a) == ("different", 251, -1, None)


def test_unexplained_overlap_asks_for_sizes() -> None:
    """k of a fused tensor with fewer kv heads than query heads: the shapes do not tell how many rows stand before it."""
    fused = random(7, (30 + 12) * 14)
    one, two = (tt.split(fused, text, h=30, g=6, d=14).k for text in ("g (q r|k|v) d", "(q h|k g|v g) d"))
    found = tt.diagnose(one, two)
    assert (found.kind, found.matched, found.total) == ("different", 14, 84)
    assert str(found).endswith("try      the sizes that are known: h=, g=, d=")


def test_rows_are_matched_one_to_one() -> None:
    one, two = random(6, 20)[[0, 1, 1, 1, 2]], random(6, 20)[[2, 1, 0, 3, 1]]
    found = tt.diagnose(one, two)
    assert (found.kind, found.matched, found.indices.tolist()) == ("different", 4, [2, 1, 4, -1, 0])
    single = tt.diagnose(torch.tensor([1.0, 2, 2, 2, 5]), torch.tensor([5.0, 2, 2, 9, 1]))
    assert (single.kind, single.indices.tolist()) == ("different", [4, 1, 2, -1, 0])
    assert "by chance" in str(single)


def test_no_row_in_common() -> None:
    found = tt.diagnose(random(252, 20), random(252, 20, seed=1))
    assert (found.kind, found.matched, found.layout_a, found.fix) == ("different", 0, None, "")
    assert tt.diagnose(torch.zeros(252), torch.ones(252)).matched == 0


def test_infinities_and_nans_are_values() -> None:
    one = random(252, 20)
    one[3, 4], one[50, 5], one[51, 5], one[90] = torch.inf, -torch.inf, torch.nan, torch.nan
    assert tt.diagnose(one, one.clone()).equal
    two = laid_out(one, "h (q|k|v) d", "(q|k|v) h d", SMALL_MHA)
    assert tt.diagnose(one, two, h=6, d=14).kind == "layout"
    other = one.clone()
    other[51, 5] = 0
    assert tt.diagnose(one, other).matched == 251


# -- doors -----------------------------------------------------------------------------------------------------------


def test_without_sizes() -> None:
    one = random(3 * 6 * 16, 20)
    found = tt.diagnose(one, laid_out(one, "h (q|k|v) d", "(q|k|v) h d", {"h": 6, "d": 16}))
    assert (str(found.layout_a), str(found.layout_b), dict(found.sizes or {})) == (
        "h (q|k|v) d",
        "(q|k|v) h d",
        {"d": 16, "h": 6, "r": 1, "g": 6},
    )
    grouped = random(42 * 16, 20)
    sizes = SIZES | {"d": 16}
    found = tt.diagnose(grouped, laid_out(grouped, "g (q r|k|v) d", "(q h|k g|v g) d", sizes))
    assert (str(found.layout_a), str(found.layout_b)) == ("g (q r|k|v) d", "(q h|k g|v g) d")
    rotated = random(4 * 64, 20)
    found = tt.diagnose(rotated, laid_out(rotated, "h d", "h p c", {"h": 4, "d": 64, "p": 32, "c": 2}))
    assert (found.kind, str(found.layout_b)) == ("rotary", "h p c")


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "i1", "u1", "i4", "i8", ml_dtypes.bfloat16])
def test_numpy_arrays(dtype: object) -> None:
    one = np.random.default_rng(0).integers(-120, 120, (252, 20)).astype(dtype)
    two = one[order("(q|k|v) h d", "h (q|k|v) d", SMALL_MHA)]
    found = tt.diagnose(one, two, h=6, d=14)
    assert (found.kind, str(found.layout_a), str(found.layout_b)) == ("layout", "h (q|k|v) d", "(q|k|v) h d")
    assert tt.diagnose(one, torch.from_numpy(one.astype("f4"))).equal
    assert tt.diagnose(two[::-1][:, ::2], one[:, ::2]).matched == 252


def test_large_integers_keep_their_digits() -> None:
    one = np.arange(252 * 20).reshape(252, 20) + 2**40
    assert tt.diagnose(one, one[order("(q|k|v) h d", "h (q|k|v) d", SMALL_MHA)], h=6, d=14).kind == "layout"


def test_numpy_users_need_no_torch() -> None:
    code = (
        "import sys, numpy as np, triptych as tt; a = np.random.default_rng(0).standard_normal((252, 9));"
        "b = tt.repack(a, 'h (q|k|v) d', '(q|k|v) h d', axis=0, h=6);"
        "print(tt.diagnose(a, b, h=6, d=14).layout_a, tt.diagnose(a, b[::-1]).kind, 'torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split("\n")[0] == "h (q|k|v) d permuted False"


def test_the_tensors_are_left_alone() -> None:
    one = torch.nn.Parameter(random(252, 20))
    two = laid_out(one.detach(), "h (q|k|v) d", "(q|k|v) h d", SMALL_MHA)
    before = one.detach().clone(), two.clone()
    tt.diagnose(one, two, h=6, d=14)
    assert torch.equal(one, before[0]) and torch.equal(two, before[1]) and one.grad is None


def test_memory_does_not_grow_with_the_samples() -> None:
    one = np.random.default_rng(0).standard_normal((756, 3000), dtype=np.float32)
    two = one[order("(q|k|v) h d", "h (q|k|v) d", {"h": 18, "d": 14})]
    tracemalloc.start()
    assert tt.diagnose(one, two, h=18, d=14).kind == "layout"
    assert tt.diagnose(one.T, two.T, h=18, d=14).kind == "layout"
    assert tt.diagnose(one, two[::-1], h=18, d=14).kind == "permuted"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < one.nbytes / 2


def test_text_and_dict() -> None:
    one = random(384, 16)
    found = tt.diagnose(one, laid_out(one, "h (q|k|v) d", "(q|k|v) h d", {"h": 4, "d": 32}), h=4, d=32)
    assert str(found) == (
        "layout: the same 384 rows in another order\n"
        "  a        h (q|k|v) d   with h=4 d=32   (GPT-NeoX, BLOOM, Persimmon, Megatron v2+)\n"
        "  b        (q|k|v) h d   with h=4 d=32   (GPT-2, MPT, ViT, nn.MultiheadAttention)\n"
        "  try      b = b.view(3, 4, 32, -1).transpose(0, 1).reshape(384, -1)"
    )
    written = json.loads(json.dumps(found.to_dict()))
    assert (written["kind"], written["layout_a"], written["sizes"]["h"], written["matched"]) == ("layout", "h (q|k|v) d", 4, 384)
    assert str(tt.diagnose(one, one)) == "equal: all 384 rows are equal"


def test_assert_same_rows() -> None:
    q, manual, _ = puzzle()
    with pytest.raises(tt.MismatchError, match=r"partly: 64 of 128 rows are shared\n  a        part q of h \(q\|k\|v\) d") as caught:
        tt.assert_same_rows(q, manual)
    assert isinstance(caught.value, AssertionError)
    assert str(caught.value) == str(tt.diagnose(q, manual))
    tt.assert_same_rows(q, q * (1 + 1e-7))
    tt.assert_same_rows(q.bfloat16(), q)
    tt.assert_same_rows(q, q + 0.01, tolerance=0.1)
    for other in (q + 0.01, q.transpose(1, 2), q.flatten(-2), torch.zeros_like(q), q[:, :, :3]):
        with pytest.raises(tt.MismatchError):
            tt.assert_same_rows(q, other)


@pytest.mark.parametrize(
    ("a", "b", "sizes", "error"),
    [
        (np.zeros(0), np.zeros(0), {}, "without rows to compare"),
        (np.zeros(()), np.zeros(()), {}, "without rows to compare"),
        (np.ones((2, 2, 2, 2, 2, 2)), np.ones(3), {}, "without rows to compare"),
        (np.ones(3, complex), np.ones(3), {}, "only real numbers"),
        (torch.ones(3, device="meta"), np.ones(3), {}, "meta device"),
        (np.ones(3), np.array(["a", "b", "c"]), {}, "only real numbers"),
        (np.ones(3), np.ones(3), {"head": 3}, "unknown axis 'head'"),
        (np.ones(3), np.ones(3), {"h": 6, "g": 4}, "multiple of g"),
        (np.ones(3), np.ones(3), {"h": 0}, "positive whole number"),
    ],
)
def test_what_cannot_be_compared_is_an_error(a: object, b: object, sizes: dict[str, int], error: str) -> None:
    with pytest.raises(tt.LayoutError, match=error):
        tt.diagnose(a, b, **sizes)


def test_no_reading_with_a_gate_beside_one_without() -> None:
    sizes = {"g": 2, "r": 4, "h": 8, "d": 16}
    weight = random(12 * 16, 5)
    one, two = (tt.split(weight, text, axis=0, **sizes).v.flatten(0, 1) for text in ("g (q r|k|v) d", "(q h|k g|v g) d"))
    found = tt.diagnose(one, two)
    assert found.also and not any("gate" in text for text in (str(found.layout_a), str(found.layout_b), *found.also))
