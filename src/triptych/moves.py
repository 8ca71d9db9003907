"""What a conversion moves: every projection that its target speaks of, from tensors to tensors, as strided nests of bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import NamedTuple

from . import axes, quantised
from .beside import NORM, Place, check_both, neighbours, norm_at, norms, places_of
from .checkpoint import Checkpoint
from .errors import IncompatibleError, PlanError, SizeError
from .formats import BITS, Tensor, nbytes
from .layout import Layout
from .packed import Packed, Piece
from .pieces import WORDS, Target, alone, base_names, name_of_part, with_zeros
from .relay import in_nests, in_turned_nests, relay
from .rope import Rope, named, names_pairs, names_turned, order_named, other_words, rope_of, with_pairs
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
    tensors = stored.tensors
    for glob, _ in targets.more:
        if not any(_fits(glob, packed) for packed in projections):
            raise PlanError("no projection has a name like this", found=glob, where=stored.path, try_="`triptych inspect` lists them")
    wanted = []
    for packed in projections:
        target = _with_order(packed, targets.of(packed))
        wanted.append((_with_pairs(packed, target), target))
    found = [move for one in _with_norms(wanted, tensors) if (move := _moved(*one, targets.named(one[0]), sizes, tensors))]
    if not found:
        raise _nothing(checkpoint, targets.default)
    axis = targets.default.axis
    if axis is not None and any(move.axis != move.packed.axis for move in found):
        found += [_move(packed, packed.pieces, {}, axis, None, tensors) for packed in neighbours(projections, tensors, 1 - axis)]
    return found


def _moved(packed: Packed, target: Target, named: bool, given: Mapping[str, int], tensors: Mapping[str, Tensor]) -> Move | None:
    """What becomes of one projection, or None when its target does not speak of it. `named`: whether it has a target of its own."""
    turns = target.axis is not None and len(tensors[packed.pieces[0].tensor].shape) == 2 and not packed.name.endswith(WORDS)
    axis = target.axis if turns and target.axis is not None else packed.axis
    if target.join and not packed.fused and packed.name.endswith(".g_idx"):
        raise PlanError("group numbers of inputs are no rows to join", tensor=packed.name, found=f"one for each part: {packed.layout}",
                        expected="one for the fused weight", try_="fuse the weights before they are quantised")  # fmt: skip
    if target.layout is not None and packed.name.endswith(WORDS) and _speaks(target, packed) and not quantised.by_rows(packed):
        raise PlanError("packed numbers keep the order of their rows", tensor=packed.name, found=f"{packed.layout}   -> {target.layout}",
                        try_="--to split; or bring the weights into another order before they are quantised")  # fmt: skip
    pieces = _wanted(packed, target, packed.kind == "attention" or named)
    if not pieces:  # its parts stay where they are; rotary order and orientation may change
        pieces = tuple(replace(piece, layout=_ordered(piece.layout, packed, target)) for piece in packed.pieces)
        if axis == packed.axis and pieces == packed.pieces:
            return None
    return _move(packed, pieces, given, axis, target.rope, tensors)


def _wanted(packed: Packed, target: Target, meant: bool) -> tuple[Piece, ...]:
    """The output tensors of a projection, or none when the target does not speak of its parts, or is not `meant` for such a kind."""
    zeros = frozenset(name for path in packed.layout.paths if path.zero for name in path.names)
    parts = base_names(packed.layout)
    if target.layout is not None:
        if not _speaks(target, packed):
            return ()
        return (Piece(packed.name, _ordered(with_zeros(target.layout, zeros), packed, target)),)
    if not meant or packed.kind == NORM or packed.fused != target.split or not (target.split or target.join) or parts == ("",):
        return ()
    if target.join:
        return (Piece(packed.name, _ordered(packed.layout, packed, target)),)
    names = dict(packed.parts)
    return tuple(
        Piece(names.get(part) or name_of_part(packed.name, part), _ordered(alone(packed.layout, part), packed, target))
        for part in parts
        if part not in zeros
    )


def _speaks(target: Target, packed: Packed) -> bool:
    """Whether the layout of a target is meant for a projection."""
    same = target.layout is not None and set(base_names(packed.layout)) == set(base_names(target.layout))
    return same and packed.kind != NORM and (packed.fused or target.join)


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


def _named_anew(packed: Packed, target: Target) -> Layout | None:
    """The layout of the result, where it is another one and pairs are named in it or in the source."""
    layout = target.layout if _speaks(target, packed) else packed.layout if target.join and not packed.fused else None
    return layout if layout and any(map(names_pairs, [layout, *(piece.layout for piece in packed.pieces)])) else None


def _with_order(packed: Packed, target: Target) -> Target:
    """The target with the rotary order of its result: beside pairs that are named, d lies as is said of it; if nothing is, it is (c p)."""
    layout, rope = _named_anew(packed, target), rope_of(packed.rope or "")
    if target.rope or layout is None or rope is None:
        return target
    paired = filter(names_pairs, [layout, *(piece.layout for piece in packed.pieces)])
    if rope.first is not None and not all(map(names_turned, paired)):  # pairs of all dims, of which some are turned: d is (c p)
        return target
    return replace(target, rope=order_named(layout) or rope.order)


def _turned_to(packed: Packed, target: Target) -> str | None:
    """The rotary order of the result, where it is another one."""
    if packed.kind == NORM:
        return None
    found = {order_named(piece.layout) for piece in packed.pieces}
    layout = _named_anew(packed, target)
    if target.rope is None and layout is not None:
        order = order_named(layout) or "half"
        return order if {one or "half" for one in found} != {order} else None
    return target.rope if found - {None, target.rope} else None


def _with_norms(wanted: Sequence[tuple[Packed, Target]], tensors: Mapping[str, Tensor]) -> Iterator[tuple[Packed, Target]]:
    """All of it, and the norms of q and k where their pairs are turned: those that are projections already, and all others."""
    turned = [(packed, order) for packed, target in wanted if (order := _turned_to(packed, target))]
    orders: dict[Place | None, str] = {place: order for packed, order in turned for place in places_of(packed)}
    taken = {piece.tensor for packed, _ in wanted for piece in packed.pieces}
    for packed, target in wanted:
        order = orders.get(norm_at(packed.name)) if packed.kind == NORM else None
        yield packed, replace(target, rope=order or target.rope)
    free = {name: tensor for name, tensor in tensors.items() if name not in taken} if turned else {}
    known = [packed for packed, _ in wanted if _rope(packed) and packed.kind != NORM]
    check_both([packed for packed, _ in turned], known if turned else [], free)
    for norm in norms((packed for packed, _ in turned), free):
        yield norm, Target(rope=orders[norm_at(norm.name)])


def _with_pairs(packed: Packed, target: Target) -> Packed:
    """The projection with its rotary pairs named, where their order is asked for."""
    rope = _rope(packed)
    if target.rope is None or rope is None:
        return packed
    (layout, *layouts), sizes = with_pairs((packed.layout, *(piece.layout for piece in packed.pieces)), packed.sizes, rope)
    pieces = tuple(replace(piece, layout=one) for piece, one in zip(packed.pieces, layouts, strict=True))
    return replace(packed, pieces=pieces, layout=layout, sizes=sizes)


def _ordered(layout: Layout, packed: Packed, target: Target) -> Layout:
    rope = _rope(packed)
    if target.rope is None or rope is None:
        return layout
    ordered = named(layout, rope, target.rope)
    same = [path.axes for path in ordered.paths] == [path.axes for path in layout.paths]
    return layout if same else ordered  # as it was written


# Bytes


def _move(
    packed: Packed, pieces: tuple[Piece, ...], given: Mapping[str, int], axis: int, order: str | None, tensors: Mapping[str, Tensor]
) -> Move:
    old = tuple(tensors[piece.tensor] for piece in packed.pieces)
    sources, targets = tuple(piece.layout for piece in packed.pieces), tuple(piece.layout for piece in pieces)
    used = {spelt for layout in (*sources, *targets) for name in layout.axes for spelt in (name, axes.ALIASES.get(name, name))}
    told = {name: size for name, size in given.items() if name in used}
    for name, size in told.items():
        if (known := packed.sizes.get(axes.ALIASES.get(name, name), size)) != size:
            raise SizeError(f"the given size of {name!r} contradicts what is known of a tensor", tensor=old[0].name,
                            expected=f"{name}={known}   ({packed.source})", found=f"{name}={size}")  # fmt: skip
    sizes = bind(packed.layout, *sources, *targets, **{**packed.sizes, **told})
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
