"""Planes of a DICOM series -> their stored values, streamed; what is cut short or cannot be decoded is refused."""

from __future__ import annotations

import os
import struct
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import groupby, islice
from operator import attrgetter
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from photon_data.errors import COPY_AGAIN, EXPORT_AGAIN, Refused, refusal
from photon_data.readers.dicom_file import (
    EXPLICIT_BIG,
    MAX_HEADER_BYTES,
    PLAIN,
    UNDEFINED_LENGTH,
    DicomFile,
    PlaneHeader,
)
from photon_data.readers.dicom_header import as_uid, refusing

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

# What SimpleITK's GDCM decodes here: JPEG baseline, extended and lossless, JPEG-LS, JPEG 2000.
# pydicom itself decodes RLE, several times as fast, and with its plugins some rarer syntaxes.
GDCM = tuple(f"1.2.840.10008.1.2.4.{n}" for n in (50, 51, 57, 70, 80, 81, 90, 91))
# Bytes behind the pixels that pass as padding; more means that rows or columns are not what the header says.
MAX_PADDING = 4096
# What a body can show, from lung to metal in 12 bits. Padding beyond NO_BODY_HU may be LOSSY values off.
BODY_HU, NO_BODY_HU, LOSSY = (-850, 3071), (-1500, 1500), 16
BATCH = 8  # pictures that are decoded at once
IN_MEMORY = hasattr(os, "memfd_create") and Path("/proc/self/fd").exists()
ITEM = 0xE000FFFE  # tag of each piece of compressed pixel data, read as a little-endian word


def require_decodable(planes: Sequence[PlaneHeader]) -> None:
    """Refuse what the headers already show to be undecodable ("dicom-undecodable") or cut short ("truncated")."""
    for plane in planes:
        bits = plane.pixels
        fits = 1 <= bits.bits_stored <= bits.high_bit + 1 <= bits.bits_allocated
        if bits.bits_allocated not in (8, 16, 32) or not fits:
            found = f"{bits.bits_stored} bits up to bit {bits.high_bit} in {bits.bits_allocated}"
            raise _undecodable(plane, "integers of 8, 16 or 32 bits", found)
        if bits.transfer_syntax in PLAIN:
            _require_plain_bytes(plane)
        elif bits.are_frames_compressed and bits.at is None:
            raise _cut_short(plane, plane.rows * plane.columns, 0)
    for syntax, path in {plane.pixels.transfer_syntax: plane.path for plane in planes}.items():
        if syntax not in PLAIN + GDCM and not _pydicom_decodes(syntax):
            raise Refused("dicom-undecodable", f"{path.name}: {_cannot_decode(syntax)}")


def _bytes_of(plane: PlaneHeader) -> int:
    """Return how many bytes the decoded pixels of the plane's file take."""
    return plane.frames * plane.rows * plane.columns * plane.pixels.bits_allocated // 8


def _require_plain_bytes(plane: PlaneHeader) -> None:
    length, expected = plane.pixels.length, _bytes_of(plane)
    if length == UNDEFINED_LENGTH:
        raise _undecodable(plane, "uncompressed pixels", "compressed ones")
    found = min(length, plane.pixels.present)
    if found < expected:
        raise _cut_short(plane, expected, found)
    if length > expected + MAX_PADDING:
        size = f"{expected} bytes of pixels for {plane.rows} rows and {plane.columns} columns"
        raise _undecodable(plane, size, f"{length}, which the header does not describe")


def _undecodable(plane: PlaneHeader, expected: str, found: str) -> Refused:
    return refusal("dicom-undecodable", plane.path.name, expected, found, EXPORT_AGAIN)


def _cut_short(plane: PlaneHeader, expected: int, found: int) -> Refused:
    return refusal("truncated", plane.path.name, f"{expected} bytes of pixels", found, COPY_AGAIN)


def _pydicom_decodes(syntax: str) -> bool:
    from pydicom.pixels import get_decoder

    with suppress(NotImplementedError):
        return as_uid(syntax).name != syntax and get_decoder(syntax).is_available
    return False


def _cannot_decode(syntax: str) -> str:
    # Only the standard's name of a transfer syntax gets into a message, no other text.
    name = as_uid(syntax).name
    found = "an unknown transfer syntax" if name == syntax else name
    remedy = "convert the series to uncompressed (gdcmconv --raw, dcmdjpeg), install pylibjpeg and its plugins"
    return f"expected pixels that can be decoded, found {found} that cannot; {remedy}, or copy the files again"


def stored_planes(planes: Sequence[PlaneHeader]) -> Iterator[np.ndarray]:
    """Yield the stored values [row, column] of each plane, without any rescaling, as its `pixels.dtype`.

    Where headers declare padding, they are floats, and NaN stands for it in every slice: values that pad one slice pad
    the others too, also those whose own header does not say so.
    """
    paddings = {plane.pixels.padding for plane in planes if plane.pixels.padding}
    for pictures in _batches(_pictures(planes)):
        for (plane, _), values in zip(pictures, _stored(pictures), strict=True):
            yield _without_padding(values, plane, paddings) if paddings else values


