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

import math
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import repeat
from typing import Any, NamedTuple

from . import families, formats
from .errors import PlanError
from .families import Projection, Record
from .formats import BITS, Stored, Tensor
from .layout import Axis, Factor, Layout
from .packed import BY_RECORD, BY_STAMP, Packed, Piece, from_records
from .pieces import WORDS, alone, base_names, stem
from .sizes import Sizes, bind

OUT, IN = 0, 1
"""Axes of the weight as nn.Linear has it."""
PACKED = {"qweight": ("qzeros", "scales", "g_idx"), "weight_packed": ("weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape")}
"""Tensor of packed numbers -> those that go with it."""
GROUPED = ("scales", "qzeros", "weight_scale", "weight_zero_point")
"""Those with an element for each group of inputs."""
ORDERS = ("g_idx", "weight_g_idx")
"""For every input its group: written by GPTQ, and needed where the inputs were sorted by their activation."""
SCALED = ("weight_scale", "weight_scale_inv", "weight_zero_point")
"""Beside a plain weight of few bits: one element for each of its rows, or for a block of them."""
BLOCK = 128
"""Rows and columns of one FP8 scale, where the config does not say."""


class Pack(NamedTuple):
    """A stored tensor of the weight `base`: for each of its axes, the axis of the weight and how many rows of it one element holds."""

    base: str
    axes: tuple[tuple[int, int], ...]


class Quantised(NamedTuple):
    """A checkpoint as if its packed weights were plain ones; stored tensor -> what it is; weights whose inputs are sorted, or may be."""

    plain: Stored
    packs: Mapping[str, Pack]
    sorted: Mapping[str, str]


def unpacked(stored: Stored, rules: Iterable[str], strict: bool = True, skip: Container[str] = ()) -> Quantised:
    """The weights behind the packed numbers of a checkpoint, but for those that a glob of `rules` speaks of, or that are to `skip`.

    Raises PlanError for packed numbers that are of no kind known here; without `strict` those stay what they are.
    """
    packs: dict[str, Pack] = {}
    tensors: dict[str, Tensor] = {}
    sorted_: dict[str, str] = {}
    told: Mapping[str, Any] | None = None
    for name, tensor in stored.tensors.items():
        stem, _, word = name.rpartition(".")
        if word not in PACKED or name in skip or any(fnmatchcase(name, glob) for glob in rules):
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
    every_bits = {bits for one in _schemes(told) if type(bits := one.get("num_bits")) is int}
    scales = beside.get("weight_scale")
    if len(every_bits) != 1 or not every_bits <= {2, 4, 8} or scales is None or len(scales.shape) != 2 or len(words.shape) != 2:
        raise _of_no_kind(words, "weight_scale [out, groups], and one num_bits of 2, 4 or 8 in config_groups")
    pack = BITS.get(words.dtype, 0) // every_bits.pop()
    if not pack:
        raise _of_no_kind(words, "words of at least one number")
    out, inputs = words.shape[0], words.shape[1] * pack
    group = _group(scales, scales.shape[1], inputs, _only(one.get("group_size") for one in _schemes(told)))
    every: _Axes = {"weight_packed": ((OUT, 1), (IN, pack)), "weight_scale": ((OUT, 1), (IN, group)), "weight_shape": (),
                    "weight_zero_point": ((OUT, pack), (IN, group)), "weight_g_idx": ((IN, 1),)}  # fmt: skip
    _check((out, inputs), every, {"weight_packed": words, **beside})
    return (out, inputs), every


