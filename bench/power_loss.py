"""Cuts the power after every call of a conversion: `python bench/power_loss.py`.

One run of each conversion is recorded, call by call. For every point of it the disk is put together as a power failure may leave it: data
that was written and not synced is lost, whole or in part; new names, renames and removals that no sync of their folder followed happened or
did not, in any order. Then the conversion is run again. With --write the table goes into docs/reliability.md.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import soak_crash
from soak_crash import HERE, PAGE, fresh, jobs, judge

BEGIN, END = "<!-- power -->\n", "<!-- end of power -->"
WAYS = ("all unsynced data lost", "none lost", "some lost", "some lost", "some lost")
"""What is done at every point."""


class Event(NamedTuple):
    """One call: `file` is the number of an opened file, `name` and `other` are paths below the place."""

    kind: str
    file: int = -1
    name: str = ""
    other: str = ""
    at: int = 0
    data: bytes = b""


@contextmanager
def recorded(place: Path) -> Iterator[list[Event]]:
    """All calls that change something below a folder, or sync it, in their order."""
    events: list[Event] = []
    real: dict[str, Callable[..., Any]] = {
        name: getattr(os, name)
        for name in ("open", "pwrite", "posix_fallocate", "ftruncate", "fsync", "rename", "unlink", "mkdir", "rmdir")
    }
    numbers: dict[int, int] = {}
    files: dict[tuple[int, int], int] = {}

    def below(path: Any) -> str | None:
        whole = Path(os.path.abspath(path))  # noqa: PTH100 (links are not followed)
        return whole.relative_to(place).as_posix() if place in whole.parents or whole == place else None

    def opened(path: Any, flags: int, *more: Any, **named: Any) -> int:
        name = below(path)
        new = name is not None and flags & os.O_CREAT and not Path(path).exists()
        fd: int = real["open"](path, flags, *more, **named)
        numbers.pop(fd, None)
        if name is not None:
            info = os.fstat(fd)
            number = files.setdefault((info.st_dev, info.st_ino), len(files))
            numbers[fd] = number
            if new:
                files[info.st_dev, info.st_ino] = numbers[fd] = number = len(events) + 1_000_000
                events.append(Event("create", number, name))
            elif flags & os.O_TRUNC:
                events.append(Event("size", number, at=0))
            if Path(path).is_dir():
                numbers[fd] = -1 - len(events)
                events.append(Event("folder", numbers[fd], name))
        return fd

    def pwrite(fd: int, data: Any, at: int) -> int:
        done: int = real["pwrite"](fd, data, at)
        if fd in numbers:
            events.append(Event("write", numbers[fd], at=at, data=bytes(data[:done])))
        return done

    def sized(name: str) -> Callable[..., Any]:
        def call(fd: int, *sizes: int) -> None:
            real[name](fd, *sizes)
            if fd in numbers:
                events.append(Event("size", numbers[fd], at=sum(sizes)))

        return call

    def fsync(fd: int) -> None:
        real["fsync"](fd)
        if fd in numbers:
            events.append(Event("sync", numbers[fd]))

    def named(kind: str) -> Callable[..., Any]:
        def call(path: Any, *more: Any, **options: Any) -> None:
            real[kind](path, *more, **options)
            if (name := below(path)) is not None:
                events.append(Event(kind, name=name, other=(below(more[0]) or "") if kind == "rename" else ""))

        return call

    ours = {"open": opened, "pwrite": pwrite, "posix_fallocate": sized("posix_fallocate"), "ftruncate": sized("ftruncate"), "fsync": fsync}
    for name, call in {**ours, **{kind: named(kind) for kind in ("rename", "unlink", "mkdir", "rmdir")}}.items():
        setattr(os, name, call)
    try:
        yield events
    finally:
        for name, call in real.items():
            setattr(os, name, call)


def after_power(events: list[Event], way: str, chance: random.Random) -> tuple[dict[str, bytes], set[str]]:
    """(files with contents, folders) that a disk may hold when the power goes after these calls."""

    def lost() -> bool:
        return way == WAYS[0] or (way != WAYS[1] and chance.random() < 0.5)

    synced: dict[int, bytes] = {}
    pending: dict[int, list[Event]] = {}
    folders = {number: name for kind, number, name, *_ in events if kind == "folder"}
    changes: list[Event] = []
    done: list[Event] = []
    for event in events:
        if event.kind in ("write", "size"):
            pending.setdefault(event.file, []).append(event)
        elif event.kind == "sync" and event.file in folders:
            home = folders[event.file]
            mine = [one for one in changes if _home(one.other or one.name) == home]
            done += mine
            changes = [one for one in changes if one not in mine]
        elif event.kind == "sync":
            synced[event.file] = _played(synced.get(event.file, b""), pending.pop(event.file, []))
        elif event.kind != "folder":
            changes.append(event)
    contents = {
        number: _played(synced.get(number, b""), [one for one in pending.get(number, []) if not lost()]) for number in {*synced, *pending}
    }
    late = [one for one in changes if not lost()]
    if way not in WAYS[:2]:
        chance.shuffle(late)
    names: dict[str, int] = {}
    made: set[str] = set()
    for one in (*done, *late):
        if one.kind == "create":
            names[one.name] = one.file
        elif one.kind == "mkdir":
            made.add(one.name)
        elif one.kind == "rename" and one.name in names:
            names[one.other] = names.pop(one.name)
        elif one.kind == "unlink":
            names.pop(one.name, None)
        elif one.kind == "rmdir":
            made.discard(one.name)
    reached = {name: contents.get(number, b"") for name, number in names.items() if _home(name) in ("", ".", *made)}
    return reached, {name for name in made if _home(name) in ("", ".", *made)}


def _home(name: str) -> str:
    return Path(name).parent.as_posix()


def _played(content: bytes, events: list[Event]) -> bytes:
    held = bytearray(content)
    for event in events:
        if event.kind == "size":
            held = held[: event.at] if event.at < len(held) else held
        held += bytes(max(0, event.at + len(event.data) - len(held)))
        held[event.at : event.at + len(event.data)] = event.data
    return bytes(held)


def campaign(root: Path) -> Iterator[tuple[str, Counter[str]]]:
    place, chance = root / "place", random.Random(0)
    for name, job in list(jobs(root)):
        fresh(place)
        with recorded(place) as events:
            job.run()
        found: Counter[str] = Counter(points=len(events))
        for point in range(len(events) + 1):
            for way in WAYS:
                fresh(place)
                files, folders = after_power(events[:point], way, chance)
                for folder in sorted(folders):
                    (place / folder).mkdir()
                for file, content in files.items():
                    (place / file).write_bytes(content)
                judge(job, place, found)
        yield name, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--write", action="store_true", help="put the table into docs/reliability.md")
    told = parser.parse_args()
    sys.path.insert(0, str(HERE / "src"))
    columns = ("points", *soak_crash.COLUMNS_OF_TABLE)
    lines = [f"| {' | '.join(('conversion', 'calls recorded', 'states', *soak_crash.HEAD[2:]))} |", "|---|" + "---:|" * len(columns)]
    total: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="triptych-power-") as root:
        for name, found in campaign(Path(root)):
            total += found
            lines.append(f"| {name} | {' | '.join(str(found[column]) for column in columns)} |")
    lines.append(f"| all | {' | '.join(str(total[column]) for column in columns)} |")
    print("\n".join(lines))
    if told.write:
        head, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
        day = f"{datetime.date.today().isoformat()}, {platform.system()}, Python {platform.python_version()}."
        PAGE.write_text(f"{head}{BEGIN}{day}\n\n" + "\n".join(lines) + f"\n{END}{rest.partition(END)[2]}", "utf-8")
    sys.exit(1 if total["wrong"] or total["leftovers"] else 0)


if __name__ == "__main__":
    main()
