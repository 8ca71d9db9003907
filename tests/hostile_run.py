"""Reads hostile files, each in a process of its own, and prints as JSON what came of it: error, time, memory, and what the reader did.

python -m tests.hostile_run [KIND | NAME]...
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import triptych as tt
from triptych.formats import gguf, torch_zip

from .crafted import config, gguf_file, neox, one, safetensors_file, table, tensor, torch_file
from .hostile import CASES, Case

READERS: dict[str, Callable[[Path], object]] = {
    "safetensors": tt.inspect, "folder": tt.inspect, "plan": lambda path: tt.plan(path, "(q|k|v) h d"),
    "torch": lambda path: torch_zip.read(path).plain(), "gguf": gguf.read,
}  # fmt: skip
HARMLESS = {"open", "os.listdir", "os.scandir", "os.walk", "builtins.id"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def deeds() -> list[str]:
    """All that this process does from now on that is more than reading: imports, calls of the system, writing."""
    found: list[str] = []

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event not in HARMLESS or (event == "open" and isinstance(args[2], int) and args[2] & WRITING):
            found.append(f"{event} {args!r}"[:200])

    sys.addaudithook(hook)
    return found


def read(kind: str, path: Path) -> dict[str, Any]:
    """What a reader makes of a file."""
    did = deeds()
    try:
        READERS[kind](path)
        error: BaseException | None = None
    except BaseException as raised:
        error = raised
    done = list(did)
    told = str(error)
    return {"error": type(error).__name__ if error else None, "exit": getattr(error, "exit_code", None), "told": told[:2000],
            "lines": told.count("\n") + 1, "letters": len(told), "did": done}  # fmt: skip


def apart(work: Callable[[], object]) -> tuple[Any, resource.struct_rusage, int]:
    """The result of some work in a process of its own, what it used, and its status."""
    out, into = os.pipe()
    child = os.fork()
    if not child:
        os.close(out)
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
        resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
        result = work()
        with os.fdopen(into, "w") as pipe:
            json.dump(result, pipe)
        os._exit(0)
    os.close(into)
    with os.fdopen(out) as pipe:
        text = pipe.read()
    _, status, used = os.wait4(child, 0)
    return json.loads(text) if text else None, used, status


def state(folder: Path) -> list[tuple[str, int, int]]:
    found = (path.lstat() for path in sorted(folder.rglob("*")))
    return [(str(path), info.st_size, info.st_mtime_ns) for path, info in zip(sorted(folder.rglob("*")), found, strict=True)]


def run(case: Case) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "files"
        folder.mkdir()
        path, _, _ = apart(lambda: str(case.make(folder)))
        before = state(Path(name))
        os.chdir(folder)
        result, used, status = apart(lambda: read(case.kind, Path(path)))
        os.chdir("/")
        after = state(Path(name))
    killed = {"error": "killed", "exit": None, "told": "", "lines": 0, "letters": 0, "did": []}
    return {"name": case.name, "seconds": used.ru_utime + used.ru_stime, "megabytes": used.ru_maxrss / 1024, "status": status,
            "changed": before != after, **(result or killed)}  # fmt: skip


def warm_up() -> None:
    """Load all that the readers load, by good files and one bad one."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        good = {
            "safetensors": ("a.safetensors", safetensors_file({})),
            "torch": ("a.bin", torch_file(table(w=tensor()))),
            "gguf": ("a.gguf", gguf_file()),
        }
        for kind, (file, data) in good.items():
            READERS[kind](one(file, data)(folder))
        (folder / "whole").mkdir()
        for kind in ("folder", "plan"):
            READERS[kind](config(neox())(folder / "whole"))
        str(tt.FormatError("x", found=1))


if __name__ == "__main__":
    wanted = sys.argv[1:]
    warm_up()
    for case in CASES:
        if not wanted or case.kind in wanted or case.name in wanted:
            print(json.dumps(run(case)), flush=True)
