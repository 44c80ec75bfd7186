"""The header of a DICOM file -> one Plane per image plane in it: where it lies and how its values are stored."""

from __future__ import annotations

import errno
import hashlib
import logging
import math
import os
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

from photon_data.errors import Refused
from photon_data.readers.checks import not_a

if TYPE_CHECKING:
    from pydicom.dataset import Dataset, FileDataset
    from pydicom.uid import UID

IMPLICIT_LITTLE, EXPLICIT_LITTLE, EXPLICIT_BIG = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
UNDEFINED_LENGTH = 0xFFFFFFFF  # of compressed pixel data: items until a delimiter

# Where an enhanced (multi-frame) object keeps what a single-frame one has at the top: PS3.3 C.7.6.16.
FRAME_GROUPS = (
    "PlanePositionSequence",
    "PlaneOrientationSequence",
    "PixelMeasuresSequence",
    "PixelValueTransformationSequence",
)
PER_FRAME, SHARED = "PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"
# Nothing else of a header is ever read: no name, no date, no free text.
KEYWORDS = (
    f"SOPClassUID SeriesInstanceUID ConcatenationUID AcquisitionNumber ImageType NumberOfFrames {PER_FRAME} {SHARED} "
    "ImagePositionPatient ImageOrientationPatient PixelSpacing Rows Columns SamplesPerPixel PhotometricInterpretation "
    "BitsAllocated BitsStored HighBit PixelRepresentation RescaleSlope RescaleIntercept ModalityLUTSequence"
).split()


class Encoding(NamedTuple):
    """How the stored values of one file are written.

    at       byte of the file where the pixel data begin; None where there are none (or they are deflated with the header)
    length   bytes the header says there are (UNDEFINED_LENGTH: compressed)
    present  bytes from `at` to the end of the file
    """

    transfer_syntax: str
    bits_allocated: int
    bits_stored: int
    high_bit: int
    signed: bool
    at: int | None
    length: int
    present: int

    @property
    def dtype(self) -> np.dtype:
        """The stored type in native byte order, e.g. uint16 for 12 unsigned bits in 16."""
        return np.dtype(f"{'i' if self.signed else 'u'}{self.bits_allocated // 8}")


class Plane(NamedTuple):
    """One image plane of a series.

    series        first 8 hex digits of the sha256 of the SeriesInstanceUID: the UID itself goes no further
    container     what holds its frames together where a file has several (file name or hashed concatenation), else ""
    position_lps  mm [3], centre of the first pixel         orientation  unit vectors [2, 3]: along a row, down a column
    spacing_mm    distance of rows, distance of columns     each None where the header has no usable value
    slope, intercept   HU = slope * stored + intercept; slope NaN where the header has a table instead
    """

    path: Path
    frame: int
    frames: int
    series: str
    container: str
    localizer: bool
    color: bool
    acquisition: str
    rows: int
    columns: int
    position_lps: np.ndarray | None
    orientation: np.ndarray | None
    spacing_mm: np.ndarray | None
    slope: float
    intercept: float
    encoding: Encoding


@contextmanager
def refusing(code: str, path: Path, what: str) -> Iterator[None]:
    """Turn whatever a library raises about a damaged file into Refused(code), naming the file and the kind of error.

    pydicom raises nearly anything on damaged files, and quotes header values in errors, warnings and log lines: none of that
    text gets out. A disk that fails or is full is no fault of the file: those OSErrors pass.
    """
    log = logging.getLogger("pydicom")
    was_disabled, log.disabled = log.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Refused:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # EINVAL: a length that led out of the file
            raise
        raise Refused(code, f"{path.name}: {what} ({type(error).__name__})") from None
    finally:
        log.disabled = was_disabled


def as_uid(text: Any) -> UID:
    """Return pydicom's UID, which knows names and kinds; without its warning, which quotes what is no valid UID."""
    from pydicom.config import IGNORE
    from pydicom.uid import UID

    return UID(str(text), validation_mode=IGNORE)


