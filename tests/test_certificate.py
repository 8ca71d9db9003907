"""The certificate: written, checked with this program and without it, against output alone and against the input too."""

from __future__ import annotations

import ast
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import triptych as tt
from tests import files, packings
from tests.injected import ROOT, certificate_script
from triptych import formats, ranges
from triptych.cli import main
from triptych.errors import FormatError, MismatchError, PlanError
from triptych.layout import Layout
from triptych.listing import listing
from triptych.sizes import bind

H, G, D, IN = 6, 2, 4, 10
SCRIPT = ROOT / "docs" / "check_certificate.py"
SIZES = {"h": H, "g": G, "d": D}


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, check=False)


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main([*map(str, arguments)])
    told = capsys.readouterr()
    return int(left.value.code or 0), told.out, told.err


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path, dict[str, str]]:
    rows = (H + 2 * G) * D
    shards: list[dict[str, tuple[str, tuple[int, ...]]]] = [
        {"x.a.weight": ("BF16", (rows, IN)), "empty": ("F32", (0, 3)), "one": ("F64", ())},
        {"x.a.bias": ("F32", (rows,)), "y.a.weight": ("F16", (7, rows)), "e": ("I64", (3, 5))},
    ]
    files.checkpoint(tmp_path / "a", shards)
    given = {"x.a.weight": "(q h|k g|v g) d @ 0", "x.a.bias": "(q h|k g|v g) d", "y.a.weight": "(q h|k g|v g) d @ 1"}
    return tmp_path / "a", tmp_path / "b", given


@pytest.mark.parametrize("to", ["g (q r|k|v) d", "split", "g d (q r|k|v)", "(q g r|k g|v g) p c"])
def test_written_and_checked(pair: tuple[Path, Path, dict[str, str]], tmp_path: Path, to: str) -> None:
    path, out, given = pair
    tt.convert(path, out, to, layouts=given, **SIZES)
    made = tt.certify(path, out, layouts=given, **SIZES)
    assert made.proof == tt.verify(path, out, layouts=given, **SIZES)
    made.write(tmp_path / "c.json")
    with pytest.raises(PlanError, match="exists"):
        made.write(tmp_path / "c.json")
    checked = tt.check_certificate(tmp_path / "c.json", out)
    assert (checked.rows, checked.projections, checked.source) == (3 * (H + 2 * G) * D, 3, None)
    assert "the input, which was not looked at" in str(checked) and checked.to_dict()["equal"] is True
    assert tt.check_certificate(tmp_path / "c.json", out, path).source == str(path)
    for source in ((), (path,)):
        done = run(tmp_path / "c.json", out, *source)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
    data = next((path / "model-00001-of-00002.safetensors").parent.glob("*1-of-00002*"))
    content = bytearray(data.read_bytes())
    content[-1] ^= 1
    data.write_bytes(content)
    with pytest.raises(MismatchError, match="a tensor of the input is not as certified"):
        tt.check_certificate(tmp_path / "c.json", out, path)
    assert "not the certified one" in run(tmp_path / "c.json", out, path).stderr and run(tmp_path / "c.json", out).returncode == 0


def test_rows_that_are_zero_or_shared(tmp_path: Path) -> None:
    """`k=0` leaves rows out, `k=v` writes one row twice: both are put back."""
    values = np.frombuffer(files.noise(3 * H * D * 4), np.float32).copy()
    values[H * D : 2 * H * D] = 0
    files.raw(tmp_path / "z.safetensors", {"w.bias": files.entry("F32", [3 * H * D], 0, values.nbytes)}, values.tobytes())
    zero = {"w.bias": "(q|k=0|v) h d"}
    tt.convert(tmp_path / "z.safetensors", tmp_path / "s.safetensors", "split", layouts=zero, h=H)
    tt.certify(tmp_path / "z.safetensors", tmp_path / "s.safetensors", layouts=zero, h=H).write(tmp_path / "z.json")
    files.checkpoint(tmp_path / "a", [{"w.weight": ("F32", ((H + G) * D, IN))}])
    shared = {"w.weight": "(q h|k=v g) d @ 0"}
    tt.convert(tmp_path / "a", tmp_path / "b", "split", layouts=shared, **SIZES)
    tt.certify(tmp_path / "a", tmp_path / "b", layouts=shared, **SIZES).write(tmp_path / "a.json")
    for name, out in (("z", tmp_path / "s.safetensors"), ("a", tmp_path / "b")):
        tt.check_certificate(tmp_path / f"{name}.json", out)
        assert run(tmp_path / f"{name}.json", out).returncode == 0
    both = {"s": files.read(tmp_path / "s.safetensors"), "b": files.read(tmp_path / "b")}
    assert len(both["s"]) == 2 and len(both["b"]) == 3


def altered(out: Path, name: str, at: int, certificate: Path) -> Path:
    """One bit of a tensor turned over, and a certificate that has the digest of what is there now."""
    tensor = formats.read(out).tensors[name]
    file = (out if out.is_dir() else out.parent) / tensor.file
    content = bytearray(file.read_bytes())
    content[tensor.start + at] ^= 1
    file.write_bytes(content)
    table = json.loads(certificate.read_text())
    table["output"]["tensors"][name]["sha256"] = hashlib.sha256(content[tensor.start : tensor.stop]).hexdigest()
    false = certificate.with_suffix(".false.json")
    false.write_text(json.dumps(table))
    return false


