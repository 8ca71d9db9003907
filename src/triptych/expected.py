"""What an output must hold: for each projection of the input the tensors, layouts and rotary order in which it must lie.

The output's stamp (or record) says so, or a person does, in the words of `convert`; where both speak they must agree. The rules of a
conversion are stated here once more: none of its code is used, and none of what it knows of rotary order, or of tensors that change beside
a projection.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from .axes import ALIASES
from .checkpoint import Checkpoint
from .errors import MismatchError, PlanError
from .formats import Tensor
from .layout import Layout, count
from .listing import ORDERS, Turn, listing, turn_of
from .packed import BY_STAMP, Packed, Piece
from .pieces import KEEP, ORIENTATIONS, Target, alone, base_names, listed, name_of_part, star, stem, target_of, with_zeros
from .sizes import bind

NORM, LINEAR = "norm", "linear"
TRANSPOSED = frozenset(["c_attn", "q_attn", "c_proj", "c_fc"])
"""Modules whose weights transformers stores [in, out] together or not at all (class Conv1D)."""


@dataclass(frozen=True)
class Claim:
    """One projection as the input holds it and as the output must, and how rotary dims are paired on each side.

    `asked`: whether a person says so, not the output.
    """

    source: Packed
    target: Packed
    turns: tuple[Turn | None, Turn | None] = (None, None)
    asked: bool = False

    @property
    def stays(self) -> bool:
        """Whether its tensors keep names, rows and axis."""
        sides = ((self.source, self.turns[0]), (self.target, self.turns[1]))
        one, two = ([(piece.tensor, listing(piece.layout, side.sizes, turn)) for piece in side.pieces] for side, turn in sides)
        return self.source.axis == self.target.axis and one == two


@dataclass(frozen=True)
class Asked:
    """What a conversion was asked for: a target for all, others for names that fit a glob, other names of output tensors."""

    default: Target
    more: tuple[tuple[str, Target], ...] = ()
    names: tuple[tuple[str, str], ...] = ()

    @property
    def layouts(self) -> list[Layout]:
        return [target.layout for target in (self.default, *(target for _, target in self.more)) if target.layout]

    def of(self, packed: Packed) -> Target:
        return next((target for glob, target in self.more if _fits(glob, packed)), self.default)

    def named(self, packed: Packed) -> bool:
        """Whether a target of its own was asked for; without, only attention is split or joined."""
        return any(_fits(glob, packed) for glob, _ in self.more)


def _fits(glob: str, packed: Packed) -> bool:
    return any(fnmatchcase(name, glob) for name in (packed.name, *(piece.tensor for piece in packed.pieces)))


def asked_for(
    to: str | Layout | None, rope: str | None, orientation: str | None, overrides: Mapping[str, str], names: Mapping[str, str]
) -> Asked | None:
    """The words of `convert`; None when nothing is said. Raises PlanError for a word that is none."""
    if to is None and rope is None and orientation is None and not overrides:
        if names:
            raise PlanError("names without a target", expected="what was asked of the conversion too: --to, --rope, ...")
        return None
    for what, word, known in (("rotary order", rope, ORDERS), ("orientation", orientation, ORIENTATIONS)):
        if word is not None and word not in known:
            raise PlanError(f"no such {what}", found=repr(word), expected=" or ".join(known))
    for rule, pattern in names.items():
        if rule.count("*") != pattern.count("*"):
            raise PlanError("a name and its replacement need as many stars", found=f"{rule}={pattern}")
    axis = None if orientation is None else ORIENTATIONS.index(orientation)
    default, *more = (replace(target_of(text), rope=rope, axis=axis) for text in (KEEP if to is None else to, *overrides.values()))
    return Asked(default, tuple(zip(overrides, more, strict=True)), tuple(names.items()))


def claims(before: Checkpoint, after: Checkpoint, asked: Asked | None, sizes: Mapping[str, int]) -> tuple[Claim, ...]:
    """What must hold of every projection of the input that the output knows, and of what changes beside it.

    Raises MismatchError where a stamp of the output says otherwise, PlanError where what was asked speaks of nothing in the input.
    """
    tensors = before.stored.tensors
    if asked is None:
        there = {packed.link: packed for packed in after.projections}
        found = [_as_told(packed, there[packed.name]) for packed in before.projections if packed.name in there]
    else:
        found = list(_as_asked(before, asked, sizes))
    taken = {piece.tensor for packed in before.projections for piece in packed.pieces}
    free = {name: tensor for name, tensor in tensors.items() if name not in taken}
    found += [*_norms(found, free, after), *_neighbours(found, free, after)]
    if asked is not None and asked.names:
        found = _renamed(found, asked.names)
    _must_agree(found, after)
    return tuple(found)


def _as_told(source: Packed, target: Packed) -> Claim:
    """By the stamp of the output, or by its record. Dims are told by pairs where the two sides tell of them in different ways."""
    turns = turn_of(source.rope), turn_of(target.rope)
    alike = source.rope == target.rope and (
        _names(source.pieces) == _names(target.pieces) or _all_paired(turns[0], (*source.pieces, *target.pieces))
    )
    return Claim(source, target, (None, None) if alike or None in turns else turns)


# By the words of the conversion


def _as_asked(before: Checkpoint, asked: Asked, sizes: Mapping[str, int]) -> Iterator[Claim]:
    for glob, _ in asked.more:
        if not any(_fits(glob, packed) for packed in before.projections):
            raise PlanError("no projection has a name like this", found=glob, where=before.path, try_="`triptych inspect` lists them")
    spoken = False
    for packed in before.projections:
        target = asked.of(packed)
        pieces = _pieces(packed, target, packed.kind == "attention" or asked.named(packed))
        spoken |= pieces is not None or target.rope is not None or target.axis is not None
        yield _claim(packed, target, packed.pieces if pieces is None else pieces, sizes, before.stored.tensors)
    if not spoken:
        names = listed(dict.fromkeys(star(packed.name) for packed in before.projections)) or "no known projection"
        raise PlanError("what was asked for speaks of no projection of the input", where=before.path, expected=asked.default, found=names)


def _pieces(packed: Packed, target: Target, meant: bool) -> tuple[Piece, ...] | None:
    """The output tensors of a projection, or None when the target does not speak of its parts, or is not `meant` for such a kind."""
    parts = base_names(packed.layout)
    zeros = frozenset(name for path in packed.layout.paths if path.zero for name in path.names)
    if target.layout is not None:
        spoken = packed.kind != NORM and set(parts) == set(base_names(target.layout)) and (packed.fused or target.join)
        return (Piece(packed.name, with_zeros(target.layout, zeros)),) if spoken else None
    if not meant or packed.kind == NORM or parts == ("",):
        return None
    if target.join and not packed.fused:
        return (Piece(packed.name, packed.layout),)
    if not target.split or not packed.fused:
        return None
    names = dict(packed.parts)
    kept = (part for part in parts if part not in zeros)
    return tuple(Piece(names.get(part) or name_of_part(packed.name, part), alone(packed.layout, part)) for part in kept)


def _claim(packed: Packed, target: Target, pieces: tuple[Piece, ...], given: Mapping[str, int], tensors: Mapping[str, Tensor]) -> Claim:
    layouts = [piece.layout for piece in (*packed.pieces, *pieces)]
    used = {spelt for layout in layouts for name in layout.axes for spelt in (name, ALIASES.get(name, name))}
    sizes = bind(packed.layout, *layouts, **{**packed.sizes, **{name: size for name, size in given.items() if name in used}})
    flat = len(tensors[packed.pieces[0].tensor].shape) == 2
    axis = target.axis if target.axis is not None and flat else packed.axis
    turn, rope = turn_of(packed.rope), packed.rope
    if rope is None and (_names(packed.pieces) or _names(pieces)):
        turn = Turn(ORDERS[0])  # beside layouts that tell the order, d is (c p)
    order = target.rope or _names(pieces)
    if turn is None or (order is None and not _names(packed.pieces)) or (not target.rope and _all_paired(turn, (*packed.pieces, *pieces))):
        turns: tuple[Turn | None, Turn | None] = None, None
    elif order is None:
        turns = turn, turn
    else:
        turns = turn, turn._replace(order=order, asked=target.rope is not None)
        rope = rope and rope.replace(turn.order, order, 1)
    layout = pieces[0].layout if len(pieces) == 1 else packed.layout
    after = replace(packed, pieces=pieces, layout=layout, sizes=sizes, axis=axis, rope=rope, fused=len(pieces) == 1)
    return Claim(packed, after, turns, True)


def _renamed(found: Sequence[Claim], names: Iterable[tuple[str, str]]) -> list[Claim]:
    """The claims with other output names of what does not stay; each rule must meet one."""
    moved = [claim for claim in found if not claim.stays]
    new: dict[str, str] = {}
    for rule, pattern in names:
        regex = re.compile("(.*)".join(map(re.escape, rule.split("*"))), re.DOTALL)
        met = [match for claim in moved for piece in claim.target.pieces if (match := regex.fullmatch(piece.tensor))]
        if not met:
            raise PlanError("no output tensor has this name by rule", found=f"{rule}={pattern}",
                            expected=listed(piece.tensor for claim in moved for piece in claim.target.pieces))  # fmt: skip
        for match in met:
            stars = iter(match.groups())
            new.setdefault(match[0], "".join(next(stars) if letter == "*" else letter for letter in pattern))
    out = []
    for claim in found:
        pieces = tuple(Piece(new.get(piece.tensor, piece.tensor), piece.layout) for piece in claim.target.pieces)
        out.append(replace(claim, target=replace(claim.target, pieces=pieces)) if claim in moved else claim)
    return out


# What changes beside a projection


def _norms(found: Sequence[Claim], free: Mapping[str, Tensor], after: Checkpoint) -> Iterator[Claim]:
    """Norms of q and k, over the dims of a head or of all heads: they stand as the dims do where a rotary embedding turns them."""
    stamped = {packed.name for packed in after.projections if packed.source == BY_STAMP}
    beside: dict[str, dict[str, str]] = {}
    for name in free:
        words = stem(name)[0].split(".")
        if words[-2:-1] == ["norms"] and words[-1].isdecimal():  # one for each head
            words = words[:-2]
        if part := _norm_part(words[-1]):
            beside.setdefault(".".join(words[:-1]), {})[name] = part
    for claim in found if beside else ():
        home = stem(claim.source.name)[0].rpartition(".")[0]
        turned = _paired_as(claim.source, claim.turns[0]) != _paired_as(claim.target, claim.turns[1])
        parts = base_names(claim.source.layout)
        for name, part in list(beside.get(home, {}).items()):
            if part in parts and (turned or name in stamped):
                del beside[home][name]
                yield _norm(claim, part, free[name])


def _paired_as(side: Packed, turn: Turn | None) -> str | None:
    """The order in which the pairs of a projection lie."""
    return turn.order if turn and turn.asked else _names(side.pieces) or (turn and turn.order)


def _all_paired(turn: Turn | None, pieces: Iterable[Piece]) -> bool:
    """Whether layouts pair all dims of a head, of which some are turned: then they are told by the language alone."""
    paired = (piece.layout for piece in pieces if _named(piece.layout))
    return turn is not None and turn.dims is not None and any(not re.search(r"\b(rot|rope)\b", str(layout)) for layout in paired)


def _names(pieces: Iterable[Piece]) -> str | None:
    """The order of pairs that layouts tell themselves."""
    return next(filter(None, (_named(piece.layout) for piece in pieces)), None)


def _norm_part(module: str) -> str | None:
    """q or k when a module of this name scales its dims.

    >>> [_norm_part(name) for name in ("attn_q_norm", "key_layernorm", "k_ln", "input_layernorm", "q_proj")]
    ['q', 'k', 'k', None, None]
    """
    words = [word for word in module.split("_") if word != "attn"]
    parts = [word for word in words if word in ("q", "k", "query", "key")]
    rest = [word for word in words if word in ("norm", "layernorm", "ln")]
    return parts[0][0] if len(words) == 2 and len(parts) == len(rest) == 1 else None


def _norm(claim: Claim, part: str, tensor: Tensor) -> Claim:
    sides = []
    for side in (claim.source, claim.target):
        layouts = [_dims(side, part, heads) for heads in (False, True)]
        fits = next((layout for layout in layouts if tensor.shape == (count(layout.factors, side.sizes),)), None)
        if fits is None:
            raise MismatchError("a norm of q or k has a size of its own", tensor=tensor.name, found=f"shape {tensor.shape}",
                                expected=" or ".join(f"{layout} with {side.sizes.of(layout)}" for layout in layouts))  # fmt: skip
        sizes = bind(fits, **{axis: side.sizes[axis] for axis in fits.axes})
        source = f"beside {star(claim.source.name)}"
        sides.append(Packed(tensor.name, tensor.name, True, (Piece(tensor.name, fits),), fits, sizes, 0, (), side.rope, NORM, source))
    return Claim(sides[0], sides[1], claim.turns)


def _dims(side: Packed, part: str, heads: bool) -> Layout:
    """The dims of one head of a part, or of all heads in counting order, as they stand in the projection."""
    paths = [path for piece in side.pieces for path in piece.layout.paths if any(name.split(".")[0] == part for name in path.names)]
    branches = []
    for path in paths:
        inner = next(name for name in path.names if name.split(".")[0] == part).partition(".")[2]
        branches.append(" ".join([inner, *(axis for axis in path.axes if axis not in path.heads)]).strip())
    dims = branches[0] if len(branches) == 1 else f"({'|'.join(branches)})"
    return Layout(f"({' '.join([part, *(paths[0].heads if heads else ()), dims])})")


def _neighbours(found: Sequence[Claim], free: Mapping[str, Tensor], after: Checkpoint) -> Iterator[Claim]:
    """Other weights of Conv1D modules, which are stored the other way round when a projection is; and those that were turned back."""
    turned = next(((claim.source.axis, claim.target.axis) for claim in found if claim.source.axis != claim.target.axis), None)
    stamped = {packed.name: (packed.axis, packed.axis) for packed in after.projections if packed.source == BY_STAMP}
    for name, tensor in free.items() if turned or stamped else ():
        begin, suffix = stem(name)
        pair = turned or stamped.get(name)
        if pair and suffix == ".weight" and begin.rpartition(".")[2] in TRANSPOSED and len(tensor.shape) == 2:
            layout = Layout("f")
            sizes = bind(layout, f=tensor.shape[pair[0]])
            sides = [Packed(name, name, True, (Piece(name, layout),), layout, sizes, axis, (), None, LINEAR, "beside Conv1D projections")
                     for axis in pair]  # fmt: skip
            yield Claim(sides[0], sides[1])


# Against the stamps of the output


def _must_agree(found: Iterable[Claim], after: Checkpoint) -> None:
    """The tensors are there; stamps say what the claims say, and speak of nothing else. Raises MismatchError, which shows both."""
    for claim in found:
        for piece in claim.target.pieces:
            if piece.tensor not in after.stored.tensors:
                raise MismatchError(
                    "a tensor is missing in the output", tensor=piece.tensor, expected=f"{piece.layout}, of {claim.source.name}"
                )
    stamped = {piece.tensor: (packed, piece) for packed in after.projections if packed.source == BY_STAMP for piece in packed.pieces}
    for claim in found:
        for piece in claim.target.pieces:
            if piece.tensor in stamped:
                packed, told = stamped.pop(piece.tensor)
                if packed is not claim.target:
                    _must_list(claim, piece, packed, told)
                _must_match(claim, packed)
    for packed, told in stamped.values():
        raise MismatchError("a converted projection is not known in the input", tensor=packed.link, found=f"{told.layout} (stamp)",
                            try_="declare the input's layout as for the conversion: --layout 'NAME_GLOB=LAYOUT'")  # fmt: skip


def _must_list(claim: Claim, piece: Piece, packed: Packed, told: Piece) -> None:
    turn = claim.turns[1]
    mine = listing(piece.layout, claim.target.sizes, turn)
    theirs = listing(told.layout, packed.sizes, turn_of(packed.rope) if turn else None)
    same = claim.target.axis == packed.axis and len(mine) == len(theirs)
    if same and all(a.zero == b.zero and (a.zero or a.labels == b.labels) for a, b in zip(mine, theirs, strict=True)):
        return
    order = f", rotary {turn.order}" if turn else ""
    raise MismatchError(
        "the output has another layout", tensor=piece.tensor,
        expected=f"{piece.layout} with {claim.target.sizes.of(piece.layout)}, axis {claim.target.axis}{order}",
        found=f"{told.layout} with {packed.sizes.of(told.layout)}, axis {packed.axis}   (stamp)",
    )  # fmt: skip


def _must_match(claim: Claim, told: Packed) -> None:
    """A stamp tells of a projection what the input, or the person, tells of it."""
    source, expected = claim.source, claim.target.rope
    if told is claim.target:  # nobody else speaks: another rotary order than that of the input is proved by the rows
        turn, mine = turn_of(told.rope), turn_of(source.rope)
        if source.rope and turn and mine and {_named(piece.layout) for piece in told.pieces} <= {None, turn.order}:
            expected = source.rope.replace(mine.order, turn.order, 1)
        else:
            expected = source.rope
    sides: list[dict[str, object]] = [{"rotary order": expected, "kind": source.kind}, {"rotary order": told.rope, "kind": told.kind}]
    if source.fused and told.fused:
        for side, one in zip(sides, (source, told), strict=True):
            side["names of parts"] = {part: name for part, name in one.parts if name != one.name}
    for word, wanted in sides[0].items():
        if wanted != sides[1][word]:
            raise MismatchError(f"the stamp tells another {word}", tensor=told.name, expected=wanted, found=sides[1][word])


def _named(layout: Layout) -> str | None:
    """The rotary order that a layout names."""
    for path in layout.paths:
        if "c" in path.axes and "p" in path.axes:
            return ORDERS[path.axes.index("p") < path.axes.index("c")]
    return None
