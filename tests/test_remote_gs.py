"""Checkpoints in Google Cloud Storage, as an emulator of it serves them: read, written, killed and continued, nothing left."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import triptych as tt
from triptych import remote
from triptych.place import MARKER

from . import files, remote_servers
from .remote_servers import Store, gcs

source, done, small = remote_servers.source, remote_servers.done, remote_servers.small


@pytest.fixture(scope="module")
def emulator() -> Iterator[Store]:
    with pytest.MonkeyPatch.context() as patch, gcs() as (url, store):
        patch.setenv("STORAGE_EMULATOR_HOST", url)
        remote._store.cache_clear()
        yield store
        remote._store.cache_clear()


@pytest.fixture
def store(emulator: Store) -> Iterator[Store]:
    emulator.storage.wipe(keep_buckets=True)
    emulator.given_up.clear()
    yield emulator


def test_there_and_back(store: Store, source: Path, done: dict[str, bytes], tmp_path: Path) -> None:
    tt.convert(source, "gs://bucket/some/b", "split")
    assert store.snapshot("some/b/") == done and store.open_sessions() == 0
    assert tt.inspect("gs://bucket/some/b").family == "gpt_neox"
    tt.convert("gs://bucket/some/b", "gs://bucket/c", "fused:h (q|k|v) d", workers=1)
    tt.convert("gs://bucket/c", tmp_path / "d", "split")
    assert files.read(tmp_path / "d") == files.read(source.with_name(source.name + "-done"))
    assert tt.verify(source, "gs://bucket/some/b").rows > 0
    tt.convert("gs://bucket/c/model-00002-of-00002.safetensors", "gs://bucket/x.safetensors", "(q|k|v) h d")
    assert [name for name in store.names() if "/" not in name] == ["x.safetensors"]


def test_killed_then_continued(store: Store, source: Path, done: dict[str, bytes]) -> None:
    slow = "import sys, time, triptych as tt; from triptych import remote, remote_out; commit = remote.Upload.commit\n"
    slow += "remote_out.BEAT, remote.BLOCK = 0.1, 5 << 20\n"
    slow += "remote.Upload.commit = lambda self: commit(self) if self._small is not None else time.sleep(99)\n"
    ran = subprocess.Popen([sys.executable, "-c", f"{slow}tt.convert(sys.argv[1], 'gs://bucket/b', 'split')", str(source)], env=os.environ)
    until = time.monotonic() + 40
    while len(store.names("b/")) < 4 and time.monotonic() < until:
        time.sleep(0.02)
    with pytest.raises(tt.PlanError, match="another run is writing this output"):
        tt.convert(source, "gs://bucket/b", "split")
    ran.kill()
    ran.wait()
    assert MARKER in store.snapshot("b/") and "b/model-00001-of-00002.safetensors" not in store.names(), "nothing half-way is seen"
    again = tt.convert(source, "gs://bucket/b", "split")
    assert "model-00002-of-00002.safetensors" in again.kept and store.snapshot("b/") == done


def test_an_error_leaves_nothing(store: Store, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put = remote.Upload.put

    def fail(upload: remote.Upload, part: bytes, at: int) -> None:
        if at > 7_000_000:
            raise OSError(5, "Input/output error")
        put(upload, part, at)

    monkeypatch.setattr(remote.Upload, "put", fail)
    with pytest.raises(tt.OutputError, match="Input/output error"):
        tt.convert(source, "gs://bucket/b", "split")
    assert store.names() == [] and len(store.given_up) == 1


def test_what_is_not_there(store: Store, source: Path) -> None:
    with pytest.raises(tt.FormatError, match="no such file or folder"):
        tt.inspect("gs://bucket/none")
    with pytest.raises(tt.OutputError):
        tt.convert(source, "gs://nobody-has-this/x", "split")
