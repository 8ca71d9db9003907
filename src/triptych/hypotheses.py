"""The layouts that a fused q, k, v weight of so many rows may have: complete over blocks, part orders, head scrambles and GQA.

Where q and k have the same number of rows the statistics are symmetric in them, so only "q before k" is listed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from .catalog import HEAD_DIMS
from .errors import SizeError
from .evidence import Reading
from .layout import Layout
from .rowmap import parts
from .sizes import Sizes, bind

MAX_HEAD_DIM, MIN_HEAD_DIM = 512, 8
MAX_RATIO = 16
"""Query heads per kv head that are tried when neither the heads nor the output projection tell."""


class Hypothesis(NamedTuple):
    """A layout with sizes. `d` is the head dim, or 0 where the rows would lie alike with any (then the sizes name a likely one)."""

    layout: Layout
    sizes: Sizes
    d: int

    @property
    def dims(self) -> tuple[int, ...]:
        """The head dims to try."""
        if self.d:
            return (self.d,)
        size = self.layout.size(**{axis: self.sizes[axis] for axis in self.layout.axes}) // 3
        return tuple(dict.fromkeys((*head_dims(size), size)))

    def reading(self) -> Reading:
        """Its rows, in the order of k's, so that layouts that set the same rows side by side give the same arrays."""
        found = {part.path.names[0]: part.rows() for part in parts(self.layout, self.sizes)}
        (heads, dims), kv_heads = found["q"].shape, found["k"].shape[0]
        shared = heads // kv_heads, kv_heads * dims
        q = found["q"].reshape(kv_heads, heads // kv_heads, dims).swapaxes(0, 1).reshape(shared)
        o = np.arange(q.size).reshape(kv_heads, heads // kv_heads, dims).swapaxes(0, 1).reshape(shared)
        k, v = found["k"].ravel(), found["v"].ravel()
        order = np.argsort(k)
        labels = np.stack([np.arange(len(k)) // d for d in self.dims])
        return Reading(q[:, order], k[order], v[order], o[:, order], labels[:, order])


def hypotheses(rows: int, width: int | None = None, heads: int | None = None, kv_heads: int | None = None) -> tuple[Hypothesis, ...]:
    """All layouts that fit.

    Args: rows: of the fused weight. width: columns of the output projection, h * d. heads, kv_heads: h and g, where known.

    >>> found = hypotheses(6144, width=4096, heads=32)
    >>> len(found), str(found[0].layout), found[0].sizes.of(found[0].layout)
    (36, '(q h|k g|v g) d', 'h=32 d=128 g=8')
    """
    out: list[Hypothesis] = []
    if rows % 3 == 0 and width in (None, rows // 3) and kv_heads in (None, heads) and (rows // 3) % (heads or 1) == 0:
        out += _one_to_one(rows // 3, heads)
    for g, r, d in _grouped_sizes(rows, width, heads, kv_heads):
        out += _grouped(g, r, d, forms=GROUPED if width or heads else GROUPED[:2])
    return tuple(out)


def divisors(number: int) -> list[int]:
    """Ascending."""
    return [i for i in range(1, number + 1) if number % i == 0]


def head_dims(width: int) -> list[int]:
    """Head dims that divide `width`, ascending."""
    return [d for d in divisors(width) if MIN_HEAD_DIM <= d <= MAX_HEAD_DIM]


# As many kv heads as query heads


_PLACES = ("q|k|v", "q|v|k", "v|q|k")


def _one_to_one(size: int, heads: int | None) -> Iterator[Hypothesis]:
    """Every number of blocks, V in every place; then heads scrambled. `size` is h * d."""
    likely = size // heads if heads else next((d for d in (64, *HEAD_DIMS) if size % d == 0), size)
    d = likely if heads else 0
    for blocks in divisors(size):
        form, sizes = _blocks(blocks, size, likely, heads is not None)
        for place in _PLACES:
            yield _made(form.format(place), sizes, d)
    for dims in [likely] if heads else [d for d in head_dims(size) if d in (MIN_HEAD_DIM, *HEAD_DIMS)]:
        if 1 < dims < size:
            for form in ("({}) d h", "d ({}) h", "d h ({})"):
                for place in _PLACES:
                    yield _made(form.format(place), {"h": size // dims, "d": dims}, dims)


def _blocks(blocks: int, size: int, d: int, known: bool) -> tuple[str, dict[str, int]]:
    """The text for `blocks` repeats of the three parts, and its sizes. Blocks of a likely size are heads when these are not known."""
    length = size // blocks
    if blocks == 1:
        return "({}) h d", {"h": size // d, "d": d}
    if length == 1:
        return "h d ({})", {"h": size // d, "d": d}
    if length == d or (not known and MIN_HEAD_DIM <= length <= max(HEAD_DIMS)):
        return "h ({}) d", {"h": blocks, "d": length}
    if length % d == 0:
        return "t ({}) n d", {"t": blocks, "n": length // d, "d": d}
    if d % length == 0:
        return "h x ({}) y", {"h": size // d, "x": d // length, "y": length}
    return "t ({}) x", {"t": blocks, "x": length}


# Several query heads to one kv head


def _grouped_sizes(rows: int, width: int | None, heads: int | None, kv_heads: int | None) -> Iterator[tuple[int, int, int]]:
    """(g, r, d) with more than one query head to a kv head."""
    if width is not None:
        kv, rest = divmod(rows - width, 2)
        ratios = [width // kv] if kv > 0 and not rest and width % kv == 0 else []
    elif heads is not None:
        ratios = divisors(heads)
    else:
        ratios = list(range(2, MAX_RATIO + 1))
    for r in ratios:
        if r > 1 and rows % (r + 2) == 0 and (heads or r) % r == 0:
            kv = rows // (r + 2)
            usual = [kv // d for d in head_dims(kv) if width or d in HEAD_DIMS]
            for g in [heads // r] if heads else usual:
                if kv % g == 0 and kv_heads in (None, g):
                    yield g, r, kv // g


GROUPED = (
    ("({}) d", "q h", "k g", "v g"),
    ("g ({}) d", "q r", "k", "v"),
    ("({}) d", "q r g", "k g", "v g"),
    ("{}", "q d h", "k d g", "v d g"),
)
"""Contiguous, one group behind the other, query heads tiled, heads scrambled."""
BLOCKS = ("t ({}) d", "q n r", "k n", "v n")


def _grouped(g: int, r: int, d: int, forms: Sequence[tuple[str, ...]]) -> Iterator[Hypothesis]:
    sizes = {"g": g, "r": r, "d": d}
    for form, *branches in forms if g > 1 else forms[:1]:
        for order in itertools.permutations(branches):
            yield _made(form.format("|".join(order)), sizes, d)
    for t in divisors(g)[1:-1]:
        for order in itertools.permutations(BLOCKS[1:]):
            yield _made(BLOCKS[0].format("|".join(order)), {**sizes, "t": t}, d)


def _made(text: str, sizes: dict[str, int], d: int) -> Hypothesis:
    layout = Layout(text)
    try:
        return Hypothesis(layout, bind(layout, **sizes), d)
    except SizeError:  # an axis that the text lacks
        return Hypothesis(layout, bind(layout, **{a: n for a, n in sizes.items() if a in layout.axes}), d)
