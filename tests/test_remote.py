"""Checkpoints behind URLs: the same bytes as on a disk, by ranges, never a whole file at once; nothing half-way is left."""

from __future__ import annotations

import importlib
import os
import pickle
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import triptych as tt
from triptych import remote, remote_run
from triptych.mover import Mover
from triptych.place import MARKER
from triptych.run import run

from . import files, remote_servers
from .remote_servers import INDEX, SHARDS, Bucket, H, Log, serving

server, bucket, source, done, small = (
    remote_servers.server, remote_servers.bucket, remote_servers.source, remote_servers.done, remote_servers.small,
)  # fmt: skip


@pytest.fixture
def web(source: Path) -> Iterator[tuple[str, Log]]:
    with serving(source) as (url, log):
        yield url, log


def check_ranges(log: Log, source: Path, block: int = 1 << 20) -> None:
    """Weights were read by ranges of one block at most, each byte about once."""
    asked = log.gets()
    assert asked and all(start is not None and stop is not None and stop - start <= block for start, stop in asked)
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert size <= sum(stop - start for start, stop in asked if start is not None and stop is not None) <= 1.1 * size
    assert len([0 for span in asked if span != (0, 1)]) < 12 + size // block, "tensors that lie side by side come together"


def leftovers(folder: Path) -> list[Path]:
    return list(folder.glob("triptych-*"))


# The same bytes


def test_s3_to_disk(bucket: Bucket, source: Path, done: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.put("models/a/", {**files.snapshot(source), "more/words.txt": b"words", "more/none": b"", ".git/x": b"hidden"})
    bucket.log.asked.clear()
    spools = tmp_path / "spools"
    spools.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(spools))
    made = tt.plan("s3://bucket/models/a", "split", tmp_path / "b")
    assert made.path == "s3://bucket/models/a"
    assert sum((b or 0) - (a or 0) for a, b in bucket.log.gets()) < 10_000, "a plan reads headers"
    run(made)
    found = files.snapshot(tmp_path / "b")
    assert found.pop("more/words.txt") == b"words" and found.pop("more/none") == b""
    assert tt.inspect(tmp_path / "b").family == "gpt_neox" and leftovers(spools) == []
    check_ranges(bucket.log, source)
    local = tmp_path / "local"
    local.mkdir()
    for name, data in {**files.snapshot(source), "more/words.txt": b"words", "more/none": b""}.items():
        (local / name).parent.mkdir(exist_ok=True)
        (local / name).write_bytes(data)
    tt.convert(local, tmp_path / "c", "split")
    assert files.snapshot(tmp_path / "c") == files.snapshot(tmp_path / "b"), "stamps too"


def test_disk_to_s3(bucket: Bucket, source: Path, done: dict[str, bytes]) -> None:
    seen: list[int] = []
    made = tt.convert(source, "s3://bucket/out/b/", "split", progress=seen.append)
    assert bucket.snapshot("out/b/") == done and sum(seen) > 10_000_000
    assert made.plan.out == "s3://bucket/out/b" and any("room" in note for note in made.plan.notes)
    puts = [path for method, path, _, _ in bucket.log.asked if method == "PUT"]
    assert puts[0].endswith(MARKER), "the marker first"
    assert [path for path in puts if not path.endswith(MARKER)][-1].endswith(INDEX), "the index last"
    assert puts.count("/bucket/out/b/model-00001-of-00002.safetensors") == 3, "in parts"


def test_s3_to_s3(bucket: Bucket, source: Path, done: dict[str, bytes], tmp_path: Path) -> None:
    bucket.put("a/", files.snapshot(source))
    bucket.log.asked.clear()
    tt.convert("s3://bucket/a", "s3://bucket/b", "split")
    check_ranges(bucket.log, source)
    assert bucket.snapshot("b/") == done
    tt.convert("s3://bucket/b", "s3://bucket/c", "fused:h (q|k|v) d", workers=1)
    (tmp_path / "c").mkdir()
    for name, data in bucket.snapshot("c/").items():
        (tmp_path / "c" / name).write_bytes(data)
    assert files.read(tmp_path / "c") == files.read(source), "a parser of our own finds the same tensors"


