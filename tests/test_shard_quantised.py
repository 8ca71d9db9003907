"""Packed weights among ranks: every number lies where vLLM's loaders put it, told by unpacking word by word as the packers packed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import triptych as tt
from tests import sharding_oracle as oracle
from triptych.errors import PlanError

H, G, D, HID, F, GROUP = 12, 2, 8, 64, 160, 8
A, M = "model.layers.0.self_attn.", "model.layers.0.mlp."
WEIGHTS = {f"{A}q_proj": (H * D, HID), f"{A}k_proj": (G * D, HID), f"{A}v_proj": (G * D, HID), f"{A}o_proj": (HID, H * D),
           f"{M}gate_proj": (F, HID), f"{M}up_proj": (F, HID), f"{M}down_proj": (HID, F)}  # fmt: skip
ROWS = (f"{A}o_proj", f"{M}down_proj")
CONFIG = {"model_type": "llama", "num_attention_heads": H, "num_key_value_heads": G, "head_dim": D, "hidden_size": HID, "vocab_size": 30}
Arrays = dict[str, np.ndarray]


def order(kind: str, bits: int) -> list[int]:
    """Which number of a run stands at which place of a word.

    GPTQ: in order, auto_gptq 0.7.1, nn_modules/qlinear/qlinear_cuda_old.py:136-138 and 172-174. AWQ: autoawq 0.2.7.post3,
    awq/modules/linear/gemm.py:220-225 and 241-246. compressed-tensors 0.20.0: in order, compressors/pack_quantized/helpers.py:75-90.
    """
    return [0, 2, 4, 6, 1, 3, 5, 7] if kind == "awq" else list(range(32 // bits))


def words(numbers: np.ndarray, kind: str, bits: int, axis: int) -> np.ndarray:
    """Numbers packed along an axis, one after the other."""
    x = np.moveaxis(numbers, axis, -1).astype(np.uint64)
    pack = 32 // bits
    out = np.zeros((*x.shape[:-1], x.shape[-1] // pack), np.uint64)
    for at, number in enumerate(order(kind, bits)):
        out |= x[..., number::pack] << np.uint64(bits * at)
    return np.ascontiguousarray(np.moveaxis(out, -1, axis)).astype(np.uint32).view(np.int32)


def numbers(packed: np.ndarray, kind: str, bits: int, axis: int) -> np.ndarray:
    """The inverse, number by number."""
    x = np.moveaxis(packed.view(np.uint32), axis, -1)
    pack = 32 // bits
    out = np.zeros((*x.shape[:-1], x.shape[-1] * pack), np.int64)
    for at, number in enumerate(order(kind, bits)):
        out[..., number::pack] = x >> np.uint32(bits * at) & np.uint32((1 << bits) - 1)
    return np.moveaxis(out, -1, axis)


def quantised(kind: str, bits: int, out: int, inputs: int, seed: int, group: int = GROUP, sort: bool = False) -> tuple[Arrays, Arrays]:
    """(tensors of one weight as stored, its numbers as plain matrices [in, out] and [groups, out])."""
    rng = np.random.default_rng(seed)
    weight, zeros = rng.integers(0, 1 << bits, (inputs, out)), rng.integers(0, 1 << bits, (inputs // group, out))
    scales = rng.standard_normal((inputs // group, out)).astype(np.float16)
    index = (rng.permutation(inputs) if sort else np.arange(inputs)) // group
    plain = {"weight": weight, "zeros": zeros, "scales": scales, "index": index.astype(np.int32)}
    if kind == "compressed":
        stored = {"weight_packed": words(weight.T, kind, bits, 1), "weight_scale": np.ascontiguousarray(scales.T),
                  "weight_zero_point": words(zeros.T, kind, bits, 0), "weight_shape": np.array([out, inputs])}  # fmt: skip
        return stored, plain
    stored = {"qweight": words(weight, kind, bits, int(kind == "awq")), "qzeros": words(zeros, kind, bits, 1), "scales": scales}
    return stored | ({"g_idx": plain["index"]} if kind == "gptq" else {}), plain


def read(stored: Arrays, kind: str, bits: int) -> Arrays:
    """The numbers of one weight as plain matrices."""
    if kind == "compressed":
        return {"weight": numbers(stored["weight_packed"], kind, bits, 1).T, "zeros": numbers(stored["weight_zero_point"], kind, bits, 0).T,
                "scales": stored["weight_scale"].T}  # fmt: skip
    found = {"weight": numbers(stored["qweight"], kind, bits, int(kind == "awq")), "scales": stored["scales"]}
    found["zeros"] = numbers(stored["qzeros"], kind, bits, 1)
    return found | ({"index": stored["g_idx"]} if kind == "gptq" else {})


def ours(plain: Arrays, name: str, tp: int, rank: int, weights: dict[str, Arrays]) -> Arrays:
    """What vLLM loads into a rank: along the output as any weight (parameter.py:145-198; for k and v by kv head), along the input rows and
    groups alike (216-226); every input's group number with its input (auto_gptq.py:376-425 and auto_awq.py:456-493 name the axes)."""
    if name in ROWS:
        return {key: oracle.vllm_row(x, tp, rank, 0) for key, x in plain.items()}
    if "_proj" in name and name.rpartition(".")[2][0] in "kv":
        q = weights[f"{A}q_proj"]
        kv = {key: oracle.vllm_qkv(q[key].T, x.T, x.T, H, G, tp, rank)[1].T for key, x in plain.items() if key != "index"}
        return kv | ({"index": plain["index"]} if "index" in plain else {})
    return {key: x if key == "index" else oracle.vllm_column(x, tp, rank, 1) for key, x in plain.items()}


