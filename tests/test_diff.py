"""Diff: every kind of difference, orders named without being told, tensors found by name, by family and by content, and nothing fooled."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import triptych as tt
from tests import files, injected, weights
from tests.injected import ERRORS, GIVEN, SIZES, Case
from triptych import ranges, values
from triptych.cli import main
from triptych.digests import Digested, Rows
from triptych.formats import read
from triptych.rowdiff import TensorDiff

H, G, D, IN = 6, 2, 8, 20
NEOX = {"model_type": "gpt_neox", "hidden_size": H * D, "num_attention_heads": H}


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return injected.case(tmp_path_factory.mktemp("right"))


def save(path: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None = None) -> Path:
    path.mkdir()
    save_file({name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}, path / "model.safetensors")
    if config:
        (path / "config.json").write_text(json.dumps(config))
    return path


def of(found: tt.Diff, name: str) -> TensorDiff:
    return next(one for one in found.tensors if name in (*one.a, *one.b))


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SAID = {
    "two rows swapped": ("order", "row 5 of a is row 17 of b, row 17 of a is row 5 of b"),
    "two query heads swapped": ("order", "head q 1 is q 4 in b, head q 4 is q 1 in b"),
    "K and V swapped": ("order", "parts are swapped\na is g (q r|k|v) p c   with g=2 r=3 p=4 c=2\nb is g (q r|v|k) p c"),
    "parts in another order": ("order", "b is g (k|q r|v) p c"),
    "GQA ratio wrong: query heads dealt out in turn": ("order", "head q 1 is q 3 in b"),
    "rotary order not changed": ("order", "the rotary order\na is g (q r|k|v) p c   with g=2 r=3 p=4 c=2\nb is g (q r|k|v) d"),
    "not grouped, parts side by side": ("order", "b is (q h|k g|v g) p c   with h=6 p=4 c=2 g=2   but its stamp says g (q r|k|v) p c"),
    "heads and dims exchanged": ("order", "heads scrambled"),
    "rows not moved at all": ("order", "b is (q h|k g|v g) d"),
    "last shard stale": ("order", "b is (q h|k g|v g) d"),
    "q of another layer": ("different", "48 of 80 rows differ, the first is row 0: part q, head 0, dim 0"),
    "two layers swapped": ("different", "the rows of a stand in b as 0.qkv.weight, another tensor"),
    "a row written twice, one lost": ("different", "1 of 80 rows differ, the first is row 3"),
    "a head never written: zeros": ("different", "8 of 80 rows differ"),
    "kv head 0 written for all": ("different", "16 of 80 rows differ, the first is row 64: part k, head 1, dim 0"),
    "one bit of a moved row": ("different", "1 of 80 rows differ, the first is row 0: part q, head 0, dim 0"),
    "a row scaled by 2": ("scaled", "b is a times 2 (1 of 80 rows)"),
    "q scaled by 1/sqrt(d)": ("scaled", "b is a times 0.353553 (the rows of q)"),
    "cast to float16": ("dtype", "F32 rounded to F16"),
    "cast to float16 and back": ("dtype", "b is a rounded to F16, in F32"),
    "stamp: another layout": ("declared", "a is declared as g (q r|k|v) p c   with g=2 r=3 p=4 c=2   (stamp)"),
    "stamp: other sizes": ("declared", "b is declared as g (q r|k|v) p c   with g=5 r=6 p=1 c=2   (stamp)"),
}
ELSEWHERE = {
    "bias not moved": ("1.qkv.bias", "order", "b is (q h|k g|v g) d"),
    "norm not permuted": ("1.q_norm.weight", "order", "the rotary order"),
    "transposed": ("0.o.weight", "order", "transposed"),
    "one bit of another tensor": ("0.o.weight", "different", "1 of 48 rows differ, the first is row 0"),
    "NaN payload changed": ("odd", "different", "in bits only, the numbers are equal"),
    "-0.0 became 0.0": ("odd", "different", "in bits only, the numbers are equal"),
    "tensor missing": ("0.o.weight", "only in a", "only in a"),
    "tensor doubled under another name": ("0.o.weight_1", "only in b", "only in b"),
    "names of two tensors exchanged": ("0.k_norm.weight", "different", "stand in b as 1.k_norm.weight, another tensor"),
}


@pytest.mark.parametrize("error", [e for e in ERRORS if e.name in SAID or e.name in ELSEWHERE], ids=lambda error: error.name)
def test_what_it_says_of_every_injected_error(right: Case, tmp_path: Path, error: injected.Error) -> None:
    found = tt.diff(right.out, injected.injected(right, error, tmp_path / "c"))
    name, kind, text = ELSEWHERE.get(error.name) or ("1.qkv.weight", *SAID[error.name])
    one = of(found, name)
    assert (one.kind, text in one.text) == (kind, True), one
    assert not found.equal and found.summary in str(found)


def test_the_order_of_a_conversion_is_found_with_and_without_words(right: Case) -> None:
    """No config and no stamp on one side: sizes are guessed, the order is the right one; the same weights, and exit code 1."""
    found = tt.diff(right.path, right.out)
    one = of(found, "0.qkv.weight")
    assert (str(one.layout_a), str(one.layout_b), one.kind, one.differing) == ("(q h|k g|v g) d", "g (q r|k|v) p c", "order", 0)
    assert one.sizes is not None and {axis: one.sizes[axis] for axis in "hgd"} == {"h": H, "g": G, "d": D}
    assert found.summary.startswith("the same weights: 3 of 11 tensors equal; 8 with their rows in another order")
    assert of(tt.diff(right.out, right.path), "0.qkv.bias").order == "layout"
    assert tt.diff(right.path, right.path).summary == "equal: all 11 tensors, byte for byte"


@pytest.mark.parametrize("to", ["(q|k|v) h d", "h d (q|k|v)", "(q|k|v) d h", "(v|q|k) h d", "h (q|k|v) p c", "split", "t (q|k|v) n d"])
def test_declared_layouts_are_named(tmp_path: Path, to: str) -> None:
    """A record on one side, a stamp on the other; split tensors are found by the names that splitting gives."""
    qkv = "gpt_neox.layers.0.attention.query_key_value."
    made = {f"{qkv}weight": noise(3 * H * D, IN), f"{qkv}bias": noise(3 * H * D), "other": noise(5, 7)}
    a = save(tmp_path / "a", made, NEOX)
    tt.convert(a, tmp_path / "b", to, **({"t": 2} if to.startswith("t ") else {}))
    found = tt.diff(a, tmp_path / "b")
    one = of(found, f"{qkv}weight")
    assert one.kind == "order" and str(one.layout_a) == "h (q|k|v) d" and one.differing == 0
    assert str(one.layout_b) == ("q h d|k h d|v h d" if to == "split" else to) and "(record transformers" in one.text
    assert len(one.b) == (3 if to == "split" else 1) and of(found, "other").kind == "equal" and len(found.tensors) == 3
    back = tt.diff(tmp_path / "b", a)
    assert str(of(back, f"{qkv}weight").layout_b) == "h (q|k|v) d"


def test_two_files_of_one_model_in_two_orders(tmp_path: Path) -> None:
    """Same names, same shapes, same config: one block for each rank, and parts side by side. Both orders are named."""
    t, n, r, d = 4, 2, 3, 16
    sizes = {"t": t, "g": t * n, "r": r, "d": d}
    weight, bias = noise((t * n * (r + 2)) * d, 24), noise((t * n * (r + 2)) * d)
    vendor, plain = "t (q n r|k n|v n) d", "(q h|k g|v g) d"
    config = {"model_type": "unheard_of", "num_attention_heads": t * n * r, "num_key_value_heads": t * n}
    a = save(tmp_path / "a", {"l.0.qkv_proj.weight": weight, "l.0.qkv_proj.bias": bias}, config)
    moved = {name: tt.repack(x, vendor, plain, axis=0, **sizes) for name, x in (("weight", weight), ("bias", bias))}
    b = save(tmp_path / "b", {f"l.0.qkv_proj.{name}": x for name, x in moved.items()}, config)
    for given in ({}, {"d": d}):
        found = tt.diff(a, b, **given)
        for one in found.tensors:
            assert (one.kind, str(one.layout_a), str(one.layout_b)) == ("order", vendor, plain)
    (a / "config.json").unlink()
    (b / "config.json").unlink()
    guessed = tt.diff(a, b).tensors[0]
    assert str(guessed.layout_a) == "g (q r|k|v) d" and "sizes are guessed" in guessed.text, "with half as many kv heads of twice the size"
    assert found.summary == f"the same weights: 0 of 2 tensors equal; 2 with their rows in another order: a is {vendor}, b is {plain}"


def test_rows_that_occur_twice_fool_nobody(tmp_path: Path) -> None:
    """Half of the rows zero, others doubled: the order is still the layouts', and a lost copy is seen."""
    weight = noise(3 * H * D, IN)
    weight[::2] = 0
    weight[1:60:4] = weight[3]
    bias = torch.zeros(3 * H * D)
    bias[30] = 1
    a = save(tmp_path / "a", {"c.qkv.weight": weight, "c.qkv.bias": bias, "c.ones": torch.ones(9)})
    moved = [tt.repack(x, "h (q|k|v) d", "(q|k|v) h d", axis=0, h=H) for x in (weight, bias)]
    b = save(tmp_path / "b", {"c.qkv.weight": moved[0], "c.qkv.bias": moved[1], "c.ones": torch.ones(9)})
    found = tt.diff(a, b, h=H)
    for name in ("c.qkv.weight", "c.qkv.bias"):
        assert (of(found, name).kind, str(of(found, name).layout_a), str(of(found, name).layout_b)) == (
            "order",
            "h (q|k|v) d",
            "(q|k|v) h d",
        )
    lost = moved[0].clone()
    lost[(lost == weight[3]).all(1).nonzero()[0]] = 0
    one = of(tt.diff(a, save(tmp_path / "c", {"c.qkv.weight": lost, "c.qkv.bias": moved[1], "c.ones": torch.ones(9)}), h=H), "c.qkv.weight")
    assert one.kind == "different"


