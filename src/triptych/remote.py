"""Files behind a URL: what is asked of them, through fsspec, which is imported with the first question.

A file is read by ranges and never as a whole; what it was when it was first seen is kept as a number made of its ETag (or what the server
has in place of one), so that a changed file is found out. Reading is tried three times, then it is an error of ours.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import quote, unquote

from .errors import FormatError, MissingExtraError, OutputError, PlanError, TriptychError

BLOCK = 8 << 20
"""Bytes of one request."""
WAITS = (0.2, 1.0)
"""Seconds before the second and the third try."""
HTTP = ("http", "https")
SCHEMES = {"s3": ("s3fs", "remote"), "gs": ("gcsfs", "remote"), "hf": ("huggingface_hub", "hub"), "http": ("aiohttp", "remote"),
           "https": ("aiohttp", "remote")}  # fmt: skip
"""Scheme -> what it needs to be installed: package, extra."""
WRITABLE = ("s3", "gs")
STATES = ("ETag", "etag", "blob_id", "xet_hash", "Content-MD5", "Last-Modified", "LastModified", "updated", "mtime")
"""What servers say of a file's contents, the surest first."""
Info = Mapping[str, Any]
Result = TypeVar("Result")


def is_remote(path: str | Path) -> bool:
    """Whether a path is a URL.

    >>> is_remote("s3://bucket/model"), is_remote("model"), is_remote("C:/model")
    (True, False, False)
    """
    return isinstance(path, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path) is not None


def scheme_of(url: str) -> str:
    return url.partition("://")[0].lower()


def shown(url: str) -> str:
    """A URL as messages have it: what follows a question mark may be a key, and is left out."""
    return url.partition("?")[0] if scheme_of(url) in HTTP else url


def join(root: str, name: str) -> str:
    """The URL of a file in a folder; of HTTP a query stays at the end.

    >>> join("s3://bucket/a/", "x y"), join("https://host/a?key=1", "x y")
    ('s3://bucket/a/x y', 'https://host/a/x%20y?key=1')
    """
    if scheme_of(root) not in HTTP:
        return f"{root.rstrip('/')}/{name}"
    base, mark, query = root.partition("?")
    return f"{base.rstrip('/')}/{quote(name)}{mark}{query}"


def cut(url: str) -> tuple[str, str]:
    """The folder and the name of a file: `join` undone.

    >>> cut("https://host/a/x%20y?key=1")
    ('https://host/a?key=1', 'x y')
    """
    if scheme_of(url) not in HTTP:
        root, _, name = url.rstrip("/").rpartition("/")
        return root, name
    base, mark, query = url.partition("?")
    root, _, name = base.rpartition("/")
    return f"{root}{mark}{query}", unquote(name)


def file_system(url: str) -> Any:
    """The fsspec file system of a URL. Raises PlanError for a kind of URL that is none of ours, MissingExtraError."""
    scheme = scheme_of(url)
    if scheme not in SCHEMES:
        expected = ", ".join(f"{known}://" for known in SCHEMES)
        raise PlanError("no such kind of URL", where=shown(url), expected=expected, found=f"{scheme}://")
    package, extra = SCHEMES[scheme]
    try:
        fsspec = importlib.import_module("fsspec")
    except ImportError:
        raise MissingExtraError("fsspec", "remote") from None
    try:
        importlib.import_module(package)
    except ImportError:
        raise MissingExtraError(package, extra) from None
    if scheme == "hf":  # keeps listings, so each thread has its own
        return tried(url, lambda: fsspec.filesystem(scheme))
    return tried(url, lambda: _shared(scheme, os.getpid()))


@lru_cache(maxsize=8)
def _shared(scheme: str, process: int) -> Any:
    """One client for all threads of a process."""
    fsspec = importlib.import_module("fsspec")
    options = {"encoded": True} if scheme in HTTP else {}
    return fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True, **options)


def tried(url: str, call: Callable[[], Result], *, kind: type[TriptychError] = FormatError, tries: int = 3) -> Result:
    """What `call` gives, asked again where the network failed. Raises `kind`; FileNotFoundError for what is not there."""
    for wait in (*WAITS[: tries - 1], None):
        try:
            return call()
        except TriptychError:
            raise
        except Exception as error:  # each library has errors of its own
            if _is_missing(url, error):
                raise FileNotFoundError(url) from error
            if wait is None or isinstance(error, PermissionError):
                what = "the server refuses" if isinstance(error, PermissionError) else "the server does not answer as it should"
                raise kind(what, file=shown(url), found=_told(error)) from error
        time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def _is_missing(url: str, error: Exception) -> bool:
    """Whether a file is not there; fsspec says so of HTTP whatever went wrong, and keeps the reason."""
    if isinstance(error, FileNotFoundError) and scheme_of(url) in HTTP:
        return getattr(error.__cause__, "status", None) in (404, 410)
    return isinstance(error, FileNotFoundError)


def _told(error: BaseException) -> str:
    cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
    text = re.sub(r"\?[^\s'\"]*", "", (str(cause).strip() or type(cause).__name__).splitlines()[0])
    return f"{type(cause).__name__}: {text}"[:200]


