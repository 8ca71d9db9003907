"""The keys and values of one attention layer: buffers that are written in place and handed out as views."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import LayoutError, SizeError

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""Dtypes that a cache can store in, and the number that the largest value of a token's head becomes."""


@dataclass(frozen=True, slots=True)
class Options:
    """How a cache keeps tokens; see `KVCache`."""

    capacity: int = 256
    max_length: int | None = None
    window: int | None = None
    spare: int = 16
    store: torch.dtype | None = None

    def __post_init__(self) -> None:
        for name, least in (("capacity", 1), ("max_length", 1), ("window", 1), ("spare", 0)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise SizeError(f"{name} must be a whole number, at least {least}", found=f"{name}={value!r}")
        if self.store is not None and self.store not in LARGEST:
            raise LayoutError("a cache cannot store in this dtype", expected=", ".join(map(str, LARGEST)), found=str(self.store))


@dataclass(slots=True, eq=False)
class CacheLayer:
    """One layer of a `KVCache`. Column c of every buffer [batch, heads, columns, dim] holds the token at position `start + c`.

    `lengths`: tokens seen so far, one number for each row of the batch. `mark`: tokens from here on may still be rolled back.
    """

    options: Options
    lengths: tuple[int, ...] = ()
    start: int = 0
    mark: int | None = None
    buffers: dict[str, Tensor] = field(default_factory=dict)
    dtype: torch.dtype | None = None
    _fits: tuple[torch.Size, torch.Size, torch.device] | None = field(default=None, init=False, repr=False)
    """Shapes and device of the keys and values that fitted last: those of the next token are most often the same."""

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths, default=0)

    @property
    def even(self) -> bool:
        """Whether all rows are equally long."""
        return not self.lengths or self.lengths.count(self.lengths[0]) == len(self.lengths)

    @property
    def first(self) -> int:
        """Position of the first token that the next one can see in the shortest row: the first column of what `update` returns."""
        return self._first(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(buffer.nbytes for buffer in self.buffers.values())

    @property
    def keys(self) -> Tensor | None:
        """[batch, heads, tokens, dim] the tokens that the next one can see; a view, with `store` a copy. None before the first update."""
        return self._read("k", self.first, self.length) if self.buffers else None

    @property
    def values(self) -> Tensor | None:
        """The values that belong to `keys`."""
        return self._read("v", self.first, self.length) if self.buffers else None

    def update(self, k: Tensor, v: Tensor, new: Sequence[int] | Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Append tokens and return all that they may see; see `KVCache.update`."""
        if not self.buffers:
            self._allocate(k, v)
        count = self._count(k, v)
        lengths, options = self.lengths, self.options
        if new is None and options.store is None and options.window is None and lengths.count(lengths[0]) == len(lengths):
            own_k, own_v, length = self.buffers["k"], self.buffers["v"], lengths[0]
            stop = length + count
            if stop <= own_k.shape[2]:  # the usual case, without what the others need
                own_k.narrow(2, length, count).copy_(k.detach() if k.requires_grad else k)
                own_v.narrow(2, length, count).copy_(v.detach() if v.requires_grad else v)
                self.lengths = (stop,) * len(lengths)
                return own_k.narrow(2, 0, stop), own_v.narrow(2, 0, stop)
        added = _whole(new, len(lengths), count) if new is not None else None
        first = self._first(lengths)
        stop = max(lengths) + count
        self._make_room(stop)
        if options.store is None:
            self._write("k", k)
            self._write("v", v)
        else:
            self._write_small("k", k)
            self._write_small("v", v)
        self.lengths = tuple([n + count for n in lengths] if added is None else map(sum, zip(lengths, added, strict=True)))
        return self._read("k", first, stop), self._read("v", first, stop)

    def kept(self, length: int | Sequence[int] | Tensor) -> tuple[int, ...]:
        """The lengths after keeping the first `length` tokens of every row, or row by row. Raises SizeError when they cannot be."""
        given = [length] * len(self.lengths) if isinstance(length, int) else _whole(length, len(self.lengths), None)
        if min(given, default=0) < 0:
            raise SizeError("a cache cannot be shorter than empty", found=f"{min(given)} tokens")
        lengths = tuple(map(min, self.lengths, given))
        if self._first(lengths) < self.start:
            raise SizeError(
                "the window has moved on: tokens that would be seen again are gone",
                expected=f"at least {self.start + self._behind} tokens kept",
                found=f"{min(lengths)} of {self.length}",
                try_=f"KVCache(window={self.options.window}, spare=N) keeps N tokens for this",
            )
        return lengths

    def without(self, count: int | Sequence[int] | Tensor) -> tuple[int, ...]:
        """The lengths without the last `count` tokens of every row, or row by row. Raises SizeError when they cannot be."""
        given = [count] * len(self.lengths) if isinstance(count, int) else _whole(count, len(self.lengths), None)
        if any(n < 0 or n > length for n, length in zip(given, self.lengths, strict=True)):
            raise SizeError("cannot roll back so many tokens", expected=f"0 to {min(self.lengths)}", found=str(count))
        return self.kept([length - n for n, length in zip(given, self.lengths, strict=True)])

    def reorder(self, rows: Sequence[int] | Tensor) -> None:
        """Row b becomes what row `rows[b]` was; the batch may grow or shrink."""
        if not self.lengths:
            return
        order = [int(row) for row in (rows.tolist() if isinstance(rows, Tensor) else rows)]
        if not order or min(order) < 0 or max(order) >= len(self.lengths):
            raise SizeError("no such row of the batch", expected=f"0 to {len(self.lengths) - 1}", found=str(order))
        columns = self.length - self.start
        if len(order) != len(self.lengths):
            self.buffers = {name: self._fresh(buffer, len(order), buffer.shape[2], columns, order) for name, buffer in self.buffers.items()}
        elif moved := [row for row, source in enumerate(order) if row != source]:
            for buffer in self.buffers.values():
                held = buffer.narrow(2, 0, columns)
                held[moved] = held[[order[row] for row in moved]]
        self.lengths, self._fits = tuple(self.lengths[row] for row in order), None

    def reset(self) -> None:
        """Forget everything and free the memory."""
        self.lengths, self.start, self.mark, self.buffers, self.dtype, self._fits = (), 0, None, {}, None, None

    def state(self) -> dict[str, Any]:
        """What `save` writes: numbers, and copies of the tokens held."""
        columns = self.length - self.start
        held = {name: buffer.narrow(2, 0, columns).clone() for name, buffer in self.buffers.items()}
        numbers = {"lengths": self.lengths, "start": self.start, "mark": self.mark, "dtype": self.dtype}
        return {"options": asdict(self.options), "buffers": held, **numbers}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> CacheLayer:
        """The inverse of `state`; ValueError for numbers that do not fit the buffers."""
        layer = cls(**{**state, "options": Options(**state["options"])})
        shapes = {tensor.shape[:3] for tensor in layer.buffers.values()}
        if shapes and shapes != {(len(layer.lengths), *next(iter(shapes))[1:2], layer.length - layer.start)}:
            raise ValueError("lengths and tensors do not agree")
        return layer

    @property
    def _behind(self) -> int:
        """Tokens before a token that it can see, when there is a window."""
        return self.options.window - 1 if self.options.window is not None else 0

    def _first(self, lengths: tuple[int, ...]) -> int:
        return max(0, min(lengths, default=0) - self._behind) if self.options.window is not None else 0

    def _allocate(self, k: Tensor, v: Tensor) -> None:
        if k.dim() != 4 or v.dim() != 4 or k.shape[:3] != v.shape[:3] or k.dtype != v.dtype or k.device != v.device:
            found = ", ".join(f"{list(tensor.shape)} {tensor.dtype} {tensor.device}" for tensor in (k, v))
            raise SizeError("keys and values do not belong together", expected="[batch, heads, tokens, dim] both", found=found)
        if not k.shape[0]:
            raise SizeError(
                "a batch without rows cannot be kept", expected="[batch, heads, tokens, dim], batch at least 1", found=f"{list(k.shape)}"
            )
        self.lengths, self.dtype = (0,) * k.shape[0], k.dtype
        with torch.inference_mode(False), torch.no_grad():
            for name, tensor in (("k", k), ("v", v)):
                shape = (*tensor.shape[:2], self._columns(k.shape[2]))
                self.buffers[name] = torch.zeros((*shape, tensor.shape[3]), dtype=self.options.store or k.dtype, device=k.device)
                if self.options.store is not None:
                    self.buffers[name + " scale"] = torch.zeros((*shape, 1), dtype=torch.float32, device=k.device)

    def _count(self, k: Tensor, v: Tensor) -> int:
        """Tokens to add. Raises SizeError when keys or values do not fit the buffers."""
        fits, shape = self._fits, k.shape
        same = fits is not None and shape == fits[0] and v.shape == fits[1] and k.dtype == v.dtype == self.dtype
        if fits is not None and same and k.device == v.device == fits[2]:
            return shape[2]
        own_k, own_v = self.buffers["k"], self.buffers["v"]
        count = k.shape[2] if k.dim() == 4 else 0
        for name, tensor, own in (("k", k, own_k), ("v", v, own_v)):
            batch, heads, _, dim = own.shape
            if tensor.shape != (batch, heads, count, dim) or tensor.dtype != self.dtype or tensor.device != own.device:
                raise SizeError(
                    "keys and values do not fit the cache",
                    tensor=name,
                    expected=f"[{batch}, {heads}, {count}, {dim}] {self.dtype} {own.device}",
                    found=f"{list(tensor.shape)} {tensor.dtype} {tensor.device}",
                )
        self._fits = k.shape, v.shape, own_k.device
        return count

    def _columns(self, needed: int, now: int = 0) -> int:
        """Columns to allocate where `needed` are needed and there are `now`."""
        options = self.options
        if options.window is not None:
            return max(needed, 2 * (self._behind + options.spare) + 1)
        return options.max_length or max(needed, 2 * now, options.capacity)

    def _make_room(self, stop: int) -> None:
        """Let the buffers hold the positions up to `stop`: drop what no window reaches, then move to other buffers if need be."""
        if self.options.max_length is not None and stop > self.options.max_length:
            raise SizeError("the cache is full", expected=f"max_length={self.options.max_length}", found=f"{stop} tokens")
        now = self.buffers["k"].shape[2]
        if stop - self.start <= now:
            return
        keep = self.start
        if self.options.window is not None:
            safe = min(self.lengths) - self.options.spare
            keep = max(keep, (safe if self.mark is None else min(safe, self.mark)) - self._behind)
        columns, held = self._columns(stop - keep, now), self.length - keep
        for name, buffer in self.buffers.items():
            source = buffer.narrow(2, keep - self.start, held)
            if columns != now:
                self.buffers[name] = self._fresh(source, buffer.shape[0], columns, held)
            else:
                buffer.narrow(2, 0, held).copy_(source if held <= keep - self.start else source.clone())
        self.start = keep

    @staticmethod
    def _fresh(source: Tensor, rows: int, columns: int, held: int, order: list[int] | None = None) -> Tensor:
        """A new buffer of `columns`, of which the first `held` are those of `source`, its rows in `order`."""
        with torch.inference_mode(False), torch.no_grad():
            out = source.new_zeros((rows, source.shape[1], columns, source.shape[3]))
            held_rows = source.narrow(2, 0, held)
            out.narrow(2, 0, held).copy_(held_rows if order is None else held_rows[order])
        return out

    def _write_small(self, name: str, tensor: Tensor) -> None:
        """Put new tokens behind the last ones as small numbers, with a scale for every token and head."""
        assert self.options.store is not None
        wide = tensor.detach().float()
        largest = wide.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny * 1024)
        scale = largest / LARGEST[self.options.store]
        small = wide / scale
        self._write(name, small.round_() if self.options.store == torch.int8 else small)
        self._write(name + " scale", scale)

    def _write(self, name: str, tensor: Tensor) -> None:
        """Put new tokens behind the last ones of every row."""
        buffer, count = self.buffers[name], tensor.shape[2]
        if tensor.requires_grad:
            tensor = tensor.detach()
        if self.even:
            buffer.narrow(2, self.lengths[0] - self.start, count).copy_(tensor)
            return
        rows = torch.arange(len(self.lengths), device=buffer.device)[:, None]
        at = torch.tensor(self.lengths, device=buffer.device)[:, None] - self.start + torch.arange(count, device=buffer.device)
        buffer[rows, :, at] = tensor.transpose(1, 2).to(buffer.dtype)

    def _read(self, name: str, first: int, stop: int) -> Tensor:
        """Positions `first` to `stop` of a buffer."""
        values = self.buffers[name].narrow(2, first - self.start, stop - first)
        if self.options.store is None:
            return values
        scale = self.buffers[name + " scale"].narrow(2, first - self.start, stop - first)
        return (values.float() * scale).to(self.dtype)


def _whole(numbers: Sequence[int] | Tensor, rows: int, most: int | None) -> list[int]:
    """One number for each row of the batch, none above `most`."""
    found = [int(n) for n in (numbers.tolist() if isinstance(numbers, Tensor) else numbers)]
    if len(found) != rows or (most is not None and not all(0 <= n <= most for n in found)):
        span = f", each 0 to {most}" if most is not None else ""
        raise SizeError("one number for each row of the batch", expected=f"{rows} numbers{span}", found=str(found))
    return found
