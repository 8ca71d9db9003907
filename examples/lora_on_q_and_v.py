"""LoRA on q and v alone, of a model that keeps q, k and v in one projection.

PEFT adapts modules, and here q is none: it is 16 of every 48 rows of `query_key_value`. `tt.unfuse_` makes modules of q, k and v, and the
model's own code runs on. After training the adapter is merged, and `tt.undo` puts the projection back as any program expects it.
"""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel

import triptych as tt

NAME = "gpt_neox.layers.0.attention.query_key_value"


def model() -> PreTrainedModel:
    torch.manual_seed(0)
    small = GPTNeoXConfig(vocab_size=97, hidden_size=48, num_attention_heads=3, num_hidden_layers=2, intermediate_size=64)
    return GPTNeoXForCausalLM(small)


def train(adapted: torch.nn.Module, steps: int) -> Tensor:
    tokens = torch.arange(40).view(2, 20)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.02)
    for _ in range(steps):
        loss: Tensor = adapted(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.detach()


def moved(change: Tensor, found: tt.Probed) -> str:
    """How many rows of each part are no longer what they were."""
    parts = tt.split(change, found.layout, axis=0, **found.sizes)
    counts = {name: int(part.flatten(0, 1).any(1).sum()) for name, part in zip(parts.names, parts, strict=True)}
    return ", ".join(f"{count} of {found.sizes['h'] * found.sizes['d']} rows of {name}" for name, count in counts.items())


def main() -> None:
    base = model()
    found = tt.probe(base)[NAME]
    before = base.get_submodule(NAME).weight.detach().clone()
    print(f"{NAME}: {found}")

    print(tt.unfuse_(base))
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q", "v"]))
    count = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    print(f"parameters to train: {count}, loss after 20 steps: {train(adapted, 20):.2f}")

    merged = adapted.merge_and_unload()
    print(tt.undo(merged))
    after = merged.get_submodule(NAME).weight.detach()
    print(f"changed: {moved(after - before, found)}")
    print(f"the state dict has the names of the base model: {list(merged.state_dict()) == list(model().state_dict())}")


if __name__ == "__main__":
    main()
