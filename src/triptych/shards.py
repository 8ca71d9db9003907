"""A checkpoint as its ranks hold it: one folder per rank, each with a table that says how every tensor is divided.

    OUT/rank-0-of-4/{config.json, model.safetensors, ..., triptych-shard.json}

The table is the same in all folders but for the number of the rank: {"version", "rank", "world", "kv", "pad", "count", "cuts": [cut ...],
"tensors": {name: number of its cut, or null where every rank holds all of it}, "layouts": the stamps of the whole}. `*` in a name stands
for any number, where all tensors so named are cut alike; `count` is how many tensors there are.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from . import formats, stamp
from .errors import FormatError, LayoutError, PlanError
from .formats import MARKER, Header, Other, Stored, Tensor
from .pieces import listed, shown
from .sharding import POLICIES, Cut, Ranks, cut_of, held, local
from .stamp import Stamped

TABLE, VERSION = "triptych-shard.json", 1
_FOLDER = re.compile(r"rank-(\d{1,6})-of-(\d{1,6})")


class Whole(NamedTuple):
    """One tensor as no rank needs to hold it. `cut` None: every rank holds all of it. `told`: its stamp; `why`: who says how it is cut."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    cut: Cut | None
    told: Stamped | None
    why: str


@dataclass(frozen=True)
class Sharded:
    """A checkpoint in one folder (`ranks` None) or in one for each rank: what is stored in each, and its tensors as wholes.

    `homes`: where the files of each rank lie below `path`, with a slash, where they are not called as ours are; `model`: what the files of
    one rank are to be called, where not as those of rank 0; `beside`: files that lie above the folders of the ranks.
    """

    path: Path
    ranks: Ranks | None
    stored: tuple[Stored, ...]
    wholes: tuple[Whole, ...]
    notes: tuple[str, ...] = ()
    homes: tuple[str, ...] = ()
    model: Stored | None = None
    beside: tuple[Other, ...] = ()

    @property
    def world(self) -> Ranks:
        return self.ranks or Ranks(1)

    def prefix(self, rank: int) -> str:
        if self.homes:
            return self.homes[rank]
        return f"{folder_of(rank, self.ranks.world)}/" if self.ranks else ""

    def tensor(self, rank: int, name: str) -> Tensor:
        """One rank's own tensor; its file as seen from `path`."""
        tensor = self.stored[rank].tensors[name]
        return tensor._replace(file=self.prefix(rank) + tensor.file)


def folder_of(rank: int, world: int) -> str:
    return f"rank-{rank}-of-{world}"


def encode(wholes: Sequence[Whole], ranks: Ranks) -> tuple[bytes, ...]:
    """The tables of all ranks."""
    numbers: dict[Cut, int] = {}
    ordered = sorted(wholes, key=lambda whole: whole.name)
    groups: dict[str, dict[str, int | None]] = {}
    for whole in ordered:
        number = None if whole.cut is None else numbers.setdefault(whole.cut, len(numbers))
        groups.setdefault(_star(whole.name), {})[whole.name] = number
    tensors: dict[str, int | None] = {}
    for star, names in groups.items():
        tensors |= {star: next(iter(names.values()))} if len(set(names.values())) == 1 else names
    layouts = {whole.name: whole.told.to_dict() for whole in ordered if whole.told}
    told = {"world": ranks.world, "kv": ranks.kv, "pad": ranks.pad, "count": len(ordered)}
    table = {**told, "cuts": [cut.to_dict() for cut in numbers], "tensors": tensors, "layouts": layouts}
    every = ({"version": VERSION, "rank": rank, **table} for rank in range(ranks.world))
    return tuple(json.dumps(one, ensure_ascii=False, separators=(",", ":")).encode() + b"\n" for one in every)


def _star(name: str) -> str:
    """A name with its numbers left out; a name that has a star of its own stands for itself."""
    return name if "*" in name else re.sub(r"(?<![^.])[0-9]+(?![^.])", "*", name)


def read(path: Path) -> Sharded | None:
    """The ranks below a folder, checked against each other; None when there are none. Raises FormatError, PlanError."""
    found = {name: match for name in _folders(path) if (match := _FOLDER.fullmatch(name))}
    if found and (path / MARKER).exists():
        raise FormatError("the input is an unfinished conversion", file=str(path), try_="run that conversion again first")
    if not any((path / name / TABLE).exists() for name in found):
        return None
    worlds = sorted({int(match[2]) for match in found.values()})
    wanted = [folder_of(rank, worlds[0]) for rank in range(worlds[0])] if worlds[0] <= len(found) else []
    if len(worlds) > 1 or set(wanted) != set(found):
        raise FormatError("the ranks are not complete", where=str(path), expected=f"{worlds[0]} folders: {folder_of(0, worlds[0])}, ...",
                          found=listed(sorted(found)), try_="bring all folders of one sharding together")  # fmt: skip
    ranks, cuts, table = _tables(path, wanted)
    stored = tuple(formats.read(path / name) for name in wanted)
    layouts = _layouts(table, stored[0])
    wholes = tuple(_whole(tensor, stored, ranks, cuts, layouts) for tensor in stored[0].tensors.values())
    for whole in wholes:
        check_held(whole, stored, ranks, "its table says")
    if any(len(one.tensors) != table["count"] for one in stored):
        counts = ", ".join(str(len(one.tensors)) for one in stored)
        raise FormatError("the ranks do not hold the same tensors", where=str(path), expected=f"{table['count']} in each", found=counts)
    sharded = Sharded(path, ranks, stored, wholes)
    _check(sharded)
    return sharded


