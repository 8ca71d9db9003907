"""A checkpoint and a target -> a plan that is known to fit as a whole. Reads headers; writes nothing and reads no tensor."""

from __future__ import annotations

import itertools
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from .checkpoint import Checkpoint, open_checkpoint
from .errors import FormatError, IncompatibleError, PlanError
from .formats import ALIGN, BITS, METADATA, Header, Stored, Tensor, index_bytes, nbytes, open_file, safetensors_name, without_gc
from .layout import Layout
from .packed import BY_RECORD, BY_STAMP, Packed, Piece
from .pieces import Target, alone, base_names, listed, name_of_part, star, stem, target_of, with_zeros
from .place import check_place, check_room
from .relay import in_nests, relay
from .sizes import Sizes, bind
from .stamp import KEY, Stamped
from .steps import Change, Feed, Nest, OutFile, Plan, Source, Step, check

WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".safetensors")
"""Other files with these endings may hold the same weights once more."""


@without_gc()
def plan(
    path: str | Path,
    to: str | Layout,
    out: str | Path | None = None,
    *,
    layouts: Mapping[str, str] | None = None,
    names: Mapping[str, str] | None = None,
    records: str | Path | None = None,
    **sizes: int,
) -> Plan:
    """What converting a checkpoint would do, checked whole; nothing is written.

    Args:
        path: a checkpoint, as for `inspect`.
        to: a layout for the fused projections, `split`, or `fused:LAYOUT` to join separate ones (`fused`: in the family's usual layout).
        out: where the result shall go: a folder for a folder, a file for a file; with it, room and place are checked too.
        layouts: glob of tensor names -> layout, for what no config says.
        records: a file of family records of your own, as for `inspect`.
        names: output name by rule -> another one; `*` stands for the same text in both.
        sizes: what neither config nor layout tells, or what the target needs beyond it (t=4).
    Raises FormatError, LayoutError, and PlanError where anything is refused: a fused tensor of unknown layout stops the plan.
    """
    target = target_of(to)
    checkpoint = open_checkpoint(path, layouts or {}, sizes, [target.layout] if target.layout else [], records)
    stored = checkpoint.stored
    if out is not None:
        check_place(stored, Path(out))
    _check_known(checkpoint)
    moves = _renamed(list(_moves(checkpoint, target, sizes)), names or {})
    _check_names(moves, stored.tensors)
    _check_companions(moves, stored.tensors)
    files = tuple(_files(checkpoint, moves))
    if out is not None and not stored.is_folder:
        files = (replace(files[0], name=Path(out).name),)
    made = Plan(
        path=str(path),
        out=None if out is None else str(out),
        target=str(target),
        is_folder=stored.is_folder,
        sources=tuple(Source(file.file, file.size, file.changed) for file in stored.files),
        files=files,
        copies=tuple(Source(*other) for other in stored.others),
        drops=tuple(feed for move in moves for feed in move.drops),
        shared=frozenset(piece.tensor for move in moves if _has_aliases(move.packed) for piece in move.packed.pieces),
        index=(safetensors_name(stored.index), _index(stored, files)) if stored.index else None,
        changes=tuple(_change(move) for move in moves),
        notes=(*checkpoint.notes, *_notes(checkpoint, target, moves)),
    )
    check(made, stored.tensors)
    if out is not None:
        check_room(made, Path(out))
    return made


# What is moved where


class _Move(NamedTuple):
    """One projection: its output tensors with their feeds, by rule or renamed."""

    packed: Packed
    pieces: tuple[Piece, ...]
    sizes: Sizes
    steps: tuple[Step, ...]
    drops: tuple[Feed, ...]


def _check_known(checkpoint: Checkpoint) -> None:
    if not checkpoint.unknown:
        return
    name, reason = next(iter(checkpoint.unknown.items()))
    more = len(checkpoint.unknown) - 1
    raise PlanError("the layout of a fused tensor is not known", tensor=name + (f"  and {more} more" if more else ""), found=reason,
                    try_=f"--layout '{star(name)}=LAYOUT' -s h=HEADS if you know it; `triptych inspect` lists all")  # fmt: skip


