"""What trained weights say for one way of reading their rows: nats for q against k, and for v against the output projection.

Training balances the factors of a product, and attention has two for each head: q with k, and v with the output projection o. So the
cosines between rows of q resemble those between the same rows of k, head by head, and rows of v those of columns of o, which always lie
in plain (head, dim) order. A statistic counts only as far as it beats its controls: the same rows a little shifted, and pairs of parts
that nothing balances.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .rowmap import Rows

Floats = NDArray[np.float32]

COLUMNS = 256
"""Columns of the residual stream that are looked at."""
WINDOW, WINDOWS = 256, 4
"""Rows are compared in so many windows of so many neighbours; fewer rows are all taken."""
OFFSETS = (*range(1, 17), *range(19, 65, 3))
"""Distances of the neighbours that are compared."""
SHIFTS = (1, 2, 3)
TINY = 1e-20


class Nats(NamedTuple):
    """Evidence in nats: `qk` of q against k and `vo` of v against o, both above controls.

    `heads` is what numbering the heads in this way explains of both beyond that, for each head dim that was tried.
    """

    qk: float
    vo: float
    heads: tuple[float, ...]


class Reading(NamedTuple):
    """Rows as a layout reads them. Column j is one dim of one kv head: q [r, j] the query rows that share it, k and v [j], o [r, j].

    `heads` [n, j] are ways to number the heads, one for every head dim to try. Readings of one `alignment` set the same rows of q, k
    and v side by side, and differ in how they number them.
    """

    q: Rows
    k: Rows
    v: Rows
    o: Rows
    heads: Rows

    @property
    def alignment(self) -> bytes:
        return bytes(str(self.q.shape), "ascii") + np.concatenate([np.sort(self.q, axis=0).ravel(), self.k, self.v]).tobytes()


class _Role(NamedTuple):
    """Unit vectors [r, windows, window, columns] and the cosines of neighbours [offset, windows, window], summed over r."""

    unit: Floats
    band: Floats


class _Counted(NamedTuple):
    """Nats of one pair of roles for each way to number the heads: above controls, and what the numbering explains."""

    above: NDArray[np.float64]
    heads: NDArray[np.float64]


@dataclass
class Evidence:
    """A fused weight [rows, columns] and the output projection's columns [h * d, columns], on columns of the residual stream.

    `shared`: these columns are the same ones, so that rows of v can be compared with columns of o.
    """

    weight: Floats
    o: Floats | None
    shared: bool
    seen: dict[object, _Role] = field(default_factory=dict)
    counted: dict[object, _Counted] = field(default_factory=dict)

    def of(self, reading: Reading) -> Nats:
        """The evidence for one reading, at the head dim that explains most."""
        at = _windows(len(reading.k))
        roles = {
            name: self._role(self.weight, rows, at) for name, rows in (("q", reading.q), ("k", reading.k[None]), ("v", reading.v[None]))
        }
        if self.o is not None:
            roles["o"] = self._role(self.o, reading.o, at)
        key = (*(index.tobytes() for index in (reading.q, reading.k, reading.v, reading.heads)), reading.q.shape)
        if key not in self.counted:
            self.counted[key] = _pair("q", "k", roles, reading.heads[:, at], self.shared)
        qk = self.counted[key]
        vo = _pair("v", "o", roles, reading.heads[:, at], self.shared) if "o" in roles else _Counted(0 * qk.above, 0 * qk.heads)
        heads = qk.heads + vo.heads
        best = int(heads.argmax())
        return Nats(float(qk.above[best]), float(vo.above[best]), tuple(heads.tolist()))

    def _role(self, matrix: Floats, rows: Rows, at: Rows) -> _Role:
        key = (matrix is self.o, rows.shape, rows.tobytes())
        if key not in self.seen:
            self.seen[key] = _look(matrix[rows[:, at]])
        return self.seen[key]


def _windows(length: int) -> Rows:
    """[windows, window] positions that are looked at, spread evenly."""
    count = min(WINDOWS, -(-length // WINDOW))
    size = min(WINDOW, length // count)
    starts = np.linspace(0, length - size, count).astype(np.int64)
    return starts[:, None] + np.arange(size)[None, :]


def _look(rows: Floats) -> _Role:
    norms = np.einsum("rwic,rwic->rwi", rows, rows)
    grams = (rows @ rows.swapaxes(-1, -2)).sum(axis=0)
    scale = np.sqrt(norms.sum(axis=0)) + TINY
    band = np.zeros((len(OFFSETS), *scale.shape), np.float32)
    for i, s in enumerate(OFFSETS):
        if s < scale.shape[1]:
            band[i, :, :-s] = np.diagonal(grams, s, -2, -1) / (scale[:, :-s] * scale[:, s:])
    return _Role(rows / (np.sqrt(norms)[..., None] + TINY), band)


def _pair(a: str, b: str, roles: dict[str, _Role], heads: Rows, shared: bool) -> _Counted:
    """Nats of one pair of roles, for each way to number the heads."""
    compared = [(roles[a], roles[b], shift) for shift in (0, *SHIFTS)]
    compared += [(roles[x], roles[y], 0) for x, y in (("q", "v"), ("k", "v"), ("q", "o"), ("k", "o")) if x in roles and y in roles]
    inside, valid = _inside(heads)
    x = np.stack([role.band[valid] for role, _, _ in compared])
    y = np.stack([np.roll(role.band, -shift, axis=-1)[valid] for _, role, shift in compared])
    above, explained = np.zeros(len(heads)), np.zeros(len(heads))
    for pooled, gains, levels in (_gram(x, y, inside), _gram(np.abs(x), np.abs(y), inside)):
        above += pooled[0] - pooled[1:].max() + np.maximum(gains[:, 0] - gains[:, 1:].max(axis=1), 0.0)
        explained += levels
    if shared:
        above += _direct([_cosines(one.unit, other.unit, shift) for one, other, shift in compared])
    return _Counted(above, explained)


def _inside(heads: Rows) -> tuple[Floats, NDArray[np.bool_]]:
    """[n, pairs]: 1 where both rows lie in one head; and [offset, windows, window]: the pairs that are there, shifted too."""
    _, windows, size = heads.shape
    valid = np.zeros((len(OFFSETS), windows, size), np.bool_)
    same = np.zeros((len(heads), *valid.shape), np.float32)
    for i, s in enumerate(OFFSETS):
        if s + max(SHIFTS) < size:
            valid[i, :, : -s - max(SHIFTS)] = True
            same[:, i, :, :-s] = heads[:, :, :-s] == heads[:, :, s:]
    return same[:, valid], valid


def _gram(x: Floats, y: Floats, inside: Floats) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Nats of cosines [compared, pairs] of one role against those of another, with `inside` [n, pairs].

    Returns: those of their correlation [compared]; what the correlations gain when pairs within and across heads are taken apart
    [n, compared]; and what the two Gaussians gain in all when they are, for the first of those compared [n].
    """
    x, y = x - x.mean(axis=1, keepdims=True), y - y.mean(axis=1, keepdims=True)
    masks = np.concatenate([np.ones_like(inside[:1]), inside])
    terms = (np.ones_like(x), x, y, x * x, y * y, x * y)
    sums = np.stack([masks @ term.T for term in terms], axis=-1).astype(np.float64)
    whole, within = sums[0], sums[1:]
    (pooled, spread), (near, near_spread), (far, far_spread) = _information(whole), _information(within), _information(whole - within)
    return pooled, near + far - pooled, (spread - near_spread - far_spread)[:, 0]