def test_one_file(bucket: Bucket, tmp_path: Path) -> None:
    files.safetensors(tmp_path / "x.safetensors", SHARDS[1])
    bucket.put("", {"x.safetensors": (tmp_path / "x.safetensors").read_bytes()})
    asked: dict[str, Any] = {"to": "(q|k|v) h d", "layouts": {"*query_key_value*": "h (q|k|v) d"}, "h": H}
    tt.convert(tmp_path / "x.safetensors", tmp_path / "y.safetensors", **asked)
    tt.convert("s3://bucket/x.safetensors", "s3://bucket/y.safetensors", **asked)
    assert bucket.snapshot("y") == {".safetensors": (tmp_path / "y.safetensors").read_bytes()}
    with pytest.raises(tt.PlanError, match="the output exists"):
        tt.convert("s3://bucket/x.safetensors", "s3://bucket/y.safetensors", **asked)


def test_http_to_disk(web: tuple[str, Log], source: Path, done: dict[str, bytes], tmp_path: Path) -> None:
    url, log = web
    made = tt.convert(url, tmp_path / "b", "split")
    assert files.snapshot(tmp_path / "b") == done
    assert any("HTTP lists no files" in note and "tokenizer.json" in note for note in made.plan.notes)
    check_ranges(log, source)


