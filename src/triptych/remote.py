"""Files behind a URL: what is asked of them; who asks (remote_web, remote_s3, remote_gs, remote_hub, and remote_fsspec for every other kind
of URL) is imported with the first question.

A file is read by ranges and never as a whole; what it was when it was first seen is kept as a number made of its ETag (or what the server
has in place of one), so that a changed file is found out. Every request is tried five times, those of other libraries, which try again
by themselves, three times; then it is an error of ours.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote, unquote

from .errors import FormatError, MissingExtraError, OutputError, PlanError, TriptychError
from .remote_web import Changed, Info, NoRanges

BLOCK = 8 << 20
"""Bytes of one request."""
WAITS = (0.2, 1.0, 3.0, 9.0)
"""Seconds before another try."""
LONGEST = 30.0
"""Seconds for which a server may put off the next try, each time."""
HTTP = ("http", "https")
SCHEMES = {"s3": ("remote_s3", "S3"), "gs": ("remote_gs", "GS"), "hf": ("remote_hub", "Hub"), "http": ("remote_web", "Web"),
           "https": ("remote_web", "Web")}  # fmt: skip
NEEDS = {"s3": ("botocore", "remote"), "gs": ("google.auth", "gcs"), "hf": ("huggingface_hub", "hub")}
"""Scheme -> what it needs beside urllib3 to be installed: package, extra."""
WRITABLE = ("s3", "gs")
SPOKEN = (*WRITABLE, *HTTP)
"""Asked by requests of ours alone; the libraries of others ask again by themselves."""
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
    """A URL as messages have it: what follows a question mark may be a key, and is left out, and so is a password.

    >>> shown("https://me:secret@host/a?key=1"), shown("hf://name@main")
    ('https://host/a', 'hf://name@main')
    """
    return re.sub("(?<=://)[^/@]*:[^/@]*@", "", url.partition("?")[0] if scheme_of(url) in HTTP else url)


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


def store_of(url: str) -> Any:
    """Who asks the server of a URL. Raises PlanError for a kind of URL that is none of ours, MissingExtraError."""
    scheme = scheme_of(url)
    needs = [("urllib3", "remote"), NEEDS.get(scheme, ("urllib3", "remote"))] if scheme in SCHEMES else [("fsspec", "remote")]
    for package, extra in needs:
        try:
            importlib.import_module(package)
        except ImportError:
            raise MissingExtraError(package, extra) from None
    if scheme not in SCHEMES:
        _check_known(url, scheme)
    return tried(url, lambda: _store(scheme, os.getpid()))


def _check_known(url: str, scheme: str) -> None:
    """That fsspec has a class for a scheme, and that class what it needs. Raises PlanError."""
    import fsspec

    try:
        fsspec.get_filesystem_class(scheme)
    except ValueError:
        expected = ", ".join(f"{known}://" for known in SCHEMES) + ", or another that fsspec knows"
        raise PlanError("no such kind of URL", where=shown(url), expected=expected, found=f"{scheme}://") from None
    except ImportError as error:
        raise PlanError("the package for such URLs is not installed", where=shown(url), found=str(error)) from None


@lru_cache(maxsize=8)
def _store(scheme: str, process: int) -> Any:
    """One for all threads of a process."""
    if scheme not in SCHEMES:
        from .remote_fsspec import Filesystem

        return Filesystem(scheme)
    module, name = SCHEMES[scheme]
    return getattr(importlib.import_module(f".{module}", __package__), name)()


def tried(url: str, call: Callable[[], Result], *, kind: type[TriptychError] = FormatError, ours: bool = False) -> Result:
    """What `call` gives, asked again where the network failed. Raises `kind`; FileNotFoundError, FileExistsError as they are."""
    for wait in (*(WAITS if ours or scheme_of(url) in SPOKEN else WAITS[:2]), None):
        try:
            return call()
        except (TriptychError, FileNotFoundError, FileExistsError):
            raise
        except NoRanges as error:
            raise kind(str(error), file=shown(url), try_="download the file, and give its path") from None
        except Changed as error:
            raise kind("a file was changed while it was read", file=shown(url), found=str(error)) from None
        except Exception as error:  # each library has errors of its own
            if wait is None or isinstance(error, PermissionError):
                what = "the server refuses" if isinstance(error, PermissionError) else "the server does not answer as it should"
                raise kind(what, file=shown(url), found=_told(error)) from error
            wait = max(wait, min(getattr(error, "wait", 0.0), LONGEST))
        time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def _told(error: BaseException) -> str:
    text = re.sub(r"\?[^\s'\"]*", "", (str(error).strip() or type(error).__name__).splitlines()[0])
    return f"{type(error).__name__}: {text}"[:200]


def missing(url: str) -> FormatError:
    return FormatError("no such file or folder", file=shown(url))


def info(url: str) -> Info:
    """What the server says of a file, now. Raises FormatError, FileNotFoundError."""
    store = store_of(url)
    found: Info = tried(url, lambda: store.info(url))
    return found


def state_of(found: Info) -> int:
    """A number that changes with the file's contents, as far as the server tells."""
    return int.from_bytes(hashlib.sha256(f"{found.tag}\n{found.size}".encode()).digest()[:7])


