"""The safetensors file: header <-> names, dtypes, shapes and byte ranges. Knows no layout and reads no tensor.

8 bytes   length n of the header, little endian
n bytes   JSON: {"__metadata__": {text: text}, name: {"dtype", "shape", "data_offsets": [start, stop]}}, padded with spaces
the rest  the tensors, side by side: no holes, no overlaps
"""

from __future__ import annotations

import gc
import json
import math
import os
import reprlib
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import repeat
from operator import attrgetter, sub
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from ..errors import FormatError

BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
"""Bits of one element of every dtype."""
MAX_HEADER, MAX_DIMS, MAX_SIZE = 100_000_000, 64, 1 << 63
MAX_LISTS, MAX_COMMAS = 1 << 20, 1 << 22
"""What a JSON text may hold: parsed, an empty list takes fifty times its letters."""
ALIGN = 4096
METADATA = "__metadata__"


class Tensor(NamedTuple):
    """Where a tensor lies: bytes `start` to `stop` of the file named `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Header:
    """What one file holds, in the order of the bytes. `changed` is its time of modification in ns: a file written to is another file.

    `head`: the first so many bytes stay as they are in every output made from it, each tensor then begins at a multiple of `align` (GGUF).
    """

    file: str
    size: int
    changed: int
    tensors: tuple[Tensor, ...] = field(repr=False)
    metadata: Mapping[str, str] = field(hash=False)
    head: int = 0
    align: int = 1


def read_header(path: Path) -> Header:
    """The header of one file, every claim in it checked against the file's size. Raises FormatError."""
    fd = open_file(path)
    try:
        info = os.fstat(fd)
        first = _pread(fd, 8, 0, path.name)
        length = int.from_bytes(first, "little")
        if len(first) < 8 or length < 2:
            raise FormatError("not a safetensors file", file=path.name, found=f"{info.st_size} bytes, header of {length}")
        if length > min(MAX_HEADER, info.st_size - 8):
            raise FormatError(
                "the header is longer than the file" if length <= MAX_HEADER else "the header is too long",
                file=path.name,
                expected=f"at most {min(MAX_HEADER, info.st_size - 8)} bytes",
                found=f"{length} bytes, in a file of {info.st_size}",
                try_="the file is cut short or no safetensors file: fetch it again",
            )
        raw = _pread(fd, length, 8, path.name)
    finally:
        os.close(fd)
    if raw[:1] != b"{":
        raise FormatError("the JSON of a header is no table", file=path.name, found=repr(raw[:8]))
    _check_amount(raw, path.name)
    with without_gc():
        tensors, metadata = _quick(raw, path.name, info.st_size) or _thorough(raw, path.name, info.st_size)
    return Header(path.name, info.st_size, info.st_mtime_ns, tuple(tensors), metadata)


