"""Bugs that people reported elsewhere, each made again with its own arithmetic, and what the product says of it.

Every test names the thread. Cases with a test file of their own are not repeated: the puzzle (test_diagnose, test_trace), two files of one
model (test_agree), policies of sharding (test_sharding), LoRA on q and v (test_modules), incomplete loads (test_lint), errors of converters
(test_injected).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

import triptych as tt

GROUPED, PER_GROUP, PER_RANK = "(q h|k g|v g) d", "g (q r|k|v) d", "t (q n r|k n|v n) d"


def rows(count: int, columns: int = 7) -> Tensor:
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(count))


def same_multiset(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.flatten().sort().values, b.flatten().sort().values)


def test_outputs_gathered_from_ranks_pass_a_test_of_sorted_rows() -> None:
    """nnsight#719, slapo#46: an all-gather of two ranks gives q0 k0 v0 q1 k1 v1; the check compared sorted values."""
    whole = rows(60)
    q, k, v = whole.split([36, 12, 12])
    gathered = torch.cat([torch.cat([part.chunk(2)[rank] for part in (q, k, v)]) for rank in range(2)])
    assert same_multiset(whole, gathered)
    found = tt.diagnose(whole, gathered, h=12, g=4)
    assert f"a        {GROUPED}" in str(found) and f"b        {PER_RANK}" in str(found) and "t=2 n=2 r=3" in str(found)
    with pytest.raises(tt.MismatchError):
        tt.assert_same_rows(whole, gathered, h=12, g=4)


def test_joined_side_by_side_and_read_per_group() -> None:
    """NVIDIA-NeMo/RL#2802, ChatLearn#277: cat([q, k, v]) is loaded where the code reads a group after the other."""
    q, k, v = rows(30), rows(12), rows(6)
    q, k, v = q[:24].view(24, 7), k[:8], rows(8)
    joined = torch.cat([q, k, v])
    groups = [torch.cat([q[12 * g : 12 * g + 12], k[4 * g : 4 * g + 4], v[4 * g : 4 * g + 4]]) for g in range(2)]
    assert torch.equal(tt.fuse((q.view(6, 4, 7), k.view(2, 4, 7), v.view(2, 4, 7)), PER_GROUP, axis=0), torch.cat(groups))
    assert f"b        {PER_GROUP}" in str(tt.diagnose(joined, torch.cat(groups), h=6, g=2))


def test_a_file_said_to_hold_q_k_v_holds_k_v_q() -> None:
    """transformers#21519: metaseq packs K, V, Q in a tensor called qkv_proj."""
    qkv = rows(60)
    kvq = torch.cat([qkv[20:40], qkv[40:], qkv[:20]])
    found = tt.diagnose(qkv, kvq, h=5)
    assert found.kind == "parts swapped" and "(k|v|q) h d" in str(found)


class Grouped(nn.Module):
    """A projection [q, k, v] of few kv heads, and the ways in which people cut it."""

    def __init__(self, heads: int, kv_heads: int, dims: int) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = heads, kv_heads, dims
        self.qkv_proj = nn.Linear(10, (heads + 2 * kv_heads) * dims)

    def thirds(self, x: Tensor) -> None:
        q, k, v = self.qkv_proj(x).chunk(3, dim=-1)
        assert (q.shape[-1], k.shape[-1], v.shape[-1]) == (43, 43, 42)

    def eighths(self, x: Tensor) -> None:
        mine = F.linear(x, self.qkv_proj.weight.chunk(8)[1])
        q, k, v = mine.split([16, 4, 4], dim=-1)
        assert q.shape[-1] + k.shape[-1] + v.shape[-1] == 24


def test_chunk_in_three_with_grouped_heads_does_not_raise() -> None:
    """ARIS-in-AI-Offer#45: widths 43, 43, 42 and no error."""
    report = tt.trace(Grouped(6, 1, 16).thirds, torch.randn(2, 10), layout=GROUPED)
    assert [text.split(" (")[0] for text in report.misread] == ["k", "v"]
    assert "q rows of heads 3 and 4" in report.misread[0] and "k rows of head 0" in report.misread[1]
    assert "No conflicts" not in str(report)


def test_a_rank_that_is_an_eighth_of_the_rows_has_q_rows_as_k() -> None:
    """vllm#42803: `chunk(tp)[rank]` of [Q, K, V]; at 8 ranks 7 of 8 load Q rows as K, and the output looks plausible."""
    model = Grouped(32, 8, 4)
    report = tt.trace(model.eighths, torch.randn(2, 10), layout=GROUPED)
    assert [text.replace(f"{report.tensors[-1].line}", "N") for text in report.misread] == [
        "k (line N) holds q rows of head 10",
        "v (line N) holds q rows of head 11",
    ]
    weight = model.qkv_proj.weight.detach()
    wrong = sum(not torch.isin(weight.chunk(8)[rank][16:20, 0], weight[128:160, 0]).all() for rank in range(8))
    assert wrong >= 7


