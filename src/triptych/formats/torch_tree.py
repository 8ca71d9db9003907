"""Which values of a torch file's pickle are the model's tensors, and what their names are.

A file may hold several tables of tensors (model, optimizer, averages) and many things that are no tensors. The model's table is taken by
its usual key; the names of tables inside tables are joined with dots; what is left out is listed with its name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..errors import FormatError, PlanError, printable
from .unpickle import Call, Name, Outside, Table

MODEL_KEYS = ("state_dict", "model_state_dict", "model", "module")
"""Where a file keeps the model's tensors beside other things; the first that is there counts."""
REBUILD = "torch._utils._rebuild_"
"""What the names of the functions that make tensors begin with."""
MAX_DEPTH, MAX_TENSORS, MAX_TEXT = 32, 1 << 16, 1 << 24


@dataclass
class Named:
    """Tensors by name as the pickle describes them; names with a reason, or a word for what they are, of all else."""

    tensors: dict[str, object] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    inside: str = ""


def find_tensors(tree: object, file: str, limit: int) -> Named:
    """Walk over at most `limit` entries. Raises FormatError (names that clash or cannot be printed, too much), PlanError (no table)."""
    if not isinstance(tree, Table):
        raise PlanError("the file does not hold a table of tensors", file=file, expected="{name: tensor}", found=_what(tree),
                        try_="save model.state_dict() in place of the model")  # fmt: skip
    walk = _Walk(file, limit, _holders(tree))
    walk.flatten(walk.choose(tree), "", 0)
    return walk.named


SETTINGS, VERSION = "args", "checkpoint_version"
"""Where Megatron-LM keeps what it was started with, and how it orders q, k, v (d98e8a64:megatron/training/checkpointing.py:1571-1572)."""


def plain_settings(tree: object) -> Iterator[tuple[str, Any]]:
    """Name and value of every setting that is a number, a text, true, false or None."""
    entries = {key: value for key, value in _pairs(tree) if isinstance(key, str)} if isinstance(tree, Table) else {}
    told = entries.get(SETTINGS)
    tables = [part for part in told.parts if isinstance(part, Table)] if isinstance(told, Call) else []
    for key, value in (*(pair for table in tables for pair in _pairs(table)), (VERSION, entries.get(VERSION))):
        if isinstance(key, str) and (value is None or type(value) in (bool, int, float, str)):
            yield key, value


def _holders(tree: object) -> set[int]:
    """The ids of all containers that hold a tensor, at any depth. Cycles and shared values are walked once."""
    above: dict[int, list[int]] = {id(tree): []}
    todo, found = [tree], []
    while todo:
        value = todo.pop()
        for item in _items(value):
            if _is_tensor(item):
                found.append(id(value))
            elif isinstance(item, (list, tuple, Call)):
                if id(item) not in above:
                    above[id(item)] = []
                    todo.append(item)
                above[id(item)].append(id(value))
    holders: set[int] = set()
    while found:
        at = found.pop()
        if at not in holders:
            holders.add(at)
            found += above[at]
    return holders


class _Walk:
    def __init__(self, file: str, limit: int, holders: set[int]) -> None:
        self.file, self.left, self.text, self.holders = file, limit, MAX_TEXT, holders
        self.named = Named()

    def choose(self, tree: Table) -> Table:
        """The model's table; all beside it is ignored by name."""
        entries = {key: value for key, value in _pairs(tree) if isinstance(key, str)}
        for key in MODEL_KEYS:
            value = entries.get(key)
            if isinstance(value, Table) and id(value) in self.holders:
                self.named.inside = key
                for other, beside in _pairs(tree):
                    if beside is not value:
                        self.count(_key(other))
                        self.named.ignored[printable(_key(other))] = self.word(beside)
                return value
        return tree

    def flatten(self, value: Any, prefix: str, depth: int) -> None:
        """Sort all entries of a container into tensors, unreadable and ignored."""
        if depth > MAX_DEPTH:
            raise FormatError("tables are nested too deeply", file=self.file, expected=f"at most {MAX_DEPTH} deep", found=prefix[:80])
        for key, item in _pairs(value) if isinstance(value, Table) else enumerate(value):
            name, plain = prefix + _key(key), isinstance(key, (str, int))
            self.count(name)
            if _is_tensor(item) and plain:
                if name in self.named.tensors:
                    raise FormatError("two tensors have one name", tensor=name[:160], file=self.file)
                if not name.isprintable():
                    raise FormatError("a tensor's name has characters that cannot be printed", tensor=name[:160], file=self.file)
                self.named.tensors[name] = item
            elif id(item) in self.holders and isinstance(item, (list, tuple)) and plain:
                self.flatten(item, name + ".", depth + 1)
            elif _is_tensor(item) or id(item) in self.holders:
                self.named.unreadable[printable(name)] = self.word(item)
            else:
                self.named.ignored[printable(name)] = _what(item)

    def count(self, name: str) -> None:
        self.left -= 1
        self.text -= len(name) + 32
        if self.left < 0 or self.text < 0 or len(self.named.tensors) >= MAX_TENSORS:
            raise FormatError(
                "the file holds too much", file=self.file, expected=f"at most {MAX_TENSORS} tensors and {MAX_TEXT} letters of names"
            )

    def word(self, item: object) -> str:
        return _what(item) + (" with tensors" if id(item) in self.holders else "")


def _is_tensor(value: object) -> bool:
    return isinstance(value, Outside) or (isinstance(value, Call) and value.name.startswith((REBUILD, "torch._tensor._rebuild")))


def _items(value: Any) -> Any:
    return value.parts if isinstance(value, Call) else value


def _pairs(table: Table) -> Iterator[tuple[Any, Any]]:
    return zip(table[::2], table[1::2], strict=True)


def _key(key: object) -> str:
    return key if isinstance(key, str) else str(key) if isinstance(key, int) else _what(key)


def _what(value: object) -> str:
    if isinstance(value, Call):
        return f"a value of {value.name}"
    if isinstance(value, Outside):
        return "a storage without a shape"
    if isinstance(value, Table):
        return f"a table of {len(value) // 2}"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    if isinstance(value, Name):
        return f"the name {value}"
    return "nothing" if value is None else f"{'an' if isinstance(value, int) else 'a'} {type(value).__name__}"
