"""What the elements of one storage hold: labels beside the data, in a table as short as their pattern allows.

A label is an int32: 0 nothing, i + 1 row i, negative a mixture. It never passes through the data's own dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

NOTHING = 0
REINTERPRETED = -1
"""The mixture of an element that spans several smaller ones with different labels (view_as_complex, a view to a wider dtype)."""


@dataclass
class Marks:
    """Element i of the storage holds `table[i // run % len(table)]`, an element being `unit` bytes.

    A weight [out, in] needs one entry a row (`run` = in), an activation [batch, rows] one row of entries.
    `kind` is what the labelled data is: "weight", "bias" or "activation"; `made` is how many rows the tensor had that it was first
    made as, by a linear map or by hand. `version` counts the writes.
    """

    table: Tensor
    run: int
    unit: int
    kind: str
    made: int
    version: int = 0

    def at(self, size: Sequence[int], stride: Sequence[int], offset: int, unit: int) -> Tensor:
        """int32 labels of a tensor with this geometry; a view of the table where its steps allow it."""
        marks = self.in_units(unit)
        if 0 in size:
            return marks.table.new_zeros(tuple(size))
        period = len(marks.table) * marks.run
        first, rest = divmod(offset % period, marks.run)
        last, steps = first, []
        for n, step in zip(size, stride, strict=True):
            if n == 1 or step % period == 0:
                steps.append(0)
            elif step % marks.run == 0:
                steps.append(step // marks.run)
                last += (n - 1) * steps[-1]
            elif step < marks.run:
                steps.append(0)
                rest += (n - 1) * step
            else:
                break
        if len(steps) == len(size) and rest < marks.run and last < len(marks.table):
            return marks.table.as_strided(tuple(size), steps, first)
        places = torch.tensor(offset, device="cpu")
        for n, step in zip(size, stride, strict=True):
            places = places.unsqueeze(-1) + torch.arange(n, device="cpu") * step
        return marks.table[places.div(marks.run, rounding_mode="floor") % len(marks.table)]

    def put(self, labels: Tensor, size: Sequence[int], stride: Sequence[int], offset: int, elements: int) -> None:
        """Writes `labels` at the place of a tensor; the table then has an entry for every element."""
        if self.run > 1 or len(self.table) != elements:
            table = self.table.repeat_interleave(self.run)
            self.table, self.run = table.repeat(-(-elements // len(table)))[:elements].clone(), 1
        self.table.as_strided(tuple(size), tuple(stride), offset).copy_(labels)

    def in_units(self, unit: int) -> Marks:
        """The same storage, read as elements of another size; a larger one keeps a label that all of its pieces share."""
        if unit == self.unit:
            return self
        if self.unit % unit == 0:
            return replace(self, run=self.run * (self.unit // unit), unit=unit)
        pieces = unit // self.unit
        if self.run % pieces == 0:
            return replace(self, run=self.run // pieces, unit=unit)
        if len(self.table) * self.run % pieces:
            return replace(self, table=torch.full_like(self.table[:1], REINTERPRETED), run=1, unit=unit)
        groups = self.table.repeat_interleave(self.run).view(-1, pieces)
        return replace(self, table=torch.where((groups == groups[:, :1]).all(1), groups[:, 0], REINTERPRETED), run=1, unit=unit)


def marks_of(
    labels: Tensor, size: Sequence[int], stride: Sequence[int], offset: int, unit: int, elements: int, kind: str, made: int
) -> Marks:
    """Marks of a storage of which one tensor, of this geometry, is labelled; short when the tensor fills it and labels repeat."""
    if offset == 0 and math.prod(size) == elements and _dense(size, stride):
        order = sorted((i for i, n in enumerate(size) if n > 1), key=lambda i: -stride[i])
        while order and labels.stride(order[0]) == 0:
            order.pop(0)
        run = 1
        while order and labels.stride(order[-1]) == 0:
            run *= size[order.pop()]
        for i in range(len(size)):
            if i not in order:
                labels = labels.narrow(i, 0, 1)
        table = labels.permute([*order, *(i for i in range(len(size)) if i not in order)]).reshape(-1)
        return Marks(table.clone() if table.numel() else table.new_zeros(1), run, unit, kind, made)
    marks = Marks(torch.zeros(1, dtype=torch.int32, device="cpu"), 1, unit, kind, made)
    marks.put(labels, size, stride, offset, elements)
    return marks


def _dense(size: Sequence[int], stride: Sequence[int]) -> bool:
    expected = 1
    for n, step in sorted(((n, s) for n, s in zip(size, stride, strict=True) if n != 1), key=lambda pair: (pair[1], pair[0])):
        if step != expected:
            return False
        expected *= n
    return True


def packed(*labels: Tensor) -> tuple[Tensor, ...]:
    """The same tensors with every axis along which all of them repeat cut to size 1; `expand` undoes it."""
    for axis in range(labels[0].dim()):
        if labels[0].size(axis) > 1 and all(one.stride(axis) == 0 for one in labels):
            labels = tuple(one.narrow(axis, 0, 1) for one in labels)
    return labels
