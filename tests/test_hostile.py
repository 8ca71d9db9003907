"""Hostile files: each gives the error that it should, soon, in little memory, and the reader does nothing but read."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import safetensors.numpy
import torch

from triptych.errors import TriptychError
from triptych.formats import gguf as our_gguf
from triptych.formats import read_header as read_safetensors
from triptych.formats import torch_zip

from .crafted import entry, gguf_file, info, item, safetensors_file, string, table, tensor, torch_file
from .hostile import CASES

ROOT = Path(__file__).parent.parent
SECONDS, MEGABYTES, LINES, LETTERS = 1.0, 200.0, 6, 2000
GOOD = {
    "a.safetensors": safetensors_file({"a": entry(0, 24, "F32", [2, 3]), "b": entry(24, 27), "__metadata__": {"format": "pt"}}, bytes(27)),
    "a.bin": torch_file(table(a=tensor(), b=tensor((2,), (1,), 4))),
    "a.gguf": gguf_file(
        [item(b"general.architecture", 8, string(b"llama")), item(b"list", 9, struct.pack("<IQ", 8, 2) + string(b"x") + string(b"y"))],
        [info(b"a"), info(b"b", (32,), 2, 128)], bytes(160),
    ),
}  # fmt: skip
READERS = {
    "a.safetensors": read_safetensors,
    "a.bin": lambda path: torch_zip.read(path).plain(),
    "a.gguf": lambda path: our_gguf.read(path).header,
}


def wrong(result: dict[str, object]) -> list[str]:
    """What is not as it should be in the reading of one case."""
    case = next(case for case in CASES if case.name == result["name"])
    seconds, megabytes, told = float(str(result["seconds"])), float(str(result["megabytes"])), str(result["told"])
    checks = {
        f"{result['error']} {result['exit']} in place of {case.expected}": (result["error"], result["exit"]) == case.expected,
        f"{told!r} does not speak of {case.what!r}": bool(re.search(case.what, told.split("\n")[0])),
        f"{seconds:.2f} s": seconds < SECONDS,
        f"{megabytes:.0f} MB": megabytes < MEGABYTES,
        f"{result['lines']} lines": int(str(result["lines"])) <= LINES,
        f"{result['letters']} letters": int(str(result["letters"])) <= LETTERS,
        "characters that a terminal obeys": not re.search(r"[^\n -~\u00a0-\uffff]", told),
        f"it did {result['did']}": not result["did"],
        "the folder is not as it was": not result["changed"],
        f"status {result['status']}": result["status"] == 0,
    }
    return [what for what, fine in checks.items() if not fine]


@pytest.fixture
def memory() -> Iterator[Callable[[bytes], Path]]:
    """A file that lies in memory and is given new content again and again."""
    fd = os.memfd_create("file")

    def holding(data: bytes) -> Path:
        os.truncate(fd, len(data))
        os.pwrite(fd, data, 0)
        return Path(f"/proc/self/fd/{fd}")

    yield holding
    os.close(fd)


def results(*kinds: str) -> list[dict[str, object]]:
    run = subprocess.run([sys.executable, "-m", "tests.hostile_run", *kinds], cwd=ROOT, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.parametrize("kind", ["safetensors", "folder", "plan", "torch", "gguf"])
def test_hostile_files(kind: str) -> None:
    found = results(kind)
    assert [result["name"] for result in found] == [case.name for case in CASES if case.kind == kind]
    assert {str(result["name"]): faults for result in found if (faults := wrong(result))} == {}


def test_there_are_enough_of_every_kind() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 200
    assert min(Counter(case.kind for case in CASES).values()) >= 20


def test_the_watch_sees_code_that_runs(tmp_path: Path) -> None:
    """The same harness on a reader that unpickles, and on one that writes."""
    code = """
import os, pathlib, pickle
from tests import crafted as c, hostile_run as h
def unpickles(path): pickle.loads(path.read_bytes())
def writes(path): path.with_suffix(".x").write_text("x")
for reader in (unpickles, writes):
    h.READERS["torch"] = reader
    print(h.json.dumps(h.run(h.Case("x", "torch", c.one("a.bin", b"cos\\nsystem\\n(S'true'\\ntR."), ("FormatError", 3), ""))))
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    unpickled, written = map(json.loads, run.stdout.splitlines())
    assert any(deed.startswith("os.system") for deed in unpickled["did"]) and not unpickled["changed"]
    assert any(deed.startswith("open") for deed in written["did"]) and written["changed"]


def test_the_files_before_they_were_broken_are_good(tmp_path: Path) -> None:
    for name, data in GOOD.items():
        (tmp_path / name).write_bytes(data)
        assert [tensor.name for tensor in READERS[name](tmp_path / name).tensors] == ["a", "b"]
    theirs = torch.load(tmp_path / "a.bin", weights_only=True)
    assert {name: tensor.tolist() for name, tensor in theirs.items()} == {"a": [[0.0] * 3] * 2, "b": [0.0] * 2}
    assert {name: array.shape for name, array in safetensors.numpy.load_file(tmp_path / "a.safetensors").items()} == {
        "a": (2, 3),
        "b": (3,),
    }
    assert [(tensor.name, tuple(tensor.data.shape)) for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors] == [
        ("a", (4, 8)),
        ("b", (18,)),
    ]


@pytest.mark.parametrize("name", GOOD)
def test_cut_short_everywhere(name: str, memory: Callable[[bytes], Path]) -> None:
    """The file without its last bytes, for every number of them: an error of ours each time."""
    for size in range(len(GOOD[name]) - (31 if name == "a.gguf" else 0)):
        path = memory(GOOD[name][:size])
        with pytest.raises(TriptychError):
            READERS[name](path)


@pytest.mark.parametrize("name", GOOD)
def test_bytes_changed_everywhere(name: str, memory: Callable[[bytes], Path]) -> None:
    """Every byte set to others, one at a time, and runs of eight: an error of ours, or a reading that stays inside of the file."""
    data = np.frombuffer(GOOD[name], np.uint8)
    for at in range(len(data)):
        for width, value in ((1, 0), (1, 255), (1, data[at] ^ 1), (8, 255)):
            broken = data.copy()
            broken[at : at + width] = value
            try:
                header = READERS[name](memory(broken.tobytes()))
            except TriptychError as error:
                assert str(error).count("\n") < LINES
                continue
            assert all(0 <= tensor.start <= tensor.stop <= len(data) for tensor in header.tensors)
