"""What a traced run noted: every tensor that was bound to a name, with the rows that it held then."""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from .names import Scope, names_read, tensors_named
from .reading import Grid, grid_of
from .shadow import Shadow


class Name(NamedTuple):
    """A name in a function, and the line that bound it."""

    text: str
    function: str
    depth: int
    line: int


@dataclass(eq=False)
class Entry:
    """One tensor with rows of the fused weight. `sources` are the entries that its statement read.

    `whole`: it was cut out of a tensor with every row, and not computed from a slice of the weight.
    """

    index: int
    names: list[Name]
    file: str
    shape: tuple[int, ...]
    kind: str
    grid: Grid
    mixture: str
    whole: bool
    sources: set[int] = field(default_factory=set)

    @property
    def name(self) -> Name:
        """The name a user would call it by: of the outermost function, `q` rather than `parts[0]`."""
        return min(self.names, key=lambda name: (name.depth, not name.text.isidentifier()))


class Notebook:
    """Listens to `Names` and collects entries."""

    def __init__(self, shadow: Shadow, total: int) -> None:
        self.entries: list[Entry] = []
        self._shadow, self._total = shadow, total
        self._known: dict[int, tuple[weakref.ref[Tensor], int, Entry]] = {}
        self._same: dict[object, Entry] = {}

    def place(self, scope: Scope | None) -> None:
        self._shadow.place = "" if scope is None else f"line {scope.line}" + (f" of {scope.function}" if scope.depth else "")

    def seen(self, scope: Scope, line: int, names: dict[str, Tensor]) -> None:
        read = {index for name in names_read(scope.code, line) for index in scope.memory.get(name, ())}
        bound: dict[str, set[int]] = {}
        for text, tensor in names.items():
            base = text.partition("[")[0]
            bound.setdefault(base, set())
            entry = self._entry(Name(text, scope.function, scope.depth, line), tensor, scope.code.co_filename)
            if entry is not None:
                entry.sources |= read - {entry.index}
                bound[base].add(entry.index)
        scope.memory.update(bound)

    def returned(self, result: object, scope: Scope | None) -> None:
        """What the traced function returned, as far as it has no name."""
        read = {index for name in names_read(scope.code, scope.line) for index in scope.memory.get(name, ())} if scope else set()
        for text, tensor in tensors_named({"returned": result}):
            name = Name(text, scope.function, 0, scope.line) if scope else Name(text, "", 0, 0)
            if not self._is_known(tensor):
                entry = self._entry(name, tensor, scope.code.co_filename if scope else "")
                if entry is not None:
                    entry.sources |= read

    def _is_known(self, tensor: Tensor) -> bool:
        known = self._known.get(id(tensor))
        return known is not None and known[0]() is tensor and known[1] == self._shadow.version(tensor)

    def _entry(self, name: Name, tensor: Tensor, file: str) -> Entry | None:
        if self._is_known(tensor):
            entry = self._known[id(tensor)][2]
            if name not in entry.names and any(name.depth < n.depth or name.function == n.function for n in entry.names):
                entry.names.append(name)
            return entry
        rows = self._shadow.rows(tensor)
        if rows is None or not rows.size:
            return None
        grid = grid_of(rows)
        if bool((grid.rows == -1).all()):
            return None
        key = (name, file, tuple(tensor.shape), grid.axes, grid.rows.tobytes())
        if key not in self._same:
            kind, whole = self._shadow.kind_of(tensor), self._shadow.made(tensor) >= self._total
            self._same[key] = Entry(len(self.entries), [name], file, tuple(tensor.shape), kind, grid, self._mixed(grid), whole)
            self.entries.append(self._same[key])
        self._known[id(tensor)] = (weakref.ref(tensor), self._shadow.version(tensor), self._same[key])
        return self._same[key]

    def _mixed(self, grid: Grid) -> str:
        """`mixed by add (line 57)`, with the share when it is not all."""
        found = grid.rows[grid.rows < -1]
        if not found.size:
            return ""
        counts = Counter((m.op, m.place) for m in (self._shadow.mixtures[-2 - int(label)] for label in found.tolist()))
        (op, place), _ = counts.most_common(1)[0]
        share = "" if found.size == grid.rows.size else f"{found.size} of {grid.rows.size} elements "
        return f"{share}mixed by {op}" + (f" ({place})" if place else "")
