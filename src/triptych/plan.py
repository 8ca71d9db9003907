"""A checkpoint and a target -> a plan that is known to fit as a whole. Reads headers; writes nothing and reads no tensor."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from . import families, settings
from .agree import checked
from .checkpoint import Checkpoint, known
from .errors import PlanError
from .families import Record, load_records
from .formats import METADATA, Tensor, read, without_gc
from .layout import Layout
from .moves import Move, Targets, change_of, moves_of
from .outfiles import bytes_of, files_of, index_of
from .packed import BY_RECORD, BY_STAMP, Piece
from .pieces import KEEP, ORIENTATIONS, WEIGHTS, Target, listed, star, stem, target_of
from .place import check_place, check_room
from .remote import is_remote
from .remote_out import check_remote_place, note_on
from .remote_skeleton import Skeleton, skeleton
from .rope import ORDERS
from .steps import Plan, Source, check
from .unknown import refusal


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
        own = load_records(records) if records else ()
        checkpoint = known(read(here.path), layouts or {}, sizes, spoken, own)
        if place is not None and is_remote(place):
            check_remote_place(checkpoint.stored, path, place)
        elif place is not None:
            check_place(checkpoint.stored, Path(place))
        if checkpoint.unknown:
            raise refusal(checkpoint)
        agreements = checked(here.path, checkpoint.projections, checkpoint.stored.tensors, check_weights)
        moves = _renamed(moves_of(checkpoint, targets, sizes), names or {})
        _check_names(moves, checkpoint.stored.tensors)
        _check_companions(moves, checkpoint.stored.tensors)
        _check_wrapped(moves)
        told = (*here.notes, *(agreement.sentence for agreement in agreements))
        made = _planned(checkpoint, here, targets, moves, shard, place, told)
        made = _with_config(made, checkpoint, moves, own, sizes)
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


def _with_config(made: Plan, checkpoint: Checkpoint, moves: Sequence[Move], records: Sequence[Record], sizes: Mapping[str, int]) -> Plan:
    """The plan with a config.json by which the family's code reads the result, where a switch in it says the order; else with a note."""
    if not checkpoint.family or any(file.head for file in made.files):
        return made
    shapes = {step.tensor: step.shape for file in made.files for step in file.steps}
    setting = settings.needed(checkpoint, moves, shapes, records, sizes)
    if isinstance(setting, bool):
        told = any(move.packed.source.startswith((BY_RECORD, BY_STAMP)) for move in moves)
        note = f"config.json still says {checkpoint.family}, whose own code does not read the result"
        return replace(made, notes=(*made.notes, note)) if told and not setting else made
    if not any(copy.name == settings.CONFIG for copy in made.copies):  # the output is one file
        return replace(made, notes=(*made.notes, f"the code of {checkpoint.family} reads the result with {setting} in config.json"))
    copies = tuple(copy for copy in made.copies if copy.name != settings.CONFIG)
    note = f"config.json: {setting}, with which the code of {checkpoint.family} reads the result"
    return replace(made, copies=copies, texts=((settings.CONFIG, settings.text_of(setting)),), notes=(*made.notes, note))


def _targets(to: str | Layout | None, rope: str | None, orientation: str | None, overrides: Mapping[str, str]) -> Targets:
    for what, word, words in (("rotary order", rope, tuple(ORDERS)), ("orientation", orientation, ORIENTATIONS)):
        if word is not None and word not in words:
            raise PlanError(f"no such {what}", found=repr(word), expected=" or ".join(words))
    axis = None if orientation is None else ORIENTATIONS.index(orientation)
    if to is None and rope is None and axis is None and not overrides:
        raise PlanError("nothing is asked for", expected="a target: a layout, split, fused:LAYOUT; or a rotary order, or an orientation")

    def target(text: str | Layout) -> Target:
        return replace(target_of(text), rope=rope, axis=axis)

    return Targets(target(KEEP if to is None else to), tuple((glob, target(text)) for glob, text in overrides.items()))


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
    turned = [piece.tensor for move in moves if move.axis != move.packed.axis for piece in move.packed.pieces]
    for name, scale in ((name, tensors.get(f"{name}_{word}")) for name in turned for word in ("scale", "scale_inv", "zero_point")):
        if scale and math.prod(scale.shape) > 1:
            raise PlanError("a weight with scales is not stored the other way round", tensor=name, found=f"{scale.name} {scale.shape}")
    changed = [move for move in moves if move.pieces != move.packed.pieces]  # others are only stored the other way round
    moved = {piece.tensor: move for move in changed for piece in move.packed.pieces}
    stems = {stem(name)[0]: move for name, move in moved.items()}
    words = {begin.rpartition(".")[2] for begin in stems}
    for name, tensor in tensors.items():
        if name in moved or not any(word in name for word in words):
            continue
        last = name.rfind(".")  # experts.gate_up_proj_scales stands beside experts.gate_up_proj_bias
        ends = (i for i, letter in enumerate(name) if letter == "." or (letter == "_" and i > last))
        move = next((stems[name[:end]] for end in ends if name[:end] in stems), None)
        if move is None:
            continue
        stays = len(move.pieces) == 1 and move.packed.fused
        if not stays or (math.prod(tensor.shape) > 1 and not name.endswith(".weight_shape")):
            raise _left_behind(tensor, move)


def _left_behind(tensor: Tensor, move: Move) -> PlanError:
    name, one, found = tensor.name, move.packed, f"{tensor.dtype} {tensor.shape} beside {move.packed.name}"
    if name.endswith("g_idx") and not one.fused:
        return PlanError("group numbers of inputs are no rows to join", tensor=name, found=found,
                         expected="one for the fused weight", try_="fuse the weights before they are quantised")  # fmt: skip
    if name.endswith(".weight_shape"):
        return PlanError("the shape of packed numbers would have to be computed", tensor=name, found=found,
                         expected="bytes that only move", try_="convert the weights before they are quantised")  # fmt: skip
    layout = f"{one.layout}' {' '.join(f'-s {axis}={one.sizes[axis]}' for axis in one.layout.axes)}" if one.fused else "LAYOUT'"
    return PlanError("a companion of a fused tensor would stay behind", tensor=name, found=found,
                     try_=f"if it has the same rows: --layout '{star(name)}={layout}")  # fmt: skip


def _check_wrapped(moves: Iterable[Move]) -> None:
    """The output side of an adapter has the rows of its module in any order, but no part of it is an adapter of its own."""
    for move in moves:
        names = [piece.tensor for piece in move.packed.pieces]
        if len(names) != len(move.pieces) and (found := families.wrapped(names)):
            name, why = next(iter(found.items()))
            raise PlanError("the tensors inside a fused module are not taken apart", tensor=name, found=why,
                            try_="--to LAYOUT moves its rows; or merge the adapter into its base first")  # fmt: skip


def _notes(checkpoint: Checkpoint, targets: Targets, moves: Sequence[Move]) -> Iterator[str]:
    moved = {move.packed.name for move in moves}
    left = Counter((star(p.name), str(p.layout) if p.fused else "apart") for p in checkpoint.projections if p.name not in moved)
    for (name, layout), number in left.items():
        yield f"{number} x {name} ({layout}) stays as it is: {targets} does not speak of it"
    has_head = any(file.head for file in checkpoint.stored.files)
    if has_head:
        yield "a GGUF file keeps its head, which has no room for a stamp: nothing in the result says that rows were moved"
    for other in checkpoint.stored.others:
        if other.name.endswith(WEIGHTS):
            yield f"{other.name} is carried over as it is: weights in it keep their layout"
