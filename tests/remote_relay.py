"""A relay on loopback between us and a server, which loses, cuts, delays and refuses what it is told to."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

KINDS = ("reset", "lost", "cut", "503", "429", "500")
"""Faults that pass: a connection that breaks before the server has the request, or after it has done it and before it tells, or within the
answer; answers that ask for another try."""


@dataclass
class Relay:
    """`fault`: what happens to a request, by its number from 1, its method and its path; None is nothing."""

    fault: Callable[[int, str, str], str | None] = lambda number, method, path: None
    number: int = 0
    seen: list[tuple[str, str, str]] = field(default_factory=list)
    garbled: int = 0
    """Requests that are none: what follows another one on its connection."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def next(self, method: str, path: str) -> str | None:
        with self.lock:
            self.number += 1
            kind = self.fault(self.number, method, path)
            self.seen.append((method, path, kind or ""))
            return kind

    def set(self, fault: Callable[[int, str, str], str | None]) -> None:
        """From here on, counted from 1 again."""
        with self.lock:
            self.fault, self.number, self.seen = fault, 0, []


@contextmanager
def relayed(url: str) -> Iterator[tuple[str, Relay]]:
    """The address of a relay to `url`, and what it does."""
    relay, there = Relay(), urlsplit(url).netloc

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *args: object) -> None:
            pass

        def send_error(self, *args: object, **more: object) -> None:
            relay.garbled += 1
            self.hang_up()

        def pass_on(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(size)
            if len(body) < size:  # who asks was killed
                return self.hang_up()
            kind = relay.next(self.command, self.path)
            if kind == "reset":
                return self.hang_up()
            if kind == "slow":
                time.sleep(1)
                return self.hang_up()
            if kind and kind.isdigit() and kind != "200":
                return self.tell(int(kind), [("Retry-After", "0")], b"not now")
            headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
            if kind == "200":
                headers.pop("Range", None)
            upstream = HTTPConnection(there)
            upstream.request(self.command, self.path, body, headers)
            answer = upstream.getresponse()
            data = answer.read()
            upstream.close()
            if kind == "lost":
                return self.hang_up()
            kept = [(name, value) for name, value in answer.getheaders() if name.lower() not in ("connection", "transfer-encoding", "date")]
            self.tell(answer.status, kept, data, cut=kind == "cut")

        def tell(self, status: int, headers: list[tuple[str, str]], data: bytes, cut: bool = False) -> None:
            self.send_response(status)
            for name, value in headers:
                if name.lower() != "content-length" or self.command == "HEAD":
                    self.send_header(name, value)
            if self.command != "HEAD":
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if cut:
                self.wfile.write(data[: len(data) // 2])
                return self.hang_up()
            if self.command != "HEAD":
                self.wfile.write(data)

        def hang_up(self) -> None:
            """Close with a reset."""
            self.close_connection = True
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = pass_on

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda request, client_address: None  # type: ignore[method-assign]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", relay
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
