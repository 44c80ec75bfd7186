"""One image plane of a DICOM series, as its header describes it: where it lies, how its values are stored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

# Transfer syntaxes.
IMPLICIT_LITTLE, EXPLICIT_LITTLE, EXPLICIT_BIG = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
PLAIN = (IMPLICIT_LITTLE, EXPLICIT_LITTLE, EXPLICIT_BIG)
DEFLATED = "1.2.840.10008.1.2.1.99"
UNDEFINED_LENGTH = 0xFFFFFFFF  # of compressed pixel data: items until a delimiter
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
    return np.array([plane.position_lps for plane in planes]) @ planes[0].normal


def differing(planes: Sequence[PlaneHeader]) -> str:
    """Return which of SPLIT_TAGS take some values, each in several planes: "AcquisitionNumber (2 values)", or ""."""
    counts = {name: Counter(plane.tags[n] for plane in planes) for n, name in enumerate(SPLIT_TAGS)}
    some = {name: len(values) for name, values in counts.items() if len(values) > 1 and min(values.values()) > 1}
    return ", ".join(f"{name} ({count} values)" for name, count in some.items())
