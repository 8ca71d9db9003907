"""blocks: every row in one block, views of the tensor itself, the numbers that heads have in the whole tensor on every rank."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import triptych as tt
from tests.strategies import ALL, bound_sizes
from triptych.blocks import blocks

SIZES = {"g": 2, "r": 3, "d": 7}
H = 6
GROUPED = ["g (q r|k|v) d", "(q h|k g|v g) d", "(q g r|k g|v g) d", "(q r g|k g|v g) d"]
IN = 5


def weight(layout: str, **sizes: int) -> Tensor:
    """Row i holds i in every column."""
    rows = tt.Layout(layout).size(**sizes)
    return torch.arange(float(rows))[:, None].repeat(1, IN)


def rows(block: Tensor) -> list[int]:
    return block[..., 0].flatten().int().tolist()


def listed(layout: str, part: str, head: int, **sizes: int) -> list[int]:
    """The rows of a head by the slow listing."""
    return [i for i, row in enumerate(tt.Layout(layout).rows(**sizes)) if (row.part.split(".")[0], row.head) == (part, head)]


@pytest.mark.parametrize("layout", [*GROUPED, "h (q|k|v) p c", "h (rot c p|pass n)"])
def test_by_head_gives_the_rows_of_each_head_in_their_order(layout: str) -> None:
    sizes = SIZES if layout in GROUPED else {"h": 3, "p": 4, "c": 2} if "|k|" in layout else {"h": 3, "p": 4, "n": 5}
    w = weight(layout, **sizes)
    found = blocks(w, layout, **sizes)
    for name, block in found.items():
        part, head = name.removesuffix("]").split("[")
        assert block.shape == (len(rows(block)), IN)
        assert rows(block) == listed(layout, part, int(head), **sizes)
        assert block.untyped_storage().data_ptr() == w.untyped_storage().data_ptr()
    assert sorted(itertools.chain(*map(rows, found.values()))) == list(range(len(w)))


@pytest.mark.parametrize("layout", GROUPED)
def test_by_group_gives_what_belongs_to_a_kv_head(layout: str) -> None:
    w = weight(layout, **SIZES)
    found = blocks(w, layout, "group", **SIZES)
    assert list(found) == ["q[g=0]", "q[g=1]", "k[g=0]", "k[g=1]", "v[g=0]", "v[g=1]"]
    assert found["q[g=1]"].shape == (3, 7, IN) and found["v[g=1]"].shape == (1, 7, IN)
    assert [rows(head) for head in found["q[g=1]"]] == [listed(layout, "q", head, **SIZES) for head in (3, 4, 5)]
    assert rows(found["k[g=1]"]) == listed(layout, "k", 1, **SIZES)


@pytest.mark.parametrize("layout", GROUPED)
def test_by_part_heads_stand_in_counting_order(layout: str) -> None:
    w = weight(layout, **SIZES)
    q = blocks(w, layout, "part", **SIZES)["q"]
    assert q.shape == ((H, 7, IN) if layout in GROUPED[1:3] else (2, 3, 7, IN))
    assert rows(q) == [row for head in range(H) for row in listed(layout, "q", head, **SIZES)]
    q.zero_()
    assert not w[[i for i, row in enumerate(tt.Layout(layout).rows(**SIZES)) if row.part == "q"]].any(), "a view"
    assert w[-1].all()


@pytest.mark.parametrize("layout", ALL)
@given(data=st.data())
@settings(max_examples=5)
def test_every_row_is_in_one_block(layout: str, data: st.DataObject) -> None:
    value = tt.Layout(layout)
    sizes = data.draw(bound_sizes(value))
    listing = value.rows(**sizes)
    kept = [i for i, row in enumerate(listing) if not any(path.zero and row.part in path.names for path in value.paths)]
    w = np.arange(len(listing))
    assert sorted(itertools.chain(*(block.ravel().tolist() for block in blocks(w, value, **sizes).values()))) == kept


def test_numpy_arrays_biases_and_the_other_axis() -> None:
    w = np.arange(H * 3 * 7)
    found = blocks(w, "h (q|k|v) d", h=H)
    assert found["k[2]"].tolist() == list(range(2 * 21 + 7, 2 * 21 + 14)) and np.shares_memory(found["k[2]"], w)
    turned = blocks(np.stack([w, w]), "h (q|k|v) d", axis=1, h=H)
    assert turned["k[2]"].shape == (2, 7) and (turned["k[2]"] == found["k[2]"]).all()


def test_an_aliased_part_is_one_block_and_zero_rows_are_none() -> None:
    assert list(blocks(np.arange(8), "(q|k=v) h d", "part", h=2)) == ["q", "k=v"]
    assert list(blocks(np.arange(12), "(q|k=0|v) h d", "part", h=2)) == ["q", "v"]


def test_a_gated_mlp_has_parts() -> None:
    found = blocks(np.arange(10), "f (gate|up)", "part", f=5)
    assert {name: block.tolist() for name, block in found.items()} == {"gate": [[0, 2, 4, 6, 8]], "up": [[1, 3, 5, 7, 9]]}


# fragments


def fragment(whole: Tensor, layout: str, rank: int, world: int, **sizes: int) -> Tensor:
    """What a rank holds, head by head: written from the listing."""
    listing = tt.Layout(layout).rows(**sizes)
    counts = {part: 1 + max(row.head for row in listing if row.part == part) for part in "qkv"}

    def ours(part: str, head: int) -> bool:
        share = max(counts[part] // world, 1)
        return head in range(rank * counts[part] // world, rank * counts[part] // world + share)

    return whole[[i for i, row in enumerate(listing) if ours(row.part, row.head)]]


@pytest.mark.parametrize("world", [2, 3, 6])
@pytest.mark.parametrize("layout", GROUPED)
def test_fragments_keep_the_numbers_of_the_whole(layout: str, world: int) -> None:
    sizes = {"g": 3 if world == 3 else 2, "h": 12, "d": 7}
    whole = weight(layout, **sizes)
    for rank in range(world):
        ours = fragment(whole, layout, rank, world, **sizes)
        found = blocks(ours, layout, rank=rank, world=world, **sizes)
        assert len(found) == len(ours) // 7
        for name, block in found.items():
            part, head = name.removesuffix("]").split("[")
            assert rows(block) == listed(layout, part, int(head), **sizes)
        groups = blocks(ours, layout, "group", rank=rank, world=world, **sizes)
        assert rows(groups[next(name for name in groups if name[0] == "k")]) == rows(next(b for n, b in found.items() if n[0] == "k"))


def test_a_fragment_of_rank_blocks_is_some_of_them() -> None:
    layout, sizes = "t (q n r|k n|v n) d", {"t": 4, "n": 2, "r": 3, "d": 5}
    whole = weight(layout, **sizes)
    found = blocks(whole[len(whole) // 2 :], layout, rank=1, world=2, **sizes)
    assert [name for name in found if name[0] == "k"] == [f"k[{head}]" for head in (4, 5, 6, 7)]
    assert all(rows(block) == listed(layout, name[0], int(name[2:-1]), **sizes) for name, block in found.items())


def test_a_fragment_by_its_own_layout_counts_from_zero() -> None:
    assert list(blocks(np.arange(10), "(q n r|k n|v n) d", n=1, r=3, d=2)) == ["q[0]", "q[1]", "q[2]", "k[0]", "v[0]"]


def test_a_fragment_without_heads_is_a_share_of_each_part() -> None:
    assert blocks(np.arange(6), "(gate|up) f", "part", rank=1, world=3, f=9)["up"].tolist() == [[3, 4, 5]]


# training


def test_gradients_reach_the_fused_weight() -> None:
    w = torch.nn.Parameter(weight("g (q r|k|v) d", **SIZES))
    blocks(w, "g (q r|k|v) d", **SIZES)["q[4]"].sum().backward()
    mine = listed("g (q r|k|v) d", "q", 4, **SIZES)
    assert w.grad is not None and w.grad[mine].eq(1).all() and w.grad.sum() == len(mine) * IN


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent.parent / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_muon_on_the_blocks_is_muon_on_each_head_alone() -> None:
    muon = example("muon_per_head")
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(80, 48))
    weight.grad = torch.randn(80, 48)
    rows = {(row.part, row.head): [] for row in tt.Layout(muon.LAYOUT).rows(**muon.SIZES)}
    for i, row in enumerate(tt.Layout(muon.LAYOUT).rows(**muon.SIZES)):
        rows[row.part, row.head].append(i)
    alone = [torch.nn.Parameter(weight.detach()[mine].clone()) for mine in rows.values()]
    for p, mine in zip(alone, rows.values(), strict=True):
        p.grad = weight.grad[mine].clone()
    torch.optim.Muon(alone, lr=0.02, weight_decay=0.0, momentum=0.0, nesterov=False).step()
    muon.MuonPerHead(weight, muon.LAYOUT, lr=0.02, **muon.SIZES).step()
    assert all(torch.equal(weight.detach()[mine], p) for p, mine in zip(alone, rows.values(), strict=True))


def test_the_update_of_each_head_is_orthogonal_and_that_of_the_whole_is_not() -> None:
    muon = example("muon_per_head")
    for name, update in muon.updates(per_head=True).items():
        values = torch.linalg.svdvals(update.double())
        assert values.max() < 2 * values.min(), name
    sizes = [update.norm() for update in muon.updates(per_head=True).values()]
    assert max(sizes) < 1.3 * min(sizes)
    whole = [update.norm() for update in muon.updates(per_head=False).values()]
    assert max(whole) > 50 * min(whole)


# refusals


def test_rows_that_do_not_fit() -> None:
    with pytest.raises(tt.SizeError, match="rows do not fill the layout"):
        blocks(np.arange(21), "(q h|k g|v g) d", rank=0, world=2, h=H, g=2, d=7)
    with pytest.raises(tt.SizeError, match="heads do not divide among the ranks"):
        blocks(np.arange(21), "(q h|k g|v g) d", rank=0, world=5, h=H, g=2, d=7)
    with pytest.raises(tt.SizeError, match="no such rank"):
        blocks(np.arange(21), "(q h|k g|v g) d", rank=2, world=2, h=H, g=2, d=7)


def test_what_cannot_be_cut_so() -> None:
    with pytest.raises(tt.LayoutError, match="do not divide into kv groups"):
        blocks(np.arange(10), "f (gate|up)", "group", f=5)
    with pytest.raises(tt.LayoutError, match="by part, by group or by head"):
        blocks(np.arange(12), "(q|k|v) h d", "row", h=2)  # type: ignore[arg-type]
    with pytest.raises(tt.LayoutError, match="only whole heads"):
        blocks(np.arange(12), "_ g (q r|k|v) d|gate f", rank=0, world=2, g=2, r=2, d=3, f=2)
