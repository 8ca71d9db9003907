"""Record, stamp, hand and weights must agree; two vendors' files of one model, of one shape and config, are told apart by their weights."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import triptych as tt
from triptych import stamp
from triptych.agree import pairing
from triptych.cli import main
from triptych.errors import FormatError, PlanError
from triptych.families.records import parse_records

from . import weights

PLAIN, BLOCKS = "(q h|k g|v g) d", "t (q n r|k n|v n) d"
SIZES = {"t": 2, "n": 2, "r": 3, "d": 32}
"""12 query heads, 4 kv heads, 2 blocks: 768 = 2 x (192 + 64 + 64) + ... of 384 columns."""
LAYERS = (1, 2, 3, 4)
QKV = "model.layers.{}.self_attn.qkv_proj.weight"
CONFIG = {
    "model_type": "mimo-v2.5", "hidden_size": 384, "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 32, "v_head_dim": 32,
    "num_hidden_layers": 4, "hybrid_layer_pattern": [0, 0, 0, 0],
}  # fmt: skip


@cache
def layers() -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """(q, k and v one behind the other, output projection) of trained layers; every third head of k and v serves three heads of q."""
    out = []
    with safe_open(weights.minilm(), "np") as file:
        for layer in LAYERS:
            home = f"encoder.layer.{layer}.attention."
            q, k, v = (file.get_tensor(f"{home}self.{part}.weight").reshape(12, 32, 384) for part in ("query", "key", "value"))
            fused = np.concatenate([q, k[::3], v[::3]]).reshape(640, 384)
            out.append((fused, file.get_tensor(f"{home}output.dense.weight")))
    return tuple(out)


def vendor(folder: Path, layout: str, metadata: dict[str, str] | None = None, config: dict | None = CONFIG) -> Path:
    """The model as one vendor writes it."""
    folder.mkdir()
    tensors = {}
    for i, (fused, o) in enumerate(layers()):
        tensors[QKV.format(i)] = tt.repack(fused, PLAIN, layout, axis=0, **SIZES)
        tensors[f"model.layers.{i}.self_attn.o_proj.weight"] = o
    save_file(tensors, folder / "model.safetensors", metadata)
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    home = tmp_path_factory.mktemp("mimo")
    return vendor(home / "blocks", BLOCKS), vendor(home / "plain", PLAIN)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as done:
        main([str(word) for word in words])
    out = capsys.readouterr()
    return int(str(done.value.code)), out.out, out.err


def test_two_files_of_one_model_differ_in_nothing_but_the_order_of_rows(both: tuple[Path, Path]) -> None:
    blocks, plain = (load_file(folder / "model.safetensors") for folder in both)
    assert {name: (t.shape, t.dtype) for name, t in blocks.items()} == {name: (t.shape, t.dtype) for name, t in plain.items()}
    assert (both[0] / "config.json").read_bytes() == (both[1] / "config.json").read_bytes()
    for name in blocks:
        assert np.array_equal(np.sort(blocks[name], axis=0), np.sort(plain[name], axis=0))
        assert np.array_equal(blocks[name], plain[name]) is ("o_proj" in name)
    q, k, v = np.split(plain[QKV.format(0)], [384, 512])
    expected = np.concatenate([q[:192], k[:64], v[:64], q[192:], k[64:], v[64:]])
    assert np.array_equal(blocks[QKV.format(0)], expected), "2 x (192 Q + 64 K + 64 V)"


def test_detect_tells_the_two_apart(both: tuple[Path, Path]) -> None:
    for folder, layout in zip(both, (BLOCKS, PLAIN), strict=True):
        (kind,) = tt.detect_checkpoint(folder, heads=12, kv_heads=4).kinds
        assert (kind.verdict.confidence, str(kind.verdict.layout)) == ("confident", layout)


def test_convert_goes_on_where_the_weights_bear_the_record_out(both: tuple[Path, Path], tmp_path: Path) -> None:
    done = tt.plan(both[0], "split", tmp_path / "out", t=2)
    assert any("agree with t (q n r d|k n d|v n dv) with t=2 n=2 r=3 d=32 dv=32, as its record says" in note for note in done.notes)
    tt.convert(both[0], tmp_path / "out", "split", t=2)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert np.array_equal(written["model.layers.2.self_attn.k_proj.weight"], layers()[2][0][384:512])


def test_convert_refuses_the_other_one_and_says_how_to_go_on(
    both: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, text = run(capsys, "convert", both[1], tmp_path / "out", "--to", "split", "-s", "t=2")
    assert code == 4 and not (tmp_path / "out").exists()
    assert text.startswith("PlanError: the weights contradict the layout\n")
    assert "expected t (q n r d|k n d|v n dv) with t=2 n=2 r=3 d=32 dv=32   (its record)" in text
    assert re.search(r"found    \(q h\|k g\|v g\) d with [hgrd=0-9 ]*   \(the weights: \d+ nats ahead\)", text)
    options = re.search(r"--layout '(.*)=\(q h\|k g\|v g\) d'((?: -s [hgd]=\d+){3}) takes what the weights say", text)
    assert options is not None
    given = ("--layout", f"{options[1]}={PLAIN}", *options[2].split())
    assert run(capsys, "convert", both[1], tmp_path / "out", "--to", "split", *given)[0] == 0
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert np.array_equal(written["model.layers.2.self_attn.v_proj.weight"], layers()[2][0][512:])


def test_a_layout_by_hand_is_asked_about_only_when_told(both: tuple[Path, Path]) -> None:
    given = {QKV.format("*"): PLAIN}
    assert tt.plan(both[0], "split", layouts=given, h=12, g=4).changes, "a person has spoken"
    with pytest.raises(PlanError, match="contradict") as error:
        tt.plan(both[0], "split", layouts=given, h=12, g=4, check_weights=True)
    assert "(the layout by hand)" in str(error.value)


def test_weights_that_cannot_tell_leave_an_ambiguous_record_refused(tmp_path: Path) -> None:
    folder = vendor(tmp_path / "model", BLOCKS)
    tensors = load_file(folder / "model.safetensors")
    rng = np.random.default_rng(0)
    save_file({name: rng.normal(size=t.shape).astype(np.float32) for name, t in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(PlanError, match="more than one order") as error:
        tt.plan(folder, "split", t=2)
    assert "q h d|k g d|v g dv   (other files of the model)" in str(error.value) and "--layout" in str(error.value)
    (one,) = tt.inspect(folder, t=2, check_weights=True).agreements
    assert one.outcome == "cannot tell" and one.reasons, "to look at, that is no reason to stop"


def test_values_of_another_head_size_are_not_asked(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({QKV.format(0): np.zeros((2 * (6 * 32 + 2 * 32 + 2 * 16), 384), np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**CONFIG, "v_head_dim": 16}))
    with pytest.raises(PlanError, match="more than one order") as error:
        tt.plan(folder, "split", t=2)
    assert "one head size only" in str(error.value)


def test_an_ambiguous_record_that_no_statistics_can_settle_is_refused(tmp_path: Path) -> None:
    folder, records = tmp_path / "model", tmp_path / "x.toml"
    folder.mkdir()
    save_file({"mlp.gate_up.weight": np.random.default_rng(0).normal(size=(64, 24)).astype(np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "x"}')
    tensor = '[[family.tensor]]\nfused = "mlp.gate_up"\nlayout = "(gate|up) f"\nkind = "mlp"\n'
    records.write_text(f'[[family]]\ntypes = ["x"]\nsource = "s"\n{tensor}ambiguous = ["f (gate|up)"]\n')
    with pytest.raises(PlanError, match="more than one order"):
        tt.plan(folder, "f (gate|up)", records=records)
    assert tt.plan(folder, "f (gate|up)", records=records, layouts={"mlp.gate_up.weight": "(gate|up) f"}).changes
    (one,) = tt.lint(folder, records=records).findings
    assert one.rule == "unknown-layout" and "files of this model exist as f (gate|up) too" in one.message


def test_inspect_says_that_a_record_is_ambiguous_and_asks_when_told(both: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    text = str(tt.inspect(both[1], t=2))
    assert "files of this model exist as t (q n r d|k n d|v n dv) or q h d|k g d|v g dv" in text and "--check-weights" in text
    found = tt.inspect(both[0], t=2, check_weights=True)
    (one,) = found.agreements
    assert (one.outcome, one.name, len(one.tensors)) == ("agrees", QKV.format("*"), 4) and one.evidence > 12
    assert found.to_dict()["agreements"][0]["outcome"] == "agrees"
    assert run(capsys, "inspect", both[1], "-s", "t=2", "--check-weights")[0] == 4


def test_a_stamp_is_checked_against_the_weights_and_against_the_record(tmp_path: Path) -> None:
    told = tt.Layout(BLOCKS)
    entries = [(QKV.format(i), stamp.Stamped(told, tt.bind(told, **SIZES), 0, QKV.format(i))) for i in range(len(LAYERS))]
    wrong = vendor(tmp_path / "wrong", PLAIN, {stamp.KEY: stamp.encode(entries, "")}, None)
    assert tt.plan(wrong, "split").changes, "without being told, the stamp is believed"
    with pytest.raises(PlanError, match="contradict") as error:
        tt.plan(wrong, "split", check_weights=True)
    assert "(its stamp)" in str(error.value)
    plain = tt.Layout(PLAIN)
    entries = [(name, stamp.Stamped(plain, tt.bind(plain, h=12, g=4, d=32), 0, name)) for name, _ in entries]
    right = vendor(tmp_path / "right", PLAIN, {stamp.KEY: stamp.encode(entries, "")})
    notes = tt.inspect(right, t=2).notes
    assert notes == (
        "model.layers.*.self_attn.qkv_proj.weight is stamped (q h|k g|v g) d; its record says t (q n r d|k n d|v n dv), "
        "and the code of mimo-v2.5 reads it so",
    ), "and the stamp settles what the record leaves open"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("h (q|k|v) d", "h (k|q|v) d", True),  # q and k of one size change places
        ("h (q|k|v) d", "h (v|k|q) d", False),
        ("h (q|k|v) d", "(q|k|v) h d", False),
        ("(q h c p|k h c p|v h d)", "(q h p c|k h p c|v h d)", True),  # rotary order moves q and k alike
        ("g (q r|k|v) d", "g (k|q r|v) d", False),
        ("g (q r|k|v) d", "t (q n r|k n|v n) d", False),
        ("(q g r|k g|v g) d", "(q h|k g|v g) d", True),
        ("(q g r|k g|v g) d", "(q r g|k g|v g) d", False),
        ("(q h d|k g d|v g dv)", "(q h|k g|v g) d", True),
    ],
)
def test_what_statistics_can_see_of_a_layout(one: str, other: str, same: bool) -> None:
    found = []
    for text in (one, other):
        layout = tt.Layout(text)
        sizes = {"h": 12, "g": 12 if " r" not in text and " g" not in text else 4, "d": 6, "c": 2, "p": 3, "dv": 6, "t": 2, "n": 2, "r": 3}
        found.append(pairing(layout, tt.bind(layout, **{axis: size for axis, size in sizes.items() if axis in layout.axes})))
    assert found[0] is not None and (found[0] == found[1]) is same


def test_a_record_says_that_it_is_ambiguous() -> None:
    text = '[[family]]\ntypes = ["x"]\nsource = "s"\n[[family.tensor]]\nfused = "qkv"\nlayout = "h (q|k|v) d"\nambiguous = ["{}"]\n'
    (record,) = parse_records(text.format("(q|k|v) h d"), "x.toml")
    assert record.entries[0].ambiguous == (tt.Layout("(q|k|v) h d"),)
    with pytest.raises(FormatError, match="layout is none"):
        parse_records(text.format("(q|"), "x.toml")


def test_layouts_that_statistics_know_nothing_of() -> None:
    for text, sizes in (
        ("(gate|up) f", {"f": 8}),
        ("h (q dk|k dk|v dv)", {"h": 2, "dk": 3, "dv": 5}),
        ("(k|v) d", {"d": 4}),
        ("(q h|k=v g) d", {"h": 6, "g": 2, "d": 4}),
    ):
        assert pairing(tt.Layout(text), tt.bind(tt.Layout(text), **sizes)) is None
