"""What a picture is made of: five kinds of block, pure data. render_text and render_html draw them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

GAP = "…"
"""The text of a cell or row that stands for what is left out."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A few rows or a table entry; `part` chooses its colour, `wrong` marks it."""

    text: str
    part: str = ""
    wrong: bool = False


@dataclass(frozen=True, slots=True)
class Facts:
    """Labelled lines."""

    lines: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Note:
    """A sentence or two; `mood` is "", "good" or "bad"."""

    text: str
    mood: str = ""


@dataclass(frozen=True, slots=True)
class Strip:
    """Rows side by side: `starts[i]` is the first row of column i, every line says what that column is."""

    starts: tuple[str, ...]
    lines: tuple[tuple[str, tuple[Cell, ...]], ...]


@dataclass(frozen=True, slots=True)
class Table:
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True, slots=True)
class Code:
    title: str
    lines: tuple[str, ...]


Block = Facts | Note | Strip | Table | Code


class Drawable(Protocol):
    """Anything that can be drawn: a picture, a report."""

    @property
    def blocks(self) -> tuple[Block, ...]: ...


@dataclass(frozen=True, slots=True)
class Sample:
    """One block of each kind, for the renderers' demos."""

    blocks: tuple[Block, ...] = (
        Facts((("rows are", "h (q|k) d"), ("read as", "(q|k) h d"), ("sizes", "h=2 d=3   12 rows"))),
        Strip(
            ("0", "3", "6", "9"),
            (
                ("hold", (Cell("q0", "q"), Cell("k0", "k"), Cell("q1", "q"), Cell("k1", "k"))),
                ("read as", (Cell("q0", "q"), Cell("q1", "q", True), Cell("k0", "k", True), Cell("k1", "k"))),
            ),
        ),
        Note("6 of 12 rows are read as something else.", "bad"),
        Table(
            "what each head receives",
            ("head", "receives"),
            ((Cell("q 0", "q"), Cell("q of head 0", "q")), (Cell("q 1", "q"), Cell("k of head 0", "k", True))),
        ),
        Code("move the rows once", ("weight = weight.view(2, 2, 3, -1).transpose(0, 1).reshape(12, -1)",)),
    )
