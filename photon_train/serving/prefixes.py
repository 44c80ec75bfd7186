"""The encodings of volumes that are kept for the next question: the least recently used goes first, never one in use.

A key says all that an encoding depends on: the content of the volumes, the text before them, and the weights. Names of
volumes do not count.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from photon_train.prefix import Prefix


@dataclass
class _Entry:
    prefix: Prefix | None = None  # while it is being made
    bytes: int = 0
    users: int = 1
    forgotten: bool = False  # it goes as soon as nobody uses it


class PrefixCache:
    """Prefixes by key, of at most `max_bytes` together, once those that are in use are let go of."""

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


def bytes_of(prefix: Prefix) -> int:
    """Return the size of all tensors of a prefix."""
    pairs = [tensor for pair in prefix.keys_values for tensor in pair]
    others = [value for value in prefix if isinstance(value, Tensor)]
    return sum(tensor.nbytes for tensor in (*pairs, *others, *prefix.volumes.values()))
