"""Plans: values that can be printed, hashed and compared, and that refuse everything that does not fit before a byte is written."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import triptych as tt
from tests import files
from triptych import place, steps
from triptych.errors import FormatError, IncompatibleError, PlanError, SizeError
from triptych.layout import Layout
from triptych.packed import Packed
from triptych.pieces import alone, target_of, together, with_zeros
from triptych.steps import Nest, check, covers, nest

H, D = 6, 4
NEOX = {"model_type": "gpt_neox", "hidden_size": H * D, "num_attention_heads": H}
QKV = "gpt_neox.layers.{}.attention.query_key_value.{}"


def neox(folder: Path, layers: int = 2) -> Path:
    shard = {QKV.format(i, "weight"): ("BF16", (3 * H * D, H * D)) for i in range(layers)}
    shard |= {QKV.format(i, "bias"): ("BF16", (3 * H * D,)) for i in range(layers)} | {"gpt_neox.norm": ("BF16", (5,))}
    files.checkpoint(folder, [shard], NEOX)
    return folder


def grid(n: Nest, side: int) -> list[int]:
    """Every byte of one side of a nest, by loops."""
    first = (n.out, n.into)[side]
    steps_ = itertools.product(*(range(size) for size, _, _ in n.dims))
    return [first + sum(i * dim[1 + side] for i, dim in zip(at, n.dims, strict=True)) + byte for at in steps_ for byte in range(n.width)]


nests = st.builds(
    lambda out, into, width, dims: Nest(out, into, width, tuple(dims)),
    st.integers(0, 8), st.integers(0, 8), st.integers(1, 4),
    st.lists(st.tuples(st.integers(1, 3), st.integers(0, 8), st.integers(0, 8)), max_size=2),
)  # fmt: skip


@given(st.lists(nests, max_size=4), st.integers(0, 16), st.booleans())
def test_covers_is_what_loops_say(found: list[Nest], size: int, often: bool) -> None:
    times = [0] * max([size, *(byte + 1 for n in found for byte in grid(n, 0))])
    for n in found:
        for byte in grid(n, 0):
            times[byte] += 1
    right = all(t >= 1 if often else t == 1 for t in times[:size]) and not any(times[size:])
    assert covers(tuple(found), size, often) == right


@given(nests)
def test_the_shortest_form_of_a_nest_is_the_same_nest(n: Nest) -> None:
    short = nest(*n)
    assert sorted(zip(grid(n, 0), grid(n, 1), strict=True)) == sorted(zip(grid(short, 0), grid(short, 1), strict=True))
    assert len(short.dims) <= len(n.dims)


def test_covering_permutations_of_blocks() -> None:
    """What Hypothesis rarely finds: sets of nests that do tile."""
    for widths in ((1, 2, 3), (4, 4), (5, 1, 2)):
        for order in itertools.permutations(range(len(widths))):
            starts = [sum(widths[j] for j in order[: order.index(i)]) for i in range(len(widths))]
            tiled = tuple(Nest(start, 0, width, ((3, sum(widths), 0),)) for start, width in zip(starts, widths, strict=True))
            assert covers(tiled, 3 * sum(widths)) and not covers(tiled, 3 * sum(widths) + 1) and not covers(tiled[1:], 3 * sum(widths))
            assert not covers((*tiled, tiled[0]), 3 * sum(widths)) and covers((*tiled, tiled[0]), 3 * sum(widths), often=True)


# The value


def test_a_plan_is_a_value(tmp_path: Path) -> None:
    neox(tmp_path / "a")
    one, two = (tt.plan(tmp_path / "a", "(q|k|v) h d") for _ in range(2))
    assert one == two and hash(one) == hash(two) and one.digest == two.digest and one.digest.startswith("sha256:")
    assert tt.plan(tmp_path / "a", "h d (q|k|v)").digest != one.digest
    assert tt.plan(tmp_path / "a", "(q|k|v) h d", tmp_path / "out").digest == one.digest
    assert not (tmp_path / "out").exists()


def test_the_json_of_a_plan(tmp_path: Path) -> None:
    """Stable and versioned: this is its whole text for a small file."""
    files.safetensors(tmp_path / "a.safetensors", {"w.weight": ("U8", (6, 5)), "n": ("U8", (3,))}, {"format": "pt"})
    made = tt.plan(tmp_path / "a.safetensors", "(q|k|v) h", tmp_path / "b.safetensors", layouts={"w.weight": "h (q|k|v)"}, h=2)
    told = json.loads(json.dumps(made.to_dict()))
    assert told.pop("digest") == made.digest and told.pop("path").endswith("a.safetensors") and told.pop("out").endswith("b.safetensors")
    start = next(feed.start for file in made.files for step in file.steps for feed in step.feeds if step.tensor == "w.weight")
    source = {"file": "a.safetensors", "start": start}
    moves = [[0, 0, 5, [[2, 5, 15]]], [10, 5, 5, [[2, 5, 15]]], [20, 10, 5, [[2, 5, 15]]]]
    parts = {part: f"{part}_proj.weight" for part in "qkv"}
    stamp = {
        "layout": "(q|k|v) h",
        "sizes": {"h": 2},
        "axis": 0,
        "projection": "w.weight",
        "parts": parts,
        "kind": "attention",
        "rope": None,
    }
    layouts = {"w.weight": stamp}
    assert told == {
        "version": 1, "target": "(q|k|v) h", "bytes": made.size,
        "sources": [["a.safetensors", start + 33]],
        "files": [{"name": "b.safetensors", "metadata": {"format": "pt"}, "layouts": layouts, "steps": [
            {"tensor": "w.weight", "dtype": "U8", "shape": [6, 5], "start": 0, "size": 30, "zeros": [],
             "feeds": [{**source, "tensor": "w.weight", "size": 30, "nests": moves}]},
            {"tensor": "n", "dtype": "U8", "shape": [3], "start": 30, "size": 3, "zeros": [],
             "feeds": [{"file": "a.safetensors", "tensor": "n", "start": start + 30, "size": 3, "nests": [[0, 0, 3, []]]}]}]}],
        "copies": [], "drops": [], "index": None, "unchanged": ["n"], "notes": [],
        "changes": [{"projection": "w.weight", "before": [["w.weight", "h (q|k|v)"]], "after": [["w.weight", "(q|k|v) h"]], "sizes": "h=2",
                     "size": 30, "source": "by hand"}],
    }  # fmt: skip


def test_the_text_of_a_plan(tmp_path: Path) -> None:
    neox(tmp_path / "a")
    (tmp_path / "a" / "pytorch_model.bin").write_text("old")
    text = str(tt.plan(tmp_path / "a", "split"))
    assert "to split" in text and "2 x 3.46 kB   h=6 d=4   (record transformers" in text
    assert "from gpt_neox.layers.*.attention.query_key_value.weight   h (q|k|v) d" in text
    assert "to   gpt_neox.layers.*.attention.query.weight   (q h d)" in text
    assert "1 tensors carried over unchanged" in text and "2 other files copied: config.json, pytorch_model.bin" in text
    assert "note: config.json still says gpt_neox" in text and "note: pytorch_model.bin is carried over as it is" in text
    assert text.splitlines()[-1].startswith("  plan sha256:") and all(len(line) < 140 for line in text.splitlines())


def test_large_tensors_begin_on_a_page_and_elements_are_aligned(tmp_path: Path) -> None:
    made = {"odd": ("U8", (7,)), "a.weight": ("BF16", (96, 64)), "half": ("BF16", (3,)), "b": ("F64", (512,)), "c": ("F64", (3,))}
    files.checkpoint(tmp_path / "a", [made])
    plan = tt.plan(tmp_path / "a", "(q|k|v) h d", layouts={"a.weight": "h (q|k|v) d @ 0"}, h=4)
    begins = {step.tensor: step.start for step in plan.files[0].steps}
    assert begins["a.weight"] % 4096 == begins["b"] % 4096 == 0 and begins["c"] % 8 == 0 and begins["half"] % 2 == 0
    assert len(plan.headers["model.safetensors"]) % 4096 == 0


def test_the_check_finds_every_wrong_plan(tmp_path: Path) -> None:
    """The check is seen to fail: each of these is a right plan with one thing changed."""
    neox(tmp_path / "a", 1)
    made = tt.plan(tmp_path / "a", "(q|k|v) h d")
    tensors = tt.inspect(tmp_path / "a").stored.tensors
    check(made, tensors)
    (file,) = made.files
    first = file.steps[0]
    feed = first.feeds[0]

    def changed(**more: Any) -> steps.Plan:
        return steps.Plan(**{**vars_of(made), "files": (steps.OutFile(file.name, (first._replace(**more), *file.steps[1:]), (), ()),)})

    def vars_of(plan: steps.Plan) -> dict[str, Any]:
        return {name: getattr(plan, name) for name in plan.__dataclass_fields__}

    twice = feed._replace(nests=(feed.nests[0], feed.nests[0], *feed.nests[2:]))
    same_source = feed._replace(nests=(feed.nests[0], feed.nests[1]._replace(into=feed.nests[0].into), *feed.nests[2:]))
    for plan in (changed(feeds=(twice,)), changed(feeds=(same_source,)), changed(feeds=()), changed(start=8), changed(shape=(3, 3)),
                 changed(feeds=(feed._replace(nests=feed.nests[1:]),)), changed(tensor="gpt_neox.norm"),
                 steps.Plan(**{**vars_of(made), "files": ()}),
                 steps.Plan(**{**vars_of(made), "copies": (steps.Source("MODEL.safetensors", 1, 1),)})):  # fmt: skip
        with pytest.raises(PlanError):
            check(plan, tensors)


# What a target speaks of


def test_targets() -> None:
    for text in ("split", "fused", "fused:h (q|k|v) d", "h (q|k|v) d", "(q h|k g|v g) d"):
        assert str(target_of(text)) == text
    assert target_of(" split ").split and target_of(Layout("h (q|k) d")).layout == Layout("h (q|k) d")
    for wrong in ("fused:", "3"):
        with pytest.raises(tt.LayoutSyntaxError):
            target_of(wrong)
    for wrong, advice in (
        ("fusd", "did you mean 'fused'?"),
        ("Split", "did you mean 'split'?"),
        ("split:h d", "split"),
        ("fused g (q r|k|v) d", "fused:g (q r|k|v) d"),
        ("megatron", "`triptych families NAME`"),
    ):
        with pytest.raises(tt.LayoutError, match="this is no target") as caught:
            target_of(wrong)
        assert str(caught.value.fields["try"]).startswith(advice)


def test_layouts_of_parts() -> None:
    cases = {
        ("h (q|k|v) d", "k"): "(k h d)",
        ("h d (q|k|v)", "q"): "(q h d)",
        ("(q|k|v) d h", "v"): "(v h d)",
        ("g (q r|k|v) d", "q"): "(q h d)",
        ("g (q r|k|v) d", "k"): "(k g d)",
        ("t (q n r|k n|v n) d", "q"): "(q h d)",
        ("t (q n r|k n|v n) d", "v"): "(v g d)",
        ("(q r g|k g|v g) p c", "q"): "(q h p c)",
        ("(q r g|k g|v g) c p", "q"): "(q h d)",
        ("m (q|v|k) n d", "k"): "(k g d)",
        ("(q h|k=v g) d", "v"): "(v g d)",
        ("h (k dn|v dv)", "v"): "(v h dv)",
        ("_ g (q r|k|v) d|gate h", "gate"): "(gate h)",
        ("h (q|k|v) (rot c p|pass u)", "k"): "h (k) (rot c p|pass u)",
        ("_ g (q (rot p c|pass u) r|k d)|v g d", "q"): "(_ g (q (rot p c|pass u) r))",
    }
    for (layout, part), expected in cases.items():
        assert alone(Layout(layout), part) == Layout(expected), (layout, part)
    joined = together([Layout("(q h d)"), Layout("h (k) d"), Layout("v h d|w h d")])
    assert [row.part for row in joined.rows(h=1, d=1)] == ["q", "k", "v", "w"]
    assert with_zeros(Layout("h (q|k|v) d"), frozenset("k")) == Layout("h (q|k=0|v) d")


def test_what_the_target_does_not_speak_of_stays_and_is_named(tmp_path: Path) -> None:
    made = {"a.weight": ("U8", (24, 3)), "b.weight": ("U8", (16, 3)), "m.weight": ("U8", (10, 3))}
    parts = files.checkpoint(tmp_path / "a", [made])
    given = {"a.weight": "h (q|k|v) d", "b.weight": "h (k|v) d", "m.weight": "(gate|up) f @ 0"}
    plan = tt.plan(tmp_path / "a", "(q|k|v) h d", layouts=given, h=4)
    assert [change.projection for change in plan.changes] == ["a.weight"]
    assert sum("does not speak of it" in note for note in plan.notes) == 2
    tt.convert(tmp_path / "a", tmp_path / "b", "(q|k|v) h d", layouts=given, h=4)
    found = files.read(tmp_path / "b")
    assert found["b.weight"] == parts["b.weight"] and found["m.weight"] == parts["m.weight"]


def test_sizes_that_only_the_target_needs(tmp_path: Path) -> None:
    neox(tmp_path / "a")
    with pytest.raises(SizeError, match="sizes are missing"):
        tt.plan(tmp_path / "a", "t (q|k|v) n d")
    made = tt.plan(tmp_path / "a", "t (q|k|v) n d", t=2)
    assert made.changes[0].sizes == "h=6 d=4 t=2 n=3"
    with pytest.raises(SizeError):
        tt.plan(tmp_path / "a", "t (q|k|v) n d", t=4)


def test_names_by_rule_and_others(tmp_path: Path) -> None:
    neox(tmp_path / "a")
    names = {"gpt_neox.layers.*.attention.query.*": "m.*.wq.*", QKV.format(0, "bias").replace("query_key_value", "key"): "m.k0"}
    made = tt.plan(tmp_path / "a", "split", names=names)
    after = [name for change in made.changes for name, _ in change.after]
    assert "m.1.wq.weight" in after and "m.k0" in after and "gpt_neox.layers.1.attention.key.bias" in after
    for wrong, match in (
        ({"nothing": "x"}, "no output tensor has this name"),
        ({"gpt_neox.layers.*.attention.query.*": "a*"}, "as many stars"),
        ({"gpt_neox.layers.0.attention.query.weight": "gpt_neox.norm"}, "name of another tensor"),
        ({"gpt_neox.layers.0.attention.query.weight": "gpt_neox.layers.0.attention.key.weight"}, "two output tensors have one name"),
        ({"gpt_neox.layers.0.attention.query.weight": "__metadata__"}, "printable name"),
        ({"gpt_neox.layers.0.attention.query.weight": "a\x1b"}, "printable name"),
    ):
        with pytest.raises(PlanError, match=match):
            tt.plan(tmp_path / "a", "split", names=wrong)


def test_a_renamed_projection_is_still_known_and_verified(tmp_path: Path) -> None:
    neox(tmp_path / "a")
    tt.convert(tmp_path / "a", tmp_path / "b", "(q|k|v) h d", names={"gpt_neox.*": "m.*"})
    assert {str(one.layout) for one in tt.inspect(tmp_path / "b").projections} == {"(q|k|v) h d"}
    tt.verify(tmp_path / "a", tmp_path / "b")
    tt.convert(tmp_path / "b", tmp_path / "c", "split")
    tt.verify(tmp_path / "b", tmp_path / "c")
    tt.convert(tmp_path / "c", tmp_path / "d", "fused:h (q|k|v) d", names={"m.*": "gpt_neox.*"})
    assert files.read(tmp_path / "d") == files.read(tmp_path / "a")


# What is refused


def test_unknown_fused_tensors_stop_the_plan(tmp_path: Path) -> None:
    files.checkpoint(tmp_path / "a", [{f"h.{i}.attn.qkv_proj.weight": ("U8", (24, 3)) for i in range(3)}])
    with pytest.raises(PlanError, match="the layout of a fused tensor is not known") as caught:
        tt.plan(tmp_path / "a", "split")
    assert "and 2 more" in str(caught.value) and "--layout 'h.*.attn.qkv_proj.*=" in str(caught.value)
    text = str(tt.inspect(tmp_path / "a"))
    assert "3 x h.*.attn.qkv_proj.weight" in text and "unknown:" in text
    assert tt.plan(tmp_path / "a", "split", layouts={"*qkv_proj*": "h (q|k|v) d"}, h=4).changes


def test_nothing_to_convert(tmp_path: Path) -> None:
    neox(tmp_path / "a")
    files.checkpoint(tmp_path / "plain", [{"x": ("U8", (3,))}])
    for source, to in (("a", "fused:(gate|up) f"), ("a", "fused"), ("a", "(gate|up) f"), ("plain", "split"), ("plain", "h (q|k|v) d")):
        with pytest.raises(PlanError, match="there is nothing to convert"):
            tt.plan(tmp_path / source, to)
    tt.convert(tmp_path / "a", tmp_path / "b", "split")
    with pytest.raises(PlanError, match="fused:h") as caught:
        tt.plan(tmp_path / "b", "h (q|k|v) d")
    assert "joins separate ones" in str(caught.value)


def test_other_parts_or_sizes_are_incompatible(tmp_path: Path) -> None:
    neox(tmp_path / "a")
    with pytest.raises(IncompatibleError, match="query_key_value"):
        tt.plan(tmp_path / "a", "h (q x|k x|v x)", x=2)


def test_companions_do_not_stay_behind(tmp_path: Path) -> None:
    made = {"l.qkv.weight": ("F8_E4M3", (24, 8)), "l.qkv.weight_scale": ("F32", (24, 1)), "l.qkv.input_scale": ("F32", ())}
    files.checkpoint(tmp_path / "a", [made])
    given = {"l.qkv.weight": "h (q|k|v) d"}
    with pytest.raises(PlanError, match="companion") as caught:
        tt.plan(tmp_path / "a", "(q|k|v) h d", layouts=given, h=4)
    assert "l.qkv.weight_scale" in str(caught.value)
    given["l.qkv.weight_scale"] = "h (q|k|v) d"
    assert len(tt.plan(tmp_path / "a", "(q|k|v) h d", layouts=given, h=4).changes) == 2
    with pytest.raises(PlanError, match="input_scale"):
        tt.plan(tmp_path / "a", "split", layouts=given, h=4)


def test_the_digest_is_of_every_byte_that_moves(tmp_path: Path) -> None:
    """Two plans that differ in nothing but where rows come from: a killed run of one is no beginning of the other."""
    files.checkpoint(tmp_path / "a", [{"l.qkv.weight": ("F32", (24, 5))}])
    made = [tt.plan(tmp_path / "a", "(q|k|v) h d", layouts={"*": f"{text} @ 0"}, h=2) for text in ("h (q|k|v) d", "h d (q|k|v)")]
    assert made[0].files[0].layouts == made[1].files[0].layouts
    assert made[0].digest != made[1].digest
    assert made[0].digest == tt.plan(tmp_path / "a", "(q|k|v) h d", tmp_path / "b", layouts={"*": "h (q|k|v) d @ 0"}, h=2).digest


def test_room_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    neox(tmp_path / "a")

    class Little:
        f_bavail, f_frsize = 3, 512

    monkeypatch.setattr(place.os, "statvfs", lambda path: Little)
    with pytest.raises(PlanError, match="not enough room"):
        tt.plan(tmp_path / "a", "split", tmp_path / "b")
    assert tt.plan(tmp_path / "a", "split")


def test_room_that_an_unfinished_run_took_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a file that another share has just renamed is none."""
    neox(tmp_path / "a")
    made = tt.plan(tmp_path / "a", "split")
    (tmp_path / "b" / "below").mkdir(parents=True)
    (tmp_path / "b" / "below" / "part").write_bytes(bytes(made.size + 4096))
    (tmp_path / "b" / "gone").symlink_to("nowhere")
    is_file = Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda path: path.name == "gone" or is_file(path))
    monkeypatch.setattr(place.os, "statvfs", lambda path: SimpleNamespace(f_bavail=0, f_frsize=512))
    place.check_room(made, tmp_path / "b")
    (tmp_path / "b" / "below" / "part").unlink()
    with pytest.raises(PlanError, match="not enough room"):
        place.check_room(made, tmp_path / "b")


