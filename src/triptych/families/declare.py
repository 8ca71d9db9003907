"""Config + tensor names and shapes -> which tensors are fused projections, how their rows lie, and which cannot be told."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

from ..errors import FormatError, TriptychError, cut
from ..layout import Layout
from ..sizes import Sizes, bind
from .match import Claim, Hit, Pattern, Shape, claims_of, ending_in, hits_of, index_of, tail_of
from .records import Record, entry_point_records, find
from .sized import applies, rotary, sizes_of, uses_layer

LOOKS_FUSED = frozenset(
    word
    for words in (
        "query_key_value key_value query_key c_attn att_proj attn_qkv W_pack qkv_linear kv_linear mixed_qkv qkv_opreact",
        "Wqkv wqkv w_qkv Wkv wkv qkv qkv_proj gqkv_proj qkvg_proj kv kv_proj to_qkv to_kv to_qkv_mlp_proj linear_qkv linear_kv",
        "in_proj_weight in_proj_bias in_proj_qkv in_proj_qkvz in_proj_ba queries_keys_values keys_values kv_a_proj_with_mqa kv_b_proj",
    )
    for word in words.split()
)
"""Last components of names under which some model stores several parts in one tensor; alone they tell no layout."""


@dataclass(frozen=True)
class Projection:
    """One attention (or gate/up, MLA, state-space) projection, weight or bias, of one layer.

    `name` is the fused tensor's name: in the file when `fused`, else the name by rule that it gets when joined. `layout` says how its rows
    lie; for separate tensors it is the layout that joining writes by default. `axis` is the packed axis of the fused tensor and of
    its parts. `parts` gives the tensors in the file when not `fused`, else the names by rule when split; a part that is
    zero has none. `rope` is "half", "interleaved", "partial half: first 16 of 64 dims" or None. `source` is the provenance. `ambiguous`:
    other layouts in which files of the same model exist.
    """

    name: str
    fused: bool
    layout: Layout
    sizes: Sizes
    axis: int
    parts: dict[str, str] = field(hash=False)
    rope: str | None
    source: str
    kind: str = "attention"
    ambiguous: tuple[Layout, ...] = ()


@dataclass(frozen=True)
class Declaration:
    """What the records say of a checkpoint. `doubts` are sentences, `unknown` the same for each tensor: name -> reason."""

    family: str | None
    projections: tuple[Projection, ...]
    doubts: tuple[str, ...]
    unknown: Mapping[str, str] = field(default_factory=dict, hash=False)


def declared(
    config: Mapping[str, Any] | None,
    shapes: Mapping[str, Shape],
    records: Sequence[Record] = (),
    sizes: Mapping[str, int] | None = None,
    family: str | None = None,
) -> Declaration:
    """What `config` and the tensor names say about every fused projection, and every set of separate ones, among `shapes`.

    Args: config: the content of config.json, or None. shapes: tensor name -> shape. records: the user's, asked first.
    sizes: sizes given by hand (`-s h=12`), for what the config does not say. family: a family named by hand, whatever the config says.
    Raises FormatError when the config is no table, or nobody knows the family.

    >>> said = declared({"model_type": "gpt_neox", "hidden_size": 12, "num_attention_heads": 2},
    ...                 {"gpt_neox.layers.0.attention.query_key_value.weight": (36, 12)})
    >>> said.family, str(said.projections[0].layout), str(said.projections[0].sizes)
    ('gpt_neox', 'h (q|k|v) d', 'h=2 d=6')
    """
    if config is not None and not isinstance(config, Mapping):
        raise FormatError("a config is a table", found=repr(config)[:60], expected="the content of config.json")
    named = find(family) if family is not None else ()
    claims = tuple(claims_of(config, (*records, *entry_point_records()), named))
    index = index_of(claims)
    tails = {**dict.fromkeys(_FUSED_TAILS, ()), **index}
    outcomes = _Outcomes(sizes or {}, shapes)
    found: dict[str, list[Hit]] = {}
    suspects = []
    for name in ending_in(shapes, tails):
        tail = tail_of(name)
        if tail in _FUSED_TAILS:
            suspects.append(name)
        if hits := hits_of(name, tails[tail], shapes):
            found[name] = hits
            if fused := [hit for hit in hits if not hit.part]:
                outcomes.fused(name, fused)
    outcomes.separate(found)
    for name in suspects:
        if name not in outcomes.told and name not in outcomes.unknown:
            outcomes.unknown[name] = _why_unknown(config, claims)
    outcomes.unknown.update(wrapped(shapes, index))
    known = [claim for claim in claims if claim.rank < 3]
    family = family or (known and cut(str((config or {}).get("model_type") or known[0].record.name))) or None
    return Declaration(family, tuple(outcomes.projections), _sentences(outcomes.unknown), outcomes.unknown)


_FUSED_TAILS = frozenset(f"{name}{end}" for name in LOOKS_FUSED for end in ("", ".weight", ".bias"))
_WRAPS = (
    "base_layer", "lora_B", "lora_magnitude_vector", "ia3_l", "vera_lambda_b", "hada_w1_a", "hada_w2_a", "lokr_w1", "lokr_w2", "oft_R",
    "boft_R", "parametrizations", "weight_orig", "weight_v", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module",
)  # fmt: skip
"""Components behind a module's name whose tensors have its rows, or mix them: PEFT's adapters, torch's parametrizations and wrappers."""


