"""Rotary position: which dims of a head turn, and in which order their pairs stand, read off the axes c and p of a layout."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from ..errors import LayoutError
from ..layout import Layout
from ..rowmap import Part, parts
from ..sizes import Sizes

Order = Literal["half", "interleaved"]


def pieces(layout: Layout, sizes: Sizes, part: str) -> tuple[Part, ...]:
    """What makes up a part: itself, or `part.rot`, `part.pass` and so on in row order. Empty when the layout has no such part."""
    return tuple(p for p in parts(layout, sizes) if any(name == part or name.startswith(part + ".") for name in p.path.names))


@dataclass(frozen=True)
class Rotary:
    """Dims `first` to `first + 2 * pairs` of a head turn with the position; pair i by `position * base ** (-i / pairs)` radians.

    `order`: "half" turns dim i with dim i + pairs, "interleaved" dim 2i with dim 2i + 1. Dims count as `split` counts them: there c
    stands before p whatever the row order, so a layout that says `c p` or `p c` is always "half" here.
    """

    first: int
    pairs: int
    order: Order = "half"
    base: float = 10000.0
    _tables: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def dims(self) -> int:
        return 2 * self.pairs

    def __call__(self, x: Tensor, past: int | tuple[int, ...] = 0) -> Tensor:
        """Turn `x` [batch, tokens, heads, dims], whose first token is at position `past` (one for all rows, or one a row).

        Angles are computed in float32, in float64 for a float64 `x`; products are in the dtype of `x`. Returns a new tensor.
        """
        cos, sin = self._at(past, x)
        turning = x.narrow(-1, self.first, self.dims)
        if self.order == "half":
            a, b = turning.chunk(2, -1)
            turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
        else:
            a, b = turning[..., 0::2], turning[..., 1::2]
            turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
        if self.dims == x.shape[-1]:
            return turned
        rest = x.shape[-1] - self.first - self.dims
        return torch.cat((x.narrow(-1, 0, self.first), turned, x.narrow(-1, self.first + self.dims, rest)), -1)

    def _at(self, past: int | tuple[int, ...], x: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin as [tokens, 1, pairs], or [batch, tokens, 1, pairs] for rows at different positions."""
        tokens = x.shape[1]
        stop = (past if isinstance(past, int) else max(past)) + tokens
        cos, sin = self._table(stop, x)
        if isinstance(past, int):
            return cos.narrow(0, past, tokens), sin.narrow(0, past, tokens)
        places = torch.tensor(past, device=x.device)[:, None] + torch.arange(tokens, device=x.device)
        return cos[places], sin[places]

    def _table(self, stop: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of all positions before `stop`, kept and doubled when they run out."""
        known = self._tables.get((x.dtype, x.device))
        if known is not None and known[0].shape[0] >= stop:
            return known
        length = max(stop, 64, 2 * known[0].shape[0] if known is not None else 0)
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        with torch.inference_mode(False), torch.no_grad():
            frequency = self.base ** (-torch.arange(self.pairs, device=x.device, dtype=exact) / self.pairs)
            angle = (torch.arange(length, device=x.device, dtype=exact)[:, None] * frequency)[:, None]
            table = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        self._tables[(x.dtype, x.device)] = table
        return table


def rotary_of(layout: Layout, sizes: Sizes, order: str | bool | None = None, base: float = 10000.0) -> Rotary | None:
    """The rotation of q and k; None for none.

    Args: order: None for what the layout says: `c` and `p` in q or k, and those dims turn (see `Rotary`). False for none. "half" or
        "interleaved" turns all dims of a head; "partial half: first 16 of 64 dims" only those: the words of `probe`, which says
        "half or interleaved" of 2 dims, where both are the same.
    Raises LayoutError: q and k disagree, or `order` says something else than the layout.

    >>> from ..sizes import bind
    >>> text = "h (q|k|v) (rot c p|pass n)"
    >>> rotary_of(Layout(text), bind(text, h=2, p=4, n=8))
    Rotary(first=0, pairs=4, order='half', base=10000.0)
    >>> rotary_of(Layout("h (q|k|v) d"), bind("h (q|k|v) d", h=2, d=16), "partial half: first 8 of 16 dims")
    Rotary(first=0, pairs=4, order='half', base=10000.0)
    """
    if order is False:
        return None
    where = f"{layout} with {sizes.of(layout)}"
    said = {part: ranges for part in ("q", "k") if (ranges := _turning(pieces(layout, sizes, part)))}
    found = list(dict.fromkeys(said.values()))
    if len(found) > 1 or any(len(ranges) > 1 for ranges in found):
        text = ", ".join(f"{part} dims " + " and ".join(f"{a} to {a + 2 * n}" for a, n in ranges) for part, ranges in said.items())
        raise LayoutError("q and k must turn the same dims, in one piece", layout=where, found=text)
    stated = Rotary(*found[0][0], base=base) if found else None
    if order is None:
        return stated
    dims = sum(piece.shape[1] for piece in pieces(layout, sizes, "q"))
    told = _told(str(order), dims, base)
    if stated not in (None, told):
        raise LayoutError(
            "the layout says another rotary order", layout=where, found=f"rotary={order!r}", try_="leave rotary away, or write d for c p"
        )
    return told


_WORDS = re.compile(r"(?:partial )?(half|interleaved|half or interleaved)(?:: (first|last|dims (\d+) to \d+,) (\d+) of (\d+) dims)?")


def _told(order: str, dims: int, base: float) -> Rotary:
    """The rotation in words, of a head of `dims`."""
    words = _WORDS.fullmatch(order)
    if words is None or int(words[5] or dims) != dims:
        expected = f"'half', 'interleaved', 'partial half: first N of {dims} dims', False, or None as the layout says"
        raise LayoutError("no such rotary order", expected=expected, found=repr(order))
    count = int(words[4] or dims)
    if " or " in words[1] and count != 2:
        raise LayoutError(
            "the two rotary orders are the same for 2 dims alone", expected="half or interleaved, one of them", found=repr(order)
        )
    first = int(words[3]) if words[3] else dims - count if words[2] == "last" else 0
    if count % 2 or first + count > dims:
        raise LayoutError("dims turn in pairs", found=f"{count} of {dims} dims a head")
    return Rotary(first, count // 2, "interleaved" if words[1] == "interleaved" else "half", base)


def _turning(part: tuple[Part, ...]) -> tuple[tuple[int, int], ...]:
    """(first dim, pairs) of every piece of a part that has both c and p."""
    out = []
    first = 0
    for piece in part:
        sizes = {digit.axis: digit.size for digit in piece.digits}
        if "c" in sizes and "p" in sizes:
            out.append((first, sizes["p"]))
        first += piece.shape[1]
    return tuple(out)