def test_places(tmp_path: Path) -> None:
    neox(tmp_path / "a")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    one = tmp_path / "a" / "model.safetensors"
    for source, out, match in (
        (tmp_path / "a", tmp_path / "a", "inside the input"),
        (tmp_path / "a", tmp_path / "a" / "b", "inside the input"),
        (tmp_path / "a", tmp_path / "link" / "b", "inside the input"),
        (tmp_path / "link", tmp_path / "a" / "b", "inside the input"),
        (tmp_path / "a", tmp_path, "exists"),
        (tmp_path / "a", tmp_path / "full", "exists"),
        (tmp_path / "a", tmp_path / "dangling", "exists"),
        (tmp_path / "a", tmp_path / "no" / "b", "no folder to lie in"),
        (tmp_path / "a", tmp_path / "b.safetensors", "a folder becomes a folder"),
        (one, tmp_path / "b", "a file becomes a file"),
        (one, one, "inside the input"),
        (one, tmp_path / "empty", "exists"),
    ):
        with pytest.raises(PlanError, match=match):
            tt.plan(source, "split", out)
    tt.plan(tmp_path / "a", "split", tmp_path / "empty")
    (tmp_path / "a" / place.MARKER).write_text("{}")
    with pytest.raises(FormatError, match="unfinished conversion"):
        tt.plan(tmp_path / "a", "split", tmp_path / "b")


