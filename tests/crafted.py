"""Checkpoint files laid by hand, byte by byte: well-formed but for what is asked."""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple


def safetensors_file(table: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start: int, stop: int, dtype: object = "U8", shape: object = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [stop - start] if shape is None else shape, "data_offsets": [start, stop]}


class Part(NamedTuple):
    """One record of an archive; what is None is as it should be."""

    data: bytes
    method: int = 0
    flags: int = 0
    size: int | None = None
    header: int | None = None
    local_name: bytes | None = None
    attributes: int = 0


def archive(
    records: Mapping[bytes, bytes | Part] | Iterable[tuple[bytes, bytes | Part]], *, wide: bool = False, comment: bytes = b"",
    count: int | None = None, directory_at: int | None = None, locator_at: int | None = None,
) -> bytes:  # fmt: skip
    """A zip archive; `wide` writes 64-bit sizes and a 64-bit end."""
    body, directory = bytearray(), bytearray()
    pairs = list(records.items() if isinstance(records, Mapping) else records)
    for name, part in pairs:
        one = part if isinstance(part, Part) else Part(part)
        size, at, local = len(one.data) if one.size is None else one.size, len(body), one.local_name or name
        crc = zlib.crc32(one.data)
        body += struct.pack("<4s5H3I2H", b"PK\3\4", 20, one.flags, one.method, 0, 0, crc, len(one.data), len(one.data), len(local), 0)
        body += local + one.data
        numbers, extra = (size, size, at if one.header is None else one.header), b""
        if wide:
            extra, numbers = struct.pack("<2H3Q", 1, 24, *numbers), (0xFFFFFFFF,) * 3
        directory += struct.pack("<4s6H3I", b"PK\1\2", 45, 20, one.flags, one.method, 0, 0, crc, *numbers[:2])
        directory += struct.pack("<5H2I", len(name), len(extra), 0, 0, 0, one.attributes, numbers[2]) + name + extra
    at, total = len(body) if directory_at is None else directory_at, len(pairs) if count is None else count
    end = b""
    if wide:
        end = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, total, total, len(directory), at)
        end += struct.pack("<4sIQI", b"PK\6\7", 0, len(body) + len(directory) if locator_at is None else locator_at, 1)
        at, total = 0xFFFFFFFF, 0xFFFF
    end += struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, total, total, len(directory), at, len(comment)) + comment
    return bytes(body + directory) + end


def text(word: str) -> bytes:
    return b"X" + struct.pack("<I", len(word.encode())) + word.encode()


def number(value: int) -> bytes:
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def row(values: Iterable[int]) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def tensor(shape: Iterable[int] = (2, 3), strides: Iterable[int] = (3, 1), offset: int = 0, numel: int = 6, key: str = "0") -> bytes:
    """The pickle of one F32 tensor."""
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + number(numel) + b"tQ"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + row(shape) + row(strides) + b"\x89}tR"


def table(**values: bytes) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in values.items()) + b"u"


def torch_file(value: bytes, more: Mapping[bytes, bytes | Part] | None = None, *, whole: bool = True, **options: Any) -> bytes:
    """A torch file whose pickle makes `value`; storage 0 has six F32."""
    program = b"\x80\x02" + value + b"." if whole else value
    return archive(
        {b"a/data.pkl": program, b"a/byteorder": b"little", b"a/data/0": bytes(24), b"a/version": b"3\n", **(more or {})}, **options
    )


