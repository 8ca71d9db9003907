"""Follows rows of a weight through any torch code: run it inside `Shadow`, then ask which row every element came from.

The code runs for real, once. Labels live beside the tensors, one table per storage, so views need no handling; data movers are
repeated on the labels; a linear map takes the label its weight has all along the contracted axis.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from types import MethodType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from .marks import Marks, marks_of, packed
from .rules import Call, mixed, nothing, rule_for, tensors_in


class Mixture(NamedTuple):
    """What an element is that is not one row: the operation that mixed it, and where."""

    op: str
    place: str


class Shadow(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context in which labelled rows are followed. `place` is noted with every mixture and finding.

    >>> weight, x = torch.randn(6, 4), torch.randn(2, 4)
    >>> with Shadow() as shadow:
    ...     shadow.label(weight)
    ...     q, k = (x @ weight.T).view(2, 3, 2).unbind(-1)
    >>> shadow.rows(k)[0].tolist()
    [1, 3, 5]

    `mixtures` are the operations that mixed rows; `findings` say what was added to what it does not belong to, and where.
    """

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch would import its compiler for this class, which takes seconds."""
        return False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.place = ""
        self.mixtures: list[Mixture] = [Mixture("a view of several elements as one", "")]
        self.findings: dict[str, str] = {}
        self._numbers: dict[Mixture, int] = {}
        self._marks: dict[int, tuple[StorageWeakRef, Marks]] = {}
        self._purge_at = 1024
        self._flex: list[tuple[object, object]] = []

    # -- asking ------------------------------------------------------------------------------------------------------

    def label(self, tensor: Tensor, axis: int = 0, kind: str = "weight") -> None:
        """Index i along `axis` of `tensor` is row i. `kind` is "weight", "bias" or "activation"."""
        with _quietly():
            numbers = torch.arange(1, 1 + tensor.size(axis), dtype=torch.int32, device="cpu")
            shape = [1] * tensor.dim()
            shape[axis] = -1
            self._write(tensor, numbers.view(shape).expand(tensor.shape), kind, tensor.size(axis))

    def rows(self, tensor: Tensor) -> NDArray[np.int32] | None:
        """int32 array shaped like `tensor`: a row number, -1 for no row, or a mixture m <= -2, which is `mixtures[-2 - m]`.

        None when nothing is known of the tensor's storage.
        """
        with _quietly():
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
        if "torch._dynamo" in sys.modules:  # compiled code may be run, which must not look in here
            self.__torch_dispatch__ = MethodType(_uncompiled, self)  # type: ignore[method-assign]
        flex = sys.modules.get("torch.nn.attention.flex_attention")
        self._flex.append((flex, getattr(flex, _UNCOMPILED_FLEX, None)))
        if self._flex[-1][1] is not None:  # else it compiles itself, which torch refuses under any mode
            setattr(flex, _UNCOMPILED_FLEX, True)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        flex, before = self._flex.pop()
        if before is not None:
            setattr(flex, _UNCOMPILED_FLEX, before)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            marked = any(self._marks_of(t) for t in (*tensors_in(args), *tensors_in(tuple(kwargs.values()))))
        if marked and torch.is_inference_mode_enabled() and hasattr(func, "decompose"):
            with self:  # under inference_mode composite operations arrive whole
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        schema = getattr(func, "_schema", None)
        if schema is None:  # a higher-order operation: flex_attention, cond, ...
            values = {str(i): value for i, value in enumerate(args)} if marked else {}
        elif marked or (self._marks and schema.is_mutable):
            values = {a.name: value for a, value in zip(schema.arguments, args, strict=False)} | dict(kwargs)
        else:
            return out
        try:
            with _quietly():
                self.follow(func, values, out, marked)
        except Exception as wrong:  # whatever happens to labels, the user's code goes on as if alone
            self.findings.setdefault(f"rows were lost at {func}: {wrong}", self.place)
        return out

    def follow(self, func: Any, values: Mapping[str, Any], out: Any, marked: bool) -> None:
        """Notes what one operation, which has just run, did. `values`: its arguments by name; `marked`: one of them holds labels."""
        name, is_pointwise, written = _facts(func)
        targets = [t for w in written for t in tensors_in(values.get(w))]
        if not marked and not any(self._marks_of(t) for t in targets):
            return
        outs = list(tensors_in(out)) or targets
        sources = {_key(t) for t in tensors_in(tuple(values.values()))}
        if not targets and all(_key(t) in sources for t in outs):
            return  # a view
        if targets and name.startswith(_KEEP_ROWS):
            return
        call = Call(func, name, values, outs, written, self)
        try:
            results = rule_for(name, is_pointwise)(call)
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
            results = mixed(call)
        kind, made = self._origin(call)
        keys = {_key(t) for t in targets}
        for tensor, labels in zip(outs, results, strict=False):
            if _key(tensor) in keys:
                self._write(tensor, nothing(tensor.shape) if labels is None else labels, kind, made)
            elif labels is not None and _key(tensor) not in sources:
                self._write(tensor, labels, kind, made)

    def read(self, tensor: Tensor) -> Tensor | None:
        """Labels as `marks` keeps them: int32, shaped like `tensor`; a view where it can be."""
        marks = self._marks_of(tensor)
        return marks.at(*_geometry(tensor)) if marks else None

    def mixture(self, op: str) -> int:
        """The label of what `op` mixes here."""
        key = Mixture(op, self.place)
        if key not in self._numbers:
            self._numbers[key] = -1 - len(self.mixtures)
            self.mixtures.append(key)
        return self._numbers[key]

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
        marks = [found for t in call.inputs() if (found := self._marks_of(t))]
        if call.name in _MAKE_ACTIVATIONS:
            return "activation", None
        kinds = {found.kind for found in marks}
        kind = kinds.pop() if len(kinds) == 1 else "activation"
        return kind, max((found.made for found in marks if found.kind == kind), default=None)

    def _marks_of(self, tensor: Tensor) -> Marks | None:
        if not self._marks or (key := _key(tensor)) is None or (entry := self._marks.get(key)) is None:
            return None
        if entry[0].expired():  # type: ignore[no-untyped-call]
            del self._marks[key]
            return None
        return entry[1]

    def _write(self, tensor: Tensor, labels: Tensor, kind: str, made: int | None) -> None:
        """Notes that `tensor`, and nothing else in its storage, now holds `labels`."""
        key, old = _key(tensor), self._marks_of(tensor)
        if key is None or (old is None and not bool(packed(labels)[0].any())):
            return
        if made is None:
            (few,) = packed(labels)
            made = len(torch.unique(few[few > 0]))
        size, stride, offset, unit = _geometry(tensor)
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
        self._marks[key] = (StorageWeakRef(tensor.untyped_storage()), marks)  # type: ignore[no-untyped-call]
        if len(self._marks) > self._purge_at:
            self._marks = {k: entry for k, entry in self._marks.items() if not entry[0].expired()}  # type: ignore[no-untyped-call]
            self._purge_at = max(1024, 2 * len(self._marks))


_UNCOMPILED_FLEX = "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG"
_uncompiled = torch._disable_dynamo(Shadow.__torch_dispatch__)  # type: ignore[attr-defined]
_KEEP_ROWS = ("set", "_foreach", "_fused_ad", "_fused_sgd")
"""In place, these give a tensor another storage, or are the step of an optimizer."""
_MAKE_ACTIVATIONS = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "_int_mm", "_scaled_mm", "_addmm_activation"}
_MAKE_ACTIVATIONS |= {"convolution", "_convolution", "sum"}


@contextmanager
def _quietly() -> Iterator[None]:
    """Work on labels that no other mode, hook or graph sees."""
    with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction(), torch.inference_mode():
        yield


@lru_cache(maxsize=4096)
def _facts(func: Any) -> tuple[str, bool, tuple[str, ...]]:
    """(plain name, whether it works element by element, the arguments that it writes)."""
    if not hasattr(func, "_schema"):
        return str(func.name()), False, ()
    name = func._schema.name.partition("::")[2]
    written = tuple(a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write)
    plain = name.removesuffix("_") if written else name
    return plain, torch.Tag.pointwise in func.tags, written


def _key(tensor: Tensor) -> int | None:
    """The identity of a tensor's storage; None for tensors that have none of their own (sparse, wrapped)."""
    try:
        storage = tensor.untyped_storage()
        return int(storage._cdata) if storage.nbytes() else None
    except (RuntimeError, NotImplementedError):
        return None


def _geometry(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], int, int]:
    """(size, stride, offset, bytes of an element)."""
    return tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()), tensor.element_size()
