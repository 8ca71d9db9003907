"""heads: the weights of every head, against slices written by hand and against what the heads did in a run."""

from __future__ import annotations

import pytest
import torch
import transformers
from einops import rearrange
from torch import Tensor, nn

import triptych as tt
from tests.attention_families import FAMILIES, call, shared, small

transformers.logging.set_verbosity_error()


def by_hand(family: str) -> tuple[nn.Module, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The model, (W_Q, W_K, W_V, W_O) and (b_Q, b_K, b_V) of its second layer, sliced as its modeling code does."""
    model = shared(family)
    if family == "gpt2":
        attn = model.h[1].attn
        w = rearrange(attn.c_attn.weight, "m (x h d) -> x h m d", x=3, h=5)
        return model, (*w, rearrange(attn.c_proj.weight, "(h d) m -> h d m", h=5)), (*attn.c_attn.bias.view(3, 5, 7),)
    if family == "gpt_neox":
        attn = model.layers[1].attention
        w = rearrange(attn.query_key_value.weight, "(h x d) m -> x h m d", x=3, h=3)
        b = rearrange(attn.query_key_value.bias, "(h x d) -> x h d", x=3, h=3)
        return model, (*w, rearrange(attn.dense.weight, "m (h d) -> h d m", h=3)), (*b,)
    if family == "falcon":
        attn = model.h[1].self_attention
        w = rearrange(attn.query_key_value.weight, "(g x d) m -> x g m d", g=2, x=7)
        return model, (rearrange(w[:5], "r g m d -> (g r) m d"), w[5], w[6], rearrange(attn.dense.weight, "m (h d) -> h d m", h=10)), ()
    if family == "phi3":
        attn = model.layers[1].self_attn
        w = rearrange(attn.qkv_proj.weight, "(h d) m -> h m d", d=14)
        return model, (w[:10], w[10:12], w[12:], rearrange(attn.o_proj.weight, "m (h d) -> h d m", h=10)), ()
    if family == "codegen":
        attn = model.h[1].attn
        q, v, k = rearrange(attn.qkv_proj.weight, "(m x i d) e -> x (m i) e d", m=4, x=3, d=14)
        return model, (q, k, v, rearrange(attn.out_proj.weight, "m (h d) -> h d m", h=8)), ()
    attn = model.layers[1].self_attn
    w = [rearrange(p.weight, "(h d) m -> h m d", d=14) for p in (attn.q_proj, attn.k_proj, attn.v_proj)]
    return model, (*w, rearrange(attn.o_proj.weight, "m (h d) -> h d m", h=10)), ()


HAND = ["gpt2", "gpt_neox", "falcon", "phi3", "codegen", "llama"]
GATHERED = {"falcon": {"W_Q"}, "codegen": {"W_Q", "W_K", "W_V"}}
"""Two head axes with something between them: no one stride."""


@pytest.mark.parametrize("family", HAND)
def test_weights_are_those_sliced_by_hand(family: str) -> None:
    model, weights, biases = by_hand(family)
    of = tt.heads(model)[1]
    for name, theirs in zip(("W_Q", "W_K", "W_V", "W_O"), weights, strict=True):
        ours = getattr(of, name)
        assert torch.equal(ours, theirs)
        assert of.shares(name) is (name not in GATHERED.get(family, ()))
        assert (ours.untyped_storage().data_ptr() in {p.untyped_storage().data_ptr() for p in model.parameters()}) is of.shares(name)
    for name, theirs in zip(("b_Q", "b_K", "b_V"), biases, strict=False):
        assert torch.equal(getattr(of, name), theirs) and of.shares(name)
    if not biases:
        assert of.b_Q is None and not of.shares("b_Q")


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_do_what_the_heads_did(family: str) -> None:
    """Inputs of the projections times W_Q, W_K, W_V, and outputs of the heads times W_O, are what the run shows."""
    model = shared(family)
    found = tt.heads(model)
    layer = found[len(found) - 1]
    names = {lines.parameter.rpartition(".")[0]: part for part, lines in layer._rows.parts.items() if part in "qkv"}
    inputs: dict[str, Tensor] = {}
    outputs: list[Tensor] = []
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda module, args, name=name: inputs.__setitem__(name, args[0]))
        for name in names
    ]
    closing = model.get_submodule(layer._rows.out.parameter.rpartition(".")[0])
    handles.append(closing.register_forward_hook(lambda module, args, output: outputs.append(output)))
    with torch.no_grad(), tt.capture(model) as acts:
        model(**call(model))
    for handle in handles:
        handle.remove()
    seen = acts[layer.layer]
    for part in "qkv":
        x = inputs[layer._rows.parts[part].parameter.rpartition(".")[0]]
        bias = layer.bias(part)
        made = torch.einsum("...m,hmd->...hd", x, layer.weight(part)) + (0 if bias is None else bias)
        torch.testing.assert_close(made, getattr(seen.before, part), rtol=1e-4, atol=1e-4)
    if family != "qwen3_next":  # the output is gated before the projection
        made = torch.einsum("bnhd,hdm->bnm", seen.z, layer.W_O) + (0 if layer.b_O is None else layer.b_O)
        torch.testing.assert_close(made.reshape(outputs[-1].shape), outputs[-1], rtol=1e-4, atol=1e-4)


def test_more_than_fifteen_families_are_tested() -> None:
    assert len({name.split()[0] for name in FAMILIES}) >= 15


@pytest.mark.parametrize("family", ["gpt2", "falcon", "codegen"])
def test_gradients_reach_the_rows_of_the_head_alone(family: str) -> None:
    model = small(family)
    of = tt.heads(model)[0]
    of.W_Q[2].sum().backward()
    touched = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    assert len(touched) == 1
    grad = of._rows.parts["q"].of(touched[0][1])
    assert grad[2].eq(1).all() and grad.sum() == touched[0][1].sum() == grad[2].numel()


def test_writing_to_a_view_edits_the_model() -> None:
    model = small("gpt_neox")
    of = tt.heads(model)["layers.1.attention"]
    with torch.no_grad():
        of.W_V[1] = 0
        assert of.b_V is not None
        of.b_V[1] = 0
        with tt.capture(model) as acts:
            model(**call(model))
    assert not acts[1].after.v[:, :, 1].any() and acts[1].after.v[:, :, 0].any() and acts[0].after.v[:, :, 1].any()


def test_a_replaced_weight_is_read_anew() -> None:
    model = small("gpt2")
    of = tt.heads(model)[0]
    model.h[0].attn.c_attn.weight = nn.Parameter(torch.zeros_like(model.h[0].attn.c_attn.weight))
    assert not of.W_Q.any()


def test_attention_of_torch_with_keys_of_another_width() -> None:
    module = nn.MultiheadAttention(15, 3, kdim=8, vdim=11).eval()
    of = tt.heads(module)[0]
    assert (of.W_Q.shape, of.W_K.shape, of.W_V.shape, of.W_O.shape) == ((3, 15, 5), (3, 8, 5), (3, 11, 5), (3, 5, 15))
    assert torch.equal(of.W_K[1], module.k_proj_weight[5:10].T) and torch.equal(of.W_O[2], module.out_proj.weight[:, 10:].T)


def test_other_parts_and_what_is_not_there() -> None:
    of = tt.heads(shared("deepseek_v3"))[0]
    assert of.weight("nope").shape == (5, 12, 7) and torch.equal(of.W_Q[..., 7:], of.weight("rope"))
    gated = tt.heads(shared("qwen3_next"))[1]
    assert gated.layer == "layers.1.self_attn" and gated.weight("gate").shape == gated.W_Q.shape
    with pytest.raises(tt.TraceError, match="no projection makes gate"):
        of.weight("gate")


def test_an_unfused_model_has_the_same_weights() -> None:
    model = small("gpt_neox")
    before = tt.heads(model)["layers.0.attention"].W_Q.clone()
    tt.unfuse_(model)
    assert torch.equal(tt.heads(model)["layers.0.attention"].W_Q, before)


def test_what_it_says() -> None:
    assert str(tt.heads(shared("falcon"))[0]).splitlines()[:2] == [
        "W_Q  10 x 140 x 14  gathered from h.0.self_attention.query_key_value.weight",
        "W_K  2 x 140 x 14   view of h.0.self_attention.query_key_value.weight",
    ]
