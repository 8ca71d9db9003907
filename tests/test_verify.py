"""The proof: it holds for what is right, and every wrong byte, row, name, layout and stamp is found and named."""

from __future__ import annotations

import ast
import json
import shutil
import sys
from pathlib import Path

import pytest

import triptych as tt
from tests import files, packings
from triptych.errors import FormatError, MismatchError, PlanError
from triptych.layout import Layout
from triptych.listing import listing, origins
from triptych.sizes import bind

H, G, D, IN = 6, 2, 4, 10
NEOX = {"model_type": "gpt_neox", "hidden_size": H * D, "num_attention_heads": H}
QKV = "gpt_neox.layers.0.attention.query_key_value."
SHAPES: dict[str, tuple[str, tuple[int, ...]]] = {
    f"{QKV}weight": ("BF16", (3 * H * D, H * D)),
    f"{QKV}bias": ("BF16", (3 * H * D,)),
    "other": ("F32", (7,)),
    "none": ("F32", (0,)),
}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint and what it was converted to: `(q|k|v) h d`."""
    files.checkpoint(tmp_path / "a", [SHAPES], NEOX)
    tt.convert(tmp_path / "a", tmp_path / "b", "(q|k|v) h d")
    return tmp_path / "a", tmp_path / "b"


def rewrite(folder: Path, name: str, change: slice, new: bytes) -> None:
    """Change bytes of one tensor of a single-file checkpoint in place."""
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    offsets = json.loads(content[8:start])[name]["data_offsets"]
    data = content[start + offsets[0] : start + offsets[1]]
    data[change] = new
    content[start + offsets[0] : start + offsets[1]] = data
    path.write_bytes(content)


def restamp(folder: Path, **entries: object) -> None:
    """Change what the stamp says of the weight."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    told = json.loads(header["__metadata__"]["triptych"])
    told["layouts"][f"{QKV}weight"] |= entries
    header["__metadata__"]["triptych"] = json.dumps(told)
    files.raw(path, header, content[start:])


def test_what_is_right(pair: tuple[Path, Path]) -> None:
    proof = tt.verify(*pair)
    assert (proof.projections, proof.rows, proof.tensors) == (2, 2 * 3 * H * D, 2)
    assert "144 rows of 2 projections compared by label, 2 other tensors byte for byte" in str(proof)
    assert json.loads(json.dumps(proof.to_dict()))["equal"] is True
    assert tt.verify(*pair, "(q|k|v) h d") == proof and tt.verify(*pair, "(q|k|v) t n d", t=2) == proof
    tt.verify(pair[0], pair[0])


def test_every_row_counts(pair: tuple[Path, Path]) -> None:
    """One bit in each row of the weight in turn: the right row, part, head and dim are named."""
    labels = Layout("(q|k|v) h d").rows(h=H, d=D)
    kept = (pair[1] / "model.safetensors").read_bytes()
    data = files.read(pair[1])[f"{QKV}weight"]
    for row, (part, head, dim) in enumerate(labels):
        byte = row * H * D * 2 + row % (H * D * 2)
        rewrite(pair[1], f"{QKV}weight", slice(byte, byte + 1), bytes([data[byte] ^ 1]))
        with pytest.raises(MismatchError) as caught:
            tt.verify(*pair)
        source = Layout("h (q|k|v) d").rows(h=H, d=D).index((part, head, dim))
        assert caught.value.fields["where"] == f"row {row}: part {part}, head {head}, dim {dim}   ((q|k|v) h d)"
        assert caught.value.fields["expected"] == f"the bytes of row {source} of {QKV}weight"
        (pair[1] / "model.safetensors").write_bytes(kept)
    tt.verify(*pair)


def test_other_tensors_count(pair: tuple[Path, Path]) -> None:
    data = files.read(pair[1])["other"]
    rewrite(pair[1], "other", slice(13, 14), bytes([data[13] ^ 128]))
    with pytest.raises(MismatchError, match="should be unchanged differs") as caught:
        tt.verify(*pair)
    assert caught.value.fields["where"] == "byte 13 of its data" and caught.value.exit_code == 1


