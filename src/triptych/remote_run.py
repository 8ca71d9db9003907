"""The work on one file whose source or target is behind a URL: the tensors of one step at a time lie on a disk here.

What a step reads is fetched into a nameless file with holes, where every byte has the place that it has in its source, so the bytes are
moved as those of any file. A remote target takes the tensors in their order, in one upload. The disk holds, for each worker, at most KEEP
bytes beside the tensors of one step.
"""

from __future__ import annotations

import bisect
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

from .errors import FormatError, OutputError
from .mover import Mover, Tick, read_into, write
from .output import Task, sources, written
from .remote import BLOCK, RemoteFile, Upload, join, lay, nameless, shown, state_of, uploading
from .remote_web import WINDOW
from .steps import Feed, OutFile, Source, Step

KEEP = 256 << 20
"""Bytes of fetched tensors that are kept for later steps of the same file."""
AHEAD = 64
"""Steps that are looked ahead: tensors that lie side by side and are needed soon come in one request."""
Range = tuple[str, int, int]
"""File, first byte, the byte behind the last."""


class Reading(Protocol):
    """Source files: descriptors to read what was fetched."""

    @property
    def fds(self) -> dict[str, int]: ...
    def fetch(self, now: Sequence[Range], soon: Sequence[Range] = ()) -> None: ...
    def parts(self, file: str, start: int, stop: int) -> Iterator[bytes | memoryview]: ...


class Here(NamedTuple):
    """Files of this machine: everything is there."""

    fds: dict[str, int]

    def fetch(self, now: Sequence[Range], soon: Sequence[Range] = ()) -> None:
        """Nothing to do."""

    def parts(self, file: str, start: int, stop: int) -> Iterator[memoryview]:
        """A range in order."""
        room = memoryview(bytearray(min(WINDOW, stop - start)))
        for at in range(start, stop, WINDOW):
            part = room[: min(WINDOW, stop - at)]
            read_into(self.fds[file], [part], at, len(part), file)
            yield part


class Spool:
    """Remote files as files with holes; what is fetched stays until there is more than KEEP of it."""

    def __init__(self, files: dict[str, RemoteFile], fds: dict[str, int]) -> None:
        self.files, self.fds = files, fds
        self._have: dict[str, list[tuple[int, int]]] = {name: [] for name in files}
        self._held = 0

    def fetch(self, now: Sequence[Range], soon: Sequence[Range] = ()) -> None:
        """Have the ranges `now` on the disk, with those of `soon` that touch them where a request has room for more."""
        lacking = [gap for one in sorted(now) for gap in self._gaps(*one)]
        if lacking and self._held > KEEP:
            for name, fd in self.fds.items():
                os.ftruncate(fd, 0)
                os.ftruncate(fd, self.files[name].size)
                self._have[name] = []
            self._held, lacking = 0, [gap for one in sorted(now) for gap in self._gaps(*one)]
        wider = _joined([*lacking, *(gap for one in soon for gap in self._gaps(*one))]) if lacking else []
        for file, start, stop in lacking:
            end = next(b for name, a, b in wider if name == file and a <= start < b)
            while gaps := self._gaps(file, start, stop):  # what the gap before brought along is there by now
                _, at, _ = gaps[0]
                to = min(at + BLOCK, end)
                place = at
                for part in self.files[file].parts(at, to):
                    lay(self.fds[file], part, place, self.files[file].url)
                    place += len(part)
                had = ((file, *one) for one in self._have[file])
                self._have[file] = [(a, b) for _, a, b in _joined([*had, (file, at, to)])]
                self._held += to - at

    def parts(self, file: str, start: int, stop: int) -> Iterator[bytes | memoryview]:
        """A range in order, straight from the source where it was not fetched."""
        for at in range(start, stop, BLOCK):
            end = min(at + BLOCK, stop)
            if self._gaps(file, at, end):
                yield from self.files[file].parts(at, end)
            else:
                yield from Here(self.fds).parts(file, at, end)

    def _gaps(self, file: str, start: int, stop: int) -> list[Range]:
        """What is lacking of a range."""
        have, found = self._have[file], []
        for a, b in have[max(0, bisect.bisect(have, (start,)) - 1) :]:
            if a >= stop:
                break
            if a > start:
                found.append((file, start, a))
            start = max(start, b)
        return [*found, (file, start, stop)] if start < stop else found


def _joined(ranges: Iterable[Range]) -> list[Range]:
    """The same bytes in as few ranges as possible, in order."""
    found: list[Range] = []
    for file, start, stop in sorted(ranges):
        if found and found[-1][0] == file and start <= found[-1][2]:
            found[-1] = (file, found[-1][1], max(stop, found[-1][2]))
        else:
            found.append((file, start, stop))
    return found


