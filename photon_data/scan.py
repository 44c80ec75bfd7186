"""A raw scan between disk and volume: found (`Source`), opened but not yet read (`Scan`).

What a data set's own table says of the grid of one of its files, and how that agrees with the file's header.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from photon_data.errors import Refused
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
    choices    of the policy, without which the header would be refused or give another geometry
    planes     call it to stream the stored values: one array [y, x] per index of axis 0. The array may be reused for the next
               plane. Exhausting it verifies length and checksums; Refused is raised on damage.
    """

    geometry: Geometry
    dtype: np.dtype
    slope: float
    intercept: float
    planes: Callable[[], Iterator[np.ndarray]]
    format: str
    choices: Mapping[str, str] = field(default_factory=dict)


# Published tables round spacing to four digits or more.
SPACING_SHARE = 0.005


class Stated(NamedTuple):
    """A grid that a table states for one file.

    geometry  shape, spacing and directions
    instead   True: the header is blank and this grid takes its place; False: the header counts, and has to agree with this
    """

    geometry: Geometry
    instead: bool

    def to_json(self) -> dict[str, Any]:
        """Return the plain dict that `from_json` reads back."""
        return {"geometry": self.geometry.to_json(), "instead": self.instead}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Stated:
        """Return the Stated that `to_json` wrote."""
        return cls(Geometry.from_json(data["geometry"]), data["instead"])


def agreed(native: Geometry, stated: Stated) -> Geometry:
    """Return the grid to go by; Refused ("table-conflict") where shape, or the header that counts, differs from the table.

    Of a header that counts, shape and spacing are compared, axis by axis as they lie in the file.
    """
    table = stated.geometry
    if native.shape_zyx != table.shape_zyx:
        raise _conflict("voxels", native.shape_zyx, table.shape_zyx)
    if not stated.instead and not np.allclose(native.spacing_zyx_mm, table.spacing_zyx_mm, rtol=SPACING_SHARE):
        raise _conflict("mm", native.spacing_zyx_mm, table.spacing_zyx_mm)
    return table if stated.instead else native


def _conflict(unit: str, found: tuple[float, ...], said: tuple[float, ...]) -> Refused:
    in_file, in_table = (" x ".join(f"{value:.4g}" for value in values) for values in (found, said))
    return Refused(
        "table-conflict",
        f"a header that agrees with the data set's table wanted, found {in_file} {unit} (z, y, x) in the file and {in_table} in "
        "the table; one of the two belongs to another version or file",
    )
