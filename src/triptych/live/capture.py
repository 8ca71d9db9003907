"""`capture`: q, k and v of every layer and head while a model runs, as its projections make them and as its attention receives them."""

from __future__ import annotations

import contextlib
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import TraceError
from .anatomy import Layer, Layers, Lines, anatomy, busy, take, unwrapped

MATMULS = frozenset(("matmul", "__matmul__", "bmm", "baddbmm"))
IN_PLACE = frozenset(("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__"))


@dataclass(frozen=True)
class Heads:
    """[..., tokens, heads, dim] each; `k` and `v` with the kv heads as stored."""

    q: Tensor
    k: Tensor
    v: Tensor

    @property
    def expanded(self) -> Heads:
        """The same with every kv head repeated for the query heads it serves (a copy, unless each serves one)."""
        return Heads(self.q, *(t.repeat_interleave(self.q.shape[-2] // t.shape[-2], -2) if t.shape[-2] != self.q.shape[-2] else t
                               for t in (self.k, self.v)))  # fmt: skip


class Held:
    """A tensor of the model; a copy of it as soon as the model is about to write over it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.version = None if tensor.is_inference() else tensor._version

    def copy(self) -> None:
        self.tensor = self.tensor.clone()
        self.version = None

    def get(self) -> Tensor:
        """Raises TraceError: it was written over outside of `capture`."""
        if self.version is not None and self.tensor._version != self.version:
            raise TraceError("a captured tensor was written over since", try_="clone it inside `with tt.capture(...)`")
        return self.tensor


@dataclass(frozen=True, eq=False, repr=False)
class Attention:
    """One attention call of one layer.

    `before`: q, k, v as the projections made them: before the norms of q and k, before rotary.
    `after`: q, k, v as the model's own attention received them: after both. With a cache, k and v of all tokens attended to.
    `z`: what the attention gave for every head, before the output projection.
    All [batch, tokens, heads, dim]. `received` are q, k and v as the call had them, the very tensors (k in a product of its own is the
    transpose of one); gradients can be asked of those.
    """

    layer: str
    _rows: Layer
    _projected: Mapping[str, Mapping[int, Held]]
    _received: tuple[Held, Held, Held]
    _result: Held
    _transposed: bool

    @property
    def received(self) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (held.get() for held in self._received)
        return q, k.transpose(-1, -2) if self._transposed else k, v

    @property
    def before(self) -> Heads:
        """Raises TraceError: not every one of q, k, v comes out of a projection that ran in this layer."""
        return Heads(*(self.part(part) for part in "qkv"))

    def part(self, name: str) -> Tensor:
        """Another part by its name, as its projection made it: "gate", "nope", ..."""
        return self._made(self._rows.part(name))

    def _made(self, lines: Lines) -> Tensor:
        low, high = int(lines.grid.min()), int(lines.grid.max())
        for first, held in self._projected.get(lines.parameter, {}).items():
            output = held.get()
            if first <= low and high < first + output.shape[-1]:
                return take(output, output.dim() - 1, lines.grid - first)
        raise TraceError("this projection did not run in this call", where=lines.parameter, found=", ".join(self._projected))

    @property
    def after(self) -> Heads:
        """Raises TraceError: the call does not show which axis holds the heads."""
        q, k, v = self.received
        batch = self._batch(q)
        stored = {part: len(lines.grid) for part, lines in self._rows.parts.items()}
        found = [_headed(t, batch) for t in (q, k, v)]
        return Heads(_folded(found[0], stored.get("q")), _stored(found[1], stored.get("k")), _stored(found[2], stored.get("v")))

    @property
    def z(self) -> Tensor:
        """As `after`."""
        lines = self._rows.parts.get("q")
        return _folded(_headed(self._result.get(), self._batch(self.received[0])), len(lines.grid) if lines else None)

    def _batch(self, q: Tensor) -> int:
        """Into how many to cut a first axis that holds batch and heads, [batch heads, tokens, dim]."""
        lines = self._rows.parts.get("q")
        return q.shape[0] // len(lines.grid) if lines and q.dim() == 3 and q.shape[0] % len(lines.grid) == 0 else 1


class Captured(Layers[Attention]):
    """What was seen: module name (or number) of a layer -> its last attention call. `calls`: all calls, in order."""

    def __init__(self) -> None:
        super().__init__({})
        self.calls: list[Attention] = []

    def add(self, call: Attention) -> None:
        self.calls.append(call)
        self._layers[call.layer] = call

    def name(self, layer: str | int) -> str:
        if not self.calls:
            raise TraceError(
                "no attention call was seen",
                expected="torch's scaled_dot_product_attention, or two products with a softmax between",
                try_='attn_implementation="sdpa" or "eager", and a run inside `with tt.capture(...)`',
            )
        return super().name(layer)

    def __str__(self) -> str:
        last = {name: call.after for name, call in self.items()}
        return "\n".join(f"{name}  q {_shape(to.q)}  k {_shape(to.k)}  v {_shape(to.v)}" for name, to in last.items())


@contextlib.contextmanager
def capture(model: nn.Module, *args: Any, **kwargs: Any) -> Iterator[Captured]:
    """While it lasts, keeps q, k and v of every softmax attention that the model runs on this thread.

    Which rows are q, k and v of which head is read off the model's own code first, as `probe` does (once per model).

    Args: model: any module that `probe` understands, fused or not. args, kwargs: what `probe` is to call it with.
    Returns: layer's module name -> `Attention`; `.before`, `.after`, `.calls`. The tensors are the model's own, not detached: use
        `torch.no_grad()` to keep no graph. Nothing of the model is changed, and no hook stays.
    Raises TraceError: the model is compiled, cannot be run, or has no attention.

    >>> mha = nn.MultiheadAttention(12, 3, batch_first=True)
    >>> with capture(mha) as acts:
    ...     _ = mha(*[torch.randn(2, 5, 12)] * 3)
    >>> acts[0].before.q.shape
    torch.Size([2, 5, 3, 4])
    """
    if not isinstance(model, nn.Module):
        raise TraceError("a model is wanted", expected="a torch.nn.Module", found=type(model).__name__)
    compiled = next((n for n, m in model.named_modules() if hasattr(m, "_orig_mod") or m._compiled_call_impl is not None), None)
    if compiled is not None:
        raise TraceError("compiled code cannot be watched", where=compiled or type(model).__name__, try_="capture the model it was made of")
    layers = anatomy(model, *args, **kwargs)
    watch = _Watch(layers)
    handles: list[RemovableHandle] = []
    try:
        watch.attach(model, handles)
        with watch:
            yield watch.found
    finally:
        for handle in handles:
            handle.remove()


class _Watch(TorchFunctionMode):
    """Sees projections end (by hooks, or as `linear` of a bare parameter) and attention begin (by name, or as two products and a softmax).

    `open`: the modules that are running and hold projections, inner ones last: what these gave since.
    """

    def __init__(self, layers: Mapping[str, Layer]) -> None:
        super().__init__()
        self.layers = layers
        self.found = Captured()
        self.thread = threading.get_ident()
        self.lines = {lines.parameter: layer.name for layer in layers.values() for lines in layer.parts.values()}
        self.bare: dict[str, nn.Parameter] = {}
        self.open: list[dict[str, dict[int, Held]]] = []
        self.held: dict[int, list[Held]] = {}
        self.scores: Any = WeakIdKeyDictionary()
        self.tokens_first = False

    # hooks

    def attach(self, model: nn.Module, handles: list[RemovableHandle]) -> None:
        """Hooks the projections, whose outputs are kept, and all modules around them, whose calls tell which outputs belong together.

        What removes the hooks is added to `handles`.
        """
        modules = dict(model.named_modules())
        around: set[str] = set()
        for parameter in self.lines:
            owner, _, name = parameter.rpartition(".")
            if name != "weight":
                self.bare[parameter] = modules[owner].get_parameter(name)
                around.add(owner)
            owner = unwrapped(owner)
            if name == "weight":
                handles.append(modules[owner].register_forward_hook(self._projection(parameter)))
            around |= {owner[:at] for at, c in enumerate(owner) if c == "."} | {""}
        for name in around:
            handles.append(modules[name].register_forward_pre_hook(self._enter))
            handles.append(modules[name].register_forward_hook(self._leave, always_call=True))

    @property
    def idle(self) -> bool:
        return threading.get_ident() != self.thread or busy()

    def _enter(self, module: nn.Module, args: object) -> None:
        if not self.idle:
            self.open.append({})

    def _leave(self, module: nn.Module, args: object, output: object) -> None:
        if not self.idle and self.open:
            self.open.pop()

    def _projection(self, parameter: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            if isinstance(output, Tensor) and not self.idle:
                self._projected(parameter, 0, output)

        return hook

    def _projected(self, parameter: str, first: int, output: Tensor) -> None:
        held = self._hold(output)
        for frame in self.open:
            frame.setdefault(parameter, {})[first] = held

    # functions

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if busy():
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "multi_head_attention_forward":  # sees the mode itself, and would hide from it what it calls
            before, self.tokens_first = self.tokens_first, True
            try:
                with self:
                    return _unwatched(func)(*args, **kwargs)
            finally:
                self.tokens_first = before
        if (name.endswith("_") and not name.endswith("__")) or name in IN_PLACE or "out" in kwargs or kwargs.get("inplace"):
            self._written(kwargs.get("out", args[0] if args else None))
        out = func(*args, **kwargs)
        if self.open:
            self._seen(name, args, kwargs, out)
        return out

    def _seen(self, name: str, args: Any, kwargs: Mapping[str, Any], out: Any) -> None:
        if name == "linear" and self.bare:
            self._bare(args[1] if len(args) > 1 else kwargs["weight"], out)
        elif name == "scaled_dot_product_attention":
            given = dict(zip(("query", "key", "value"), args, strict=False)) | dict(kwargs)
            self._attention(given["query"], given["key"], given["value"], out, False)
        elif name in MATMULS and isinstance(out, Tensor):
            a, b = (args[0], kwargs["other"]) if "other" in kwargs else args[-2:] if len(args) > 1 else (kwargs["batch1"], kwargs["batch2"])
            self._product(a, b, out)
        elif isinstance(out, Tensor) and self.scores:
            seen = next((self.scores[t] for t in args if isinstance(t, Tensor) and t in self.scores), None)
            if seen is not None:
                self.scores[out] = (*seen[:2], seen[2] or "softmax" in name)

    def _product(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """q times k, remembered by its result; or what came of it through a softmax, times v."""
        weights = self.scores.get(a)
        if weights is not None and weights[2]:
            self._attention(weights[0], weights[1], b, out, True)
        elif weights is None and a.dim() > 2 and b.dim() > 2:
            self.scores[out] = (a, b, False)

    def _bare(self, weight: Tensor, out: Tensor) -> None:
        for parameter, p in self.bare.items():
            first, rest = divmod(weight.data_ptr() - p.data_ptr(), p.stride(0) * p.element_size())
            if weight.untyped_storage().data_ptr() == p.untyped_storage().data_ptr() and not rest and 0 <= first < len(p):
                self._projected(parameter, first, out.transpose(0, 1) if self.tokens_first and out.dim() > 2 else out)

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, transposed: bool) -> None:
        projected = next((frame for frame in reversed(self.open) if frame), {})
        names = {self.lines[parameter] for parameter in projected}
        if len(names) != 1:  # nothing that was projected here
            return
        layer = self.layers[names.pop()]
        received = self._hold(q), self._hold(k), self._hold(v)
        pieces = {parameter: dict(found) for parameter, found in projected.items()}
        self.found.add(Attention(layer.name, layer, pieces, received, self._hold(out), transposed))

    def _hold(self, tensor: Tensor) -> Held:
        held = Held(tensor)
        self.held.setdefault(tensor.untyped_storage()._cdata, []).append(held)
        return held

    def _written(self, target: object) -> None:
        """Copies of what is held, before the model writes over it."""
        if isinstance(target, Tensor) and target.layout == torch.strided:
            for held in self.held.pop(target.untyped_storage()._cdata, ()):
                held.copy()


def _unwatched(func: Any) -> Any:
    """The same function of torch, blind to modes; what it calls is not."""
    space = {**func.__globals__, "has_torch_function": lambda _: False}
    return types.FunctionType(func.__code__, space, func.__name__, func.__defaults__, func.__closure__)


def _headed(tensor: Tensor, batch: int) -> Tensor:
    """[..., heads, tokens, dim], or [batch heads, tokens, dim], as [..., tokens, heads, dim]; a view."""
    if tensor.dim() == 3 and tensor.shape[0] % batch == 0:
        tensor = tensor.reshape(batch, -1, *tensor.shape[1:])
    if tensor.dim() < 3:
        raise TraceError("nobody knows which axis holds the heads", found=f"attention over {_shape(tensor)}", try_="see `.received`")
    return tensor.transpose(-3, -2)


def _folded(tensor: Tensor, heads: int | None) -> Tensor:
    """Query heads of one token that were folded, group by group, into the place of tokens: [..., r, g, dim] -> [..., 1, h, dim]."""
    if not heads or tensor.shape[-2] == heads:
        return tensor
    if tensor.shape[-3] * tensor.shape[-2] != heads:
        raise TraceError("nobody knows which axis holds the heads", expected=f"{heads} heads",
                         found=f"attention over {_shape(tensor.transpose(-3, -2))}", try_="see `.received`")  # fmt: skip
    return tensor.transpose(-3, -2).reshape(*tensor.shape[:-3], 1, heads, tensor.shape[-1])


def _stored(tensor: Tensor, heads: int | None) -> Tensor:
    """One copy of each kv head, when the model repeated them for its query heads before it called."""
    found = tensor.shape[-2]
    if not heads or found == heads or found % heads:
        return tensor
    one = tensor[..., :: found // heads, :]
    return one if torch.equal(one.repeat_interleave(found // heads, -2), tensor) else tensor


def _shape(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape))
