"""Runs a plan here, or one share of it: each file is a piece of work of its own, the index comes last.

Several runs may share one plan on a shared file system, each doing its own files; one more finishes. How a place is held and how a file
appears in it is in output.py, so another engine (run_ray.py) does the same work elsewhere.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from . import remote_run
from .errors import OutputError, PlanError
from .layout import Layout
from .mover import WINDOW, Mover, Tick, read_into, write
from .output import Output, Task, appear, clear, drop, finished, held, names_of, output_of, put, release, sources, task_of
from .pieces import in_bytes, listed
from .plan import plan
from .steps import OutFile, Plan, Source, starts

WORKERS = 2


Engine = Callable[[Sequence[Task], Tick], None]
"""Does all tasks, each whole or not at all, and calls the tick with bytes done."""


@dataclass(frozen=True)
class Converted:
    """What a run did. `kept`: files that an earlier, killed run had finished. `share`: (number, of how many) when it did only a share."""

    plan: Plan
    files: tuple[str, ...]
    kept: tuple[str, ...]
    size: int
    seconds: float
    share: tuple[int, int] | None = None

    def to_dict(self) -> dict[str, Any]:
        return {"version": 1, "path": self.plan.path, "out": self.plan.out, "target": self.plan.target, "digest": self.plan.digest,
                "converted": len(self.plan.changes), "files": list(self.files), "kept": list(self.kept), "bytes": self.size,
                "seconds": round(self.seconds, 3), "share": self.share, "notes": list(self.plan.notes)}  # fmt: skip

    def __str__(self) -> str:
        rate = f"{in_bytes(round(self.size / max(self.seconds, 1e-6)))}/s"
        kept = f", {len(self.kept)} kept from an earlier run" if self.kept else ""
        done = f"{in_bytes(self.size)} in {len(self.files)} files{kept}, {self.seconds:.2f} s, {rate}"
        if self.share:
            return f"{self.plan.out}: share {self.share[0]} of {self.share[1]}: {done}; --finish when all shares are done"
        unchanged = len(self.plan.unchanged)
        return f"{self.plan.out}: {len(self.plan.changes)} projections to {self.plan.target}, {unchanged} tensors unchanged; {done}"


def convert(
    path: str | Path,
    out: str | Path,
    to: str | Layout | None = None,
    *,
    workers: int = WORKERS,
    progress: Tick | None = None,
    share: tuple[int, int] | None = None,
    finish: bool = False,
    engine: Engine | None = None,
    **asked: Any,
) -> Converted:
    """Write the checkpoint at `path` to `out` with its projections turned into `to`. The input is only read.

    Args:
        to, asked: all that `plan` takes. workers: files written at a time.
        progress: called with the number of bytes written since the last call, from several threads.
        share: (i, n), 1 to n: only this share of the files; any number of shares may run at once. finish: complete what all shares wrote.
        engine: does the work in place of threads here (`run_ray.on_ray`).
    Raises what `plan` raises, and OutputError or FormatError when writing or reading fails half-way; then nothing is left behind
        (a share leaves the files that are finished). A run that was killed, or interrupted by ctrl-C, is continued by the same call.
    """
    return run(plan(path, to, out, **asked), workers=workers, progress=progress, share=share, finish=finish, engine=engine)


def run(
    made: Plan,
    *,
    workers: int = WORKERS,
    progress: Tick | None = None,
    share: tuple[int, int] | None = None,
    finish: bool = False,
    engine: Engine | None = None,
) -> Converted:
    """Carry out a plan that has an output place. Arguments and errors as for `convert`."""
    if made.out is None:
        raise PlanError("a plan without an output cannot be run", where=made.path)
    if workers < 1:
        raise PlanError("at least one worker is needed", found=f"workers={workers}")
    if (share or finish) and not made.is_folder:
        raise PlanError("a single file is written by one run", where=made.out, try_="leave --share and --finish out")
    if share and not 1 <= share[0] <= share[1]:
        raise PlanError("no such share", found=f"{share[0]}/{share[1]}", expected="1/N to N/N")
    begin = time.monotonic()
    place = output_of(made)
    items: tuple[OutFile | Source, ...] = (*made.files, *made.copies)
    tasks = _share([task_of(place, item) for item in items], share or (1, 1))
    names = [task.name for task in tasks]
    with held(place, shared=share is not None) as created:
        there = finished(place)
        kept = [name for name in names if name in there]
        missing = [task for task in tasks if task.name not in there]
        if finish and missing:
            if not there:
                clear(place, finished=True, folder=created)
            found = f"{len(missing)} files are not there: {listed(task.name for task in missing)}"
            raise PlanError("shares are missing", where=made.out, found=found, try_="run the other shares first")
        try:
            _check_drops(place)
            (engine or partial(_threads, workers=workers))(missing, progress or (lambda size: None))
            if not share:
                _complete(place)
        except KeyboardInterrupt:
            drop(place, names)
            raise
        except BaseException as error:
            if share or finish:
                drop(place, names)
            else:
                clear(place, finished=True, folder=created)
            if isinstance(error, OSError):
                raise OutputError("the output cannot be written", where=made.out, found=error.strerror or str(error)) from error
            raise
    size = sum(task.size for task in tasks) if share else made.size
    return Converted(made, tuple(names if share else names_of(made)), tuple(kept), size, time.monotonic() - begin, share)


def _share(tasks: list[Task], share: tuple[int, int]) -> list[Task]:
    """One share of the tasks: the largest first, each to the share that has least so far."""
    number, of = share
    if of == 1:
        return tasks
    loads, mine = [0] * of, []
    for task in sorted(tasks, key=lambda task: (-task.size, task.name)):
        least = loads.index(min(loads))
        loads[least] += task.size + 1
        if least == number - 1:
            mine.append(task)
    return mine


def _complete(place: Output) -> None:
    """What comes last: small files, the index; then the place is marked no more."""
    for name, text in place.plan.last:
        put(place, name, text)
    release(place)


# The work


class _Stopped(Exception):
    """Another worker has failed."""


def _threads(tasks: Sequence[Task], progress: Tick, workers: int) -> None:
    """The engine of this process."""
    stop = threading.Event()
    movers: SimpleQueue[Mover] = SimpleQueue()

    def tick(size: int) -> None:
        if stop.is_set():
            raise _Stopped
        progress(size)

    def job(task: Task) -> None:
        mover = movers.get()
        try:
            do(task, mover, tick)
        finally:
            movers.put(mover)

    workers = min(workers, len(tasks))
    for _ in range(workers):
        movers.put(Mover())
    with ThreadPoolExecutor(max(1, workers), "triptych") as pool:
        try:
            for done in as_completed([pool.submit(job, task) for task in tasks]):
                done.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def do(task: Task, mover: Mover, tick: Tick) -> None:
    """Write one file of a plan, or copy one: it appears whole or not at all."""
    item, header, source, root = task.item, task.header, task.source, task.root
    if isinstance(source, str) or isinstance(root, str):
        remote_run.do(task, mover, tick)
        return

    def fill(target: int) -> None:
        with sources(source, task.states) as fds:
            if isinstance(item, Source):
                mover.copy(item.name, fds[item.name], 0, item.size, target, 0, tick)
                return
            write(target, memoryview(header), 0)
            for step in item.steps:
                mover.move(step, [fds[feed.file] for feed in step.feeds], target, len(header) + step.start, tick)

    mode = (source / item.name).stat().st_mode & 0o777 if isinstance(item, Source) else 0o666
    appear(root / task.name, task.size, fill, mode=mode, alone=task.alone)


def _check_drops(place: Output) -> None:
    """Rows that a layout declares zero hold zero; only then may they be left out. Raises PlanError."""
    buffer, states = memoryview(bytearray(WINDOW)), {source.name: source for source in place.plan.sources}
    for feed in place.plan.drops:
        with remote_run.reading(place.source, (states[feed.file],)) as given:
            given.fetch([(feed.file, feed.start, feed.start + feed.size)])
            for n in feed.nests:
                for at in starts(n.into, n.dims, 2).tolist():
                    for skip in range(0, n.width, WINDOW):
                        part = buffer[: min(WINDOW, n.width - skip)]
                        read_into(given.fds[feed.file], [part], feed.start + at + skip, len(part), feed.file)
                        if part.tobytes().strip(b"\0"):
                            where, try_ = f"byte {at + skip} of its data", "name the part without =0 to keep it"
                            raise PlanError("rows that the layout declares zero are not", tensor=feed.tensor, where=where, try_=try_)
