"""Rules on numbers: NaN and infinity, parts that are zero, rows that are all the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import SizeError
from ..families import LOOKS_FUSED
from ..formats import Tensor
from ..pieces import listed
from ..rowmap import parts
from .model import ERROR, VALUES, WARNING, Spot, rule
from .seen import Seen
from .values import Facts, Peek, runs

LEAST = 8
"""A run of zero rows in a fused tensor of unknown layout counts from this share, 1 / LEAST of the rows."""


@rule(
    "not-finite",
    ERROR,
    "NaN or infinity among the weights",
    "go back to an earlier checkpoint; in float16 look for an overflow of the cast",
    VALUES,
)
def not_finite(seen: Seen) -> Iterator[Spot]:
    for weights, found in zip(seen.sets, seen.values.facts, strict=True):
        for name, fact in found.items():
            if fact.nan or fact.infinite:
                tensor = weights.tensors[name]
                total = int(np.prod(tensor.shape, dtype=object))
                yield Spot(f"{fact.nan} NaN and {fact.infinite} infinities among {total} numbers", tensor.file, name)


class _Part(NamedTuple):
    """One part of a projection in one tensor: its rows [heads, dims] and what is known of the tensor."""

    name: str
    tensor: Tensor
    rows: NDArray[np.int64]
    fact: Facts


def _parts(seen: Seen) -> Iterator[_Part]:
    """Every part of every weight whose layout is known; biases are left out, as zero ones are honest."""
    for (weights, told), found in zip(seen.told, seen.values.facts, strict=True):
        for one in told.projections:
            for piece in one.pieces:
                tensor, fact = weights.tensors[piece.tensor], found.get(piece.tensor)
                if fact is None or len(tensor.shape) < 2:
                    continue
                try:
                    placed = parts(piece.layout, one.sizes)
                except SizeError:
                    continue
                for part in placed:
                    if not part.path.zero:
                        yield _Part("=".join(part.path.names), tensor, part.rows(), fact)


@rule(
    "zero-part",
    ERROR,
    "A whole part of a projection is zero",
    "look where the tensor was written: a third that was never filled stays zero",
    VALUES,
)
def zero_part(seen: Seen) -> Iterator[Spot]:
    for part in _parts(seen):
        zero = part.fact.zero[part.rows]
        if zero.all():
            yield Spot(f"all {zero.size} rows of {part.name or 'the tensor'} are zero", part.tensor.file, part.tensor.name)


@rule("zero-rows", WARNING, "Heads, or many rows, are zero", "check that they were padded or pruned on purpose", VALUES)
def zero_rows(seen: Seen) -> Iterator[Spot]:
    """Whole heads of a part; and long runs of rows of a tensor that looks fused and whose layout is not known."""
    known = set()
    for part in _parts(seen):
        known.add(part.tensor.name)
        zero = part.fact.zero[part.rows]
        heads = zero.all(axis=1)
        if heads.any() and not heads.all():
            which = listed([str(i) for i in np.flatnonzero(heads)], 8)
            yield Spot(
                f"{np.count_nonzero(heads)} of {heads.size} heads of {part.name} are zero: {which}", part.tensor.file, part.tensor.name
            )
    for weights, found in zip(seen.sets, seen.values.facts, strict=True):
        for name, fact in found.items():
            tensor = weights.tensors[name]
            if name in known or len(tensor.shape) != 2 or name.removesuffix(".weight").rpartition(".")[2] not in LOOKS_FUSED:
                continue
            rows = len(fact.zero)
            for first, last in runs(fact.zero):
                if (last + 1 - first) * LEAST >= rows > 1:
                    yield Spot(f"rows {first} to {last} of {rows} along axis {fact.axis} are zero", tensor.file, name)


@rule(
    "untrained-part",
    WARNING,
    "All rows are equal",
    "check that these weights were trained and loaded: no training leaves equal rows",
    VALUES,
)
def untrained_part(seen: Seen) -> Iterator[Spot]:
    """Measured: that every row of a part, or of a matrix that is no projection, has the same bits; zero matrices among them."""
    peek, known = Peek(seen.root), set()
    for part in _parts(seen):
        known.add(part.tensor.name)
        rows = part.rows.ravel()
        if not part.fact.zero[rows].all() and peek.alike(part.tensor, part.fact.axis, rows):
            yield Spot(f"all {len(rows)} rows of {part.name or 'the tensor'} are equal", part.tensor.file, part.tensor.name)
    for weights, found in zip(seen.sets, seen.values.facts, strict=True):
        for name, fact in found.items():
            tensor = weights.tensors[name]
            if name in known or len(tensor.shape) < 2 or len(fact.zero) < 2:
                continue
            if fact.zero.all():
                yield Spot("all of it is zero", tensor.file, name)
            elif peek.alike(tensor, fact.axis, np.arange(len(fact.zero))):
                yield Spot(f"all {len(fact.zero)} rows along axis {fact.axis} are equal", tensor.file, name)


RULES = (not_finite, zero_part, zero_rows, untrained_part)
