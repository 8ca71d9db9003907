"""A checkpoint on disk: one .safetensors file, or a folder with one, or a folder with an index and its shards."""

from __future__ import annotations

import json
import os
import re
import reprlib
import shlex
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import FormatError
from . import gguf, torch_zip
from .safetensors import Header, Tensor, open_file, parse_json, read_header, without_gc

MAX_JSON = 1 << 26
SINGLE = ("model.safetensors", "pytorch_model.bin")
"""The usual names, the better first; with `INDEX` behind it the name of an index."""
INDEX = ".index.json"
MARKER = ".triptych-unfinished.json"
"""Lies in the folder of an output until the conversion is complete."""
POINTER = b"version https://git-lfs"
SUFFIXES = ((".safetensors",), torch_zip.SUFFIXES, (gguf.SUFFIX,))


class Other(NamedTuple):
    """A file that holds no tensor of the checkpoint: its path inside the folder, its size, its time of modification."""

    name: str
    size: int
    changed: int


@dataclass(frozen=True)
class Stored:
    """What lies where. `index` is the index file's name and `index_metadata` its table "metadata"; a folder carries its `others` along.

    `settings` stand for config.json where something else says what it would.
    """

    path: Path
    root: Path
    files: tuple[Header, ...]
    index: str | None
    index_metadata: Mapping[str, Any] = field(hash=False)
    others: tuple[Other, ...] = ()
    tensors: Mapping[str, Tensor] = field(default_factory=dict, hash=False, repr=False)
    notes: tuple[str, ...] = ()
    settings: Mapping[str, Any] | None = field(default=None, hash=False, repr=False)

    @property
    def is_folder(self) -> bool:
        return self.path == self.root

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum([tensor.stop - tensor.start for tensor in self.tensors.values()])


def read(path: str | Path) -> Stored:
    """Headers and index of a checkpoint, checked against each other and against the sizes of the files. Raises FormatError."""
    path = Path(path)
    if path.is_dir():
        if (path / MARKER).exists():
            raise FormatError("the input is an unfinished conversion", file=str(path), try_="run that conversion again first")
        index, names = _weights(path)
        root = path
    elif path.exists():
        if path.name.endswith(".json"):
            raise FormatError("an index is not a checkpoint", file=str(path), try_=f"give its folder: {path.parent}")
        index, names, root = None, (path.name,), path.parent
    elif re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):
        raise FormatError("a URL is not read here", file=str(path), expected="a path", try_="download it, and give its path")
    else:
        raise FormatError("no such file or folder", file=str(path))
    weight_map, metadata = _read_index(root / index) if index else ({}, {})
    names = names or tuple(sorted(set(weight_map.values())))
    if index and (absent := [name for name in names if not (root / name).exists()]):
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise FormatError("files of the checkpoint are missing", file=str(root / index), expected=f"all {len(names)} that it names",
                          found=f"no {absent[0]}{more}", try_="fetch them")  # fmt: skip
    found = [_read_file(root / name) for name in names]
    files, notes = tuple(header for header, _ in found), tuple(note for _, more in found for note in more)
    tensors = _join(files, weight_map if index else None, index)
    links: list[str] = []
    others = tuple(_others(root, {index, *(file.file for file in files)}, links)) if path.is_dir() else ()
    notes += tuple(f"{link} is left out: a link to a folder" for link in links)
    return Stored(path, root, files, index, metadata, others, tensors, notes)


def _read_file(path: Path) -> tuple[Header, tuple[str, ...]]:
    """The header of a file of any format, and what there is to say about it."""
    try:
        return _header(path)
    except FormatError as error:
        error.fields["file"] = str(path)
        raise _not_fetched(path) or error from None