def test_zeros_and_shared_rows_are_checked_though_no_digest_of_the_input_tells(tmp_path: Path) -> None:
    """Bits that are dropped, or overwritten, when the rows are put back."""
    values = np.frombuffer(files.noise(3 * H * D * 4), np.float32).copy()
    values[H * D : 2 * H * D] = 0
    files.raw(tmp_path / "z.safetensors", {"w.bias": files.entry("F32", [3 * H * D], 0, values.nbytes)}, values.tobytes())
    files.checkpoint(tmp_path / "a", [{"w.weight": ("F32", ((H + G) * D, IN))}])
    cases = (
        (tmp_path / "z.safetensors", tmp_path / "s.safetensors", "h (q|k|v) d", {"w.bias": "(q|k=0|v) h d"}, {"h": H}, "w.bias", 4 * D),
        (tmp_path / "a", tmp_path / "b", "split", {"w.weight": "(q h|k=v g) d @ 0"}, SIZES, "v_proj.weight", 5),
    )
    for (path, out, to, given, sizes, name, at), says in zip(cases, ("declared zero are not", "one in the input differ"), strict=True):
        tt.convert(path, out, to, layouts=given, **sizes)
        tt.certify(path, out, layouts=given, **sizes).write(tmp_path / "c.json")
        with pytest.raises(MismatchError, match=says):
            tt.check_certificate(altered(out, name, at, tmp_path / "c.json"), out)
        assert run(tmp_path / "c.false.json", out).returncode == 1
        with pytest.raises(MismatchError, match="a row of the output is not the row of the input"):
            tt.verify(path, out, layouts=given, **sizes)
        (tmp_path / "c.json").unlink()


def test_weights_stored_the_other_way_round_and_norms(tmp_path: Path) -> None:
    """[in, out] to [out, in] with a new order, and a new rotary order that the norms follow: proved, certified, checked."""
    gpt2 = {"model_type": "gpt2", "n_embd": 24, "n_head": 3}
    made = {"h.0.attn.c_attn.weight": ("F32", (24, 72)), "h.0.attn.c_attn.bias": ("F32", (72,)), "h.0.mlp.c_fc.weight": ("F16", (24, 40))}
    qwen3 = {"model_type": "qwen3", "hidden_size": 20, "num_attention_heads": H, "num_key_value_heads": G, "head_dim": 8}
    home = "model.layers.0.self_attn."
    apart = {f"{home}{part}_proj.weight": ("BF16", (heads * 8, 20)) for part, heads in (("q", H), ("k", G), ("v", G))}
    norms = {f"{home}{part}_norm.weight": ("BF16", (8,)) for part in "qk"}
    cases = ((gpt2, made, {"to": "h (q|k|v) d", "orientation": "linear"}, 3), (qwen3, {**apart, **norms}, {"rope": "interleaved"}, 3))
    for number, (config, tensors, asked, projections) in enumerate(cases):
        path, out, certificate = (tmp_path / f"{word}{number}" for word in ("a", "b", "c"))
        parts = files.checkpoint(path, [tensors], config)
        tt.convert(path, out, **asked)
        assert sum(parts[name] != data for name, data in files.read(out).items()) == (3 if number == 0 else 4)
        made_here = tt.certify(path, out)
        assert made_here.proof.projections == projections
        made_here.write(certificate)
        tt.check_certificate(certificate, out, path)
        assert run(certificate, out, path).returncode == 0, run(certificate, out, path).stderr
        content = bytearray((out / "model.safetensors").read_bytes())
        for name in made_here.table["projections"][0]["output"]["tensors"]:
            start = 8 + int.from_bytes(content[:8], "little")
            begin = start + json.loads(content[8:start])[name]["data_offsets"][0]
            content[begin + 37 if len(made_here.table["output"]["tensors"][name]["shape"]) > 1 else begin + 3] ^= 1
        (out / "model.safetensors").write_bytes(content)
        with pytest.raises(MismatchError, match="is not the row of the input"):
            tt.verify(path, out)


def test_the_script_reads_the_language_as_the_program_does() -> None:
    """Its evaluator against the hand-checked table of all known packings, and against the listing of nested, shared and zero parts."""
    rows = certificate_script().rows
    for packing in packings.PACKINGS:
        layout = Layout(packing.layout)
        sizes = bind(layout, **packing.sizes)
        places, zeros, counts = rows((str(layout),), tuple((axis, sizes[axis]) for axis in layout.axes))
        expected = {
            (frozenset(filter(None, part.split("."))), head, dim): i for i, (part, head, dim) in enumerate(packings.listing(packing.rows))
        }
        assert expected.items() <= places.items() and (zeros, counts) == ([], [len(expected)]), packing.layout
    known = {"h": 6, "g": 2, "r": 3, "c": 2, "p": 5, "d": 10, "x": 4, "y": 7}
    nested = ("h (rot p c|pass n)", "_ g (q r|k|v) d|gate h", "(q h|k=v g) p c", "(q|k=0|v) h d", "(q|k) (rot|pass) h d", "x y h p c")
    for text in nested:
        layout = Layout(text)
        sizes = bind(layout, **{axis: known.get(axis, 3) for axis in layout.axes})
        places, zeros, counts = rows((text,), tuple((axis, sizes[axis]) for axis in layout.axes))
        listed = listing(layout, sizes)
        mine = {(frozenset(filter(None, label.part.split("."))), label.head, label.dim): row
                for row, entry in enumerate(listed) for label in entry.labels if not entry.zero}  # fmt: skip
        assert (places, sorted(set(zeros)), counts) == (mine, [row for row, entry in enumerate(listed) if entry.zero], [len(listed)]), text


