"""Runs a plan here, or one share of it: each file is a piece of work of its own, or several where few are large; the index comes last.

Several runs may share one plan on a shared file system, each doing its portion; one more finishes. How a place is held and how a file
appears in it is in output.py, how files are divided in portions.py; another engine (run_ray.py) does the same work elsewhere.
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
from .mover import WINDOW, Mover, Tick, hasten, read_into, write
from .output import Output, Task, clear, drop, finished, held, into_place, names_of, output_of, parted, put, release, sources, written
from .pieces import in_bytes, listed
from .plan import plan
from .portions import complete, deal, lacking, parts_of, prepare, record, recorded, sweep, tasks_of
from .steps import Plan, Source, starts

WORKERS = 2


Engine = Callable[[Sequence[Task], Tick], None]
"""Does all tasks, in any order, and calls the tick with bytes done."""


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
        done = f"{in_bytes(self.size)} in {len(self.files)} file{'s' * (len(self.files) != 1)}{kept}, {self.seconds:.2f} s, {rate}"
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
        to, asked: all that `plan` takes. workers: how many write at a time.
        progress: called with the number of bytes written since the last call, from several threads.
        share: (i, n), 1 to n: only this share of the work: files, or tensors of files where these do not balance; any number of shares may
            run at once. finish: complete what all shares wrote.
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
    tasks = tasks_of(place)
    with held(place, share) as created:
        try:
            there = set(finished(place))
            if finish:
                done = _finish(place, tasks, there, created)
            elif share:
                done = _shared(place, tasks, there, share, partial(_work, engine, workers, progress))
            else:
                done = _alone(place, tasks, there, workers, partial(_work, engine, workers, progress))
            if not share:
                _complete(place)
        except KeyboardInterrupt:
            if not (share or finish):
                clear(place)
            raise
        except BaseException as error:
            if not (share or finish):
                clear(place, finished=True, folder=created)
            if isinstance(error, OSError):
                raise OutputError("the output cannot be written", where=made.out, found=error.strerror or str(error)) from error
            raise
    names = tuple(dict.fromkeys(task.name for task in done))
    kept = tuple(name for name in names if name in there)
    size = sum(task.size for task in done) if share else made.size
    return Converted(made, names if share else tuple(names_of(made)), kept, size, time.monotonic() - begin, share)


Work = Callable[[Output, Sequence[Task]], None]


def _work(engine: Engine | None, workers: int, progress: Tick | None, place: Output, tasks: Sequence[Task]) -> None:
    _check_drops(place)
    (engine or partial(_threads, workers=workers))(tasks, progress or (lambda size: None))


def _alone(place: Output, tasks: Sequence[Task], there: set[str], workers: int, work: Work) -> Sequence[Task]:
    """All that is not there yet; files are divided where that keeps all workers busy."""
    missing = [task for task in tasks if task.name not in there]
    dealt = [task for mine in deal(missing, workers) for task in mine]
    if parts_of(dealt):
        prepare(place, dealt)
        missing = dealt
    work(place, missing)
    complete(missing)
    return tasks


def _shared(place: Output, tasks: Sequence[Task], there: set[str], share: tuple[int, int], work: Work) -> Sequence[Task]:
    """One share. Every share gives all divided files their size, so that a record never speaks of a file that is yet to be made."""
    dealt = deal(tasks, share[1])
    mine = dealt[share[0] - 1]
    divided = [task for some in dealt for task in some if task.total and task.name not in there]
    if divided:
        prepare(place, divided)
        if share in recorded(place):
            there |= {task.name for task in mine if task.total}
    missing = [task for task in mine if task.name not in there]
    try:
        work(place, missing)
        if divided and share not in recorded(place):
            record(place, share)
    except BaseException:
        drop(place, [task.name for task in missing if not task.total], share)
        raise
    return mine


def _finish(place: Output, tasks: Sequence[Task], there: set[str], created: bool) -> Sequence[Task]:
    """What all shares wrote becomes whole."""
    missing = [task for task in tasks if task.name not in there]
    if found := lacking(place, missing):
        if not there and not recorded(place):
            clear(place, finished=True, folder=created)
        raise PlanError("shares are missing", where=place.plan.out, found=f"not there: {listed(found)}", try_="run the other shares first")
    for task in missing:
        into_place(parted(task), Path(task.root) / task.name, task.alone)
    return tasks


def _complete(place: Output) -> None:
    """What comes last: small files, the index; then the place is marked no more."""
    for name, text in place.plan.last:
        put(place, name, text)
    sweep(place)
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
                at = len(header) + step.start
                mover.move(step, [fds[feed.file] for feed in step.feeds], target, at, tick)
                if step.size >= WINDOW:
                    hasten(target, at, step.size)

    mode = (source / item.name).stat().st_mode & 0o777 if isinstance(item, Source) else 0o666
    written(task, fill, mode)


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
