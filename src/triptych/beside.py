"""Tensors that change with a projection beside them: norms of dims that a rotary embedding turns, weights stored [in, out] as its own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from .axes import head_axes
from .errors import PlanError
from .formats import Tensor
from .layout import Axis, Branch, Factor, Layout, Sum, count
from .packed import Packed, Piece
from .pieces import alone, base_names, star, stem
from .rope import Rope, named, names_turned
from .sizes import bind
from .syntax import text_of

NORM, LINEAR = "norm", "linear"
"""Kinds of projections that are none, but whose rows are told in the same way."""
CONV1D = frozenset(["c_attn", "q_attn", "c_proj", "c_fc"])
"""Modules that store their weight [in, out] where one of them does (transformers 5.23, pytorch_utils.py, class Conv1D)."""
_NAME = re.compile(r"(?:(.*)\.)?(?:(?:attn_)?(q|k|query|key)_(?:layer)?norm|norm_(q|k)|(q|k)_ln)(?:\.norms\.[0-9]+)?", re.DOTALL)
"""The last part of it is that of a norm for each head (StableLM)."""


_KEYS = re.compile(r"k|key|wk|w_k|wkv|kv|kv_proj|k_proj|key_proj|to_k|to_kv|attn_k|key_value|linear_kv")
"""Modules that give keys."""


class Place(NamedTuple):
    """Where a norm stands, and whose dims it scales: those of q or k."""

    home: str
    part: str


def norm_at(name: str) -> Place | None:
    """Where a tensor of this name scales the dims of q or k before they are turned; None for a tensor that does not.

    >>> [norm_at(name) for name in ("attn.key_layernorm.weight", "q_norm.norms.3.weight", "input_layernorm.weight")]
    [Place(home='attn', part='k'), Place(home='', part='q'), None]
    """
    match = _NAME.fullmatch(stem(name)[0]) if "norm" in name or "_ln" in name else None
    return Place(match[1] or "", next(part for part in match.groups()[1:] if part)[0]) if match else None


def places_of(packed: Packed) -> list[Place]:
    """Where the norms of a projection stand."""
    return [Place(stem(packed.name)[0].rpartition(".")[0], part) for part in base_names(packed.layout)]


def check_both(turned: Sequence[Packed], known: Sequence[Packed], tensors: Mapping[str, Tensor]) -> None:
    """Pairs of q are turned where those of k are, or scores change. Raises PlanError for one of them beside another that nobody knows.

    Args: known: projections whose rotary order is known; tensors: those that are in no projection.
    """
    homes: dict[str, dict[str, set[str]]] = {}
    for packed in (*turned, *known):
        begin = stem(packed.name)[0]
        home = begin.rpartition(".")[0]
        for above in (home, home.removesuffix(".experts")):
            homes.setdefault(above, {}).setdefault(begin, set()).update(base_names(packed.layout))
    for packed in turned:
        home = stem(packed.name)[0].rpartition(".")[0].removesuffix(".experts")
        parts = set().union(*homes[home].values())
        if parts >= {"q", "k"} or len(homes[home]) > 1 or not (parts & {"q", "k"} or names_turned(packed.layout)):
            continue
        begin = f"{home}." if home else ""
        others = (name for name in tensors if name.startswith(begin) and _KEYS.fullmatch(stem(name)[0].removeprefix(begin)))
        other = "q, which no record tells" if "k" in parts else next(others, None)
        if other:
            raise PlanError("q and k would be turned apart", tensor=f"{packed.name}  ({packed.layout})", found=f"beside {other}",
                            try_="--layout 'NAME_GLOB=(k g c p)', or (k g p c), says how the pairs of the other lie")  # fmt: skip


def norms(projections: Iterable[Packed], tensors: Mapping[str, Tensor]) -> Iterator[Packed]:
    """The norms beside projections whose pairs are turned: over the dims of a head, or over those of all heads.

    Args: tensors: those that are in no projection.
    Raises PlanError for one that has another size.
    """
    found: dict[Place, list[str]] = {}
    for name in tensors:
        if place := norm_at(name):
            found.setdefault(place, []).append(name)
    for packed in projections if found else ():
        for place in places_of(packed):
            yield from (_norm(packed, place.part, tensors[name]) for name in found.pop(place, ()))


def _norm(packed: Packed, part: str, tensor: Tensor) -> Packed:
    layout = next(piece.layout for piece in packed.pieces if part in base_names(piece.layout))
    whole = named(alone(layout, part), Rope("half"))  # alone says d for (c p)
    heads = {axis for path in whole.paths for axis in head_axes(path.axes)}
    for layout in (Layout(text_of(_without(whole.factors, heads))), whole):
        if tensor.shape == (count(layout.factors, packed.sizes),):
            sizes = bind(layout, **{axis: packed.sizes[axis] for axis in layout.axes})
            source = f"beside {star(packed.name)}"
            return Packed(tensor.name, tensor.name, True, (Piece(tensor.name, layout),), layout, sizes, 0, (), packed.rope, NORM, source)
    raise PlanError("a norm of q or k has a size of its own", tensor=tensor.name, found=f"shape {tensor.shape}",
                    expected=f"the dims of {whole} with {packed.sizes.of(whole)}, of one head or of all",
                    try_=f"--layout '{star(tensor.name)}=LAYOUT' says how they lie")  # fmt: skip


def _without(factors: tuple[Factor, ...], gone: set[str]) -> tuple[Factor, ...]:
    """Factors without some axes."""

    def inner(branch: Branch) -> Branch:
        return replace(branch, factors=_without(branch.factors, gone))

    kept = (factor for factor in factors if not isinstance(factor, Axis) or factor.name not in gone)
    return tuple(Sum(tuple(map(inner, factor.branches))) if isinstance(factor, Sum) else factor for factor in kept)


def neighbours(projections: tuple[Packed, ...], tensors: Mapping[str, Tensor], axis: int) -> Iterator[Packed]:
    """The other weights of Conv1D modules, stored as the projections are: along `axis`."""
    taken = {piece.tensor for packed in projections for piece in packed.pieces}
    for name, tensor in tensors.items():
        begin, suffix = stem(name)
        if suffix == ".weight" and begin.rpartition(".")[2] in CONV1D and name not in taken and len(tensor.shape) == 2:
            layout = Layout("f")
            yield Packed(name, name, True, (Piece(name, layout),), layout, bind(layout, f=tensor.shape[axis]), axis, (), None, LINEAR,
                         "beside Conv1D projections")  # fmt: skip
