"""A network that fails in each of its ways: the right result, or one error of ours and nothing left; never too many requests."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import triptych as tt
from triptych import remote, remote_run, remote_web
from triptych.formats import MARKER
from triptych.remote_gs import GS
from triptych.run import run

from . import files, remote_servers
from .remote_relay import KINDS, Relay, relayed
from .remote_servers import Bucket, serving

server, bucket, small, done = remote_servers.server, remote_servers.bucket, remote_servers.small, remote_servers.done
H, D = 5, 64
SHARDS: list[dict[str, tuple[str, tuple[int, ...]]]] = [
    {"gpt_neox.layers.0.attention.query_key_value.weight": ("BF16", (3 * H * D, H * D)), "x": ("U8", (1_700_003,))},
    {"gpt_neox.layers.0.attention.query_key_value.bias": ("BF16", (3 * H * D,)), "y": ("U8", (5_001,))},
]
CONFIG = {"model_type": "gpt_neox", "hidden_size": H * D, "num_attention_heads": H}
WORDS = {"403": "the server refuses"}
BIG = "model-00001-of-00002.safetensors"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    files.checkpoint(folder, SHARDS, CONFIG)
    return folder


@pytest.fixture(scope="module")
def relay_of(server: Bucket) -> Iterator[Relay]:
    with pytest.MonkeyPatch.context() as patch, relayed(os.environ["AWS_ENDPOINT_URL"]) as (url, relay):
        patch.setenv("AWS_ENDPOINT_URL", url)
        remote._store.cache_clear()
        yield relay
    remote._store.cache_clear()


@pytest.fixture
def relay(relay_of: Relay, bucket: Bucket, source: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Relay]:
    """Between us and S3, where the source is `s3://bucket/a`; files above 256 KB go up in parts of a megabyte."""
    monkeypatch.setattr(remote, "BLOCK", 1 << 18)
    monkeypatch.setattr(remote, "WAITS", (0.0,) * 4)
    monkeypatch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", 1)
    bucket.put("a/", files.snapshot(source))
    relay_of.garbled = 0
    relay_of.set(lambda number, method, path: None)
    yield relay_of
    relay_of.set(lambda number, method, path: None)
    assert relay_of.garbled == 0, "a request sends its bytes and no more"


def convert(workers: int = 2) -> tt.Converted:
    return tt.convert("s3://bucket/a", "s3://bucket/b", "split", workers=workers)


# Faults that pass


def test_every_second_request_fails(relay: Relay, bucket: Bucket, done: dict[str, bytes]) -> None:
    seen, kinds = Counter[str](), itertools.cycle(KINDS)

    def fail(number: int, method: str, path: str) -> str | None:
        seen[path] += 1
        return next(kinds) if seen[path] % 2 else None

    relay.set(fail)
    convert()
    assert bucket.snapshot("b/") == done
    assert {kind for _, _, kind in relay.seen} == {"", *KINDS}


@pytest.mark.parametrize("what", ["uploads=", "uploadId=", "partNumber="])
def test_an_answer_is_lost_and_what_was_asked_is_done(relay: Relay, bucket: Bucket, done: dict[str, bytes], what: str) -> None:
    """A begun upload that nobody knows of is ended, a completed one is found complete."""
    left = [1]

    def lose(number: int, method: str, path: str) -> str | None:
        if method in ("POST", "PUT") and what in path and left and ("partNumber" in path) == ("part" in what):
            return "lost" if left.pop() else None
        return None

    relay.set(lose)
    convert()
    assert bucket.snapshot("b/") == done and not left


def test_a_server_that_ignores_a_range(relay: Relay, bucket: Bucket, done: dict[str, bytes]) -> None:
    seen: list[int] = []

    def whole(number: int, method: str, path: str) -> str | None:
        return "200" if method == "GET" and path.endswith(".safetensors") and not seen.append(1) and len(seen) % 3 == 1 else None

    relay.set(whole)
    convert()
    assert bucket.snapshot("b/") == done
    relay.set(lambda number, method, path: "200" if path.endswith(".safetensors") else None)
    with pytest.raises(tt.FormatError, match="200 OK in place of 206") as caught:
        tt.inspect("s3://bucket/a")
    assert caught.value.exit_code == 3 and max(map(len, str(caught.value).splitlines())) < 200


def test_a_server_may_put_off_the_next_try(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(remote, "WAITS", (1.0, 2.0, 3.0))
    monkeypatch.setattr("time.sleep", slept.append)

    class Answer:
        status, reason, headers = 429, "Too Many Requests", {"Retry-After": "17"}

        def read(self, size: int) -> bytes:
            return b""

        def release_conn(self) -> None: ...

    with pytest.raises(tt.FormatError, match="429"):
        remote.tried("http://host/x", lambda: remote_web.check(Answer(), "", 200))
    Answer.headers = {"Retry-After": "99999"}
    with pytest.raises(tt.FormatError, match="429"):
        remote.tried("http://host/x", lambda: remote_web.check(Answer(), "", 200))
    assert slept == [17.0] * 3 + [remote.LONGEST] * 3


# Faults that stay


@pytest.mark.parametrize("kind", ["503", "reset", "403", "slow"])
def test_a_store_that_dies_in_the_middle(
    relay: Relay, bucket: Bucket, done: dict[str, bytes], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One error, few requests; what is left is marked, and the same command goes on."""
    dead: list[int] = []

    def die(number: int, method: str, path: str) -> str | None:
        if "partNumber=2" in path:
            dead.append(number)
        return kind if dead else None

    with monkeypatch.context() as patch, pytest.raises(tt.OutputError, match=WORDS.get(kind, "does not answer as it should")) as caught:
        if kind == "slow":
            patch.setattr(remote_web, "TIMEOUTS", (0.1, 0.1))
            remote_web._pool.cache_clear()
        relay.set(die)
        convert(workers=1)
    assert caught.value.exit_code == 4 and relay.number - dead[0] < 60
    remote_web._pool.cache_clear()
    relay.set(lambda number, method, path: None)
    assert MARKER in bucket.snapshot("b/")
    convert()
    assert bucket.snapshot("b/") == done


