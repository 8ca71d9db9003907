"""The wish behind the puzzle: give me q alone, for my KV cache.

The module keeps q, k and v of each head together, as GPT-NeoX does; the first third of its rows is not q.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import triptych as tt


class Attention(nn.Module):
    """The puzzle's module, without a cache."""

    def __init__(self, n_embd: int, n_head: int) -> None:
        super().__init__()
        self.n_head, self.head_size = n_head, n_embd // n_head
        self.query_key_value = nn.Linear(n_embd, 3 * n_embd)

    def forward(self, x: Tensor) -> Tensor:
        batch, seq, _ = x.shape
        qkv = self.query_key_value(x).view(batch, seq, self.n_head, 3 * self.head_size)
        q, k, v = (part.transpose(1, 2) for part in qkv.split(self.head_size, dim=-1))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    model, x = Attention(n_embd=128, n_head=4).double(), torch.randn(2, 9, 128, dtype=torch.float64)
    fused, full = model.query_key_value, model(x)

    found = tt.probe(model)["query_key_value"]
    print(f"query_key_value is   {found}")

    def q_of(tokens: Tensor) -> Tensor:  # computes 128 of the 384 rows
        return tt.project(fused, tokens, "q", found).transpose(1, 2)

    chunk = F.linear(x, fused.weight.chunk(3)[0], fused.bias.chunk(3)[0]).view(2, 9, 4, 32).transpose(1, 2)
    q, _, _ = (part.transpose(1, 2) for part in tt.split(fused(x), found.layout, h=4))
    print(f"q by tt.project      {(q_of(x) - q).abs().max():.0e} from the q of the whole projection")
    print(f"q by weight.chunk(3) {(chunk - q).abs().max():.1f} from it: those are rows of q, k and v")

    cache = tt.KVCache()
    for step, tokens in enumerate(x.split([6, 1, 1, 1], dim=1)):
        k, v = (part.transpose(1, 2) for part in tt.project(fused, tokens, ("k", "v"), found))
        keys, values = cache.update(k, v)
        out = tt.attend(q_of(tokens), keys, values)
        same = full[:, :, cache.length - tokens.shape[1] : cache.length]
        print(f"step {step}: {cache.length} tokens cached {tuple(keys.shape)}, {(out - same).abs().max():.0e} from the run without a cache")

    print(
        f"q of the last token once more, against the cache: {(tt.attend(q_of(x[:, -1:]), keys, values) - full[:, :, -1:]).abs().max():.0e}"
    )


if __name__ == "__main__":
    main()
