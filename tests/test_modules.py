"""unfuse_, fuse_, undo on real model code: same output, same weights, and everything that hangs on a parameter comes along."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import triptych as tt
from triptych.errors import PlanError, SizeError
from triptych.live import modules
from triptych.live.hinged import Hinged
from triptych.live.inputs import inputs_of
from triptych.live.probe import Probed
from triptych.live.tiny import classes

from .strategies import ALL, sizes_for
from .test_laws import PAIRS

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
transformers.logging.set_verbosity_error()

WORDS = {"vocab_size": 53, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_hidden_layers": 2, "max_position_embeddings": 31}
MHA = {**WORDS, "hidden_size": 30, "num_attention_heads": 3, "intermediate_size": 37}
GQA = {**WORDS, "hidden_size": 66, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 37, "head_dim": 22}
OLD = {"n_embd": 35, "n_head": 5, "n_layer": 2, "vocab_size": 53}
FALCON = {**WORDS, "hidden_size": 60, "num_attention_heads": 6}
VISION = {"hidden_size": 35, "num_attention_heads": 5, "num_hidden_layers": 2, "intermediate_size": 41, "image_size": 21, "patch_size": 7}
MLA = {
    **WORDS,
    "hidden_size": 46,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "intermediate_size": 37,
    "q_lora_rank": 13,
    "kv_lora_rank": 11,
    "qk_nope_head_dim": 5,
    "qk_rope_head_dim": 4,
    "v_head_dim": 7,
    "first_k_dense_replace": 2,
}
# model type, config, glob of the projections, their layout and sizes
FAMILIES: list[tuple[str, dict[str, Any], str, str, dict[str, int]]] = [
    ("gpt2", OLD, "*.c_attn", "(q|k|v) h d", {"h": 5, "d": 7}),
    ("openai-gpt", OLD, "*.c_attn", "(q|k|v) h d", {"h": 5, "d": 7}),
    ("imagegpt", OLD, "*.c_attn", "(q|k|v) h d", {"h": 5, "d": 7}),
    ("gpt_bigcode", {**OLD, "multi_query": True}, "*.c_attn", "(q h|k g|v g) d", {"h": 5, "g": 1, "d": 7}),
    ("gpt_bigcode", {**OLD, "multi_query": False}, "*.c_attn", "h (q|k|v) d", {"h": 5, "d": 7}),
    ("gpt_neox", MHA, "*.query_key_value", "h (q|k|v) d", {"h": 3, "d": 10}),
    ("gpt_neox_japanese", MHA, "*.query_key_value", "h (q|k|v) d", {"h": 3, "d": 10}),
    ("bloom", {"hidden_size": 35, "n_head": 5, "n_layer": 2, "vocab_size": 53}, "*.query_key_value", "h (q|k|v) d", {"h": 5, "d": 7}),
    ("persimmon", {**MHA, "hidden_size": 60}, "*.query_key_value", "h (q|k|v) d", {"h": 3, "d": 20}),
    ("falcon", {**FALCON, "multi_query": True}, "*.query_key_value", "(q h|k g|v g) d", {"h": 6, "g": 1, "d": 10}),
    ("falcon", {**FALCON, "multi_query": False, "alibi": True}, "*.query_key_value", "h (q|k|v) d", {"h": 6, "d": 10}),
    (
        "falcon",
        {**FALCON, "num_kv_heads": 2, "new_decoder_architecture": True},
        "*.query_key_value",
        "g (q r|k|v) d",
        {"g": 2, "r": 3, "d": 10},
    ),
    (
        "codegen",
        {"n_embd": 120, "n_head": 12, "n_layer": 1, "rotary_dim": 4, "vocab_size": 53},
        "*.qkv_proj",
        "m (q|v|k) n d",
        {"m": 4, "n": 3, "d": 10},
    ),
    ("mpt", {"d_model": 35, "n_heads": 5, "n_layers": 2, "vocab_size": 53}, "*.Wqkv", "(q|k|v) h d", {"h": 5, "d": 7}),
    ("phi3", GQA, "*.qkv_proj", "(q h|k g|v g) d", {"h": 6, "g": 2, "d": 22}),
    ("modernbert", MHA, "*.Wqkv", "(q|k|v) h d", {"h": 3, "d": 10}),
    ("deberta", {**MHA, "hidden_size": 35, "num_attention_heads": 5}, "*.in_proj", "h (q|k|v) d", {"h": 5, "d": 7}),
    ("blip_vision_model", VISION, "*.qkv", "(q|k|v) h d", {"h": 5, "d": 7}),
    ("blip_2_vision_model", VISION, "*.qkv", "(q|k|v) h d", {"h": 5, "d": 7}),
    ("vitdet", {**VISION, "pretrain_image_size": 21}, "*.qkv", "(q|k|v) h d", {"h": 5, "d": 7}),
]
IDS = [f"{kind}-{layout}" for kind, _, _, layout, _ in FAMILIES]


def build(kind: str, config: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    made = transformers.AutoConfig.for_model(kind, **config)
    model = classes(made)[0](made).double().eval()
    with torch.no_grad():
        for p in model.parameters():  # biases are zero at the start, which would hide them
            p.copy_(torch.randn_like(p) * 0.2)
    return model


def small(kind: str = "gpt_neox") -> Any:
    return next(build(name, config) for name, config, *_ in FAMILIES if name == kind)


def floats(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    return [t for value in (output.values() if hasattr(output, "values") else output or ()) for t in floats(value)] if output else []


def run(model: Any) -> list[Tensor]:
    torch.manual_seed(0)
    args, kwargs = inputs_of(model)[0]
    return floats({"first": model(*args, **kwargs)[0]})


def fused(model: Any, glob: str) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if fnmatchcase(name, glob)}


def by_rows(weight: Tensor, layout: str, sizes: dict[str, int]) -> dict[str, Tensor]:
    """The parts of a weight [rows, ...], row by row from the slow listing."""
    places: dict[str, list[tuple[int, int, int]]] = {}
    for number, row in enumerate(tt.Layout(layout).rows(**sizes)):
        places.setdefault(row.part, []).append((row.head, row.dim, number))
    return {part: weight[[number for *_, number in sorted(rows)]] for part, rows in places.items()}


@pytest.mark.parametrize(("kind", "config", "glob", "layout", "sizes"), FAMILIES, ids=IDS)
def test_a_family_apart_and_back(kind: str, config: dict[str, Any], glob: str, layout: str, sizes: dict[str, int]) -> None:
    model = build(kind, config)
    before = run(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters, classes = dict(model.named_parameters()), {name: type(module) for name, module in model.named_modules()}
    there = fused(model, glob)
    originals = {name: (m.weight.T if type(m).__name__ == "Conv1D" else m.weight).detach().clone() for name, m in there.items()}

    done = tt.unfuse_(model).done
    assert len(there) == config.get("n_layer", 2) and all(done[name] == ("q", "k", "v") for name in there)
    for name, original in originals.items():
        hinged = model.get_submodule(name)
        parts = tt.split(original, layout, axis=0, **sizes)
        for part, rows in by_rows(original, layout, sizes).items():
            linear = hinged.get_submodule(part)
            assert type(linear) is nn.Linear and linear.weight.is_contiguous()
            assert torch.equal(linear.weight, rows) and torch.equal(linear.weight, parts[part].flatten(0, 1))
        assert torch.equal(hinged.weight.T if hinged.packing.axis else hinged.weight, original)
    for a, b in zip(before, run(model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)

    tt.undo(model)
    after = model.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[name], state[name]) for name in state)
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert all(model.get_submodule(name) is module for name, module in there.items())
    assert all(torch.equal(a, b) for a, b in zip(before, run(model), strict=True))


@pytest.mark.parametrize(("kind", "config", "glob", "layout", "sizes"), FAMILIES, ids=IDS)
def test_lora_on_q_and_v_alone(kind: str, config: dict[str, Any], glob: str, layout: str, sizes: dict[str, int]) -> None:
    model = build(kind, config)
    originals = {name: module.weight.detach().clone() for name, module in fused(model, glob).items()}
    biases = {name: module.bias.detach().clone() for name, module in fused(model, glob).items() if module.bias is not None}
    tt.unfuse_(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q", "v"]))
    with pytest.raises(PlanError, match="carries an adapter"):
        tt.undo(model)
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        sum(out.square().sum() for out in run(adapted.get_base_model())).backward()  # type: ignore[union-attr]
        optimizer.step()
    merged = adapted.merge_and_unload()
    trained = run(merged)
    tt.undo(merged)
    for a, b in zip(trained, run(merged), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for name, original in originals.items():
        module = merged.get_submodule(name)
        delta = module.weight.detach() - original
        delta = delta.T if type(module).__name__ == "Conv1D" else delta
        expected = [row.part in ("q", "v") for row in tt.Layout(layout).rows(**sizes)]
        assert (delta != 0).any(1).tolist() == expected
        assert name not in biases or torch.equal(module.bias, biases[name])


# Other parts, other ways to know


def test_other_parts_than_q_k_v() -> None:
    model = build("deepseek_v3", MLA)
    before = run(model)
    done = tt.unfuse_(model).done
    assert done["layers.0.self_attn.kv_b_proj"] == ("k", "v")
    assert done["layers.0.self_attn.kv_a_proj_with_mqa"] == ("latent", "rope")
    for a, b in zip(before, run(model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
    tt.undo(model)
    assert all(torch.equal(a, b) for a, b in zip(before, run(model), strict=True))


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "falcon", "codegen", "phi3", "deberta"])
def test_the_records_say_the_same_as_the_code(kind: str) -> None:
    one, other = small(kind), small(kind)
    parts = (
        tt.unfuse_(one, only="*attn*" if kind != "gpt_neox" else "*attention*") if kind not in ("falcon", "deberta") else tt.unfuse_(one)
    )
    assert tt.unfuse_(other, "records", only=list(parts.done)).done == parts.done
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


class Block(nn.Module):
    """Knows nothing of transformers; reads its fused module as code does: by call, by attribute, by weight."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.qkv = nn.Linear(11, 3 * 5 * 7, bias=bias, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.qkv(x) + nn.functional.linear(x, self.qkv.weight, self.qkv.bias) * self.qkv.out_features


