"""Listens to every operation of torch that touches what a book knows, and tells it: run code inside `Watch(book)`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .operations import Effect, Operation, operation


@dataclass(frozen=True)
class Call:
    """One operation that has run: its arguments by name, and the tensors that it returned or wrote."""

    func: Any
    operation: Operation
    values: Mapping[str, Any]
    outs: Sequence[Tensor]
    targets: Sequence[Tensor]

    @property
    def name(self) -> str:
        return self.operation.name

    @property
    def effect(self) -> Effect:
        return self.operation.effect

    @property
    def written(self) -> tuple[str, ...]:
        return self.operation.written

    def tensor(self, name: str) -> Tensor | None:
        value = self.values.get(name)
        return value if isinstance(value, Tensor) else None

    def inputs(self) -> Iterator[Tensor]:
        """All tensors that are read."""
        for name, value in self.values.items():
            if name not in self.written or name == "self":
                yield from tensors_in(value)


class Book(Protocol):
    """Who is told. What `follow` raises goes to `lost`; whatever that lets pass, the code goes on as if alone."""

    def knows(self, tensor: Tensor) -> bool: ...
    def follow(self, call: Call) -> None: ...
    def lost(self, func: Any, error: Exception) -> None: ...


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context. The book hears of operations that make or write elements, if it knows one of their arguments; not of views."""

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch would import its compiler for this class, which takes seconds."""
        return False

    def __init__(self, book: Book) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.book = book
        self._flex: list[tuple[object, object]] = []

    def __enter__(self) -> Watch:
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
            known = any(self.book.knows(t) for t in (*tensors_in(args), *tensors_in(tuple(kwargs.values()))))
        if known and torch.is_inference_mode_enabled() and hasattr(func, "decompose"):
            with self:  # under inference_mode composite operations arrive whole
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if known:
            try:
                with quietly():
                    call = _call(func, args, kwargs, out)
                    if call is not None:
                        self.book.follow(call)
            except Exception as wrong:
                self.book.lost(func, wrong)
        return out


_UNCOMPILED_FLEX = "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG"
_uncompiled = torch._disable_dynamo(Watch.__torch_dispatch__)  # type: ignore[attr-defined]


def _call(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> Call | None:
    """What has run; None when it only made views."""
    op = operation(func)
    values = dict(zip(op.arguments or map(str, range(len(args))), args, strict=False)) | dict(kwargs)
    targets = [t for name in op.written for t in tensors_in(values.get(name))]
    outs = list(tensors_in(out)) or targets
    if not targets:
        sources = {key(t) for t in tensors_in(tuple(values.values()))}
        if all(key(t) in sources for t in outs):
            return None
    return Call(func, op, values, outs, targets)


@contextmanager
def quietly() -> Iterator[None]:
    """Work on labels that no other mode, hook or graph sees."""
    with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction(), torch.inference_mode():
        yield


def tensors_in(value: object) -> Iterator[Tensor]:
    """All tensors in a value, in lists and tuples too."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def key(tensor: Tensor) -> int | None:
    """The identity of a tensor's storage; None for tensors that have none of their own (sparse, wrapped)."""
    try:
        storage = tensor.untyped_storage()
        return int(storage._cdata) if storage.nbytes() else None
    except (RuntimeError, NotImplementedError):
        return None


def geometry(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], int, int]:
    """(size, stride, offset, bytes of an element)."""
    return tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()), tensor.element_size()
