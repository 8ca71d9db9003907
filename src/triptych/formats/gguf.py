"""The GGUF file: metadata, names, types, shapes and byte ranges of tensors. Knows no layout and reads no tensor.

    magic, version, number of tensors, number of metadata entries
    metadata   key, type, value; lists are typed once
    tensors    name, dims (fastest first, NumPy's shape reversed), type, offset from the data section
    data       from the next multiple of the alignment; every tensor begins at one, padded with fewer bytes than that

Numbers may be packed into blocks of 32 to 256. A block never spans two rows, so every row is a whole number of bytes and rows can be moved
as they are, whatever their type.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import FormatError, PlanError
from . import safetensors
from .safetensors import MAX_SIZE, Header, Tensor, open_file, without_gc

SUFFIX = ".gguf"
MAGIC, VERSIONS, ALIGNMENT = b"GGUF", (2, 3), "general.alignment"
WINDOW = 1 << 20
MAX_TENSORS, MAX_ENTRIES, MAX_ITEMS, MAX_DIMS = 1 << 16, 1 << 16, 1 << 21, 4
MAX_NAME, MAX_TEXT, MAX_LIST, MAX_NESTED = 1 << 12, 1 << 24, 1 << 12, 4
SLOW = 16
"""Items that are visited one by one count as so many."""

TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip
"""Number of a tensor type -> name, numbers in a block, bytes of a block."""
BLOCKS = {name: (length, size) for name, length, size in TYPES.values()}
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
"""Number of a metadata type -> how struct reads it."""
UINT32, BOOL, TEXT, LIST = 4, 7, 8, 9


class Long(NamedTuple):
    """A list of the metadata that is not decoded, such as a vocabulary: the number of its type, its length, where its items lie."""

    type: int
    length: int
    start: int
    stop: int


Value = bool | int | float | str | Long | tuple["Value", ...]


@dataclass(frozen=True)
class GgufFile:
    """What one file holds.

    Bytes 0 to `data` are the head: metadata, names, types, shapes. A file with other rows in the same tensors begins with the same bytes.
    """

    header: Header
    version: int
    alignment: int
    data: int
    metadata: Mapping[str, Value] = field(hash=False, repr=False)

    @property
    def gaps(self) -> tuple[tuple[int, int], ...]:
        """The byte ranges behind `data` that are padding: with the head and the tensors they make up the whole file."""
        ends = [self.data, *(tensor.stop for tensor in self.header.tensors)]
        starts = [*(tensor.start for tensor in self.header.tensors), self.header.size]
        return tuple((end, start) for end, start in zip(ends, starts, strict=True) if end < start)


def config_of(file: GgufFile) -> dict[str, Any]:
    """The metadata as a config: `model_type` "gguf", and the keys of the architecture without its name and without `attention.`.

    `llama.attention.head_count_kv` becomes `head_count_kv`.
    """
    architecture = file.metadata.get("general.architecture", "")
    begin = f"{architecture}."
    mine = {key.removeprefix(begin): value for key, value in file.metadata.items() if key.startswith(begin)}
    table = {key.removeprefix("attention."): list(value) if isinstance(value, tuple) else value for key, value in mine.items()}
    return {**table, "model_type": "gguf", "architecture": architecture}


def nbytes(dtype: str, shape: tuple[int, ...]) -> int | None:
    """Bytes of a tensor of any dtype, of GGUF or safetensors, or None when its numbers do not fill whole blocks and bytes.

    >>> nbytes("Q4_1", (576, 576)), nbytes("Q4_1", (576,)), nbytes("Q4_1", (576, 16)), nbytes("BF16", (3, 5))
    (207360, 360, None, 30)
    """
    if dtype not in BLOCKS:
        return safetensors.nbytes(dtype, shape)
    length, size = BLOCKS[dtype]
    row = shape[-1] if shape else 1
    return None if row % length else math.prod(shape) // length * size


def read(path: Path) -> GgufFile:
    """Metadata and tensors of one file, every claim in it checked against the file's size.

    Raises FormatError (damaged, no GGUF file), PlanError (big-endian, or a version that is not read).
    """
    fd = open_file(path)
    try:
        info = os.fstat(fd)
        with without_gc():
            cursor = _Cursor(fd, info.st_size, path.name)
            version, count, entries = _begin(cursor)
            metadata = _metadata(cursor, entries)
            alignment = _alignment(metadata, path.name)
            infos = [_info(cursor) for _ in range(count)]
    finally:
        os.close(fd)
    data = -(-cursor.at // alignment) * alignment
    if not infos:
        data = min(data, info.st_size)
    tensors = [Tensor(i.name, i.dtype, i.shape, path.name, data + i.offset, data + i.offset + i.size) for i in infos]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.stop))
    _check_tiling(tensors, path.name, data, info.st_size, alignment)
    values = {key: value for key, (_, value) in metadata.items()}
    return GgufFile(
        Header(path.name, info.st_size, info.st_mtime_ns, tuple(tensors), {}, data, alignment), version, alignment, data, values
    )


class _Cursor:
    """A place in the file, and one window of its bytes. `items` and `text` are what may still be listed and decoded."""

    def __init__(self, fd: int, size: int, file: str) -> None:
        self.fd, self.size, self.file, self.at = fd, size, file, 0
        self.window, self.base = b"", 0
        self.items, self.text = MAX_ITEMS, MAX_TEXT

    def take(self, size: int) -> bytes:
        start = self.at
        self.skip(size)
        if self.at > self.base + len(self.window):
            self.window, self.base = os.pread(self.fd, max(size, WINDOW), start), start
            if len(self.window) < size:
                raise FormatError("the file was cut short while it was read", file=self.file)
        return self.window[start - self.base : self.at - self.base]

    def skip(self, size: int) -> None:
        if size > self.size - self.at:
            raise FormatError("the file is cut short", file=self.file, expected=f"{size} bytes from byte {self.at}",
                              found=f"{self.size} bytes in all", try_="fetch the file again")  # fmt: skip
        self.at += size

    def skip_texts(self, count: int) -> None:
        """Pass over texts by their lengths alone: a vocabulary has hundreds of thousands."""
        length_at = struct.Struct("<Q").unpack_from
        place, last = self.at - self.base, len(self.window) - 8
        for _ in range(count):
            if place > last:  # not wholly in the window: read the next one
                self.at = self.base + place
                self.take(8)
                place, last = 0, len(self.window) - 8
            place += 8 + length_at(self.window, place)[0]
        self.at = self.base + place
        self.skip(0)

    def number(self, form: str) -> int:
        number: int = struct.unpack(form, self.take(struct.calcsize(form)))[0]
        return number

    def count(self, form: str, what: str, limit: int, least: int) -> int:
        """A number of things, of at least so many bytes each, that the rest of the file can hold."""
        number = self.number(form)
        most = min(limit, (self.size - self.at) // least)
        if number > most:
            raise FormatError(f"too many {what}", file=self.file, expected=f"at most {most} from byte {self.at}", found=number)
        return number

    def spend(self, items: int) -> None:
        self.items -= items
        if self.items < 0:
            raise FormatError("the metadata have too many items", file=self.file, expected=f"at most {MAX_ITEMS}")

    def name(self, what: str) -> str:
        """A key or a tensor's name. Raises FormatError when it is no printable UTF-8."""
        raw = self.take(self.count("<Q", f"bytes in the name of {what}", MAX_NAME, 1))
        try:
            name = raw.decode()
        except UnicodeDecodeError:
            raise FormatError(f"the name of {what} is no UTF-8", file=self.file, found=repr(raw[:40])) from None
        if not name.isprintable():
            raise FormatError(f"the name of {what} has characters that cannot be printed", file=self.file, found=name[:80])
        return name


