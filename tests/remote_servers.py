"""Servers on loopback for the tests of remote files: one that serves ranges, one that answers as a model hub does, moto's S3."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Log:
    """What was asked: (method, path, first byte, byte behind the last) with None where no range was asked, and bytes sent of bodies."""

    asked: list[tuple[str, str, int | None, int | None]] = field(default_factory=list)
    failures: int = 0
    ranges: bool = True

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
            data = file.read_bytes()
            tag = hashlib.sha256(data).hexdigest()
            if start is None:
                return self.send(200, data, body, {"ETag": f'"{tag}"'})
            part = data[start:stop]
            self.send(206, part, body, {"ETag": f'"{tag}"', "Content-Range": f"bytes {start}-{start + len(part) - 1}/{len(data)}"})

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


def entry(root: Path, path: Path) -> dict[str, Any]:
    """A file or folder as the hub's API describes it."""
    name = path.relative_to(root).as_posix()
    if path.is_dir():
        return {"type": "directory", "oid": hashlib.sha1(name.encode()).hexdigest(), "size": 0, "path": name}
    return {"type": "file", "oid": hashlib.sha1(path.read_bytes()).hexdigest(), "size": path.stat().st_size, "path": name}


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