SIZES = {"h": 5, "d": 7}
X = torch.linspace(-1, 1, 2 * 3 * 11, dtype=torch.float64).reshape(2, 3, 11)


@pytest.mark.parametrize("layout", ["h (q|k|v) d", "(v|q|k) h d", "h d (q|k|v)", "(q|k|v) d h", "h (q (a x|b y)|k (a x|b y)|v d)"])
@pytest.mark.parametrize("bias", [True, False])
def test_layouts_by_hand(layout: str, bias: bool) -> None:
    sizes = {**SIZES, "x": 3, "y": 4} if " x" in layout else SIZES
    model, same = Block(bias), Block(bias)
    assert tt.unfuse_(model, {"qkv": layout}, **sizes).done == {"qkv": ("q", "k", "v")}
    assert sorted(model.state_dict()) == sorted(f"qkv.{part}.{end}" for part in "qkv" for end in ["weight", "bias"][: 1 + bias])
    torch.testing.assert_close(model(X), same(X), rtol=1e-14, atol=1e-13)
    assert torch.equal(model.qkv.weight, same.qkv.weight)
    model(X).square().sum().backward()
    same(X).square().sum().backward()
    tt.undo(model)
    torch.testing.assert_close(model.qkv.weight.grad, same.qkv.weight.grad, rtol=1e-12, atol=1e-12)
    assert torch.equal(model.qkv.weight, same.qkv.weight)


