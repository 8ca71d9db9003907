"""`triptych families`, `triptych probe`, and records of one's own on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from triptych.cli import main

RECORD = """
[[family]]
types = ["my_decoder"]
source = "my_package==1.0:my_package/model.py:40-66"
checked = "2026-11-22"

[[family.tensor]]
fused = "layers.{L}.attn.qkv"
layout = "g (q r|k|v) d"
sizes = {h = "n_heads", g = "n_kv_heads or n_heads", d = "dim / n_heads"}
rope = "half"
"""


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    out, err = capsys.readouterr()
    return int(end.value.code), out, err


def test_families_lists_and_shows(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "families")
    assert code == 0 and len(out.splitlines()) > 150 and any(line.split()[0] == "gpt_neox" for line in out.splitlines())
    code, out, _ = run(capsys, "families", "gpt_neox")
    assert code == 0 and "h (q|k|v) d" in out and "modeling_gpt_neox.py" in out
    code, out, _ = run(capsys, "families", "codegen", "--json")
    assert code == 0 and json.loads(out)[0]["layout"] == "m (q|v|k) n d"
    code, _, err = run(capsys, "families", "gpt_neoxx")
    assert code == 3 and "gpt_neox" in err


def test_a_config_chooses_the_variant(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = {"model_type": "falcon", "new_decoder_architecture": True, "num_attention_heads": 30, "num_kv_heads": 6, "hidden_size": 210}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, out, _ = run(capsys, "families", "falcon", "--config", tmp_path / "config.json")
    assert code == 0 and out.count("    layout ") == 1 and "g (q r|k|v) d   with g=6 r=5 d=7" in out


def test_a_record_of_ones_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (tmp_path / "my.toml").write_text(RECORD)
    (model / "config.json").write_text(json.dumps({"model_type": "my_decoder", "n_heads": 6, "n_kv_heads": 2, "dim": 30}))
    weight = np.arange(50 * 7, dtype=np.float32).reshape(50, 7)
    save_file({"layers.0.attn.qkv.weight": weight}, model / "model.safetensors")
    code, _, err = run(capsys, "convert", model, tmp_path / "out", "--to", "split")
    assert code == 4 and "layout" in err and not (tmp_path / "out").exists()
    code, _, _ = run(capsys, "convert", model, tmp_path / "out", "--to", "(q h|k g|v g) d", "--records", tmp_path / "my.toml")
    assert code == 0
    code, out, _ = run(capsys, "inspect", model, "--records", tmp_path / "my.toml")
    assert code == 0 and "g (q r|k|v) d" in out and "my_package==1.0" in out
    code, _, _ = run(capsys, "verify", model, tmp_path / "out", "--records", tmp_path / "my.toml")
    assert code == 0
    from safetensors.numpy import load_file

    moved = load_file(tmp_path / "out" / "model.safetensors")["layers.0.attn.qkv.weight"]
    groups = weight.reshape(2, 5, 5, 7)
    by_hand = np.concatenate([groups[:, :3].reshape(30, 7), groups[:, 3].reshape(10, 7), groups[:, 4].reshape(10, 7)])
    assert np.array_equal(moved, by_hand)


def test_probe_reads_a_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt_neox", "num_attention_heads": 12, "hidden_size": 768}))
    code, out, _ = run(capsys, "probe", tmp_path, "--json")
    found = json.loads(out)
    assert code == 0 and {one["layout"] for one in found.values()} == {"h (q|k|v) d"}
    assert all(one["rotary"].startswith("partial half") for one in found.values())


@pytest.mark.parametrize(
    ("config", "code", "match"),
    [
        ({"model_type": "no_such_model"}, 3, "no model of transformers has this config"),
        ({}, 3, "no model of transformers has this config"),
        ({"model_type": "phi3", "num_attention_heads": "many"}, 3, "transformers refuses this config"),
        ({"model_type": "phi3", "num_attention_heads": -3}, 2, "no small model of this config runs"),
    ],
)
def test_probe_refuses(capsys: pytest.CaptureFixture[str], tmp_path: Path, config: dict[str, object], code: int, match: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    got, _, err = run(capsys, "probe", tmp_path)
    assert (got, match in err) == (code, True), err