def wrapped(names: Collection[str], index: Mapping[str, Sequence[Pattern]] | None = None) -> dict[str, str]:
    """Tensors inside a wrapped module whose name looks fused, or that a record (`index`) names; with the reason why they are not known.

    >>> list(wrapped(["h.0.attn.c_attn.lora_A.weight", "h.0.attn.c_attn.lora_B.weight", "h.0.attn.q_proj.lora_B.weight"]))
    ['h.0.attn.c_attn.lora_B.weight']
    """
    text = "\n".join(names)
    words = tuple(word for word in _WRAPS if f".{word}" in text)
    out: dict[str, str] = {}
    for name in names if words else ():
        place = name.split(".")
        for at, (module, inside) in enumerate(itertools.pairwise(place), 1):
            if inside.startswith(words) and (module in LOOKS_FUSED or _is_named(place, at, index or {}, names)):
                out[name] = f"it is {inside} of {module}, whose name looks fused" if module in LOOKS_FUSED else f"it lies inside {inside}"
    return out


def _is_named(place: Sequence[str], at: int, index: Mapping[str, Sequence[Pattern]], names: Collection[str]) -> bool:
    """Whether a record names the tensor without the component `at`, or the weight of the module before it."""
    plain = ".".join((*place[:at], *place[at + 1 :])), ".".join((*place[:at], "weight"))
    return any(hits_of(name, index.get(tail_of(name), ()), names) for name in plain)


class _Sized(NamedTuple):
    """What an entry says at the sizes of a config: `rows` of each part that is not zero."""

    sizes: Sizes
    rope: str | None
    rows: dict[str, int]