def write(path: Path, tensors: Arrays, told: dict[str, Any], config: dict[str, Any] = CONFIG) -> None:
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": told}))


def told_of(kind: str, bits: int) -> dict[str, Any]:
    if kind == "compressed":
        weights = {"num_bits": bits, "group_size": GROUP, "symmetric": False}
        return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}
    return {"quant_method": kind, "bits": bits, "group_size": GROUP, **({"desc_act": False} if kind == "gptq" else {})}


def model(path: Path, kind: str, bits: int) -> tuple[Arrays, dict[str, Arrays]]:
    tensors, plain = {}, {}
    for seed, (name, (out, inputs)) in enumerate(WEIGHTS.items()):
        stored, plain[name] = quantised(kind, bits, out, inputs, seed)
        tensors |= {f"{name}.{word}": x for word, x in stored.items()}
    write(path, tensors, told_of(kind, bits))
    return tensors, plain


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize(("kind", "bits"), [("gptq", 4), ("gptq", 8), ("awq", 4), ("compressed", 4), ("compressed", 8)])
def test_every_number_lies_where_vllm_puts_it(tmp_path: Path, kind: str, bits: int, tp: int) -> None:
    """tp 4 has more ranks than kv heads: two hold the same."""
    tensors, plain = model(tmp_path / "a", kind, bits)
    tt.shard(tmp_path / "a", tmp_path / "b", tp)
    for rank in range(tp):
        found = load_file(tmp_path / "b" / f"rank-{rank}-of-{tp}" / "model.safetensors")
        for name, whole in plain.items():
            own = {key.rpartition(".")[2]: x for key, x in found.items() if key.startswith(f"{name}.")}
            expected = ours(whole, name, tp, rank, plain)
            for key, x in read(own, kind, bits).items():
                assert np.array_equal(x, expected[key]), (name, key, rank)
    tt.merge(tmp_path / "b", tmp_path / "c")
    merged = load_file(tmp_path / "c" / "model.safetensors")
    assert merged.keys() == tensors.keys() and all(np.array_equal(merged[name], tensors[name]) for name in tensors)