def test_an_order_with_a_few_rows_changed(tmp_path: Path) -> None:
    qkv = "gpt_neox.layers.0.attention.query_key_value.weight"
    a = save(tmp_path / "a", {qkv: noise(3 * H * D, IN)}, NEOX)
    tt.convert(a, tmp_path / "b", "(q|k|v) h d")
    tensors = load_file(tmp_path / "b" / "model.safetensors")
    tensors[qkv][[3, 70]] += 1
    with (tmp_path / "b" / "model.safetensors").open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        metadata = json.loads(file.read(size))["__metadata__"]
    save_file(tensors, tmp_path / "b" / "model.safetensors", metadata)
    one = of(tt.diff(a, tmp_path / "b"), qkv)
    assert (one.kind, one.differing, str(one.layout_b)) == ("different", 2, "(q|k|v) h d")
    assert "2 of 144 rows are not the same even so, the first is row 3: part q, head 0, dim 3" in one.text


def test_names_without_their_beginning_and_names_that_say_nothing(tmp_path: Path) -> None:
    made = {
        "model.layers.0.q.weight": noise(48, IN, seed=1), "model.layers.0.q.bias": noise(48, seed=2),
        "model.norm.weight": noise(IN, seed=3), "lm_head.weight": noise(30, IN, seed=4),
    }  # fmt: skip
    a = save(tmp_path / "a", made)
    short = save(tmp_path / "b", {name.removeprefix("model."): tensor for name, tensor in made.items()})
    found = tt.diff(a, short)
    assert not found.equal and {one.kind for one in found.tensors} == {"equal"} and "3 under other names" in found.summary
    other = save(tmp_path / "c", dict(zip(("x.w.weight", "x.w.bias", "y", "z"), made.values(), strict=True)))
    found = tt.diff(a, other)
    assert [(one.kind, one.b) for one in found.tensors if one.a == ("model.layers.0.q.bias",)] == [("equal", ("x.w.bias",))]
    assert len(found.tensors) == 4 and "4 under other names" in found.summary