def test_the_script_is_short_and_stands_alone() -> None:
    text = SCRIPT.read_text()
    assert len(text.splitlines()) <= 60
    imported = {alias.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import) for alias in node.names}
    assert imported - set(sys.stdlib_module_names) == {"numpy"} and not any(
        isinstance(n, ast.ImportFrom) for n in ast.walk(ast.parse(text))
    )


def test_the_command(pair: tuple[Path, Path, dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out, given = pair
    tt.convert(path, out, "g (q r|k|v) d", layouts=given, **SIZES)
    options = [word for glob, text in given.items() for word in ("--layout", f"{glob}={text}")] + ["-s", "h=6", "-s", "g=2", "-s", "d=4"]
    code, told, _ = command(capsys, "verify", path, out, "--certificate", tmp_path / "c.json", *options)
    assert code == 0 and "120 rows of 3 projections" in told
    assert command(capsys, "verify", path, out, "--certificate", tmp_path / "c.json", *options)[0] == 4
    code, told, _ = command(capsys, "verify", "--certificate", tmp_path / "c.json", out)
    assert code == 0 and "as certified by" in told
    code, told, _ = command(capsys, "verify", "--certificate", tmp_path / "c.json", out, "--json")
    assert json.loads(told)["rows"] == 120
    assert command(capsys, "verify", "--certificate", tmp_path / "c.json", path)[0] == 1
    assert command(capsys, "verify", out)[0] == 2
    (tmp_path / "no.json").write_text("{}")
    code, _, told = command(capsys, "verify", "--certificate", tmp_path / "no.json", out)
    assert code == 3 and "makes no sense" in told
    (tmp_path / "no.json").write_text(json.dumps({"version": 2}))
    with pytest.raises(FormatError, match="does not know"):
        tt.check_certificate(tmp_path / "no.json", out)


@pytest.mark.parametrize(
    "wrong", [{"axis": 9}, {"axis": 1 << 40}, {"sizes": {"h": 1 << 40, "g": 1, "d": 1}}, {"shape": []}, {"shape": [1 << 40, IN]}]
)
def test_numbers_that_nothing_has(pair: tuple[Path, Path, dict[str, str]], tmp_path: Path, wrong: dict[str, object]) -> None:
    """Without the input nobody else says how large it was: no memory is taken, and no rows are listed, on the certificate's word."""
    path, out, given = pair
    tt.convert(path, out, "split", layouts=given, **SIZES)
    table = tt.certify(path, out, layouts=given, **SIZES).to_dict()
    one = next(one["source"] for one in table["projections"] if "x.a.weight" in one["source"]["tensors"])
    (table["source"]["tensors"]["x.a.weight"] if "shape" in wrong else one).update(wrong)
    (tmp_path / "c.json").write_text(json.dumps(table))
    with pytest.raises(FormatError, match="makes no sense"):
        tt.check_certificate(tmp_path / "c.json", out)


@pytest.mark.parametrize(
    "wrong", [{"dtype": "F16"}, {"dtype": None}, {"shape": [(H + 2 * G) * D, 2 * IN]}, {"shape": [(H + 2 * G) * D, "x"]}]
)
def test_a_lie_about_the_numbers_of_the_input(pair: tuple[Path, Path, dict[str, str]], tmp_path: Path, wrong: dict[str, object]) -> None:
    """The digests of bytes know neither dtype nor shape: those of a projection must be the same on both sides."""
    path, out, given = pair
    tt.convert(path, out, "split", layouts=given, **SIZES)
    table = tt.certify(path, out, layouts=given, **SIZES).to_dict()
    table["source"]["tensors"]["x.a.weight"].update(wrong)
    (tmp_path / "c.json").write_text(json.dumps(table))
    with pytest.raises(MismatchError, match="dtype or shape of a projection changed"):
        tt.check_certificate(tmp_path / "c.json", out)
    assert "other dtypes or shapes" in run(tmp_path / "c.json", out).stderr


def test_of_several_errors_the_first_is_raised() -> None:
    def work(item: int) -> int:
        if item > 2:
            raise ValueError(item)
        return item

    assert ranges.in_order(work, [0, 1, 2]) == [0, 1, 2]
    for _ in range(20):
        with pytest.raises(ValueError, match="3"):
            ranges.in_order(work, range(40))