def _information(sums: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """From [..., 6] sums of 1, x, y, x^2, y^2, x y over n pairs: -n/2 log(1 - r^2) and n/2 log(determinant of the covariance), in nats."""
    n = sums[..., 0]
    mean = sums / np.maximum(n, 1)[..., None]
    xx, yy = np.maximum(mean[..., 3] - mean[..., 1] ** 2, TINY), np.maximum(mean[..., 4] - mean[..., 2] ** 2, TINY)
    rest = np.log1p(-np.clip((mean[..., 5] - mean[..., 1] * mean[..., 2]) ** 2 / (xx * yy), 0, 0.999999))
    return np.where(n < 8, 0.0, -n / 2 * rest), np.where(n < 8, 0.0, n / 2 * (rest + np.log(xx) + np.log(yy)))


def _cosines(a: Floats, b: Floats, shift: int) -> NDArray[np.float64]:
    """Cosines of the rows of two roles, each head of q or o against its kv head."""
    stop = a.shape[2] - max(SHIFTS)
    found: NDArray[np.float64] = np.einsum("rwic,rwic->rwi", a[:, :, :stop], b[:, :, shift : shift + stop]).ravel().astype(np.float64)
    return found


def _direct(cosines: list[NDArray[np.float64]]) -> float:
    """How far the cosines of a pair are from those of its controls: a Gaussian of another mean and a larger variance, in nats."""
    null = float(np.mean([np.mean(control**2) for control in cosines[1:]])) + TINY
    values = []
    for cosine in cosines:
        spread = max(float(cosine.var()) / null, 1.0)
        values.append(cosine.size / 2 * (float(cosine.mean()) ** 2 / null + spread - 1 - math.log(spread)))
    return values[0] - max(values[1:])