def test_hub_to_disk(source: Path, done: dict[str, bytes], tmp_path: Path) -> None:
    with serving(source, hub="org/name@v1") as (url, log):
        environment = {**os.environ, "HF_ENDPOINT": url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
        command = [sys.executable, "-m", "triptych.cli", "convert", "hf://org/name@v1", str(tmp_path / "b"), "--to", "split"]
        ran = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert ran.returncode == 0, ran.stderr
        assert files.snapshot(tmp_path / "b") == done
        check_ranges(log, source, 8 << 20)
        command[-4:] = ["hf://org/name@v2", str(tmp_path / "c"), "--to", "split"]
        ran = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert ran.returncode == 3 and ran.stderr.startswith("FormatError: no such file or folder\n  file     hf://org/name@v2")


def test_shares_and_ray_style_tasks(bucket: Bucket, source: Path, done: dict[str, bytes]) -> None:
    def elsewhere(tasks: Any, tick: Any) -> None:
        for task in tasks:
            remote_run.do(pickle.loads(pickle.dumps(task)), Mover(), tick)

    for number in (2, 1):
        tt.convert(source, "s3://bucket/b", "split", share=(number, 2), engine=elsewhere)
    assert MARKER in bucket.snapshot("b/")
    tt.convert(source, "s3://bucket/b", "split", finish=True)
    assert bucket.snapshot("b/") == done


def test_zeros_and_dropped_rows(bucket: Bucket, tmp_path: Path) -> None:
    """Rows of zeros go out in a step of their own, come back, and are checked over the network before they are left out."""
    home = "bert.encoder.layer.0.attention.self."
    made: dict[str, tuple[str, tuple[int, ...]]] = {f"{home}{part}.weight": ("F32", (15, 15)) for part in ("query", "key", "value")}
    made |= {f"{home}{part}.bias": ("F32", (15,)) for part in ("query", "value")}
    config = {"model_type": "bert", "hidden_size": 15, "num_attention_heads": 5}
    parts = files.checkpoint(tmp_path / "a", [made], config)
    tt.convert(tmp_path / "a", tmp_path / "b", "fused:h (q|k|v) d")
    tt.convert(tmp_path / "a", "s3://bucket/b", "fused:h (q|k|v) d")
    assert bucket.snapshot("b/") == files.snapshot(tmp_path / "b")
    tt.convert("s3://bucket/b", tmp_path / "c", "split")
    assert files.read(tmp_path / "c") == parts


def test_little_room_is_kept(bucket: Bucket, source: Path, done: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_run, "KEEP", 0)
    bucket.put("a/", files.snapshot(source))
    tt.convert("s3://bucket/a", "s3://bucket/b", "split")
    assert bucket.snapshot("b/") == done


def test_what_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any ranges in any order: the bytes are right, and none is asked for twice while there is room."""
    monkeypatch.setattr(remote_run, "BLOCK", 16)
    rng, data = random.Random(3), random.Random(4).randbytes(300)
    asked: list[tuple[int, int]] = []

    class File:
        size, url = len(data), "x"

        def parts(self, start: int, stop: int) -> Iterator[bytes]:
            assert 0 < stop - start <= 16
            asked.append((start, stop))
            yield data[start:stop]

    def some(number: int) -> list[tuple[str, int, int]]:
        starts = [rng.randrange(300) for _ in range(number)]
        return [("x", start, min(300, start + rng.randrange(1, 60))) for start in starts]

    for keep in (1000, 100):
        monkeypatch.setattr(remote_run, "KEEP", keep)
        for _ in range(40):
            asked.clear()
            with (tmp_path / "spool").open("w+b") as room:
                room.truncate(len(data))
                spool = remote_run.Spool({"x": File()}, {"x": room.fileno()})  # type: ignore[dict-item]
                for _ in range(5):
                    now = some(2)
                    spool.fetch(now, some(3))
                    assert all(os.pread(room.fileno(), stop - start, start) == data[start:stop] for _, start, stop in now)
                    start = rng.randrange(200)
                    assert b"".join(spool.parts("x", start, start + 70)) == data[start : start + 70]
            if keep == 1000:
                fetched = [byte for start, stop in asked for byte in range(start, stop)]
                assert len(fetched) - len(set(fetched)) <= 5 * 70, "what passes by is asked for again, nothing else"


# Half-way


def test_interrupted_then_continued(bucket: Bucket, source: Path, done: dict[str, bytes]) -> None:
    def stop(size: int) -> None:
        if any(key.endswith("2-of-00002.safetensors") for key in bucket.names()):
            raise KeyboardInterrupt

    made = tt.plan(source, "split", "s3://bucket/b")
    with pytest.raises(KeyboardInterrupt):
        run(made, progress=stop)
    assert MARKER in bucket.snapshot("b/") and INDEX not in bucket.snapshot("b/") and bucket.uploads() == []
    with pytest.raises(tt.FormatError, match="unfinished"):
        tt.convert("s3://bucket/b", "s3://bucket/c", "fused:h (q|k|v) d")
    with pytest.raises(tt.PlanError, match="another conversion is unfinished"):
        tt.convert(source, "s3://bucket/b", "(q|k|v) h d")
    again = tt.convert(source, "s3://bucket/b", "split")
    assert "model-00002-of-00002.safetensors" in again.kept and bucket.snapshot("b/") == done


def test_killed_in_an_upload_then_continued(bucket: Bucket, source: Path, done: dict[str, bytes]) -> None:
    slow = "import sys, time, triptych as tt; from triptych import remote; commit = remote.Upload.commit\n"
    slow += "remote.Upload.commit = lambda self: commit(self) if self._small is not None else (self._flush(True), time.sleep(99))\n"
    ran = subprocess.Popen([sys.executable, "-c", f"{slow}tt.convert(sys.argv[1], 's3://bucket/b', 'split')", str(source)])
    until = time.monotonic() + 20
    while not bucket.uploads() and time.monotonic() < until:
        time.sleep(0.01)
    ran.kill()
    ran.wait()
    assert bucket.uploads() == ["b/model-00001-of-00002.safetensors"] and MARKER in bucket.snapshot("b/")
    tt.convert(source, "s3://bucket/b", "split")
    assert bucket.snapshot("b/") == done


def test_a_damaged_object_is_written_anew(bucket: Bucket, source: Path, done: dict[str, bytes]) -> None:
    with pytest.raises(KeyboardInterrupt):
        tt.convert(source, "s3://bucket/b", "split", progress=lambda size: (_ for _ in ()).throw(KeyboardInterrupt))
    bucket.put("b/", {"model-00002-of-00002.safetensors": b"x" * len(done["model-00002-of-00002.safetensors"])})
    assert "model-00002-of-00002.safetensors" not in tt.convert(source, "s3://bucket/b", "split").kept
    assert bucket.snapshot("b/") == done


def test_what_another_run_has_removed(bucket: Bucket, source: Path) -> None:
    def steal(size: int) -> None:
        if "b/model-00002-of-00002.safetensors" in bucket.names():
            bucket.client.delete_object(Bucket="bucket", Key="b/model-00002-of-00002.safetensors")

    with pytest.raises(tt.OutputError, match="files are gone"):
        tt.convert(source, "s3://bucket/b", "split", progress=steal)
    assert bucket.names() == []


def test_an_error_leaves_nothing(bucket: Bucket, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put, parts = remote.Upload.put, [0]

    def fail(upload: remote.Upload, part: bytes, at: int) -> None:
        parts[0] += len(part) > 0 and at > 5_000_000
        if parts[0] > 1:
            raise OSError(5, "Input/output error")
        put(upload, part, at)

    monkeypatch.setattr(remote.Upload, "put", fail)
    with pytest.raises(tt.OutputError, match="Input/output error"):
        tt.convert(source, "s3://bucket/b", "split")
    assert bucket.names() == []


def test_a_source_that_changes(bucket: Bucket, source: Path, tmp_path: Path) -> None:
    bucket.put("a/", files.snapshot(source))
    made = tt.plan("s3://bucket/a", "split", tmp_path / "b")
    name = "model-00002-of-00002.safetensors"
    data = (source / name).read_bytes()
    bucket.put("a/", {name: data[:-1] + bytes([data[-1] ^ 1])})
    with pytest.raises(tt.FormatError, match="changed while the conversion went on") as caught:
        run(made)
    assert caught.value.exit_code == 3 and not (tmp_path / "b").exists()


# What is refused


def test_a_network_that_fails(web: tuple[str, Log], source: Path, done: dict[str, bytes], tmp_path: Path) -> None:
    url, log = web
    made = tt.plan(url, "split", tmp_path / "b")
    log.failures = 2
    run(made)
    assert files.snapshot(tmp_path / "b") == done, "asked again"
    made, log.failures = tt.plan(url, "split", tmp_path / "c"), 1000
    with pytest.raises(tt.FormatError, match="does not answer as it should") as caught:
        run(made)
    assert "503" in str(caught.value) and caught.value.exit_code == 3 and not (tmp_path / "c").exists()


def test_a_server_without_ranges(web: tuple[str, Log]) -> None:
    url, log = web
    log.ranges = False
    with pytest.raises(tt.FormatError, match="range"):
        tt.plan(url, "split")


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(tt.FormatError) as caught:
        tt.inspect("http://127.0.0.1:9/secret?key=hidden")
    assert "hidden" not in str(caught.value)


def test_places_that_are_refused(bucket: Bucket, source: Path, web: tuple[str, Log]) -> None:
    bucket.put("there/", {"x": b""})
    bucket.put("a/", files.snapshot(source))
    for out, match in {
        "s3://bucket/there": "the output exists",
        "s3://bucket/x.safetensors": "a folder becomes a folder",
        "s3://bucket": "no name",
        "hf://org/name": "nothing can be written there",
        f"{web[0]}/out": "nothing can be written there",
        "az://host/x": "nothing can be written there",
    }.items():
        with pytest.raises(tt.PlanError, match=match):
            tt.plan(source, "split", out)
    with pytest.raises(tt.PlanError, match="inside the input"):
        tt.plan("s3://bucket/a", "split", "s3://bucket/a/b")
    with pytest.raises(tt.OutputError):
        tt.convert(source, "s3://nobody-has-this/x", "split")


def test_inputs_that_are_refused(bucket: Bucket, source: Path) -> None:
    bucket.put("bin/", {"pytorch_model.bin": b"PK", "config.json": b"{}"})
    bucket.put("cut/", {"model.safetensors": (source / "model-00001-of-00002.safetensors").read_bytes()[:-1]})
    bucket.put("a/", files.snapshot(source))
    bucket.put("up/", {"a//x": b"", "model.safetensors": b""})
    for url, match in {"s3://bucket/bin": "no safetensors in this folder", "s3://bucket/none": "no such file or folder",
                       "s3://bucket/cut": "cut short", "s3://bucket/up": "no file can have"}.items():  # fmt: skip
        with pytest.raises(tt.FormatError, match=match) as caught:
            tt.inspect(url)
        assert "/tmp" not in str(caught.value)


def test_a_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module
    for scheme, package, extra in (
        ("s3", "urllib3", "remote"),
        ("s3", "botocore", "remote"),
        ("gs", "google.auth", "gcs"),
        ("hf", "huggingface_hub", "hub"),
    ):

        def fake(name: str, package_: str | None = None, gone: str = package) -> Any:
            if name == gone:
                raise ImportError(name)
            return real(name, package_)

        monkeypatch.setattr(importlib, "import_module", fake)
        with pytest.raises(tt.MissingExtraError, match=f"{package} is not installed") as caught:
            tt.inspect(f"{scheme}://bucket/a")
        assert f"pip install 'triptych[{extra}]'" in str(caught.value)