@pytest.mark.parametrize("text", ALL)
def test_every_layout_of_the_language_apart_and_in_others(text: str) -> None:
    one = tt.Layout(text)
    if len({part.split(".")[0] for part in one.parts}) < 2:
        return  # nothing to take apart
    for other in [text, *(b for a, b in PAIRS if a == text)][::4]:
        two = tt.Layout(other)
        sizes = {axis: size for axis, size in sizes_for(one, two).items() if axis in one.axes}
        rows = one.rows(**sizes)
        model = nn.ModuleDict({"x": nn.Linear(3, len(rows), dtype=torch.float64)})
        module, weight, x = model["x"], model["x"].weight.detach().clone(), torch.ones(2, 3, dtype=torch.float64)
        before = module(x)
        tt.unfuse_(model, {"x": text}, **sizes)
        for part, child in model["x"].named_children():
            numbers = [number for number, row in enumerate(rows) if row.part.split(".")[0] == part]
            if not any(rows[number].part != part for number in numbers):  # heads in order, and the dims of a head as they lay
                numbers.sort(key=lambda number: (rows[number].head, number))
            assert torch.equal(child.weight, weight[numbers])
        torch.testing.assert_close(model["x"](x), before)
        tt.fuse_(model, other, **{axis: size for axis, size in sizes_for(one, two).items() if axis in two.axes})
        if isinstance(model["x"], Hinged):
            at = {row: number for number, row in enumerate(rows)}
            there = two.rows(**{axis: sizes_for(one, two)[axis] for axis in two.axes})
            assert torch.equal(model["x"].packed.weight, weight[[at[row] for row in there]])
        torch.testing.assert_close(model["x"](x), before)
        tt.undo(model)
        assert model["x"] is module and torch.equal(module.weight, weight) and torch.equal(module(x), before)


def test_what_probe_found_can_be_given() -> None:
    model = small()
    seen = tt.probe(model)
    wanted = {name: found for name, found in seen.items() if ".1." in name}
    assert list(tt.unfuse_(model, wanted).done) == ["layers.1.attention.query_key_value"]
    assert not isinstance(model.layers[0].attention.query_key_value, Hinged)
    unknown = Probed(None, tt.Sizes({}), None, "rows reach no attention")
    left = tt.unfuse_(model, {"layers.0.attention.query_key_value": unknown}).left
    assert left == {"layers.0.attention.query_key_value": "probe cannot tell its layout: rows reach no attention"}


