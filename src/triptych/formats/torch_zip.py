"""The zip file that `torch.save` writes (.bin, .pt, .pth): names, dtypes, shapes and byte ranges. Needs no torch and runs no pickle.

    root/data.pkl     a pickle of tables; a tensor in it says which storage it lies in, from which element on, with which shape and strides
    root/data/KEY     the bytes of one storage
    root/byteorder    little or big; little where it is missing

Legacy files (a bare pickle, before torch 1.6), big-endian ones and compressed ones are refused.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import FormatError, PlanError
from .safetensors import BITS, MAX_DIMS, MAX_SIZE, Header, Tensor, open_file, without_gc
from .torch_tree import REBUILD, find_tensors, plain_settings
from .unpickle import Call, Name, Outside, load
from .zip_records import Record, content, data_start, read_records

SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
MAX_PICKLE, MAX_STEPS, MAX_SMALL = 1 << 25, 1 << 19, 64
SHARED = 1 << 12
"""Entries that tables which stand in several places may have more than the pickle has bytes."""
LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."

STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "LongStorage": "I64",
    "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8", "BoolStorage": "BOOL",
    "ComplexFloatStorage": "C64", "UntypedStorage": "U8",
}  # fmt: skip
DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64", "bool": "BOOL", "complex64": "C64", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0", "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float4_e2m1fn_x2": "F4",
}  # fmt: skip


class Strided(NamedTuple):
    """A tensor whose bytes do not lie side by side in its own order: element i is at byte `start` + sum(i * strides)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    strides: tuple[int, ...]