def test_wrong_stamps(pair: tuple[Path, Path]) -> None:
    """A stamp that claims another layout than the bytes have is found by the bytes, another one than was asked for by `to`."""
    wrong: list[tuple[dict[str, object], str]] = [
        ({"layout": "(q|v|k) h d"}, "part v, head 0, dim 0"),
        ({"layout": "h (q|k|v) d"}, "row 4: part k, head 0"),
        ({"layout": "h (q|k|w) d"}, "do not hold the same rows"),
        ({"layout": "(q|k) h d", "sizes": {"h": 9, "d": D}}, "do not hold the same rows"),
        ({"projection": "nothing"}, "not known in the input"),
    ]
    for entries, match in wrong:
        shutil.rmtree(pair[1])
        tt.convert(*pair, "(q|k|v) h d")
        restamp(pair[1], **entries)
        with pytest.raises(MismatchError, match=match):
            tt.verify(*pair)
    shutil.rmtree(pair[1])
    tt.convert(*pair, "h d (q|k|v)")
    tt.verify(*pair)
    tt.verify(*pair, "fused:h d (q|k|v)")
    for to, match in (("(q|k|v) h d", "another layout"), ("fused:(q|k|v) h d", "another layout"),
                      ("split", "missing in the output")):  # fmt: skip
        with pytest.raises(MismatchError, match=match):
            tt.verify(*pair, to)
    with pytest.raises(PlanError, match="speaks of no projection"):
        tt.verify(*pair, "h (k|v) d")
    shutil.rmtree(pair[1])
    tt.convert(*pair, "split")
    tt.verify(*pair, "split")
    with pytest.raises(MismatchError, match="missing in the output"):
        tt.verify(*pair, "h (q|k|v) d")


def test_files_beside_the_weights_are_named(pair: tuple[Path, Path]) -> None:
    """People edit config.json after a conversion: no mismatch, but said."""
    assert tt.verify(*pair).notes == ()
    (pair[0] / "tokenizer.json").write_text("{}")
    (pair[1] / "config.json").write_text("{}")
    proof = tt.verify(*pair)
    assert proof.notes == ("not in the output: tokenizer.json", "not the same in the output: config.json")
    assert "note: not in the output: tokenizer.json" in str(proof) and proof.to_dict()["notes"] == list(proof.notes)


def test_parts_that_nest_in_another_order(tmp_path: Path) -> None:
    """`(q|k) (rot|pass)` and `(rot|pass) (q|k)` label the same rows."""
    files.checkpoint(tmp_path / "a", [{"w": ("F32", (2 * 2 * H * D, IN))}])
    given = {"w": "(q|k) (rot|pass) h d"}
    tt.convert(tmp_path / "a", tmp_path / "b", "(rot|pass) (q|k) h d", layouts=given, h=H)
    assert tt.verify(tmp_path / "a", tmp_path / "b", layouts=given, h=H).rows == 4 * H * D


def test_missing_and_changed_tensors(pair: tuple[Path, Path], tmp_path: Path) -> None:
    wrong: list[tuple[dict[str, tuple[str, tuple[int, ...]] | None], str]] = [
        ({"other": None}, "missing in the output"),
        ({"more": ("U8", (1,))}, "missing in the input"),
        ({"other": ("F32", (7, 1))}, "dtype or shape"),
        ({"other": ("F64", (7,))}, "dtype or shape"),
        ({f"{QKV}weight": ("F16", (3 * H * D, H * D))}, "dtype or shape"),
        ({f"{QKV}bias": None}, "missing"),
    ]
    for number, (change, match) in enumerate(wrong):
        made = {name: told for name, told in {**SHAPES, **change}.items() if told}
        files.checkpoint(tmp_path / f"c{number}", [made], NEOX)
        with pytest.raises(MismatchError, match=match):
            tt.verify(pair[0], tmp_path / f"c{number}")


@pytest.mark.parametrize("axis", [0, 1])
def test_split_join_grouped_and_both_axes(tmp_path: Path, axis: int) -> None:
    rows = (H + 2 * G) * D
    made = {"w.weight": ("F32", (rows, IN) if axis == 0 else (IN, rows)), "w.bias": ("F32", (rows,))}
    files.checkpoint(tmp_path / "a", [made])
    given = {"w.weight": f"(q h|k g|v g) d @ {axis}", "w.bias": "(q h|k g|v g) d"}
    for number, to in enumerate(("g (q r|k|v) d", "split", "g d (q r|k|v)")):
        tt.convert(tmp_path / "a", tmp_path / f"b{number}", to, layouts=given, h=H, g=G)
        proof = tt.verify(tmp_path / "a", tmp_path / f"b{number}", layouts=given, h=H, g=G)
        assert proof.rows == 2 * rows
        with pytest.raises(MismatchError, match="not known in the input"):
            tt.verify(tmp_path / "a", tmp_path / f"b{number}")
    name = "k_proj.weight"
    data = files.read(tmp_path / "b1")[name]
    rewrite(tmp_path / "b1", name, slice(len(data) - 1, len(data)), bytes([data[-1] ^ 1]))
    with pytest.raises(MismatchError, match="part k, head 1, dim 3"):
        tt.verify(tmp_path / "a", tmp_path / "b1", layouts=given, h=H, g=G)
    tt.convert(tmp_path / "b2", tmp_path / "c", "split")
    tt.verify(tmp_path / "b2", tmp_path / "c")


