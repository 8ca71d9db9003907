"""Every usual mistake in a layout or its sizes: the sentence, the place that is underlined, the advice."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest

from triptych.errors import LayoutError, LayoutSyntaxError, SizeError
from triptych.layout import Layout
from triptych.sizes import bind, does_not_fit


class Mistake(NamedTuple):
    """`start` and `under` are the place and the text that is underlined; `advice` is None where the sentence says it all."""

    text: str
    start: int
    under: str
    what: str
    advice: str | None


NOT_A_PART = "brackets hold parts, (q|k|v); axes need none: h d"
NOT_AN_AXIS = "parts stand first in brackets: (q h d), (q|k|v)"
EITHER_SIDE = "h = (g r), g = (t n), d = (c p): write either side"
NO_NAME = "one bracket, (q|k|v); or `_`, which adds no name: (_ g (q r|k|v) d|gate h)"
SIZES_APART = "sizes are given apart: h=32, d=128"

MISTAKES = [
    Mistake("", 0, "", "a layout cannot be empty", "h (q|k|v) d"),
    Mistake("h 3 d", 2, "3", "3 is a size, not an axis", "name the parts: (q|k|v)"),
    Mistake("(3 h d)", 1, "3", "3 is a size, not an axis", "name the parts: (q|k|v)"),
    Mistake("2 f", 0, "2", "2 is a size, not an axis", "name the parts, e.g. (k|v) or (gate|up), or write c for the two rotary components"),
    Mistake("4 (q|v|k) n d", 0, "4", "4 is a size, not an axis", "name the axis and bind its size, e.g. m=4"),
    Mistake("h (q, k, v) d", 4, ",", "a comma means nothing here", "axes are separated by spaces, parts by |"),
    Mistake("h (q|k|v) d -> (q|k|v) h d", 12, "->", "a layout is one side only", "give the two layouts as two arguments: explain(a, b)"),
    Mistake("q:(h d)|k:(g d)", 1, ":", "a colon means nothing here", "a part is followed by its axes: (q h|k g|v g) d"),
    Mistake("h*d", 1, "*", "products are written side by side", "h d, not h*d"),
    Mistake("g (q+k) d", 4, "+", "sums name their parts", "g (q r|k|v) d, not g (r+2) d"),
    Mistake("g (r+2) d", 3, "r", "'r' is an axis, and stands where a part is named", NOT_A_PART),
    Mistake("h/g d", 1, "/", "quotients are axes of their own", "h = (g r) and d = (c p): name the axis you mean, or a free one"),
    Mistake("[q|k|v] h d", 0, "[", "brackets are round", "(q|k|v)"),
    Mistake("h {q|k|v} d", 2, "{", "brackets are round", "(q|k|v)"),
    Mistake(
        "... h (q|k|v) d",
        0,
        ".",
        "a dot means nothing here",
        "nested parts get theirs by themselves: (q (rot|pass)|k); other axes of the tensor are left out",
    ),
    Mistake(
        "h (q|k|v) d @ 1",
        12,
        "@",
        "an axis is no part of a layout",
        "weights [in, out]: axis=1; on the command line --layout 'NAME_GLOB=LAYOUT @ 1'",
    ),
    Mistake("h d!", 3, "!", "'!' means nothing here", "axes are words, parts stand in ( | )"),
    Mistake("(h d)", 1, "h", "'h' is an axis, and stands where a part is named", NOT_A_PART),
    Mistake("h q|k|v d", 0, "h", "'h' is an axis, and stands where a part is named", NOT_A_PART),
    Mistake("q h d", 0, "q", "'q' names a part, and stands here as an axis", NOT_AN_AXIS),
    Mistake("h (q k|v) d", 5, "k", "'k' names a part, and stands here as an axis", NOT_AN_AXIS),
    Mistake("h _ d", 2, "_", "'_' names a part, and stands here as an axis", NOT_AN_AXIS),
    Mistake("h=4 (q|k|v) d", 1, "=", "'h' is an axis here; only parts have '='", SIZES_APART),
    Mistake("h (q|k|v d", 2, "(", "this bracket is never closed", None),
    Mistake("h (q|k|v)) d", 9, ")", "this bracket was never opened", None),
    Mistake("h (q||v) d", 5, "|", "a part is missing here", "(q|k|v)"),
    Mistake("h () d", 3, ")", "a part is missing here", "(q|k|v)"),
    Mistake("(q|k|", 5, "", "a part is missing here", "(q|k|v)"),
    Mistake("(q|k=|v) d", 5, "|", "a part is missing here", "k=v says that k and v are one tensor, k=0 that k is zero"),
    Mistake("(q|k=1) d", 5, "1", "a part is missing here", "k=v says that k and v are one tensor, k=0 that k is zero"),
    Mistake("((q|k) d|gate h)", 1, "(", "a branch begins with the name of its part", NO_NAME),
    Mistake("(_=q|k) d", 1, "_", "`_` has no name and no role", None),
    Mistake("(_=0 h|k) d", 1, "_", "`_` has no name and no role", None),
    Mistake("(q|k|q) h d", 5, "q", "part 'q' stands twice", "each part has one name of its own: (q1|q2|k)"),
    Mistake("(q|k=q) h d", 5, "q", "part 'q' stands twice", "each part has one name of its own: (q1|q2|k)"),
    Mistake("h d d", 4, "d", "axis 'd' stands twice", "leave one out"),
    Mistake("h (q h|k) d", 5, "h", "axis 'h' stands twice on the way to part 'q'", "leave one out"),
    Mistake("h (q|k|v) g d", 10, "g", "axes 'h' and 'g' number the same heads or dims on the way to part 'q'", EITHER_SIDE),
    Mistake("(q g r|k g t) d", 11, "t", "axes 'g' and 't' number the same heads or dims on the way to part 'k'", EITHER_SIDE),
    Mistake("h c p d", 6, "d", "axes 'c' and 'd' number the same heads or dims", EITHER_SIDE),
    Mistake("(" * 1 + "a (" * 40 + "b" + ")" * 41, 96, "(", "brackets nested too deeply", None),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=[m.text[:30] or "empty" for m in MISTAKES])
def test_a_mistake_is_named_underlined_and_advised(mistake: Mistake) -> None:
    with pytest.raises(LayoutSyntaxError, match=re.escape(mistake.what)) as caught:
        Layout(mistake.text)
    error = caught.value
    assert error.what == mistake.what
    assert error.span[0] == mistake.start
    assert error.source[slice(*error.span)] == mistake.under
    assert error.fields.get("try") == mistake.advice


@pytest.mark.parametrize("mistake", MISTAKES, ids=[m.text[:30] or "empty" for m in MISTAKES])
def test_the_message_is_at_most_five_lines_with_the_mark_under_the_mistake(mistake: Mistake) -> None:
    with pytest.raises(LayoutSyntaxError) as caught:
        Layout(mistake.text)
    lines = caught.value.text().split("\n")
    assert lines[0] == f"LayoutSyntaxError: {mistake.what}" and 3 <= len(lines) <= 5
    assert lines[1] == f"  layout   {mistake.text}".rstrip()
    assert lines[2] == " " * (11 + mistake.start) + "^" * max(1, len(mistake.under))
    assert lines[3:] == ([] if mistake.advice is None else [f"  try      {mistake.advice}"])


@pytest.mark.parametrize(
    ("value", "match"), [(3, "a layout is text, not int"), ("h " * 4000, "a layout of 8000 characters"), (None, "not NoneType")]
)
def test_what_is_no_layout_at_all(value: object, match: str) -> None:
    with pytest.raises(LayoutSyntaxError, match=match):
        Layout(value)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["(" + "|".join(f"p{i}" for i in range(257)) + ")", " ".join(f"(a{i}=b{i})" for i in range(9))])
def test_too_many_parts(text: str) -> None:
    with pytest.raises(LayoutSyntaxError, match="more than 256 parts"):
        Layout(text)


@pytest.mark.parametrize("word", ["x{}", "(p{})", "x{0} (p{0})"])
def test_a_way_that_is_too_long(word: str) -> None:
    def ways(count: int) -> str:
        return " ".join(word.format(i) for i in range(count))

    most = 64 // len(word.split())
    assert len(Layout(ways(most)).paths) == 1
    with pytest.raises(LayoutSyntaxError, match="more than 64 axes and brackets on the way to a part"):
        Layout(ways(most + 1))


SIZES = [
    ("h (q|k|v) d", {}, "sizes are missing", {"expected": "sizes for h, d", "try": "give h and d"}),
    ("h (q|k|v) d", {"h": 4}, "sizes are missing", {"found": "h=4", "try": "give d"}),
    ("h (q|k|v) d", {"h": 4, "d": 0}, "the size of 'd' must be a positive whole number", {"found": "d=0"}),
    ("h (q|k|v) d", {"h": 4.0, "d": 2}, "the size of 'h' must be a positive whole number", {"found": "h=4.0"}),
    ("h (q|k|v) d", {"h": True, "d": 2}, "the size of 'h' must be a positive whole number", {"found": "h=True"}),
    ("h (q dk|k dk|v dv)", {"h": 4, "dx": 2, "dv": 3}, "unknown axis 'dx'", {"try": "did you mean 'd"}),
    ("g (q r|k|v) d", {"h": 10, "g": 4, "d": 8}, "h must be a multiple of g", {"equation": "10 = 4 * 2 + 2"}),
    ("g (q r|k|v) d", {"h": 10, "g": 4, "r": 3, "d": 8}, "sizes contradict each other: h = g * r", {"equation": "4 * 3 = 12, not 10"}),
    ("t (q n r|k n|v n) d", {"t": 2, "m": 3, "n": 2, "r": 2, "d": 4}, "two sizes for one axis", {"found": "2 and 3"}),
    ("h p c", {"h": 4, "d": 7}, "d must be a multiple of c", {"equation": "7 = 2 * 3 + 1"}),
    ("h (q|k|v) d", {"h": 4, "rows": 100}, "no size of d gives 100 rows", {"equation": "100 = 12 * 8 + 4"}),
    (
        "h (q|k|v) d",
        {"h": 4, "d": 32, "rows": 400},
        "rows do not fill the layout",
        {"found": "400 rows", "layout": "4*(1+1+1)*32 = 384 rows"},
    ),
    (
        "h (q|k|v) d",
        {"h": 4, "d": 32, "rows": 768},
        "rows do not fill the layout",
        {"found": "768 rows = 2 * 384", "try": "d=64 or h=8 fits"},
    ),
]


@pytest.mark.parametrize(("text", "sizes", "what", "fields"), SIZES, ids=[f"{t} {s}" for t, s, _, _ in SIZES])
def test_a_size_that_is_wrong_is_named_with_its_equation(text: str, sizes: dict[str, int], what: str, fields: dict[str, str]) -> None:
    with pytest.raises(SizeError, match=re.escape(what)) as caught:
        bind(text, **sizes)
    for name, value in fields.items():
        assert value in str(caught.value.fields[name]), caught.value.text()
    assert set(caught.value.fields) <= {"layout", "found", "expected", "equation", "try"}


def test_a_tensor_that_does_not_fit_names_its_shape() -> None:
    layout = Layout("g (q r|k|v) d")
    error = does_not_fit(layout, 12288, bind(layout, g=8, r=4, d=128), tensor="query_key_value.weight", shape=(12288, 4096))
    assert error.text().split("\n") == [
        "SizeError: rows do not fill the layout",
        "  tensor   query_key_value.weight",
        "  layout   g (q r|k|v) d with g=8 r=4 d=128   -> 8*(4+1+1)*128 = 6144 rows",
        "  found    (12288, 4096)   -> 12288 rows = 2 * 6144",
        "  try      d=256 or r=10 or g=16 fits this layout; `triptych detect FILE` ranks all that fit",
    ]
    assert isinstance(error, LayoutError) and error.exit_code == 2
