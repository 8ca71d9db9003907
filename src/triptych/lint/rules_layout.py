"""Rules on projections: what config, record, stamp and weights say of q, k and v, and whether it can be so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from ..agree import CONTRADICTS, agreements
from ..pieces import star
from .model import ERROR, WARNING, WEIGHTS, Spot, rule
from .seen import Seen, Told, Weights, siblings

MISSING = ("is missing", "are missing")
NOBODY = ("its name looks fused", "more than one record fits", "the config has no")


@rule("incomplete-projection", ERROR, "One of q, k and v is missing", "fetch or write the missing tensor")
def incomplete_projection(seen: Seen) -> Iterator[Spot]:
    """By the family's record; without one, where other layers have all three."""
    for weights, told in _whole(seen):
        known = {piece.tensor for one in told.projections for piece in one.pieces}
        places = set[tuple[str, str]]()
        for name, reason in told.unknown.items():
            if not reason.endswith(MISSING):
                continue
            known.add(name)
            place = (name.rsplit(".", 2)[0], reason)
            if place not in places:
                places.add(place)
                yield Spot(reason, weights.tensors[name].file, name)
        groups = list(siblings(weights.tensors))
        full = {star(home) for home, trio, found in groups if len(found) == len(trio)}
        for home, trio, found in groups:
            if len(found) < len(trio) and star(home) in full and not known.intersection(found.values()):
                gone = [part for part in trio if part not in found]
                name = next(iter(found.values()))
                yield Spot(f"{' and '.join(gone)} of this layer is not there; other layers have it", weights.tensors[name].file, name)


@rule(
    "split-projection",
    WARNING,
    "q, k and v of one layer lie in different files",
    "put them into one file: `triptych convert --to fused` does",
)
def split_projection(seen: Seen) -> Iterator[Spot]:
    for weights, told in seen.told:
        groups = [[piece.tensor for piece in one.pieces] for one in told.projections if not one.fused]
        known = {name for group in groups for name in group}
        groups += [list(found.values()) for _, _, found in siblings(weights.tensors) if not known.intersection(found.values())]
        for group in groups:
            files = list(dict.fromkeys(weights.tensors[name].file for name in group))
            if len(files) > 1:
                yield Spot(f"the tensors of this projection lie in {' and '.join(files)}", files[0], group[0])


@rule(
    "mixed-dtype", WARNING, "Tensors of one kind have different dtypes", "convert the odd ones out, unless a part is kept wider on purpose"
)
def mixed_dtype(seen: Seen) -> Iterator[Spot]:
    """Tensors whose names differ only in numbers, and the parts of one projection."""
    for weights in seen.sets:
        kinds: dict[str, dict[str, list[str]]] = {}
        for name, tensor in weights.tensors.items():
            kinds.setdefault(star(name), {}).setdefault(tensor.dtype, []).append(name)
        for dtypes in kinds.values():
            if len(dtypes) > 1:
                rare = min(dtypes.values(), key=len)[0]
                said = " and ".join(f"{len(names)} are {dtype}" for dtype, names in sorted(dtypes.items(), key=lambda item: -len(item[1])))
                yield Spot(f"of its kind {said}", weights.tensors[rare].file, rare)
        for _, _, found in siblings(weights.tensors):
            counts = Counter(weights.tensors[name].dtype for name in found.values())
            if len(counts) > 1:
                said = ", ".join(f"{part} is {weights.tensors[name].dtype}" for part, name in found.items())
                name = next(name for name in found.values() if weights.tensors[name].dtype == min(counts, key=lambda d: counts[d]))
                yield Spot(f"in one projection {said}", weights.tensors[name].file, name)


@rule(
    "config-shapes",
    ERROR,
    "Shapes do not fit config.json",
    "find out which of the two belongs to the other model; `triptych inspect` shows the sizes",
)
def config_shapes(seen: Seen) -> Iterator[Spot]:
    """A projection whose tensors the family's record, at the sizes of the config, cannot have."""
    for weights, told in seen.told:
        yield from told.misfits
        for name, reason in told.unknown.items():
            if not reason.endswith(MISSING) and not _nobody_knows(reason, seen):
                yield Spot(reason, weights.tensors[name].file, name)


@rule(
    "unknown-layout",
    WARNING,
    "Nobody says how the rows of a fused tensor lie",
    "write a stamp (docs/stamp.md), or a family record (docs/add-a-family.md)",
)
def unknown_layout(seen: Seen) -> Iterator[Spot]:
    """Tensors that look fused and have no record, several, or one that is known to be ambiguous; and no stamp."""
    for weights, told in seen.told:
        if not weights.name.endswith(".gguf"):
            for name, reason in told.unknown.items():
                if _nobody_knows(reason, seen):
                    yield Spot(reason, weights.tensors[name].file, name)
        for one in told.projections:
            if one.ambiguous:
                others = " or ".join(map(str, one.ambiguous))
                name = one.pieces[0].tensor
                yield Spot(f"its record says {one.layout}, but files of this model exist as {others} too", weights.tensors[name].file, name)


@rule("stamp", ERROR, "A stamp does not fit its file", "convert the original again, or remove the stamp if the file was changed on purpose")
def stamp_(seen: Seen) -> Iterator[Spot]:
    for _, told in seen.told:
        yield from told.stamps


@rule(
    "stamp-config",
    WARNING,
    "Stamp and config.json say different layouts",
    "load it with code that reads the stamp, or convert it back for the family's own code",
)
def stamp_config(seen: Seen) -> Iterator[Spot]:
    for _, told in seen.told:
        yield from told.other_orders


@rule(
    "weights-contradict",
    ERROR,
    "The weights contradict the layout",
    "ask `triptych detect`; then convert with --layout, or correct stamp or record",
    WEIGHTS,
)
def weights_contradict(seen: Seen) -> Iterator[Spot]:
    """What record or stamp says, against what `detect` is confident of."""
    for weights, told in seen.told:
        if weights.whole:
            place = weights.root if weights.index else weights.root / weights.name
            for one in agreements(place, told.projections, weights.tensors):
                if one.outcome == CONTRADICTS:
                    yield Spot(one.sentence, weights.tensors[one.tensors[0]].file, one.tensors[0])


def _nobody_knows(reason: str, seen: Seen) -> bool:
    """Whether a reason of a record means that something is not said, and not that it does not fit."""
    return not reason.endswith(MISSING) and (seen.config is None or any(words in reason for words in NOBODY))


def _whole(seen: Seen) -> Iterator[tuple[Weights, Told]]:
    """Sets of which every file was read: what they lack is lacking."""
    yield from ((weights, told) for weights, told in seen.told if weights.whole and not seen.alone)


RULES = (
    incomplete_projection, split_projection, mixed_dtype, config_shapes, unknown_layout, stamp_, stamp_config, weights_contradict,
)  # fmt: skip
