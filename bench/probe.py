"""Probes the models whose packings differ most and prints layout, rotary order and seconds: `python -m bench.probe [TYPE ...]`."""

from __future__ import annotations

import re
import sys
import time
from typing import Any

import torch
from tests.families_small import small
from torch import nn

from triptych.live.probe import Probed, probe, smallest

LIMIT = 2.0
NAMED: list[tuple[str, str, dict[str, Any]]] = [
    ("GPT-2", "gpt2", {}),
    ("GPT-NeoX", "gpt_neox", {}),
    ("BLOOM", "bloom", {}),
    ("Falcon (new)", "falcon", {"new_decoder_architecture": True, "num_attention_heads": 12, "num_kv_heads": 4, "hidden_size": 768}),
    ("Falcon (MQA)", "falcon", {"num_attention_heads": 12, "hidden_size": 768}),
    ("Falcon (MHA)", "falcon", {"multi_query": False, "num_attention_heads": 12, "hidden_size": 768}),
    ("CodeGen", "codegen", {"n_head": 12, "n_embd": 768, "rotary_dim": 32}),
    ("Phi-3", "phi3", {"num_attention_heads": 12, "num_key_value_heads": 4, "hidden_size": 768}),
    (
        "DBRX",
        "dbrx",
        {
            "d_model": 384,
            "n_heads": 12,
            "attn_config": {"kv_n_heads": 4, "clip_qkv": 8.0, "rope_theta": 1e4},
            "ffn_config": {"ffn_hidden_size": 64},
        },
    ),
    ("GPTBigCode (MQA)", "gpt_bigcode", {}),
    ("GPTBigCode (MHA)", "gpt_bigcode", {"multi_query": False}),
    ("Persimmon", "persimmon", {}),
    ("DeepSeek-V3", "deepseek_v3", {}),
    ("Qwen3-Next", "qwen3_next", {}),
    ("MiniMax", "minimax", {}),
    ("ModernBERT", "modernbert", {}),
    ("SAM", "sam_vision_model", {}),
    ("Qwen2-VL vision", "qwen2_vl_vision", {}),
    ("DeBERTa", "deberta", {}),
    ("LeViT", "levit", {}),
    ("Mamba-2", "mamba2", {}),
]


def shown(name: str, found: dict[str, Probed], seconds: float) -> None:
    print(f"{name:18} {seconds:5.2f} s" + ("" if seconds <= LIMIT else f"   more than {LIMIT} s"))
    seen = set()
    for module, probed in found.items():
        key = (re.sub(r"\d+", "", module), str(probed))
        if key not in seen:
            seen.add(key)
            print(f"    {module:46} {probed}")


def main(types: list[str]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    jobs: list[tuple[str, Any]] = [(name, (kind, sizes)) for name, kind, sizes in NAMED if not types or kind in types]
    if not types:
        jobs += [("ESMFold", small("esm")), ("MultiheadAttention", nn.MultiheadAttention(24, 3))]
    for name, job in jobs:
        if isinstance(job, nn.Module):
            model = job
        else:
            from transformers import AutoConfig

            model, _ = smallest(AutoConfig.for_model(job[0], **job[1]))
        start = time.perf_counter()
        found = probe(model) if name != "ESMFold" else probe(model, input_ids=torch.tensor([[5, 6, 7, 8]]))
        shown(name, found, time.perf_counter() - start)


if __name__ == "__main__":
    main(sys.argv[1:])
