"""Text -> tree: the grammar of the layout language.

layout  := product | sum             a sum at top level needs no brackets
product := factor+                   slowest first
factor  := AXIS | "(" sum ")"
sum     := branch ("|" branch)*      concatenation, in this order
branch  := NAME factor*              the first word of a branch names the part
NAME    := PART                      q, gate, B, ...
         | PART ("=" PART)+          one tensor in several roles: k=v
         | PART "=" "0"              rows that are there and hold zero: k=0
         | "_"                       adds no name: _ g (q r|k|v) d|gate h
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from . import axes
from .errors import LayoutSyntaxError

MAX_TEXT, MAX_DEPTH, MAX_PARTS, MAX_WAY = 4096, 32, 256, 64


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis, by its name."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Branch:
    """`names` has one entry, several for an alias (k=v), none for `_`."""

    names: tuple[str, ...]
    zero: bool
    factors: tuple[Factor, ...]

    def __str__(self) -> str:
        name = "=".join(self.names) + ("=0" if self.zero else "") or "_"
        return " ".join([name, *map(str, self.factors)])


@dataclass(frozen=True, slots=True)
class Sum:
    """Branches one after the other."""

    branches: tuple[Branch, ...]

    def __str__(self) -> str:
        return f"({'|'.join(map(str, self.branches))})"


Factor = Axis | Sum


@dataclass(frozen=True, slots=True)
class Path:
    """One part of a layout: the axes from the outermost to the innermost.

    `names` are its dotted names (several when aliased); `heads` and `dims` are the axes that number head and dim,
    slowest digit first, which need not be their order in the rows.
    """

    names: tuple[str, ...]
    zero: bool
    axes: tuple[str, ...]

    @property
    def heads(self) -> tuple[str, ...]:
        return axes.head_axes(self.axes)

    @property
    def dims(self) -> tuple[str, ...]:
        return axes.dim_axes(self.axes)


def text_of(factors: tuple[Factor, ...]) -> str:
    """The text of a product; `parse` reads the same factors out of it."""
    if len(factors) == 1 and isinstance(factors[0], Sum) and len(factors[0].branches) > 1:
        return str(factors[0])[1:-1]
    return " ".join(map(str, factors))


def parse(source: str) -> tuple[Factor, ...]:
    """The factors of a layout. Raises LayoutSyntaxError, which underlines the mistake."""
    if not isinstance(source, str):
        raise LayoutSyntaxError(f"a layout is text, not {type(source).__name__}", repr(source)[:60], (0, 1))
    return _parsed(source)


@lru_cache(maxsize=1024)
def _parsed(source: str) -> tuple[Factor, ...]:
    return _Parser(source).layout()


def dotted(words: Iterable[str]) -> str:
    """The name of a nested part. q, k, v, gate, up lead, so that `(q|k|v) (rot|pass)` and `(rot|pass) (q|k|v)` name the same parts.

    >>> dotted(["rot", "q"])
    'q.rot'
    """
    flat = [word for name in words for word in name.split(".") if word]
    return ".".join(sorted(flat, key=lambda word: word not in axes.FIRST_PARTS))


def paths(factors: tuple[Factor, ...]) -> Iterator[Path]:
    """All ways through a product: one branch of each sum, with the dotted names and the axes met on the way."""
    if not factors:
        yield Path(("",), False, ())
        return
    first, rest = factors[0], factors[1:]
    if isinstance(first, Axis):
        for tail in paths(rest):
            yield Path(tail.names, tail.zero, (first.name, *tail.axes))
        return
    for branch in first.branches:
        for path in paths((*branch.factors, *rest)):
            names = [dotted(pair) for pair in itertools.product(branch.names or ("",), path.names)]
            yield Path(tuple(names), branch.zero or path.zero, path.axes)


_TOKEN = re.compile(r"\s*(?:([A-Za-z_][A-Za-z0-9_]*)|([0-9]+)|(->)|(.))", re.DOTALL)
_MISTAKES = {
    ",": ("a comma means nothing here", "axes are separated by spaces, parts by |"),
    "->": ("a layout is one side only", "give the two layouts as two arguments: explain(a, b)"),
    ":": ("a colon means nothing here", "a part is followed by its axes: (q h|k g|v g) d"),
    "*": ("products are written side by side", "h d, not h*d"),
    "+": ("sums name their parts", "g (q r|k|v) d, not g (r+2) d"),
    "/": ("quotients are axes of their own", "h = (g r) and d = (c p): name the axis you mean, or a free one"),
    ".": ("a dot means nothing here", "nested parts get theirs by themselves: (q (rot|pass)|k); other axes of the tensor are left out"),
    "@": ("an axis is no part of a layout", "weights [in, out]: axis=1; on the command line --layout 'NAME_GLOB=LAYOUT @ 1'"),
    "[": ("brackets are round", "(q|k|v)"),
    "{": ("brackets are round", "(q|k|v)"),
    "3": ("3 is a size, not an axis", "name the parts: (q|k|v)"),
    "2": ("2 is a size, not an axis", "name the parts, e.g. (k|v) or (gate|up), or write c for the two rotary components"),
}


@dataclass(frozen=True, slots=True)
class _Word:
    kind: str  # "name", "number", or the character itself; "" at the end
    text: str
    span: tuple[int, int]


class _Parser:
    def __init__(self, source: str) -> None:
        if len(source) > MAX_TEXT:
            raise LayoutSyntaxError(f"a layout of {len(source)} characters", source[:60] + "...", (0, 60))
        self.source = source
        self.words = self._words()
        self.at = 0
        self.depth = 0

    def _words(self) -> list[_Word]:
        words = []
        for match in _TOKEN.finditer(self.source.rstrip()):
            kinds = ("name", "number", match[3] or "", match[4] or "")
            index = next(i for i in range(4) if match[i + 1] is not None)
            words.append(_Word(kinds[index], match[index + 1], match.span(index + 1)))
        end = len(self.source.rstrip())
        return [*words, _Word("", "the end", (end, end + 1))]

    @property
    def word(self) -> _Word:
        return self.words[self.at]

    def fail(self, what: str, word: _Word | None = None, try_: str | None = None) -> LayoutSyntaxError:
        return LayoutSyntaxError(what, self.source, (word or self.word).span, try_)

    def take(self) -> _Word:
        word = self.word
        self.at += 1
        return word

    def layout(self) -> tuple[Factor, ...]:
        """The whole text, by the rule `layout`. This and the rules below raise LayoutSyntaxError."""
        if not self.word.kind:
            raise self.fail("a layout cannot be empty", try_="h (q|k|v) d")
        if self._top_level_bar():
            factors: tuple[Factor, ...] = (self.sum(),)
        else:
            factors = self.product()
        if self.word.kind == ")":
            raise self.fail("this bracket was never opened")
        if self.word.kind:
            raise self._unexpected()
        _check(factors, self)
        return factors

    def _top_level_bar(self) -> bool:
        depth = 0
        for word in self.words:
            depth += (word.kind in ("(", "[", "{")) - (word.kind in (")", "]", "}"))
            if word.kind == "|" and depth == 0:
                return True
        return False

    def product(self) -> tuple[Factor, ...]:
        """Axes and sums in brackets, up to what closes or separates them."""
        factors: list[Factor] = []
        while self.word.kind in ("name", "("):
            if self.word.kind == "name":
                word = self.take()
                if word.text in ("q", "k", "v", "_"):
                    raise self.fail(
                        f"{word.text!r} names a part, and stands here as an axis", word, "parts stand first in brackets: (q h d), (q|k|v)"
                    )
                if self.word.kind == "=":
                    raise self.fail(f"{word.text!r} is an axis here; only parts have '='", try_="sizes are given apart: h=32, d=128")
                factors.append(Axis(word.text))
                continue
            opening = self.take()
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise self.fail("brackets nested too deeply", opening)
            inner = self.sum()
            if self.word.kind != ")":
                raise self.fail("this bracket is never closed", opening) if not self.word.kind else self._unexpected()
            self.take()
            self.depth -= 1
            factors.append(inner)
        if self.word.kind not in ("", ")", "|"):
            raise self._unexpected()
        return tuple(factors)

    def sum(self) -> Sum:
        branches = [self.branch()]
        while self.word.kind == "|":
            self.take()
            branches.append(self.branch())
        return Sum(tuple(branches))

    def branch(self) -> Branch:
        """The names of a part, or `_`, and its factors."""
        word = self.word
        if word.kind == "(":
            raise self.fail(
                "a branch begins with the name of its part",
                try_="one bracket, (q|k|v); or `_`, which adds no name: (_ g (q r|k|v) d|gate h)",
            )
        if word.kind != "name":
            raise self._unexpected() if word.kind not in ("|", ")", "") else self.fail("a part is missing here", try_="(q|k|v)")
        names, zero = [self._part()], False
        while self.word.kind == "=":
            self.take()
            if self.word.text == "0":
                self.take()
                zero = True
                break
            names.append(self._part())
        if names == ["_"] and not zero:
            names = []
        elif "_" in names:
            raise self.fail("`_` has no name and no role", word)
        return Branch(tuple(names), zero, self.product())

    def _part(self) -> str:
        word = self.take()
        if word.kind != "name":
            raise self.fail("a part is missing here", word, "k=v says that k and v are one tensor, k=0 that k is zero")
        if word.text in axes.RESERVED:
            raise self.fail(
                f"{word.text!r} is an axis, and stands where a part is named",
                word,
                "brackets hold parts, (q|k|v); axes need none: h d",
            )
        return word.text

    def _unexpected(self) -> LayoutSyntaxError:
        word = self.word
        if word.kind == "number":
            what, try_ = _MISTAKES.get(word.text, (f"{word.text} is a size, not an axis", "name the axis and bind its size, e.g. m=4"))
        else:
            what, try_ = _MISTAKES.get(word.kind, (f"{word.text!r} means nothing here", "axes are words, parts stand in ( | )"))
        return self.fail(what, try_=try_)


def _check(factors: tuple[Factor, ...], parser: _Parser) -> None:
    """No part twice, no axis twice on the way to a part: then all labels differ."""
    if _ways(factors) > MAX_PARTS:
        raise parser.fail(f"more than {MAX_PARTS} parts", parser.words[0])
    if _longest(factors) > MAX_WAY:
        raise parser.fail(f"more than {MAX_WAY} axes and brackets on the way to a part", parser.words[0])
    names: set[str] = set()
    for path in paths(factors):
        for name in path.names:
            if name in names:
                raise _twice(parser, name.split(".")[-1], f"part {name!r} stands twice", "each part has one name of its own: (q1|q2|k)")
            names.add(name)
        pair = axes.clash(path.axes)
        if pair:
            what = (
                f"axis {pair[0]!r} stands twice"
                if pair[0] == pair[1]
                else f"axes {pair[0]!r} and {pair[1]!r} number the same heads or dims"
            )
            where = f" on the way to part {path.names[0]!r}" if path.names[0] else ""
            advice = "leave one out" if pair[0] == pair[1] else "h = (g r), g = (t n), d = (c p): write either side"
            raise _twice(parser, pair[1], what + where, advice)


def _ways(factors: tuple[Factor, ...]) -> int:
    """How many parts there are, every name of one counted."""
    sums = (factor.branches for factor in factors if isinstance(factor, Sum))
    return math.prod(sum(max(1, len(branch.names)) * _ways(branch.factors) for branch in branches) for branches in sums)


def _longest(factors: tuple[Factor, ...]) -> int:
    """Axes and brackets on the longest way to a part."""
    sums = (factor.branches for factor in factors if isinstance(factor, Sum))
    return len(factors) + sum(max(_longest(branch.factors) for branch in branches) for branches in sums)


def _twice(parser: _Parser, name: str, what: str, try_: str) -> LayoutSyntaxError:
    last = [word for word in parser.words if word.text == name] or [parser.words[0]]
    return parser.fail(what, last[-1], try_)
