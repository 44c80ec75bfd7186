"""A DICOM file, as its header describes it: its image planes, where they lie, how their values are stored.

A plain header is read here, from its first kilobytes; any other by pydicom, from a file of which it can read so many
bytes and no more, whatever its lengths say, packed or not.
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from isal import igzip_lib

# Transfer syntaxes.
IMPLICIT_LITTLE, EXPLICIT_LITTLE, EXPLICIT_BIG = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
PLAIN = (IMPLICIT_LITTLE, EXPLICIT_LITTLE, EXPLICIT_BIG)
DEFLATED = "1.2.840.10008.1.2.1.99"
UNDEFINED_LENGTH = 0xFFFFFFFF  # of a sequence or of compressed pixel data: items until a delimiter
# Largest difference of direction cosines within one stack: 0.6 mm at the edge of a body. Headers round to the third
# digit; ITK reads far larger differences as one stack, along the first slice's axes.
SAME_DIRECTION = 3e-3
SAME_POSITION_MM = 0.01

# Tags that tell the volumes of one series apart: passes, phases, reconstructions. Only hashes of them are kept.
SPLIT_TAGS = (
    *("AcquisitionNumber", "TemporalPositionIdentifier", "AcquisitionTime", "AcquisitionDateTime", "TriggerTime"),
    *("ContentTime", "NominalPercentageOfCardiacPhase", "ImageType", "ConvolutionKernel", "SliceThickness"),
    *("ReconstructionDiameter", "KVP", "EchoTime", "EchoNumbers", "SeriesNumber"),
)


class PixelLayout(NamedTuple):
    """How the stored values of one file are written."""

    transfer_syntax: str
    bits_allocated: int
    bits_stored: int
    high_bit: int
    signed: bool
    at: int | None  # byte of the file where the pixel data begin; None: there are none, or deflated with the header
    length: int  # bytes the header says there are (UNDEFINED_LENGTH: compressed)
    present: int  # bytes from `at` to the end of the file
    padding: tuple[int, int] | None = None  # PixelPaddingValue and its RangeLimit (the same where there is none)

    @property
    def are_frames_compressed(self) -> bool:
        """Whether each frame is a piece of its own, compressed, rather than all of them in a row."""
        return self.transfer_syntax not in (*PLAIN, DEFLATED)

    @property
    def dtype(self) -> np.dtype:
        """The stored type in native byte order, e.g. uint16 for 12 unsigned bits in 16."""
        return np.dtype(f"{'i' if self.signed else 'u'}{self.bits_allocated // 8}")


class PlaneHeader(NamedTuple):
    """What the header says of one image plane of a series. None stands for no usable value."""

    path: Path
    frame: int
    frames: int
    # Hashes, of 16 hex digits: the texts themselves go no further.
    instance: str
    study: str  # of the study and the patient's id together
    patient: str  # of the issuer and the patient's id; "" where there is none
    series: str
    tags: tuple[str, ...]  # of each of SPLIT_TAGS, "" where there is none
    acquired: float | None  # AcquisitionTime as the number HHMMSS: only its order counts
    container: str  # of the frames of one file: its name or hashed concatenation; "" where it has one frame
    localizer: bool
    color: bool
    rows: int
    columns: int
    position_lps: np.ndarray | None  # [3] in mm: the centre of the first pixel
    orientation: np.ndarray | None  # unit vectors [2, 3]: along a row, down a column
    spacing_mm: np.ndarray | None  # distance of rows, distance of columns
    slope: float  # HU = slope * stored + intercept; NaN where the header has a table instead
    intercept: float
    is_rescaled: bool  # the header has both of them, or a table in their place
    pixels: PixelLayout

    @property
    def normal(self) -> np.ndarray:
        """Unit vector [3] of the slice normal, row x column direction; only where there is an orientation."""
        return np.cross(*np.asarray(self.orientation))

    def is_parallel_to(self, other: PlaneHeader, within: float = SAME_DIRECTION) -> bool:
        """Tell whether both have the same orientation, or both none."""
        if self.orientation is None or other.orientation is None:
            return self.orientation is other.orientation
        return bool(np.abs(self.orientation - other.orientation).max() < within)


class Content(NamedTuple):
    """What one DICOM file is."""

    kind: str  # in the standard's words
    planes: list[PlaneHeader]  # in the file's order; none where it is no part of a volume
    head: bytes = b""  # the file's first bytes, if all of this follows from them


def along_normal(planes: Sequence[PlaneHeader]) -> np.ndarray:
    """Return the position of each plane along the slice normal of the first, mm [n]; of axial scans the patient's z."""
    positions = np.array([plane.position_lps for plane in planes])
    return (positions * planes[0].normal).sum(axis=1)  # no BLAS, see `photon_data.volume.inverse`


