"""An output behind a URL: marked until it is complete; every object in it is there as a whole or not at all.

The marker is written first and removed last, as in a folder. No object store has a lock that ends with its holder: two runs of one plan
into one place at once are not kept apart (two of different plans are, by the marker).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import OutputError, PlanError
from .formats import Stored
from .pieces import listed
from .place import MARKER, check_begun, check_kind, check_whole, marked
from .remote import (
    WRITABLE,
    RemoteFile,
    abort_uploads,
    file_system,
    info,
    is_remote,
    join,
    names_below,
    remove,
    scheme_of,
    shown,
    uploading,
)
from .steps import Plan


def check_remote_place(stored: Stored, source: str | Path, out: str) -> None:
    """That the output may be written there. Raises PlanError: it exists, is inside the input, is of the wrong kind; FormatError."""
    check_whole(stored)
    if scheme_of(out) not in WRITABLE:
        file_system(out)
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


def begin(made: Plan, root: str) -> None:
    """Write the marker, or find the one of an earlier run of the same plan on the same input. Raises PlanError."""
    if not made.is_folder:
        if _is_there(join(root, made.files[0].name)):
            raise PlanError("the output exists", where=made.out, try_="choose another place, or remove it")
        return
    url, found = join(root, MARKER), _marker(root)
    if found is None:
        if there := sorted(names_below(root)):
            raise PlanError("the output exists", where=made.out, found=listed(there), try_="choose another place, or remove it")
        text = json.dumps(marked(made)).encode()
        fs = file_system(url)
        try:
            fs.pipe_file(url, text, mode="create")  # of two that begin at once one fails
        except Exception as error:
            found = _marker(root)
            if found is None:
                raise OutputError("the output cannot be written", where=made.out, found=str(error)[:200]) from error
    if found is not None:
        check_begun(made, found)


def _marker(root: str) -> dict[str, Any] | None:
    if not _is_there(join(root, MARKER)):
        return None
    with RemoteFile(join(root, MARKER)) as file:
        raw = file.read(0, file.size)
    try:
        found = json.loads(raw)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {}


def finished(made: Plan, root: str) -> tuple[str, ...]:
    """Files that an earlier run of this plan completed; objects in their place that are none are removed."""
    kept, there = [], names_below(root) if made.is_folder else {}
    for name, header, size in (
        *((file.name, made.headers[file.name], file.data_size + len(made.headers[file.name])) for file in made.files),
        *((copy.target, b"", copy.size) for copy in made.copies),
    ):
        if name not in there:
            continue
        url, whole = join(root, name), there[name]["size"] == size
        if whole and header:
            with RemoteFile(url) as file:
                whole = file.read(0, min(len(header), file.size)) == header
        if whole:
            kept.append(name)
        else:
            remove(url)
    return tuple(kept)


def drop(root: str, names: Iterable[str]) -> None:
    """End the uploads of some files that did not come to an end."""
    for name in names:
        abort_uploads(join(root, name))


def clear(root: str, names: Iterable[str]) -> None:
    """Remove all that a plan has written, the marker last."""
    for name in (*names, MARKER):
        remove(join(root, name))


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
    if lacking := [name for name, size in written if name not in there or there[name]["size"] != size]:
        raise OutputError("files are gone that were written", where=made.out, found=listed(lacking),
                          try_="let no other run write here, and run it again")  # fmt: skip
    remove(join(root, MARKER))
