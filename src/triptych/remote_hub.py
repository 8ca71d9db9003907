"""Files of a model hub through huggingface_hub, which knows its addresses, tokens and revisions."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

from .remote_web import Info


class Hub:
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

    def info(self, url: str) -> Info:
        self._fs.invalidate_cache()
        found = self._fs.info(url)
        if found["type"] == "directory":
            raise FileNotFoundError(url)
        return _info(found)

    def get(self, url: str, start: int, stop: int) -> Iterator[bytes]:
        if getattr(self._local, "url", None) != url:  # one that is open stays so, as each opening asks for the file's size again
            self._local.file, self._local.url = self._fs.open(url, "rb", cache_type="none"), url
        self._local.file.seek(start)
        part: bytes = self._local.file.read(stop - start)
        if len(part) != stop - start:
            raise OSError(f"{len(part)} bytes in place of {stop - start} at byte {start}")
        yield part

    def names(self, url: str) -> dict[str, Info]:
        self._fs.invalidate_cache()
        prefix = str(self._fs._strip_protocol(url)).rstrip("/") + "/"
        found = self._fs.find(url, detail=True)
        return {name.removeprefix(prefix): _info(one) for name, one in found.items() if name.startswith(prefix) and one["type"] == "file"}


def _info(found: dict[str, Any]) -> Info:
    return Info(found["size"], next((str(found[key]) for key in ("blob_id", "xet_hash", "oid") if found.get(key)), ""))
