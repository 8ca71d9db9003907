"""Whole checkpoints divided among ranks, joined and divided anew: bytes against vLLM's and Megatron's rules, and against a forward pass."""

from __future__ import annotations

import ast
import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

import triptych as tt
from tests import files
from tests import sharding_oracle as oracle
from triptych import parallel
from triptych.cli import main
from triptych.errors import FormatError, MismatchError, PlanError
from triptych.sharding import Ranks

H, D, F, IN, V = 48, 16, 96, 20, 101  # query heads, head dim, MLP width, columns, vocabulary
Arrays = dict[str, np.ndarray]
Shapes = dict[str, tuple[str, tuple[int, ...]]]


def load(path: Path) -> Arrays:
    """The tensors of a file or folder as integers of their width, read with a parser of its own."""
    out: Arrays = {}
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        content = file.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        for name, told in json.loads(content[8:start]).items():
            if name != "__metadata__":
                width = files.BITS[told["dtype"]] // 8
                begin, stop = (start + at for at in told["data_offsets"])
                out[name] = np.frombuffer(content[begin:stop], f"u{width}").reshape(told["shape"])
    return out


def rank_folder(out: Path, rank: int, tp: int) -> Path:
    return out / f"rank-{rank}-of-{tp}"


def same(one: Arrays, two: Arrays) -> None:
    assert one.keys() == two.keys()
    for name in one:
        assert np.array_equal(one[name], two[name]), name


def llama(kv: int) -> tuple[dict[str, Any], Shapes]:
    config = {"model_type": "llama", "num_attention_heads": H, "num_key_value_heads": kv, "head_dim": D, "hidden_size": IN, "vocab_size": V}
    layer = "model.layers.0."
    shapes: Shapes = {
        "model.embed_tokens.weight": ("BF16", (V, IN)),
        "lm_head.weight": ("BF16", (V, IN)),
        "model.norm.weight": ("BF16", (IN,)),
    }
    for part, heads in (("q", H), ("k", kv), ("v", kv)):
        shapes[f"{layer}self_attn.{part}_proj.weight"] = ("BF16", (heads * D, IN))
        shapes[f"{layer}self_attn.{part}_proj.bias"] = ("BF16", (heads * D,))
    shapes |= {f"{layer}self_attn.o_proj.weight": ("BF16", (IN, H * D)), f"{layer}self_attn.o_proj.bias": ("BF16", (IN,))}
    shapes |= {f"{layer}mlp.{part}_proj.weight": ("BF16", (F, IN)) for part in ("gate", "up")}
    shapes |= {f"{layer}mlp.down_proj.weight": ("BF16", (IN, F)), f"{layer}input_layernorm.weight": ("BF16", (IN,))}
    return config, shapes


def llama_rank(whole: Arrays, kv: int, policy: str, pad: int, tp: int, rank: int) -> Arrays:
    """What vLLM's loaders (or, for raw kv rows, Megatron's splitting) put into a rank."""
    out: Arrays = {}
    for name, x in whole.items():
        if "norm" in name or name.endswith("o_proj.bias"):
            out[name] = x
        elif "embed" in name or "lm_head" in name:
            out[name] = oracle.vllm_vocab(x, pad, tp, rank, 0)
        elif "o_proj" in name or "down_proj" in name:
            out[name] = oracle.vllm_row(x, tp, rank)
        elif "k_proj" in name or "v_proj" in name:
            q = oracle.grid(H * D, 1)
            raw = policy == "rows" and kv < tp
            out[name] = oracle.megatron_column(x, tp, rank) if raw else oracle.vllm_qkv(q, x, x, H, kv, tp, rank)[1]
        else:
            out[name] = oracle.vllm_column(x, tp, rank)
    return out


