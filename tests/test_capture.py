"""capture: what it gives is what the model's own attention received, as seen by hooks that share no code with it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from einops import rearrange
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import triptych as tt
from tests.attention_families import FAMILIES, INTERFACE, OWN_PRODUCTS, call, shared, small
from triptych.live.capture import Attention, Captured

transformers.logging.set_verbosity_error()

NORMED = {"qwen3", "gemma3_text", "olmo2", "qwen3_next", "persimmon"}
"""q and k are normalised between the projection and the attention."""
CHANGED = {"deepseek_v3", "sam_vision_model", "qwen2_vl_vision", "opt", "deberta"}
"""Before the attention tokens or pieces of a head are put together anew, or q is scaled, or q and v are given a bias of their own."""
Seen = list[tuple[str, Tensor, Tensor, Tensor]]


@pytest.fixture
def family_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., nn.Module]:
    """A shared model, for the time of a test with the attention asked for."""

    def found(name: str, attention: str) -> nn.Module:
        model = shared(name)
        tt.heads(model)
        for module in model.modules():
            if hasattr(module, "config"):
                monkeypatch.setattr(module.config, "_attn_implementation_internal", attention)
        return model

    return found


def ran(model: nn.Module, **inputs: Any) -> Captured:
    with torch.no_grad(), tt.capture(model) as acts:
        model(**(inputs or call(model)))
    return acts


def interface(model: nn.Module, patch: pytest.MonkeyPatch) -> Seen:
    """Module name, q, k, v of every call of the attention functions that transformers hands its models."""
    names = {module: name for name, module in model.named_modules()}
    seen: Seen = []

    def recording(function: Any) -> Any:
        def wrapped(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.append((names[module], q, k, v))
            return function(module, q, k, v, *args, **kwargs)

        return wrapped

    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    patch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", recording(ALL_ATTENTION_FUNCTIONS["sdpa"]))
    for home in {sys.modules[type(module).__module__] for module in model.modules()}:
        if hasattr(home, "eager_attention_forward"):
            patch.setattr(home, "eager_attention_forward", recording(home.eager_attention_forward))
    return seen


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", INTERFACE)
def test_after_is_what_the_attention_function_received(
    family: str, attention: str, family_of: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = family_of(family, attention)
    seen = interface(model, monkeypatch)
    acts = ran(model)
    assert len(acts.calls) == len(seen) > 0
    for found, (name, q, k, v) in zip(acts.calls, seen, strict=True):
        assert found.layer == name
        after = found.after
        for ours, theirs in ((after.q, q), (after.k, k), (after.v, v)):
            assert torch.equal(ours.transpose(1, 2), theirs)


class Products(TorchDispatchMode):
    """Both operands of every batched product, as the dispatcher sees them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("bmm", "baddbmm"):
            self.seen.append((args[-2], args[-1]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", [*OWN_PRODUCTS, "llama"])
def test_after_are_the_operands_of_the_products(family: str, family_of: Callable[..., nn.Module]) -> None:
    model = family_of(family, "eager")
    products = Products()
    with products:
        acts = ran(model)
    assert len(acts.calls) == 2
    seen = iter(products.seen)
    for found in acts.calls:
        q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in vars(found.after.expanded).values())
        assert any(torch.equal(a, q) and torch.equal(b, k.transpose(1, 2)) for a, b in seen if a.shape == q.shape)
        assert any(torch.equal(b, v) for a, b in seen if b.shape == v.shape)


@pytest.mark.parametrize("family", ["falcon", "falcon mqa", "llama", "sam_vision_model"])
def test_received_are_the_very_tensors_that_torch_is_given(
    family: str, family_of: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = family_of(family, "sdpa")
    seen: list[tuple[Tensor, ...]] = []
    function = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **kwargs: (seen.append(args[:3]), function(*args, **kwargs))[1])
    acts = ran(model)
    assert len(seen) == len(acts.calls) == 2
    for found, given in zip(acts.calls, seen, strict=True):
        assert all(ours is theirs for ours, theirs in zip(found.received, given, strict=True))
        for part, theirs in zip("qkv", given, strict=True):
            as_given = found.after if theirs.shape[1] == getattr(found.after, part).shape[2] else found.after.expanded
            assert torch.equal(getattr(as_given, part).transpose(1, 2), theirs)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in CHANGED])
def test_before_is_after_where_nothing_is_turned_or_normed(family: str) -> None:
    """v everywhere; q and k at the first token, where the rotary angle is 0."""
    for found in ran(shared(family)).calls:
        before, after = found.before, found.after
        assert torch.equal(before.v, after.v)
        if family not in NORMED:
            assert torch.equal(before.q[:, 0], after.q[:, 0]) and torch.equal(before.k[:, 0], after.k[:, 0])