def test_one_scale_for_all_inputs_goes_to_every_rank(tmp_path: Path) -> None:
    """group_size -1: vLLM repeats them, auto_gptq.py:361-368."""
    name = f"{M}down_proj"
    stored, _ = quantised("gptq", 4, HID, F, 0, group=F)
    write(tmp_path / "a", {f"{name}.{word}": x for word, x in stored.items()}, {**told_of("gptq", 4), "group_size": -1})
    tt.shard(tmp_path / "a", tmp_path / "b", 5)
    for rank in range(5):
        found = load_file(tmp_path / "b" / f"rank-{rank}-of-5" / "model.safetensors")
        assert np.array_equal(found[f"{name}.scales"], stored["scales"]) and np.array_equal(found[f"{name}.qzeros"], stored["qzeros"])
        assert np.array_equal(
            numbers(found[f"{name}.qweight"], "gptq", 4, 0), oracle.vllm_row(numbers(stored["qweight"], "gptq", 4, 0), 5, rank, 0)
        )


def test_a_fused_weight_is_divided_by_heads(tmp_path: Path) -> None:
    config = {**CONFIG, "model_type": "phi3", "intermediate_size": F}
    qkv, gate_up = f"{A}qkv_proj", f"{M}gate_up_proj"
    (one, plain), (two, both) = quantised("awq", 4, (H + 2 * G) * D, HID, 1), quantised("awq", 4, 2 * F, HID, 2)
    tensors = {**{f"{qkv}.{word}": x for word, x in one.items()}, **{f"{gate_up}.{word}": x for word, x in two.items()}}
    write(tmp_path / "a", tensors, told_of("awq", 4), config)
    tt.shard(tmp_path / "a", tmp_path / "b", 4)
    for rank in range(4):
        found = load_file(tmp_path / "b" / f"rank-{rank}-of-4" / "model.safetensors")
        weight = numbers(found[f"{qkv}.qweight"], "awq", 4, 1)
        q, k, v = np.split(plain["weight"].T, [H * D, (H + G) * D])
        assert np.array_equal(weight.T, np.concatenate(oracle.vllm_qkv(q, k, v, H, G, 4, rank)))
        zeros = numbers(found[f"{gate_up}.qzeros"], "awq", 4, 1)
        assert np.array_equal(zeros.T, oracle.vllm_merged(both["zeros"].T, 2, 4, rank))
    tt.merge(tmp_path / "b", tmp_path / "c")
    merged = load_file(tmp_path / "c" / "model.safetensors")
    assert all(np.array_equal(merged[name], tensors[name]) for name in tensors)


def test_words_and_groups_that_cross_a_boundary_are_refused(tmp_path: Path) -> None:
    stored, _ = quantised("awq", 4, 24, HID, 0)
    write(tmp_path / "w", {f"{M}up_proj.{word}": x for word, x in stored.items()}, told_of("awq", 4))
    with pytest.raises(PlanError, match="a block of 8 rows crosses a boundary") as error:
        tt.shard_plan(tmp_path / "w", 2)
    assert error.value.fields["tensor"] == f"{M}up_proj.qweight" and error.value.fields["found"] == "row 12 = 8 + 4"
    stored, _ = quantised("awq", 4, HID, 48, 0, group=16)
    write(tmp_path / "g", {f"{M}down_proj.{word}": x for word, x in stored.items()}, {**told_of("awq", 4), "group_size": 16})
    with pytest.raises(PlanError, match="a block of 16 rows crosses a boundary") as error:
        tt.shard_plan(tmp_path / "g", 2)
    assert error.value.fields["tensor"] == f"{M}down_proj.qzeros" and error.value.fields["found"] == "row 24 = 16 + 8"


