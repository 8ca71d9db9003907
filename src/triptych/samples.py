"""Numbers of a stored tensor, as far as statistics ask for them: any float dtype, and GGUF's packed types through the gguf package."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import MissingExtraError, PlanError
from .formats import Tensor, gguf
from .holes import opened
from .values import PRECISION, decode

Floats = NDArray[np.float32]
SCALED = 128
"""Rows and columns that share a scale in the files of 8-bit floats that come with `_scale_inv`."""


class Numbers:
    """A stored matrix or vector. `[rows]` and `[rows, columns]`, slices from 0, give float32; only the bytes asked for are read.

    scale: of blocks of SCALED x SCALED numbers, where the file has them. Raises PlanError for a dtype that holds no numbers.
    """

    def __init__(self, root: Path, tensor: Tensor, scale: Numbers | None = None) -> None:
        length, _ = gguf.BLOCKS.get(tensor.dtype, (1, 0))
        if tensor.dtype not in PRECISION and length == 1:
            raise PlanError(
                "statistics need numbers", tensor=tensor.name, file=tensor.file, found=tensor.dtype, expected=", ".join(PRECISION)
            )
        self.shape, self.tensor, self.scale, self._packed = tensor.shape, tensor, scale, length
        self._file = opened(root, tensor.file)
        whole = mmap.mmap(self._file.fd, 0, access=mmap.ACCESS_READ)
        self._file.close()  # a map needs no descriptor
        if hasattr(mmap, "MADV_RANDOM"):
            whole.madvise(mmap.MADV_RANDOM)
        flat = np.frombuffer(whole, np.uint8, tensor.stop - tensor.start, tensor.start)
        self._bytes = flat.reshape(tensor.shape[0], -1)

    def __getitem__(self, key: Any) -> Floats:
        rows, columns = key if isinstance(key, tuple) else (key, slice(None))
        width = self.shape[1] if len(self.shape) > 1 else 1
        stop = min(columns.stop or width, width)
        blocks = -(-stop // self._packed)
        first, last, _ = rows.indices(self.shape[0])
        with self._file.having(*(self.tensor.start + row * self._bytes.shape[1] for row in (first, last))):
            raw = np.ascontiguousarray(self._bytes[rows, : blocks * self._bytes.shape[1] * self._packed // width])
        found = (decode(raw, self.tensor.dtype) if self._packed == 1 else _unpacked(raw, self.tensor.dtype)).astype(np.float32)[:, :stop]
        if self.scale is not None:
            found = found * self.scale[:].repeat(SCALED, 0).repeat(SCALED, 1)[: len(found), :stop]
        return found if len(self.shape) > 1 else found[:, 0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Floats:
        return self[:]


def _unpacked(raw: NDArray[np.uint8], dtype: str) -> Floats:
    try:
        from gguf import GGMLQuantizationType, quants
    except ImportError:
        raise MissingExtraError("gguf", "gguf") from None
    try:
        found: Floats = quants.dequantize(raw, GGMLQuantizationType[dtype])
    except (KeyError, NotImplementedError):
        raise PlanError("the gguf package cannot unpack this type", found=dtype) from None
    return found
