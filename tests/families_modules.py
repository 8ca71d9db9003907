"""Modules that hold a fused projection and run it, built alone where the whole model cannot be made or is not made of them."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn

TOKENS = 5


class Held(NamedTuple):
    """A module of a type: where the model has it, its class, keys of the config, and what its forward is given.

    `made_of` names the sub-config that the class is made of, "" the config itself.
    """

    path: str
    module: str
    keys: dict[str, Any]
    call: dict[str, Any]
    made_of: str = ""


class Alone(nn.Module):
    """One module at the place that it has in its model; calling this calls it."""

    def __init__(self, path: str, module: nn.Module, config: Any, call: dict[str, Any]) -> None:
        super().__init__()
        self.config, self.call, self.path = config, call, path
        *homes, last = path.split(".")
        home: nn.Module = self
        for name in homes:
            home.add_module(name, nn.Module())
            home = home.get_submodule(name)
        home.add_module(last, module)

    def forward(self, **kwargs: Any) -> Any:
        return self.get_submodule(self.path)(**kwargs)


def _some(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


MODULES = {
    "idefics2_vision": Held(
        "head",
        "idefics2.Idefics2MultiheadAttentionPoolingHead",
        {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 40},
        {"hidden_state": _some(1, TOKENS, 24)},
    ),
    "layoutlmv2": Held(
        "encoder",
        "layoutlmv2.LayoutLMv2Encoder",
        {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 40, "num_hidden_layers": 1, "fast_qkv": True},
        {
            "hidden_states": _some(1, TOKENS, 24),
            "attention_mask": torch.zeros(1, 1, 1, TOKENS),
            "bbox": torch.arange(TOKENS * 4).view(1, TOKENS, 4),
            "position_ids": torch.arange(TOKENS).view(1, -1),
        },
    ),
    "mask2former": Held(
        "transformer_module.decoder.layers.0",
        "mask2former.Mask2FormerMaskedAttentionDecoderLayer",
        {"hidden_dim": 24, "num_attention_heads": 3, "dim_feedforward": 40},
        {
            "hidden_states": _some(TOKENS, 1, 24),
            "level_index": 0,
            "position_embeddings": [_some(7, 1, 24)],
            "query_position_embeddings": _some(TOKENS, 1, 24),
            "encoder_hidden_states": [_some(7, 1, 24)],
        },
    ),
    "pp_chart2table_vision": Held(
        "vision_tower",
        "got_ocr2.GotOcr2VisionEncoder",
        {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2, "image_size": 64, "output_channels": 8, "mlp_dim": 40}
        | {"window_size": 2, "global_attn_indexes": [1]},
        {"pixel_values": _some(1, 3, 64, 64)},
    ),
    "pp_doclayout_v2": Held(
        "reading_order",
        "pp_doclayout_v2.PPDocLayoutV2ReadingOrder",
        {},
        {
            "boxes": 100.0 * torch.arange(1, 5).expand(1, TOKENS, 4) + torch.arange(TOKENS).view(1, -1, 1),
            "labels": torch.arange(TOKENS).view(1, -1),
            "mask": torch.ones(1, TOKENS, dtype=torch.bool),
        },
        "reading_order_config",
    ),
    "pp_doclayout_v3": Held(
        "decoder_global_pointer",
        "pp_doclayout_v3.PPDocLayoutV3GlobalPointer",
        {"d_model": 24, "global_pointer_head_size": 16},
        {"inputs": _some(1, TOKENS, 24)},
    ),
    "xlstm": Held(
        "blocks.0",
        "xlstm.xLSTMBlock",
        {"hidden_size": 96, "num_heads": 4, "num_hidden_layers": 1, "weight_mode": "fused", "qk_dim_factor": 0.5, "v_dim_factor": 1.0},
        {"x": _some(1, TOKENS, 96)},
    ),
}


def alone(kind: str) -> Alone | None:
    """The module of a type that is run by itself, or None where the model is."""
    held = MODULES.get(kind)
    if held is None:
        return None
    package, name = held.module.split(".")
    cls = getattr(importlib.import_module(f"transformers.models.{package}.modeling_{package}"), name)
    config = transformers.AutoConfig.for_model(kind, **held.keys)
    torch.manual_seed(0)
    module = cls(getattr(config, held.made_of) if held.made_of else config)
    for parameter in module.parameters():  # what a model would initialise
        nn.init.normal_(parameter, std=0.2)
    return Alone(held.path, module, config, held.call).eval()
