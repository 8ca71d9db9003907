"""A checkpoint with what is known of its layouts: every projection, its tensors, how their rows lie, and who says so.

Three sources, the later the stronger: the record of the model's family, the stamp that a conversion left in the file, a layout given by
hand. The stamp was written with the bytes, so it replaces the record. A layout given by hand replaces the record too, with a note, but
must agree with the stamp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import axes, families, formats, packed, quantised, stamp
from .errors import PlanError, SizeError
from .families import Record
from .formats import Stored
from .layout import Layout, with_brackets
from .packed import Packed
from .pieces import alone, base_names, in_bytes, shown, star
from .remote_skeleton import skeleton
from .rope import named, order_named, rope_of
from .sizes import bind

if TYPE_CHECKING:
    from .agree import Agreement


@dataclass(frozen=True)
class Checkpoint:
    """What `inspect` returns.

    `unknown`: tensors that look fused and whose layout nobody knows, with the reason; `notes` are sentences; `agreements`: what the weights
    say of the layouts, where they were asked.
    """

    stored: Stored
    family: str | None
    projections: tuple[Packed, ...]
    unknown: Mapping[str, str] = field(hash=False)
    notes: tuple[str, ...] = ()
    agreements: tuple[Agreement, ...] = ()
    url: str | None = None

    @property
    def path(self) -> str:
        """What it is called: a path, or a URL."""
        return self.url or str(self.stored.path)

    def to_dict(self) -> dict[str, Any]:
        """What `inspect --json` prints."""
        stored = self.stored
        return {
            "version": 1,
            "path": self.path,
            "family": self.family,
            "files": [file.file for file in stored.files],
            "tensors": len(stored.tensors),
            "bytes": stored.size,
            "projections": [projection.to_dict() for projection in self.projections],
            "unknown": dict(self.unknown),
            "notes": list(self.notes),
            "agreements": [one.to_dict() for one in self.agreements],
        }

    def __str__(self) -> str:
        stored = self.stored
        lines = [f"{self.path}   {self.family or 'no known family'}"]
        lines += [f"  {len(stored.files)} file{'s' * (len(stored.files) != 1)}, {len(stored.tensors)} tensors, {in_bytes(stored.size)}"]
        for one, number in _alike((star(p.name), (p.fused, p.layout, p.sizes, p.axis, p.source, p.rope), p) for p in self.projections):
            words = [str(one.layout), one.sizes.of(one.layout)]
            words += [f"along axis {one.axis}"] if one.axis else []
            words += [f"rotary {one.rope}"] if one.rope else []
            words += [] if one.fused else [f"in {len(one.pieces)} tensors"]
            lines += [
                f"  {number:>4} x {star(one.name) if number > 1 else shown(one.name)}",
                "         " + "   ".join(words),
                f"         {one.source}",
            ]
        for name, number in _alike((star(name), (reason,), name) for name, reason in self.unknown.items()):
            lines += [f"  {number:>4} x {star(name) if number > 1 else shown(name)}", f"         unknown: {self.unknown[name]}"]
        if not self.projections and not self.unknown:
            lines.append("  no projection known")
        lines += [f"  weights: {one.sentence}" for one in self.agreements]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def _alike(items: Iterable[tuple[str, tuple[object, ...], Any]]) -> Iterator[tuple[Any, int]]:
    """The first of those with equal keys, and how many there are."""
    groups: dict[tuple[object, ...], list[Any]] = {}
    for name, key, item in items:
        groups.setdefault((name, *key), []).append(item)
    yield from ((group[0], len(group)) for group in groups.values())


def inspect(
    path: str | Path,
    *,
    layouts: Mapping[str, str] | None = None,
    records: str | Path | None = None,
    check_weights: bool = False,
    **sizes: int,
) -> Checkpoint:
    """What a checkpoint holds: family, and layout, sizes and rotary order of every projection.

    Args:
        path: a folder (config.json; one file of weights, or an index and its shards) or one file: .safetensors, .bin/.pt/.pth, .gguf;
            or the URL of a folder or file of safetensors (docs/remote.md).
        layouts: glob of tensor names -> layout, for what no config says; "LAYOUT @ 1" names the packed axis.
        records: a file of family records of your own, asked before ours (docs/add-a-family.md).
        check_weights: ask the weights too (`detect`); else only headers are read.
        sizes: what neither config nor layout tells (h=12).
    Raises FormatError (damaged files), LayoutError (a given layout is none or does not fit), PlanError (it contradicts the stamp, or the
    weights contradict it).
    """
    with skeleton(path) as here, formats.without_gc():
        found = open_checkpoint(here.path, layouts or {}, sizes, records=records)
        if check_weights:
            from .agree import checked  # it reads weights, for which it loads NumPy

            found = replace(found, agreements=checked(here.path, found.projections, found.stored.tensors, check_weights, settle=False))
    if here.states is not None:
        found = replace(found, url=here.name, notes=(*found.notes, *here.notes))
    if check_weights:
        return found
    return replace(found, notes=(*found.notes, *packed.doubts(found.projections)))


@formats.without_gc()
def open_checkpoint(
    path: str | Path, layouts: Mapping[str, str], sizes: Mapping[str, int], more: Sequence[Layout] = (), records: str | Path | None = None
) -> Checkpoint:
    """As `inspect`; `more` are layouts whose axes `sizes` may also speak of."""
    return known(formats.read(path), layouts, sizes, more, families.load_records(records) if records else ())


def known(
    stored: Stored, layouts: Mapping[str, str], sizes: Mapping[str, int], more: Sequence[Layout] = (), records: Sequence[Record] = ()
) -> Checkpoint:
    """What is known of tensors whose names, shapes and config are at hand, wherever their bytes are; `records` are asked before ours."""
    stamped = {name: told for file in stored.files for name, told in stamp.decode(file).items()}
    given = packed.given(layouts, stored.tensors)
    shapes = dict(zip(stored.tensors, map(attrgetter("shape"), stored.tensors.values()), strict=True))
    for name in stamped:
        shapes.pop(name, None)
    declared = partial(families.declared, formats.read_config(stored), records=records, sizes=sizes)
    said = declared(shapes)
    record = {name: one for one in said.projections for name in ([one.name] if one.fused else one.parts.values())}
    notes = list(_other_orders(declared, stored, stamped)) if stamped else []
    notes += [
        f"{layout} gives its last part alone heads and dims: did you mean {meant}?"
        for layout, _ in given.values()
        if (meant := with_brackets(layout))
    ]
    told: dict[str, families.Projection | stamp.Stamped] = {**record, **stamped}
    hand = {name: packed.by_hand(layout, axis, stored.tensors[name], sizes, told.get(name)) for name, (layout, axis) in given.items()}
    for name in [name for name in hand if name in stamped]:
        packed.must_agree(name, hand.pop(name), stamped[name])
    found = [*packed.from_stamps(stamped), *packed.from_records(said.projections, hand, notes), *packed.from_hand(hand, record)]
    words, unmoved = quantised.projections(stored, stamped, layouts, records, sizes)
    found += [*words, *quantised.scales(found, stored, {**stamped, **hand})]
    for one in found:
        packed.check_fit(one, stored.tensors)
    found = quantised.as_usual(_as_usual(declared, stored, found, notes), stored, declared, _joining_as)
    spoken = [*(one.layout for one in found), *more, *(layout for layout, _ in given.values())]
    axes.checked(sizes, [axis for layout in spoken for axis in layout.axes])
    firsts = {one.pieces[0].tensor for one in found}
    order = {name: i for i, name in enumerate(filter(firsts.__contains__, stored.tensors))}
    found.sort(key=lambda one: order[one.pieces[0].tensor])
    unknown = {name: reason for name, reason in {**said.unknown, **unmoved}.items() if name not in hand}
    return Checkpoint(stored, said.family, tuple(found), unknown, (*stored.notes, *dict.fromkeys(notes)))


Declared = Callable[[Mapping[str, tuple[int, ...]]], families.Declaration]
"""What the records say of names and shapes under the config at hand."""


def _as_usual(declared: Declared, stored: Stored, found: list[Packed], notes: list[str]) -> list[Packed]:
    """Parts that a conversion left apart are joined by default in the order that the record of their family gives the fused tensor."""
    apart = [one for one in found if one.source == packed.BY_STAMP and not one.fused]
    if not apart:
        return found
    parts = declared({piece.tensor: stored.tensors[piece.tensor].shape for one in apart for piece in one.pieces})
    joined = declared({one.name: _joined(one, stored) for one in apart})
    usual = {record.name: record for record in (*parts.projections, *joined.projections) if not record.ambiguous}
    known = {one.name: usual[one.name] for one in apart if one.name in usual}
    for one in apart:
        if one.name in known and known[one.name].rope != one.rope:
            notes.append(f"the parts of {star(one.name)} are stamped rotary {one.rope}; their record says {known[one.name].rope}, "
                         f"and the code of {parts.family} reads them so")  # fmt: skip
    return [_joining_as(known[one.name], one) if one.source == packed.BY_STAMP and one.name in known else one for one in found]


def _joining_as(record: families.Projection, one: Packed) -> Packed:
    """A projection that is joined as a record says, with its pairs named as its parts name them; as it was where they are other rows."""
    own = {base_names(piece.layout)[0]: piece.layout for piece in one.pieces}
    rope, order = rope_of(record.rope or ""), next(filter(None, map(order_named, own.values())), None)
    try:
        layout = named(record.layout, rope, order) if rope and order else record.layout
        blocks = {axis: record.sizes[axis] for axis in ("t", "n") if axis in record.sizes}  # parts do not tell of them
        sizes = bind(layout, *own.values(), **{**blocks, **one.sizes})
    except (PlanError, SizeError):  # parts of other sizes, or in an order that the fused tensor cannot have
        return one
    zeros = {name for path in layout.paths if path.zero for name in path.names}
    parts = {part: alone(layout, part) for part in base_names(layout) if part not in zeros}
    if record.axis != one.axis or parts.keys() != own.keys():
        return one
    alike = (tuple((side, bind(side, **{axis: sizes[axis] for axis in side.axes})) for side in (parts[part], own[part])) for part in own)
    same = all(packed.same_rows(*a, *b) for a, b in alike)
    return replace(one, layout=layout, sizes=sizes) if same else one


def _joined(one: Packed, stored: Stored) -> tuple[int, ...]:
    """The shape of the tensor that its parts would become."""
    shapes = [stored.tensors[piece.tensor].shape for piece in one.pieces]
    return (*shapes[0][: one.axis], sum(shape[one.axis] for shape in shapes), *shapes[0][one.axis + 1 :])


def _other_orders(declared: Declared, stored: Stored, stamped: Mapping[str, stamp.Stamped]) -> Iterator[str]:
    """A sentence for each kind of stamped tensor whose family record says another order: that of the model's own code."""
    shapes = {name: stored.tensors[name].shape for name in stamped}
    said = declared(shapes)
    for one in said.projections:
        told = stamped[one.name] if one.fused else None
        if told is None:
            continue
        here, usual = (packed.Order(side.layout, side.sizes, side.rope) for side in (told, one))
        if not packed.same_order(here, usual):
            record = f"{one.layout}, rotary {one.rope}" if told.rope not in (None, one.rope) else str(one.layout)
            yield f"{star(one.name)} is stamped {told.layout}; its record says {record}, and the code of {said.family} reads it so"
