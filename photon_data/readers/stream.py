"""The text at the start of a file that is a header by lines (NRRD, MetaImage), and where its data begin.

The data file that a header in another file refers to: beside the header or below it, never anywhere else.

What the first bytes of a file say it is, whatever its name says.

Stored values, from disk to planes, in the memory of one plane; length and checksums are verified on the way.

file:  |<- start ->|<---------- stream (plain, gzip or zlib) ---------->|
decoded stream:    |<- skip ->| plane 0 | plane 1 | ... | plane nz - 1 |  and then nothing more
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from io import BytesIO
from math import prod
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np
from isal import igzip_lib

from photon_data.errors import Refused

MAX_HEADER_BYTES = 1 << 20


class HeaderText(NamedTuple):
    """Lines of a header (without line ends) and the number of bytes it takes with its last line end."""

    lines: list[str]
    length: int


def read_lines(path: Path, is_last: Callable[[str], bool]) -> HeaderText:
    """Return the header up to and with the first line that `is_last`, or the whole of a short file that has no such line.

    Refused bad-header where it goes on beyond 1 MB. Bytes are read as Latin-1, which never fails.
    """
    head = BytesIO(read_head(path, MAX_HEADER_BYTES))
    lines = []
    for line in head:
        lines.append(line.decode("latin-1").rstrip())
        if is_last(lines[-1]):
            return HeaderText(lines, head.tell())
    if head.tell() == MAX_HEADER_BYTES:
        raise Refused("bad-header", f"{path.name}: a header of at most 1 MB wanted, found no end of it; export the scan again")
    return HeaderText(lines, head.tell())


MAX_REFERENCE = 255


def beside(header: Path, reference: str) -> Path:
    """Return the data file that `reference`, a text of the header, means. It is trusted no further than the header's folder.

    Refused data-file: several files or a pattern of names; a path that leads out, by dots, links or a root; no such file.
    """
    words = reference.split()
    if not words or words[0].upper() == "LIST" or "%" in reference:
        raise Refused("data-file", f"{header.name}: one data file wanted, its header lists several; save the scan as one file")
    folder = header.parent.resolve()
    data = folder / reference.strip()
    if "\0" in reference or len(reference) > MAX_REFERENCE or not data.resolve().is_relative_to(folder):
        raise Refused("data-file", f"{header.name}: a data file in its own folder wanted, it points elsewhere; move it there")
    if not data.is_file():
        raise Refused("data-file", f"{header.name}: its data file beside it wanted, there is none; copy both files")
    return header.parent / reference.strip()


HEAD_BYTES = 352
GZIP_MAGIC = b"\x1f\x8b"
DICOM_MAGIC = b"DICM"

_MAGICS = (
    (GZIP_MAGIC, "gzip data"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"\x89PNG", "a PNG picture"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"%PDF", "a PDF document"),
    (b"\x89HDF", "an HDF5 file"),
    (b"NRRD", "an NRRD file"),
    (b"BZh", "bzip2 data"),
    (b"\x28\xb5\x2f\xfd", "zstandard data"),
    (b"\xfd7zXZ", "xz data"),
)


def is_dicom(head: bytes) -> bool:
    """Tell whether the first bytes of a file carry the DICOM magic after its 128 bytes of preamble."""
    return head[128:132] == DICOM_MAGIC


def is_nifti(head: bytes) -> bool:
    """Tell whether the first bytes of a file are a NIfTI-1 or NIfTI-2 header."""
    return head[344:348] in (b"n+1\0", b"ni1\0") or head[4:8] in (b"n+2\0", b"ni2\0")


def describe(head: bytes) -> str:
    """Return in words what the first 352 bytes of a file look like; never a quotation of them."""
    for magic, words in _MAGICS:
        if head.startswith(magic):
            return words
    if is_dicom(head):
        return "a DICOM file"
    if is_nifti(head):
        return "an uncompressed NIfTI file"
    if head and not head.strip(b"\0"):
        return "zeros"
    is_text = all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head)
    return "text" if is_text else "data of an unknown kind"


# Compressed bytes read at a time. 32 kB to 2 MB take the same 0.29 s for 183 MB of voxels; less memory is nicer to caches.
CHUNK_BYTES = 1 << 17
# Deflate packs at most 258 bytes into 2 bits; a smaller file cannot hold what its header promises.
MAX_DEFLATE_RATIO = 1032


class Encoding(StrEnum):
    """How the stream is stored."""

    PLAIN = "plain"
    GZIP = "gzip"
    ZLIB = "zlib"


@dataclass(frozen=True)
class Stored:
    """Where the voxels of a scan lie: `shape_zyx` values of `dtype` (as stored, so with its byte order), last axis fastest."""

    path: Path
    encoding: Encoding
    start: int
    skip: int
    shape_zyx: tuple[int, int, int]
    dtype: np.dtype

    @property
    def wanted_bytes(self) -> int:
        """Length of the decoded stream that the header asks for."""
        return self.skip + prod(self.shape_zyx) * self.dtype.itemsize


class _Readable(Protocol):
    def readinto(self, view: memoryview, /) -> int | None: ...


class _Inflated:
    """The decoded bytes of a gzip file (one member or several) or of a zlib stream; its checksums are verified at its end."""

    def __init__(self, file: BinaryIO, encoding: Encoding, name: str) -> None:
        self._file = file
        self._name = name
        self._is_gzip = encoding is Encoding.GZIP
        self._flag = igzip_lib.DECOMP_GZIP if self._is_gzip else igzip_lib.DECOMP_ZLIB
        self._member = igzip_lib.IgzipDecompressor(self._flag)
        self._pending = b""

    def readinto(self, view: memoryview) -> int:
        """Fill `view` as far as one step goes and return how far: 0 at the sound end of the stream, else at least 1."""
        while not (self._member.eof and self._is_last_member()):
            data = self._decode(len(view))
            if data:
                view[: len(data)] = data
                return len(data)
        return 0

    def _decode(self, most: int) -> bytes:
        chunk = self._pending or (self._file.read(CHUNK_BYTES) if self._member.needs_input else b"")
        if self._member.needs_input and not chunk:
            raise Refused("truncated", f"{self._name}: a whole compressed file wanted, it ends early; copy or download it again")
        self._pending = b""
        try:
            return self._member.decompress(chunk, most)
        except igzip_lib.IsalError:  # type: ignore[misc]  # its stub calls the class an instance
            raise Refused(
                "damaged",
                f"{self._name}: compressed data that match their checksum wanted, found others; copy or download the file again",
            ) from None

    def _is_last_member(self) -> bool:
        """Tell whether nothing follows this member but padding with zeros; else go on with the next one."""
        rest = self._member.unused_data
        while not rest.strip(b"\0"):
            rest = self._file.read(CHUNK_BYTES)
            if not rest:
                return True
        rest = rest.lstrip(b"\0")
        if len(rest) < len(GZIP_MAGIC):
            rest += self._file.read(CHUNK_BYTES)
        if not (self._is_gzip and rest.startswith(GZIP_MAGIC)):
            raise _surplus(self._name)
        self._member = igzip_lib.IgzipDecompressor(self._flag)
        self._pending = rest
        return False


def read_head(path: Path, count: int, encoding: Encoding = Encoding.PLAIN) -> bytes:
    """Return the first `count` decoded bytes of a file, fewer where it ends before; Refused where it is cut or damaged there."""
    head = bytearray(count)
    with path.open("rb", buffering=0) as file:
        filled = _fill(_decoded(file, encoding, path.name), memoryview(head))
    return bytes(head[:filled])


def check_length(stored: Stored) -> None:
    """Compare the length of the file with what its header wants, before any voxel is read; Refused truncated or surplus."""
    found = stored.path.stat().st_size - stored.start
    wanted = stored.wanted_bytes
    if stored.encoding is Encoding.PLAIN and found > wanted:
        raise _surplus(stored.path.name, wanted, found)
    most = found if stored.encoding is Encoding.PLAIN else (max(found, 0) + 1) * MAX_DEFLATE_RATIO
    if most < wanted:
        raise _truncated(stored.path.name, wanted, max(found, 0) if stored.encoding is Encoding.PLAIN else None)


def stream_planes(stored: Stored) -> Iterator[np.ndarray]:
    """Yield the planes [y, x] of stored values in native byte order, each in the same buffer, which the next one overwrites.

    The end of the data is verified before the last plane is handed out. Refused: truncated, damaged, surplus.
    """
    nz, ny, nx = stored.shape_zyx
    octets = np.empty(ny * nx * stored.dtype.itemsize, np.uint8)
    plane = octets.view(stored.dtype).reshape(ny, nx)
    native = plane.view(stored.dtype.newbyteorder("="))
    with stored.path.open("rb", buffering=0) as file:
        file.seek(stored.start)
        source = _decoded(file, stored.encoding, stored.path.name)
        _skip(source, stored)
        for z in range(nz):
            _fill_plane(source, octets.data, stored, z)
            if z == nz - 1:
                _expect_end(source, stored)
            if not stored.dtype.isnative:
                plane.byteswap(inplace=True)
            yield native


def _decoded(file: BinaryIO, encoding: Encoding, name: str) -> _Readable:
    return file if encoding is Encoding.PLAIN else _Inflated(file, encoding, name)  # type: ignore[return-value]


def _fill(source: _Readable, view: memoryview) -> int:
    """Read until `view` is full or the source ends; return the number of bytes."""
    filled = 0
    while filled < len(view):
        count = source.readinto(view[filled:])
        if not count:
            break
        filled += count
    return filled


def _skip(source: _Readable, stored: Stored) -> None:
    left = stored.skip
    scratch = memoryview(bytearray(min(left, CHUNK_BYTES)))
    while left:
        count = _fill(source, scratch[: min(left, CHUNK_BYTES)])
        if not count:
            raise _truncated(stored.path.name, stored.wanted_bytes, stored.skip - left)
        left -= count


def _fill_plane(source: _Readable, view: memoryview, stored: Stored, z: int) -> None:
    filled = _fill(source, view)
    if filled < len(view):
        raise _truncated(stored.path.name, stored.wanted_bytes, stored.skip + z * len(view) + filled)


def _expect_end(source: _Readable, stored: Stored) -> None:
    if source.readinto(memoryview(bytearray(1))):
        raise _surplus(stored.path.name, stored.wanted_bytes)


def _truncated(name: str, wanted: int, found: int | None) -> Refused:
    got = "the file is too small to hold them" if found is None else f"found {found:,}"
    return Refused("truncated", f"{name}: {wanted:,} bytes wanted by its header, {got}; copy or download it again")


def _surplus(name: str, wanted: int | None = None, found: int | None = None) -> Refused:
    want = "nothing after its voxels wanted" if wanted is None else f"{wanted:,} bytes wanted by its header"
    got = "found more" if found is None else f"found {found:,}"
    return Refused("surplus", f"{name}: {want}, {got}; its header does not describe its data, export the scan again")
