"""The voxels of a store, read when they are sliced, and never others than were written."""

from __future__ import annotations

import errno
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from photon_data.errors import UsageError
from photon_data.files import Location
from photon_data.json_text import from_json

ROOT = "zarr.json"
CHECKSUMS = "checksums_sha256"  # of each shard, see `checksums`; stores of earlier versions do not have it either
LARGEST_VOXELS = 4_000_000_000
CODECS = {"sharding_indexed", "bytes", "blosc", "crc32c"}


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
    """The voxels of a grid, read when they are sliced: int16 [z, y, x]; of masks, uint8 [layer, z, y, x].

    UsageError where they are not what was written.

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
        except (
            ValueError,
            RuntimeError,
            ArithmeticError,
            OSError,
        ) as error:  # checksums, codecs, places beyond the file
            if isinstance(error, OSError) and error.errno != errno.EINVAL:
                raise
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


def open_array(
    location: Location, metadata: dict[str, Any], place: str, verify: str = "quick", *, dtype: str = "int16"
) -> StoredArray:
    """Return the array of a grid of a store, which lies below `place` ("" or "model/"); uint8 ones have four axes.

    UsageError where a file of it is not as the store's `metadata` record it.
    """
    ndim = 3 if dtype == "int16" else 4
    content = checked_file(location, metadata, f"{place}0/{ROOT}")
    shard = "/".join([f"{place}0", "c", *("0" * ndim)])
    look = partial(location.state, shard)
    state = look()
    if verify == "full":
        checked_file(location, metadata, shard)
    elif lost := what_is_lost(metadata, shard, location.size(shard)):
        raise not_whole(location, f"{shard} {lost}")
    try:
        check_array(from_json(content), location.url, ndim, dtype)
        array = zarr.open_array(location.at(f"{place}0"), mode="r", zarr_format=3)
    except (UsageError, OSError, MemoryError):
        raise
    except Exception as error:  # what the metadata of a stranger's array make zarr raise has no end
        raise not_whole(location, f"{place}0/{ROOT}, which describes no array ({str(error)[:200]})") from None
    bound = metadata[CHECKSUMS].get(shard)
    if bound and location.is_local and verify == "quick" and checksums(array, location.path / shard) != bound:
        raise not_whole(location, f"{shard}, whose checksums have changed")
    return StoredArray(array, location.at(shard), look, state)


def check_array(metadata: dict[str, Any], path: str | Path, ndim: int = 3, dtype: str = "int16") -> None:
    """Raise UsageError, before anything is decoded, unless this is a sane array in our codecs: a volume, or masks."""
    shape = metadata.get("shape", [])
    found = metadata.get("data_type")
    if found != dtype or len(shape) != ndim or math.prod(shape[-3:]) > LARGEST_VOXELS:
        dimensions = {3: "three", 4: "four"}[ndim]
        raise UsageError(f"expected a {dimensions}-dimensional {dtype} array, found {found} {shape} in {path}")
    outer = metadata.get("codecs", [])
    inner = [c for codec in outer for c in codec.get("configuration", {}).get("codecs", [])]
    unknown = {codec.get("name") for codec in [*outer, *inner]} - CODECS
    if unknown:
        raise UsageError(f"expected the codecs {sorted(CODECS)}, found {sorted(map(str, unknown))} in {path}")


def what_is_lost(metadata: dict[str, Any], file: str, size: int | None) -> str:
    """Return what is wrong with a part of that size (None where there is none); "" for one of the recorded size.

    zarr itself takes a chunk that is missing for one of fill values.
    """
    expected = metadata["files"][file]["bytes"]  # a part that is not listed could not be missed
    found = "missing" if size is None else f"of {size:,} bytes"
    return "" if size == expected else f"{found} where {expected:,} bytes were written"


def checked_file(location: Location, metadata: dict[str, Any], file: str) -> bytes:
    """Return the content of a file of a store; UsageError where it is not what was written."""
    content = location.read(file)
    if lost := what_is_lost(metadata, file, None if content is None else len(content)):
        raise not_whole(location, f"{file} {lost}")
    assert content is not None
    if hashlib.sha256(content).hexdigest() != metadata["files"][file]["sha256"]:
        raise not_whole(location, f"{file}, whose bytes have changed")
    return content


def not_whole(location: Location, wrong: str) -> UsageError:
    """Return the error for a store of which something is wrong."""
    return UsageError(f"expected a whole store, found {location.url} with {wrong}; prepare it or copy it again")
