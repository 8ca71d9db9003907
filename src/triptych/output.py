"""A place that is written to: held against other runs, marked until it is complete, every file in it whole or absent.

What is said here of folders, remote_out.py does for URLs; which of the two a place is, is decided here.

In a folder the marker stands from the first byte to the last: it holds the plan's digest and the state of the sources, and is locked while
a run goes on. Files are written under a temporary name, synced, renamed; then the folder is synced.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

from . import remote_out
from .errors import FormatError, OutputError, PlanError
from .formats import MARKER, open_file
from .mover import write
from .pieces import listed
from .place import RECORD, check_begun, marked
from .remote import cut, is_remote
from .steps import OutFile, Plan, Source

PATIENCE = 20.0
"""Seconds that a share waits for another one that is just beginning or ending, or that writes the same file."""


class Output(NamedTuple):
    """Where a plan reads and writes: two folders, a URL as text."""

    plan: Plan
    source: Path | str
    root: Path | str


class Task(NamedTuple):
    """One file to write, with all that this needs, so that it can be done on another machine: `states` are those of the files it reads.

    `alone`: it is the whole output, and must not be there yet. `total`: the size of the file, where only some of its tensors are written.
    """

    item: OutFile | Source
    header: bytes
    states: tuple[Source, ...]
    source: Path | str
    root: Path | str
    alone: bool
    total: int = 0

    @property
    def name(self) -> str:
        return self.item.name if isinstance(self.item, OutFile) else self.item.target

    @property
    def size(self) -> int:
        """Bytes to write."""
        if isinstance(self.item, Source):
            return self.item.size
        return sum(step.size for step in self.item.steps) if self.total else len(self.header) + self.item.data_size


def task_of(place: Output, item: OutFile | Source) -> Task:
    """What writing one file needs to know."""
    made = place.plan
    states = {source.name: source for source in (*made.sources, *made.copies)}
    if isinstance(item, OutFile):
        read, header = sorted({feed.file for step in item.steps for feed in step.feeds}), made.headers[item.name]
    else:
        read, header = [item.name], b""
    return Task(item, header, tuple(states[name] for name in read), place.source, place.root, not made.is_folder)


def temporary(path: Path, divided: bool = False) -> Path:
    """Where a file is written before it takes its name; one that is `divided` is never begun anew, so it must not be another's."""
    return path.with_name(f".{path.name}.triptych-part{'s' if divided else ''}")


def parted(task: Task) -> Path:
    """Where a file is written in parts. A file that is the whole output is locked by its temporary name, and written there."""
    return temporary(Path(task.root) / task.name, not task.alone)


def output_of(made: Plan) -> Output:
    return Output(made, _folder(made.path, made.is_folder), _folder(made.out or "", made.is_folder))


def _folder(path: str, is_folder: bool) -> Path | str:
    if is_remote(path):
        return path if is_folder else cut(path)[0]
    return Path(path) if is_folder else Path(path).parent


def names_of(made: Plan) -> list[str]:
    """All files that the plan writes."""
    return [*(file.name for file in made.files), *(copy.target for copy in made.copies), *(name for name, _ in made.last)]


@contextmanager
def held(place: Output, share: tuple[int, int] | None = None) -> Iterator[bool]:
    """Hold the place against other runs, as a share only against those that do not share; whether this plan made the folder.

    Raises PlanError when it is not ours to write in.
    """
    made, root = place.plan, place.root
    if isinstance(root, str):
        with remote_out.holding(made, root, share):
            yield False
        return
    lock = root / MARKER if made.is_folder else temporary(root / made.files[0].name)
    created = False
    try:
        if made.is_folder and not root.is_dir():
            root.mkdir()
            created = True
        fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if created:
            root.rmdir()
        raise OutputError("the output cannot be written", where=made.out, found=error.strerror) from error
    try:
        if not _lock(fd, lock, (fcntl.LOCK_EX, fcntl.LOCK_SH) if share else (fcntl.LOCK_EX,), PATIENCE if share else 0):
            raise PlanError("another run is writing this output", where=made.out)
        created = _begun(place, root, fd, created) if made.is_folder else False
        if share:
            fcntl.flock(fd, fcntl.LOCK_SH)  # others may come in
        yield created
    finally:
        os.close(fd)


