"""Bad input at the command line: each a five-line error, its documented exit code, nothing left behind."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests import files
from triptych.cli import main

NEOX = {"model_type": "gpt_neox", "hidden_size": 24, "num_attention_heads": 6}
SHARDS = [{f"gpt_neox.layers.{i}.attention.query_key_value.weight": ("BF16", (72, 24)), f"n.{i}": ("U8", (3,))} for i in range(2)]
FIRST = "model-00001-of-00002.safetensors"


class Case(NamedTuple):
    """A command, run where `a` is a good checkpoint that `spoil` has spoiled; its exit code and a word of its message."""

    command: str
    code: int
    match: str
    spoil: Callable[[Path], object] = lambda folder: None


def cut(folder: Path) -> None:
    path = folder / "a" / FIRST
    path.write_bytes(path.read_bytes()[:-7])


def lies(folder: Path) -> None:
    files.raw(folder / "a" / FIRST, {"w": files.entry("BF16", [1 << 40, 1 << 40], 0, 4)}, b"abcd")


def overlaps(folder: Path) -> None:
    files.raw(folder / "a" / FIRST, {"w": files.entry("U8", [4], 0, 4), "v": files.entry("U8", [4], 2, 6)}, b"abcdef")


def escapes(folder: Path) -> None:
    (folder / "a" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "../x"}}))
    files.safetensors(folder / "x", {"w": ("U8", (3,))})


def unfit(folder: Path) -> None:
    (folder / "a" / "config.json").write_text(json.dumps({**NEOX, "hidden_size": 36}))


def exists(folder: Path) -> None:
    (folder / "b").mkdir()
    (folder / "b" / "precious").write_text("mine")


TO = '--to "(q|k|v) h d"'
CASES = {
    "unknown axis": Case('explain "h (q|k|v) d" -s h=4 -s d=32 -s heads=3', 2, "unknown axis 'heads'"),
    "unknown axis of a checkpoint": Case(f"convert a b {TO} -s zz=3", 2, "unknown axis 'zz'"),
    "a layout that is none": Case('convert a b --to "(q|k|v h d"', 2, "never closed"),
    "impossible sizes": Case('explain "g (q r|k|v) d" -s h=10 -s g=4 -s d=8', 2, "h must be a multiple of g"),
    "impossible sizes of a checkpoint": Case('convert a b --to "t (q|k|v) n d" -s t=4', 2, "must be a multiple"),
    "a size that is no number": Case(f"convert a b {TO} -s h=many", 2, "positive whole number"),
    "a tensor that does not fit its layout": Case(
        f'convert a b {TO} --layout "*query_key_value*=h (q|k|v) d" -s h=5 -s d=4', 2, "do not fill"
    ),
    "a tensor that does not fit its config": Case(f"convert a b {TO}", 4, "not known", unfit),
    "a truncated file": Case(f"convert a b {TO}", 3, "cut short", cut),
    "a header that lies": Case(f"convert a b {TO}", 3, "do not fit its shape", lies),
    "a header with overlaps": Case(f"convert a b {TO}", 3, "overlap", overlaps),
    "an index that names ../x": Case(f"convert a b {TO}", 3, "outside its folder", escapes),
    "no such input": Case(f"convert nothing b {TO}", 3, "no such file or folder"),
    "an output that exists": Case(f"convert a b {TO}", 4, "the output exists", exists),
    "an output that is the input": Case(f"convert a a {TO}", 4, "inside the input"),
    "an output inside the input": Case(f"convert a a/b {TO}", 4, "inside the input"),
    "an output inside the input, said otherwise": Case(f"convert a/../a ./a/../a/b {TO}", 4, "inside the input"),
    "an output in no folder": Case(f"convert a no/b {TO}", 4, "no folder to lie in"),
    "nothing to convert": Case('convert a b --to "f (gate|up)"', 4, "nothing to convert"),
    "an unknown option": Case(f"convert a b {TO} --fast", 2, "No such option"),
    "a mismatch": Case("verify a c", 1, "is missing in the output", lambda folder: files.checkpoint(folder / "c", SHARDS[:1], NEOX)),
}


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], case: Case, as_json: bool) -> None:
    files.checkpoint(tmp_path / "a", SHARDS, NEOX)
    case.spoil(tmp_path)
    before = files.snapshot(tmp_path), sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main([*shlex.split(case.command), *(["--json"] if as_json else [])])
    out, err = capsys.readouterr()
    assert caught.value.code == case.code
    assert out == "", "the error is talk, not a result"
    if as_json:
        told = json.loads(err)
        assert case.match in told["what"] + json.dumps(told) and told["exit_code"] == case.code and told["error"].endswith("Error")
    else:
        lines = err.rstrip("\n").splitlines()
        assert case.match in err and 2 <= len(lines) <= 6, err
        assert lines[0].split(":")[0].endswith("Error") and all(line.startswith("  ") for line in lines[1:])
        assert all(len(line) <= 200 for line in lines)
    assert (files.snapshot(tmp_path), sorted(tmp_path.rglob("*"))) == before, "something was left behind"
