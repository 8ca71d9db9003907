"""Files of a model hub: huggingface_hub knows addresses, tokens and revisions; bytes are asked for without it, as it holds each answer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .remote_fsspec import Filesystem, told
from .remote_web import Info, ranged, send


class Hub(Filesystem):
    """Files of a repository: `hf://org/name@revision/file`. Nothing is written there."""

    def __init__(self) -> None:
        import huggingface_hub

        self._kind, self._local = huggingface_hub.HfFileSystem, threading.local()
        utils: Any = huggingface_hub.utils
        self._headers: Callable[[], dict[str, str]] = utils.build_hf_headers
        self._urls: dict[str, str] = {}

    @property
    def _fs(self) -> Any:
        """It keeps listings, so each thread has its own."""
        if not hasattr(self._local, "fs"):
            self._local.fs = self._kind(use_listings_cache=False, skip_instance_cache=True)
        return self._local.fs

    def get(self, url: str, start: int, stop: int, tag: str) -> Iterator[bytes]:
        """Sent on to another host, the token stays behind."""
        if url not in self._urls:
            self._urls[url] = self._fs.url(url)
        headers = {**self._headers(), "Range": f"bytes={start}-{stop - 1}"}
        return ranged(send("GET", self._urls[url], headers), url, start, stop)

    def _listed(self, name: str, found: Mapping[str, Any]) -> Info:
        return told(found)
