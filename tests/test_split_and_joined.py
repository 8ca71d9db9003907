"""`--to split`, then `--to fused`: the family's own order again, byte for byte, so that its own code reads the result rightly."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import triptych as tt

FAMILIES = {
    "gpt_neox": ({"num_attention_heads": 3, "hidden_size": 48}, "gpt_neox.layers.0.attention.query_key_value.weight", (144, 48)),
    "falcon": (
        {"num_attention_heads": 6, "num_kv_heads": 2, "hidden_size": 48, "new_decoder_architecture": True},
        "transformer.h.0.self_attention.query_key_value.weight",
        (80, 48),
    ),
    "gpt2": ({"n_head": 3, "n_embd": 48}, "transformer.h.0.attn.c_attn.weight", (48, 144)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_that_were_split_are_joined_as_the_family_has_them(family: str, tmp_path: Path) -> None:
    config, name, shape = FAMILIES[family]
    (tmp_path / "in").mkdir()
    save_file({name: np.random.default_rng(0).standard_normal(shape).astype(np.float32)}, tmp_path / "in" / "model.safetensors")
    (tmp_path / "in" / "config.json").write_text(json.dumps({"model_type": family, "num_hidden_layers": 1, **config}))
    tt.convert(tmp_path / "in", tmp_path / "apart", "split")
    tt.convert(tmp_path / "apart", tmp_path / "out", "fused")
    before, after = (load_file(tmp_path / place / "model.safetensors") for place in ("in", "out"))
    assert before.keys() == after.keys() and np.array_equal(before[name], after[name])
    tt.verify(tmp_path / "in", tmp_path / "out")
