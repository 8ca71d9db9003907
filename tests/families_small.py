"""Small models, written out, of the types that `tt.probe` makes no small one of by itself."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import transformers

from tests.families_modules import Alone
from triptych.live.tiny import classes

BASE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MAMBA2 = {**BASE, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_n_groups": 2, "mamba_d_state": 24}
CONVOLUTION = {**BASE, "layer_types": ["conv", "full_attention"]}
SHARED = {**BASE, "num_key_value_heads": 4, "attention_hidden_size": 128, "attention_head_dim": 32}
STRUCTURE = {
    "sequence_dim": 24,
    "pairwise_dim": 8,
    "ipa_dim": 4,
    "num_heads_ipa": 3,
    "num_blocks": 1,
    "resnet_dim": 8,
    "num_qk_points": 2,
    "num_v_points": 3,
}
TRUNK = {
    "sequence_head_width": 4,
    "sequence_state_dim": 24,
    "pairwise_head_width": 4,
    "pairwise_state_dim": 8,
    "num_blocks": 1,
    "max_recycles": 1,
    "structure_module": STRUCTURE,
}
SMALL: dict[str, dict[str, Any]] = {
    "bamba": {**MAMBA2, "attn_layer_indices": [1]},
    "granitemoehybrid": {**MAMBA2, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 64},
    "falcon_h1": {**MAMBA2, "head_dim": 16, "mamba_d_ssm": 128},
    "zamba": {
        **SHARED,
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "n_mamba_heads": 2,
        "mamba_d_state": 8,
        "mamba_dt_rank": 6,
    },
    "zamba2": {
        **SHARED,
        "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "hybrid", "mamba"],
        "hybrid_layer_ids": [1],
        "n_mamba_heads": 8,
        "mamba_headdim": 16,
        "mamba_d_state": 24,
        "mamba_ngroups": 2,
        "adapter_rank": 8,
    },
    "bailing_hybrid": {
        **BASE,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
        "mlp_layer_types": ["dense", "dense"],
        "kv_lora_rank": 40,
        "q_lora_rank": None,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 24,
        "v_head_dim": 20,
        "linear_head_dim": 16,
        "linear_num_heads": 4,
    },
    "hrm_text": {**BASE, "num_key_value_heads": 4, "head_dim": 16},
    "lfm2": CONVOLUTION,
    "lfm2_moe": {**CONVOLUTION, "num_dense_layers": 2, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
    "esm": {
        **BASE,
        "hidden_size": 24,
        "num_attention_heads": 3,
        "num_hidden_layers": 1,
        "vocab_size": 33,
        "is_folding_model": True,
        "pad_token_id": 1,
        "mask_token_id": 32,
        "position_embedding_type": "rotary",
        "esmfold_config": {"trunk": TRUNK, "fp16_esm": False, "lddt_head_hid_dim": 8},
    },
    "bridgetower_vision_model": {"hidden_size": 128, "num_hidden_layers": 2, "image_size": 32, "patch_size": 16},
    "xlstm": {**BASE, "num_heads": 4, "num_blocks": 2, "weight_mode": "fused"},
    "qwen4_exp_text": {
        **BASE,
        "head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 6,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 24,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "levit": {
        "image_size": 64,
        "hidden_sizes": [48, 60, 72],
        "num_attention_heads": [3, 5, 6],
        "key_dim": [8, 12, 4],
        "depths": [1, 1, 1],
        "attention_ratio": [2, 2, 3],
    },
    "florence_vision": {
        "image_size": 64,
        "depths": [1, 1, 1, 1],
        "embed_dim": [24, 40, 60, 72],
        "num_heads": [3, 4, 5, 6],
        "num_groups": [4, 5, 6, 3],
        "window_size": 2,
    },
    "hiera": {
        "image_size": [64, 64],
        "embed_dim": 12,
        "num_heads": [1, 2, 3, 4],
        "depths": [1, 1, 1, 1],
        "decoder_hidden_size": 40,
        "decoder_depth": 1,
        "decoder_num_heads": 5,
    },
    "focalnet": {"image_size": 64, "embed_dim": 12, "depths": [1, 1, 1], "hidden_sizes": [12, 24, 48], "focal_levels": [3, 2, 2]}
    | {"focal_windows": [3, 3, 3]},
    "mobilevitv2": {"image_size": 64, "base_attn_unit_dims": [16, 24, 32], "n_attn_blocks": [1, 1, 1], "width_multiplier": 0.25},
}
SMALL["rf_detr"] = {
    "d_model": 48,
    "decoder_self_attention_heads": 3,
    "decoder_cross_attention_heads": 4,
    "decoder_layers": 1,
    "decoder_ffn_dim": 40,
    "num_queries": 5,
    "group_detr": 1,
    "backbone_config": {
        "model_type": "rf_detr_dinov2",
        "hidden_size": 24,
        "num_attention_heads": 3,
        "num_hidden_layers": 2,
        "image_size": 56,
        "num_windows": 1,
        "window_block_indexes": [],
        "out_features": ["stage1", "stage2"],
    },
}
EVOLLA = {
    **BASE,
    "num_hidden_layers": 2,
    "aligner_num_add_layers": 1,
    "resampler_depth": 1,
    "resampler_dim_head": 8,
    "resampler_heads": 3,
    "resampler_num_latents": 5,
    "protein_encoder_config": {"hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 40, "num_hidden_layers": 1},
}
SMALL |= {"evolla": EVOLLA, "EvollaModel": EVOLLA}
CLASSES = {
    "esm": "EsmForProteinFolding",
    "pp_ocrv5_mobile_rec": "PPOCRV5MobileRecEncoderWithSVTR",
    "pp_ocrv5_server_rec": "PPOCRV5ServerRecEncoderWithSVTR",
    "pp_ocrv6_small_rec": "PPOCRV6SmallRecEncoderWithSVTR",
}
"""The class that holds the tensors, where it is not the base model."""


def small(kind: str, overrides: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """A model of a type that is written out here, or of a class that `overrides` name as `architecture`, else None."""
    wanted = overrides.get("architecture", CLASSES.get(kind))
    if kind not in SMALL and wanted is None:
        return None
    config = transformers.AutoConfig.for_model(kind, **SMALL.get(kind, {}) | {k: v for k, v in overrides.items() if k != "architecture"})
    found = classes(config)
    return next((cls for cls in found if cls.__name__ == wanted), found[0])(config).eval()


def inputs(kind: str, model: Any) -> dict[str, Any]:
    """What to call it with, when `tt.probe` cannot know."""
    if isinstance(model, Alone):
        return model.call
    if kind in ("evolla", "EvollaModel"):
        ids = torch.arange(5, 11).view(1, -1)
        return {"input_ids": ids, "protein_input_ids": ids, "protein_attention_mask": torch.ones_like(ids)}
    if getattr(model.config, "add_cross_attention", False):
        ids, other = torch.arange(5, 11).view(1, -1), torch.randn(1, 7, model.config.hidden_size)
        return {"input_ids": ids, "encoder_hidden_states": other, "use_cache": False}
    if not type(model).__name__.endswith("EncoderWithSVTR"):
        return {}
    first = next(p for p in model.parameters() if p.dim() == 4)
    return {"hidden_states": torch.randn(1, first.shape[1], 1, 8)}
