"""What a picture says is compared, row by row, with the slow listing; its pictures are kept as text."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from functools import cache

import pytest

from triptych.drawing import GAP, Code, Facts, Note, Strip, Table
from triptych.errors import IncompatibleError, LayoutSyntaxError, SizeError
from triptych.layout import Layout, Row
from triptych.picture import Picture, explain
from triptych.render_code import convert_lines, part_line, read_lines
from triptych.sizes import Sizes, bind

from .packings import PACKINGS
from .test_render_code import GROUPS, LAYOUTS, bound

ALONE = [("r g d", {"r": 3, "g": 2, "d": 4}), ("h p c", {"h": 3, "p": 5}), ("d", {"d": 7})]
SAME_SIZE = [(a, b, sizes) for sizes, texts in GROUPS.values() for a, b in itertools.permutations(texts, 2)]


@cache
def listing(text: str, sizes: Sizes) -> list[Row]:
    layout = Layout(text)
    return layout.rows(**{axis: sizes[axis] for axis in layout.axes})


def block(picture: Picture, kind: type) -> object:
    return next(one for one in picture.blocks if isinstance(one, kind))


def check_strip(strip: Strip, lists: list[list[Row]]) -> None:
    """Every column names the row that it starts with, in every line."""
    for i, start in enumerate(strip.starts):
        if not start:
            assert all(cells[i].text == GAP for _, cells in strip.lines)
            continue
        for (_, cells), rows in zip(strip.lines, lists, strict=True):
            part, head, dim = re.fullmatch(r"(?:rows|h(?=\d)|(\D*?))(\d*)(?::(\d+)(?:-\d+)?)?", cells[i].text).groups(default="")
            row = rows[int(start)]
            assert (part, int(head or 0), int(dim or 0)) == row
            assert cells[i].wrong in (False, len(lists) > 1 and lists[0][int(start)] != row)
    if len(lists) > 1:
        for i, start in enumerate(strip.starts):
            assert not start or strip.lines[-1][1][i].wrong == (lists[0][int(start)] != lists[1][int(start)])


@pytest.mark.parametrize(("text", "sizes"), LAYOUTS + ALONE, ids=[text for text, _ in LAYOUTS + ALONE])
def test_one_layout_names_rows_as_the_listing_does(text: str, sizes: dict[str, int]) -> None:
    sized = bound(sizes, text)
    layout, rows = Layout(text), listing(text, sized)
    picture = explain(text, **{axis: sized[axis] for axis in layout.axes})
    assert picture.rows == len(rows) and picture.reading is None
    check_strip(block(picture, Strip), [rows])
    for cells in block(picture, Table).rows:
        name, grid, formula, *spans = (cell.text for cell in cells)
        mine = [(row.head, row.dim, i) for i, row in enumerate(rows) if row.part == name.replace("rows", "")]
        assert grid == f"{max(mine)[0] + 1} x {max(dim for _, dim, _ in mine) + 1}"
        path = next(path for path in layout.paths if name.replace("rows", "") in path.names)
        axes = [dict(zip(path.axes, index, strict=True)) for index in itertools.product(*(range(sized[axis]) for axis in path.axes))]
        assert sorted(eval(formula, {}, values) for values in axes) == sorted(i for _, _, i in mine)
        last = max(mine)[0]
        for spoken, head in ((spans[0], 0), (spans[-1], last)):
            mentioned = [int(number) for number in re.findall(r"\d+", spoken)]
            of_head = [i for h, _, i in sorted(mine) if h == head]
            assert not mentioned or (mentioned[0], mentioned[-1]) == (of_head[0], of_head[-1])
    assert picture.code["read"] == read_lines(layout, picture.sizes)
    for name in layout.parts:
        assert picture.code[f"weight {name}".rstrip()] == (part_line(layout, picture.sizes, name),)


@pytest.mark.parametrize(("a", "b", "sizes"), SAME_SIZE, ids=[f"{a} read as {b}" for a, b, _ in SAME_SIZE])
def test_two_layouts_give_every_head_what_the_listing_says(a: str, b: str, sizes: dict[str, int]) -> None:
    sized = bound(sizes, a, b)
    picture = explain(a, b, **{axis: sized[axis] for axis in (*Layout(a).axes, *Layout(b).axes)})
    given, wanted = listing(a, sized), listing(b, sized)
    reading = picture.reading
    assert reading.wrong == sum(x != y for x, y in zip(given, wanted, strict=True))
    check_strip(block(picture, Strip), [given, wanted])
    heads: dict[tuple[str, int], list[tuple[Row, Row]]] = {}
    for x, y in zip(given, wanted, strict=True):
        heads.setdefault((y.part, y.head), []).append((x, y))
    assert {(one.part, one.head or 0) for one in reading.received} == set(heads)
    for one in reading.received:
        pairs = heads[one.part, one.head or 0]
        assert (one.rows, one.right) == (len(pairs), sum(x == y for x, y in pairs))
        assert one.own == all((x.part, x.head) == (y.part, y.head) for x, y in pairs)
        assert one.ordered == all(x.dim == y.dim for x, y in pairs)
        told = Counter({(s.part, head): s.rows for s in one.sources for head in range(s.first or 0, (s.last or 0) + 1)})
        assert told == Counter((x.part, x.head) for x, _ in pairs)
    parts_own = all(x.part == y.part for x, y in zip(given, wanted, strict=True))
    heads_own = all(one.own for one in reading.received)
    assert reading.verdict == ("same" if given == wanted else "order" if heads_own else "heads" if parts_own else "parts")
    if given != wanted:
        assert picture.code["weight"] == convert_lines(Layout(a), Layout(b), picture.sizes)
        assert picture.code["bias"] == convert_lines(Layout(a), Layout(b), picture.sizes, "bias", bias=True)
        assert any(isinstance(one, Code) and one.lines == picture.code["misread"] for one in picture.blocks)
    assert json.loads(json.dumps(picture.to_dict()))["wrong"] == reading.wrong


def test_these_checks_can_fail() -> None:
    picture = explain("h (q|k|v) d", h=4, d=32)
    with pytest.raises(AssertionError):
        check_strip(block(picture, Strip), [listing("(q|k|v) h d", bind("(q|k|v) h d", h=4, d=32))])


@pytest.mark.parametrize("packing", PACKINGS, ids=[f"{p.number} {p.layout}" for p in PACKINGS])
def test_every_known_packing_can_be_drawn(packing) -> None:
    picture = explain(packing.layout, **packing.sizes)
    assert len(str(picture).split("\n")) < 60 and picture._repr_html_().count("<table") == picture._repr_html_().count("</table>")
    json.dumps(picture.to_dict())


NEOX_AS_GPT2 = """\
rows are   h (q|k|v) d
           head by head: q, k, v   (GPT-NeoX, BLOOM, Persimmon, Megatron v2+)
