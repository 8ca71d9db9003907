"""verify, diff, lint, detect, shard, merge and the asking of weights behind URLs: they say what they say of the same files on a disk."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import triptych as tt
from triptych import detect_files, holes
from triptych.lint import lint

from . import files, remote_servers, test_agree
from .remote_servers import Bucket, Log, serving

server, bucket, source, done, small = (
    remote_servers.server, remote_servers.bucket, remote_servers.source, remote_servers.done, remote_servers.small,
)  # fmt: skip


@pytest.fixture
def split(bucket: Bucket, source: Path, done: dict[str, bytes], tmp_path: Path) -> Path:
    """The conversion on a disk; `s3://bucket/a` and `s3://bucket/b` are what it was made of and what it is."""
    bucket.put("a/", files.snapshot(source))
    bucket.put("b/", done)
    bucket.log.asked.clear()
    return source.with_name(source.name + "-done")


def fetched(log: Log) -> int:
    """Bytes of weights that were asked for by range."""
    return sum(stop - start for start, stop in log.gets() if start is not None and stop is not None)


def damage(bucket: Bucket, name: str, data: bytes, at: int) -> None:
    bucket.put("b/", {name: data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]})


# The same answers


def test_verify(bucket: Bucket, source: Path, split: Path, done: dict[str, bytes]) -> None:
    sides = {"path": "s3://bucket/a", "out": "s3://bucket/b"}
    assert tt.verify(**sides) == replace(tt.verify(source, split), **sides)
    size = sum(path.stat().st_size for folder in (source, split) for path in folder.glob("*.safetensors"))
    assert size * 0.99 < fetched(bucket.log) < 1.1 * size, "every byte about once"
    assert len(bucket.log.gets()) < 60, "and several tensors at a time"
    assert tt.verify(source, "s3://bucket/b").out == "s3://bucket/b"
    name = "model-00001-of-00002.safetensors"
    damage(bucket, name, done[name], len(done[name]) - 2_000_000)
    with pytest.raises(tt.MismatchError) as caught:
        tt.verify(**sides)
    assert "/tmp" not in str(caught.value)


def test_verify_in_little_room(bucket: Bucket, source: Path, split: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holes, "KEEP", 1 << 20)
    assert tt.verify("s3://bucket/a", "s3://bucket/b").rows == tt.verify(source, split).rows


def test_diff(bucket: Bucket, source: Path, split: Path) -> None:
    ours, theirs = tt.diff("s3://bucket/a", "s3://bucket/b"), tt.diff(source, split)
    assert (ours.a, ours.b, ours.tensors) == ("s3://bucket/a", "s3://bucket/b", theirs.tensors)


def test_lint(bucket: Bucket, source: Path, split: Path, done: dict[str, bytes], tmp_path: Path) -> None:
    bucket.put("b/", {"pytorch_model.bin": b"PK"})
    ours, theirs = lint("s3://bucket/b"), lint(split)
    assert ours.path == "s3://bucket/b" and (ours.findings, ours.read) == (theirs.findings, theirs.read)
    assert ours.notes[0] == "behind a URL only safetensors are looked at, and not pytorch_model.bin"
    fast = len(bucket.log.asked)
    lint("s3://bucket/b", fast=True)
    assert len(bucket.log.asked) - fast < 20
    made = files.checkpoint(tmp_path / "nan", [{"x": ("F32", (3, 5))}], {})
    data = (tmp_path / "nan" / "model.safetensors").read_bytes()
    bucket.put("nan/", {"model.safetensors": data[:-4] + np.float32(np.nan).tobytes()})
    assert made and any(one.rule == "not-finite" for one in lint("s3://bucket/nan").findings)


def test_a_file_that_changes_while_it_is_read(bucket: Bucket, split: Path, done: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    name, check = "model-00001-of-00002.safetensors", holes.Fetched.check

    def late(file: holes.Fetched) -> None:
        damage(bucket, name, done[name], len(done[name]) - 1)
        check(file)

    monkeypatch.setattr(holes.Fetched, "check", late)
    with pytest.raises(tt.FormatError, match="changed while it was read") as caught:
        lint("s3://bucket/b")
    assert caught.value.exit_code == 3 and "s3://bucket/b/" in str(caught.value)


def test_shard_and_merge(bucket: Bucket, source: Path, split: Path, tmp_path: Path) -> None:
    rules = {"*mlp*": "copy", "odd": "copy", "norm*": "copy"}
    tt.shard(source, tmp_path / "ranks", 2, rules=rules)
    tt.shard("s3://bucket/a", "s3://bucket/ranks", 2, rules=rules)
    assert bucket.snapshot("ranks/") == files.snapshot(tmp_path / "ranks")
    tt.shard("s3://bucket/a", tmp_path / "here", 2, rules=rules)
    assert files.snapshot(tmp_path / "here") == files.snapshot(tmp_path / "ranks")
    tt.merge(tmp_path / "ranks", tmp_path / "whole")
    tt.merge("s3://bucket/ranks", "s3://bucket/whole")
    assert bucket.snapshot("whole/") == files.snapshot(tmp_path / "whole")
    with pytest.raises(tt.PlanError, match="inside the input"):
        tt.shard("s3://bucket/a", "s3://bucket/a/ranks", 2, rules=rules)
    name = "rank-1-of-2/model-00001-of-00002.safetensors"
    data = bucket.snapshot("ranks/")[name]
    bucket.put("ranks/", {name: data[:-1] + bytes([data[-1] ^ 1])})
    with pytest.raises(tt.MismatchError, match="different copies"):
        tt.merge("s3://bucket/ranks", "s3://bucket/again")


# The weights are asked


@pytest.fixture(scope="module")
def vendors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two vendors' files of one model, with the same names, shapes and config."""
    home = tmp_path_factory.mktemp("mimo")
    for name, layout in (("blocks", test_agree.BLOCKS), ("plain", test_agree.PLAIN)):
        test_agree.vendor(home / name, layout)
    return home


