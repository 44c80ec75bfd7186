"""What the questions on one volume share: every token up to the end of the last volume, computed once, and kept.

Legend: B rows, L tokens of a row, P tokens of the prefix, S tokens of a question, D hidden size, H query heads, K key
heads, d head_dim.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils._pytree import tree_map
from transformers.cache_utils import Cache

from photon_train.scheduling import Scheduled


class Prefix(NamedTuple):
    """What is the same for every question on a volume. Never modified; with gradients, a part of the graph.

    `PhotonForConditionalGeneration.encode_prefix` makes it.
    """

    input_ids_1P: Tensor
    volumes: dict[str, Tensor]  # video_grid_thw, second_per_grid_ts
    keys_values: tuple[tuple[Tensor, Tensor], ...]  # of its layers, each [1, K heads, P, d]
    h_1PD: Tensor  # after the last of them
    foreground_1P: Tensor  # share of foreground voxels of each visual token, for the foreground scheduler
    q_1HPd: Tensor | None = None  # of the layer after which tokens are dropped, rotated; None where no one asks
    k_1KPd: Tensor | None = None
    # What stayed, where that was chosen before the decoder: h, q, k, keys and values are then of these tokens alone.
    scheduled: Scheduled | None = None

    @property
    def length(self) -> int:
        """P."""
        return self.input_ids_1P.shape[1]

    @property
    def layers(self) -> int:
        """How many layers it was computed through: those to the one that drops, or all."""
        return len(self.keys_values)

    def into(self, cache: Cache, rows: int) -> Cache:
        """Return the cache with these layers holding a copy of the prefix for each row."""
        for layer, (keys, values) in enumerate(self.keys_values):
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), layer)
        return cache

    def before(self, h_BSD: Tensor) -> Tensor:
        """Return h_BLD of whole rows: the prefix, and these hidden states of its questions behind it."""
        return torch.cat([self.h_1PD.expand(len(h_BSD), -1, -1), h_BSD], dim=1)

    def volumes_of(self, rows: int) -> dict[str, Tensor]:
        """Return `volumes` of so many rows; those of a prefix of as many rows are there already."""
        copies = rows // len(self.input_ids_1P)
        return {name: torch.cat([value] * copies) for name, value in self.volumes.items()}

    def selected(self, rows: Sequence[int]) -> Prefix:
        """Return the prefix with these rows of it, of each all its volumes."""
        count = len(self.input_ids_1P)

        @cache
        def index(per_row: int, device: torch.device) -> Tensor:
            chosen = torch.tensor([row * per_row + i for row in rows for i in range(per_row)])
            return chosen.to(device, non_blocking=True)  # the host does not wait for what the device has yet to do

        def select(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return None  # a number is one of all rows
            return value.index_select(0, index(len(value) // count, value.device))

        found: Prefix = tree_map(select, self)
        return found

    def followed_by(self, questions: Sequence[Tensor], pad_token_id: int = 0) -> dict[str, Any]:
        """Return model inputs of B rows: prefix, padding, the ids of a question. Raises ValueError for an empty one."""
        lengths = [len(question) for question in questions]
        if not all(lengths) or not lengths:
            raise ValueError(f"expected questions of at least one token, found lengths {lengths}; leave empty ones out")
        input_ids = with_suffixes(self.input_ids_1P, questions, pad_token_id)
        mask = with_suffixes(torch.ones_like(self.input_ids_1P), [torch.ones_like(q) for q in questions], 0)
        return {"input_ids": input_ids, "attention_mask": mask, "prefix": self, **self.volumes_of(len(questions))}


def with_suffixes(prefix_P: Tensor, suffixes: Sequence[Tensor], padding: int) -> Tensor:
    """Return int64[B, L], a row for each suffix: [P P P . s s], [P P P s s s]."""
    suffix_BS = pad_sequence(list(suffixes), batch_first=True, padding_value=padding, padding_side="left")
    return torch.cat([prefix_P.expand(len(suffixes), -1), suffix_BS.to(prefix_P.device)], dim=1)


class PrefixCache:
    """Prefixes by key, of at most `max_bytes` together: the least recently used goes first, never one in use.

    A key says all that an encoding depends on: the content of the volumes, the text before them, and the weights.
    Names of volumes do not count.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.hits = self.misses = self.evictions = self.bytes = 0
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    @contextmanager
    def pinned(self, key: Hashable, encode: Callable[[], Prefix]) -> Iterator[Prefix]:
        """Yield the prefix of a key, from `encode` if it is not there. It stays until the block ends.

        Raises what `encode` raises; nothing is kept then. One thread at a time may call this.
        """
        with self._lock:
            found = self._entries.get(key)
            entry = self._entries.setdefault(key, found or _Entry())
            self._entries.move_to_end(key)
            self.hits += found is not None
            self.misses += found is None
            entry.users += found is not None
        try:
            if entry.prefix is None:
                entry.prefix = encode()
                with self._lock:
                    entry.bytes = bytes_of(entry.prefix)
                    self.bytes += entry.bytes
                    self._shrink(self.max_bytes)
            yield entry.prefix
        finally:
            with self._lock:
                entry.users -= 1
                entry.forgotten |= entry.prefix is None
                self._shrink(self.max_bytes)

    def forget(self, is_forgotten: Callable[[Hashable], bool]) -> None:
        """Remove the prefixes whose keys are so, those in use as soon as they are not."""
        with self._lock:
            for key, entry in self._entries.items():
                entry.forgotten |= is_forgotten(key)
            self._shrink(self.max_bytes)

    def clear(self) -> int:
        """Remove every prefix that is not in use; return how many bytes that were."""
        with self._lock:
            before = self.bytes
            self._shrink(0)
            return before - self.bytes

    def _shrink(self, most: int) -> None:
        """Remove what is forgotten, then the least recently used, until `most` bytes are left; not what is in use."""
        free = [key for key, entry in self._entries.items() if not entry.users]
        for key in sorted(free, key=lambda key: not self._entries[key].forgotten):
            entry = self._entries[key]
            if entry.forgotten or self.bytes > most:
                self.evictions += not entry.forgotten
                self.bytes -= entry.bytes
                del self._entries[key]


@dataclass
class _Entry:
    prefix: Prefix | None = None  # while it is being made
    bytes: int = 0
    users: int = 1
    forgotten: bool = False  # it goes as soon as nobody uses it


def bytes_of(prefix: Prefix) -> int:
    """Return the size of all tensors of a prefix."""
    pairs = [tensor for pair in prefix.keys_values for tensor in pair]
    others = [value for value in prefix if isinstance(value, Tensor)]
    return sum(tensor.nbytes for tensor in (*pairs, *others, *prefix.volumes.values()))
