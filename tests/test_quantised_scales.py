"""Weights of few bits with their scales in a conversion: each row with what scales it, told by multiplying them out; or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import triptych as tt
from tests import files
from tests.test_quantised import fused as packed_phi
from tests.test_shard_quantised import A, Arrays, quantised, told_of, write
from triptych.errors import PlanError

H, G, D, HID, BLOCK = 12, 4, 16, 40, 8
R = H // G
GROUPED = {"model_type": "internlm2", "num_attention_heads": H, "num_key_value_heads": G, "hidden_size": H * D}
APART = {"model_type": "llama", "num_attention_heads": H, "num_key_value_heads": G, "head_dim": D, "hidden_size": HID}
WQKV = "model.layers.0.attention.wqkv"
KINDS = ["row", "flat", "block", "zeros", "groups"]
TOLD: dict[str, dict[str, Any]] = {"block": {"quant_method": "fp8", "weight_block_size": [BLOCK, 5]}}


def weight(kind: str, out: int, seed: int, inputs: int = HID) -> Arrays:
    """A weight of whole numbers with scales for every row, blocks of rows and columns, or groups of columns of every row."""
    rng = np.random.default_rng(seed)
    shapes = {"row": (out, 1), "flat": (out,), "block": (-(-out // BLOCK), inputs // 5), "zeros": (out, 1), "groups": (out, inputs // 10)}
    word = "weight_scale_inv" if kind == "block" else "weight_scale"
    made = {"weight": rng.integers(-99, 99, (out, inputs)).astype(np.int8), word: rng.standard_normal(shapes[kind]).astype(np.float32)}
    return made | ({"weight_zero_point": rng.integers(-9, 9, (out, 1)).astype(np.int8)} if kind == "zeros" else {})


def numbers(found: Arrays, kind: str) -> np.ndarray:
    """[out, in, 3] what an element is, its scale and its zero point."""
    x = found["weight"].astype(np.float64)
    scale = found["weight_scale_inv" if kind == "block" else "weight_scale"]
    if kind == "block":
        scale = scale[np.arange(x.shape[0])[:, None] // BLOCK, np.arange(x.shape[1]) // 5]
    elif kind == "groups":
        scale = np.repeat(scale, 10, 1)
    zero = found.get("weight_zero_point", np.zeros(1))
    return np.stack([x, np.broadcast_to(scale.reshape(x.shape[0], -1), x.shape), np.broadcast_to(zero, x.shape)], -1)


def model(path: Path, kind: str, weights: dict[str, int], config: dict[str, Any], bias: bool = True) -> dict[str, Arrays]:
    made = {name: weight(kind, out, seed) for seed, (name, out) in enumerate(weights.items())}
    tensors = {f"{name}.{word}": x for name, one in made.items() for word, x in one.items()}
    tensors |= {f"{name}.bias": np.arange(out).astype(np.float16) for name, out in weights.items() if bias}
    write(path, tensors, TOLD.get(kind, {"quant_method": "compressed-tensors"}), config)
    return made


def of(path: Path, name: str) -> Arrays:
    return {key.removeprefix(f"{name}."): x for key, x in load_file(path / "model.safetensors").items() if key.startswith(f"{name}.")}


def apart(x: np.ndarray) -> list[np.ndarray]:
    """q, k and v of rows `g (q r|k|v) d` (transformers 4.x, InternLM2Attention.forward: rearrange "b q (h gs d) -> b q h gs d")."""
    groups = x.reshape(G, R + 2, D, *x.shape[1:])
    return [groups[:, a:b].reshape(-1, *x.shape[1:]) for a, b in ((0, R), (R, R + 1), (R + 1, R + 2))]


@pytest.mark.parametrize("kind", KINDS)
def test_a_fused_weight_taken_apart_and_joined(tmp_path: Path, kind: str) -> None:
    """Joined again all of it has the order of the family, whose code reads it."""
    made = model(tmp_path / "a", kind, {WQKV: (H + 2 * G) * D}, GROUPED)
    tt.convert(tmp_path / "a", tmp_path / "s", "split")
    for part, expected in zip("qkv", apart(numbers(made[WQKV], kind)), strict=True):
        assert np.array_equal(numbers(of(tmp_path / "s", f"model.layers.0.attention.w{part}"), kind), expected)
    tt.verify(tmp_path / "a", tmp_path / "s")
    tt.verify(tmp_path / "a", tmp_path / "s", "split")
    tt.convert(tmp_path / "s", tmp_path / "f", "fused")
    assert files.read(tmp_path / "f") == files.read(tmp_path / "a")


@pytest.mark.parametrize("kind", ["awq", "gptq"])
def test_packed_words_are_joined_as_the_family_has_them(tmp_path: Path, kind: str) -> None:
    stored, _ = quantised(kind, 4, (H + 2 * G) * D, 64, 1)
    stored = {word: x for word, x in stored.items() if word != "g_idx"}
    bias = {f"{WQKV}.bias": np.arange((H + 2 * G) * D).astype(np.float16)}
    write(tmp_path / "a", {**{f"{WQKV}.{word}": x for word, x in stored.items()}, **bias}, told_of(kind, 4), GROUPED)
    tt.convert(tmp_path / "a", tmp_path / "s", "split")
    tt.convert(tmp_path / "s", tmp_path / "f", "fused")
    assert files.read(tmp_path / "f") == files.read(tmp_path / "a")
    tt.verify(tmp_path / "s", tmp_path / "f")


@pytest.mark.parametrize("kind", ["row", "flat", "zeros", "groups"])
def test_rotary_order_and_layout(tmp_path: Path, kind: str) -> None:
    sizes = {f"{A}{part}_proj": heads * D for part, heads in (("q", H), ("k", G), ("v", G))}
    made = {name[len(A)]: numbers(one, kind) for name, one in model(tmp_path / "a", kind, sizes, APART).items()}
    tt.convert(tmp_path / "a", tmp_path / "r", rope="interleaved")
    for part, x in made.items():
        half = x.reshape(-1, 2, D // 2, HID, 3).swapaxes(1, 2).reshape(x.shape) if part in "qk" else x
        assert np.array_equal(numbers(of(tmp_path / "r", f"{A}{part}_proj"), kind), half)
    tt.verify(tmp_path / "a", tmp_path / "r", rope="interleaved")
    tt.convert(tmp_path / "a", tmp_path / "f", "fused:g (q r|k|v) d")
    for found, expected in zip(apart(numbers(of(tmp_path / "f", f"{A}qkv_proj"), kind)), made.values(), strict=True):
        assert np.array_equal(found, expected)
    tt.verify(tmp_path / "a", tmp_path / "f", "fused:g (q r|k|v) d")


def test_what_blocks_do_not_allow(tmp_path: Path) -> None:
    """Rotary order goes through a block; a block of several heads belongs to none; of blocks that nothing tells 128 rows are meant."""
    sizes = {f"{A}{part}_proj": heads * D for part, heads in (("q", H), ("k", G), ("v", G))}
    model(tmp_path / "a", "block", sizes, APART)
    with pytest.raises(PlanError, match="a companion of a fused tensor would stay behind") as error:
        tt.plan(tmp_path / "a", rope="interleaved")
    assert str(error.value.fields["tensor"]).endswith("weight_scale_inv")
    for number, rows in enumerate((32, None)):
        told = {"quant_method": "fp8", **({"weight_block_size": [rows, 5]} if rows else {})}
        out = (H + 2 * G) * D
        stored = {"weight": np.zeros((out, HID), np.int8), "weight_scale_inv": np.zeros((-(-out // (rows or 160)), 8), np.float32)}
        write(tmp_path / f"b{number}", {f"{A}qkv_proj.{word}": x for word, x in stored.items()}, told, {**APART, "model_type": "phi3"})
        assert [one.name for one in tt.inspect(tmp_path / f"b{number}").projections] == [f"{A}qkv_proj.weight"]
        with pytest.raises(PlanError, match="a companion of a fused tensor would stay behind"):
            tt.plan(tmp_path / f"b{number}", "split")


def test_scales_stay_with_their_weight(tmp_path: Path) -> None:
    model(tmp_path / "a", "row", {f"{A}qkv_proj": (H + 2 * G) * D}, {**APART, "model_type": "phi3"}, bias=False)
    with pytest.raises(PlanError, match="a weight with scales is not stored the other way round"):
        tt.plan(tmp_path / "a", orientation="conv1d")
    with pytest.raises(PlanError, match="a companion of a fused tensor would stay behind"):
        tt.plan(tmp_path / "a", overrides={"*.weight": "split"})
    packed_phi(tmp_path / "g", "gptq", 4)
    tt.convert(tmp_path / "g", tmp_path / "s", "split")
    names = [name for name in load_file(tmp_path / "s" / "model.safetensors") if name.endswith(".weight_scale")]
    assert not names


def test_numbers_of_experts_stay_with_their_bias(tmp_path: Path) -> None:
    """MXFP4: gate and up of a bias do not change places while those of the blocks and scales beside it stay."""
    home = "model.layers.0.mlp.experts.gate_up_proj"
    made = {f"{home}_blocks": ("U8", (3, 20, 2, 16)), f"{home}_scales": ("U8", (3, 20, 2)), f"{home}_bias": ("BF16", (3, 20))}
    files.checkpoint(tmp_path / "a", [made], {"model_type": "gpt_oss", "intermediate_size": 10, "hidden_size": 64})
    for target in ({"to": "(gate|up) f"}, {"overrides": {"*_bias": "split"}}):
        with pytest.raises(PlanError, match="a companion of a fused tensor would stay behind") as error:
            tt.plan(tmp_path / "a", **target)
        assert error.value.fields["tensor"] == f"{home}_blocks"
    layouts = {f"{home}_{word}": "f (gate|up) @ 1" for word in ("blocks", "scales")}
    assert len(tt.plan(tmp_path / "a", "(gate|up) f", layouts=layouts).changes) == 3


SCHEMES: dict[str, dict[str, Any]] = {
    "block": {"config_groups": {"group_0": {"weights": {"num_bits": 8, "block_structure": [BLOCK, 5]}}}},
    "groups": {"config_groups": {"group_0": {"weights": {"num_bits": 8, "group_size": 10}}}},
    "zeros": {"config_groups": {"group_0": {"weights": {"num_bits": 8, "group_size": None}}}},
}


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("kind", [*SCHEMES])
def test_ranks(tmp_path: Path, kind: str, tp: int) -> None:
    """Rows and columns of a rank with their own scales, in blocks and groups of the sizes that compressed-tensors tells."""
    home, f = "model.layers.0.mlp.", 160
    made = {"up_proj": weight(kind, f, 1), "down_proj": weight(kind, HID, 2, f)}
    tensors = {f"{home}{name}.{word}": x for name, one in made.items() for word, x in one.items()}
    write(tmp_path / "a", tensors, SCHEMES[kind], APART)
    tt.shard(tmp_path / "a", tmp_path / "b", tp)
    for rank in range(tp):
        for name, axis in (("up_proj", 0), ("down_proj", 1)):
            found = numbers(of(tmp_path / "b" / f"rank-{rank}-of-{tp}", home + name), kind)
            assert np.array_equal(found, np.split(numbers(made[name], kind), tp, axis)[rank]), (name, rank)
    tt.verify(tmp_path / "a", tmp_path / "b")
    tt.merge(tmp_path / "b", tmp_path / "c")
    assert files.read(tmp_path / "c") == files.read(tmp_path / "a")
    if kind != "zeros":
        with pytest.raises(PlanError, match="rows crosses a boundary"):
            tt.shard_plan(tmp_path / "a", 32)


def test_two_numbers_in_a_byte(tmp_path: Path) -> None:
    """NVFP4 as ModelOpt writes it: 16 inputs to a scale are 8 bytes; a group that the config does not tell is not guessed."""
    name, told = "model.layers.0.mlp.down_proj", {"config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 16}}}}
    rng = np.random.default_rng(5)
    stored = {"weight": rng.integers(0, 256, (HID, 48)).astype(np.uint8), "weight_scale": rng.standard_normal((HID, 6)).astype(np.float32)}
    tensors = {f"{name}.{word}": x for word, x in stored.items()} | {f"{name}.weight_scale_2": np.array(2.0, np.float32)}
    write(tmp_path / "a", tensors, told, APART)
    tt.shard(tmp_path / "a", tmp_path / "b", 3)
    for rank in range(3):
        found = of(tmp_path / "b" / f"rank-{rank}-of-3", name)
        assert all(np.array_equal(found[word], np.split(x, 3, 1)[rank]) for word, x in stored.items())
    with pytest.raises(PlanError, match="a block of 8 rows crosses a boundary"):
        tt.shard_plan(tmp_path / "a", 4)
    write(tmp_path / "u", tensors, {}, APART)
    with pytest.raises(PlanError, match="scales do not fit the tensor that they scale"):
        tt.shard_plan(tmp_path / "u", 3)


@pytest.mark.parametrize("first", ["split", "rope"])
def test_rotary_order_and_apart_and_joined(tmp_path: Path, first: str) -> None:
    """Named pairs do not lead weight and scales to two orders."""
    made = model(tmp_path / "a", "row", {WQKV: (H + 2 * G) * D}, GROUPED)
    steps: list[dict[str, Any]] = [{"to": "split"}, {"rope": "interleaved"}]
    one, two = steps if first == "split" else steps[::-1]
    tt.convert(tmp_path / "a", tmp_path / "b", **one)
    tt.convert(tmp_path / "b", tmp_path / "c", **two)
    tt.convert(tmp_path / "c", tmp_path / "d", "fused")
    found = apart(numbers(of(tmp_path / "d", WQKV), "row"))
    for part, x, expected in zip("qkv", found, apart(numbers(made[WQKV], "row")), strict=True):
        half = expected.reshape(-1, 2, D // 2, HID, 3).swapaxes(1, 2).reshape(expected.shape)
        assert np.array_equal(x, expected if part == "v" else half), part
    biases = apart(of(tmp_path / "d", WQKV)["bias"])
    assert np.array_equal(biases[0], apart(np.arange((H + 2 * G) * D))[0].reshape(-1, 2, D // 2).swapaxes(1, 2).reshape(-1))


def test_scales_of_experts(tmp_path: Path) -> None:
    """One for every output of every expert beside weights [experts, in, out]: which axis it is along is not guessed by its length."""
    config = {"model_type": "gpt_oss", "num_attention_heads": H, "num_key_value_heads": G, "hidden_size": 24, "intermediate_size": 24}
    home = "model.layers.0.mlp.experts."
    made = {
        f"{home}gate_up_proj": ("F8_E4M3", (3, 24, 48)),
        f"{home}down_proj": ("F8_E4M3", (3, 24, 24)),
        f"{home}down_proj_scale": ("F32", (3,)),
    }
    files.checkpoint(tmp_path / "a", [made], config)
    cuts = {one.name: one.cut for one in tt.shard_plan(tmp_path / "a", 2).wholes}
    assert cuts[f"{home}down_proj_scale"] is None and getattr(cuts[f"{home}down_proj"], "axis", None) == 1
    for number, (name, shape) in enumerate((("down_proj", (3, 24)), ("gate_up_proj", (3, 48)))):
        files.checkpoint(tmp_path / f"b{number}", [{**made, f"{home}{name}_scale": ("F32", shape)}], config)
        with pytest.raises(PlanError, match="scales do not fit the tensor that they scale"):
            tt.shard_plan(tmp_path / f"b{number}", 2)
