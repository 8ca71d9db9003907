"""The page, the parser and the error texts say the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from triptych import axes, syntax
from triptych.catalog import USUAL
from triptych.errors import LayoutSyntaxError
from triptych.layout import Layout
from triptych.sizes import bind
from triptych.words import order

from .test_layout_errors import MISTAKES

PAGE = (Path(__file__).parent.parent / "docs" / "language.md").read_text()


def table(heading: str) -> list[list[str]]:
    """The cells of the table below a heading, without code marks and escapes."""
    lines = [line for line in PAGE.split(f"## {heading}\n")[1].split("\n## ")[0].split("\n") if line.startswith("|")][2:]
    return [[cell.strip().strip("`").replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_the_grammar_is_that_of_the_parser() -> None:
    grammar = re.search(r"```text\n(.*?)\n```", PAGE, re.DOTALL)[1]
    assert grammar == syntax.__doc__.split("\n\n", 1)[1].strip()


def test_the_legend_names_every_axis_with_a_meaning() -> None:
    rows = table("Axes")
    assert {row[0] for row in rows} == axes.RESERVED
    products = {row[0]: row[2] for row in rows if row[2]}
    assert products == {whole: f"{whole} = {a} * {b}" for whole, (a, b) in axes.PRODUCTS.items()}


@pytest.mark.parametrize("row", table("Layouts in use"), ids=lambda row: row[0])
def test_a_layout_of_the_page(row: list[str]) -> None:
    text, sizes, rows, words, who = row
    layout = Layout(text)
    assert str(layout) == text
    bound = bind(layout, **{name: int(size) for name, size in (word.split("=") for word in sizes.split())})
    assert layout.size(**{axis: bound[axis] for axis in layout.axes}) == int(rows)
    assert order(layout) == words
    assert dict(USUAL)[text] == who


@pytest.mark.parametrize("row", table("Usual mistakes"), ids=lambda row: row[0])
def test_a_mistake_of_the_page(row: list[str]) -> None:
    text, what, advice = row
    with pytest.raises(LayoutSyntaxError) as caught:
        Layout(text)
    assert (caught.value.what, caught.value.fields.get("try") or "") == (what, advice)
    assert any((mistake.text, mistake.what, mistake.advice or "") == (text, what, advice) for mistake in MISTAKES)


def test_the_tables_are_there() -> None:
    assert len(table("Layouts in use")) >= 12 and len(table("Usual mistakes")) >= 10
