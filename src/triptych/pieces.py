"""What a conversion is told and tells: its target, layouts and names of single parts, words for people."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from . import axes
from .errors import LayoutError, printable
from .layout import Branch, Factor, Layout, Sum

SPLIT, FUSED, KEEP = "split", "fused", "keep"
ORIENTATIONS = ("linear", "conv1d")
"""How a weight is stored: [out, in] as in nn.Linear, [in, out] as in transformers' Conv1D."""
WORDS = (".qweight", ".qzeros", ".scales", ".g_idx", ".weight_packed", ".weight_scale", ".weight_scale_inv",
         ".weight_zero_point")  # fmt: skip
"""Ends of the names of packed numbers and what goes with them."""
SUFFIXES = (".weight", ".bias", "_weight", "_bias", *WORDS)
WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".safetensors")
"""Other files with these endings may hold the same weights once more."""


@dataclass(frozen=True)
class Target:
    """What to turn projections into: `layout` for fused ones, or one tensor per part (`split`), or join those that are apart (`join`).

    With none of the three they keep their tensors. `rope`: the rotary order of the result; `axis`: where a weight packs its rows, 0 for
    [out, in] and 1 for [in, out]. None leaves them as they are.
    """

    layout: Layout | None = None
    split: bool = False
    join: bool = False
    rope: str | None = None
    axis: int | None = None

    def __str__(self) -> str:
        text = SPLIT if self.split else (FUSED if self.join else "") + (":" if self.join and self.layout else "") + str(self.layout or "")
        words = [text or KEEP, f"rotary {self.rope}" if self.rope else "", "" if self.axis is None else ORIENTATIONS[self.axis]]
        return ", ".join(word for word in words if word)


def target_of(text: str | Layout) -> Target:
    """LAYOUT, `split`, `fused`, `fused:LAYOUT` or `keep`. Raises LayoutError.

    >>> print(target_of("fused:h (q|k|v)  d"))
    fused:h (q|k|v) d
    """
    if isinstance(text, Layout):
        return Target(text)
    word, colon, rest = text.partition(":")
    if not colon and word.strip() in (SPLIT, KEEP):
        return Target(split=word.strip() == SPLIT)
    if word.strip() == FUSED:
        return Target(Layout(rest) if colon else None, join=True)
    _check_word(text)
    return Target(Layout(text))


def _check_word(text: str) -> None:
    """A word that is misspelt, or the name of a program or family, would be taken for an axis. Raises LayoutError."""
    first, _, rest = text.strip().partition(" ")
    near = difflib.get_close_matches(first.lower(), (SPLIT, FUSED, KEEP), 1)
    if first == FUSED or (near and rest):
        try_ = f"{near[0]}:{rest.strip()}" if near[0] == FUSED else near[0]
    elif not rest and len(first) > 2 and first.replace("-", "_").isidentifier():
        try_ = f"did you mean {near[0]!r}?" if near else "`triptych families NAME` shows the layouts of a family"
    else:
        return
    raise LayoutError("this is no target", found=printable(text), expected="a layout, split, fused, fused:LAYOUT or keep", try_=try_)


def base_names(layout: Layout) -> tuple[str, ...]:
    """The parts without what they nest in them, in the order q, k, v, ...: `q.rot` and `q.pass` are `q`."""
    return tuple(dict.fromkeys(name.split(".")[0] for name in layout.parts))


@lru_cache(maxsize=1024)
def alone(layout: Layout, part: str) -> Layout:
    """The layout of one part in a tensor of its own: heads in counting order, the dims of a head in the order that they had.

    >>> str(alone(Layout("g (q r|k|v) p c"), "q")), str(alone(Layout("(q|k|v) d h"), "k"))
    ('(q h p c)', '(k h d)')
    """
    paths = [path for path in layout.paths if not path.zero and any(name.split(".")[0] == part for name in path.names)]
    if len(paths) == 1 and part in paths[0].names:
        dims = " ".join(axis for axis in paths[0].axes if axis not in paths[0].heads)
        heads = " ".join(axes.ALIASES.get(axis, axis) for axis in paths[0].heads)
        if not layout.n_is_free:
            heads = {"g r": "h", "t n r": "h", "t n": "g"}.get(heads, heads)
        return Layout(f"({part} {heads} {'d' if dims == 'c p' else dims})")
    return Layout(_only(layout.factors, part) or "")


def _only(factors: tuple[Factor, ...], part: str) -> str | None:
    """A product with all branches gone but those of one part."""
    out, found = [], False
    for factor in factors:
        if found or not isinstance(factor, Sum):
            out.append(str(factor))
            continue
        kept = [str(replace(branch, names=(part,))) for branch in factor.branches if part in branch.names]
        kept += [f"_ {inner}" for branch in factor.branches if not branch.names and (inner := _only(branch.factors, part))]
        out.append(f"({'|'.join(kept)})" if kept else str(factor))
        found = bool(kept)
    return " ".join(out) if found else None


def together(layouts: Sequence[Layout]) -> Layout:
    """The layout of several tensors one after the other.

    >>> together([Layout("(q h d)"), Layout("(k g d)"), Layout("g (v) d")])
    Layout('q h d|k g d|_ g (v) d')
    """
    return _together(tuple(layouts))


@lru_cache(maxsize=1024)
def _together(layouts: tuple[Layout, ...]) -> Layout:
    if len(layouts) == 1:
        return layouts[0]
    branches: list[str] = []
    for layout in layouts:
        only = layout.factors[0]
        branches += map(str, only.branches) if len(layout.factors) == 1 and isinstance(only, Sum) else [f"_ {layout}"]
    return Layout("|".join(branches) if len(branches) > 1 else f"({branches[0]})")


@lru_cache(maxsize=1024)
def with_zeros(layout: Layout, parts: frozenset[str]) -> Layout:
    """The same layout with the rows of some parts declared zero."""

    def mark(factor: Factor) -> Factor:
        if not isinstance(factor, Sum):
            return factor
        return Sum(tuple(Branch(b.names, b.zero or bool(set(b.names) & parts), tuple(map(mark, b.factors))) for b in factor.branches))

    return Layout(" ".join(str(mark(factor)) for factor in layout.factors))


def stem(name: str) -> tuple[str, str]:
    suffix = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")
    return name.removesuffix(suffix), suffix


def name_of_part(fused: str, part: str) -> str:
    """The name by rule of a part that no record names.

    >>> name_of_part("h.0.attn.c_attn.weight", "q"), name_of_part("attn.in_proj_weight", "k")
    ('h.0.attn.q_proj.weight', 'attn.k_proj_weight')
    """
    begin, suffix = stem(fused)
    home, dot, _ = begin.rpartition(".")
    return f"{home}{dot}{part}_proj{suffix}"


def shown(name: str) -> str:
    r"""A name of unknown origin on one line of a terminal.

    >>> shown("a\nb\x1b")
    'a\\nb\\x1b'
    """
    return printable(name).replace("\n", "\\n")


def star(name: str) -> str:
    """A tensor's name with its numbers left out, for printing many as one."""
    return ".".join(["*" if word.isdecimal() else word for word in shown(name).split(".")])


def listed(names: Iterable[str], most: int = 3) -> str:
    """The first few names.

    >>> listed("abcd")
    'a, b, c, ...'
    """
    some = list(itertools.islice(names, most + 1))
    return ", ".join([*map(shown, some[:most]), *(["..."] if len(some) > most else [])])


def in_bytes(size: int) -> str:
    """A number of bytes for people.

    >>> in_bytes(999), in_bytes(2_830_000_000)
    ('999 B', '2.83 GB')
    """
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size} B"
