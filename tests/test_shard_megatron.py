"""Megatron-LM's folders of ranks (mp_rank_00/model_optim_rng.pt), written with its own slicing rules, become one checkpoint."""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import triptych as tt
from tests import sharding_oracle as oracle
from triptych.errors import FormatError, PlanError

H, G, D, HID, F, VOCAB = 12, 2, 8, 20, 24, 128
Arrays = dict[str, np.ndarray]
ARGS = {"num_attention_heads": H, "num_query_groups": G, "kv_channels": D, "hidden_size": HID, "swiglu": True, "vocab_size": 101,
        "padded_vocab_size": VOCAB, "params_dtype": torch.bfloat16, "pipeline_model_parallel_size": 1}  # fmt: skip
QKV, PROJ = "decoder.layers.0.self_attention.linear_qkv", "decoder.layers.0.self_attention.linear_proj"
FC1, FC2 = "decoder.layers.0.mlp.linear_fc1", "decoder.layers.0.mlp.linear_fc2"


def core() -> Arrays:
    """A model in Megatron-core's names; its vocabulary is padded with rows that are not zero, as Megatron leaves them."""
    shapes = {"embedding.word_embeddings.weight": (VOCAB, HID), "output_layer.weight": (VOCAB, HID),
              f"{QKV}.weight": ((H + 2 * G) * D, HID),
              f"{QKV}.bias": ((H + 2 * G) * D,), f"{QKV}.layer_norm_weight": (HID,), f"{PROJ}.weight": (HID, H * D), f"{PROJ}.bias": (HID,),
              f"{FC1}.weight": (2 * F, HID), f"{FC2}.weight": (HID, F), "decoder.final_layernorm.weight": (HID,)}  # fmt: skip
    rng = np.random.default_rng(3)
    return {name: rng.integers(0, 1 << 15, shape).astype(np.int16) for name, shape in shapes.items()}


def rank_of(whole: Arrays, tp: int, rank: int) -> Arrays:
    out: Arrays = {}
    for name, x in whole.items():
        if "norm" in name or name == f"{PROJ}.bias":
            out[name] = x
        elif name.startswith((PROJ, FC2)):
            out[name] = oracle.megatron_column(x, tp, rank, 1)
        elif name.startswith(FC1):  # gate and up of a rank, which it takes apart itself: megatron/core/transformer/mlp.py:324-332
            out[name] = np.concatenate([oracle.megatron_column(half, tp, rank) for half in np.split(x, 2)])
        elif name.startswith(QKV):
            out[name] = oracle.megatron_qkv(x, H, G, tp, rank)
        else:
            out[name] = oracle.megatron_column(x, tp, rank)
    return out


def save(folder: Path, ranks: list[Any], args: dict[str, Any], version: float = 3.0, **more: Any) -> Path:
    """As checkpointing.py:1569-1600 writes them: arguments, version, model, and what is no model."""
    for number, model in enumerate(ranks):
        home = folder / f"mp_rank_{number:02d}"
        home.mkdir(parents=True)
        told = argparse.Namespace(**args, tensor_model_parallel_size=len(ranks))
        beside = {"args": told, "checkpoint_version": version, "iteration": 5, "optimizer": {"exp_avg": torch.ones(3)}, "rng_state": [{}]}
        torch.save({**beside, "model": model, **more}, home / "model_optim_rng.pt")
        (home / "distrib_optim.pt").write_bytes(b"the optimizer's own")
    return folder


def tensors(arrays: Arrays) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(x)).view(torch.bfloat16) for name, x in arrays.items()}


def load(folder: Path) -> Arrays:
    return {name: x.view(torch.int16).numpy() for name, x in load_file(folder / "model.safetensors").items()}


def same(found: Arrays, expected: Arrays) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert np.array_equal(found[name], x), name


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_core(tmp_path: Path, tp: int) -> None:
    """On 4 ranks there are fewer kv groups than ranks: raw rows, which the shapes tell."""
    whole = core()
    extra = {f"{QKV}._extra_state": io.BytesIO(b"state"), f"{FC2}._extra_state": None}
    source = save(tmp_path / "a", [{**tensors(rank_of(whole, tp, rank)), **extra} for rank in range(tp)], ARGS)
    done = tt.merge(source, tmp_path / "m")
    same(load(tmp_path / "m"), whole)
    assert any("the vocabulary keeps its padding" in note for note in done.made.plan.notes)
    (attention, bias) = (one for one in tt.inspect(tmp_path / "m").projections if one.kind == "attention")
    assert (str(attention.layout), attention.sizes["h"], attention.sizes["g"]) == ("g (q r|k|v) d", H, G) and bias.name == f"{QKV}.bias"
    tt.shard(source, tmp_path / "t", 2)
    for rank in range(2):
        same(load(tmp_path / "t" / f"rank-{rank}-of-2"), rank_of(whole, 2, rank))