@pytest.mark.parametrize(("dims", "hidden"), [(4, True), (8, False)])
def test_an_inverse_that_is_the_forward_reshape_is_right_at_head_dim_four(dims: int, hidden: bool) -> None:
    """mobius#396, maxtext#581: to interleaved pairs and "back" with the same reshape; a round trip at head dim 4 passes."""

    def turn(weight: Tensor) -> Tensor:
        return weight.view(5, dims // 2, 2, -1).transpose(1, 2).reshape(5 * dims, -1)

    weight = rows(5 * dims)
    found = tt.diagnose(weight, turn(turn(weight)), h=5)
    assert (found.kind == "equal") is hidden and (hidden or "h p c" in str(found))
    back = tt.repack(tt.repack(weight, "h p c", "h c p", axis=0, h=5), "h c p", "h p c", axis=0, h=5)
    assert torch.equal(back, weight) and torch.equal(tt.repack(weight, "h p c", "h c p", axis=0, h=5), turn(weight))


def test_columns_of_the_output_projection_in_the_wrong_heads() -> None:
    """nntile#347: query heads regrouped in q and not in the output projection; tests had one head."""
    out = rows(11, 48)
    wrong = torch.cat([out.view(11, 2, 3, 8)[:, :, i].reshape(11, -1) for i in range(3)], 1)
    found = tt.diagnose(out, wrong, h=6, g=2)
    assert found.kind == "heads" and "r g d" in str(found)
    assert tt.diagnose(out[:, :8], wrong[:, :8], h=1).kind == "equal"


def test_an_update_of_q_and_v_padded_for_another_order_trains_k() -> None:
    """litgpt#891, Megatron-Bridge#1818: the zero-padded update of a LoRA assumes q, k, v side by side; the base is per group."""
    update = torch.cat([torch.ones(24, 7), torch.zeros(8, 7), torch.ones(8, 7)])
    touched = {name: bool(block.any()) for name, block in tt.blocks(update, PER_GROUP, by="part", h=6, g=2).items()}
    assert touched == {"q": True, "k": True, "v": True}
    parts = tt.blocks(update, PER_GROUP, by="head", h=6, g=2)
    assert not parts["q[4]"].any() and parts["k[0]"].all()
    right = tt.repack(update, GROUPED, PER_GROUP, axis=0, h=6, g=2)
    assert not tt.split(right, PER_GROUP, axis=0, h=6, g=2)[1].any()


def checkpoint(folder: Path, heads: int, kv_heads: int, dims: int, interleaved: bool = False) -> Path:
    """A llama of one layer with projections of its own, rotary half; or with the pairs of q and k side by side."""
    random, hidden, home = np.random.default_rng(heads), 10, "model.layers.0.self_attn."
    tensors = {
        f"{home}{part}_proj.weight": random.standard_normal((count * dims, hidden)).astype(np.float32)
        for part, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
    }
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = {"model_type": "llama", "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": dims}
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": hidden, "num_hidden_layers": 1}))
    return folder


@pytest.mark.parametrize(("heads", "kv_heads", "hidden"), [(4, 2, True), (8, 2, False)])
def test_heads_per_kv_head_taken_for_kv_heads(heads: int, kv_heads: int, hidden: bool, tmp_path: Path) -> None:
    """llama.cpp#3364: `n_head //= n_head_kv` in the permutation of k. On the 70B model 64 / 8 is 8, so nobody saw it."""
    source = checkpoint(tmp_path / "in", heads, kv_heads, 8)
    tt.convert(source, tmp_path / "out", rope="interleaved")
    file, name = tmp_path / "out" / "model.safetensors", "model.layers.0.self_attn.k_proj.weight"
    k, ratio = load_file(source / "model.safetensors")[name], heads // kv_heads
    mistaken = k.reshape(ratio, 2, k.shape[0] // ratio // 2, -1).swapaxes(1, 2).reshape(k.shape)
    data = file.read_bytes()
    right = load_file(file)[name]
    assert data.count(right.tobytes()) == 1
    file.write_bytes(data.replace(right.tobytes(), np.ascontiguousarray(mistaken).tobytes()))
    if hidden:
        tt.verify(source, tmp_path / "out")
        assert (mistaken == right).all()
        return
    with pytest.raises(tt.MismatchError) as caught:
        tt.verify(source, tmp_path / "out")
    assert "k_proj" in str(caught.value)


def test_two_releases_that_differ_in_one_kind_of_tensor(tmp_path: Path) -> None:
    """MiniMax-H3#48: two files differ in qkv_proj alone; the first rows of q agree, the last do not. Which row layout is it?"""
    weight = {f"layers.{i}.qkv_proj.weight": rows(72 + i, 9)[:72].numpy() for i in range(2)}
    other = {name: tt.repack(one, "(q|k|v) h d", "h (q|k|v) d", axis=0, h=6) for name, one in weight.items()}
    rest = {"norm.weight": rows(5)[:, 0].contiguous().numpy()}
    for name, tensors in (("a", weight), ("b", other)):
        (tmp_path / name).mkdir()
        save_file({**tensors, **rest}, tmp_path / name / "model.safetensors")
    one, two = weight["layers.0.qkv_proj.weight"], other["layers.0.qkv_proj.weight"]
    assert (one[:4] == two[:4]).all() and (one[20:24] != two[20:24]).any()
    said = str(tt.diff(tmp_path / "a", tmp_path / "b", h=6))
    assert "(q|k|v) h d" in said and "h (q|k|v) d" in said and "1 of 3 tensors equal" in said


def test_every_rank_loads_the_first_shard(tmp_path: Path) -> None:
    """vllm-gguf-plugin#103: the rank defaults to 0, all ranks load shard 0, shapes fit. Only the whole can tell: `verify` does."""
    source = checkpoint(tmp_path / "in", 4, 2, 8)
    tt.shard(source, tmp_path / "ranks", tp=2)
    first, second = (tmp_path / "ranks" / f"rank-{i}-of-2" / "model.safetensors" for i in range(2))
    second.write_bytes(first.read_bytes())
    tt.merge(tmp_path / "ranks", tmp_path / "merged")
    with pytest.raises(tt.MismatchError, match="not the row of the input"):
        tt.verify(source, tmp_path / "merged")
