"""Files open for reading, wherever their bytes are: here, or behind a URL with a folder of holes in their place (remote_skeleton.py).

`opened` gives a descriptor, and `having` sees to it that some bytes can be read from it: of a file of this machine all can; of a remote one
they are fetched into a nameless file, where every byte has the place that it has in its source. Readers that ask `having` first need to
know no more of URLs.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from .errors import FormatError
from .formats import open_file
from .remote import BLOCK, RemoteFile, join, lay, nameless, shown, state_of

GRAIN = 1 << 20
"""Files are fetched in whole pieces of so many bytes."""
KEEP = 256 << 20
"""Bytes of one remote checkpoint that lie on the disk here, for readers that go back."""


class Opened:
    """A file of this machine. `fd` reads it; `close` closes it."""

    def __init__(self, path: Path) -> None:
        self.fd = open_file(path)

    def having(self, start: int, stop: int) -> AbstractContextManager[None]:
        """While this context lasts, bytes `start` to `stop` can be read from `fd`. Raises FormatError."""
        return _ALL_HERE

    def close(self) -> None:
        os.close(self.fd)


_ALL_HERE = nullcontext()


class Fetched(Opened):
    """A file behind a URL; it must stay the file whose state was seen. What was read is kept while there is room for it."""

    def __init__(self, url: str, size: int, state: int, is_full: Callable[[], bool]) -> None:
        self._url, self._size, self._state, self._is_full = url, size, state, is_full
        self._file: RemoteFile | None = None
        self._room = nameless()
        self.fd = self._room.fileno()
        os.ftruncate(self.fd, size)
        self._here: set[int] = set()
        self._readers, self._lock = 0, threading.Lock()

    @contextmanager
    def having(self, start: int, stop: int) -> Iterator[None]:
        with self._lock:
            self._fetch(start, min(stop, self._size))
            self._readers += 1
        try:
            yield
        finally:
            with self._lock:
                self._readers -= 1

    def close(self) -> None:
        """It stays for the next reader, until the folder of holes is gone."""

    def end(self) -> None:
        self._room.close()

    def check(self) -> None:
        """That the file is still what it was, where any of it was read. Raises FormatError."""
        if self._file is not None:
            self._file.look()
            self._must_be_it(self._file)

    def _must_be_it(self, file: RemoteFile) -> None:
        if (file.size, state_of(file.info)) != (self._size, self._state):
            raise FormatError("a file was changed while it was read", file=shown(self._url))

    @property
    def held(self) -> int:
        """Bytes on the disk."""
        return len(self._here) * GRAIN

    def drop(self) -> None:
        """Forget all, unless somebody is about to read it."""
        if self._lock.acquire(blocking=False):
            try:
                self._forget()
            finally:
                self._lock.release()

    def _forget(self) -> None:
        if not self._readers:
            os.ftruncate(self.fd, 0)
            os.ftruncate(self.fd, self._size)
            self._here.clear()

    def _lacking(self, start: int, stop: int) -> list[int]:
        return [grain for grain in range(start // GRAIN, -(-stop // GRAIN)) if grain not in self._here]

    def _fetch(self, start: int, stop: int) -> None:
        if self._lacking(start, stop):
            if self._is_full():
                self._forget()
            self._fetch_all(self._lacking(start, stop))

    @property
    def _source(self) -> RemoteFile:
        if self._file is None:
            self._file = RemoteFile(self._url)
            self._must_be_it(self._file)
        return self._file

    def _fetch_all(self, lacking: list[int]) -> None:
        for first, last in _runs(lacking):
            if first - 1 in self._here:  # who reads on reads on
                last = min(max(last, first + BLOCK // GRAIN), -(-self._size // GRAIN))
            while first < last:
                upto = min(first + max(1, BLOCK // GRAIN), last)
                at = first * GRAIN
                for part in self._source.parts(at, min(upto * GRAIN, self._size)):
                    lay(self.fd, part, at, self._url)
                    at += len(part)
                self._here.update(range(first, upto))
                first = upto


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """(first, behind the last) of numbers in order that follow each other.

    >>> list(_runs([1, 2, 5]))
    [(1, 3), (5, 6)]
    """
    first = 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1:
            yield numbers[first], numbers[i - 1] + 1
            first = i


_FOLDERS: dict[Path, dict[str, Fetched]] = {}
"""Folders of holes, and what is behind each of their files."""


def opened(root: Path, file: str) -> Opened:
    """A file of a folder, open for reading. Raises FormatError."""
    behind = _FOLDERS.get(root)
    return Opened(root / file) if behind is None else behind[file]


def is_behind(root: Path) -> bool:
    """Whether a folder is one of holes."""
    return root in _FOLDERS


@contextmanager
def filled(folder: Path, url: str, sizes: Mapping[str, int], states: Mapping[str, int]) -> Iterator[None]:
    """While this context lasts, the holes of a folder can be read through `opened`. Raises FormatError when a file was changed."""
    behind = _Behind(url, sizes, states)
    _FOLDERS[folder] = behind
    try:
        yield
        for file in behind.values():
            file.check()
    finally:
        del _FOLDERS[folder]
        for file in behind.values():
            file.end()


class _Behind(dict[str, Fetched]):
    """Files by name, each opened when it is asked for."""

    def __init__(self, url: str, sizes: Mapping[str, int], states: Mapping[str, int]) -> None:
        self.url, self.sizes, self.states, self.lock = url, sizes, states, threading.Lock()

    def __missing__(self, name: str) -> Fetched:
        with self.lock:
            if name not in self:
                self[name] = Fetched(join(self.url, name), self.sizes[name], self.states[name], self.is_full)
            return self[name]

    def is_full(self) -> bool:
        """Whether there is too much on the disk; then all files but the one that asks are told to forget."""
        files = list(self.values())
        full = sum(file.held for file in files) > KEEP
        for file in files if full else ():
            file.drop()
        return full
