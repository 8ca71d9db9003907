"""Ranks that others wrote, without a table: what vLLM and Megatron hold by their own rules becomes the whole model again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import triptych as tt
from tests import sharding_oracle as oracle
from triptych.cli import main
from triptych.errors import FormatError, MismatchError, PlanError

H, D, HID, F, VOCAB, LAYERS = 12, 8, 20, 36, 101, 2
Arrays = dict[str, np.ndarray]


def config_of(kv: int, **more: Any) -> dict[str, Any]:
    sizes = {"num_attention_heads": H, "num_key_value_heads": kv, "head_dim": D, "hidden_size": HID, "intermediate_size": F}
    return {"model_type": "llama", **sizes, "vocab_size": VOCAB, **more}


def noise(shapes: dict[str, tuple[int, ...]]) -> Arrays:
    rng = np.random.default_rng(7)
    return {name: rng.integers(0, 1 << 16, shape).astype(np.uint16) for name, shape in shapes.items()}


def llama(kv: int) -> Arrays:
    """The model's own tensors, with biases of q, k, v and o."""
    shapes: dict[str, tuple[int, ...]] = {
        "lm_head.weight": (VOCAB, HID),
        "model.embed_tokens.weight": (VOCAB, HID),
        "model.norm.weight": (HID,),
    }
    for layer in range(LAYERS):
        a, m = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.mlp."
        for part, heads in (("q", H), ("k", kv), ("v", kv)):
            shapes |= {f"{a}{part}_proj.weight": (heads * D, HID), f"{a}{part}_proj.bias": (heads * D,)}
        shapes |= {f"{a}o_proj.weight": (HID, H * D), f"{a}o_proj.bias": (HID,), f"{m}down_proj.weight": (HID, F)}
        shapes |= {f"{m}gate_proj.weight": (F, HID), f"{m}up_proj.weight": (F, HID), f"model.layers.{layer}.input_layernorm.weight": (HID,)}
    return noise(shapes)


def rank_of(whole: Arrays, kv: int, tp: int, rank: int, pad: int = 64, rows: bool = False) -> Arrays:
    """What a rank holds of each tensor under the model's own names; `rows`: kv heads cut through, as Megatron cuts any column-parallel."""
    out: Arrays = {}
    for name, x in whole.items():
        if "norm" in name or name.endswith("o_proj.bias"):
            out[name] = x
        elif "embed" in name or "lm_head" in name:
            out[name] = oracle.vllm_vocab(x, pad, tp, rank, 0)
        elif "o_proj" in name or "down_proj" in name:
            out[name] = oracle.vllm_row(x, tp, rank)
        elif ("k_proj" in name or "v_proj" in name) and not rows:
            out[name] = oracle.vllm_qkv(oracle.grid(H * D, 1), x, x, H, kv, tp, rank)[1]
        else:
            out[name] = oracle.vllm_column(x, tp, rank)
    return out


def as_vllm(rank: Arrays) -> Arrays:
    """The same under vLLM's names: q, k, v in one parameter, and gate and up (linear.py:1282-1290 and 836-839 of vllm==0.33.0)."""
    out = {name: x for name, x in rank.items() if not any(f".{part}_proj." in name for part in ("q", "k", "v", "gate", "up"))}
    for name in rank:
        for first, fused, parts in (("q", "qkv", "qkv"), ("gate", "gate_up", ("gate", "up"))):
            if f".{first}_proj." in name:
                out[name.replace(f".{first}_", f".{fused}_")] = np.concatenate([rank[name.replace(f".{first}_", f".{p}_")] for p in parts])
    return out