read as    (q|k|v) h d
           q, k, v, each head by head   (GPT-2, MPT, ViT, nn.MultiheadAttention)
sizes      h=4 d=32   384 rows

         0    32   64   96   128  160  192  224  256  288  320  352
        ┌────┬────┬────┬────┬────┬────┬────┬────┬────┬────┬────┬────┐
hold    │ q0 │ k0 │ v0 │ q1 │ k1 │ v1 │ q2 │ k2 │ v2 │ q3 │ k3 │ v3 │
read as │ q0 │ q1 │ q2 │ q3 │ k0 │ k1 │ k2 │ k3 │ v0 │ v1 │ v2 │ v3 │
        └────┴────┴────┴────┴────┴────┴────┴────┴────┴────┴────┴────┘
               ≠    ≠    ≠    ≠    ≠    ≠    ≠    ≠    ≠    ≠

320 of 384 rows are read as something else. Right: head 0 of q, head 3 of v; 10
others are not.

Why: the rows go head by head: q, k, v. They are read as if they went q, k, v,
each head by head. So head 1 of q receives k of head 0 and head 2 of q receives
v of head 0.

what each head receives
  head  receives
  q 0   its own rows
  q 1   k of head 0
  q 2   v of head 0
  q 3   q of head 1
  k 0   k of head 1
  k 1   v of the same head
  k 2   q of the same head
  k 3   k of head 2
  v 0   v of head 2
  v 1   q of head 3
  v 2   k of head 3
  v 3   its own rows

what each part receives
  part  receives
  q     64 rows of q, 32 rows of k, 32 rows of v
  k     64 rows of k, 32 rows of v, 32 rows of q
  v     64 rows of v, 32 rows of q, 32 rows of k

this reads them as (q|k|v) h d: wrong here
    q, k, v = qkv.view(b, s, 3, 4, 32).unbind(-3)

this reads them as h (q|k|v) d: right
    q, k, v = qkv.view(b, s, 4, 3, 32).unbind(-2)

