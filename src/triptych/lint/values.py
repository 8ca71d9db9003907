"""What the numbers of a tensor show at once: NaN, infinity, rows that are zero. Read once, in blocks of bounded size."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import FormatError
from ..formats import Tensor
from ..holes import Opened, opened

BLOCK = 1 << 22
"""Bytes that are read at a time."""
MAX_ROWS = 1 << 22


class _Kind(NamedTuple):
    """How a float dtype is told from its bits: `mask` leaves out the sign; from `infinity` on, magnitudes are no numbers."""

    word: str
    mask: int
    infinity: int | None
    nan: int | None = None


KINDS = {
    "F64": _Kind("<u8", (1 << 63) - 1, 0x7FF << 52), "F32": _Kind("<u4", 0x7FFFFFFF, 0x7F800000), "F16": _Kind("<u2", 0x7FFF, 0x7C00),
    "BF16": _Kind("<u2", 0x7FFF, 0x7F80), "F8_E5M2": _Kind("<u1", 0x7F, 0x7C), "F8_E4M3": _Kind("<u1", 0x7F, None, 0x7F),
}  # fmt: skip
"""The dtypes that are looked at. Whole numbers, quantised and packed ones are not: any of their bits may be right."""


class Facts(NamedTuple):
    """Of one tensor: how many NaN and infinities, and for each row along `axis` whether it is all zero."""

    nan: int
    infinite: int
    axis: int
    zero: NDArray[np.bool_]


def is_looked_at(tensor: Tensor) -> bool:
    """Whether the numbers of a tensor are looked at at all."""
    return tensor.dtype in KINDS and tensor.size > 0


def facts(source: Opened, tensor: Tensor, axis: int) -> Facts:
    """Read a tensor once. Raises FormatError when the file has become shorter."""
    kind = KINDS[tensor.dtype]
    outer, rows, inner = _shape(tensor.shape, axis)
    peaks = np.zeros(rows, kind.word)
    nan = infinite = 0
    buffer = memoryview(bytearray(max(8, min(BLOCK, tensor.size))))
    at = tensor.start
    for first, (k, n, m) in _blocks(outer, rows, inner, len(buffer) // peaks.itemsize):
        view = buffer[: k * n * m * peaks.itemsize]
        with source.having(at, at + len(view)):
            _fill(source.fd, view, at, tensor.file)
        at += len(view)
        size = np.frombuffer(view, kind.word).reshape(k, n, m) & peaks.dtype.type(kind.mask)
        peak = size.max(axis=(0, 2))
        np.maximum(peaks[first : first + n], peak, out=peaks[first : first + n])
        top = int(peak.max())
        if kind.infinity is not None and top >= kind.infinity:
            nan += int(np.count_nonzero(size > kind.infinity))
            infinite += int(np.count_nonzero(size == kind.infinity))
        elif kind.nan is not None and top >= kind.nan:
            nan += int(np.count_nonzero(size == kind.nan))
    return Facts(nan, infinite, axis, peaks == 0)


def _shape(shape: tuple[int, ...], axis: int) -> tuple[int, int, int]:
    """(slices before the axis, rows along it, numbers behind it); one row where there are too many to tell apart."""
    if not shape or shape[axis] > MAX_ROWS:
        return 1, 1, int(np.prod(shape, dtype=object))
    before, after = shape[:axis], shape[axis + 1 :]
    return int(np.prod(before, dtype=object)), shape[axis], int(np.prod(after, dtype=object))


def _blocks(outer: int, rows: int, inner: int, limit: int) -> Iterator[tuple[int, tuple[int, int, int]]]:
    """(first row, shape) of blocks of at most `limit` numbers, side by side in the file."""
    if rows * inner <= limit:
        step = limit // (rows * inner)
        yield from ((0, (min(step, outer - at), rows, inner)) for at in range(0, outer, step))
        return
    step, part = max(1, limit // inner), min(inner, limit)
    for _ in range(outer):
        for row in range(0, rows, step):
            for at in range(0, inner, part):
                yield row, (1, min(step, rows - row), min(part, inner - at))


def _fill(fd: int, view: memoryview, at: int, file: str) -> None:
    while view:
        got = os.preadv(fd, [view], at)
        if got == 0:
            raise FormatError("the file became shorter while it was read", file=file)
        view, at = view[got:], at + got


class Peek:
    """Rows of the tensors of one folder, mapped, read only where they are looked at."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.maps: dict[str, tuple[Opened, Any]] = {}

    def alike(self, tensor: Tensor, axis: int, rows: NDArray[np.int64]) -> bool:
        """Whether rows along an axis (two or more) are all equal, bit for bit. Two rows settle it for nearly every tensor."""
        if tensor.file not in self.maps:
            source = opened(self.root, tensor.file)
            self.maps[tensor.file] = source, np.frombuffer(mmap.mmap(source.fd, 0, access=mmap.ACCESS_READ), np.uint8)
            source.close()  # a map needs no descriptor
        source, whole = self.maps[tensor.file]
        outer, count, inner = _shape(tensor.shape, axis)
        raw = whole[tensor.start : tensor.stop].view(KINDS[tensor.dtype].word).reshape(outer, count, inner)

        def row(number: int) -> Any:
            start = tensor.start + number * inner * raw.itemsize
            with source.having(start, start + inner * raw.itemsize) if outer == 1 else source.having(tensor.start, tensor.stop):
                return raw[:, number].copy()

        return len(rows) > 1 and all(np.array_equal(row(rows[0]), row(other)) for other in rows[1:])


def runs(marks: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """(first, last) of every run of marks.

    >>> runs(np.array([True, False, True, True]))
    [(0, 0), (2, 3)]
    """
    edges = np.flatnonzero(np.diff(np.concatenate([[False], marks, [False]]).astype(np.int8))).tolist()
    return [(start, stop - 1) for start, stop in zip(edges[::2], edges[1::2], strict=True)]


def by_file(tensors: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
    """The tensors of each file in the order of their bytes."""
    files: dict[str, list[Tensor]] = {}
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.start):
        files.setdefault(tensor.file, []).append(tensor)
    return files
