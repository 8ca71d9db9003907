"""Byte ranges of tensors: read, compared and hashed window by window, several tensors at a time. Knows no layout."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from .errors import FormatError
from .formats import Stored, Tensor
from .holes import Opened, opened

CHUNK = 1 << 20
WORKERS = 2
Bytes = NDArray[np.uint8]
Item = TypeVar("Item")
Result = TypeVar("Result")


class Ranges:
    """Reads byte ranges of the tensors of one checkpoint, from any thread; a context that closes its files."""

    def __init__(self, stored: Stored) -> None:
        self.tensors: Mapping[str, Tensor] = stored.tensors
        self.root: Path = stored.root
        self._files: dict[str, Opened] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Ranges:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def into(self, tensor: Tensor, start: int, room: Bytes) -> None:
        """Fill `room`, one contiguous piece of memory, from byte `start` of a tensor's data. Raises FormatError."""
        file, view, done, at = self._open(tensor.file), room.data.cast("B"), 0, tensor.start + start
        with file.having(at, at + len(view)):
            while done < len(view):
                try:
                    got = os.preadv(file.fd, [view[done:]], at + done)
                except OSError as error:
                    raise FormatError("the file cannot be read", tensor=tensor.name, file=tensor.file, found=error.strerror) from None
                if not got:
                    raise FormatError("the file ended while it was read", tensor=tensor.name, file=tensor.file)
                done += got

    def read(self, tensor: Tensor, start: int, size: int) -> Bytes:
        """[size] bytes, a copy."""
        room = np.empty(size, np.uint8)
        self.into(tensor, start, room)
        return room

    def sha256(self, tensor: Tensor) -> str:
        """Of all bytes of a tensor."""
        found, room = hashlib.sha256(), np.empty(min(CHUNK, tensor.size), np.uint8)
        for at in range(0, tensor.size, CHUNK):
            window = room[: min(CHUNK, tensor.size - at)]
            self.into(tensor, at, window)
            found.update(window.data)
        return found.hexdigest()

    def _open(self, file: str) -> Opened:
        with self._lock:
            if file not in self._files:
                self._files[file] = opened(self.root, file)
            return self._files[file]


def same(one: Bytes, two: Bytes) -> bool:
    """Whether two contiguous pieces of memory of one size hold the same bytes."""
    if one.nbytes % 8 == 0 and one.nbytes:
        return bool(np.array_equal(one.reshape(-1).view(np.uint64), two.reshape(-1).view(np.uint64)))
    return bool(np.array_equal(one, two))


def first_difference(old: Ranges, one: Tensor, new: Ranges, two: Tensor) -> tuple[int, int, int] | None:
    """(byte, what `one` has there, what `two` has), or None where two tensors of one size have the same bytes."""
    rooms = np.empty((2, min(CHUNK, one.size)), np.uint8)
    for at in range(0, one.size, CHUNK):
        a, b = rooms[:, : min(CHUNK, one.size - at)]
        old.into(one, at, a)
        new.into(two, at, b)
        if not same(a, b):
            byte = int(np.flatnonzero(a != b)[0])
            return at + byte, int(a[byte]), int(b[byte])
    return None


def in_order(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """What `work` gives for every item, several at a time. Of several errors the one of the first item is raised."""
    with ThreadPoolExecutor(WORKERS, "triptych") as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
