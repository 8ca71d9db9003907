"""`heads`: the weights of every head of a model, as views of its own parameters where there are such; `prune_heads_`: fewer heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import TraceError
from .anatomy import Layer, Layers, Lines, anatomy, take

MATRICES = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O")


@dataclass(frozen=True)
class HeadWeights:
    """The weights of one attention, head by head, read from the model anew each time.

    W_Q [heads, d_model, d_head], W_K and W_V [kv heads, d_model, d_head], W_O [heads, d_head, d_model]; b_Q, b_K, b_V [heads, d_head]
    and b_O [d_model], None where there is no bias. What multiplies: `x @ W_Q[5] + b_Q[5]` is the query of head 5, before rotary.

    Each is a view that shares storage with the parameter when the rows of the heads lie at one stride and those of a head at one
    stride (`shares` says so): writing to it under `torch.no_grad()` edits the model. Else it is gathered, a copy. Gradients flow
    into the parameter either way.
    """

    layer: str
    _model: nn.Module
    _rows: Layer

    @property
    def W_Q(self) -> Tensor:
        return self.weight("q")

    @property
    def W_K(self) -> Tensor:
        return self.weight("k")

    @property
    def W_V(self) -> Tensor:
        return self.weight("v")

    @property
    def W_O(self) -> Tensor:
        lines = self._out()
        return lines.of(_get(self._model, lines.parameter))

    @property
    def b_Q(self) -> Tensor | None:
        return self.bias("q")

    @property
    def b_K(self) -> Tensor | None:
        return self.bias("k")

    @property
    def b_V(self) -> Tensor | None:
        return self.bias("v")

    @property
    def b_O(self) -> Tensor | None:
        return _find(self._model, self._out().bias)

    def weight(self, part: str) -> Tensor:
        """[heads, d_model, dims] of any part that `probe` names: "q", "k", "v", "gate", "nope", ..."""
        lines = self._rows.part(part)
        return lines.of(_get(self._model, lines.parameter)).transpose(1, 2)

    def bias(self, part: str) -> Tensor | None:
        """[heads, dims] of a part, None without a bias."""
        lines = self._rows.part(part)
        bias = _find(self._model, lines.bias)
        return None if bias is None else take(bias, 0, lines.grid)

    def shares(self, name: str) -> bool:
        """Whether "W_Q", "b_O", ... is a view of the model's parameter. False when there is none."""
        tensor = getattr(self, name)
        lines = self._out() if name.endswith("O") else self._rows.part(name[-1].lower())
        owner = _find(self._model, lines.parameter if name.startswith("W") else lines.bias)
        return tensor is not None and owner is not None and tensor.untyped_storage().data_ptr() == owner.untyped_storage().data_ptr()

    def _out(self) -> Lines:
        if self._rows.out is None:
            raise TraceError("no one projection takes the outputs of the heads", where=self.layer)
        return self._rows.out

    def __str__(self) -> str:
        return "\n".join(self._line(name) for name in MATRICES if not (name[0] == "b" and getattr(self, name) is None))

    def _line(self, name: str) -> str:
        lines = self._out() if name.endswith("O") else self._rows.part(name[-1].lower())
        kind = "view of" if self.shares(name) else "gathered from"
        return f"{name}  {' x '.join(map(str, getattr(self, name).shape)):<14} {kind} {lines.parameter if name[0] == 'W' else lines.bias}"


def heads(model: nn.Module, *args: Any, **kwargs: Any) -> Layers[HeadWeights]:
    """The weights of the heads of every attention: module name (or number) of the layer -> `HeadWeights`.

    Args: model: any module that `probe` understands, fused or not. args, kwargs: what `probe` is to call it with.
    Raises TraceError: it cannot be run, or has no attention.

    >>> of = heads(nn.MultiheadAttention(12, 3))[0]
    >>> tuple(of.W_Q.shape), tuple(of.W_O.shape), of.shares("W_Q")
    ((3, 12, 4), (3, 4, 12), True)
    """
    return Layers({name: HeadWeights(name, model, layer) for name, layer in anatomy(model, *args, **kwargs).items()})


def _get(model: nn.Module, name: str) -> Tensor:
    """A parameter by its name; of a parametrised module, what the module computes."""
    owner, _, last = name.rpartition(".")
    return getattr(model.get_submodule(owner), last)  # type: ignore[no-any-return]


def _find(model: nn.Module, name: str) -> Tensor | None:
    owner, _, last = name.rpartition(".")
    found = getattr(model.get_submodule(owner), last, None)
    return found if isinstance(found, Tensor) else None