def test_a_part_that_always_fails(relay: Relay, bucket: Bucket) -> None:
    relay.set(lambda number, method, path: "500" if "partNumber=2" in path else None)
    with pytest.raises(tt.OutputError, match="500") as caught:
        convert()
    assert caught.value.exit_code == 4 and bucket.names("b/") == [] and bucket.uploads() == []
    assert len([0 for _, path, _ in relay.seen if "partNumber=2" in path]) == 5


def test_the_right_to_write_ends(relay: Relay, bucket: Bucket) -> None:
    relay.set(lambda number, method, path: "403" if method == "PUT" and number > 30 else None)
    with pytest.raises(tt.OutputError, match="the server refuses"):
        convert()
    assert not bucket.names("b/") or MARKER in bucket.snapshot("b/"), "what cannot be removed is marked"


def test_the_right_to_read_ends(relay: Relay, bucket: Bucket) -> None:
    made = tt.plan("s3://bucket/a", "split", "s3://bucket/b")
    relay.set(lambda number, method, path: "403" if method == "GET" and path.startswith("/bucket/a/") else None)
    with pytest.raises(tt.FormatError, match="the server refuses") as caught:
        run(made)
    assert caught.value.exit_code == 3 and bucket.names("b/") == [] and bucket.uploads() == []


def test_a_token_that_has_expired() -> None:
    class Answer:
        status, reason, headers = 400, "Bad Request", dict[str, str]()

        def read(self, size: int) -> bytes:
            return b"<Error><Code>ExpiredToken</Code></Error>"

        def release_conn(self) -> None: ...

    asked: list[int] = []
    with pytest.raises(tt.OutputError, match="the server refuses"):
        remote.tried("s3://b/x", lambda: (asked.append(1), remote_web.check(Answer(), "", 200)), kind=tt.OutputError)
    assert asked == [1]


# What is read is what is there