class RemoteFile:
    """One file, read by ranges, by any thread. Raises FormatError."""

    def __init__(self, url: str) -> None:
        self.url, self._store = url, store_of(url)
        self.look()

    def look(self) -> None:
        """Ask anew what the file is."""
        try:
            self.info = info(self.url)
        except FileNotFoundError:
            raise missing(self.url) from None

    @property
    def size(self) -> int:
        return self.info.size

    def parts(self, start: int, stop: int) -> Iterator[bytes]:
        """Bytes `start` to `stop` in one request, in pieces of a megabyte at most. Another try goes on where the last one ended."""
        at, answer = start, None

        def ask() -> bytes:
            nonlocal answer
            try:
                answer = self._store.get(self.url, at, stop, self.info.tag) if answer is None else answer
                part: bytes = next(answer, b"")
                if not part:
                    raise OSError(f"{at - start} bytes in place of {stop - start}")
            except BaseException:
                answer = None
                raise
            return part

        try:
            while at < stop:
                part = tried(self.url, ask, ours=True)
                at += len(part)
                yield part
        except FileNotFoundError:
            self.look()  # if it is there, the contents that were seen are not
            raise FormatError("a file was changed while it was read", file=shown(self.url)) from None
        finally:
            if answer is not None:
                answer.close()

    def read(self, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop` in one request."""
        return b"".join(self.parts(start, stop))


def nameless() -> Any:
    """A file here without a name, which is gone when it is closed."""
    import tempfile  # who gives a path does not wait for this

    return tempfile.TemporaryFile(prefix="triptych-")


def lay(fd: int, part: bytes, at: int, url: str) -> None:
    """Put what was read of a file at byte `at` of a file here. Raises FormatError when there is no room."""
    left = memoryview(part)
    try:
        while left:
            done = os.pwrite(fd, left, at)
            left, at = left[done:], at + done
    except OSError as error:
        what, way = "there is no room here for what is read", "TMPDIR names another place"
        raise FormatError(what, file=shown(url), found=error.strerror, try_=way) from None


# Writing


class _Begun(NamedTuple):
    """An upload in parts. `room`: a nameless file for the part that is being filled, so that none lies in memory."""

    name: str
    room: Any
    block: int
    tags: list[str]


class Upload:
    """One object of `size` bytes, written in order: there as a whole when `commit` returns, or not at all. Raises OutputError."""

    def __init__(self, url: str, size: int) -> None:
        self.url, self.size, self.at = url, size, 0
        self._store = store_of(url)
        self._small = bytearray() if size <= BLOCK else None
        self._begun: _Begun | None = None
        if self._small is None:
            block = max(BLOCK, -(-size // 9000 // (1 << 20)) << 20)  # at most 10,000 parts of whole megabytes
            name = self._once(self._begin)
            self._begun = _Begun(name, nameless(), block, [])

    def _begin(self) -> str:
        """Uploads that were begun before are ended: by a run that was killed, or by a request whose answer was lost."""
        abort_uploads(self.url)
        name: str = self._store.begin(self.url, self.size)
        return name

    def put(self, part: bytes | memoryview, at: int) -> None:
        """Write what begins at byte `at`, which is not before what was written; zeros fill the gap."""
        for piece in (memoryview(bytes(at - self.at)), memoryview(part)):
            while piece:
                self._flush()
                room = len(piece) if self._begun is None else min(len(piece), self._begun.block - self._held)
                (self._begun.room.write if self._begun else self._small.extend)(piece[:room])  # type: ignore[union-attr]
                self.at += room
                piece = piece[room:]

    @property
    def _held(self) -> int:
        """Bytes of the part that is not yet sent."""
        return self.at - len(self._begun.tags) * self._begun.block if self._begun else 0

    def _flush(self, last: bool = False) -> None:
        """Send a part that is full; the last one only when all is there, since with some stores the object then appears."""
        begun, held = self._begun, self._held
        if begun and (held == begun.block or last):
            at = self.at - held
            begun.room.truncate(held)  # else what the part before had there would be sent too
            send = (self.url, begun.name, len(begun.tags) + 1, at, begun.room, held, self.size)
            begun.tags.append(self._once(lambda: self._or_whole(self._store.part, *send)))
            begun.room.seek(0)

    def commit(self) -> None:
        if self._small is not None:
            data = bytes(self._small)
            self._once(lambda: self._store.put(self.url, data))
        elif self._begun:
            begun = self._begun
            self._flush(last=True)
            self._once(lambda: self._or_whole(self._store.finish, self.url, begun.name, begun.tags))

    def _or_whole(self, call: Callable[..., Any], *args: Any) -> Any:
        """What a request gives; where there is no such upload any more, a request whose answer was lost may have ended it well."""
        try:
            return call(*args)
        except FileNotFoundError:
            if self._store.info(self.url).size != self.size:
                raise
            return ""

    def abort(self) -> None:
        """Nothing of it stays; errors here are left for the next run to mend."""
        if self._begun:
            with suppress(Exception):
                self._store.give_up(self.url, self._begun.name)

    def close(self) -> None:
        if self._begun:
            self._begun.room.close()

    def _once(self, call: Callable[[], Any]) -> Any:
        try:
            return tried(self.url, call, kind=OutputError)
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
    finally:
        upload.close()


def put(url: str, data: bytes, tag: str) -> str | None:
    """Write a small object in place of the one with that tag, "" for none; its tag, or None where another one is there now."""
    store = store_of(url)
    try:
        found: str = tried(url, lambda: store.put(url, data, tag), kind=OutputError)
    except FileExistsError:
        return None
    except FileNotFoundError:
        if tag:
            return None
        raise OutputError("there is no such bucket", where=url) from None
    return found


def remove(url: str) -> None:
    """Remove an object that may be there."""
    store = store_of(url)
    with suppress(FileNotFoundError):
        tried(url, lambda: store.remove(url), kind=OutputError)


def abort_uploads(url: str) -> None:
    """End the uploads of one object that a killed run left; a store that does not tell them, or not to us, keeps them."""
    store = store_of(url)
    with suppress(OutputError, FileNotFoundError):
        tried(url, lambda: store.give_up_all(url), kind=OutputError)


def names_below(url: str) -> dict[str, Info]:
    """All files below a folder by their name there; empty where there is none. Raises FormatError."""
    store = store_of(url)
    try:
        found: dict[str, Info] = tried(url, lambda: store.names(url))
    except FileNotFoundError:
        return {}
    return {name: one for name, one in found.items() if name and not name.endswith("/")}