@dataclass(frozen=True)
class TorchFile:
    """What one file holds. `header` has the tensors that are one byte range each, two names for the same bytes both.

    `strided`: views that have to be gathered. `unreadable`: name -> why a tensor cannot be had without torch. `ignored`: name -> what it
    is, for all that is no tensor of the model. `inside`: the key under which the model's tensors were found, or nothing.
    """

    header: Header
    strided: tuple[Strided, ...]
    unreadable: Mapping[str, str] = field(hash=False)
    ignored: Mapping[str, str] = field(hash=False)
    inside: str

    @property
    def tied(self) -> tuple[tuple[str, ...], ...]:
        """Names that stand for the same bytes, group by group."""
        groups: dict[tuple[int, int], list[str]] = {}
        for tensor in self.header.tensors:
            if tensor.size:
                groups.setdefault((tensor.start, tensor.stop), []).append(tensor.name)
        return tuple(tuple(names) for names in groups.values() if len(names) > 1)

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on what is taken from the file and what is not, for the plan."""
        left = [f"{name} ({what})" for name, what in self.ignored.items()]
        notes = [f"its tensors are those under {self.inside!r}"] if self.inside else []
        notes += [f"left out: {', '.join(left[:6])}{f' and {len(left) - 6} more' if len(left) > 6 else ''}"] if left else []
        notes += [f"{' and '.join(names[:3])} share their bytes and are written each" for names in self.tied[:3]]
        return tuple(f"{self.header.file}: {note}" for note in notes)

    def plain(self) -> Header:
        """The header. Raises PlanError when a tensor of the model is no byte range."""
        for name, reason in self.unreadable.items():
            raise PlanError("a tensor cannot be read without running code", tensor=name, file=self.header.file, found=reason,
                            try_="save plain tensors: torch.save({name: tensor.detach().clone().contiguous()}, file)")  # fmt: skip
        for view in self.strided:
            where = f"shape {view.shape}, strides of {view.strides} bytes"
            raise PlanError("a tensor's bytes do not lie side by side", tensor=view.name, file=view.file, expected="a contiguous tensor",
                            found=where, try_="save tensor.contiguous() in place of the view")  # fmt: skip
        return self.header


def safetensors_name(name: str) -> str:
    """The usual name of the safetensors file, or index, in place of a torch one; other names stay.

    >>> safetensors_name("pytorch_model-00001-of-00002.bin"), safetensors_name("pytorch_model.bin.index.json"), safetensors_name("a.gguf")
    ('model-00001-of-00002.safetensors', 'model.safetensors.index.json', 'a.gguf')
    """
    index = ".index.json" if name.endswith(".index.json") else ""
    stem = name.removesuffix(index)
    suffix = next((suffix for suffix in SUFFIXES if stem.endswith(suffix)), None)
    if suffix is None:
        return name
    stem = stem.removesuffix(suffix)
    return ("model" + stem.removeprefix("pytorch_model") if stem.startswith("pytorch_model") else stem) + ".safetensors" + index


def read(path: Path) -> TorchFile:
    """All that a file holds, every claim in it checked against the file's size; no tensor is read and nothing is run.

    Raises FormatError (damaged, no torch file), PlanError (legacy, big-endian, TorchScript, compressed, or its pickle asks to run code).
    """
    with _opened(path) as (archive, info):
        raw = archive.program()
        tree = load(raw, path.name, archive.steps)
        named = find_tensors(tree, path.name, SHARED + len(raw))
        found = {name: archive.tensor(name, value) for name, value in named.tensors.items()}
        archive.check_apart()
    tensors = sorted((one for one in found.values() if isinstance(one, Tensor)), key=lambda tensor: (tensor.start, tensor.stop))
    header = Header(path.name, info.st_size, info.st_mtime_ns, tuple(tensors), {"format": "pt"} if tensors else {})
    strided = tuple(one for one in found.values() if isinstance(one, Strided))
    unreadable = {**named.unreadable, **{name: why for name, why in found.items() if isinstance(why, str)}}
    return TorchFile(header, strided, unreadable, named.ignored, named.inside)


def settings(path: Path) -> dict[str, bool | int | float | str | None]:
    """The plain values that a training program left beside the model: those of `args`, and `checkpoint_version`. Raises as `read`."""
    with _opened(path) as (archive, _):
        return dict(plain_settings(load(archive.program(), path.name, archive.steps)))


@contextmanager
def _opened(path: Path) -> Iterator[tuple[_Archive, os.stat_result]]:
    fd = open_file(path)
    try:
        info = os.fstat(fd)
        _check_kind(os.pread(fd, 64, 0), info.st_size, path.name)
        with without_gc():
            yield _Archive(fd, info.st_size, path.name), info
    finally:
        os.close(fd)


def _check_kind(first: bytes, size: int, file: str) -> None:
    if first.startswith(b"PK\3\4"):
        return
    if first.startswith(LEGACY):
        raise PlanError("the file has the format that torch wrote before version 1.6", file=file, expected="a zip archive",
                        try_="torch.save(torch.load(FILE, map_location='cpu', weights_only=True), NEW_FILE)")  # fmt: skip
    if first.startswith(b"\x80"):
        raise PlanError("the file is a bare pickle", file=file, expected="the zip archive that torch.save writes",
                        try_="a pickle may run anything: only if you trust it, load it and torch.save its tensors")  # fmt: skip
    raise FormatError("not a torch file", file=file, expected="a zip archive", found=f"{size} bytes that begin with {first[:8]!r}")


# The archive


class _Storage(NamedTuple):
    start: int
    size: int


class _Archive:
    """The records of the file, and the tensors that the calls in its pickle describe."""

    def __init__(self, fd: int, size: int, file: str) -> None:
        self.fd, self.file = fd, file
        self.records, self.end = read_records(fd, size, file)
        self.root = self._root()
        self.storages: dict[str, _Storage] = {}
        self.steps = MAX_STEPS + 256 * len(self.records)

    def _root(self) -> bytes:
        roots = [name.removesuffix(b"data.pkl") for name in self.records if name.endswith(b"/data.pkl") and name.count(b"/") == 1]
        if len(roots) != 1:
            raise FormatError("not a torch file", file=self.file, expected="a zip archive with one data.pkl", found=f"{len(roots)} of them")
        if roots[0] + b"constants.pkl" in self.records:
            raise PlanError("the file is a TorchScript program", file=self.file, expected="tensors",
                            try_="torch.save(torch.jit.load(FILE).state_dict(), NEW_FILE)")  # fmt: skip
        return roots[0]

    def small(self, name: str) -> str | None:
        """The text of a small record, or None."""
        record = self.records.get(self.root + name.encode())
        return record and content(self.fd, record, self.end, self.file, MAX_SMALL).decode("ascii", "replace").strip()

    def program(self) -> bytes:
        """The pickle."""
        version, order = self.small("version"), self.small("byteorder")
        if version is not None and version not in map(str, range(1, 11)):
            raise PlanError("the file has a version that this program does not know", file=self.file, expected="1 to 10", found=version)
        if order == "big":
            raise PlanError("the file is big-endian", file=self.file, expected="little", try_="load and save it on a little-endian machine")
        if order not in (None, "little"):
            raise FormatError("unknown byte order", file=self.file, expected="little or big", found=order)
        record = self.records[self.root + b"data.pkl"]
        return content(self.fd, record, self.end, self.file, MAX_PICKLE)

    def storage(self, key: str, size: int, name: str) -> _Storage:
        """The bytes of a storage that must have `size` of them."""
        found = self.storages.get(key)
        if found is None:
            record: Record | None = self.records.get(self.root + b"data/" + key.encode("utf-8", "surrogatepass"))
            if record is None:
                raise FormatError("a tensor's storage is not in the archive", tensor=name, file=self.file, found=key[:80])
            found = self.storages[key] = _Storage(data_start(self.fd, record, self.end, self.file), record.size)
        if found.size != size:
            raise FormatError(
                "a storage has another size than its record",
                tensor=name,
                file=self.file,
                expected=f"{size} bytes",
                found=f"{found.size} bytes",
            )
        return found

    def check_apart(self) -> None:
        """That no two storages share bytes."""
        end = 0
        for start, size in sorted(self.storages.values()):
            if start < end and size:
                raise FormatError(
                    "two storages overlap", file=self.file, expected=f"the next at byte {end} or later", found=f"at byte {start}"
                )
            end = max(end, start + size)

    def tensor(self, name: str, call: object) -> Tensor | Strided | str:
        """The tensor that a call describes, or why it cannot be had. Raises FormatError (the description makes no sense)."""
        for _ in range(4):
            if isinstance(call, Call) and call.name in (REBUILD + "parameter", REBUILD + "parameter_with_state"):
                call = call.parts[0] if call.parts else None
            elif isinstance(call, Call) and call.name == "torch._tensor._rebuild_from_type_v2":
                function, _, args, *_ = (*call.parts, None, None, None)
                call = Call(function, list(args)) if isinstance(function, Name) and isinstance(args, tuple) else None
        if isinstance(call, Outside):
            return "it is a storage without a shape"
        if not isinstance(call, Call):
            raise self._nonsense(name, "a call without a tensor")
        counts = {REBUILD + "tensor": (4,), REBUILD + "tensor_v2": (6, 7), REBUILD + "tensor_v3": (7, 8)}.get(call.name)
        if counts is None:
            return f"it is made by {call.name}"
        if len(call.parts) not in counts:
            raise self._nonsense(name, f"{len(call.parts)} arguments")
        storage, offset, shape, strides, *more = call.parts
        if len(more) == counts[-1] - 4 and len(counts) == 2 and more[-1]:
            return "its bytes are to be negated or conjugated"
        return self._view(name, storage, offset, shape, strides, more[2] if call.name.endswith("v3") else None)

    def _view(self, name: str, storage: Any, offset: Any, shape: Any, strides: Any, dtype: Any) -> Tensor | Strided | str:
        try:
            word, kind, key, _, numel = storage.id
            stored = kind.rpartition(".")[2] if isinstance(kind, Name) else ""
            if word != "storage" or not isinstance(key, str) or not stored.endswith("Storage"):
                raise TypeError
        except (AttributeError, TypeError, ValueError):
            raise self._nonsense(name, "no storage") from None
        if not (isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides) <= MAX_DIMS):
            raise self._nonsense(name, "shape and strides are no pair of tuples")
        if not all(type(number) is int and 0 <= number < MAX_SIZE for number in (offset, numel, *shape, *strides)):
            raise self._nonsense(name, "a size, stride or offset is no natural number")
        short = STORAGES.get(stored) if dtype is None else DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, Name) else None
        if short is None or stored not in STORAGES:
            return f"its dtype is {dtype or stored.removesuffix('Storage')}"
        place = self.storage(key, numel * BITS[STORAGES[stored]] // 8, name)
        item = max(8, BITS[short]) // 8
        if math.prod(shape) and (offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) + 1) * item > place.size:
            raise FormatError("a tensor does not lie in its storage", tensor=name, file=self.file, expected=f"{place.size} bytes",
                              found=f"shape {shape}, strides {strides}, from element {offset}, {item} bytes each"[:160])  # fmt: skip
        return _placed(name, short, shape, strides, self.file, place.start + offset * item, item)

    def _nonsense(self, name: str, found: str) -> FormatError:
        return FormatError("the description of a tensor makes no sense", tensor=name, file=self.file, found=found)


def _placed(
    name: str, dtype: str, shape: tuple[int, ...], strides: tuple[int, ...], file: str, start: int, item: int
) -> Tensor | Strided | str:
    size = math.prod(shape)
    if size * item >= MAX_SIZE:
        return "it is too large"
    steps = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    if size and any(n > 1 and stride != step for n, stride, step in zip(shape, strides, steps, strict=True)):
        if dtype == "F4":
            return "it is a view of packed numbers"
        return Strided(name, dtype, shape, file, start, tuple(stride * item for stride in strides))
    if dtype == "F4":  # two numbers in one element of torch
        if not shape:
            return "it is a pair of packed numbers without an axis"
        shape = (*shape[:-1], 2 * shape[-1])
    return Tensor(name, dtype, shape, file, start if size else 0, start + size * item if size else 0)
