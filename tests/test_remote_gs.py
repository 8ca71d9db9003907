"""Checkpoints in Google Cloud Storage, as an emulator of it serves them: read, written, killed and continued, nothing left."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import triptych as tt
from triptych import remote, remote_gs
from triptych.place import MARKER
from triptych.remote_gs import GS

from . import files, remote_servers
from .remote_relay import relayed
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


def test_an_answer_is_lost(store: Store, source: Path, done: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a session has is asked before anything is sent again; one that is complete is found complete."""
    asked: list[str] = []

    def lose(number: int, method: str, path: str) -> str | None:
        asked.extend([path] if method == "PUT" else [])
        return None if method != "PUT" or len(asked) % 2 == 0 else "lost" if len(asked) > 1 else "reset"

    with relayed(os.environ["STORAGE_EMULATOR_HOST"]) as (url, relay):
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
        remote._store.cache_clear()
        relay.set(lose)
        tt.convert(source, "gs://bucket/b", "split", workers=1)
        assert relay.garbled == 0
    remote._store.cache_clear()
    assert store.snapshot("b/") == done and len(asked) == 8


def test_contents_that_are_gone(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for is one generation of an object, which Google (not the emulator) answers with 404 when there is another one in its place."""
    asked, send = list[str](), remote_gs.send

    def strict(method: str, url: str, *args: Any, **more: Any) -> Any:
        if "generation=" in url:
            asked.append(url)
            url = url if f"generation={GS().info('gs://bucket/x').tag}" in url else url.replace("/o/x", "/o/gone")
        return send(method, url, *args, **more)

    monkeypatch.setattr(remote_gs, "send", strict)
    remote.put("gs://bucket/x", b"one", "")
    file = remote.RemoteFile("gs://bucket/x")
    assert file.read(0, 3) == b"one" and asked
    remote.put("gs://bucket/x", b"two", file.info.tag)
    with pytest.raises(tt.FormatError, match="changed while it was read"):
        file.read(0, 3)
    remote.remove("gs://bucket/x")
    with pytest.raises(tt.FormatError, match="no such file"):
        file.read(0, 3)