def _moves(checkpoint: Checkpoint, target: Target, sizes: Mapping[str, int]) -> Iterator[_Move]:
    none = True
    for packed in checkpoint.projections:
        if pieces := _wanted(packed, target):
            none = False
            yield _move(packed, pieces, sizes, checkpoint.stored.tensors)
    if none:
        raise _nothing(checkpoint, target)


def _wanted(packed: Packed, target: Target) -> tuple[Piece, ...]:
    """The output tensors of a projection, or none when the target does not speak of it."""
    zeros = frozenset(name for path in packed.layout.paths if path.zero for name in path.names)
    parts = base_names(packed.layout)
    if target.layout is not None:
        if set(parts) != set(base_names(target.layout)) or not (packed.fused or target.join):
            return ()
        return (Piece(packed.name, with_zeros(target.layout, zeros)),)
    if packed.kind != "attention" or packed.fused != target.split or parts == ("",):
        return ()
    if target.join:
        return (Piece(packed.name, packed.layout),)
    named = dict(packed.parts)
    return tuple(
        Piece(named.get(part) or name_of_part(packed.name, part), alone(packed.layout, part)) for part in parts if part not in zeros
    )


def _nothing(checkpoint: Checkpoint, target: Target) -> PlanError:
    apart = sum(not packed.fused for packed in checkpoint.projections)
    fused = len(checkpoint.projections) - apart
    try_ = "--layout 'NAME_GLOB=LAYOUT' -s h=HEADS declares what no config says"
    if target.split:
        expected = "fused projections"
    elif target.layout is None:
        expected = "separate projections"
    else:
        expected = f"{'' if target.join else 'fused '}projections of {', '.join(base_names(target.layout))}"
        if apart and not target.join:
            try_ = f"--to 'fused:{target.layout}' joins separate ones"
    found = f"{fused} fused and {apart} separate projections" + (f" of {checkpoint.family}" if checkpoint.family else "")
    return PlanError("there is nothing to convert", where=checkpoint.stored.path, expected=expected, found=found, try_=try_)


def _move(packed: Packed, pieces: tuple[Piece, ...], given: Mapping[str, int], tensors: Mapping[str, Tensor]) -> _Move:
    old = tuple(tensors[piece.tensor] for piece in packed.pieces)
    sources, targets = tuple(piece.layout for piece in packed.pieces), tuple(piece.layout for piece in pieces)
    used = {axis for layout in (*sources, *targets) for axis in layout.axes}
    sizes = bind(packed.layout, *sources, *targets, **{**packed.sizes, **{axis: size for axis, size in given.items() if axis in used}})
    try:
        way = relay(sources, targets, sizes)
    except IncompatibleError as error:
        both = f"{packed.layout}   -> {' and '.join(map(str, targets))}   with {sizes.of(*sources, *targets)}"
        raise IncompatibleError(error.what, **{"tensor": old[0].name, **error.fields, "layout": both}) from None
    before, after, dtype = old[0].shape[: packed.axis], old[0].shape[packed.axis + 1 :], old[0].dtype
    inner = nbytes(dtype, after)
    if inner is None:
        raise PlanError("rows do not begin on whole bytes", tensor=old[0].name, found=f"{dtype} {old[0].shape}")
    outer, rows = math.prod(before), tuple(tensor.shape[packed.axis] for tensor in old)
    steps = []
    for piece, cut in zip(pieces, way.cuts, strict=True):
        size = outer * cut.rows * inner
        feeds = tuple(_feed(old[s], in_nests(blocks, outer, inner, cut.rows, rows[s])) for s, blocks in cut.blocks) if size else ()
        zeros = in_nests(cut.zeros, outer, inner, cut.rows, cut.rows)
        steps.append(Step(piece.tensor, dtype, (*before, cut.rows, *after), 0, size, feeds, zeros))
    drops = tuple(_feed(old[s], in_nests(blocks, outer, inner, rows[s], rows[s])) for s, blocks in way.unused)
    return _Move(packed, pieces, sizes, tuple(steps), drops)