def _lock(fd: int, path: Path, kinds: tuple[int, ...], patience: float) -> bool:
    """Lock an open file in one of the ways; False when another run has it, or has removed it, for all of so many seconds."""
    until = time.monotonic() + patience
    while True:
        for kind in kinds:
            try:
                fcntl.flock(fd, kind | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    continue
                raise OutputError("the file system of the output has no locks", where=path, found=error.strerror,
                                  try_="mount it with locks (Lustre: -o flock)") from error  # fmt: skip
            with suppress(OSError):
                return os.path.samestat(os.fstat(fd), path.stat())
            return False  # that run has just ended
        if time.monotonic() >= until:
            return False
        time.sleep(0.02)


def _begun(place: Output, root: Path, fd: int, created: bool) -> bool:
    """Write the marker, or find the one of an earlier run of the same plan on the same input."""
    made = place.plan
    try:
        found = json.loads(_all(fd))
        created = bool(found.pop("created"))
    except (ValueError, AttributeError, KeyError, TypeError):
        found = None
    except OSError as error:
        raise OutputError("the output cannot be read", where=made.out, found=error.strerror or str(error)) from error
    if found is None:  # no run has begun: the marker is synced before anything else is written
        others = [path.name for path in root.iterdir() if path.name != MARKER]
        if others:
            (root / MARKER).unlink()
            raise PlanError("the output exists", where=made.out, found=listed(sorted(others)), try_="choose another place, or remove it")
        try:
            os.ftruncate(fd, 0)
            write(fd, memoryview(json.dumps({**marked(made), "created": created}).encode()), 0)
            os.fsync(fd)
            sync(root)
            sync(root.resolve().parent)
        except OSError as error:
            clear(place, finished=True, folder=created)
            raise OutputError("the output cannot be written", where=made.out, found=error.strerror) from error
    else:
        check_begun(made, found)
    return created


def _all(fd: int) -> bytes:
    """What an open file holds, however little a call gives of it."""
    got, size = b"", os.fstat(fd).st_size
    while len(got) < size and (more := os.pread(fd, size - len(got), len(got))):
        got += more
    return got


def finished(place: Output) -> tuple[str, ...]:
    """Files that an earlier run of this plan completed; files in their place that are none are removed."""
    root = place.root
    if isinstance(root, str):
        return remote_out.finished(place.plan, root)
    kept = []
    for file in place.plan.files:
        path, header = root / file.name, place.plan.headers[file.name]
        if os.path.lexists(path):
            if not place.plan.is_folder:
                raise PlanError("the output exists", where=path, try_="choose another place, or remove it")
            with path.open("rb") as there:
                whole = there.read(len(header)) == header and os.fstat(there.fileno()).st_size == len(header) + file.data_size
            if whole:
                kept.append(file.name)
            else:
                path.unlink()
    return (*kept, *(copy.target for copy in place.plan.copies if os.path.lexists(root / copy.target)))


def clear(place: Output, *, finished: bool = False, folder: bool = False) -> None:
    """Remove what is half written, and with `finished` all that the plan has written, and the folder if a run of the plan made it."""
    made, root = place.plan, place.root
    with suppress(OSError):
        _remove(path.unlink for path in half_done(place))
    drop(place, names_of(made))
    if finished and made.is_folder:
        if isinstance(root, str):
            remote_out.clear(root, names_of(made))
            return
        _remove(path.unlink for path in (*(root / name for name in names_of(made)), root / MARKER))
        below = {parent for name in names_of(made) for parent in Path(name).parents if parent != Path()}
        _remove(path.rmdir for path in (*(root / parent for parent in sorted(below, reverse=True)), *([root] if folder else [])))


def records(place: Output) -> dict[tuple[int, int], Path]:
    """What shares left to say that they are done, by (number, of how many)."""
    if not isinstance(place.root, Path) or not place.plan.is_folder or not place.root.is_dir():
        return {}
    found = ((RECORD.fullmatch(path.name), path) for path in place.root.iterdir())
    return {(int(name[1]), int(name[2])): path for name, path in found if name}


def half_done(place: Output) -> list[Path]:
    """Records of shares, then all files that have not taken their names."""
    if not isinstance(place.root, Path):
        return []
    parts = (temporary(place.root / name, divided) for name in names_of(place.plan) for divided in (False, True))
    return [*records(place).values(), *(part for part in parts if os.path.lexists(part))]


def drop(place: Output, names: Iterable[str], share: tuple[int, int] | None = None) -> None:
    """Remove the half-written forms of some files, but for those that another run is writing."""
    root = place.root
    if isinstance(root, str):
        remote_out.drop(root, names, share)
    else:
        _remove(partial(_unlink_idle, temporary(root / name)) for name in names)


def _unlink_idle(path: Path) -> None:
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    finally:
        os.close(fd)


def put(place: Output, name: str, text: bytes) -> None:
    """A small file of the plan's own."""
    root = place.root
    if isinstance(root, str):
        remote_out.put(root, name, text)
    else:
        appear(root / name, len(text), partial(write, part=memoryview(text), at=0))


def release(place: Output) -> None:
    """The place is complete: it is marked no more."""
    root = place.root
    if isinstance(root, str):
        remote_out.release(place.plan, root)
    elif place.plan.is_folder:
        (root / MARKER).unlink()
        sync(root)


def _remove(ways: Iterable[Callable[[], None]]) -> None:
    for remove in ways:
        with suppress(OSError):
            remove()


def sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def appear(path: Path, size: int, fill: Callable[[int], None], *, mode: int = 0o666, alone: bool = False) -> None:
    """A file that is there whole or not at all: written beside its place, synced, renamed, the folder synced. `alone`: it must be new."""
    part = temporary(path)
    if not path.parent.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
        sync(path.parent.parent)
    fd = _anew(part, path, mode, alone)
    try:
        os.ftruncate(fd, 0)
        allocate(fd, size)
        fill(fd)
        os.fsync(fd)
        into_place(part, path, alone)  # locked until it has its name
    finally:
        os.close(fd)


def _anew(part: Path, path: Path, mode: int, alone: bool) -> int:
    """Open a temporary file, locked: a share that was started twice must not begin what the other one gives its name. Raises PlanError."""
    until = time.monotonic() + PATIENCE
    while True:
        fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        if alone or _lock(fd, part, (fcntl.LOCK_EX,), PATIENCE):  # one file that is the whole output is locked already
            return fd
        os.close(fd)
        if time.monotonic() >= until:
            raise PlanError("another run is writing this file", where=path, try_="start each share once, and again when it has ended")


def written(task: Task, fill: Callable[[int], None], mode: int = 0o666) -> None:
    """The file of a task appears; of one that is divided this part is written and synced, where the file already has its size."""
    if not isinstance(task.root, Path):
        return
    path = task.root / task.name
    if not task.total:
        appear(path, task.size, fill, mode=mode, alone=task.alone)
        return
    fd = os.open(parted(task), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fill(fd)
        os.fsync(fd)
    finally:
        os.close(fd)


def into_place(part: Path, path: Path, alone: bool) -> None:
    """A file that is written and synced takes its name. `alone`: that must be new."""
    if alone and os.path.lexists(path):
        raise PlanError("the output exists", where=path, try_="choose another place, or remove it")
    part.rename(path)
    try:
        sync(path.parent)
    except OSError:
        path.unlink()
        raise


def allocate(fd: int, size: int) -> None:
    """Give a file its size, and its room where the system can: a full disk is found before the first byte. What is there stays."""
    try:
        if size:
            os.posix_fallocate(fd, 0, size)
    except AttributeError:  # macOS
        os.ftruncate(fd, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(fd, size)


@contextmanager
def sources(folder: Path, states: tuple[Source, ...]) -> Iterator[dict[str, int]]:
    """Open source files, which must be as they were when the plan was made, before and after. Raises FormatError."""
    with ExitStack() as stack:
        fds = {}
        for state in states:
            fds[state.name] = open_file(folder / state.name)
            stack.callback(os.close, fds[state.name])
            _check_state(fds[state.name], state)
        yield fds
        for state in states:
            _check_state(fds[state.name], state)


def _check_state(fd: int, state: Source) -> None:
    info = os.fstat(fd)
    if (info.st_size, info.st_mtime_ns) != (state.size, state.changed):
        raise FormatError(
            "a source file was changed while the conversion went on",
            file=state.name,
            expected=f"{state.size} bytes",
            found=f"{info.st_size} bytes",
        )
