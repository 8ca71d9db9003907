"""`--to split`, then `--to fused`: the family's own order again, byte for byte, so that its own code reads the result rightly."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import triptych as tt
from triptych.stamp import KEY

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


def restamped(folder: Path, **changed: object) -> None:
    """Write other values into every entry of a stamp."""
    path = folder / "model.safetensors"
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    stamp = json.loads(metadata[KEY])
    for told in stamp["layouts"].values():
        told.update(changed)
    save_file(load_file(path), path, {**metadata, KEY: json.dumps(stamp)})


def apart(tmp_path: Path, family: str) -> Path:
    config, name, shape = FAMILIES[family]
    (tmp_path / "in").mkdir()
    save_file({name: np.zeros(shape, np.float32)}, tmp_path / "in" / "model.safetensors")
    (tmp_path / "in" / "config.json").write_text(json.dumps({"model_type": family, **config}))
    tt.convert(tmp_path / "in", tmp_path / "apart", "split")
    return tmp_path / "apart"


def test_a_stamp_of_parts_that_names_no_axis_of_theirs(tmp_path: Path) -> None:
    folder = apart(tmp_path, "gpt_neox")
    restamped(folder, axis=5)
    with pytest.raises(tt.FormatError, match="no such axis"):
        tt.inspect(folder)


def test_the_stamp_outlasts_a_config_with_other_heads(tmp_path: Path) -> None:
    folder = apart(tmp_path, "falcon")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_attention_heads": 4, "num_kv_heads": 1}))
    (found,) = tt.inspect(folder).projections
    assert dict(found.sizes) == {"h": 6, "g": 2, "r": 3, "d": 8}
