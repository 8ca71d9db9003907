"""Servers on loopback for the tests of remote files: one that serves ranges, one that answers as a model hub does, moto's S3."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

import triptych as tt
from triptych import holes, remote, remote_out, remote_run

from . import files


@dataclass
class Log:
    """What was asked: (method, path, first byte, byte behind the last) with None where no range was asked, and bytes sent of bodies."""

    asked: list[tuple[str, str, int | None, int | None]] = field(default_factory=list)
    failures: int = 0
    ranges: bool = True
    elsewhere: str = ""
    """Another host, which is sent to for the bytes of files."""
    tokens: list[str | None] = field(default_factory=list)
    """The Authorization of each request for a file."""

    def gets(self, end: str = ".safetensors") -> list[tuple[int | None, int | None]]:
        return [(start, stop) for method, path, start, stop in self.asked if method == "GET" and path.endswith(end)]


def span(header: str | None) -> tuple[int | None, int | None]:
    """bytes=2-5 as (2, 6)."""
    if not header:
        return None, None
    first, _, last = header.removeprefix("bytes=").partition("-")
    return int(first), int(last) + 1


@contextmanager
def serving(root: Path, hub: str | None = None) -> Iterator[tuple[str, Log]]:
    """A server of the files below `root`, by ranges; with `hub` (org/name@revision) as a hub that has them in a repository."""
    log = Log()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def do_POST(self) -> None:
            asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
            assert hub and "/paths-info/" in self.path, self.path
            names = json.loads(asked)["paths"] if asked.startswith("{") else [unquote(asked.partition("paths=")[2].partition("&")[0])]
            self.table([entry(root, root / name) for name in ([names] if isinstance(names, str) else names) if (root / name).is_file()])

        def answer(self, body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            start, stop = span(self.headers.get("Range")) if log.ranges else (None, None)
            if hub:
                repo, revision = hub.split("@")
                if path.startswith(f"/api/models/{repo}/tree/{revision}"):
                    return self.table([entry(root, one) for one in sorted(root.rglob("*"))])
                if path in (f"/api/models/{repo}", f"/api/models/{repo}/revision/{revision}"):
                    return self.table({"id": repo, "sha": "0" * 40, "siblings": []})
                if "/revision/" in path:
                    return self.send(404, b"{}", True, {"X-Error-Code": "RevisionNotFound"})
                path = path.removeprefix(f"/{repo}/resolve/{revision}")
            file = root / path.lstrip("/")
            if log.failures and body and start:
                log.failures -= 1
                return self.send(503, b"later", body)
            if not file.is_file():
                return self.send(404, b"nothing here", body)
            log.asked.append((self.command, path, start, stop))
            log.tokens.append(self.headers.get("Authorization"))
            if log.elsewhere and body:
                return self.send(302, b"", body, {"Location": f"{log.elsewhere}/{path.lstrip('/')}"})
            headers, size = {"ETag": f'"{hashed(file)}"'}, file.stat().st_size
            with file.open("rb") as opened:
                opened.seek(start or 0)
                data = opened.read(None if stop is None else stop - (start or 0))
            if start is None:
                return self.send(200, data, body, headers)
            self.send(206, data, body, {**headers, "Content-Range": f"bytes {start}-{start + len(data) - 1}/{size}"})

        def table(self, value: Any) -> None:
            self.send(200, json.dumps(value).encode(), True, {"Content-Type": "application/json"})

        def send(self, code: int, data: bytes, body: bool, headers: dict[str, str] | None = None) -> None:
            self.send_response(code)
            for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", log
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def hashed(path: Path) -> str:
    """Of a file's contents; read once for each state of it."""
    state = path.stat()
    return _hashed(path, state.st_mtime_ns, state.st_size, state.st_ino)


@lru_cache
def _hashed(path: Path, *state: int) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


def entry(root: Path, path: Path) -> dict[str, Any]:
    """A file or folder as the hub's API describes it."""
    name = path.relative_to(root).as_posix()
    if path.is_dir():
        return {"type": "directory", "oid": hashlib.sha1(name.encode()).hexdigest(), "size": 0, "path": name}
    return {"type": "file", "oid": hashed(path), "size": path.stat().st_size, "path": name}


class Bucket:
    """A bucket of moto's S3, which listens on loopback: its objects, its unfinished uploads, what was asked of it."""

    def __init__(self, client: Any, log: Log) -> None:
        self.client, self.log = client, log

    def names(self, prefix: str = "") -> list[str]:
        return [one["Key"] for one in self.client.list_objects_v2(Bucket="bucket", Prefix=prefix).get("Contents", [])]

    def snapshot(self, prefix: str) -> dict[str, bytes]:
        return {key.removeprefix(prefix): self.client.get_object(Bucket="bucket", Key=key)["Body"].read() for key in self.names(prefix)}

    def uploads(self) -> list[str]:
        return [one["Key"] for one in self.client.list_multipart_uploads(Bucket="bucket").get("Uploads", [])]

    def put(self, prefix: str, files: dict[str, bytes]) -> None:
        for name, data in files.items():
            self.client.put_object(Bucket="bucket", Key=f"{prefix}{name}", Body=data)

    def empty(self) -> None:
        for key in self.names():
            self.client.delete_object(Bucket="bucket", Key=key)
        self.log.asked.clear()


