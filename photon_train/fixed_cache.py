"""A cache that grows while prompts are read and pruned, and then has one length until the answers end.

The first decoding step moves keys and values into arrays with room for all that will come. From then on a step writes
its place in them: nothing is copied, memory does not grow, and every step has the shapes of the one before it.

Legend: B rows, K key heads, M tokens after pruning, R room for new tokens, d head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class FixedLayer(DynamicLayer):
    """One layer: keys and values [B, K, M, d], and from the first decoding step on [B, K, M + R, d]."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.filled: int | None = None  # tokens, once the length is fixed

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return all keys and values; those that are still to come are 0, and for the mask to hide."""
        if not self.is_initialized or (self.filled is None and key_states.shape[-2] > 1):
            return super().update(key_states, value_states, *args, **kwargs)
        assert self.keys is not None and self.values is not None, "the layer is initialized"
        if self.filled is None:
            self.filled = self.keys.shape[-2]
            self.keys, self.values = (_with_room(x_BKMd, self.room) for x_BKMd in (self.keys, self.values))
        end = self.filled + key_states.shape[-2]
        self.keys[:, :, self.filled : end] = key_states
        self.values[:, :, self.filled : end] = value_states
        self.filled = end
        return self.keys, self.values

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        """Tell whether the next single token finds one length: transformers never leaves its mask out then."""
        return self.is_initialized

    def get_seq_length(self) -> int:
        """Return how many tokens are in the layer."""
        return super().get_seq_length() if self.filled is None else self.filled

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys `update` will return, and the place of the first."""
        if self.filled is not None:
            assert self.keys is not None, "the length is fixed"
            return self.keys.shape[-2], 0
        begun = super().get_seq_length()
        return begun + (self.room if begun and query_length == 1 else query_length), 0


class FixedCache(Cache):
    """Layers with `room` for so many tokens behind the pruned prompts."""

    def __init__(self, config: Any, room: int) -> None:
        super().__init__(layers=[FixedLayer(room) for _ in range(config.num_hidden_layers)])


def _with_room(x_BKMd: Tensor, room: int) -> Tensor:
    """Return the tensor with `room` more tokens of 0."""
    return torch.cat([x_BKMd, x_BKMd.new_zeros(*x_BKMd.shape[:2], room, x_BKMd.shape[-1])], dim=2)
