"""A small checkpoint with grouped heads, two layers of random numbers: something to divide among ranks (docs/sharding.md).

python examples/small_gqa.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, WIDTH, VOCAB = 12, 2, 8, 40, 96, 101


def main(folder: Path) -> None:
    random = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "lm_head.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(2):
        home = f"model.layers.{layer}."
        for part, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            shapes[f"{home}self_attn.{part}_proj.weight"] = (heads * HEAD_DIM, HIDDEN)
        shapes[f"{home}self_attn.o_proj.weight"] = (HIDDEN, HEADS * HEAD_DIM)
        shapes |= {f"{home}mlp.{part}_proj.weight": (WIDTH, HIDDEN) for part in ("gate", "up")}
        shapes |= {f"{home}mlp.down_proj.weight": (HIDDEN, WIDTH), f"{home}input_layernorm.weight": (HIDDEN,)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: random.standard_normal(shape).astype(np.float16) for name, shape in shapes.items()}, folder / "model.safetensors")
    config = {"model_type": "llama", "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM}
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": HIDDEN, "intermediate_size": WIDTH, "vocab_size": VOCAB}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