def differing(planes: Sequence[PlaneHeader]) -> str:
    """Return which of SPLIT_TAGS take some values, each in several planes: "AcquisitionNumber (2 values)", or ""."""
    counts = {name: Counter(plane.tags[n] for plane in planes) for n, name in enumerate(SPLIT_TAGS)}
    some = {name: len(values) for name, values in counts.items() if len(values) > 1 and min(values.values()) > 1}
    return ", ".join(f"{name} ({count} values)" for name, count in some.items())


# --- a file for pydicom

# An enhanced object with the places of thousands of frames takes a few MB.
MAX_HEADER_BYTES = 1 << 25
# A header of one slice takes 2 to 12 kB; one with a picture in it, or with much of a vendor's own, some hundred.
FIRST_BYTES, MORE_BYTES = 1 << 14, 1 << 20
CHUNK = 1 << 16
# What a read counts for at least: a hole in a file is as many empty elements as fit in.
LEAST = 64


class TooLong(ValueError):
    """A header, or what comes of a deflated file, is longer than any of an image."""


class DicomFile:
    """An open file as pydicom wants it; TooLong once more than `most` bytes are read of it.

    pydicom reads what elements say of their lengths, in a file that may be nearly all holes, and inflates a deflated
    data set whole, of which a few MB can hold GBs.
    """

    def __init__(self, file: BinaryIO, most: int = MAX_HEADER_BYTES) -> None:
        self.file, self.name, self.most, self.left = file, file.name, most, most
        self.size = os.fstat(file.fileno()).st_size

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes. All the rest is asked for where it is deflated."""
        if size < 0:
            return self._start_of_deflated()
        count = max(0, min(size, self.size - self.file.tell()))
        self.left -= max(count, LEAST)
        if self.left < 0:
            raise TooLong(f"expected at most {self.most:,} bytes, found more")
        return self.file.read(count)

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to a place in the file."""
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        """Return the place in the file."""
        return self.file.tell()

    def _start_of_deflated(self) -> bytes:
        """Return what fits of a deflated data set, deflated again without effort; leave the file at its end."""
        inflate, pieces, left = zlib.decompressobj(-zlib.MAX_WBITS), [], self.most
        while left > 0 and not inflate.eof and (chunk := self.file.read(CHUNK)):
            pieces.append(inflate.decompress(chunk, left))
            left -= max(len(pieces[-1]), len(chunk))
        self.file.seek(0, os.SEEK_END)
        deflate = zlib.compressobj(0, zlib.DEFLATED, -zlib.MAX_WBITS)
        return deflate.compress(b"".join(pieces)) + deflate.flush()


# --- plain headers

