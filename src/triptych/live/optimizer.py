"""Optimizer state and parameter groups, carried along when parameters are cut into parts or joined."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PlanError

Convert = Callable[[list[Tensor]], list[Tensor]]
"""Tensors shaped like the old parameters -> tensors shaped like the new ones."""
Parameters = Sequence[nn.Parameter]


def place(optimizer: Any, old: Parameters, name: str) -> tuple[int, int] | None:
    """(group, position) of the first of the parameters; None when the optimizer has none of them.

    Raises PlanError when it has only some, has them in several groups, or keeps a state that does not follow the rows.
    """
    at = {id(p): (g, i) for g, group in enumerate(optimizer.param_groups) for i, p in enumerate(group["params"])}
    places = [at.get(id(p)) for p in old]
    found = [one for one in places if one is not None]
    if not found:
        return None
    if len(found) < len(old) or len({group for group, _ in found}) > 1:
        raise PlanError(
            "the parts of one projection are treated differently by the optimizer",
            module=name,
            found="in groups " + ", ".join("none" if one is None else str(one[0]) for one in places),
            expected="all in one group",
            try_="leave optimizer= away and make a new one afterwards",
        )
    states = [optimizer.state.get(p, {}) for p in old]
    for key in dict.fromkeys(key for state in states for key in state):
        values = [state[key] for state in states if key in state]
        rows = [_follows(state[key], p) for state, p in zip(states, old, strict=True) if key in state]
        if not all(rows) and (any(rows) or not all(_same(value, values[0]) for value in values)):
            raise PlanError(
                "the optimizer's state does not follow the rows",
                module=name,
                state=f"{type(optimizer).__name__}, {key}",
                found=", ".join(_shown(value) for value in values),
                expected="one number for each weight, or one that the parts share",
                try_="leave optimizer= away and make a new one afterwards",
            )
    return min(found)


def carry(optimizer: Any, at: tuple[int, int], old: Parameters, new: Parameters, convert: Convert, names: Sequence[str]) -> None:
    """Puts the new parameters in the place of the old ones, with their state. Parameters that had no state yet count as zeros.

    Args: at: what `place` told. names: of the new parameters, for groups that keep names.
    """
    group = optimizer.param_groups[at[0]]
    gone = {id(p) for p in old}
    kept = [i for i, p in enumerate(group["params"]) if id(p) not in gone]
    before = sum(i < at[1] for i in kept)
    for key, fresh in (("params", new), ("param_names", names)):
        if key in group:
            rest = [group[key][i] for i in kept]
            group[key][:] = [*rest[:before], *fresh, *rest[before:]]
    states = [optimizer.state.pop(p, {}) for p in old]
    made: list[dict[str, Any]] = [{} for _ in new]
    for key in dict.fromkeys(key for state in states for key in state):
        some = next(state[key] for state in states if key in state)
        if any(key in state and _follows(state[key], p) for state, p in zip(states, old, strict=True)):
            tensors = [state.get(key, torch.zeros_like(p, dtype=some.dtype)) for state, p in zip(states, old, strict=True)]
            values: list[Any] = [tensor.clone() for tensor in convert(tensors)]
        else:  # every parameter counts its own steps
            values = [some.clone() if isinstance(some, Tensor) else some for _ in new]
        for state, value in zip(made, values, strict=True):
            state[key] = value
    for p, state in zip(new, made, strict=True):
        if state:
            optimizer.state[p] = state


def _follows(value: object, p: nn.Parameter) -> bool:
    """Whether a state has a number for each weight."""
    return isinstance(value, Tensor) and value.shape == p.shape and p.dim() > 0


def _same(a: object, b: object) -> bool:
    """Whether two parts' states are one and the same number, flag or nothing."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.numel() == b.numel() == 1 and bool((a == b).all())
    return isinstance(a, (int, float, bool, type(None))) and a == b


def _shown(value: object) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) and value.numel() != 1 else repr(value)[:40]
