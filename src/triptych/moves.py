"""What a conversion moves: every projection that its target speaks of, from tensors to tensors, as strided nests of bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import NamedTuple

from . import axes
from .beside import NORM, neighbours, norms
from .checkpoint import Checkpoint
from .errors import IncompatibleError, PlanError
from .formats import BITS, Tensor, nbytes
from .layout import Layout
from .packed import Packed, Piece
from .pieces import WORDS, Target, alone, base_names, name_of_part, with_zeros
from .relay import in_nests, in_turned_nests, relay
from .rope import Rope, named, names_pairs, other_words, rope_of, sizes_of
from .sizes import Sizes, bind
from .stamp import Stamped
from .steps import Change, Feed, Nest, Step


class Targets(NamedTuple):
    """What to make of every projection: one target for all, others for names that fit a glob; the first that fits counts."""

    default: Target
    more: tuple[tuple[str, Target], ...] = ()

    def __str__(self) -> str:
        return ", ".join([str(self.default), *(f"{glob}: {target}" for glob, target in self.more)])

    def of(self, packed: Packed) -> Target:
        return next((target for glob, target in self.more if _fits(glob, packed)), self.default)

    def named(self, packed: Packed) -> bool:
        """Whether a target of its own was given; without, only attention is split or joined."""
        return any(_fits(glob, packed) for glob, _ in self.more)


def _fits(glob: str, packed: Packed) -> bool:
    return any(fnmatchcase(name, glob) for name in (packed.name, *(piece.tensor for piece in packed.pieces)))


class Move(NamedTuple):
    """One projection: its output tensors with their feeds, by rule or renamed; the packed axis and the rotary order in them."""

    packed: Packed
    pieces: tuple[Piece, ...]
    sizes: Sizes
    axis: int
    rope: str | None
    steps: tuple[Step, ...]
    drops: tuple[Feed, ...]

    @property
    def after(self) -> Packed:
        """The projection as the output has it, but for its tensors."""
        return replace(self.packed, axis=self.axis, rope=self.rope)

    @property
    def has_aliases(self) -> bool:
        """Whether some rows are those of several parts."""
        return any(len(path.names) > 1 for path in self.packed.layout.paths)


def moves_of(checkpoint: Checkpoint, targets: Targets, sizes: Mapping[str, int]) -> list[Move]:
    """Every projection that its target speaks of, and what changes with it. Raises PlanError when there is nothing to do."""
    stored, projections = checkpoint.stored, checkpoint.projections
    for glob, _ in targets.more:
        if not any(_fits(glob, packed) for packed in projections):
            raise PlanError("no projection has a name like this", found=glob, where=stored.path, try_="`triptych inspect` lists them")
    if targets.default.rope or any(target.rope for _, target in targets.more):
        projections += tuple(norms(projections, stored.tensors))
    found = [move for packed in projections if (move := _moved(packed, targets, sizes, stored.tensors))]
    if not found:
        raise _nothing(checkpoint, targets.default)
    axis = targets.default.axis
    if axis is not None and any(move.axis != move.packed.axis for move in found):
        rest = neighbours(checkpoint.projections, stored.tensors, 1 - axis)
        found += [_move(packed, packed.pieces, sizes, axis, None, stored.tensors) for packed in rest]
    return found


def _moved(packed: Packed, targets: Targets, given: Mapping[str, int], tensors: Mapping[str, Tensor]) -> Move | None:
    """What becomes of one projection, or None when its target does not speak of it."""
    target = targets.of(packed)
    before = _with_pairs(packed, target)
    turns = target.axis is not None and len(tensors[packed.pieces[0].tensor].shape) == 2 and not packed.name.endswith(WORDS)
    axis = target.axis if turns and target.axis is not None else packed.axis
    if target.join and not packed.fused and packed.name.endswith(".g_idx"):
        raise PlanError("group numbers of inputs are no rows to join", tensor=packed.name, found=f"one for each part: {packed.layout}",
                        expected="one for the fused weight", try_="fuse the weights before they are quantised")  # fmt: skip
    pieces = _wanted(before, target, packed.kind == "attention" or targets.named(packed))
    if not pieces:  # its parts stay where they are; rotary order and orientation may change
        pieces = tuple(replace(piece, layout=_ordered(piece.layout, before, target)) for piece in before.pieces)
        if axis == packed.axis and pieces == before.pieces:
            return None
    return _move(before, pieces, given, axis, target.rope, tensors)


def _wanted(packed: Packed, target: Target, meant: bool) -> tuple[Piece, ...]:
    """The output tensors of a projection, or none when the target does not speak of its parts, or is not `meant` for such a kind."""
    zeros = frozenset(name for path in packed.layout.paths if path.zero for name in path.names)
    parts = base_names(packed.layout)
    if target.layout is not None:
        if packed.kind == NORM or set(parts) != set(base_names(target.layout)) or not (packed.fused or target.join):
            return ()
        return (Piece(packed.name, _ordered(with_zeros(target.layout, zeros), packed, target)),)
    if not meant or packed.fused != target.split or not (target.split or target.join) or parts == ("",):
        return ()
    if target.join:
        return (Piece(packed.name, _ordered(packed.layout, packed, target)),)
    names = dict(packed.parts)
    return tuple(
        Piece(names.get(part) or name_of_part(packed.name, part), _ordered(alone(packed.layout, part), packed, target))
        for part in parts
        if part not in zeros
    )


def _nothing(checkpoint: Checkpoint, target: Target) -> PlanError:
    apart = sum(not packed.fused for packed in checkpoint.projections)
    fused = len(checkpoint.projections) - apart
    try_ = "--layout 'NAME_GLOB=LAYOUT' -s h=HEADS declares what no config says"
    if target.split:
        expected = "fused projections"
    elif target.join and target.layout is None:
        expected = "separate projections"
    elif target.layout is not None:
        expected = f"{'' if target.join else 'fused '}projections of {', '.join(base_names(target.layout)).strip() or 'no named part'}"
        if apart and not target.join:
            try_ = f"--to 'fused:{target.layout}' joins separate ones"
    elif target.rope:
        expected = f"projections whose rotary order is known and not {target.rope}"
        try_ = "--layout 'NAME_GLOB=(q h p c)' says that the pairs of q lie interleaved, (q h c p) half-split"
    else:
        expected = "weights stored [in, out]" if target.axis == 0 else "weights stored [out, in]"
    found = f"{fused} fused and {apart} separate projections" + (f" of {checkpoint.family}" if checkpoint.family else "")
    return PlanError("there is nothing to convert", where=checkpoint.stored.path, expected=expected, found=found, try_=try_)


# Rotary order


def _rope(packed: Packed) -> Rope | None:
    """By the record, else by a layout that names the pairs."""
    if packed.rope:
        return rope_of(packed.rope)
    return Rope("half") if any(names_pairs(piece.layout) for piece in packed.pieces) else None


def _with_pairs(packed: Packed, target: Target) -> Packed:
    """The projection with its rotary pairs named, where their order is asked for."""
    rope = _rope(packed)
    if target.rope is None or rope is None:
        return packed
    pieces = tuple(replace(piece, layout=named(piece.layout, rope)) for piece in packed.pieces)
    layout = named(packed.layout, rope)
    used = {axis for one in (layout, *(piece.layout for piece in pieces)) for axis in one.axes}
    known = {axis: size for axis, size in packed.sizes.items() if axis in used or axis in axes.ATOMS}
    known |= {axis: size for axis, size in sizes_of(packed.layout, rope, packed.sizes).items() if axis in used}
    return replace(packed, pieces=pieces, layout=layout, sizes=bind(layout, *(piece.layout for piece in pieces), **known))


def _ordered(layout: Layout, packed: Packed, target: Target) -> Layout:
    rope = _rope(packed)
    return layout if target.rope is None or rope is None else named(layout, rope, target.rope)


# Bytes


def _move(
    packed: Packed, pieces: tuple[Piece, ...], given: Mapping[str, int], axis: int, order: str | None, tensors: Mapping[str, Tensor]
) -> Move:
    old = tuple(tensors[piece.tensor] for piece in packed.pieces)
    sources, targets = tuple(piece.layout for piece in packed.pieces), tuple(piece.layout for piece in pieces)
    used = {name for layout in (*sources, *targets) for name in layout.axes}
    sizes = bind(packed.layout, *sources, *targets, **{**packed.sizes, **{name: size for name, size in given.items() if name in used}})
    try:
        way = relay(sources, targets, sizes)
    except IncompatibleError as error:
        both = f"{packed.layout}   -> {' and '.join(map(str, targets))}   with {sizes.of(*sources, *targets)}"
        raise IncompatibleError(error.what, **{"tensor": old[0].name, **error.fields, "layout": both}) from None
    before, after, dtype = old[0].shape[: packed.axis], old[0].shape[packed.axis + 1 :], old[0].dtype
    turned, rows = axis != packed.axis, tuple(tensor.shape[packed.axis] for tensor in old)
    outer, inner = math.prod(before), nbytes(dtype, after)
    if inner is None or (turned and BITS.get(dtype, 1) % 8):
        raise PlanError("rows do not begin on whole bytes", tensor=old[0].name, found=f"{dtype} {old[0].shape}")
    steps = []
    for piece, cut in zip(pieces, way.cuts, strict=True):
        shape, size = (*before, cut.rows, *after), outer * cut.rows * inner
        if turned:
            shape, wide, item = shape[::-1], shape[1 - packed.axis], BITS[dtype] // 8
            nests = [(s, in_turned_nests(blocks, wide, item, cut.rows, rows[s], axis)) for s, blocks in cut.blocks]
            zeros = in_nests(cut.zeros, *((1, wide * item) if axis == 0 else (wide, item)), cut.rows, cut.rows)
        else:
            nests = [(s, in_nests(blocks, outer, inner, cut.rows, rows[s])) for s, blocks in cut.blocks]
            zeros = in_nests(cut.zeros, outer, inner, cut.rows, cut.rows)
        feeds = tuple(_feed(old[s], some) for s, some in nests) if size else ()
        steps.append(Step(piece.tensor, dtype, shape, 0, size, feeds, zeros))
    drops = tuple(_feed(old[s], in_nests(blocks, outer, inner, rows[s], rows[s])) for s, blocks in way.unused)
    rope = other_words(packed.rope, order) if packed.rope and order else packed.rope
    return Move(packed, pieces, sizes, axis, rope, tuple(steps), drops)


def _feed(tensor: Tensor, nests: tuple[Nest, ...]) -> Feed:
    return Feed(tensor.file, tensor.name, tensor.start, tensor.size, nests)


# What is said of it


def change_of(move: Move) -> Change:
    """A move in words."""
    packed, pieces = move.packed, move.pieces
    before, after = (tuple((piece.tensor, str(piece.layout)) for piece in side) for side in (packed.pieces, pieces))
    along = f" along axis {packed.axis}" if packed.axis else ""
    if move.axis != packed.axis:
        along = f" from axis {packed.axis} to axis {move.axis}"
    sizes = move.sizes.of(*(piece.layout for piece in (*packed.pieces, *pieces))) + along
    return Change(packed.name, before, after, sizes, sum(step.size for step in move.steps), packed.source)


def stamp_of(packed: Packed, piece: Piece, pieces: Sequence[Piece], sizes: Sizes) -> Stamped:
    """What the stamp says of one piece of a projection that is written as `pieces`."""
    if len(pieces) > 1:
        parts = [(base_names(other.layout)[0], other.tensor) for other in pieces]
    else:
        parts = [(part, name) for part, name in packed.parts if name != piece.tensor]
    return Stamped(piece.layout, sizes, packed.axis, packed.name, tuple(parts), packed.kind, packed.rope)
