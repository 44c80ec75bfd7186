"""The header of a DICOM file -> one PlaneHeader per image plane in it: where it lies and how its values are stored."""

from __future__ import annotations

import errno
import hashlib
import logging
import math
import os
import re
import struct
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from photon_data.errors import (
    COPY_AGAIN,
    EXPORT_AGAIN,
    HEAD_BYTES,
    Refused,
    is_dicom,
    is_out_of_memory,
    not_a,
    refusal,
)
from photon_data.readers.dicom_file import (
    DEFLATED,
    EXPLICIT_BIG,
    EXPLICIT_LITTLE,
    IMPLICIT_LITTLE,
    SPLIT_TAGS,
    Content,
    DicomFile,
    PixelLayout,
    PlainHeader,
    PlaneHeader,
    plain_header,
)

if TYPE_CHECKING:
    from pydicom.dataset import Dataset, FileDataset
    from pydicom.uid import UID

    Header = Dataset | PlainHeader

# Warnings and loggers are the process's own: threads that silence them take turns.
ONE_AT_A_TIME = threading.RLock()
SUFFIXES = (".dcm", ".ima", ".dicom")
CUT_HEADER = "the end of the header before"

# Where an enhanced (multi-frame) object keeps what a single-frame one has at the top: PS3.3 C.7.6.16.
FRAME_GROUPS = ("PlanePosition", "PlaneOrientation", "PixelMeasures", "PixelValueTransformation")  # + "Sequence"
PER_FRAME, SHARED = "PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"
# Nothing else of a header is ever kept: no name, no free text, and of the patient's id only hashes.
_OF_IMAGES = (
    "SOPClassUID SOPInstanceUID StudyInstanceUID PatientID IssuerOfPatientID SeriesInstanceUID ConcatenationUID "
    f"{PER_FRAME} {SHARED} NumberOfFrames ImagePositionPatient ImageOrientationPatient PixelSpacing "
    "Rows Columns SamplesPerPixel "
    "PhotometricInterpretation BitsAllocated BitsStored HighBit PixelRepresentation RescaleSlope RescaleIntercept "
    "ModalityLUTSequence PixelPaddingValue PixelPaddingRangeLimit"
)
KEYWORDS = (*_OF_IMAGES.split(), *SPLIT_TAGS)
# What names a person: for `names_in` alone.
PERSON = ("PatientName", "PatientID", "OtherPatientIDs", "OtherPatientNames", "PatientBirthName")
# Names (in the standard) of images that are slices of a volume, also where their header lost its place.
VOLUMES = ("CT Image", "MR Image", "MR Color", "PET Image", "Positron", "Nuclear Medicine", "3D", "Tomosynthesis")
# Syntaxes whose headers are read here: PS3.5 A.1, A.2 and A.4 (compressed frames), A.5.
SYNTAXES = {IMPLICIT_LITTLE: "implicit", EXPLICIT_LITTLE: "explicit", DEFLATED: "deflated"}
SYNTAXES |= {f"1.2.840.10008.1.2.4.{n}": "explicit" for n in (50, 51, 57, 70, 80, 81, 90, 91)}
SYNTAXES |= {"1.2.840.10008.1.2.5": "explicit"}
# Values of ImageType that say what is no slice.
SCOUTS = ("LOCALIZER", "SCOUT", "SCOUTVIEW", "TOPOGRAM", "SURVIEW")
SCREENS = ("SCREEN SAVE", "SCREENSHOT", "DOSE", "DOSE_INFO", "DOSE REPORT", "PROTOCOL")
CAPTURE = "secondary capture"


def require_pydicom() -> None:
    """Refused("dicom-extra-missing") without pydicom."""
    if find_spec("pydicom") is None:
        expected, remedy = "pydicom, which reads DICOM", "pip install 'photon-ct[dicom]'"
        raise refusal("dicom-extra-missing", "", expected, "it not installed", remedy)


def may_be_dicom(path: Path) -> bool:
    """Tell whether the name of a file says so, or its first bytes."""
    name = path.name.lower()
    if name.endswith(SUFFIXES):
        return True
    if name == "dicomdir":
        return False
    try:
        with path.open("rb") as file:
            return is_dicom(file.read(HEAD_BYTES))
    except OSError:
        return path.suffix == "" or path.suffix[1:].isdigit()


