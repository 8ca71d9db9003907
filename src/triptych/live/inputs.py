"""What to call a model with: a few tokens, the smallest image, a little sound."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

Call = tuple[tuple[Any, ...], dict[str, Any]]
TOKENS = 4


def inputs_of(model: nn.Module) -> list[Call]:
    """Calls to try, the likeliest first; on the device and, floating ones, in the dtype of the model's first floating parameter."""
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    return [(tuple(_as(like, x) for x in args), {key: _as(like, x) for key, x in kwargs.items()}) for args, kwargs in _calls(model)]


def _as(like: torch.Tensor | None, x: Any) -> Any:
    if like is None or not isinstance(x, torch.Tensor):
        return x
    return x.to(like.device, like.dtype if x.is_floating_point() else x.dtype)


def _calls(model: nn.Module) -> list[Call]:
    if isinstance(model, nn.MultiheadAttention):
        x = torch.randn(1, TOKENS, model.embed_dim) if model.batch_first else torch.randn(TOKENS, 1, model.embed_dim)
        sides = [x if n == model.embed_dim else x.new_ones(*x.shape[:-1], n) for n in (model.embed_dim, model.kdim, model.vdim)]
        return [(tuple(sides), {})]
    if hasattr(model, "config") and hasattr(model, "main_input_name"):
        from .tiny import transformers_inputs

        return transformers_inputs(model)
    return _guessed(model)


def _guessed(model: nn.Module) -> list[Call]:
    """For a module of unknown make: ids when an embedding comes first, else features, as many as the first projection takes."""
    calls: list[Call] = []
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            ids = torch.arange(TOKENS).view(1, -1) % module.num_embeddings
            calls.append(((ids,), {}))
            break
    for module in model.modules():
        width = getattr(module, "in_features", None) or getattr(module, "embed_dim", None)
        if width is None and isinstance(module, nn.LayerNorm):
            width = module.normalized_shape[-1]
        if isinstance(width, int):
            x = torch.randn(1, TOKENS, width)
            calls.append(((x,), {}))
            required = [
                p for p in inspect.signature(model.forward).parameters.values() if p.default is p.empty and p.kind < p.VAR_POSITIONAL
            ]
            if len(required) in (2, 3):
                calls.append(((x,) * len(required), {}))
            break
    return calls
