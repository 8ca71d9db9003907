"""A `KVCache` in the place of a transformers cache. Written for the cache layers of transformers 5."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import MissingExtraError, SizeError
from .kv_layer import CacheLayer

try:
    from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
except ImportError as error:
    raise MissingExtraError("transformers 5", "hf") from error

if TYPE_CHECKING:
    from .kv_cache import KVCache


_Mixin: Any = CacheLayerMixin


class PastLayer(_Mixin):  # type: ignore[misc]
    """One layer of a `KVCache` with the methods that transformers calls."""

    is_croppable = True

    def __init__(self, layer: CacheLayer) -> None:
        self.layer = layer
        self.is_sliding = layer.options.window is not None
        if layer.options.window is not None:
            self.sliding_window = layer.options.window

    @property
    def keys(self) -> Tensor | None:
        return self.layer.keys

    @property
    def values(self) -> Tensor | None:
        return self.layer.values

    @property
    def is_initialized(self) -> bool:
        return bool(self.layer.buffers)

    @property
    def dtype(self) -> torch.dtype | None:
        return self.layer.dtype

    @property
    def device(self) -> torch.device | None:
        return self.layer.buffers["k"].device if self.layer.buffers else None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.layer.update(key_states[:, :, :0], value_states[:, :, :0])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.layer.update(key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.layer.length + query_length - self.layer.first, self.layer.first

    def get_seq_length(self) -> int:
        return self.layer.length

    def get_max_length(self) -> int:
        options = self.layer.options
        return options.window or options.max_length or -1

    @property
    def record_past(self) -> bool:
        """Whether tokens since the last `crop` are kept for the next one, window or not."""
        return self.layer.mark is not None

    @record_past.setter
    def record_past(self, on: bool) -> None:
        self.layer.mark = self.layer.length if on else None

    def activate_past_recording(self) -> None:
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens."""
        if tokens_to_remove > 0:
            raise SizeError("crop takes tokens to remove, as a number below zero", found=str(tokens_to_remove), try_="KVCache.truncate(n)")
        if self.layer.lengths:
            self.layer.lengths = self.layer.without(-tokens_to_remove)
        if self.record_past:
            self.record_past = True

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.layer.reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        rows = torch.arange(len(self.layer.lengths), device=indices.device)[indices]
        self.layer.reorder(rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.layer.reorder([row for row in range(len(self.layer.lengths)) for _ in range(repeats)])

    def reset(self) -> None:
        self.layer.reset()


def adapted(cache: KVCache, config: Any = None) -> Any:
    """See `KVCache.for_transformers`: a DynamicCache whose layers for keys and values are those of `cache`."""
    past: Any = DynamicCache(config=config)
    made = []
    for index, layer in enumerate(past.layers):
        own = cache[index]
        if type(layer) is DynamicSlidingWindowLayer and not own.buffers:
            own.options = replace(own.options, window=layer.sliding_window)
        made.append(PastLayer(own) if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) else layer)
    past.layers = made
    if past.layer_class_to_replicate is not None:
        past.layers = [PastLayer(layer) for layer in cache]
        past.layer_class_to_replicate = lambda: PastLayer(cache[len(past.layers)])
    return past