def _begin(cursor: _Cursor) -> tuple[int, int, int]:
    """(version, number of tensors, number of metadata entries)."""
    if cursor.size < 24 or cursor.take(4) != MAGIC:
        raise FormatError("not a GGUF file", file=cursor.file, found=f"{cursor.size} bytes", expected="GGUF as its first letters")
    version = cursor.number("<I")
    if version and version & 0xFFFF == 0:
        raise PlanError(
            "the file is big-endian", file=cursor.file, expected="a little-endian GGUF file", try_="gguf-convert-endian FILE little"
        )
    if version not in VERSIONS:
        raise PlanError("a version of GGUF that is not read", file=cursor.file, expected=" or ".join(map(str, VERSIONS)), found=version)
    return version, cursor.count("<Q", "tensors", MAX_TENSORS, 24), cursor.count("<Q", "metadata entries", MAX_ENTRIES, 13)


# Metadata


def _metadata(cursor: _Cursor, entries: int) -> dict[str, tuple[int, Value]]:
    """Key -> (number of the type, value)."""
    table: dict[str, tuple[int, Value]] = {}
    for _ in range(entries):
        key = cursor.name("a metadata entry")
        if key in table:
            raise FormatError("a metadata key stands twice", file=cursor.file, found=key[:80])
        kind = cursor.number("<I")
        table[key] = kind, _value(cursor, kind, 0)
    return table


def _value(cursor: _Cursor, kind: int, depth: int) -> Value:
    if kind == TEXT:
        size = cursor.count("<Q", "bytes in a text", cursor.text, 1)
        cursor.text -= size
        return cursor.take(size).decode("utf-8", "backslashreplace")
    if kind == LIST:
        return _list(cursor, depth + 1)
    if kind not in SCALARS:
        raise _unknown(cursor, kind)
    return _scalars(cursor, kind, 1)[0]


