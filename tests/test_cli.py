"""The command line is a skin: the library's results as text or JSON on stdout, talk on stderr, exit codes."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import triptych as tt
from tests import files
from triptych.cli import commands, main
from triptych.progress import progress

H, D = 6, 4
NEOX = {"model_type": "gpt_neox", "hidden_size": H * D, "num_attention_heads": H}
SHAPES = {"gpt_neox.layers.0.attention.query_key_value.weight": ("BF16", (3 * H * D, H * D)), "n": ("U8", (3,))}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    files.checkpoint(tmp_path / "a", [SHAPES], NEOX)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    out, err = capsys.readouterr()
    assert isinstance(caught.value.code, int)
    return caught.value.code, out, err


def test_inspect(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "inspect", "a") == (0, f"{tt.inspect('a')}\n", "")
    code, out, err = call(capsys, "inspect", "a", "--json")
    assert (code, err) == (0, "") and json.loads(out) == tt.inspect("a").to_dict()
    code, out, _ = call(capsys, "inspect", "a", "--layout", "*query_key_value*=(q|k|v) t n d", "-s", "t=2")
    assert "(q|k|v) t n d" in out and "note:" in out


def test_explain(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "explain", "h (q|k|v) d", "(q|k|v) h d", "-s", "h=4", "-s", "d=32")
    assert (code, err) == (0, "") and "\x1b" not in out and max(map(len, out.splitlines())) <= 80
    assert call(capsys, "explain", "h (q|k|v) d", "(q|k|v) h d", "-s", "h=4", "-s", "d=32", "--ascii")[1].isascii()
    told = json.loads(call(capsys, "explain", "h (q|k|v) d", "(q|k|v) h d", "-s", "h=4", "-s", "d=32", "--json")[1])
    assert told == json.loads(json.dumps(tt.explain("h (q|k|v) d", "(q|k|v) h d", h=4, d=32).to_dict()))
    assert call(capsys, "explain", "h (q|k|v) d", "-s", "h=2", "-s", "d=3")[0] == 0


def test_plan_convert_verify(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to = ("--to", "(q|k|v) h d")
    assert call(capsys, "plan", "a", *to) == (0, f"{tt.plan('a', '(q|k|v) h d')}\n", "")
    code, out, _ = call(capsys, "plan", "a", "b", *to, "--json")
    assert code == 0 and json.loads(out) == json.loads(json.dumps(tt.plan("a", "(q|k|v) h d", "b").to_dict()))
    assert call(capsys, "convert", "a", "b", *to, "--dry-run")[1] == f"{tt.plan('a', '(q|k|v) h d', 'b')}\n"
    assert not Path("b").exists()
    code, out, err = call(capsys, "convert", "a", "b", *to, "--workers", "1")
    assert code == 0 and out.startswith("b: 1 projections to (q|k|v) h d, 1 tensors unchanged; ") and out.count("\n") == 1
    assert err == "note: config.json still says gpt_neox, whose own code does not read the result\n"
    assert call(capsys, "verify", "a", "b", *to) == (0, f"{tt.verify('a', 'b')}\n", "")
    assert json.loads(call(capsys, "verify", "a", "b", "--json")[1]) == tt.verify("a", "b").to_dict()
    code, out, err = call(capsys, "verify", "a", "b", "--to", "h (q|k|v) d")
    assert code == 1 and out == "" and err.startswith("MismatchError: the output has another layout\n")
    told = json.loads(call(capsys, "convert", "a", "c", "--to", "split", "--json")[1])
    assert told["files"] == ["model.safetensors", "config.json"] and told["kept"] == [] and told["target"] == "split"


def test_names_and_layouts_by_option(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "plan", "a/model.safetensors", "--to", "split", "--name", "*.query.weight=*.wq.weight")
    assert code == 0 and "attention.wq.weight" in out
    for wrong in (["--name", "x"], ["--name", "=x"], ["--layout", "a="], ["-s", "h"], ["-s", "h=1.5"], ["-s", "h=²"], ["-s", "to=3"],
                  ["-s", "h=4", "-s", "h=5"], ["-s", f"h={'9' * 30}"]):  # fmt: skip
        code, out, err = call(capsys, "plan", "a", "--to", "split", *wrong)
        assert (code, out) == (2, "") and err.startswith("UsageError: ")


def test_names_of_unknown_origin_are_harmless(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "x\x1b[31m\nqkv_proj.weight"
    files.checkpoint(tmp_path / "a", [{evil: ("U8", (24, 3)), "l.qkv_proj.weight": ("U8", (24, 3))}])
    for arguments in (["inspect"], ["inspect", "--layout", "*=h (q|k|v) d @ 0", "-s", "h=4"], ["plan", "--to", "split"],
                      ["plan", "--to", "h d (q|k|v)", "--layout", "*=h (q|k|v) d @ 0", "-s", "h=4"]):  # fmt: skip
        _, out, err = call(capsys, arguments[0], str(tmp_path / "a"), *arguments[1:])
        assert "\x1b" not in out + err and "\nqkv_proj" not in out


def test_interrupts_bugs_and_closed_pipes(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from triptych import checkpoint

    def raises(error: BaseException) -> Any:
        def inspect(*args: Any, **more: Any) -> None:
            raise error

        return inspect

    monkeypatch.setattr(checkpoint, "inspect", raises(KeyboardInterrupt()))
    code, out, err = call(capsys, "inspect", "a")
    assert (code, out, err.strip()) == (130, "", "interrupted")
    with monkeypatch.context() as patched:
        patched.setattr(import_module("triptych.run"), "run", raises(KeyboardInterrupt()))
        code, _, err = call(capsys, "convert", "a", "b", "--to", "split")
    assert code == 130 and "the same command goes on where this one stopped" in err
    monkeypatch.setattr(checkpoint, "inspect", raises(ZeroDivisionError("a bug")))
    code, out, err = call(capsys, "inspect", "a")
    assert (code, out) == (70, "") and "Traceback" in err
    monkeypatch.setattr(checkpoint, "inspect", raises(PermissionError(13, "Permission denied", "a/x\x1b")))
    code, out, err = call(capsys, "inspect", "a")
    assert (code, out) == (3, "") and err == "OSError: a file cannot be used\n  file     a/x\\x1b\n  found    Permission denied\n"
    run = subprocess.run(f"{sys.executable} -m triptych.cli --help | head -c 1", shell=True, capture_output=True, text=True)
    assert run.stderr == "" and run.stdout == "U"


def test_help_is_quick_and_loads_nothing() -> None:
    code = (
        "import sys\nsys.argv = ['triptych', '--help']\nfrom triptych.cli import main\ntry: main()\nexcept SystemExit: print(*sys.modules)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3
    assert not {"numpy", "rich", "torch", "triptych.plan"} & set(run.stdout.split("\n")[-2].split()), "the last line lists the modules"


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "--help")
    assert code == 0 and "Exit codes: 0 done, 1 a mismatch" in out
    for name in commands.commands:
        code, out, err = call(capsys, name, "--help")
        assert code == 0 and err == "" and "--json" in out
    assert call(capsys, "--version")[1].split()[-1] == tt.__version__
    assert call(capsys)[0] == 2


def test_a_bar_while_a_person_looks(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress("auto", 9) as tick:
        assert tick is not None
        tick(3)
    with progress("none", 9) as tick:
        assert tick is None


def test_the_module_runs_as_a_program(here: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "triptych.cli", "convert", "a", "b", "--to", "split"], capture_output=True, text=True, env=os.environ
    )
    assert run.returncode == 0 and run.stdout.startswith("b: ") and Path("b/model.safetensors").exists()
