"""config.json follows the rows where a key of it says their order: the family's code then computes the same from the converted files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import triptych as tt

SIZES = {
    "hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3, "qk_rope_head_dim": 8, "qk_nope_head_dim": 10, "v_head_dim": 14,
    "kv_lora_rank": 20, "q_lora_rank": 28, "vocab_size": 31, "intermediate_size": 40, "moe_intermediate_size": 24, "num_hidden_layers": 2,
    "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
    "max_position_embeddings": 64,
}  # fmt: skip
TYPES = ["deepseek_v3", "axk1", "glm4_moe_lite", "mistral4", "youtu"]
TOKENS = torch.tensor([[3, 17, 8, 30, 1, 12, 5]])


def saved(folder: Path, kind: str, **changed: object) -> dict[str, Any]:
    torch.manual_seed(5)
    config = transformers.CONFIG_MAPPING[kind](**{**SIZES, **changed})
    transformers.AutoModel.from_config(config).double().save_pretrained(folder)
    return config_of(folder)


def config_of(folder: Path) -> dict[str, Any]:
    table: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return table


def output(folder: Path) -> torch.Tensor:
    model = transformers.AutoModel.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS).last_hidden_state
    return found


@pytest.mark.parametrize(("kind", "lora"), [*((kind, 28) for kind in TYPES), ("deepseek_v3", None)])
def test_the_code_of_the_family_reads_the_other_rotary_order(kind: str, lora: int | None, tmp_path: Path) -> None:
    before = saved(tmp_path / "in", kind, q_lora_rank=lora)
    assert before["rope_interleave"] is True
    made = tt.convert(tmp_path / "in", tmp_path / "half", rope="half")
    assert config_of(tmp_path / "half") == {**before, "rope_interleave": False}
    assert list(config_of(tmp_path / "half")) == list(before)
    assert any("rope_interleave = false" in note for note in made.plan.notes)
    mine = output(tmp_path / "in")
    torch.testing.assert_close(output(tmp_path / "half"), mine, rtol=1e-12, atol=1e-12)

    (tmp_path / "half" / "config.json").write_text(json.dumps(before))  # the test can fail: rows and config of two orders
    assert (output(tmp_path / "half") - mine).abs().max() > 1e-6
    assert any("rotary interleaved" in note for note in tt.inspect(tmp_path / "half").notes)

    tt.convert(tmp_path / "half", tmp_path / "back", rope="interleaved")
    first, last = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "back"))
    assert config_of(tmp_path / "back") == before
    assert first.keys() == last.keys() and all(torch.equal(first[name], last[name]) for name in first)
    assert tt.inspect(tmp_path / "back").notes == ()


QKV = ["layers.0.qkv.weight", "layers.1.qkv.weight"]
ENGINE = {
    "model_type": "transformer-engine",
    "num_attention_heads": 6,
    "num_gqa_groups": 2,
    "kv_channels": 5,
    "qkv_weight_interleaved": True,
}


def crafted(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir()
    save_file({name: torch.randn(50, 7) for name in QKV}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_layout_that_a_switch_names(tmp_path: Path) -> None:
    made = tt.convert(crafted(tmp_path / "in", ENGINE), tmp_path / "out", "(q h|k g|v g) d")
    assert config_of(tmp_path / "out") == {**ENGINE, "qkv_weight_interleaved": False}
    assert [name for name, _ in made.plan.texts] == ["config.json"] and not made.plan.copies
    assert tt.verify(tmp_path / "in", tmp_path / "out").notes == ("not the same in the output: config.json",)
    assert tt.inspect(tmp_path / "out").notes == ()


def test_a_config_stays_when_no_switch_tells_all_rows(tmp_path: Path) -> None:
    source = crafted(tmp_path / "in", ENGINE)
    some = tt.convert(source, tmp_path / "some", "(q h|k g|v g) d", overrides={"*layers.0.*": "keep"})
    other = tt.convert(source, tmp_path / "other", "(v g|k g|q h) d")
    for made in (some, other):
        assert config_of(Path(str(made.plan.out))) == ENGINE and not made.plan.texts
        assert any("does not read the result" in note for note in made.plan.notes)


def test_a_switch_of_an_inner_config_and_of_one_that_is_left_out(tmp_path: Path) -> None:
    inner = {key: value for key, value in ENGINE.items() if key != "qkv_weight_interleaved"}
    tt.convert(crafted(tmp_path / "in", {"model_type": "another", "decoder_config": inner}), tmp_path / "out", "(q h|k g|v g) d")
    assert config_of(tmp_path / "out") == {"model_type": "another", "decoder_config": {**inner, "qkv_weight_interleaved": False}}


def test_one_file_has_no_config_to_change(tmp_path: Path) -> None:
    source = crafted(tmp_path / "in", ENGINE)
    made = tt.convert(source / "model.safetensors", tmp_path / "out.safetensors", "(q h|k g|v g) d")
    assert any("with qkv_weight_interleaved = false in config.json" in note for note in made.plan.notes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out.safetensors"]


def test_the_config_of_shares_comes_with_the_finish(tmp_path: Path) -> None:
    source = crafted(tmp_path / "in", ENGINE)
    asked: dict[str, Any] = {"to": "(q h|k g|v g) d"}
    tt.convert(source, tmp_path / "out", **asked, share=(1, 1))
    assert not (tmp_path / "out" / "config.json").exists()
    tt.convert(source, tmp_path / "out", **asked, finish=True)
    assert config_of(tmp_path / "out")["qkv_weight_interleaved"] is False
