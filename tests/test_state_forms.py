"""State dicts of all forms into models of all forms: bit for bit, strict loading intact, through files as well."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import triptych as tt
from triptych.errors import IncompatibleError, LayoutError, PlanError, SizeError
from triptych.live.state import marked, unmarked

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
transformers.logging.set_verbosity_error()

WORDS = {"vocab_size": 53, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_hidden_layers": 2, "max_position_embeddings": 31}
# model type, config, projections, the layout of its code, its sizes, another layout
MODELS: dict[str, tuple[dict[str, Any], str, str, dict[str, int], str]] = {
    "gpt2": (
        {"n_embd": 35, "n_head": 5, "n_layer": 2, "vocab_size": 53},
        "h.{}.attn.c_attn",
        "(q|k|v) h d",
        {"h": 5, "d": 7},
        "h d (q|k|v)",
    ),
    "gpt_neox": (
        {**WORDS, "hidden_size": 30, "num_attention_heads": 3, "intermediate_size": 37},
        "layers.{}.attention.query_key_value",
        "h (q|k|v) d",
        {"h": 3, "d": 10},
        "(v|q|k) h d",
    ),
    "falcon": (
        {**WORDS, "hidden_size": 60, "num_attention_heads": 6, "num_kv_heads": 2, "new_decoder_architecture": True, "bias": True},
        "h.{}.self_attention.query_key_value",
        "g (q r|k|v) d",
        {"g": 2, "r": 3, "d": 10},
        "(q h|k g|v g) p c",
    ),
}
FORMS = ["original", "split", "fused"]


@functools.cache
def first(kind: str) -> Any:
    return transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **MODELS[kind][0]))


def fresh(kind: str, seed: int) -> Any:
    model = copy.deepcopy(first(kind))
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    return model


def in_form(model: Any, kind: str, form: str) -> Any:
    _, name, layout, sizes, other = MODELS[kind]
    tt.unfuse_(model, {name.format("*"): layout}, **sizes)
    if form != "split":
        tt.fuse_(model, other if form == "fused" else None)
    return model


def saved(model: Any, kind: str, form: str) -> dict[str, Tensor]:
    state: dict[str, Tensor] = tt.state_dict(model, form, MODELS[kind][-1] if form == "fused" else None)
    return state


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("source", FORMS)
@pytest.mark.parametrize("target", FORMS)
def test_every_form_loads_into_every_form(kind: str, source: str, target: str, tmp_path: Path) -> None:
    one, other = in_form(fresh(kind, 1), kind, source), in_form(fresh(kind, 2), kind, target)
    wanted = {name: tensor.clone() for name, tensor in fresh(kind, 1).state_dict().items()}
    for state in (one.state_dict(), saved(one, kind, source)):
        other.load_state_dict(fresh(kind, 3).state_dict())
        safetensors.save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "file.safetensors")
        before = dict(state)
        assert other.load_state_dict(state) == other.load_state_dict(safetensors.load_file(tmp_path / "file.safetensors"))
        assert state.keys() == before.keys()
        assert same(tt.state_dict(other), wanted)
    tt.undo(other)
    assert same(other.state_dict(), wanted)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("source", FORMS)
@pytest.mark.parametrize("target", FORMS)
def test_through_save_pretrained_and_from_pretrained(kind: str, source: str, target: str, tmp_path: Path) -> None:
    model = fresh(kind, 1)
    wanted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    in_form(model, kind, target).save_pretrained(tmp_path / "whole", state_dict=saved(model, kind, source))
    model.save_pretrained(tmp_path / "as_it_is")
    for folder in ("whole", "as_it_is"):
        state = safetensors.load_file(tmp_path / folder / "model.safetensors")
        again = type(model).from_pretrained(None, config=model.config, state_dict=tt.state_dict(model, of=state))
        assert same(again.state_dict(), wanted)
        assert in_form(fresh(kind, 2), kind, target).load_state_dict(state) == ([], [])
    if source == "original":
        assert same(type(model).from_pretrained(tmp_path / "whole").state_dict(), wanted)


@pytest.mark.parametrize("kind", MODELS)
def test_the_forms_are_what_they_say(kind: str) -> None:
    model = fresh(kind, 1)
    _, name, layout, sizes, other = MODELS[kind]
    name = name.format(1)
    conv1d = kind == "gpt2"
    weight = model.get_submodule(name).weight.detach()
    rows = tt.Layout(layout).rows(**sizes)
    flat = weight.T if conv1d else weight
    original = model.state_dict()
    split, fused = saved(model, kind, "split"), saved(model, kind, "fused")
    assert (
        same(tt.state_dict(model), original)
        and same(tt.state_dict(model, "fused"), original)
        and same(tt.state_dict(model, "fused", layout), original)
    )
    for part in "qkv":
        order = sorted((row.head, row.dim, number) for number, row in enumerate(rows) if row.part == part)
        numbers = [number for *_, number in order]
        assert torch.equal(split[f"{name}.{part}.weight"], flat[numbers])
        assert torch.equal(split[f"{name}.{part}.bias"], original[f"{name}.bias"][numbers])
    at = {(row.part, row.head, row.dim): number for number, row in enumerate(rows)}
    wide = {**sizes, "h": 6} if "g" in sizes else sizes
    order = [at[row] for row in tt.Layout(other).rows(**wide)]
    assert torch.equal(fused[f"{name}.weight"].T if conv1d else fused[f"{name}.weight"], flat[order])
    assert torch.equal(fused[f"{name}.bias"], original[f"{name}.bias"][order])
    assert unmarked(fused[f"{name}.layout"]) == tt.Layout(other)


def apart() -> nn.ModuleDict:
    model = nn.ModuleDict({"qkv": nn.Linear(11, 105), "out": nn.Linear(35, 11)})
    tt.unfuse_(model, {"qkv": "h (q|k|v) d"}, h=5)
    return model


def drop(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda state: state.pop(name)  # type: ignore[no-any-return]


def put(name: str, tensor: Tensor) -> Callable[[dict[str, Any]], None]:
    return lambda state: state.update({name: tensor})


@pytest.mark.parametrize(
    ("form", "change", "words"),
    [
        ("original", drop("qkv.weight"), ["Missing key(s)", '"qkv.q.weight", "qkv.k.weight", "qkv.v.weight"']),
        ("original", drop("qkv.bias"), ["Missing key(s)", '"qkv.q.bias"']),
        ("split", drop("qkv.k.weight"), ["Missing key(s)", '"qkv.k.weight"']),
        ("split", put("qkv.z.weight", torch.zeros(3)), ["Unexpected key(s)", '"qkv.z.weight"']),
        ("original", put("qkv.weight_scale", torch.zeros(3)), ["Unexpected key(s)", '"qkv.weight_scale"']),
        ("split", put("qkv.q.weight", torch.zeros(3, 11)), ["size mismatch for qkv.q.weight"]),
    ],
)
def test_strict_loading_is_as_strict_as_before(form: str, change: Any, words: list[str]) -> None:
    model = apart()
    state = tt.state_dict(model, form)
    change(state)
    with pytest.raises(RuntimeError) as error:
        model.load_state_dict(state)
    assert all(word in str(error.value) for word in words)


def test_an_original_names_what_it_lacks() -> None:
    model = apart()
    tt.undo(model)
    state = tt.state_dict(model, "split")
    del state["qkv.k.weight"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "qkv.weight"'):
        model.load_state_dict(state)


def test_loading_by_assignment() -> None:
    model, other = apart(), apart()
    tt.undo(other)
    other.load_state_dict(model.state_dict(), assign=True)
    assert same(other.state_dict(), tt.state_dict(model))


def test_a_model_that_was_never_touched_refuses_what_it_does_not_know() -> None:
    model = apart()
    plain = nn.ModuleDict({"qkv": nn.Linear(11, 105), "out": nn.Linear(35, 11)})
    for state in (model.state_dict(), tt.state_dict(model, "fused", "(q|k|v) h d")):
        with pytest.raises(RuntimeError, match="qkv"):
            plain.load_state_dict(state)
    assert plain.load_state_dict(tt.state_dict(model)) == ([], [])


def test_rows_of_another_model_are_named() -> None:
    model = apart()
    state = tt.state_dict(model, "original")
    with pytest.raises(SizeError, match="rows do not fill the layout") as error:
        model.load_state_dict({**state, "qkv.weight": torch.zeros(90, 11)})
    assert "qkv.weight" in str(error.value)
    with pytest.raises(IncompatibleError):
        model.load_state_dict({**state, "qkv.layout": marked(tt.Layout("(q|k) h d"))})
    with pytest.raises(LayoutError, match="the mark of a layout"):
        model.load_state_dict({**state, "qkv.layout": torch.zeros(3)})


def test_words_that_are_no_form() -> None:
    model = apart()
    with pytest.raises(PlanError, match="one of three forms"):
        tt.state_dict(model, "joined")
    with pytest.raises(PlanError, match="only the form fused has a layout"):
        tt.state_dict(model, "split", "(q|k|v) h d")
    with pytest.raises(PlanError, match="no projection has the parts of this layout"):
        tt.state_dict(model, "fused", "(q|k) h d")


def test_projections_with_other_parts_stay_as_they_are() -> None:
    config = {**WORDS, "hidden_size": 60, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 37}
    model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model("phi3", **config))
    state = tt.state_dict(model, "fused", "g (q r|k|v) d")
    assert "layers.0.self_attn.qkv_proj.layout" in state and "layers.0.mlp.gate_up_proj.layout" not in state
    assert "layers.0.mlp.gate_up_proj.up.weight" in tt.state_dict(model, "split")
    tt.fuse_(model, "g (q r|k|v) d")
    assert model.load_state_dict(state) == ([], [])


def test_adapters_are_merged_first_and_full_states_load_around_them() -> None:
    peft = pytest.importorskip("peft")
    model, same_weights = apart(), apart()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q"]))
    with pytest.raises(PlanError, match="carries an adapter"):
        tt.state_dict(adapted)
    model.load_state_dict(tt.state_dict(same_weights), strict=False)
    assert torch.equal(model["qkv"].q.base_layer.weight, same_weights["qkv"].q.weight)
    adapted.merge_and_unload()
    assert same(tt.state_dict(model), tt.state_dict(same_weights))