def read_planes(path: Path) -> list[Plane]:
    """Return the image planes of one file in its order; [] for DICOM objects that are no images (RTSTRUCT, SR, SEG, RTDOSE, ...).

    Reads the header only. An enhanced multi-frame file gives one Plane per frame; an old multi-frame file, which does not say
    where its frames lie, gives one Plane without position. Refused: dicom-unreadable,
    dicom-multiframe, empty, not-a-scan, truncated.
    """
    with refusing("dicom-unreadable", path, "a DICOM header wanted, this one cannot be read; copy the file again"):
        dataset, encoded = _read(path)
        if not _is_image(path, dataset):
            return []
        frames = int(dataset.get("NumberOfFrames") or 1)
        placed = len(dataset.get(PER_FRAME) or [])
        if placed and placed != frames:
            raise Refused(
                "dicom-multiframe", f"{path.name}: {frames} frames wanted, positions of {placed} found; export it again"
            )
        return [_plane(path, dataset, encoded, frame, frames) for frame in range(placed or 1)]


def _read(path: Path) -> tuple[FileDataset, Encoding]:
    """Return the wanted tags and the whereabouts of the pixel data."""
    from pydicom import dcmread
    from pydicom.errors import InvalidDicomError

    if not path.is_file():
        raise Refused("dicom-unreadable", f"{path.name}: a regular file wanted, found none (a broken link?); restore it")
    with path.open("rb") as file:
        try:
            dataset = dcmread(file, stop_before_pixels=True, specific_tags=KEYWORDS)
        except (InvalidDicomError, EOFError):
            dataset = _read_without_preamble(path, file)
        return dataset, _encoding(file, dataset)


def _read_without_preamble(path: Path, file: BinaryIO) -> FileDataset:
    """Return the tags of a bare data set (old exports), if the name says DICOM and the tags an image must have are there."""
    from pydicom import dcmread

    strange = not_a("a DICOM file", path, "export the series again, or leave the file out")
    if path.suffix.lower() not in (".dcm", ".ima"):
        raise strange
    file.seek(0)
    try:
        dataset = dcmread(file, stop_before_pixels=True, specific_tags=KEYWORDS, force=True)
        essential = [dataset.get(keyword) for keyword in ("SOPClassUID", "SeriesInstanceUID", "Rows", "Columns")]
    except Exception:  # anything may happen in bytes that are not DICOM
        raise strange from None
    if not all(essential):
        raise strange
    return dataset


def _encoding(file: BinaryIO, dataset: FileDataset) -> Encoding:
    """Return how pixels are stored. `file` stands where pydicom stopped: on the pixel data element or at the end."""
    at, length = _pixel_element(file, *dataset.original_encoding)
    allocated = int(dataset.get("BitsAllocated") or 0)
    stored = int(dataset.get("BitsStored") or allocated)
    high = dataset.get("HighBit")
    return Encoding(
        transfer_syntax=_transfer_syntax(dataset),
        bits_allocated=allocated,
        bits_stored=stored,
        high_bit=stored - 1 if high is None else int(high),
        signed=bool(dataset.get("PixelRepresentation")),
        at=at,
        length=length,
        present=os.fstat(file.fileno()).st_size - (at or 0),
    )


def _pixel_element(file: BinaryIO, implicit: bool, little: bool) -> tuple[int | None, int]:
    """Return (byte where the pixel data begin, their length as written), or (None, 0) where no PixelData element follows."""
    order, start, head = "<" if little else ">", file.tell(), file.read(12)
    if head[:4] != struct.pack(order + "HH", 0x7FE0, 0x0010) or len(head) < 12:
        return None, 0
    if implicit:
        return start + 8, struct.unpack(order + "L", head[4:8])[0]
    if head[4:6] not in (b"OB", b"OW", b"UN"):
        return None, 0
    return start + 12, struct.unpack(order + "L", head[8:12])[0]


def _transfer_syntax(dataset: FileDataset) -> str:
    """Return the transfer syntax of the file, or the plain one that pydicom found it to be in where the file does not say."""
    implicit, little = dataset.original_encoding
    found = IMPLICIT_LITTLE if implicit else EXPLICIT_LITTLE if little else EXPLICIT_BIG
    return str(dataset.file_meta.get("TransferSyntaxUID") or found)


