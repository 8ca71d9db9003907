"""A checkpoint and a target -> a plan that is known to fit as a whole. Reads headers; writes nothing and reads no tensor."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from .agree import checked
from .checkpoint import Checkpoint, open_checkpoint
from .errors import PlanError
from .formats import METADATA, Tensor, without_gc
from .layout import Layout
from .moves import Move, Targets, change_of, moves_of
from .outfiles import bytes_of, files_of, index_of
from .packed import BY_RECORD, BY_STAMP, Piece, same_rows
from .pieces import KEEP, ORIENTATIONS, WORDS, Target, listed, star, stem, target_of
from .place import check_place, check_room
from .remote import is_remote
from .remote_out import check_remote_place, note_on
from .remote_skeleton import Skeleton, skeleton
from .rope import ORDERS
from .steps import Plan, Source, check

WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".safetensors")
"""Other files with these endings may hold the same weights once more."""


@without_gc()
def plan(
    path: str | Path,
    to: str | Layout | None = None,
    out: str | Path | None = None,
    *,
    rope: str | None = None,
    orientation: str | None = None,
    overrides: Mapping[str, str] | None = None,
    max_shard_size: str | int | None = None,
    layouts: Mapping[str, str] | None = None,
    names: Mapping[str, str] | None = None,
    records: str | Path | None = None,
    check_weights: bool = False,
    **sizes: int,
) -> Plan:
    """What converting a checkpoint would do, checked whole; nothing is written.

    Args:
        path: a checkpoint, as for `inspect`, or its URL.
        to: a layout for the fused projections, `split`, or `fused:LAYOUT` to join separate ones (`fused`: in the family's usual layout).
            Without it (or `keep`) the tensors stay, and `rope` or `orientation` says what changes.
        out: where the result shall go: a folder for a folder, a file for a file, or the URL of one (s3://, gs://); with it, room and place
            are checked too.
        rope: the rotary order of the result, `half` or `interleaved`; biases and norms of q and k follow.
        orientation: how weights are stored, `linear` [out, in] or `conv1d` [in, out].
        overrides: glob of tensor names -> another target for these projections, in the words of `to`.
        max_shard_size: bytes of tensors in one output file at most ("5GB"), as in transformers; None keeps the files of the input.
        layouts: glob of tensor names -> layout, for what no config says.
        records: a file of family records of your own, as for `inspect`.
        names: output name by rule -> another one; `*` stands for the same text in both.
        check_weights: stop where the weights contradict the layouts (`detect`). Without it only those of an ambiguous record are asked.
        sizes: what neither config nor layout tells, or what the target needs beyond it (t=4).
    Raises FormatError, LayoutError, and PlanError where anything is refused: a fused tensor of unknown layout stops the plan.
    """
    targets = _targets(to, rope, orientation, overrides or {})
    shard = None if max_shard_size is None else bytes_of(max_shard_size)
    spoken = [target.layout for target in (targets.default, *(target for _, target in targets.more)) if target.layout]
    place = None if out is None else str(out).rstrip("/") if is_remote(out) else str(out)
    with skeleton(path) as here:
        checkpoint = open_checkpoint(here.path, layouts or {}, sizes, spoken, records)
        if place is not None and is_remote(place):
            check_remote_place(checkpoint.stored, path, place)
        elif place is not None:
            check_place(checkpoint.stored, Path(place))
        _check_known(checkpoint)
        agreements = checked(here.path, checkpoint.projections, checkpoint.stored.tensors, check_weights)
        moves = _renamed(moves_of(checkpoint, targets, sizes), names or {})
        _check_names(moves, checkpoint.stored.tensors)
        _check_companions(moves, checkpoint.stored.tensors)
        told = (*here.notes, *(agreement.sentence for agreement in agreements))
        made = _planned(checkpoint, here, targets, moves, shard, place, told)
    check(made, checkpoint.stored.tensors)
    if place is not None and not is_remote(place):
        check_room(made, Path(place))
    return made


def _planned(
    checkpoint: Checkpoint, here: Skeleton, targets: Targets, moves: Sequence[Move], shard: int | None, out: str | None, told: Iterable[str]
) -> Plan:
    """The plan of these moves, not checked yet; `told`: notes on the input beside those of the checkpoint."""
    stored = checkpoint.stored
    files = files_of(checkpoint, moves, shard)
    if out is not None and not stored.is_folder:
        files = (replace(files[0], name=Path(out).name),)
    return Plan(
        path=here.name,
        out=out,
        target=str(targets),
        is_folder=stored.is_folder,
        sources=tuple(Source(file.file, file.size, here.changed(file.file, file.changed)) for file in stored.files),
        files=files,
        copies=tuple(Source(other.name, other.size, here.changed(other.name, other.changed)) for other in stored.others),
        drops=tuple(feed for move in moves for feed in move.drops),
        shared=frozenset(piece.tensor for move in moves if move.has_aliases for piece in move.packed.pieces),
        index=index_of(stored, files, shard),
        changes=tuple(map(change_of, moves)),
        notes=(*checkpoint.notes, *told, *_notes(checkpoint, targets, moves), *([note_on(out)] if out and is_remote(out) else [])),
    )


def _targets(to: str | Layout | None, rope: str | None, orientation: str | None, overrides: Mapping[str, str]) -> Targets:
    for what, word, known in (("rotary order", rope, tuple(ORDERS)), ("orientation", orientation, ORIENTATIONS)):
        if word is not None and word not in known:
            raise PlanError(f"no such {what}", found=repr(word), expected=" or ".join(known))
    axis = None if orientation is None else ORIENTATIONS.index(orientation)
    if to is None and rope is None and axis is None and not overrides:
        raise PlanError("nothing is asked for", expected="a target: a layout, split, fused:LAYOUT; or a rotary order, or an orientation")

    def target(text: str | Layout) -> Target:
        return replace(target_of(text), rope=rope, axis=axis)

    return Targets(target(KEEP if to is None else to), tuple((glob, target(text)) for glob, text in overrides.items()))


def _check_known(checkpoint: Checkpoint) -> None:
    if not checkpoint.unknown:
        return
    name, reason = next(iter(checkpoint.unknown.items()))
    more = len(checkpoint.unknown) - 1
    raise PlanError("the layout of a fused tensor is not known", tensor=name + (f"  and {more} more" if more else ""), found=reason,
                    try_=f"--layout '{star(name)}=LAYOUT' -s h=HEADS if you know it; `triptych inspect` lists all")  # fmt: skip


def _renamed(moves: list[Move], names: Mapping[str, str]) -> list[Move]:
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


def _check_names(moves: Iterable[Move], tensors: Mapping[str, Tensor]) -> None:
    """No output tensor takes the name of another one that stays. (That no two outputs share a name is part of the check of the plan.)"""
    gone = {piece.tensor for move in moves for piece in move.packed.pieces}
    for name in (piece.tensor for move in moves for piece in move.pieces):
        if name in tensors and name not in gone:
            raise PlanError("an output tensor would have the name of another tensor", tensor=name, try_=f"--name '{name}=ANOTHER'")
        if not name.isprintable() or name == METADATA:
            raise PlanError("an output tensor needs a printable name", tensor=name)


def _check_companions(moves: Iterable[Move], tensors: Mapping[str, Tensor]) -> None:
    """Scales, zero points or adapters of a fused tensor move with its rows, or nothing does: those that nobody declared stop the plan."""
    changed = [move for move in moves if move.pieces != move.packed.pieces]  # others are only stored the other way round
    moved = {piece.tensor: move for move in changed for piece in move.packed.pieces}
    stems = {stem(name)[0]: move for name, move in moved.items() if name.endswith((".weight", ".bias", *WORDS))}
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


def _leaves_the_usual(move: Move) -> bool:
    """Whether the code of the family, which reads what the record says, does not read the result."""
    packed = move.packed
    if packed.source.startswith(BY_RECORD):
        return True
    joined = packed.source == BY_STAMP and not packed.fused and len(move.pieces) == 1
    return joined and not same_rows(move.pieces[0].layout, move.sizes, packed.layout, packed.sizes)


def _notes(checkpoint: Checkpoint, targets: Targets, moves: Sequence[Move]) -> Iterator[str]:
    moved = {move.packed.name for move in moves}
    left = Counter((star(p.name), str(p.layout) if p.fused else "apart") for p in checkpoint.projections if p.name not in moved)
    for (name, layout), number in left.items():
        yield f"{number} x {name} ({layout}) stays as it is: {targets} does not speak of it"
    has_head = any(file.head for file in checkpoint.stored.files)
    if checkpoint.family and not has_head and any(_leaves_the_usual(move) for move in moves):
        yield f"config.json still says {checkpoint.family}, whose own code reads the layout before, not the one after"
    if has_head:
        yield "a GGUF file keeps its head, which has no room for a stamp: nothing in the result says that rows were moved"
    for other in checkpoint.stored.others:
        if other.name.endswith(WEIGHTS):
            yield f"{other.name} is carried over as it is: weights in it keep their layout"
