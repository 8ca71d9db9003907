"""The order of rotary pairs, by what training keeps equal: only the norm of a pair is balanced between q and k."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

HALF, INTERLEAVED = "half", "interleaved"
MIN_Z = 3.0
TINY = 1e-20


class Rotary(NamedTuple):
    """`z` standard deviations for dims i and i + d/2 as pairs (positive) against dims 2i and 2i + 1 (negative), from `layers` layers."""

    z: float
    layers: int = 1

    @property
    def order(self) -> str | None:
        """ "half" (`c p`), "interleaved" (`p c`), or None: no evidence, which is not to say that there is no rotary embedding."""
        return None if abs(self.z) <= MIN_Z else HALF if self.z > 0 else INTERLEAVED

    def plus(self, other: Rotary) -> Rotary:
        """Both together, each layer with equal weight."""
        layers = self.layers + other.layers
        total = self.z * math.sqrt(self.layers) + other.z * math.sqrt(other.layers)
        return Rotary(total / math.sqrt(layers), layers)

    def to_dict(self) -> dict[str, Any]:
        return {"order": self.order, "z": round(self.z, 1)}

    def __str__(self) -> str:
        if self.order is None:
            return f"rotary pairs leave no trace (z {self.z:.1f}): none, or normed away"
        return f"rotary order {self.order} ({'c p' if self.order == HALF else 'p c'} in place of d; z {self.z:.1f})"


def rotary(q: NDArray[np.floating[Any]], k: NDArray[np.floating[Any]]) -> Rotary | None:
    """Which dims of a head are rotated together.

    Args: q: [kv heads, query heads to one, d, columns] rows, k: [kv heads, d, columns], both in (head, dim) order.
    Returns None for heads of an odd size or with too few dims to say anything.
    """
    groups, _, d, _ = q.shape
    if d % 2 or groups * d < 16:
        return None
    squares = [np.einsum("grdc,grdc->gd", q, q), np.einsum("gdc,gdc->gd", k, k)]
    half, inter = (
        _correlation(*(np.log(x.sum(axis=way) + TINY).astype(np.float64) for x in (s.reshape(shape) for s in squares)))
        for shape, way in (((groups, 2, d // 2), 1), ((groups, d // 2, 2), 2))
    )
    return Rotary((math.atanh(half) - math.atanh(inter)) / math.sqrt(2 / (groups * d // 2 - 3)))


def _correlation(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    x, y = x - x.mean(), y - y.mean()
    return float(np.clip((x * y).sum() / (math.sqrt(float((x * x).sum() * (y * y).sum())) + TINY), -0.9999, 0.9999))