@pytest.mark.parametrize("told", [{"desc_act": True}, {"desc_act": None}])
def test_sorted_inputs_stop_the_plan(tmp_path: Path, told: dict[str, Any]) -> None:
    """Inputs that were sorted by activation have their groups anywhere; along the output they are divided as ever."""
    name = f"{M}down_proj"
    stored, plain = quantised("gptq", 4, HID, F, 0, sort=True)
    up, _ = quantised("gptq", 4, F, HID, 1, sort=True)
    tensors = {**{f"{name}.{word}": x for word, x in stored.items()}, **{f"{M}up_proj.{word}": x for word, x in up.items()}}
    write(tmp_path / "a", tensors, {**told_of("gptq", 4), **told})
    with pytest.raises(PlanError, match="inputs that were sorted by activation have their groups on all ranks") as error:
        tt.shard_plan(tmp_path / "a", 2)
    assert "--rule 'model.layers.*.mlp.down_proj.scales=copy'" in error.value.fields["try"]
    rules = {"*.down_proj.scales": "copy", "*.down_proj.qzeros": "copy"}
    tt.shard(tmp_path / "a", tmp_path / "b", 2, rules=rules)
    whole = (plain["weight"] - plain["zeros"][plain["index"]]) * plain["scales"][plain["index"]].astype(np.float64)
    for rank in range(2):
        found = load_file(tmp_path / "b" / f"rank-{rank}-of-2" / "model.safetensors")
        own = read({key.rpartition(".")[2]: x for key, x in found.items() if key.startswith(name)}, "gptq", 4)
        mine = (own["weight"] - own["zeros"][own["index"]]) * own["scales"][own["index"]].astype(np.float64)
        assert np.array_equal(mine, oracle.vllm_row(whole, 2, rank, 0))


def test_packed_numbers_of_no_known_kind_are_refused(tmp_path: Path) -> None:
    stored, _ = quantised("gptq", 4, F, HID, 0)
    name = f"{M}up_proj"
    cases = {
        "packed numbers of an unknown kind": {**stored, "qweight": stored["qweight"][:, :-1]},
        "tensors of one quantised weight do not fit each other": {**stored, "g_idx": stored["g_idx"][1:]},
        "scales do not fit the tensor that they scale": {**stored, "scales": stored["scales"][:5], "qzeros": stored["qzeros"][:5]},
        "a weight is there twice, packed and plain": {**stored, "weight": np.zeros((F, HID), np.float16)},
    }
    cases["packed numbers of an unknown kind "] = {word: x for word, x in stored.items() if word != "scales"}
    for number, (match, tensors) in enumerate(cases.items()):
        tensors = {f"{name}.{word}": np.ascontiguousarray(x) for word, x in tensors.items()}
        write(tmp_path / str(number), tensors, told_of("gptq", 4))
        with pytest.raises(PlanError, match=match.strip()):
            tt.shard_plan(tmp_path / str(number), 2)
    three = {**told_of("compressed", 4), "config_groups": {"g": {"weights": {"num_bits": 3}}}}
    packed, _ = quantised("compressed", 4, F, HID, 0)
    write(tmp_path / "three", {f"{name}.{word}": x for word, x in packed.items()}, three)
    with pytest.raises(PlanError, match="packed numbers of an unknown kind") as error:
        tt.shard_plan(tmp_path / "three", 2)
    assert error.value.fields["try"] == f"--rule '{name}.*=copy'"
    assert all(whole.cut is None for whole in tt.shard_plan(tmp_path / "three", 2, rules={f"{name}.*": "copy"}).wholes)


def test_one_word_for_all_rows_is_not_copied(tmp_path: Path) -> None:
    """A rank with half the rows would take the numbers of the first half for its own."""
    config = {**CONFIG, "num_key_value_heads": 1, "num_attention_heads": 2}
    tensors: Arrays = {}
    for seed, (name, rows) in enumerate((("q", 2 * D), ("k", D), ("v", D))):
        tensors |= {f"{A}{name}_proj.{word}": x for word, x in quantised("compressed", 4, rows, HID, seed)[0].items()}
    assert tensors[f"{A}k_proj.weight_zero_point"].shape[0] == 1
    write(tmp_path / "a", tensors, told_of("compressed", 4), config)
    assert tt.shard_plan(tmp_path / "a", 2).plan.files
    with pytest.raises(PlanError, match="a block of 8 rows crosses a boundary") as error:
        tt.shard_plan(tmp_path / "a", 2, kv="rows")
    assert error.value.fields["tensor"] == f"{A}k_proj.weight_zero_point"
    stored, _ = quantised("gptq", 4, HID, 8, 0)
    write(tmp_path / "b", {f"{M}down_proj.{word}": x for word, x in stored.items()}, told_of("gptq", 4))
    with pytest.raises(PlanError, match="a block of 8 rows crosses a boundary") as error:
        tt.shard_plan(tmp_path / "b", 2)
    assert error.value.fields["tensor"] == f"{M}down_proj.qweight"
