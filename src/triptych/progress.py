"""How far a run has come, for people and for programs, on stderr.

auto    a bar while a person is looking, else nothing
plain   one line every few seconds: bytes, share, rate, remaining time
json    the same as JSON objects, one a line
none    nothing
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from .mover import Tick
from .pieces import in_bytes

EVERY = 2.0
"""Seconds between two lines."""


@contextmanager
def progress(mode: str, total: int) -> Iterator[Tick | None]:
    """A function to call with every number of bytes that is done, from any thread, or None where nothing is shown."""
    if mode == "auto" and sys.stderr.isatty():
        with _bar(total) as tick:
            yield tick
    elif mode in ("plain", "json"):
        lines = Lines(total, mode == "json", sys.stderr)
        yield lines.tick
        lines.show()
    else:
        yield None


class Lines:
    """One line every few seconds, and a last one."""

    def __init__(self, total: int, as_json: bool, stream: TextIO) -> None:
        self.total, self.as_json, self.stream = total, as_json, stream
        self.done, self.begin, self.lock = 0, time.monotonic(), threading.Lock()
        self.next = self.begin + EVERY

    def tick(self, size: int) -> None:
        with self.lock:
            self.done += size
            if time.monotonic() < self.next:
                return
            self.next = time.monotonic() + EVERY
        self.show()

    def show(self) -> None:
        seconds = time.monotonic() - self.begin
        rate = self.done / max(seconds, 1e-6)
        left = (self.total - self.done) / rate if rate else 0.0
        if self.as_json:
            told = {"done": self.done, "total": self.total, "seconds": round(seconds, 3), "rate": round(rate), "remaining": round(left, 1)}
            print(json.dumps(told), file=self.stream, flush=True)
            return
        share = 100 * self.done // max(1, self.total)
        text = f"{in_bytes(self.done)} of {in_bytes(self.total)} ({share} %)   {in_bytes(round(rate))}/s   {left:.0f} s left"
        print(text, file=self.stream, flush=True)


@contextmanager
def _bar(total: int) -> Iterator[Tick]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda size: bar.advance(task, size)
