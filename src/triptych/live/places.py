"""What a run says of parameters: the part, head and dim of their rows, the order of the rotary pairs, and what lines up with outputs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..layout import Row

Labels = NDArray[np.int64]
Roles = dict[str, tuple[int, int]]
"""part -> (head, dim) of one row."""


@dataclass(frozen=True)
class Place:
    """A parameter: its name, shape, the number of its first element, and the axis over which a product sums (None in a convolution).

    Of a stack of experts [E, ...] the rows of one are told, whichever was called.
    """

    name: str
    shape: tuple[int, ...]
    first: int
    summed: int | None

    @property
    def kept(self) -> tuple[int, ...]:
        """The axes that number the rows."""
        if self.summed is None:
            return (0,)
        axes = tuple(axis for axis in range(len(self.shape)) if axis != self.summed)
        return axes[-1:] if len(self.shape) == 3 and self.summed > 0 else axes

    @property
    def rows(self) -> int:
        return math.prod(self.shape[axis] for axis in self.kept)

    def row(self, element: int) -> int:
        """The row on which an element lies."""
        return int(self.rows_of(np.array([element]))[0])

    def rows_of(self, elements: Labels) -> Labels:
        """[n] rows of [n] elements."""
        at = np.unravel_index(elements - self.first, self.shape)
        number = np.zeros(len(elements), np.int64)
        for axis in self.kept:
            number = number * self.shape[axis] + at[axis]
        return number


@dataclass
class Table:
    """The roles of the rows of one parameter, and what was in doubt.

    `latent`: it makes keys of MLA. `chooses`: its scores weigh no values.
    """

    place: Place
    roles: dict[int, Roles] = field(default_factory=dict)
    doubts: set[str] = field(default_factory=set)
    latent: bool = False
    chooses: bool = False

    def add(self, number: int, part: str, head: int, dim: int) -> None:
        known = self.roles.setdefault(number, {}).setdefault(part, (head, dim))
        if known != (head, dim):
            self.doubts.add(f"{part} rows are read in two ways")

    def listing(self) -> list[Row] | None:
        """One `Row` a row, a row in two roles named `k=v`; None when rows have no role or two places."""
        out = []
        for number in range(self.place.rows):
            roles = self.roles.get(number)
            if not roles or len(set(roles.values())) != 1:
                return None
            head, dim = next(iter(roles.values()))
            out.append(Row("=".join(sorted(roles, key="qkv".find)), head, dim))
        return out


@dataclass(frozen=True)
class Columns:
    """A parameter that multiplies the output of an attention: (head, dim) of every line of its `axis`.

    `queries`: the parameter that makes the queries of that attention.
    """

    queries: str
    axis: int | None
    places: list[tuple[int, int]]


def rotary(table: Table, partners: Mapping[int, Iterable[int]]) -> str | None:
    """The order of the rotary pairs among the q, k or rope rows of a parameter; None when none is turned."""
    found: set[tuple[int, int, int]] = set()
    size = 0
    for number, roles in table.roles.items():
        part = next((p for p in ("q", "k", "rope") if p in roles), None)
        if part is None:
            continue
        head, dim = roles[part]
        size = max(size, dim + 1)
        for partner in partners.get(number, ()):
            other = table.roles.get(partner, {}).get(part)
            if other is not None and other[0] == head:
                found.add((head, dim, other[1]))
    if not found:
        return None
    turned = sorted({dim for _, dim, _ in found})
    pairs = {(a, b) for _, a, b in found}
    first, count = turned[0], len(turned)
    if turned != list(range(first, first + count)):
        order = "mixed"
    elif count == 2:
        order = "half or interleaved"  # of one pair both are the same
    elif pairs == {(i, first + (i - first ^ 1)) for i in turned}:
        order = "interleaved"
    elif pairs == {(i, first + (i - first + count // 2) % count) for i in turned}:
        order = "half"
    else:
        order = "mixed"
    if count == size:
        return order
    end = "first" if first == 0 else "last" if first + count == size else f"dims {first} to {first + count - 1},"
    return f"partial {order}: {end} {count} of {size} dims"