# Who knows the layout


def test_a_layout_given_by_hand(tmp_path: Path) -> None:
    """It replaces the record of the family, with a note, and takes sizes and names from it."""
    neox(tmp_path / "a")
    found = tt.inspect(tmp_path / "a", layouts={"*query_key_value*": "(q|k|v) h d"})
    assert {(str(one.layout), one.source, one.sizes["h"]) for one in found.projections} == {("(q|k|v) h d", "by hand", H)}
    assert len(found.notes) == 2 and "its record says h (q|k|v) d" in found.notes[0]
    assert dict(found.projections[0].parts)["q"].endswith(("attention.query.weight", "attention.query.bias"))
    assert not tt.inspect(tmp_path / "a", layouts={"*query_key_value*": "t n (q|k|v) d"}, t=2).notes, "another spelling of the same"
    for wrong, error, match in (
        ({"nothing*": "h (q|k|v) d"}, PlanError, "no tensor has such a name"),
        ({"*.weight": "h (q|k|v) d", "*.0.*": "(q|k|v) h d"}, PlanError, "two layouts are given"),
        ({"*.weight": "h (q|k|v) d @ x"}, PlanError, "an axis is a number"),
        ({"*.weight": "h (q|k|v) d @ 2"}, PlanError, "no such axis"),
        ({"*.weight": "h (q|k|v d"}, tt.LayoutSyntaxError, "never closed"),
        ({"*.weight": "h (q|k|v|w) d e"}, SizeError, "query_key_value.weight"),
    ):
        with pytest.raises(error, match=match):
            tt.inspect(tmp_path / "a", layouts=wrong)
    with pytest.raises(SizeError, match="unknown axis"):
        tt.inspect(tmp_path / "a", zz=3)


