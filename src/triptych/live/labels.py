"""The labels of a `Ledger`: int64 numbers, what they say, and the log of what was seen while they moved."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

MIX = -1
"""Several rows: a sum of rows that is no rotation, a reduction."""

KIND, TOKEN = 56, 40
ROW, SCORE_HALF = (1 << TOKEN) - 1, (1 << 22) - 1
STRONG, OUT, SCORE, WEAK = 0, 1, 2, 3
"""Kinds of label, in bits 56-59: a row of a product with a parameter (row number + 1, and the token in bits 40-55); an element of
an attention's output; a score (attention number, query vector, key vector); an element of a parameter itself (its number + 1)."""
ACTIVE = 1 << 60
"""Set on a row's label once it has gone through an activation function."""


@dataclass
class Attention:
    """One attention as executed: `q`, `k` [b, n, d] labels of the vectors that were multiplied, `v` [b, n, d] what they weighed.

    `q_of` says from which vector of q (number b * N + n) each vector of the output came, `k_of` which vector of k each of v met,
    `pairs` [2, m] which of q met which of k. `others`: what else a recurrence is given, one number a head.
    """

    q: Tensor
    k: Tensor
    v: Tensor | None = None
    softmax: bool = False
    q_of: Tensor | None = None
    k_of: Tensor | None = None
    out: int = 0
    out_shape: tuple[int, ...] = ()
    pairs: Tensor | None = None
    recurrent: bool = False
    others: dict[str, Tensor] = field(default_factory=dict)

    @property
    def by_heads(self) -> bool:
        """The scores of several heads are added, each times one number: an indexer's."""
        return self.v is not None and not self.softmax and not self.recurrent and self.v.shape[-1] == 1 < self.q.shape[-1]


@dataclass
class Scan:
    """A state-space recurrence: operands [tokens, heads, dims]; output [.., heads, dims], or [batch, dims, tokens] by `channels`."""

    operands: dict[str, Tensor]
    out: int
    out_shape: tuple[int, ...]
    channels: bool


@dataclass
class Log:
    """What was seen. Pairs are [2, n] tensors of row numbers; `gates` pairs rows with elements of attention outputs.

    `spread`: products of rows along the last axis with one. `softened`: rows that went through a softmax themselves.
    `closing`: first element of a parameter that multiplies outputs of attention -> [in] their numbers, -1 for none.
    `unclear`: vectors met that were mixed all over, as rotated ones far from position 0 are.
    """

    attentions: list[Attention] = field(default_factory=list)
    scans: list[Scan] = field(default_factory=list)
    rotations: list[Tensor] = field(default_factory=list)
    products: list[Tensor] = field(default_factory=list)
    gates: list[Tensor] = field(default_factory=list)
    biases: list[Tensor] = field(default_factory=list)
    softened: list[Tensor] = field(default_factory=list)
    spread: list[Tensor] = field(default_factory=list)
    fed: dict[int, Tensor] = field(default_factory=dict)
    mixed: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    contracted: dict[int, int] = field(default_factory=dict)
    closing: dict[int, Tensor] = field(default_factory=dict)
    unclear: bool = False


def kind(labels: Tensor) -> Tensor:
    return (labels >> KIND) & 0xF


def row(labels: Tensor) -> Tensor:
    """Row or element number, counted over all parameters; -1 for none."""
    return torch.where(labels > 0, labels & ROW, 0) - 1


def token(labels: Tensor) -> Tensor:
    return (labels >> TOKEN) & 0xFFFF


def rows_only(labels: Tensor) -> Tensor:
    """Rows without their token, MIX for what else has a label."""
    rows = torch.where(labels > 0, labels & ~(((1 << 16) - 1) << TOKEN), labels)
    return torch.where((labels > 0) & (kind(labels) != STRONG), MIX, rows)


def distinct(pairs: Tensor) -> Tensor:
    """[2, n] pairs, each once, in order; several times as fast as `torch.unique(pairs, dim=1)`.

    >>> distinct(torch.tensor([[7, 3, 7, 3], [1, 9, 1, 2]])).tolist()
    [[3, 3, 7], [2, 9, 1]]
    """
    (first, a), (second, b) = (torch.unique(side, return_inverse=True) for side in pairs)
    codes = torch.unique(a * len(second) + b)
    return torch.stack([first[codes // max(1, len(second))], second[codes % max(1, len(second))]])
