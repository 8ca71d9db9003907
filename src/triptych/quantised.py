"""Weights stored as packed numbers: which axis of the weight every stored tensor runs along, and how many of its rows one element holds.

GPTQ and AWQ keep [in, out], compressed-tensors [out, in]; a word of 32 bits holds 4, 8 or 16 numbers. The numbers themselves are never
read: whole words and whole groups move, or nothing does.

    GPTQ                 qweight [in / 8, out], qzeros [groups, out / 8], scales [groups, out], g_idx [in]
    AWQ                  qweight [in, out / 8], the rest alike; the 8 numbers of a word stand in an order of their own
    compressed-tensors   weight_packed [out, in / 8], weight_scale [out, groups], weight_zero_point [out / 8, groups], weight_shape

as read in vllm==0.33.0 (vllm/model_executor/layers/quantization/auto_gptq.py:376-425, auto_awq.py:456-493,
compressed_tensors/schemes/compressed_tensors_wNa16.py:176-240).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import repeat
from typing import Any, NamedTuple

from . import families, formats
from .errors import PlanError
from .families import Record
from .formats import Stored, Tensor
from .layout import Axis, Factor, Layout
from .packed import Packed, Piece, from_records
from .pieces import base_names, together
from .sizes import bind

OUT, IN = 0, 1
"""Axes of the weight as nn.Linear has it."""
PACKED = {"qweight": ("qzeros", "scales", "g_idx"), "weight_packed": ("weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape")}
"""Tensor of packed numbers -> those that go with it."""
GROUPED = ("scales", "qzeros", "weight_scale", "weight_zero_point")
"""Those with an element for each group of inputs."""
ORDERS = ("g_idx", "weight_g_idx")
"""For every input its group: written by GPTQ, and needed where the inputs were sorted by their activation."""


class Pack(NamedTuple):
    """A stored tensor of the weight `base`: for each of its axes, the axis of the weight and how many rows of it one element holds."""

    base: str
    axes: tuple[tuple[int, int], ...]


class Quantised(NamedTuple):
    """A checkpoint as if its packed weights were plain ones; stored tensor -> what it is; weights whose inputs are sorted, or may be."""

    plain: Stored
    packs: Mapping[str, Pack]
    sorted: Mapping[str, str]


def unpacked(stored: Stored, rules: Iterable[str], strict: bool = True) -> Quantised:
    """The weights behind the packed numbers of a checkpoint, but for those that a glob of `rules` speaks of.

    Raises PlanError for packed numbers that are of no kind known here; without `strict` those stay what they are.
    """
    packs: dict[str, Pack] = {}
    tensors: dict[str, Tensor] = {}
    sorted_: dict[str, str] = {}
    told: Mapping[str, Any] | None = None
    for name, tensor in stored.tensors.items():
        stem, _, word = name.rpartition(".")
        if word not in PACKED or any(fnmatchcase(name, glob) for glob in rules):
            continue
        told = _told(stored) if told is None else told
        found = {other: stored.tensors[f"{stem}.{other}"] for other in PACKED[word] if f"{stem}.{other}" in stored.tensors}
        try:
            shape, axes = _compressed(tensor, found, told) if word == "weight_packed" else _gptq_or_awq(tensor, found, told)
        except PlanError:
            if strict:
                raise
            continue
        base = f"{stem}.weight"
        packs |= {f"{stem}.{other}": Pack(base, axes[other]) for other in (word, *found)}
        tensors[name] = tensor._replace(name=base, shape=shape)
        order = next((other for other in ORDERS if other in found), None)
        if order and told.get("desc_act") is not False:
            sorted_[base] = order
    if not packs:
        return Quantised(stored, {}, {})
    kept = {(tensors.get(name) or tensor).name: tensors.get(name) or tensor for name, tensor in stored.tensors.items()
            if name in tensors or name not in packs}  # fmt: skip
    if len(kept) != len(stored.tensors) - len(packs) + len(tensors):
        twice = next(one.name for one in tensors.values() if one.name in stored.tensors)
        raise PlanError("a weight is there twice, packed and plain", tensor=twice)
    return Quantised(replace(stored, tensors=kept), packs, sorted_)


def _told(stored: Stored) -> dict[str, Any]:
    """What the checkpoint says of its own numbers: in config.json, or in GPTQ's file of its own."""
    told = (formats.read_config(stored) or {}).get("quantization_config")
    place = stored.root / "quantize_config.json"
    if not isinstance(told, dict) and place.exists():
        told = formats.read_json(place)
    return told if isinstance(told, dict) else {}


