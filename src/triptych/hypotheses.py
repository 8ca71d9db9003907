"""The layouts that a fused weight of so many rows may have: complete over blocks, part orders, head scrambles and GQA.

Where q and k have the same number of rows the statistics are symmetric in them, so only "q before k" is listed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from .catalog import HEAD_DIMS
from .errors import LayoutError, SizeError
from .evidence import Reading
from .layout import Layout
from .rowmap import parts
from .sizes import Sizes, bind

MAX_HEAD_DIM, MIN_HEAD_DIM = 512, 4
MIN_GROUPED_DIM = 8
MAX_RATIO = 16
"""Query heads per kv head that are tried when neither the heads nor the output projection tell."""
QKV, KV, GATE_UP = "q|k|v", "k|v", "gate|up"
ORDERS = {QKV: ("q|k|v", "q|v|k", "v|q|k"), KV: ("k|v", "v|k"), GATE_UP: ("gate|up", "up|gate")}
"""The parts that a weight may have, and the orders in which they are told apart."""


class Hypothesis(NamedTuple):
    """A layout with sizes. `d` is the head dim, or 0 where the rows would lie alike with any (then the sizes name a likely one).

    `ratio` query heads share a kv head.
    """

    layout: Layout
    sizes: Sizes
    d: int
    ratio: int = 1

    @property
    def kind(self) -> str:
        return GATE_UP if "gate" in self.layout.parts else QKV if "q" in self.layout.parts else KV

    def reading(self) -> Reading:
        """Its rows, by head and dim where the head dim is known, else by the rows of k."""
        found = {part.path.names[0]: part.rows() for part in parts(self.layout, self.sizes)}
        if self.kind == GATE_UP:
            up = found["up"].ravel()
            return Reading(found["gate"].reshape(1, -1), up, up, np.arange(up.size)[None], 0)
        k, v = found["k"].ravel(), found["v"].ravel()
        d, ratio = self.d or k.size, self.ratio
        o = np.arange(ratio * k.size).reshape(-1, ratio, d).swapaxes(0, 1).reshape(ratio, -1)
        q = found["q"].ravel()[o] if self.kind == QKV else o
        if self.d:
            return Reading(q, k, v, o, self.d)
        order = np.argsort(k)
        return Reading(q[:, order], k[order], v[order], o[:, order], 0)


def hypotheses(
    rows: int, width: int | None = None, heads: int | None = None, kv_heads: int | None = None, kind: str = QKV
) -> tuple[Hypothesis, ...]:
    """All layouts that fit.

    Args: rows: of the fused weight. width: columns of the output projection, h * d. heads, kv_heads: h and g, where known.
        kind: the parts it has, a key of ORDERS.
    Raises LayoutError for another kind.

    >>> found = hypotheses(6144, width=4096, heads=32)
    >>> len(found), str(found[0].layout), found[0].sizes.of(found[0].layout)
    (46, '(q h|k g|v g) d', 'h=32 d=128 g=8')
    """
    if kind not in ORDERS:
        raise LayoutError("no such parts to tell apart", found=kind, expected=", ".join(ORDERS))
    if kind == GATE_UP:
        return tuple(_mlp(rows // 2)) if rows % 2 == 0 and width in (None, rows // 2) else ()
    if kind == KV:
        return tuple(_key_value(rows // 2, width, heads, kv_heads)) if rows % 2 == 0 else ()
    out: list[Hypothesis] = []
    if rows % 3 == 0 and width in (None, rows // 3) and kv_heads in (None, heads) and (rows // 3) % (heads or 1) == 0:
        out += _one_to_one(ORDERS[QKV], rows // 3, heads, 1)
    for g, r, d in _grouped_sizes(rows, width, heads, kv_heads):
        out += _grouped(g, r, d, GROUPED if width or heads else GROUPED[:2], kv_grouped=width is not None)
    return tuple(out)


def divisors(number: int) -> list[int]:
    """Ascending.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    small = [i for i in range(1, int(number**0.5) + 1) if number % i == 0]
    return sorted({*small, *(number // i for i in small)})


def head_dims(width: int) -> list[int]:
    """Head dims that divide `width`, ascending."""
    return [d for d in divisors(width) if MIN_HEAD_DIM <= d <= MAX_HEAD_DIM]


# Parts of one size


def _one_to_one(orders: Sequence[str], size: int, heads: int | None, ratio: int) -> Iterator[Hypothesis]:
    """Every number of blocks, every order; then heads scrambled. `size` is heads * d."""
    likely = size // heads if heads else next((d for d in (64, *HEAD_DIMS) if size % d == 0), size)
    d = likely if heads else 0
    for blocks in divisors(size):
        form, sizes = _blocks(blocks, size, likely, heads is not None)
        for order in orders:
            yield _made(form.format(order), sizes, d, ratio)
    for dims in [likely] if heads else head_dims(size):
        if 1 < dims < size:
            for form in ("({}) d h", "d ({}) h", "d h ({})"):
                for order in orders:
                    yield _made(form.format(order), {"h": size // dims, "d": dims}, dims, ratio)


def _blocks(blocks: int, size: int, d: int, known: bool) -> tuple[str, dict[str, int]]:
    """The text for `blocks` repeats of the parts, and its sizes. Blocks of a likely size are heads when these are not known."""
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


def _mlp(size: int) -> Iterator[Hypothesis]:
    """Every number of blocks; there are no heads."""
    for blocks in divisors(size):
        form = "({}) f" if blocks == 1 else "f ({})" if blocks == size else "t ({}) f"
        for order in ORDERS[GATE_UP]:
            sizes = {"f": size // blocks if blocks < size else size} | ({"t": blocks} if form.startswith("t") else {})
            yield _made(form.format(order), sizes, 0, 1)


def _key_value(size: int, width: int | None, heads: int | None, kv_heads: int | None) -> Iterator[Hypothesis]:
    """k and v alone, beside q and o of `width`; where several query heads share a kv head the head dim is tried too."""
    ratio, rest = divmod(width or size, size)
    if rest or (heads and kv_heads and ratio != heads // kv_heads):
        return
    count = kv_heads or (heads // ratio if heads else None)
    known = [count] if count else [None] if ratio == 1 else [size // d for d in head_dims(size) if d >= MIN_GROUPED_DIM]
    for g in known:
        if g is None or size % g == 0:
            for one in _one_to_one(ORDERS[KV], size, g, ratio):
                text = str(one.layout).replace("h", "g")
                yield _made(text, {"g" if axis == "h" else axis: one.sizes[axis] for axis in one.layout.axes}, one.d, ratio)


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
            usual = [kv // d for d in head_dims(kv) if d in HEAD_DIMS or (width and d >= MIN_GROUPED_DIM)]
            for g in [heads // r] if heads else usual:
                if kv % g == 0 and kv_heads in (None, g):
                    yield g, r, kv // g


GROUPED = (
    ("({}) d", "q h", "k g", "v g"),
    ("g ({}) d", "q r", "k", "v"),
    ("({}) d", "q r g", "k g", "v g"),
    ("{}", "q d h", "k d g", "v d g"),
    ("g d ({})", "q r", "k", "v"),
)
"""Contiguous, one group behind the other, query heads tiled, heads scrambled, dim by dim."""
KV_GROUPED = "q h d", "_ g (k|v) d", "_ g (v|k) d"
"""q apart, k and v one group behind the other: compared only where O bears it out."""
BLOCKS = ("t ({}) d", "q n r", "k n", "v n")


def _grouped(g: int, r: int, d: int, forms: Sequence[tuple[str, ...]], kv_grouped: bool) -> Iterator[Hypothesis]:
    sizes = {"g": g, "r": r, "d": d}
    for form, *branches in forms if g > 1 else [forms[0], *forms[4:]]:
        for order in itertools.permutations(branches):
            yield _made(form.format("|".join(order)), sizes, d, r)
    if kv_grouped and g > 1:
        q, *pairs = KV_GROUPED
        for pair in pairs:
            yield from (_made(text, sizes, d, r) for text in (f"{q}|{pair}", f"{pair}|{q}"))
    for t in divisors(g)[1:-1]:
        for order in itertools.permutations(BLOCKS[1:]):
            yield _made(BLOCKS[0].format("|".join(order)), {**sizes, "t": t}, d, r)


def _made(text: str, sizes: dict[str, int], d: int, ratio: int) -> Hypothesis:
    layout = Layout(text)
    try:
        return Hypothesis(layout, bind(layout, **sizes), d, ratio)
    except SizeError:  # an axis that the text lacks
        return Hypothesis(layout, bind(layout, **{a: n for a, n in sizes.items() if a in layout.axes}), d, ratio)