def header_bytes(tensors: Iterable[tuple[str, str, tuple[int, ...], int, int]], metadata: Mapping[str, str]) -> bytes:
    """Length and header for tensors of (name, dtype, shape, start, stop) that count from the data section, which then begins on a page.

    >>> len(header_bytes([("a", "BF16", (2, 3), 0, 12)], {}))
    4096
    """
    table: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    for name, dtype, shape, start, stop in tensors:
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": (start, stop)}
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    length = -(-(8 + len(text)) // ALIGN) * ALIGN - 8
    if length > MAX_HEADER:
        raise FormatError("the header is too long", expected=f"at most {MAX_HEADER} bytes", found=f"{length} bytes")
    return length.to_bytes(8, "little") + text.ljust(length)


def nbytes(dtype: str, shape: Iterable[int]) -> int | None:
    """Bytes of a tensor, or None when its bits do not fill the last byte.

    >>> nbytes("F4", (3, 2)), nbytes("F4", (3, 1))
    (3, None)
    """
    whole, rest = divmod(math.prod(shape) * BITS[dtype], 8)
    return None if rest else whole


def open_file(path: Path) -> int:
    """A descriptor for reading a regular file. Raises FormatError for anything else: a folder, a pipe, nothing."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise FormatError("the file cannot be read", file=str(path), found=error.strerror or str(error)) from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise FormatError("not a regular file", file=str(path))
    return fd


def _pread(fd: int, size: int, at: int, file: str) -> bytes:
    """`size` bytes from byte `at`, fewer only at the end of the file. Raises FormatError."""
    try:
        raw = os.pread(fd, size, at)
        while len(raw) < size and (more := os.pread(fd, size - len(raw), at + len(raw))):
            raw += more
    except OSError as error:
        raise FormatError("the file cannot be read", file=file, found=error.strerror or str(error)) from None
    return raw


def parse_json(raw: bytes, file: str) -> dict[str, Any]:
    """A JSON object out of a file of unknown origin; no key twice, no NaN, every text encodable. Raises FormatError."""
    _check_amount(raw, file)
    try:
        table = _decoded(raw)
        if table is None or _texts(table) != _quoted(raw):  # it is damaged, or a key stands twice: the slow way says where
            table = json.loads(raw.decode("utf-8"), object_pairs_hook=_object, parse_constant=_no_constant)
    except RecursionError:
        raise FormatError("the JSON is nested too deeply", file=file) from None
    except ValueError as error:
        raise FormatError("the JSON cannot be read", file=file, found=str(error)[:120]) from None
    if not isinstance(table, dict):
        raise FormatError("the JSON is no table", file=file, found=type(table).__name__)
    return table


def _decoded(raw: bytes) -> Any:
    """A JSON value, in half the time that `json` takes; None for what is refused here and `json` may read: 1e400, half a surrogate pair."""
    try:
        return msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _check_amount(raw: bytes, file: str) -> None:
    """That a text does not take gigabytes when it is parsed. Raises FormatError."""
    if len(raw) <= MAX_LISTS:
        return
    lists, commas = raw.count(b"[") + raw.count(b"{"), raw.count(b",")
    if lists > MAX_LISTS or commas > MAX_COMMAS:
        raise FormatError("the JSON holds too much", file=file, expected=f"at most {MAX_LISTS} lists and tables, and {MAX_COMMAS} commas",
                          found=f"{lists} and {commas}")  # fmt: skip


@contextmanager
def without_gc() -> Iterator[None]:
    """Parsing many small objects takes less than half the time when the collector does not walk them again and again."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} stands twice")
    return table


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def _metadata(table: object, file: str) -> dict[str, str]:
    if not isinstance(table, dict) or not all(isinstance(value, str) for value in table.values()):
        raise FormatError(f"{METADATA} is no table of texts", file=file, found=reprlib.repr(table))
    return table


_place = attrgetter("start", "stop")


def _thorough(raw: bytes, file: str, size: int) -> tuple[list[Tensor], dict[str, str]]:
    """Tensors in the order of their bytes, and the metadata, entry by entry. Raises FormatError, which says what is wrong, and where."""
    table = parse_json(raw, file)
    metadata = _metadata(table.pop(METADATA, {}), file)
    tensors = sorted((_tensor(name, entry, file, 8 + len(raw)) for name, entry in table.items()), key=_place)
    _check_tiling(tensors, file, 8 + len(raw), size)
    return tensors, metadata


class _Entry(msgspec.Struct, gc=False):
    """The value of every key of a header, that of the metadata too: then none of these is told."""

    dtype: str = ""
    shape: tuple[int, ...] | None = None
    data_offsets: tuple[int, int] | None = None


class _About(msgspec.Struct):
    metadata: dict[str, str] = msgspec.field(name=METADATA, default_factory=dict)


_ENTRIES, _ABOUT = msgspec.json.Decoder(dict[str, _Entry]), msgspec.json.Decoder(_About)
_told = attrgetter("dtype", "shape", "data_offsets")


def _quick(raw: bytes, file: str, size: int) -> tuple[list[Tensor], dict[str, str]] | None:
    """What `_thorough` gives, read by type and checked column by column in a fourth of its time, or None when something is not right."""
    try:
        table, metadata = _ENTRIES.decode(raw), _ABOUT.decode(raw).metadata
        quoted = _quoted(raw) - (table.pop(METADATA, None) is not None)
        if quoted != 5 * len(table) + 2 * len(metadata):  # a name, three keys and a dtype for each: one more, and a key stands twice
            return None
        dtypes, shapes, offsets = zip(*map(_told, table.values()), strict=True)
        starts, stops = zip(*offsets, strict=True)
        sizes, dtypes, shapes = zip(*map(_kind, dtypes, shapes), strict=True)
        if sizes != tuple(map(sub, stops, starts)):
            return None
    except (msgspec.DecodeError, TypeError, KeyError, ValueError, RecursionError):
        return None
    base = 8 + len(raw)
    columns = zip(table, dtypes, shapes, repeat(file), map(base.__add__, starts), map(base.__add__, stops), strict=False)
    tensors: list[Tensor] = list(map(tuple.__new__, repeat(Tensor), columns))
    if starts[1:] != stops[:-1]:
        tensors.sort(key=_place)
        starts, stops = zip(*sorted(zip(starts, stops, strict=True)), strict=True)
    whole = (starts[0], stops[-1]) == (0, size - base) and starts[1:] == stops[:-1]
    return (tensors, metadata) if whole else None


