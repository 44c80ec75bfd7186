"""A raw scan between disk and volume: found (`Source`), opened but not yet read (`Scan`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from photon_data.volume import Geometry

# The largest scan of CT-RATE's validation split has 424 million voxels.
MAX_VOXELS = 1_000_000_000


@dataclass(frozen=True)
class Source:
    """One scan found in a folder, before anything but names (and, for DICOM, headers) was read.

    `id` names the volume everywhere, `path` is relative to the source folder (posix, for people and tables), `files` are
    absolute and hold the whole scan: one NIfTI, a header and its data file, or the slices of one DICOM series, sorted by name.
    `problem` is set where it is known before it is opened that it cannot become a volume (an unreadable file, say); `code` is
    then the code of the refusal.
    """

    id: str
    path: str
    files: tuple[Path, ...]
    format: str
    bytes: int
    mtime_ns: int
    problem: str | None = None
    code: str = "unreadable"


@dataclass(frozen=True)
class Scan:
    """One raw scan whose header has been read and found sound.

    geometry   native grid; axis 0 is the slowest of the file, so planes arrive in its order
    dtype      of the stored values
    slope, intercept   from the header: HU = slope * stored + intercept
    planes     call it to stream the stored values: one array [y, x] per index of axis 0. The array may be reused for the next
               plane. Exhausting it verifies length and checksums; Refused is raised on damage.
    """

    geometry: Geometry
    dtype: np.dtype
    slope: float
    intercept: float
    planes: Callable[[], Iterator[np.ndarray]]
    format: str