class _Outcomes:
    """Gathers projections and doubts; sizes are computed once for all layers that agree."""

    def __init__(self, sizes: Mapping[str, int], shapes: Mapping[str, Shape]) -> None:
        self.given, self.shapes = sizes, shapes
        self.projections: list[Projection] = []
        self.unknown: dict[str, str] = {}
        self.told: set[str] = set()
        self.cache: dict[tuple[object, ...], _Sized | str | None] = {}

    def fused(self, name: str, hits: Sequence[Hit]) -> None:
        """One tensor that claims say is fused: the claim that fits, or why none does."""
        fits: list[tuple[Hit, Projection]] = []
        reasons: list[str] = []
        for hit in sorted(hits, key=lambda hit: hit.claim.rank):
            if fits and hit.claim.rank > fits[0][0].claim.rank:
                break
            told = self._fused(name, hit)
            if isinstance(told, str):
                reasons.append(told)
            elif told is not None:
                fits.append((hit, told))
        if fits:
            self._choose([name], fits)
        elif reasons:
            self.unknown[name] = reasons[0]
        elif hits and tail_of(name) in _FUSED_TAILS:
            self.unknown[name] = f"no variant of {hits[0].claim.record.name} has this tensor under the flags of the config"

    def _fused(self, name: str, hit: Hit) -> Projection | str | None:
        entry, shape = hit.claim.entry, self.shapes[name]
        axis = len(shape) - 1 if hit.tail else entry.axis
        if not 0 <= axis < len(shape):
            return f"its shape {shape} has no axis {entry.axis}, along which {hit.claim.record.name} packs its rows"
        layout = entry.bias_layout if hit.tail == 1 else entry.layout
        told = self._sized(hit, layout, shape[axis], shape)
        if told is None or isinstance(told, str):
            return told
        end = entry.tails[hit.tail]
        parts = {part: hit.home + file + end for part, file in entry.parts if part in told.rows}
        return Projection(name, True, layout, told.sizes, axis, parts, told.rope, entry.source, entry.kind, entry.ambiguous)

    def _choose(self, names: Sequence[str], fits: list[tuple[Hit, Projection]]) -> None:
        self.told.update(names)
        if len(fits) == 1:
            self.projections.append(fits[0][1])
            return
        different = {(fit.layout, fit.sizes, fit.axis): (hit, fit) for hit, fit in reversed(fits)}
        if len(different) == 1:
            self.projections.append(next(iter(different.values()))[1])
            return
        listed = " or ".join(
            f"{fit.layout} with {fit.sizes.of(fit.layout)} ({hit.claim.record.name})" for hit, fit in reversed(different.values())
        )
        self.unknown.update(dict.fromkeys(names, f"more than one record fits: {listed}"))

    def _sized(self, hit: Hit, layout: Layout, rows: int | None, shape: Shape) -> _Sized | str | None:
        """Sizes and rotary order, or the reason why there are none, or None when the guard says that this entry is not meant."""
        claim = hit.claim
        numbers = hit.numbers if uses_layer(claim.entry) else ()
        key = (id(claim.entry), id(claim.view), numbers, layout, rows)
        if key not in self.cache:
            self.cache[key] = self._compute(claim, dict(hit.numbers), layout, rows, shape)
        return self.cache[key]

    def _compute(self, claim: Claim, numbers: dict[str, int], layout: Layout, rows: int | None, shape: Shape) -> Any:
        try:
            if not applies(claim.entry, claim.view, numbers):
                return None
            sizes = sizes_of(claim.entry, claim.view, numbers, self.given)
            bound = bind(layout, rows=rows, **sizes)
            counts = {name: math.prod(map(bound.__getitem__, path.axes)) for path in layout.paths if not path.zero for name in path.names}
            return _Sized(bound, rotary(claim.entry, claim.view, bound, numbers), counts)
        except TriptychError as error:
            return _reason(error, claim, shape)

    def separate(self, found: Mapping[str, Sequence[Hit]]) -> None:
        """Sets of separate tensors that one entry names: a projection each, when they are complete and their sizes fit."""
        groups: dict[tuple[str, str, str], dict[int, tuple[Hit, dict[str, str]]]] = {}
        for name, hits in found.items():
            for hit in hits:
                if hit.part and name not in self.told:
                    entry = hit.claim.entry
                    group = groups.setdefault((hit.home, entry.name, entry.tails[hit.tail]), {})
                    group.setdefault(id(hit.claim), (hit, {}))[1][hit.part] = name
        misfits: list[tuple[str, list[str], str]] = []
        fitting: set[str] = set()
        for (home, name, _), candidates in groups.items():
            best = min(hit.claim.rank for hit, _ in candidates.values())
            chosen = [(hit, names) for hit, names in candidates.values() if hit.claim.rank == best]
            told = [(hit, self._joined(hit, names)) for hit, names in chosen]
            tensors = list(dict.fromkeys(name for _, names in chosen for name in names.values()))
            place = _place(home + name)
            if fits := [(hit, fit) for hit, fit in told if isinstance(fit, Projection)]:
                self._choose(tensors, fits)
                fitting.add(place)
            elif reasons := [fit for hit, fit in told if isinstance(fit, str) and not hit.claim.entry.on_disk]:
                misfits.append((place, tensors, reasons[0]))
        for place, tensors, reason in misfits:
            if place in fitting or not fitting:  # elsewhere it is another module, which no record claims
                self.unknown.update(dict.fromkeys(tensors, reason))

    def _joined(self, hit: Hit, names: dict[str, str]) -> Projection | str | None:
        entry = hit.claim.entry
        fused = hit.home + entry.name + entry.tails[hit.tail]
        absent = tuple(part for part, _ in entry.parts if part not in names)
        if absent and hit.tail == 0:
            return f"{' and '.join(absent)} of the same projection {'is' if len(absent) == 1 else 'are'} missing"
        layout = _with_zeros(entry.layout, absent)
        shapes = {part: self.shapes[name] for part, name in names.items()}
        axis = 0 if hit.tail else entry.axis
        if any(axis >= len(shape) for shape in shapes.values()):
            return f"a shape {next(iter(shapes.values()))} has no axis {axis}"
        first = next(iter(shapes.values()))
        told = self._sized(hit, layout, None, first)
        if isinstance(told, str) and not absent:  # one size may follow from the rows
            told = self._sized(hit, layout, sum({names[part]: shape[axis] for part, shape in shapes.items()}.values()), first)
        if told is None or isinstance(told, str):
            return told
        if missing := [part for part in told.rows if part not in names]:  # a bias of k=v, which cannot be called zero for one alone
            return f"{' and '.join(missing)} of the same projection {'is' if len(missing) == 1 else 'are'} missing"
        for part, shape in shapes.items():
            if shape[axis] != told.rows[part]:
                expected = f"{hit.claim.record.name} with {told.sizes.of(layout)} needs {told.rows[part]}"
                return f"{part} has {shape[axis]} rows, and {expected}"
        parts = {part: names[part] for part, _ in entry.parts if part in names}
        return Projection(fused, False, layout, told.sizes, axis, parts, told.rope, entry.source, entry.kind)