def missing(url: str) -> FormatError:
    return FormatError("no such file or folder", file=shown(url))


def info(url: str) -> Info:
    """What the server says of a file, now. Raises FormatError, FileNotFoundError."""
    fs = file_system(url)

    def ask() -> Info:
        fs.invalidate_cache(url)
        found: Info = fs.info(url)
        return found

    found = tried(url, ask)
    if found.get("type") == "directory":
        raise FileNotFoundError(url)
    if not isinstance(found.get("size"), int):
        raise FormatError("the server does not say how long a file is", file=shown(url), expected="Content-Length")
    if found.get("partial") is False:
        raise FormatError("the server answers no range requests", file=shown(url), try_="download the file, and give its path")
    return found


def state_of(found: Info) -> int:
    """A number that changes with the file's contents, as far as the server tells."""
    told = next((str(found[key]) for key in STATES if found.get(key)), "")
    return int.from_bytes(hashlib.sha256(f"{told}\n{found['size']}".encode()).digest()[:7])


class RemoteFile:
    """One file, read by ranges; a context that closes it. Raises FormatError."""

    def __init__(self, url: str) -> None:
        self.url, fs = url, file_system(url)
        try:
            self.info = info(url)
            self._file = tried(url, lambda: fs.open(url, "rb", cache_type="none"))
        except FileNotFoundError:
            raise missing(url) from None
        self.size: int = self.info["size"]

    def __enter__(self) -> RemoteFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def read(self, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop` in one request."""

        def ask() -> bytes:
            self._file.seek(start)
            got: bytes = self._file.read(stop - start)
            if len(got) != stop - start:
                raise OSError(f"{len(got)} bytes in place of {stop - start} at byte {start}")
            return got

        try:
            return tried(self.url, ask) if stop > start else b""
        except FileNotFoundError:
            raise missing(self.url) from None


# Writing


class Upload:
    """One object, written in order: there as a whole when `commit` returns, or not at all. Raises OutputError."""

    def __init__(self, url: str, size: int) -> None:
        self.url, self.at = url, 0
        self._fs = file_system(url)
        self._small = bytearray() if size <= BLOCK else None
        if self._small is None:
            block = max(BLOCK, -(-size // 9000))  # at most 10,000 parts
            self._file = tried(url, lambda: self._fs.open(url, "wb", block_size=block, autocommit=False), kind=OutputError)

    def put(self, part: bytes | memoryview, at: int) -> None:
        """Write what begins at byte `at`, which is not before what was written; zeros fill the gap."""
        for piece in (b"\0" * (at - self.at), part):
            if self._small is not None:
                self._small += piece
            elif len(piece):
                self._once(partial(self._file.write, piece))
            self.at += len(piece)

    def commit(self) -> None:
        if self._small is not None:
            data = bytes(self._small)
            tried(self.url, lambda: self._fs.pipe_file(self.url, data), kind=OutputError)
            return
        self._once(self._file.close)
        self._once(self._file.commit)

    def abort(self) -> None:
        """Nothing of it stays; errors here are left for the next run to mend."""
        if self._small is None:
            with suppress(Exception):
                self._file.closed = True
                self._file.discard()

    def _once(self, call: Callable[[], object]) -> None:
        """A part is in no state to be sent twice from here: the file systems try again by themselves."""
        try:
            tried(self.url, call, kind=OutputError, tries=1)
        except FileNotFoundError:
            raise OutputError("the place of the output is gone", where=self.url) from None


@contextmanager
def uploading(url: str, size: int) -> Iterator[Upload]:
    """An upload of `size` bytes that ends with the context: there, or after an error gone."""
    upload = Upload(url, size)
    try:
        yield upload
        upload.commit()
    except BaseException:
        upload.abort()
        raise


def remove(url: str) -> None:
    """Remove an object that may be there."""
    fs = file_system(url)
    with suppress(FileNotFoundError):
        tried(url, lambda: fs.rm_file(url), kind=OutputError)


def abort_uploads(url: str) -> None:
    """End the uploads of one object that a killed run left, which nobody sees and somebody pays for. Other stores forget them."""
    if scheme_of(url) != "s3":
        return
    fs = file_system(url)
    bucket, key, _ = fs.split_path(url)
    with suppress(OutputError, FileNotFoundError):  # a store that does not tell them, or not to us, keeps them
        found = tried(url, lambda: fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=key), kind=OutputError, tries=1)
        for upload in found.get("Uploads", []):
            if upload["Key"] == key:
                tried(url, partial(fs.abort_mpu, bucket, key, upload["UploadId"]), kind=OutputError)


def names_below(url: str) -> dict[str, Info]:
    """All files below a folder by their name there; empty where there is none. Raises FormatError."""
    fs = file_system(url)
    try:
        fs.invalidate_cache()
        found: dict[str, Info] = tried(url, lambda: fs.find(url, detail=True))
    except FileNotFoundError:
        return {}
    prefix = str(fs._strip_protocol(url)).rstrip("/") + "/"
    return {name.removeprefix(prefix): one for name, one in found.items()
            if name.startswith(prefix) and one.get("type") == "file" and name != prefix and not name.endswith("/")}  # fmt: skip
