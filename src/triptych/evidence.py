"""What trained weights say for one way of reading their rows: nats for q against k, and for v against the output projection.

Training balances the factors of a product, and attention has two for each head: q with k, and v with the output projection o. So the
cosines between rows of q resemble those between the same rows of k, head by head; rows of v those of columns of o, which always lie in
plain (head, dim) order; and rows that belong together share directions of the residual stream. A statistic counts only as far as it
beats its controls: the same rows a little shifted, the heads one further, and pairs of parts that nothing balances. The rows of gate
and up are judged in the same way, with the down projection in the place of o.

Cost of one reading: O(rows looked at * WINDOW * COLUMNS) for the Gram matrices of its windows, at most 4 * WINDOWS of them; a role that
several readings share is computed once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
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
OUTLIER = 4.0
"""Cosines of rows count up to so many standard deviations of chance: a few rows along one large direction are no match of all."""
REMEMBERED = 96
"""Roles kept for the readings that share them."""
NEXT = "+"
"""Marks a role whose heads are moved on by one."""
TINY = 1e-20
UNMATCHED = (("q", "v"), ("k", "v"), ("q", "o"), ("k", "o"))


class Nats(NamedTuple):
    """Evidence in nats above controls: `qk` of q against k, `vo` of v against o.

    `law` is how well the norms of the two sides of a product
    agree; it is what tells k from one of several query heads, and up from gate.
    """

    qk: float
    vo: float
    law: float


class Reading(NamedTuple):
    """Rows as a layout reads them. Position j is one dim of one kv head: q [r, j] the query rows that share it, k and v [j], o [r, j].

    Positions go by head and dim, `d` to a head; with d = 0 heads are not known, and positions go by the rows of k. q is None where the
    weight has none and nothing stands in for it. For an MLP q is gate, k and v are both up, o is down.
    """

    q: Rows | None
    k: Rows
    v: Rows
    o: Rows
    d: int


class Role(NamedTuple):
    """Rows of one part: unit vectors [r, windows, window, columns], and the cosines of neighbours, summed over r.

    `bands` [2, 1 + SHIFTS, pairs] has them and their absolute values, each again for rows that lie a little further on, about their
    mean and of length 1.
    """

    unit: Floats
    bands: Floats


@dataclass
class Evidence:
    """A fused weight [rows, columns], the output projection's columns [h * d, columns] and q's rows [h * d, columns] where q is apart.

    `shared`: all have the same columns of the residual stream, so that rows of v can be compared with columns of o.
    """

    weight: Floats
    o: Floats | None = None
    query: Floats | None = None
    shared: bool = True
    mlp: bool = False
    size: int = WINDOW
    looks: int = WINDOWS
    seen: dict[object, Role] = field(default_factory=dict)
    nulls: dict[bool, tuple[float, float]] = field(default_factory=dict)
    squares: dict[int, NDArray[np.float64]] = field(default_factory=dict)

    def of(self, reading: Reading, by_head: Reading | None = None) -> Nats:
        """The evidence for one reading; for v and o of the same one with its positions in another order, where one is given."""
        return Nats(self._matched(reading, "q", "k"), self._matched(by_head or reading, "v", "o"), self._law(reading))

    def _matched(self, reading: Reading, a: str, b: str) -> float:
        """Nats of two roles beside each other."""
        if (a == "q" and reading.q is None) or (b == "o" and self.o is None):
            return 0.0
        roles = self._roles(reading)
        most, null = self._null(b == "o") if self.shared else (None, 0.0)
        unmatched = [(x, y) for x, y in UNMATCHED if x in roles and y in roles and not self.mlp]
        others = [*unmatched, *([(a, b + NEXT)] if b + NEXT in roles else [])]
        matches = [_match(roles[a], roles[b], most, len(SHIFTS)), *(_match(roles[x], roles[y], most) for x, y in others)]
        nats = _grams(matches, roles[a].bands.shape[-1])
        return nats + (_above([_unlikely(*one, null) for match in matches for one in match.cosines]) if self.shared else 0.0)

    def norms(self, reading: Reading) -> float:
        """Nats of the norms of rows of v and columns of o, near and far. No controls: it compares orders of the same rows."""
        if self.o is None:
            return 0.0
        order = np.argsort(reading.o[0])
        v, o = self._squares(self.weight)[reading.v], self._squares(self.o)[reading.o].sum(axis=0)
        scales = _scales(v[order]), _scales(o[order])
        return sum(_together(one, other, len(one) - 1) for one, other in zip(*scales, strict=True))

    def rows(self, reading: Reading, stop: int) -> list[tuple[Floats, Floats]]:
        """Rows [r, stop, columns] of the roles that belong together, pair by pair."""
        found = []
        if reading.q is not None:
            query = self.weight if self.query is None else self.query
            found.append((query[reading.q[:, :stop]], self.weight[None, reading.k[:stop]]))
        if self.o is not None:
            found.append((self.weight[None, reading.v[:stop]], self.o[reading.o[:, :stop]]))
        return found

    def _roles(self, reading: Reading) -> dict[str, Role]:
        """The roles that the matrices have; those of the next head too, where several query heads share a kv head."""
        query, (ratio, length) = self.weight if self.query is None else self.query, reading.o.shape
        at = windows(length, ratio, self.size, self.looks)
        wanted: dict[str, tuple[Floats | None, Rows | None]] = {"q": (query, reading.q), "k": (self.weight, reading.k[None])}
        wanted |= {"v": (self.weight, reading.v[None]), "o": (self.o, reading.o)}
        if 0 < reading.d < length and ratio > 1:
            moved = (("k", self.weight, reading.k[None]), ("o", self.o, reading.o))
            wanted |= {name + NEXT: (matrix, np.roll(rows, -reading.d, axis=1)) for name, matrix, rows in moved}
        return {name: self._role(matrix, rows[:, at]) for name, (matrix, rows) in wanted.items() if matrix is not None and rows is not None}

    def _role(self, matrix: Floats, rows: Rows) -> Role:
        key = (id(matrix), rows.shape, rows.tobytes())
        if key not in self.seen:
            if len(self.seen) >= REMEMBERED:
                self.seen.clear()
            self.seen[key] = _look(matrix[rows])
        return self.seen[key]

    def _law(self, reading: Reading) -> float:
        """How well norms of up follow those of down's columns, or those of k the sum over its query heads; in nats.

        Of a rotated head only the norm of a rotary pair is balanced, so both ways to pair dims are tried; single dims of two query heads
        resemble each other more than k. Heads are compared within themselves: the level of a whole head says little.
        """
        query = self.weight if self.query is None else self.query
        if self.mlp:
            if self.o is None:
                return 0.0
            one, other = self._squares(self.weight)[reading.v], self._squares(self.o)[reading.o].sum(axis=0)
        elif reading.q is None:
            return 0.0
        else:
            one, other = self._squares(self.weight)[reading.k], self._squares(query)[reading.q].sum(axis=0)
        heads = [x.reshape(-1, reading.d or x.size) for x in (one, other)]
        ways = [heads]
        if reading.d and reading.d % 2 == 0:
            ways = [[x.reshape(len(x), 2, -1).sum(axis=1) for x in heads], [x.reshape(len(x), -1, 2).sum(axis=2) for x in heads]]
        return max(_agreement(*way) for way in ways)

    def _squares(self, matrix: Floats) -> NDArray[np.float64]:
        if id(matrix) not in self.squares:
            self.squares[id(matrix)] = np.einsum("ij,ij->i", matrix, matrix).astype(np.float64)
        return self.squares[id(matrix)]

    def _null(self, with_o: bool) -> tuple[float, float]:
        """The largest cosine that counts, and the mean cos^2 of two rows that have nothing to do with each other."""
        if with_o not in self.nulls:
            rng = np.random.default_rng(0)
            a, b = self.weight, self.o if with_o and self.o is not None else self.weight
            x, y = a[rng.integers(len(a), size=2048)], b[rng.integers(len(b), size=2048)]
            lengths = np.einsum("ij,ij->i", x, x) * np.einsum("ij,ij->i", y, y)
            squares = np.einsum("ij,ij->i", x, y) ** 2 / (lengths + TINY)
            squares = squares[squares < 0.98]
            most = OUTLIER**2 * float(squares.mean()) + TINY
            self.nulls[with_o] = math.sqrt(most), float(np.minimum(squares, most).mean()) + TINY
        return self.nulls[with_o]


@lru_cache(maxsize=64)
def windows(length: int, ratio: int = 1, size: int = WINDOW, looks: int = WINDOWS) -> Rows:
    """[windows, window] positions that are looked at, spread evenly; fewer where several query heads stand for each."""
    count = min(max(looks // ratio, 1), -(-length // size))
    size = min(size, length // count)
    starts = np.linspace(0, length - size, count).astype(np.int64)
    return starts[:, None] + np.arange(size)[None, :]


def _look(rows: Floats) -> Role:
    norms = np.einsum("rwic,rwic->rwi", rows, rows)
    grams = (rows @ rows.swapaxes(-1, -2)).sum(axis=0)
    scale = np.sqrt(norms.sum(axis=0)) + TINY
    grams /= scale[:, :, None] * scale[:, None, :]
    near = _neighbours(scale.shape[1])
    bands = grams.reshape(len(grams), -1).take(near, axis=1).swapaxes(0, 1).reshape(len(near), -1)
    plain = np.stack([bands, np.abs(bands)])
    plain -= plain.mean(axis=-1, keepdims=True)
    plain /= np.sqrt(np.einsum("tsi,tsi->ts", plain, plain))[..., None] + TINY
    return Role(rows / (np.sqrt(norms)[..., None] + TINY), plain)


@lru_cache(maxsize=16)
def _neighbours(size: int) -> Rows:
    """[1 + SHIFTS, pairs] places in a flat [size, size] matrix of pairs of rows at all OFFSETS, and the same a little further on."""
    stop = max(size - max(SHIFTS), 0)
    first = np.concatenate([np.arange(stop - s) for s in OFFSETS if s < stop] or [np.zeros(0, np.int64)])
    second = np.concatenate([np.arange(s, stop) for s in OFFSETS if s < stop] or [np.zeros(0, np.int64)])
    return np.stack([(first + i) * size + second + i for i in (0, *SHIFTS)])


def _above(values: list[float]) -> float:
    return max(values[0] - max(values[1:]), 0.0)


class _Match(NamedTuple):
    """Two roles beside each other, plain and then shifted: correlations [2, 1 + shifts] of their bands; number, mean and mean square of the
    cosines of their rows."""

    bands: Floats
    cosines: list[tuple[int, float, float]]


def _match(one: Role, other: Role, most: float | None, shifts: int = 0) -> _Match:
    bands: Floats = (other.bands[:, : shifts + 1] @ one.bands[:, 0, :, None])[..., 0]
    a, b = one.unit, other.unit
    found = list[tuple[int, float, float]]()
    stop = a.shape[2] - max(SHIFTS)
    if most is None:
        return _Match(bands, found)
    for shift in (0, *SHIFTS[:shifts]):
        cosines = np.einsum("rwic,rwic->rwi", a[:, :, :stop], b[:, :, shift : shift + stop]).ravel()
        np.minimum(np.maximum(cosines, -most, out=cosines), most, out=cosines)
        found.append((cosines.size, float(cosines.sum()) / cosines.size, float(cosines @ cosines) / cosines.size))
    return _Match(bands, found)


def _grams(matches: list[_Match], count: int) -> float:
    """Nats of the cosines of neighbours, signed and absolute: -n/2 log(1 - r^2) of the first pair above the others."""
    found = np.concatenate([match.bands for match in matches], axis=1).astype(np.float64)
    nats = -count / 2 * np.log1p(-np.minimum(found**2, 0.999999))
    return sum(_above(row) for row in nats.tolist())


def _unlikely(count: int, mean: float, square: float, null: float) -> float:
    """How far cosines of rows, each head of q or o against its kv head, are from chance: another mean, a larger variance; in nats."""
    spread = max((square - mean * mean) / null, 1.0)
    return count / 2 * (mean * mean / null + spread - 1 - math.log(spread))


def _agreement(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Nats of the correlation of [heads, dims] log norms^2, each head about its mean; 0 where it is negative."""
    x, y = (np.log(z + TINY) for z in (one, other))
    x, y = (z - z.sum(axis=1, keepdims=True) / z.shape[1] for z in (x, y))
    return _together(x, y, x.size - len(x))


def _together(x: NDArray[np.float64], y: NDArray[np.float64], free: int) -> float:
    """Nats of the correlation of numbers about 0, of which `free` are free; 0 where it is negative."""
    product = float((x * y).sum())
    square = product**2 / max(float((x * x).sum() * (y * y).sum()), TINY)
    return -free / 2 * math.log1p(-min(square, 0.999999)) if product > 0 else 0.0


def _scales(squares: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    """How the logs of neighbours differ, of neighbouring pairs, of neighbouring fours and so on: each difference is news."""
    level, found = np.log(squares + TINY), []
    while len(level) > 3:
        pairs = level[: len(level) // 2 * 2].reshape(-1, 2)
        found.append(pairs[:, 0] - pairs[:, 1])
        level = pairs.mean(axis=1)
    return found