class Picture(NamedTuple):
    """A plane, and its compressed frame (none where frames are not compressed)."""

    plane: PlaneHeader
    frame: bytes


def _pictures(planes: Sequence[PlaneHeader]) -> Iterator[Picture]:
    for _, of_file in groupby(planes, key=attrgetter("path")):
        frames: list[bytes] = []
        for plane in of_file:
            if plane.pixels.are_frames_compressed and not frames:
                frames = _compressed_frames(plane)
            yield Picture(plane, frames[plane.frame] if frames else b"")


def _batches(pictures: Iterable[Picture]) -> Iterator[list[Picture]]:
    """Yield the pictures, those together that GDCM can decode at once: opening what it reads takes a third of it."""
    for kind, alike in groupby(pictures, key=_kind):
        while batch := list(islice(alike, BATCH if kind else 1)):
            yield batch


def _kind(picture: Picture) -> object:
    """Return what pictures that are decoded together share; None where each is decoded alone."""
    pixels = picture.plane.pixels
    if pixels.transfer_syntax not in GDCM:
        return None
    return pixels._replace(at=0, length=0, present=0), picture.plane.rows, picture.plane.columns


def _without_padding(values: np.ndarray, plane: PlaneHeader, paddings: Collection[tuple[int, int]]) -> np.ndarray:
    """Return stored values as floats with NaN for padding.

    A padding value that tissue or metal may have as well counts only from the slice's edge inwards along a row or a
    column, so that no hole is made in a body.
    """
    padding = np.zeros(values.shape, bool)
    for ends in paddings:
        # As the pixels are: 63536 is -2000 among signed ones, and bits that are not stored are not there.
        low, high = sorted(map(int, _significant_bits(np.array(ends).astype(values.dtype), plane)))
        low_hu, high_hu = sorted(end * plane.slope + plane.intercept for end in (low, high))
        if not (high_hu > NO_BODY_HU[0] and low_hu < NO_BODY_HU[1]):
            low, high = low - LOSSY, high + LOSSY
        found = (values >= low) & (values <= high)
        is_like_a_body = high_hu >= BODY_HU[0] and low_hu <= BODY_HU[1]
        padding |= _from_the_edge(found) | _from_the_edge(found.T).T if is_like_a_body else found
    return np.where(padding, np.nan, values.astype(np.result_type(values, np.float32)))


def _from_the_edge(found: np.ndarray) -> np.ndarray:
    """Return where `found` [row, column] holds without a gap from the left or the right edge on."""
    inwards = np.logical_and.accumulate
    return inwards(found, axis=1) | inwards(found[:, ::-1], axis=1)[:, ::-1]


def _stored(pictures: Sequence[Picture]) -> Sequence[np.ndarray]:
    """Return the stored values of pictures of one `_kind`."""
    if len(pictures) > 1:
        with suppress(Exception):  # whatever is wrong, and with whichever: it is told of each alone
            return _decode_with_gdcm(pictures)
    return [_alone(picture) for picture in pictures]


def _alone(picture: Picture) -> np.ndarray:
    """Return the stored values of one picture; Refused where they cannot be decoded."""
    from pydicom import dcmread

    plane = picture.plane
    syntax = plane.pixels.transfer_syntax
    # numpy reads plain values. Big-endian 8-bit ones are swapped in pairs.
    if syntax in PLAIN and not (syntax == EXPLICIT_BIG and plane.pixels.bits_allocated == 8):
        return _significant_bits(_read_plain(plane), plane)
    with refusing("dicom-undecodable", plane.path, _cannot_decode(syntax)):
        if syntax in GDCM:
            return _decode_with_gdcm([picture])[0]
        if plane.pixels.are_frames_compressed:
            values = _decode_with_pydicom(_bare([picture]), 0)
        else:
            with plane.path.open("rb") as file:
                dataset = dcmread(DicomFile(file, MAX_HEADER_BYTES + _bytes_of(plane)))
            values = _decode_with_pydicom(dataset, plane.frame)
        return _checked(_significant_bits(values, plane), plane)


def _require_whole(picture: Picture) -> None:
    plane, frame = picture
    # Decoders believe the size in the picture, and take the memory for it.
    if _size_in(frame) not in ((plane.rows, plane.columns), None):
        raise ValueError("expected a picture of the header's size")
    # A JPEG of any kind ends with a marker (padding may follow); without it, libjpeg would fill in the rest.
    if not frame.rstrip(b"\0\xff").endswith(b"\xff\xd9"):
        raise ValueError("expected the end of an image")


def _read_plain(plane: PlaneHeader) -> np.ndarray:
    pixels, count = plane.pixels, plane.rows * plane.columns
    assert pixels.at is not None
    stored = pixels.dtype.newbyteorder(">" if pixels.transfer_syntax == EXPLICIT_BIG else "<")
    values = np.fromfile(plane.path, stored, count, offset=pixels.at + plane.frame * count * stored.itemsize)
    if values.size < count:
        raise _cut_short(plane, count * stored.itemsize, values.nbytes)
    return values.astype(pixels.dtype, copy=False).reshape(plane.rows, plane.columns)