def _is_image(path: Path, dataset: FileDataset) -> bool:
    """Tell images from the objects beside them; Refused where a file ends before it says what it is."""
    sop_class = as_uid(dataset.get("SOPClassUID") or dataset.file_meta.get("MediaStorageSOPClassUID") or "")
    sized = bool(dataset.get("Rows") and dataset.get("Columns"))
    if sop_class.name == sop_class:  # not in the standard: a vendor's own kind of object, or cut off
        if not dataset.get("SeriesInstanceUID"):
            raise Refused("dicom-unreadable", f"{path.name}: a kind of object and its series wanted, the header ends before")
        return sized
    if "Image Storage" in sop_class.name and not sized:
        raise Refused("truncated", f"{path.name}: rows and columns of an image wanted, the header ends before; copy it again")
    return "Image Storage" in sop_class.name


def _plane(path: Path, dataset: FileDataset, encoding: Encoding, frame: int, frames: int) -> Plane:
    places = _places(dataset, frame)
    orientation = _numbers(places, "ImageOrientationPatient", 6)
    samples, photometric = dataset.get("SamplesPerPixel") or 1, dataset.get("PhotometricInterpretation") or "MONOCHROME2"
    slope, intercept = _rescale(places)
    return Plane(
        path=path,
        frame=frame,
        frames=frames,
        series=_digest(dataset.get("SeriesInstanceUID")),
        container="" if frames == 1 else _container(path, dataset),
        localizer="LOCALIZER" in (dataset.get("ImageType") or []),
        color=int(samples) != 1 or not str(photometric).startswith("MONOCHROME"),
        acquisition=str(dataset.get("AcquisitionNumber") or ""),
        rows=int(dataset.Rows),
        columns=int(dataset.Columns),
        position_lps=_numbers(places, "ImagePositionPatient", 3),
        orientation=None if orientation is None else _perpendicular_pair(orientation),
        spacing_mm=_positive(_numbers(places, "PixelSpacing", 2)),
        slope=slope,
        intercept=intercept,
        encoding=encoding,
    )


def _places(dataset: Dataset, frame: int) -> list[Dataset]:
    """Return the data sets to look for a tag in: the frame's own functional groups, the shared ones, the top level."""
    groups = [*(dataset.get(PER_FRAME) or [])[frame : frame + 1], *(dataset.get(SHARED) or [])[:1]]
    return [item for group in groups for name in FRAME_GROUPS for item in (group.get(name) or [])[:1]] + [dataset]


def _value(places: list[Dataset], keyword: str) -> Any:
    return next((place[keyword].value for place in places if place.get(keyword) not in (None, "")), None)


def _numbers(places: list[Dataset], keyword: str, count: int) -> np.ndarray | None:
    """Return `count` finite numbers [count], or None where the header has anything else."""
    value = _value(places, keyword)
    if value is None or isinstance(value, (str, float)) or len(value) != count:
        return None
    numbers = np.array([float(v) for v in value])
    return numbers if np.isfinite(numbers).all() else None


def _positive(numbers: np.ndarray | None) -> np.ndarray | None:
    return numbers if numbers is not None and (numbers > 0).all() else None


def _perpendicular_pair(cosines: np.ndarray) -> np.ndarray | None:
    """Return the directions [2, 3] along a row and down a column, or None where the header's are not nearly perpendicular units.

    Headers round them to few digits: the column direction is brought to unit length, the row direction is turned in their plane
    to be perpendicular to it, as ITK does.
    """
    along_row, down_column = cosines.reshape(2, 3)
    if abs(along_row @ down_column) > 0.01 or np.abs(np.linalg.norm([along_row, down_column], axis=1) - 1).max() > 0.01:
        return None
    normal = np.cross(along_row, down_column)
    turned = np.cross(down_column, normal)
    return np.array([turned / np.linalg.norm(turned), down_column / np.linalg.norm(down_column)])


def _rescale(places: list[Dataset]) -> tuple[float, float]:
    slope, intercept = _value(places, "RescaleSlope"), _value(places, "RescaleIntercept")
    if slope is None and _value(places, "ModalityLUTSequence"):
        return math.nan, 0.0
    return (1.0 if slope is None else float(slope)), float(intercept or 0.0)


def _container(path: Path, dataset: Dataset) -> str:
    concatenation = dataset.get("ConcatenationUID")
    return _digest(concatenation) if concatenation else path.name


def _digest(uid: Any) -> str:
    return hashlib.sha256(str(uid or "").encode()).hexdigest()[:8]