SHORT_VRS = frozenset(b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split())
LONG_VRS = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
PIXEL_TAGS = (0x7FE00008, 0x7FE00009, 0x7FE00010)
ITEM, ITEM_END, SEQUENCE_END = 0xFFFEE000, b"\xfe\xff\x0d\xe0", 0xFFFEE0DD
EXPLICIT_ELEMENT, IMPLICIT_ELEMENT = struct.Struct("<HH2sH").unpack_from, struct.Struct("<HHL").unpack_from
META = {0x00020002: ("MediaStorageSOPClassUID", "UI"), 0x00020010: ("TransferSyntaxUID", "UI")}
NUMBERS = {"US": "<H", "SS": "<h"}
SIGNS = {b"\0\0": "US", b"\1\0": "SS"}  # what a number of implicit VR is, by PixelRepresentation
# Of what else is taken by its value, this is the usual one: one word.
WORDS = ("NumberOfFrames", "PhotometricInterpretation")
WORD = re.compile(rb"[0-9A-Za-z._]+[ \0]*")


class Element(NamedTuple):
    """One element of a header, its value as the file has it."""

    vr: str
    value: bytes


class _Unusual(Exception):
    """A header that pydicom has to read."""


class PlainHeader:
    """Some tags of a header in a usual syntax, by `get` and `get_item` as a data set of pydicom gives them."""

    def __init__(self, elements: Mapping[str, Element], meta: Mapping[str, Element], implicit: bool) -> None:
        self.elements, self.original_encoding = elements, (implicit, True)
        self.file_meta = {keyword: _text_of(element) for keyword, element in meta.items()}

    def get_item(self, keyword: str) -> Element | None:
        """Return an element as the file has it, None where there is none."""
        return self.elements.get(keyword)

    def get(self, keyword: str) -> Any:
        """Return a value: a number for US and SS, a text for others; None where there is none."""
        element = self.elements.get(keyword)
        if element is None or not element.value:
            return None
        kind = NUMBERS.get(element.vr)
        return struct.unpack(kind, element.value)[0] if kind else _text_of(element)


class Opened(NamedTuple):
    """A plain header, and what follows it."""

    header: PlainHeader
    begin: int  # byte of the file (inflated, of a deflated one) where the header ends
    head: bytes  # as many of the next bytes as the tag and the length of an element take; none of a deflated one
    read: bytes  # the bytes of the file that decided all this: its first ones
    size: int  # bytes of the file


def plain_header(file: BinaryIO, wanted: Mapping[int, tuple[str, str]], syntaxes: Mapping[str, str]) -> Opened | None:
    """Return the elements of a file that are `wanted`, {tag: (keyword, VR)}; None where pydicom has to read it.

    `syntaxes` are {UID: "explicit", "implicit" or "deflated"}, all little endian.

    It has to where anything is unusual: another syntax, a sequence that is wanted, tags that do not ascend, a value of
    another type. So what is returned is what pydicom would read.
    """
    size, data = os.fstat(file.fileno()).st_size, b""
    for count in (FIRST_BYTES, MORE_BYTES):
        data += file.read(count)
        with suppress(_Unusual, struct.error, RecursionError):
            return _opened(data, size, wanted, syntaxes)
    return None


def _opened(data: bytes, size: int, wanted: Mapping[int, tuple[str, str]], syntaxes: Mapping[str, str]) -> Opened:
    """Return the header that the first bytes of a file of `size` bytes are; see `plain_header` for _Unusual."""
    if data[128:132] != b"DICM":
        raise _Unusual
    meta, at = _elements(data, 132, META, implicit=False, ends=False, group=2)
    kind = syntaxes.get(_text_of(meta["TransferSyntaxUID"]) if "TransferSyntaxUID" in meta else "")
    implicit, read, ends = kind == "implicit", data, len(data) == size
    if kind is None:
        raise _Unusual
    if kind == "deflated":
        data, at, ends = _inflated(data[at:]), 0, False
    if implicit == (data[at + 4 : at + 6].isalpha() and data[at + 4 : at + 6].isupper()):
        raise _Unusual
    elements, begin = _elements(data, at, wanted, implicit=implicit, ends=ends)
    if kind != "deflated" and len(data) < min(begin + 12, size):  # they end within the tag and the length of the pixels
        raise _Unusual
    head, read = (b"", read) if kind == "deflated" else (data[begin : begin + 12], data[: begin + 12])
    return Opened(PlainHeader(elements, meta, implicit), begin, head, read, size)


