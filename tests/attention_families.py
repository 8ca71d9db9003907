"""Small models of many families, with heads, kv heads, their ratio, head dims, batch and tokens all different."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers
from torch import nn

from triptych.live.inputs import inputs_of
from triptych.live.tiny import classes

BATCH, TOKENS = 6, 9
TEXT = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_hidden_layers": 2, "max_position_embeddings": 37}
MHA = {"hidden_size": 42, "num_attention_heads": 3, "intermediate_size": 31}
GQA = {"hidden_size": 80, "num_attention_heads": 10, "num_key_value_heads": 2, "intermediate_size": 32, "head_dim": 14}
"""10 query heads, 2 kv heads, ratio 5, head dim 14."""
GPT = {"n_embd": 35, "n_head": 5, "n_layer": 2, "vocab_size": 61, "n_positions": 37, "bos_token_id": 1, "eos_token_id": 2}
VISION = {"hidden_size": 33, "num_attention_heads": 3, "num_hidden_layers": 2, "image_size": 32, "patch_size": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "shared_expert_intermediate_size": 20}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_key_head_dim": 5, "linear_value_head_dim": 7}
LATENT = {
    "hidden_size": 48,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 7,
    "qk_rope_head_dim": 4,
    "v_head_dim": 13,
    "intermediate_size": 31,
    "moe_intermediate_size": 20,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": GPT,
    "gpt_neox": {**TEXT, **MHA},
    "falcon": {**TEXT, "hidden_size": 140, "num_attention_heads": 10, "num_kv_heads": 2, "new_decoder_architecture": True},
    "falcon mqa": {**TEXT, "hidden_size": 42, "num_attention_heads": 3, "multi_query": True},
    "phi3": {**TEXT, **GQA, "hidden_size": 140},
    "gpt_bigcode": GPT,
    "persimmon": {**TEXT, **MHA, "hidden_size": 60},
    "modernbert": {**TEXT, **MHA, "cls_token_id": 1, "sep_token_id": 2},
    "minimax": {**TEXT, **GQA, "num_local_experts": 2, "block_size": 4, "layer_types": ["full_attention", "full_attention"]},
    "llama": {**TEXT, **GQA},
    "qwen3": {**TEXT, **GQA},
    "gemma3_text": {**TEXT, **GQA},
    "olmo2": {**TEXT, **GQA, "hidden_size": 140},
    "qwen3_next": {**TEXT, **GQA, **EXPERTS, **LINEAR, "layer_types": ["linear_attention", "full_attention"]},
    "deepseek_v3": {**TEXT, **LATENT},
    "opt": {**TEXT, "hidden_size": 35, "word_embed_proj_dim": 35, "num_attention_heads": 5, "ffn_dim": 31},
    "bert": {**TEXT, **MHA, "hidden_size": 33},
    "t5": {"vocab_size": 61, "d_model": 35, "d_kv": 7, "num_heads": 5, "d_ff": 31, "num_layers": 2, "decoder_start_token_id": 0},
    "vit": {**VISION, "intermediate_size": 31},
    "sam_vision_model": {**VISION, "window_size": 2, "global_attn_indexes": [1], "mlp_dim": 30, "output_channels": 12},
    "qwen2_vl_vision": {"depth": 2, "embed_dim": 36, "hidden_size": 36, "num_heads": 3, "patch_size": 4},
    "bloom": {"hidden_size": 35, "n_head": 5, "n_layer": 2, "vocab_size": 61},
    "codegen": {**GPT, "n_embd": 112, "n_head": 8, "rotary_dim": 6},
    "gptj": {**GPT, "n_embd": 56, "n_head": 4, "rotary_dim": 6},
    "mpt": {"d_model": 44, "n_heads": 4, "n_layers": 2, "vocab_size": 61, "max_seq_len": 37},
    "deberta": {**TEXT, **MHA, "hidden_size": 33, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 9},
}
OWN_PRODUCTS = ("falcon", "falcon mqa", "bloom", "codegen", "gptj", "mpt", "deberta")
"""Families that multiply by themselves, or call torch, and none of the attention functions of transformers."""
INTERFACE = tuple(name for name in FAMILIES if name not in (*OWN_PRODUCTS, "sam_vision_model"))


@functools.cache
def shared(name: str) -> nn.Module:
    """One model for all tests that leave it as it is: what its rows are is found once."""
    return small(name)


def small(name: str) -> nn.Module:
    """A model with random weights."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name.split()[0], **FAMILIES[name])
    model = classes(config)[0]._from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)  # biases are not zero, and norms not one
    return model


def call(model: nn.Module) -> dict[str, Any]:
    """What to call it with, the same each time: several sequences for those that take ids."""
    torch.manual_seed(0)
    _, found = inputs_of(model)[0]
    ids = torch.randint(3, 61, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    return {name: ids if name.endswith("input_ids") else value for name, value in found.items()}