def test_parts_are_found_by_their_rows(tmp_path: Path) -> None:
    """q, k, v of a under names that nobody declares are one tensor of b, in three dtypes and both ways round."""
    q, k, v = noise(H * D, IN, seed=1), noise(G * D, IN, seed=2), noise(G * D, IN, seed=3)
    a = save(tmp_path / "a", {"l.aq": q.bfloat16(), "l.ak": k.bfloat16(), "l.av": v.bfloat16(), "same": q[:5]})
    fused = tt.repack(torch.cat([q, k, v]).bfloat16(), "(q h|k g|v g) d", "g (q r|k|v) d", axis=0, h=H, g=G, d=D)
    for number, dtype in enumerate((torch.bfloat16, torch.float32)):
        b = save(tmp_path / f"b{number}", {"l.x": fused.to(dtype), "same": q[:5]})
        for found in (tt.diff(a, b, h=H, g=G, d=D), tt.diff(b, a, h=H, g=G, d=D)):
            one = of(found, "l.x")
            assert one.kind == "order" and {*one.a, *one.b} == {"l.x", "l.aq", "l.ak", "l.av"} and one.differing == 0
            assert {str(one.layout_a), str(one.layout_b)} == {"(q h|k g|v g) d", "g (q r|k|v) d"}
            assert ("the same numbers in" in one.text) == (dtype is torch.float32)