def _feed(tensor: Tensor, nests: tuple[Nest, ...]) -> Feed:
    return Feed(tensor.file, tensor.name, tensor.start, tensor.size, nests)


def _has_aliases(packed: Packed) -> bool:
    return any(len(path.names) > 1 for path in packed.layout.paths)


def _change(move: _Move) -> Change:
    packed, pieces = move.packed, move.pieces
    before, after = (tuple((piece.tensor, str(piece.layout)) for piece in side) for side in (packed.pieces, pieces))
    sizes = move.sizes.of(*(piece.layout for piece in (*packed.pieces, *pieces))) + (f" along axis {packed.axis}" if packed.axis else "")
    return Change(packed.name, before, after, sizes, sum(step.size for step in move.steps), packed.source)


def _renamed(moves: list[_Move], names: Mapping[str, str]) -> list[_Move]:
    """The moves with other output names; each rule must meet a name that the plan writes."""
    written = [piece.tensor for move in moves for piece in move.pieces]
    new: dict[str, str] = {}
    for rule, pattern in names.items():
        if rule.count("*") != pattern.count("*"):
            raise PlanError("a name and its replacement need as many stars", found=f"{rule}={pattern}")
        regex = re.compile("(.*)".join(map(re.escape, rule.split("*"))), re.DOTALL)
        met = {name: match for name in written if (match := regex.fullmatch(name))}
        if not met:
            raise PlanError("no output tensor has this name by rule", found=f"{rule}={pattern}", expected=listed(written))
        for name, match in met.items():
            pairs = zip(pattern.split("*"), (*match.groups(), ""), strict=True)
            new.setdefault(name, "".join(itertools.chain.from_iterable(pairs)))
    out = []
    for move in moves:
        pieces = tuple(Piece(new.get(piece.tensor, piece.tensor), piece.layout) for piece in move.pieces)
        steps = tuple(step._replace(tensor=piece.tensor) for step, piece in zip(move.steps, pieces, strict=True))
        out.append(move._replace(pieces=pieces, steps=steps))
    return out


def _check_names(moves: Iterable[_Move], tensors: Mapping[str, Tensor]) -> None:
    """No output tensor takes the name of another one that stays. (That no two outputs share a name is part of the check of the plan.)"""
    gone = {piece.tensor for move in moves for piece in move.packed.pieces}
    for name in (piece.tensor for move in moves for piece in move.pieces):
        if name in tensors and name not in gone:
            raise PlanError("an output tensor would have the name of another tensor", tensor=name, try_=f"--name '{name}=ANOTHER'")
        if not name.isprintable() or name == METADATA:
            raise PlanError("an output tensor needs a printable name", tensor=name)


def _check_companions(moves: Iterable[_Move], tensors: Mapping[str, Tensor]) -> None:
    """Scales, zero points or adapters of a fused tensor move with its rows, or nothing does: those that nobody declared stop the plan."""
    moved = {piece.tensor: move for move in moves for piece in move.packed.pieces}
    stems = {stem(name)[0]: move for name, move in moved.items() if name.endswith((".weight", ".bias"))}
    words = {f".{begin}".rpartition(".")[2] + "." for begin in stems}
    for name, tensor in tensors.items():
        if name in moved or not any(word in name for word in words):
            continue
        dots = (i for i, letter in enumerate(name) if letter == ".")
        move = next((stems[name[:dot]] for dot in dots if name[:dot] in stems), None)
        if move is None:
            continue
        if math.prod(tensor.shape) > 1 or len(move.pieces) > 1 or not move.packed.fused:
            try_ = f"if it has the same rows: --layout '{star(name)}=LAYOUT'"
            found = f"{tensor.dtype} {tensor.shape} beside {move.packed.name}"
            raise PlanError("a companion of a fused tensor would stay behind", tensor=name, found=found, try_=try_)


# Files


