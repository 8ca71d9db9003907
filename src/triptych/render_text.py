"""Draw a picture as text: boxes at any width, ASCII when asked, ANSI colours only when asked.

Demo: python -m triptych.render_text
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator, Sequence

from .drawing import GAP, Block, Cell, Code, Drawable, Facts, Note, Sample, Strip, Table
from .errors import printable

COLOURS = (36, 33, 35, 32, 34, 96, 93, 95)
BAD, GOOD, DIM, BOLD = 31, 32, 2, 1
TO_ASCII = str.maketrans({
    "┌": "+", "┬": "+", "┐": "+", "├": "+", "┼": "+", "┤": "+", "└": "+", "┴": "+", "┘": "+", "─": "-", "│": "|",
    "…": "...", "≠": "!=", "·": "-", "×": "x",
})  # fmt: skip


def text(picture: Drawable, width: int = 80, ascii: bool = False, color: bool = False) -> str:
    """The picture in lines of at most `width` columns where words allow it; code lines are never cut.

    >>> print(text(Sample(Sample().blocks[:3]), ascii=True))
    rows are   h (q|k) d
    read as    (q|k) h d
    sizes      h=2 d=3   12 rows
    <BLANKLINE>
             0    3    6    9
            +----+----+----+----+
    hold    | q0 | k0 | q1 | k1 |
    read as | q0 | q1 | k0 | k1 |
            +----+----+----+----+
                   !=   !=
    <BLANKLINE>
    6 of 12 rows are read as something else.
    """
    paint = _Paint(picture.blocks, color, ascii)
    return "\n\n".join("\n".join(line.rstrip() for line in _draw(block, max(width, 24), paint)) for block in picture.blocks)


class _Paint:
    """Text as it is printed: translated to ASCII, padded, coloured by part in order of appearance."""

    def __init__(self, blocks: Sequence[Block], color: bool, ascii: bool) -> None:
        self.color, self.ascii = color, ascii
        self.parts: dict[str, int] = {}
        for block in blocks:
            rows = [cells for _, cells in block.lines] if isinstance(block, Strip) else block.rows if isinstance(block, Table) else ()
            for cell in (cell for row in rows for cell in row if cell.part):
                self.parts.setdefault(cell.part, len(self.parts))

    def plain(self, text: str) -> str:
        shown = printable(text)
        return shown.translate(TO_ASCII) if self.ascii else shown

    def __call__(self, text: str, *codes: int) -> str:
        shown = self.plain(text)
        return f"\x1b[{';'.join(map(str, codes))}m{shown}\x1b[0m" if self.color and codes and text.strip() else shown

    def cell(self, cell: Cell, width: int, centre: bool = False) -> str:
        shown = self.plain(cell.text)
        filled = shown.center(width) if centre else shown.ljust(width)
        if not self.color or not cell.part:
            return filled
        codes = [COLOURS[self.parts[cell.part] % len(COLOURS)], *([7] if cell.wrong and centre else [])]
        return filled.replace(shown, f"\x1b[{';'.join(map(str, codes))}m{shown}\x1b[0m", 1)


def _draw(block: Block, width: int, paint: _Paint) -> Iterator[str]:
    if isinstance(block, Facts):
        label = max(len(name) for name, _ in block.lines) + 3
        for name, value in block.lines:
            first, *more = textwrap.wrap(
                paint.plain(value), max(16, width - label), break_long_words=False, break_on_hyphens=False, drop_whitespace=False
            ) or [""]
            yield paint(name.ljust(label), DIM) + first
            yield from (" " * label + line.strip() for line in more)
    elif isinstance(block, Note):
        yield from _wrapped(block.text, width, paint, *{"bad": (BAD,), "good": (GOOD,)}.get(block.mood, ()))
    elif isinstance(block, Code):
        yield from _wrapped(block.title, width, paint, BOLD)
        yield from ("    " + paint.plain(line) for line in block.lines)
    elif isinstance(block, Table):
        yield from _table(block, width, paint)
    else:
        yield from _strip(block, width, paint)


def _wrapped(text: str, width: int, paint: _Paint, *codes: int) -> Iterator[str]:
    yield from (paint(line, *codes) for line in textwrap.wrap(paint.plain(text), width, break_long_words=False, break_on_hyphens=False))


def _table(table: Table, width: int, paint: _Paint) -> Iterator[str]:
    yield from _wrapped(table.title, width, paint, BOLD)
    rows = [[paint.plain(cell.text) for cell in row] for row in table.rows]
    widths = [max([len(title), *(len(row[i]) for row in rows if i < len(row))]) for i, title in enumerate(table.columns)]
    last = max(16, width - 2 - sum(w + 2 for w in widths[:-1]))
    if any(table.columns):
        yield paint("  " + "  ".join(title.ljust(w) for title, w in zip(table.columns, widths, strict=True)), DIM)
    for row in table.rows:
        *front, end = row
        line = "  " + "".join(paint.cell(cell, w) + "  " for cell, w in zip(front, widths, strict=False))
        lines = textwrap.wrap(paint.plain(end.text), last, break_long_words=False, break_on_hyphens=False) or [""]
        yield line + paint.cell(Cell(lines[0], end.part, end.wrong), 0)
        yield from (" " * (2 + sum(w + 2 for w in widths[:-1])) + paint.cell(Cell(more, end.part, end.wrong), 0) for more in lines[1:])


def _strip(strip: Strip, width: int, paint: _Paint) -> Iterator[str]:
    """Boxes. Where they are wider than the width, the gap swallows columns before it; without a gap they are cut into several strips."""
    label = max(len(name) for name, _ in strip.lines) + 1
    longest = [max(len(paint.plain(cells[i].text)) for _, cells in strip.lines) for i in range(len(strip.starts))]
    gaps = [strip.lines[0][1][i].text == GAP for i in range(len(longest))]
    kept = list(range(len(longest)))
    roomy = [w if gap else w + 2 for w, gap in zip(longest, gaps, strict=True)]
    for inner in (roomy, longest):
        inner = [max(w, len(start) + 1) for w, start in zip(inner, strip.starts, strict=True)]
        if label + 1 + sum(w + 1 for w in inner) <= width:
            break
    while True in gaps and label + 1 + sum(inner[i] + 1 for i in kept) > width:
        before = kept.index(gaps.index(True)) - 1
        if before < 3:
            break
        del kept[before]
    while kept:
        room, end = width - label - 1, 0
        while end < len(kept) and (room >= inner[kept[end]] + 1 or not end):
            room -= inner[kept[end]] + 1
            end += 1
        yield from _boxes(strip, kept[:end], inner, label, paint)
        kept = kept[end:]
        if kept:
            yield ""


def _boxes(strip: Strip, columns: list[int], inner: list[int], label: int, paint: _Paint) -> Iterator[str]:
    pad = " " * label
    yield pad + paint("".join(" " + strip.starts[i].ljust(inner[i]) for i in columns), DIM)
    yield pad + paint.plain("┌" + "┬".join("─" * inner[i] for i in columns) + "┐")
    bar = paint.plain("│")
    for name, cells in strip.lines:
        yield paint(name.ljust(label), DIM) + bar + bar.join(paint.cell(cells[i], inner[i], centre=True) for i in columns) + bar
    yield pad + paint.plain("└" + "┴".join("─" * inner[i] for i in columns) + "┘")
    marks = [any(cells[i].wrong for _, cells in strip.lines) for i in columns]
    if any(marks):
        yield pad + "".join(
            " " + paint(paint.plain("≠").center(inner[i]) if bad else " " * inner[i], BAD) for i, bad in zip(columns, marks, strict=True)
        )


if __name__ == "__main__":
    print(text(Sample(), color=sys.stdout.isatty()))
