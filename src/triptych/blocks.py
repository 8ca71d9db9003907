"""Row blocks of a packed tensor: views of its parts, kv groups or heads, for optimizers, pruning and edits in place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, TypeVar

import numpy as np

from .arrays import normal_axis, shape_of, strided
from .errors import LayoutError, SizeError
from .layout import Layout, count
from .rowmap import Dim, Part, Rows, from_indices, parts
from .sizes import Sizes, bind, does_not_fit

By = Literal["part", "head", "group"]
T = TypeVar("T")


def blocks(tensor: T, layout: Layout | str, by: By = "head", axis: int = 0, rank: int = 0, world: int = 1, **sizes: int) -> dict[str, T]:
    """Views of the rows of every part, kv group or head of a packed tensor; each row is in one block.

    Args:
        tensor: a weight [rows, in] or a bias [rows], NumPy or torch; or what has the shape of one (a gradient, a momentum).
        by: "head": `q[5]` is [dims, in]. "group": `q[g=1]` is [r, dims, in], the query heads of kv head 1, and `k[g=1]` [1, dims, in].
            "part": `q` is [heads, dims, in].
        axis: the packed axis: 0, or 1 for a Conv1D weight [in, rows].
        rank, world: the tensor is the fragment that tensor-parallel rank `rank` of `world` holds: of every part, its share of whole
            heads, or one copied kv head where there are fewer than ranks. `sizes` are then those of the whole tensor, and heads keep
            the numbers they have in it. Without them a fragment is a tensor with sizes of its own.
        sizes: any that determine the layout together with the row count.
    Returns: name -> view, in the order q, k, v, gate, up, others. Dims stand in the order in which they lie. Heads that do not lie at
        one stride (`q` of `g (q r|k|v) d`, by part) have two axes, [g, r, dims, in]. Of an aliased part (`k=v`) there is one block.
    Raises SizeError: the rows do not fill the layout, or do not divide among the ranks; LayoutError: there is no such view.

    >>> found = blocks(np.arange(12), "h (q|k|v) d", h=2)
    >>> list(found), found["k[1]"].tolist()
    (['q[0]', 'q[1]', 'k[0]', 'k[1]', 'v[0]', 'v[1]'], [8, 9])
    >>> list(blocks(np.arange(6), "h (q|k|v) d", rank=1, world=2, h=2, d=2))
    ['q[1]', 'k[1]', 'v[1]']
    """
    value, shape = Layout(layout), shape_of(tensor)
    axis = normal_axis(axis, len(shape), shape)
    whole, bound = _bound(value, shape[axis], rank, world, sizes)
    if count(value.factors, bound) != shape[axis]:
        raise does_not_fit(value, shape[axis], bound, shape=shape)
    grids = {part: _grid(pieces) for part, pieces in _pieces(value, bound).items()}
    heads = {part: pieces[0].shape[0] for part, pieces in _pieces(value, whole).items()}
    first = {part: _first(len(grid), heads[part], rank, world) for part, grid in grids.items()}
    found: dict[str, T] = {}
    groups, first_group = _groups(value, bound, grids, first) if by == "group" else (1, 0)
    for part, grid in grids.items():
        if by == "head":
            for number, rows in enumerate(grid, first[part]):
                found[f"{part}[{number}]"] = _view(tensor, axis, rows[None], value, part, heads=False)
        elif by == "group":
            for number, rows in enumerate(grid.reshape(groups, -1, grid.shape[1]), first_group):
                found[f"{part}[g={number}]"] = _view(tensor, axis, rows, value, part)
        elif by == "part":
            found[part] = _view(tensor, axis, grid, value, part)
        else:
            raise LayoutError("blocks are cut by part, by group or by head", found=repr(by))
    return found


def _pieces(layout: Layout, sizes: Sizes) -> dict[str, list[Part]]:
    """Part -> what is nested in it (`q.rot` and `q.pass` are `q`), parts in the order q, k, v, ..."""
    order = {name: i for i, name in enumerate(layout.parts)}
    found: dict[str, list[Part]] = {}
    for part in sorted(parts(layout, sizes), key=lambda part: min(order[name] for name in part.path.names)):
        if not part.path.zero:
            found.setdefault("=".join(dict.fromkeys(name.split(".")[0] for name in part.path.names)), []).append(part)
    odd = next((name for name, pieces in found.items() if len({piece.shape[0] for piece in pieces}) > 1), None)
    if odd is not None:
        raise LayoutError(f"the pieces of {odd} have different numbers of heads", layout=str(layout))
    return found


def _grid(pieces: list[Part]) -> Rows:
    """[heads, dims] row numbers, the rows of a head ascending."""
    return np.sort(np.concatenate([piece.rows() for piece in pieces], axis=1), axis=1)


def _groups(layout: Layout, sizes: Sizes, grids: Mapping[str, Rows], first: Mapping[str, int]) -> tuple[int, int]:
    """Number of kv groups, and the number of the first one."""
    kv = next((part for part in grids if part.split("=")[0] in ("k", "v")), None)
    groups = len(grids[kv]) if kv is not None else sizes.get("g", 0)
    odd = next((part for part, grid in grids.items() if not groups or len(grid) % groups), None)
    if odd is not None:
        found = f"{len(grids[odd])} heads of {odd}" + (f", {groups} of {kv}" if groups else ", and no g")
        raise LayoutError("the heads of a part do not divide into kv groups", layout=f"{layout} with {sizes.of(layout)}", found=found,
                          try_="by='part' or by='head'")  # fmt: skip
    return groups, first[kv] if kv is not None else next(iter(first.values())) * groups // len(next(iter(grids.values())))


def _first(here: int, whole: int, rank: int, world: int) -> int:
    """The number of the first head that a rank holds."""
    return rank * here if here * world == whole else rank * whole // world


def _bound(layout: Layout, rows: int, rank: int, world: int, sizes: Mapping[str, int]) -> tuple[Sizes, Sizes]:
    """Sizes of the whole tensor and of the fragment."""
    if world < 1 or not 0 <= rank < world:
        raise SizeError("no such rank", expected="0 <= rank < world", found=f"rank {rank} of {world}")
    if world == 1:
        bound = bind(layout, rows=rows, **sizes)
        return bound, bound
    try:
        whole = bind(layout, **sizes)
    except SizeError:  # the row count may tell the size that is missing
        whole = bind(layout, rows=rows * world, **sizes)
    cut = dict(_shared(layout, whole, world))
    return whole, bind(layout, **{axis: cut.get(axis, whole[axis]) for axis in layout.axes})


def _shared(layout: Layout, whole: Sizes, world: int) -> dict[str, int]:
    """The axes that a rank has less of."""
    used = set(layout.axes)
    headless = [path for path in layout.paths if not path.heads]
    if len(headless) == len(layout.paths):
        return {axis: _share(axis, whole[axis], world) for axis in {path.axes[0] for path in layout.paths if path.axes}}
    if headless:
        raise LayoutError("only whole heads are dealt to ranks", layout=str(layout), found=f"{headless[0].names[0]} has no head axis")
    tensor_parallel = used & {"t", "m"}
    if tensor_parallel:
        axis = tensor_parallel.pop()
        return {axis: _share(axis, whole[axis], world)}
    cut: dict[str, int] = {}
    if "g" in whole and world % whole["g"] == 0:
        cut["g"] = 1
    elif "g" in whole:
        cut["g"] = _share("g", whole["g"], world)
    if "h" in whole:
        cut["h"] = _share("h", whole["h"], world)
        if "g" in cut:
            cut["r"] = cut["h"] // cut["g"]
    return cut


def _share(axis: str, size: int, world: int) -> int:
    if size % world:
        raise SizeError("heads do not divide among the ranks", expected=f"{axis} divisible by {world}", found=f"{axis}={size}")
    return size // world


def _view(tensor: T, axis: int, grid: Rows, layout: Layout, part: str, heads: bool = True) -> T:
    """The rows of a grid [heads, dims] as a view: heads in one axis where their stride allows it, dims in one."""
    starts, steps = grid[:, 0], grid[0] - grid[0, 0]
    nests = [nest(starts - starts.min()), nest(steps)]
    if (grid - starts[:, None] != steps).any() or starts[0] != starts.min() or nests[0] is None or nests[1] is None:
        raise LayoutError("no strided view holds these rows", layout=str(layout), found=part, try_="by='head'; tt.split copies")
    dims = [*(nests[0] if heads else ()), *nests[1]]
    return strided(tensor, axis, int(starts[0]), [dim.size for dim in dims], [dim.into for dim in dims])  # type: ignore[no-any-return]


def nest(rows: Rows) -> tuple[Dim, ...] | None:
    """Row numbers from 0 as a nest of steps, or None."""
    found = from_indices(rows, int(rows.max()) + 1).blocks
    if len(found) != 1 or math.prod(dim.size for dim in found[0].dims) != len(rows):
        return None
    return found[0].dims or (Dim(1, 1, 1),)
