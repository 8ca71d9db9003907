"""Which modules of a model are fused projections and how their rows lie: asked of `probe`, of the family records, or of the user."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..axes import RESERVED
from ..errors import PlanError
from ..families import declared
from ..layout import Layout, count
from ..pieces import alone, base_names, listed
from ..rowmap import between
from ..sizes import Sizes, bind, does_not_fit
from .probe import Probed, probe

RECORDS = "records"
"""In place of layouts: what the family records say of `model.config`."""
TAKEN = frozenset(dir(nn.Module)) | {"weight", "bias", "layout", "packed", "packing", "pieces"}
"""Names that a part cannot have as a module."""
Layouts = str | Mapping[str, Layout | str | Probed]


@dataclass(frozen=True)
class Packing:
    """How the rows of one projection lie as the model's own code reads them. `axis` of the weight: 0 in nn.Linear, 1 in Conv1D."""

    layout: Layout
    sizes: Sizes
    axis: int

    @cached_property
    def pieces(self) -> tuple[tuple[str, Layout], ...]:
        """Part -> layout of its rows in a tensor of its own."""
        return tuple((part, alone(self.layout, part)) for part in base_names(self.layout))

    def rows(self, layout: Layout) -> int:
        return count(layout.factors, self.sizes)

    def is_order_of(self, layout: Layout) -> bool:
        """Whether a layout puts the rows where this one has them. Raises IncompatibleError when it labels other rows."""
        return between(layout, self.layout, self.sizes).is_identity

    def has_parts_of(self, layout: Layout) -> bool:
        return set(layout.parts) == set(self.layout.parts)

    def also(self, *layouts: Layout, **sizes: int) -> Packing:
        """The same with sizes for other layouts as well. Raises IncompatibleError or SizeError when they do not label the same rows."""
        used = {axis for layout in (self.layout, *layouts) for axis in layout.axes} | RESERVED
        known = {axis: size for axis, size in self.sizes.items() if axis in used}
        return Packing(self.layout, bind(self.layout, *layouts, rows=self.rows(self.layout), **{**known, **sizes}), self.axis)

    def __str__(self) -> str:
        return f"{self.layout}  {self.sizes.of(self.layout)}"


@dataclass(frozen=True)
class Found:
    """The projections of a model by module name, and those that are left alone, with the reason; asked for `by_name`, or all there are."""

    packings: dict[str, Packing]
    left: dict[str, str]
    by_name: bool = False


def find(model: nn.Module, layouts: Layouts | None, only: Sequence[str], sizes: Mapping[str, int], apart: Sequence[str] = ()) -> Found:
    """The fused projections that can be replaced by modules.

    Args: layouts: None asks `probe`; "records" the family records; or module name or glob -> layout, or what `probe` gave. only: globs
    of module names. sizes: for layouts given by hand, as far as the row count leaves them open. apart: modules that were replaced already.
    Raises PlanError for what was asked by name and cannot be: a layout given by hand, or a name in `only`. A sharded or
        quantised model is refused as a whole, unless its layouts are given by hand.
    """
    told = dict(_told(model, layouts))
    by_name = bool(only) or (isinstance(layouts, Mapping) and not all(isinstance(value, Probed) for value in layouts.values()))
    told = {name: value for name, value in told.items() if _chosen(name, only)}
    _all_match(only, [*told, *apart], model)
    told = {name: value for name, value in told.items() if not any(name == home or name.startswith(f"{home}.") for home in apart)}
    packings: dict[str, Packing] = {}
    left: dict[str, str] = {}
    for name, value in told.items():
        fault = module_fault(model, name)
        if fault is None:
            packing = _packing(name, model.get_submodule(name), value, sizes)
            fault = packing if isinstance(packing, str) else None
            if not isinstance(packing, str):
                packings[name] = packing
        if fault is not None:
            if by_name:
                raise PlanError("a projection cannot be replaced by modules", module=name, found=fault)
            left[name] = fault
    return Found(packings, left, by_name)


def _chosen(name: str, only: Sequence[str]) -> bool:
    return not only or any(fnmatchcase(name, glob) for glob in only)


def _all_match(only: Sequence[str], told: Sequence[str], model: nn.Module) -> None:
    for glob in only:
        if not any(fnmatchcase(name, glob) for name in told):
            there = any(fnmatchcase(name, glob) for name, _ in model.named_modules())
            raise PlanError(
                "nobody knows a fused projection of this name",
                module=glob,
                found="a module in which no fused projection was seen" if there else "no such module",
                expected=listed(told) or "none was found",
                try_='give its layout: layouts={"' + glob + '": "h (q|k|v) d"}' if there else None,
            )


# Who says so


def _told(model: nn.Module, layouts: Layouts | None) -> Iterator[tuple[str, Packing | Probed | Layout]]:
    if isinstance(layouts, Mapping):
        names = [name for name, _ in model.named_modules(remove_duplicate=False)]
        for glob, value in layouts.items():
            hits = [name for name in names if name == glob or (name and fnmatchcase(name, glob))] or [glob] * isinstance(value, Probed)
            if not hits:
                raise PlanError("no module has such a name", found=glob, expected=listed(name for name in names if name))
            yield from ((name, value if isinstance(value, Probed) else Layout(value)) for name in hits)
        return
    if layouts not in (None, RECORDS):
        raise PlanError(
            "layouts are given by module name", found=repr(layouts)[:60], expected='{"h.*.attn.c_attn": "(q|k|v) h d"} or "records"'
        )
    _refuse(model)
    yield from probe(model).items() if layouts is None else _recorded(model)


