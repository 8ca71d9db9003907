"""A projection as it lies in the files, and the three who can say so: a family record, the stamp of a conversion, a person."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any, NamedTuple

from . import axes
from .errors import FormatError, PlanError, SizeError
from .families import Projection
from .formats import Tensor
from .layout import Layout, Row, count
from .pieces import alone, base_names, listed, name_of_part, star, stem, together
from .rope import Rope, names_pairs, rope_of, with_pairs
from .sizes import Sizes, bind, does_not_fit
from .stamp import Stamped

BY_HAND, BY_STAMP, BY_RECORD = "by hand", "stamp", "record"


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor of a projection and how its rows lie."""

    tensor: str
    layout: Layout


@dataclass(frozen=True)
class Packed:
    """One projection as it lies in the files: one fused tensor, or several that belong together.

    `name` is the fused tensor's name, in the file or by rule; `link` the name it had before the last conversion. `layout` is that of the
    fused tensor, or the one in which joining writes by default. `parts`: part -> tensor, in the file or by rule. `source` says who
    knows: "by hand", "stamp" or "record ...". `ambiguous`: layouts in which files of the same model exist too, as its record says.
    """

    name: str
    link: str
    fused: bool
    pieces: tuple[Piece, ...]
    layout: Layout
    sizes: Sizes
    axis: int
    parts: tuple[tuple[str, str], ...]
    rope: str | None = None
    kind: str = "attention"
    source: str = BY_HAND
    ambiguous: tuple[Layout, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        tensors = {piece.tensor: str(piece.layout) for piece in self.pieces}
        told = {key: getattr(self, key) for key in ("name", "fused", "axis", "rope", "kind", "source")}
        return {**told, "layout": str(self.layout), "sizes": dict(self.sizes), "parts": dict(self.parts), "tensors": tensors}


def _fused(
    name: str, layout: Layout, sizes: Sizes, axis: int, parts: Iterable[tuple[str, str]], link: str | None = None, **more: Any
) -> Packed:
    return Packed(name, link or name, True, (Piece(name, layout),), layout, sizes, axis, tuple(parts), **more)


def _apart(
    name: str, pieces: Iterable[Piece], layout: Layout, sizes: Sizes, axis: int, parts: Iterable[tuple[str, str]], **more: Any
) -> Packed:
    return Packed(name, name, False, tuple(pieces), layout, sizes, axis, tuple(parts), **more)


def check_fit(packed: Packed, tensors: Mapping[str, Tensor]) -> None:
    """Every tensor of a projection fills its layout, and all have one dtype and, but for the packed axis, one shape.

    Raises SizeError, FormatError when it is a stamp that does not fit, PlanError for tensors that differ.
    """
    try:
        _check_fit(packed, tensors)
    except SizeError as error:
        if packed.source != BY_STAMP:
            raise
        fields = {**error.fields, "try_": "the file was changed after its conversion: restore it, or remove the stamp"}
        fields.pop("try", None)
        raise FormatError(f"the stamp does not fit its tensor: {error.what}", **fields) from None


def _check_fit(packed: Packed, tensors: Mapping[str, Tensor]) -> None:
    first, axis = tensors[packed.pieces[0].tensor], packed.axis
    for piece in packed.pieces:
        tensor = tensors[piece.tensor]
        where = f"{tensor.name}  ({tensor.file})"
        if axis >= len(tensor.shape):
            raise SizeError(
                "a tensor has no such axis", tensor=where, layout=piece.layout, expected=f"axis {axis}", found=f"shape {tensor.shape}"
            )
        if tensor.shape[axis] != count(piece.layout.factors, packed.sizes):
            raise does_not_fit(piece.layout, tensor.shape[axis], packed.sizes, where, tensor.shape)
        if tensor.dtype != first.dtype or _around(tensor, axis) != _around(first, axis):
            found = f"{first.dtype} {first.shape} and {tensor.dtype} {tensor.shape}"
            raise PlanError(
                "tensors of one projection differ in more than their rows", tensor=f"{first.name} and {tensor.name}", found=found
            )


def _around(tensor: Tensor, axis: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tensor.shape[:axis], tensor.shape[axis + 1 :]


def doubts(projections: Iterable[Packed]) -> tuple[str, ...]:
    """A sentence for every kind of tensor whose record is ambiguous."""
    return tuple(
        dict.fromkeys(
            f"files of this model exist as {' or '.join(map(str, (one.layout, *one.ambiguous)))}: for {star(one.name)} only the weights "
            "(--check-weights) or a person (--layout) can tell"
            for one in projections
            if one.ambiguous
        )
    )


# By record


def from_records(projections: Iterable[Projection], hand: Mapping[str, Hand], notes: list[str]) -> Iterator[Packed]:
    """What the records say; for a tensor whose layout is given by hand, what the hand says, and a note where the two differ."""
    for said in projections:
        more = {"rope": said.rope, "kind": said.kind, "source": f"{BY_RECORD} {said.source}"}
        if said.fused:
            if said.name not in hand:
                yield _fused(said.name, said.layout, said.sizes, said.axis, said.parts.items(), ambiguous=said.ambiguous, **more)
            else:
                _note(said.name, hand[said.name], Order(said.layout, said.sizes, said.rope), notes)
            continue
        pieces = []
        for part, name in said.parts.items():
            layout = alone(said.layout, part)
            if name in hand:
                _note(name, hand[name], Order(layout, said.sizes, said.rope), notes)
                layout = hand[name].layout
            pieces.append(Piece(name, layout))
        sizes = bind(said.layout, *(piece.layout for piece in pieces), **said.sizes)
        yield _apart(said.name, pieces, said.layout, sizes, said.axis, said.parts.items(), **more)


def _note(name: str, hand: Hand, said: Order, notes: list[str]) -> None:
    if not same_order(Order(hand.layout, hand.sizes, said.rope), said):
        notes.append(f"{star(name)} is taken as {hand.layout}, as given by hand; its record says {said.layout}")


# By stamp


def from_stamps(stamped: Mapping[str, Stamped]) -> Iterator[Packed]:
    """What the stamps say. Raises FormatError where they speak of tensors that are not there, or contradict each other."""
    groups: dict[str, list[str]] = {}
    for name, told in stamped.items():
        groups.setdefault(told.projection, []).append(name)
    for link, names in groups.items():
        first = stamped[names[0]]
        siblings = list(dict.fromkeys(name for _, name in first.parts))
        more = {"rope": first.rope, "kind": first.kind, "source": BY_STAMP}
        if names[0] not in siblings:
            if len(names) > 1:
                raise FormatError("the stamp gives one projection two fused tensors", found=" and ".join(names))
            yield _fused(names[0], first.layout, first.sizes, first.axis, first.parts, link, **more)
            continue
        if set(siblings) != set(names) or any(stamped[name].axis != first.axis for name in names):
            raise FormatError("the stamp speaks of tensors that are not there", tensor=names[0], expected=", ".join(siblings),
                              found=", ".join(names), try_="give the whole folder, not one of its files")  # fmt: skip
        pieces = [Piece(name, stamped[name].layout) for name in siblings]
        layout = together([piece.layout for piece in pieces])
        try:
            sizes = bind(layout, **{axis: stamped[name].sizes[axis] for name in siblings for axis in stamped[name].layout.axes})
        except SizeError as error:
            raise FormatError("the stamp is damaged", tensor=names[0], found=error.what) from None
        yield _apart(link, pieces, layout, sizes, first.axis, first.parts, **more)


# By hand: --layout GLOB=LAYOUT


@dataclass(frozen=True, slots=True)
class Hand:
    """A layout given by hand for one tensor, sized, along one axis."""

    layout: Layout
    sizes: Sizes
    axis: int


def given(layouts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, tuple[Layout, int | None]]:
    """Tensor -> (layout, axis if told), for every tensor that a glob matches."""
    out: dict[str, tuple[Layout, int | None]] = {}
    for glob, text in layouts.items():
        text, at, digits = text.partition("@")
        if at and not digits.strip().isdecimal():
            raise PlanError("an axis is a number", found=f"{text}@{digits}", expected="LAYOUT @ 0, or @ 1 for a weight [in, out]")
        told = Layout(text), int(digits) if at else None
        names = [glob] if glob in tensors else [name for name in tensors if fnmatchcase(name, glob)]
        if not names:
            raise PlanError("no tensor has such a name", found=glob, expected=listed(tensors))
        for name in names:
            if out.setdefault(name, told) != told:
                raise PlanError("two layouts are given for one tensor", tensor=name, found=f"{out[name][0]}   and   {told[0]}")
    return out


def by_hand(layout: Layout, axis: int | None, tensor: Tensor, sizes: Mapping[str, int], told: Projection | Stamped | None) -> Hand:
    """A given layout with sizes for its axes (where none are given, those of the record or stamp), along the one axis that it fills."""
    mine = {name: size for name, size in sizes.items() if name in axes.RESERVED or name in layout.axes}
    wanted = [axis] if axis is not None else [told.axis] if told else sorted({0, max(0, len(tensor.shape) - 1)})
    fits: list[Hand] = []
    errors: list[SizeError] = []
    for at in wanted:
        if at >= len(tensor.shape):
            raise PlanError("a tensor has no such axis", tensor=tensor.name, expected=f"axis {at}", found=f"shape {tensor.shape}")
        for known in [mine, {**told.sizes, **mine}] if told else [mine]:
            try:
                fits.append(Hand(layout, bind(layout, rows=tensor.shape[at], **known), at))
                break
            except SizeError as error:
                errors.append(_named(error, tensor, at, layout, known))
    if len(fits) > 1:
        raise PlanError("the layout fits more than one axis", tensor=tensor.name, layout=layout, found=f"shape {tensor.shape}",
                        try_=f"'{layout} @ 0' packs the rows, '{layout} @ {wanted[-1]}' is for weights [in, out]")  # fmt: skip
    if not fits:
        raise errors[0]
    return fits[0]


def _named(error: SizeError, tensor: Tensor, at: int, layout: Layout, known: Mapping[str, int]) -> SizeError:
    """The same error with the tensor's name on it."""
    where = f"{tensor.name}  ({tensor.file})"
    try:
        return does_not_fit(layout, tensor.shape[at], bind(layout, **known), where, tensor.shape)
    except SizeError:
        return SizeError(error.what, **{"tensor": where, **error.fields})


def must_agree(name: str, hand: Hand, told: Stamped) -> None:
    """A layout given by hand says what the stamp says. Raises PlanError, which shows both."""
    if hand.axis != told.axis or not same_rows(hand.layout, hand.sizes, told.layout, told.sizes):
        raise PlanError("the layout given by hand contradicts the stamp in the file", tensor=name,
                        expected=f"{told.layout} with {told.sizes.of(told.layout)}, axis {told.axis}   (stamp)",
                        found=f"{hand.layout} with {hand.sizes.of(hand.layout)}, axis {hand.axis}   (by hand)",
                        try_="the stamp was written with the bytes: leave the layout out")  # fmt: skip


def same_rows(a: Layout, sizes_a: Sizes, b: Layout, sizes_b: Sizes) -> bool:
    """Whether two sized layouts list the same rows in the same order."""
    return (a == b and sizes_a.of(a) == sizes_b.of(b)) or _listing(a, sizes_a) == _listing(b, sizes_b)


class Order(NamedTuple):
    """Rows in an order: a sized layout, and what is said of the rotary order beside it."""

    layout: Layout
    sizes: Sizes
    rope: str | None


@lru_cache(maxsize=256)
def same_order(one: Order, two: Order) -> bool:
    """Whether two orders list the same rows alike, rotary pairs told apart where both sides tell of them.

    >>> plain, pairs = Layout("h (nope dn|rope dr)"), Layout("h (nope dn|rope p c)")
    >>> theirs = Order(pairs, bind(pairs, h=3, dn=5, p=4, c=2), "interleaved")
    >>> [same_order(Order(plain, bind(plain, h=3, dn=5, dr=8), rope), theirs) for rope in ("interleaved", "half")]
    [True, False]
    """
    ropes = [rope_of(side.rope or "") for side in (one, two)]
    if None not in ropes and (one.rope, names_pairs(one.layout)) != (two.rope, names_pairs(two.layout)):
        try:
            one, two = (_paired(side, rope) for side, rope in zip((one, two), ropes, strict=True) if rope)
        except PlanError:  # dims that are no pairs
            return False
    return same_rows(one.layout, one.sizes, two.layout, two.sizes)


def _paired(side: Order, rope: Rope) -> Order:
    (layout,), sizes = with_pairs((side.layout,), side.sizes, rope)
    return Order(layout, sizes, side.rope)


@lru_cache(maxsize=16)
def _listing(layout: Layout, sizes: Sizes) -> Sequence[Row]:
    return layout.rows(**sizes)


def from_hand(hand: Mapping[str, Hand], record: Mapping[str, Projection]) -> Iterator[Packed]:
    """Tensors that no record joins: fused ones each for itself, single parts with those that share all of the name but its last word."""
    groups: dict[tuple[str, str], dict[str, str]] = {}
    for name, told in hand.items():
        rule, bases = record.get(name), base_names(told.layout)
        if rule is not None and not rule.fused:
            continue  # the record says what it belongs to
        if len(bases) > 1 or not bases[0]:
            by_rule = {base: name_of_part(name, base) for base in bases if base}
            parts = rule.parts if rule and set(rule.parts) >= set(bases) else by_rule
            home, _, word = name.rpartition(".")
            if (weight := record.get(f"{home}.weight")) and not rule and weight.fused and set(weight.parts) >= set(bases):  # X.SCB
                parts = {part: f"{other.removesuffix('.weight')}.{word}" for part, other in weight.parts.items()}
            more = {"rope": rule.rope, "kind": rule.kind} if rule else {}
            yield _fused(name, told.layout, told.sizes, told.axis, parts.items(), **more)
            continue
        begin, suffix = stem(name)
        group = groups.setdefault((begin.rpartition(".")[0], suffix), {})
        if group.setdefault(bases[0], name) != name:
            raise PlanError(f"two tensors are given as part {bases[0]} of one projection", found=f"{group[bases[0]]} and {name}")
    for (home, suffix), group in groups.items():
        order = sorted(group, key=lambda part: (*axes.FIRST_PARTS, part).index(part))
        pieces = [Piece(group[part], hand[group[part]].layout) for part in order]
        layout = together([piece.layout for piece in pieces])
        sizes = bind(layout, **{axis: hand[piece.tensor].sizes[axis] for piece in pieces for axis in piece.layout.axes})
        word = ("" if max(map(len, order)) == 1 else "_").join(order)
        name = f"{home}{'.' if home else ''}{word}_proj{suffix}"
        yield _apart(name, pieces, layout, sizes, hand[group[order[0]]].axis, ((part, group[part]) for part in order))