_Axes = dict[str, tuple[tuple[int, int], ...]]


def _gptq_or_awq(words: Tensor, beside: Mapping[str, Tensor], told: Mapping[str, Any]) -> tuple[tuple[int, int], _Axes]:
    """Shape of the weight [out, in] and the axes of each tensor, from the shapes."""
    scales, zeros = beside.get("scales"), beside.get("qzeros")
    if scales is None or len(scales.shape) != 2 or len(words.shape) != 2:
        raise _of_no_kind(words, "scales [groups, out] beside it")
    out = scales.shape[1]
    bits = told.get("bits") if zeros is None else None
    words_of_zeros = zeros.shape[1] if zeros is not None and len(zeros.shape) == 2 else 0
    pack = 32 // bits if type(bits) is int and bits > 0 else out // max(1, words_of_zeros)
    if pack not in (4, 8, 16):
        raise _of_no_kind(words, "qzeros of 2, 4 or 8 bits, whole numbers in every word")
    if words.shape[1] == out:
        inputs, axes = words.shape[0] * pack, ((IN, pack), (OUT, 1))
    elif words.shape[1] * pack == out:
        inputs, axes = words.shape[0], ((IN, 1), (OUT, pack))
    else:
        raise _of_no_kind(words, f"(in / {pack}, {out}) of GPTQ or (in, {out // pack}) of AWQ")
    group = _group(scales, scales.shape[0], inputs, told.get("group_size"))
    every = {"qweight": axes, "scales": ((IN, group), (OUT, 1)), "qzeros": ((IN, group), (OUT, pack)), "g_idx": ((IN, 1),)}
    _check((out, inputs), every, {"qweight": words, **beside})
    return (out, inputs), every


def _compressed(words: Tensor, beside: Mapping[str, Tensor], told: Mapping[str, Any]) -> tuple[tuple[int, int], _Axes]:
    """The same for the packed numbers of compressed-tensors; only the config knows how many bits they have."""
    groups = told.get("config_groups")
    weights = [one.get("weights") for one in groups.values() if isinstance(one, Mapping)] if isinstance(groups, Mapping) else []
    every_bits = {bits for one in weights if isinstance(one, Mapping) and type(bits := one.get("num_bits")) is int}
    scales = beside.get("weight_scale")
    if len(every_bits) != 1 or not every_bits <= {2, 4, 8} or scales is None or len(scales.shape) != 2 or len(words.shape) != 2:
        raise _of_no_kind(words, "weight_scale [out, groups], and one num_bits of 2, 4 or 8 in config_groups")
    pack = 32 // every_bits.pop()
    out, inputs = words.shape[0], words.shape[1] * pack
    sizes = {one.get("group_size") for one in weights if isinstance(one, Mapping)}
    group = _group(scales, scales.shape[1], inputs, sizes.pop() if len(sizes) == 1 else None)
    every: _Axes = {"weight_packed": ((OUT, 1), (IN, pack)), "weight_scale": ((OUT, 1), (IN, group)), "weight_shape": (),
                    "weight_zero_point": ((OUT, pack), (IN, group)), "weight_g_idx": ((IN, 1),)}  # fmt: skip
    _check((out, inputs), every, {"weight_packed": words, **beside})
    return (out, inputs), every