@pytest.mark.parametrize(
    ("family", "pattern"),
    [("gpt_neox", "b n (h x d) -> x b n h d"), ("gpt2", "b n (x h d) -> x b n h d"), ("bloom", "b n (h x d) -> x b n h d")],
)
def test_before_is_the_projection_as_einops_cuts_it(family: str, pattern: str) -> None:
    model = small(family)
    outputs: list[Tensor] = []
    for name, module in model.named_modules():
        if name.endswith(("query_key_value", "c_attn")):
            module.register_forward_hook(lambda module, args, output: outputs.append(output))
    acts = ran(model)
    heads = acts[0].before.q.shape[2]
    for found, output in zip(acts.calls, outputs[-2:], strict=True):
        for ours, theirs in zip(vars(found.before).values(), rearrange(output, pattern, x=3, h=heads), strict=True):
            assert torch.equal(ours, theirs)
            assert ours.untyped_storage().data_ptr() == output.untyped_storage().data_ptr(), "views"


def test_before_of_codegen_and_of_grouped_rows() -> None:
    hooked: list[Tensor] = []
    model = small("codegen")
    model.h[0].attn.qkv_proj.register_forward_hook(lambda module, args, output: hooked.append(output))
    found = ran(model)[0].before
    q, v, k = rearrange(hooked[-1], "b n (m x i d) -> x b n (m i) d", m=4, x=3, d=14)
    assert torch.equal(found.q, q) and torch.equal(found.k, k) and torch.equal(found.v, v)
    model = small("falcon")
    model.h[1].self_attention.query_key_value.register_forward_hook(lambda module, args, output: hooked.append(output))
    grouped = rearrange(ran(model)[1].before.expanded.k, "b n (g r) d -> r b n g d", r=5)
    assert all(torch.equal(k, rearrange(hooked[-1], "b n (g x d) -> x b n g d", x=7, d=14)[5]) for k in grouped)


def test_before_of_latent_attention() -> None:
    """q is its two pieces side by side; k is what its projection makes, without the rotary piece that all heads share."""
    found = ran(shared("deepseek_v3"))[0]
    assert torch.equal(found.before.q[..., :7], found.after.q[..., :7])
    assert torch.equal(found.part("nope"), found.before.q[..., :7])
    assert torch.equal(found.before.k.reshape(found.after.k[..., :7].shape), found.after.k[..., :7])
    with pytest.raises(tt.TraceError, match="no projection makes gate"):
        found.part("gate")


def test_z_is_what_the_output_projection_is_given() -> None:
    for family in ("llama", "bloom", "gpt2"):
        model = small(family)
        given: list[Tensor] = []
        for name, module in model.named_modules():
            if name.endswith(("o_proj", "attn.c_proj", "dense")):
                module.register_forward_pre_hook(lambda module, args, given=given: given.append(args[0]))
        acts = ran(model)
        for found, theirs in zip(acts.calls, given[-2:], strict=True):
            assert torch.equal(found.z.flatten(2), theirs.reshape(found.z.flatten(2).shape))


def test_the_run_is_the_same_and_nothing_stays() -> None:
    for family in ("gpt2", "llama", "bloom", "t5"):
        model = shared(family)
        tt.heads(model)
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        with torch.no_grad():
            plain = model(**call(model))[0]
            with tt.capture(model):
                watched = model(**call(model))[0]
        assert torch.equal(plain, watched)
        assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


# generation


@pytest.mark.parametrize("cache", [None, "static"])
def test_with_a_cache_k_and_v_are_of_all_tokens(cache: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.AutoConfig.for_model("llama", **FAMILIES["llama"])
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    tt.heads(model)
    seen = interface(model, monkeypatch)
    copies: list[tuple[Tensor, ...]] = []
    handle = model.model.layers[0].self_attn.register_forward_hook(lambda *_: copies.append(tuple(t.clone() for t in seen[-1][1:])))
    with torch.no_grad(), tt.capture(model) as acts:
        model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=4, do_sample=False, cache_implementation=cache, pad_token_id=0)
    handle.remove()
    first = [found for found in acts.calls if found.layer.endswith("0.self_attn")]
    assert len(first) == len(copies) == 4 and acts[0] is first[-1]
    for found, received in zip(first, copies, strict=True):
        for ours, theirs in zip(vars(found.after).values(), received, strict=True):
            assert torch.equal(ours.transpose(1, 2), theirs[:, :, : ours.shape[1]]), "a static cache is written over at every step"
    assert first[1].before.k.shape == (1, 1, 2, 14) and first[1].after.k.shape[1] > 1


# attention of torch


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("weights", [True, False])
def test_multihead_attention_of_torch(batch_first: bool, weights: bool) -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(15, 3, batch_first=batch_first).eval()
    x, y = torch.randn(2, 7, 15), torch.randn(2, 11, 15)
    w, b = module.in_proj_weight.view(3, 3, 5, 15), module.in_proj_bias.view(3, 3, 5)
    for keys in (x, y):
        given = [t if batch_first else t.transpose(0, 1) for t in (x, keys, keys)]
        with torch.no_grad(), tt.capture(module) as acts:
            module(*given, need_weights=weights)
        assert acts[0].layer == ""
        for i, (source, ours) in enumerate(zip((x, keys, keys), vars(acts[0].before).values(), strict=True)):
            torch.testing.assert_close(ours, torch.einsum("bnm,hdm->bnhd", source, w[i]) + b[i])
        torch.testing.assert_close(acts[0].after.v, acts[0].before.v)


