"""What every operation of torch does to the elements it is given: one table, from which `shadow` and `follow` both work.

Operations are named as in their schema, without namespace, overload and the underscore of those that work in place.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch

Effect = Literal[
    "moves", "same", "copies", "erases", "multiplies", "convolves", "reduces", "spreads", "softmax", "attends", "pointwise", "?"
]
"""moves: the elements of some arguments go elsewhere, unchanged. same: a copy, cast or dropout. copies: `copy_`. erases: constants and
random numbers. multiplies: a @ b [+ bias]. reduces: axes go away. spreads: the shape stays, whole axes are worked on."""

MOVES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("cat", "stack"), ("tensors",)),
    **dict.fromkeys(("index", "_unsafe_index", "index_select", "gather", "take", "flip", "roll", "repeat", "masked_select"), ("self",)),
    **dict.fromkeys(("tril", "triu", "im2col", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "diag_embed", "rot90"), ("self",)),
    **{f"{kind}_pad{n}d": ("self",) for kind in ("reflection", "replication") for n in (1, 2, 3)},
    **dict.fromkeys(("constant_pad_nd", "masked_fill", "index_fill"), ("self", "value")),
    **dict.fromkeys(("slice_scatter", "select_scatter", "diagonal_scatter", "as_strided_scatter"), ("self", "src")),
    **dict.fromkeys(("index_put", "_unsafe_index_put", "_index_put_impl"), ("self", "values")),
    **dict.fromkeys(("index_copy", "masked_scatter"), ("self", "source")),
    "where": ("self", "other"),
    "scatter": ("self", "src", "value"),
    "embedding": ("weight",),
}
"""Operations that only move elements -> the arguments that hold the elements; the others say where they go. Those whose name ends in
`_copy` move `self`."""

FACTORS: dict[str, tuple[str, str, str]] = {
    "mm": ("self", "mat2", ""),
    "_int_mm": ("self", "mat2", ""),
    "_scaled_mm": ("self", "mat2", "bias"),
    "addmm": ("mat1", "mat2", "self"),
    "_addmm_activation": ("mat1", "mat2", "self"),
    "bmm": ("self", "mat2", ""),
    "baddbmm": ("batch1", "batch2", "self"),
    "mv": ("self", "vec", ""),
    "addmv": ("mat", "vec", "self"),
    "dot": ("self", "tensor", ""),
}
"""Products of matrices -> their left factor, right factor and what is added ("" for none)."""

SUMS = frozenset(("add", "sub", "rsub"))
PRODUCTS = frozenset(("mul",))
ACTIVATIONS = frozenset(("silu", "gelu", "relu", "sigmoid", "tanh", "elu", "leaky_relu", "hardswish", "hardsigmoid", "softplus", "mish"))
ACTIVATIONS |= {"log_sigmoid_forward", "celu"}
"""Functions of one element that no layout tells apart from any other, but a gated unit has one."""

CHANNEL_NORMS = {"native_group_norm", "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training"}
CHANNEL_NORMS |= {"cudnn_batch_norm", "_batch_norm_with_update"}
_NORMS = {"native_layer_norm", "_fused_rms_norm", "rms_norm"} | CHANNEL_NORMS
_SOFTMAX = {"_softmax", "_safe_softmax", "softmax"}
_REDUCE = {"sum", "mean", "amax", "amin", "prod", "var", "std", "logsumexp", "linalg_vector_norm", "norm", "max", "min", "nansum"}
_SPREAD = {"_log_softmax", "cumsum", "cumprod", "logcumsumexp"}
_SAME = {"clone", "_to_copy", "lift_fresh_copy", "native_dropout", "_fused_dropout"}
_ERASE = {"fill", "zero", "normal", "uniform", "random", "bernoulli", "exponential", "log_normal", "cauchy", "geometric"}
_UNTAGGED = {"log_sigmoid_forward", "complex"}
"""Pointwise, though torch does not say so."""

_EFFECTS: dict[str, Effect] = {
    **dict.fromkeys(MOVES, "moves"),
    **dict.fromkeys(_SAME, "same"),
    "copy": "copies",
    **dict.fromkeys(_ERASE, "erases"),
    **dict.fromkeys(FACTORS, "multiplies"),
    **dict.fromkeys(("convolution", "_convolution"), "convolves"),
    **dict.fromkeys(_REDUCE, "reduces"),
    **dict.fromkeys(_SPREAD | _NORMS, "spreads"),
    **dict.fromkeys(_SOFTMAX, "softmax"),
    **dict.fromkeys(_UNTAGGED, "pointwise"),
}


def effect_of(name: str, is_pointwise: bool = False) -> Effect:
    """
    >>> effect_of("addmm"), effect_of("zeros_like"), effect_of("unfold_copy"), effect_of("topk"), effect_of("div", is_pointwise=True)
    ('multiplies', 'erases', 'moves', '?', 'pointwise')
    """
    if name in _EFFECTS:
        return _EFFECTS[name]
    if name.endswith("_copy"):
        return "moves"
    if name.endswith("_like") or name.startswith("new_"):
        return "erases"
    if name.startswith("_scaled_dot_product"):
        return "attends"
    return "pointwise" if is_pointwise else "?"


@dataclass(frozen=True)
class Operation:
    """`arguments`: the names of its arguments, in order; none for an operation of higher order (flex_attention, cond, ...), whose
    arguments are named by their number. `written`: those that it writes."""

    name: str
    effect: Effect
    arguments: tuple[str, ...] = ()
    written: tuple[str, ...] = ()

    @property
    def plain(self) -> str:
        """The name as a user knows it."""
        if self.name in _USER_NAMES:
            return _USER_NAMES[self.name]
        if "scaled_dot_product" in self.name or "flash_attention" in self.name or "efficient_attention" in self.name:
            return "scaled_dot_product_attention"
        return self.name.lstrip("_").removeprefix("native_").removeprefix("fused_").removeprefix("safe_")


@lru_cache(maxsize=4096)
def operation(func: Any) -> Operation:
    """What is known of an operation of torch."""
    if not hasattr(func, "_schema"):
        return Operation(str(func.name()), "?")
    arguments = func._schema.arguments
    written = tuple(a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write)
    name = func._schema.name.partition("::")[2]
    plain = name.removesuffix("_") if written else name
    return Operation(plain, effect_of(plain, torch.Tag.pointwise in func.tags), tuple(a.name for a in arguments), written)


_USER_NAMES = {
    **dict.fromkeys(FACTORS, "matmul"),
    "linalg_vector_norm": "norm",
    "_log_softmax": "log_softmax",
    "_native_batch_norm_legit": "batch_norm",
    "_native_batch_norm_legit_no_training": "batch_norm",
}
