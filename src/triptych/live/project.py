"""`project`: some parts of a fused projection, computed from their rows alone."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..errors import LayoutError, SizeError
from ..layout import Layout
from ..sizes import bind
from .probe import Probed, probe
from .rotary import pieces

Known = Layout | str | Any
"""A layout, its text, or anything with `.layout` and `.sizes`: what `probe` or `inspect` found."""


@overload
def project(module: nn.Module, x: Tensor, part: str, layout: Known = None, *, model: nn.Module | None = None, **sizes: int) -> Tensor: ...
@overload
def project(
    module: nn.Module, x: Tensor, part: tuple[str, ...], layout: Known = None, *, model: nn.Module | None = None, **sizes: int
) -> tuple[Tensor, ...]: ...
def project(
    module: nn.Module, x: Tensor, part: str | tuple[str, ...], layout: Known = None, *, model: nn.Module | None = None, **sizes: int
) -> Tensor | tuple[Tensor, ...]:
    """One part of a fused projection, such as q for a KV cache, computed from its rows alone: [..., in] -> [..., heads, dims].

    Args:
        module: an `nn.Linear`, or a transformers `Conv1D`, whose output is packed as `layout` says.
        x: [..., in].
        part: "q", or several parts that one product computes: ("k", "v"). Of `h (q|k|v) (rot c p|pass n)`, "q" is both its
            pieces, joined along dims in row order; "q.rot" is one of them.
        layout: how the rows lie; or an entry of `probe(model)` or of a checkpoint, which knows its sizes too.
        model: instead of a layout, the model that holds the module: it is probed once.
        sizes: any that determine the layout together with the row count.
    Returns: a new tensor, or for several parts a tuple of views of one; equal to those of `split(module(x), layout)` but for
        rounding. Gradients flow.

    Rows that lie together, one after another, are a *view* of the weight. Others are *copied* once and kept as long as the module
    lives; a change of the weight in place, by a new parameter, dtype or device makes a fresh copy at the next call. PyTorch hides writes
    through `weight.data` from everybody: call `forget(module)` after those. Hooks of the module are not run.

    Raises LayoutError (another kind of module, an unknown part, no layout), SizeError (the rows do not fill the layout).

    >>> _ = torch.manual_seed(0)
    >>> linear, x = nn.Linear(4, 12), torch.randn(2, 4)
    >>> q, k, v = linear(x).view(2, 2, 3, 2).unbind(2)
    >>> torch.allclose(project(linear, x, "q", "h (q|k|v) d", h=2), q)
    True
    """
    weight, bias = _weights(module)
    try:
        rows = _PREPARED[module][(part, layout, *sizes.items()) if sizes else (part, layout)]
    except (KeyError, TypeError):
        rows = _rows(module, part, layout, model, sizes)
    if weight.shape != rows.shape:
        forget(module)
        rows = _rows(module, part, layout, model, sizes)
    shape = x.shape
    if shape[-1] != rows.width:
        raise SizeError("the input does not fit the projection", expected=f"[..., {rows.width}]", found=tuple(shape))
    out = F.linear(x, *rows.tensors(weight, bias))
    if isinstance(part, str):
        return out.view(*shape[:-1], *rows.cuts[0])
    dims = rows.cuts[0][1]
    if all(cut[1] == dims for cut in rows.cuts):
        heads = [cut[0] for cut in rows.cuts]
        return tuple(out.view(*shape[:-1], sum(heads), dims).split_with_sizes(heads, -2))
    parts = out.split_with_sizes([heads * dims for heads, dims in rows.cuts], -1)
    return tuple(one.view(*shape[:-1], *cut) for one, cut in zip(parts, rows.cuts, strict=True))


def forget(module: nn.Module) -> None:
    """Drop the rows kept for a module; the next `project` prepares them afresh. Needed only after writes through `.data`."""
    _PREPARED.pop(module, None)


class _Stamp:
    """Which state of a tensor a copy was taken from. The storage is held weakly, so that its address is not taken again."""

    __slots__ = ("dtype", "offset", "storage", "stride", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.storage = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        self.version, self.dtype = tensor._version, tensor.dtype
        self.offset, self.stride = tensor.storage_offset(), tensor.stride()

    def fresh(self, tensor: Tensor) -> bool:
        return (
            tensor.untyped_storage()._cdata == self.storage.cdata
            and tensor._version == self.version
            and tensor.dtype == self.dtype
            and tensor.storage_offset() == self.offset
            and tensor.stride() == self.stride
        )


@dataclass(slots=True)
class _Rows:
    """The rows of some parts of one module, and their latest copy. `cuts`: (heads, dims) of every part, in the order asked for."""

    cuts: tuple[tuple[int, int], ...]
    index: Tensor  # row numbers
    run: slice | None  # when they follow each other
    shape: torch.Size  # of the weight
    turned: bool  # it is [in, rows]
    width: int  # of the input
    copy: tuple[Tensor, Tensor | None] | None = None
    stamps: tuple[_Stamp, ...] = ()

    def tensors(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """weight [rows, in] and bias [rows] of these parts."""
        if self.run is not None and not self.turned:
            return weight[self.run], bias[self.run] if bias is not None else None  # a slice takes less time than `narrow`
        if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
            return self._taken(weight, bias)
        both = (weight,) if bias is None else (weight, bias)
        alike = self.copy is not None and len(self.stamps) == len(both)
        if alike and self.stamps[0].fresh(weight) and (bias is None or self.stamps[1].fresh(bias)):
            assert self.copy is not None
            return self.copy
        self.copy = None  # the old rows go before the new ones come
        if any(tensor.is_inference() for tensor in both):  # they do not count their changes
            return self._taken(weight, bias)
        with torch.inference_mode(False), torch.no_grad():
            self.copy = self._taken(weight, bias)
        self.stamps = tuple(map(_Stamp, both))
        return self.copy

    def _taken(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.index.device != weight.device:
            self.index = self.index.to(weight.device)
        rows = weight.index_select(1, self.index).t().contiguous() if self.turned else weight.index_select(0, self.index)
        return rows, bias.index_select(0, self.index) if bias is not None else None


_NONE = torch.empty(0)
_PREPARED: weakref.WeakKeyDictionary[nn.Module, dict[object, _Rows]] = weakref.WeakKeyDictionary()
_PROBED: weakref.WeakKeyDictionary[nn.Module, dict[str, Probed]] = weakref.WeakKeyDictionary()


def _rows(module: nn.Module, part: str | tuple[str, ...], layout: Known, model: nn.Module | None, sizes: dict[str, int]) -> _Rows:
    """The prepared rows, made at the first call with these words."""
    kept = _PREPARED.setdefault(module, {})
    names = (part,) if isinstance(part, str) else tuple(part)
    if not names:
        raise LayoutError("no part is asked for", expected='"q", or several: ("k", "v")', found="none")
    key = (part if isinstance(part, str) else names, layout, *sizes.items())
    turned = _turned(module)
    shape = _weights(module)[0].shape
    if key in kept and kept[key].shape == shape:  # asked for by a list, which is no key
        return kept[key]
    known: Any = layout if layout is not None else _found(module, model)
    if isinstance(known, (Layout, str)):
        value = Layout(known)
    else:
        value = known.layout
        if value is None:
            raise LayoutError("probe found no layout", where=type(module).__name__, found=known.note, try_="give layout=")
        sizes = {**{axis: known.sizes[axis] for axis in value.axes}, **sizes}
    bound = bind(value, rows=shape[1 if turned else 0], **sizes)
    index: list[int] = []
    cuts = []
    for name in names:
        found = pieces(value, bound, name)
        if not found or len({piece.shape[0] for piece in found}) > 1:
            raise LayoutError(f"the layout has no part {name!r}", layout=str(value), expected=", ".join(value.parts), found=name)
        grid = torch.cat([torch.from_numpy(piece.rows()) for piece in found], 1)
        index += grid.flatten().tolist()
        cuts.append((grid.shape[0], grid.shape[1]))
    stop = index[0] + len(index)
    run = slice(index[0], stop) if index == list(range(index[0], stop)) else None
    kept[key] = _Rows(tuple(cuts), torch.tensor(index), run, shape, turned, shape[0 if turned else 1])
    return kept[key]


def _turned(module: nn.Module) -> bool:
    """Whether the weight is [in, rows]. Raises LayoutError for a module that computes something else than a linear map of its weight."""
    kind = type(module)
    plain = "forward" not in vars(module)
    if plain and kind.forward is nn.Linear.forward and _weights(module)[0].dim() == 2:
        return False
    if plain and kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils":
        return True
    raise LayoutError(
        "rows are taken from an nn.Linear or a transformers Conv1D",
        found=kind.__name__ + ("" if plain else ", whose forward is replaced"),
        try_="give the projection itself; merge adapters first",
    )


def _weights(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """weight and bias, without the slow way of `nn.Module` where they are plain parameters."""
    try:
        own: Any = module._parameters
    except AttributeError:
        raise LayoutError(
            "rows are taken from a module", expected="an nn.Linear or a transformers Conv1D", found=type(module).__name__
        ) from None
    try:
        return own["weight"], own["bias"]
    except KeyError:
        return getattr(module, "weight", _NONE), getattr(module, "bias", None)


def _found(module: nn.Module, model: nn.Module | None) -> Probed:
    """The entry of a module in its model's probe, which runs once."""
    if model is None:
        raise LayoutError("the layout is not known", expected="layout=, or model= to probe", try_="tt.probe(model) prints all layouts")
    name = next((name for name, other in model.named_modules() if other is module), None)
    if name is None:
        raise LayoutError("the model does not hold this module", found=type(module).__name__)
    if model not in _PROBED:
        _PROBED[model] = probe(model)
    if name not in _PROBED[model]:
        raise LayoutError("not a fused projection", where=name, expected=", ".join(_PROBED[model])[:200] or "the model has none")
    return _PROBED[model][name]
