"""Which local names of the user's functions are bound to tensors, line by line, while the code runs unchanged."""

from __future__ import annotations

import dis
import itertools
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor

MAX_ITEMS = 64
"""A tuple, list or dict with more items is not looked into."""

Tracer = Callable[[FrameType, str, Any], Any]


@dataclass
class Scope:
    """One running call of a user's function. `line` is the line being executed; `depth` 0 is the function that is traced.

    `bound` are its tensors now, with their versions; `memory` is the listener's.
    """

    code: CodeType
    depth: int
    line: int
    bound: dict[str, tuple[Tensor, int]] = field(default_factory=dict)
    memory: dict[str, set[int]] = field(default_factory=dict)

    @property
    def function(self) -> str:
        return self.code.co_name


class Names:
    """A context in which `seen(scope, line, names, tensors)` is called after every line of a user's function that bound tensors.

    `names` are `q` or `parts[0]`; `version(tensor)` tells whether a tensor was written to since; `place(scope)` is told every new line.
    `outermost` is the user's function that returned last, once all have; `trouble` is what went wrong here, and where. A tracer that
    was there before (debugger, coverage) keeps being called, and is put back.
    """

    def __init__(
        self,
        seen: Callable[[Scope, int, dict[str, Tensor]], None],
        version: Callable[[Tensor], int],
        place: Callable[[Scope | None], None],
    ) -> None:
        self._seen, self._version, self._place = seen, version, place
        self.outermost: Scope | None = None
        self.trouble: dict[str, str] = {}
        self._stack: list[Scope] = []
        self._before: Any = None
        self._here: Tracer = self._enter

    def __enter__(self) -> Names:
        self._before = sys.gettrace()
        sys.settrace(self._here)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)
        self._stack.clear()

    def _enter(self, frame: FrameType, event: str, arg: Any) -> Tracer | None:
        """Called for every new frame."""
        theirs: Tracer | None = None
        if self._before is not None:
            theirs = self._before(frame, event, arg)
            if sys.gettrace() is not self._here:  # coverage's C tracer puts itself back whenever it is called
                sys.settrace(self._here)
        if not is_users(frame.f_code):
            return None if theirs is None else self._pass_on(theirs)
        scope = Scope(frame.f_code, len(self._stack), frame.f_lineno)
        self._stack.append(scope)
        self._place(scope)
        return self._follow(scope, theirs)

    def _pass_on(self, theirs: Tracer) -> Tracer:
        def local(frame: FrameType, event: str, arg: Any) -> Tracer:
            nonlocal theirs
            theirs = theirs(frame, event, arg) or theirs
            return local

        return local

    def _follow(self, scope: Scope, theirs: Tracer | None) -> Tracer:
        def local(frame: FrameType, event: str, arg: Any) -> Tracer:
            """Called before each line of a user's function and at its end: what the line before bound is reported as that line's."""
            nonlocal theirs
            if theirs is not None:
                theirs = theirs(frame, event, arg) or theirs
            if event in ("line", "return"):
                with torch._C.DisableTorchFunction():  # a mode of the user's does not see what is asked here
                    self._scan(scope, frame)
                scope.line = frame.f_lineno
            if event == "line":
                self._place(scope)
            elif event == "return":
                if scope.depth == 0:
                    self.outermost = scope
                scope.bound.clear()
                if self._stack and self._stack[-1] is scope:
                    self._stack.pop()
                self._place(self._stack[-1] if self._stack else None)
            return local

        return local

    def _scan(self, scope: Scope, frame: FrameType) -> None:
        try:
            now = {name: (tensor, self._version(tensor)) for name, tensor in tensors_named(frame.f_locals)}
            before, scope.bound = scope.bound, now
            new = {
                name: tensor
                for name, (tensor, version) in now.items()
                if name not in before or before[name][0] is not tensor or before[name][1] != version
            }
            if new:
                order = names_bound(scope.code, scope.line)
                place = {name: order.index(base) for name in new if (base := name.partition("[")[0]) in order}
                self._seen(scope, scope.line, dict(sorted(new.items(), key=lambda item: place.get(item[0], -1))))
        except Exception as wrong:  # it would be raised in the user's function
            self.trouble.setdefault(f"names were lost: {wrong}", f"line {scope.line}")


def tensors_named(names: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Tensors among the values, and one level down in tuples, lists and dicts: `q`, `parts[0]`, `out['k']`."""
    for name, value in list(names.items()):
        if name.startswith((".", "__")) or name in ("args", "kwargs"):
            continue
        if isinstance(value, Tensor):
            yield name, value
        elif type(value) in (list, tuple, dict) or isinstance(value, tuple):
            if len(value) > MAX_ITEMS:
                continue
            items = value.items() if isinstance(value, dict) else enumerate(value)
            yield from ((f"{name}[{key!r}]", item) for key, item in items if isinstance(item, Tensor))


@lru_cache(maxsize=4096)
def is_users(code: CodeType) -> bool:
    """Whether a function is the user's, and not part of torch, NumPy, einops, Python or this package. Comprehensions are not."""
    if code.co_name.startswith("<") and code.co_name != "<lambda>":
        return False
    file = code.co_filename
    generated = file == "<string>" and code.co_name.startswith(("__", "<"))  # by dataclasses and named tuples
    if generated or file.startswith(("<frozen", *_SKIPPED)):
        return False
    return not file.startswith(_STDLIB) or "site-packages" in file or "dist-packages" in file


def _folder(module: Any) -> str:
    return str(Path(module.__file__).parent) + os.sep


_LIBRARIES = (str(Path(path) / name) + os.sep for path in sys.path if path for name in ("numpy", "einops"))
_SKIPPED = (_folder(torch), str(Path(__file__).parents[1]) + os.sep, *_LIBRARIES)
_STDLIB = tuple(sysconfig.get_path(key) + os.sep for key in ("stdlib", "platstdlib"))


@lru_cache(maxsize=4096)
def names_read(code: CodeType, line: int) -> frozenset[str]:
    """Local names whose values the statement on `line` reads, not only their shapes; a statement may go on over the next lines."""
    inside = _statement(code, line)
    names: set[str] = set()
    for load, after in itertools.zip_longest(inside, inside[1:]):
        if load.opname.startswith(_LOADS) and not (after is not None and after.argval in _LOOKS):
            names.update(_names_of(load))
    return frozenset(names)


@lru_cache(maxsize=4096)
def names_bound(code: CodeType, line: int) -> list[str]:
    """Names that the statement on `line` binds, in order."""
    return [name for i in _statement(code, line) if i.opname.startswith("STORE_") for name in _names_of(i)]


def _statement(code: CodeType, line: int) -> list[dis.Instruction]:
    """The instructions of the statement that begins on a line."""
    steps = [(i, i.positions.lineno or 0, i.positions.end_lineno or 0) for i in dis.get_instructions(code) if i.positions is not None]
    last = max((end for _, start, end in steps if start == line), default=line)
    return [i for i, start, _ in steps if line <= start <= last]


def _names_of(instruction: dis.Instruction) -> tuple[str, ...]:
    value = instruction.argval  # 3.13 has instructions for two names
    return tuple(n for n in (value if isinstance(value, tuple) else (value,)) if isinstance(n, str))


_LOADS = ("LOAD_FAST", "LOAD_DEREF", "LOAD_NAME", "LOAD_CLOSURE")
_LOOKS = {"shape", "size", "dim", "ndim", "dtype", "device", "numel", "stride"}