def string(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


def item(key: bytes, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def info(name: bytes = b"w", dims: Iterable[int] = (8, 4), kind: int = 0, offset: int = 0, count: int | None = None) -> bytes:
    sizes = tuple(dims)
    return string(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes) if count is None else count, *sizes, kind, offset)


def gguf_file(
    items: Iterable[bytes] = (), infos: Iterable[bytes] | None = None, data: bytes = bytes(128), *, version: int = 3, align: int = 32,
    tensors: int | None = None, entries: int | None = None,
) -> bytes:  # fmt: skip
    """A GGUF file; without `infos` it has one F32 tensor of 4 rows of 8."""
    keys, names = list(items), [info()] if infos is None else list(infos)
    counts = len(names) if tensors is None else tensors, len(keys) if entries is None else entries
    head = b"GGUF" + struct.pack("<I2Q", version, *counts) + b"".join(keys) + b"".join(names)
    return head + bytes(-len(head) % align) + data


# How a file comes into its folder


def one(name: str, content: bytes | Callable[[], bytes]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content())
        return folder / name

    return make


def sparse(name: str, first: bytes, size: int, last: bytes = b"") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        with (folder / name).open("wb") as file:
            file.write(first)
            file.truncate(size - len(last))
            file.seek(size - len(last))
            file.write(last)
        return folder / name

    return make


def folder_of(**files: bytes | object) -> Callable[[Path], Path]:
    """A folder; `__` in a name is a dot, tables become JSON."""

    def make(folder: Path) -> Path:
        for name, content in files.items():
            (folder / name.replace("__", ".")).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return folder

    return make


def index(weight_map: object, **more: object) -> Callable[[Path], Path]:
    shard = safetensors_file({"w": entry(0, 4)}, bytes(4))
    names = {"model__safetensors__index__json": weight_map if isinstance(weight_map, bytes) else {"metadata": {}, "weight_map": weight_map}}
    return folder_of(**names, model1__safetensors=shard, **more)


def linked(name: str, target: str, then: Callable[[Path], Path] | None = None) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).symlink_to(target)
        return then(folder) if then else folder / name

    return make


def piped(name: str, then: Callable[[Path], Path] | None = None) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        os.mkfifo(folder / name)
        return then(folder) if then else folder / name

    return make


def config(text: bytes | object) -> Callable[[Path], Path]:
    """A folder with a fused projection of GPT-NeoX and this config."""
    weight = {"gpt_neox.layers.0.attention.query_key_value.weight": entry(0, 72, "U8", [12, 6])}
    return folder_of(model__safetensors=safetensors_file(weight, bytes(72)), config__json=text)


def neox(**values: object) -> dict[str, object]:
    return {"model_type": "gpt_neox", "num_attention_heads": 2, "hidden_size": 4, **values}


# Files that take more than one line


def sparse_torch(size: int) -> Callable[[Path], Path]:
    """A torch file whose pickle has so many bytes, most of them a hole."""
    whole = archive({b"a/data.pkl": b"#"})
    first, last = whole[: whole.index(b"#")], bytearray(whole[whole.index(b"#") + 1 :])
    last[20:28] = struct.pack("<2I", size, size)
    last[-6:-2] = struct.pack("<I", len(first) + size)
    return sparse("a.bin", first, len(first) + size + len(last), bytes(last))


def bomb() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as zip, zip.open("a/data.pkl", "w", force_zip64=True) as record:
        for _ in range(8):
            record.write(bytes(1 << 24))
    return out.getvalue()


def overlapping() -> bytes:
    """Storage 1 lies inside of storage 0, with a header of its own."""
    inner = struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, 0, 0, 0, 0, 4, 4, 8, 0) + b"a/data/1" + bytes(4)
    outer = bytes(6) + inner
    value = table(v=tensor((12,), (1,), numel=len(outer) // 4), w=tensor((1,), (1,), numel=1, key="1"))
    plain = torch_file(value, {b"a/data/0": outer})
    at = plain.index(inner)
    return torch_file(value, {b"a/data/0": outer, b"a/data/1": Part(b"", size=4, header=at)})


def crowd() -> bytes:
    return archive([(b"a/data/%d" % i, b"") for i in range(200_000)], wide=True)


def plain_zip() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as zip:
        zip.writestr("[Content_Types].xml", "<x/>")
    return out.getvalue()


def tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    return out.getvalue()