@pytest.mark.parametrize("policy", ["replicate", "rows"])
@pytest.mark.parametrize("tp", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("kv", [1, 2, 8])
def test_separate_projections(tmp_path: Path, kv: int, tp: int, policy: str) -> None:
    config, shapes = llama(kv)
    files.checkpoint(tmp_path / "a", [shapes], config)
    whole, out = load(tmp_path / "a"), tmp_path / "b"
    try:
        expected = [llama_rank(whole, kv, policy, 48, tp, rank) for rank in range(tp)]
    except AssertionError:
        with pytest.raises(PlanError, match="cannot be shared by 3 ranks"):
            tt.shard(tmp_path / "a", out, tp, kv=policy, pad_vocab_to=48)
        assert not out.exists()
        return
    done = tt.shard(tmp_path / "a", out, tp, kv=policy, pad_vocab_to=48)
    for rank in range(tp):
        same(load(rank_folder(out, rank, tp)), expected[rank])
    assert done.size == sum(len(data) for data in files.snapshot(out).values())
    tt.merge(out, tmp_path / "c")
    same(load(tmp_path / "c"), whole)
    assert (tmp_path / "c" / "config.json").read_bytes() == (tmp_path / "a" / "config.json").read_bytes()
    assert not (tmp_path / "c" / "triptych-shard.json").exists()
    (weight, bias) = (packed for packed in tt.inspect(tmp_path / "c").projections if packed.kind == "attention")
    assert (weight.sizes["h"], weight.sizes["g"], bias.sizes["g"]) == (H, kv, kv)


@pytest.mark.parametrize("tp", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("kv", [1, 2, 8])
def test_one_fused_tensor(tmp_path: Path, kv: int, tp: int) -> None:
    """Phi-3: q|k|v and gate|up, both fused on disk, as vLLM loads them."""
    config = {"model_type": "phi3", "num_attention_heads": H, "num_key_value_heads": kv, "hidden_size": H * D, "intermediate_size": F}
    qkv, gate_up = "model.layers.0.self_attn.qkv_proj.weight", "model.layers.0.mlp.gate_up_proj.weight"
    files.checkpoint(tmp_path / "a", [{qkv: ("BF16", ((H + 2 * kv) * D, IN)), gate_up: ("BF16", (2 * F, IN))}], config)
    whole, out = load(tmp_path / "a"), tmp_path / "b"
    q, k, v = np.split(whole[qkv], [H * D, (H + kv) * D])
    try:
        expected = [oracle.vllm_qkv(q, k, v, H, kv, tp, rank) for rank in range(tp)]
    except AssertionError:
        with pytest.raises(PlanError, match="kv heads cannot be shared by 3 ranks"):
            tt.shard(tmp_path / "a", out, tp)
        return
    tt.shard(tmp_path / "a", out, tp)
    for rank in range(tp):
        found = load(rank_folder(out, rank, tp))
        assert np.array_equal(found[qkv], np.concatenate(expected[rank]))
        assert np.array_equal(found[gate_up], oracle.vllm_merged(whole[gate_up], 2, tp, rank))
        (attention, mlp) = tt.inspect(rank_folder(out, rank, tp)).projections
        assert (str(attention.layout), attention.sizes["h"], attention.sizes["g"]) == ("(q h|k g|v g) d", H // tp, max(1, kv // tp))
        assert mlp.sizes["f"] == F // tp
    tt.merge(out, tmp_path / "c")
    same(load(tmp_path / "c"), whole)


@pytest.mark.parametrize("tp", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("kv", [1, 2, 8])
def test_grouped_rows_as_megatron_cuts_them(tmp_path: Path, kv: int, tp: int) -> None:
    config = {"model_type": "falcon", "num_attention_heads": H, "num_kv_heads": kv, "hidden_size": H * D, "new_decoder_architecture": True}
    layer = "transformer.h.0."
    qkv, dense, up = (
        f"{layer}self_attention.query_key_value.weight",
        f"{layer}self_attention.dense.weight",
        f"{layer}mlp.dense_h_to_4h.weight",
    )
    shapes: Shapes = {qkv: ("F32", ((H + 2 * kv) * D, IN)), dense: ("F32", (IN, H * D)), up: ("F32", (F, IN))}
    files.checkpoint(tmp_path / "a", [shapes], config)
    whole, out = load(tmp_path / "a"), tmp_path / "b"
    try:
        expected = [oracle.megatron_qkv(whole[qkv], H, kv, tp, rank) for rank in range(tp)]
    except AssertionError:
        with pytest.raises(PlanError, match="cannot be shared by 3 ranks"):
            tt.shard(tmp_path / "a", out, tp, kv="rows")
        return
    tt.shard(tmp_path / "a", out, tp, kv="rows")
    for rank in range(tp):
        found = load(rank_folder(out, rank, tp))
        assert np.array_equal(found[qkv], expected[rank])
        assert np.array_equal(found[dense], oracle.megatron_column(whole[dense], tp, rank, 1))
        assert np.array_equal(found[up], oracle.megatron_column(whole[up], tp, rank))
    tt.merge(out, tmp_path / "c")
    same(load(tmp_path / "c"), whole)


def test_weights_stored_in_out(tmp_path: Path) -> None:
    """GPT-2's Conv1D: what is a row elsewhere is a column here; q, k, v are read off a Linear that holds the same."""
    config = {"model_type": "gpt2", "n_head": 6, "n_embd": 24, "vocab_size": 30}
    shapes: Shapes = {"h.0.attn.c_attn.weight": ("F16", (24, 72)), "h.0.attn.c_attn.bias": ("F16", (72,)),
                      "h.0.attn.c_proj.weight": ("F16", (24, 24)), "h.0.attn.c_proj.bias": ("F16", (24,)),
                      "h.0.mlp.c_fc.weight": ("F16", (24, 96)), "h.0.mlp.c_fc.bias": ("F16", (96,)),
                      "h.0.mlp.c_proj.weight": ("F16", (96, 24)), "wte.weight": ("F16", (30, 24)), "wpe.weight": ("F16", (11, 24)),
                      "h.0.attn.bias": ("F16", (1, 1, 11, 11)), "h.0.ln_1.weight": ("F16", (24,)), "ln_f.bias": ("F16", (24,))}  # fmt: skip
    files.checkpoint(tmp_path / "a", [shapes], config)
    whole, out = load(tmp_path / "a"), tmp_path / "b"
    tt.shard(tmp_path / "a", out, 3, rules={"h.*.attn.bias": "copy"})
    for rank in range(3):
        found = load(rank_folder(out, rank, 3))
        for name in ("h.0.attn.c_attn.weight", "h.0.attn.c_attn.bias"):
            q, k, v = np.split(whole[name].T, 3)
            assert np.array_equal(found[name].T, np.concatenate(oracle.vllm_qkv(q, k, v, 6, 6, 3, rank)))
        assert np.array_equal(found["h.0.mlp.c_fc.weight"].T, oracle.vllm_column(whole["h.0.mlp.c_fc.weight"].T, 3, rank))
        assert np.array_equal(found["h.0.mlp.c_fc.bias"], oracle.vllm_column(whole["h.0.mlp.c_fc.bias"], 3, rank))
        for name in ("h.0.attn.c_proj.weight", "h.0.mlp.c_proj.weight"):
            assert np.array_equal(found[name].T, oracle.vllm_row(whole[name].T, 3, rank))
        assert np.array_equal(found["wte.weight"], oracle.vllm_vocab(whole["wte.weight"], 1, 3, rank, 0))
        for name in ("h.0.attn.c_proj.bias", "wpe.weight", "h.0.attn.bias", "h.0.ln_1.weight", "ln_f.bias"):
            assert np.array_equal(found[name], whole[name])
    tt.merge(out, tmp_path / "c")
    same(load(tmp_path / "c"), whole)


def test_latent_attention_and_experts(tmp_path: Path) -> None:
    config = {"model_type": "deepseek_v3", "num_attention_heads": 6, "num_key_value_heads": 6, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2,
              "v_head_dim": 5, "q_lora_rank": 7, "kv_lora_rank": 8, "hidden_size": IN}  # fmt: skip
    a, m = "model.layers.0.self_attn.", "model.layers.0.mlp."
    shapes: Shapes = {f"{a}q_a_proj.weight": ("BF16", (7, IN)), f"{a}q_a_layernorm.weight": ("BF16", (7,)),
                      f"{a}q_b_proj.weight": ("BF16", (36, 7)), f"{a}kv_a_proj_with_mqa.weight": ("BF16", (10, IN)),
                      f"{a}kv_b_proj.weight": ("BF16", (54, 8)), f"{a}o_proj.weight": ("BF16", (IN, 30)),
                      f"{m}gate.weight": ("BF16", (4, IN)), f"{m}gate.e_score_correction_bias": ("F32", (4,)),
                      f"{m}experts.3.gate_proj.weight": ("BF16", (12, IN)), f"{m}experts.3.down_proj.weight": ("BF16", (IN, 12)),
                      f"{m}shared_experts.up_proj.weight": ("BF16", (18, IN))}  # fmt: skip
    files.checkpoint(tmp_path / "a", [shapes], config)
    whole, out = load(tmp_path / "a"), tmp_path / "b"
    tt.shard(tmp_path / "a", out, 3)
    divided: dict[str, Callable[[np.ndarray, int, int], np.ndarray]] = {
        **dict.fromkeys((f"{a}q_b_proj", f"{a}kv_b_proj", f"{m}experts.3.gate_proj", f"{m}shared_experts.up_proj"), oracle.vllm_column),
        **dict.fromkeys((f"{a}o_proj", f"{m}experts.3.down_proj"), oracle.vllm_row),
    }
    for rank in range(3):
        for name, found in load(rank_folder(out, rank, 3)).items():
            rule = divided.get(name.removesuffix(".weight"))
            assert np.array_equal(found, rule(whole[name], 3, rank) if rule else whole[name]), name
    tt.merge(out, tmp_path / "c")
    same(load(tmp_path / "c"), whole)


def test_stacked_experts_follow_the_axis_of_their_gates(tmp_path: Path) -> None:
    config = {
        "model_type": "gpt_oss",
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "hidden_size": IN,
        "intermediate_size": 12,
    }
    m = "model.layers.0.mlp.experts."
    shapes: Shapes = {
        f"{m}gate_up_proj": ("BF16", (3, IN, 24)),
        f"{m}gate_up_proj_bias": ("BF16", (3, 24)),
        f"{m}down_proj": ("BF16", (3, 12, IN)),
        f"{m}down_proj_bias": ("BF16", (3, IN)),
        "model.layers.0.self_attn.sinks": ("BF16", (6,)),
        "model.layers.0.mlp.router.bias": ("BF16", (3,)),
    }
    files.checkpoint(tmp_path / "a", [shapes], config)
    whole, out = load(tmp_path / "a"), tmp_path / "b"
    tt.shard(tmp_path / "a", out, 2)
    for rank in range(2):
        found = load(rank_folder(out, rank, 2))
        assert np.array_equal(found[f"{m}gate_up_proj"], whole[f"{m}gate_up_proj"][:, :, rank * 12 : rank * 12 + 12])  # pairs: gate, up
        assert np.array_equal(found[f"{m}gate_up_proj_bias"], whole[f"{m}gate_up_proj_bias"][:, rank * 12 : rank * 12 + 12])
        assert np.array_equal(found[f"{m}down_proj"], whole[f"{m}down_proj"][:, rank * 6 : rank * 6 + 6])
        assert np.array_equal(found[f"{m}down_proj_bias"], whole[f"{m}down_proj_bias"])
        assert np.array_equal(found["model.layers.0.self_attn.sinks"], whole["model.layers.0.self_attn.sinks"][rank * 3 : rank * 3 + 3])
    tt.merge(out, tmp_path / "c")
    same(load(tmp_path / "c"), whole)


# MiMo: one block per rank in the file, and FP8 scales


def mimo(path: Path, heads: int = 64) -> tuple[str, dict[str, str], dict[str, int]]:
    name = "model.layers.0.self_attn.qkv_proj.weight"
    rows = heads * 192 + 8 * 192 + 8 * 128
    shapes: Shapes = {name: ("F8_E4M3", (rows, 256)), f"{name}_scale_inv": ("F32", (-(-rows // 128), 2)),
                      "model.layers.0.self_attn.o_proj.weight": ("F8_E4M3", (256, heads * 128)),
                      "model.layers.0.self_attn.o_proj.weight_scale_inv": ("F32", (2, heads))}  # fmt: skip
    files.checkpoint(path, [shapes], {"model_type": "unheard_of", "quantization_config": {"weight_block_size": [128, 128]}})
    return name, {name: "t (q n r d|k n d|v n dv)"}, {"t": 4, "g": 8, "h": heads, "d": 192, "dv": 128}


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_blocks_and_scales_of_mimo(tmp_path: Path, tp: int) -> None:
    name, layouts, sizes = mimo(tmp_path / "a")
    whole, out = load(tmp_path / "a"), tmp_path / "b"
    tt.shard(tmp_path / "a", out, tp, layouts=layouts, **sizes)
    blocks = [np.split(block, [3072, 3456]) for block in np.split(whole[name], 4)]
    q, k, v = (np.concatenate([block[i] for block in blocks]) for i in range(3))
    scale_of_row = np.repeat(whole[f"{name}_scale_inv"], 128, 0)
    for rank in range(tp):
        found = load(rank_folder(out, rank, tp))
        expected = np.concatenate(oracle.vllm_qkv(q, k, v, 64, 8, tp, rank)) if tp > 1 else whole[name]
        assert np.array_equal(found[name], expected)
        rows = np.concatenate(oracle.vllm_qkv(*_row_numbers(), 64, 8, tp, rank))[:, 0] if tp > 1 else np.arange(len(whole[name]))
        assert np.array_equal(np.repeat(found[f"{name}_scale_inv"], 128, 0), scale_of_row[rows])
        o = "model.layers.0.self_attn.o_proj.weight"
        assert np.array_equal(found[o], oracle.vllm_row(whole[o], tp, rank))
        assert np.array_equal(found[f"{o}_scale_inv"], oracle.vllm_row(whole[f"{o}_scale_inv"], tp, rank))
    if tp == 4:
        assert np.array_equal(load(rank_folder(out, 2, 4))[name], np.split(whole[name], 4)[2])
    tt.merge(out, tmp_path / "c")
    same(load(tmp_path / "c"), whole)


def _row_numbers() -> list[np.ndarray]:
    blocks = [np.split(block, [3072, 3456]) for block in np.split(oracle.grid(14848, 1), 4)]
    return [np.concatenate([block[i] for block in blocks]) for i in range(3)]


def test_scales_that_cross_a_boundary_stop_the_plan(tmp_path: Path) -> None:
    name, layouts, sizes = mimo(tmp_path / "a")
    with pytest.raises(PlanError, match="a block of 128 rows crosses a boundary") as error:
        tt.shard(tmp_path / "a", tmp_path / "b", 8, layouts=layouts, **sizes)
    assert error.value.fields["tensor"] == f"{name}_scale_inv"
    assert error.value.fields["where"] == "rank 0 of 8 holds rows 3072 to 3263: k, head 0, dim 0"
    assert not (tmp_path / "b").exists()


def test_scales_of_rows_and_of_the_whole(tmp_path: Path) -> None:
    config = {"model_type": "llama", "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 4, "hidden_size": IN}
    a = "model.layers.0.self_attn."
    shapes: Shapes = {f"{a}{part}_proj.weight": ("F8_E4M3", (n * 4, IN)) for part, n in (("q", 6), ("k", 2), ("v", 2))}
    shapes |= {f"{a}o_proj.weight": ("F8_E4M3", (IN, 24)), f"{a}o_proj.weight_scale": ("F32", (IN, 1))}
    shapes |= {f"{a}q_proj.weight_scale": ("F32", (24, 1)), f"{a}k_proj.weight_scale": ("F32", (8,))}
    shapes |= {f"{a}v_proj.weight_scale": ("F32", ()), f"{a}q_proj.input_scale": ("F32", (1,))}
    files.checkpoint(tmp_path / "a", [shapes], config)
    whole, out = load(tmp_path / "a"), tmp_path / "b"
    tt.shard(tmp_path / "a", out, 2)
    for rank in range(2):
        found = load(rank_folder(out, rank, 2))
        for part in "qk":
            assert np.array_equal(found[f"{a}{part}_proj.weight_scale"], oracle.vllm_column(whole[f"{a}{part}_proj.weight_scale"], 2, rank))
        for name in (f"{a}v_proj.weight_scale", f"{a}q_proj.input_scale", f"{a}o_proj.weight_scale"):
            assert np.array_equal(found[name], whole[name])
    wrong = {**shapes, f"{a}q_proj.weight_scale": ("F32", (7, 1))}
    files.checkpoint(tmp_path / "w", [wrong], config)
    with pytest.raises(PlanError, match="scales do not fit the tensor that they scale"):
        tt.shard_plan(tmp_path / "w", 2)


# From ranks to ranks


def small(path: Path, kv: int = 2, heads: int = 12, shards: int = 2) -> Arrays:
    config = {"model_type": "llama", "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": 4, "hidden_size": IN}
    a, m = "model.layers.0.self_attn.", "model.layers.0.mlp."
    shapes: Shapes = {f"{a}{part}_proj.weight": ("BF16", (n * 4, IN)) for part, n in (("q", heads), ("k", kv), ("v", kv))}
    shapes |= {f"{a}o_proj.weight": ("BF16", (IN, heads * 4)), "model.norm.weight": ("F32", (IN,))}
    shapes |= {f"{m}gate_proj.weight": ("BF16", (24, IN)), f"{m}down_proj.weight": ("BF16", (IN, 24))}
    shapes |= {"model.embed_tokens.weight": ("BF16", (50, IN))}
    items = list(shapes.items())
    files.checkpoint(path, [dict(items[i::shards]) for i in range(shards)], config)
    (path / "tokenizer.json").write_text("{}")
    return load(path)


@pytest.mark.parametrize(
    ("kv", "before", "after"), [(1, 4, 6), (1, 6, 4), (1, 2, 12), (1, 12, 3), (1, 3, 1), (2, 4, 6), (2, 6, 4), (2, 2, 12)]
)
def test_ranks_become_other_ranks(tmp_path: Path, before: int, after: int, kv: int) -> None:
    small(tmp_path / "a", kv)
    tt.shard(tmp_path / "a", tmp_path / "b", before, pad_vocab_to=8 * before)
    done = tt.shard(tmp_path / "b", tmp_path / "c", after, pad_vocab_to=after)
    tt.shard(tmp_path / "a", tmp_path / "d", after, pad_vocab_to=after)
    for rank in range(after):
        one, two = (rank_folder(tmp_path / side, rank, after) for side in "cd")
        same(load(one), load(two))
        assert (one / "triptych-shard.json").read_bytes() == (two / "triptych-shard.json").read_bytes()
        assert sorted(files.snapshot(one)) == sorted(files.snapshot(two))
        assert json.loads((one / "model.safetensors.index.json").read_text()) == json.loads(
            (two / "model.safetensors.index.json").read_text()
        )
    assert done.made.compared == 1 + 2 * (before > kv)  # the norm, and k and v


def test_policies_can_change(tmp_path: Path) -> None:
    small(tmp_path / "a")
    tt.shard(tmp_path / "a", tmp_path / "b", 4, kv="rows", pad_vocab_to=4)
    tt.shard(tmp_path / "b", tmp_path / "c", 4, kv="replicate")
    tt.shard(tmp_path / "a", tmp_path / "d", 4, pad_vocab_to=4)
    for rank in range(4):
        same(load(rank_folder(tmp_path / "c", rank, 4)), load(rank_folder(tmp_path / "d", rank, 4)))


def test_other_ranks_are_refused_with_the_reason(tmp_path: Path) -> None:
    small(tmp_path / "a", kv=4, heads=24)
    tt.shard(tmp_path / "a", tmp_path / "b", 4, pad_vocab_to=4)
    with pytest.raises(PlanError, match="4 kv heads cannot be shared by 6 ranks") as error:
        tt.shard(tmp_path / "b", tmp_path / "c", 6, pad_vocab_to=6)
    assert error.value.fields["equation"] == "4 divides neither into 6 nor 6 into 4"
    with pytest.raises(PlanError, match="24 heads of q cannot be shared by 16 ranks"):
        tt.shard(tmp_path / "b", tmp_path / "c", 16, pad_vocab_to=16)
    with pytest.raises(PlanError, match="ranks know how they are divided"):
        tt.shard(tmp_path / "b", tmp_path / "c", 2, rules={"*": "copy"})
    assert not (tmp_path / "c").exists()


def flip(path: Path, name: str, at: int) -> None:
    """Change one byte of a tensor."""
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    begin = json.loads(content[8:start])[name]["data_offsets"][0]
    content[start + begin + at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(("name", "rank", "at"), [("model.layers.0.self_attn.v_proj.weight", 1, 159), ("model.norm.weight", 3, 0)])
def test_copies_that_differ_are_found(tmp_path: Path, name: str, rank: int, at: int) -> None:
    small(tmp_path / "a", shards=1)
    tt.shard(tmp_path / "a", tmp_path / "b", 4, pad_vocab_to=4)
    flip(rank_folder(tmp_path / "b", rank, 4) / "model.safetensors", name, at)
    for run in (lambda: tt.merge(tmp_path / "b", tmp_path / "c"), lambda: tt.shard(tmp_path / "b", tmp_path / "c", 2)):
        with pytest.raises(MismatchError, match="two ranks hold different copies of the same rows") as error:
            run()
        assert error.value.fields["tensor"] == name
        assert error.value.fields["where"] == f"byte {at} of rank-0-of-4/model.safetensors, byte {at} of rank-{rank}-of-4/model.safetensors"
        assert not (tmp_path / "c").exists()


def test_a_row_that_one_rank_holds_is_not_compared(tmp_path: Path) -> None:
    """Bytes that only one rank has cannot be checked: they are carried over as they are."""
    small(tmp_path / "a", shards=1)
    tt.shard(tmp_path / "a", tmp_path / "b", 4, pad_vocab_to=4)
    name = "model.layers.0.self_attn.q_proj.weight"
    flip(rank_folder(tmp_path / "b", 2, 4) / "model.safetensors", name, 5)
    tt.merge(tmp_path / "b", tmp_path / "c")
    differs = load(tmp_path / "c")[name] != load(tmp_path / "a")[name]
    assert np.argwhere(differs).tolist() == [[24, 2]]


def test_padding_that_is_not_zero_is_kept_from_getting_lost(tmp_path: Path) -> None:
    small(tmp_path / "a", shards=1)
    tt.shard(tmp_path / "a", tmp_path / "b", 4, pad_vocab_to=64)
    flip(rank_folder(tmp_path / "b", 3, 4) / "model.safetensors", "model.embed_tokens.weight", 15 * IN * 2)
    with pytest.raises(PlanError, match="rows that the layout declares zero are not"):
        tt.merge(tmp_path / "b", tmp_path / "c")


def edit(table: Path, **new: object) -> None:
    table.write_text(json.dumps({**json.loads(table.read_text()), **new}))


def test_ranks_that_are_no_set_are_refused(tmp_path: Path) -> None:
    small(tmp_path / "a", shards=1)
    tt.shard(tmp_path / "a", tmp_path / "good", 4, pad_vocab_to=4)
    tt.shard(tmp_path / "a", tmp_path / "two", 2)

    def broken(change: Callable[[Path], object], match: str, kind: type[Exception] = FormatError) -> None:
        shutil.rmtree(tmp_path / "b", ignore_errors=True)
        shutil.copytree(tmp_path / "good", tmp_path / "b")
        change(tmp_path / "b")
        with pytest.raises(kind, match=match):
            tt.merge(tmp_path / "b", tmp_path / "c")
        assert not (tmp_path / "c").exists()

    table = "rank-1-of-4/triptych-shard.json"
    broken(lambda b: shutil.rmtree(b / "rank-1-of-4"), "the ranks are not complete")
    broken(lambda b: shutil.copytree(tmp_path / "two" / "rank-0-of-2", b / "rank-0-of-2"), "the ranks are not complete")
    broken(lambda b: (b / table).unlink(), "cannot be opened|no such file|cannot be read")
    broken(lambda b: edit(b / table, version=2), "a version that this program does not know")
    broken(lambda b: edit(b / table, rank=0), "the tables of two ranks differ")
    broken(lambda b: edit(b / table, pad=8), "the tables of two ranks differ")
    broken(lambda b: [edit(b / f"rank-{r}-of-4/triptych-shard.json", kv="odd") for r in range(4)], "the table of a rank is damaged")
    broken(lambda b: [edit(b / f"rank-{r}-of-4/triptych-shard.json", cuts=[{}]) for r in range(4)], "the table of a rank is damaged")
    broken(lambda b: [edit(b / f"rank-{r}-of-4/triptych-shard.json", cuts=[]) for r in range(4)], "the table of a rank is damaged")
    broken(lambda b: [edit(b / f"rank-{r}-of-4/triptych-shard.json", layouts=[]) for r in range(4)], "the stamp is damaged")
    broken(
        lambda b: [edit(b / f"rank-{r}-of-4/triptych-shard.json", tensors={}) for r in range(4)], "does not speak of a tensor", PlanError
    )
    cuts = json.loads((tmp_path / "good" / table).read_text())["cuts"]
    for size in (1 << 40, 1 << 20, 200):
        huge = [{**cut, "sizes": dict.fromkeys(cut["sizes"], size)} for cut in cuts]
        broken(
            lambda b, huge=huge: [edit(b / f"rank-{r}-of-4/triptych-shard.json", cuts=huge) for r in range(4)], "not hold what their? table"
        )
    broken(lambda b: (b / ".triptych-unfinished.json").touch(), "the input is an unfinished conversion")
    one = load(tmp_path / "good" / "rank-0-of-4")
    broken(lambda b: _rewrite(b / "rank-3-of-4", {**one, "more": one["model.norm.weight"]}), "do not hold the same tensors")
    short = {name: x for name, x in one.items() if "norm" not in name}
    broken(lambda b: _rewrite(b / "rank-3-of-4", short), "does not hold what its table says")
    broken(
        lambda b: _rewrite(b / "rank-3-of-4", {**one, "model.norm.weight": one["model.norm.weight"][:8]}),
        "does not hold what its table says",
    )


def _rewrite(folder: Path, arrays: Arrays) -> None:
    kinds = {2: "BF16", 4: "F32"}
    files.safetensors(folder / "model.safetensors", {name: (kinds[x.itemsize], x.shape) for name, x in arrays.items()})


def test_a_rank_that_was_converted_is_refused(tmp_path: Path) -> None:
    config = {"model_type": "phi3", "num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 24, "intermediate_size": 12}
    name = "model.layers.0.self_attn.qkv_proj.weight"
    files.checkpoint(tmp_path / "a", [{name: ("BF16", (40, IN))}], config)
    tt.shard(tmp_path / "a", tmp_path / "b", 2)
    tt.convert(rank_folder(tmp_path / "b", 1, 2), tmp_path / "x", "g (q r|k|v) d")
    shutil.copy(tmp_path / "x" / "model.safetensors", rank_folder(tmp_path / "b", 1, 2) / "model.safetensors")
    with pytest.raises(PlanError, match="a rank was converted after it was made"):
        tt.merge(tmp_path / "b", tmp_path / "c")


def test_a_converted_checkpoint_is_divided_by_its_stamp(tmp_path: Path) -> None:
    small(tmp_path / "a", shards=1)
    tt.convert(tmp_path / "a", tmp_path / "f", "fused:g (q r|k|v) d")
    tt.shard(tmp_path / "f", tmp_path / "s", 4, kv="rows", pad_vocab_to=4)
    name = "model.layers.0.self_attn.qkv_proj.weight"
    whole = load(tmp_path / "f")[name]
    for rank in range(4):
        assert np.array_equal(load(rank_folder(tmp_path / "s", rank, 4))[name], oracle.megatron_qkv(whole, 12, 2, 4, rank))
    tt.merge(tmp_path / "s", tmp_path / "m")
    tt.convert(tmp_path / "m", tmp_path / "b", "split")
    same(load(tmp_path / "b"), load(tmp_path / "a"))


# What is refused, what is said


def test_a_tensor_that_nothing_speaks_of_is_refused(tmp_path: Path) -> None:
    files.checkpoint(tmp_path / "a", [{"odd.one.weight": ("BF16", (8, 6)), "odd.two.weight": ("BF16", (8, 6))}], {"model_type": "llama"})
    with pytest.raises(PlanError, match="nothing says how ranks divide a tensor") as error:
        tt.shard_plan(tmp_path / "a", 2)
    assert error.value.fields == {
        "tensor": "odd.one.weight  and 1 more",
        "found": "BF16 (8, 6)",
        "try": "--rule 'odd.one.weight=copy', or column, row, vocab",
    }
    whole = load(tmp_path / "a")
    tt.shard(tmp_path / "a", tmp_path / "b", 2, rules={"*.one.*": "column @ 1", "*.two.*": "column"})
    assert np.array_equal(load(rank_folder(tmp_path / "b", 1, 2))["odd.one.weight"], whole["odd.one.weight"][:, 3:])
    assert np.array_equal(load(rank_folder(tmp_path / "b", 1, 2))["odd.two.weight"], whole["odd.two.weight"][4:])
    wrong = [({"*": "odd"}, "no such rule"), ({"none": "copy"}, "no tensor has such a name"), ({"*": "row @ 2"}, "no such axis")]
    wrong += [({"*.one.*": "copy", "odd.*": "row"}, "two rules are given"), ({"*": "copy @ 1"}, "no such rule")]
    for rules, match in wrong:
        with pytest.raises(PlanError, match=match):
            tt.shard_plan(tmp_path / "a", 2, rules=rules)
    with pytest.raises(PlanError, match="6 of f cannot be shared by 4 ranks"):
        tt.shard_plan(tmp_path / "a", 4, rules={"*": "row"})


def test_a_weight_stored_the_other_way_round_is_found_out(tmp_path: Path) -> None:
    """A Conv1D family that the table does not list: its bias, or the projection beside it, tells the output."""
    shapes: Shapes = {"h.0.mlp.c_fc.weight": ("F16", (24, 96)), "h.0.mlp.c_fc.bias": ("F16", (96,))}
    files.checkpoint(tmp_path / "a", [shapes], {"model_type": "unheard_of"})
    with pytest.raises(PlanError, match="a weight seems to be stored the other way round") as error:
        tt.shard_plan(tmp_path / "a", 2)
    assert error.value.fields["found"] == "(24, 96), bias (96,)"
    assert error.value.fields["try"] == "--rule 'h.*.mlp.c_fc.weight=column @ 1'"
    tt.shard(tmp_path / "a", tmp_path / "b", 2, rules={"h.*.mlp.c_fc.weight": "column @ 1"})
    assert load(rank_folder(tmp_path / "b", 1, 2))["h.0.mlp.c_fc.weight"].shape == (24, 48)
    square: Shapes = {"h.0.attn.c_attn.weight": ("F16", (24, 72)), "h.0.attn.c_proj.weight": ("F16", (24, 24))}
    files.checkpoint(tmp_path / "s", [square], {"model_type": "unheard_of"})
    with pytest.raises(PlanError, match="the projection beside it has its output along axis 1"):
        tt.shard_plan(tmp_path / "s", 2, layouts={"*.c_attn.*": "(q|k|v) h d @ 1"}, h=4)


def test_a_fused_tensor_of_unknown_layout_is_refused(tmp_path: Path) -> None:
    files.checkpoint(tmp_path / "a", [{"x.qkv_proj.weight": ("BF16", (24, 6))}], {"model_type": "unheard_of"})
    with pytest.raises(PlanError, match="the layout of a fused tensor is not known"):
        tt.shard_plan(tmp_path / "a", 2)
    tt.shard(tmp_path / "a", tmp_path / "b", 2, layouts={"x.*": "h (q|k|v) d"}, h=4)
    assert str(tt.inspect(rank_folder(tmp_path / "b", 0, 2)).projections[0].layout) == "h (q|k|v) d"


def test_places_and_numbers(tmp_path: Path) -> None:
    small(tmp_path / "a")
    for tp in (0, -1, 1025, True, 2.0):
        with pytest.raises(PlanError, match="no such number of ranks"):
            tt.shard_plan(tmp_path / "a", tp)
    with pytest.raises(PlanError, match="no such division"):
        tt.shard_plan(tmp_path / "a", 2, kv="odd")
    with pytest.raises(PlanError, match="no such division"):
        tt.shard_plan(tmp_path / "a", 2, pad_vocab_to=0)
    with pytest.raises(PlanError, match="the output lies inside the input"):
        tt.shard_plan(tmp_path / "a", 2, tmp_path / "a" / "b")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(PlanError, match="the output exists"):
        tt.shard_plan(tmp_path / "a", 2, tmp_path / "full")
    with pytest.raises(PlanError, match="ranks are made of a folder"):
        tt.shard_plan(tmp_path / "a" / "model-00001-of-00002.safetensors", 2, rules={"*": "copy"})
    with pytest.raises(PlanError, match="there are no ranks here"):
        tt.merge(tmp_path / "a", tmp_path / "b")
    with pytest.raises(PlanError, match="a plan without an output cannot be run"):
        importlib.import_module("triptych.shard").carry_out(tt.shard_plan(tmp_path / "a", 2))


def test_other_weights_are_left_out_and_said(tmp_path: Path) -> None:
    small(tmp_path / "a")
    (tmp_path / "a" / "old").mkdir()
    (tmp_path / "a" / "old" / "consolidated.pth").write_bytes(b"weights")
    (tmp_path / "a" / "old" / "note.txt").write_bytes(b"kept")
    made = tt.shard(tmp_path / "a", tmp_path / "b", 2).made
    assert made.plan.notes == ("old/consolidated.pth is left out: its weights are not divided",)
    found = files.snapshot(rank_folder(tmp_path / "b", 1, 2))
    assert found["old/note.txt"] == b"kept" and found["tokenizer.json"] == b"{}" and "old/consolidated.pth" not in found


def test_torch_files_become_ranks(tmp_path: Path) -> None:
    whole = small(tmp_path / "a", shards=1)
    (tmp_path / "p").mkdir()
    kinds = {2: torch.bfloat16, 4: torch.float32}
    tensors = {name: torch.from_numpy(x.view(f"i{x.itemsize}").copy()).view(kinds[x.itemsize]) for name, x in whole.items()}
    torch.save(tensors, tmp_path / "p" / "pytorch_model.bin")
    shutil.copy(tmp_path / "a" / "config.json", tmp_path / "p")
    tt.shard(tmp_path / "p", tmp_path / "b", 2)
    tt.shard(tmp_path / "a", tmp_path / "c", 2)
    same(load(rank_folder(tmp_path / "b", 1, 2)), load(rank_folder(tmp_path / "c", 1, 2)))


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    small(tmp_path / "a")
    tt.shard(tmp_path / "a", tmp_path / "good", 4, pad_vocab_to=4)
    seen = []

    def stop(size: int) -> None:
        seen.append(size)
        if len(seen) == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tt.shard(tmp_path / "a", tmp_path / "b", 4, pad_vocab_to=4, workers=1, progress=stop)
    with pytest.raises(FormatError, match="the input is an unfinished conversion"):
        tt.merge(tmp_path / "b", tmp_path / "c")
    done = tt.shard(tmp_path / "a", tmp_path / "b", 4, pad_vocab_to=4)
    assert done.kept
    assert files.snapshot(tmp_path / "b") == files.snapshot(tmp_path / "good")


def test_an_error_half_way_leaves_nothing(tmp_path: Path) -> None:
    small(tmp_path / "a")

    def fail(size: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(tt.TriptychError, match="the output cannot be written"):
        tt.shard(tmp_path / "a", tmp_path / "b", 2, progress=fail)
    assert not (tmp_path / "b").exists()


def test_a_plan_that_loses_rows_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of coverage is not the map that it checks."""
    small(tmp_path / "a")
    planning = importlib.import_module("triptych.shard_plan")
    true = planning.passage

    def wrong(cut: Any, before: Ranks, after: Ranks) -> Any:
        found = true(cut, before, after)
        return found._replace(taken=(found.taken[0], found.taken[0])) if cut.role == "even" else found

    planning._moved.cache_clear()
    monkeypatch.setattr(planning, "passage", wrong)
    with pytest.raises(PlanError, match="not every row of a source tensor is used as often as it should be"):
        tt.shard_plan(tmp_path / "a", 2)
    planning._moved.cache_clear()


# The command line


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return int(exit_.value.code or 0), out, err


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small(tmp_path / "a")
    code, out, _ = call(capsys, "shard", tmp_path / "a", "--tp", 4, "--pad-vocab-to", 4, "--dry-run")
    assert code == 0
    assert "one folder to 4 ranks, vocabulary padded to 4" in out
    assert "(k g d) by heads   g=2 d=4 -> g=1 d=4" in out
    code, out, _ = call(capsys, "shard", tmp_path / "a", tmp_path / "b", "--tp", 4, "--pad-vocab-to", 4, "--kv", "rows", "--json")
    told = json.loads(out)
    assert code == 0 and told["tensors"] == 8 and told["target"] == "4 ranks, raw kv rows, vocabulary padded to 4"
    code, out, _ = call(capsys, "merge", tmp_path / "b", "--dry-run", "--json")
    told = json.loads(out)
    assert code == 0 and told["before"] == {"world": 4, "kv": "rows", "pad": 4} and told["after"] is None and told["compared"] == 1
    code, out, _ = call(capsys, "merge", tmp_path / "b", tmp_path / "c")
    assert code == 0 and "8 tensors to one folder; 1 tensor that several ranks hold is equal" in out
    same(load(tmp_path / "a"), load(tmp_path / "c"))
    assert call(capsys, "shard", tmp_path / "a", "--tp", 4)[0] == 4  # the vocabulary
    assert call(capsys, "shard", tmp_path / "a", "--tp", 2)[0] == 2  # no place
    assert call(capsys, "shard", tmp_path / "a", tmp_path / "d", "--tp", 0)[0] == 2
    assert call(capsys, "shard", tmp_path / "a", tmp_path / "d", "--tp", 2, "-s", "tp=3")[0] == 2
    flip(rank_folder(tmp_path / "b", 2, 4) / "model-00001-of-00002.safetensors", "model.norm.weight", 1)
    assert call(capsys, "merge", tmp_path / "b", tmp_path / "d")[0] == 1


# Against transformers


@pytest.mark.parametrize(("heads", "kv", "tp"), [(12, 2, 2), (12, 2, 4), (12, 3, 6), (12, 6, 3)])
def test_ranks_together_compute_what_the_model_computes(tmp_path: Path, heads: int, kv: int, tp: int) -> None:
    """Attention and MLP of every rank, run by transformers' own modules at the sizes of the rank: their sum is the layer's output."""
    torch.manual_seed(1)
    more = {
        "hidden_size": 36,
        "intermediate_size": 24,
        "vocab_size": 60,
        "num_hidden_layers": 1,
        "head_dim": 8,
        "attn_implementation": "eager",
    }
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=heads, num_key_value_heads=kv, **more)).double().eval()
    model.save_pretrained(tmp_path / "a")
    tt.shard(tmp_path / "a", tmp_path / "b", tp)
    x = torch.randn(2, 5, 36, dtype=torch.float64)
    places = model.model.rotary_emb(x, torch.arange(5)[None])
    layer = model.model.layers[0]
    config = LlamaConfig(num_attention_heads=heads // tp, num_key_value_heads=max(1, kv // tp), **{**more, "intermediate_size": 24 // tp})
    attention, mlp = torch.zeros_like(x), torch.zeros_like(x)
    for rank in range(tp):
        mine = {name: torch.from_numpy(a.view(np.float64).copy()) for name, a in load(rank_folder(tmp_path / "b", rank, tp)).items()}
        for kind, total in ((LlamaAttention(config, 0), attention), (LlamaMLP(config), mlp)):
            home = f"model.layers.0.{'self_attn' if total is attention else 'mlp'}."
            kind.double().load_state_dict({name.removeprefix(home): t for name, t in mine.items() if name.startswith(home)})
            with torch.no_grad():
                total += kind(x, places, None)[0] if total is attention else kind(x)
    with torch.no_grad():
        assert torch.allclose(attention, layer.self_attn(x, places, None)[0], rtol=0, atol=1e-12)
        assert torch.allclose(mlp, layer.mlp(x), rtol=0, atol=1e-12)


def plans() -> dict[str, dict[str, str]]:
    """Model type -> the tensor-parallel plan of its configuration class, read off the source."""
    found = {}
    for path in (Path(transformers.__file__).parent / "models").glob("*/configuration_*.py"):
        for kind in ast.parse(path.read_text("utf-8")).body:
            told = {}
            for line in kind.body if isinstance(kind, ast.ClassDef) else ():
                if (
                    isinstance(line, ast.Assign)
                    and isinstance(line.targets[0], ast.Name)
                    and isinstance(line.value, ast.Constant | ast.Dict)
                ):
                    told[line.targets[0].id] = line.value
            if {"model_type", "base_model_tp_plan"} <= set(told):
                plan = told["base_model_tp_plan"]
                pairs = zip(plan.keys, plan.values, strict=True) if isinstance(plan, ast.Dict) else ()
                found[ast.literal_eval(told["model_type"])] = {
                    ast.literal_eval(key): ast.literal_eval(value) for key, value in pairs if key is not None
                }
    return found


def test_the_table_agrees_with_the_plans_of_transformers() -> None:
    """Where both speak of a linear layer of attention or MLP, they say the same. (Of stacked experts the plan names the axis alone.)"""
    compared, wrong = 0, []
    for kind, plan in plans().items():
        for pattern, style in plan.items():
            told = parallel.by_name(f"model.{pattern.replace('*', '0')}.weight", (8, 6), {kind})
            role = {"colwise": "column", "rowwise": "row"}.get(style)
            if role is None or told is None or told.role == "stacked":
                continue
            compared += 1
            if told.role != role:
                wrong.append((kind, pattern, style, told.role))
    assert wrong == []
    assert compared > 400
