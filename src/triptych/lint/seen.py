"""A checkpoint read for lint: every header, index, config and stamp that can be read, and a spot for each that cannot.

Where `formats.read` stops at the first thing that is wrong, this goes on. Tensors are not read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from .. import families, formats, packed, stamp
from ..detect_files import packed_axis
from ..errors import FormatError, PlanError, TriptychError
from ..families import Record
from ..formats import Header, Tensor, gguf, torch_zip
from ..formats.folder import INDEX, is_plain_name
from ..holes import is_behind, opened
from ..packed import Packed
from ..stamp import Stamped
from .model import Spot
from .pickles import ENDINGS as PICKLES
from .pickles import names_in
from .values import Facts, by_file, facts, is_looked_at

SAFETENSORS = ".safetensors"
ENDINGS = (SAFETENSORS, *torch_zip.SUFFIXES, gguf.SUFFIX)
NUMBERED = re.compile(r"(?P<stem>.*)-(?P<number>\d{1,9})-of-(?P<count>\d{1,9})(?P<ending>\.\w+)\Z", re.DOTALL)
MAX_FILES = 100_000
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("wq", "wk", "wv"), ("to_q", "to_k", "to_v"), ("q_lin", "k_lin", "v_lin"),
    ("attn_q", "attn_k", "attn_v"),
)  # fmt: skip
"""Names of q, k and v of one layer in tensors of their own."""


class Values(NamedTuple):
    """Facts of every tensor that is looked at, set by set, how many bytes were read, and a spot for each file that could not be."""

    facts: tuple[dict[str, Facts], ...]
    size: int
    unreadable: tuple[Spot, ...]


class Told(NamedTuple):
    """What records and stamps say of one set of weights. `unknown`: name -> reason, as records give it."""

    projections: tuple[Packed, ...]
    unknown: Mapping[str, str]
    misfits: tuple[Spot, ...]
    stamps: tuple[Spot, ...]
    other_orders: tuple[Spot, ...]


@dataclass(frozen=True)
class Weights:
    """Files that make one model: those of an index, shards that are numbered alike, or one file.

    `listed`: tensor -> file, as the index says; `missing`: files that should be there; `damaged`: those that cannot be read.
    """

    name: str
    root: Path
    index: str | None
    listed: Mapping[str, str] = field(hash=False)
    total: object
    headers: tuple[Header, ...]
    missing: tuple[str, ...]
    damaged: tuple[str, ...]

    @property
    def whole(self) -> bool:
        """Whether every file is there and was read."""
        return not self.missing and not self.damaged

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name; where two files have it, the one that the index names, else the first."""
        found: dict[str, Tensor] = {}
        for header in self.headers:
            for tensor in header.tensors:
                if tensor.name not in found or self.listed.get(tensor.name) == tensor.file:
                    found[tensor.name] = tensor
        return found


