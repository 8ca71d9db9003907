"""Drawing: what is said is there at any width, in ASCII, in colour and in HTML; nothing breaks out of it."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from triptych.drawing import GAP, Cell, Code, Facts, Note, Sample, Strip, Table
from triptych.picture import explain
from triptych.render_html import html
from triptych.render_text import text

ANSI = re.compile(r"\x1b\[[0-9;]*m")
PICTURES = [
    explain("h (q|k|v) d", h=4, d=32),
    explain("g (q r|k|v) d", h=128, g=8, d=128),
    explain("h d (q|k|v)", h=128, d=128),
    explain("h (q|k|v) (rot c p|pass u)", h=16, p=24, u=32),
    explain("h (q|k|v) d", "(q|k|v) h d", h=4, d=32),
    explain("(q|k|v) h d", "(q|k|v) d h", h=4, d=32),
    explain("(q h|k g|v g) d", "g (q r|k|v) d", h=64, g=8, d=128),
    explain("(q h|k g|v g) c p", "(q h|k g|v g) p c", h=64, g=8, d=128),
    explain("h (q|k|v) (rot c p|pass u)", "h (q|k|v) (rot p c|pass u)", h=16, p=24, u=32),
    explain("f (gate|up)", "(gate|up) f", f=14336),
    explain("(q|k=v) h d", "(q|k|v) h d", h=4, d=32),
]
IDS = [f"{p.layout} {p.reading.read_as if p.reading else ''}" for p in PICTURES]


def code(picture: object) -> set[str]:
    return {"    " + line for block in picture.blocks if isinstance(block, Code) for line in block.lines}


@pytest.mark.parametrize("width", [60, 80, 100, 132])
@pytest.mark.parametrize("picture", PICTURES, ids=IDS)
def test_lines_keep_to_the_width(picture: object, width: int) -> None:
    for line in text(picture, width=width).split("\n"):
        in_table = width < 80 and line.startswith("  ") and "  " in line.strip()
        assert len(line) <= width or line in code(picture) or in_table, line
        assert line == line.rstrip()


@pytest.mark.parametrize("picture", PICTURES, ids=IDS)
def test_80_columns_show_every_head_column_and_60_no_less_than_its_ends(picture: object) -> None:
    for width in (40, 60, 80):
        drawn = text(picture, width=width)
        for strip in (block for block in picture.blocks if isinstance(block, Strip)):
            for _, cells in strip.lines:
                assert cells[0].text in drawn and cells[-1].text in drawn
                if GAP not in [cell.text for cell in cells]:
                    assert all(cell.text in drawn for cell in cells)


@pytest.mark.parametrize("picture", PICTURES, ids=IDS)
def test_ascii_says_the_same(picture: object) -> None:
    plain = text(picture, ascii=True)
    assert plain.isascii()
    for block in picture.blocks:
        if isinstance(block, Note):
            assert "".join(block.text.split()) in "".join(plain.split())


@pytest.mark.parametrize("picture", PICTURES, ids=IDS)
def test_colour_only_when_asked_and_only_colour(picture: object) -> None:
    plain, coloured = text(picture), text(picture, color=True)
    assert "\x1b" not in plain and "\x1b" in coloured
    strip = [line.rstrip() for line in ANSI.sub("", coloured).split("\n")]
    assert strip == plain.split("\n")


def test_a_part_keeps_its_colour() -> None:
    coloured = text(explain("h (q|k|v) d", "(q|k|v) h d", h=4, d=32), color=True)
    colours = {name: set(re.findall(rf"\x1b\[(\d+)(?:;7)?m{name}\d?\x1b", coloured)) for name in "qkv"}
    assert all(len(found) == 1 for found in colours.values()) and len({*map(tuple, colours.values())}) == 3


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.words = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.mark.parametrize("picture", PICTURES, ids=IDS)
def test_html_is_balanced_and_complete(picture: object) -> None:
    page = Page()
    page.feed(html(picture))
    assert not page.open and page.tags <= {"div", "table", "tr", "th", "td", "caption", "p", "pre"}
    for block in picture.blocks:
        for said in [block.text] if isinstance(block, Note) else block.lines if isinstance(block, Code) else []:
            assert said in page.words
        for row in block.rows if isinstance(block, Table) else [cells for _, cells in block.lines] if isinstance(block, Strip) else []:
            assert all(cell.text in page.words for cell in row)
    assert ("≠" in page.words) == any(cell.wrong for b in picture.blocks if isinstance(b, Strip) for _, line in b.lines for cell in line)
    assert picture._repr_html_() == html(picture)


def test_html_escapes_everything() -> None:
    bad = "<b>&\"'"
    cell = Cell(bad, bad, True)
    blocks = (Facts(((bad, bad),)), Note(bad, "bad"), Strip((bad,), ((bad, (cell,)),)), Table(bad, (bad,), ((cell,),)), Code(bad, (bad,)))
    drawn = html(Sample(blocks))
    assert "<b>" not in drawn and drawn.count("&lt;b&gt;&amp;&quot;&#x27;") == 11


def test_nothing_from_outside_reaches_the_terminal() -> None:
    evil = "a\x1b[31mb"
    drawn = text(Sample((Facts((("tensor", evil),)), Note(evil), Code(evil, (evil,)), Table(evil, ("x",), ((Cell(evil),),)))))
    assert "\x1b" not in drawn and "a\\x1b[31mb" in drawn


@pytest.mark.parametrize("module", ["render_text", "render_html", "render_code"])
def test_every_renderer_has_a_demo(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", f"triptych.{module}"], capture_output=True, text=True, check=True)
    assert "weight.view(" in done.stdout and "\x1b" not in done.stdout