or move the rows once; then reading them as (q|k|v) h d is right
    weight = weight.view(4, 3, 32, -1).transpose(0, 1).reshape(384, -1)
    bias = bias.view(4, 3, 32).transpose(0, 1).reshape(-1)"""

NEOX = """\
layout    h (q|k|v) d
used by   GPT-NeoX, BLOOM, Persimmon, Megatron v2+
order     head by head: q, k, v
sizes     h=4 d=32   4*(1+1+1)*32 = 384 rows
repeats   4 blocks of 96 rows

      0    32   64   96   128  160  192  224  256  288  320  352
     ┌────┬────┬────┬────┬────┬────┬────┬────┬────┬────┬────┬────┐
rows │ q0 │ k0 │ v0 │ q1 │ k1 │ v1 │ q2 │ k2 │ v2 │ q3 │ k3 │ v3 │
     └────┴────┴────┴────┴────┴────┴────┴────┴────┴────┴────┴────┘

where each part lies
  part  heads x dims  row number     head 0  head 1   last head
  q     4 x 32        96*h + d       0-31    96-127   288-319
  k     4 x 32        96*h + 32 + d  32-63   128-159  320-351
  v     4 x 32        96*h + 64 + d  64-95   160-191  352-383

read every part, as [..., heads, dims]
    q, k, v = qkv.view(b, s, 4, 3, 32).unbind(-2)

