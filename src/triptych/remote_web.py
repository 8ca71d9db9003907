"""HTTP through urllib3, which is imported with the first request: what every store is spoken to with, and files of plain web servers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

WINDOW = 1 << 20
"""Bytes of an answer, or of a file that is sent, that lie in memory at once."""
TIMEOUTS = 15.0, 60.0
"""Seconds to connect, and between two pieces of an answer."""


class Info(NamedTuple):
    """What a server says of a file: its bytes, and what stands for its contents: ETag, generation, id, or date."""

    size: int
    tag: str


class Later(OSError):
    """An answer that says after how many seconds to ask again."""

    wait = 0.0


def send(method: str, url: str, headers: Mapping[str, str] | None = None, body: Any = None, redirect: bool = True) -> Any:
    """The answer to a request, its body not yet read (`parts`, `whole`). Raises OSError and others when there is none."""
    http = _pool(os.getpid(), _proxy(url))
    asked = {"Accept-Encoding": "identity", "User-Agent": "triptych", **(headers or {})}
    answer = http.request(method, url, headers=asked, body=body, preload_content=False, redirect=redirect)
    answer.auto_close = False
    return answer


@lru_cache(maxsize=4)
def _pool(process: int, proxy: str | None) -> Any:
    """One set of connections for all threads of a process."""
    import urllib3

    tries = urllib3.Retry(None, connect=0, read=0, status=0, other=0, redirect=5)
    options: dict[str, Any] = {"retries": tries, "timeout": urllib3.Timeout(*TIMEOUTS), "maxsize": 16, "blocksize": WINDOW >> 2}
    bundle = os.environ.get("AWS_CA_BUNDLE") or os.environ.get("REQUESTS_CA_BUNDLE")
    if bundle:
        options["ca_certs"] = bundle
    return urllib3.ProxyManager(proxy, **options) if proxy else urllib3.PoolManager(**options)


def _proxy(url: str) -> str | None:
    """The proxy that the environment names for an address."""
    from urllib.parse import urlsplit
    from urllib.request import getproxies, proxy_bypass

    proxies, address = getproxies(), urlsplit(url)
    proxy = proxies.get(address.scheme.lower())
    return proxy if proxy and not proxy_bypass(address.netloc.rpartition("@")[2]) else None


def parts(answer: Any, size: int) -> Iterator[bytes]:
    """`size` bytes of an answer in pieces; its connection serves the next request. Raises OSError when there are fewer."""
    left = size
    try:
        while left:
            part: bytes = answer.read(min(left, WINDOW), decode_content=False)  # as its bytes are counted
            if not part:
                raise OSError(f"{size - left} bytes in place of {size}")
            left -= len(part)
            yield part
    finally:
        if left:
            answer.close()
        else:
            answer.drain_conn()
            answer.release_conn()


def whole(answer: Any, most: int = 1 << 26) -> bytes:
    """All of a short answer; the connection of one that is longer ends."""
    raw: bytes = answer.read(most)
    answer.release_conn() if len(raw) < most else answer.close()
    return raw


def check(answer: Any, url: str, *good: int) -> Any:
    """The answer, if its status is one of `good`. Raises FileNotFoundError, PermissionError, FileExistsError (a condition), OSError."""
    if answer.status in good:
        return answer
    if answer.status < 300:
        answer.close()
        raise OSError(f"{answer.status} {answer.reason} in place of {' or '.join(map(str, good))}")
    told = " ".join(whole(answer, 2000).decode("utf-8", "replace").split())
    kinds = {404: FileNotFoundError, 410: FileNotFoundError, 401: PermissionError, 403: PermissionError, 412: FileExistsError}
    kind = PermissionError if answer.status == 400 and "Token" in told else kinds.get(answer.status, Later)  # S3: ExpiredToken
    error = kind(f"{answer.status} {answer.reason}: {told[:160]}".rstrip(": "))
    if isinstance(error, Later) and (seconds := answer.headers.get("Retry-After", "")).isdigit():
        error.wait = float(seconds)
    raise error


def ranged(answer: Any, url: str, start: int, stop: int, tag: str = "") -> Iterator[bytes]:
    """The bytes of an answer to a request for a range; a server that answers with another one, or of another file, is not believed."""
    check(answer, url, 206)
    other = answer.headers.get("ETag")
    if other and tag.endswith('"') and other != tag:
        answer.close()
        raise Changed(f"ETag {other} in place of {tag}")
    told = answer.headers.get("Content-Range", "")
    if not told.startswith(f"bytes {start}-{stop - 1}/"):
        answer.close()
        raise OSError(f"{told or 'no range'} in place of bytes {start}-{stop - 1}")
    return parts(answer, stop - start)


class Web:
    """Files of a web server that answers range requests. It lists nothing, and nothing is written there."""

    def info(self, url: str) -> Info:
        """Asked for is one byte: links that are signed for reading answer nothing else."""
        answer = send("GET", url, {"Range": "bytes=0-0"})
        headers = answer.headers
        tag = next((headers[key] for key in ("ETag", "Content-MD5", "Last-Modified") if headers.get(key)), "")
        if answer.status == 416 or (answer.status == 200 and headers.get("Content-Length") == "0"):
            answer.close()
            return Info(0, tag)
        check(answer, url, 200, 206)
        size = headers.get("Content-Range", "").rpartition("/")[2]
        ranges = answer.status == 206
        answer.close() if not ranges else list(parts(answer, 1))
        if not ranges or not size.isdigit():
            raise NoRanges("the server answers no range requests" if not ranges else "the server does not say how long a file is")
        return Info(int(size), tag)

    def get(self, url: str, start: int, stop: int, tag: str) -> Iterator[bytes]:
        return ranged(send("GET", url, {"Range": f"bytes={start}-{stop - 1}"}), url, start, stop, tag)


class NoRanges(Exception):
    """A server that cannot be read from in parts."""


class Changed(Exception):
    """The file is no longer the one that was seen."""
