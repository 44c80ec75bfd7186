"""The voxels of a store, read when they are sliced, and never others than were written.

A whole array is read here, by one read of the one file that holds it; a part of one is read by zarr.
"""

from __future__ import annotations

import errno
import hashlib
import math
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

import google_crc32c
import numpy as np
import zarr
from numcodecs import blosc

from photon_data.errors import UsageError
from photon_data.files import Location
from photon_data.json_text import from_json

ROOT = "zarr.json"
CHECKSUMS = "checksums_sha256"  # of each shard, see `checksums`; stores of earlier versions do not have it either
LARGEST_VOXELS = 4_000_000_000
CODECS = {"sharding_indexed", "bytes", "blosc", "crc32c"}
CHAINS = (["bytes", "blosc", "crc32c"], ["bytes", "crc32c"])  # of a chunk and of the index
BLOSC_HEADER = 16
# Between the parts of the name of the one shard. "/" made a folder of each part, in stores of earlier versions.
SEPARATOR = "."
SEPARATORS = (SEPARATOR, "/")


class Layout(NamedTuple):
    """How an array lies in its one file: in chunks of one shape, the last of an axis padded, as `store.py` writes."""

    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    dtype: np.dtype

    @property
    def counts(self) -> tuple[int, ...]:
        """How many chunks there are along each axis."""
        return tuple(math.ceil(n / c) for n, c in zip(self.shape, self.chunk, strict=True))


def shard_name(ndim: int, separator: str = SEPARATOR) -> str:
    """Return the name of the one shard of an array below its folder: "c.0.0.0" of three dimensions."""
    return separator.join(["c", *("0" * ndim)])


def checksums(layout: Layout, shard: Path) -> str:
    """Return the SHA-256 of the checksums in the one shard of an array: of its index and of each chunk.

    Whoever decodes a chunk compares it with its checksum. So this binds all voxels, for a hundred short reads at most
    instead of a whole one.
    """
    with shard.open("rb", buffering=0) as file:
        size = file.seek(0, 2)
        file.seek(max(size - _index_bytes(layout), 0))
        index = file.read()
        found = hashlib.sha256(index)
        for offset, length in np.frombuffer(index[:-4], "<u8").reshape(-1, 2).tolist():
            file.seek(min(max(offset + length - 4, 0), size))
            found.update(file.read(4))
    return found.hexdigest()


def _index_bytes(layout: Layout) -> int:
    return 16 * math.prod(layout.counts) + 4


def decoded(layout: Layout, shard: bytes) -> np.ndarray:
    """Return all voxels of a shard; ValueError or RuntimeError where a checksum or a chunk is not as it was written.

    <chunk 0><crc32c><chunk 1><crc32c> ... <index: offset and length of every chunk, uint64><crc32c>
    """
    content, size = np.frombuffer(shard, np.uint8), _index_bytes(layout)
    index = _checked(content[-size:], size)
    array, padded = np.empty(layout.shape, layout.dtype), np.empty(layout.chunk, layout.dtype)
    places = np.frombuffer(index, "<u8").reshape(-1, 2).tolist()
    for place, (start, length) in zip(np.ndindex(layout.counts), places, strict=True):
        chunk = _checked(content[start : start + length], max(length, BLOSC_HEADER + 4))
        decoded_bytes, _, own_bytes = struct.unpack_from("<3L", chunk.data, 4)  # Blosc believes both
        if (decoded_bytes, own_bytes) != (padded.nbytes, len(chunk)):
            raise ValueError("a chunk has another size")
        part = array[tuple(slice(i * c, (i + 1) * c) for i, c in zip(place, layout.chunk, strict=True))]
        if part.shape == layout.chunk and part.flags.c_contiguous:
            blosc.decompress(chunk, part)
        else:
            blosc.decompress(chunk, padded)
            part[...] = padded[tuple(slice(n) for n in part.shape)]
    return array


def _checked(piece: np.ndarray, size: int) -> np.ndarray:
    """Return a piece of a file, `size` bytes, without the checksum that ends it; ValueError where it does not agree."""
    if len(piece) != size or google_crc32c.value(piece[:-4]) != int.from_bytes(piece[-4:].tobytes(), "little"):
        raise ValueError("a checksum does not agree")
    return piece[:-4]


