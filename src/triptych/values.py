"""Numbers of the float dtypes out of their bytes, and rounded into another one: for comparing files, not for converting them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.floating[Any]]

PRECISION = {"F64": 53, "F32": 24, "F16": 11, "BF16": 8, "F8_E4M3": 4, "F8_E5M2": 3}
"""Significant bits of the dtypes whose numbers can be had, the widest first."""
PLAIN = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
WRITTEN = ("F64", "F32", "F16", "BF16")
"""Those that numbers can be rounded into."""


def decode(raw: NDArray[np.uint8], dtype: str) -> Values:
    """The numbers in bytes of a dtype of `PRECISION`, along the last axis; float64 for F64, else float32.

    >>> decode(np.array([0x80, 0x3F, 0x38, 0xC0], np.uint8), "BF16"), decode(np.array([0x38, 0x7F], np.uint8), "F8_E4M3")
    (array([ 1.   , -2.875], dtype=float32), array([ 1., nan], dtype=float32))
    """
    if dtype in PLAIN:
        values: Values = raw.view(PLAIN[dtype])
        return values.astype(np.float32) if dtype == "F16" else values
    if dtype == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return _eighths(dtype)[raw]


def encode(values: Values, dtype: str) -> NDArray[np.uint8]:
    """The bytes of numbers rounded to nearest even into a dtype of `WRITTEN`; every NaN becomes the same one.

    >>> encode(np.array([1.0, -2.875], np.float32), "BF16").tobytes().hex(" ")
    '80 3f 38 c0'
    """
    with np.errstate(over="ignore"):
        if dtype == "BF16":
            bits = values.astype(np.float32, order="C").view(np.uint32)
            rounded: NDArray[Any] = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype("<u2")
        else:
            rounded = values.astype(PLAIN[dtype], order="C")
    lost = np.isnan(values)
    if lost.any():
        rounded[lost] = 0x7FC0 if dtype == "BF16" else np.nan
    return rounded.view(np.uint8)


@lru_cache(maxsize=2)
def _eighths(dtype: str) -> NDArray[np.float32]:
    """The numbers of all 256 bytes of an 8-bit dtype."""
    exponent_bits = 4 if dtype == "F8_E4M3" else 5
    fraction_bits = 7 - exponent_bits
    byte = np.arange(256)
    exponent, fraction = (byte >> fraction_bits) & ((1 << exponent_bits) - 1), byte & ((1 << fraction_bits) - 1)
    bias = (1 << (exponent_bits - 1)) - 1
    scale = np.where(exponent == 0, 0, 1) + fraction / (1 << fraction_bits)
    out = np.ldexp(scale, np.maximum(exponent, 1) - bias)
    if dtype == "F8_E4M3":
        out[(byte & 127) == 127] = np.nan
    else:
        out[(exponent == 31) & (fraction == 0)] = np.inf
        out[(exponent == 31) & (fraction != 0)] = np.nan
    out[byte > 127] *= -1
    return np.asarray(out, np.float32)
