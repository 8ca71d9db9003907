"""The language: text <-> Layout value. Symbolic: a layout holds no sizes. The grammar is in syntax.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import NamedTuple

from . import axes
from .errors import SizeError
from .syntax import Axis, Branch, Factor, Path, Sum, dotted, parse, paths, text_of

__all__ = ["Axis", "Branch", "Factor", "Layout", "Path", "Row", "Sum", "count", "equation"]

MAX_LISTING = 1 << 20


class Row(NamedTuple):
    """What one row of the packed axis is."""

    part: str
    head: int
    dim: int


class Layout:
    """What every row of a packed axis is, in one line. Frozen, hashable, equal when the text is.

    >>> Layout("h ( q | k | v ) d")
    Layout('h (q|k|v) d')
    >>> Layout("h (q|k|v) d").size(h=4, d=32)
    384

    Raises LayoutSyntaxError, which underlines the mistake.
    """

    __slots__ = ("__dict__", "_text", "factors")
    factors: tuple[Factor, ...]
    _text: str

    def __init__(self, text: str | Layout) -> None:
        factors = text.factors if isinstance(text, Layout) else parse(text)
        object.__setattr__(self, "factors", factors)
        object.__setattr__(self, "_text", text_of(factors))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("a Layout is frozen")

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return f"Layout({self._text!r})"

    def __eq__(self, other: object) -> bool:
        return self._text == other._text if isinstance(other, Layout) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._text)

    def __reduce__(self) -> tuple[object, ...]:
        return Layout, (self._text,)

    @cached_property
    def paths(self) -> tuple[Path, ...]:
        """The parts, in the order of their first rows."""
        return tuple(paths(self.factors))

    @cached_property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts in the order `split` hands them out: q, k, v, gate, up, then others as they appear.

        >>> Layout("m (q|v|k) n d").parts
        ('q', 'k', 'v')
        """
        names = [name for path in self.paths for name in path.names]
        first = {name: i for i, name in enumerate(axes.FIRST_PARTS)}
        return tuple(sorted(names, key=lambda name: first.get(name.split(".")[0], len(first))))

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """All axes, in order of appearance."""
        return tuple(dict.fromkeys(axis for path in self.paths for axis in path.axes))

    @cached_property
    def n_is_free(self) -> bool:
        """Whether `n` is a free axis here and not "kv heads per block" (see `axes.head_axes`)."""
        return any("n" in path.axes and "n" not in path.heads for path in self.paths)

    def size(self, **sizes: int) -> int:
        """Number of rows. Sizes may be any that determine all axes, e.g. h and g instead of r. Raises SizeError.

        >>> Layout("g (q r|k|v) d").size(h=32, g=8, d=128)
        6144
        """
        return count(self.factors, self._sizes(sizes))

    def rows(self, **sizes: int) -> list[Row]:
        """The slow listing, row by row: for reading, and as the oracle of tests. A zero or aliased row has its first name.

        >>> Layout("h (q|k) d").rows(h=2, d=1)
        [Row(part='q', head=0, dim=0), Row(part='k', head=0, dim=0), Row(part='q', head=1, dim=0), Row(part='k', head=1, dim=0)]
        """
        bound = self._sizes(sizes)
        total = count(self.factors, bound)
        if total > MAX_LISTING:
            raise SizeError("too many rows to list one by one", found=f"{total} rows", expected=f"at most {MAX_LISTING}")
        return [_label(row, bound) for row in _listing(self.factors, bound)]

    def _sizes(self, sizes: Mapping[str, int]) -> dict[str, int]:
        bound = axes.resolve(axes.checked(sizes, self.axes), self.axes, self.n_is_free)
        missing = [a for a in self.axes if axes.ALIASES.get(a, a) not in bound]
        if missing:
            raise SizeError(
                "sizes are missing",
                layout=str(self),
                found=", ".join(f"{k}={v}" for k, v in sizes.items()) or "none",
                expected="a size for " + ", ".join(missing),
            )
        return bound | {alias: bound[chief] for alias, chief in axes.ALIASES.items() if chief in bound}


def with_brackets(layout: Layout) -> str:
    """The layout that was perhaps meant where q, k and v have no dims and the last of them has; empty for all others.

    >>> with_brackets(Layout("q|k|v h d")), with_brackets(Layout("q h|k g|v g d")), with_brackets(Layout("q h d|k g d|v g d"))
    ('(q|k|v) h d', '(q h|k g|v g) d', '')
    """
    only = layout.factors[0]
    if len(layout.factors) > 1 or not isinstance(only, Sum) or not set(layout.parts) <= {"q", "k", "v", "gate", "up"}:
        return ""
    *others, last = only.branches
    taken = {axis for path in layout.paths[:-1] for axis in path.axes}
    stays = next((i for i in range(len(last.factors), 0, -1) if str(last.factors[i - 1]) in taken), 0)
    common = " ".join(map(str, last.factors[stays:]))
    if not others or not common or any(path.dims for path in layout.paths[:-1]) or "(" in common:
        return ""
    inner = "|".join(map(str, (*others, Branch(last.names, last.zero, last.factors[:stays]))))
    return f"({inner}) {common}"


def count(factors: tuple[Factor, ...], sizes: Mapping[str, int]) -> int:
    """Rows of a product of factors; a chief name stands for its aliases."""
    total = 1
    for factor in factors:
        if isinstance(factor, Axis):
            total *= sizes[axes.ALIASES.get(factor.name, factor.name)]
        else:
            total *= sum(count(branch.factors, sizes) for branch in factor.branches)
    return total


def equation(factors: tuple[Factor, ...], sizes: Mapping[str, int]) -> str:
    """The row count as arithmetic.

    >>> equation(Layout("g (q r|k|v) d").factors, {"g": 8, "r": 4, "d": 128})
    '8*(4+1+1)*128'
    """
    terms = []
    for factor in factors:
        if isinstance(factor, Axis):
            terms.append(str(sizes[axes.ALIASES.get(factor.name, factor.name)]))
        else:
            terms.append("(" + "+".join(equation(b.factors, sizes) for b in factor.branches) + ")")
    return "*".join(terms) or "1"


def _listing(factors: tuple[Factor, ...], sizes: Mapping[str, int]) -> Iterator[tuple[tuple[str, ...], dict[str, tuple[int, int]]]]:
    """Every row in order, as (part names, {axis: (index, position of the axis on the path)})."""
    if not factors:
        yield (), {}
        return
    first, rest = factors[0], factors[1:]
    if isinstance(first, Axis):
        for index in range(sizes[first.name]):
            for names, at in _listing(rest, sizes):
                yield names, {first.name: (index, 0), **{a: (i, place + 1) for a, (i, place) in at.items()}}
    else:
        for branch in first.branches:
            for names, at in _listing((*branch.factors, *rest), sizes):
                yield branch.names[:1] + names, at


def _label(row: tuple[tuple[str, ...], dict[str, tuple[int, int]]], sizes: Mapping[str, int]) -> Row:
    names, at = row
    order = sorted(at, key=lambda axis: at[axis][1])
    head = dim = 0
    for axis in axes.head_axes(order):
        head = head * sizes[axis] + at[axis][0]
    for axis in axes.dim_axes(order):
        dim = dim * sizes[axis] + at[axis][0]
    return Row(dotted(names), head, dim)