def test_twice_is_once() -> None:
    model = small()
    assert len(tt.unfuse_(model).done) == 2 and tt.unfuse_(model).done == {}
    assert str(tt.unfuse_(model)) == "nothing to do"
    assert len(tt.undo(model).done) == 2 and tt.undo(model).done == {}
    assert str(tt.unfuse_(model)) == "2 x layers.*.attention.query_key_value -> q, k, v"
    assert str(tt.undo(model)) == "2 x layers.*.attention.query_key_value -> as it was"


# What hangs on a module


def test_a_block_is_a_view_and_the_rest_is_released() -> None:
    model = Block()
    storage, shell = model.qkv.weight.untyped_storage().data_ptr(), model.qkv.weight
    tt.unfuse_(model, {"qkv": "(q|k|v) h d"}, h=5)
    assert {part.weight.untyped_storage().data_ptr() for part in model.qkv.children()} == {storage} and not shell.numel()
    tt.undo(model)
    assert model.qkv.weight is shell and shell.shape == (105, 11)
    tt.unfuse_(model, {"qkv": "h (q|k|v) d"}, h=5)
    assert len({part.weight.untyped_storage().data_ptr() for part in model.qkv.children()}) == 3


def test_never_two_copies_of_more_than_one_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.ModuleList(nn.Linear(11, 105, bias=False) for _ in range(7))
    seen: set[nn.Parameter] = set()
    most: list[int] = []
    built = modules._built

    def watched(job: Any, parameters: dict[str, list[nn.Parameter]]) -> nn.Module:
        seen.update(p for new in parameters.values() for p in new)
        most.append(sum({p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in seen}.values()))
        return built(job, parameters)

    monkeypatch.setattr(modules, "_built", watched)
    for call in (lambda: tt.unfuse_(model, {"*": "h (q|k|v) d"}, h=5), lambda: tt.fuse_(model, "(q|k|v) h d"), lambda: tt.undo(model)):
        seen.update(model.parameters())
        call()
    assert most == [7 * 105 * 11 * 4] * 21


def test_flags_dtype_hooks_and_attributes_stay() -> None:
    model = Block().bfloat16().train()
    seen: list[str] = []
    model.qkv.register_forward_hook(lambda module, args, out: seen.append(f"after {type(module).__name__} {tuple(out.shape)}"))
    handle = model.qkv.register_forward_pre_hook(lambda module, args: seen.append("before"))
    model.qkv.weight.requires_grad_(False)
    model.qkv.weight.is_mine = True  # type: ignore[attr-defined]
    model.qkv.note = "of the user"  # type: ignore[assignment]
    tt.unfuse_(model, {"qkv": "h (q|k|v) d"}, h=5)
    model.qkv(X.bfloat16())
    assert seen == ["before", "after Hinged (2, 3, 105)"]
    handle.remove()
    model.qkv(X.bfloat16())
    assert seen[2:] == ["after Hinged (2, 3, 105)"]
    assert all(part.weight.dtype == torch.bfloat16 and part.weight.is_mine for part in model.qkv.children())
    assert [part.weight.requires_grad for part in model.qkv.children()] == [False] * 3 and model.qkv.q.bias.requires_grad
    assert model.qkv.training and model.qkv.q.training and model.qkv.note == "of the user"
    model.eval().double()
    model.qkv.k.weight.requires_grad_(True)
    tt.undo(model)
    assert model.qkv.weight.requires_grad and model.qkv.weight.dtype == torch.float64 and not model.qkv.training
    model.qkv(X)
    assert seen[3:] == ["after Linear (2, 3, 105)"]


def test_edits_and_gradients_come_back() -> None:
    model = Block()
    model(X).sum().backward()
    before, grad = model.qkv.weight.detach().clone(), model.qkv.weight.grad.clone()
    tt.unfuse_(model, {"qkv": "h (q|k|v) d"}, h=5)
    assert torch.equal(model.qkv.k.weight.grad, by_rows(grad, "h (q|k|v) d", SIZES)["k"])
    with torch.no_grad():
        model.qkv.v.weight.mul_(2)
        model.qkv.q.weight[0, 0] = float("nan")
    model.qkv.q.weight.grad = None
    tt.undo(model)
    rows = tt.Layout("h (q|k|v) d").rows(**SIZES)
    expected = before * torch.tensor([2.0 if row.part == "v" else 1.0 for row in rows])[:, None]
    expected[0, 0] = float("nan")
    assert torch.equal(model.qkv.weight.view(torch.int64), expected.view(torch.int64))
    assert torch.equal(model.qkv.weight.grad, grad * torch.tensor([float(row.part != "q") for row in rows])[:, None])


