"""Ranks without a table: how each tensor was divided follows from its shape on every rank and in the whole beside them.

Of names only the scales of a weight are known, and of vLLM's files that they hold parts one after the other. A tensor that has its whole
shape on every rank is there whole; else it is divided along the one axis that differs, by heads where the whole has a layout with heads.
That each rank then holds those rows, bit by bit, is the proof.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from .errors import MismatchError
from .layout import Layout
from .listing import listing
from .pieces import listed
from .rank_rows import EVEN, HEADS, POLICIES, VOCAB, Cut, Ranked, World, held
from .rank_sets import Found
from .sizes import bind

CONFIG = "config.json"
SCALES = ("_scale_inv", "_scale", "_zero_point")
RUN = Layout("f")
Shape = tuple[int, ...]


class Beside(NamedTuple):
    """What is known of the whole: the shape of every tensor; how those of known layout are divided where they are."""

    shapes: Mapping[str, Shape]
    cuts: Mapping[str, Cut]


def by_shapes(found: Found, whole: Beside) -> Ranked:
    """The ranks with how each tensor must be divided. Raises MismatchError for shapes that are no shares of those of the whole."""
    shapes = {name: [one.tensors[name].shape for one in found.stored] for name in found.stored[0].tensors}
    if differing := sorted(shapes.keys() ^ whole.shapes.keys()):
        raise MismatchError("the ranks have other tensors than the whole", tensor=differing[0], expected=f"{len(whole.shapes)} tensors",
                            found=f"{len(shapes)} on every rank",
                            try_="merge the ranks, which keeps their names, and compare the result with both")  # fmt: skip
    cuts = {name: _cut(name, own, whole) for name, own in shapes.items()}
    for cut, name in {cut: name for name, cut in cuts.items() if cut}.items() if found.engine else ():
        _one_after_the_other(name, cut)
    filled = {sum(shape[cut.axis] for shape in shapes[name]) for name, cut in cuts.items() if cut and cut.role == VOCAB}
    if len(filled) > 1:
        raise MismatchError("the vocabularies of the ranks are padded to several lengths", found=listed(map(str, sorted(filled))))
    pad = max(filled, default=1)
    few = {(cut, tuple(shape[cut.axis] for shape in shapes[name])) for name, cut in cuts.items() if cut and cut.role == HEADS}
    worlds = [World(len(found.stored), kv, pad) for kv in POLICIES]
    world = next((world for world in worlds if all(_fits(cut, lengths, world) for cut, lengths in few)), worlds[0])
    above = any(other.name == CONFIG for other in found.beside)
    stored = tuple(replace(one, path=found.path, root=found.path, others=found.beside) if above else one for one in found.stored)
    return Ranked(found.path, stored, found.homes, world, cuts)


def _cut(name: str, shapes: Sequence[Shape], whole: Beside) -> Cut | None:
    wanted = whole.shapes[name]
    if all(shape == wanted for shape in shapes):
        return None
    axes = {axis for shape in shapes for axis, (own, there) in enumerate(zip(shape, wanted, strict=False)) if own != there}
    if len(axes) != 1 or any(len(shape) != len(wanted) for shape in shapes):
        raise _no_shares(name, shapes, wanted)
    (axis,) = axes
    if known := whole.cuts.get(name) or _of_scales(name, axis, whole):
        if known.axis != axis:
            raise _no_shares(name, shapes, wanted)
        return known
    total, rows = sum(shape[axis] for shape in shapes), wanted[axis]
    if len(set(shapes)) != 1 or total < rows:
        raise _no_shares(name, shapes, wanted)
    return Cut(VOCAB if total > rows else EVEN, axis, RUN, bind(RUN, f=rows), 1, 0)


def _of_scales(name: str, axis: int, whole: Beside) -> Cut | None:
    """The cut of the weight that a tensor scales, in blocks of as many rows as share a scale."""
    base = next((name.removesuffix(tail) for tail in SCALES if name.endswith(tail)), "")
    cut, shape = whole.cuts.get(base), whole.shapes.get(base, ())
    if cut is None or cut.axis != axis or shape[axis] % whole.shapes[name][axis]:
        return None
    block = shape[axis] // whole.shapes[name][axis]
    return cut if block == 1 else cut._replace(block=block, period=shape[axis])


def _one_after_the_other(name: str, cut: Cut) -> None:
    """As in vLLM (vllm==0.33.0:vllm/model_executor/layers/linear.py:836-839 for gate and up, 1282-1290 for q, k and v)."""
    parts = [label.part for entry in listing(cut.layout, cut.sizes) for label in entry.labels[:1]] if cut.role != VOCAB else []
    if {"q", "k", "v"} <= set(parts) or {"gate", "up"} <= set(parts):
        runs = 1 + sum(one != two for one, two in pairwise(parts))
        if runs > len(set(parts)):
            raise MismatchError("vLLM holds the parts of a tensor one after the other", tensor=name, found=cut.layout,
                                try_="the ranks were joined in another order than they have")  # fmt: skip


def _no_shares(name: str, shapes: Sequence[Shape], wanted: Shape) -> MismatchError:
    found = listed(map(str, dict.fromkeys(shapes)))
    return MismatchError("the shapes on the ranks are no shares of the whole", tensor=name, found=found,
                         expected=f"all of {wanted}, or shares of it along one axis")  # fmt: skip


def _fits(cut: Cut, lengths: Sequence[int], world: World) -> bool:
    try:
        return all(len(held(cut, world, rank)) == length for rank, length in enumerate(lengths))
    except MismatchError:
        return False
