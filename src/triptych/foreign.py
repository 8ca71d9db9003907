"""Ranks that others wrote, made wholes: nothing in them says how they were divided, and nothing is guessed.

What every tensor is as a whole follows from the model's config and from how tensors of its name are divided; then each rank must hold
exactly what the whole gives it. In vLLM's files q, k and v of a rank lie one after the other, whatever the model's own files have
(vllm==0.33.0:vllm/model_executor/layers/linear.py:1282-1290), and gate and up (836-839); so do gate and up of a rank of Megatron-LM
(d98e8a64:megatron/core/transformer/mlp.py:324-332).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from . import formats, parallel
from .checkpoint import known
from .errors import PlanError, TriptychError
from .families import Entry, Record, load_records, lookup
from .families.config import towers
from .families.match import Hit, Pattern, claims_of, hits_of, index_of, tail_of
from .families.records import parse_records
from .families.sized import applies, sizes_of
from .formats import Tensor
from .layout import Layout, count
from .packed import BY_RECORD, Packed
from .packed import given as given_layouts
from .parallel import BY_HAND, COLUMN, COPY, ROW, STACKED, VOCAB
from .pieces import alone, star
from .quantised import Quantised, block_of
from .rank_sets import Found
from .sharding import HEADS, POLICIES, Cut, Ranks, along, has_heads, held
from .shards import Sharded, Whole, check_held
from .sizes import bind
from .whole import SCALES, Deciding

ENGINE = "vllm==0.33.0:vllm/model_executor/layers/linear.py"
AT_RUN_TIME = ("internlm2",)
"""Types whose fused rows vLLM takes for q|k|v and puts in order while it computes (models/internlm2.py:158-180)."""
MEGATRON = "NVIDIA/Megatron-LM@d98e8a64:megatron/core/transformer/mlp.py:324-332"
WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
"""Keys of a config that say how wide its MLP is: a rank that holds so much holds all."""
_MLP = """
[[family]]
source = "{source}"
[[family.tensor]]
fused = {names}
layout = "{layout}"
kind = "mlp"
"""


class Given(NamedTuple):
    """What a person says of ranks without a table. `kv`, `pad`: as in `Ranks`; `padded`: that the vocabulary has padding, however much."""

    layouts: Mapping[str, str]
    rules: Mapping[str, str]
    records: str | Path | None
    sizes: Mapping[str, int]
    kv: str | None = None
    pad: int | None = None
    padded: bool = False


def wholes_of_ranks(found: Found, given: Given) -> Sharded:
    """The ranks with what every tensor is as a whole. Raises PlanError where nothing says it, FormatError where a shape does not fit."""
    model, notes = found.model, [*found.stored[0].notes]
    config = formats.read_config(model) or {}
    records = list(load_records(given.records)) if given.records else []
    records += _as_engine(config) if found.engine else _as_megatron(config) if model.settings else ()
    grown = _Growing(found, given, config, records)
    plain = replace(model, tensors={name: grown.whole(tensor) for name, tensor in model.tensors.items()})
    checkpoint = known(plain, given.layouts, given.sizes, records=records)
    _check_sure(checkpoint.projections, found.engine)
    wholes = tuple(Deciding(checkpoint, given.rules, plain, Quantised(plain, {}, {}), found.engine).all())
    notes += [*checkpoint.notes, *grown.notes]
    ranks = _ranks(wholes, found, given, grown.padded)
    return Sharded(found.path, ranks, found.stored, wholes, tuple(dict.fromkeys(notes)), found.homes, model, found.beside)


def _check_sure(projections: Sequence[Packed], engine: bool) -> None:
    """Nothing is guessed: a record that knows two orders, or one that speaks of the model's own files where an engine wrote these."""
    for one in projections:
        by_hand = f"--layout '{star(one.name)}=LAYOUT' says it"
        if one.ambiguous:
            orders = " or ".join(map(str, (one.layout, *one.ambiguous)))
            raise PlanError("files of this model exist in more than one order", tensor=one.name, found=f"ranks of {orders}", try_=by_hand)
        if engine and one.fused and one.source.startswith(BY_RECORD) and not one.source.startswith(f"{BY_RECORD} {ENGINE}"):
            raise PlanError("no record says how vLLM holds this tensor", tensor=one.name, found=f"{one.layout} in the model's own files",
                            try_=by_hand)  # fmt: skip


def _ranks(wholes: Sequence[Whole], found: Found, given: Given, padded: int | None) -> Ranks:
    """The policy that the shapes of all ranks follow. Raises FormatError when they follow none, or not the one that is given."""
    problem: TriptychError | None = None
    for kv in [given.kv] if given.kv else POLICIES:
        ranks = Ranks(len(found.stored), kv, padded or given.pad or 1)
        try:
            for whole in wholes:
                check_held(whole, found.stored, ranks, "the whole gives it")
            return ranks
        except TriptychError as error:
            problem = problem or error
    assert problem is not None
    fields = dict(problem.fields)
    try_ = fields.pop("try", "--rule 'NAME_GLOB=copy', column, row or vocab says how a tensor is divided")
    raise type(problem)(problem.what, **fields, try_=try_) from None


