"""How the files of a plan are divided among workers, or among the shares of a job array; and what shares leave for the one who finishes.

Whole files, where these balance. Where they do not (one large file, three for two workers), some are divided by tensors: everyone writes
ranges of one file, which was given its size before and bears a temporary name until all of it is there. It is never begun anew: whoever
writes a range twice writes the same bytes. A share that is done says so in a record, which holds as long as those files exist.
"""

from __future__ import annotations

import heapq
import json
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from .mover import write
from .output import Output, Task, allocate, appear, half_done, into_place, parted, records, sync, task_of
from .place import record_of
from .steps import OutFile, Source, Step

SLACK = 1.1
"""Files stay whole where the busiest then has at most so much of the mean."""
LEAST = 16 << 20
"""Files of fewer bytes are never divided."""


def tasks_of(place: Output) -> list[Task]:
    """Every file of the plan."""
    items: tuple[OutFile | Source, ...] = (*place.plan.files, *place.plan.copies)
    return [task_of(place, item) for item in items]


def deal(tasks: Sequence[Task], ways: int) -> list[list[Task]]:
    """The work of each of so many: the largest files first, each to who has least; with files divided where that does not balance."""
    dealt, loads = _dealt(tasks, ways)
    if max(loads) > SLACK * sum(loads) / ways and any(map(_divisible, tasks)):
        return _divided(tasks, ways)
    return dealt


def _dealt(tasks: Sequence[Task], ways: int) -> tuple[list[list[Task]], list[int]]:
    dealt: list[list[Task]] = [[] for _ in range(ways)]
    loads = [(0, way) for way in range(ways)]
    for task in sorted(tasks, key=lambda task: (-task.size, task.name)):
        load, way = heapq.heappop(loads)
        dealt[way].append(task)
        heapq.heappush(loads, (load + task.size + 1, way))
    return dealt, [load for load, _ in loads]


def _divided(tasks: Sequence[Task], ways: int) -> list[list[Task]]:
    """Files whole as long as someone has room for them; the tensors of the others, file by file, to fill one after the other."""
    mean = sum(task.size for task in tasks) / ways
    dealt: list[list[Task]] = [[] for _ in range(ways)]
    loads = [(0, way) for way in range(ways)]
    rest: list[Task] = []
    for task in sorted(tasks, key=lambda task: (-task.size, task.name)):
        load, way = loads[0]
        if load + task.size > SLACK * mean and _divisible(task):
            rest.append(task)
            continue
        dealt[way].append(task)
        heapq.heapreplace(loads, (load + task.size + 1, way))
    load, way = heapq.heappop(loads)
    for task in rest:
        mine: dict[int, list[int]] = {}
        for size, index in sorted((-step.size, index) for index, step in enumerate(_steps(task))):
            if load - size > mean:
                load, way = heapq.heappushpop(loads, (load, way))
            mine.setdefault(way, []).append(index)
            load -= size
        for one, found in mine.items():
            dealt[one].append(_part(task, sorted(found)))
    return dealt


def _steps(task: Task) -> tuple[Step, ...]:
    return task.item.steps if isinstance(task.item, OutFile) else ()


def _divisible(task: Task) -> bool:
    return isinstance(task.root, Path) and task.size >= LEAST and len(_steps(task)) > 1


def _part(task: Task, found: Sequence[int]) -> Task:
    """The task of writing some steps of a file."""
    if not isinstance(task.item, OutFile) or len(found) == len(task.item.steps):
        return task
    steps: tuple[Step, ...] = tuple(task.item.steps[index] for index in found)
    read = {feed.file for step in steps for feed in step.feeds}
    states = tuple(state for state in task.states if state.name in read)
    return task._replace(item=replace(task.item, steps=steps), states=states, total=task.size)


def parts_of(tasks: Iterable[Task]) -> dict[str, Task]:
    """Name -> one of the tasks, of every file that is divided."""
    return {task.name: task for task in tasks if task.total}


def prepare(place: Output, tasks: Iterable[Task]) -> None:
    """Give the divided files their size; what is in them stays. Records of a file that is no more are removed before it is made anew."""
    for task in parts_of(tasks).values():
        part = parted(task)
        if not part.exists():
            forget(place)
        if not part.parent.is_dir():
            part.parent.mkdir(parents=True, exist_ok=True)
            sync(part.parent.parent)
        fd = os.open(part, os.O_RDWR | os.O_CREAT | (os.O_TRUNC if task.alone else 0) | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            allocate(fd, task.total)
        finally:
            os.close(fd)
        sync(part.parent)


def complete(tasks: Iterable[Task]) -> None:
    """Divided files whose parts are all written take their names."""
    for task in parts_of(tasks).values():
        into_place(parted(task), Path(task.root) / task.name, task.alone)


# Records


def record(place: Output, share: tuple[int, int]) -> None:
    """Say that a share is done. What it wrote is on the disk by now."""
    text = json.dumps({"version": 1, "plan": place.plan.digest}).encode()
    appear(Path(place.root) / record_of(share), len(text), partial(write, part=memoryview(text), at=0))


def recorded(place: Output) -> set[tuple[int, int]]:
    """The shares of this plan that say that they are done."""
    found = set()
    for share, path in records(place).items():
        with suppress(ValueError, AttributeError):
            if json.loads(path.read_bytes()).get("plan") == place.plan.digest:
                found.add(share)
    return found


def forget(place: Output) -> None:
    """Remove all records, before a file is made anew that they speak of."""
    if found := records(place):
        for path in found.values():
            path.unlink(missing_ok=True)
        sync(Path(place.root))


def sweep(place: Output) -> None:
    """All files have their names: remove what shares left, and runs that were killed and divided the files in another way."""
    found = half_done(place)
    for path in found:
        path.unlink()
    for folder in {path.parent for path in found}:
        sync(folder)  # before the marker goes


def lacking(place: Output, tasks: Iterable[Task]) -> list[str]:
    """What is not there of files that shares were to write: files, or shares of those that are divided."""
    there = recorded(place)
    all_ = any({(number, of) for number in range(1, of + 1)} <= there for of in {of for _, of in there})
    some: dict[str, None] = {}
    for task in tasks:
        part = parted(task)
        if not there or not part.is_file() or part.stat().st_size != task.size:
            some[task.name] = None
        elif not all_:
            of = max(of for _, of in there)
            some |= {f"share {number} of {of}": None for number in range(1, of + 1) if (number, of) not in there}
    return list(some)