@contextmanager
def s3() -> Iterator[tuple[str, Bucket]]:
    """moto's server with one bucket, and a log of what it is asked. The environment must hold credentials."""
    import boto3
    from moto.server import ThreadedMotoServer
    from werkzeug.serving import WSGIRequestHandler

    log = Log()

    def note(handler: WSGIRequestHandler, code: object = "-", size: object = "-") -> None:
        log.asked.append((handler.command, unquote(urlsplit(handler.path).path), *span(handler.headers.get("Range"))))

    before = WSGIRequestHandler.log_request
    WSGIRequestHandler.log_request = note  # type: ignore[method-assign, assignment]
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        url = f"http://{host}:{port}"
        client = boto3.client("s3", endpoint_url=url)
        client.create_bucket(Bucket="bucket")
        yield url, Bucket(client, log)
    finally:
        server.stop()
        WSGIRequestHandler.log_request = before  # type: ignore[method-assign]


# Fixtures: tests import those that they use

H, D = 6, 128
BIG = {"model_type": "gpt_neox", "hidden_size": H * D, "num_attention_heads": H}
ATTENTION = "gpt_neox.layers.0.attention.query_key_value."
SHARDS: list[dict[str, tuple[str, tuple[int, ...]]]] = [
    {ATTENTION + "weight": ("BF16", (3 * H * D, H * D)), "gpt_neox.layers.0.mlp.weight": ("BF16", (4801, H * D)), "odd": ("U8", (7,))},
    {ATTENTION + "bias": ("BF16", (3 * H * D,)), **{f"norm.{i}": ("F32", (3 + i,)) for i in range(9)}},
]
INDEX = "model.safetensors.index.json"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "a",
    "AWS_SECRET_ACCESS_KEY": "b",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose first shard takes several requests, and whose second one is small."""
    folder = tmp_path_factory.mktemp("source")
    files.checkpoint(folder, SHARDS, BIG)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def done(source: Path) -> dict[str, bytes]:
    """The conversion on a disk."""
    tt.convert(source, source.with_name(source.name + "-done"), "split")
    return files.snapshot(source.with_name(source.name + "-done"))


@pytest.fixture(scope="module")
def server() -> Iterator[Bucket]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        with s3() as (url, bucket):
            patch.setenv("AWS_ENDPOINT_URL", url)
            remote._store.cache_clear()
            yield bucket
            remote._store.cache_clear()


@pytest.fixture
def bucket(server: Bucket) -> Iterator[Bucket]:
    server.empty()
    yield server
    assert server.uploads() == [], "no upload is left half-way"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "WAITS", (0.0, 0.0))
    monkeypatch.setattr(remote, "BLOCK", 5 << 20)
    monkeypatch.setattr(remote_run, "BLOCK", 1 << 20)
    monkeypatch.setattr(holes, "BLOCK", 1 << 20)
    monkeypatch.setattr(holes, "GRAIN", 1 << 17)
    monkeypatch.setattr(remote_out, "BEAT", 0.1)
    monkeypatch.setattr(remote_out, "PATIENCE", 0.5)


# Google Cloud Storage


class Store:
    """A bucket of an emulator of Google Cloud Storage on loopback: its objects, the sessions that were given up."""

    def __init__(self, storage: Any) -> None:
        self.storage, self.given_up = storage, list[str]()

    def names(self, prefix: str = "") -> list[str]:
        return sorted(one["name"] for one in self.storage.get_file_list("bucket", prefix, None)[0])

    def snapshot(self, prefix: str) -> dict[str, bytes]:
        return {name.removeprefix(prefix): self.storage.get_file("bucket", name) for name in self.names(prefix)}

    def open_sessions(self) -> int:
        return len(self.storage.resumable)


@contextmanager
def gcs() -> Iterator[tuple[str, Store]]:
    """gcp-storage-emulator with one bucket; what it lacks is added: conditions on writing, and giving sessions up."""
    from http import HTTPStatus

    from gcp_storage_emulator import server
    from gcp_storage_emulator.exceptions import NotFound
    from gcp_storage_emulator.handlers import objects

    emulator = server.Server("127.0.0.1", 0, True, "bucket")
    store = Store(emulator._storage)

    def insert(request: Any, response: Any, storage: Any) -> None:
        body, name = request.data, request.query.get("name", [""])[0]
        try:
            there = storage.get_file_obj("bucket", name)["generation"]
        except NotFound:
            there = "0"
        if request.query.get("ifGenerationMatch", [there]) != [there]:
            response.status = HTTPStatus.PRECONDITION_FAILED
            return
        assert body is not None
        objects.insert(request, response, storage)

    def give_up(request: Any, response: Any, storage: Any) -> None:
        store.given_up.append(request.query["upload_id"][0])
        storage.resumable.pop(store.given_up[-1], None)
        response.status = HTTPStatus.NO_CONTENT

    table = next(methods for _, methods in server.HANDLERS if methods.get("POST") is objects.insert)
    table |= {"POST": insert, "DELETE": give_up}
    emulator.start()
    try:
        host, port = emulator._api._httpd.server_address
        yield f"http://{host}:{port}", store
    finally:
        emulator.stop()
        table["POST"] = objects.insert
        del table["DELETE"]