@dataclass(frozen=True)
class Seen:
    """All that lint looks at. `files`: all names below the folder; `alone`: a single file was given, which may be a part of a model."""

    path: Path
    root: Path
    alone: bool
    files: tuple[str, ...]
    sets: tuple[Weights, ...]
    unreadable: tuple[Spot, ...]
    config: Mapping[str, Any] | None = field(hash=False)
    records: tuple[Record, ...]
    sizes: Mapping[str, int] = field(hash=False)

    @cached_property
    def told(self) -> tuple[tuple[Weights, Told], ...]:
        """What is known of every set."""
        return tuple((one, _told(one, self)) for one in self.sets)

    @cached_property
    def asked(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """The names that each pickle asks for; damaged archives are left out."""
        return tuple(_asked(self))

    @cached_property
    def values(self) -> Values:
        """What the numbers of every tensor show; all of them are read, once."""
        return _values(self)


def look(path: str | Path, records: str | Path | None, sizes: Mapping[str, int]) -> Seen:
    """Read what can be read. Raises FormatError when there is no such place, or no weights and no index in it."""
    path, spots = Path(path), list[Spot]()
    alone = not path.is_dir()
    if alone and not path.exists():
        raise FormatError("no such file or folder", file=str(path))
    if alone and path.name.endswith(INDEX):
        raise FormatError("an index is not a checkpoint", file=str(path), try_=f"give its folder: {path.parent}")
    root = path.parent if alone else path
    files = (path.name,) if alone else tuple(_names(root, spots))
    top = [name for name in files if "/" not in name and not name.startswith(".")]
    sets = tuple(_sets(root, [name for name in top if not is_behind(root) or SAFETENSORS in name], spots))
    config = None
    if (root / "config.json").exists():
        try:
            config = formats.read_json(root / "config.json")
        except TriptychError as error:
            spots.append(_named(error, "config.json"))
    if not sets and not spots:
        raise FormatError("no weights here", where=str(path), expected=f"files that end in {', '.join(ENDINGS)}")
    own = families.load_records(records) if records else ()
    return Seen(path, root, alone, files, sets, tuple(spots), config, own, sizes)


def _names(root: Path, spots: list[Spot]) -> Iterator[str]:
    """All files below a folder, hidden folders left out; a spot for all that is no regular file or cannot be read, or is too much."""
    number = 0

    def refused(error: OSError) -> None:
        spots.append(Spot(f"a folder cannot be read: {error.strerror}", Path(error.filename).relative_to(root).as_posix()))

    for folder, folders, names in os.walk(root, onerror=refused):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            number += 1
            if number > MAX_FILES:
                spots.append(Spot(f"more than {MAX_FILES} files: the others were not looked at"))
                return
            path = Path(folder) / name
            if path.is_file():
                yield path.relative_to(root).as_posix()
            else:
                spots.append(Spot("not a regular file", path.relative_to(root).as_posix()))


# Sets of files


def _sets(root: Path, names: Sequence[str], spots: list[Spot]) -> Iterator[Weights]:
    taken: set[str] = set()
    stems: set[tuple[str, str]] = set()
    for name in names:
        if name.endswith(tuple(ending + INDEX for ending in ENDINGS)):
            listed, total = _index(root, name, spots)
            if listed:
                wanted = sorted(set(listed.values()))
                taken.update(wanted)
                stems.update((match["stem"], match["ending"]) for file in wanted if (match := NUMBERED.match(file)))
                yield _weights(root, name, name, listed, total, wanted, names, spots)
    groups: dict[tuple[str, str, str], list[str]] = {}
    for name in names:
        if name.endswith(ENDINGS) and name not in taken and (len(names) == 1 or _looks_like_weights(root / name)):
            match = NUMBERED.match(name)
            key = (match["stem"], match["ending"], match["count"]) if match and int(match["count"]) <= MAX_FILES else (name, "", "")
            if key[:2] not in stems:  # else it is a stale shard
                groups.setdefault(key, []).append(name)
    for (stem, ending, count), members in groups.items():
        every = [f"{stem}-{i:0{len(count)}}-of-{count}{ending}" for i in range(1, int(count) + 1)] if count and names != members else []
        yield _weights(
            root, members[0] if len(members) == 1 else f"{stem}-*{ending}", None, {}, None, sorted({*members, *every}), names, spots
        )


def _looks_like_weights(path: Path) -> bool:
    """Whether a file may hold weights: other things end in .bin too."""
    if path.name.endswith((SAFETENSORS, gguf.SUFFIX)) or path.name.startswith("pytorch_model"):
        return True
    try:
        fd = formats.open_file(path)
    except FormatError:
        return True  # to be found unreadable
    try:
        return os.pread(fd, 4, 0) == b"PK\3\4"
    finally:
        os.close(fd)


def _index(root: Path, name: str, spots: list[Spot]) -> tuple[dict[str, str], object]:
    """(tensor -> file, total_size) of an index, without the entries that make no sense."""
    try:
        table = formats.read_json(root / name)
    except TriptychError as error:
        spots.append(_named(error, name))
        return {}, None
    listed, metadata = table.get("weight_map"), table.get("metadata")
    if not isinstance(listed, dict) or not listed:
        spots.append(Spot("it is no index: it has no weight_map", name))
        return {}, None
    good = {tensor: file for tensor, file in listed.items() if isinstance(file, str) and is_plain_name(file)}
    spots += [Spot(f"the index names no plain file: {listed[tensor]!r:.80}", name, tensor) for tensor in listed if tensor not in good]
    return good, metadata.get("total_size") if isinstance(metadata, dict) else None


def _weights(
    root: Path,
    name: str,
    index: str | None,
    listed: dict[str, str],
    total: object,
    wanted: list[str],
    names: Sequence[str],
    spots: list[Spot],
) -> Weights:
    there, headers, damaged = set(names), [], []
    for file in wanted:
        if file not in there:
            continue
        try:
            headers.append(_header(root / file, spots))
        except PlanError as error:
            if index is not None or len(names) == 1 or file.startswith("pytorch_model"):
                spots.append(_named(error, file))
            damaged.append(file)
        except TriptychError as error:
            spots.append(_named(error, file))
            damaged.append(file)
    missing = tuple(file for file in wanted if file not in there)
    return Weights(name, root, index, listed, total, tuple(headers), missing, tuple(damaged))


def _header(path: Path, spots: list[Spot]) -> Header:
    if path.name.endswith(torch_zip.SUFFIXES):
        found = torch_zip.read(path)
        spots += [Spot(f"a tensor cannot be read without running code: {why}", path.name, name) for name, why in found.unreadable.items()]
        return found.header
    return gguf.read(path).header if path.name.endswith(gguf.SUFFIX) else formats.read_header(path)


# What is known of a set


def _told(weights: Weights, seen: Seen) -> Told:
    """Records and stamps, each projection for itself: what does not fit becomes a spot."""
    stamps: list[Spot] = []
    stamped: dict[str, Stamped] = {}
    for header in weights.headers:
        try:
            stamped |= stamp.decode(header)
        except TriptychError as error:
            stamps.append(_named(error, header.file))
    groups: dict[str, dict[str, Stamped]] = {}
    for name, told in stamped.items():
        groups.setdefault(told.projection, {})[name] = told
    good: list[Packed] = []
    for group in groups.values():
        try:
            for one in packed.from_stamps(group):
                packed.check_fit(one, weights.tensors)
                good.append(one)
        except TriptychError as error:
            if weights.whole or not isinstance(error, FormatError):
                first = next(iter(group))
                stamps.append(Spot(_sentence(error), weights.tensors[first].file, first))
    shapes = {name: tensor.shape for name, tensor in weights.tensors.items()}
    unknown: dict[str, str] = {}
    misfits: list[Spot] = []
    others: list[Spot] = []
    try:
        said = families.declared(seen.config, shapes, seen.records, seen.sizes)
    except TriptychError as error:
        return Told(tuple(good), {}, (_named(error, "config.json"),), tuple(stamps), ())
    by_name = {one.name: one for one in good if one.fused}
    notes: list[str] = []
    for found in packed.from_records(said.projections, {}, notes):
        names = [piece.tensor for piece in found.pieces]
        if set(names) & set(stamped):
            other = by_name.get(names[0])
            if other is not None and not packed.same_rows(other.layout, other.sizes, found.layout, found.sizes):
                others.append(_other_order(other, found, said.family, weights))
            continue
        if len({weights.tensors[name].dtype for name in names}) > 1:  # another rule's
            continue
        try:
            packed.check_fit(found, weights.tensors)
            good.append(found)
        except TriptychError as error:
            misfits.append(Spot(_sentence(error), weights.tensors[names[0]].file, names[0]))
    unknown |= {name: reason for name, reason in said.unknown.items() if name not in stamped}
    return Told(tuple(good), unknown, tuple(misfits), tuple(stamps), tuple(others))


def _asked(seen: Seen) -> Iterator[tuple[str, tuple[str, ...]]]:
    for file in seen.files:
        if file.endswith(PICKLES) and not is_behind(seen.root):
            try:
                yield file, names_in(seen.root / file)
            except TriptychError:  # no readable archive: a file of weights is reported as such
                continue


def _values(seen: Seen) -> Values:
    every, size, spots = [], 0, []
    for weights, told in seen.told:
        axes = {piece.tensor: one.axis for one in told.projections for piece in one.pieces}
        found: dict[str, Facts] = {}
        for file, tensors in by_file(weights.tensors).items():
            try:
                with closing(opened(weights.root, file)) as source:
                    for tensor in filter(is_looked_at, tensors):
                        axis = axes.get(tensor.name, packed_axis(tensor.shape) if len(tensor.shape) == 2 else 0)
                        found[tensor.name] = facts(source, tensor, axis)
                        size += tensor.size
            except (FormatError, OSError) as error:
                spots.append(_named(error, file) if isinstance(error, FormatError) else Spot(f"{error.strerror}", file))
        every.append(found)
    return Values(tuple(every), size, tuple(spots))


def _other_order(stamped: Packed, record: Packed, family: str | None, weights: Weights) -> Spot:
    both = f"stamped {stamped.layout} with {stamped.sizes.of(stamped.layout)}, and the code of {family} reads {record.layout}"
    return Spot(f"it is {both}", weights.tensors[stamped.name].file, stamped.name)


def _named(error: TriptychError, file: str) -> Spot:
    return Spot(_sentence(error), file, str(error.fields["tensor"]).partition("  (")[0] if "tensor" in error.fields else None)


def _sentence(error: TriptychError) -> str:
    """An error on one line, without what a spot says anyway."""
    more = "; ".join(f"{key} {' '.join(str(value).split())}" for key, value in error.fields.items() if key not in ("tensor", "file", "try"))
    return error.what + (f": {more}" if more else "")


def siblings(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, tuple[str, ...], dict[str, str]]]:
    """Sets of separate q, k and v by their names: (home, the three names, name -> tensor); weights only."""
    parts = {part: trio for trio in SIBLINGS for part in trio}
    groups: dict[tuple[str, tuple[str, ...]], dict[str, str]] = {}
    for name in tensors:
        begin, _, last = name.rpartition(".")
        home, _, part = begin.rpartition(".")
        if last == "weight" and part in parts:
            groups.setdefault((home, parts[part]), {})[part] = name
    for (home, trio), found in groups.items():
        yield home, trio, found