def _tables(path: Path, folders: Sequence[str]) -> tuple[Ranks, dict[str, Cut | None], dict[str, Any]]:
    """What the tables of all ranks say, which must be the same."""
    tables = [formats.read_json(path / name / TABLE) for name in folders]
    for rank, table in enumerate(tables):
        if table.get("version") != VERSION:
            raise FormatError("a table of a version that this program does not know", file=f"{folders[rank]}/{TABLE}", expected=VERSION,
                              found=reprlib.repr(table.get("version")))  # fmt: skip
        if table != {**tables[0], "rank": rank} or table.get("world") != len(tables):
            raise FormatError("the tables of two ranks differ", file=f"{folders[rank]}/{TABLE}", expected=f"that of {folders[0]}",
                              try_="bring all folders of one sharding together")  # fmt: skip
    return *_ranks(tables[0], len(tables), folders[0]), tables[0]


def _folders(path: Path) -> list[str]:
    return [entry.name for entry in path.iterdir() if entry.is_dir()] if path.is_dir() else []


def _damaged(file: str, found: object, expected: str) -> FormatError:
    return FormatError("the table of a rank is damaged", file=f"{file}/{TABLE}", found=reprlib.repr(found), expected=expected)


def _ranks(table: Mapping[str, Any], world: int, folder: str) -> tuple[Ranks, dict[str, Cut | None]]:
    kv, pad, cuts, tensors = (table.get(key) for key in ("kv", "pad", "cuts", "tensors"))
    if kv not in POLICIES or type(pad) is not int or not 0 < pad < 1 << 31:
        raise _damaged(folder, (kv, pad), "kv and pad")
    if not isinstance(cuts, list) or not isinstance(tensors, dict) or type(table.get("count")) is not int:
        raise _damaged(folder, cuts, "a list of cuts, a table of tensors and their number")
    known = []
    for told in cuts:
        try:
            known.append(cut_of(told))
        except (TypeError, KeyError, AttributeError, LayoutError):
            raise _damaged(folder, told, "role, axis, layout and sizes") from None
    for number in tensors.values():
        if number is not None and (type(number) is not int or not 0 <= number < len(known)):
            raise _damaged(folder, number, "the number of a cut")
    return Ranks(world, kv, pad), {name: None if number is None else known[number] for name, number in tensors.items()}


def _layouts(table: Mapping[str, Any], stored: Stored) -> dict[str, Stamped]:
    """The stamps of the wholes, read as those of a file are."""
    text = json.dumps({"version": stamp.VERSION, "layouts": table.get("layouts")})
    every = tuple(tensor for file in stored.files for tensor in file.tensors)
    return stamp.decode(replace(stored.files[0], file=TABLE, tensors=every, metadata={stamp.KEY: text}))


def _whole(tensor: Tensor, stored: Sequence[Stored], ranks: Ranks, cuts: Mapping[str, Cut | None], layouts: Mapping[str, Stamped]) -> Whole:
    key = tensor.name if tensor.name in cuts else _star(tensor.name)
    if key not in cuts:
        raise PlanError("the table of the ranks does not speak of a tensor", tensor=tensor.name, file=tensor.file)
    cut, shape = cuts[key], tensor.shape
    if cut is not None:
        if cut.axis >= len(shape):
            raise _damaged(folder_of(0, ranks.world), cut.axis, f"an axis of {shown(tensor.name)} {shape}")
        mine = [one.tensors[tensor.name].shape for one in stored if tensor.name in one.tensors]
        there = sum(rows[cut.axis] for rows in mine if cut.axis < len(rows))
        if cut.rows > there:
            raise FormatError("the ranks do not hold what their table says", tensor=tensor.name, expected=f"{cut.rows} rows",
                              found=f"{there} in all ranks together")  # fmt: skip
        shape = (*shape[: cut.axis], cut.rows, *shape[cut.axis + 1 :])
    return Whole(tensor.name, tensor.file, tensor.dtype, shape, cut, layouts.get(tensor.name), TABLE)


def check_held(whole: Whole, stored: Sequence[Stored], ranks: Ranks, what: str) -> None:
    """That every rank's own tensor has the shape that the cut of the whole gives it. Raises FormatError: it is not what `what`."""
    cut, shape = whole.cut, whole.shape
    for rank, one in enumerate(stored):
        own = one.tensors.get(whole.name)
        rows = None if cut is None else len(held(cut, ranks, rank))
        wanted = shape if cut is None else (*shape[: cut.axis], rows, *shape[cut.axis + 1 :])
        if own is None or (own.dtype, own.shape) != (whole.dtype, wanted):
            found = f"{own.dtype} {own.shape}" if own else "no such tensor"
            raise FormatError(f"a rank does not hold what {what}", tensor=whole.name, where=f"rank {rank} of {ranks.world}",
                              expected=f"{whole.dtype} {wanted}", found=found)  # fmt: skip


def _check(found: Sharded) -> None:
    """No rank was converted since: a rank's stamp, where it has one, is the one that sharding writes."""
    cut_of_name = {whole.name: whole.cut for whole in found.wholes}
    for rank, stored in enumerate(found.stored):
        for name, told in stamped(stored.files).items():
            cut = cut_of_name[name]
            own = local(cut, found.world) if cut is not None and cut.block == 1 else None
            if own is not None and (told.layout, told.sizes.of(told.layout)) != (own[0], own[1].of(own[0])):
                raise PlanError("a rank was converted after it was made", tensor=name, where=folder_of(rank, found.world.world),
                                expected=f"{own[0]} with {own[1].of(own[0])}", found=f"{told.layout} with {told.sizes.of(told.layout)}",
                                try_="convert it back, or merge the ranks as they were made")  # fmt: skip


def stamped(files: Sequence[Header]) -> dict[str, Stamped]:
    """The stamps of several files."""
    return {name: told for file in files for name, told in stamp.decode(file).items()}
