"""The voxels of a store, read when they are sliced, and never others than were written."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from photon_data.errors import UsageError


def checksums(array: Any, shard: Path) -> str:
    """Return the SHA-256 of the checksums in the one shard of a zarr array: of its index and of each chunk.

    Whoever decodes a chunk compares it with its checksum. So this binds all voxels, for a hundred short reads at most
    instead of a whole one.
    """
    count = math.prod(n // c for n, c in zip(array.shards, array.chunks, strict=True))
    with shard.open("rb", buffering=0) as file:
        size = file.seek(0, 2)
        file.seek(max(size - 16 * count - 4, 0))
        index = file.read()
        found = hashlib.sha256(index)
        for offset, length in np.frombuffer(index[: 16 * count], "<u8").reshape(-1, 2).tolist():
            file.seek(min(max(offset + length - 4, 0), size))
            found.update(file.read(4))
    return found.hexdigest()


@dataclass(frozen=True)
class StoredArray:
    """The voxels of a grid, int16 [z, y, x], read when they are sliced; UsageError where they are not what was written.

    zarr takes a file that is lost for fill values. So every read is followed by a look at the file, whatever has
    decoded it.
    """

    array: Any  # of zarr
    place: str  # of the file that holds it
    look: Callable[[], object]  # returns the state of the file: see Location.state
    state: object  # when the store was opened

    @property
    def shape(self) -> tuple[int, int, int]:
        """(z, y, x)."""
        return tuple(self.array.shape)

    @property
    def dtype(self) -> np.dtype:
        """Of the voxels: int16."""
        return self.array.dtype

    def __getitem__(self, index: Any) -> Any:
        """Return the voxels of a numpy index."""
        remedy = "copy the store or prepare it again"
        try:
            voxels = self.array[index]
        except (ValueError, RuntimeError) as error:  # checksums, codecs
            raise UsageError(f"expected whole voxels, found {self.place} damaged ({error}); {remedy}") from error
        if (state := self.look()) != self.state:
            found = "lost" if state is None else "replaced"
            raise UsageError(f"expected {self.place} as it was when opened, found it {found} since then; open it again")
        return voxels

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Return all voxels, for numpy."""
        return np.asarray(self[...], dtype=dtype)

    def __len__(self) -> int:
        """Return the number of slices."""
        return self.shape[0]
