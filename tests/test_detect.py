"""`detect` on real trained weights in many layouts, and on what it must not be confident about."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

import triptych as tt
from triptych.detect import Verdict, detect, pool
from triptych.detect_files import detect_checkpoint
from triptych.errors import FormatError, LayoutError, SizeError
from triptych.hypotheses import hypotheses

from . import weights

PLAIN = "(q|k|v) h d"
LAYOUTS = (PLAIN, "(q|v|k) h d", "(v|q|k) h d", "h (q|k|v) d", "h (v|q|k) d", "h d (q|k|v)", "t (q|v|k) n d", "(q|k|v) d h")


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
    layers = [(*minilm()[3], 12), (*sceptr("SCEPTR_large")[0][:2], 8)]
    for weight, o, heads in layers:
        found = detect(laid_out(weight, layout, heads), o)
        assert found.confidence == "confident", found
        assert blocks(found) == layout
        assert "convention" in str(found)


@pytest.mark.parametrize("name", weights.SCEPTR)
def test_genuinely_fused_layers(name: str) -> None:
    found = [detect(weight, o, bias) for weight, o, bias in sceptr(name)]
    assert {str(one.layout) for one in found} == {PLAIN}
    pooled = pool(found)
    assert (pooled.confidence, str(pooled.layout), pooled.layers) == ("confident", PLAIN, len(found))
    assert pooled.sizes is not None and pooled.sizes["h"] == 8, "the number of heads follows from the weights"


@pytest.mark.parametrize("layout", LAYOUTS[:6])
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
    """Untrained weights: plain, parts of another scale, rows that share a direction."""
    rng = np.random.default_rng(7)
    for i in range(90):
        d = (32, 40, 64)[i % 3]
        weight, o = rng.standard_normal((3 * d, d), np.float32), rng.standard_normal((d, d), np.float32)
        if i % 4 == 1:
            weight[:d] *= 3
        if i % 4 == 2:
            weight += 0.5 * rng.standard_normal((1, d), np.float32)
        yield weight, o


def test_untrained_weights() -> None:
    for i, (weight, o) in enumerate(controls()):
        assert detect(weight, o, heads=len(o) // 8).confidence != "confident"
        assert i % 10 or detect(weight, heads=len(o) // 8).confidence == "cannot tell"


def test_shuffled_rows() -> None:
    rng = np.random.default_rng(8)
    for weight, o, _ in sceptr("SCEPTR") * 10:
        shuffled = weight[rng.permutation(len(weight))]
        assert detect(shuffled, o, heads=8).confidence != "confident"


def test_the_output_projection_of_another_layer() -> None:
    layers = sceptr("SCEPTR")
    for (weight, _, _), (_, o, _) in zip(layers, layers[1:] + layers[:1], strict=True):
        found = detect(weight, o)
        assert found.confidence != "confident" or str(found.layout) == PLAIN, found


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


def test_grouped_heads() -> None:
    """Weights balanced as training balances them: the layouts that real packages do not ship."""
    rng = np.random.default_rng(9)
    g, r, d, width = 3, 5, 16, 96
    k, v = (rng.standard_normal((g, d, width), np.float32) * rng.gamma(2, 1, (g, d, 1)).astype(np.float32) for _ in "kv")
    mixed = k + 0.3 * np.roll(k, 1, axis=1)
    q = np.stack([mixed[:, None] * 1.0 + rng.standard_normal((1, 1, d, width), np.float32) for _ in range(r)], axis=1).reshape(
        g * r, d, width
    )
    o = np.repeat(v, r, axis=0) + 0.5 * rng.standard_normal((g * r, d, width), np.float32)
    parts = {"q": q.transpose(2, 0, 1), "k": mixed.transpose(2, 0, 1), "v": v.transpose(2, 0, 1)}
    for layout in ("g (q r|k|v) d", "(q h|k g|v g) d", "(k g|v g|q h) d"):
        weight = tt.fuse(parts, layout, g=g, r=r, h=g * r).T
        found = detect(weight, o.reshape(-1, width).T)
        best = found.ranked[0]
        assert (str(best.layout), best.sizes["g"]) == (layout, g), found


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
        tensors[f"layers.{i}.attention.query_key_value.weight"] = laid_out(weight, "h (q|k|v) d", 12).astype(ml_dtypes.bfloat16)
        tensors[f"layers.{i}.attention.dense.weight"] = o.astype(ml_dtypes.bfloat16)
    save_file(tensors, tmp_path / "model.safetensors")
    (kind,) = detect_checkpoint(tmp_path).kinds
    assert (str(kind.verdict.layout), kind.verdict.layers) == ("h (q|k|v) d", 2)
    assert kind.name == "layers.*.attention.query_key_value.weight"
    with pytest.raises(FormatError, match="no tensor to look at"):
        detect_checkpoint(tmp_path, "nothing.*")
