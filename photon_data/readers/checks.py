"""What every format's header must give, checked once: a grid of a sane size, a frame, numbers of a known type."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from photon_data.errors import Refused
from photon_data.readers.stream import HEAD_BYTES, Stored, check_length, describe, read_head, stream_planes
from photon_data.scan import Scan
from photon_data.volume import Geometry

# One plane is in memory at a time: its sides are bounded, not only the number of voxels.
MAX_SIDE = 4096
SPACING_MM = (0.001, 100.0)


def not_a(kind: str, path: Path, remedy: str) -> Refused:
    """Return the refusal of a file that is not the `kind` its name says: "empty", or "not-a-scan" with what it looks like."""
    head = read_head(path, HEAD_BYTES)
    if not head:
        return Refused("empty", f"{path.name}: {kind} wanted, the file has no bytes; copy or download it again")
    return Refused("not-a-scan", f"{path.name}: {kind} wanted, found {describe(head)}; {remedy}")


def unreadable(path: Path, error: OSError) -> Refused:
    """Return the refusal of a file that the system does not let us read."""
    return Refused("unreadable", f"{path.name}: a readable file wanted: {error.strerror}; restore it or its permissions")


def grid_shape(sizes: Sequence[int], name: str, max_voxels: int) -> tuple[int, int, int]:
    """Return (z, y, x) of sizes in file order (fastest axis first); sides of 1 after the third are dropped.

    Refused: bad-header, several-volumes, two-d, too-large.
    """
    shown = " x ".join(str(n) for n in sizes)
    if not sizes or min(sizes) < 1:
        raise Refused("bad-header", f"{name}: sides of at least 1 voxel wanted, found {shown or 'none'}; export the scan again")
    if prod(sizes[3:]) > 1:
        raise Refused("several-volumes", f"{name}: one volume wanted, found {shown}; split it into one file per volume")
    if len(sizes) < 3 or min(sizes[:3]) < 2:
        raise Refused("two-d", f"{name}: a volume of at least 2 voxels a side wanted, found {shown}; leave it out")
    if prod(sizes) > max_voxels:
        raise Refused(
            "too-large", f"{name}: at most {max_voxels:,} voxels wanted, found {shown}; raise the limit or crop the scan"
        )
    if max(sizes) > MAX_SIDE:
        raise Refused("too-large", f"{name}: sides of at most {MAX_SIDE} voxels wanted, found {shown}; crop the scan")
    return int(sizes[2]), int(sizes[1]), int(sizes[0])


def frame(shape_zyx: tuple[int, int, int], origin_lps: Any, steps_lps: Any, name: str, remedy: str) -> Geometry:
    """Return the Geometry of a header's frame in LPS mm; Refused bad-geometry where it is not finite, singular or absurd."""
    try:
        with np.errstate(all="ignore"):
            geometry = Geometry.from_arrays(shape_zyx, origin_lps, steps_lps)
    except ValueError:
        raise Refused("bad-geometry", f"{name}: finite, independent axes wanted, found others; {remedy}") from None
    low, high = SPACING_MM
    if not all(low <= spacing <= high for spacing in geometry.spacing_zyx_mm):
        found = " x ".join(f"{spacing:.4g}" for spacing in geometry.spacing_zyx_mm[::-1])
        raise Refused("bad-geometry", f"{name}: voxels of {low:g} to {high:g} mm wanted, found {found} mm; {remedy}")
    return geometry


def scan_of(stored: Stored, geometry: Geometry, file_format: str, slope: float = 1.0, intercept: float = 0.0) -> Scan:
    """Return the Scan of stored values whose file is long enough for them; Refused truncated or surplus where it is not."""
    check_length(stored)
    planes = partial(stream_planes, stored)
    return Scan(geometry, stored.dtype.newbyteorder("="), slope, intercept, planes, file_format)
