"""`prune_heads_`: takes heads out of a model for good, and keeps the result only if the model then does what it did without them."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import PlanError, TraceError
from .anatomy import Layer, Layers, Lines, anatomy
from .inputs import Call, inputs_of
from .probe import untouched

QUERY_HEADS = re.compile(r"^(n_heads?|num_(attention_|query_)?heads)$")
KV_HEADS = re.compile(r"^(n_kv_heads?|num_kv_heads|num_key_value_heads|kv_heads)$")
RATIOS = re.compile(r"^(num_key_value_groups|num_kv_groups|n_rep)$")
WIDTHS = re.compile(r"(_size|_dim|^d_model)$")
OUTWARD, INWARD = ("out_features", "nf"), ("in_features", "nx")
ROUNDING = {torch.float64: 2.0**-15, torch.float32: 2.0**-15}
"""By how much two runs may differ, in parts of the largest value (float64 too: some code attends in float32); 16 units of short types."""


def prune_heads_(model: nn.Module, heads: Mapping[str | int, Iterable[int]], *args: Any, **kwargs: Any) -> dict[str, tuple[int, ...]]:
    """Removes heads: their rows of the projections, fused or not, their columns of the output projection, and their share of the counts
    that the attention module keeps.

    The model is run before, with those columns set to zero, and after; both must give the same to within rounding. A model for
    which they do not, or which does not run any more, is put back as it was.

    Args: heads: layer's module name (or number) -> numbers of query heads. kv heads go with the last query head that they serve; the
        others must all keep equally many. args, kwargs: what to call the model with; found by itself as for `probe`.
    Returns: layer -> the heads that are left, by their old numbers. Parameters stay the same objects, smaller; an optimizer's state
        for them does not fit any more. A config that a pruned attention reads becomes a copy of its own; the model's stays as it was.
    Raises PlanError: there are no such heads, what would be left is no attention, or the model cannot do without them; nothing is changed.
    """
    if not isinstance(heads, Mapping):
        raise PlanError(
            "heads are given by layer", expected="a mapping such as {0: [1, 5]}, by number or module name", found=type(heads).__name__
        )
    layers = Layers(anatomy(model, *args, **kwargs))
    plans = [_plan(layers[name], gone) for name, numbers in heads.items() if (gone := set(numbers))]
    calls = [(args, kwargs)] if args or kwargs else inputs_of(model)
    reasons = []
    with untouched(model):
        call, wanted = _without(model, plans, calls)
        for widths in (True, False):
            undo: list[Callable[[], None]] = []
            try:
                for plan in plans:
                    _cut(model, plan, widths, undo)
                found = _run(model, plans, call)
                reason = _difference(wanted, found)
            except Exception as error:  # whatever the model's own code raises
                reason = f"{type(error).__name__}: {error}"
            except BaseException:
                _back(undo)
                raise
            if reason is None:
                return {plan.layer.name: plan.kept for plan in plans}
            _back(undo)
            reasons.append(reason)
    raise PlanError(
        "this model cannot do without those heads",
        where=", ".join(plan.layer.name for plan in plans),
        found=reasons[0].split("\n")[0][:300],
        expected="what the model gives with their outputs set to zero",
        try_="zero them instead: tt.heads(model)[layer].W_O[head] under torch.no_grad()",
    )


@dataclass(frozen=True)
class _Plan:
    """What stays of a layer: query heads and kv heads, by their old numbers."""

    layer: Layer
    kept: tuple[int, ...]
    groups: tuple[int, ...]

    @property
    def counts(self) -> tuple[int, int]:
        return len(self.layer.part("q").grid), len(self.layer.part("k").grid)

    def keeps(self, lines: Lines) -> tuple[int, ...]:
        """Heads of a part that stay."""
        here, (heads, groups) = len(lines.grid), self.counts
        kept = {1: (0,), groups: self.groups, heads: self.kept}.get(here)
        if kept is None:
            raise PlanError(f"a part has {here} heads", where=lines.parameter, expected=f"{heads} or {groups}")
        return kept


def _plan(layer: Layer, gone: set[int]) -> _Plan:
    try:
        heads, groups = len(layer.part("q").grid), len(layer.part("k").grid)
        layer.part("v")
    except TraceError as error:
        raise PlanError(error.what, **error.fields) from None
    if not gone <= set(range(heads)):
        raise PlanError("no such heads", where=layer.name, expected=f"0 to {heads - 1}", found=", ".join(map(str, sorted(gone))))
    if layer.out is None:
        raise PlanError("no one projection takes the outputs of the heads", where=layer.name)
    kept = tuple(head for head in range(heads) if head not in gone)
    ratio = heads // groups
    left = {group: sum(head // ratio == group for head in kept) for group in range(groups)}
    staying = tuple(group for group, count in left.items() if count)
    if len({left[group] for group in staying}) != 1:
        found = ", ".join(f"{count} of kv head {group}" for group, count in left.items()) if kept else "none"
        raise PlanError("kv heads must keep equally many query heads", where=layer.name, found=f"left are {found}",
                        try_=f"prune all {ratio} query heads of a kv head" if kept and ratio > 1 else None)  # fmt: skip
    return _Plan(layer, kept, staying)


def _cut(model: nn.Module, plan: _Plan, widths: bool, undo: list[Callable[[], None]]) -> None:
    gone: dict[str, set[int]] = {}
    lines_of = {lines.parameter: lines for lines in plan.layer.parts.values()}
    for lines in plan.layer.parts.values():
        away = np.delete(lines.grid, plan.keeps(lines), axis=0)
        gone.setdefault(lines.parameter, set()).update(away.ravel().tolist())
    sizes: dict[int, int] = {}
    for name, rows in gone.items():
        before, after = _shrink(model, name, lines_of[name].axis, rows, OUTWARD, undo)
        sizes[before] = after
        if lines_of[name].bias != name and _parameter(model, lines_of[name].bias) is not None:
            _shrink(model, lines_of[name].bias, 0, rows, (), undo)
    out = plan.layer.out
    assert out is not None
    columns = {int(line) for line in np.delete(out.grid, plan.kept, axis=0).ravel()}
    before, after = _shrink(model, out.parameter, out.axis, columns, INWARD, undo)
    sizes[before] = after
    _recount(model.get_submodule(plan.layer.name), plan, sizes if widths else {}, undo)


def _shrink(
    model: nn.Module, name: str, axis: int, gone: set[int], told: tuple[str, ...], undo: list[Callable[[], None]]
) -> tuple[int, int]:
    """Takes lines out of a parameter, which stays the same object; its size before and after."""
    p = _parameter(model, name)
    assert p is not None
    data, grad, size = p.data, p.grad, p.shape[axis]
    index = torch.tensor([line for line in range(size) if line not in gone], device=p.device)

    def back() -> None:
        p.grad, p.data = None, data
        p.grad = grad

    undo.append(back)
    p.grad, p.data = None, data.index_select(axis, index)
    p.grad = None if grad is None else grad.index_select(axis, index)
    owner = model.get_submodule(name.rpartition(".")[0])
    for attribute in told:
        if getattr(owner, attribute, None) == size:
            _set(owner, attribute, len(index), undo)
    return size, len(index)


def _recount(module: nn.Module, plan: _Plan, sizes: Mapping[int, int], undo: list[Callable[[], None]]) -> None:
    """The numbers of heads, and widths that are multiples of them, that an attention module keeps."""
    (heads, groups), kept, staying = plan.counts, len(plan.kept), len(plan.groups)

    def changed(name: str, value: object) -> int | None:
        for pattern, old, new in (
            (KV_HEADS, groups, staying), (QUERY_HEADS, heads, kept), (RATIOS, heads // groups, kept // staying)
        ):  # fmt: skip
            if pattern.search(name) and value == old:
                return new
        return sizes.get(value) if WIDTHS.search(name) and type(value) is int else None

    for name, value in list(vars(module).items()):
        new = changed(name, value)
        if new is not None:
            _set(module, name, new, undo)
    config = vars(module).get("config")
    counts = {name: new for name, value in (vars(config) if config is not None else {}).items()
              if not WIDTHS.search(name) and (new := changed(name, value)) is not None}  # fmt: skip
    if counts:
        own = copy.copy(config)
        for name, new in counts.items():
            setattr(own, name, new)
        _set(module, "config", own, undo)


def _set(owner: nn.Module, name: str, value: object, undo: list[Callable[[], None]]) -> None:
    before = getattr(owner, name)
    undo.append(lambda: setattr(owner, name, before))
    setattr(owner, name, value)


def _back(undo: list[Callable[[], None]]) -> None:
    for step in reversed(undo):
        step()


def _parameter(model: nn.Module, name: str) -> nn.Parameter | None:
    owner, _, last = name.rpartition(".")
    found = getattr(model.get_submodule(owner), last, None)
    return found if isinstance(found, nn.Parameter) else None


def _without(model: nn.Module, plans: list[_Plan], calls: list[Call]) -> tuple[Call, list[Tensor]]:
    """The first call that runs, and what it gives with the columns of the heads set to zero."""
    saved = []
    failed: Exception | None = None
    try:
        for plan in plans:
            out = plan.layer.out
            assert out is not None
            p = _parameter(model, out.parameter)
            if p is None:
                raise PlanError("an output projection holds no plain parameter", where=out.parameter)
            saved.append((p, p.data))
            lines = torch.from_numpy(np.delete(out.grid, plan.kept, axis=0).ravel())
            p.data = p.data.index_fill(out.axis, lines.to(p.device), 0)
        for call in calls:
            try:
                return call, _run(model, plans, call)
            except Exception as error:  # whatever the model's own code raises
                failed = failed or error
    finally:
        for p, data in saved:
            p.data = data
    raise PlanError("the model cannot be run", where=type(model).__name__, found=str(failed)[:300], try_="give what to call it with")


def _run(model: nn.Module, plans: list[_Plan], call: Call) -> list[Tensor]:
    """Outputs of the model and of the output projections of the layers."""
    seen: list[Tensor] = []
    outs = [plan.layer.out.parameter.rpartition(".")[0] for plan in plans if plan.layer.out is not None]
    handles = [model.get_submodule(name).register_forward_hook(lambda module, args, output: seen.extend(_tensors(output))) for name in outs]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            seen.extend(_tensors(model(*copy.copy(call[0]), **copy.copy(call[1]))))
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _tensors(value)
    elif isinstance(output, Mapping):
        yield from _tensors([value for key, value in output.items() if key != "past_key_values"])


def _difference(wanted: list[Tensor], found: list[Tensor]) -> str | None:
    """In words, or None to within rounding."""
    if [t.shape for t in wanted] != [t.shape for t in found]:
        return "outputs of another shape"
    for a, b in zip(wanted, found, strict=True):
        allowed = ROUNDING.get(a.dtype, 16 * torch.finfo(a.dtype).eps) * float(a.abs().max())
        worst = float((a - b).abs().max())
        if not worst <= allowed:
            return f"outputs that differ by {worst:.2g}, where rounding explains {allowed:.2g}"
    return None
