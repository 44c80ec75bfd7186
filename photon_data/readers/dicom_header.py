"""The header of a DICOM file -> one PlaneHeader per image plane in it: where it lies and how its values are stored."""

from __future__ import annotations

import errno
import hashlib
import logging
import math
import os
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

from photon_data.errors import COPY_AGAIN, EXPORT_AGAIN, Refused, not_a, refusal

if TYPE_CHECKING:
    from pydicom.dataset import Dataset, FileDataset
    from pydicom.uid import UID

# Transfer syntaxes.
IMPLICIT_LITTLE, EXPLICIT_LITTLE, EXPLICIT_BIG = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
PLAIN = (IMPLICIT_LITTLE, EXPLICIT_LITTLE, EXPLICIT_BIG)
DEFLATED = "1.2.840.10008.1.2.1.99"
UNDEFINED_LENGTH = 0xFFFFFFFF  # of compressed pixel data: items until a delimiter
SAME_DIRECTION = 1e-3  # largest difference of direction cosines within one stack: 0.2 mm at the edge of a body
SAME_POSITION_MM = 0.01
CUT_HEADER = "the end of the header before"

# Where an enhanced (multi-frame) object keeps what a single-frame one has at the top: PS3.3 C.7.6.16.
FRAME_GROUPS = ("PlanePosition", "PlaneOrientation", "PixelMeasures", "PixelValueTransformation")  # + "Sequence"
PER_FRAME, SHARED = "PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"
# Nothing else of a header is ever read: no name, no date, no free text.
KEYWORDS = (
    f"SOPClassUID SeriesInstanceUID ConcatenationUID AcquisitionNumber ImageType NumberOfFrames {PER_FRAME} {SHARED} "
    "ImagePositionPatient ImageOrientationPatient PixelSpacing Rows Columns SamplesPerPixel PhotometricInterpretation "
    "BitsAllocated BitsStored HighBit PixelRepresentation RescaleSlope RescaleIntercept ModalityLUTSequence "
    "PixelPaddingValue PixelPaddingRangeLimit"
).split()


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
    series: str  # first 8 hex digits of the sha256 of the SeriesInstanceUID: the UID itself goes no further
    container: str  # of the frames of one file: its name or hashed concatenation; "" where it has one frame
    localizer: bool
    color: bool
    acquisition: str
    rows: int
    columns: int
    position_lps: np.ndarray | None  # [3] in mm: the centre of the first pixel
    orientation: np.ndarray | None  # unit vectors [2, 3]: along a row, down a column
    spacing_mm: np.ndarray | None  # distance of rows, distance of columns
    slope: float  # HU = slope * stored + intercept; NaN where the header has a table instead
    intercept: float
    pixels: PixelLayout

    @property
    def normal(self) -> np.ndarray:
        """Unit vector [3] of the slice normal, row x column direction; only where there is an orientation."""
        return np.cross(*np.asarray(self.orientation))

    def is_parallel_to(self, other: PlaneHeader) -> bool:
        """Tell whether both have the same orientation, or both none."""
        if self.orientation is None or other.orientation is None:
            return self.orientation is other.orientation
        return bool(np.abs(self.orientation - other.orientation).max() < SAME_DIRECTION)


def along_normal(planes: Sequence[PlaneHeader]) -> np.ndarray:
    """Return the position of each plane along the slice normal of the first, mm [n]; of axial scans the patient's z."""
    return np.array([plane.position_lps for plane in planes]) @ planes[0].normal


def require_pydicom() -> None:
    """Refused("dicom-extra-missing") without pydicom."""
    if find_spec("pydicom") is None:
        expected, remedy = "pydicom, which reads DICOM", "pip install 'photon-ct[dicom]'"
        raise refusal("dicom-extra-missing", "", expected, "it not installed", remedy)


def read_planes(path: Path) -> list[PlaneHeader]:
    """Return the image planes of one file in its order; [] for DICOM objects without images (RTSTRUCT, SR, SEG, ...).

    Only the header is read. An enhanced multi-frame file gives one plane per frame. An old multi-frame file does not
    say where its frames lie: it gives one plane without a position. Raises Refused for a damaged file.
    """
    sentence = "expected a DICOM header, found one that cannot be read; copy the file again"
    with refusing("dicom-unreadable", path, sentence):
        dataset, pixels = _read(path)
        if not _is_image(path, dataset):
            return []
        frames = int(dataset.get("NumberOfFrames") or 1)
        placed = len(dataset.get(PER_FRAME) or [])
        if placed and placed != frames:
            raise refusal("dicom-multiframe", path.name, f"positions of {frames} frames", placed, EXPORT_AGAIN)
        return [_plane(path, dataset, pixels, frame, frames) for frame in range(placed or 1)]


