"""Planes of a DICOM series -> their stored values, streamed; refuses what is cut short or cannot be decoded."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from photon_data.errors import Refused
from photon_data.readers.dicom_header import (
    EXPLICIT_BIG,
    EXPLICIT_LITTLE,
    IMPLICIT_LITTLE,
    UNDEFINED_LENGTH,
    Encoding,
    Plane,
    as_uid,
    refusing,
)

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

PLAIN = (IMPLICIT_LITTLE, EXPLICIT_LITTLE, EXPLICIT_BIG)
JPEG = "1.2.840.10008.1.2.4."
DEFLATED = "1.2.840.10008.1.2.1.99"
# What SimpleITK's GDCM decodes here: JPEG baseline, extended and lossless, JPEG-LS, JPEG 2000. pydicom itself decodes RLE,
# several times as fast, and with its plugins some rarer syntaxes.
GDCM = tuple(JPEG + n for n in ("50", "51", "57", "70", "80", "81", "90", "91"))
MAX_PADDING = 4096  # bytes behind the pixels that pass as padding; more means that rows or columns are not what the header says
ITEM = 0xE000FFFE  # tag of each piece of compressed pixel data, read as a little-endian word


def require_decodable(planes: Sequence[Plane]) -> None:
    """Refuse what the headers already show to be undecodable ("dicom-undecodable") or cut short ("truncated")."""
    for plane in planes:
        _require_sound_bits(plane)
        if plane.encoding.transfer_syntax in PLAIN:
            _require_plain_bytes(plane)
        elif _is_compressed(plane.encoding) and plane.encoding.at is None:
            raise _cut_short(plane, plane.rows * plane.columns, 0)
    for syntax, path in {plane.encoding.transfer_syntax: plane.path for plane in planes}.items():
        if syntax not in PLAIN + GDCM and not _plugin_decodes(syntax):
            raise Refused("dicom-undecodable", f"{path.name}: {_remedy(syntax)}")


def stored_planes(planes: Sequence[Plane]) -> Iterator[np.ndarray]:
    """Yield the stored values [row, column] of each plane, without any rescaling, as its `encoding.dtype`."""
    frames: list[bytes] = []
    frames_of: Path | None = None
    with TemporaryDirectory(prefix="photon-dicom-") as scratch:
        for plane in planes:
            if _is_compressed(plane.encoding) and plane.path != frames_of:
                frames, frames_of = _compressed_frames(plane), plane.path
            yield _stored(plane, frames, Path(scratch) / "plane.dcm")


def _stored(plane: Plane, frames: list[bytes], scratch: Path) -> np.ndarray:
    """Return the stored values of one plane; `frames` are the compressed ones of its file, if it has such."""
    from pydicom import dcmread

    syntax = plane.encoding.transfer_syntax
    if _is_raw(plane.encoding):
        return _significant_bits(_raw(plane), plane.encoding)
    with refusing("dicom-undecodable", plane.path, _remedy(syntax)):
        if syntax in GDCM:
            _require_end(frames[plane.frame])
            return _checked(_decode_with_gdcm(_bare(plane, frames[plane.frame]), scratch), plane)
        if _is_compressed(plane.encoding):
            values = _decode_with_pydicom(_bare(plane, frames[plane.frame]), 0)
        else:
            values = _decode_with_pydicom(dcmread(plane.path), plane.frame)
        return _checked(_significant_bits(values, plane.encoding), plane)


def _is_raw(encoding: Encoding) -> bool:
    """Tell whether the values lie in the file as numpy would write them. Big-endian 8-bit ones are swapped in pairs."""
    return encoding.transfer_syntax in PLAIN and not (encoding.transfer_syntax == EXPLICIT_BIG and encoding.bits_allocated == 8)


def _is_compressed(encoding: Encoding) -> bool:
    """Tell whether each frame is a piece of its own, compressed, rather than all of them in a row."""
    return encoding.transfer_syntax not in (*PLAIN, DEFLATED)


def _raw(plane: Plane) -> np.ndarray:
    encoding, count = plane.encoding, plane.rows * plane.columns
    assert encoding.at is not None
    stored = encoding.dtype.newbyteorder(">" if encoding.transfer_syntax == EXPLICIT_BIG else "<")
    values = np.fromfile(plane.path, stored, count, offset=encoding.at + plane.frame * count * stored.itemsize)
    if values.size < count:
        raise _cut_short(plane, count * stored.itemsize, values.nbytes)
    return values.astype(encoding.dtype, copy=False).reshape(plane.rows, plane.columns)


def _significant_bits(values: np.ndarray, encoding: Encoding) -> np.ndarray:
    """Return the value in bits_stored bits below and including high_bit; the others may hold an overlay.

    Shifted up to the top and down again: a signed type brings its sign along, an unsigned one zeros.
    """
    if encoding.bits_stored == encoding.bits_allocated:
        return values
    return (values << (encoding.bits_allocated - 1 - encoding.high_bit)) >> (encoding.bits_allocated - encoding.bits_stored)


def _compressed_frames(plane: Plane) -> list[bytes]:
    """Return the compressed frames of the plane's file; Refused("truncated") where it ends before the delimiter."""
    from pydicom.encaps import generate_frames

    with plane.path.open("rb") as file:
        file.seek(plane.encoding.at or 0)
        items = file.read()
    at, tag = 0, ITEM
    while tag == ITEM:
        if at + 8 > len(items):
            raise _cut_short(plane, at + 8, len(items))
        tag, length = struct.unpack_from("<LL", items, at)
        at += 8 + length
    with refusing("dicom-undecodable", plane.path, "compressed frames wanted, the pixel data hold others; copy the file again"):
        return list(generate_frames(items[:at], number_of_frames=plane.frames))