def _group(scales: Tensor, groups: int, inputs: int, told: object) -> int:
    """How many inputs share a scale: as the config says, where that fits, else an equal share."""
    if type(told) is int and told > 0 and -(-inputs // told) == groups:
        return told
    if groups < 1 or inputs % groups:
        raise PlanError("scales do not fit the tensor that they scale", tensor=scales.name, found=f"{groups} groups of {inputs} inputs",
                        expected="group_size in quantization_config, or groups of one size")  # fmt: skip
    return inputs // groups


def _check(shape: tuple[int, int], every: _Axes, tensors: Mapping[str, Tensor]) -> None:
    for word, tensor in tensors.items():
        wanted = tuple(-(-shape[of] // block) for of, block in every[word])
        if word != "weight_shape" and tensor.shape != wanted:
            raise PlanError(
                "tensors of one quantised weight do not fit each other", tensor=tensor.name, found=tensor.shape, expected=wanted
            )


def _of_no_kind(words: Tensor, expected: str) -> PlanError:
    return PlanError("packed numbers of an unknown kind", tensor=words.name, found=f"{words.dtype} {words.shape}", expected=expected,
                     try_=f"--rule '{words.name.rpartition('.')[0]}.*=copy'")  # fmt: skip


# What a conversion may move


def projections(
    stored: Stored, skip: Iterable[str], records: Sequence[Record], sizes: Mapping[str, int]
) -> tuple[list[Packed], dict[str, str]]:
    """Every tensor of packed numbers whose weight a record knows, as a projection of words; of others, fused, why they cannot be moved.

    A word stands for several rows that lie side by side: its layout is that of the weight with fewer of the fastest axis, under another
    name (`d` becomes `dw`), so that no layout of rows is taken for one of words.
    """
    ends = tuple(f".{word}" for word in PACKED)
    if not any(map(str.endswith, stored.tensors, repeat(ends))):
        return [], {}
    told = unpacked(stored, [*skip], strict=False)
    names: dict[str, list[str]] = {}
    for name, pack in told.packs.items():
        names.setdefault(pack.base, []).append(name)
    said = families.declared(formats.read_config(stored), {base: told.plain.tensors[base].shape for base in names}, records, sizes)
    found, unknown = list[Packed](), dict[str, str]()
    for one in from_records(said.projections, {}, []):
        for name in names[one.pieces[0].tensor]:
            made = _in_words(one, name.rpartition(".")[2], told.packs[name], stored)
            if isinstance(made, Packed):
                found.append(made)
            elif one.fused and made:
                unknown[name] = made
    return found, unknown


def _in_words(one: Packed, word: str, pack: Pack, stored: Stored) -> Packed | str | None:
    """One tensor (of each part) of a quantised projection; a reason, where words hold rows of several heads; None for what stays."""
    name, parts = _renamed(one.name, word), tuple((part, _renamed(tensor, word)) for part, tensor in one.parts)
    at = next((axis for axis, (of, _) in enumerate(pack.axes) if of == OUT), None)
    if at is None:
        if not one.fused or word not in ORDERS:
            return None
        layout = Layout(f"({'='.join(base_names(one.layout))} f)")
        rows = bind(layout, f=stored.tensors[name].shape[0])
        return replace(one, name=name, link=name, pieces=(Piece(name, layout),), layout=layout, sizes=rows, axis=0, parts=parts, rope=None)
    block = pack.axes[at][1]
    layouts = [_shorter(piece.layout, one.sizes, block) for piece in one.pieces]
    if reason := next((text for text in layouts if isinstance(text, str)), None):
        return reason
    pieces = tuple(Piece(_renamed(old.tensor, word), new) for old, new in zip(one.pieces, layouts, strict=True) if isinstance(new, Layout))
    layout = together([piece.layout for piece in pieces])
    known = {axis: size for axis, size in one.sizes.items() if axis in layout.axes}
    known |= {f"{axis}w": size // block for axis, size in one.sizes.items() if f"{axis}w" in layout.axes}
    return replace(one, name=name, link=name, pieces=pieces, layout=layout, sizes=bind(layout, **known), axis=at, parts=parts, rope=None)


def _renamed(tensor: str, word: str) -> str:
    return f"{tensor.removesuffix('.weight')}.{word}"


def _shorter(layout: Layout, sizes: Mapping[str, int], block: int) -> Layout | str:
    """The layout of words of `block` rows, or why whole words are no whole rows of one part of one head."""
    if block == 1:
        return layout
    if not _ends(layout.factors) or any(not path.dims or path.axes[-1] not in path.dims for path in layout.paths):
        return f"a word holds {block} numbers, and neighbours in {layout} are of several parts or heads"
    text = str(layout)
    for axis in dict.fromkeys(path.axes[-1] for path in layout.paths):
        if sizes[axis] % block:
            size = sizes[axis]
            return f"a word holds {block} numbers, and crosses a boundary: {axis}={size} = {block} * {size // block} + {size % block}"
        text = re.sub(rf"\b{axis}\b", f"{axis}w", text)
    return Layout(text)


def _ends(factors: Sequence[Factor]) -> bool:
    """Whether an axis is what changes fastest, and not the part."""
    last = factors[-1] if factors else None
    return isinstance(last, Axis) or (last is not None and all(_ends(branch.factors) for branch in last.branches))
