"""Runs a user's function once, unchanged, and reports which rows of the fused weight every tensor bound to a name in it holds."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import TraceError, TriptychError
from ..families import declared, lookup
from ..layout import Layout
from ..rowmap import parts
from ..sizes import Sizes
from .compare import Pair, conflicts, rows_of
from .entries import Entry, Notebook
from .find import Fused, config_of, find, hints_of
from .mend import mend
from .names import Names, is_users
from .reading import Fit, Held, Reader, Rows, in_words, role_of, run_text
from .report import Conflict, Report, TracedTensor
from .shadow import Shadow


def trace(
    fn: Callable[..., Any],
    *args: Any,
    fused: Tensor | nn.Module | str | None = None,
    layout: Layout | str | None = None,
    **kwargs: Any,
) -> Report:
    """Call `fn(*args, **kwargs)` once and report which rows of its fused projection every named tensor holds.

    >>> qkv = torch.nn.Linear(12, 36)
    >>> def attend(x):
    ...     fused = qkv(x)
    ...     q, k, v = fused.view(2, 5, 3, 12).split(4, dim=-1)
    ...     return q, k, v
    >>> [(t.name, str(t.layout), t.part) for t in trace(attend, torch.randn(2, 5, 12)).tensors[1:]]
    [('q', 'h (q|k|v) d', 'q'), ('k', 'h (q|k|v) d', 'k'), ('v', 'h (q|k|v) d', 'v')]

    Args: fn: any function, method or module; it runs for real, under the grad mode, autocast and hooks in force.
        fused: the projection, when more than one could be meant: its weight, its module, or its name. A fused activation can be given
            too; its last axis is then followed.
        layout: the layout that is known to be right; else that of the model's family, when its config names one.
    Exceptions of `fn` are in the report's `error`, what it returns in `result`. The report's tensors hold row numbers and no data.
    What leaves torch (NumPy, kernels of other libraries) is not followed: a tensor made from it is not in the report.
    Raises TraceError when the fused projection cannot be told.
    """
    if not callable(fn):
        raise TraceError("trace takes a function, a method or a module", found=type(fn).__name__, try_="tt.trace(model.get_q_matrix, x)")
    fn = getattr(fn, "_torchdynamo_orig_callable", fn)  # of what torch.compile made, the function that it was made of
    target = find(fn, args, kwargs, fused)
    truth, source, hints = _truth(target, fn, layout)
    shadow = Shadow()
    book = Notebook(shadow, target.rows)
    if target.kind != "output":
        shadow.label(target.tensor.detach(), target.axis, target.kind)
    if target.bias is not None:
        shadow.label(target.bias.detach(), kind="bias")
    torch.clear_autocast_cache()  # casts made before would hide the labels
    names = Names(book.seen, shadow.version, book.place)
    result: Any = None
    error: Exception | None = None
    try:
        with _labelled_output(target, shadow), shadow, names:
            result = fn(*args, **kwargs)
    except Exception as raised:
        inner = raised.__traceback__.tb_next if raised.__traceback__ else None
        error = raised.with_traceback(inner)
    book.returned(result, names.outermost)
    shadow.findings.update(names.trouble)
    code = names.outermost.code if names.outermost else getattr(getattr(fn, "forward", fn), "__code__", None)
    title = type(fn).__name__ if isinstance(fn, nn.Module) or code is None else code.co_name
    file = code.co_filename if code else ""
    return _report(title, file, target, book.entries, shadow, truth, source, hints, result, error)


@contextmanager
def _labelled_output(target: Fused, shadow: Shadow) -> Iterator[None]:
    """Of a projection whose weight cannot be labelled, the rows begin with what it returns."""
    if target.kind != "output" or target.owner is None:
        yield
        return

    def label(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            shadow.label(output.detach(), output.dim() - 1, "activation")

    handle = target.owner.register_forward_hook(label)
    try:
        yield
    finally:
        handle.remove()


def _truth(target: Fused, fn: object, layout: Layout | str | None) -> tuple[Layout | None, str, Mapping[str, int]]:
    """(the right layout, who says so, sizes)."""
    hints = hints_of(target, fn)
    if layout is not None:
        return Layout(layout), "layout= says so", hints
    config = config_of(target, fn)
    for name in _names_in_files(target, config):
        try:
            said = declared(config, {name: tuple(target.tensor.shape)}, sizes=hints if config is None else None)
        except TriptychError:
            continue
        for projection in said.projections:
            if projection.fused and projection.name == name and projection.axis == target.axis:
                return projection.layout, f"{said.family or 'torch'}, {projection.source}", {**hints, **projection.sizes}
    return None, "", hints


def _names_in_files(target: Fused, config: Mapping[str, Any] | None) -> Iterator[str]:
    """Names that the projection may have in a checkpoint: its own, then those in which the family's records end as it does."""
    own = target.name if target.name.endswith("_weight") else f"{target.name}.weight"
    yield own
    if config is not None:
        layer = str(getattr(target.home, "layer_idx", None) or 0)
        for record in lookup(str(config["model_type"])):
            for entry in record.entries:
                name = entry.home + entry.name + entry.tails[0]
                if name.split(".")[-2:] == own.split(".")[-2:]:
                    yield name.replace("{L}", layer).replace("{S}", "0").replace("*", "x")