def _require_end(frame: bytes) -> None:
    """ValueError for a JPEG of any kind without its end marker (padding may follow): libjpeg would fill in what is missing."""
    if not frame.rstrip(b"\0\xff").endswith(b"\xff\xd9"):
        raise ValueError("the end of an image wanted")


def _bare(plane: Plane, frame: bytes) -> Dataset:
    """Return a data set that holds one compressed frame and how to decode it, and nothing else of the header."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.encaps import encapsulate
    from pydicom.uid import SecondaryCaptureImageStorage

    bare, meta, encoding = Dataset(), FileMetaDataset(), plane.encoding
    bare.SOPClassUID = meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    bare.SOPInstanceUID = meta.MediaStorageSOPInstanceUID = as_uid("2.25.1")
    meta.TransferSyntaxUID = as_uid(encoding.transfer_syntax)
    bare.SamplesPerPixel, bare.PhotometricInterpretation = 1, "MONOCHROME2"
    bare.Rows, bare.Columns = plane.rows, plane.columns
    bare.BitsAllocated, bare.BitsStored, bare.HighBit = encoding.bits_allocated, encoding.bits_stored, encoding.high_bit
    bare.PixelRepresentation = int(encoding.signed)
    bare.PixelData = encapsulate([frame])
    bare.file_meta = meta
    return bare


def _decode_with_gdcm(bare: Dataset, scratch: Path) -> np.ndarray:
    """Return the stored values [row, column] of a bare data set.

    Bare, because ITK applies the rescaling of some kinds of images and not of others: so what comes back are stored values, and
    no header text reaches the scratch file.
    """
    import SimpleITK as sitk

    bare.save_as(scratch, enforce_file_format=True)
    return sitk.GetArrayFromImage(sitk.ReadImage(str(scratch), imageIO="GDCMImageIO"))[0]


def _decode_with_pydicom(dataset: Dataset, frame: int) -> np.ndarray:
    """Return the stored values [row, column] of one frame, as pydicom or one of its plugins decodes it.

    Its warnings are errors here: damaged RLE that gives too many values would pass with one.
    """
    from pydicom.pixels import get_decoder

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return get_decoder(dataset.file_meta.TransferSyntaxUID).as_array(dataset, index=frame, raw=True)[0]


def _checked(values: np.ndarray, plane: Plane) -> np.ndarray:
    """Return decoded values [row, column] as the type the header promises; ValueError where they do not fit it."""
    fitted = values.astype(plane.encoding.dtype)
    if fitted.shape != (plane.rows, plane.columns) or not np.array_equal(fitted, values):
        raise ValueError("values that fit the header wanted")
    return fitted


def _require_sound_bits(plane: Plane) -> None:
    e = plane.encoding
    if e.bits_allocated not in (8, 16, 32) or not 1 <= e.bits_stored <= e.high_bit + 1 <= e.bits_allocated:
        raise Refused(
            "dicom-undecodable",
            f"{plane.path.name}: integers of 8, 16 or 32 bits wanted, found {e.bits_stored} bits up to bit {e.high_bit} in "
            f"{e.bits_allocated}; export the slices again",
        )


def _require_plain_bytes(plane: Plane) -> None:
    encoding = plane.encoding
    wanted = plane.frames * plane.rows * plane.columns * encoding.bits_allocated // 8
    if encoding.length == UNDEFINED_LENGTH:
        raise Refused(
            "dicom-undecodable", f"{plane.path.name}: uncompressed pixels wanted, compressed ones found; export it again"
        )
    there = min(encoding.length, encoding.present)
    if there < wanted:
        raise _cut_short(plane, wanted, there)
    if encoding.length > wanted + MAX_PADDING:
        raise Refused(
            "dicom-undecodable",
            f"{plane.path.name}: {wanted} bytes of pixels wanted for {plane.rows} rows and {plane.columns} columns, found "
            f"{encoding.length}; the header does not describe these pixels, export it again",
        )


def _cut_short(plane: Plane, wanted: int, there: int) -> Refused:
    return Refused("truncated", f"{plane.path.name}: {wanted} bytes of pixels wanted, found {there}; copy the file again")


def _plugin_decodes(syntax: str) -> bool:
    from pydicom.pixels import get_decoder

    if _name_of(syntax) is None:
        return False
    try:
        return get_decoder(syntax).is_available
    except NotImplementedError:
        return False


def _name_of(syntax: str) -> str | None:
    """Return the standard's name of a transfer syntax, None for any other text: that must not get into a message."""
    uid = as_uid(syntax)
    return uid.name if uid.name != uid else None


def _remedy(syntax: str) -> str:
    """Return what a person can do about pixels that nothing here decodes."""
    found = _name_of(syntax) or "an unknown transfer syntax"
    return (
        f"pixels that can be decoded wanted, found {found} that cannot; convert the series to uncompressed (gdcmconv --raw, "
        "dcmdjpeg), install pylibjpeg and its plugins, or copy the files again"
    )