def _as_engine(config: Mapping[str, Any]) -> Iterator[Record]:
    """The records of the model with its projections as vLLM's layers hold them: q|k|v, whatever the model's own files have."""
    yield from _mlp(["gate_up_proj"], "(gate|up) f", f"{ENGINE}:836-839")
    for kind in dict.fromkeys(view.type for view in towers(config)):
        for record in lookup(kind) if kind not in AT_RUN_TIME else ():
            entries = tuple(entry for one in record.entries if (entry := _merged(one)))
            yield replace(record, types=(kind,), entries=entries)


def _mlp(names: Sequence[str], layout: str, source: str) -> tuple[Record, ...]:
    return parse_records(_MLP.format(names=json.dumps(names), layout=layout, source=source), "foreign.py")


def _as_megatron(config: Mapping[str, Any]) -> Iterator[Record]:
    """The first layer of Megatron's MLP: gate and up in one tensor where its arguments say that it is gated."""
    gated = config.get("swiglu", config.get("gated_linear_unit"))
    if isinstance(gated, bool):
        yield from _mlp(["mlp.linear_fc1", "mlp.dense_h_to_4h"], "(gate|up) f" if gated else "(up f)", MEGATRON)


def _merged(entry: Entry) -> Entry | None:
    """An entry of separate or fused q, k, v as one of q|k|v rows; of others only latent attention, which vLLM takes as it is."""
    if entry.kind != "attention" or sorted(path.names for path in entry.layout.paths if not path.zero) != [("k",), ("q",), ("v",)]:
        return replace(entry, source=f"{ENGINE}:589-606; {entry.source}") if entry.kind == "mla" else None
    groups = "g" if "g" in entry.layout.axes or any(axis == "g" for axis, _ in entry.sizes) else "h"
    dims = {path.names[0]: " ".join(axis for axis in path.axes if axis not in path.heads) for path in entry.layout.paths}
    layout = Layout(f"q h {dims['q']}|k {groups} {dims['k']}|v {groups} {dims['v']}")
    return replace(
        entry,
        source=f"{ENGINE}:1282-1290; {entry.source}",
        on_disk=True,
        apart=False,
        layout=layout,
        bias_layout=layout,
        axis=0,
        beside=(),
        ambiguous=(),
    )


