"""What a conversion can be asked for beside a layout: rotary order, orientation, other targets for some tensors, the size of files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

import triptych as tt
from triptych import mover
from triptych.layout import Layout
from triptych.rope import named, rope_of

H, G, D, W = 6, 3, 10, 14


def folder(path: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    return path


def load(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in safetensors.torch.load_file(file).items()}


def qwen3(seed: int = 0) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Separate q, k, v with norms of q and k over the dims of a head."""
    config = {
        "model_type": "qwen3",
        "num_attention_heads": H,
        "num_key_value_heads": G,
        "head_dim": D,
        "hidden_size": W,
        "attention_bias": True,
    }
    torch.manual_seed(seed)
    home = "model.layers.{}.self_attn."
    shapes = {"q_proj": (H * D, W), "k_proj": (G * D, W), "v_proj": (G * D, W), "o_proj": (W, H * D)}
    tensors = {}
    for i in range(2):
        for name, shape in shapes.items():
            tensors[home.format(i) + name + ".weight"] = torch.randn(shape, dtype=torch.bfloat16)
            if name != "o_proj":
                tensors[home.format(i) + name + ".bias"] = torch.randn(shape[0], dtype=torch.bfloat16)
        for name in ("q_norm", "k_norm"):
            tensors[home.format(i) + name + ".weight"] = torch.randn(D, dtype=torch.bfloat16)
    return config, tensors


