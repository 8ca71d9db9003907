"""Follows rows of a weight through any torch code: run it inside `Shadow`, then ask which row every element came from.

The code runs for real, once. Labels live beside the tensors, one table per storage, so views need no handling; data movers are
repeated on the labels; a linear map takes the label its weight has all along the contracted axis.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .marks import Marks, marks_of, packed
from .rules import RULES, mixed, nothing
from .watch import Call, Watch, geometry, key, quietly, tensors_in


class Mixture(NamedTuple):
    """What an element is that is not one row: the operation that mixed it, and where."""

    op: str
    place: str


class Shadow:
    """A context in which labelled rows are followed. `place` is noted with every mixture and finding.

    >>> weight, x = torch.randn(6, 4), torch.randn(2, 4)
    >>> with Shadow() as shadow:
    ...     shadow.label(weight)
    ...     q, k = (x @ weight.T).view(2, 3, 2).unbind(-1)
    >>> shadow.rows(k)[0].tolist()
    [1, 3, 5]

    `mixtures` are the operations that mixed rows; `findings` say what was added to what it does not belong to, and where.
    """

    def __init__(self) -> None:
        self.place = ""
        self.mixtures: list[Mixture] = [Mixture("a view of several elements as one", "")]
        self.findings: dict[str, str] = {}
        self._numbers: dict[Mixture, int] = {}
        self._marks: dict[int, tuple[StorageWeakRef, Marks]] = {}
        self._purge_at = 1024
        self._watches: list[Watch] = []

    # -- asking ------------------------------------------------------------------------------------------------------

    def label(self, tensor: Tensor, axis: int = 0, kind: str = "weight") -> None:
        """Index i along `axis` of `tensor` is row i. `kind` is "weight", "bias" or "activation"."""
        with quietly():
            numbers = torch.arange(1, 1 + tensor.size(axis), dtype=torch.int32, device="cpu")
            shape = [1] * tensor.dim()
            shape[axis] = -1
            self._write(tensor, numbers.view(shape).expand(tensor.shape), kind, tensor.size(axis))

    def rows(self, tensor: Tensor) -> NDArray[np.int32] | None:
        """int32 array shaped like `tensor`: a row number, -1 for no row, or a mixture m <= -2, which is `mixtures[-2 - m]`.

        None when nothing is known of the tensor's storage.
        """
        with quietly():
            labels = self.read(tensor)
            if labels is None:
                return None
            (few,) = packed(labels)
            return np.broadcast_to((few - 1).numpy(), tuple(labels.shape))

    def kind_of(self, tensor: Tensor) -> str:
        marks = self._marks_of(tensor)
        return marks.kind if marks else ""

    def version(self, tensor: Tensor) -> int:
        """A number that changes when the rows in the storage of `tensor` do."""
        marks = self._marks_of(tensor)
        return marks.version + 1 if marks else 0

    def made(self, tensor: Tensor) -> int:
        """How many rows the tensor had from which this one was cut or moved: all of them when it came from the whole projection."""
        marks = self._marks_of(tensor)
        return marks.made if marks else 0

    # -- following ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> Shadow:
        self._watches.append(Watch(self).__enter__())
        return self

    def __exit__(self, *error: Any) -> None:
        self._watches.pop().__exit__(*error)

    def knows(self, tensor: Tensor) -> bool:
        """Whether something in the storage of `tensor` is labelled."""
        return self._marks_of(tensor) is not None

    def follow(self, call: Call) -> None:
        """Notes what one operation, which has just run, did."""
        if call.targets and call.name.startswith(_KEEP_ROWS):
            return
        try:
            results = RULES[call.effect](self, call)
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
            results = mixed(self, call)
        kind, made = self._origin(call)
        targets = {key(t) for t in call.targets}
        sources = {key(t) for t in tensors_in(tuple(call.values.values()))}
        for tensor, labels in zip(call.outs, results, strict=False):
            if key(tensor) in targets:
                self._write(tensor, nothing(tensor.shape) if labels is None else labels, kind, made)
            elif labels is not None and key(tensor) not in sources:
                self._write(tensor, labels, kind, made)

    def lost(self, func: Any, error: Exception) -> None:
        """Whatever happens to labels, the user's code goes on as if alone."""
        self.findings.setdefault(f"rows were lost at {func}: {error}", self.place)

    def read(self, tensor: Tensor) -> Tensor | None:
        """Labels as `marks` keeps them: int32, shaped like `tensor`; a view where it can be."""
        marks = self._marks_of(tensor)
        return marks.at(*geometry(tensor)) if marks else None

    def mixture(self, op: str) -> int:
        """The label of what `op` mixes here."""
        mixture = Mixture(op, self.place)
        if mixture not in self._numbers:
            self._numbers[mixture] = -1 - len(self.mixtures)
            self.mixtures.append(mixture)
        return self._numbers[mixture]

    def found(self, bias: Tensor, rows: Tensor) -> None:
        """Compares the rows of a bias with the rows it is added to."""
        few_bias, few_rows = packed(bias, rows)
        wrong = (few_bias != few_rows) & (few_bias > 0) & (few_rows > 0)
        if bool(wrong.any()):
            one, two = few_bias.expand(wrong.shape)[wrong], few_rows.expand(wrong.shape)[wrong]
            pairs = len(torch.unique(torch.stack([one, two], 1), dim=0))
            more = f" ({pairs} rows in all)" if pairs > 1 else ""
            self.findings.setdefault(f"bias of row {int(one[0]) - 1} added to row {int(two[0]) - 1}{more}", self.place)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _origin(self, call: Call) -> tuple[str, int | None]:
        """The kind of what a call makes, and `Marks.made`; None when it is made here."""
        if call.effect in ("multiplies", "convolves") or call.name == "sum":
            return "activation", None
        marks = [found for t in call.inputs() if (found := self._marks_of(t))]
        kinds = {found.kind for found in marks}
        kind = kinds.pop() if len(kinds) == 1 else "activation"
        return kind, max((found.made for found in marks if found.kind == kind), default=None)

    def _marks_of(self, tensor: Tensor) -> Marks | None:
        if not self._marks or (storage := key(tensor)) is None or (entry := self._marks.get(storage)) is None:
            return None
        if entry[0].expired():  # type: ignore[no-untyped-call]
            del self._marks[storage]
            return None
        return entry[1]

    def _write(self, tensor: Tensor, labels: Tensor, kind: str, made: int | None) -> None:
        """Notes that `tensor`, and nothing else in its storage, now holds `labels`."""
        storage, old = key(tensor), self._marks_of(tensor)
        if storage is None or (old is None and not bool(packed(labels)[0].any())):
            return
        if made is None:
            (few,) = packed(labels)
            made = len(torch.unique(few[few > 0]))
        size, stride, offset, unit = geometry(tensor)
        elements = tensor.untyped_storage().nbytes() // unit
        if old is not None:
            if torch.equal(*packed(old.at(size, stride, offset, unit), labels)):
                return
            if tensor.numel() < elements:
                marks = old.in_units(unit)
                marks.put(labels, size, stride, offset, elements)
            else:
                marks = marks_of(labels, size, stride, offset, unit, elements, kind, made)
            marks.version = old.version + 1
        else:
            marks = marks_of(labels, size, stride, offset, unit, elements, kind, made)
        self._marks[storage] = (StorageWeakRef(tensor.untyped_storage()), marks)  # type: ignore[no-untyped-call]
        if len(self._marks) > self._purge_at:
            self._marks = {k: entry for k, entry in self._marks.items() if not entry[0].expired()}  # type: ignore[no-untyped-call]
            self._purge_at = max(1024, 2 * len(self._marks))


_KEEP_ROWS = ("set", "_foreach", "_fused_ad", "_fused_sgd")
"""In place, these give a tensor another storage, or are the step of an optimizer."""
