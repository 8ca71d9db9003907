"""Torch and GGUF checkpoints through the whole path: inspect, plan, convert, verify."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch
from gguf import quants

import triptych as tt

H, D, W = 3, 10, 8


def neox(folder: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    """A folder with a config and the tensors that go with it, not yet written."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt_neox", "num_attention_heads": H, "hidden_size": H * D}))
    torch.manual_seed(seed)
    names = {
        f"gpt_neox.layers.{i}.attention.query_key_value.{kind}": (3 * H * D, *more)
        for i in range(2)
        for kind, more in (("weight", (H * D,)), ("bias", ()))
    }
    return {name: torch.randn(shape) for name, shape in names.items()} | {"gpt_neox.embed_in.weight": torch.randn(5, H * D)}


def turned(tensor: torch.Tensor) -> torch.Tensor:
    """Rows `h (q|k|v) d` as `(q|k|v) h d`, by view and transpose."""
    return tensor.view(H, 3, D, -1).transpose(0, 1).reshape(tensor.shape)


def check(out: Path, tensors: dict[str, torch.Tensor]) -> None:
    found = {name: tensor for file in out.glob("*.safetensors") for name, tensor in safetensors.torch.load_file(file).items()}
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(found[name], turned(tensor) if "query_key_value" in name else tensor)


def test_one_torch_file(tmp_path: Path) -> None:
    tensors = neox(tmp_path / "a")
    tensors["embed_out.weight"] = tensors["gpt_neox.embed_in.weight"]
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "a" / "pytorch_model.bin")
    plan = tt.plan(tmp_path / "a", "(q|k|v) h d")
    assert [file.name for file in plan.files] == ["model.safetensors"]
    assert [note.partition(": ")[2] for note in plan.notes[:3]] == [
        "its tensors are those under 'state_dict'", "left out: epoch (an int)",
        "gpt_neox.embed_in.weight and embed_out.weight share their bytes and are written each"]  # fmt: skip
    tt.convert(tmp_path / "a", tmp_path / "b", "(q|k|v) h d")
    assert tt.verify(tmp_path / "a", tmp_path / "b").projections == 4
    check(tmp_path / "b", tensors)
    tt.convert(
        tmp_path / "a" / "pytorch_model.bin", tmp_path / "b.safetensors", "(q|k|v) h d", layouts={"*query_key_value*": "h (q|k|v) d"}, h=H
    )
    assert torch.equal(safetensors.torch.load_file(tmp_path / "b.safetensors")["embed_out.weight"], tensors["embed_out.weight"])


def test_torch_shards_with_an_index(tmp_path: Path) -> None:
    tensors = neox(tmp_path / "a")
    names, weight_map = list(tensors), {}
    for i, part in enumerate((names[:3], names[3:])):
        file = f"pytorch_model-{i + 1:05}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, tmp_path / "a" / file)
        weight_map |= dict.fromkeys(part, file)
    (tmp_path / "a" / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    tt.convert(tmp_path / "a", tmp_path / "b", "(q|k|v) h d")
    check(tmp_path / "b", tensors)
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {
        name: file.replace("pytorch_model", "model").replace(".bin", ".safetensors") for name, file in weight_map.items()
    }
    assert tt.verify(tmp_path / "a", tmp_path / "b").tensors == 1


def test_safetensors_is_read_where_both_are(tmp_path: Path) -> None:
    tensors = neox(tmp_path / "a")
    torch.save({"x": torch.zeros(1)}, tmp_path / "a" / "pytorch_model.bin")
    safetensors.torch.save_file(tensors, tmp_path / "a" / "model.safetensors")
    plan = tt.plan(tmp_path / "a", "(q|k|v) h d")
    assert any(note.startswith("pytorch_model.bin is carried over") for note in plan.notes)


def test_a_torch_file_that_is_refused(tmp_path: Path) -> None:
    tensors = neox(tmp_path / "a")
    name = next(iter(tensors))
    torch.save({**tensors, name: tensors[name].t()}, tmp_path / "a" / "pytorch_model.bin")
    with pytest.raises(tt.PlanError, match="do not lie side by side"):
        tt.plan(tmp_path / "a", "(q|k|v) h d")


def test_gguf_keeps_its_head_and_its_types(tmp_path: Path) -> None:
    out = gguf.GGUFWriter(tmp_path / "a.gguf", "gptneox")
    out.add_custom_alignment(64)
    out.add_array("words", ["a", "b"])
    rng, kind = np.random.default_rng(0), gguf.GGMLQuantizationType.Q4_1
    for i in range(2):
        for name, shape in ((f"blk.{i}.attn_qkv.weight", (3 * H * D, 96)), (f"blk.{i}.other.weight", (7, 32))):
            out.add_tensor(name, quants.quantize(rng.normal(size=shape).astype(np.float32), kind), raw_dtype=kind)
        out.add_tensor(f"blk.{i}.attn_qkv.bias", np.arange(3 * H * D, dtype=np.float32))
    for write in (out.write_header_to_file, out.write_kv_data_to_file, out.write_tensors_to_file, out.close):
        write()
    tt.convert(tmp_path / "a.gguf", tmp_path / "b.gguf", "(q|k|v) h d", layouts={"*qkv*": "h (q|k|v) d"}, h=H)
    before, after = (gguf.GGUFReader(tmp_path / name) for name in ("a.gguf", "b.gguf"))
    for old, new in zip(before.tensors, after.tensors, strict=True):
        values = quants.dequantize(old.data, old.tensor_type)
        if "qkv" in old.name:
            values = values.reshape(H, 3, D, -1).swapaxes(0, 1).reshape(values.shape)
        assert (new.name, new.data_offset) == (old.name, old.data_offset)
        assert np.array_equal(quants.dequantize(new.data, new.tensor_type), values)
    tt.convert(tmp_path / "b.gguf", tmp_path / "c.gguf", "h (q|k|v) d", layouts={"*qkv*": "(q|k|v) h d"}, h=H)
    assert (tmp_path / "c.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()
    with pytest.raises(tt.PlanError, match="keeps its tensors"):
        tt.plan(tmp_path / "a.gguf", "split", layouts={"*qkv*": "h (q|k|v) d"}, h=H)
    with pytest.raises(tt.PlanError, match=r"ends in \.gguf"):
        tt.plan(tmp_path / "a.gguf", "(q|k|v) h d", tmp_path / "b.safetensors", layouts={"*qkv*": "h (q|k|v) d"}, h=H)
