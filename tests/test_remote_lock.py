"""Two runs into one output behind a URL exclude each other; one that was killed is continued."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import triptych as tt
from triptych import remote_out
from triptych.place import MARKER

from . import files, remote_servers
from .remote_servers import Bucket

server, bucket, source, done, small = (
    remote_servers.server, remote_servers.bucket, remote_servers.source, remote_servers.done, remote_servers.small,
)  # fmt: skip
OUT = "s3://bucket/b"


@contextmanager
def halted(source: Path, **more: Any) -> Iterator[None]:
    """A run that has begun to write and stays where it is while the context lasts; then it goes on to its end."""
    begun, go = threading.Event(), threading.Event()
    ended: list[BaseException | None] = []

    def stop(size: int) -> None:
        begun.set()
        assert go.wait(60)

    def run() -> None:
        try:
            tt.convert(source, OUT, "split", progress=stop, **more)
            ended.append(None)
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert begun.wait(60)
        yield
    finally:
        go.set()
        thread.join()
    if ended != [None]:
        raise ended[0] or AssertionError("it did not end")


def lock(bucket: Bucket) -> dict[str, object]:
    found: dict[str, object] = json.loads(bucket.snapshot("b/")[MARKER])
    return found


def test_the_second_of_two_runs_is_refused(bucket: Bucket, source: Path, done: dict[str, bytes]) -> None:
    with halted(source):
        run = lock(bucket)["run"]
        begin = time.monotonic()
        with pytest.raises(tt.PlanError, match="another run is writing this output") as caught:
            tt.convert(source, OUT, "split")
        assert time.monotonic() - begin < remote_out.PATIENCE * 10 and caught.value.exit_code == 4
        assert str(caught.value).splitlines()[0] == "another run is writing this output" and len(str(caught.value).splitlines()) <= 5
        assert lock(bucket)["run"] == run is not None
        with pytest.raises(tt.PlanError, match="another run is writing this output"):
            tt.convert(source, OUT, "split", share=(1, 2))
    assert bucket.snapshot("b/") == done


def test_one_of_two_that_begin_at_once(bucket: Bucket, source: Path, done: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """Both find nothing there; the store lets only one of them write the marker."""
    together, seen = threading.Barrier(2, timeout=60), remote_out._marker
    once: dict[int, bool] = {}

    def marker(url: str) -> object:
        found = seen(url)
        if found[0] is None and not once.setdefault(threading.get_ident(), False):
            once[threading.get_ident()] = True
            together.wait()
        return found

    monkeypatch.setattr(remote_out, "_marker", marker)
    outcomes: list[str] = []

    def run() -> None:
        try:
            tt.convert(source, OUT, "split", progress=lambda size: time.sleep(0.2))
            outcomes.append("done")
        except tt.PlanError as error:
            outcomes.append(error.what)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["another run is writing this output", "done"] and bucket.snapshot("b/") == done


def test_a_killed_run_is_taken_over(bucket: Bucket, source: Path, done: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """What kill -9 leaves: the marker of a run that gives no sign of life any more."""
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(remote_out.Hold, "end", lambda hold: None)
        killed.setattr(remote_out.Hold, "start", lambda hold: None)
        tt.convert(source, OUT, "split", progress=lambda size: (_ for _ in ()).throw(KeyboardInterrupt))
    assert lock(bucket)["run"] is not None
    begin = time.monotonic()
    tt.convert(source, OUT, "split")
    assert time.monotonic() - begin > 0.5 and bucket.snapshot("b/") == done


def test_after_an_interruption_nobody_waits(bucket: Bucket, source: Path, done: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        tt.convert(source, OUT, "split", progress=lambda size: (_ for _ in ()).throw(KeyboardInterrupt))
    assert lock(bucket)["run"] is None
    monkeypatch.setattr(remote_out, "PATIENCE", 1e6)
    tt.convert(source, OUT, "split")
    assert bucket.snapshot("b/") == done


def test_a_run_that_was_taken_over_removes_nothing(bucket: Bucket, source: Path, done: dict[str, bytes]) -> None:
    """It was not heard of for too long, and another run has begun: it ends with an error, and leaves the place to that one."""
    with pytest.raises(tt.OutputError, match="another run has taken this output over"), halted(source):
        text = json.dumps({**lock(bucket), "run": "another", "beat": 1}).encode()
        bucket.put("b/", {MARKER: text})
    assert lock(bucket)["run"] == "another"
    assert set(bucket.snapshot("b/")) >= set(done), "its files are those of the other run too"


def test_one_file_has_a_lock_beside_it(bucket: Bucket, tmp_path: Path) -> None:
    files.safetensors(tmp_path / "x.safetensors", remote_servers.SHARDS[1])
    asked = {"to": "(q|k|v) h d", "layouts": {"*query_key_value*": "h (q|k|v) d"}, "h": remote_servers.H}
    out = "s3://bucket/y.safetensors"
    bucket.put("", {".y.safetensors.triptych-part": b"{}"})
    with pytest.raises(tt.PlanError, match="another conversion is unfinished"):
        tt.convert(tmp_path / "x.safetensors", out, **asked)
    bucket.empty()
    tt.convert(tmp_path / "x.safetensors", out, **asked)
    assert bucket.names() == ["y.safetensors"]


# Shares


def test_a_share_that_is_started_twice(bucket: Bucket, source: Path, done: dict[str, bytes]) -> None:
    """A scheduler that starts a job again while the first one lives: the second is refused, and the first goes on."""
    with halted(source, share=(1, 2)):
        with pytest.raises(tt.PlanError, match="another run is writing this share") as caught:
            tt.convert(source, OUT, "split", share=(1, 2))
        assert caught.value.exit_code == 4
        with pytest.raises(tt.PlanError, match="another run is writing this share"):
            tt.convert(source, OUT, "split")
        tt.convert(source, OUT, "split", share=(2, 2))
        with pytest.raises(tt.PlanError, match="another run is writing this share"):
            tt.convert(source, OUT, "split", finish=True)
    tt.convert(source, OUT, "split", finish=True)
    assert bucket.snapshot("b/") == done


def test_a_killed_share_is_continued(bucket: Bucket, source: Path, done: dict[str, bytes]) -> None:
    slow = "import sys, time, triptych as tt; from triptych import remote; commit = remote.Upload.commit\n"
    slow += "remote.Upload.commit = lambda self: commit(self) if self._small is not None else (self._flush(True), time.sleep(99))\n"
    code = f"{slow}tt.convert(sys.argv[1], {OUT!r}, 'split', share=(1, 2))"
    ran = subprocess.Popen([sys.executable, "-c", code, str(source)])
    until = time.monotonic() + 40
    while not bucket.uploads() and time.monotonic() < until:
        time.sleep(0.01)
    ran.kill()
    ran.wait()
    tt.convert(source, OUT, "split", share=(2, 2))
    before = bucket.snapshot("b/")
    assert ".triptych-share-1-of-2.json" in before and bucket.uploads() != []
    with pytest.raises(tt.PlanError, match="shares are missing") as caught:
        tt.convert(source, OUT, "split", finish=True)
    assert "model-00001-of-00002.safetensors" in str(caught.value)
    assert {**bucket.snapshot("b/"), MARKER: b""} == {**before, MARKER: b""}
    tt.convert(source, OUT, "split", share=(1, 2))
    tt.convert(source, OUT, "split", finish=True)
    assert bucket.snapshot("b/") == done


def test_a_share_that_never_came_back(bucket: Bucket, source: Path, done: dict[str, bytes]) -> None:
    """One run without shares does what is missing, and leaves nothing of them."""
    tt.convert(source, OUT, "split", share=(2, 2))
    bucket.put("b/", {".triptych-share-1-of-2.json": bucket.snapshot("b/")[MARKER].replace(b'"run": null', b'"run": "x"')})
    tt.convert(source, OUT, "split")
    assert bucket.snapshot("b/") == done
