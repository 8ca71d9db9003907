"""Which rows form a head, by where the likeness of two roles ends: cosines of rows of one head agree, those across heads less so."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .evidence import TINY, Floats
from .rowmap import Rows

LOOK = 1024
"""Neighbouring positions that are looked at, all against all."""
LEAST = 8
"""Pairs of rows without which nothing is said."""


class Likeness:
    """The cosines of all rows of one role with each other beside those of the role it belongs to, for LOOK positions.

    Args: pairs: rows [r, positions, columns] of two roles that belong together; each pair of roles counts for itself.
    """

    def __init__(self, pairs: list[tuple[Floats, Floats]]) -> None:
        self.pairs = [(_gram(one), _gram(other)) for one, other in pairs]

    def explains(self, heads: Rows) -> float:
        """Nats that a way to form heads explains. heads: [heads, d] positions.

        The cosines of a pair of roles are a two-dimensional Gaussian; what it gains when pairs of rows within one head and across
        heads have a Gaussian each.
        """
        total = 0.0
        for x, y in self.pairs:
            for function in (np.asarray, np.abs):
                one, other = function(x), function(y)
                inside = _sums(one[heads[:, :, None], heads[:, None, :]], other[heads[:, :, None], heads[:, None, :]])
                inside[0] -= heads.size
                whole = _sums(one, other)
                whole[0] -= len(one)
                total += _spread(whole) - _spread(inside) - _spread(whole - inside)
        return total / 2


def shuns(rows: Floats, heads: Rows) -> float:
    """Nats that rows of one head repeat each other less than rows of two heads do, as those of v should not. rows: [positions, columns]."""
    gram = _gram(rows[None])
    inside, whole = gram[heads[:, :, None], heads[:, None, :]], gram
    counts = np.array([len(gram) * (len(gram) - 1), inside.size - heads.size])
    sums = np.array([float(np.vdot(whole, whole)), float(np.vdot(inside, inside))])
    counts, sums = np.append(counts, counts[0] - counts[1]), np.append(sums, sums[0] - sums[1])
    if counts.min() < LEAST or sums[1] * counts[2] > sums[2] * counts[1]:
        return 0.0
    return float(counts @ (np.array([1, -1, -1]) * np.log(sums / counts + TINY))) / 4


def _gram(rows: Floats) -> Floats:
    """[positions, positions] cosines, their mean taken off, and 0 on the diagonal."""
    norms = np.sqrt(np.einsum("rjc,rjc->j", rows, rows)) + TINY
    gram: Floats = np.einsum("rjc,rkc->jk", rows, rows, optimize=True) / (norms * norms[:, None])
    np.fill_diagonal(gram, 0)
    return gram


def _sums(x: Floats, y: Floats) -> NDArray[np.float64]:
    """Sums of 1, x, y, x^2, y^2, x y."""
    x, y = x.ravel(), y.ravel()
    return np.array([x.size, x.sum(), y.sum(), x @ x, y @ y, x @ y], np.float64)


def _spread(sums: NDArray[np.float64]) -> float:
    """count / 2 log(determinant of the covariance)."""
    if sums[0] < LEAST:
        return 0.0
    _, mx, my, mxx, myy, mxy = sums / sums[0]
    xx, yy = max(mxx - mx * mx, TINY), max(myy - my * my, TINY)
    rest = np.log1p(-min((mxy - mx * my) ** 2 / (xx * yy), 0.999999))
    return float(sums[0] / 2 * (rest + np.log(xx) + np.log(yy)))
