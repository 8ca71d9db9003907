"""Finds the fused projection that a function uses: in its module, its arguments, its closure and the globals it names."""

from __future__ import annotations

import difflib
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TraceError
from ..families.declare import LOOKS_FUSED
from .names import is_users

MAX_LISTED = 12
_FUSED = re.compile(r"qkv|kqv|qvk|query_?key|key_?value|c_attn|att_proj|w_?pack|in_proj|fused|(^|_)(kv|qk)(_|$)", re.IGNORECASE)
_WRAPPERS = {"weight", "base_layer", "linear", "original", "module", "_orig_mod"}
"""Components of a name that say nothing about what it is."""


@dataclass(frozen=True, eq=False)
class Fused:
    """A fused projection: its tensor with the packed `axis`, and the bias that goes with it.

    `name` is what the user calls it in `fused=`, `weight_text` and `bias_text` are how code reaches the tensors, `kind` is
    "weight", or "activation" when the fused tensor itself is given, or "output" when `owner` keeps its weight packed (quantised): what it
    returns is then followed, and `tensor` only has the shape. `owner` is the module that holds the weight, `home` the one around it.
    """

    name: str
    tensor: Tensor
    bias: Tensor | None
    axis: int
    kind: str
    weight_text: str
    bias_text: str
    owner: nn.Module | None = None
    home: nn.Module | None = None
    root: nn.Module | None = None

    @property
    def rows(self) -> int:
        return int(self.tensor.size(self.axis))


def find(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], fused: Tensor | nn.Module | str | None) -> Fused:
    """The projection that is meant. Raises TraceError when none, or more than one, is found."""
    places = list(_places(fn, args, kwargs))
    found = list(_unique(c for name, value in places for c in _candidates(name, value)))
    if isinstance(fused, str):
        return _with_bias(_named(fused, found), places)
    if isinstance(fused, nn.Module):
        return _of_module(fused, found)
    if isinstance(fused, Tensor):
        return _with_bias(next((c for c in found if c.tensor is fused), None) or _bare("fused", fused), places)
    if fused is not None:
        raise TraceError("fused= takes a tensor, a module or a name", found=type(fused).__name__)
    for tier in (_by_name, _by_shape, _by_default):
        fitting = [c for c in found if tier(c)]
        if len(fitting) == 1:
            return _with_bias(fitting[0], places)
        if fitting:
            raise TraceError(
                f"{len(fitting)} projections could be meant",
                found=_listing(fitting),
                try_=f'fused="{fitting[0].name}"',
            )
    raise TraceError(
        "no fused projection found",
        where="the function's module, its arguments, its closure and the globals it names",
        found=_listing(found) if found else None,
        try_='fused="name", or the weight, or its module',
    )


def _by_name(candidate: Fused) -> bool:
    words = [w for w in re.split(r"[.\[\]'\"]+", candidate.name) if w and w not in _WRAPPERS]
    return bool(words) and (words[-1] in LOOKS_FUSED or bool(_FUSED.search(words[-1])))


def _by_shape(candidate: Fused) -> bool:
    return candidate.kind != "activation" and candidate.rows * candidate.tensor.shape[1 - candidate.axis] * 3 == candidate.rows**2


def _by_default(candidate: Fused) -> bool:
    return candidate.kind != "activation" and candidate.rows > 1


def _listing(candidates: list[Fused]) -> str:
    lines = [f"{c.name}  {tuple(c.tensor.shape)}" for c in candidates[:MAX_LISTED]]
    return "\n".join(lines + [f"and {len(candidates) - MAX_LISTED} more"] * (len(candidates) > MAX_LISTED))


def _named(name: str, found: list[Fused]) -> Fused:
    wanted = name.removeprefix("self.").removesuffix(".weight")
    names = [c.name.removeprefix("self.").removesuffix(".weight") for c in found]
    exact = [c for c, name in zip(found, names, strict=True) if name == wanted]
    inside = [c for c, name in zip(found, names, strict=True) if name.endswith(f".{wanted}")]
    for fitting in (exact, inside):
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            raise TraceError(f"{len(fitting)} projections end in {name!r}", found=_listing(fitting), try_=f'fused="{fitting[0].name}"')
    near = difflib.get_close_matches(name, [c.name for c in found], 1)
    raise TraceError(
        f"no projection is called {name!r}",
        found=_listing(found) or "none",
        try_=f"did you mean {near[0]!r}?" if near else "pass the weight or its module: fused=model.attn.qkv",
    )