def _inflated(data: bytes) -> bytes:
    """Return the first bytes of a deflated data set."""
    try:
        return igzip_lib.IgzipDecompressor(igzip_lib.DECOMP_DEFLATE).decompress(data, FIRST_BYTES)
    except igzip_lib.IsalError:  # type: ignore[misc]  # its stub calls the class an instance
        raise _Unusual from None


def _elements(
    data: bytes, at: int, wanted: Mapping[int, tuple[str, str]], *, implicit: bool, ends: bool, group: int = 0
) -> tuple[dict[str, Element], int]:
    """Return the elements that are wanted, and where they end: at the pixels, with their `group`, or with the file.

    `ends` says whether the data are all of the file.
    """
    found, last, size = dict[str, Element](), 0xFFFF, len(data)  # group 0 is for messages, not for files
    while not (ends and at == size):
        if group and data[at : at + 2] != group.to_bytes(2, "little"):
            return found, at
        start = at
        tag, vr, length, at = _begin(data, at, implicit)
        if tag <= last or tag in PIXEL_TAGS:
            if tag in PIXEL_TAGS:
                return found, start
            raise _Unusual
        last = tag
        if length == UNDEFINED_LENGTH:
            if vr not in (b"SQ", b"") or tag in wanted:
                raise _Unusual
            at = _after_items(data, at, implicit)
            continue
        if tag in wanted:
            keyword, expected = wanted[tag]
            found[keyword] = _element(data[at : at + length], keyword, expected, vr.decode(), found)
        at += length
        if at > size:
            raise _Unusual
    return found, at


def _begin(data: bytes, at: int, implicit: bool) -> tuple[int, bytes, int, int]:
    """Return the tag, the VR (none in implicit VR) and the length of an element, and where its value begins."""
    if implicit:
        group, number, length = IMPLICIT_ELEMENT(data, at)
        return group << 16 | number, b"", length, at + 8
    group, number, vr, length = EXPLICIT_ELEMENT(data, at)
    if vr in SHORT_VRS:
        return group << 16 | number, vr, length, at + 8
    if vr not in LONG_VRS:
        raise _Unusual
    return group << 16 | number, vr, int.from_bytes(data[at + 8 : at + 12], "little"), at + 12


def _after_items(data: bytes, at: int, implicit: bool) -> int:
    """Return where a sequence without a length ends."""
    while True:
        group, number, length = IMPLICIT_ELEMENT(data, at)
        tag, at = group << 16 | number, at + 8
        if tag == SEQUENCE_END:
            return at
        if tag != ITEM:
            raise _Unusual
        if length != UNDEFINED_LENGTH:
            at += length
            continue
        while data[at : at + 4] != ITEM_END:
            _, vr, length, at = _begin(data, at, implicit)
            if length == UNDEFINED_LENGTH and vr not in (b"SQ", b""):
                raise _Unusual
            at = _after_items(data, at, implicit) if length == UNDEFINED_LENGTH else at + length
        at += 8


def _element(value: bytes, keyword: str, expected: str, vr: str, before: Mapping[str, Element]) -> Element:
    """Return an element whose value has the expected type, and one word where it must."""
    if expected == "US or SS":
        sign = before.get("PixelRepresentation")
        expected = vr or SIGNS.get(sign.value if sign else b"", "")
        if expected not in NUMBERS:
            raise _Unusual
    is_word = expected == "UI" or keyword in WORDS
    if (vr or expected) != expected or (is_word and not WORD.fullmatch(value)):
        raise _Unusual
    if expected == "SQ" or (expected in NUMBERS and len(value) not in (0, 2)):
        raise _Unusual
    return Element(expected, value)


def _text_of(element: Element) -> str:
    return element.value.rstrip(b" \0").decode("ascii")