def read_planes(path: Path) -> Content:
    """Return what a file is and its image planes; none for what is left aside: reports, masks, screenshots, X-rays.

    Only the header is read. An enhanced multi-frame file gives one plane per frame. An old multi-frame file does not
    say where its frames lie: it gives one plane. Refused.
    """
    if not path.is_file():
        raise refusal("dicom-unreadable", path.name, "a regular file", "none (a broken link?)", "restore it")
    with path.open("rb", buffering=0) as file, suppress(ValueError, ArithmeticError):  # pydicom says it its way
        if opened := plain_header(file, _tags(KEYWORDS), SYNTAXES):
            pixels = _pixel_layout(opened.header, opened.begin, opened.head, opened.size)
            return _content(path, opened.header, pixels)._replace(head=opened.read)
    with path.open("rb") as file:
        sentence = "expected a DICOM header, found one that cannot be read; copy the file again"
        with refusing("dicom-unreadable", path, sentence):
            return _content(path, *_read(path, file))


@cache
def _tags(keywords: tuple[str, ...]) -> dict[int, tuple[str, str]]:
    """Return {tag: (keyword, VR)}."""
    from pydicom.datadict import dictionary_VR, tag_for_keyword

    tags = {keyword: tag_for_keyword(keyword) or 0 for keyword in keywords}
    return {tag: (keyword, dictionary_VR(tag)) for keyword, tag in tags.items()}


def names_in(path: Path) -> set[str]:
    """Return the parts of the patient's names and ids in a header, without their case; none where it cannot be read.

    They are for nothing but a comparison: what somebody calls a file must not tell them.
    """
    from pydicom import dcmread

    header: Header | None = None
    with suppress(Exception), path.open("rb") as file:  # whatever pydicom raises of what is damaged
        opened = plain_header(file, _tags(PERSON), SYNTAXES)
        file.seek(0)
        header = (
            opened.header
            if opened
            else dcmread(DicomFile(file), stop_before_pixels=True, specific_tags=list(PERSON), force=True)
        )
    texts = [] if header is None else [_text(header, keyword) for keyword in PERSON]
    with suppress(UnicodeError):
        texts += [text.encode("latin-1").decode("utf-8") for text in texts]
    return {part for text in texts for part in re.split(r"[\W_]+", text.casefold()) if part}


def _content(path: Path, dataset: Header, pixels: PixelLayout) -> Content:
    kind = _kind(path, dataset)
    if not (dataset.get("Rows") and dataset.get("Columns")) or (kind and "Image" not in kind):
        return Content(kind, [])
    frames = int(dataset.get("NumberOfFrames") or 1)
    placed = len(dataset.get(PER_FRAME) or [])
    if placed and placed != frames:
        raise refusal("dicom-multiframe", path.name, f"positions of {frames} frames", placed, EXPORT_AGAIN)
    first = _plane(path, dataset, pixels, 0, frames)
    if aside := _left_aside(kind, first, dataset):
        return Content(aside, [])
    return Content(kind, [first, *(_plane(path, dataset, pixels, frame, frames) for frame in range(1, placed))])


def _left_aside(kind: str, plane: PlaneHeader, dataset: Header) -> str:
    """Return what an image is that is no slice of a volume, or "".

    It lies nowhere, and is of a kind that need not, in colour, or a screenshot by its ImageType; or it is a screenshot
    in colour. Grey frames of a capture may be a volume that lost its place: they stay, to be refused as that.
    """
    types = [text.upper() for text in _text(dataset, "ImageType").split("\\")]
    is_capture = "Secondary Capture" in kind
    is_screen = is_capture or "SECONDARY" in types[1:2] or any(text in SCREENS for text in types)
    is_placed = plane.position_lps is not None and plane.orientation is not None
    if (is_screen and plane.color) or ((is_screen or plane.color) and not is_placed and plane.frames == 1):
        return CAPTURE
    is_slice = is_capture or any(name in kind for name in VOLUMES) or not kind
    return kind if not (is_placed or is_slice) else ""


@contextmanager
def refusing(code: str, path: Path, sentence: str) -> Iterator[None]:
    """Turn whatever a library raises about a damaged file into Refused(code), naming the file and the kind of error.

    pydicom raises nearly anything on damaged files, and quotes header values in errors, warnings and log lines: none of
    that text gets out. A disk that fails or is full is no fault of the file: those OSErrors pass.
    """
    log = logging.getLogger("pydicom")
    try:
        with ONE_AT_A_TIME, warnings.catch_warnings():
            was_disabled, log.disabled = log.disabled, True
            warnings.simplefilter("ignore")
            try:
                yield
            finally:
                log.disabled = was_disabled
    except Exception as error:
        # EINVAL: a length that led out of the file.
        is_disk = isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)
        if is_disk or isinstance(error, Refused) or is_out_of_memory(error):
            raise
        raise Refused(code, f"{path.name}: {sentence} ({type(error).__name__})") from None


def as_uid(text: Any) -> UID:
    """Return pydicom's UID, which knows names and kinds; without its warning, which quotes what is no valid UID."""
    from pydicom.config import IGNORE
    from pydicom.uid import UID

    return UID(str(text), validation_mode=IGNORE)


