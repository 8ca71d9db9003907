"""Byte ranges of tensors: read, compared and hashed window by window, several tensors at a time. Knows no layout."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
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
AHEAD = 64
"""Items that are handed to the workers before the first of them must be done."""
MOST_OPEN = 64
"""Files of one checkpoint that stay open: it may have more of them than a process may open."""
Bytes = NDArray[np.uint8]
Item = TypeVar("Item")
Result = TypeVar("Result")


class Ranges:
    """Reads byte ranges of the tensors of one checkpoint, from any thread; a context that closes its files."""

    def __init__(self, stored: Stored) -> None:
        self.tensors: Mapping[str, Tensor] = stored.tensors
        self.root: Path = stored.root
        self._files: dict[str, Opened] = {}  # the one that was read last stands last
        self._readers = Counter[str]()
        self._lock = threading.Lock()

    def __enter__(self) -> Ranges:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def into(self, tensor: Tensor, start: int, room: Bytes) -> None:
        """Fill `room`, one contiguous piece of memory, from byte `start` of a tensor's data. Raises FormatError."""
        view, done, at = room.data.cast("B"), 0, tensor.start + start
        with self._open(tensor.file) as file, file.having(at, at + len(view)):
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

    @contextmanager
    def _open(self, name: str) -> Iterator[Opened]:
        """A file to read from; where that makes too many, others that nobody reads are closed."""
        with self._lock:
            file = self._files.pop(name) if name in self._files else opened(self.root, name)
            self._files[name] = file
            self._readers[name] += 1
            spare = [other for other in self._files if not self._readers[other]] if len(self._files) > MOST_OPEN else []
            for other in spare[: len(self._files) - MOST_OPEN]:
                self._files.pop(other).close()
        try:
            yield file
        finally:
            with self._lock:
                self._readers[name] -= 1


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
    found: list[Result] = []
    begun: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(WORKERS, "triptych") as pool:
        try:
            for item in items:
                begun.append(pool.submit(work, item))
                if len(begun) == AHEAD:
                    found.append(begun.popleft().result())
            return found + [future.result() for future in begun]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