def _report(
    title: str,
    file: str,
    target: Fused,
    entries: list[Entry],
    shadow: Shadow,
    truth: Layout | None,
    source: str,
    hints: Mapping[str, int],
    result: Any,
    error: Exception | None,
) -> Report:
    held = {entry.index: Held(entry.grid, tuple(name.text for name in entry.names)) for entry in entries}
    usable = {axis: size for axis, size in hints.items() if axis in ("h", "g", "d")}
    reader = Reader(target.rows, list(held.values()), usable, truth)
    fits = {index: reader.best(one) for index, one in held.items()}
    frame = _reference(fits, truth)
    if truth is not None and reader.truth_sizes is None:
        known = " ".join(f"{axis}={size}" for axis, size in usable.items())
        shadow.findings[f"{truth} fits {target.rows} rows at none of the sizes seen: " + (known or "no module here names heads")] = ""
    misread = list(_misread(entries, fits, truth, reader.truth_sizes, title, target)) if truth is not None else []
    return Report(
        title,
        file,
        target.weight_text,
        target.rows,
        tuple(_tensor(entry, fits[entry.index], target.rows, frame) for entry in entries),
        tuple(_conflict(pair, fits, entries, target, truth, frame) for pair in conflicts(entries, fits, reader, truth)),
        tuple(f"{what}{f' ({place})' if place else ''}" for what, place in shadow.findings.items()),
        error,
        _line_of(error),
        result,
        truth,
        source,
        tuple(text for text, _ in misread),
        "\n".join(fix for _, fix in misread if fix),
    )


def _misread(
    entries: list[Entry], fits: dict[int, Fit | None], truth: Layout, sizes: Sizes | None, title: str, target: Fused
) -> Iterator[tuple[str, str]]:
    """Tensors taken for a part that hold that of another layout and are not only on the way to the true one; and the lines that mend them.

    A tensor is taken for what its name speaks of, what is returned for what the function's name does; one of no such name if it has heads.
    """
    groups: dict[tuple[int, Layout], list[tuple[Entry, Fit]]] = {}
    for entry in entries:
        fit, text = fits[entry.index], entry.name.text
        role = role_of(title) if text == "returned" else role_of(text)
        if fit is None and role in truth.parts and sizes is not None and _is_mixed(entry, role, truth, sizes):
            if not any(entry.index in e.sources and fits[e.index] for e in entries):
                yield f"{text} (line {entry.name.line}) holds {in_words(entry.grid.order, target.rows, truth, sizes)}", ""
            continue
        if fit is None or fit.layout == truth or role not in (fit.part, None) or (role is None and len(entry.grid.axes) < 2):
            continue
        onward = (e for e in entries if entry.index in e.sources and np.array_equal(np.sort(e.grid.order), np.sort(entry.grid.order)))
        if not any(onward):
            groups.setdefault((entry.name.line, fit.layout), []).append((entry, fit))
    for (line, layout), found in groups.items():
        fixes = []
        for entry, fit in found:
            shape = next((part.shape for part in parts(truth, sizes) if fit.part in part.path.names), None) if sizes else None
            wanted = Fit(truth, sizes, fit.part, shape, 0) if sizes and shape else None
            fixes += mend(entry, None, wanted, fit.part, fits, entries, target).splitlines()
        names, held = ", ".join(entry.name.text for entry, _ in found), ", ".join(fit.part for _, fit in found)
        text = f"{names} (line {line}) {'is' if len(found) == 1 else 'are'} {held} of {layout}"
        yield text, "\n".join(dict.fromkeys(fixes))


