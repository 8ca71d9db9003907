"""What a run of a model writes down: the labels beside its tensors, and the log."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import watch
from .labels import KIND, OUT, WEAK, Attention, Log, Scan, kind, row


@dataclass
class _Held:
    labels: Tensor
    storage: torch.UntypedStorage  # kept, so that no other storage takes its place
    unit: int


class Ledger:
    """`params` maps a storage to the number of its first element, counted over all parameters. Nothing is noted while it is `blind`."""

    def __init__(self, params: Mapping[int, int]) -> None:
        self.params = dict(params)
        self.log = Log()
        self.blind = False
        self._held: dict[int, _Held] = {}
        self._firsts = torch.tensor(sorted(set(self.params.values())))
        self._outputs = 0

    def knows(self, tensor: Tensor) -> bool:
        """Whether something in the storage of `tensor` is labelled."""
        storage = watch.key(tensor)
        return storage in self._held or storage in self.params

    def labels(self, tensor: Tensor) -> Tensor | None:
        """int64 labels of the tensor's shape (a complex tensor has a last axis of 2 more), or None when it has none."""
        storage = watch.key(tensor)
        if storage is None:
            return None
        held = self._held.get(storage)
        size, stride, offset, unit = _geometry(tensor)
        if held is not None:
            return held.labels.as_strided(size, stride, offset) if held.unit == unit else None
        first = self.params.get(storage)
        if first is None:
            return None
        labels = torch.tensor((WEAK << KIND) + first + 1 + offset)
        for n, step in zip(size, stride, strict=True):
            labels = labels.unsqueeze(-1) + torch.arange(n) * step
        return labels

    def labels_or_zeros(self, tensor: Tensor) -> Tensor:
        """`labels`, 0 everywhere when it has none."""
        labels = self.labels(tensor)
        return torch.zeros(_geometry(tensor)[0], dtype=torch.int64) if labels is None else labels

    def put(self, tensor: Tensor, labels: Tensor | None) -> None:
        """Sets the labels of a tensor, as far as the storage under it is concerned."""
        storage = watch.key(tensor)
        if storage is None or tensor.numel() == 0:
            return
        held = self._held.get(storage)
        size, stride, offset, unit = _geometry(tensor)
        if held is None or held.unit != unit:
            if labels is None or storage in self.params:
                return
            data = tensor.untyped_storage()
            held = self._held[storage] = _Held(torch.zeros(data.nbytes() // unit, dtype=torch.int64), data, unit)
        held.labels.as_strided(size, stride, offset).copy_(torch.zeros(()) if labels is None else labels)

    def is_weak(self, tensor: Tensor) -> bool:
        """Whether it holds elements of a parameter, as its first one shows."""
        storage = watch.key(tensor)
        if storage in self._held:
            labels = self.labels(tensor[(slice(0, 1),) * tensor.dim()])
            return labels is not None and bool((kind(labels) == WEAK).any())
        return storage in self.params

    def owners(self, labels: Tensor) -> Tensor:
        """The number of the parameter of each row, counted in the order of their first elements; -1 for none."""
        return torch.searchsorted(self._firsts, row(labels).contiguous(), right=True) - 1

    def starts(self, lines: Tensor) -> list[int]:
        """First element of each parameter in `lines`."""
        return [int(self._firsts[n]) for n in torch.unique(self.owners(lines[lines > 0])).tolist()]

    def output(self, shape: Sequence[int]) -> Tensor:
        """New labels for an output of attention."""
        labels = torch.arange(math.prod(shape)).reshape(tuple(shape)) + self._outputs + (OUT << KIND)
        self._outputs += math.prod(shape)
        return labels

    def attention(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax: bool, heads: int = 1, **others: Tensor) -> None:
        """A call that does the whole of attention, q, k, v [..., d] with an axis `heads`, or of a recurrence when there is no softmax.

        Of fewer heads each serves several others in a row. The vectors of `out` are those of q, in a recurrence those of v.
        """
        labels = [x.reshape(1, -1, x.shape[-1]).clone() for t in (q, k, v) if (x := self.labels(t)) is not None]
        if len(labels) < 3:
            return
        places = [
            torch.arange(math.prod(t.shape[:-1])).view(t.shape[:-1]).movedim(heads, 0).flatten(1)[:, :1].flatten().tolist()
            for t in (q, k, v)
        ]
        seen = Attention(labels[0], labels[1], labels[2], softmax=softmax, recurrent=not softmax)
        seen.pairs = torch.tensor([(i, places[1][n * len(places[1]) // len(places[0])]) for n, i in enumerate(places[0])]).T
        met = [-1] * math.prod(v.shape[:-1])
        for n, i in enumerate(places[2]):
            met[i] = places[1][n * len(places[1]) // len(places[2])]
        seen.k_of = torch.tensor([met])
        seen.q_of = torch.arange(math.prod(out.shape[:-1])).view(1, -1)
        seen.out, seen.out_shape = self._outputs, (1, math.prod(out.shape[:-1]), out.shape[-1])
        seen.others = {name: x for name, t in others.items() if (x := self.labels(t)) is not None}
        self.log.attentions.append(seen)
        self.put(out, self.output(out.shape))

    def scan(self, out: Tensor, operands: Mapping[str, Tensor]) -> None:
        """A state-space recurrence: x, z [batch, tokens, heads, dims], dt without dims; or x, z, dt [batch, dims, tokens]."""
        channels = out.dim() == 3
        found = {}
        for part, t in operands.items():
            labels = self.labels(t)
            if labels is None:
                continue
            if channels:
                labels = labels.transpose(1, 2) if t.shape[-1] == out.shape[-1] else labels
                labels = labels.unsqueeze(-2)
            elif part == "dt":
                labels = labels.unsqueeze(-1)
            found[part] = labels.reshape(-1, *labels.shape[-2:]).clone()
        self.log.scans.append(Scan(found, self._outputs, tuple(out.shape), channels))
        self.put(out, self.output(out.shape))


def _geometry(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], int, int]:
    """Size, stride, offset and bytes in units of real numbers."""
    size, stride, offset, unit = watch.geometry(tensor)
    if tensor.is_complex():
        return (*size, 2), (*(2 * s for s in stride), 1), 2 * offset, unit // 2
    return size, stride, offset, unit
