"""The module that stands where a fused projection stood: its parts as linear maps of their own, or all of it in another layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PlanError
from ..layout import Layout
from ..weave import weave
from .projections import Packing
from .state import PACKED, accept, marked, wrapped

HOOKS = (
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks",
    "_forward_hooks_always_called",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
"""Shared with the module that was replaced, so that handles still remove what they added."""
Pieces = tuple[tuple[str, Layout], ...]


class Hinged(nn.Module):
    """`nn.Linear`s that together answer as the projection they replace did: same input, same output, rows in the order of its code.

    Children are the parts (`q`, `k`, `v`), or one called `packed` that holds all rows in another layout. `weight` and `bias` are those
    of the replaced module, made anew at every look: what is to be changed are those of the children.
    """

    packing: Packing
    pieces: Pieces

    def __init__(self, original: nn.Module, packing: Packing, pieces: Pieces, linears: Sequence[nn.Linear]) -> None:
        super().__init__()
        plain = vars(nn.Module())
        for name, value in vars(original).items():
            if name not in plain:
                object.__setattr__(self, name, value)
        for name in HOOKS:
            object.__setattr__(self, name, getattr(original, name))
        self._is_full_backward_hook = original._is_full_backward_hook
        self.training = original.training
        self.packing, self.pieces = packing, pieces
        self._original = (original,)  # in a tuple: not a child
        self._join = weave(tuple(layout for _, layout in pieces), packing.layout, packing.sizes)
        for (name, _), linear in zip(pieces, linears, strict=True):
            self.add_module(name, linear)

    @property
    def original(self) -> nn.Module:
        """The module that was replaced; its parameters are empty until it is put back."""
        return self._original[0]

    @property
    def is_apart(self) -> bool:
        return self.pieces[0][0] != PACKED

    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = self._join([self._modules[name](input) for name, _ in self.pieces])  # type: ignore[misc]
        return out

    @property
    def weight(self) -> Tensor:
        """The fused weight as the replaced module had it, [rows, in] or [in, rows]: a new tensor, through which gradients flow.

        Raises PlanError when a child carries an adapter that is not merged, whose share would be missing.
        """
        whole: Tensor = self._join([child.weight for child in self.linears(merged=True)], 0)
        return whole.T if self.packing.axis else whole

    @property
    def bias(self) -> Tensor | None:
        """The fused bias [rows], or None."""
        biases = [child.bias for child in self.linears(merged=True)]
        fused: Tensor | None = None if biases[0] is None else self._join(biases, 0)
        return fused

    def linears(self, merged: bool = False) -> list[nn.Linear]:
        """The children. Raises PlanError when one is wrapped by something else (an adapter); with `merged`, one that is not merged in."""
        found = []
        for name, _ in self.pieces:
            child: Any = self._modules[name]
            if wrapped(child) and not (merged and getattr(child, "merged", False)):
                raise PlanError(
                    "a part carries an adapter",
                    part=name,
                    found=f"{type(child).__name__} around {type(child.base_layer).__name__}",
                    expected="nn.Linear",
                    try_="merge it first: model.merge_and_unload()",
                )
            child = child.base_layer if wrapped(child) else child
            if not isinstance(child, nn.Linear):
                raise PlanError("a part was replaced by another module", part=name, found=type(child).__name__, expected="nn.Linear")
            found.append(child)
        return found

    def extra_repr(self) -> str:
        here = "" if self.is_apart else f", packed as {self.pieces[0][1]}"
        return f"{self.packing}{here}"

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.is_apart:
            destination[f"{prefix}layout"] = marked(self.pieces[0][1])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        homes = [(f"{name}.base_layer" if wrapped(self._modules[name]) else name, layout) for name, layout in self.pieces]
        accept(state_dict, prefix, self.packing, tuple(homes))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def linear(weight: nn.Parameter, bias: nn.Parameter | None, training: bool) -> nn.Linear:
    """An `nn.Linear` around parameters that exist."""
    with torch.device("meta"):
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    made.weight = weight
    if bias is not None:
        made.bias = bias
    made.training = training
    return made
