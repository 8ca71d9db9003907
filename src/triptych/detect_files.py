"""`detect` on a checkpoint: finds fused tensors and the output projection beside each, reads both, and pools layers of one kind."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from . import formats
from .detect import Verdict, detect, pool
from .errors import FormatError, PlanError
from .evidence import Floats
from .families.declare import LOOKS_FUSED
from .formats import Tensor, torch_zip

OUTPUTS = (
    "o_proj", "out_proj", "output.dense", "dense", "c_proj", "to_out.0", "to_out", "wo", "proj", "out", "o", "linear_proj", "attn_out",
    "attn_output", "projection", "output",
)  # fmt: skip
"""Names of the output projection, in the module of the fused tensor or one above."""
MAX_LAYERS = 32
"""Layers of one kind that are looked at, spread evenly."""
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


@dataclass(frozen=True)
class Kind:
    """Fused tensors whose names differ only in numbers: what they say together, and each alone."""

    name: str
    verdict: Verdict
    layers: Mapping[str, Verdict] = field(hash=False, repr=False)
    outputs: Mapping[str, str] = field(hash=False, repr=False)


@dataclass(frozen=True)
class Detected:
    """What the weights of a checkpoint say."""

    path: str
    kinds: tuple[Kind, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"version": 1, "path": self.path, "kinds": [_kind_dict(kind) for kind in self.kinds]}

    def __str__(self) -> str:
        lines = [self.path]
        for kind in self.kinds:
            beside = next(iter(kind.outputs.values()), None)
            lines.append(f"  {len(kind.layers)} x {kind.name}   " + (f"with {_star(beside)}" if beside else "without an output projection"))
            lines += [f"    {line}" for line in str(kind.verdict).split("\n")]
        return "\n".join(lines)


def _kind_dict(kind: Kind) -> dict[str, Any]:
    layers = [
        {"tensor": name, "output": kind.outputs.get(name), "layout": str(one.layout) if one.layout else None, "confidence": one.confidence}
        for name, one in kind.layers.items()
    ]
    return {"name": kind.name, **kind.verdict.to_dict(), "tensors": layers}


def detect_checkpoint(path: str | Path, tensor: str | None = None, *, heads: int | None = None, kv_heads: int | None = None) -> Detected:
    """Which layouts the fused weights of a checkpoint have, by their values alone; config and stamps are not asked.

    Args:
        path: a folder or a file: safetensors, or the zip file that torch.save writes.
        tensor: a name or glob; without it all matrices whose names look fused.
        heads, kv_heads: how many, where known.
    Raises FormatError (damaged files, no such tensor), PlanError (numbers of a tensor cannot be read).
    """
    root, tensors = _tensors(Path(path))
    names = [name for name, one in tensors.items() if len(one.shape) == 2 and _wanted(name, tensor)]
    if not names:
        wanted = "a matrix named " + (tensor or "like qkv_proj, query_key_value, c_attn or in_proj_weight")
        raise FormatError("no tensor to look at", where=str(path), expected=wanted, found=f"{len(tensors)} tensors",
                          try_="give the tensor's name" if tensor is None else "`triptych inspect` lists the tensors")  # fmt: skip
    groups: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name in names:
        groups.setdefault((_star(name), tensors[name].shape), []).append(name)
    return Detected(str(path), tuple(_kind(root, star, members, tensors, heads, kv_heads) for (star, _), members in groups.items()))


def _kind(root: Path, star: str, names: list[str], tensors: Mapping[str, Tensor], heads: int | None, kv_heads: int | None) -> Kind:
    chosen = [names[i] for i in np.unique(np.linspace(0, len(names) - 1, min(len(names), MAX_LAYERS)).astype(int))]
    beside = {name: found for name in chosen if (found := output_of(name, tensors)) is not None}
    if len(beside) < len(chosen):
        beside = {}
    verdicts = {}
    for name in chosen:
        weight, axis = _read(root, tensors[name]), packed_axis(tensors[name].shape)
        o = _read(root, tensors[beside[name]]) if beside else None
        bias = tensors.get(_bias_name(name))
        rows = tensors[name].shape[axis]
        verdicts[name] = detect(weight, o, _read(root, bias) if bias and bias.shape == (rows,) else None, heads, kv_heads, axis)
    return Kind(star, pool(verdicts.values()), verdicts, beside)


def packed_axis(shape: tuple[int, ...]) -> int:
    """The axis along which a fused matrix is packed: the longer one.

    >>> packed_axis((2304, 768)), packed_axis((768, 2304))
    (0, 1)
    """
    return int(shape[1] > shape[0])


def output_of(name: str, tensors: Mapping[str, Tensor]) -> str | None:
    """The output projection of the layer that a fused tensor belongs to, by its name and shape; or None."""
    shape = tensors[name].shape
    axis = packed_axis(shape)
    module = name.removesuffix(".weight").rpartition(".")[0]
    for home in (module, module.rpartition(".")[0]):
        for end in OUTPUTS:
            found = tensors.get(f"{home}.{end}.weight" if home else f"{end}.weight")
            if found is None or found.name == name or len(found.shape) != 2:
                continue
            if found.shape[axis] == shape[1 - axis] and found.shape[1 - axis] < shape[axis]:
                return found.name
    return None


def _wanted(name: str, pattern: str | None) -> bool:
    if pattern is not None:
        return fnmatchcase(name, pattern)
    return name.removesuffix(".weight").rpartition(".")[2] in LOOKS_FUSED and not name.endswith("bias")


def _star(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _bias_name(name: str) -> str:
    return name.removesuffix("weight") + "bias"


def _tensors(path: Path) -> tuple[Path, Mapping[str, Tensor]]:
    if path.is_file() and path.suffix in torch_zip.SUFFIXES:
        return path.parent, {one.name: one for one in torch_zip.read(path).header.tensors}
    stored = formats.read(path)
    return stored.root, stored.tensors


def _read(root: Path, tensor: Tensor) -> Any:
    """[shape] floats of a tensor, mapped and not copied but for BF16."""
    if tensor.dtype not in DTYPES:
        raise PlanError("statistics need numbers", tensor=tensor.name, file=tensor.file, found=tensor.dtype, expected=", ".join(DTYPES))
    raw: Any = np.memmap(root / tensor.file, DTYPES[tensor.dtype], "r", offset=tensor.start, shape=tensor.shape)
    return _widened(raw) if tensor.dtype == "BF16" else raw


def _widened(bits: Any) -> Floats:
    """bfloat16, given as its bits, in float32: the same numbers."""
    floats: Floats = (bits.astype(np.uint32) << 16).view(np.float32)
    return floats
