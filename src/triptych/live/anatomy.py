"""Which rows of which parameter are q, k and v of which head, and which columns take each head's output back, layer by layer."""

from __future__ import annotations

import difflib
import threading
import weakref
from collections.abc import Container, ItemsView, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ..arrays import strided
from ..blocks import nest
from ..errors import TraceError
from ..rowmap import Rows
from .places import Columns, Table
from .probe import read

T = TypeVar("T")
_KNOWN: weakref.WeakKeyDictionary[nn.Module, tuple[object, dict[str, Layer]]] = weakref.WeakKeyDictionary()
_BUSY = threading.local()


@dataclass(frozen=True)
class Lines:
    """The rows of one part, or the columns that take the heads' outputs: `grid` [heads, dims] line numbers on an axis of a parameter."""

    parameter: str
    axis: int
    grid: Rows

    @property
    def bias(self) -> str:
        """The name of the bias beside a weight."""
        return "bias".join(self.parameter.rsplit("weight", 1))

    def of(self, weight: Tensor) -> Tensor:
        """[heads, dims, others] of the parameter; a view when there is one, else a gather. Gradients flow through either."""
        lines = weight.movedim(self.axis, 0)
        return take(lines.flatten(1) if lines.dim() > 2 else lines, 0, self.grid)


@dataclass(frozen=True)
class Layer:
    """One attention: `parts` are q, k, v and what stands beside them, `out` the output projection. `name` is the module's."""

    name: str
    parts: Mapping[str, Lines]
    out: Lines | None

    def part(self, name: str) -> Lines:
        if name not in self.parts:
            raise TraceError(f"no projection makes {name}", where=self.name, found=", ".join(self.parts))
        return self.parts[name]


class Layers(Generic[T]):
    """Something of every layer, by module name or by number."""

    def __init__(self, layers: Mapping[str, T]) -> None:
        self._layers = dict(layers)

    def __getitem__(self, layer: str | int) -> T:
        name = self.name(layer)
        return self._layers[name]

    def name(self, layer: str | int) -> str:
        """The module name. Raises TraceError: there is no such layer."""
        names = list(self._layers)
        if isinstance(layer, int) and -len(names) <= layer < len(names):
            return names[layer]
        if layer in self._layers:
            return str(layer)
        near = difflib.get_close_matches(str(layer), names, 1)
        there = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") if names else "none"
        raise TraceError("no such layer", found=repr(layer), expected=there, try_=f"did you mean {near[0]!r}?" if near else None)

    def __contains__(self, layer: object) -> bool:
        return layer in self._layers

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def items(self) -> ItemsView[str, T]:
        return self._layers.items()

    def __len__(self) -> int:
        return len(self._layers)

    def __repr__(self) -> str:
        return "\n".join(self._layers)


def anatomy(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Layer]:
    """The layers of a model with attention, as `probe` sees them run, in the order of its modules; found once per model.

    Args: what to call the model with, as for `probe`. Raises TraceError: it cannot be run, or no attention is seen.
    """
    if not isinstance(model, nn.Module):
        raise TraceError("a model is wanted", expected="a torch.nn.Module", found=type(model).__name__)
    key = tuple((name, p.shape) for name, p in model.named_parameters())
    known = _KNOWN.get(model)
    if known is not None and known[0] == key:
        return known[1]
    _BUSY.depth = getattr(_BUSY, "depth", 0) + 1
    try:
        reading = read(model, *args, **kwargs)
    finally:
        _BUSY.depth -= 1
    modules = dict(model.named_modules())
    found = _layers(reading.tables, reading.outputs, {name for name, module in modules.items() if hasattr(module, "packing")})
    layers = {name: found[name] for name in modules if name in found}
    if not layers:
        raise TraceError("no attention is seen", where=type(model).__name__, try_="tt.probe(model) shows what is")
    _KNOWN[model] = (key, layers)
    return layers


def busy() -> bool:
    """Whether a model is being run on this thread only to see what its rows are."""
    return bool(getattr(_BUSY, "depth", 0))


def home(parameter: str, hinged: Container[str] = ()) -> str:
    """The module in which a projection stands: that of a bare parameter, the parent of a projection's own module.

    hinged: modules that stand for a projection whose parts they hold.
    """
    owner, _, name = parameter.rpartition(".")
    owner = unwrapped(owner)
    found = owner.rpartition(".")[0] if name == "weight" else owner
    return found.rpartition(".")[0] if found in hinged else found


def unwrapped(module: str) -> str:
    """The name of the adapter around a module, if there is one."""
    while module.endswith(".base_layer"):
        module = module.removesuffix(".base_layer")
    return module


def take(tensor: Tensor, axis: int, grid: Rows) -> Tensor:
    """Lines of an axis, which becomes two: [..., lines, ...] -> [..., heads, dims, ...]; a view when one stride fits each, else a copy."""
    steps = grid[0] - grid[0, 0]
    outer, inner = nest(grid[:, 0] - grid[0, 0]), nest(steps)
    if outer is not None and inner is not None and len(outer) == len(inner) == 1 and (grid == grid[:, :1] + steps).all():
        return strided(tensor, axis, int(grid[0, 0]), grid.shape, [outer[0].into, inner[0].into])  # type: ignore[no-any-return]
    index = torch.from_numpy(grid.ravel().copy()).to(tensor.device)
    shape = (*tensor.shape[:axis], *grid.shape, *tensor.shape[axis + 1 :])
    return tensor.index_select(axis, index).reshape(shape)


def _layers(tables: Mapping[str, Table], outputs: Mapping[str, Columns], hinged: Container[str]) -> dict[str, Layer]:
    parts: dict[str, dict[str, Lines]] = {}
    for name, table in tables.items():
        known = parts.setdefault(home(name, hinged), {})
        for part, grid in _grids(table).items() if len(table.place.kept) == 1 else ():
            if part not in known or len(grid) > len(known[part].grid):  # the rotated piece of every query, not of the one key
                known[part] = Lines(name, table.place.kept[0], grid)
    outs: dict[str, list[Lines]] = {}
    for name, columns in outputs.items():
        order = _grid(dict(enumerate(columns.places)))
        if order is not None and columns.axis is not None:
            outs.setdefault(home(columns.queries, hinged), []).append(Lines(name, columns.axis, order))
    return {
        name: Layer(name, found, outs[name][0] if len(outs.get(name, ())) == 1 else None)
        for name, found in parts.items()
        if {"q", "k", "v"} & set(found)
    }


def _grids(table: Table) -> dict[str, Rows]:
    """Part -> [heads, dims] rows. A query in two pieces, one of them rotated, is also q as a whole."""
    found: dict[str, dict[int, tuple[int, int]]] = {}
    for row, roles in table.roles.items():
        for part, place in roles.items():
            found.setdefault(part, {})[row] = place
    grids = {part: grid for part, places in found.items() if (grid := _grid(places)) is not None}
    if {"nope", "rope"} <= set(grids) and "q" not in grids and len(grids["nope"]) == len(grids["rope"]):
        grids["q"] = np.concatenate([grids["nope"], grids["rope"]], axis=1)
    return grids


def _grid(places: Mapping[int, tuple[int, int]]) -> Rows | None:
    """[heads, dims] line numbers of lines at (head, dim); None unless every place is taken once."""
    heads, dims = (max(place[i] for place in places.values()) + 1 for i in (0, 1))
    if heads * dims != len(places) or len(set(places.values())) != len(places):
        return None
    grid = np.empty((heads, dims), np.int64)
    for line, (head, dim) in places.items():
        grid[head, dim] = line
    return grid