def test_an_object_that_changes_and_changes_back(relay: Relay, bucket: Bucket, source: Path) -> None:
    """Before and after it is the file of the plan, and between not: its ranges say so."""
    data = (source / BIG).read_bytes()
    made, asked = tt.plan("s3://bucket/a", "split", "s3://bucket/b"), list[str]()

    def swap(number: int, method: str, path: str) -> None:
        if method == "GET" and path.endswith(BIG):
            asked.append(path)
            bucket.put("a/", {BIG: data[:-1] + bytes([data[-1] ^ 1]) if 1 < len(asked) < 4 else data})

    relay.set(swap)
    with pytest.raises(tt.FormatError, match="changed while it was read") as caught:
        run(made)
    assert caught.value.exit_code == 3 and bucket.names("b/") == []


def test_an_object_that_says_it_is_packed(relay: Relay, bucket: Bucket, source: Path, done: dict[str, bytes]) -> None:
    """Its bytes are counted as they lie there, so they are taken as they lie there."""
    bucket.client.put_object(Bucket="bucket", Key=f"a/{BIG}", Body=(source / BIG).read_bytes(), ContentEncoding="gzip")
    convert()
    assert bucket.snapshot("b/") == done


def test_short_reads(relay: Relay, bucket: Bucket, done: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of the system that do half of their work, on what was fetched and on what is sent."""
    pread, preadv, pwrite = os.pread, os.preadv, os.pwrite
    monkeypatch.setattr(os, "pread", lambda fd, size, at: pread(fd, max(1, size // 2), at))
    monkeypatch.setattr(os, "preadv", lambda fd, parts, at: preadv(fd, [part[: max(1, len(part) // 2)] for part in parts[:1]], at))
    monkeypatch.setattr(os, "pwrite", lambda fd, part, at: pwrite(fd, part[: max(1, len(part) // 2)], at))
    convert()
    assert bucket.snapshot("b/") == done
    assert tt.verify("s3://bucket/a", "s3://bucket/b").rows > 0


def test_no_room_here(relay: Relay, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tt.plan("s3://bucket/a", "split", "s3://bucket/b")

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(tt.FormatError, match="there is no room here for what is read"):
        patch.setattr(os, "pwrite", full)
        run(made)
    with monkeypatch.context() as patch, pytest.raises(tt.OutputError, match="a temporary file here cannot be written") as caught:
        patch.setattr(remote_run.Stream, "move", full)
        run(made)
    assert "TMPDIR" in str(caught.value) and bucket.names("b/") == [] and bucket.uploads() == []


# What others are told


def test_a_password_is_not_shown() -> None:
    with pytest.raises(tt.FormatError) as caught:
        tt.inspect("http://me:secret@127.0.0.1:9/a?key=hidden")
    assert "secret" not in str(caught.value) and "hidden" not in str(caught.value)


def test_a_token_stays_with_its_host(source: Path, done: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that sends on to another host for the bytes, and a store that does: our key is for the first alone."""
    with serving(source) as (there, plain), serving(source, hub="org/name@v1") as (url, log):
        log.elsewhere = there.replace("127.0.0.1", "localhost")
        environment = {**os.environ, "HF_ENDPOINT": url, "HF_TOKEN": "hf_key", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
        command = [sys.executable, "-m", "triptych.cli", "convert", "hf://org/name@v1", str(tmp_path / "b"), "--to", "split"]
        ran = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert ran.returncode == 0, ran.stderr
        assert files.snapshot(tmp_path / "b") == done
        assert "Bearer hf_key" in log.tokens and set(plain.tokens) == {None}
        plain.tokens.clear()
        monkeypatch.setattr(GS, "_headers", lambda store: {"Authorization": "Bearer key"})
        monkeypatch.setattr(GS, "_object", lambda store, name: f"{url}/org/name/resolve/v1/{BIG}")
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
        assert b"".join(GS().get("gs://b/k", 0, 9, "1")) == (source / BIG).read_bytes()[:9]
        assert log.tokens[-1] == "Bearer key" and plain.tokens == [None]