def _recorded(model: nn.Module) -> Iterator[tuple[str, Packing]]:
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        raise PlanError("family records need a config", module=type(model).__name__, found="no model.config", try_="leave layouts away")
    for said in declared(config.to_dict(), {name: tuple(p.shape) for name, p in model.named_parameters()}).projections:
        if said.fused and said.name.endswith(".weight"):
            yield said.name.removesuffix(".weight"), Packing(said.layout, said.sizes, said.axis)


def _packing(name: str, module: nn.Module, told: Packing | Probed | Layout, sizes: Mapping[str, int]) -> Packing | str:
    """The sized packing of a module, or why there is none. Raises SizeError when the rows do not fill a layout given by hand."""
    axis = axis_of(module)
    weight: Tensor = module._parameters["weight"]  # type: ignore[assignment]
    rows = weight.shape[axis]
    if isinstance(told, Layout):
        told = Packing(told, bind(told, rows=rows, **sizes), axis)
    if told.layout is None:
        return f"probe cannot tell its layout: {told.note}"
    packing = Packing(told.layout, told.sizes, axis)
    if packing.rows(packing.layout) != rows:
        raise does_not_fit(packing.layout, rows, packing.sizes, name, tuple(weight.shape))
    return part_fault(packing) or packing


def part_fault(packing: Packing) -> str | None:
    """Why the parts of a layout cannot be modules of their own."""
    for path in packing.layout.paths:
        if len(path.names) > 1:
            return f"{' and '.join(path.names)} are the same rows"
        if path.zero:
            return f"part {path.names[0]} is declared zero"
    names = [part for part, _ in packing.pieces]
    if len(names) < 2:
        return "it holds a single part"
    if taken := [part for part in names if part in TAKEN or not part]:
        return f"a module cannot have a part called {taken[0]!r}"
    return None


# What can be replaced


def axis_of(module: nn.Module) -> int:
    """The packed axis of the weight."""
    return int(_is_conv1d(module))


def _is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D, a linear map with a weight [in, rows]; not torch's convolution."""
    return any(cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils" for cls in type(module).__mro__)


def module_fault(model: nn.Module, name: str) -> str | None:
    """Why a module cannot be replaced by others, in words; None when it can."""
    if not name:
        return "it is the whole model: put it into another module, such as nn.Sequential"
    home, _, last = name.rpartition(".")
    try:
        parent = model.get_submodule(home)
        module = parent.get_submodule(last)
    except AttributeError:
        return "it is a bare parameter: the code around it calls no module, so modules in its place would never run"
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    fault = next((why for p in (weight, bias) if p is not None and (why := tensor_fault(p))), None)
    if fault or _is_quantised(module):
        return fault or QUANTISED
    if weight is None or weight.dim() != 2 or not (isinstance(module, nn.Linear) or _is_conv1d(module)):
        return f"a {type(module).__name__} is no linear map with one weight [rows, in]"
    if extra := [key for key in (*module._parameters, *module._buffers, *module._modules) if key not in ("weight", "bias")]:
        return f"it holds {', '.join(extra)} besides weight and bias"
    if "forward" in vars(module):
        return "its forward was replaced by another (offloading hooks of accelerate do so)"
    if module._state_dict_hooks or module._state_dict_pre_hooks or module._load_state_dict_post_hooks:
        return "it has state dict hooks of its own"
    if getattr(parent, "base_layer", None) is module:
        return f"it is inside an adapter ({type(parent).__name__}): unfuse first, then add the adapter"
    return None if _computes_linear(module) else f"{type(module).__name__} computes something else than a linear map"


QUANTISED = "it is quantised: blocks and scales do not follow the rows of one part"


def tensor_fault(tensor: Tensor) -> str | None:
    """Why the rows of a parameter cannot be moved."""
    if tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None):
        return "its gradient has hooks, which expect all its rows and no others"
    return numbers_fault(tensor)


def numbers_fault(tensor: Tensor) -> str | None:
    """Why a parameter is no plain tensor of numbers."""
    if any(cls.__name__ == "DTensor" for cls in type(tensor).__mro__):
        return "it is sharded (DTensor of FSDP2 or tensor parallelism): rows of one part lie on several ranks; do this before sharding"
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.dtype.itemsize == 1:
        return QUANTISED
    if type(tensor) not in (nn.Parameter, Tensor):
        return f"its weight is a {type(tensor).__name__}, no plain tensor: what it keeps besides numbers may not follow the rows"
    return None


def _is_quantised(module: nn.Module) -> bool:
    return "qweight" in module._buffers or "qweight" in module._parameters or ".quantized." in type(module).__module__


def _refuse(model: nn.Module) -> None:
    """Raises PlanError for a model that cannot be run under labels, because some of its weights are no plain tensors."""
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        fault = QUANTISED if _is_quantised(module) else numbers_fault(weight) if weight is not None else None
        if fault:
            raise PlanError(
                "this model is refused",
                module=name or type(model).__name__,
                found=fault,
                try_='layouts={"*.qkv": "h (q|k|v) d"} takes those modules that it names',
            )


def _computes_linear(module: nn.Module) -> bool:
    """Whether a subclass with a forward of its own computes a linear map all the same: tried on three vectors."""
    cls: Any = type(module)
    if cls.forward is nn.Linear.forward or cls.__name__ == "Conv1D":
        return True
    weight: Tensor = module._parameters["weight"]  # type: ignore[assignment]
    if weight.is_meta:
        return False
    x = torch.linspace(-1, 1, 3 * weight.shape[1], device=weight.device, dtype=weight.dtype).reshape(3, -1)
    with torch.no_grad():
        try:
            torch.testing.assert_close(cls.forward(module, x), nn.functional.linear(x, weight, module._parameters.get("bias")))
        except Exception:  # whatever the module's own code raises
            return False
    return True