def said(path: str | Path) -> list[str]:
    """What the weights of an ambiguous record bring about: notes of a plan, or the lines of a refusal."""
    try:
        return [note for note in tt.plan(path, "split", t=2).notes if "weights" in note]
    except tt.PlanError as error:
        return str(error).splitlines()


def test_an_ambiguous_record_asks_the_weights(bucket: Bucket, vendors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By range reads: a plan says what it says of the files on a disk; the order that the record does not have is refused."""
    monkeypatch.setattr(detect_files, "MAX_LAYERS", 1)
    bucket.put("", files.snapshot(vendors))
    assert said("s3://bucket/blocks") == said(vendors / "blocks") != []
    with pytest.raises(tt.PlanError, match=r"the weights contradict the layout|more than one order") as caught:
        tt.convert("s3://bucket/plain", tmp_path / "out", "split", t=2)
    assert "--layout" in str(caught.value) and not (tmp_path / "out").exists()


def test_detect_behind_http(vendors: Path) -> None:
    asked: dict[str, Any] = {"tensor": "model.layers.1.*", "heads": 12, "kv_heads": 4}
    with serving(vendors) as (url, log):
        ours = tt.detect_checkpoint(f"{url}/plain", **asked)
    assert ours.path == f"{url}/plain" and ours.kinds == tt.detect_checkpoint(vendors / "plain", **asked).kinds
    assert fetched(log) < 0.6 * (vendors / "plain" / "model.safetensors").stat().st_size, "one layer of four"


def test_the_command(bucket: Bucket, source: Path, split: Path) -> None:
    command = [sys.executable, "-m", "triptych.cli", "verify", "s3://bucket/a", "s3://bucket/b"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("s3://bucket/b: equal to s3://bucket/a; ")
    ran = subprocess.run([*command[:-1], "s3://bucket/none"], capture_output=True, text=True)
    assert ran.returncode == 3 and ran.stderr.startswith("FormatError: no such file or folder\n  file     s3://bucket/none")


def test_a_certificate_is_checked(bucket: Bucket, source: Path, split: Path, tmp_path: Path) -> None:
    tt.certify(source, split).write(tmp_path / "certificate.json")
    checked = tt.check_certificate(tmp_path / "certificate.json", "s3://bucket/b")
    assert checked == replace(tt.check_certificate(tmp_path / "certificate.json", split), out="s3://bucket/b")
    with pytest.raises(tt.FormatError, match="a URL is not read here"):
        tt.certify("s3://bucket/a", "s3://bucket/b")