def _read(path: Path, file: BinaryIO) -> tuple[FileDataset, PixelLayout]:
    """Return the tags in KEYWORDS and where the pixel data are, by pydicom."""
    from pydicom import dcmread
    from pydicom.errors import InvalidDicomError

    try:
        dataset = dcmread(DicomFile(file), stop_before_pixels=True, specific_tags=list(KEYWORDS))
    except (InvalidDicomError, EOFError):
        dataset = _read_without_preamble(path, file)
    # The file stands where pydicom stopped: on the pixel data element or at the end.
    return dataset, _pixel_layout(dataset, file.tell(), file.read(12), os.fstat(file.fileno()).st_size)


def _read_without_preamble(path: Path, file: BinaryIO) -> FileDataset:
    """Return the tags of a bare data set (old exports) whose name or first bytes say DICOM and that says its kind."""
    from pydicom import dcmread

    file.seek(0)
    if path.suffix.lower() in (".dcm", ".ima") or is_dicom(file.read(HEAD_BYTES)):
        with suppress(Exception):  # anything may happen in bytes that are not DICOM
            file.seek(0)
            dataset = dcmread(DicomFile(file), stop_before_pixels=True, specific_tags=list(KEYWORDS), force=True)
            if all(dataset.get(keyword) for keyword in ("SOPClassUID", "SeriesInstanceUID")):
                return dataset
    raise not_a("a DICOM file", path, "export the series again, or leave the file out")


def _pixel_layout(dataset: Header, start: int, head: bytes, size: int) -> PixelLayout:
    """Return how pixels are stored in a file of `size` bytes. `head` are up to 12 bytes from `start`, behind the tags.

    A file that does not say its transfer syntax has the plain one that pydicom found it to be in.
    """
    implicit, little = map(bool, dataset.original_encoding)
    syntax = IMPLICIT_LITTLE if implicit else EXPLICIT_LITTLE if little else EXPLICIT_BIG
    allocated, high = int(dataset.get("BitsAllocated") or 0), dataset.get("HighBit")
    stored = int(dataset.get("BitsStored") or allocated)

    at, length, order = None, 0, "<" if little else ">"
    has_pixels = len(head) == 12 and head[:4] == struct.pack(order + "HH", 0x7FE0, 0x0010)
    if has_pixels and (implicit or head[4:6] in (b"OB", b"OW", b"UN")):
        taken = 8 if implicit else 12
        at, length = start + taken, struct.unpack(order + "L", head[taken - 4 : taken])[0]
    syntax = str(dataset.file_meta.get("TransferSyntaxUID") or syntax)
    return PixelLayout(
        transfer_syntax=syntax,
        bits_allocated=allocated,
        bits_stored=stored,
        high_bit=stored - 1 if high is None else int(high),
        signed=bool(dataset.get("PixelRepresentation")),
        at=at,
        length=length,
        present=size - (at or 0),
        padding=_padding(dataset, order),
    )


def _padding(dataset: Header, order: str) -> tuple[int, int] | None:
    """Return the stored values that begin and end the range of padding, whatever type they are written as; or None."""
    found = []
    for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit"):
        value = dataset.get(keyword)
        if isinstance(value, bytes):  # its type depends on PixelRepresentation, which may be missing
            value = struct.unpack_from(f"{order}H", value)[0] if len(value) >= 2 else None
        found.append(value if isinstance(value, int) else None)
    value, limit = found
    return None if value is None else (value, value if limit is None else limit)


def _kind(path: Path, dataset: Header) -> str:
    """Return the standard's name of a kind of object, "" for a vendor's own; Refused where a file ends before it."""
    sop_class = as_uid(dataset.get("SOPClassUID") or dataset.file_meta.get("MediaStorageSOPClassUID") or "")
    if sop_class.name == sop_class:  # not in the standard, or cut off
        if not dataset.get("SeriesInstanceUID"):
            raise refusal("dicom-unreadable", path.name, "a kind of object and its series", CUT_HEADER, COPY_AGAIN)
        return ""
    if "Image Storage" in sop_class.name and not (dataset.get("Rows") and dataset.get("Columns")):
        raise refusal("truncated", path.name, "rows and columns of an image", CUT_HEADER, COPY_AGAIN)
    return sop_class.name.partition(" Storage")[0]