def _of_module(module: nn.Module, found: list[Fused]) -> Fused:
    here = [c for c in found if c.owner is module] or list(_of_modules("fused", module))
    if len(here) == 1:
        return here[0]
    raise TraceError(
        f"{type(module).__name__} holds {len(here)} projections" if here else f"{type(module).__name__} has no weight of two axes",
        found=_listing(here) or None,
        try_=f'fused="{here[0].name}"' if here else "fused= its fused projection",
    )


# -- what a function can reach -----------------------------------------------------------------------------------------


def _places(fn: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(name, object) of what the function is bound to, is given, encloses and names."""
    if isinstance(fn, nn.Module):
        yield "self", fn
    yield from _given(fn, args, kwargs)
    yield from _enclosed(fn, set())


def _given(fn: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    while isinstance(fn, functools.partial):
        fn, args, kwargs = fn.func, (*fn.args, *args), {**fn.keywords, **kwargs}
    call = fn.forward if isinstance(fn, nn.Module) else fn
    try:
        bound = inspect.signature(call).bind(*args, **kwargs)
    except (TypeError, ValueError):
        yield from ((f"args[{i}]", value) for i, value in enumerate(args))
        yield from kwargs.items()
        return
    bound.apply_defaults()
    for name, value in bound.arguments.items():
        if isinstance(value, Mapping):
            yield from ((str(key) if name in kwargs or name == "kwargs" else f"{name}[{key!r}]", item) for key, item in value.items())
        elif isinstance(value, (tuple, list)):
            yield from ((f"{name}[{i}]", item) for i, item in enumerate(value))
        else:
            yield name, value


def _enclosed(fn: Any, done: set[CodeType]) -> Iterator[tuple[str, Any]]:
    while isinstance(fn, functools.partial):
        fn = fn.func
    if not isinstance(fn, (FunctionType, MethodType, nn.Module)):
        fn = getattr(fn, "__call__", fn)  # noqa: B004
    if isinstance(fn, MethodType):
        yield "self", fn.__self__
        if not isinstance(fn.__self__, nn.Module) and hasattr(fn.__self__, "__dict__"):
            yield from ((f"self.{name}", value) for name, value in vars(fn.__self__).items())
    fn = inspect.unwrap(getattr(fn, "__func__", fn)) if callable(fn) and not isinstance(fn, nn.Module) else fn
    if not isinstance(fn, FunctionType) or fn.__code__ in done or not is_users(fn.__code__):
        return
    done.add(fn.__code__)
    near: dict[str, Any] = {}
    for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=False):
        try:
            near[name] = cell.cell_contents
        except ValueError:
            continue
    near |= {name: fn.__globals__[name] for name in _global_names(fn.__code__) if name in fn.__globals__}
    for name, value in near.items():
        yield name, value
        yield from _enclosed(value, done) if isinstance(value, (FunctionType, MethodType)) else ()


def _global_names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _global_names(constant)


# -- what could be a projection ----------------------------------------------------------------------------------------


def _candidates(name: str, value: object) -> Iterator[Fused]:
    if isinstance(value, nn.Module):
        yield from _of_modules(name, value)
    elif isinstance(value, Tensor) and value.dim() >= 2 and (value.dtype.is_floating_point or _FUSED.search(name)):
        yield _bare(name, value)


def _of_modules(name: str, root: nn.Module) -> Iterator[Fused]:
    for path, module in root.named_modules():
        home = root.get_submodule(path.rpartition(".")[0]) if path else root
        packed = _packed(module)
        if packed is not None:
            text = ".".join(filter(None, [name, path]))
            yield Fused(path or text, packed, None, 0, "output", f"{text}(...)", "", module, home, root)
            continue
        own = dict(module.named_parameters(recurse=False))
        for key, tensor in own.items():
            if nn.parameter.is_lazy(tensor) or tensor.dim() < 2 or isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                continue
            bias_key = key.replace("weight", "bias")
            text = ".".join(filter(None, [name, path, key]))
            bias = own.get(bias_key) if bias_key != key else None
            short = ".".join(filter(None, [path, key if key != "weight" else ""])) or text
            axis = 1 if type(module).__name__ == "Conv1D" else 0
            bias_text = ".".join(filter(None, [name, path, bias_key]))
            yield Fused(short, tensor, bias, axis, "weight", text, bias_text, module, home, root)


def _packed(module: nn.Module) -> Tensor | None:
    """[out, in] without storage, when a linear module keeps its weight in another form: several numbers in one, in buffers, or turned."""
    rows, width = (getattr(module, name, None) or getattr(module, name.replace("_", ""), None) for name in ("out_features", "in_features"))
    if not (isinstance(rows, int) and isinstance(width, int) and rows > 0 and width > 0):
        return None
    matrices = [tensor for tensor in module.parameters() if nn.parameter.is_lazy(tensor) or tensor.dim() > 1]
    if any(nn.parameter.is_lazy(tensor) or rows in tensor.shape for tensor in matrices):
        return None
    return torch.empty(rows, width, device="meta")


def _bare(name: str, tensor: Tensor) -> Fused:
    """A tensor on its own: a weight [rows, in] or [in, rows], or a fused activation [..., rows]."""
    is_weight = isinstance(tensor, nn.Parameter) or bool(re.search(r"weight|kernel|(^|_)w(_|$)|^W", name))
    if not is_weight and (tensor.dim() > 2 or (tensor.shape[0] != 3 * tensor.shape[1] and name != "fused")):
        return Fused(name, tensor, None, tensor.dim() - 1, "activation", name, "")
    axis = 1 if tensor.dim() == 2 and tensor.shape[1] == 3 * tensor.shape[0] else 0
    return Fused(name, tensor, None, axis, "weight", name, "bias")


def _with_bias(candidate: Fused, places: list[tuple[str, Any]]) -> Fused:
    if candidate.owner is not None or candidate.kind == "activation":
        return candidate
    named = [(name, t) for name, t in places if isinstance(t, Tensor) and t.shape == (candidate.rows,)]
    close = [pair for pair in named if re.search(r"bias|(^|_)b(_|$)|^b", pair[0])] or named
    if len({id(t) for _, t in close}) != 1:
        return candidate
    return Fused(candidate.name, candidate.tensor, close[0][1], candidate.axis, "weight", candidate.weight_text, close[0][0])


def _unique(candidates: Iterator[Fused]) -> Iterator[Fused]:
    """Tied and twice-reached tensors once; those inside a module first, since it knows the bias."""
    seen: dict[int, Fused] = {}
    for candidate in candidates:
        key = id(candidate.owner if candidate.kind == "output" else candidate.tensor)
        have = seen.get(key)
        if have is None or (have.owner is None and candidate.owner is not None):
            seen[key] = candidate
    yield from seen.values()


def config_of(fused: Fused, fn: object) -> dict[str, Any] | None:
    """The config.json content of the model around the projection, when it has one with a model_type."""
    for module in (fused.home, fused.root, getattr(fn, "__self__", None)):
        config: Any = getattr(module, "config", None)
        if getattr(config, "model_type", None) and hasattr(config, "to_dict"):
            content: dict[str, Any] = config.to_dict()
            return content
    return None


_HEADS = ("num_heads", "n_head", "n_heads", "num_attention_heads", "nhead", "heads", "num_query_heads")
_KV_HEADS = ("num_kv_heads", "n_kv_heads", "num_key_value_heads", "n_kv_head", "num_kv", "kv_heads", "num_query_groups")
_DIMS = ("head_dim", "head_size", "d_head", "dim_head", "head_width", "attention_head_size")


def hints_of(fused: Fused, fn: object) -> dict[str, int]:
    """h, g and d as the modules around the projection name them, as far as they do."""
    out: dict[str, int] = {}
    owners = [fused.owner, fused.home, fused.root, getattr(fn, "__self__", None)]
    for axis, names in (("h", _HEADS), ("g", _KV_HEADS), ("d", _DIMS)):
        for owner in owners:
            for name in names:
                value = getattr(owner, "__dict__", {}).get(name)
                if isinstance(value, int) and not isinstance(value, (bool, torch.SymInt)) and value > 0:
                    out.setdefault(axis, value)
    return out