def _not_fetched(path: Path) -> FormatError | None:
    """The error for a file that is of no format because its content is elsewhere."""
    try:
        with os.fdopen(open_file(path), "rb") as file:
            first = file.read(len(POINTER))
    except FormatError:
        return None
    if first == POINTER:
        return FormatError("the file is a pointer of git-lfs, not what it points to", file=str(path), try_="git lfs pull")
    return None if first else FormatError("the file is empty", file=str(path), try_="fetch it again")


def _header(path: Path) -> tuple[Header, tuple[str, ...]]:
    if path.name.endswith(torch_zip.SUFFIXES):
        found = torch_zip.read(path)
        return found.plain(), found.notes
    return (gguf.read(path).header if path.name.endswith(gguf.SUFFIX) else read_header(path)), ()


def read_config(stored: Stored) -> dict[str, Any] | None:
    """The config.json beside the weights, or what the head of a GGUF file says, or None. Raises FormatError when it is no table."""
    if stored.settings is not None:
        return dict(stored.settings)
    head = next((file for file in stored.files if file.head), None)
    if head is not None:
        return gguf.config_of(gguf.read(stored.root / head.file))
    return read_json(stored.root / "config.json") if (stored.root / "config.json").exists() else None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON table of bounded size. Raises FormatError."""
    fd = open_file(path)
    with os.fdopen(fd, "rb") as file:
        raw = file.read(MAX_JSON + 1)
    if len(raw) > MAX_JSON:
        raise FormatError("a JSON file is too large", file=str(path), expected=f"at most {MAX_JSON} bytes")
    with without_gc():
        return parse_json(raw, str(path))


def index_bytes(weight_map: Mapping[str, str], total_size: int, metadata: Mapping[str, Any]) -> bytes:
    """An index file; `metadata` is carried over but for the total size."""
    metadata = {**metadata, "total_size": total_size}
    head = json.dumps({"metadata": metadata, "weight_map": {}}, indent=2, ensure_ascii=False).removesuffix("{}\n}")
    pairs = sorted(weight_map.items())
    some = (dict(pairs[at : at + 4096]) for at in range(0, len(pairs), 4096))  # all at once would be many times as long as the file
    lines = [json.dumps(table, separators=(",\n    ", ": "), ensure_ascii=False)[1:-1].encode() for table in some]  # json indents slowly
    return b"".join([head.encode(), b"{\n    ", b",\n    ".join(lines), b"\n  }\n}\n"])


def _weights(folder: Path) -> tuple[str | None, tuple[str, ...]]:
    """(index, ()) or (None, (file,)) of a folder: the usual names first, else the only ones there."""
    found = sorted(entry.name for entry in os.scandir(folder))
    usual = [([name] * (name in found), [name + INDEX] * (name + INDEX in found)) for name in SINGLE]
    by_suffix = [
        ([name for name in found if name.endswith(suffixes)], [name for name in found if name.endswith(tuple(s + INDEX for s in suffixes))])
        for suffixes in SUFFIXES
    ]
    for single, index in (usual[0], by_suffix[0], usual[1], *by_suffix[1:]):
        if len(index) == 1 and single[:1] not in ([name] for name in SINGLE):
            return index[0], ()
        if len(single) == 1 and not index:
            return None, (single[0],)
        if single or index:
            raise FormatError("more than one checkpoint in this folder", where=str(folder), found=", ".join([*index, *single][:6]),
                              try_="give one file, or a folder with one index and its shards")  # fmt: skip
    below = sorted([*folder.glob("snapshots/*"), *folder.glob("iter_*")])  # the hub's cache of one model; Megatron's of one run
    ranks = any(re.fullmatch(r"(mp_)?rank[-_]?\d+.*", name) for name in found)
    raise FormatError(
        "no checkpoint in this folder",
        where=str(folder),
        expected=f"{SINGLE[0]} or {SINGLE[0]}{INDEX}; or one .bin, .pt or .gguf file",
        found=", ".join(found[:6]) or "nothing",
        try_=str(below[-1]) if below else f"triptych merge {shlex.quote(str(folder))} OUT" if ranks else None,
    )


def _read_index(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    table = read_json(path)
    weight_map, metadata = table.get("weight_map"), table.get("metadata", {})
    if not isinstance(weight_map, dict) or not weight_map or not isinstance(metadata, dict):
        raise FormatError(
            "not an index", file=path.name, expected='{"metadata": {...}, "weight_map": {tensor: file}}', found=", ".join(table)[:80]
        )
    files = weight_map.values()
    if set(map(type, files)) != {str} or not all(map(is_plain_name, set(files))):
        tensor, name = next((tensor, name) for tensor, name in weight_map.items() if type(name) is not str or not is_plain_name(name))
        raise FormatError("an index names a file outside its folder", tensor=tensor, file=path.name, expected="a plain file name",
                          found=reprlib.repr(name))  # fmt: skip
    return weight_map, metadata


def is_plain_name(name: str) -> bool:
    r"""Whether a name is that of a file in the same folder on every system.

    >>> is_plain_name("model-00001-of-00002.safetensors"), is_plain_name("../x"), is_plain_name("C:x"), is_plain_name("a\\b")
    (True, False, False, False)
    """
    return bool(name) and name not in (".", "..") and name.isprintable() and not set(name) & set('/\\:*?"<>|') and len(name.encode()) <= 255


def _join(files: tuple[Header, ...], weight_map: Mapping[str, str] | None, index: str | None) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors.update(zip(map(attrgetter("name"), file.tensors), file.tensors, strict=True))
    if len(tensors) != sum(len(file.tensors) for file in files):
        for tensor in (tensor for file in files for tensor in file.tensors):
            if tensors[tensor.name] is not tensor:
                raise FormatError("a tensor lies in two files", tensor=tensor.name, found=f"{tensor.file} and {tensors[tensor.name].file}")
    if weight_map is not None and not (len(weight_map) == len(tensors) and all(_lists(weight_map, file) for file in files)):
        for name, where in weight_map.items():
            if name not in tensors or tensors[name].file != where:
                found = f"it lies in {tensors[name].file}" if name in tensors else "no such tensor in any shard"
                raise FormatError("index and shards disagree", tensor=name, file=index, expected=f"in {where}", found=found)
        for name in tensors:
            if name not in weight_map:
                raise FormatError(
                    "index and shards disagree",
                    tensor=name,
                    file=index,
                    expected=f"an entry for it: it lies in {tensors[name].file}",
                    found="none",
                )
    return tensors


def _lists(weight_map: Mapping[str, str], file: Header) -> bool:
    """Whether an index says of every tensor of a file that it lies there."""
    return set(map(weight_map.get, map(attrgetter("name"), file.tensors))) <= {file.file}


def _others(root: Path, taken: set[str | None], links: list[str]) -> Iterator[Other]:
    """All other files, in folders below too, except in hidden ones; links to files are followed, `links` to folders are only listed."""

    def refuse(error: OSError) -> None:
        raise FormatError("a folder cannot be read", file=str(error.filename), found=error.strerror)

    for folder, folders, names in os.walk(root, onerror=refuse):
        seen = sorted(name for name in folders if not name.startswith("."))
        linked = [name for name in seen if (Path(folder) / name).is_symlink()]
        links += [(Path(folder) / name).relative_to(root).as_posix() for name in linked]
        folders[:] = [name for name in seen if name not in linked]
        for name in sorted(names):
            path = Path(folder) / name
            relative = path.relative_to(root).as_posix()
            if relative in taken:
                continue
            try:
                info = path.stat()
            except OSError as error:
                lost = "a link to nothing" if path.is_symlink() and not path.exists() else error.strerror
                raise FormatError(
                    "a file of the folder cannot be read", file=str(path), found=lost, try_="fetch it, or remove it"
                ) from None
            if not stat.S_ISREG(info.st_mode):
                raise FormatError("not a regular file", file=relative)
            yield Other(relative, info.st_size, info.st_mtime_ns)
