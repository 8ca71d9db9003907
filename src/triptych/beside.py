"""Tensors that change with a projection beside them: norms of dims that a rotary embedding turns, weights stored [in, out] as its own."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from .axes import head_axes
from .errors import PlanError
from .formats import Tensor
from .layout import Axis, Branch, Factor, Layout, Sum, count
from .packed import Packed, Piece
from .pieces import alone, base_names, star, stem
from .rope import names_pairs
from .sizes import bind
from .syntax import text_of

NORM, LINEAR = "norm", "linear"
"""Kinds of projections that are none, but whose rows are told in the same way."""
CONV1D = frozenset(["c_attn", "q_attn", "c_proj", "c_fc"])
"""Modules that store their weight [in, out] where one of them does (transformers 5.23, pytorch_utils.py, class Conv1D)."""
_NAME = re.compile(r"(?:attn_)?(q|k|query|key)_(?:layer)?norm|norm_(q|k)|(q|k)_ln")


def norm_part(module: str) -> str | None:
    """q or k when a module of this name scales its dims before they are turned.

    >>> [norm_part(name) for name in ("q_norm", "key_layernorm", "input_layernorm")]
    ['q', 'k', None]
    """
    match = _NAME.fullmatch(module)
    return next(part for part in match.groups() if part)[0] if match else None


def norms(projections: tuple[Packed, ...], tensors: Mapping[str, Tensor]) -> Iterator[Packed]:
    """The norms beside projections with a rotary order: over the dims of a head, or over those of all heads.

    Raises PlanError for one that has another size.
    """
    taken = {piece.tensor for packed in projections for piece in packed.pieces}
    found: dict[str, list[tuple[str, str]]] = {}
    for name in tensors:
        home, _, module = stem(name)[0].rpartition(".")
        if (part := norm_part(module)) and name not in taken:
            found.setdefault(home, []).append((part, name))
    for packed in projections if found else ():
        if packed.rope is None and not any(names_pairs(piece.layout) for piece in packed.pieces):
            continue
        home = stem(packed.name)[0].rpartition(".")[0]
        for part, name in found.get(home, ()):
            if part in base_names(packed.layout):
                found[home] = [one for one in found[home] if one[1] != name]
                yield _norm(packed, part, tensors[name])


def _norm(packed: Packed, part: str, tensor: Tensor) -> Packed:
    whole = alone(packed.layout, part)
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