def test_a_layer_without_gate(tmp_path: Path) -> None:
    whole = core()
    ranks = [{**rank_of(whole, 2, rank), f"{FC1}.weight": oracle.megatron_column(whole[f"{FC1}.weight"], 2, rank)} for rank in range(2)]
    tt.merge(save(tmp_path / "a", list(map(tensors, ranks)), {**ARGS, "swiglu": False}), tmp_path / "m")
    same(load(tmp_path / "m"), whole)
    silent = {name: value for name, value in ARGS.items() if name != "swiglu"}
    source = save(tmp_path / "b", list(map(tensors, ranks)), silent)
    with pytest.raises(PlanError, match="nothing says how ranks divide a tensor") as error:
        tt.merge(source, tmp_path / "n")
    assert error.value.fields["tensor"] == f"{FC1}.weight"
    tt.merge(source, tmp_path / "n", rules={"*.linear_fc1.*": "column"})
    same(load(tmp_path / "n"), whole)


@pytest.mark.parametrize(("version", "text"), [(0, "t (q|k|v) n d"), (1.0, "h d (q|k|v)"), (2.0, "h (q|k|v) d")])
def test_older_files(tmp_path: Path, version: float, text: str) -> None:
    """Nested tables, and the order of q, k and v that checkpoint_version says: every rank has its own heads, in that order."""
    heads, d = 6, 4
    rng = np.random.default_rng(5)
    q, k, v = rng.integers(0, 1 << 15, (3, heads * d, 10)).astype(np.int16)
    up = rng.integers(0, 1 << 15, (30, 10)).astype(np.int16)
    order = {0: (2, 0, 1), 1.0: (0, 1, 2), 2.0: (0, 2, 1)}  # of heads, dims and parts, the slowest first: parts are axis 2 below

    def fused(rank: int) -> np.ndarray:
        own = np.stack([oracle.megatron_column(x, 3, rank).reshape(2, d, 10) for x in (q, k, v)], 2)
        return own.transpose(*order[version], 3).reshape(-1, 10)

    def model(rank: int) -> dict[str, Any]:
        layer = {"layers.0.self_attention.query_key_value.weight": fused(rank), "layers.0.mlp.dense_h_to_4h.weight": np.split(up, 3)[rank]}
        return {"language_model": {"encoder": tensors(layer)}}

    args = {"num_attention_heads": heads, "hidden_size": 24, "swiglu": False}
    tt.merge(save(tmp_path / "a", [model(rank) for rank in range(3)], args, version), tmp_path / "m")
    found = load(tmp_path / "m")
    assert np.array_equal(found["language_model.encoder.layers.0.mlp.dense_h_to_4h.weight"], up)
    (one,) = (one for one in tt.inspect(tmp_path / "m").projections if one.kind == "attention")
    assert str(one.layout) == text
    parts = tt.split(torch.from_numpy(found[one.name].copy()), text, axis=0, h=heads, d=d, **({"t": 3} if version == 0 else {}))
    for mine, whole in zip(parts, (q, k, v), strict=True):
        assert np.array_equal(mine.reshape(heads * d, 10).numpy(), whole)


def test_what_the_arguments_contradict(tmp_path: Path) -> None:
    whole = core()
    ranks = [tensors(rank_of(whole, 2, rank)) for rank in range(2)]
    source = save(tmp_path / "a", [*ranks, ranks[0]], {**ARGS})
    shutil.rmtree(source / "mp_rank_02")
    with pytest.raises(FormatError, match="the ranks are not complete") as error:
        tt.merge_plan(source)
    assert error.value.fields["expected"] == "tensor_model_parallel_size=3"
    with pytest.raises(FormatError, match="the ranks are not complete"):
        tt.merge_plan(save(tmp_path / "b", ranks, {**ARGS, "pipeline_model_parallel_size": 4}))
    with pytest.raises(FormatError, match="a rank does not hold what the whole gives it"):
        tt.merge_plan(save(tmp_path / "c", ranks, {**ARGS, "num_query_groups": 4}))


def test_a_file_that_asks_to_run_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            import os

            return os.system, ("touch ran",)

    source = save(tmp_path / "a", [{"x.weight": torch.ones(2)}] * 2, {**ARGS, "evil": Evil()})
    with pytest.raises(PlanError, match="the file asks to run code"):
        tt.merge_plan(source)
