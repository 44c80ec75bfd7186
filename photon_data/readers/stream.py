"""Stored voxels -> a Scan whose planes are streamed in the memory of one plane; length and checksums are verified.

file:  |<- start ->|<---------- stream (plain, gzip or zlib) ---------->|
decoded stream:    |<- skip ->| plane 0 | plane 1 | ... | plane nz - 1 |  and then nothing more

What every format's header must give is checked here once: a grid of a sane size, a frame, numbers of a known type.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from isal import igzip_lib

from photon_data.errors import COPY_AGAIN, EXPORT_AGAIN, Refused, refusal
from photon_data.scan import Scan
from photon_data.volume import Geometry

GZIP_MAGIC = b"\x1f\x8b"
# Compressed bytes read at a time. 32 kB to 2 MB take the same time; less memory is nicer to caches.
CHUNK_BYTES = 1 << 17
# Deflate packs at most 258 bytes into 2 bits; a smaller file cannot hold what its header promises.
MAX_DEFLATE_RATIO = 1032
# What cannot be compressed grows by less than a fiftieth; zeros may follow a gzip stream.
MAX_PADDING = 1 << 24
# One plane is in memory at a time: its sides are bounded, not only the number of voxels.
MAX_SIDE = 4096
SPACING_MM = (0.001, 100.0)
_UNITS = {0.001: "um|µm|micron|micrometer|micrometre", 1.0: "|?|mm|millimeter|millimetre"}
_UNITS |= {10.0: "cm|centimeter|centimetre", 1000.0: "m|meter|metre"}
MM_PER_UNIT = {name: mm for mm, names in _UNITS.items() for name in names.split("|")}


class Compression(IntEnum):
    """How the stream of a file is packed: isal's flag."""

    NONE = -1
    GZIP = igzip_lib.DECOMP_GZIP
    ZLIB = igzip_lib.DECOMP_ZLIB


@dataclass(frozen=True)
class Stored:
    """Where the voxels of a scan lie: `shape_zyx` values of `dtype` (in its stored byte order), last axis fastest."""

    path: Path
    compression: Compression
    start: int
    skip: int
    shape_zyx: tuple[int, int, int]
    dtype: np.dtype

    @property
    def expected_bytes(self) -> int:
        """Length of the decoded stream by the header."""
        return self.skip + prod(self.shape_zyx) * self.dtype.itemsize


def scan_of(stored: Stored, geometry: Geometry, file_format: str, slope: float = 1.0, intercept: float = 0.0) -> Scan:
    """Return the Scan of stored values; Refused truncated or surplus where the file has not the length for them."""
    found, expected = stored.path.stat().st_size - stored.start, stored.expected_bytes
    if stored.compression is Compression.NONE:
        if found > expected:
            raise _surplus(stored.path.name, f"{expected:,} bytes", f"{found:,}")
        if found < expected:
            raise _truncated(stored, f"{max(found, 0):,}")
    elif (max(found, 0) + 1) * MAX_DEFLATE_RATIO < expected:
        raise _truncated(stored, "a file too small to hold them")
    elif found > expected + expected // 50 + MAX_PADDING:
        raise _surplus(stored.path.name, f"less than {expected:,} compressed bytes", f"{found:,}")
    return Scan(geometry, stored.dtype.newbyteorder("="), slope, intercept, partial(stream_planes, stored), file_format)


def stream_planes(stored: Stored) -> Iterator[np.ndarray]:
    """Yield the planes [y, x] of stored values in native byte order, all in one buffer: the next overwrites the last.

    The end of the data is verified before the last plane is handed out. Refused: truncated, damaged, surplus.
    """
    nz, ny, nx = stored.shape_zyx
    octets = np.empty(ny * nx * stored.dtype.itemsize, np.uint8)
    plane = octets.view(stored.dtype).reshape(ny, nx)
    native = plane.view(stored.dtype.newbyteorder("="))
    with stored.path.open("rb", buffering=0) as file:
        file.seek(stored.start)
        source = _decoded(file, stored.compression, stored.path.name)
        if (skipped := _fill(source, memoryview(bytearray(stored.skip)))) < stored.skip:
            raise _truncated(stored, f"{skipped:,}")
        for z in range(nz):
            if (filled := _fill(source, octets.data)) < len(octets):
                raise _truncated(stored, f"{stored.skip + z * len(octets) + filled:,}")
            if z == nz - 1 and source.readinto(memoryview(bytearray(1))):
                raise _surplus(stored.path.name, f"{stored.expected_bytes:,} bytes", "more")
            if not stored.dtype.isnative:
                plane.byteswap(inplace=True)
            yield native


def read_head(path: Path, count: int, compression: Compression) -> bytes:
    """Return the first `count` decoded bytes of a file, fewer where it ends before; Refused if damaged."""
    head = bytearray(count)
    with path.open("rb", buffering=0) as file:
        filled = _fill(_decoded(file, compression, path.name), memoryview(head))
    return bytes(head[:filled])


class _Readable(Protocol):
    def readinto(self, view: memoryview, /) -> int | None: ...


def _decoded(file: BinaryIO, compression: Compression, name: str) -> _Readable:
    return file if compression is Compression.NONE else _Inflated(file, compression, name)  # type: ignore[return-value]


def _fill(source: _Readable, view: memoryview) -> int:
    """Read until `view` is full or the source ends; return the number of bytes."""
    filled = 0
    while filled < len(view) and (count := source.readinto(view[filled:])):
        filled += count
    return filled


