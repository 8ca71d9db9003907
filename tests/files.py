"""Checkpoint files for tests, written byte by byte: the right ones and the wrong ones."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

BITS = {"F4": 4, "F6_E2M3": 6, "BOOL": 8, "U8": 8, "F8_E4M3": 8, "BF16": 16, "F16": 16, "F32": 32, "F64": 64, "I64": 64}


def raw(path: Path, header: bytes | dict[str, Any], data: bytes = b"", length: int | None = None) -> Path:
    """A file of that header and that data, whatever they are."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def noise(size: int, seed: int = 0) -> bytes:
    """Random bytes: as floats they are NaNs, infinities and denormals among others."""
    return np.random.default_rng(seed).bytes(size)


def safetensors(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str] | None = None) -> dict[str, bytes]:
    """A file of random tensors (name -> dtype, shape); their bytes by name."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    parts: dict[str, bytes] = {}
    at = 0
    for number, (name, (dtype, shape)) in enumerate(tensors.items()):
        size = math.prod(shape) * BITS[dtype] // 8
        header[name] = entry(dtype, list(shape), at, at + size)
        parts[name] = noise(size, number)
        at += size
    raw(path, header, b"".join(parts.values()))
    return parts


def checkpoint(
    folder: Path, shards: list[dict[str, tuple[str, tuple[int, ...]]]], config: dict[str, Any] | None = None
) -> dict[str, bytes]:
    """A folder with one file, or with an index and several; the bytes of all tensors by name."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if len(shards) == 1:
        return safetensors(folder / "model.safetensors", shards[0], {"format": "pt"})
    parts: dict[str, bytes] = {}
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        parts |= safetensors(folder / name, shard, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": sum(map(len, parts.values())), "note": "kept"}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return parts


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes: to show that nothing changed, or that nothing was left."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rows(data: bytes, number: int) -> list[bytes]:
    """The bytes of a tensor cut into rows."""
    size = len(data) // number
    return [data[i * size : (i + 1) * size] for i in range(number)]


def read(path: Path) -> dict[str, bytes]:
    """The tensors of a file or folder by name, read with a parser of ten lines."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    out = {}
    for file in files:
        content = file.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        header.pop("__metadata__", None)
        assert len(content) == start + max((told["data_offsets"][1] for told in header.values()), default=0)
        out |= {name: content[start + told["data_offsets"][0] : start + told["data_offsets"][1]] for name, told in header.items()}
    return out


def stamp(path: Path) -> dict[str, Any]:
    """The stamp of a converted file."""
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return dict(json.loads(header["__metadata__"]["triptych"]))