take parts out of a weight [out, in] and a bias
    q_weight = weight.view(4, 3, 32, -1)[:, 0].reshape(128, -1)
    k_weight = weight.view(4, 3, 32, -1)[:, 1].reshape(128, -1)
    v_weight = weight.view(4, 3, 32, -1)[:, 2].reshape(128, -1)
    q_bias = bias.view(4, 3, 32)[:, 0].reshape(-1)
    k_bias = bias.view(4, 3, 32)[:, 1].reshape(-1)
    v_bias = bias.view(4, 3, 32)[:, 2].reshape(-1)"""


def test_the_pictures_of_the_readme() -> None:
    assert str(explain("h (q|k|v) d", h=4, d=32)) == NEOX
    assert str(explain("h (q|k|v) d", "(q|k|v) h d", h=4, d=32)) == NEOX_AS_GPT2


def words(picture: Picture) -> str:
    return " ".join(one.text for one in picture.blocks if isinstance(one, Note))


def test_scrambled_heads_are_said_to_pass_every_blind_test() -> None:
    picture = explain("(q|k|v) h d", "(q|k|v) d h", h=4, d=32)
    assert (picture.reading.verdict, picture.reading.wrong) == ("heads", 378)
    text = words(picture)
    assert "head 0 of q receives 8 rows of each of heads 0-3 of q" in text
    assert "Shapes, sums, norms, sorted values and any other test that ignores order (a multiset) pass" in text
    assert [row[1].text for row in block(picture, Table).rows] == [f"8 rows of each of heads 0-3 of {part}" for part in "qkv"]


def test_rotary_orders_are_told_apart_by_their_pairs() -> None:
    picture = explain("(q h|k g|v g) c p", "(q h|k g|v g) p c", h=12, g=4, d=16)
    assert picture.reading.verdict == "order"
    assert "A rotary pair" not in words(picture)
    assert "lie 8 rows apart (half-split, as in Hugging Face) and are taken side by side (interleaved" in words(picture)
    assert "scores agree until the rotary embedding turns the wrong pairs" in words(picture)
    assert "A rotary pair of rows is dim i and dim i + 8, side by side (interleaved" in words(explain("h p c", h=3, p=8))


def test_two_spellings_of_one_order() -> None:
    picture = explain("(q g r|k g|v g) d", "(q h|k g|v g) d", h=6, g=2, d=8)
    assert (picture.reading.verdict, picture.reading.wrong) == ("same", 0)
    assert "at these sizes the two layouts say the same" in words(picture)
    assert not any(isinstance(one, Code) and "move" in one.title for one in picture.blocks)


def test_whole_parts_that_change_places() -> None:
    picture = explain("(q|k|v) h d", "(q|v|k) h d", h=128, d=128)
    assert [[cell.text for cell in row] for row in block(picture, Table).rows] == [
        ["q 0-127", "its own rows"], ["v 0-127", "k of the same head"], ["k 0-127", "v of the same head"],
    ]  # fmt: skip


def test_128_heads_are_summarised() -> None:
    for layouts in (
        ["h (q|k|v) d"],
        ["(q h|k g|v g) d"],
        ["g (q r|k|v) d"],
        ["h (q|k|v) d", "(q|k|v) h d"],
        ["g (q r|k|v) d", "(q h|k g|v g) d"],
    ):
        picture = explain(*layouts, d=128, **({"h": 128, "g": 8} if "g" in layouts[0] else {"h": 128}))
        assert len(str(picture).split("\n")) < 70
        assert len(block(picture, Strip).starts) <= 15 and any(cell.text == GAP for cell in block(picture, Strip).lines[0][1])
    strip = block(explain("(q h|k g|v g) d", h=128, g=8, d=128), Strip)
    assert [cell.text for cell in strip.lines[0][1]] == ["q0", GAP, "q127", "k0", GAP, "k7", "v0", GAP, "v7"]


def test_aliases_zeros_and_parts_without_heads() -> None:
    text = str(explain("h (q|k=v) d", h=4, d=32))
    assert "k and v are one tensor: the same rows in 2 roles" in text and "k=v3" in text
    text = str(explain("(q|k=0|v) h d", h=4, d=32))
    assert "the rows of k are there and hold zero" in text and "k3=0" in text
    text = words(explain("latent f|rope dr", "rope dr|latent f", f=16, dr=6))
    assert "latent receives 10 rows of latent, 6 rows of rope" in text and "No part is right" in text
    assert "up receives all of gate" in words(explain("(gate|up) f", "(up|gate) f", f=9))


def test_layouts_that_cannot_be_read_as_one_another() -> None:
    picture = explain("(q|k=v) h d", "(q|k|v) h d", h=4, d=8)
    assert picture.reading.verdict == "size" and "has 64 rows and (q|k|v) h d has 96" in words(picture)
    assert picture.code["weight"][-1] == "weight = torch.cat([q, k, v])"
    with pytest.raises(SizeError, match="different rows: nothing can be read as both") as caught:
        explain("(q|k) h d", "(q|k|v) h d", h=4, d=8)
    assert "only in the second: v 4 x 8" in caught.value.text() and len(caught.value.text().split("\n")) <= 6
    picture = explain("(q|v) h d", "(q|k) h d", h=4, d=8)
    assert picture.reading.verdict == "labels" and picture.reading.wrong == 32
    assert "do not label the same rows. Only in (q|v) h d: v 4 x 8. Only in (q|k) h d: k 4 x 8." in words(picture)
    with pytest.raises(IncompatibleError, match="k and v are one tensor here and 2 there"):
        explain("(q|k|v) h d", "(q|k=v) h d", h=4, d=8)
    text = words(explain("(q|k|v) h d", "(q|k=v|z=0) h d", h=4, d=8))
    assert "There is no conversion: k and v are one tensor here and 2 there." in text


def test_sizes_are_completed_and_missing_ones_named() -> None:
    assert explain("g (q r|k|v) d", h=32, g=8, rows=6144).sizes["d"] == 128
    with pytest.raises(SizeError, match="sizes are missing"):
        explain("h (q|k|v) d", h=4)
    with pytest.raises(SizeError, match="too many rows to draw"):
        explain("h (q|k|v) d", h=32, d=1 << 20)
    with pytest.raises(SizeError, match="at most 2097152 rows, 4096 heads"):
        explain("h (q|k|v) d", "(q|k|v) h d", h=4097, d=1)
    with pytest.raises(LayoutSyntaxError, match="3 is a size"):
        explain("h 3 d", h=4, d=32)


def test_the_dict_holds_the_rows_as_strides() -> None:
    data = explain("g (q r|k|v) d", h=6, g=2, d=8).to_dict()
    assert data["parts"][1] == {
        "names": ["k"], "zero": False, "heads": 2, "dims": 8, "start": 24,
        "axes": [{"axis": "g", "size": 2, "stride": 40}, {"axis": "d", "size": 8, "stride": 1}],
    }  # fmt: skip
    assert set(data) == {"layout", "sizes", "rows", "order", "parts", "code"}
    two = explain("h (q|k|v) d", "(q|k|v) h d", h=4, d=32).to_dict()
    assert (two["layout"], two["read_as"], two["verdict"], two["wrong"]) == ("h (q|k|v) d", "(q|k|v) h d", "parts", 320)
    assert two["received"][1]["sources"] == [{"part": "k", "first": 0, "last": 0, "rows": 32, "of": 32}]


def test_facts_come_first() -> None:
    for picture in (explain("h d", h=3, d=5), explain("h d", "d h", h=3, d=5)):
        assert isinstance(picture.blocks[0], Facts) and isinstance(picture.blocks[1], Strip)