def _significant_bits(values: np.ndarray, plane: PlaneHeader) -> np.ndarray:
    """Return the value in bits_stored bits below and including high_bit; the others may hold an overlay."""
    allocated, stored = plane.pixels.bits_allocated, plane.pixels.bits_stored
    # Shifted up to the top and down again: a signed type brings its sign along, an unsigned one zeros.
    if stored == allocated:
        return values
    return (values << (allocated - 1 - plane.pixels.high_bit)) >> (allocated - stored)


def _compressed_frames(plane: PlaneHeader) -> list[bytes]:
    """Return the compressed frames of the plane's file; Refused("truncated") where it ends before the delimiter."""
    from pydicom.encaps import generate_frames

    with plane.path.open("rb") as file:
        file.seek(plane.pixels.at or 0)
        items = file.read(2 * _bytes_of(plane) + MAX_HEADER_BYTES)  # what follows them may be endless
    at, tag = 0, ITEM
    while tag == ITEM:
        if at + 8 > len(items):
            raise _cut_short(plane, at + 8, len(items))
        tag, length = struct.unpack_from("<LL", items, at)
        at += 8 + length
    sentence = "expected compressed frames, found other pixel data; copy the file again"
    with refusing("dicom-undecodable", plane.path, sentence):
        return list(generate_frames(items[:at], number_of_frames=plane.frames))


def _size_in(frame: bytes) -> tuple[int, int] | None:
    """Return the rows and columns that a JPEG, JPEG-LS or JPEG 2000 picture says it has; None where it says none."""
    if frame.startswith(b"\xff\x4f\xff\x51"):  # JPEG 2000: the ends of the image and its start, from the canvas
        if len(frame) < 24:
            return None
        width, height, left, top = struct.unpack_from(">4L", frame, 8)
        return height - top, width - left
    at = 2
    while at + 9 <= len(frame) and frame[at] == 0xFF:
        marker = frame[at + 1]
        if marker == 0xFF:  # a byte of filling
            at += 1
        elif marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            return struct.unpack_from(">HH", frame, at + 5)
        else:
            at += 2 + struct.unpack_from(">H", frame, at + 2)[0]
    return None


def _bare(pictures: Sequence[Picture]) -> Dataset:
    """Return a data set of compressed frames of one kind and how to decode them, and nothing else of a header."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.encaps import encapsulate
    from pydicom.uid import SecondaryCaptureImageStorage

    plane = pictures[0].plane
    bare, meta, pixels = Dataset(), FileMetaDataset(), plane.pixels
    bare.SOPClassUID = meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    bare.SOPInstanceUID = meta.MediaStorageSOPInstanceUID = as_uid("2.25.1")
    meta.TransferSyntaxUID = as_uid(pixels.transfer_syntax)
    bare.SamplesPerPixel, bare.PhotometricInterpretation = 1, "MONOCHROME2"
    bare.Rows, bare.Columns = plane.rows, plane.columns
    bare.BitsAllocated, bare.BitsStored, bare.HighBit = pixels.bits_allocated, pixels.bits_stored, pixels.high_bit
    bare.PixelRepresentation = int(pixels.signed)
    if len(pictures) > 1:
        bare.NumberOfFrames = len(pictures)
    bare.PixelData = encapsulate([picture.frame for picture in pictures])
    bare.file_meta = meta
    return bare


def _decode_with_gdcm(pictures: Sequence[Picture]) -> list[np.ndarray]:
    # Bare, because ITK applies the rescaling of some kinds of images and not of others. And so no header text reaches
    # the scratch file, which is one in memory where the system has such.
    import SimpleITK as sitk

    for picture in pictures:
        _require_whole(picture)
    with os.fdopen(os.memfd_create("dicom"), "w+b") if IN_MEMORY else NamedTemporaryFile(suffix=".dcm") as file:
        _bare(pictures).save_as(file, enforce_file_format=True)
        file.flush()
        place = f"/proc/self/fd/{file.fileno()}" if IN_MEMORY else file.name
        values = sitk.GetArrayFromImage(sitk.ReadImage(place, imageIO="GDCMImageIO"))
    return [_checked(frame, picture.plane) for frame, picture in zip(values, pictures, strict=True)]


def _decode_with_pydicom(dataset: Dataset, frame: int) -> np.ndarray:
    # Its warnings are errors here: damaged RLE that gives too many values would pass with one.
    from pydicom.pixels import get_decoder

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return get_decoder(dataset.file_meta.TransferSyntaxUID).as_array(dataset, index=frame, raw=True)[0]


def _checked(values: np.ndarray, plane: PlaneHeader) -> np.ndarray:
    """Return decoded values [row, column] as the type the header promises; ValueError where they do not fit it."""
    fitted = values.astype(plane.pixels.dtype)
    if fitted.shape != (plane.rows, plane.columns) or not np.array_equal(fitted, values):
        raise ValueError("expected values that fit the header")
    return fitted