@lru_cache(maxsize=256)
def _with_zeros(layout: Layout, absent: tuple[str, ...]) -> Layout:
    text = str(layout)
    for part in absent:
        text = re.sub(rf"(?<![\w=]){part}(?![\w=])", f"{part}=0", text, count=1)
    return Layout(text)


def _reason(error: TriptychError, claim: Claim, shape: Shape) -> str:
    """One sentence of an error."""
    if error.what == "rows do not fill the layout":
        return f"shape {shape} does not fit {claim.record.name}: {error.fields.get('layout')}, found {error.fields.get('found')}"
    details = ", ".join(f"{error.fields[key]}" for key in ("found", "equation") if key in error.fields)
    return f"{claim.record.name}: {error.what}" + (f" ({details})" if details else "")


def _why_unknown(config: Mapping[str, Any] | None, claims: Sequence[Claim]) -> str:
    if config is None:
        return "its name looks fused, and no config.json says which family it is of"
    kind = config.get("model_type")
    if not isinstance(kind, str):
        return "its name looks fused, and the config has no model_type"
    if not any(claim.rank < 3 for claim in claims):
        return f"its name looks fused, and no record knows model_type {cut(kind)!r}"
    return f"its name looks fused, and the record of {cut(kind)!r} has no such tensor"


def _sentences(unknown: Mapping[str, str]) -> tuple[str, ...]:
    """One sentence for each reason, tensors that differ only in numbers taken together."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, reason in unknown.items():
        groups.setdefault((_place(name[: len(name) - len(tail_of(name))]), reason), []).append(name)
    return tuple(
        f"{names[0]}{f' and {len(names) - 1} like it' if len(names) > 1 else ''}: {reason}" for (_, reason), names in groups.items()
    )


def _place(name: str) -> str:
    """A name without its numbers."""
    return re.sub(r"\d+", "#", name)