def _list(cursor: _Cursor, depth: int) -> Value:
    if depth > MAX_NESTED:
        raise FormatError("lists are nested too deeply", file=cursor.file, expected=f"at most {MAX_NESTED} deep")
    kind = cursor.number("<I")
    if kind not in SCALARS and kind not in (TEXT, LIST):
        raise _unknown(cursor, kind)
    least = struct.calcsize(SCALARS[kind]) if kind in SCALARS else 8 if kind == TEXT else 12
    length = cursor.count("<Q", "items in a list", MAX_SIZE, least)
    if length > MAX_LIST:
        start = cursor.at
        _skip(cursor, kind, length, least, depth)
        return Long(kind, length, start, cursor.at)
    cursor.spend(length if kind in SCALARS else SLOW * length)
    return _scalars(cursor, kind, length) if kind in SCALARS else tuple(_value(cursor, kind, depth) for _ in range(length))


def _scalars(cursor: _Cursor, kind: int, length: int) -> tuple[bool | int | float, ...]:
    form = SCALARS[kind]
    raw = cursor.take(length * struct.calcsize(form))
    if kind == BOOL and any(byte > 1 for byte in raw):
        raise FormatError("a truth value is neither 0 nor 1", file=cursor.file, found=max(raw))
    return struct.unpack(f"<{length}{form[1]}", raw)


def _skip(cursor: _Cursor, kind: int, length: int, least: int, depth: int) -> None:
    if kind in SCALARS:
        cursor.skip(length * least)
        return
    if kind == TEXT:
        cursor.spend(length)
        cursor.skip_texts(length)
        return
    cursor.spend(SLOW * length)
    for _ in range(length):
        _list(cursor, depth + 1)


def _unknown(cursor: _Cursor, kind: int) -> FormatError:
    return FormatError("unknown type of a metadata value", file=cursor.file, found=kind, expected="0 to 12")


def _alignment(metadata: Mapping[str, tuple[int, Value]], file: str) -> int:
    kind, value = metadata.get(ALIGNMENT, (UINT32, 32))
    if kind != UINT32 or not isinstance(value, int) or value.bit_count() != 1:
        raise FormatError("the alignment is no power of two", file=file, found=f"{ALIGNMENT} = {value!r}"[:80])
    return value


# Tensors


class _Info(NamedTuple):
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


def _info(cursor: _Cursor) -> _Info:
    name = cursor.name("a tensor")
    dims = cursor.count("<I", "dims in a tensor", MAX_DIMS, 8)
    shape = struct.unpack(f"<{dims}Q", cursor.take(8 * dims))[::-1]
    kind, offset = struct.unpack("<IQ", cursor.take(12))
    if kind not in TYPES:
        raise FormatError("unknown tensor type", tensor=name, file=cursor.file, found=kind, expected=", ".join(BLOCKS))
    if not all(0 < n < MAX_SIZE for n in shape):
        raise FormatError("a dim is no positive number", tensor=name, file=cursor.file, found=str(shape))
    dtype, length, _ = TYPES[kind]
    size = nbytes(dtype, shape)
    if size is None:
        raise FormatError("a row does not fill whole blocks", tensor=name, file=cursor.file, expected=f"a multiple of {length} for {dtype}",
                          found=f"shape {shape}")  # fmt: skip
    if offset + size >= MAX_SIZE:
        raise FormatError(
            "a tensor is larger than any file", tensor=name, file=cursor.file, found=f"{size} bytes at {offset}, shape {shape}"
        )
    return _Info(name, dtype, shape, offset, size)


def _check_tiling(tensors: list[Tensor], file: str, data: int, size: int, alignment: int) -> None:
    """That tensors lie one behind the other, each at the next multiple of the alignment, up to the end of the file; no name twice."""
    names = sorted(tensor.name for tensor in tensors)
    for a, b in pairwise(names):
        if a == b:
            raise FormatError("two tensors have one name", tensor=a, file=file)
    end = data
    for tensor in tensors:
        place = -(-end // alignment) * alignment
        if tensor.start != place:
            what = (
                "two tensors overlap"
                if tensor.start < end
                else "there is a hole between tensors"
                if tensor.start > place
                else "a tensor is not aligned"
            )
            raise FormatError(what, tensor=tensor.name, file=file, expected=f"its data at byte {place}", found=f"at byte {tensor.start}")
        end = tensor.stop
    if not end <= size < end + alignment:
        raise FormatError(
            "the file is cut short" if end > size else "bytes behind the last tensor",
            file=file,
            expected=f"{end} bytes",
            found=f"{size} bytes",
        )