def test_a_gguf_file_and_a_torch_file(tmp_path: Path) -> None:
    """Names, dtype and rotary order of q and k are others; found by content, named by the layouts."""
    q, k, v = noise(H * D, IN, seed=1), noise(G * D, IN, seed=2), noise(G * D, IN, seed=3)
    home = "model.layers.0.self_attn."
    made = {f"{home}q_proj.weight": q, f"{home}k_proj.weight": k, f"{home}v_proj.weight": v, "model.norm.weight": noise(IN, seed=4)}
    a = save(tmp_path / "a", made)
    torch.save(made, tmp_path / "a.bin")
    assert tt.diff(a, tmp_path / "a.bin").equal
    pairs = [tt.repack(x, "h c p", "h p c", axis=0, h=heads) for x, heads in ((q, H), (k, G))]
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    for name, x in zip(("blk.0.attn_q", "blk.0.attn_k", "blk.0.attn_v"), (*pairs, v), strict=True):
        writer.add_tensor(f"{name}.weight", x.half().numpy())
    writer.add_tensor("output_norm.weight", made["model.norm.weight"].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = tt.diff(a, tmp_path / "x.gguf", h=H, g=G, d=D)
    for name, layouts in (("q", ("h d", "h p c")), ("k", ("g d", "g p c"))):
        one = of(found, f"{home}{name}_proj.weight")
        assert (one.b, one.kind, one.order) == ((f"blk.0.attn_{name}.weight",), "order", "rotary")
        assert (str(one.layout_a), str(one.layout_b)) == layouts and "F32 rounded to F16" in one.text
    assert of(found, "blk.0.attn_v.weight").kind == "dtype" and of(found, "output_norm.weight").kind == "equal"


def test_two_orders_of_real_weights(tmp_path: Path) -> None:
    """A trained BERT's q, k and v packed in two ways under one name and one config."""
    trained = load_file(weights.minilm())
    home = "encoder.layer.{}.attention.self."
    made = {}
    for layer in range(3):
        q, k, v = (trained[home.format(layer) + f"{part}.weight"] for part in ("query", "key", "value"))
        made[f"l.{layer}.qkv_proj.weight"] = torch.cat([q, k, v])
        made[f"l.{layer}.o.weight"] = trained[f"encoder.layer.{layer}.attention.output.dense.weight"]
    config = {"model_type": "unheard_of", "num_attention_heads": 12}
    other = {name: tt.repack(x, "(q|k|v) h d", "t (q|k|v) n d", axis=0, h=12, t=4) if "qkv" in name else x for name, x in made.items()}
    found = tt.diff(save(tmp_path / "a", made, config), save(tmp_path / "b", other, config))
    assert (
        found.summary == "the same weights: 3 of 6 tensors equal; 3 with their rows in another order: a is (q|k|v) h d, b is t (q|k|v) n d"
    )


def test_what_is_constant_has_every_order(tmp_path: Path) -> None:
    """A bias of zeros is what both declarations say."""
    qkv = "gpt_neox.layers.0.attention.query_key_value."
    a = save(tmp_path / "a", {f"{qkv}weight": noise(3 * H * D, IN), f"{qkv}bias": torch.zeros(3 * H * D)}, NEOX)
    tt.convert(a, tmp_path / "b", "(q|k|v) h d")
    found = tt.diff(a, tmp_path / "b")
    assert [of(found, f"{qkv}{name}").kind for name in ("weight", "bias")] == ["order", "equal"]


def test_dtypes_and_scales(tmp_path: Path) -> None:
    x = noise(24, IN)
    x[0, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
    half = x.bfloat16()
    pairs = {
        "wide": (half, half.float(), "dtype", "the same numbers in BF16 and F32"),
        "narrow": (x, half, "dtype", "F32 rounded to BF16"),
        "eighth": (noise(9, 7).to(torch.float8_e4m3fn), noise(9, 7).to(torch.float8_e4m3fn).float(), "dtype", "the same numbers"),
        "apart": (x, half + 1, "different", "24 of 24 rows differ"),
        "whole": (torch.arange(12).reshape(3, 4), torch.arange(12).reshape(3, 4).int(), "different", "do not go together"),
        "shape": (noise(4, 6), noise(4, 7), "different", "do not go together"),
        "turned": (noise(4, 6), noise(4, 6).T, "order", "transposed"),
        "scaled": (half[1:], (half[1:].float() * 0.125).bfloat16(), "scaled", "b is a times 0.125"),
        "apiece": (noise(5, 30), noise(5, 30) * torch.tensor([2, 3, 4, 5, 6.0])[:, None], "scaled", "a factor of its own, 2 to 6"),
        "vector": (noise(50), noise(50) * 3, "scaled", "b is a times 3"),
        "unlike": (noise(50), noise(50, seed=1), "different", "50 of 50 rows differ"),
        "number": (torch.tensor(1.0), torch.tensor(2.0), "different", "F32 () and F32 ()"),
    }
    a = save(tmp_path / "a", {name: pair[0] for name, pair in pairs.items()})
    b = save(tmp_path / "b", {name: pair[1] for name, pair in pairs.items()})
    found = tt.diff(a, b)
    for name, (_, _, kind, text) in pairs.items():
        assert (of(found, name).kind, text in of(found, name).text) == (kind, True), of(found, name)


def test_columns_of_weights_in_out(tmp_path: Path) -> None:
    """GPT-2's weights are packed along axis 1: a record says so, and for others it is tried."""
    made = {"h.0.attn.c_attn.weight": noise(IN, 3 * H * D), "h.0.attn.c_attn.bias": noise(3 * H * D)}
    config = {"model_type": "gpt2", "n_embd": H * D, "n_head": H}
    for number, told in enumerate((config, None)):
        a = save(tmp_path / f"a{number}", made, told)
        turned = {name: tt.repack(x, "(q|k|v) h d", "h (q|k|v) d", axis=-1, h=H) for name, x in made.items()}
        one = of(tt.diff(a, save(tmp_path / f"b{number}", turned), h=H), "h.0.attn.c_attn.weight")
        assert (one.kind, str(one.layout_a), str(one.layout_b), one.rows) == ("order", "(q|k|v) h d", "h (q|k|v) d", 3 * H * D)


@pytest.mark.parametrize("chunk", [1, 200, 1 << 20])
def test_rows_and_their_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Equal numbers exactly for equal rows, along every axis, whatever the window; sign bits in pairs too."""
    monkeypatch.setattr(ranges, "CHUNK", chunk)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((7, 12, 5)).astype(np.float16)
    x[:, 3], x[2], x[..., 4] = x[:, 8], x[5], x[..., 1]
    y = x.copy()
    y[0, 0, [0, 4]] *= -1
    y[2, 0, 0] *= -1
    files.raw(tmp_path / "x.safetensors", {"x": files.entry("F16", [7, 12, 5], 0, x.nbytes)}, x.tobytes())
    files.raw(tmp_path / "y.safetensors", {"x": files.entry("F16", [7, 12, 5], 0, y.nbytes)}, y.tobytes())
    sides = [read(tmp_path / f"{name}.safetensors") for name in "xy"]
    with ranges.Ranges(sides[0]) as one, ranges.Ranges(sides[1]) as two:
        for axis in range(3):
            a, b = (Rows(r, (s.tensors["x"],), axis) for r, s in ((one, sides[0]), (two, sides[1])))
            rows = [np.moveaxis(side, axis, 0).reshape(side.shape[axis], -1) for side in (x, y)]
            same = (rows[0][:, None] == rows[0][None]).all(-1)
            assert np.array_equal(a.numbers[:, None] == a.numbers[None], same)
            index, _ = Digested(a, b).matched
            for i, j in enumerate(index):
                assert j == -1 or np.array_equal(rows[0][i], rows[1][j])
            as_is = np.arange(len(rows[0]))
            assert np.array_equal(Digested(a, b).differing(as_is), np.flatnonzero((rows[0] != rows[1]).any(1)))


def test_numbers_of_all_dtypes() -> None:
    """Against torch: every byte of the 8-bit dtypes, and rounding to nearest even."""
    every = torch.arange(256, dtype=torch.uint8)
    for name, dtype in (("F8_E4M3", torch.float8_e4m3fn), ("F8_E5M2", torch.float8_e5m2)):
        assert np.array_equal(values.decode(every.numpy(), name), every.view(dtype).float().numpy(), equal_nan=True)
    x = noise(5000) * 10 ** torch.randint(-44, 38, (5000,), generator=torch.Generator().manual_seed(0)).float()
    x[:4] = torch.tensor([float("nan"), float("inf"), -0.0, 65520.0])
    for name, dtype in (("BF16", torch.bfloat16), ("F16", torch.float16), ("F64", torch.float64)):
        rounded = values.encode(x.numpy(), name)
        assert np.array_equal(values.decode(rounded, name), x.to(dtype).double().numpy(), equal_nan=True)


def test_the_command(right: Case, capsys: pytest.CaptureFixture[str]) -> None:
    codes = []
    for arguments in (
        ["diff", right.path, right.path],
        ["diff", right.path, right.out],
        ["diff", right.path, right.out, "--json"],
        ["diff", "/no", "/no"],
    ):
        with pytest.raises(SystemExit) as left:
            main([*map(str, arguments)])
        codes.append((left.value.code, capsys.readouterr().out))
    assert [code for code, _ in codes] == [0, 1, 1, 3]
    assert codes[0][1].endswith("equal: all 11 tensors, byte for byte\n")
    told = json.loads(codes[2][1])
    assert told["equal"] is False and told["tensors"][0]["layout_b"] == "g (q r|k|v) p c" and told["summary"] in codes[1][1]


def test_diff_needs_no_torch() -> None:
    code = "import sys, triptych as tt; tt.diff; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_sizes_are_all_different() -> None:
    assert len({H, G, H // G, D, IN, *GIVEN}) == 5 + len(GIVEN) and SIZES == {"h": H, "g": G, "d": D}
