"""An output behind a URL: marked until it is complete; every object in it is there as a whole or not at all.

The marker is written first and removed last, as in a folder. It is a lock too: it names the run that writes here, and every change of it
has a condition that the store checks, so of two runs one succeeds. While a run goes on it writes the marker anew every BEAT seconds;
whoever finds the marker of another run watches it for PATIENCE seconds, and takes it over when it stays as it is: that run was killed.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import FormatError, OutputError, PlanError
from .formats import MARKER, Stored
from .pieces import listed
from .place import RECORD, check_begun, check_kind, marked, record_of
from .remote import WRITABLE, RemoteFile, abort_uploads, info, is_remote, join, names_below, remove, scheme_of, shown, uploading
from .remote import put as put_if
from .steps import Plan

BEAT, PATIENCE = 10.0, 35.0
"""Seconds between two signs of life of a run, and how long another one waits for one."""


def check_remote_place(stored: Stored, source: str | Path, out: str) -> None:
    """That the output may be written there. Raises PlanError: it exists, is inside the input, is of the wrong kind; FormatError."""
    if scheme_of(out) not in WRITABLE:
        raise PlanError("nothing can be written there", where=shown(out), expected=" or ".join(f"{scheme}://" for scheme in WRITABLE))
    place, given = out.rstrip("/"), str(source).rstrip("/")
    if "/" not in place.partition("://")[2] or "//" in place.partition("://")[2]:
        raise PlanError("the output has no name", where=out, expected="s3://BUCKET/NAME, with single slashes")
    if is_remote(source) and (place == given or (stored.is_folder and place.startswith(given + "/"))):
        raise PlanError("the output lies inside the input", where=out, found=f"the input is {given}", try_="choose a place beside it")
    check_kind(stored, place)
    there = sorted(names_below(place)) if stored.is_folder else [place] if _is_there(place) else []
    if there and not (stored.is_folder and MARKER in there):
        raise PlanError("the output exists", where=out, found=listed(there), try_="choose another place, or remove it")


def note_on(out: str) -> str:
    return f"whether {out} has room enough is not known before; what is half uploaded is ended on an error"


def _is_there(url: str) -> bool:
    try:
        return bool(info(url))
    except FileNotFoundError:
        return False


class Hold:
    """The marker at `url` of the output, or of one share of it, held by this run: kept fresh by a thread until `end`.

    `tag`: what the store calls it as written last. `passing`: it goes with the run, and does not mark what is unfinished.
    """

    def __init__(self, made: Plan, url: str, passing: bool) -> None:
        self.url, self.passing, self.tag, self.number, self.here = url, passing, "", 0, True
        self.told, self.run = marked(made), secrets.token_hex(8)
        self._ended, self._lock = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._beats, name="triptych-beat", daemon=True)

    def take(self, tag: str, alone: bool) -> bool:
        """Write the marker in place of the one with that tag, "" for none; False when another run was quicker."""
        with self._lock:
            self.number += 1
            text = json.dumps({**self.told, "run": self.run if alone else None, "beat": self.number}).encode()
            found = put_if(self.url, text, tag)
            if found is None:  # it may be ours, written by a request whose answer was lost
                there, now = _marker(self.url)
                found = now if alone and there and there.get("run") == self.run else None
            self.tag = found or self.tag
            return found is not None

    def still(self) -> bool:
        """Whether the place is still this run's; a sign of life."""
        self.here = self.here and self.take(self.tag, True)
        return self.here

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        """Others need not wait for signs of life any more."""
        self._ended.set()
        self._thread.join()
        if self.here:
            with suppress(FormatError, OutputError):
                remove(self.url) if self.passing else self.take(self.tag, False)

    def _beats(self) -> None:
        while not self._ended.wait(BEAT):
            with suppress(FormatError, OutputError):  # the next one may come through
                if not self.still():
                    return


_HELD: dict[str, Hold] = {}
"""The markers that runs of this process hold."""


@contextmanager
def holding(made: Plan, root: str, share: tuple[int, int] | None) -> Iterator[None]:
    """Hold the place: write the marker, or take over that of an earlier run of the same plan on the same input.

    `share`: hold this share, and see that no run holds the place alone. Raises PlanError when another run does, or when it is not ours.
    """
    hold = whole = Hold(made, join(root, MARKER if made.is_folder else f".{made.files[0].name}.triptych-part"), not made.is_folder)
    _take(made, root, whole, share is not None)
    if share:
        hold = Hold(made, join(root, record_of(share)), True)
        _take(made, None, hold, False)
    _HELD[hold.url] = hold
    hold.start()
    try:
        if share:
            _take(made, root, whole, True)  # a run that began meanwhile has seen this share, or is seen here
        else:
            _watch_shares(made, root)
        yield
        if hold.passing:
            remove(hold.url)
            hold.here = False
    finally:
        del _HELD[hold.url]
        hold.end()


def _take(made: Plan, root: str | None, hold: Hold, shared: bool) -> None:
    """Take the place, which must be empty at first, or without `root` a share of it. Raises PlanError."""
    while not _taken(made, root, hold, shared):
        pass


