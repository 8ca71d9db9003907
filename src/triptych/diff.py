"""What differs between two checkpoints, tensor by tensor: nothing, the order of the rows, a scale, the dtype, or the numbers.

Tensors are compared byte by byte. Where they differ, every row gets a number (digests.py); equal numbers tell which row of one is which
row of the other, and the layouts that explain it are looked for: those that records or stamps declare, those that explained a tensor
before, then all in use. Whatever is found is compared byte by byte before it is said.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from . import formats, ranges
from .agree import AGREES, agreements
from .checkpoint import Checkpoint, open_checkpoint
from .digests import Digested, Rows
from .errors import SizeError
from .formats import nbytes
from .partners import Couple, Unit, constant, couples
from .pieces import listed, shown, star
from .ranges import Ranges
from .remote_skeleton import reading_urls
from .rowdiff import DECLARED, DIFFERENT, DTYPE, EQUAL, KINDS, ONLY_A, ONLY_B, ORDER, SCALED, Comparison, Order, TensorDiff, same_layout
from .values import PRECISION, WRITTEN

LARGE = 1 << 28
"""Bytes of a tensor beyond which it is not turned over to see whether the other one is its transpose."""


@dataclass(frozen=True)
class Diff:
    """What `diff` found; `equal` when every tensor of one is, byte for byte and under its name, in the other.

    `notes`: what the weights say where a record is ambiguous.
    """

    a: str
    b: str
    tensors: tuple[TensorDiff, ...]
    renamed: int = 0
    notes: tuple[str, ...] = ()

    @property
    def equal(self) -> bool:
        return not self.renamed and all(one.kind == EQUAL for one in self.tensors)

    @property
    def summary(self) -> str:
        """One sentence for the whole."""
        count = {kind: sum(one.kind == kind for one in self.tensors) for kind in KINDS}
        if self.equal:
            return f"equal: all {len(self.tensors)} tensors, byte for byte"
        begin = "the same weights" if not any(count[kind] for kind in (DIFFERENT, SCALED, ONLY_A, ONLY_B)) else "not the same weights"
        told = [f"{count[EQUAL]} of {len(self.tensors)} tensors equal"]
        told += [f"{self.renamed} under other names"] if self.renamed else []
        orders = list(dict.fromkeys((str(one.layout_a), str(one.layout_b)) for one in self.tensors if one.kind == ORDER and one.layout_a))
        if count[ORDER]:
            named = f": a is {orders[0][0]}, b is {orders[0][1]}" if len(orders) == 1 else ""
            told.append(f"{count[ORDER]} with their rows in another order{named}")
        told += [f"{count[kind]} {word}" for kind, word in _WORDS.items() if count[kind]]
        return f"{begin}: {'; '.join(told)}"

    def to_dict(self) -> dict[str, Any]:
        tensors = [one.to_dict() for one in self.tensors]
        return {"version": 1, "a": self.a, "b": self.b, "equal": self.equal, "summary": self.summary, "tensors": tensors,
                "notes": list(self.notes)}  # fmt: skip

    def __str__(self) -> str:
        lines = [f"a: {self.a}", f"b: {self.b}"]
        groups: dict[tuple[object, ...], list[TensorDiff]] = {}
        for one in self.tensors:
            key: tuple[object, ...] = (EQUAL,)
            if one.kind != EQUAL or one.a != one.b:
                key = tuple(map(star, one.a)), tuple(map(star, one.b)), one.kind, one.text
            groups.setdefault(key, []).append(one)
        for key, some in groups.items():
            first, show = some[0], star if len(some) > 1 else shown
            if key == (EQUAL,):
                lines.append(f"  {len(some):>4} x equal   {listed(dict.fromkeys(star(one.a[0]) for one in some), 4)}")
                continue
            names = [" + ".join(map(show, side)) for side in (first.a, first.b) if side]
            lines.append(f"  {len(some):>4} x {'   ->   '.join(dict.fromkeys(names))}")
            lines += [f"         {line}" for line in (first.text or first.kind).split("\n")]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes), self.summary])


_WORDS = {
    DECLARED: "with the same bytes, but declared as another layout",
    SCALED: "scaled",
    DTYPE: "in another dtype",
    DIFFERENT: "different",
    ONLY_A: "only in a",
    ONLY_B: "only in b",
}


@reading_urls("a", "b")
def diff(a: str | Path, b: str | Path, *, records: str | Path | None = None, **sizes: int) -> Diff:
    """Compare two checkpoints of any formats, whatever their files, shards and layouts; finds the order of rows without being told.

    Args:
        a, b: folders, files or URLs, as for `inspect`. records: a file of family records of your own.
        sizes: known sizes (h, g, d, ...) for layouts that no record or stamp tells.
    Raises FormatError and others as `inspect` does.
    """
    (before, *notes), (after, *more) = (_settled(path, _opened(path, sizes, records)) for path in (a, b))
    with Ranges(before.stored) as old, Ranges(after.stored) as new:
        found, left, right = couples(before, after, old, new)
        hints: dict[int, list[Order]] = {}
        known = _known_sizes((before, after), sizes)
        firsts = ranges.in_order(lambda couple: _first(*couple, old, new), found)
        by_size = sorted(range(len(found)), key=lambda i: -found[i][0].tensors[0].size)
        rest = {i: _compared(*found[i], old, new, known, hints) for i in by_size if firsts[i] is None}
        rest |= _exchanged({i: one for i, one in rest.items() if one.kind == DIFFERENT and one.differing == one.rows}, found, old, new)
    told = [first or rest[i] for i, first in enumerate(firsts)]
    told += [TensorDiff((name,), (), ONLY_A, "only in a") for name in left] + [
        TensorDiff((), (name,), ONLY_B, "only in b") for name in right
    ]
    renamed = sum(one.kind == EQUAL and one.a != one.b for one in told)
    return Diff(str(a), str(b), tuple(told), renamed, (*(f"a: {note}" for note in notes), *(f"b: {note}" for note in more)))


def _opened(path: str | Path, sizes: Mapping[str, int], records: str | Path | None) -> Checkpoint:
    """Sizes that the family does not speak of are for the search of layouts only."""
    try:
        return open_checkpoint(path, {}, sizes, records=records)
    except SizeError:
        return open_checkpoint(path, {}, {}, records=records)


def _settled(path: str | Path, found: Checkpoint) -> tuple[Checkpoint, *tuple[str, ...]]:
    """A checkpoint without the layouts of ambiguous records that its weights do not bear out; what the weights say of them."""
    asked = agreements(path, [packed for packed in found.projections if packed.ambiguous], found.stored.tensors)
    wrong = {name for one in asked if one.outcome != AGREES for name in one.tensors}
    kept = tuple(packed for packed in found.projections if packed.name not in wrong)
    return replace(found, projections=kept), *(one.sentence for one in asked)


CONFIG = {"h": ("num_attention_heads", "n_head"), "g": ("num_key_value_heads",), "d": ("head_dim",)}
"""Usual names of sizes, for models that no family record knows."""


def _known_sizes(sides: Sequence[Checkpoint], sizes: Mapping[str, int]) -> list[dict[str, int]]:
    """Sizes to try: those given, then those of the projections that somebody declares, then those that a config names."""
    out = [dict(sizes)] if sizes else []
    tables = [dict(packed.sizes) for side in sides for packed in side.projections]
    configs = [formats.read_config(side.stored) or {} for side in sides]
    tables += [{axis: config[key] for axis, keys in CONFIG.items() for key in keys if type(config.get(key)) is int} for config in configs]
    for table in tables:
        told = {axis: size for axis, size in table.items() if axis in CONFIG and size > 0}
        if told and {**told, **sizes} not in out:
            out.append({**told, **sizes})
    return out


def _first(mine: Unit, theirs: Unit, old: Ranges, new: Ranges) -> TensorDiff | None:
    """What can be said without looking at rows: equal, or not to be compared."""
    names = tuple(t.name for t in mine.tensors), tuple(t.name for t in theirs.tensors)
    if len(mine.tensors) == len(theirs.tensors) == 1:
        one, two = mine.tensors[0], theirs.tensors[0]
        rows = one.shape[mine.axis] if one.shape else 1
        if (one.dtype, one.shape) == (two.dtype, two.shape) and ranges.first_difference(old, one, new, two) is None:
            pair = Digested(Rows(old, (one,), mine.axis), Rows(new, (two,), theirs.axis))
            if not same_layout(mine, theirs) and not Comparison(names, mine, theirs, pair).holds_as_declared():
                sides = (("a", mine.declared), ("b", theirs.declared))
                text = "\n".join(f"{side} is declared as {told}" for side, told in sides)
                return TensorDiff(*names, DECLARED, f"the same bytes\n{text}", rows, 0, None, mine.layout, theirs.layout, mine.sizes)
            return TensorDiff(*names, EQUAL, "equal, under another name" if names[0] != names[1] else "", rows)
        if not one.shape or not one.size or not two.shape or not two.size:
            return TensorDiff(*names, DIFFERENT, f"{one.dtype} {one.shape} and {two.dtype} {two.shape}", rows, rows)
    return None


def _compared(
    mine: Unit, theirs: Unit, old: Ranges, new: Ranges, known: Sequence[Mapping[str, int]], hints: dict[int, list[Order]]
) -> TensorDiff:
    names = tuple(t.name for t in mine.tensors), tuple(t.name for t in theirs.tensors)
    kinds = [{t.dtype for t in unit.tensors} for unit in (mine, theirs)]
    if any(len(kind) > 1 for kind in kinds):
        return TensorDiff(*names, DIFFERENT, f"tensors of several dtypes: {', '.join(sorted(kinds[0] | kinds[1]))}")
    shapes = " and ".join(f"{t.dtype} {t.shape}" for t in (mine.tensors[0], theirs.tensors[0]))
    best: TensorDiff | None = None
    for note, one, two in _views(mine, theirs, old, new):
        found = Comparison(names, mine, theirs, Digested(one, two), note).told(known, hints)
        if found.kind != DIFFERENT:
            return found
        best = best or found
    return best or TensorDiff(*names, DIFFERENT, f"shapes that do not go together: {shapes}")


def _exchanged(whole: Mapping[int, TensorDiff], found: Sequence[Couple], old: Ranges, new: Ranges) -> dict[int, TensorDiff]:
    """Of tensors that differ in every row those that stand in b under the name of another one: layers or names exchanged."""
    keys: list[dict[int, tuple[object, ...]]] = [{}, {}]
    for i in whole:
        for side, reader in enumerate((old, new)):
            tensors, axis = found[i][side].tensors, found[i][side].axis
            numbers = Rows(reader, tensors, axis).numbers
            if not constant(numbers):
                keys[side][i] = tensors[0].dtype, tensors[0].shape, np.sort(numbers).tobytes()
    places = {key: i for i, key in keys[1].items()}
    out = {}
    for i, key in keys[0].items():
        if key in places:
            out[i] = replace(whole[i], text=f"the rows of a stand in b as {shown(found[places[key]][1].name)}, another tensor")
    return out


def _views(mine: Unit, theirs: Unit, old: Ranges, new: Ranges) -> Iterator[tuple[str, Rows, Rows]]:
    """Ways to see both as rows of as many numbers: as they lie, then rounded; along their axes, then others."""
    one, two = mine.tensors[0], theirs.tensors[0]
    axes = [(mine.axis, theirs.axis)]
    if len(mine.tensors) == len(theirs.tensors) == 1 and len(one.shape) == len(two.shape) == 2:
        axes += [(0, 0), (1, 1), (0, 1), (1, 0)]
    dtypes: list[tuple[str, str | None]] = [("", None)]
    if one.dtype != two.dtype:
        if not {one.dtype, two.dtype} <= set(PRECISION):
            return
        wide, narrow = sorted((one.dtype, two.dtype), key=lambda dtype: -PRECISION[dtype])
        dtypes = [(f"the same numbers in {one.dtype} and {two.dtype}", wide)]
        dtypes += [(f"{wide} rounded to {narrow}", narrow)] if narrow in WRITTEN else []
    for note, to in dtypes:
        for number, (x, y) in enumerate(dict.fromkeys(axes)):
            a, b = Rows(old, mine.tensors, x, to), Rows(new, theirs.tensors, y, to)
            if a.rows != b.rows or a.samples != b.samples or (number and a.edge() != b.edge()):
                continue
            if a.outer == b.outer:
                yield note, a, b
            elif one.size <= LARGE:
                unit = nbytes(to or one.dtype, ()) or 0
                yield ", ".join(filter(None, ("transposed", note))), replace(a, unit=unit), replace(b, unit=unit)
