"""Draw a picture as HTML: one self-contained, escaped fragment that reads well without its colours.

Demo: python -m triptych.render_html > sample.html
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from .drawing import Block, Cell, Code, Drawable, Facts, Note, Sample, Strip, Table

COLOURS = ("#cfe8ff", "#ffe9b8", "#ecd3ff", "#d3f2d0", "#ffd6d6", "#d8f0f0", "#eee0cc", "#e3e3e3")
MOODS = {"bad": ' style="color:#b00020"', "good": ' style="color:#1b7f3b"'}


def html(picture: Drawable) -> str:
    """The picture as a `<div>`: tables for what is side by side, `<pre>` for code, ≠ on wrong columns.

    >>> html(Sample((Note("a < b", "bad"),)))
    '<div class="triptych">\\n<p style="color:#b00020">a &lt; b</p>\\n</div>'
    """
    colours: dict[str, str] = {}
    return "\n".join(['<div class="triptych">', *(line for block in picture.blocks for line in _draw(block, colours)), "</div>"])


def _draw(block: Block, colours: dict[str, str]) -> Iterator[str]:
    if isinstance(block, Facts):
        yield "<table>"
        yield from (f'<tr><th align="left">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in block.lines)
        yield "</table>"
    elif isinstance(block, Note):
        yield f"<p{MOODS.get(block.mood, '')}>{escape(block.text)}</p>"
    elif isinstance(block, Code):
        yield f"<p>{escape(block.title)}</p>"
        yield f"<pre>{escape(chr(10).join(block.lines))}</pre>"
    elif isinstance(block, Table):
        yield f'<table><caption align="left">{escape(block.title)}</caption>'
        if any(block.columns):
            yield "<tr>" + "".join(f'<th align="left">{escape(name)}</th>' for name in block.columns) + "</tr>"
        yield from ("<tr>" + "".join(_cell(cell, colours) for cell in row) + "</tr>" for row in block.rows)
        yield "</table>"
    else:
        yield from _strip(block, colours)


def _strip(strip: Strip, colours: dict[str, str]) -> Iterator[str]:
    yield '<table border="1" style="border-collapse:collapse">'
    yield "<tr><th>row</th>" + "".join(f"<td>{escape(start)}</td>" for start in strip.starts) + "</tr>"
    for name, cells in strip.lines:
        yield f'<tr><th align="left">{escape(name)}</th>' + "".join(_cell(cell, colours, "≠ ") for cell in cells) + "</tr>"
    yield "</table>"


def _cell(cell: Cell, colours: dict[str, str], mark: str = "") -> str:
    style = ""
    if cell.part:
        colour = colours.setdefault(cell.part, COLOURS[len(colours) % len(COLOURS)])
        style = f' style="background:{colour};color:#000"'
    return f"<td{style}>{mark if cell.wrong else ''}{escape(cell.text)}</td>"


if __name__ == "__main__":
    print(html(Sample()))
