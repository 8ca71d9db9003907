"""The proof: every row of every output tensor is the row of the input that has its label, found by a slow listing of its own.

Nothing of the code that makes row maps, plans or runs them is used, nor what they know of rotary order: from the two layouts alone, each
row of each side is labelled one by one with part, head and dim, and the bytes of equal labels are compared. All other tensors must be there
under their names, byte for byte. What the output must be is said by its stamp or, in the words of the conversion, by the caller.
Files beside the weights (config.json, tokenizer) are compared too: what differs is named, not refused, since people change them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from . import ranges
from .checkpoint import Checkpoint, open_checkpoint
from .errors import MismatchError, PlanError
from .expected import Claim, asked_for, claims
from .layout import Layout
from .listing import listing, origins
from .packed import BY_RECORD
from .ranges import Ranges
from .ranked import are_ranks, prove_ranks
from .remote_skeleton import reading_urls
from .rowproof import Proof, Rows, beside, prove_same, prove_zeros

UNTOLD = "the output has no stamp: state what was asked of the conversion, as --to LAYOUT or --rope half"


class Proved(NamedTuple):
    """A proof with what it is about: both sides, and what was proved of every projection."""

    proof: Proof
    before: Checkpoint
    after: Checkpoint
    claims: tuple[Claim, ...]


@reading_urls("path", "out")
def verify(
    path: str | Path,
    out: str | Path,
    to: str | Layout | None = None,
    *,
    rope: str | None = None,
    orientation: str | None = None,
    overrides: Mapping[str, str] | None = None,
    names: Mapping[str, str] | None = None,
    layouts: Mapping[str, str] | None = None,
    records: str | Path | None = None,
    **sizes: int,
) -> Proof:
    """Prove that the checkpoint `out` holds what `path` holds, row by row, byte by byte.

    Args:
        path, layouts, records, sizes: the input, as for `inspect`; either side may be ranks, of `shard` or of others.
        out: the output; its stamp says how its rows lie, or with any of the following they do.
        to, rope, orientation, overrides, names: what was asked of the conversion, as for `convert`. A stamp must say the same.
    Raises MismatchError at the first row that differs, with its tensor, part, head and dim; FormatError and others as `inspect` does.
    """
    if are_ranks(path) or are_ranks(out):
        if asked_for(to, rope, orientation, overrides or {}, names or {}):
            raise PlanError(
                "ranks hold the rows of the input, and nothing else can be asked of them", expected="no --to, --rope and the like"
            )
        return prove_ranks(path, out, layouts or {}, records, sizes)
    return prove(path, out, to, rope=rope, orientation=orientation, overrides=overrides, names=names, layouts=layouts, records=records,
                 **sizes).proof  # fmt: skip


def prove(
    path: str | Path,
    out: str | Path,
    to: str | Layout | None = None,
    *,
    rope: str | None = None,
    orientation: str | None = None,
    overrides: Mapping[str, str] | None = None,
    names: Mapping[str, str] | None = None,
    layouts: Mapping[str, str] | None = None,
    records: str | Path | None = None,
    **sizes: int,
) -> Proved:
    """As `verify`, with what the proof is about; not for ranks."""
    asked = asked_for(to, rope, orientation, overrides or {}, names or {})
    more = asked.layouts if asked else []
    before = open_checkpoint(path, layouts or {}, sizes, more, records)
    after = open_checkpoint(out, {}, sizes, [*(packed.layout for packed in before.projections), *more])
    found = claims(before, after, asked, sizes)
    with Ranges(before.stored) as old, Ranges(after.stored) as new:
        rows = sum(ranges.in_order(lambda claim: _prove_projection(claim, old, new), found))
        apart = _prove_others(found, old, new)
    proof = Proof(str(path), str(out), len(found), rows, apart, before.stored.size, tuple(beside(before.stored, after.stored)))
    return Proved(proof, before, after, found)


# Comparing bytes


def _prove_projection(claim: Claim, old: Ranges, new: Ranges) -> int:
    """Compare one projection; how many rows it has. Raises MismatchError."""
    source, target, turns = claim.source, claim.target, claim.turns
    sources, targets = tuple(piece.layout for piece in source.pieces), tuple(piece.layout for piece in target.pieces)
    found = origins(sources, targets, source.sizes, target.sizes, turns)
    if isinstance(found, str):
        before, after = (f"{side.layout} with {side.sizes.of(side.layout)}" for side in (source, target))
        raise MismatchError("input and output do not hold the same rows", tensor=target.name, expected=before, found=f"{after}: {found}")
    tensors = tuple(old.tensors[piece.tensor] for piece in source.pieces)
    for tensor, layout in zip(tensors, sources, strict=True):
        prove_zeros(tensor, [row for row, entry in enumerate(listing(layout, source.sizes)) if entry.zero], source.axis, old)
    hint = UNTOLD if target.source.startswith(BY_RECORD) and not claim.asked else None
    for piece, origin in zip(target.pieces, found, strict=True):

        def label(row: int, layout: Layout = piece.layout) -> str:
            return f"{listing(layout, target.sizes, turns[1])[row].labels[0]}   ({layout})"

        Rows(new.tensors[piece.tensor], tensors, source.axis, target.axis, origin, old, new, label, hint).prove()
    return sum(len(origin.rows) for origin in found)


def _prove_others(found: Sequence[Claim], old: Ranges, new: Ranges) -> int:
    """Compare all tensors that are in no projection; how many there are. Raises MismatchError."""
    before, after = ({piece.tensor for side in some for piece in side.pieces}
                     for some in ([claim.source for claim in found], [claim.target for claim in found]))  # fmt: skip
    rest_old, rest_new = (
        {name: t for name, t in reader.tensors.items() if name not in gone} for reader, gone in ((old, before), (new, after))
    )
    for name in [*rest_old, *rest_new]:
        if name not in rest_new or name not in rest_old:
            where = "output" if name in rest_old else "input"
            raise MismatchError(
                f"a tensor is missing in the {where}", tensor=name, found=f"{len(rest_old)} tensors before, {len(rest_new)} after"
            )
    ranges.in_order(lambda tensor: prove_same(tensor, rest_new[tensor.name], old, new), rest_old.values())
    return len(rest_old)