def _schemes(told: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What compressed-tensors says of weights, of each group of modules."""
    groups = told.get("config_groups")
    weights = [one.get("weights") for one in groups.values() if isinstance(one, Mapping)] if isinstance(groups, Mapping) else []
    return [one for one in weights if isinstance(one, Mapping)]


def _only(values: Iterable[object]) -> object:
    """What all say alike, else None."""
    first, *more = [*values] or [None]
    return first if all(value == first for value in more) else None


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
    stored: Stored, skip: Container[str], rules: Iterable[str], records: Sequence[Record], sizes: Mapping[str, int]
) -> tuple[list[Packed], dict[str, str]]:
    """Every tensor of packed numbers whose weight a record knows, as a projection of words; of others, fused, why they cannot be moved.

    Tensors to `skip`, or that a glob of `rules` speaks of, are told by others.

    A word stands for several rows that lie side by side: its layout is that of the weight with fewer of the fastest axis, under another
    name (`d` becomes `dw`), so that no layout of rows is taken for one of words.
    """
    ends = tuple(f".{word}" for word in PACKED)
    if not any(map(str.endswith, stored.tensors, repeat(ends))):
        return [], {}
    told = unpacked(stored, rules, strict=False, skip=skip)
    names: dict[str, list[str]] = {}
    for name, pack in told.packs.items():
        names.setdefault(pack.base, []).append(name.rpartition(".")[2])
    said = families.declared(formats.read_config(stored), {base: told.plain.tensors[base].shape for base in names}, records, sizes)
    found, unknown = list[Packed](), dict[str, str]()
    for one in from_records(said.projections, {}, []):
        for word in names[one.pieces[0].tensor]:
            packs = [told.packs.get(_renamed(piece.tensor, word)) for piece in one.pieces]
            made = _in_words(one, word, packs[0], stored) if packs[0] and len({pack and pack.axes for pack in packs}) == 1 else None
            if isinstance(made, Packed):
                found.append(made)
            elif one.fused and made:
                unknown[_renamed(one.name, word)] = made
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
    return _in_blocks(one, word, at, pack.axes[at][1])


def _in_blocks(one: Packed, word: str, at: int, block: int) -> Packed | str:
    """A projection with one element for `block` rows of a weight along axis `at`; a reason, where those are of several heads."""
    name, parts = _renamed(one.name, word), tuple((part, _renamed(tensor, word)) for part, tensor in one.parts)
    layout, layouts = _shorter(one.layout, one.sizes, block), [_shorter(piece.layout, one.sizes, block) for piece in one.pieces]
    if isinstance(layout, str):
        return layout
    if reason := next((text for text in layouts if isinstance(text, str)), None):
        return reason
    pieces = tuple(Piece(_renamed(old.tensor, word), new) for old, new in zip(one.pieces, layouts, strict=True) if isinstance(new, Layout))
    sizes = _sizes([layout, *(piece.layout for piece in pieces)], one.sizes, block)
    return replace(one, name=name, link=name, pieces=pieces, layout=layout, sizes=sizes, axis=at, parts=parts, rope=None)


def _sizes(layouts: Sequence[Layout], sizes: Mapping[str, int], block: int) -> Sizes:
    """The sizes of layouts of words, by those of the weight."""
    used = {axis for layout in layouts for axis in layout.axes}
    known = {axis: size for axis, size in sizes.items() if axis in used}
    return bind(*layouts, **known, **{f"{axis}w": size // block for axis, size in sizes.items() if f"{axis}w" in used})


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


# Scales beside plain weights


def scales(found: Iterable[Packed], stored: Stored, skip: Container[str]) -> Iterator[Packed]:
    """What scales the weights that a record knows, one element for each row or for a block of rows, as projections of the same order.

    Tensors to `skip` are told by others. Where a block is no whole part of a head its scales are none, and so the weight has to stay.
    """
    config = formats.read_config(stored) or {}
    for one in found:
        if one.axis or not one.source.startswith(BY_RECORD) or not one.name.endswith(".weight"):
            continue
        for word in SCALED:
            names = [_renamed(piece.tensor, word) for piece in one.pieces]
            if not all(name in stored.tensors and name not in skip for name in names):
                continue
            weights = [stored.tensors[piece.tensor] for piece in one.pieces]
            blocks = {_rows_of(weight, stored.tensors[name], config) for weight, name in zip(weights, names, strict=True)}
            block = blocks.pop()
            made = _in_blocks(one, word, 0, block) if block and not blocks else None
            if isinstance(made, Packed):
                yield replace(made, rope=one.rope if block == 1 else None, ambiguous=())  # the weight is asked, and stops what it stops


def _rows_of(weight: Tensor, scale: Tensor, config: Mapping[str, Any]) -> int | None:
    """How many rows of a weight one element speaks of; None where it speaks of all, or nothing says it."""
    if len(weight.shape) != 2 or len(scale.shape) not in (1, 2) or math.prod(scale.shape) <= 1:
        return None
    if scale.shape[0] == weight.shape[0]:
        return 1
    block = block_of(config, -2) or BLOCK
    return block if len(scale.shape) == 2 and scale.shape[0] == -(-weight.shape[0] // block) else None


def block_of(config: Mapping[str, Any], axis: int) -> int | None:
    """Rows (axis -2) or columns (axis -1) that share a FP8 scale, as the config says."""
    told = _of_config(config)
    sizes = told.get("weight_block_size") or _only(one.get("block_structure") for one in _schemes(told))
    if isinstance(sizes, list) and len(sizes) == 2 and all(type(size) is int and 0 < size < 1 << 20 for size in sizes):
        return int(sizes[axis])
    return None


def group_of(config: Mapping[str, Any], weight: Tensor) -> int | None:
    """Columns of a weight as it is stored that share a scale, as the config says; a byte may hold two numbers."""
    told = _of_config(config)
    size = told.get("group_size") or _only(one.get("group_size") for one in _schemes(told))
    if type(size) is not int or size < 2:
        return None
    return size // 2 if weight.dtype == "U8" else size


def _of_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    told = config.get("quantization_config")
    return told if isinstance(told, Mapping) else {}


def by_rows(one: Packed) -> bool:
    """Whether a projection of packed numbers or scales has one element for each row, not for several."""
    return not any(len(axis) > 1 and axis.endswith("w") for axis in one.layout.axes) and not one.name.endswith(ORDERS)


# Joined again


def as_usual(
    found: list[Packed],
    stored: Stored,
    declared: Callable[[Mapping[str, tuple[int, ...]]], families.Declaration],
    joining_as: Callable[[Projection, Packed], Packed],
) -> list[Packed]:
    """Parts that a conversion left apart are joined by default in the order that the record gives the rows of their weight.

    `joining_as` does that where there is one element for each row, as for the weight.
    """
    apart = [one for one in found if one.source == BY_STAMP and not one.fused and one.name.endswith(WORDS)]
    if not apart:
        return found
    told, config = unpacked(stored, (), strict=False), formats.read_config(stored) or {}
    shapes: dict[str, tuple[int, ...]] = {}
    blocks: dict[str, int] = {}
    for one in apart:
        pairs = [_weight_of(piece.tensor, told, config) for piece in one.pieces]
        known = [(weight, block) for weight, block in filter(None, pairs) if block]
        if len(known) == len(pairs) and len({block for _, block in known}) == 1:
            shapes[f"{stem(one.name)[0]}.weight"] = (sum(weight.shape[0] for weight, _ in known), known[0][0].shape[1])
            blocks[one.name] = known[0][1]
    usual = {record.name: record for record in declared(shapes).projections if record.fused and not record.ambiguous}
    records = {name: usual.get(f"{stem(name)[0]}.weight") for name in blocks}

    def joined(one: Packed) -> Packed:
        record, block = records.get(one.name), blocks.get(one.name, 1)
        if record is None:
            return one
        return _joining_as(record, one, block) if block > 1 or one.axis else joining_as(record, one)

    return [joined(one) for one in found]


def _weight_of(name: str, told: Quantised, config: Mapping[str, Any]) -> tuple[Tensor, int | None] | None:
    """The weight that a tensor of words or scales belongs to, and how many of its rows one element speaks of."""
    if pack := told.packs.get(name):
        return told.plain.tensors[pack.base], next((block for of, block in pack.axes if of == OUT), None)
    weight = told.plain.tensors.get(f"{stem(name)[0]}.weight")
    return (weight, _rows_of(weight, told.plain.tensors[name], config)) if weight else None


def _joining_as(record: Projection, one: Packed, block: int) -> Packed:
    layout = _shorter(record.layout, record.sizes, block)
    own = {base_names(piece.layout)[0]: piece.layout for piece in one.pieces}
    if isinstance(layout, str) or own != {part: alone(layout, part) for part in base_names(layout)}:
        return one
    return replace(one, layout=layout, sizes=_sizes([layout, *own.values()], record.sizes, block))