class _Growing:
    """From the shape on a rank to that of the whole: sizes from the config where it has them, else as many times as there are ranks."""

    def __init__(self, found: Found, given: Given, config: Mapping[str, Any], records: Sequence[Record]) -> None:
        self.world, self.given, self.config, self.tensors = len(found.stored), given, config, found.model.tensors
        self.types = frozenset() if found.engine else frozenset(view.type for view in towers(config))
        self.patterns: Mapping[str, Sequence[Pattern]] = index_of(tuple(claims_of(config, records, ())))
        self.shapes = {name: tensor.shape for name, tensor in self.tensors.items()}
        self.roles = parallel.by_hand(given.rules, self.tensors)
        self.hand = given_layouts(given.layouts, self.tensors)
        several = self.world > 1
        self.widths = {size for view in towers(config) for key in WIDTHS if several and type(size := view.get(key)) is int}
        self.padded: int | None = None
        self.notes: list[str] = []

    def whole(self, tensor: Tensor) -> Tensor:
        axis, rows = self._axis(tensor) or (0, None)
        shape = tensor.shape
        return tensor if rows is None else tensor._replace(shape=(*shape[:axis], rows, *shape[axis + 1 :]))

    def _axis(self, tensor: Tensor) -> tuple[int, int] | None:
        """The axis that is divided, and its rows in the whole; None for a tensor that every rank holds whole, or nobody knows."""
        name, shape = tensor.name, tensor.shape
        if name not in self.roles:
            for tail in SCALES:
                if name.endswith(tail) and name.removesuffix(tail) in self.tensors:
                    return self._scale(tensor, self.tensors[name.removesuffix(tail)])
            if name in self.hand:
                return self._by_hand(tensor)
            if hits := hits_of(name, self.patterns.get(tail_of(name), ()), self.shapes):
                return self._by_record(tensor, hits)
        role = self.roles.get(name) or parallel.by_name(name, shape, self.types)
        axis = None if role is None else self._stacked(name) if role.role == STACKED else role.axis
        if role is None or role.role == COPY or axis is None or axis >= len(shape):
            return None
        if shape[axis] in self.widths and role.role in (COLUMN, ROW) and role.source != BY_HAND and "att" not in name:
            raise PlanError("every rank seems to hold all of a tensor", tensor=name, found=f"{shape}; {shape[axis]}, as the config says",
                            expected=f"{role.role} along axis {axis}, a part on each of {self.world} ranks",
                            try_=f"--rule '{star(name)}=copy', or {role.role} if it is divided")  # fmt: skip
        return axis, self._vocabulary(tensor, axis) if role.role == VOCAB else self.world * shape[axis]

    def _stacked(self, name: str) -> int | None:
        beside = name.replace("down_proj", "gate_up_proj")
        hits = hits_of(beside, self.patterns.get(tail_of(beside), ()), self.shapes)
        return 3 - hits[0].claim.entry.axis if hits else None

    def _scale(self, tensor: Tensor, base: Tensor) -> tuple[int, int] | None:
        axis, rows = self._axis(base) or (0, None)
        if rows is None or axis >= len(tensor.shape):
            return None
        block = block_of(self.config, axis - len(base.shape))
        if block and len(tensor.shape) == len(base.shape):
            return axis, -(-rows // block)
        return None if tensor.shape[axis] == 1 else (axis, tensor.shape[axis] * rows // base.shape[axis])

    def _by_hand(self, tensor: Tensor) -> tuple[int, int]:
        layout, at = self.hand[tensor.name]
        axis = at or 0
        return axis, self._rows(layout, self.given.sizes) or self.world * tensor.shape[axis]

    def _by_record(self, tensor: Tensor, hits: Sequence[Hit]) -> tuple[int, int]:
        """Of all records that speak of the tensor the first that fits what the ranks hold, else the first."""
        told: list[tuple[int, int]] = []
        best = min(hit.claim.rank for hit in hits)
        for hit in (hit for hit in hits if hit.claim.rank == best):
            entry, numbers = hit.claim.entry, dict(hit.numbers)
            layout = alone(entry.layout, hit.part) if hit.part else entry.bias_layout if hit.tail == 1 else entry.layout
            axis = len(tensor.shape) - 1 if hit.tail and not hit.part else 0 if hit.tail else entry.axis
            if axis >= len(tensor.shape):
                continue
            try:
                if not applies(entry, hit.claim.view, numbers):
                    continue
                sizes = sizes_of(entry, hit.claim.view, numbers, self.given.sizes)
            except TriptychError:
                sizes = {}
            own = tensor.shape[axis]
            rows = self._rows(layout, sizes)
            if rows is None:
                rows = self.world * own if has_heads(layout) or entry.kind == "mlp" else own
            elif self._fits(layout, sizes, rows, own):
                return axis, rows
            told.append((axis, rows))
        return told[0] if told else (0, tensor.shape[0])

    def _rows(self, layout: Layout, sizes: Mapping[str, int]) -> int | None:
        """Rows of a whole, where the sizes tell them."""
        try:
            return count(layout.factors, bind(layout, **sizes))
        except TriptychError:
            return None

    def _fits(self, layout: Layout, sizes: Mapping[str, int], rows: int, own: int) -> bool:
        if not has_heads(layout):
            return rows == own
        cut = along(HEADS, 0, layout, bind(layout, **sizes))
        return any(_held(cut, Ranks(self.world, kv)) == own for kv in POLICIES)

    def _vocabulary(self, tensor: Tensor, axis: int) -> int:
        """Rows without the padding, which only config and person know."""
        there, pad = self.world * tensor.shape[axis], self.given.pad
        told = next((size for view in towers(self.config) if type(size := view.get("vocab_size")) is int and size > 0), None)
        if told is None:
            return self._padded(tensor, there)
        if there == told and pad is None:
            return told
        if self.given.padded and there > told:
            self.padded = there
            return told
        if pad is None and there > told:
            raise PlanError("the vocabulary of the ranks is padded", tensor=tensor.name, expected=f"{told} rows, as the config says",
                            found=f"{there} in all ranks together", try_="--pad-vocab-to N says to a multiple of what (64 in vLLM)\n"
                            f"--rule '{star(tensor.name)}=column' keeps all rows")  # fmt: skip
        if there != -(-told // (pad or 1)) * (pad or 1):
            raise PlanError("the vocabulary of the ranks has another size", tensor=tensor.name, found=f"{there} rows in all ranks together",
                            expected=f"{told} rows, as the config says" + (f", padded to a multiple of {pad}" if pad else ""),
                            try_=f"--rule '{star(tensor.name)}=copy' if every rank holds all of it")  # fmt: skip
        self.padded = pad
        return told

    def _padded(self, tensor: Tensor, there: int) -> int:
        """All rows, where Megatron's arguments say that they are so many with the padding, of which they do not say where it begins."""
        if self.config.get("padded_vocab_size") != there:
            raise PlanError("nothing says how large the vocabulary is", tensor=tensor.name, found=f"{there} rows in all ranks together",
                            expected="vocab_size in a config.json beside the ranks",
                            try_=f"--rule '{star(tensor.name)}=column' takes all rows, row or copy if it is divided otherwise")  # fmt: skip
        self.notes.append("the vocabulary keeps its padding: where that begins nothing says")
        return there


def _held(cut: Cut, ranks: Ranks) -> int | None:
    try:
        return len(held(cut, ranks, 0))
    except PlanError:
        return None
