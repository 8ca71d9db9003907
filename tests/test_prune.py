"""prune_heads_: the pruned model is the model with the outputs of those heads set to zero; what cannot be pruned stays as it was."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import triptych as tt
from tests.attention_families import FAMILIES, call, small

transformers.logging.set_verbosity_error()

CLOSING = {"c_proj", "dense", "o_proj", "out_proj", "Wo", "proj"}
PRUNED: dict[str, tuple[list[int], list[int]]] = {
    "gpt2": ([1, 3], [4]),
    "gpt_neox": ([1], [0, 2]),
    "falcon": ([0, 1, 2, 3, 4], []),
    "falcon mqa": ([1], [2]),
    "phi3": ([5, 6, 7, 8, 9], [0, 1, 2, 3, 4]),
    "gpt_bigcode": ([1, 3], [4]),
    "persimmon": ([1], [0]),
    "modernbert": ([2], [0, 1]),
    "llama": ([5, 6, 7, 8, 9], [3, 1, 6, 8]),
    "qwen3": ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9]),
    "gemma3_text": ([0, 1, 2, 3, 4], []),
    "deepseek_v3": ([1, 3], [4]),
    "opt": ([1, 3], [4]),
    "bert": ([1], [0, 2]),
    "vit": ([1], [0, 2]),
    "sam_vision_model": ([1], [0]),
    "gptj": ([1], [0, 3]),
}
"""Heads of the first and of the second layer. llama's second layer loses two query heads of each kv head."""
SINGLE = {"deepseek_v3", "gptj"}
"""Experts multiply, or attention is done, in float32 alone."""
REFUSED = {
    "bloom": "size of the tensor",
    "mpt": "size of tensor",
    "codegen": "shape",
    "deberta": "shape",
    "olmo2": "size of tensor",
    "t5": "size of tensor",
}
"""Biases for all heads from elsewhere, rank blocks of equal size, norms over all heads."""


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found = model(**inputs(model))
    return found[0]  # type: ignore[no-any-return]


def inputs(model: nn.Module) -> dict[str, Any]:
    dtype = next(model.parameters()).dtype
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in call(model).items()}


def zeroed(model: nn.Module, heads: dict[str, Iterable[int]], dims: int) -> Tensor:
    """The output when the inputs of the output projections are zero where those heads write."""
    handles = []
    for layer, numbers in heads.items():
        home = layer.removesuffix(".self") if layer.endswith("attention.self") else layer
        names = [n for n, m in model.named_modules() if n.startswith(home + ".") and n.rpartition(".")[2] in CLOSING]
        columns = [head * dims + dim for head in numbers for dim in range(dims)]

        def zero(module: nn.Module, args: tuple[Tensor], columns: list[int] = columns) -> tuple[Tensor]:
            return (args[0].index_fill(-1, torch.tensor(columns, dtype=torch.long), 0),)

        assert len(names) == 1, names
        handles.append(model.get_submodule(names[0]).register_forward_pre_hook(zero))
    try:
        return output(model)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("family", PRUNED)
def test_a_pruned_model_is_the_model_with_those_heads_silent(family: str) -> None:
    model = small(family) if family in SINGLE else small(family).double()
    layers = tt.heads(model)
    heads = {name: numbers for name, numbers in zip(layers, PRUNED[family], strict=True) if numbers}
    dims, count = layers[0].W_O.shape[1], len(layers[0].W_Q)
    wanted, plain = zeroed(model, heads, dims), output(model)
    kept = tt.prune_heads_(model, heads)
    assert kept == {name: tuple(head for head in range(count) if head not in numbers) for name, numbers in heads.items()}
    near = 1e-4 if family in SINGLE else 1e-9
    torch.testing.assert_close(output(model), wanted, rtol=near, atol=near)
    assert not torch.allclose(plain, wanted, rtol=1e-3, atol=1e-3), "those heads did something"
    pruned = tt.heads(model)
    for name in kept:
        assert len(pruned[name].W_Q) == len(pruned[name].W_O) == len(kept[name])


@pytest.mark.parametrize("family", REFUSED)
def test_a_model_that_cannot_do_without_stays_as_it_was(family: str) -> None:
    model = small(family)
    parameters = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    attributes = [{k: v for k, v in vars(m).items() if isinstance(v, (int, float, str))} for m in model.modules()]
    with pytest.raises(tt.PlanError, match="cannot do without") as error:
        tt.prune_heads_(model, {0: range(5) if family == "olmo2" else [1]})
    assert REFUSED[family] in str(error.value.fields["found"])
    assert all(parameters[name][0] is p and torch.equal(parameters[name][1], p) for name, p in model.named_parameters())
    assert attributes == [{k: v for k, v in vars(m).items() if isinstance(v, (int, float, str))} for m in model.modules()]


def test_attention_of_torch_is_refused() -> None:
    with pytest.raises(tt.PlanError, match="cannot do without"):
        tt.prune_heads_(nn.MultiheadAttention(15, 3), {0: [1]})


def test_parameters_stay_the_same_objects() -> None:
    model = small("gpt2")
    c_attn = model.h[0].attn.c_attn
    weight, bias = c_attn.weight, c_attn.bias
    bias.requires_grad_(False)
    model(**call(model))[0].sum().backward()
    grad = weight.grad.clone()
    tt.prune_heads_(model, {"h.0.attn": [0]})
    assert c_attn.weight is weight and c_attn.bias is bias and not bias.requires_grad
    assert weight.shape == (35, 84) and torch.equal(weight.grad, grad.view(35, 3, 5, 7)[:, :, 1:].flatten(1))
    model(**call(model))[0].sum().backward()


def test_the_config_of_the_model_stays() -> None:
    model = small("phi3")
    tt.prune_heads_(model, {0: [0, 1, 2, 3, 4]})
    assert model.config.num_attention_heads == 10 == model.layers[1].self_attn.config.num_attention_heads
    assert model.layers[0].self_attn.config.num_attention_heads == 5 and model.layers[0].self_attn.config.num_key_value_heads == 1


def test_pruning_twice_and_nothing() -> None:
    model = small("gpt2").double()
    wanted = zeroed(model, {"h.0.attn": [1, 4]}, 7)
    assert tt.prune_heads_(model, {0: []}) == {}
    assert tt.prune_heads_(model, {0: [1]}) == {"h.0.attn": (0, 2, 3, 4)}
    assert tt.prune_heads_(model, {0: [3]}) == {"h.0.attn": (0, 1, 2)}
    torch.testing.assert_close(output(model), wanted)


def test_short_types() -> None:
    model = small("llama").bfloat16()
    tt.prune_heads_(model, {0: range(5)})
    assert model.layers[0].self_attn.q_proj.weight.shape == (70, 80) and model.layers[0].self_attn.q_proj.out_features == 70


def test_what_would_be_no_attention() -> None:
    model = small("llama")
    with pytest.raises(tt.PlanError, match="equally many query heads") as error:
        tt.prune_heads_(model, {0: [1]})
    assert error.value.fields["found"] == "left are 4 of kv head 0, 5 of kv head 1"
    with pytest.raises(tt.PlanError, match="equally many query heads"):
        tt.prune_heads_(model, {0: range(10)})
    with pytest.raises(tt.PlanError, match="no such heads"):
        tt.prune_heads_(model, {1: [10]})
    with pytest.raises(tt.TraceError, match="no such layer"):
        tt.prune_heads_(model, {"layers.2.self_attn": [1]})


def test_every_family_is_pruned_or_refused() -> None:
    assert set(FAMILIES) - set(PRUNED) - set(REFUSED) == {"minimax", "qwen3_next", "qwen2_vl_vision"}