def _files(checkpoint: Checkpoint, moves: Sequence[_Move]) -> Iterator[OutFile]:
    """Every file with its steps: where the (first) source tensor stood, whole pages first, so that large tensors begin on a page."""
    taken = {piece.tensor for move in moves for piece in move.packed.pieces}
    written = {move.packed.pieces[0].tensor: move.steps for move in moves}
    stamps = {piece.tensor: _stamp(move.packed, piece, move.pieces, move.sizes) for move in moves for piece in move.pieces}
    for packed in checkpoint.projections:
        if packed.source == BY_STAMP and packed.pieces[0].tensor not in taken:
            stamps |= {piece.tensor: _stamp(packed, piece, packed.pieces, packed.sizes) for piece in packed.pieces}
    for file in checkpoint.stored.files:
        steps: list[Step] = []
        for tensor in file.tensors:
            if tensor.name in written:
                steps += written[tensor.name]
            elif tensor.name not in taken:
                size = tensor.size
                feeds = (Feed(tensor.file, tensor.name, tensor.start, size, _all(size)),) if size else ()
                steps.append(Step(tensor.name, tensor.dtype, tensor.shape, 0, size, feeds))
        if file.tensors and not steps:
            continue  # all its tensors went to other files
        if file.head:
            yield _same_head(checkpoint.stored.root / file.file, file, steps)
            continue
        steps.sort(key=lambda step: (step.size % ALIGN != 0, -BITS[step.dtype]))
        starts = itertools.accumulate((step.size for step in steps), initial=0)
        placed = tuple(Step(*step[:3], start, *step[4:]) for step, start in zip(steps, starts, strict=False))
        metadata = tuple((key, value) for key, value in file.metadata.items() if key != KEY)
        layouts = tuple((step.tensor, stamps[step.tensor]) for step in placed if step.tensor in stamps)
        yield OutFile(safetensors_name(file.file), placed, metadata, layouts)


def _same_head(path: Path, file: Header, steps: Sequence[Step]) -> OutFile:
    """A GGUF file made from one with the same tensors: its head is copied, so each tensor keeps its name, shape and place."""
    for old, step in itertools.zip_longest(file.tensors, steps):
        if old is None or step is None or old[:3] != step[:3]:
            raise PlanError(
                "a GGUF file keeps its tensors: rows can move in each, not between them", tensor=(step or old)[0], file=file.file
            )
    fd = open_file(path)
    try:
        head = os.pread(fd, file.head, 0)
    finally:
        os.close(fd)
    if len(head) < file.head:
        raise FormatError("the file was cut short while it was read", file=file.file)
    placed = tuple(step._replace(start=old.start - file.head) for old, step in zip(file.tensors, steps, strict=True))
    return OutFile(file.file, placed, (), (), head, file.align)


@lru_cache(maxsize=1024)
def _all(size: int) -> tuple[Nest, ...]:
    """All bytes of a tensor; one value for all tensors of one size."""
    return (Nest(0, 0, size),)


def _stamp(packed: Packed, piece: Piece, pieces: Sequence[Piece], sizes: Sizes) -> Stamped:
    if len(pieces) > 1:
        parts = [(base_names(other.layout)[0], other.tensor) for other in pieces]
    else:
        parts = [(part, name) for part, name in packed.parts if name != piece.tensor]
    return Stamped(piece.layout, sizes, packed.axis, packed.name, tuple(parts), packed.kind, packed.rope)


def _index(stored: Stored, files: Sequence[OutFile]) -> bytes:
    weight_map = {step.tensor: file.name for file in files for step in file.steps}
    return index_bytes(weight_map, sum(file.data_size for file in files), stored.index_metadata)


def _notes(checkpoint: Checkpoint, target: Target, moves: Sequence[_Move]) -> Iterator[str]:
    moved = {move.packed.name for move in moves}
    left = Counter((star(p.name), str(p.layout) if p.fused else "apart") for p in checkpoint.projections if p.name not in moved)
    for (name, layout), number in left.items():
        yield f"{number} x {name} ({layout}) stays as it is: {target} does not speak of it"
    if checkpoint.family and any(move.packed.source.startswith(BY_RECORD) for move in moves):
        yield f"config.json still says {checkpoint.family}, whose own code reads the layout before, not the one after"
    for other in checkpoint.stored.others:
        if other.name.endswith(WEIGHTS):
            yield f"{other.name} is carried over as it is: weights in it keep their layout"
