"""`detect` on a checkpoint: finds fused tensors and the output projection beside each, reads both, and pools layers of one kind."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from . import formats
from .detect import CONFIDENT, GATE_UP, KV, QKV, Verdict, detect, pool
from .errors import FormatError
from .families.declare import LOOKS_FUSED
from .formats import Tensor
from .pieces import listed
from .remote_skeleton import reading_urls
from .samples import Numbers

OUTPUTS = (
    "o_proj", "out_proj", "output.dense", "dense", "c_proj", "to_out.0", "to_out", "wo", "proj", "out", "o", "linear_proj", "attn_out",
    "attn_output", "projection", "output",
)  # fmt: skip
"""Names of the output projection, in the module of the fused tensor or one above."""
DOWNS = ("down_proj", "w2", "dense_4h_to_h", "linear_fc2", "fc2", "wo", "ffn_down")
"""Names of the projection behind gate and up."""
QUERIES = ("q_proj", "query", "to_q", "Wq", "wq", "q", "linear_q", "q_linear")
"""Names of the query projection beside fused k and v."""
KEY_VALUES = ("key_value", "kv_linear", "Wkv", "wkv", "kv", "kv_proj", "to_kv", "linear_kv", "keys_values")
GATED = ("gate_up_proj", "gate_up", "w13", "up_gate_proj")
"""Last words of the names of tensors that hold k and v, or gate and up."""
FIRST_LAYERS, MAX_LAYERS = 8, 32
"""Layers of one kind that are looked at, spread evenly; more only where these say too little."""
LEAST_LAYERS, NUMBERS = 2, 1 << 30
"""Of large layers, which say more each and take longer, only as many as hold so many numbers, but so many at least."""


@dataclass(frozen=True)
class Kind:
    """Fused tensors whose names differ only in numbers, `total` in all: what those that were read say together, and each alone."""

    name: str
    total: int
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
            read = "" if len(kind.layers) == kind.total else f", {len(kind.layers)} of them read: {_numbers_in(kind.layers)}"
            lines.append(f"  {kind.total} x {kind.name}{read}   " + (f"with {_star(beside)}" if beside else "without an output projection"))
            lines += [f"    {line}" for line in str(kind.verdict).split("\n")]
        return "\n".join(lines)


def _kind_dict(kind: Kind) -> dict[str, Any]:
    layers = [
        {"tensor": name, "output": kind.outputs.get(name), "layout": str(one.layout) if one.layout else None, "confidence": one.confidence}
        for name, one in kind.layers.items()
    ]
    return {"name": kind.name, "total": kind.total, **kind.verdict.to_dict(), "tensors": layers}


def _numbers_in(names: Iterable[str]) -> str:
    """What tells layers of one kind apart: the numbers in their names."""
    every = [re.findall(r"\d+", name) for name in names]
    return listed([".".join(number for number, *others in zip(one, *every, strict=True) if set(others) != {number}) for one in every], 8)


@reading_urls("path")
def detect_checkpoint(path: str | Path, tensor: str | None = None, *, heads: int | None = None, kv_heads: int | None = None) -> Detected:
    """Which layouts the fused weights of a checkpoint have, by their values alone; config and stamps are not asked.

    Args:
        path: a folder or a file: safetensors, GGUF, or the zip file that torch.save writes; or the URL of safetensors.
        tensor: a name or glob; without it all matrices whose names look fused.
        heads, kv_heads: how many, where known.
    Raises FormatError (damaged files, no such tensor), PlanError (numbers of a tensor cannot be read), MissingExtraError (GGUF's packed
    types without the gguf package).
    """
    stored = formats.read(path)
    root, tensors = stored.root, stored.tensors
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
    size = sum(math.prod(tensors[one].shape) for one in (names[0], output_of(names[0], tensors)) if one)
    most = max(LEAST_LAYERS, min(MAX_LAYERS, NUMBERS // size))
    chosen = _spread(names, most)
    beside = {name: found for name in chosen if (found := output_of(name, tensors)) is not None}
    if len(beside) < len(chosen):
        beside = {}
    verdicts: dict[str, Verdict] = {}
    for few in (_spread(chosen, FIRST_LAYERS), chosen):
        for name in few:
            if name not in verdicts:
                verdicts[name] = _verdict(root, tensors, name, beside.get(name), heads, kv_heads)
        pooled = pool(verdicts.values())
        if pooled.confidence == CONFIDENT:
            break
    return Kind(star, len(names), pooled, {name: verdicts[name] for name in chosen if name in verdicts}, beside)


def _spread(names: list[str], count: int) -> list[str]:
    return [names[i] for i in np.unique(np.linspace(0, len(names) - 1, min(len(names), count)).astype(int))]


def _verdict(root: Path, tensors: Mapping[str, Tensor], name: str, beside: str | None, heads: int | None, kv_heads: int | None) -> Verdict:
    kind, axis, bias = kind_of(name), packed_axis(tensors[name].shape), tensors.get(_bias_name(name))
    o = _numbers(root, tensors, beside) if beside else None
    q = _numbers(root, tensors, query) if kind == KV and (query := _beside(name, tensors, QUERIES, _is_query)) else None
    values = _numbers(root, tensors, bias.name) if bias and bias.shape == (tensors[name].shape[axis],) else None
    return detect(_numbers(root, tensors, name), o, values, heads, kv_heads, axis, parts=kind, q=q)


def _numbers(root: Path, tensors: Mapping[str, Tensor], name: str) -> Numbers:
    scale = tensors.get(f"{name}_scale_inv")
    return Numbers(root, tensors[name], Numbers(root, scale) if scale is not None and len(scale.shape) == 2 else None)


def kind_of(name: str) -> str:
    """Which parts a tensor has, by its name.

    >>> kind_of("layers.0.attn.kv_proj.weight"), kind_of("layers.0.mlp.gate_up_proj.weight"), kind_of("h.0.attn.c_attn.weight")
    ('k|v', 'gate|up', 'q|k|v')
    """
    word = name.removesuffix(".weight").rpartition(".")[2]
    return KV if word in KEY_VALUES else GATE_UP if word in GATED else QKV


def packed_axis(shape: tuple[int, ...]) -> int:
    """The axis along which a fused matrix is packed: the longer one.

    >>> packed_axis((2304, 768)), packed_axis((768, 2304))
    (0, 1)
    """
    return int(shape[1] > shape[0])


def output_of(name: str, tensors: Mapping[str, Tensor]) -> str | None:
    """The output projection of the layer that a fused tensor belongs to, by its name and shape, or down beside gate and up; or None."""
    return _beside(name, tensors, DOWNS if kind_of(name) == GATE_UP else OUTPUTS, _is_output)


def _is_output(fused: Tensor, other: Tensor, axis: int) -> bool:
    narrow = other.shape[1 - axis] < fused.shape[axis] or kind_of(fused.name) == KV
    return other.shape[axis] == fused.shape[1 - axis] and narrow


def _is_query(fused: Tensor, other: Tensor, axis: int) -> bool:
    return other.shape[1 - axis] == fused.shape[1 - axis]


def _beside(name: str, tensors: Mapping[str, Tensor], ends: tuple[str, ...], fits: Callable[[Tensor, Tensor, int], bool]) -> str | None:
    fused, module = tensors[name], name.removesuffix(".weight").rpartition(".")[0]
    for home in (module, module.rpartition(".")[0]):
        for end in ends:
            found = tensors.get(f"{home}.{end}.weight" if home else f"{end}.weight")
            if found is not None and found.name != name and len(found.shape) == 2 and fits(fused, found, packed_axis(fused.shape)):
                return found.name
    return None


def _wanted(name: str, pattern: str | None) -> bool:
    if pattern is not None:
        return fnmatchcase(name, pattern)
    return name.removesuffix(".weight").rpartition(".")[2] in (*LOOKS_FUSED, *GATED) and not name.endswith("bias")


def _star(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _bias_name(name: str) -> str:
    return name.removesuffix("weight") + "bias"