def test_an_encoder_of_torch_takes_no_fast_path() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(15, 3, 11, batch_first=True), 2, enable_nested_tensor=False).eval()
    with torch.no_grad(), tt.capture(model) as acts:
        model(torch.randn(2, 7, 15))
    assert list(acts) == ["layers.0.self_attn", "layers.1.self_attn"]
    assert str(acts).splitlines()[0] == "layers.0.self_attn  q 2 x 7 x 3 x 5  k 2 x 7 x 3 x 5  v 2 x 7 x 3 x 5"


# adapters


def test_a_query_with_lora_is_that_with_lora() -> None:
    model = peft.get_peft_model(small("llama"), peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    acts = ran(model, input_ids=torch.tensor([[3, 4, 5]]))
    assert acts[0].layer.endswith("layers.0.self_attn")
    assert torch.equal(acts[0].before.v, acts[0].after.v)
    assert torch.equal(acts[0].before.q[:, 0], acts[0].after.q[:, 0])


def test_an_unfused_model_gives_the_same() -> None:
    model = small("gpt_neox")
    fused = ran(model)
    tt.unfuse_(model)
    apart = ran(model)
    assert list(fused) == list(apart)
    torch.testing.assert_close(apart[1].before.q, fused[1].before.q)


# the context


class Attend(nn.Module):
    """A layer that writes over its own query, as some rotary code does."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(12, 36)
        self.out = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, 3, 4).unbind(2)
        q[..., :2] *= 2
        out: Tensor = self.out(F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2).flatten(2))
        return out


def test_what_the_model_writes_over_is_kept() -> None:
    model, x = Attend().eval(), torch.randn(2, 5, 12)
    with torch.no_grad(), tt.capture(model) as acts:
        model(x)
    projected = model.qkv(x).detach().view(2, 5, 3, 3, 4)
    assert torch.equal(acts[0].before.q, projected[:, :, 0])
    assert torch.equal(acts[0].after.q[..., :2], projected[:, :, 0, :, :2] * 2)


def test_what_is_written_over_later_is_refused() -> None:
    model = shared("gpt2")
    acts = ran(model)
    acts[0].received[0].zero_()
    with pytest.raises(tt.TraceError, match="written over since"):
        _ = acts[0].after


def test_gradients_can_be_asked_of_what_was_received() -> None:
    model = shared("llama")
    with tt.capture(model) as acts:
        loss = model(**call(model))[0].square().sum()
    q, k, v = acts[0].received
    assert all(g is not None and g.abs().sum() > 0 for g in torch.autograd.grad(loss, (q, k, v)))


def test_nested_on_one_model_and_on_a_part_of_it() -> None:
    model = shared("gpt2")
    with torch.no_grad(), tt.capture(model) as outer:
        model(**call(model))
        with tt.capture(model) as inner, tt.capture(model.h[1]) as part:
            model(**call(model))
    assert (len(outer.calls), len(inner.calls), len(part.calls)) == (4, 2, 1)
    assert torch.equal(part[0].after.q, inner[1].after.q) and list(part) == ["attn"]


def test_an_error_of_the_model_leaves_no_trace() -> None:
    model = shared("gpt2")
    tt.heads(model)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]

    def fails(*args: object) -> None:
        raise KeyError("inside")

    with torch.no_grad(), tt.capture(model) as acts:
        handle = model.h[1].mlp.register_forward_pre_hook(fails)
        with pytest.raises(KeyError, match="inside"):
            model(**call(model))
        handle.remove()
        model(**call(model))
    assert [found.layer for found in acts.calls] == ["h.0.attn", "h.1.attn", "h.0.attn", "h.1.attn"]
    with pytest.raises(KeyError, match="outside"), tt.capture(model):
        raise KeyError("outside")
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


def test_only_this_thread_is_watched() -> None:
    model = shared("gpt2")
    with torch.no_grad(), tt.capture(model) as acts:
        other = threading.Thread(target=lambda: model(**call(model)))
        other.start()
        other.join()
        assert acts.calls == []
        model(**call(model))
    assert len(acts.calls) == 2


# refusals


def test_no_such_layer() -> None:
    acts = ran(shared("gpt2"))
    with pytest.raises(tt.TraceError, match=r"did you mean 'h.0.attn'"):
        _ = acts["h.0.atn"]
    with pytest.raises(tt.TraceError, match="no such layer"):
        _ = acts[2]
    assert isinstance(acts["h.1.attn"], Attention) and acts[-1] is acts["h.1.attn"]


def test_attention_that_is_not_seen() -> None:
    model = shared("gpt2")
    with tt.capture(model) as acts:
        pass
    assert "h.0.attn" not in acts and len(acts) == 0
    with pytest.raises(tt.TraceError, match="no attention call was seen"):
        _ = acts["h.0.attn"]


def test_compiled_models_and_models_without_attention() -> None:
    with pytest.raises(tt.TraceError, match="compiled code cannot be watched"), tt.capture(torch.compile(shared("gpt2"))):
        pass
    with pytest.raises(tt.TraceError, match="no attention is seen"), tt.capture(nn.Linear(3, 5)):
        pass
