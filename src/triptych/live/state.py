"""The forms of a state dict: the original's names and rows, one tensor a part, or all rows in another layout; and how a load takes any.

Below the name of a projection, `X`:

    original   X.weight                             rows as the model's own code has them
    split      X.q.weight, X.k.weight, X.v.weight
    fused      X.weight, X.layout                   rows in another layout, whose text is the uint8 tensor X.layout
    packed     X.packed.weight, X.layout            the same, as a live model holds it

and the same with bias. Rows in another order than the original's are always marked, so that none are read under a wrong layout.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LayoutError, PlanError
from ..layout import Layout
from ..sizes import does_not_fit
from ..weave import weave
from .projections import Packing

PACKED, MARK = "packed", "layout"
Homes = tuple[tuple[str, Layout], ...]
"""Where the rows are, below the name of the projection ("" for the projection itself), and how they lie there."""


def marked(layout: Layout) -> Tensor:
    """The text of a layout as a tensor, for a state dict."""
    return torch.tensor(list(str(layout).encode()), dtype=torch.uint8)


def unmarked(mark: Tensor) -> Layout:
    """The layout of such a tensor. Raises LayoutError when it is none."""
    if not isinstance(mark, Tensor) or mark.dtype != torch.uint8 or mark.dim() != 1 or not len(mark):
        raise LayoutError("the mark of a layout is a text in a uint8 tensor", found=str(getattr(mark, "dtype", type(mark).__name__)))
    return Layout(bytes(mark.tolist()).decode("utf-8", "replace"))


def wrapped(module: Any) -> bool:
    """Whether a module is an adapter around a linear map, as those of PEFT are."""
    return isinstance(getattr(module, "base_layer", None), nn.Module)


def turned(tensors: list[Tensor], source: Homes, target: Homes, packing: Packing) -> list[Tensor]:
    """[rows, ...] tensors of one form as those of another; views of them where a part lies in one block."""
    layouts = tuple(layout for _, layout in source)
    return [weave(layouts, layout, packing.sizes)(tensors, 0) for _, layout in target]


def accept(state: MutableMapping[str, Any], prefix: str, packing: Packing, target: Homes) -> None:
    """Puts the tensors of one projection under the names and in the order of `target`, whatever form they have, in place.

    What is incomplete stays as it is, so that a strict load names it. Args: prefix: the name of the projection and a dot.
    Raises SizeError, IncompatibleError: rows of another model.
    """
    mark = state.pop(f"{prefix}{MARK}", None)
    layout = packing.layout if mark is None else unmarked(mark)
    wide = packing
    if mark is not None:
        wide = packing.also(layout, *(own for _, own in target))
        wide.is_order_of(layout)  # the check that it labels the same rows
    forms: list[Homes] = [(("", layout),), ((PACKED, layout),), packing.pieces, target]
    for end in ("weight", "bias"):
        for source in forms:
            keys = [_key(prefix, home, end) for home, _ in source]
            if all(key in state for key in keys):
                if source != target:
                    _retell(state, prefix, end, wide, source, target)
                break


def _retell(state: MutableMapping[str, Any], prefix: str, end: str, packing: Packing, source: Homes, target: Homes) -> None:
    tensors = []
    for home, layout in source:
        key = _key(prefix, home, end)
        rows = _rows(state[key], home, packing)
        if rows.dim() == 0 or rows.shape[0] != packing.rows(layout):
            raise does_not_fit(layout, rows.shape[0] if rows.dim() else 0, packing.sizes, key, tuple(state[key].shape))
        tensors.append(rows.detach())
        del state[key]
    for (home, _), tensor in zip(target, turned(tensors, source, target, packing), strict=True):
        state[_key(prefix, home, end)] = _rows(tensor, home, packing).contiguous()


def _key(prefix: str, home: str, end: str) -> str:
    return f"{prefix}{home}.{end}" if home else f"{prefix}{end}"


def _rows(tensor: Tensor, home: str, packing: Packing) -> Tensor:
    """[rows, in], from or to the axes in which a home keeps them."""
    return tensor.T if packing.axis and not home and tensor.dim() == 2 else tensor


@dataclass(frozen=True)
class Accept:
    """A load_state_dict pre-hook for a module in its original form."""

    packing: Packing

    def __call__(self, state: MutableMapping[str, Any], prefix: str, *_: Any) -> None:
        accept(state, prefix, self.packing, (("", self.packing.layout),))


def accepts(module: nn.Module) -> Packing | None:
    """The packing that a module's load hook knows, if it has one."""
    hooks = (getattr(hook, "hook", hook) for hook in module._load_state_dict_pre_hooks.values())
    return next((hook.packing for hook in hooks if isinstance(hook, Accept)), None)


def in_form(
    state: Mapping[str, Any], packings: Mapping[str, Packing], form: str, layout: Layout | str | None = None, **sizes: int
) -> dict[str, Any]:
    """A state dict with every projection of `packings` (module name -> packing) in one form."""
    if form not in ("split", "fused", "original"):
        raise PlanError("a state dict has one of three forms", found=repr(form)[:40], expected='"split", "fused" or "original"')
    if layout is not None and form != "fused":
        raise PlanError("only the form fused has a layout", found=f"form={form!r}, layout={str(layout)!r}")
    if layout is not None and not any(packing.has_parts_of(Layout(layout)) for packing in packings.values()):
        found = ", ".join(dict.fromkeys(str(packing.layout) for packing in packings.values())) or "no fused projection"
        raise PlanError("no projection has the parts of this layout", layout=str(layout), found=found)
    out = dict(state)
    for name, packing in packings.items():
        prefix = f"{name}." if name else ""
        target: Homes = packing.pieces if form == "split" else (("", packing.layout),)
        mark = None
        if layout is not None and packing.has_parts_of(Layout(layout)):
            other = Layout(layout)
            packing = packing.also(other, **sizes)
            if not packing.is_order_of(other):
                target, mark = (("", other),), marked(other)
        accept(out, prefix, packing, target)
        if mark is not None:
            out[f"{prefix}{MARK}"] = mark
    return out
