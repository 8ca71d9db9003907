"""The puzzle: one projection, read in two ways that agree before the `view` and differ after it.

`get_q_matrix` is run unchanged under `triptych.trace`, which says which rows every tensor holds and how to mend either side.
"""

# ruff: noqa: RUF059  (get_q_matrix takes k and v too, as a user would)
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import triptych as tt
from triptych.live.report import Report


class Attention(nn.Module):
    """An attention that keeps q, k and v of each head together, as GPT-NeoX does."""

    def __init__(self, n_embd: int, n_head: int) -> None:
        super().__init__()
        self.n_embd, self.n_head, self.head_size = n_embd, n_head, n_embd // n_head
        self.query_key_value = nn.Linear(n_embd, 3 * n_embd)

    def get_q_matrix(self, x: Tensor) -> Tensor:
        """The query matrix alone, in two ways."""
        batch, seq, _ = x.shape
        # 1. from the activation: project, then cut every head into q, k, v
        qkv = self.query_key_value(x)
        q, k, v = qkv.view(batch, seq, self.n_head, 3 * self.head_size).split(self.head_size, dim=-1)
        # 2. from the weight: cut it into thirds, and project with the first
        w_q, w_k, w_v = self.query_key_value.weight.chunk(3, dim=0)
        b_q, b_k, b_v = self.query_key_value.bias.chunk(3, dim=0)
        flat_q = F.linear(x, w_q, b_q)
        assert torch.allclose(qkv[..., : self.n_embd], flat_q, atol=1e-6), "before the view"
        manual_q = flat_q.view(batch, seq, self.n_head, self.head_size)
        assert torch.allclose(q, manual_q, atol=1e-6), f"after the view: {(q - manual_q).abs().max():.1f} apart"
        return q


class GroupedAttention(nn.Module):
    """The same with fewer kv heads: each group of the weight is its q heads, one k, one v, as in Falcon-40B."""

    def __init__(self, n_embd: int, n_head: int, n_kv_head: int, head_size: int) -> None:
        super().__init__()
        self.n_head, self.n_kv_head, self.head_size = n_head, n_kv_head, head_size
        self.query_key_value = nn.Linear(n_embd, (n_head + 2 * n_kv_head) * head_size)

    def get_q_matrix(self, x: Tensor) -> Tensor:
        """The query matrix alone, in two ways."""
        batch, seq, _ = x.shape
        rows, heads = self.n_head * self.head_size, self.n_head // self.n_kv_head
        qkv = self.query_key_value(x)
        groups = qkv.view(batch, seq, self.n_kv_head, heads + 2, self.head_size)
        q = groups[:, :, :, :heads].reshape(batch, seq, self.n_head, self.head_size)
        w_q, b_q = self.query_key_value.weight[:rows], self.query_key_value.bias[:rows]
        manual_q = F.linear(x, w_q, b_q).view(batch, seq, self.n_head, self.head_size)
        assert torch.allclose(q, manual_q, atol=1e-6), "after the view"
        return q


def in_short(title: str, report: Report) -> str:
    """One line for one report."""
    found = ", ".join(f"{c.a} {c.layout_a} (line {c.line_a}) against {c.b} {c.layout_b} (line {c.line_b})" for c in report.conflicts)
    return f"{title}: {len(report.conflicts)} conflict: {found}"


def main() -> None:
    torch.manual_seed(0)
    model = Attention(n_embd=128, n_head=4)
    print(tt.trace(model.get_q_matrix, torch.randn(2, 5, 128)))
    print()
    print(in_short("the same in bf16", tt.trace(model.bfloat16().get_q_matrix, torch.randn(2, 5, 128, dtype=torch.bfloat16))))
    grouped = GroupedAttention(n_embd=256, n_head=64, n_kv_head=8, head_size=128)
    print(in_short("64 query heads of 128, 8 kv heads", tt.trace(grouped.get_q_matrix, torch.randn(2, 5, 256))))


if __name__ == "__main__":
    main()
