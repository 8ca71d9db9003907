"""A plan as a value: for every tensor of every output file, which bytes of which source file go where. Frozen, hashable, printable as JSON.

Bytes move in strided nests, so a plan is as long as the checkpoint has tensors, not as it has rows.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .errors import PlanError
from .formats import Tensor, header_bytes, nbytes, without_gc
from .pieces import in_bytes, listed, shown, star
from .stamp import KEY, Stamped, encode

VERSION = 1
MAX_MARKS = 1 << 22
MAX_SHOWN = 40
"""Lines that the text of a plan gives to one thing; its JSON has all."""
MEMORY, A_WORKER = 64, 8
"""Megabytes that a run may take, whatever the checkpoint; the plan of very many tensors comes on top (1 kB each)."""


class Nest(NamedTuple):
    """`width` bytes at every point of a grid, at byte out + sum(i * to) of the output tensor and into + sum(i * of) of the source.

    `dims` holds (size, to, of), the slowest output step first.
    """

    out: int
    into: int
    width: int
    dims: tuple[tuple[int, int, int], ...] = ()

    @property
    def size(self) -> int:
        return self.width * math.prod(n for n, _, _ in self.dims)


def nest(out: int, into: int, width: int, dims: Iterable[tuple[int, int, int]]) -> Nest:
    """A nest in its shortest form: no dim of size 1, neighbours that step alike joined, the last ones folded into the width.

    >>> nest(0, 8, 2, [(3, 32, 64), (4, 8, 8), (4, 2, 2)])
    Nest(out=0, into=8, width=32, dims=((3, 32, 64),))
    """
    kept: list[tuple[int, int, int]] = []
    for n, to, of in dims:
        if n == 1:
            continue
        if kept and kept[-1][1:] == (n * to, n * of):
            n *= kept.pop()[0]
        kept.append((n, to, of))
    if kept and kept[-1][1:] == (width, width):
        width *= kept.pop()[0]
    return Nest(out, into, width, tuple(kept))


class Feed(NamedTuple):
    """What one source tensor gives: it lies at byte `start` of `file` and has `size` bytes."""

    file: str
    tensor: str
    start: int
    size: int
    nests: tuple[Nest, ...]


class Step(NamedTuple):
    """One output tensor, at byte `start` of its file's data. `zeros` are bytes that no source fills."""

    tensor: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int
    feeds: tuple[Feed, ...]
    zeros: tuple[Nest, ...] = ()