@contextmanager
def reading(root: Path | str, states: tuple[Source, ...]) -> Iterator[Reading]:
    """Source files, which must be as they were when the plan was made, before and after. Raises FormatError."""
    if isinstance(root, Path):
        with sources(root, states) as fds:
            yield Here(fds)
        return
    with ExitStack() as stack:
        files, fds = {}, {}
        for state in states:
            files[state.name] = RemoteFile(join(root, state.name))
            _check_state(files[state.name], state)
            spool = stack.enter_context(nameless())
            fds[state.name] = spool.fileno()
            os.ftruncate(fds[state.name], state.size)
        yield Spool(files, fds)
        for state in states:
            files[state.name].look()
            _check_state(files[state.name], state)


def _check_state(file: RemoteFile, state: Source) -> None:
    if (file.size, state_of(file.info)) != (state.size, state.changed):
        raise FormatError(
            "a source file was changed while the conversion went on",
            file=shown(file.url),
            expected=f"{state.size} bytes",
            found=f"{file.size} bytes" + (", others" if file.size == state.size else ""),
        )


# Targets


class Target(Protocol):
    """Where a file is written: pieces, or whole steps."""

    def put(self, part: bytes | memoryview, at: int) -> None: ...
    def move(self, move: Callable[[int, int], None], at: int, size: int) -> None: ...


class File(NamedTuple):
    """A file of this machine, written in any order."""

    fd: int

    def put(self, part: bytes | memoryview, at: int) -> None:
        write(self.fd, memoryview(part), at)

    def move(self, move: Callable[[int, int], None], at: int, size: int) -> None:
        move(self.fd, at)


class Stream(NamedTuple):
    """An upload: a step is moved in the nameless file `fd`, and sent on from there."""

    upload: Upload
    fd: int

    def put(self, part: bytes | memoryview, at: int) -> None:
        self.upload.put(part, at)

    def move(self, move: Callable[[int, int], None], at: int, size: int) -> None:
        os.ftruncate(self.fd, 0)  # rows of zeros are left as a fresh file has them
        os.ftruncate(self.fd, size)
        move(self.fd, 0)
        for part in Here({"": self.fd}).parts("", 0, size):
            self.upload.put(part, at)
            at += len(part)


# The work


def do(task: Task, mover: Mover, tick: Tick) -> None:
    """Write one file of a plan, or copy one: it appears whole or not at all."""
    if isinstance(task.root, Path):
        written(task, lambda fd: _fill(task, mover, tick, File(fd)))
        return
    url = join(task.root, task.name)
    try:
        with uploading(url, task.size) as upload, nameless() as scratch:
            _fill(task, mover, tick, Stream(upload, scratch.fileno()))
            upload.put(b"", task.size)
    except OSError as error:
        what, way = "a temporary file here cannot be written", "TMPDIR names another place"
        raise OutputError(what, where=url, found=error.strerror or str(error), try_=way) from error


def _fill(task: Task, mover: Mover, tick: Tick, target: Target) -> None:
    item, base = task.item, len(task.header)
    with reading(task.source, task.states) as source:
        target.put(task.header, 0)
        if isinstance(item, Source):
            _copy(source, (item.name, 0, item.size), target, 0, tick)
            return
        steps = _in_order(item, isinstance(target, File))
        needs = [[] if _passes(step) else [one for feed in step.feeds for one in _ranges(feed)] for step in steps]
        for number, step in enumerate(steps):
            if _passes(step):
                _copy(source, _ranges(step.feeds[0])[0], target, base + step.start, tick)
                continue
            source.fetch(needs[number], [one for some in needs[number + 1 : number + 1 + AHEAD] for one in some])
            move = partial(_move, mover, step, [source.fds[feed.file] for feed in step.feeds], tick)
            target.move(move, base + step.start, step.size)


def _move(mover: Mover, step: Step, fds: list[int], tick: Tick, target: int, base: int) -> None:
    mover.move(step, fds, target, base, tick)


def _in_order(item: OutFile, any_order: bool) -> Sequence[Step]:
    """The steps as they lie in the target; where that may be written in any order, as their sources lie."""
    return sorted(item.steps, key=lambda step: [feed[:1] + feed[2:3] for feed in step.feeds[:1]]) if any_order else item.steps


def _passes(step: Step) -> bool:
    """Whether a tensor goes on as it is, and is large enough for requests of its own."""
    return step.size > BLOCK and len(step.feeds) == 1 and step.feeds[0].nests == ((0, 0, step.size, ()),)


def _ranges(feed: Feed) -> list[Range]:
    """What is read of a source tensor: all of it, or one rank's part."""
    starts = [(feed.start + n.into, n) for n in feed.nests]
    return _joined((feed.file, at, at + n.width + sum((count - 1) * step for count, _, step in n.dims)) for at, n in starts)


def _copy(source: Reading, one: Range, target: Target, base: int, tick: Tick) -> None:
    file, start, stop = one
    for part in source.parts(file, start, stop):
        target.put(part, base)
        base += len(part)
        tick(len(part))