def test_ties_hold() -> None:
    shared = nn.Linear(11, 105)
    twin = nn.Linear(11, 105)
    twin.weight = shared.weight
    model = nn.ModuleDict({"one": shared, "again": nn.ModuleDict({"one": shared}), "twin": twin})
    tt.unfuse_(model, {"*one": "h (q|k|v) d", "twin": "h (q|k|v) d"}, h=5)
    assert model["one"] is model["again"]["one"] and model["one"] is not model["twin"]
    assert model["one"].q.weight is model["twin"].q.weight and model["one"].q.bias is not model["twin"].q.bias
    with torch.no_grad():
        model["twin"].k.weight.zero_()
    tt.undo(model)
    assert model["one"] is shared is model["again"]["one"] and model["twin"].weight is shared.weight
    assert int((shared.weight == 0).all(1).sum()) == 35
    with pytest.raises(PlanError, match=r"its weight is also (one|twin)\.weight, which stays as it is"):
        tt.unfuse_(model, {"twin": "h (q|k|v) d"}, h=5)
    view = nn.Linear(11, 35)
    view.weight = nn.Parameter(shared.weight.detach()[:35])
    with pytest.raises(PlanError, match=r"its weight is also view\.weight"):
        tt.unfuse_(nn.ModuleDict({"one": shared, "view": view}), {"one": "h (q|k|v) d"}, h=5)


def test_copies_and_files_of_an_unfused_model() -> None:
    model, same = Block(), Block()
    tt.unfuse_(model, {"qkv": "h (q|k|v) d"}, h=5)
    file = io.BytesIO()
    torch.save(model, file)
    for other in (copy.deepcopy(model), torch.load(io.BytesIO(file.getvalue()), weights_only=False)):
        with torch.no_grad():
            other.qkv.q.weight.add_(1)
        assert torch.equal(model.qkv.weight, same.qkv.weight)
        tt.undo(other)
        rows = tt.Layout("h (q|k|v) d").rows(**SIZES)
        assert torch.equal(other.qkv.weight, same.qkv.weight + torch.tensor([float(row.part == "q") for row in rows])[:, None])


def test_a_model_without_memory() -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"qkv": nn.Linear(11, 105)})
    tt.unfuse_(model, {"qkv": "h (q|k|v) d"}, h=5)
    assert model["qkv"].k.weight.is_meta and model["qkv"](torch.empty(2, 11, device="meta")).shape == (2, 105)
    tt.undo(model)
    assert model["qkv"].weight.shape == (105, 11)


