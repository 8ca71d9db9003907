"""From some ranks to others, or to one folder and back: a plan of byte ranges, known to fit as a whole before a byte is written.

Splitting, joining and changing the number of ranks are one thing: for every tensor the map of the ranks before and that of the ranks
after, composed. What several ranks hold must be equal, and is compared before the plan is run.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from .errors import FormatError, PlanError
from .foreign import Given, wholes_of_ranks
from .formats import Stored, index_bytes, nbytes, safetensors_name, without_gc
from .outfiles import placed_file
from .pieces import WEIGHTS, in_bytes, listed, star
from .place import check_place, check_room
from .rank_sets import find
from .relay import in_nests
from .remote import is_remote
from .remote_out import check_remote_place
from .remote_skeleton import Skeleton, reading_urls
from .sharding import EVEN, POLICIES, ROWS, RUN, VOCAB, Cut, Ranks, held, local, passage
from .shards import TABLE, Sharded, Whole, encode, folder_of, read
from .stamp import KEY, Stamped
from .steps import Feed, Nest, Plan, Source, Step, covers
from .whole import wholes_of

MAX_RANKS = 1024


class Twin(NamedTuple):
    """Bytes that two ranks hold: `nests` lead from those of `first` (their source) to those of `second` (their result)."""

    tensor: str
    first: Feed
    second: Feed
    nests: tuple[Nest, ...]


@dataclass(frozen=True)
class Sharding:
    """A plan from the ranks `before` to the ranks `after` (None: one folder), and what must be equal before it is run."""

    plan: Plan
    before: Ranks | None
    after: Ranks | None
    wholes: tuple[Whole, ...]
    twins: tuple[Twin, ...]

    @property
    def compared(self) -> int:
        """How many tensors are held by more than one rank, in whole or in part."""
        return len({twin.tensor for twin in self.twins})

    def to_dict(self) -> dict[str, Any]:
        """The plan as for `convert`, and how every tensor is divided."""
        sides = {"before": _told(self.before), "after": _told(self.after)}
        tensors = {whole.name: {"cut": whole.cut.to_dict() if whole.cut else None, "source": whole.why} for whole in self.wholes}
        return {**self.plan.to_dict(), **sides, "tensors": tensors, "compared": self.compared}

    def __str__(self) -> str:
        made = self.plan
        lines = [f"{made.path} -> {made.out or '(no output given)'}   {_words(self.before)} to {_words(self.after)}"]
        groups = Counter((star(whole.name), _how(whole.cut), self._sizes(whole.cut)) for whole in self.wholes)
        width = max((len(name) for name, how, _ in groups), default=0)
        lines += [f"  {number:>4} x {name:<{width}}  {how}   {sizes}".rstrip() for (name, how, sizes), number in groups.items()]
        if self.twins:
            lines.append(f"  {tensors_shared(self.compared)} compared first")
        lines.append(f"  {in_bytes(made.size)} in all, weights in {listed((file.name for file in made.files), 2)}")
        lines += [f"  note: {note}" for note in made.notes]
        return "\n".join([*lines, f"  plan {made.digest}"])

    def _sizes(self, cut: Cut | None) -> str:
        """Sizes of the whole and of a rank."""
        if cut is None or cut.block > 1:
            return ""
        sides = []
        for ranks in (self.before, self.after):
            found = (cut.layout, cut.sizes) if ranks is None else local(cut, ranks)
            sides.append(found[1].of(found[0]) if found and cut.role != VOCAB else _length(cut, ranks))
        return " -> ".join(sides)


def _length(cut: Cut, ranks: Ranks | None) -> str:
    """Rows of a rank, where no whole heads tell them."""
    return f"{len(held(cut, ranks or Ranks(1), 0))} rows"


def _how(cut: Cut | None) -> str:
    if cut is None:
        return "whole on every rank"
    along = "" if cut.axis == 0 else f" along axis {cut.axis}"
    scales = f", one element for {cut.block}" if cut.block > 1 else ""
    words = {EVEN: "equal runs", VOCAB: "vocabulary"}
    return f"{words[cut.role] if cut.layout == RUN else f'{cut.layout} by {words.get(cut.role, cut.role)}'}{along}{scales}"


def tensors_shared(number: int) -> str:
    """The subject of a sentence about what is compared.

    >>> tensors_shared(1), tensors_shared(2)
    ('1 tensor that several ranks hold is', '2 tensors that several ranks hold are')
    """
    return f"{number} tensor{'s' * (number != 1)} that several ranks hold {'is' if number == 1 else 'are'}"


def _words(ranks: Ranks | None) -> str:
    if ranks is None:
        return "one folder"
    kv = ", raw kv rows" if ranks.kv == ROWS else ""
    pad = f", vocabulary padded to {ranks.pad}" if ranks.pad > 1 else ""
    return f"{ranks.world} rank{'s' * (ranks.world != 1)}{kv}{pad}"


def _told(ranks: Ranks | None) -> dict[str, Any] | None:
    return None if ranks is None else {"world": ranks.world, "kv": ranks.kv, "pad": ranks.pad}


def _behind(made: Sharding, places: Mapping[str, Skeleton]) -> Sharding:
    """A plan made with a folder of holes, as one of the URL that it stands for."""
    here, plan = places["path"], made.plan
    if plan.out is not None and f"{plan.out}/".startswith(f"{here.name}/"):
        raise PlanError("the output lies inside the input", where=plan.out, found=f"the input is {here.name}")
    sides = [tuple(one._replace(changed=here.changed(one.name, one.changed)) for one in some) for some in (plan.sources, plan.copies)]
    return replace(made, plan=replace(plan, path=here.name, sources=sides[0], copies=sides[1]))


@reading_urls("path", told=_behind)
@without_gc()
def shard_plan(
    path: str | Path,
    tp: int,
    out: str | Path | None = None,
    *,
    kv: str | None = None,
    pad_vocab_to: int | None = None,
    layouts: Mapping[str, str] | None = None,
    rules: Mapping[str, str] | None = None,
    records: str | Path | None = None,
    **sizes: int,
) -> Sharding:
    """What dividing a checkpoint among `tp` ranks would do, checked whole; nothing is written.

    Args:
        path: a checkpoint in one folder, or a folder of ranks, which are then divided anew; or its URL.
        out: where the folders `rank-0-of-TP` and so on shall lie; or its URL (s3://, gs://).
        kv: `replicate` (vLLM) or `rows` (Megatron) where there are fewer kv heads than ranks; as before, or `replicate`.
        pad_vocab_to: the vocabulary is filled with zeros to a multiple of this; as before, or 1.
        rules: glob of tensor names -> column, row, vocab or copy, for tensors that neither layout nor table speaks of.
        layouts, records, sizes: as for `plan`; a folder of ranks knows its own.
    Raises PlanError where anything is refused: heads that do not divide, a tensor that nothing says how to divide, scales that cross.
    """
    if type(tp) is not int or not 0 < tp <= MAX_RANKS:
        raise PlanError("no such number of ranks", found=f"tp={tp!r}", expected=f"1 to {MAX_RANKS}")
    told = Given(layouts or {}, rules or {}, records, sizes, padded=pad_vocab_to is not None)
    source = _read(Path(path), told)
    if source is None:
        source = foreign_ranks(path, told) or wholes_of(Path(path), layouts or {}, rules or {}, records, sizes)
    before = source.world
    after = Ranks(tp, kv or before.kv, before.pad if pad_vocab_to is None else pad_vocab_to)
    if after.kv not in POLICIES or type(after.pad) is not int or not 0 < after.pad < 1 << 31:
        raise PlanError("no such division", found=f"kv={after.kv!r}, pad_vocab_to={after.pad!r}", expected=" or ".join(POLICIES))
    return _planned(source, after, out)


@reading_urls("path", told=_behind)
@without_gc()
def merge_plan(
    path: str | Path,
    out: str | Path | None = None,
    *,
    tp: int | None = None,
    kv: str | None = None,
    pad_vocab_to: int | None = None,
    layouts: Mapping[str, str] | None = None,
    rules: Mapping[str, str] | None = None,
    records: str | Path | None = None,
    **sizes: int,
) -> Sharding:
    """What joining the ranks below `path` would do, checked whole: the inverse of `shard_plan`, computed from the tables in the folders.

    Args: as for `shard_plan`, for ranks that others wrote, which have no tables; `tp` must be how many there are.
    """
    told = Given(layouts or {}, rules or {}, records, sizes, kv, pad_vocab_to)
    source = _read(Path(path), told) or foreign_ranks(path, told)
    if source is None:
        if not Path(path).exists():
            raise FormatError("no such file or folder", file=str(path))
        raise PlanError("there are no ranks here", where=path, expected=f"folders {folder_of(0, 2)}, {folder_of(1, 2)}, each with {TABLE}; "
                        "folders rank0, rank1; or vLLM's model-rank-0-part-0.safetensors")  # fmt: skip
    if tp is not None and tp != source.world.world:
        raise PlanError("there is another number of ranks", where=path, expected=str(tp), found=str(source.world.world))
    return _planned(source, None, out)


def _read(path: Path, told: Given) -> Sharded | None:
    """The ranks of a folder that have tables, which know more than a person may say."""
    source = read(path)
    words = {"--layout": told.layouts, "--rule": told.rules, "--records": told.records, "-s": told.sizes, "--kv": told.kv,
             "--pad-vocab-to": told.pad}  # fmt: skip
    if source is not None and (given := [word for word, value in words.items() if value]):
        found = " and ".join(given)
        raise PlanError("ranks know how they are divided", found=found, try_="leave it out, or merge them and shard the whole")
    return source


def foreign_ranks(path: str | Path, told: Given) -> Sharded | None:
    """The ranks of a folder that others wrote."""
    if told.kv not in (None, *POLICIES):
        raise PlanError("no such division", found=f"kv={told.kv!r}", expected=" or ".join(POLICIES))
    found = find(Path(path))
    return None if found is None else wholes_of_ranks(found, told)


def _planned(source: Sharded, after: Ranks | None, out: str | Path | None) -> Sharding:
    everything = _together(source)
    url = str(out).rstrip("/") if out is not None and is_remote(out) else None
    if url is not None:
        check_remote_place(everything, source.path, url)
    elif out is not None:
        check_place(everything, Path(out))
    ranks = after or Ranks(1)
    steps, drops, twins = _steps(source, ranks)
    own = _own_stamps(source.wholes, ranks)
    files, texts, copies = [], [], []
    left_out: dict[str, None] = {}
    indexes: dict[bytes, bytes] = {}
    first = source.model or source.stored[0]
    metadata = {file.file: {key: value for key, value in file.metadata.items() if key != KEY} for file in first.files}
    tables = encode(source.wholes, ranks) if after else ()
    for rank in range(ranks.world):
        prefix = f"{folder_of(rank, ranks.world)}/" if after else ""
        mine = [
            placed_file(prefix + safetensors_name(file.file), steps[rank].get(file.file, []), metadata[file.file], own)
            for file in first.files
        ]
        files += mine
        if first.index:
            weight_map = {step.tensor: file.name.removeprefix(prefix) for file in mine for step in file.steps}
            text = index_bytes(weight_map, sum(file.data_size for file in mine), first.index_metadata)
            texts.append((prefix + safetensors_name(first.index), indexes.setdefault(text, text)))  # most are equal, and large
        if after:
            texts.append((prefix + TABLE, tables[rank]))
        mine_too = {other.name: (source.prefix(0), other) for other in first.others}
        for name, (home, other) in {**{other.name: ("", other) for other in source.beside}, **mine_too}.items():
            if name.endswith(WEIGHTS):
                left_out[name] = None
            elif name != TABLE:
                copies.append(Source(home + name, other.size, other.changed, prefix + name))
    notes = [*source.notes, *(f"{name} is left out: its weights are not divided" for name in left_out)]
    made = Plan(
        path=str(source.path),
        out=None if out is None else url or str(out),
        target=_words(after),
        is_folder=True,
        sources=tuple(Source(file.file, file.size, file.changed) for file in everything.files),
        files=tuple(files),
        copies=tuple(copies),
        drops=tuple(drops),
        shared=frozenset(),
        index=None,
        changes=(),
        notes=tuple(notes),
        texts=tuple(texts),
    )
    _check_names(made)
    if out is not None and url is None:
        check_room(made, Path(out))
    return Sharding(made, source.ranks, after, source.wholes, tuple(twins))


def _together(source: Sharded) -> Stored:
    """All ranks as one checkpoint of files with their folders."""
    files = [
        type(file)(source.prefix(rank) + file.file, file.size, file.changed, (), {})
        for rank, stored in enumerate(source.stored)
        for file in stored.files
    ]
    others = [other._replace(name=source.prefix(rank) + other.name) for rank, stored in enumerate(source.stored) for other in stored.others]
    return Stored(source.path, source.path, tuple(files), None, {}, tuple(others))


# Steps


_Steps = list[dict[str, list[Step]]]


def _steps(source: Sharded, after: Ranks) -> tuple[_Steps, list[Feed], list[Twin]]:
    """By rank and file the steps, not placed yet; padding that is left out; what must be equal."""
    steps: _Steps = [{} for _ in range(after.world)]
    drops: list[Feed] = []
    twins: list[Twin] = []
    for whole in source.wholes:
        olds = [source.tensor(rank, whole.name) for rank in range(source.world.world)]
        feeds = [Feed(old.file, old.name, old.start, old.size, ()) for old in olds]
        moved = _moved_named(whole, source.world, after, feeds)
        for rank, (shape, size, parts, zeros) in enumerate(moved.ranks):
            mine = tuple(Feed(*feeds[number][:4], nests) for number, nests in parts)
            steps[rank].setdefault(whole.file, []).append(Step(whole.name, whole.dtype, shape, 0, size, mine, zeros))
        drops += [feeds[number]._replace(nests=nests) for number, nests in moved.drops]
        twins += [Twin(whole.name, feeds[one], feeds[two], nests) for one, two, nests in moved.twins]
    return steps, drops, twins


class _Moved(NamedTuple):
    """For each rank shape, bytes, (number of the source rank, nests), zeros; by source rank what is dropped; pairs that must be equal."""

    ranks: tuple[tuple[tuple[int, ...], int, tuple[tuple[int, tuple[Nest, ...]], ...], tuple[Nest, ...]], ...]
    drops: tuple[tuple[int, tuple[Nest, ...]], ...]
    twins: tuple[tuple[int, int, tuple[Nest, ...]], ...]


def _moved_named(whole: Whole, before: Ranks, after: Ranks, feeds: Sequence[Feed]) -> _Moved:
    try:
        if whole.cut is None:
            return _copied(whole.shape, feeds[0].size, before.world, after.world)
        return _moved(whole.cut, before, after, whole.dtype, whole.shape)
    except PlanError as error:
        raise PlanError(error.what, **{"tensor": whole.name, **error.fields}) from None


@lru_cache(maxsize=1024)
def _copied(shape: tuple[int, ...], size: int, before: int, after: int) -> _Moved:
    """A tensor that every rank holds whole."""
    all_ = (Nest(0, 0, size),) if size else ()
    parts = ((0, all_),) if size else ()
    return _Moved(((shape, size, parts, ()),) * after, (), tuple((0, rank, all_) for rank in range(1, before) if size))


@lru_cache(maxsize=1024)
def _moved(cut: Cut, before: Ranks, after: Ranks, dtype: str, shape: tuple[int, ...]) -> _Moved:
    """A tensor that is cut, in nests of bytes; every byte of every output filled once, every byte of every source used or left out."""
    found, axis = passage(cut, before, after), cut.axis
    outer, inner = math.prod(shape[:axis]), nbytes(dtype, shape[axis + 1 :])
    if inner is None:
        raise PlanError("rows do not begin on whole bytes", found=f"{dtype} {shape}")
    ranks = []
    used: list[list[Nest]] = [[] for _ in found.rows]
    for taken in found.taken:
        parts = tuple((s, in_nests(blocks, outer, inner, taken.rows, found.rows[s])) for s, blocks in taken.blocks) if outer * inner else ()
        zeros = in_nests(taken.zeros, outer, inner, taken.rows, taken.rows)
        if not covers((*(n for _, nests in parts for n in nests), *zeros), outer * taken.rows * inner):
            raise PlanError("an output tensor is not filled byte by byte", layout=cut.layout)
        for s, nests in parts:
            used[s] += nests
        ranks.append(((*shape[:axis], taken.rows, *shape[axis + 1 :]), outer * taken.rows * inner, parts, zeros))
    twins = tuple((t.first, t.second, in_nests(t.blocks, outer, inner, found.rows[t.second], found.rows[t.first])) for t in found.twins)
    drops = tuple((s, in_nests(gaps, outer, inner, found.rows[s], found.rows[s])) for s, gaps in found.padding)
    for s, rows in enumerate(found.rows):
        sides = [Nest(n.into, 0, n.width, tuple((k, of, 0) for k, _, of in n.dims)) for n in used[s]]
        sides += [n for _, second, nests in twins if second == s for n in nests]
        sides += [n for number, nests in drops if number == s for n in nests]
        if not covers(tuple(sides), outer * rows * inner, found.often):
            raise PlanError("not every row of a source tensor is used as often as it should be", layout=cut.layout, where=f"rank {s}")
    return _Moved(tuple(ranks), drops if outer * inner else (), twins if outer * inner else ())


def _own_stamps(wholes: Sequence[Whole], ranks: Ranks) -> dict[str, Stamped]:
    """The stamps of a rank's own tensors: of projections whose every tensor holds whole heads there."""
    out: dict[str, Stamped] = {}
    without: set[str] = set()
    for whole in wholes:
        if whole.told is None:
            continue
        own = (whole.told.layout, whole.told.sizes) if whole.cut is None else local(whole.cut, ranks) if whole.cut.block == 1 else None
        if own is None:
            without.add(whole.told.projection)
            continue
        told = whole.told
        out[whole.name] = Stamped(own[0], own[1], told.axis, told.projection, told.parts, told.kind, told.rope)
    return {name: told for name, told in out.items() if told.projection not in without}


def _check_names(made: Plan) -> None:
    seen: set[str] = set()
    for name in _names(made):
        if name.casefold() in seen:
            raise PlanError("two outputs have one name", found=name)
        seen.add(name.casefold())


def _names(made: Plan) -> Iterator[str]:
    lists: tuple[Iterable[str], ...] = (
        (file.name for file in made.files),
        (copy.target for copy in made.copies),
        (name for name, _ in made.last),
    )
    yield from itertools.chain.from_iterable(lists)
