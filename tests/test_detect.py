"""`detect` on real trained weights in many layouts, and on what it must not be confident about."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch
from gguf import quants
from safetensors import safe_open
from safetensors.torch import save_file

import triptych as tt
from triptych import formats
from triptych.detect import Verdict, detect, pool
from triptych.detect_files import detect_checkpoint
from triptych.errors import FormatError, LayoutError, MissingExtraError, SizeError
from triptych.evidence import Evidence
from triptych.hypotheses import hypotheses
from triptych.rotary import rotary
from triptych.samples import Numbers

from . import weights

PLAIN = "(q|k|v) h d"
LAYOUTS = (PLAIN, "(q|v|k) h d", "(v|q|k) h d", "h (q|k|v) d", "h (v|q|k) d", "h d (q|k|v)", "t (q|v|k) n d", "(q|k|v) d h")
TORCH = {"half": torch.float16, "bf": torch.bfloat16, "e4": torch.float8_e4m3fn, "e5": torch.float8_e5m2}


@cache
def sceptr(name: str) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(weight, output projection, bias) of every layer, as stored."""
    table = {key: tensor.numpy() for key, tensor in torch.load(weights.sceptr(name), weights_only=True).items()}
    homes = [key.removesuffix("in_proj_weight") for key in table if key.endswith("in_proj_weight")]
    return [(table[home + "in_proj_weight"], table[home + "out_proj.weight"], table[home + "in_proj_bias"]) for home in homes]


@cache
def minilm() -> list[tuple[np.ndarray, np.ndarray]]:
    """(q, k and v one behind the other, output projection) of every layer."""
    out = []
    with safe_open(weights.minilm(), "np") as file:
        for layer in range(6):
            home = f"encoder.layer.{layer}.attention."
            parts = [file.get_tensor(f"{home}self.{part}.weight") for part in ("query", "key", "value")]
            out.append((np.concatenate(parts), file.get_tensor(f"{home}output.dense.weight")))
    return out