def test_small_chunks_find_the_same(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = sys.modules["triptych.ranges"]
    files.checkpoint(tmp_path / "c", [{"w": ("BF16", (IN, 3 * H * D))}])
    tt.convert(tmp_path / "c", tmp_path / "d", "h d (q|k|v)", layouts={"w": "h (q|k|v) d @ 1"}, h=H)
    for chunk in (1, 50, 300):
        monkeypatch.setattr(module, "CHUNK", chunk)
        tt.verify(*pair)
        tt.verify(tmp_path / "c", tmp_path / "d", layouts={"w": "h (q|k|v) d @ 1"}, h=H)
    rewrite(tmp_path / "d", "w", slice(-1, None), b"\xaa")
    for chunk in (1, 300, 1 << 20):
        monkeypatch.setattr(module, "CHUNK", chunk)
        with pytest.raises(MismatchError, match="part v, head 5, dim 3"):
            tt.verify(tmp_path / "c", tmp_path / "d", layouts={"w": "h (q|k|v) d @ 1"}, h=H)


def test_rows_declared_zero_and_shared(tmp_path: Path) -> None:
    zeroed = bytearray(files.noise(3 * H * D * 4))
    zeroed[H * D * 4 : 2 * H * D * 4] = bytes(H * D * 4)
    files.raw(tmp_path / "z.safetensors", {"w.bias": files.entry("F32", [3 * H * D], 0, len(zeroed))}, bytes(zeroed))
    given = {"w.bias": "(q|k=0|v) h d"}
    tt.convert(tmp_path / "z.safetensors", tmp_path / "s.safetensors", "split", layouts=given, h=H)
    tt.verify(tmp_path / "z.safetensors", tmp_path / "s.safetensors", layouts=given, h=H)
    wrong = bytes(zeroed).replace(bytes(8), b"\0\0\0\1" * 2)
    files.raw(tmp_path / "z.safetensors", {"w.bias": files.entry("F32", [3 * H * D], 0, len(wrong))}, wrong)
    with pytest.raises(MismatchError, match="declared zero is not"):
        tt.verify(tmp_path / "z.safetensors", tmp_path / "s.safetensors", layouts=given, h=H)
    files.checkpoint(tmp_path / "a", [{"w.weight": ("F32", ((H + G) * D, IN))}])
    tt.convert(tmp_path / "a", tmp_path / "b", "split", layouts={"w.weight": "(q h|k=v g) d"}, h=H, g=G)
    tt.verify(tmp_path / "a", tmp_path / "b", layouts={"w.weight": "(q h|k=v g) d"}, h=H, g=G)


def test_the_listing_is_the_language() -> None:
    """The evaluator of the proof against the hand-checked table of all known packings."""
    for packing in packings.PACKINGS:
        layout = Layout(packing.layout)
        mine = [tuple(entry.labels[0]) for entry in listing(layout, bind(layout, **packing.sizes))]
        assert mine == packings.listing(packing.rows), packing.layout


def test_the_proof_imports_neither_row_maps_nor_runs() -> None:
    """Nothing that makes a conversion is in reach of the file that proves it."""
    module = sys.modules["triptych.verify"]
    tree = ast.parse(Path(module.__file__).read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not imported & {"rowmap", "relay", "mover", "run", "plan", "steps", "tensors"} and "layout" in imported


def test_a_converter_that_errs_is_found(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The row map is made for another layout than the one in the stamp: the plan's own check cannot see it, the proof does."""
    module = sys.modules["triptych.relay"]
    right = module.between
    for number, wrong in enumerate(("(q|v|k) h d", "h (q|k|v) d", "(q|k|v) d h")):
        monkeypatch.setattr(module, "between", lambda source, target, sizes, wrong=wrong: right(source, Layout(wrong), sizes))
        module.relay.cache_clear()
        out = pair[1].parent / str(number)
        tt.convert(pair[0], out, "(q|k|v) h d")
        with pytest.raises(MismatchError, match="is not the row of the input"):
            tt.verify(pair[0], out)
    module.relay.cache_clear()


def test_files_that_end_early(pair: tuple[Path, Path]) -> None:
    path = pair[1] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FormatError, match="cut short"):
        tt.verify(*pair)


@pytest.mark.parametrize(
    ("sources", "targets", "says"),
    [
        (["(q h)", "(q h)"], ["(q h)"], "part q, head 0, dim 0 stands twice in the input"),
        (["(q h)"], ["(q|k) h"], "part k, head 0, dim 0 of the output is not in the input"),
        (["(q|k) h"], ["(q h)"], "part k, head 0, dim 0 of the input is not in the output"),
        (["(q|k) h"], ["(q=k h)"], "part q, head 0, dim 0 of the output is two rows of the input"),
    ],
)
def test_rows_that_differ_by_their_labels_are_named(sources: list[str], targets: list[str], says: str) -> None:
    old, new = (tuple(map(Layout, side)) for side in (sources, targets))
    assert origins(old, new, bind(*old, h=2), bind(*new, h=2)) == says
