"""Two vendors' files of one model, of one shape and config: `diff` and `certify` ask the weights where the record does not settle it."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import triptych as tt
from triptych.agree import AGREES, CONTRADICTS, UNTOLD, Agreement
from triptych.errors import PlanError

PLAIN, BLOCKS = "(q h|k g|v g) d", "t (q n r|k n|v n) d"
SIZES = {"t": 2, "n": 2, "r": 3, "d": 8}
QKV = "model.layers.{}.self_attn.qkv_proj.weight"
CONFIG = {
    "model_type": "mimo-v2.5", "hidden_size": 20, "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 8, "v_head_dim": 8,
    "num_hidden_layers": 2, "hybrid_layer_pattern": [0, 0],
}  # fmt: skip


def vendor(folder: Path, layout: str) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    weights = {QKV.format(i): rng.normal(size=(160, 20)).astype(np.float32) for i in range(2)}
    save_file({name: tt.repack(w, PLAIN, layout, axis=0, **SIZES) for name, w in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture
def weights_say(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Name of the folder -> what its weights say of their layout, in place of the statistics of small random weights."""
    says: dict[str, str] = {}

    def agreements(path: str | Path, projections: Iterable[Any], tensors: Mapping[str, Any]) -> tuple[Agreement, ...]:
        names = tuple(one.name for one in projections)
        what = says.get(Path(path).name, UNTOLD)
        one = Agreement("qkv", names, BLOCKS, "t=2", "record", what, PLAIN if what == CONTRADICTS else None, 9.0, ("why",), (PLAIN,))
        return (one,) if names else ()

    for module in ("agree", "diff"):
        monkeypatch.setattr(importlib.import_module(f"triptych.{module}"), "agreements", agreements)
    return says


def test_diff_says_what_the_weights_say_and_believes_no_record_against_them(tmp_path: Path, weights_say: dict[str, str]) -> None:
    blocks, plain, twin = vendor(tmp_path / "a", BLOCKS), vendor(tmp_path / "b", PLAIN), vendor(tmp_path / "c", BLOCKS)
    weights_say |= {"a": AGREES, "b": CONTRADICTS, "c": AGREES}
    found = tt.diff(blocks, plain, t=2)
    assert found.notes[0].startswith("a: the weights of qkv agree with") and found.notes[1].startswith("b: the weights of qkv say (q h|k")
    assert "note: a: the weights" in str(found) and json.loads(json.dumps(found.to_dict()))["notes"] == list(found.notes)
    assert {one.kind for one in found.tensors} == {"order"} and "with their rows in another order" in found.summary
    assert tt.diff(blocks, twin, t=2).equal
    tt.convert(plain, tmp_path / "d", "(k g|q h|v g) d", layouts={"*qkv_proj.weight": PLAIN}, h=12, g=4, d=8)
    (note,) = tt.diff(tmp_path / "d", plain, t=2).notes
    assert note.startswith("b:"), "a stamp settles it"


def test_certificates_are_given_where_the_weights_bear_the_record_out(tmp_path: Path, weights_say: dict[str, str]) -> None:
    path, given = vendor(tmp_path / "a", BLOCKS), {"*qkv_proj.weight": BLOCKS}
    tt.convert(path, tmp_path / "b", "split", layouts=given, **SIZES)
    tt.verify(path, tmp_path / "b", layouts=given, **SIZES)
    for what, match in ((UNTOLD, "more than one order"), (CONTRADICTS, "the weights contradict the layout")):
        weights_say["a"] = what
        with pytest.raises(PlanError, match=match):
            tt.certify(path, tmp_path / "b", t=2)
    weights_say["a"] = AGREES
    tt.certify(path, tmp_path / "b", t=2).write(tmp_path / "c.json")
    tt.check_certificate(tmp_path / "c.json", tmp_path / "b", path)
    weights_say["a"] = UNTOLD
    tt.certify(path, tmp_path / "b", layouts=given, **SIZES)