@contextmanager
def refusing(code: str, path: Path, sentence: str) -> Iterator[None]:
    """Turn whatever a library raises about a damaged file into Refused(code), naming the file and the kind of error.

    pydicom raises nearly anything on damaged files, and quotes header values in errors, warnings and log lines: none of
    that text gets out. A disk that fails or is full is no fault of the file: those OSErrors pass.
    """
    log = logging.getLogger("pydicom")
    was_disabled, log.disabled = log.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        # EINVAL: a length that led out of the file.
        is_disk = isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)
        if is_disk or isinstance(error, Refused):
            raise
        raise Refused(code, f"{path.name}: {sentence} ({type(error).__name__})") from None
    finally:
        log.disabled = was_disabled


def as_uid(text: Any) -> UID:
    """Return pydicom's UID, which knows names and kinds; without its warning, which quotes what is no valid UID."""
    from pydicom.config import IGNORE
    from pydicom.uid import UID

    return UID(str(text), validation_mode=IGNORE)


def _read(path: Path) -> tuple[FileDataset, PixelLayout]:
    """Return the tags in KEYWORDS and where the pixel data are."""
    from pydicom import dcmread
    from pydicom.errors import InvalidDicomError

    if not path.is_file():
        raise refusal("dicom-unreadable", path.name, "a regular file", "none (a broken link?)", "restore it")
    with path.open("rb") as file:
        try:
            dataset = dcmread(file, stop_before_pixels=True, specific_tags=KEYWORDS)
        except (InvalidDicomError, EOFError):
            dataset = _read_without_preamble(path, file)
        return dataset, _pixel_layout(file, dataset)


def _read_without_preamble(path: Path, file: BinaryIO) -> FileDataset:
    """Return the tags of a bare data set (old exports) if its name says DICOM and it has the tags of an image."""
    from pydicom import dcmread

    if path.suffix.lower() in (".dcm", ".ima"):
        with suppress(Exception):  # anything may happen in bytes that are not DICOM
            file.seek(0)
            dataset = dcmread(file, stop_before_pixels=True, specific_tags=KEYWORDS, force=True)
            if all(dataset.get(keyword) for keyword in ("SOPClassUID", "SeriesInstanceUID", "Rows", "Columns")):
                return dataset
    raise not_a("a DICOM file", path, "export the series again, or leave the file out")


def _pixel_layout(file: BinaryIO, dataset: FileDataset) -> PixelLayout:
    """Return how pixels are stored. `file` stands where pydicom stopped: on the pixel data element or at the end.

    A file that does not say its transfer syntax has the plain one that pydicom found it to be in.
    """
    implicit, little = map(bool, dataset.original_encoding)
    syntax = IMPLICIT_LITTLE if implicit else EXPLICIT_LITTLE if little else EXPLICIT_BIG
    allocated, high = int(dataset.get("BitsAllocated") or 0), dataset.get("HighBit")
    stored = int(dataset.get("BitsStored") or allocated)

    at, length, order, start, head = None, 0, "<" if little else ">", file.tell(), file.read(12)
    has_pixels = len(head) == 12 and head[:4] == struct.pack(order + "HH", 0x7FE0, 0x0010)
    if has_pixels and (implicit or head[4:6] in (b"OB", b"OW", b"UN")):
        size = 8 if implicit else 12
        at, length = start + size, struct.unpack(order + "L", head[size - 4 : size])[0]
    return PixelLayout(
        transfer_syntax=str(dataset.file_meta.get("TransferSyntaxUID") or syntax),
        bits_allocated=allocated,
        bits_stored=stored,
        high_bit=stored - 1 if high is None else int(high),
        signed=bool(dataset.get("PixelRepresentation")),
        at=at,
        length=length,
        present=os.fstat(file.fileno()).st_size - (at or 0),
        padding=_padding(dataset, order),
    )


