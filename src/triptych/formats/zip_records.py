"""The records of a zip archive as byte ranges of the file. Nothing is unpacked: a record that is read must be stored as it is.

Read from the end: the end record, with the 64-bit one before it where numbers are large, then the directory, whose entries tell where each
record's own header lies. One archive has one reading: bytes behind the end record, two records of one name and ranges that leave the
file are errors; that ranges do not overlap is checked of those that hold tensors (torch_zip.py).
"""

from __future__ import annotations

import os
import struct
from typing import NamedTuple

from ..errors import FormatError, PlanError

MAX_DIRECTORY = 1 << 24
END, END64, LOCATOR, ENTRY, LOCAL = b"PK\5\6", b"PK\6\6", b"PK\6\7", b"PK\1\2", b"PK\3\4"
ALL16, ALL32 = 0xFFFF, 0xFFFFFFFF
ENCRYPTED, FOLDER = 1, 0x10


class Record(NamedTuple):
    """One file of the archive: `size` bytes whose own header begins at byte `header`; `plain` when they are stored as they are."""

    header: int
    size: int
    plain: bool
    name: bytes


def read_records(fd: int, size: int, file: str) -> tuple[dict[bytes, Record], int]:
    """Name -> record, and the byte at which the directory begins. Raises FormatError (damaged)."""
    at, length, count, end = _directory(fd, size, file)
    if length > MAX_DIRECTORY:
        raise FormatError("the zip directory is too long", file=file, expected=f"at most {MAX_DIRECTORY} bytes", found=f"{length} bytes")
    if at + length > end:
        raise FormatError("the zip directory lies outside the file", file=file, found=f"bytes {at} to {at + length} of {end}")
    raw = os.pread(fd, length, at)
    records: dict[bytes, Record] = {}
    place = 0
    try:
        while place < length:
            record, place = _entry(raw, place, file)
            if record.name in records:
                raise FormatError("the zip directory has one name twice", file=file, found=_text(record.name))
            records[record.name] = record
    except struct.error:
        raise FormatError("the zip directory is cut short", file=file) from None
    if len(records) != count:
        raise FormatError("the zip directory is damaged", file=file, expected=f"{count} records", found=f"{len(records)}")
    return records, at


def data_start(fd: int, record: Record, end: int, file: str) -> int:
    """The first byte of a record's content, which ends before byte `end`. Raises FormatError (damaged), PlanError (not stored as it is)."""
    if not record.plain:
        raise PlanError("a record of the archive is compressed, encrypted or a folder", file=file, found=_text(record.name),
                        try_="load and save it again with torch: it stores tensors as they are")  # fmt: skip
    head = os.pread(fd, 30 + len(record.name), record.header) if record.header < end else b""
    if len(head) < 30 or head[:4] != LOCAL or head[30:] != record.name:
        raise FormatError("the zip directory points at no record", file=file, expected=_text(record.name), found=f"byte {record.header}")
    names, extra = struct.unpack_from("<2H", head, 26)
    start: int = record.header + 30 + names + extra
    if names != len(record.name) or start + record.size > end:
        raise FormatError("a record of the archive does not end where it should", file=file, found=_text(record.name),
                          expected=f"{record.size} bytes from byte {start}, before byte {end}")  # fmt: skip
    return start


def content(fd: int, record: Record, end: int, file: str, limit: int) -> bytes:
    """All bytes of a record. Raises FormatError for more than `limit`, and what `data_start` raises."""
    start = data_start(fd, record, end, file)
    if record.size > limit:
        raise FormatError(
            "a record of the archive is too large",
            file=file,
            expected=f"at most {limit} bytes",
            found=f"{_text(record.name)}: {record.size} bytes",
        )
    return os.pread(fd, record.size, start)


def _directory(fd: int, size: int, file: str) -> tuple[int, int, int, int]:
    """(first byte, length, number of records, byte behind the room for it) of the directory."""
    end = os.pread(fd, 22, max(0, size - 22))
    if len(end) < 22 or end[:4] != END:
        raise FormatError(
            "the archive has no end", file=file, found=f"{size} bytes", try_="the file is cut short or longer than it was: fetch it again"
        )
    disk, first, here, count, length, at, comment = struct.unpack("<4H2IH", end[4:])
    if comment or disk not in (0, ALL16) or first not in (0, ALL16) or here != count:
        raise FormatError("the archive is cut into volumes or has a comment", file=file)
    locator = os.pread(fd, 20, size - 42) if size >= 42 else b""
    if locator[:4] != LOCATOR:
        return at, length, count, size - 22
    where = struct.unpack("<Q", locator[8:16])[0]
    end64 = os.pread(fd, 56, where) if where <= size - 98 else b""
    if len(end64) < 56 or end64[:4] != END64:
        raise FormatError("the archive's 64-bit end is not where it should be", file=file, found=f"byte {where} of {size}")
    here, count, length, at = struct.unpack("<4Q", end64[24:])
    if here != count:
        raise FormatError("the archive is cut into volumes", file=file)
    return at, length, count, where


def _entry(raw: bytes, at: int, file: str) -> tuple[Record, int]:
    mark, flags, method, packed, size, names, extra, comment, kind, header = struct.unpack_from("<4s4x2H8x2I3H4x2I", raw, at)
    if mark != ENTRY:
        raise FormatError("the zip directory is damaged", file=file, found=f"{mark!r} in place of an entry")
    name = raw[at + 46 : at + 46 + names]
    more = at + 46 + names
    stop = more + extra + comment
    if stop > len(raw):
        raise FormatError("the zip directory is cut short", file=file)
    if ALL32 in (size, packed, header):
        size, packed, header = _large(raw[more : more + extra], [size, packed, header], name, file)
    plain = method == 0 and not flags & ENCRYPTED and not kind & FOLDER
    if plain and packed != size:
        raise FormatError("a stored record has two sizes", file=file, found=f"{_text(name)}: {packed} and {size} bytes")
    return Record(header, size, plain, name), stop


def _large(extra: bytes, numbers: list[int], name: bytes, file: str) -> list[int]:
    """The numbers that do not fit 32 bits, from the entry's extra field 1."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            wide = iter(struct.unpack_from(f"<{min(length, len(extra) - at - 4) // 8}Q", extra, at + 4))
            found = [next(wide, None) if number == ALL32 else number for number in numbers]
            if None not in found:
                return [number for number in found if number is not None]
        at += 4 + length
    raise FormatError("a zip entry lacks its 64-bit sizes", file=file, found=_text(name))


def _text(name: bytes) -> str:
    return name[:80].decode("utf-8", "backslashreplace")