def save_vllm(folder: Path, ranks: list[Arrays], config: dict[str, Any] | None, parts: int = 2) -> Path:
    """Files as ShardedStateLoader.save_model writes them (sharded_state_loader.py:38, 269-305): each rank's tensors in parts."""
    folder.mkdir()
    for number, rank in enumerate(ranks):
        names = sorted(rank)
        for part in range(parts):
            some = {name: np.ascontiguousarray(rank[name]) for name in names[part::parts]}
            save_file(some, folder / f"model-rank-{number}-part-{part}.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def save_folders(folder: Path, ranks: list[Arrays], config: dict[str, Any] | None, name: str = "rank{}", inside: bool = True) -> Path:
    for number, rank in enumerate(ranks):
        home = folder / name.format(number)
        home.mkdir(parents=True)
        save_file({key: np.ascontiguousarray(x) for key, x in rank.items()}, home / "model.safetensors")
        if config is not None and (inside or not number):
            ((home if inside else folder) / "config.json").write_text(json.dumps(config))
    return folder


def load(folder: Path) -> Arrays:
    return {name: x for path in sorted(folder.glob("*.safetensors")) for name, x in load_file(path).items()}


def same(found: Arrays, expected: Arrays) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert found[name].shape == x.shape and np.array_equal(found[name], x), name


# vLLM


@pytest.mark.parametrize(("kv", "tp", "parts"), [(1, 2, 1), (2, 4, 2), (3, 3, 3), (6, 2, 2), (4, 12, 1)])
def test_vllm_files_become_the_model(tmp_path: Path, kv: int, tp: int, parts: int) -> None:
    whole = llama(kv)
    pad = 48 if tp % 3 == 0 else 64
    ranks = [as_vllm(rank_of(whole, kv, tp, rank, pad)) for rank in range(tp)]
    source = save_vllm(tmp_path / "a", ranks, config_of(kv), parts)
    done = tt.merge(source, tmp_path / "m", tp=tp, pad_vocab_to=pad)
    assert done.made.compared == 2 * LAYERS + 1 + (2 * LAYERS if kv < tp else 0)
    tt.convert(tmp_path / "m", tmp_path / "s", "split", overrides={"*.gate_up_proj.*": "split"})
    same(load(tmp_path / "s"), whole)
    names = {path.name for path in (tmp_path / "m").iterdir()}
    index = {"model.safetensors.index.json"} if parts > 1 else set()
    weights = {f"model-{n:05}-of-{parts:05}.safetensors" for n in range(1, parts + 1)} if parts > 1 else {"model.safetensors"}
    assert names == {"config.json", "tokenizer.json", *weights, *index}
    (attention,) = {
        (str(one.layout), one.sizes["h"], one.sizes["g"]) for one in tt.inspect(tmp_path / "m").projections if one.kind == "attention"
    }
    assert attention == ("q h d|k g d|v g d", H, kv)


def test_vllm_files_are_divided_anew(tmp_path: Path) -> None:
    """From 4 ranks to 2 at once is the same as merging and dividing."""
    whole = llama(2)
    source = save_vllm(tmp_path / "a", [as_vllm(rank_of(whole, 2, 4, rank)) for rank in range(4)], config_of(2), 1)
    tt.shard(source, tmp_path / "b", 2, pad_vocab_to=64)
    for rank in range(2):
        same(load(tmp_path / "b" / f"rank-{rank}-of-2"), as_vllm(rank_of(whole, 2, 2, rank)))
    tt.merge(tmp_path / "b", tmp_path / "c")
    tt.merge(source, tmp_path / "d", pad_vocab_to=64)
    same(load(tmp_path / "c"), load(tmp_path / "d"))


def test_vllm_holds_q_k_v_whatever_the_model_has(tmp_path: Path) -> None:
    """GPT-NeoX's own rows are h (q|k|v) d, and GPT-2's lie along axis 1; vLLM's parameters are q|k|v rows of [out, in]."""
    qkv, up = "gpt_neox.layers.0.attention.query_key_value.weight", "gpt_neox.layers.0.mlp.dense_h_to_4h.weight"
    own = noise({qkv: (3 * 6 * 4, 10), up: (30, 10)})
    q, k, v = own[qkv].reshape(6, 3, 4, 10).swapaxes(0, 1).reshape(3, 24, 10)
    ranks = [{qkv: np.concatenate(oracle.vllm_qkv(q, k, v, 6, 6, 3, r)), up: oracle.vllm_column(own[up], 3, r)} for r in range(3)]
    config = {"model_type": "gpt_neox", "num_attention_heads": 6, "hidden_size": 24}
    tt.merge(save_vllm(tmp_path / "a", ranks, config), tmp_path / "m")
    same(load(tmp_path / "m"), {qkv: np.concatenate([q, k, v]), up: own[up]})
    tt.convert(tmp_path / "m", tmp_path / "c", "h (q|k|v) d")
    same(load(tmp_path / "c"), own)
    attn, fc = "transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_fc"
    own = noise({f"{attn}.weight": (72, 24), f"{attn}.bias": (72,), f"{fc}.weight": (96, 24), f"{fc}.bias": (96,)})
    split = {name: np.split(x, 3) for name, x in own.items()}
    ranks = [{name: np.concatenate(oracle.vllm_qkv(*split[name], 6, 6, 2, r)) if attn in name else oracle.vllm_column(x, 2, r)
              for name, x in own.items()} for r in range(2)]  # fmt: skip
    tt.merge(save_vllm(tmp_path / "g", ranks, {"model_type": "gpt2", "n_head": 6, "n_embd": 24}), tmp_path / "h")
    same(load(tmp_path / "h"), own)


def test_what_no_record_says_of_vllm_is_asked_for(tmp_path: Path) -> None:
    """InternLM2's rows lie per group in its own files, and vLLM puts them in order while it computes: nobody knows them from the name."""
    name = "model.layers.0.attention.wqkv.weight"
    config = {"model_type": "internlm2", "num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 24}
    whole = noise({name: (40, 24)})
    ranks = [{name: np.concatenate(oracle.vllm_qkv(*np.split(whole[name], [24, 32]), 6, 2, 2, r))} for r in range(2)]
    source = save_vllm(tmp_path / "a", ranks, config)
    with pytest.raises(PlanError, match="no record says how vLLM holds this tensor"):
        tt.merge(source, tmp_path / "m")
    tt.merge(source, tmp_path / "m", layouts={"*.wqkv.weight": "(q h|k g|v g) d"}, h=6, g=2)
    same(load(tmp_path / "m"), whole)


def test_experts_in_one_tensor_are_asked_for(tmp_path: Path) -> None:
    m = "model.layers.0.mlp.experts."
    whole = noise({f"{m}w13_weight": (3, 2 * F, HID), f"{m}w2_weight": (3, HID, F)})
    ranks = [{f"{m}w13_weight": np.stack([oracle.vllm_merged(x, 2, 2, r) for x in whole[f"{m}w13_weight"]]),
              f"{m}w2_weight": oracle.vllm_row(whole[f"{m}w2_weight"], 2, r, 2)} for r in range(2)]  # fmt: skip
    source = save_vllm(tmp_path / "a", ranks, {"model_type": "qwen3_moe"})
    with pytest.raises(PlanError, match="nothing says how ranks divide a tensor"):
        tt.merge(source, tmp_path / "m")
    tt.merge(source, tmp_path / "m", layouts={"*.w13_weight": "(gate|up) f @ 1"}, rules={"*.w2_weight": "row @ 2"})
    same(load(tmp_path / "m"), whole)


# Plain folders


@pytest.mark.parametrize("name", ["rank{}", "rank_{:02}", "mp_rank_{:02}", "tp-{}", "model.rank{}"])
@pytest.mark.parametrize("inside", [True, False])
def test_names_of_folders(tmp_path: Path, name: str, inside: bool) -> None:
    whole = llama(2)
    source = save_folders(tmp_path / "a", [rank_of(whole, 2, 2, rank) for rank in range(2)], config_of(2), name, inside)
    tt.merge(source, tmp_path / "m", pad_vocab_to=64)
    same(load(tmp_path / "m"), whole)
    assert json.loads((tmp_path / "m" / "config.json").read_text()) == config_of(2)


@pytest.mark.parametrize(("kv", "tp", "rows"), [(2, 4, False), (2, 4, True), (1, 4, True), (3, 12, False), (6, 3, False)])
def test_the_policy_follows_from_the_shapes(tmp_path: Path, kv: int, tp: int, rows: bool) -> None:
    whole = llama(kv)
    source = save_folders(tmp_path / "a", [rank_of(whole, kv, tp, rank, 12, rows) for rank in range(tp)], config_of(kv))
    for asked in (None, "rows" if rows else "replicate"):
        out = tmp_path / f"m-{asked}"
        tt.merge(source, out, pad_vocab_to=12, kv=asked)
        same(load(out), whole)
    if kv % tp:
        with pytest.raises(FormatError, match="a rank does not hold what the whole gives it"):
            tt.merge(source, tmp_path / "x", pad_vocab_to=12, kv="replicate" if rows else "rows")
    tt.shard(source, tmp_path / "s", 1, pad_vocab_to=1)
    same(load(tmp_path / "s" / "rank-0-of-1"), whole)


def test_grouped_rows_of_megatron(tmp_path: Path) -> None:
    """A fused tensor of kv groups, cut through them: 2 groups on 4 ranks."""
    layer = "transformer.h.0.self_attention."
    config = {"model_type": "falcon", "num_attention_heads": 12, "num_kv_heads": 2, "hidden_size": 96, "new_decoder_architecture": True}
    whole = noise({f"{layer}query_key_value.weight": (16 * 8, 10), f"{layer}dense.weight": (10, 96)})
    ranks = [{f"{layer}query_key_value.weight": oracle.megatron_qkv(whole[f"{layer}query_key_value.weight"], 12, 2, 4, r),
              f"{layer}dense.weight": oracle.megatron_column(whole[f"{layer}dense.weight"], 4, r, 1)} for r in range(4)]  # fmt: skip
    source = save_folders(tmp_path / "a", ranks, config)
    assert tt.merge(source, tmp_path / "m").made.before == tt.merge_plan(source, kv="rows").before
    same(load(tmp_path / "m"), whole)


def test_weights_stored_in_out(tmp_path: Path) -> None:
    shapes = {"h.0.attn.c_attn.weight": (24, 72), "h.0.attn.c_attn.bias": (72,), "h.0.attn.c_proj.weight": (24, 24),
              "h.0.mlp.c_fc.weight": (24, 96), "h.0.mlp.c_fc.bias": (96,), "h.0.ln_1.bias": (24,)}  # fmt: skip
    whole = noise(shapes)

    def rank(r: int) -> Arrays:
        out = {"h.0.ln_1.bias": whole["h.0.ln_1.bias"], "h.0.attn.c_proj.weight": oracle.vllm_row(whole["h.0.attn.c_proj.weight"], 3, r, 0)}
        for name in ("h.0.attn.c_attn.weight", "h.0.attn.c_attn.bias"):
            out[name] = np.concatenate(oracle.vllm_qkv(*np.split(whole[name].T, 3), 6, 6, 3, r)).T
        return out | {name: oracle.vllm_column(whole[name].T, 3, r).T for name in ("h.0.mlp.c_fc.weight", "h.0.mlp.c_fc.bias")}

    source = save_folders(tmp_path / "a", [rank(r) for r in range(3)], {"model_type": "gpt2", "n_head": 6, "n_embd": 24})
    tt.merge(source, tmp_path / "m")
    same(load(tmp_path / "m"), whole)


def test_torch_files_and_sizes_by_hand(tmp_path: Path) -> None:
    """Without a config heads are given by hand, and what the vocabulary is."""
    whole = {name: x for name, x in llama(2).items() if "bias" not in name}
    for rank in range(2):
        (tmp_path / "a" / f"rank{rank}").mkdir(parents=True)
        own = {name: torch.from_numpy(x.view(np.int16).copy()) for name, x in rank_of(whole, 2, 2, rank).items()}
        torch.save(own, tmp_path / "a" / f"rank{rank}" / "pytorch_model.bin")
    layouts = {"*.q_proj.*": "(q h d)", "*.k_proj.*": "(k g d)", "*.v_proj.*": "(v g d)"}
    with pytest.raises(PlanError, match="nothing says how large the vocabulary is"):
        tt.merge_plan(tmp_path / "a", layouts=layouts, h=H, g=2, d=D)
    rules = {"*embed_tokens*": "column", "lm_head.*": "column"}
    tt.merge(tmp_path / "a", tmp_path / "m", layouts=layouts, rules=rules, h=H, g=2, d=D)
    found = {name: x.view(np.uint16) for name, x in load(tmp_path / "m").items()}
    assert found["lm_head.weight"].shape == (128, HID) and not found["lm_head.weight"][VOCAB:].any()
    same({name: x[:VOCAB] if "lm_head" in name or "embed" in name else x for name, x in found.items()}, whole)


def test_block_scales_of_ranks(tmp_path: Path) -> None:
    a = "model.layers.0.self_attn."
    config = {"model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 4, "hidden_size": 12,
              "quantization_config": {"weight_block_size": [4, 6]}}  # fmt: skip
    whole = noise(
        {f"{a}q_proj.weight": (32, 12), f"{a}k_proj.weight": (8, 12), f"{a}v_proj.weight": (8, 12), f"{a}o_proj.weight": (12, 48 - 16)}
    )
    whole |= {
        f"{a}{part}_proj.weight_scale_inv": x
        for part, x in zip("qkv", noise({"q": (8, 2), "k": (2, 2), "v": (2, 2)}).values(), strict=True)
    }

    def rank(r: int) -> Arrays:
        kv = {name: np.split(x, 2)[r // 2] for name, x in whole.items()}
        rest = {
            name: (oracle.vllm_row if "o_proj" in name else oracle.vllm_column)(x, 4, r)
            for name, x in whole.items()
            if ".k_" not in name and ".v_" not in name
        }
        return kv | rest

    tt.merge(save_folders(tmp_path / "a", [rank(r) for r in range(4)], config), tmp_path / "m")
    same(load(tmp_path / "m"), whole)


# What is refused


def test_replicas_must_be_equal(tmp_path: Path) -> None:
    whole = llama(2)
    ranks = [rank_of(whole, 2, 4, rank) for rank in range(4)]
    name = "model.layers.1.self_attn.v_proj.weight"
    ranks[3][name] = ranks[3][name].copy()
    ranks[3][name][5, 7] ^= 1
    with pytest.raises(MismatchError, match="different copies") as error:
        tt.merge(save_folders(tmp_path / "a", ranks, config_of(2)), tmp_path / "m", pad_vocab_to=64)
    assert error.value.fields["tensor"] == name and "rank2/" in str(error.value) and "rank3/" in str(error.value)
    assert not (tmp_path / "m").exists()


def test_padding_that_holds_something_is_not_dropped(tmp_path: Path) -> None:
    whole = llama(2)
    ranks = [rank_of(whole, 2, 2, rank) for rank in range(2)]
    ranks[1]["lm_head.weight"][-1, 3] = 1
    source = save_folders(tmp_path / "a", ranks, config_of(2))
    with pytest.raises(tt.TriptychError, match="zero"):
        tt.merge(source, tmp_path / "m", pad_vocab_to=64)
    tt.merge(source, tmp_path / "n", pad_vocab_to=64, rules={"lm_head.weight": "column"})
    assert load(tmp_path / "n")["lm_head.weight"].shape == (128, HID)


def test_what_ranks_do_not_say_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = llama(2)
    ranks = [as_vllm(rank_of(whole, 2, 4, rank)) for rank in range(4)]
    source = save_vllm(tmp_path / "a", ranks, config_of(2))
    with pytest.raises(PlanError, match="the vocabulary of the ranks is padded") as error:
        tt.merge_plan(source)
    assert error.value.fields["expected"] == "101 rows, as the config says" and "--pad-vocab-to" in error.value.fields["try"]
    for pad, match in ((3, "the vocabulary of the ranks has another size"), (60, "the vocabulary of the ranks has another size")):
        with pytest.raises(PlanError, match=match):
            tt.merge_plan(source, pad_vocab_to=pad)
    with pytest.raises(PlanError, match="there is another number of ranks"):
        tt.merge_plan(source, pad_vocab_to=64, tp=2)
    with pytest.raises(PlanError, match="no such division"):
        tt.merge_plan(source, pad_vocab_to=64, kv="odd")
    with pytest.raises(SystemExit) as code:
        main(["merge", str(source), "--dry-run", "--tp", "4", "--pad-vocab-to", "64", "--kv", "replicate", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert code.value.code == 0 and told["before"] == {"world": 4, "kv": "replicate", "pad": 64} and told["compared"] == 9
    (source / "config.json").write_text(json.dumps(config_of(2, num_attention_heads=8)))
    with pytest.raises(FormatError, match="a rank does not hold what the whole gives it"):
        tt.merge_plan(source, pad_vocab_to=64)
    (source / "config.json").write_text(json.dumps(config_of(2, vocab_size=32)))
    with pytest.raises(PlanError, match="the vocabulary of the ranks has another size") as error:
        tt.merge_plan(source, pad_vocab_to=16)
    assert "copy' if every rank holds all of it" in error.value.fields["try"]


def test_a_tensor_that_every_rank_holds_whole_is_not_stacked(tmp_path: Path) -> None:
    """An engine that leaves the MLP undivided: the width that the config says is there on every rank."""
    whole = llama(2)
    ranks = [{name: whole[name] if ".mlp." in name else x for name, x in rank_of(whole, 2, 2, rank).items()} for rank in range(2)]
    source = save_folders(tmp_path / "a", ranks, config_of(2))
    with pytest.raises(PlanError, match="every rank seems to hold all of a tensor") as error:
        tt.merge_plan(source, pad_vocab_to=64)
    assert error.value.fields["tensor"] == "model.layers.0.mlp.down_proj.weight"
    tt.merge(source, tmp_path / "m", pad_vocab_to=64, rules={"*.mlp.*": "copy"})
    same(load(tmp_path / "m"), whole)


def test_a_table_is_not_spoken_against(tmp_path: Path) -> None:
    whole = llama(2)
    save_folders(tmp_path / "a", [whole], config_of(2))
    tt.shard(tmp_path / "a" / "rank0", tmp_path / "b", 2, pad_vocab_to=64)
    for told in ({"kv": "rows"}, {"pad_vocab_to": 64}, {"rules": {"*": "copy"}}, {"h": 3}):
        with pytest.raises(PlanError, match="ranks know how they are divided"):
            tt.merge_plan(tmp_path / "b", **told)
    tt.merge(tmp_path / "b", tmp_path / "c", tp=2)
    same(load(tmp_path / "c"), whole)


def test_sets_that_are_not_whole(tmp_path: Path) -> None:
    whole = llama(2)
    ranks = [rank_of(whole, 2, 4, rank) for rank in range(4)]
    source = save_folders(tmp_path / "a", ranks, config_of(2))
    shutil.copytree(source, tmp_path / "gap")
    shutil.rmtree(tmp_path / "gap" / "rank1")
    with pytest.raises(FormatError, match="the ranks are not complete"):
        tt.merge_plan(tmp_path / "gap")
    shutil.copytree(source, tmp_path / "short")
    shutil.rmtree(tmp_path / "short" / "rank3")
    with pytest.raises(tt.TriptychError):  # 3 of 4: the heads of the config say so
        tt.merge_plan(tmp_path / "short", pad_vocab_to=96)
    shutil.copytree(source / "rank0", source / "tp0")
    with pytest.raises(FormatError, match="the ranks are not complete"):
        tt.merge_plan(source)
    shutil.rmtree(source / "tp0")
    save_file({"one": np.zeros(3, np.uint16)}, source / "rank2" / "model.safetensors")
    with pytest.raises(FormatError, match="the ranks do not hold the same tensors"):
        tt.merge_plan(source)
    (tmp_path / "stages" / "mp_rank_00_000").mkdir(parents=True)
    with pytest.raises(PlanError, match="several pipeline stages"):
        tt.merge_plan(tmp_path / "stages")
    with pytest.raises(PlanError, match="there are no ranks here"):
        tt.merge_plan(source / "rank0")
    shutil.copytree(source / "rank0", tmp_path / "plain")
    (tmp_path / "plain" / "rank0").mkdir()  # beside weights a folder of such a name is none of ours
    with pytest.raises(PlanError, match="there are no ranks here"):
        tt.merge_plan(tmp_path / "plain")


def test_a_layout_that_records_know_twice_is_asked_for(tmp_path: Path) -> None:
    records = tmp_path / "x.toml"
    tensor = '[[family.tensor]]\nfused = "attn.qkv"\nlayout = "h (q|k|v) d"\nsizes = {h = "heads"}\nambiguous = ["(q|k|v) h d"]\n'
    records.write_text(f'[[family]]\ntypes = ["x"]\nsource = "s"\n{tensor}')
    whole = noise({"attn.qkv.weight": (36, 10)})
    ranks = [{"attn.qkv.weight": x} for x in np.split(whole["attn.qkv.weight"], 2)]
    source = save_folders(tmp_path / "a", ranks, {"model_type": "x", "heads": 4})
    with pytest.raises(PlanError, match="files of this model exist in more than one order"):
        tt.merge_plan(source, records=records)
    tt.merge(source, tmp_path / "m", records=records, layouts={"*": "h (q|k|v) d"}, h=4)
    same(load(tmp_path / "m"), whole)


def test_sharding_asks_the_weights_where_a_record_is_ambiguous(tmp_path: Path) -> None:
    """As converting does: what the weights cannot tell is not divided on a guess."""
    records = tmp_path / "x.toml"
    tensor = '[[family.tensor]]\nfused = "mlp.gate_up"\nlayout = "(gate|up) f"\nkind = "mlp"\nambiguous = ["f (gate|up)"]\n'
    records.write_text(f'[[family]]\ntypes = ["x"]\nsource = "s"\n{tensor}')
    (tmp_path / "a").mkdir()
    save_file(noise({"mlp.gate_up.weight": (64, 24)}), tmp_path / "a" / "model.safetensors")
    (tmp_path / "a" / "config.json").write_text('{"model_type": "x"}')
    with pytest.raises(PlanError, match="more than one order"):
        tt.shard_plan(tmp_path / "a", 2, records=records)
    made = tt.shard_plan(tmp_path / "a", 2, records=records, layouts={"mlp.gate_up.weight": "(gate|up) f"})
    assert made.plan.files
