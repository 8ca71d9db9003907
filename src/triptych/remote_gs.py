"""Google Cloud Storage through its JSON API; google-auth finds the credentials. An upload is one resumable session, in order."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import IO, Any
from urllib.parse import quote, urlencode

from .remote_web import Info, check, ranged, send, whole

HOST = "https://storage.googleapis.com"
GRAIN = 256 << 10
"""All parts of an upload but the last are multiples of it."""
SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"


class GS:
    """Objects in buckets: `gs://bucket/key`. Without credentials requests go out bare, as public buckets take them.

    STORAGE_EMULATOR_HOST: another server, which is asked without credentials.
    """

    def __init__(self) -> None:
        other = os.environ.get("STORAGE_EMULATOR_HOST", "").rstrip("/")
        self._host = other if "://" in other else f"http://{other}" if other else HOST
        self._credentials = None if other else _credentials()
        self._tried = set[tuple[str, int]]()

    def info(self, url: str) -> Info:
        return _info(self._json("GET", self._object(url)))

    def get(self, url: str, start: int, stop: int, tag: str) -> Iterator[bytes]:
        """Of that generation, which is gone when the object was written anew."""
        where = f"{self._object(url)}?{urlencode({'alt': 'media', 'generation': tag})}"
        return ranged(send("GET", where, {**self._headers(), "Range": f"bytes={start}-{stop - 1}"}), url, start, stop)

    def names(self, url: str) -> dict[str, Info]:
        """All objects below a folder by their name there."""
        bucket, key = _split(url)
        prefix, found, more = f"{key.rstrip('/')}/" if key else "", dict[str, Info](), ""
        while True:
            query = {"prefix": prefix, "fields": "nextPageToken,items(name,size,generation)", **({"pageToken": more} if more else {})}
            table = self._json("GET", f"{self._host}/storage/v1/b/{bucket}/o?{urlencode(query)}")
            found |= {one["name"].removeprefix(prefix): _info(one) for one in table.get("items", [])}
            more = table.get("nextPageToken", "")
            if not more:
                return found

    def put(self, url: str, data: bytes, tag: str | None = None) -> str:
        """Write an object; with `tag` only in place of the one with that tag, with "" only where there is none. Its tag is returned."""
        condition = {} if tag is None else {"ifGenerationMatch": tag or "0"}
        bucket, key = _split(url)
        query = urlencode({"uploadType": "media", "name": key, **condition})
        headers = {"Content-Type": "application/octet-stream"}
        return _info(self._json("POST", f"{self._host}/upload/storage/v1/b/{bucket}/o?{query}", headers, data)).tag

    def remove(self, url: str) -> None:
        whole(check(send("DELETE", self._object(url), self._headers()), url, 200, 204))

    # One upload in parts

    def begin(self, url: str, size: int) -> str:
        """The address of the session."""
        bucket, key = _split(url)
        query = urlencode({"uploadType": "resumable", "name": key})
        headers = {**self._headers(), "X-Upload-Content-Length": str(size), "Content-Type": "application/json"}
        answer = check(send("POST", f"{self._host}/upload/storage/v1/b/{bucket}/o?{query}", headers, b"{}"), url, 200, 201)
        whole(answer)
        return str(answer.headers["Location"])

    def part(self, url: str, upload: str, number: int, at: int, body: IO[bytes], size: int, total: int) -> str:
        """Send what begins at byte `at`; the last part makes the object appear."""
        stop = at + size
        have = self._held(url, upload, "", b"", total) if (upload, at) in self._tried else at  # some of it may have come through
        self._tried.add((upload, at))
        if at <= have < stop:
            body.seek(have - at)
            have = self._held(url, upload, f"{have}-{stop - 1}", body, total, stop - have)
        if have != stop:
            raise OSError(f"the session has {have} bytes, and was sent all before {stop}")
        self._tried.discard((upload, at))
        return ""

    def _held(self, url: str, upload: str, span: str, body: IO[bytes] | bytes, total: int, size: int = 0) -> int:
        """Send a span of bytes, or nothing; how many the session has then, in whole grains: it takes no notice of what it has already."""
        headers = {"Content-Length": str(size), "Content-Range": f"bytes {span or '*'}/{total}"}
        answer = check(send("PUT", upload, headers, body, redirect=False), url, 200, 201, 308)
        whole(answer)
        last = answer.headers.get("Range", "").rpartition("-")[2]
        return total if answer.status != 308 else (int(last) + 1) // GRAIN * GRAIN if last else 0

    def finish(self, url: str, upload: str, tags: list[str]) -> None:
        """The last part has done it."""

    def give_up(self, url: str, upload: str) -> None:
        whole(check(send("DELETE", upload), url, 204, 404, 499))

    def give_up_all(self, url: str) -> None:
        """Sessions that a killed run left cost nothing, cannot be listed, and end after a week."""

    # Requests

    def _json(self, method: str, where: str, headers: Mapping[str, str] | None = None, body: bytes | None = None) -> dict[str, Any]:
        answer = check(send(method, where, {**self._headers(), **(headers or {})}, body), where, 200)
        found: dict[str, Any] = json.loads(whole(answer))
        return found

    def _object(self, url: str) -> str:
        bucket, key = _split(url)
        return f"{self._host}/storage/v1/b/{bucket}/o/{quote(key, safe='')}"

    def _headers(self) -> dict[str, str]:
        if self._credentials is None:
            return {}
        if not self._credentials.valid:
            import urllib3

            transport = importlib.import_module("google.auth.transport.urllib3")
            self._credentials.refresh(transport.Request(urllib3.PoolManager()))
        headers: dict[str, str] = {}
        self._credentials.apply(headers)
        return headers


def _credentials() -> Any:
    auth = importlib.import_module("google.auth")
    try:
        return auth.default(scopes=[SCOPE])[0]
    except auth.exceptions.DefaultCredentialsError:
        return None


def _split(url: str) -> tuple[str, str]:
    bucket, _, key = url.partition("://")[2].partition("/")
    return quote(bucket, safe=""), key


def _info(table: Mapping[str, Any]) -> Info:
    return Info(int(table["size"]), str(table["generation"]))
