"""`KVCache`: the keys and values of all layers of a model, written in place."""

from __future__ import annotations

import os
import pickle
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FormatError, SizeError
from .kv_layer import CacheLayer, Options

__all__ = ["CacheLayer", "KVCache", "Options"]

KIND = "triptych kv cache 1"


class KVCache:
    """Keys and values of the tokens seen so far, layer by layer: [batch, kv heads, length, dim], written in place.

    Layers come into being at their first `update`, which sets batch, heads, dims, dtype and device. Adding a token costs the same at any
    length. Gradients do not flow into a cache.

    Args:
        capacity: tokens allocated at first; doubled whenever they run out.
        max_length: allocate so many at once, never more; a longer row is a SizeError.
        window: a token sees only the last `window` tokens, itself included; older ones are dropped. Memory then follows the window (and
            the longest chunk of tokens added at once), and `capacity` has no effect.
        spare: tokens that a cache with a window can always roll back.
        store: torch.int8 or torch.float8_e4m3fn keeps tokens small, with one float32 scale for each token and head. What is read back
            is then a *copy*, off by at most 1/254 (int8) or 1/16 (float8) of the largest value of that token and head.

    >>> cache = KVCache()
    >>> k, v = cache.update(torch.ones(2, 3, 4, 8), torch.ones(2, 3, 4, 8))
    >>> k, v = cache.update(torch.ones(2, 3, 1, 8), torch.ones(2, 3, 1, 8))
    >>> k.shape, cache.lengths
    (torch.Size([2, 3, 5, 8]), (5, 5))
    """

    def __init__(
        self,
        capacity: int = 256,
        *,
        max_length: int | None = None,
        window: int | None = None,
        spare: int = 16,
        store: torch.dtype | None = None,
    ) -> None:
        self.options = Options(capacity, max_length, window, spare, store)
        self.layers: list[CacheLayer] = []

    def __repr__(self) -> str:
        return f"KVCache({len(self.layers)} layers, lengths {self.lengths}, {self.nbytes} bytes)"

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[CacheLayer]:
        return iter(self.layers)

    def __getitem__(self, layer: int) -> CacheLayer:
        """A layer; one that is not there yet is made, empty."""
        if layer < 0:
            raise SizeError("layers count from 0", found=str(layer))
        while len(self.layers) <= layer:
            self.layers.append(CacheLayer(self.options))
        return self.layers[layer]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of every row of the batch, in the first layer that holds any; () before the first update."""
        return next((layer.lengths for layer in self.layers if layer.lengths), ())

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths, default=0)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(layer.nbytes for layer in self.layers)

    def update(self, k: Tensor, v: Tensor, layer: int = 0, new: Sequence[int] | Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Append tokens to a layer and return the keys and values that they may see.

        Args:
            k, v: [batch, kv heads, tokens, dim]; the dims of k and v may differ.
            new: how many of the tokens are real, row by row, where rows are padded at their end. Each row goes on where its own real
                tokens end, so rows become unequally long.
        Returns: k, v [batch, kv heads, columns, dim]: *views* of the cache, valid until the next change of it; copies with `store`.
            Columns are the positions in order; with a window, from the first one that the first new token of the shortest row can see.
            Behind a row's end there are numbers without meaning: mask them (`attend` does).
        Raises SizeError: another batch, heads, dim, dtype or device than before; more than `max_length` tokens.
        """
        layers = self.layers
        return (layers[layer] if 0 <= layer < len(layers) else self[layer]).update(k, v, new)

    def truncate(self, length: int | Sequence[int] | Tensor) -> None:
        """Keep the first `length` tokens, of every row or row by row. Nothing is moved.

        Raises SizeError when a window has dropped tokens that would be seen again.
        """
        for layer, lengths in [(layer, layer.kept(length)) for layer in self.layers if layer.lengths]:
            layer.lengths = lengths

    def rollback(self, count: int | Sequence[int] | Tensor) -> None:
        """Forget the last `count` tokens, of every row or row by row, as after rejected guesses of speculative decoding.

        Raises SizeError: more tokens than there are, or more than a window kept (`spare` always are).
        """
        for layer, lengths in [(layer, layer.without(count)) for layer in self.layers if layer.lengths]:
            layer.lengths = lengths

    def reorder(self, rows: Sequence[int] | Tensor) -> None:
        """Row b becomes what row `rows[b]` was, as beam search asks; the batch may grow or shrink. Only rows that change are copied."""
        for layer in self.layers:
            layer.reorder(rows)

    def reset(self) -> None:
        """Forget everything and free the memory."""
        for layer in self.layers:
            layer.reset()

    def for_transformers(self, config: Any = None) -> Any:
        """This cache for `past_key_values=` of a transformers model (version 5).

        `model.generate(ids, past_key_values=cache.for_transformers(model.config))` needs nothing else.

        Args: config: the model's; its sliding layers get their windows, and layers that hold other things than keys and values
            (state spaces, indexers) stay what transformers makes them. Without one every layer is as this cache.
        Returns: a transformers cache whose attention layers are this cache's.
        """
        from .hf_cache import adapted

        return adapted(self, config)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the tokens held into a file that `load` and `torch.load(weights_only=True)` read. The file appears whole or not at all."""
        path = Path(path)
        content = {"kind": KIND, "options": asdict(self.options), "layers": [layer.state() for layer in self.layers]}
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        try:
            with os.fdopen(handle, "wb") as file:
                torch.save(content, file)
            Path(partial).replace(path)
        except BaseException:
            Path(partial).unlink()
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str | None = None) -> KVCache:
        """A cache as it was saved, bit for bit, on the device it was on or on another one. No code of the file is run.

        Raises FormatError: the file is none that `save` wrote.
        """
        try:
            content = torch.load(path, map_location=device, weights_only=True)
            if content["kind"] != KIND:
                raise ValueError(content["kind"])
            cache = cls(**content["options"])
            cache.layers = [CacheLayer.from_state(state) for state in content["layers"]]
        except (pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, ValueError, TypeError, KeyError) as error:
            foreign = isinstance(error, pickle.UnpicklingError)  # torch's own text advises to run the file's code
            found = "other things than tensors and numbers" if foreign else str(error).split("\n")[0][:200]
            raise FormatError("not a saved KVCache", file=path, found=found) from error
        return cache
