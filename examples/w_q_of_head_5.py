"""W_Q of head 5 of any model: one line, whatever the order of the rows in its fused projection.

The models are small and random; with weights of your own the line is the same: `tt.heads(model)[layer].W_Q[5]`.
"""

from __future__ import annotations

import torch
import transformers
from torch import nn

import triptych as tt

CONFIGS = {
    "gpt2": {"n_embd": 56, "n_head": 8, "n_layer": 1},
    "gpt_neox": {"hidden_size": 56, "num_attention_heads": 8},
    "falcon": {"hidden_size": 120, "num_attention_heads": 10, "num_kv_heads": 2, "new_decoder_architecture": True},
    "codegen": {"n_embd": 56, "n_head": 8, "n_layer": 1, "rotary_dim": 4},
    "llama": {"hidden_size": 80, "num_attention_heads": 10, "num_key_value_heads": 2},
}


def model_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2, "num_hidden_layers": 1, **CONFIGS[kind]}
    made: nn.Module = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **sizes))
    return made.eval()


def main() -> None:
    transformers.logging.set_verbosity_error()
    for kind in CONFIGS:
        model = model_of(kind)
        layer = tt.heads(model)[0]
        w_q = layer.W_Q[5]
        with torch.no_grad(), tt.capture(model) as acts:
            model(input_ids=torch.tensor([[3, 5, 8, 13]]))
        fused = next(iter(tt.probe(model).values()), None)
        rows = f"{fused.layout}" if fused is not None and fused.layout is not None else "three projections"
        query = ", ".join(f"{x:+.2f}" for x in acts[0].before.q[0, 0, 5, :3].tolist())
        kind_of = "view" if layer.shares("W_Q") else "gathered"
        print(f"{kind:9} {rows:18} W_Q[5] {tuple(w_q.shape)!s:10} {kind_of:9} query of head 5: {query}, ...")


if __name__ == "__main__":
    main()
