"""Rows of two tensors, matched by value: up to rounding, with bounded memory, and nothing claimed that was not compared in full."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import LayoutError
from ..pairs import NONE, Index, Mask

Tensor = Any
"""numpy.ndarray or torch.Tensor; torch is not imported here."""
Values = NDArray[np.floating[Any]]

STRETCHES = 16
"""Random sums taken of a row."""
COMPARED = 1 << 17
"""Pairs of rows looked at together."""
FEW_ROWS = 200
"""Looked at before all are."""
HUGE = 1e15
"""Stands for infinity in those sums."""
BLOCK = 1 << 15
"""Values read at a time: what stays in the cache, and is converted by one thread."""
FIRM = 6.0
"""A random sum of noise is at most this many times as large as the noise: fails once in 10^9."""


@dataclass(frozen=True, slots=True)
class Precision:
    """How far two values of one number may be apart: `relative` to the value, `absolute` in units of its row's size."""

    name: str
    bits: int
    relative: float
    absolute: float


_PRECISIONS = {
    p.name: p
    for p in (
        Precision("float64", 53, 4 * 2.0**-52, 128 * 2.0**-52),
        Precision("float32", 24, 4 * 2.0**-23, 128 * 2.0**-23),
        Precision("float16", 11, 1.5 * 2.0**-10, 0.25 * 2.0**-10),
        Precision("bfloat16", 8, 1.5 * 2.0**-7, 0.25 * 2.0**-7),
        Precision("float8", 4, 1.5 * 2.0**-3, 0.25 * 2.0**-3),
    )
}


def precision(a: Tensor, b: Tensor, tolerance: float | None = None) -> Precision:
    """The coarser precision of two tensors.

    float32 that holds nothing but bfloat16 or float16 values counts as such, beside one that holds more.
    """
    if tolerance is not None:
        return Precision("as given", 24, tolerance, tolerance)
    names = [_name(a), _name(b)]
    if names == ["float32", "float32"]:
        hidden = [_hidden(a), _hidden(b)]
        if hidden[0] != hidden[1] and "float32" in hidden:
            names = hidden
    return min((_PRECISIONS[name] for name in names), key=lambda p: p.bits)


def _name(tensor: Tensor) -> str:
    text = str(tensor.dtype).removeprefix("torch.")
    if str(getattr(tensor, "device", "")) == "meta":
        raise LayoutError("a tensor on the meta device has no values to compare", found=f"{text} {tuple(tensor.shape)}")
    if text.startswith("float8"):
        return "float8"
    if text in _PRECISIONS:
        return text
    if not text.startswith(("int", "uint", "bool")):
        raise LayoutError("only real numbers can be compared", found=f"{text} {tuple(tensor.shape)}")
    return "float64" if text.endswith(("32", "64")) else "float32"