@dataclass(frozen=True)
class StoredArray:
    """The voxels of a grid, read when they are sliced: int16 [z, y, x]; of masks, uint8 [layer, z, y, x].

    UsageError where they are not what was written.

    zarr takes a file that is lost for fill values. So every read is followed by a look at the file, whatever has
    decoded it.
    """

    location: Location  # of the store
    name: str  # of the array in it
    shard: str  # the one file of its voxels
    layout: Layout
    state: object  # of the shard when the store was opened

    @cached_property
    def array(self) -> Any:
        """The array as zarr opens it; UsageError."""
        try:
            return zarr.open_array(self.location.at(self.name), mode="r", zarr_format=3)
        except (OSError, MemoryError):
            raise
        except Exception as error:  # what the metadata of a stranger's array make zarr raise has no end
            raise not_whole(
                self.location, f"{self.name}/{ROOT}, which describes no array ({str(error)[:200]})"
            ) from None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(z, y, x)."""
        return cast(tuple[int, int, int], self.layout.shape)

    @property
    def dtype(self) -> np.dtype:
        """Of the voxels: int16."""
        return self.layout.dtype

    def __getitem__(self, index: Any) -> Any:
        """Return the voxels of a numpy index."""
        remedy, place = "copy the store or prepare it again", self.location.at(self.shard)
        try:
            voxels = self._whole() if index is Ellipsis else self.array[index]
        except (
            ValueError,
            RuntimeError,
            ArithmeticError,
            OSError,
        ) as error:  # checksums, codecs, places beyond the file
            if isinstance(error, OSError) and error.errno != errno.EINVAL:
                raise
            raise UsageError(f"expected whole voxels, found {place} damaged ({error}); {remedy}") from error
        if voxels is None or self.location.state(self.shard) != self.state:
            found = "replaced" if self.location.exists(self.shard) else "lost"
            raise UsageError(f"expected {place} as it was when opened, found it {found} since then; open it again")
        return voxels

    def _whole(self) -> np.ndarray | None:
        content = self.location.read(self.shard)
        return None if content is None else decoded(self.layout, content)

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
    described = from_json(checked_file(location, metadata, f"{place}0/{ROOT}"))
    check_array(described, location.url, ndim, dtype)
    try:
        layout, separator = _layout(described), _separator(described)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise not_whole(location, f"{place}0/{ROOT}, which describes no array of ours ({str(error)[:200]})") from None
    shard = f"{place}0/{shard_name(ndim, separator)}"
    state = location.state(shard)
    if verify == "full":
        checked_file(location, metadata, shard)
    elif lost := what_is_lost(metadata, shard, location.size(shard)):
        raise not_whole(location, f"{shard} {lost}")
    bound = metadata[CHECKSUMS].get(shard)
    if bound and location.is_local and verify == "quick" and checksums(layout, location.path / shard) != bound:
        raise not_whole(location, f"{shard}, whose checksums have changed")
    return StoredArray(location, f"{place}0", shard, layout, state)


def _layout(described: dict[str, Any]) -> Layout:
    """Return the layout of an array in one shard that `check_array` passed; ValueError for any other."""
    (sharding,) = described["codecs"]
    inner = sharding["configuration"]
    shard, chunk = described["chunk_grid"]["configuration"]["chunk_shape"], inner["chunk_shape"]
    layout = Layout(tuple(described["shape"]), tuple(chunk), np.dtype(described["data_type"]).newbyteorder("<"))
    chains = inner["codecs"], inner["index_codecs"]
    orders = {codec.get("configuration", {}).get("endian", "little") for chain in chains for codec in chain}
    names = tuple([codec["name"] for codec in chain] for chain in chains)
    whole = [n * c for n, c in zip(layout.counts, chunk, strict=True)]
    if (names, shard, inner.get("index_location", "end"), orders) != (CHAINS, whole, "end", {"little"}):
        raise ValueError("another order of its parts")
    return layout


def _separator(described: dict[str, Any]) -> str:
    """Return what stands between the parts of a shard's name; ValueError for names of another kind."""
    encoding = described["chunk_key_encoding"]
    separator = encoding.get("configuration", {}).get("separator", "/")
    if encoding["name"] != "default" or separator not in SEPARATORS:
        raise ValueError("another way to name its parts")
    return str(separator)


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
    if size == expected:
        return ""
    found = "missing" if size is None else f"of {size:,} bytes"
    return f"{found} where {expected:,} bytes were written"


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
