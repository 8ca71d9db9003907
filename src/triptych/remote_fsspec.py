"""Files of every other store that fsspec knows a class for (az://, sftp://, webhdfs://, ...), read by ranges. Nothing is written there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .remote_web import Info

STATES = ("ETag", "etag", "blob_id", "xet_hash", "oid", "checksum", "md5", "content_md5", "mtime", "last_modified", "created")
"""What these stores say of a file's contents, the surest first."""


class Filesystem:
    """Files behind `scheme://`, with the settings that fsspec finds in its configuration and in the environment.

    Raises ValueError for a scheme that fsspec does not know, ImportError for one whose package is not installed.
    """

    def __init__(self, scheme: str) -> None:
        import fsspec

        self._one: Any = fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True)

    @property
    def _fs(self) -> Any:
        return self._one

    def info(self, url: str) -> Info:
        self._fs.invalidate_cache()
        found = self._fs.info(url)
        if found["type"] == "directory":
            raise FileNotFoundError(url)
        return told(found)

    def get(self, url: str, start: int, stop: int, tag: str) -> Iterator[bytes]:
        yield exactly(self._fs.cat_file(url, start=start, end=stop), start, stop)

    def names(self, url: str) -> dict[str, Info]:
        """All files below a folder by their name there."""
        self._fs.invalidate_cache()
        prefix = str(self._fs._strip_protocol(url)).rstrip("/") + "/"
        found = {name: one for name, one in self._fs.find(url, detail=True).items() if name.startswith(prefix) and one["type"] == "file"}
        return {name.removeprefix(prefix): self._listed(name, one) for name, one in found.items()}

    def _listed(self, name: str, found: Mapping[str, Any]) -> Info:
        """A file of a listing: asked for by itself, as some stores say other things in a listing."""
        return told(self._fs.info(name))


def told(found: Mapping[str, Any]) -> Info:
    return Info(found["size"], next((str(found[key]) for key in STATES if found.get(key)), ""))


def exactly(part: bytes, start: int, stop: int) -> bytes:
    """What was read, if it is all that was asked for. Raises OSError."""
    if len(part) != stop - start:
        raise OSError(f"{len(part)} bytes in place of {stop - start} at byte {start}")
    return part