@dataclass(frozen=True)
class OutFile:
    """One output file: its steps in the order of their bytes, and what its header says beside them."""

    name: str
    steps: tuple[Step, ...]
    metadata: tuple[tuple[str, str], ...]
    layouts: tuple[tuple[str, Stamped], ...]
    head: bytes = field(default=b"", repr=False)
    align: int = 1

    @property
    def data_size(self) -> int:
        return -(-(self.steps[-1].start + self.steps[-1].size) // self.align) * self.align if self.steps else 0

    def header(self, digest: str) -> bytes:
        """The header with the stamp, padded to whole pages; or the head of the source as it is, which has room for no stamp."""
        if self.head:
            return self.head
        entries = ((step.tensor, step.dtype, step.shape, step.start, step.start + step.size) for step in self.steps)
        return header_bytes(entries, {**dict(self.metadata), KEY: encode(self.layouts, digest)})


class Source(NamedTuple):
    """A file that the plan reads, as it was when the plan was made; one that is copied may get another name, `to`."""

    name: str
    size: int
    changed: int
    to: str = ""

    @property
    def target(self) -> str:
        return self.to or self.name


class Change(NamedTuple):
    """What happens to one projection, in words: (tensor, layout) before and after."""

    projection: str
    before: tuple[tuple[str, str], ...]
    after: tuple[tuple[str, str], ...]
    sizes: str
    size: int
    source: str


@dataclass(frozen=True)
class Plan:
    """All that a conversion does.

    `copies`: files carried over whole. `drops`: rows that a layout declares zero, checked to be zero and left out. `shared`: source tensors
    with rows that several parts have in common. `texts`: small files of the plan's own, by name.
    """

    path: str
    out: str | None
    target: str
    is_folder: bool
    sources: tuple[Source, ...]
    files: tuple[OutFile, ...]
    copies: tuple[Source, ...]
    drops: tuple[Feed, ...]
    shared: frozenset[str]
    index: tuple[str, bytes] | None
    changes: tuple[Change, ...]
    notes: tuple[str, ...]
    texts: tuple[tuple[str, bytes], ...] = ()

    @cached_property
    def digest(self) -> str:
        """sha256 over everything but the two paths and the times: the same input and target give the same digest anywhere."""
        found = hashlib.sha256()
        files = (
            [file.name, file.metadata, [(name, told.to_dict()) for name, told in file.layouts], file.steps, file.align, _sha256(file.head)]
            for file in self.files
        )
        with without_gc():
            for part in (*files, self._rest()):
                found.update(json.dumps(part, separators=(",", ":"), sort_keys=True, ensure_ascii=False).encode() + b"\n")
        return f"sha256:{found.hexdigest()}"

    @cached_property
    def headers(self) -> dict[str, bytes]:
        """File name -> header."""
        with without_gc():
            return {file.name: file.header(self.digest) for file in self.files}

    @property
    def size(self) -> int:
        """Bytes that will be written."""
        written = sum(file.data_size + len(self.headers[file.name]) for file in self.files)
        return written + sum(copy.size for copy in self.copies) + sum(len(text) for _, text in self.last)

    @property
    def last(self) -> tuple[tuple[str, bytes], ...]:
        """Small files that are written when all others are there: texts, then the index."""
        return (*self.texts, *([self.index] if self.index else []))

    @property
    def unchanged(self) -> tuple[str, ...]:
        """Output tensors that are carried over byte for byte under their own names."""
        moved = {name for change in self.changes for name, _ in change.after}
        return tuple(step.tensor for file in self.files for step in file.steps if step.tensor not in moved)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `--json`, version 1. A nest is [out, into, width, [[size, to, of], ...]]."""
        told = {"version": VERSION, "digest": self.digest, "path": self.path, "out": self.out, "bytes": self.size}
        changes = [change._asdict() for change in self.changes]
        return {
            **told,
            **self._rest(),
            "files": list(map(_file, self.files)),
            "changes": changes,
            "unchanged": list(self.unchanged),
            "notes": list(self.notes),
        }

    def _rest(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "sources": [[source.name, source.size] for source in self.sources],
            "copies": [[copy.name, copy.size, *filter(None, [copy.to])] for copy in self.copies],
            "drops": [feed._asdict() for feed in self.drops],
            "index": {"name": self.index[0], "sha256": _sha256(self.index[1])} if self.index else None,
            **({"texts": [[name, _sha256(text)] for name, text in self.texts]} if self.texts else {}),
        }

    @without_gc()
    def __str__(self) -> str:
        lines = [f"{self.path} -> {self.out or '(no output given)'}   to {self.target}"]
        groups: dict[tuple[object, ...], list[Change]] = {}
        for change in self.changes:
            groups.setdefault((*_starred(change.before), None, *_starred(change.after), change.sizes, change.source), []).append(change)
        for changes in groups.values():
            first, show = changes[0], star if len(changes) > 1 else shown
            lines.append(f"  {len(changes):>4} x {in_bytes(first.size)}   {first.sizes}   ({first.source})")
            for word, side in (("from", first.before), ("to", first.after)):
                lines += [f"         {word if not i else '':<4} {show(name)}   {layout}" for i, (name, layout) in enumerate(side)]
        lines.append(f"  {len(self.unchanged)} tensors carried over unchanged")
        lines += self._kept()
        if self.copies:
            lines.append(f"  {len(self.copies)} other files copied: {listed((copy.name for copy in self.copies), 6)}")
        lines += [f"  file  {file.name}   {len(file.steps)} tensors, {in_bytes(file.data_size)}" for file in self.files[:MAX_SHOWN]]
        if len(self.files) > MAX_SHOWN:
            lines.append(f"  and {len(self.files) - MAX_SHOWN} files more (--json lists all)")
        lines += [f"  file  {name}" for name, _ in self.last]
        lines.append(f"  {in_bytes(self.size)} to write: as much room is needed; memory {MEMORY} MB, and {A_WORKER} MB a worker")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join([*lines, f"  plan {self.digest}"])

    def _kept(self) -> list[str]:
        """Tensors that are carried over, those of one kind on one line."""
        moved = {name for change in self.changes for name, _ in change.after}
        kinds: dict[tuple[str, str, tuple[int, ...]], list[Step]] = {}
        for file in self.files:
            for step in file.steps:
                if step.tensor not in moved:
                    kinds.setdefault((star(step.tensor), step.dtype, step.shape), []).append(step)
        return [
            f"  {len(steps):>4} x {in_bytes(steps[0].size)}   {name if len(steps) > 1 else shown(steps[0].tensor)}   {dtype} {shape}"
            for (name, dtype, shape), steps in kinds.items()
        ][:MAX_SHOWN]


def _starred(pairs: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    return tuple((star(name), layout) for name, layout in pairs)


def _file(file: OutFile) -> dict[str, Any]:
    steps = [{**step._asdict(), "feeds": [feed._asdict() for feed in step.feeds]} for step in file.steps]
    layouts = {name: told.to_dict() for name, told in file.layouts}
    head = {"head": _sha256(file.head)} if file.head else {}
    return {"name": file.name, "metadata": dict(file.metadata), "layouts": layouts, "steps": steps, **head}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# The check of the whole plan


def check(plan: Plan, tensors: Mapping[str, Tensor]) -> None:
    """That every byte of every output is written once, and every byte of every source tensor used once or declared otherwise."""
    names = [file.name for file in plan.files] + [copy.target for copy in plan.copies] + [name for name, _ in plan.last]
    folded = [name.casefold() for name in names]
    if len(set(folded)) != len(folded):
        raise PlanError("two outputs have one name", found=next(name for name in names if folded.count(name.casefold()) > 1))
    used: dict[str, tuple[Nest, ...]] = dict.fromkeys(tensors, ())
    sizes: dict[tuple[str, tuple[int, ...]], int | None] = {}
    seen: set[str] = set()
    for file in plan.files:
        at = 0
        for step in file.steps:
            at = -(-at // file.align) * file.align
            if step.tensor in seen:
                raise PlanError("two output tensors have one name", tensor=step.tensor, try_="choose other names: --name OLD=NEW")
            seen.add(step.tensor)
            kind = step.dtype, step.shape
            if kind not in sizes:
                sizes[kind] = nbytes(*kind)
            if step.start != at or step.size != sizes[kind]:
                found = f"byte {step.start}, {step.size} bytes"
                raise PlanError("an output tensor is not where it should be", tensor=step.tensor, expected=f"byte {at}", found=found)
            at += step.size
            alone = len(step.feeds) == 1 and not step.zeros
            nests = step.feeds[0].nests if alone else (*(nest for feed in step.feeds for nest in feed.nests), *step.zeros)
            if nests != ((0, 0, step.size, ()),) and not covers(nests, step.size):
                raise PlanError("an output tensor is not filled byte by byte", tensor=step.tensor)
            for feed in step.feeds:
                used[feed.tensor] += feed.nests
    for feed in plan.drops:
        used[feed.tensor] += feed.nests
    for name, nests in used.items():
        size = tensors[name].stop - tensors[name].start
        if nests == ((0, 0, size, ()),):
            continue  # whole, as most are
        turned = (Nest(n.into, n.into, n.width, tuple((k, of, of) for k, _, of in n.dims)) for n in nests)
        if not covers(tuple(turned), size, name in plan.shared):
            raise PlanError("not every row of a source tensor is used exactly once", tensor=name)


def covers(nests: tuple[Nest, ...], size: int, often: bool = False) -> bool:
    """Whether the output sides of the nests fill `size` bytes, each once (each at least once with `often`).

    >>> covers((Nest(0, 0, 4, ((2, 8, 0),)), Nest(4, 0, 4, ((2, 8, 0),))), 16), covers((Nest(0, 0, 12), Nest(8, 0, 8)), 16)
    (True, False)
    """
    if nests == ((0, 0, size, ()),) or (not nests and size == 0):
        return True
    one_sided = (nest(n.out, 0, n.width, sorted(((k, to, to) for k, to, _ in n.dims), key=lambda dim: -dim[1])) for n in nests)
    return _covers(tuple(sorted(one_sided)), size, often)


@lru_cache(maxsize=256)
def _covers(nests: tuple[Nest, ...], size: int, often: bool) -> bool:
    if size == 0 or not nests or any(n.width <= 0 for n in nests):
        return False
    band = nests[0].dims[0] if nests[0].dims else (1, size, 0)
    if band[0] > 1 and band[0] * band[1] == size and all(n.dims and n.dims[0] == band for n in nests):
        return _covers(tuple(n._replace(dims=n.dims[1:]) for n in nests), band[1], often)  # all rows of a weight [in, out] alike
    unit = math.gcd(size, *(value for n in nests for value in (n.out, n.width, *(to for _, to, _ in n.dims))))
    if size // unit > MAX_MARKS:
        raise PlanError(
            "rows too many to check one by one", found=f"{size // unit} pieces of {unit} bytes", expected=f"at most {MAX_MARKS}"
        )
    length = size // unit
    edges = np.zeros(length + 1, np.int64)
    for n in nests:
        first = starts(n.out, n.dims, 1) // unit
        if n.out < 0 or any(to < 0 for _, to, _ in n.dims) or not len(first) or int(first.max()) + n.width // unit > length:
            return False
        edges += np.bincount(first, minlength=length + 1)
        edges -= np.bincount(first + n.width // unit, minlength=length + 1)
    times = np.cumsum(edges[:-1])
    return bool((times >= 1).all() if often else (times == 1).all())


def starts(first: int, dims: Sequence[tuple[int, int, int]], side: int) -> NDArray[np.int64]:
    """First byte of every point of a grid, in the order of the dims; `side` 1 counts in the output, 2 in the source."""
    at = np.array([first], np.int64)
    for dim in dims:
        at = (at[:, None] + np.arange(dim[0], dtype=np.int64) * dim[side]).ravel()
    return at
