"""Files of every other store that fsspec knows a class for (az://, sftp://, webhdfs://, ...), read by ranges. Nothing is written there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .remote_web import Info

STATES = ("ETag", "etag", "checksum", "md5", "content_md5", "mtime", "last_modified", "created")
"""What these stores say of a file's contents, the surest first."""


class Filesystem:
    """Files behind `scheme://`, with the settings that fsspec finds in its configuration and in the environment.

    Raises ValueError for a scheme that fsspec does not know, ImportError for one whose package is not installed.
    """

    def __init__(self, scheme: str) -> None:
        import fsspec

        self._fs: Any = fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True)

    def info(self, url: str) -> Info:
        self._fs.invalidate_cache()
        found = self._fs.info(url)
        if found["type"] == "directory":
            raise FileNotFoundError(url)
        return _info(found)

    def get(self, url: str, start: int, stop: int) -> Iterator[bytes]:
        part: bytes = self._fs.cat_file(url, start=start, end=stop)
        if len(part) != stop - start:
            raise OSError(f"{len(part)} bytes in place of {stop - start} at byte {start}")
        yield part

    def names(self, url: str) -> dict[str, Info]:
        """All files below a folder by their name there; each is asked for by itself, as some stores say other things in a listing."""
        self._fs.invalidate_cache()
        prefix = str(self._fs._strip_protocol(url)).rstrip("/") + "/"
        return {name.removeprefix(prefix): _info(self._fs.info(name)) for name in self._fs.find(url) if name.startswith(prefix)}


def _info(found: dict[str, Any]) -> Info:
    return Info(found["size"], next((str(found[key]) for key in STATES if found.get(key)), ""))