# Another layout


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "falcon", "phi3"])
def test_fused_in_another_layout(kind: str) -> None:
    model = small(kind)
    _, _, glob, layout, sizes = next(family for family in FAMILIES if family[0] == kind)
    before, names = run(model), list(fused(model, glob))
    first = model.get_submodule(names[0]).weight.detach().clone()
    first = first.T if kind == "gpt2" else first
    other = "(v g|k g|q g r) d"
    wide = {"h": sizes.get("h", 0) or sizes["g"] * sizes["r"], "g": sizes.get("g", sizes.get("h", 0)), "d": sizes["d"]}
    assert all(tt.fuse_(model, other, g=wide["g"]).done[name] == ("packed",) for name in names)
    packed = model.get_submodule(names[0]).packed.weight
    parts = by_rows(first, layout, sizes)
    assert torch.equal(packed, torch.cat([parts["v"], parts["k"], parts["q"]]))
    for a, b in zip(before, run(model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
    assert all(str(tt.probe(model)[f"{name}.packed"].layout).startswith("(v") for name in names)
    tt.unfuse_(model)
    assert torch.equal(model.get_submodule(names[0]).q.weight, parts["q"])
    tt.fuse_(model, layout, **({"g": wide["g"]} if " g" in layout else {}))
    assert all(torch.equal(a, b) for a, b in zip(before, run(model), strict=True))
    assert not any(isinstance(model.get_submodule(name), Hinged) for name in names)


def test_only_some() -> None:
    model = small()
    tt.unfuse_(model, only="layers.1.*")
    assert [isinstance(layer.attention.query_key_value, Hinged) for layer in model.layers] == [False, True]
    tt.unfuse_(model)
    tt.fuse_(model, only="layers.0.*")
    assert [isinstance(layer.attention.query_key_value, Hinged) for layer in model.layers] == [False, True]


# Optimizers


def adam(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [torch.optim.Adam(model.parameters(), lr=0.01, amsgrad=True)]


def sgd(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(model.named_parameters(), lr=0.01, momentum=0.9)]


def adamw_groups(model: nn.Module) -> list[torch.optim.Optimizer]:
    groups = [{"params": [p for p in model.parameters() if p.dim() == d], "weight_decay": 0.1 * d} for d in (1, 2)]
    return [torch.optim.AdamW(groups, lr=0.01, foreach=True)]


@pytest.mark.parametrize("make", [adam, sgd, adamw_groups])
@pytest.mark.parametrize("layout", ["h (q|k|v) d", "(q|k|v) h d"])
def test_training_goes_on_as_if_nothing_had_happened(make: Any, layout: str) -> None:
    def steps(model: nn.Module, optimizers: list[torch.optim.Optimizer], count: int) -> None:
        for _ in range(count):
            for optimizer in optimizers:
                optimizer.zero_grad()
            model(X).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()

    model, same = Block(), Block()
    ours, theirs = make(model), make(same)
    steps(model, ours, 2)
    groups = [group for optimizer in ours for group in optimizer.param_groups]
    tt.unfuse_(model, {"qkv": layout}, optimizer=ours, **SIZES)
    assert [p for group in groups for p in group["params"] if p.dim() == 2] == [part.weight for part in model.qkv.children()]
    if "param_names" in groups[0]:
        assert groups[0]["param_names"] == [f"qkv.{part}.{end}" for end in ("weight", "bias") for part in "qkv"]
    steps(model, ours, 3)
    tt.fuse_(model, optimizer=ours)
    steps(model, ours, 2)
    steps(same, theirs, 7)
    torch.testing.assert_close(model.qkv.weight, same.qkv.weight, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.qkv.bias, same.qkv.bias, rtol=1e-12, atol=1e-12)
    state, wanted = (optimizers[0].state[block.qkv.weight] for optimizers, block in ((ours, model), (theirs, same)))
    assert state.keys() == wanted.keys() and len(ours[0].state) == 2
    for key in state:
        torch.testing.assert_close(state[key], wanted[key], rtol=1e-11, atol=1e-11)


def test_muon_for_the_weights_and_adam_for_the_biases() -> None:
    model = small("gpt2")
    weights = [p for name, p in model.named_parameters() if name.endswith("c_attn.weight")]
    muon, rest = torch.optim.Muon(weights, lr=0.01), torch.optim.AdamW([p for p in model.parameters() if p.dim() == 1], lr=0.01)
    for _ in range(2):
        sum(out.square().sum() for out in run(model)).backward()
        muon.step()
        rest.step()
    momentum = [muon.state[p]["momentum_buffer"].clone() for p in weights]
    tt.unfuse_(model, optimizer=[muon, rest])
    parts = by_rows(momentum[0].T, "(q|k|v) h d", {"h": 5, "d": 7})
    attention = model.h[0].attn.c_attn
    assert all(torch.equal(muon.state[attention.get_submodule(part).weight]["momentum_buffer"], parts[part]) for part in "qkv")
    assert len(muon.param_groups[0]["params"]) == 6 and len(muon.state) == 6
    sum(out.square().sum() for out in run(model)).backward()
    moved = attention.q.weight.detach().clone()
    muon.step()
    assert not torch.equal(moved, attention.q.weight)
    tt.undo(model, optimizer=[muon, rest])
    assert [id(p) for p in muon.param_groups[0]["params"]] == [id(p) for p in weights] and set(muon.state) == set(weights)


def test_a_part_that_was_never_trained_has_a_state_of_zeros() -> None:
    model = Block()
    tt.unfuse_(model, {"qkv": "h (q|k|v) d"}, h=5)
    model.qkv.k.weight.requires_grad_(False)
    (optimizer,) = adam(model)
    model(X).square().mean().backward()
    optimizer.step()
    tt.undo(model, optimizer=optimizer)
    state = optimizer.state[model.qkv.weight]
    rows = tt.Layout("h (q|k|v) d").rows(**SIZES)
    assert [bool(row.any()) for row in state["exp_avg"]] == [row.part != "k" for row in rows] and state["step"] == 1


# Together with others


@pytest.mark.parametrize(("layout", "backend"), [("h (q|k|v) d", "aot_eager"), ("(q|k|v) h d", "eager")])
def test_torch_compile(layout: str, backend: str) -> None:
    model = Block()
    tt.unfuse_(model, {"qkv": layout}, **SIZES)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(X), model(X))
    compiled(X).sum().backward()
    assert model.qkv.k.weight.grad is not None


@contextlib.contextmanager
def one_rank() -> Iterator[Any]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield torch.distributed.init_device_mesh("cpu", (1,))
    finally:
        torch.distributed.destroy_process_group()


def test_fsdp_takes_the_parts_and_a_sharded_model_is_refused() -> None:
    from torch.distributed.fsdp import fully_shard

    with one_rank() as mesh:
        model, same = Block(), Block()
        tt.unfuse_(model, {"qkv": "h (q|k|v) d"}, h=5)
        fully_shard(model, mesh=mesh)
        with pytest.raises(PlanError, match="sharded"):
            tt.undo(model)
        fully_shard(same, mesh=mesh)
        for layouts in (None, {"qkv": "h (q|k|v) d"}):
            with pytest.raises(PlanError) as error:
                tt.unfuse_(same, layouts)
            assert "it is sharded (DTensor of FSDP2 or tensor parallelism)" in str(error.value)


# What is refused, before anything is changed


class Odd(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class Plain(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.T + self.bias


class Quantised(nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("qweight", torch.zeros(3, dtype=torch.int8))


class Scaled(nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.scale = nn.Parameter(torch.ones(1))


class Eight(nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.weight = nn.Parameter(torch.zeros(sizes[1], sizes[0], dtype=torch.int8), requires_grad=False)


def hooked(*sizes: int) -> nn.Module:
    module = nn.Linear(*sizes)
    module.weight.register_hook(lambda grad: grad)
    return module


def replaced(*sizes: int) -> nn.Module:
    module = nn.Linear(*sizes)
    module.forward = lambda x: x  # type: ignore[method-assign, assignment]
    return module


REFUSED = [
    (Odd, "Odd computes something else than a linear map"),
    (Quantised, "it is quantised"),
    (Eight, "it is quantised"),
    (Scaled, "it holds scale besides weight and bias"),
    (hooked, "its gradient has hooks"),
    (replaced, "its forward was replaced by another"),
    (lambda *_: nn.Conv1d(11, 105, 1), "a Conv1d is no linear map with one weight"),
    (lambda *_: nn.utils.parametrizations.weight_norm(nn.Linear(11, 105)), "is no linear map with one weight"),
    (lambda *_: nn.MultiheadAttention(35, 5), "a MultiheadAttention is no linear map with one weight"),
]


@pytest.mark.parametrize(("make", "why"), REFUSED, ids=[why for _, why in REFUSED])
def test_modules_that_are_refused(make: Any, why: str) -> None:
    model = nn.ModuleDict({"ok": nn.Linear(11, 105), "qkv": make(11, 105)})
    for layouts in ({"*": "h (q|k|v) d"}, {"ok": "h (q|k|v) d", "qkv": "h (q|k|v) d"}):
        with pytest.raises(PlanError) as error:
            tt.unfuse_(model, layouts, h=5)
        assert error.value.fields["module"] == "qkv" and why in str(error.value.fields["found"])
    assert type(model["ok"]) is nn.Linear and model["ok"].weight.shape == (105, 11)


def test_hooks_on_the_gradient_of_a_part_are_not_lost() -> None:
    model = Block()
    tt.unfuse_(model, {"qkv": "h (q|k|v) d"}, h=5)
    handle = model.qkv.k.weight.register_hook(lambda grad: grad * 2)
    with pytest.raises(PlanError, match="cannot be moved") as error:
        tt.undo(model)
    assert "its gradient has hooks" in str(error.value)
    handle.remove()
    tt.undo(model)


def test_a_linear_in_other_words_is_taken() -> None:
    model = nn.ModuleDict({"qkv": Plain(11, 105)})
    assert tt.unfuse_(model, {"qkv": "h (q|k|v) d"}, h=5).done


def test_a_bare_parameter_is_left_alone_or_refused_by_name() -> None:
    model = nn.ModuleDict({"a": nn.MultiheadAttention(12, 3)})
    found = tt.unfuse_(nn.MultiheadAttention(12, 3))
    assert found.done == {} and "bare parameter" in found.left["in_proj_weight"]
    assert str(found).startswith("in_proj_weight left as it is: it is a bare parameter")
    with pytest.raises(PlanError, match="cannot be replaced by modules"):
        tt.unfuse_(model["a"], only="in_proj_weight")


def test_a_quantised_model_is_refused_whole() -> None:
    model = small()
    model.layers[0].mlp.dense_h_to_4h = Eight(30, 37)
    with pytest.raises(PlanError, match="this model is refused"):
        tt.unfuse_(model)
    assert tt.unfuse_(model, {"*.query_key_value": "h (q|k|v) d"}, h=3).done


def test_an_adapter_first_is_refused() -> None:
    adapted = peft.get_peft_model(small(), peft.LoraConfig(r=2, target_modules=["query_key_value"]))
    with pytest.raises(PlanError, match="cannot be replaced") as error:
        tt.unfuse_(adapted, {"*.query_key_value.base_layer": "h (q|k|v) d"}, h=3)
    assert "unfuse first, then add the adapter" in str(error.value)


def test_an_adapter_is_saved_and_loaded(tmp_path: Path) -> None:
    model, other = small(), small()
    tt.unfuse_(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q", "v"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path)
    tt.unfuse_(other)
    merged = peft.PeftModel.from_pretrained(other, tmp_path).merge_and_unload()
    wanted = adapted.merge_and_unload()
    tt.undo(merged)
    tt.undo(wanted)
    assert all(torch.equal(a, b) for a, b in zip(merged.parameters(), wanted.parameters(), strict=True))


def test_a_weight_that_is_read_around_an_adapter_is_an_error() -> None:
    model = Block()
    tt.unfuse_(model, {"qkv": "h (q|k|v) d"}, h=5)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q"]))
    with pytest.raises(PlanError, match="carries an adapter"):
        adapted(X)
    adapted.merge_adapter()
    adapted(X)


def test_errors_of_names_and_sizes() -> None:
    model = Block()
    for call, what in (
        (lambda: tt.unfuse_(model, {"nothing": "h (q|k|v) d"}), "no module has such a name"),
        (lambda: tt.unfuse_(small(), only="nothing"), "nobody knows a fused projection of this name"),
        (lambda: tt.unfuse_(small(), only="*.dense"), "nobody knows a fused projection of this name"),
        (lambda: tt.unfuse_(model, "h (q|k|v) d"), "layouts are given by module name"),
        (lambda: tt.unfuse_(model, "records"), "family records need a config"),
        (lambda: tt.fuse_(model), "there is nothing to fuse"),
        (lambda: tt.fuse_(build("llama", GQA), "(gate|up) f"), "there is nothing to fuse"),
        (lambda: tt.unfuse_(model, {"qkv": "(q h|k=v g) d"}, h=2, g=1), "cannot be replaced by modules"),
        (lambda: tt.unfuse_(model, {"qkv": "h (q) d"}, h=7), "cannot be replaced by modules"),
        (lambda: tt.unfuse_(model, {"qkv": "h (q|bias|v) d"}, h=5), "cannot be replaced by modules"),
        (lambda: tt.unfuse_(nn.Linear(3, 12), {"": "h (q|k|v) d"}, h=2), "cannot be replaced by modules"),
    ):
        with pytest.raises(PlanError) as error:
            call()
        assert error.value.what.endswith(what) or what in error.value.what
        assert len(str(error.value).splitlines()) <= 6
    with pytest.raises(SizeError):
        tt.unfuse_(model, {"qkv": "h (q|k|v) d"}, h=4)
    tt.unfuse_(model, {"qkv": "h (q|k|v) d"}, h=5)
    with pytest.raises(PlanError, match="there is nothing to fuse"):
        tt.fuse_(model, "(gate|up) f")
    with pytest.raises(tt.IncompatibleError):
        tt.fuse_(model, "(q h|k g|v g) d", g=1)


def test_optimizers_that_cannot_follow() -> None:
    def apart() -> Block:
        model = Block()
        tt.unfuse_(model, {"qkv": "h (q|k|v) d"}, h=5)
        return model

    model = Block()
    factored = torch.optim.Adafactor(model.parameters())
    model(X).sum().backward()
    factored.step()
    with pytest.raises(PlanError, match="does not follow the rows") as error:
        tt.unfuse_(model, {"qkv": "h (q|k|v) d"}, h=5, optimizer=factored)
    assert "Adafactor, row_var" in str(error.value) and type(model.qkv) is nn.Linear

    model = apart()
    groups = [{"params": [model.qkv.q.weight]}, {"params": [model.qkv.k.weight, model.qkv.v.weight]}]
    with pytest.raises(PlanError, match="treated differently") as error:
        tt.undo(model, optimizer=torch.optim.SGD(groups, lr=0.1))
    assert "in groups 0, 1, 1" in str(error.value)

    model = apart()
    (optimizer,) = adam(model)
    for frozen in (True, False):
        model.qkv.k.weight.requires_grad_(not frozen)
        model(X).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    with pytest.raises(PlanError, match="does not follow the rows") as error:
        tt.undo(model, optimizer=optimizer)
    assert "Adam, step" in str(error.value) and isinstance(model.qkv, Hinged)