def _is_mixed(entry: Entry, role: str, truth: Layout, sizes: Sizes) -> bool:
    """Whether a tensor has rows of other parts than the one that it is named for."""
    own = next(part.rows() for part in parts(truth, sizes) if role in part.path.names)
    return entry.grid.is_rows and not bool(np.isin(entry.grid.order, own).all())


def _reference(fits: Mapping[int, Fit | None], truth: Layout | None) -> Fit | None:
    """The layout in which other rows are put into words: the true one, else the first found."""
    found = [fit for fit in fits.values() if fit is not None]
    return next((fit for fit in found if fit.layout == truth), found[0] if found else None)


def _tensor(entry: Entry, fit: Fit | None, total: int, frame: Fit | None) -> TracedTensor:
    grid, notes = entry.grid, []
    rows = grid.rows.ravel()
    if fit is not None:
        if fit.flipped:
            notes.append("axes are dims, heads")
        if len(grid.order) < len(rows):
            notes.append(f"each row {len(rows) // len(grid.order)} times")
    elif entry.mixture:
        notes.append(entry.mixture)
    else:
        held = rows[rows >= 0]
        if grid.rows.ndim > 2 and len(np.unique(held)) < len(held):
            notes.append(f"other rows along each of axes {', '.join(map(str, grid.axes))}")
        notes.append(in_words(held, total, frame.layout if frame else None, frame.sizes if frame else None))
        if bool((rows < 0).any()):
            notes.append(f"{int((rows < 0).sum())} of {rows.size} elements are none of its rows")
    if grid.holes:
        notes.append("not everywhere")
    chief = entry.name
    return TracedTensor(
        (chief.text, *dict.fromkeys(name.text for name in entry.names if name.text != chief.text)),
        chief.line,
        entry.shape,
        fit.layout if fit else None,
        fit.part if fit else None,
        ", ".join(notes),
        entry.kind,
        chief.function,
        entry.file,
        np.maximum(rows, -1),
    )


def _conflict(
    pair: Pair, fits: dict[int, Fit | None], entries: list[Entry], target: Fused, truth: Layout | None, frame: Fit | None
) -> Conflict:
    part, a, b = pair
    fit_a, fit_b = fits[a.index], fits[b.index]
    layouts = [fit.layout if fit else None for fit in (fit_a, fit_b)]
    wrong = None
    if truth is not None and truth in layouts:
        wrong = "b" if layouts[0] == truth else "a"
    rows = [rows_of(entry, fit) for entry, fit in ((a, fit_a), (b, fit_b))]
    notes = [_holds(one, other, fit, frame) for one, other, fit in ((rows[0], rows[1], fit_a), (rows[1], rows[0], fit_b))]
    return Conflict(
        a.name.text,
        b.name.text,
        part,
        a.name.line,
        b.name.line,
        layouts[0],
        layouts[1],
        notes[0],
        notes[1],
        len(rows[0]),
        len(np.intersect1d(rows[0], rows[1])),
        mend(a, b, fit_b, part, fits, entries, target),
        mend(b, a, fit_a, part, fits, entries, target),
        wrong,
    )


def _holds(rows: Rows, other: Rows, fit: Fit | None, frame: Fit | None) -> str:
    """Which rows a tensor holds: of the first head that is another in `other`; all of them when they are no part."""
    if fit is None:
        return in_words(rows, 0, frame.layout if frame else None, frame.sizes if frame else None)
    heads, dims = fit.shape
    differs = np.flatnonzero(rows != other) if len(rows) == len(other) else np.zeros(1, np.int64)
    head = int(differs[0]) // dims
    return f"head {head} is {run_text(rows.reshape(heads, dims)[head])}"


def _line_of(error: Exception | None) -> int | None:
    """The line of the user's code that raised."""
    if error is None or error.__traceback__ is None:
        return None
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if is_users(frame.f_code)]
    return lines[-1] if lines else None
