"""Runs a plan here: every file appears whole or not at all, the index last; a killed run is run again and keeps what was finished.

In a folder the marker stands from the first byte to the last: it holds the plan's digest and the state of the sources, and is locked while
a run goes on. Files are written under a temporary name, synced, renamed; then the folder is synced.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
import time
from collections.abc import Callable, Container, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

from .errors import FormatError, OutputError, PlanError
from .formats import open_file
from .layout import Layout
from .mover import WINDOW, Mover, Tick, read_into, write
from .pieces import in_bytes, listed
from .place import MARKER
from .plan import plan
from .steps import OutFile, Plan, Source, starts

WORKERS = 2


@dataclass(frozen=True)
class Converted:
    """What a run did. `kept`: files that an earlier, killed run had finished."""

    plan: Plan
    files: tuple[str, ...]
    kept: tuple[str, ...]
    size: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return {"version": 1, "path": self.plan.path, "out": self.plan.out, "target": self.plan.target, "digest": self.plan.digest,
                "converted": len(self.plan.changes), "files": list(self.files), "kept": list(self.kept), "bytes": self.size,
                "seconds": round(self.seconds, 3), "notes": list(self.plan.notes)}  # fmt: skip

    def __str__(self) -> str:
        rate = f"{in_bytes(round(self.size / max(self.seconds, 1e-6)))}/s"
        kept = f", {len(self.kept)} kept from an earlier run" if self.kept else ""
        return (
            f"{self.plan.out}: {len(self.plan.changes)} projections to {self.plan.target}, {len(self.plan.unchanged)} tensors unchanged; "
            f"{in_bytes(self.size)} in {len(self.files)} files{kept}, {self.seconds:.2f} s, {rate}"
        )


def convert(
    path: str | Path,
    out: str | Path,
    to: str | Layout,
    *,
    layouts: Mapping[str, str] | None = None,
    names: Mapping[str, str] | None = None,
    records: str | Path | None = None,
    workers: int = WORKERS,
    progress: Tick | None = None,
    **sizes: int,
) -> Converted:
    """Write the checkpoint at `path` to `out` with its projections turned into `to`. The input is only read.

    Args:
        to, layouts, names, records, sizes: as for `plan`. workers: files written at a time.
        progress: called with the number of bytes written since the last call, from several threads.
    Raises what `plan` raises, and OutputError or FormatError when writing or reading fails half-way; then nothing is left behind.
        A run that was killed, or interrupted by ctrl-C, is continued by the same call.
    """
    return run(plan(path, to, out, layouts=layouts, names=names, records=records, **sizes), workers=workers, progress=progress)


def run(made: Plan, *, workers: int = WORKERS, progress: Tick | None = None) -> Converted:
    """Carry out a plan that has an output place. Arguments and errors as for `convert`."""
    if made.out is None:
        raise PlanError("a plan without an output cannot be run", where=made.path)
    if workers < 1:
        raise PlanError("at least one worker is needed", found=f"workers={workers}")
    begin = time.monotonic()
    place = _place(made)
    with _locked(place) as created:
        try:
            _check_drops(place)
            kept = _finished(place)
            _work(place, kept, workers, progress or (lambda size: None))
            if made.index:
                name, text = made.index
                _appear(place, name, len(text), lambda fd: write(fd, memoryview(text), 0))
            if made.is_folder:
                (place.root / MARKER).unlink()
                _sync(place.root)
        except KeyboardInterrupt:
            _clear(place, finished=False)
            raise
        except OSError as error:
            _clear(place, finished=True, folder=created)
            raise OutputError("the output cannot be written", where=made.out, found=error.strerror or str(error)) from error
        except BaseException:
            _clear(place, finished=True, folder=created)
            raise
    files = tuple(_names(made))
    return Converted(made, files, kept, made.size, time.monotonic() - begin)


# The place


class _Place(NamedTuple):
    """Where a plan reads and writes: two folders."""

    plan: Plan
    source: Path
    root: Path

    def temporary(self, name: str) -> Path:
        path = self.root / name
        return path.with_name(f".{path.name}.triptych-part")


def _place(made: Plan) -> _Place:
    source, out = Path(made.path), Path(made.out or "")
    return _Place(made, source if made.is_folder else source.parent, out if made.is_folder else out.parent)


def _names(made: Plan) -> list[str]:
    """All files that the plan writes."""
    return [*(file.name for file in made.files), *(copy.name for copy in made.copies), *([made.index[0]] if made.index else [])]


@contextmanager
def _locked(place: _Place) -> Iterator[bool]:
    """Hold the place against other runs; whether this plan made the folder. Raises PlanError when it is not ours to write in."""
    made, root = place.plan, place.root
    lock = root / MARKER if made.is_folder else place.temporary(made.files[0].name)
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
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = os.path.samestat(os.fstat(fd), lock.stat())
        except OSError:
            ours = False
        if not ours:
            raise PlanError("another run is writing this output", where=made.out)
        yield _begun(place, fd, created) if made.is_folder else False
    finally:
        os.close(fd)


def _begun(place: _Place, fd: int, created: bool) -> bool:
    """Write the marker, or find the one of an earlier run of the same plan on the same input."""
    made = place.plan
    state = {"version": 1, "plan": made.digest, "sources": [list(source) for source in (*made.sources, *made.copies)]}
    size = os.fstat(fd).st_size
    try:
        found = json.loads(os.pread(fd, size, 0) if size else b"")
        created = bool(found.pop("created"))
    except (ValueError, AttributeError, KeyError, TypeError):
        found = None
    except OSError as error:
        raise OutputError("the output cannot be read", where=made.out, found=error.strerror or str(error)) from error
    if found is None:  # no run has begun: the marker is synced before anything else is written
        others = [path.name for path in place.root.iterdir() if path.name != MARKER]
        if others:
            (place.root / MARKER).unlink()
            raise PlanError("the output exists", where=made.out, found=listed(sorted(others)), try_="choose another place, or remove it")
        try:
            os.ftruncate(fd, 0)
            write(fd, memoryview(json.dumps({**state, "created": created}).encode()), 0)
            os.fsync(fd)
            _sync(place.root)
            _sync(place.root.resolve().parent)
        except OSError as error:
            _clear(place, finished=True, folder=created)
            raise OutputError("the output cannot be written", where=made.out, found=error.strerror) from error
    elif found != state:
        ours = found.get("plan") == made.digest
        what = "the input has changed since the conversion began" if ours else "another conversion is unfinished here"
        raise PlanError(what, where=made.out, expected=made.digest, found=found.get("plan"), try_="finish that one, or remove the output")
    return created


def _finished(place: _Place) -> tuple[str, ...]:
    """Files that an earlier run of this plan completed; files in their place that are none are removed."""
    kept = []
    for file in place.plan.files:
        path, header = place.root / file.name, place.plan.headers[file.name]
        if os.path.lexists(path):
            if not place.plan.is_folder:
                raise PlanError("the output exists", where=path, try_="choose another place, or remove it")
            with path.open("rb") as there:
                whole = there.read(len(header)) == header and os.fstat(there.fileno()).st_size == len(header) + file.data_size
            if whole:
                kept.append(file.name)
            else:
                path.unlink()
    return (*kept, *(copy.name for copy in place.plan.copies if os.path.lexists(place.root / copy.name)))


def _clear(place: _Place, *, finished: bool, folder: bool = False) -> None:
    """Remove what is half written, and with `finished` all that the plan has written, and the folder if a run of the plan made it."""
    made, gone = place.plan, [place.temporary(name) for name in _names(place.plan)]
    folders: list[Path] = []
    if finished and made.is_folder:
        gone += [*(place.root / name for name in _names(made)), place.root / MARKER]
        below = {parent for copy in made.copies for parent in Path(copy.name).parents if parent != Path()}
        folders = [*(place.root / parent for parent in sorted(below, reverse=True)), *([place.root] if folder else [])]
    for remove in (*(path.unlink for path in gone), *(path.rmdir for path in folders)):
        with suppress(OSError):
            remove()


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# The work


class _Stopped(Exception):
    """Another worker has failed."""


def _work(place: _Place, kept: Container[str], workers: int, progress: Tick) -> None:
    stop = threading.Event()
    movers: SimpleQueue[Mover] = SimpleQueue()

    def tick(size: int) -> None:
        if stop.is_set():
            raise _Stopped
        progress(size)

    def job(item: OutFile | Source) -> None:
        mover = movers.get()
        try:
            _write_file(place, item, mover, tick) if isinstance(item, OutFile) else _copy_file(place, item, mover, tick)
        finally:
            movers.put(mover)

    items: list[OutFile | Source] = [file for file in place.plan.files if file.name not in kept]
    items += [copy for copy in place.plan.copies if copy.name not in kept]
    workers = min(workers, len(items))
    for _ in range(workers):
        movers.put(Mover())
    with ThreadPoolExecutor(max(1, workers), "triptych") as pool:
        try:
            for done in as_completed([pool.submit(job, item) for item in items]):
                done.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _write_file(place: _Place, file: OutFile, mover: Mover, tick: Tick) -> None:
    header = place.plan.headers[file.name]

    def fill(target: int) -> None:
        write(target, memoryview(header), 0)
        with _sources(place, {feed.file for step in file.steps for feed in step.feeds}) as fds:
            for step in file.steps:
                mover.move(step, [fds[feed.file] for feed in step.feeds], target, len(header) + step.start, tick)

    _appear(place, file.name, len(header) + file.data_size, fill)


def _copy_file(place: _Place, copy: Source, mover: Mover, tick: Tick) -> None:
    def fill(target: int) -> None:
        with _sources(place, {copy.name}) as fds:
            mover.copy(copy.name, fds[copy.name], 0, copy.size, target, 0, tick)

    mode = (place.source / copy.name).stat().st_mode & 0o777
    _appear(place, copy.name, copy.size, fill, mode)


def _appear(place: _Place, name: str, size: int, fill: Callable[[int], None], mode: int = 0o666) -> None:
    """A file that is there whole or not at all: written beside its place, synced, renamed, the folder synced."""
    temporary, path = place.temporary(name), place.root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        _allocate(fd, size)
        fill(fd)
        os.fsync(fd)
    finally:
        os.close(fd)
    if not place.plan.is_folder and os.path.lexists(path):
        raise PlanError("the output exists", where=path, try_="choose another place, or remove it")
    temporary.rename(path)
    try:
        _sync(path.parent)
    except OSError:
        path.unlink()
        raise


def _allocate(fd: int, size: int) -> None:
    """Give a new file its size, and its room where the system can: a full disk is found before the first byte."""
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
def _sources(place: _Place, names: set[str]) -> Iterator[dict[str, int]]:
    """Open source files, which must be as they were when the plan was made, before and after. Raises FormatError."""
    states = {source.name: source for source in (*place.plan.sources, *place.plan.copies)}
    with ExitStack() as stack:
        fds = {}
        for name in sorted(names):
            fds[name] = open_file(place.source / name)
            stack.callback(os.close, fds[name])
            _check_state(fds[name], states[name])
        yield fds
        for name, fd in fds.items():
            _check_state(fd, states[name])


def _check_state(fd: int, state: Source) -> None:
    info = os.fstat(fd)
    if (info.st_size, info.st_mtime_ns) != (state.size, state.changed):
        raise FormatError(
            "a source file was changed while the conversion went on",
            file=state.name,
            expected=f"{state.size} bytes",
            found=f"{info.st_size} bytes",
        )


def _check_drops(place: _Place) -> None:
    """Rows that a layout declares zero hold zero; only then may they be left out. Raises PlanError."""
    buffer = memoryview(bytearray(WINDOW))
    for feed in place.plan.drops:
        with _sources(place, {feed.file}) as fds:
            for n in feed.nests:
                for at in starts(n.into, n.dims, 2).tolist():
                    for skip in range(0, n.width, WINDOW):
                        part = buffer[: min(WINDOW, n.width - skip)]
                        read_into(fds[feed.file], [part], feed.start + at + skip, len(part), feed.file)
                        if part.tobytes().strip(b"\0"):
                            where, try_ = f"byte {at + skip} of its data", "name the part without =0 to keep it"
                            raise PlanError("rows that the layout declares zero are not", tensor=feed.tensor, where=where, try_=try_)