class _Inflated:
    """The decoded bytes of a gzip file (of one member or several) or a zlib stream; its checksums are verified."""

    def __init__(self, file: BinaryIO, compression: Compression, name: str) -> None:
        self._file, self._compression, self._name = file, compression, name
        self._member = igzip_lib.IgzipDecompressor(compression)
        self._pending = b""

    def readinto(self, view: memoryview) -> int:
        """Fill `view` as far as one step goes and return how far: 0 at the sound end of the stream, else at least 1."""
        while not (self._member.eof and self._is_last_member()):
            chunk = self._pending or (self._file.read(CHUNK_BYTES) if self._member.needs_input else b"")
            if self._member.needs_input and not chunk:
                raise refusal("truncated", self._name, "a whole compressed file", "its end before", COPY_AGAIN)
            self._pending = b""
            try:
                data = self._member.decompress(chunk, len(view))
            except igzip_lib.IsalError:  # type: ignore[misc]  # its stub calls the class an instance
                expected = "compressed data that match their checksum"
                raise refusal("damaged", self._name, expected, "others", COPY_AGAIN) from None
            if data:
                view[: len(data)] = data
                return len(data)
        return 0

    def _is_last_member(self) -> bool:
        """Tell whether nothing follows this member but padding with zeros; else go on with the next one."""
        rest = self._member.unused_data
        while not rest.strip(b"\0"):
            if not (rest := self._file.read(CHUNK_BYTES)):
                return True
        rest = rest.lstrip(b"\0")
        if len(rest) < len(GZIP_MAGIC):
            rest += self._file.read(CHUNK_BYTES)
        if not (self._compression is Compression.GZIP and rest.startswith(GZIP_MAGIC)):
            raise _surplus(self._name, "nothing after its voxels", "more")
        self._member = igzip_lib.IgzipDecompressor(self._compression)
        self._pending = rest
        return False


def _truncated(stored: Stored, found: str) -> Refused:
    expected = f"{stored.expected_bytes:,} bytes by its header"
    return refusal("truncated", stored.path.name, expected, found, COPY_AGAIN)


def _surplus(name: str, expected: str, found: str) -> Refused:
    return refusal("surplus", name, expected, found, "its header does not describe its data, export the scan again")


def grid_shape(sizes: Sequence[int], name: str, max_voxels: int) -> tuple[int, int, int]:
    """Return (z, y, x) of sizes in file order (fastest axis first), sides of 1 after the third dropped; Refused."""
    found = " x ".join(str(n) for n in sizes) or "none"
    if not sizes or min(sizes) < 1:
        raise refusal("bad-header", name, "sides of at least 1 voxel", found, EXPORT_AGAIN)
    if 1 in sizes[:3] and len(sizes) > 3 and sorted(sizes)[-3] > 1:
        axis = sizes.index(1)
        found = f"{found}: its {('first', 'second', 'third')[axis]} is one voxel long"
        array = f"array[{':, ' * axis}0] in nibabel"
        remedy = f"move that axis to the end, or leave it out ({array}, with the affine of the other three)"
        code = "several-volumes" if axis else "channel-first"
        raise refusal(code, name, "the axes x, y, z first", found, remedy)
    if prod(sizes[3:]) > 1:
        raise refusal("several-volumes", name, "one volume", found, "split it into one file per volume")
    if len(sizes) < 3 or min(sizes[:3]) < 2:
        raise refusal("two-d", name, "a volume of at least 2 voxels a side", found, "leave it out")
    if prod(sizes) > max_voxels:
        remedy, needed = "raise the limit or crop the scan", f"too-large={prod(sizes)}"
        raise refusal("too-large", name, f"at most {max_voxels:,} voxels", found, remedy, needed)
    if max(sizes) > MAX_SIDE:
        raise refusal("too-large", name, f"sides of at most {MAX_SIDE} voxels", found, "crop the scan")
    return int(sizes[2]), int(sizes[1]), int(sizes[0])


def frame(shape_zyx: tuple[int, int, int], origin_lps: Any, steps_lps: Any, name: str, remedy: str) -> Geometry:
    """Return the Geometry of a header's frame in LPS mm; Refused if it is singular, not finite or absurd."""
    try:
        with np.errstate(all="ignore"):
            geometry = Geometry.from_arrays(shape_zyx, origin_lps, steps_lps)
    except ValueError:
        raise refusal("bad-geometry", name, "finite, independent axes", "others", remedy) from None
    low, high = SPACING_MM
    if not all(low <= spacing <= high for spacing in geometry.spacing_zyx_mm):
        found = " x ".join(f"{spacing:.4g}" for spacing in geometry.spacing_zyx_mm[::-1])
        raise refusal("bad-geometry", name, f"voxels of {low:g} to {high:g} mm", f"{found} mm", remedy)
    return geometry


def mm_per_unit(units: Sequence[str], name: str) -> float:
    """Return how many millimetres the one unit of a header has, 1 where it names none ("?" or ""); Refused."""
    found = {MM_PER_UNIT.get(str(unit).strip().lower().removesuffix("s")) for unit in units or [""]}
    mm = found.pop() if len(found) == 1 else None
    if mm is None:
        remedy = "name the unit that its spacing has"
        raise refusal("bad-geometry", name, "lengths in one unit of m, cm, mm or um", "others", remedy)
    return mm


def wrong_values(code: str, name: str, found: str) -> Refused:
    """Return the refusal ("rgb", "complex" or "dtype") of voxels that are no intensities of a type that is read."""
    expected, remedy = {
        "rgb": ("one intensity per voxel", "export the scan, not a rendering of it"),
        "complex": ("real intensities", "export the magnitude"),
        "dtype": ("integers of 8 to 64 bits, float32 or float64", "convert it to int16 or float32"),
    }[code]
    return refusal(code, name, expected, found, remedy)