def neighbours(rows: torch.Tensor, turned: int, dims: int = D) -> torch.Tensor:
    """Rows of heads half-split -> the same heads with pairs side by side, in the first `turned` dims."""
    heads = rows.view(-1, dims, *rows.shape[1:])
    first = heads[:, :turned]
    pairs = torch.stack([first[:, : turned // 2], first[:, turned // 2 :]], 2).flatten(1, 2)
    return torch.cat([pairs, heads[:, turned:]], 1).reshape(rows.shape)


def test_rotary_order_of_separate_projections_with_biases_and_norms(tmp_path: Path) -> None:
    config, tensors = qwen3()
    source = folder(tmp_path / "a", config, tensors)
    tt.convert(source, tmp_path / "b", rope="interleaved")
    found = load(tmp_path / "b")
    for name, tensor in tensors.items():
        turned = "q_" in name or "k_" in name
        assert torch.equal(found[name], neighbours(tensor, D) if turned else tensor), name
    layouts = {piece.tensor: str(piece.layout) for one in tt.inspect(tmp_path / "b").projections for piece in one.pieces}
    assert (
        layouts["model.layers.1.self_attn.q_proj.weight"] == "(q h p c)" and layouts["model.layers.0.self_attn.k_norm.weight"] == "(k p c)"
    )
    tt.convert(tmp_path / "b", tmp_path / "c", rope="half")
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load(tmp_path / "c").items())


def test_rotary_order_and_layout_at_once(tmp_path: Path) -> None:
    config, tensors = qwen3()
    source = folder(tmp_path / "a", config, tensors)
    tt.convert(source, tmp_path / "b", "fused:g (q r|k|v) d", rope="interleaved")
    found, at = load(tmp_path / "b"), "model.layers.0.self_attn."
    q, k = (neighbours(tensors[f"{at}{part}_proj.weight"], D) for part in "qk")
    v = tensors[f"{at}v_proj.weight"]
    groups = [x.view(G, -1, D, W) for x in (q, k, v)]
    assert torch.equal(found[f"{at}qkv_proj.weight"], torch.cat(groups, 1).flatten(0, 2))


def test_scores_agree_when_the_code_turns_the_other_pairs(tmp_path: Path) -> None:
    """q and k of the converted weights, turned pair by neighbouring pair, score as the old ones turned half by half."""
    config, tensors = qwen3()
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    tt.convert(folder(tmp_path / "a", config, tensors), tmp_path / "b", rope="interleaved")
    x, at = torch.randn(5, W, dtype=torch.double), "model.layers.0.self_attn."
    angles = torch.arange(5.0)[:, None] * 10_000 ** (-torch.arange(D // 2) / (D // 2))
    turn = torch.polar(torch.ones_like(angles, dtype=torch.double), angles.double())[:, None]

    def scores(weights: dict[str, torch.Tensor], interleaved: bool) -> torch.Tensor:
        out = []
        for part in "qk":
            y = (x @ weights[f"{at}{part}_proj.weight"].T + weights[f"{at}{part}_proj.bias"]).view(5, -1, D)
            y = torch.nn.functional.rms_norm(y, (D,), weights[f"{at}{part}_norm.weight"])
            pairs = y.view(5, -1, D // 2, 2) if interleaved else y.view(5, -1, 2, D // 2).transpose(2, 3)
            out.append(torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn).flatten(2))
        q, k = out
        return torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(H // G, 1))

    torch.testing.assert_close(scores(load(tmp_path / "b"), True), scores(tensors, False), rtol=1e-12, atol=1e-12)


def test_partial_rotary_of_a_fused_projection(tmp_path: Path) -> None:
    config = {"model_type": "gpt_neox", "num_attention_heads": H, "hidden_size": H * D, "rotary_pct": 0.4}
    tensors = {
        f"gpt_neox.layers.0.attention.query_key_value.{kind}": torch.randn(3 * H * D, *more)
        for kind, more in (("weight", (H * D,)), ("bias", ()))
    }
    tt.convert(folder(tmp_path / "a", config, tensors), tmp_path / "b", rope="interleaved")
    for name, tensor in load(tmp_path / "b").items():
        old = tensors[name].view(H, 3, D, -1)
        expected = old.clone()
        for part in (0, 1):
            expected[:, part] = neighbours(old[:, part].reshape(H * D, -1), 4).view(H, D, -1)
        assert torch.equal(tensor, expected.view(tensor.shape)) and not torch.equal(tensor, tensors[name])


def test_the_rule_of_the_llama_converter() -> None:
    """transformers/models/llama/convert_llama_weights_to_hf.py, permute: view(h, d / 2, 2, in).transpose(1, 2)."""
    weight = torch.randn(H * D, W)
    expected = weight.view(H, D // 2, 2, W).transpose(1, 2).reshape(H * D, W)
    assert torch.equal(tt.repack(weight, "(q h p c)", "(q h c p)", axis=0, h=H, d=D), expected)


@pytest.mark.parametrize(
    ("layout", "rope", "before", "after"),
    [
        ("h (q|k|v) d", "half", "h (q c p|k c p|v d)", "h (q p c|k p c|v d)"),
        ("(q|k|v) d h", "interleaved", "q p c h|k p c h|v d h", "q p c h|k p c h|v d h"),
        ("g (q r|k|v) d", "partial half: last 4 of 10 dims", "g (q r (pass dn|rot c p)|k (pass dn|rot c p)|v dv)",
         "g (q r (pass dn|rot p c)|k (pass dn|rot p c)|v dv)"),
        ("latent dl|rope dr", "interleaved", "latent dl|rope p c", "latent dl|rope p c"),
        ("h (nope d|rope dr|gate d)", "half", "h (nope dv|rope c p|gate dv)", "h (nope dv|rope p c|gate dv)"),
        ("h (q c p|k c p|v d)", "half", "h (q c p|k c p|v d)", "h (q p c|k p c|v d)"),
        ("(gate|up) f", "half", "(gate|up) f", "(gate|up) f"),
    ],
)  # fmt: skip
def test_pairs_named(layout: str, rope: str, before: str, after: str) -> None:
    told = rope_of(rope)
    assert told and (str(named(Layout(layout), told)), str(named(Layout(layout), told, "interleaved"))) == (
        str(Layout(before)),
        str(Layout(after)),
    )


def test_rotary_order_that_cannot_change(tmp_path: Path) -> None:
    config = {"model_type": "gpt_neox", "num_attention_heads": H, "hidden_size": H * D}
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    source = folder(tmp_path / "a", config, {name: torch.randn(3 * H * D, H * D)})
    with pytest.raises(tt.PlanError, match="share the dims"):
        tt.plan(source, rope="interleaved", layouts={name: "h d (q|k|v)"})
    with pytest.raises(tt.PlanError, match="nothing to convert"):
        tt.plan(source, rope="half")
    with pytest.raises(tt.PlanError, match="no such rotary order"):
        tt.plan(source, rope="other")
    with pytest.raises(tt.PlanError, match="nothing is asked for"):
        tt.plan(source)
    config, tensors = qwen3()
    odd = folder(tmp_path / "b", config, {**tensors, "model.layers.0.self_attn.q_norm.weight": torch.randn(D + 1)})
    with pytest.raises(tt.PlanError, match="a norm of q or k has a size of its own"):
        tt.plan(odd, rope="interleaved")


# Orientation


@pytest.mark.parametrize("window", [1 << 20, 3000])
def test_conv1d_weights_as_linear_and_back(tmp_path: Path, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mover, "WINDOW", window)
    mover.tiling.cache_clear()
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_head=3, n_embd=42, n_layer=2, n_inner=50, vocab_size=20, n_positions=8))
    model.save_pretrained(tmp_path / "a")
    old = load(tmp_path / "a")
    tt.convert(tmp_path / "a", tmp_path / "b", "h (q|k|v) d", orientation="linear")
    for name, tensor in load(tmp_path / "b").items():
        if name.endswith("c_attn.weight"):
            expected = old[name].T.reshape(3, 3, 14, 42).transpose(0, 1).reshape(126, 42)
        elif name.endswith("c_attn.bias"):
            expected = old[name].view(3, 3, 14).transpose(0, 1).reshape(-1)
        else:
            expected = old[name].T if name.endswith(("c_proj.weight", "c_fc.weight")) else old[name]
        assert torch.equal(tensor, expected), name
    assert {one.axis for one in tt.inspect(tmp_path / "b").projections} == {0}
    tt.convert(tmp_path / "b", tmp_path / "c", "(q|k|v) h d", orientation="conv1d")
    assert all(torch.equal(tensor, old[name]) for name, tensor in load(tmp_path / "c").items())
    mover.tiling.cache_clear()


# Other targets for some, and files


def test_other_targets_for_some(tmp_path: Path) -> None:
    config = {"model_type": "gpt_neox", "num_attention_heads": H, "hidden_size": H * D}
    name = "gpt_neox.layers.{}.attention.query_key_value.weight"
    tensors = {name.format(i): torch.randn(3 * H * D, H * D) for i in range(3)}
    source = folder(tmp_path / "a", config, tensors)
    tt.convert(source, tmp_path / "b", "(q|k|v) h d", overrides={"*.1.*": "split", "*.2.*": "keep"})
    found = load(tmp_path / "b")
    q, k, v = tensors[name.format(1)].view(H, 3, D, -1).transpose(0, 1).reshape(3, H * D, -1)
    assert torch.equal(found[name.format(0)], tensors[name.format(0)].view(H, 3, D, -1).transpose(0, 1).reshape(3 * H * D, -1))
    assert torch.equal(found[name.format(2)], tensors[name.format(2)])
    home = "gpt_neox.layers.1.attention."
    assert all(torch.equal(found[f"{home}{part}.weight"], rows) for part, rows in zip(("query", "key", "value"), (q, k, v), strict=True))
    with pytest.raises(tt.PlanError, match="no projection has a name like this"):
        tt.plan(source, "split", overrides={"*.7.*": "keep"})


def test_shards_of_a_size(tmp_path: Path) -> None:
    config, tensors = qwen3()
    source = folder(tmp_path / "a", config, tensors)
    tt.convert(source, tmp_path / "b", "fused", max_shard_size=4000)
    files = sorted(path.name for path in (tmp_path / "b").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    for file in files:
        held = safetensors.torch.load_file(tmp_path / "b" / file)
        assert {name for name, where in index["weight_map"].items() if where == file} == set(held)
        assert sum(tensor.nbytes for tensor in held.values()) <= 4000 or len(held) == 1
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    tt.convert(tmp_path / "b", tmp_path / "c", "split", max_shard_size="1GB")
    assert not (tmp_path / "c" / "model.safetensors.index.json").exists()
    back = load(tmp_path / "c")
    assert set(back) == set(tensors) and all(torch.equal(tensor, tensors[name]) for name, tensor in back.items())
    for wrong in ("5 apples", "0", "-1MB"):
        with pytest.raises(tt.PlanError, match="a number and a unit"):
            tt.plan(source, "fused", max_shard_size=wrong)