def _hidden(tensor: Tensor) -> str:
    """What precision float32 values spread over the tensor have; whole numbers tell nothing."""
    side = max(1, round(4096 ** (1 / tensor.ndim)))
    values = _numpy(tensor[tuple(slice(None, None, max(1, size // side)) for size in tensor.shape)])
    bits = np.ascontiguousarray(values).view(np.uint32)
    if (values == np.round(values)).all() or (bits & 0x1FFF).any():
        return "float32"
    return "float16" if (bits & 0xFFFF).any() else "bfloat16"


def _numpy(tensor: Tensor) -> Values:
    """float32, or float64 where float32 would lose digits."""
    if not isinstance(tensor, np.ndarray):
        tensor = tensor.detach().cpu()
        if str(tensor.dtype) == "torch.bfloat16" or "float8" in str(tensor.dtype):
            tensor = tensor.float()
        tensor = tensor.numpy()
    wide = tensor.dtype.kind in "fiu" and tensor.dtype.itemsize >= (8 if tensor.dtype.kind == "f" else 4)
    return tensor.astype(np.float64 if wide else np.float32, copy=False)  # type: ignore[no-any-return]


class Matrix:
    """A tensor as [rows, samples], under one choice of the axes that make up the rows.

    It is read in blocks; the tensor is copied only where its row axes lie apart.
    """

    def __init__(self, tensor: Tensor, axes: tuple[int, ...], rounded: str) -> None:
        others = tuple(i for i in range(tensor.ndim) if i not in axes)
        self.tensor, self.axes, self.rounded = tensor, axes, rounded
        self.shape = tuple(tensor.shape[i] for i in axes)
        self.rows = math.prod(self.shape)
        self.samples = math.prod(tensor.shape[i] for i in others)
        self.rows_first = axes[0] == 0
        self.order = (*axes, *others) if self.rows_first else (*others, *axes)

    @cached_property
    def _table(self) -> Tensor:
        return _permute(self.tensor, self.order).reshape((self.rows, self.samples) if self.rows_first else (self.samples, self.rows))

    def read(self, rows: slice | Index, samples: slice) -> Values:
        """[rows, samples] values, rounded to the common precision."""
        if self.rows_first:
            return self._values(_pick(self._table[:, samples], rows, 0))
        return self._values(_pick(self._table[samples], rows, 1)).T

    def _values(self, piece: Tensor) -> Values:
        if self.rounded == "bfloat16" and not isinstance(piece, np.ndarray) and piece.is_floating_point():
            return _numpy(piece.bfloat16())
        values = _numpy(piece)
        if self.rounded == "float16" and values.dtype == np.float32 and "16" not in str(self._table.dtype):
            with np.errstate(over="ignore"):
                return values.astype(np.float16).astype(np.float32)
        if self.rounded == "bfloat16" and "16" not in str(self._table.dtype):
            return _to_bfloat16(values.astype(np.float32))
        return values

    def pieces(self) -> Iterator[tuple[slice, slice]]:
        """(rows, samples) windows that cover the matrix, along the tensor's own slow axis."""
        long, wide = (self.rows, self.samples) if self.rows_first else (self.samples, self.rows)
        step = max(1, BLOCK // max(1, wide))
        for start in range(0, long, step):
            window, whole = slice(start, start + step), slice(None)
            yield (window, whole) if self.rows_first else (whole, window)

    @cached_property
    def sketch(self) -> tuple[Values, Values]:
        """([rows, k] random sums over k stretches of every row, the rows themselves if short; [rows] root mean square)."""
        k = min(STRETCHES, self.samples)
        cuts = [self.samples * i // k for i in range(k + 1)]
        weights = np.random.default_rng(0).standard_normal(self.samples) * math.sqrt(k / self.samples) if k < self.samples else np.ones(k)
        by_type: dict[np.dtype[Any], Values] = {np.dtype(kind): weights.astype(kind) for kind in (np.float64, np.float32)}
        signature, squares = np.zeros((self.rows, k)), np.zeros(self.rows)
        for rows, samples in self.pieces():
            values = self.read(rows, samples)
            first, last, _ = samples.indices(self.samples)
            with np.errstate(all="ignore"):
                square = np.einsum("ij,ij->i", values, values)
            if not np.isfinite(square).all():
                values = np.clip(np.nan_to_num(values, nan=1.0, posinf=HUGE, neginf=-HUGE), -HUGE, HUGE)
                square = np.einsum("ij,ij->i", values, values)
            squares[rows] += square
            weight = by_type[values.dtype][samples]
            for i in range(k):
                here = slice(max(cuts[i] - first, 0), max(min(cuts[i + 1], last) - first, 0))
                if here.start < here.stop:  # einsum, not a product of matrices: threads started for every block cost more than they do
                    signature[rows, i] += np.einsum("ij,j->i", values[:, here], weight[here])
        return signature, np.sqrt(squares / max(1, self.samples))


def _permute(tensor: Tensor, order: tuple[int, ...]) -> Tensor:
    return tensor.transpose(order) if isinstance(tensor, np.ndarray) else tensor.detach().permute(order)


def _pick(table: Tensor, rows: slice | Index, axis: int) -> Tensor:
    if isinstance(rows, slice):
        return table[rows] if axis == 0 else table[:, rows]
    if isinstance(table, np.ndarray):  # `take` would first copy a table that is not contiguous
        return table.take(rows, axis) if table.flags.c_contiguous else table[rows] if axis == 0 else table[:, rows]
    return table.index_select(axis, sys.modules["torch"].from_numpy(np.ascontiguousarray(rows)).to(table.device))


def _to_bfloat16(values: NDArray[np.float32]) -> Values:
    """Round to nearest even, as torch does; the result stays float32."""
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return np.where(np.isfinite(values), rounded.view(np.float32), values)


@dataclass(frozen=True)
class Pair:
    """Two matrices with the same samples, and the precision at which they are compared."""

    a: Matrix
    b: Matrix
    precision: Precision

    @cached_property
    def scale(self) -> Values:
        """[rows of a] the size of a row's values, not less than that of a usual row: noise does not shrink where sums cancel."""
        size = self.a.sketch[1]
        return np.maximum(size, np.median(size) if len(size) else 0.0)

    @cached_property
    def reach(self) -> Values:
        """[rows of a, 1] how far the sums of one row may be apart."""
        noise = self.precision.relative * self.a.sketch[1] + (self.precision.absolute + 2.0**-20) * self.scale
        return (FIRM * noise)[:, None]

    def looks(self, rows: Index, partners: Index) -> Mask:
        """Whether the sums of a's `rows` and b's `partners` agree: broadcast over index arrays. A hint, no proof."""
        near: Mask = np.logical_and.reduce(np.abs(self.a.sketch[0][rows] - self.b.sketch[0][partners]) <= self.reach[rows], axis=-1)
        return near

    def agree(self, index: Index, until_failure: bool = False) -> tuple[Mask, float]:
        """([rows of a] whether row i of a and row index[i] of b agree in every value, the largest difference among those that do).

        With `until_failure` it stops at the first block where one does not; rows after it are then False.
        """
        wanted = np.flatnonzero(index != NONE)
        good = np.zeros(self.a.rows, bool)
        good[wanted] = True
        largest = np.zeros(self.a.rows)
        for rows, samples in self.a.pieces():
            here = wanted[slice(*np.searchsorted(wanted, [rows.start, rows.stop]))] if self.a.rows_first else wanted
            if not len(here):
                continue
            ours = self.a.read(rows if len(wanted) == self.a.rows else here, samples)
            theirs = self.b.read(index[here], samples)
            if np.array_equal(ours, theirs):
                continue
            close, apart = self._close(ours, theirs, self.scale[here])
            largest[here] = np.maximum(largest[here], apart)
            good[here] &= close
            if until_failure and not close.all():
                return np.zeros(self.a.rows, bool), 0.0
        return good, float(largest[good].max(initial=0.0))

    def _close(self, ours: Values, theirs: Values, scale: Values) -> tuple[Mask, Values]:
        with np.errstate(all="ignore"):
            apart = ours - theirs
            np.abs(apart, out=apart)
            room = np.abs(ours)
            room *= self.precision.relative
            room += (self.precision.absolute * scale)[:, None]
            room -= apart
        if not room.min() >= 0:
            same = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
            apart[same], room[same] = 0, 0
        close: Mask = np.logical_and.reduce(room >= 0, axis=1)
        return close, apart.max(1, initial=0.0)

    @cached_property
    def few(self) -> Index:
        """Rows of b that look like FEW_ROWS rows of a, taken at random, or NONE."""
        rows = np.random.default_rng(3).permutation(self.a.rows)[:FEW_ROWS]
        return self._near(rows, np.arange(self.b.rows))

    def distance(self) -> float:
        """How far the nearest row of b is from a usual row of a, in units of that row's size."""
        ours, theirs = self.a.sketch[0], self.b.sketch[0]
        near = []
        for row in np.random.default_rng(3).permutation(self.a.rows)[: FEW_ROWS // 4]:
            near.append(np.linalg.norm(theirs - ours[row], axis=1).min() / (np.linalg.norm(ours[row]) or 1.0))
        return float(np.median(near))

    @cached_property
    def matched(self) -> tuple[Index, float]:
        """([rows of a] the row of b that each row of a is, or NONE; the largest difference). One to one; all pairs compared in full.

        Of rows that are equal among themselves the first goes to the first. Where a row is a single value some agree by chance.
        """
        index = self._equal()
        left, spare = np.flatnonzero(index == NONE), np.setdiff1d(np.arange(self.b.rows), index)
        if len(left) and len(spare):
            index[left] = self._alike_values(left, spare) if self.a.samples == 1 else self._alike(left, spare)
        good, largest = self.agree(index)
        index[~good] = NONE
        return index, largest

    def _equal(self) -> Index:
        """Rows with the very same sums."""
        places: dict[bytes, list[int]] = {}
        for row, sums in reversed(list(enumerate(self.b.sketch[0] + 0.0))):  # + 0.0: no negative zeros
            places.setdefault(sums.tobytes(), []).append(row)
        found = (places.get(sums.tobytes()) for sums in self.a.sketch[0] + 0.0)
        return np.array([rows.pop() if rows else NONE for rows in found], np.int64)

    def _alike_values(self, left: Index, spare: Index) -> Index:
        """Rows of one value: those that agree, going up both lists."""
        ours, theirs = self.a.sketch[0][left, 0], self.b.sketch[0][spare, 0]
        margin = self.precision.relative * np.abs(ours) + self.precision.absolute * self.scale[left]
        up_a, up_b = np.argsort(ours, kind="stable"), np.argsort(theirs, kind="stable")
        out = np.full(len(left), NONE, np.int64)
        for i, j in _upwards(ours[up_a].tolist(), theirs[up_b].tolist(), margin[up_a].tolist()):
            out[up_a[i]] = spare[up_b[j]]
        return out

    def _alike(self, left: Index, spare: Index) -> Index:
        """The nearest row that looks alike; rows that want the same one share out those that do, in order."""
        out = self._near(left, spare)
        wanted, counts = np.unique(out[out != NONE], return_counts=True)
        free = np.setdiff1d(spare, out)
        for row in wanted[counts > 1]:
            claims = np.flatnonzero(out == row)
            others = free[self.looks(np.full(len(free), left[claims[0]]), free)]
            options = np.sort(np.append(others, row))[: len(claims)]
            out[claims] = NONE
            out[claims[: len(options)]] = options
            free = np.setdiff1d(free, options)
        return out

    def _near(self, left: Index, spare: Index) -> Index:
        """[left] which of `spare` looks alike and has the nearest sums, or NONE."""
        ours, theirs, reach = self.a.sketch[0][left], self.b.sketch[0][spare], self.reach[left, 0]
        order = np.argsort(theirs[:, 0], kind="stable")
        first = theirs[order, 0]
        low, high = np.searchsorted(first, ours[:, 0] - reach, "left"), np.searchsorted(first, ours[:, 0] + reach, "right")
        until = np.cumsum(high - low)
        out = np.full(len(left), NONE, np.int64)
        start = 0
        while start < len(left):
            done = until[start - 1] if start else 0
            stop = max(start + 1, int(np.searchsorted(until, done + COMPARED, "right")))
            counts = (high - low)[start:stop]
            rows = np.repeat(np.arange(start, stop), counts)
            places = np.repeat(low[start:stop] - (until[start:stop] - counts), counts) + np.arange(done, done + len(rows))
            partners = order[places]
            for sums_a, sums_b in zip(ours.T, theirs.T, strict=True):
                close = np.abs(sums_a[rows] - sums_b[partners]) <= reach[rows]
                rows, partners = rows[close], partners[close]
            apart = np.square(ours[rows] - theirs[partners]).sum(1)
            best = np.lexsort((partners, apart, rows))[::-1]
            out[rows[best]] = spare[partners[best]]
            start = stop
        return out


def _upwards(a: list[float], b: list[float], margin: list[float]) -> Iterator[tuple[int, int]]:
    """Places of two sorted lists that agree, each used once."""
    i = j = 0
    while i < len(a) and j < len(b):
        if abs(a[i] - b[j]) <= margin[i]:
            yield i, j
            i, j = i + 1, j + 1
        elif b[j] < a[i]:
            j += 1
        else:
            i += 1
