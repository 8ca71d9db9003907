"""Rotary order in a layout: which dims of q and k a rotary embedding turns in pairs, and the layout that has them in the other order.

A record says `d` and, beside it, how the model's code pairs the dims of a head: "half" (dim i with i + d/2: Hugging Face) or "interleaved"
(2i with 2i + 1: Meta, GPT-J). In the language these are `c p` and `p c`, so one order becomes the other as any layout becomes another.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from .axes import ATOMS, head_axes
from .errors import PlanError
from .layout import Axis, Branch, Factor, Layout, Sum
from .sizes import Sizes, bind
from .syntax import text_of

ORDERS = {"half": ("c", "p"), "interleaved": ("p", "c")}
PAIRS = ("c", "p")
TURNED = frozenset(["rope", "rot"])
"""Names of the turned part of a head, where a layout tells it from the rest."""


class Rope(NamedTuple):
    """The pairs of a head: `order`, and how many dims are turned, the `first` or with `last` the last ones; None is all of them."""

    order: str
    first: int | None = None
    last: bool = False


@lru_cache
def rope_of(words: str) -> Rope | None:
    """What a record says of the rotary order, or None where it says another thing.

    >>> rope_of("half"), rope_of("partial interleaved: last 8 of 24 dims")
    (Rope(order='half', first=None, last=False), Rope(order='interleaved', first=8, last=True))
    """
    match = re.fullmatch(r"(?:partial )?(half|interleaved)(?:: (first|last) ([0-9]+) of [0-9]+ dims)?", words)
    return Rope(match[1], int(match[3]) if match[3] else None, match[2] == "last") if match else None


def other_words(words: str, order: str) -> str:
    """What a record would say after the order was changed.

    >>> other_words("partial half: first 16 of 64 dims", "interleaved")
    'partial interleaved: first 16 of 64 dims'
    """
    return re.sub("half|interleaved", order, words, count=1)


def names_pairs(layout: Layout) -> bool:
    """Whether the pairs have axes of their own, so that the layout itself tells the order.

    >>> names_pairs(Layout("(q h p c)")), names_pairs(Layout("(q h d)"))
    (True, False)
    """
    return order_named(layout) is not None


def names_turned(layout: Layout) -> bool:
    """Whether the turned part of a head has a name of its own.

    >>> names_turned(Layout("(q h (rot p c|pass n))")), names_turned(Layout("(q h p c)"))
    (True, False)
    """
    return any(word in TURNED for path in layout.paths for name in path.names for word in name.split("."))


def order_named(layout: Layout) -> str | None:
    """The rotary order that a layout tells itself, by the axes of its pairs.

    >>> order_named(Layout("(q|k) h p c")), order_named(Layout("(q h d)"))
    ('interleaved', None)
    """
    found = (path.axes for path in layout.paths if set(PAIRS) <= set(path.axes))
    return next(("half" if axes.index("c") < axes.index("p") else "interleaved" for axes in found), None)


@lru_cache(maxsize=1024)
def named(layout: Layout, rope: Rope, order: str | None = None) -> Layout:
    """The same layout with the turned dims of q and k as `c p` or `p c`: as `rope` says, or in `order`.

    A layout that names its pairs already is told by them, and changes only when an `order` is asked for.

    >>> str(named(Layout("h (q|k|v) d"), Rope("half"))), str(named(Layout("h (nope dn|rope dr)"), Rope("half"), "interleaved"))
    ('h (q c p|k c p|v d)', 'h (nope dn|rope p c)')
    >>> str(named(Layout("(q|k|v) h d"), Rope("half", 16), "interleaved"))
    'q h (rot p c|pass dn)|k h (rot p c|pass dn)|v h dv'
    >>> str(named(Layout("(v h d)"), Rope("half", 16)))
    '(v h dv)'

    Raises PlanError where q and k share these dims with v, or it is not told which dims are turned.
    """
    spread = _spread(layout.factors)
    turned = {axis for leaf in _leaves(spread) for axis in _turned(layout, leaf)}
    if not turned and rope.first is not None:  # v by itself: d = c * p does not hold for its dims
        return Layout(text_of(_rebuilt(spread, lambda found: (Axis("dv" if axis == "d" else axis) for axis in found.own))))
    if not turned or (turned == set(PAIRS) and order is None):
        return layout
    pairs = [Axis(axis) for axis in ORDERS[order or rope.order]]
    if rope.first is not None and turned != set(PAIRS):
        rot, rest = Branch(("rot",), False, tuple(pairs)), Branch(("pass",), False, (Axis("dn"),))
        dims: list[Factor] = [Sum((rest, rot) if rope.last else (rot, rest))]
    else:
        dims = [*pairs]
    keeps_d = turned <= {"d", *PAIRS} and len(dims) == 2  # then d = c * p holds for the others too

    def leaf(found: Leaf) -> Iterator[Factor]:
        mine = _turned(layout, found)
        new = iter(dims)
        for axis in found.own:
            if axis in mine:
                yield from (new if len(mine) == 1 else itertools.islice(new, 1))
            else:
                yield Axis("dv" if axis == "d" and not keeps_d else axis)

    return Layout(text_of(_rebuilt(spread, leaf)))


def with_pairs(layouts: tuple[Layout, ...], sizes: Sizes, rope: Rope) -> tuple[tuple[Layout, ...], Sizes]:
    """Layouts of one projection, the whole one first, with their pairs named, and their sizes.

    >>> pair, sizes = with_pairs((Layout("(q|k|v) h d"),), bind(Layout("h d"), h=3, d=8), Rope("half"))
    >>> print(*pair, sizes.of(*pair))
    q h c p|k h c p|v h d h=3 c=2 p=4 d=8
    """
    found = tuple(named(layout, rope) for layout in layouts)
    used = {axis for layout in found for axis in layout.axes}
    known = {axis: size for axis, size in sizes.items() if axis in used or axis in ATOMS}
    known |= {axis: size for axis, size in sizes_of(layouts[0], rope, sizes).items() if axis in used}
    return found, bind(*found, **known)


def sizes_of(layout: Layout, rope: Rope, sizes: Mapping[str, int]) -> dict[str, int]:
    """Sizes of the axes that `named` brings in: the pairs, dims that are not turned, dims of v.

    >>> sizes_of(Layout("(q|k|v) h d"), Rope("half", 16), {"d": 64})
    {'c': 2, 'p': 8, 'dn': 48, 'dv': 64}
    """
    axis = next((axis for leaf in _leaves(_spread(layout.factors)) for axis in _turned(layout, leaf)), None)
    if axis is None or axis in PAIRS:
        return {}
    whole = sizes[axis]
    first = rope.first or whole
    if first % 2 or first > whole:
        raise PlanError("the turned dims of a head are no pairs", layout=str(layout), found=f"{first} of {whole} dims")
    more = {"dv": sizes["d"]} if "d" in sizes else {}
    return {"c": 2, "p": first // 2} | ({"dn": whole - first} if first < whole else {}) | more


# A layout as a tree whose products end in at most one sum


class Leaf(NamedTuple):
    """One way through the tree: the names on it, the axes before its own product, and its own."""

    names: tuple[str, ...]
    outer: tuple[str, ...]
    own: tuple[str, ...]


ROOT = Leaf((), (), ())


def _spread(factors: tuple[Factor, ...]) -> tuple[Factor, ...]:
    """What follows a sum written into each of its branches: `(q|k) d` as `(q d|k d)`."""
    for i, factor in enumerate(factors):
        if isinstance(factor, Sum):
            rest = factors[i + 1 :]
            return (*factors[:i], Sum(tuple(replace(branch, factors=_spread((*branch.factors, *rest))) for branch in factor.branches)))
    return factors


def _rebuilt(factors: tuple[Factor, ...], leaf: Callable[[Leaf], Iterable[Factor]], above: Leaf = ROOT) -> tuple[Factor, ...]:
    """The tree with other leaves."""
    own = tuple(factor.name for factor in factors if isinstance(factor, Axis))
    if not factors or not isinstance(factors[-1], Sum):
        return tuple(leaf(Leaf(above.names, above.outer, own)))
    inner = [
        replace(branch, factors=_rebuilt(branch.factors, leaf, Leaf((*above.names, *branch.names), (*above.outer, *own), ())))
        for branch in factors[-1].branches
    ]
    return (*factors[:-1], Sum(tuple(inner)))


def _leaves(factors: tuple[Factor, ...]) -> list[Leaf]:
    found: list[Leaf] = []
    _rebuilt(factors, lambda leaf: found.append(leaf) or ())  # type: ignore[func-returns-value]
    return found


def _turned(layout: Layout, leaf: Leaf) -> tuple[str, ...]:
    """The axes that number the turned dims of a leaf: none where it is not turned, `c` and `p` where the layout names the pairs."""
    words = {word for name in leaf.names for word in name.split(".")}
    if not words & (TURNED if names_turned(layout) else {"q", "k"}):
        return ()
    axes = (*leaf.outer, *leaf.own)
    dims = [axis for axis in axes if axis not in head_axes(axes)]
    found = PAIRS if set(PAIRS) <= set(dims) else tuple(dims)
    if "v" in words or set(found) & set(leaf.outer):
        raise PlanError("q, k and v share the dims that are turned", layout=str(layout), expected="v in rows of its own",
                        try_="convert to (q h|k g|v g) d first, then change the rotary order")  # fmt: skip
    if len(found) > 1 and found != PAIRS:
        raise PlanError(
            "it is not told which dims are turned", layout=str(layout), found=" ".join(dims), try_="name them: c p, or rot c p|pass n"
        )
    return found
