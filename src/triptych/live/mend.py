"""The lines that make one side of a conflict hold the rows of the other, with the user's own names."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..render_code import part_line, read_lines, variables
from .entries import Entry
from .find import Fused
from .reading import Fit


def mend(
    side: Entry, other: Entry | None, wanted: Fit | None, part: str, fits: dict[int, Fit | None], entries: Sequence[Entry], fused: Fused
) -> str:
    """Statements after which `side` holds `part` of the layout `wanted`, in which `other` has it; "" when that is no such layout."""
    if wanted is None or part not in wanted.layout.parts:
        return ""
    line = _line_up(side, entries)
    slices = [e for e in line if e.kind == "weight" and e.grid.order.tobytes() == side.grid.order.tobytes()]
    whole = [e for e in line if e.kind == "activation" and e.grid.is_rows and len(e.grid.order) == fused.rows]
    whole = [e for e in whole if _called(e, side)]
    whole = [e for e in whole if not any(o.name[:2] == e.name[:2] and o.index > e.index for o in whole)]  # still bound
    if side.kind != "activation" or not (side.whole or fused.kind != "weight"):
        return "\n".join(_weight_lines(side, part, wanted, slices, line, entries, fused))
    flat = [e for e in whole if e.grid.axes == (len(e.shape) - 1,)]
    tail = [e for e in whole if e.grid.axes == tuple(range(len(e.shape) - len(e.grid.axes), len(e.shape)))]
    if flat:
        source = _called(flat[0], side)
    elif tail:
        source = f"{_called(tail[0], side)}.flatten({-len(tail[0].grid.axes)})"
    else:
        source = fused.weight_text if fused.kind != "weight" else "qkv"
    like = other if other is not None and fits[side.index] is None and side.shape == other.shape else side
    lines = _activation_lines(side, like, part, wanted, source, fits, entries)
    if source == "qkv" and not flat:
        module = fused.weight_text.removesuffix(".weight")
        lines.insert(0, f"# qkv: what {module} returned" if module != fused.weight_text else f"# qkv: the product with {module}")
    return "\n".join(lines)


def _called(entry: Entry, side: Entry) -> str:
    """The name of a tensor in the function of `side`; "" when it has none there."""
    return next((name.text for name in entry.names if name[1:3] == side.name[1:3]), "")


def _line_up(entry: Entry, entries: Sequence[Entry]) -> list[Entry]:
    """The entries that `entry` was computed from, the nearest first."""
    out, todo = [], sorted(entry.sources, reverse=True)
    while todo:
        index = todo.pop(0)
        if index < entry.index and entries[index] not in out:
            out.append(entries[index])
            todo = sorted({*todo, *entries[index].sources}, reverse=True)
    return out


def _weight_lines(
    side: Entry, part: str, wanted: Fit, slices: Sequence[Entry], line: Sequence[Entry], entries: Sequence[Entry], fused: Fused
) -> list[str]:
    layout, sizes = wanted.layout, wanted.sizes
    axis = -1 if fused.axis == 1 and fused.tensor.dim() == 2 else 0
    same = [e for e in entries if e.grid.order.tobytes() == side.grid.order.tobytes()]
    weight = _whole_name("weight", line, fused) or fused.weight_text
    bias = _whole_name("bias", line, fused) or fused.bias_text
    w = side if side.kind == "weight" else slices[0] if slices else None
    b = side if side.kind == "bias" else next((e for e in same if e.kind == "bias" and e in line), None)
    lines = []
    if side.kind != "bias":
        tail = f".view(-1, {', '.join(map(str, fused.tensor.shape[1:]))})" if fused.tensor.dim() > 2 else ""
        lines.append(f"{w.name.text if w else f'w_{part}'} = {part_line(layout, sizes, part, weight, axis)}{tail}")
    if fused.bias is not None and side.kind != "weight":
        lines.append(f"{b.name.text if b else f'b_{part}'} = {part_line(layout, sizes, part, bias, bias=True)}")
    if side.kind == "activation" and (w is None or (fused.bias is not None and b is None)):
        lines.append(f"# and compute {side.name.text} from these, not from slices")
    return lines


def _whole_name(kind: str, line: Sequence[Entry], fused: Fused) -> str | None:
    return next((e.name.text for e in line if e.kind == kind and e.grid.is_rows and len(e.grid.order) == fused.rows), None)


def _activation_lines(
    side: Entry, like: Entry, part: str, wanted: Fit, source: str, fits: dict[int, Fit | None], entries: Sequence[Entry]
) -> list[str]:
    """Reads the fused activation; the parts that the user took in the same statement are read with it."""
    names = variables(wanted.layout)
    fit = fits.get(side.index)
    told = {part: side.name.text} if side.name.text.isidentifier() and side.name.text != "returned" else {part: names[part]}
    for other in entries:
        found = fits.get(other.index)
        if found and fit and other.name[1:] == side.name[1:] and found.layout == fit.layout and other.name.text.isidentifier():
            told.setdefault(found.part, other.name.text)
    swap = {variable: told.get(name, "_") if name in told or len(names) > 1 else variable for name, variable in names.items()}
    lines = read_lines(wanted.layout, wanted.sizes, "\0", batch=None)
    pattern = re.compile(rf"(?<![\w.])({'|'.join(map(re.escape, swap))})(?![\w(])")
    out = [pattern.sub(lambda m: swap[m[1]], line).replace("\0", source) for line in lines]
    out = [line for line in out if set(line.partition(" = ")[0]) - set("_, ")]
    return out + _turned(like, told[part], wanted)


def _turned(like: Entry, name: str, wanted: Fit) -> list[str]:
    """From [..., heads, dims] to the order of axes that the user's tensor has."""
    axes, n, shape = like.grid.axes, len(like.shape), like.grid.rows.shape
    if len(axes) == 1:
        move = "" if axes[0] == n - 1 else f".movedim(-1, {axes[0]})"
        return [f"{name} = {name}.flatten(-2){move}"]
    if len(axes) == 3 and (shape[0] * shape[1], shape[2]) == wanted.shape and axes == (n - 3, n - 2, n - 1):
        return [f"{name} = {name}.unflatten(-2, ({shape[0]}, {shape[1]}))"]
    if len(axes) == 2 and shape == wanted.shape and axes[1] == n - 1 and axes[0] != n - 2:
        return [f"{name} = {name}.transpose({axes[0] - n}, -2)" if axes[0] == n - 3 else f"{name} = {name}.movedim(-2, {axes[0]})"]
    if len(axes) == 2 and axes != (n - 2, n - 1):
        return [f"# its heads and dims are its last axes; yours were axes {axes[0]} and {axes[1]}"]
    return []