def _taken(made: Plan, root: str | None, hold: Hold, shared: bool) -> bool:
    """Take it; False where something changed meanwhile."""
    found, tag = _marker(hold.url)
    if found is None:
        there = [] if root is None else _there(made, root)
        if there:
            raise PlanError("the output exists", where=made.out, found=listed(there), try_="choose another place, or remove it")
        return hold.take("", not shared)
    run, _ = found.pop("run", None), found.pop("beat", None)
    check_begun(made, found)
    if run is not None:
        _watch(made, hold.url, tag)
    return (shared and run is None) or hold.take(tag, not shared)


def _there(made: Plan, root: str) -> list[str]:
    """What lies where the output is to be."""
    if made.is_folder:
        return sorted(names_below(root))
    return [made.out or ""] if _is_there(join(root, made.files[0].name)) else []


def _watch(made: Plan, url: str, tag: str) -> None:
    """Wait until a marker has stayed as it is for PATIENCE seconds. Raises PlanError when its run gives a sign of life."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        time.sleep(min(BEAT, PATIENCE) / 4)
        found, now = _marker(url)
        if now != tag:
            if found and found.get("run") is not None:
                what = "share" if RECORD.search(url) else "output"
                raise PlanError(f"another run is writing this {what}", where=made.out, found=f"a sign of life every {BEAT:g} s",
                                try_="wait until it ends; one that is killed may be continued after a minute")  # fmt: skip
            return


def _watch_shares(made: Plan, root: str) -> None:
    """That no share is at work in a place that is held alone."""
    for name in sorted(names_below(root)) if made.is_folder else ():
        if RECORD.fullmatch(name):
            found, tag = _marker(join(root, name))
            if found and found.get("run") is not None:
                _watch(made, join(root, name), tag)


def _marker(url: str) -> tuple[dict[str, Any] | None, str]:
    """What a marker says, and its tag; None where there is none. One that changes while it is read is read again."""
    for last in (False, False, True):
        try:
            file = RemoteFile(url)
            before, raw = file.info, file.read(0, file.size)
            file.look()
            if file.info == before:
                break
        except FormatError:
            if not _is_there(url):
                return None, ""
            if last:
                raise
    try:
        found = json.loads(raw)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {}, file.info.tag


def finished(made: Plan, root: str) -> tuple[str, ...]:
    """Files that an earlier run of this plan completed; objects in their place that are none are removed."""
    kept, there = [], names_below(root) if made.is_folder else {}
    for name, header, size in (
        *((file.name, made.headers[file.name], file.data_size + len(made.headers[file.name])) for file in made.files),
        *((copy.target, b"", copy.size) for copy in made.copies),
    ):
        if name not in there:
            continue
        url, whole = join(root, name), there[name].size == size
        if whole and header:
            file = RemoteFile(url)
            whole = file.read(0, min(len(header), file.size)) == header
        if whole:
            kept.append(name)
        else:
            remove(url)
    return tuple(kept)


def _still_ours(hold: Hold | None) -> bool:
    """Whether what is written may be removed: not where another run has taken over, or where the store does not answer."""
    try:
        return hold is None or hold.still()
    except (FormatError, OutputError):
        return False


def drop(root: str, names: Iterable[str], share: tuple[int, int] | None = None) -> None:
    """End the uploads of some files that did not come to an end, unless another run has taken over."""
    if _still_ours(_HELD.get(join(root, record_of(share) if share else MARKER))):
        for name in names:
            abort_uploads(join(root, name))


def clear(root: str, names: Iterable[str]) -> None:
    """Remove all that a plan has written, the marker last; what cannot be removed stays, marked, for the next run to mend."""
    hold = _HELD.get(join(root, MARKER))
    if not _still_ours(hold):
        return
    with suppress(FormatError, OutputError):
        for name in names:
            remove(join(root, name))
        if hold is not None:
            hold.here = False
        remove(join(root, MARKER))


def put(root: str, name: str, data: bytes) -> None:
    """A small object."""
    with uploading(join(root, name), len(data)) as upload:
        upload.put(data, 0)


def release(made: Plan, root: str) -> None:
    """The place is complete, and is looked at once more; then it is marked no more. Raises OutputError."""
    if not made.is_folder:
        return
    there = names_below(root)
    written = [(file.name, len(made.headers[file.name]) + file.data_size) for file in made.files]
    written += [(copy.target, copy.size) for copy in made.copies] + [(name, len(text)) for name, text in made.last]
    if lacking := [name for name, size in written if name not in there or there[name].size != size]:
        raise OutputError("files are gone that were written", where=made.out, found=listed(lacking),
                          try_="let no other run write here, and run it again")  # fmt: skip
    hold = _HELD[join(root, MARKER)]
    if not hold.still():
        raise OutputError("another run has taken this output over", where=made.out, found=f"no sign of life of this one in {PATIENCE:g} s")
    for name in there:
        if RECORD.fullmatch(name):
            remove(join(root, name))
    hold.here = False
    remove(join(root, MARKER))
