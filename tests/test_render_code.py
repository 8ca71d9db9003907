"""The printed PyTorch lines are executed and compared with a gather by the slow listing, at sizes that are all different."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.errors import IncompatibleError, LayoutError
from triptych.layout import Layout
from triptych.render_code import convert_lines, part_line, read_lines, variables
from triptych.sizes import Sizes, bind

from .packings import PACKINGS, listing
from .strategies import random_layouts

B, S, IN = 2, 5, 11
MHA = {"h": 6, "t": 2, "d": 14}
GQA = {"h": 30, "g": 6, "t": 2, "d": 14}
PARTIAL = {"h": 6, "p": 7, "u": 5}
GROUPS = {
    "mha": (MHA, ["h (q|k|v) d", "(q|k|v) h d", "h d (q|k|v)", "(q|k|v) d h", "d (q|k|v) h", "m (q|v|k) n d", "(v|q|k) n m d",
                  "h p (q|v|k) c", "(q h|k n t|v t n) c p", "t (k n|q n|v n) p c", "(q h d|v d h|k p h c)"]),
    "gqa": (GQA, ["(q h|k g|v g) d", "(q g r|k g|v g) d", "(q r g|k g|v g) d", "g (q r|k|v) d", "g (k|v|q r) c p", "t (q n r|k n|v n) d",
                  "t (v n|q r n|k n) c p", "(q g r|k g|v g) p c", "(q n r t|k n t|v t n) d", "d (q h|k g|v g)", "_ g (k|v) d|q h d",
                  "(q h p c|k g p c|v g d)", "q h d|_ g (k|v) d"]),
    "gate": (GQA, ["_ g (q r|k|v) d|gate h", "_ (q h|k g|v g) d|gate h", "(q h d|gate h|k g d|v g d)", "g (gate r|q r d|k d|v d)"]),
    "partial": (PARTIAL, ["(q|k|v) h (rot c p|pass u)", "h (q|k|v) (rot p c|pass u)", "h (pass u|rot c p) (q|v|k)",
                          "(v|k|q) (pass u|rot p c) h"]),
    "free": ({"h": 4, "x": 6, "y": 10, "z": 15}, ["h (q x y|k z)", "q h y x|k h z", "q x h y|k z h"]),
    "mlp": ({"f": 9}, ["(gate|up) f", "f (gate|up)", "(up|gate) f"]),
    "delta": ({"g": 3, "r": 5, "dk": 7, "dv": 4}, ["g (q dk|k dk|v r dv|z r dv)", "q g dk|k g dk|v g r dv|z g r dv",
                                                   "_ (q|k) g dk|_ (v|z) r g dv"]),
    "nested": ({"g": 3, "r": 5, "d": 14, "x": 2, "y": 4},
               ["g (q r|_ (k|v (a x|b y))) d", "_ (v (a x|b y)|k) g d|q d r g", "d (v (b y|a x) g|q r g|k g)",
                "q g c r p|v g (a x|b y) d|k p g c"]),
}  # fmt: skip
LAYOUTS = [(text, sizes) for sizes, texts in GROUPS.values() for text in texts]
PAIRS = [(a, b, sizes) for sizes, texts in GROUPS.values() for a, b in itertools.permutations(texts, 2)]


def bound(sizes: dict[str, int], *texts: str) -> Sizes:
    layouts = [Layout(text) for text in texts]
    used = {axis for layout in layouts for axis in layout.axes}
    return bind(*layouts, **{k: v for k, v in sizes.items() if k in used or k in "hgtd"})


@cache
def slow(layout: Layout, sizes: Sizes) -> dict[str, list[list[int]]]:
    """part -> [head][dim] -> row, from the slow listing."""
    out: dict[str, dict[tuple[int, int], int]] = {}
    for i, row in enumerate(layout.rows(**{axis: sizes[axis] for axis in layout.axes})):
        out.setdefault(row.part, {})[row.head, row.dim] = i
    grids = {}
    for part, rows in out.items():
        heads, dims = (max(key[i] for key in rows) + 1 for i in (0, 1))
        grids[part] = [[rows[h, d] for d in range(dims)] for h in range(heads)]
    return grids


def run(lines: Sequence[str], **names: object) -> dict[str, object]:
    scope: dict[str, object] = {"torch": torch, **names}
    exec("\n".join(lines), scope)
    return scope


def labelled(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape)


def check_reading(layout: Layout, sizes: Sizes, grids: dict[str, list[list[int]]]) -> None:
    rows = layout.size(**{axis: sizes[axis] for axis in layout.axes})
    qkv, weight, bias = labelled(B, S, rows), labelled(rows, IN), labelled(rows)
    named = read_lines(layout, sizes)
    shapeless = read_lines(layout, sizes, "y", batch=None)
    apart = read_lines(layout, sizes, "weight", axis=0)
    alone = read_lines(layout, sizes, "bias", batch=())
    for lines, batch, scope, source in (
        (named, ("b", "s"), run(named, qkv=qkv, b=B, s=S), qkv),
        (shapeless, (), run(shapeless, y=qkv), qkv),
        (alone, (), run(alone, bias=bias), bias),
        (apart, (), run(apart, weight=weight), weight),
    ):
        for part, grid in grids.items():
            got = scope[variables(layout, batch)[part]]
            want = source[torch.tensor(grid)] if source is weight else source[..., torch.tensor(grid)]
            assert torch.equal(got, want), (part, lines)


@pytest.mark.parametrize(("text", "sizes"), LAYOUTS, ids=[text for text, _ in LAYOUTS])
def test_reading_lines_give_every_part_and_head(text: str, sizes: dict[str, int]) -> None:
    layout = Layout(text)
    check_reading(layout, bound(sizes, text), slow(layout, bound(sizes, text)))


@pytest.mark.parametrize("packing", PACKINGS, ids=[f"{p.number} {p.layout}" for p in PACKINGS])
def test_reading_lines_of_every_known_packing_match_its_hand_written_listing(packing) -> None:
    rows = {label: i for i, label in enumerate(listing(packing.rows))}
    grids: dict[str, list[list[int]]] = {}
    for part in {part for part, _, _ in rows}:
        heads, dims = (max(label[i] for label in rows if label[0] == part) + 1 for i in (1, 2))
        grids[part] = [[rows[part, h, d] for d in range(dims)] for h in range(heads)]
    check_reading(Layout(packing.layout), bind(packing.layout, **packing.sizes), grids)


@given(random_layouts(), st.data())
@settings(max_examples=60)
def test_any_layout_is_read(layout: Layout, data: st.DataObject) -> None:
    sizes = {axis: data.draw(st.integers(1, 4)) for axis in "tnrpxy"} | {"c": 2}
    sizes |= {"h": sizes["t"] * sizes["n"] * sizes["r"], "g": sizes["t"] * sizes["n"], "d": 2 * sizes["p"]}
    check_reading(layout, s := Sizes(sizes), slow(layout, s))
    check_parts(layout, s, slow(layout, s))


@pytest.mark.parametrize(("text", "sizes"), LAYOUTS, ids=[text for text, _ in LAYOUTS])
def test_one_part_of_a_weight_and_a_bias(text: str, sizes: dict[str, int]) -> None:
    layout, sized = Layout(text), bound(sizes, text)
    check_parts(layout, sized, slow(layout, sized))


def check_parts(layout: Layout, sizes: Sizes, grids: dict[str, list[list[int]]]) -> None:
    rows = sum(len(grid) * len(grid[0]) for grid in grids.values())
    weight, bias, stored = labelled(rows, IN), labelled(rows), labelled(IN, rows)
    for part, grid in grids.items():
        order = torch.tensor(grid).flatten()
        scope = {"torch": torch, "weight": weight, "bias": bias, "w": stored}
        assert torch.equal(eval(part_line(layout, sizes, part), scope), weight[order])
        assert torch.equal(eval(part_line(layout, sizes, part, "bias", bias=True), scope), bias[order])
        assert torch.equal(eval(part_line(layout, sizes, part, "w", axis=-1), scope), stored[:, order])


def check_conversion(a: Layout, b: Layout, sizes: Sizes) -> None:
    position = {(part, h, d): row for part, grid in slow(a, sizes).items() for h, line in enumerate(grid) for d, row in enumerate(line)}
    order = torch.tensor([position[tuple(row)] for row in b.rows(**{axis: sizes[axis] for axis in b.axes})])
    rows = len(position)
    weight, bias, stored = labelled(rows, IN), labelled(rows), labelled(IN, rows)
    for lines, source, want in (
        (convert_lines(a, b, sizes), {"weight": weight}, weight[order]),
        (convert_lines(a, b, sizes, "bias", bias=True), {"bias": bias}, bias[order]),
        (convert_lines(a, b, sizes, "kernel", axis=-1), {"kernel": stored}, stored[:, order]),
    ):
        assert torch.equal(run(lines, **source)[next(iter(source))], want), lines
        assert bool(lines) == (not torch.equal(order, torch.arange(rows)))


@pytest.mark.parametrize(("a", "b", "sizes"), PAIRS, ids=[f"{a} -> {b}" for a, b, _ in PAIRS])
def test_every_ordered_pair_converts(a: str, b: str, sizes: dict[str, int]) -> None:
    check_conversion(Layout(a), Layout(b), bound(sizes, a, b))


def test_the_pairs_are_many_and_their_sizes_differ() -> None:
    assert len(LAYOUTS) >= 30 and len(PAIRS) >= 300
    sizes = bound(GQA, "g (q r|k|v) c p", "t (q n r|k n|v n) d")
    assert len({sizes[a] for a in "hgrdtnp"}) == 7


def test_a_wrong_line_is_seen() -> None:
    layout, sizes = Layout("h (q|k|v) d"), bind("h (q|k|v) d", h=4, d=32)
    wrong = dict(slow(Layout("(q|k|v) h d"), sizes))
    with pytest.raises(AssertionError):
        check_reading(layout, sizes, wrong)


def test_zero_and_aliased_parts() -> None:
    sizes = bind("(q|k|v) h d", h=4, d=3)
    three, two = labelled(36, IN) + 1, labelled(24, IN) + 1
    q, _, v = three.chunk(3)
    zero = torch.zeros_like(q)
    for a, b, source, want in (
        ("(q|k=0|v) h d", "(q|v) h d", three, torch.cat([q, v])),
        ("(q|v) h d", "(q|k=0|v) h d", two, torch.cat([two[:12], zero, two[12:]])),
        ("(v|k=0|q) h d", "(q|k=0|v) h d", three, torch.cat([v, zero, q])),
        ("(q|k=v) h d", "(q|k|v) h d", two, torch.cat([two, two[12:]])),
        ("(q=k) h d", "(q|k) h d", q, torch.cat([q, q])),
    ):
        lines = convert_lines(Layout(a), Layout(b), sizes)
        assert torch.equal(run(lines, weight=source)["weight"], want), lines
    lines = convert_lines(Layout("(q|v) h d"), Layout("h (q|k=0|v) d"), sizes, "kernel", axis=-1)
    want = torch.stack([x.T.view(IN, 4, 3) for x in (two[:12], zero, two[12:])], dim=2).reshape(IN, 36)
    assert torch.equal(run(lines, kernel=two.T.contiguous())["kernel"], want), lines
    lines = convert_lines(Layout("(q|k=v) h d"), Layout("h (v|k|q) d"), sizes, "bias", bias=True)
    want = torch.stack([torch.arange(12, 24).view(4, 3), torch.arange(12, 24).view(4, 3), torch.arange(12).view(4, 3)], dim=1).reshape(-1)
    assert torch.equal(run(lines, bias=torch.arange(24))["bias"], want), lines
    lines = convert_lines(Layout("(q|v) h d"), Layout("(q|v|k=0) h d"), sizes, "bias", bias=True)
    assert torch.equal(run(lines, bias=torch.arange(24))["bias"], torch.cat([torch.arange(24), torch.zeros(12, dtype=torch.long)])), lines
    scope = run(read_lines(Layout("(q|k=v) h d"), sizes), qkv=labelled(B, S, 24), b=B, s=S)
    assert scope["k"] is scope["v"]


EXAMPLES = [
    ("h (q|k|v) d", {"h": 4, "d": 32}, ["q, k, v = qkv.view(b, s, 4, 3, 32).unbind(-2)"]),
    ("(q|k|v) h d", {"h": 4, "d": 32}, ["q, k, v = qkv.view(b, s, 3, 4, 32).unbind(-3)"]),
    ("h d (q|k|v)", {"h": 4, "d": 32}, ["q, k, v = qkv.view(b, s, 4, 32, 3).unbind(-1)"]),
    ("(q|k|v) d h", {"h": 4, "d": 32}, ["q, k, v = qkv.view(b, s, 3, 32, 4).transpose(-2, -1).unbind(-3)"]),
    ("(q h|k g|v g) d", {"h": 6, "g": 2, "d": 8}, ["q, k, v = qkv.view(b, s, 10, 8).split([6, 2, 2], dim=-2)"]),
    ("g (q r|k|v) d", {"h": 6, "g": 2, "d": 8},
     ["q, k, v = qkv.view(b, s, 2, 5, 8).split([3, 1, 1], dim=-2)", "q, k, v = (x.flatten(-3, -2) for x in (q, k, v))"]),
    ("h (rot c p|pass n)", {"h": 6, "p": 4, "n": 3}, ["rot, pass_ = qkv.view(b, s, 6, 11).split([8, 3], dim=-1)"]),
    ("(gate|up) f", {"f": 9}, ["gate, up = qkv.view(b, s, 1, 2, 9).unbind(-2)"]),
    ("h p c", {"h": 6, "p": 4}, ["rows = qkv.view(b, s, 6, 4, 2).transpose(-2, -1).flatten(-2)"]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "sizes", "lines"), EXAMPLES, ids=[text for text, _, _ in EXAMPLES])
def test_the_lines_are_those_a_person_would_write(text: str, sizes: dict[str, int], lines: list[str]) -> None:
    assert list(read_lines(Layout(text), bind(text, **sizes))) == lines


def test_the_shortest_line_for_a_part_and_a_conversion() -> None:
    neox, gpt2, falcon = Layout("h (q|k|v) d"), Layout("(q|k|v) h d"), Layout("g (q r|k|v) d")
    sizes, grouped = bind(neox, h=4, d=32), bind(falcon, h=6, g=2, d=8)
    assert part_line(neox, sizes, "q") == "weight.view(4, 3, 32, -1)[:, 0].reshape(128, -1)"
    assert part_line(neox, sizes, "q", "bias", bias=True) == "bias.view(4, 3, 32)[:, 0].reshape(-1)"
    assert part_line(gpt2, sizes, "q") == "weight[:128]"
    assert part_line(falcon, grouped, "q") == "weight.view(2, 5, 8, -1)[:, :3].reshape(48, -1)"
    nested = Layout("h (q (nope dn|rope dr)|gate dv)")
    line = part_line(nested, bind(nested, h=8, dn=12, dr=6, dv=10), "q.rope")
    assert line == "weight.view(8, 28, -1)[:, 12:18].reshape(48, -1)"
    assert convert_lines(neox, gpt2, sizes) == ("weight = weight.view(4, 3, 32, -1).transpose(0, 1).reshape(384, -1)",)
    assert convert_lines(gpt2, Layout("(q|v|k) h d"), sizes) == ("q, k, v = weight.chunk(3)", "weight = torch.cat([q, v, k])")
    assert convert_lines(neox, neox, sizes) == ()


def test_names_are_valid_variables() -> None:
    layout = Layout("h (b dk|s dk|x dv|class dv|q (rot c p|pass n)|q_rot c)")
    names = variables(layout, ("b", "s"))
    assert names == {"b": "b_", "s": "s_", "x": "x", "class": "class_", "q.rot": "q_rot", "q.pass": "q_pass", "q_rot": "q_rot_"}
    sizes = bind(layout, h=3, dk=2, dv=5, p=4, n=7)
    check_reading(layout, sizes, slow(layout, sizes))
    lines = read_lines(Layout("g (q r|k|v) d"), bind("g (q r|k|v) d", g=2, r=3, d=8), "qkv", batch=("x", "y"))
    assert run(lines, qkv=labelled(B, S, 80), x=B, y=S)["q"].shape == (B, S, 6, 8)


def test_errors() -> None:
    sizes = bind("h (q|k|v) d", h=4, d=32)
    with pytest.raises(LayoutError, match="no part 'z'"):
        part_line(Layout("h (q|k|v) d"), sizes, "z")
    with pytest.raises(LayoutError, match="first or the last"):
        part_line(Layout("h (q|k|v) d"), sizes, "q", axis=1)
    with pytest.raises(IncompatibleError, match="do not label the same rows"):
        convert_lines(Layout("h (q|k|v) d"), Layout("h (q|k) d"), sizes)