def test_one_part_of_a_separate_family_by_hand(tmp_path: Path) -> None:
    config = {"model_type": "llama", "hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 4}
    home = "model.layers.0.self_attn."
    made = {f"{home}{part}_proj.weight": ("F32", (n * 4, 24)) for part, n in (("q", 6), ("k", 2), ("v", 2))}
    files.checkpoint(tmp_path / "a", [made], config)
    (one,) = tt.inspect(tmp_path / "a", layouts={"*.q_proj.weight": "(q h p c)"}).projections
    assert isinstance(one, Packed) and [str(piece.layout) for piece in one.pieces] == ["(q h p c)", "(k g d)", "(v g d)"]
    tt.convert(tmp_path / "a", tmp_path / "b", "fused", layouts={"*.q_proj.weight": "(q h p c)"})
    q = files.rows(files.read(tmp_path / "a")[f"{home}q_proj.weight"], 24)
    mended = b"".join(q[h * 4 + p * 2 + c] for h in range(6) for c in range(2) for p in range(2))
    assert files.read(tmp_path / "b")[f"{home}qkv_proj.weight"].startswith(mended)


def test_the_layout_that_fits_two_axes_is_asked_for(tmp_path: Path) -> None:
    files.checkpoint(tmp_path / "a", [{"w": ("F32", (24, 24))}])
    with pytest.raises(PlanError, match="more than one axis"):
        tt.inspect(tmp_path / "a", layouts={"w": "h (q|k|v) d"}, h=2)
    for axis in (0, 1):
        assert tt.inspect(tmp_path / "a", layouts={"w": f"h (q|k|v) d @ {axis}"}, h=2).projections[0].axis == axis


def test_the_stamp_outranks_the_record_and_contradicts_the_hand(tmp_path: Path) -> None:
    neox(tmp_path / "a")
    tt.convert(tmp_path / "a", tmp_path / "b", "(q|k|v) h d")
    found = tt.inspect(tmp_path / "b")
    assert {(str(one.layout), one.source) for one in found.projections} == {("(q|k|v) h d", "stamp")} and found.family == "gpt_neox"
    assert tt.inspect(tmp_path / "b", layouts={"*query_key_value*": "(q|k|v) t n d"}, t=2).projections == found.projections
    with pytest.raises(PlanError, match="contradicts the stamp") as caught:
        tt.inspect(tmp_path / "b", layouts={"*query_key_value*": "h (q|k|v) d"}, h=H)
    assert "(q|k|v) h d with h=6 d=4" in str(caught.value) and "h (q|k|v) d with h=6 d=4" in str(caught.value)


def test_what_a_stamp_says(tmp_path: Path) -> None:
    neox(tmp_path / "a", 1)
    done = tt.convert(tmp_path / "a", tmp_path / "b", "split")
    table = files.stamp(tmp_path / "b" / "model.safetensors")
    assert table["version"] == 1 and table["plan"] == done.plan.digest and len(table["layouts"]) == 6
    parts = {name[0]: f"gpt_neox.layers.0.attention.{name}.weight" for name in ("query", "key", "value")}
    assert table["layouts"]["gpt_neox.layers.0.attention.key.weight"] == {
        "layout": "(k h d)", "sizes": {"h": 6, "d": 4}, "axis": 0, "projection": QKV.format(0, "weight"), "parts": parts,
        "kind": "attention",
        "rope": "partial half: first 1 of 4 dims"}  # fmt: skip


def stamped(path: Path, text: str) -> None:
    header = {"__metadata__": {"triptych": text}, "w": files.entry("U8", [6, 2], 0, 12), "u": files.entry("U8", [2, 2], 12, 16)}
    files.raw(path, header, files.noise(16))


GOOD = {"layout": "h (q|k|v)", "sizes": {"h": 2}, "axis": 0, "projection": "w"}
STAMPS = {
    "no JSON": "{",
    "a list": "[]",
    "deep": '{"a":' * 30_000,
    "another version": json.dumps({"version": 2, "layouts": {}}),
    "no version": json.dumps({"layouts": {}}),
    "no layouts": json.dumps({"version": 1}),
    "layouts a list": json.dumps({"version": 1, "layouts": [1]}),
    "a tensor that is gone": json.dumps({"version": 1, "layouts": {"x": GOOD}}),
    "an entry a list": json.dumps({"version": 1, "layouts": {"w": [1]}}),
    "no layout": json.dumps({"version": 1, "layouts": {"w": {**GOOD, "layout": None}}}),
    "a layout that is none": json.dumps({"version": 1, "layouts": {"w": {**GOOD, "layout": "h (q|k"}}}),
    "a size too few": json.dumps({"version": 1, "layouts": {"w": {**GOOD, "sizes": {}}}}),
    "a size a text": json.dumps({"version": 1, "layouts": {"w": {**GOOD, "sizes": {"h": "2"}}}}),
    "sizes a list": json.dumps({"version": 1, "layouts": {"w": {**GOOD, "sizes": [2]}}}),
    "axis a text": json.dumps({"version": 1, "layouts": {"w": {**GOOD, "axis": "0"}}}),
    "axis negative": json.dumps({"version": 1, "layouts": {"w": {**GOOD, "axis": -1}}}),
    "projection a number": json.dumps({"version": 1, "layouts": {"w": {**GOOD, "projection": 3}}}),
    "parts a list": json.dumps({"version": 1, "layouts": {"w": {**GOOD, "parts": ["w"]}}}),
    "parts that are gone": json.dumps({"version": 1, "layouts": {"w": {**GOOD, "parts": {"q": "w", "k": "z"}}}}),
    "two fused tensors": json.dumps({"version": 1, "layouts": {"w": GOOD, "u": {**GOOD, "layout": "(k|v)", "sizes": {}}}}),
}


@pytest.mark.parametrize("text", STAMPS.values(), ids=STAMPS)
def test_damaged_stamps(tmp_path: Path, text: str) -> None:
    stamped(tmp_path / "a.safetensors", text)
    with pytest.raises(FormatError) as caught:
        tt.inspect(tmp_path / "a.safetensors")
    assert len(caught.value.text()) < 700


def test_a_stamp_that_does_not_fit_its_tensor(tmp_path: Path) -> None:
    for wrong in ({"sizes": {"h": 3}}, {"axis": 1}, {"axis": 2}):
        stamped(tmp_path / "a.safetensors", json.dumps({"version": 1, "layouts": {"w": {**GOOD, **wrong}}}))
        with pytest.raises(FormatError, match="the stamp does not fit its tensor"):
            tt.inspect(tmp_path / "a.safetensors")
    stamped(tmp_path / "a.safetensors", json.dumps({"version": 1, "layouts": {"w": GOOD}}))
    assert len(tt.inspect(tmp_path / "a.safetensors").projections) == 1


def test_inspect_in_words_and_as_data(tmp_path: Path) -> None:
    neox(tmp_path / "a")
    found = tt.inspect(tmp_path / "a")
    text = str(found)
    assert "gpt_neox\n  1 file, 5 tensors" in text and "2 x gpt_neox.layers.*.attention.query_key_value.weight" in text
    assert "h (q|k|v) d   h=6 d=4   rotary partial half: first 1 of 4 dims" in text
    told = json.loads(json.dumps(found.to_dict()))
    assert told["family"] == "gpt_neox" and told["version"] == 1 and len(told["projections"]) == 4 and told["unknown"] == {}
    files.checkpoint(tmp_path / "plain", [{"evil\x1b[31m\nname": ("U8", (3,))}])
    assert "no projection known" in str(tt.inspect(tmp_path / "plain"))
