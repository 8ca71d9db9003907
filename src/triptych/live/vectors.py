"""The vectors of rows that met in an attention, and how their heads are numbered."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .labels import row
from .places import Labels


class Vectors:
    """The distinct vectors of rows in an operand [b, n, d]: `heads` in order of appearance; `head_of` each vector, -1 for none.

    An operand that is multiplied along tokens holds one row along its last axis; its vectors then lie along n (`by_channel`).
    """

    def __init__(self, labels: torch.Tensor) -> None:
        rows: Labels = row(labels).numpy()
        b, n, d = rows.shape
        pure = (rows >= 0).all(2)
        self.by_channel = bool(n > 1 and d > 1 and pure.any() and (rows[pure] == rows[pure][:, :1]).all())
        count = n
        if self.by_channel:
            rows = rows.transpose(0, 2, 1)
            pure = (rows >= 0).all(2)
            count = d
        flat, good = rows.reshape(b * count, -1), pure.reshape(-1)
        self.heads: list[tuple[int, ...]] = []
        numbers: dict[tuple[int, ...], int] = {}
        head_of = []
        for vector, fine in zip(flat.tolist(), good.tolist(), strict=True):
            key = tuple(vector)
            if fine and key not in numbers and len(set(key)) == len(key):
                numbers[key] = len(self.heads)
                self.heads.append(key)
            head_of.append(numbers.get(key, -1) if fine else -1)
        self.head_of = head_of if not self.by_channel else [head_of[i // n * d] for i in range(b * n)]

    def keep(self, which: Sequence[bool]) -> None:
        """Forgets the other heads."""
        kept = [head for head, fine in enumerate(which) if fine]
        self.heads = [self.heads[head] for head in kept]
        self.head_of = [kept.index(head) if head >= 0 and which[head] else -1 for head in self.head_of]


def in_batches(vectors: Vectors, labels: torch.Tensor) -> list[set[int]]:
    """The heads in each batch of an operand [b, n, d]."""
    n = labels.shape[1]
    return [{head for head in vectors.head_of[i : i + n] if head >= 0} for i in range(0, len(vectors.head_of), n)]


def numbered(groups: Sequence[int]) -> list[int]:
    """Head numbers of query heads that belong to the kv heads `groups`: kv head by kv head, each in order of appearance."""
    numbers = [0] * len(groups)
    for place, i in enumerate(sorted(range(len(groups)), key=lambda i: groups[i])):
        numbers[i] = place
    return numbers
