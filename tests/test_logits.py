"""`verify --logits`: the first layer and projection that differ, in ulps; what cannot be run is said; and never a bare pass."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig

import triptych as tt
from triptych.cli import main
from triptych.errors import MissingExtraError
from triptych.live.logits import Logits, _apart, logits

QKV = "gpt_neox.layers.1.attention.query_key_value.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-NeoX of three layers and three heads of eight."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        hidden_size=24, num_attention_heads=3, num_hidden_layers=3, intermediate_size=40, vocab_size=50, max_position_embeddings=16
    )
    path = tmp_path_factory.mktemp("neox") / "a"
    GPTNeoXForCausalLM(config).save_pretrained(path)
    return path


def changed(model: Path, out: Path, change: object) -> Path:
    shutil.copytree(model, out)
    tensors = load_file(out / "model.safetensors")
    tensors[QKV] = change(tensors[QKV])
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def test_equal_is_said_with_what_was_compared(model: Path, tmp_path: Path) -> None:
    tt.convert(model, tmp_path / "half", "(q|k|v) h d")
    tt.convert(tmp_path / "half", tmp_path / "b", "h (q|k|v) d")
    found = logits(model, tmp_path / "b")
    assert found.equal and found.modules > 30 and found.last is not None and found.last.ulps == 0
    assert "outputs of" in str(found) and "up to 0 ulps of float32, relative L2 0.00e+00" in str(found)


def test_the_first_projection_that_differs(model: Path, tmp_path: Path) -> None:
    """K and V swapped in one layer, one bit in another copy: the fused projection of layer 1 is named, not what follows from it."""
    swapped = changed(model, tmp_path / "b", lambda w: tt.repack(w, "h (q|v|k) d", "h (q|k|v) d", axis=0, h=3))
    found = logits(model, swapped)
    assert not found.equal and found.first is not None and found.first.module == QKV.removesuffix(".weight")
    assert found.first.ulps > 1000 and 0.1 < found.first.relative < 3 and found.last is not None and found.last.relative > 1e-4
    assert "first    gpt_neox.layers.1.attention.query_key_value   up to" in str(found) and "output   " in str(found)

    def bit(weight: torch.Tensor) -> torch.Tensor:
        weight[4, 5] *= 1 + 2**-20
        return weight

    found = logits(model, changed(model, tmp_path / "c", bit))
    assert found.first is not None and found.first.module == QKV.removesuffix(".weight") and found.first.relative < 1e-5
    json.dumps(found.to_dict())


def test_what_cannot_be_run_is_said(model: Path, tmp_path: Path) -> None:
    tt.convert(model, tmp_path / "b", "(q|k|v) h d")
    found = logits(model, tmp_path / "b")
    assert not found.equal and "reads h (q|k|v) d" in found.cannot and "is laid out as (q|k|v) h d (stamp)" in str(found)
    tt.convert(model, tmp_path / "s", "split")
    assert "is no name of" in logits(model, tmp_path / "s").cannot
    shutil.copytree(model, tmp_path / "m")
    tensors = load_file(model / "model.safetensors")
    del tensors[QKV]
    save_file(tensors, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    assert f"transformers does not find {QKV}" in logits(tmp_path / "m", model).cannot
    assert "no folder" in logits(model / "model.safetensors", model).cannot
    shutil.copytree(model, tmp_path / "n")
    (tmp_path / "n" / "config.json").write_text('{"model_type": "nobody"}')
    assert "cannot be run as a model" in str(logits(model, tmp_path / "n"))


def test_ulps() -> None:
    x = torch.tensor([1.0, 3.0, -0.5, 0.0])
    assert _apart("x", x, x).ulps == 0
    for dtype, bits in ((torch.float32, 24), (torch.bfloat16, 8), (torch.float16, 11)):
        y = x.to(dtype)
        z = y.clone()
        z[1] += 2.0 ** (2 - bits)
        assert _apart("x", y, z).ulps == 1 and _apart("x", x, z).dtype == str(dtype).removeprefix("torch.")


def test_the_command(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main([*map(str, arguments)])
        told = capsys.readouterr()
        return int(left.value.code or 0), told.out, told.err

    swapped = changed(model, tmp_path / "b", lambda w: tt.repack(w, "h (q|v|k) d", "h (q|k|v) d", axis=0, h=3))
    code, told, error = run("verify", model, swapped, "--logits")
    assert code == 1 and "first    gpt_neox.layers.1.attention.query_key_value" in told and "part k, head 0, dim 0" in error
    code, told, _ = run("verify", model, model, "--logits")
    assert code == 0 and "equal to" in told and "up to 0 ulps" in told
    code, told, _ = run("verify", model, model, "--logits", "--json")
    assert code == 0 and json.loads(told)["logits"]["equal"] is True


def test_without_transformers(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match="transformers is not installed"):
        logits(model, model)


def test_figures_are_always_there() -> None:
    assert str(Logits("a", "b", "no config")).startswith("logits: not compared: no config")


# Other families: one model class of each way to store q, k and v

SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 40, "vocab_size": 60, "max_position_embeddings": 64}
GQA = {**SIZES, "num_attention_heads": 6, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any], str, str]] = {  # class, config, the module of layer 1 that is damaged, the target on the way
    "llama": ("LlamaForCausalLM", GQA, "model.layers.1.self_attn.k_proj", "fused"),
    "qwen2": ("Qwen2ForCausalLM", GQA, "model.layers.1.self_attn.v_proj", "fused"),
    "phi3": ("Phi3ForCausalLM", GQA, "model.layers.1.self_attn.qkv_proj", "split"),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 48, "n_head": 6, "n_layer": 2, "vocab_size": 60}, "transformer.h.1.attn.c_attn", "split"),
    "gptj": ("GPTJForCausalLM", {"n_embd": 48, "n_head": 6, "n_layer": 2, "vocab_size": 60, "rotary_dim": 4},
             "transformer.h.1.attn.q_proj", "fused"),
    "falcon": ("FalconForCausalLM", {"hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 2, "vocab_size": 60},
               "transformer.h.1.self_attention.query_key_value", "split"),
    "falcon 40b": ("FalconForCausalLM", {"hidden_size": 48, "num_attention_heads": 6, "num_kv_heads": 2, "num_hidden_layers": 2,
                                         "vocab_size": 60, "new_decoder_architecture": True},
                   "transformer.h.1.self_attention.query_key_value", "split"),
    "bloom": ("BloomForCausalLM", {"hidden_size": 48, "n_head": 6, "n_layer": 2, "vocab_size": 60},
              "transformer.h.1.self_attention.query_key_value", "split"),
    "bert": ("BertModel", {**SIZES, "num_attention_heads": 6}, "encoder.layer.1.attention.self.key", "fused"),
}  # fmt: skip


def made(name: str, folder: Path) -> Path:
    kind, sizes, *_ = FAMILIES[name]
    torch.manual_seed(1)
    model = getattr(transformers, kind)
    model(model.config_class(**sizes)).save_pretrained(folder)
    return folder


def damaged(path: Path, out: Path, tensor: str, rows: tuple[int, int] = (2, 11)) -> Path:
    """Two rows of one weight exchanged."""
    shutil.copytree(path, out)
    file = out / "model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    weight = tensors[tensor].clone()
    turned = weight.T if tensor.endswith("c_attn.weight") else weight
    turned[list(rows)] = turned[list(rows[::-1])].clone()
    save_file({**tensors, tensor: weight}, file, metadata)
    return out


@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back_in_every_family(tmp_path: Path, name: str) -> None:
    """Fused tensors made separate and joined again, or the other way round; then two rows of layer 1 exchanged."""
    *_, module, to = FAMILIES[name]
    path = made(name, tmp_path / "a")
    tt.convert(path, tmp_path / "s", to)
    assert "is no name of" in logits(path, tmp_path / "s").cannot
    fused = next(one for one in tt.inspect(tmp_path / ("s" if to == "fused" else "a")).projections if one.kind == "attention")
    tt.convert(tmp_path / "s", tmp_path / "b", "split" if to == "fused" else f"fused:{fused.layout}")
    good = logits(path, tmp_path / "b")
    assert good.equal and good.modules > 20, str(good)
    wrong = damaged(tmp_path / "b", tmp_path / "w", f"{module}.weight")
    found = logits(path, wrong)
    assert found.first is not None and found.first.module == module and found.first.ulps > 100 and not found.equal
    with pytest.raises(tt.MismatchError):
        tt.verify(path, wrong)


def test_a_fused_model_and_its_separate_twin_under_another_class(tmp_path: Path) -> None:
    """Phi-3 as Llama: q, k and v of the fused output are compared with the outputs of three modules, part by part."""
    path = made("phi3", tmp_path / "a")
    tt.convert(path, tmp_path / "b", "split")
    file = tmp_path / "b" / "model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    for name in [name for name in tensors if "gate_up" in name]:
        gate, up = tensors.pop(name).chunk(2)
        tensors |= {name.replace("gate_up", "gate"): gate.clone(), name.replace("gate_up", "up"): up.clone()}
    save_file(tensors, file, metadata)
    LlamaConfig(**GQA, architectures=["LlamaForCausalLM"], rms_norm_eps=1e-5).save_pretrained(tmp_path / "b")
    good = logits(path, tmp_path / "b")
    assert good.beyond is None and good.modules > 20 and (good.first is None or "than rounding brings them" in str(good)), str(good)
    wrong = damaged(tmp_path / "b", tmp_path / "w", "model.layers.1.self_attn.k_proj.weight")
    found = logits(path, wrong)
    assert found.beyond is not None and found.beyond.relative > 0.1 and "beyond   model" in str(found)
    assert found.beyond.module == "model.layers.1.self_attn.qkv_proj and model.layers.1.self_attn.k_proj, part k"
    found = logits(wrong, path)
    assert found.beyond is not None
    assert found.beyond.module == "model.layers.1.self_attn.k_proj and model.layers.1.self_attn.qkv_proj, part k"