def laid_out(weight: np.ndarray, layout: str, heads: int) -> np.ndarray:
    rows = len(weight)
    sizes = {"t": 4, "n": heads // 4, "d": rows // 3 // heads} if " n " in layout else {"h": heads, "d": rows // 3 // heads}
    return tt.repack(weight, PLAIN, layout, axis=0, **sizes)


def blocks(verdict: Verdict) -> str:
    """The layout found; blocks of a likely size are called heads when the number of heads is not known."""
    return str(verdict.layout).replace("h (q|v|k) d", "t (q|v|k) n d")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_real_layers_with_their_output_projection(layout: str) -> None:
    weight, o, _ = sceptr("SCEPTR_large")[0]
    found = detect(laid_out(weight, layout, 8), o)
    assert (found.confidence, blocks(found)) == ("confident", layout), found
    assert "convention" in str(found)


@pytest.mark.parametrize("layout", LAYOUTS[3:4])
def test_a_wider_layer(layout: str) -> None:
    weight, o = minilm()[3]
    found = detect(laid_out(weight, layout, 12), o)
    assert (found.confidence, str(found.layout)) == ("confident", layout)
    assert found.sizes is not None and (found.sizes["h"], found.sizes["d"]) == (12, 32), "heads follow from the weights"


@pytest.mark.parametrize("name", weights.SCEPTR)
def test_genuinely_fused_layers(name: str) -> None:
    found = [detect(weight, o, bias) for weight, o, bias in sceptr(name)]
    assert {str(one.layout) for one in found} == {PLAIN}
    pooled = pool(found)
    assert (pooled.confidence, str(pooled.layout), pooled.layers) == ("confident", PLAIN, len(found))
    assert pooled.sizes is not None and pooled.sizes["h"] == 8, "the number of heads follows from the weights"


@pytest.mark.parametrize("layout", LAYOUTS[::2])
def test_without_output_projection_heads_known(layout: str) -> None:
    weight = sceptr("SCEPTR")[0][0]
    found = detect(laid_out(weight, layout, 8), heads=8)
    assert (found.confidence, str(found.layout)) == ("confident", layout)


def test_nothing_known() -> None:
    found = detect(sceptr("SCEPTR")[0][0])
    assert (found.confidence, str(found.layout)) == ("confident", PLAIN)
    assert found.sizes is not None and found.sizes["d"] == 8


def test_transposed_storage_and_dtypes() -> None:
    weight, o, _ = sceptr("SCEPTR_large")[0]
    neox = laid_out(weight, "h (q|k|v) d", 8)
    expected = detect(neox, o)
    for other in (detect(neox.T, o.T, axis=1), detect(torch.from_numpy(neox), torch.from_numpy(o))):
        assert other.to_dict() == expected.to_dict()
    for low in (neox.astype(ml_dtypes.bfloat16), torch.from_numpy(neox).bfloat16(), neox.astype(np.float16)):
        assert str(detect(low, o).layout) == "h (q|k|v) d"
    assert json.loads(json.dumps(expected.to_dict()))["layout"] == "h (q|k|v) d"


# What it must not be confident about


def controls() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Untrained weights: plain, parts of another scale, rows that share a direction, heads of other scales."""
    rng = np.random.default_rng(7)
    for i in range(24):
        d = (32, 40, 64)[i % 3]
        weight, o = rng.standard_normal((3 * d, d), np.float32), rng.standard_normal((d, d), np.float32)
        if i % 4 == 1:
            weight[:d] *= 3
        if i % 4 == 2:
            weight += 0.5 * rng.standard_normal((1, d), np.float32)
        if i % 4 == 3:
            weight *= rng.gamma(2, 1, 3 * d // 8).astype(np.float32).repeat(8)[:, None]
        yield weight, o


def test_untrained_weights() -> None:
    for i, (weight, o) in enumerate(controls()):
        assert detect(weight, o, heads=len(o) // 8).confidence != "confident"
        assert i % 10 or detect(weight, heads=len(o) // 8).confidence == "cannot tell"


def test_shuffled_rows() -> None:
    rng = np.random.default_rng(8)
    for weight, o, _ in sceptr("SCEPTR") * 4:
        shuffled = weight[rng.permutation(len(weight))]
        assert detect(shuffled, o, heads=8).confidence != "confident"


def test_the_output_projection_of_another_layer() -> None:
    layers = sceptr("SCEPTR")
    for (weight, _, _), (_, o, _) in zip(layers, layers[1:] + layers[:1], strict=True):
        found = detect(weight, o)
        assert found.confidence != "confident" or str(found.layout) == PLAIN, found


def test_heads_of_another_scale_share_nothing() -> None:
    """The mean row, taken off as it is, would be what all small rows share."""
    rng = np.random.default_rng(45)
    weight = rng.standard_normal((96, 32), np.float32)
    rng.standard_normal((32, 32), np.float32)
    weight *= rng.gamma(2, 1, (12, 1, 1)).astype(np.float32).repeat(8)[:, None]
    assert detect(weight, heads=4).confidence != "confident"


@pytest.mark.parametrize(("layer", "layout"), [(2, "_ (q|k) h d|v d h"), (2, "q h d|_ h (k|v) d"), (0, "_ h (q|k) d|v h d")])
def test_layouts_that_are_not_compared(layer: int, layout: str) -> None:
    weight, o, _ = sceptr("SCEPTR")[layer]
    assert detect(tt.repack(weight, PLAIN, layout, axis=0, h=8, d=8), o).confidence != "confident"


def test_steps_are_no_heads() -> None:
    """The two halves of this layer's heads are unlike each other: two heads of 192 rows explain more than twelve of 32."""
    weight, o = minilm()[4]
    found = detect(weight, o)
    assert (found.confidence, str(found.layout), found.sizes) == ("confident", PLAIN, None)


def test_too_few_columns() -> None:
    weight, o, _ = sceptr("SCEPTR")[0]
    assert detect(weight[:, :31], o[:31], heads=8).confidence == "cannot tell"


def test_damaged_and_unfit() -> None:
    weight = np.ones((13, 40), np.float32)
    assert "13 rows" in detect(weight).reasons[0]
    weight = np.full((96, 32), np.nan, np.float32)
    assert "NaN" in detect(weight).reasons[0]
    assert detect(np.zeros((96, 32), np.float32), heads=2).confidence == "cannot tell"
    with pytest.raises(LayoutError, match="need a matrix"):
        detect(np.ones(12))
    with pytest.raises(SizeError, match="bias does not belong"):
        detect(np.ones((96, 32)), bias=np.ones(32))
    with pytest.raises(LayoutError, match="one shape"):
        pool([])


# Hypotheses


def test_hypotheses_read_every_row_once() -> None:
    for rows, width, heads in ((240, 80, None), (240, 80, 5), (240, 160, 10), (240, None, 10)):
        for one in hypotheses(rows, width, heads):
            reading = one.reading()
            assert sorted([*reading.q.ravel(), *reading.k, *reading.v]) == list(range(rows)), one
            assert sorted(reading.o.ravel()) == list(range(reading.q.size)), one


def test_every_number_of_blocks_is_there() -> None:
    found = {len(np.flatnonzero(np.diff(one.reading().q[0]) != 1)) + 1 for one in hypotheses(3 * 96, 96) if str(one.layout).find("v") > 0}
    assert {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 96} <= found


def grouped(g: int, r: int, d: int, width: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Parts [width, heads, d] and the output projection, balanced as training balances them: what no real package ships."""
    rng = np.random.default_rng(9)
    k, v = (rng.standard_normal((g, d, width), np.float32) * rng.gamma(2, 1, (g, d, 1)).astype(np.float32) for _ in "kv")
    mixed = k + 0.3 * np.roll(k, 1, axis=1)
    share = np.sqrt(rng.dirichlet(np.ones(r), (g, d)).transpose(2, 0, 1))[..., None].astype(np.float32)
    noise = rng.standard_normal((r, g, d, width), np.float32) * np.abs(k).mean(axis=2, keepdims=True)
    q = np.stack(list(share * (mixed + noise)), axis=1).reshape(g * r, d, width)
    o = np.repeat(v, r, axis=0) + 0.5 * rng.standard_normal((g * r, d, width), np.float32)
    return {"q": q.transpose(2, 0, 1), "k": mixed.transpose(2, 0, 1), "v": v.transpose(2, 0, 1)}, o.reshape(-1, width).T


@pytest.mark.parametrize("layout", ["g (q r|k|v) d", "(q h|k g|v g) d", "(k g|v g|q h) d", "(q r g|k g|v g) d"])
def test_grouped_heads(layout: str) -> None:
    parts, o = grouped(3, 5, 16, 96)
    found = detect(tt.fuse(parts, layout, g=3, r=5, h=15).T, o)
    best = found.ranked[0]
    assert (str(best.layout), best.sizes["g"]) == (layout, 3), found


def test_q_apart_from_groups_of_k_and_v() -> None:
    layout = "q h d|_ g (k|v) d"
    assert {layout, "_ g (v|k) d|q h d"} <= {str(one.layout) for one in hypotheses(240, 144, 9)}
    assert not any("_ g" in str(one.layout) for one in hypotheses(240, heads=9))  # without o nothing bears it out
    parts, o = grouped(3, 5, 16, 96)
    assert str(detect(tt.fuse(parts, layout, g=3, h=15, d=16).T, o).ranked[0].layout) == layout


def test_norms_of_pairs_tell_k_from_a_query_head() -> None:
    """Of a rotated head only the norm of a pair is balanced; dims of two query heads may resemble each other more than k."""
    rng = np.random.default_rng(13)
    g, r, d, width = 4, 3, 16, 48
    share, first = rng.uniform(0.1, 1, (r, g, d // 2, 1)), rng.uniform(0.1, 0.9, (2, g, d // 2, 1))
    squares = np.concatenate([share * first[0], share * (1 - first[0])], axis=3)
    k = np.concatenate([share.sum(0) * first[1], share.sum(0) * (1 - first[1])], axis=2)
    unit = rng.standard_normal((r + 2, g, d, width), np.float32)
    unit /= np.linalg.norm(unit, axis=3, keepdims=True)
    q, k = unit[:r] * np.sqrt(squares).reshape(r, g, d, 1), unit[r] * np.sqrt(k).reshape(g, d, 1)
    weight = np.concatenate([q.swapaxes(0, 1).reshape(-1, width), k.reshape(-1, width), unit[r + 1].reshape(-1, width)]).astype(np.float32)
    found = {str(one.layout): one for one in hypotheses(g * (r + 2) * d, g * r * d, g * r)}
    law = {text: Evidence(weight).of(found[text].reading()).law for text in ("(q h|k g|v g) d", "(k g|q h|v g) d")}
    assert law["(q h|k g|v g) d"] > 6 + law["(k g|q h|v g) d"]


def test_parts_of_other_sizes_are_other_readings() -> None:
    """v, q and k one behind the other are the same rows in turn for any number of query heads to a kv head."""
    found = detect(laid_out(sceptr("SCEPTR")[1][0], "(v|q|k) h d", 8), heads=8)
    assert (found.confidence, str(found.layout)) == ("confident", "(v|q|k) h d"), found


@pytest.mark.parametrize("layout", ["(k|v) g d", "g (v|k) d", "g d (k|v)"])
def test_k_and_v_alone(layout: str) -> None:
    parts, o = grouped(3, 5, 16, 96)
    weight = tt.fuse({"k": parts["k"], "v": parts["v"]}, layout, g=3, d=16).T
    found = detect(weight, o, heads=15, kv_heads=3, parts="k|v", q=parts["q"].reshape(96, -1).T)
    assert (found.confidence, str(found.layout)) == ("confident", layout), found
    assert detect(weight, o, heads=15, kv_heads=3, parts="k|v").confidence != "confident", "half of the evidence is missing"
    with pytest.raises(SizeError, match="q does not belong"):
        detect(weight, o, parts="k|v", q=parts["q"].reshape(96, -1))


@pytest.mark.parametrize("layout", ["(gate|up) f", "(up|gate) f", "f (gate|up)"])
def test_gate_and_up(layout: str) -> None:
    """Norms of up follow those of down's columns; gate shares directions with both."""
    rng = np.random.default_rng(10)
    f, width = 240, 72
    shared, scale = rng.standard_normal((f, width), np.float32), rng.gamma(3, 1, (f, 1)).astype(np.float32)
    up, gate, down = (factor * (shared + rng.standard_normal((f, width), np.float32)) for factor in (scale, 1.0, scale))
    weight = tt.repack(np.concatenate([gate, up]), "(gate|up) f", layout, axis=0, f=f)
    found = detect(weight, down.T, parts="gate|up")
    assert (found.confidence, str(found.layout)) == ("confident", layout), found
    alone = detect(weight, parts="gate|up")
    assert alone.confidence == "weak" and "gate from up" in alone.reasons[0]
    assert str(alone.layout).replace("up|gate", "gate|up") == layout.replace("up|gate", "gate|up")


def test_rotary_order() -> None:
    """Only norms of pairs are balanced."""
    rng = np.random.default_rng(11)
    g, r, d, width = 6, 2, 32, 64
    pairs = rng.gamma(2, 1, (g, 1, d // 2)).astype(np.float32)
    q, k = (rng.standard_normal((g, n, d, width), np.float32) for n in (r, 1))
    for norms, order in ((np.concatenate([pairs, pairs], axis=2), "half"), (pairs.repeat(2, axis=2), "interleaved")):
        skew = rng.uniform(0.2, 0.8, (2, g, 1, d // 2)).astype(np.float32)
        first, second = (np.concatenate([s, 1 - s], axis=2) if order == "half" else np.stack([s, 1 - s], 3).reshape(g, 1, d) for s in skew)
        turn = rotary(q * np.sqrt(norms * first)[..., None], (k * np.sqrt(norms * second)[..., None])[:, 0])
        assert turn is not None and turn.order == order
    turn = rotary(q, k[:, 0])
    assert turn is not None and turn.order is None and "no trace" in str(turn)


# Checkpoints


def test_a_torch_file() -> None:
    found = detect_checkpoint(weights.sceptr("SCEPTR_large"))
    (kind,) = found.kinds
    assert (str(kind.verdict.layout), kind.verdict.confidence, len(kind.layers)) == (PLAIN, "confident", 4)
    assert all(name.endswith("out_proj.weight") for name in kind.outputs.values())
    assert "4 x " in str(found) and json.dumps(found.to_dict())


def test_a_safetensors_file(tmp_path: Path) -> None:
    tensors = {}
    for i, (weight, o) in enumerate(minilm()[:2]):
        tensors[f"layers.{i}.attention.query_key_value.weight"] = torch.from_numpy(laid_out(weight, "h (q|k|v) d", 12)).bfloat16()
        tensors[f"layers.{i}.attention.dense.weight"] = torch.from_numpy(o).bfloat16()
    save_file(tensors, tmp_path / "model.safetensors")
    (kind,) = detect_checkpoint(tmp_path).kinds
    assert (str(kind.verdict.layout), kind.verdict.layers) == ("h (q|k|v) d", 2)
    assert kind.name == "layers.*.attention.query_key_value.weight"
    with pytest.raises(FormatError, match="no tensor to look at"):
        detect_checkpoint(tmp_path, "nothing.*")


def test_numbers_of_any_dtype(tmp_path: Path) -> None:
    """As the packages that know them decode them; only what is asked for."""
    rng = np.random.default_rng(12)
    values = rng.standard_normal((6, 256), np.float32)
    scale = rng.uniform(0.5, 2, (1, 2)).astype(np.float32)
    kinds = {"half": np.float16, "bf": ml_dtypes.bfloat16, "e4": ml_dtypes.float8_e4m3fn, "e5": ml_dtypes.float8_e5m2}
    stored = {name: values.astype(dtype) for name, dtype in kinds.items()}
    save_file({name: torch.from_numpy(x.view(np.uint8)).view(TORCH[name]) for name, x in stored.items()} | {"s": torch.from_numpy(scale)},
              tmp_path / "model.safetensors")  # fmt: skip
    tensors = formats.read(tmp_path).tensors
    for name, expected in stored.items():
        numbers = Numbers(tmp_path, tensors[name])
        assert np.array_equal(numbers[:], expected.astype(np.float32))
        assert np.array_equal(numbers[:, :40], expected[:, :40].astype(np.float32)) and np.array_equal(numbers[:2], numbers[:][:2])
    scaled = Numbers(tmp_path, tensors["e4"], Numbers(tmp_path, tensors["s"]))
    assert np.array_equal(scaled[:, :200], (stored["e4"].astype(np.float32) * scale.repeat(128, 1))[:, :200])


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q5_1"])
def test_packed_numbers(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, o = grouped(3, 5, 16, 96)
    weight = tt.fuse(parts, "(q h|k g|v g) d", g=3, r=5, h=15).T
    path, packed = tmp_path / "net.gguf", gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, "phi3")
    for name, tensor in (("blk.0.attn_qkv.weight", weight), ("blk.0.attn_output.weight", o)):
        raw = quants.quantize(np.ascontiguousarray(tensor), packed) if tensor.shape[1] % 32 == 0 else np.ascontiguousarray(tensor)
        writer.add_tensor(name, raw, raw_dtype=packed if tensor.shape[1] % 32 == 0 else None)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        write()
    (found,) = detect_checkpoint(path, heads=15, kv_heads=3).kinds
    assert str(found.verdict.ranked[0].layout) == "(q h|k g|v g) d"
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"triptych\[gguf\]"):
        detect_checkpoint(path)
