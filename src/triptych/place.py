"""Where an output may go: beside the input, where nothing is yet, with room enough."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from .errors import PlanError
from .formats import MARKER, Stored
from .pieces import in_bytes
from .steps import Plan

RECORD = re.compile(r"\.triptych-share-([0-9]+)-of-([0-9]+)\.json")
"""What shares leave: in a folder that they are done, behind a URL, where each file is there or not, that they are at work."""


def record_of(share: tuple[int, int]) -> str:
    return f".triptych-share-{share[0]}-of-{share[1]}.json"


def check_place(stored: Stored, out: Path) -> None:
    """That the output may be written there. Raises PlanError: it exists, is inside the input, lies in no folder, is of the wrong kind."""
    source, place = stored.path.resolve(), out.resolve()
    if place == source or (stored.is_folder and source in place.parents):
        raise PlanError(
            "the output lies inside the input", where=str(out), found=f"the input is {stored.path}", try_="choose a place beside it"
        )
    if os.path.lexists(out) and not _may_continue(stored, out):
        raise PlanError("the output exists", where=str(out), try_="choose another place, or remove it")
    if not place.parent.is_dir():
        raise PlanError("the output has no folder to lie in", where=str(out), expected=f"a folder {out.parent}")
    check_kind(stored, str(out))


def check_kind(stored: Stored, out: str) -> None:
    """That a file becomes a file, and a folder a folder."""
    suffix = ".gguf" if stored.path.name.endswith(".gguf") else ".safetensors"
    if not stored.is_folder and not out.endswith(suffix):
        raise PlanError("a file becomes a file", where=out, expected=f"a name that ends in {suffix}", try_=out.rstrip("/") + suffix)
    if stored.is_folder and (found := next((end for end in (".safetensors", ".gguf") if out.endswith(end)), None)):
        raise PlanError("a folder becomes a folder", where=out, expected=f"a name that does not end in {found}")


def _may_continue(stored: Stored, out: Path) -> bool:
    """A folder that is empty or holds an unfinished conversion."""
    return stored.is_folder and out.is_dir() and not out.is_symlink() and ((out / MARKER).is_file() or not any(out.iterdir()))


def check_room(made: Plan, out: Path) -> None:
    """That the output has room, what an unfinished run wrote of it counted. Raises PlanError."""
    room = os.statvfs(out if out.is_dir() else out.resolve().parent)
    free = room.f_bavail * room.f_frsize
    there = sum(map(_room_of, out.rglob("*"))) if out.is_dir() else 0
    if made.size > free + there:
        raise PlanError(
            "there is not enough room for the output", where=str(out), expected=in_bytes(made.size), found=f"{in_bytes(free)} free"
        )


def _room_of(path: Path) -> int:
    """Bytes of a file on the disk; none where another share has just given it its name."""
    with suppress(FileNotFoundError):
        return path.stat().st_blocks * 512 if path.is_file() else 0
    return 0


def marked(made: Plan) -> dict[str, Any]:
    """What the marker says of a plan and its input."""
    return {"version": 1, "plan": made.digest, "sources": [list(source) for source in (*made.sources, *made.copies)]}


def check_begun(made: Plan, found: dict[str, Any]) -> None:
    """That a marker is that of this plan on this input. Raises PlanError."""
    if found != marked(made):
        ours = found.get("plan") == made.digest
        what = "the input has changed since the conversion began" if ours else "another conversion is unfinished here"
        raise PlanError(what, where=made.out, expected=made.digest, found=found.get("plan"), try_="finish that one, or remove the output")