def _is_image(path: Path, dataset: FileDataset) -> bool:
    """Tell images from the objects beside them; Refused where a file ends before it says what it is."""
    sop_class = as_uid(dataset.get("SOPClassUID") or dataset.file_meta.get("MediaStorageSOPClassUID") or "")
    has_size = bool(dataset.get("Rows") and dataset.get("Columns"))
    if sop_class.name == sop_class:  # not in the standard: a vendor's own kind of object, or cut off
        if not dataset.get("SeriesInstanceUID"):
            raise refusal("dicom-unreadable", path.name, "a kind of object and its series", CUT_HEADER, COPY_AGAIN)
        return has_size
    if "Image Storage" not in sop_class.name:
        return False
    if not has_size:
        raise refusal("truncated", path.name, "rows and columns of an image", CUT_HEADER, COPY_AGAIN)
    return True


def _plane(path: Path, dataset: FileDataset, pixels: PixelLayout, frame: int, frames: int) -> PlaneHeader:
    # A tag is looked for in the frame's own functional groups, in the shared ones, and at the top level.
    groups = [*(dataset.get(PER_FRAME) or [])[frame : frame + 1], *(dataset.get(SHARED) or [])[:1]]
    items = [item for group in groups for name in FRAME_GROUPS for item in (group.get(f"{name}Sequence") or [])[:1]]
    places = [*items, dataset]
    photometric = str(dataset.get("PhotometricInterpretation") or "MONOCHROME2")
    spacing, concatenation = _numbers(places, "PixelSpacing", 2), dataset.get("ConcatenationUID")
    slope, intercept = _value(places, "RescaleSlope"), _value(places, "RescaleIntercept")
    if slope is None:
        slope, intercept = (math.nan, 0.0) if _value(places, "ModalityLUTSequence") else (1.0, intercept)
    return PlaneHeader(
        path=path,
        frame=frame,
        frames=frames,
        series=_digest(dataset.get("SeriesInstanceUID")),
        container="" if frames == 1 else _digest(concatenation) if concatenation else path.name,
        localizer="LOCALIZER" in (dataset.get("ImageType") or []),
        color=int(dataset.get("SamplesPerPixel") or 1) != 1 or not photometric.startswith("MONOCHROME"),
        acquisition=str(dataset.get("AcquisitionNumber") or ""),
        rows=int(dataset.Rows),
        columns=int(dataset.Columns),
        position_lps=_numbers(places, "ImagePositionPatient", 3),
        orientation=_perpendicular_pair(_numbers(places, "ImageOrientationPatient", 6)),
        spacing_mm=spacing if spacing is not None and (spacing > 0).all() else None,
        slope=float(slope),
        intercept=float(intercept or 0.0),
        pixels=pixels,
    )


def _value(places: list[Dataset], keyword: str) -> Any:
    return next((place[keyword].value for place in places if place.get(keyword) not in (None, "")), None)


def _numbers(places: list[Dataset], keyword: str, count: int) -> np.ndarray | None:
    """Return `count` finite numbers [count], or None where the header has anything else."""
    value = _value(places, keyword)
    if value is None or isinstance(value, (str, float)) or len(value) != count:
        return None
    numbers = np.array([float(v) for v in value])
    return numbers if np.isfinite(numbers).all() else None


def _perpendicular_pair(cosines: np.ndarray | None) -> np.ndarray | None:
    """Return the directions [2, 3] along a row and down a column; None where they are not nearly perpendicular units.

    Headers round them to few digits: the column direction is brought to unit length, the row direction is turned in
    their plane to be perpendicular to it, as ITK does.
    """
    if cosines is None:
        return None
    along_row, down_column = cosines.reshape(2, 3)
    lengths = np.linalg.norm([along_row, down_column], axis=1)
    if abs(along_row @ down_column) > 0.01 or np.abs(lengths - 1).max() > 0.01:
        return None
    turned = np.cross(down_column, np.cross(along_row, down_column))
    return np.array([turned / np.linalg.norm(turned), down_column / np.linalg.norm(down_column)])


def _padding(dataset: FileDataset, order: str) -> tuple[int, int] | None:
    """Return the stored values that begin and end the range of padding, whatever type they are written as; or None."""
    found = []
    for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit"):
        value = dataset.get(keyword)
        if isinstance(value, bytes):  # its type depends on PixelRepresentation, which may be missing
            value = struct.unpack_from(f"{order}H", value)[0] if len(value) >= 2 else None
        found.append(value if isinstance(value, int) else None)
    value, limit = found
    return None if value is None else (value, value if limit is None else limit)


def _digest(uid: Any) -> str:
    return hashlib.sha256(str(uid or "").encode()).hexdigest()[:8]