def _plane(path: Path, dataset: Header, pixels: PixelLayout, frame: int, frames: int) -> PlaneHeader:
    # A tag is looked for in the frame's own functional groups, in the shared ones, and at the top level.
    groups = [*(dataset.get(PER_FRAME) or [])[frame : frame + 1], *(dataset.get(SHARED) or [])[:1]]
    items = [item for group in groups for name in FRAME_GROUPS for item in (group.get(f"{name}Sequence") or [])[:1]]
    places = [*items, dataset]
    photometric = str(dataset.get("PhotometricInterpretation") or "MONOCHROME2")
    spacing, concatenation = _numbers(places, "PixelSpacing", 2), dataset.get("ConcatenationUID")
    has_table = any(place.get("ModalityLUTSequence") for place in places)
    given = [any(_text(place, name) for place in places) for name in ("RescaleSlope", "RescaleIntercept")]
    slope, intercept = _numbers(places, "RescaleSlope", 1), _numbers(places, "RescaleIntercept", 1)
    if not given[0] and not has_table:
        slope = np.ones(1)
    patient = _text(dataset, "PatientID").strip()
    return PlaneHeader(
        path=path,
        frame=frame,
        frames=frames,
        instance=_digest(dataset.get("SOPInstanceUID")),
        study=_digest(f"{dataset.get('StudyInstanceUID')} {patient}"),
        patient=patient and _digest(f"{_text(dataset, 'IssuerOfPatientID')} {patient}"),
        series=_digest(dataset.get("SeriesInstanceUID")),
        acquired=None if (clock := _numbers([dataset], "AcquisitionTime", 1)) is None else float(clock[0]),
        tags=tuple(text and _digest(text) for text in (_text(dataset, name) for name in SPLIT_TAGS)),
        container="" if frames == 1 else _digest(concatenation) if concatenation else path.name,
        localizer=any(text in SCOUTS for text in _text(dataset, "ImageType").split("\\")),
        color=int(dataset.get("SamplesPerPixel") or 1) != 1 or not photometric.startswith("MONOCHROME"),
        rows=int(dataset.get("Rows")),
        columns=int(dataset.get("Columns")),
        position_lps=_numbers(places, "ImagePositionPatient", 3),
        orientation=_directions(_first_text(places, "ImageOrientationPatient")),
        spacing_mm=spacing if spacing is not None and (spacing > 0).all() else None,
        slope=math.nan if slope is None else float(slope[0]),
        intercept=float(intercept[0]) if intercept is not None else math.nan if given[1] else 0.0,
        is_rescaled=has_table or all(given),
        pixels=pixels,
    )


def _text(dataset: Header, keyword: str) -> str:
    """Return the text of a tag as the file has it, "" where there is none: nothing is parsed, so nothing can fail."""
    element = dataset.get_item(keyword)
    value = None if element is None else element.value
    if isinstance(value, bytes):
        text = value.decode("latin-1")
        return "\\".join(part.strip(" \0") for part in text.split("\\")) if "\\" in text else text.strip(" \0")
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    return "" if value is None else "\\".join(map(str, values))


def _numbers(places: Sequence[Header], keyword: str, count: int) -> np.ndarray | None:
    """Return `count` finite numbers [count], or None where the header has anything else.

    Some systems write the decimal comma of their country, as in 0,75: it is read as a point.
    """
    return _parsed(_first_text(places, keyword), count)


def _first_text(places: Sequence[Header], keyword: str) -> str:
    return next((text for text in (_text(place, keyword) for place in places) if text), "")


@lru_cache(1024)  # most are the same in all slices
def _parsed(text: str, count: int) -> np.ndarray | None:
    try:
        numbers = [float(part.replace(",", ".").replace("_", "?")) for part in text.split("\\")]
    except ValueError:
        return None
    return _fixed(np.array(numbers)) if len(numbers) == count and all(map(math.isfinite, numbers)) else None


def _fixed(array: np.ndarray) -> np.ndarray:
    """Return an array that planes can share."""
    array.flags.writeable = False
    return array


@lru_cache(1024)
def _directions(text: str) -> np.ndarray | None:
    """Return the directions [2, 3] along a row and down a column; None where they are not nearly perpendicular units.

    Headers round them to few digits: the column direction is brought to unit length, the row direction is turned in
    their plane to be perpendicular to it, as ITK does.
    """
    if (cosines := _parsed(text, 6)) is None:
        return None
    along_row, down_column = cosines.reshape(2, 3)
    lengths = np.linalg.norm([along_row, down_column], axis=1)
    if abs(along_row @ down_column) > 0.01 or np.abs(lengths - 1).max() > 0.01:
        return None
    turned = np.cross(down_column, np.cross(along_row, down_column))
    both = np.array([turned, down_column])
    return _fixed(both / np.linalg.norm(both, axis=1, keepdims=True))  # with an axis, norm takes no BLAS


@lru_cache(1024)
def _digest(uid: Any) -> str:
    return hashlib.sha256(str(uid or "").encode()).hexdigest()[:16]