@lru_cache(maxsize=4096)
def _kind(dtype: str, shape: tuple[int, ...]) -> tuple[int | None, str, tuple[int, ...]]:
    """Bytes, dtype and shape of a tensor, one value for all alike. Raises ValueError for a shape that none may have, or KeyError."""
    if len(shape) > MAX_DIMS or (shape and not 0 <= min(shape) <= max(shape) < MAX_SIZE) or math.prod(filter(None, shape)) >= MAX_SIZE:
        raise ValueError
    return nbytes(dtype, shape), dtype, shape


def _texts(value: object) -> int:
    """Texts in a parsed JSON value, keys and values: as many as `_quoted` counts in its text when no key stands twice."""
    found = 0
    open_: list[Any] = [[value]]
    while open_:
        table = open_.pop()
        values = table
        if type(table) is dict:
            found, values = found + len(table), table.values()
        kinds = list(map(type, values))
        found += kinds.count(str)
        if dict in kinds or list in kinds:
            open_ += [value for value in values if type(value) in (dict, list)]
    return found


def _quoted(raw: bytes) -> int:
    r"""Texts in valid JSON, keys and values: each stands in two quotes, and a quote with a backslash of its own before it is no such one.

    >>> _quoted(rb'{"a": "b\"c", "d\\": 1}')
    3
    """
    escaped = raw.replace(rb"\\", b"").count(rb"\"") if b"\\" in raw else 0
    return (raw.count(b'"') - escaped) // 2


def _tensor(name: str, entry: Any, file: str, base: int) -> Tensor:
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if len(entry) != 3:
            raise ValueError
        name.encode()
    except (TypeError, KeyError, ValueError):
        raise FormatError("a tensor's entry is malformed", tensor=name, file=file, found=reprlib.repr(entry),
                          expected="dtype, shape, data_offsets: [start, stop]") from None  # fmt: skip
    if type(dtype) is not str or dtype not in BITS:
        raise FormatError("unknown dtype", tensor=name, file=file, found=reprlib.repr(dtype), expected=", ".join(BITS))
    if type(shape) is not list or len(shape) > MAX_DIMS:
        raise FormatError("a shape is no list of natural numbers", tensor=name, file=file, found=reprlib.repr(shape))
    bits = BITS[dtype]
    for n in shape:
        if type(n) is not int or not 0 <= n < MAX_SIZE:
            raise FormatError("a shape is no list of natural numbers", tensor=name, file=file, found=reprlib.repr(shape))
        bits *= n
    if bits == 0 and math.prod(filter(None, shape)) >= MAX_SIZE:  # empty, but others overflow on their way to the zero
        raise FormatError("a shape is too large", tensor=name, file=file, found=reprlib.repr(shape))
    if not (_natural(start) and _natural(stop)):
        raise FormatError("an offset is no natural number", tensor=name, file=file, found=reprlib.repr([start, stop]))
    if bits != 8 * (stop - start):
        need = f"{bits // 8} bytes for {dtype} {tuple(shape)}" if bits % 8 == 0 else f"a whole number of bytes, not {bits} bits"
        found = f"{stop - start} bytes"
        raise FormatError("a tensor's bytes do not fit its shape", tensor=name, file=file, expected=need[:120], found=found)
    return Tensor(name, dtype, tuple(shape), file, base + start, base + stop)


def _natural(number: object) -> bool:
    return type(number) is int and 0 <= number < MAX_SIZE


def _check_tiling(tensors: list[Tensor], file: str, base: int, size: int) -> None:
    end = base
    for tensor in tensors:
        if tensor.start != end:
            what = "two tensors overlap" if tensor.start < end else "there is a hole between tensors"
            raise FormatError(what, tensor=tensor.name, file=file, expected=f"its data at byte {end}", found=f"at byte {tensor.start}")
        end = tensor.stop
    if end != size:
        what = "the file is cut short" if end > size else "bytes behind the last tensor"
        raise FormatError(
            what, file=file, expected=f"{end} bytes", found=f"{size} bytes", try_="fetch the file again" if end > size else None
        )
