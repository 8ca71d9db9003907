"""Files of a model hub through huggingface_hub, which knows its addresses, tokens and revisions."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import Any

from .remote_fsspec import Filesystem, exactly, told
from .remote_web import Info


class Hub(Filesystem):
    """Files of a repository: `hf://org/name@revision/file`. Nothing is written there."""

    def __init__(self) -> None:
        import huggingface_hub

        self._kind, self._local = huggingface_hub.HfFileSystem, threading.local()

    @property
    def _fs(self) -> Any:
        """It keeps listings, so each thread has its own."""
        if not hasattr(self._local, "fs"):
            self._local.fs = self._kind(use_listings_cache=False, skip_instance_cache=True)
        return self._local.fs

    def get(self, url: str, start: int, stop: int) -> Iterator[bytes]:
        if getattr(self._local, "url", None) != url:  # one that is open stays so, as each opening asks for the file's size again
            self._local.file, self._local.url = self._fs.open(url, "rb", cache_type="none"), url
        self._local.file.seek(start)
        yield exactly(self._local.file.read(stop - start), start, stop)

    def _listed(self, name: str, found: Mapping[str, Any]) -> Info:
        return told(found)
