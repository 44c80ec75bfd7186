"""CT-RATE's metadata tables (train_metadata.csv, validation_metadata.csv) -> what they say of each volume."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from photon_data.sources.collected import table_with
from photon_data.tables import Problem, refuse
from photon_data.volume import Geometry

COLUMNS = (
    "VolumeName",
    "ConvolutionKernel",
    "PatientPosition",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "Rows",
    "Columns",
    "XYSpacing",
    "ZSpacing",
    "NumberofSlices",
    "RescaleSlope",
    "RescaleIntercept",
)

# Kernels without a number, of Philips: those for soft tissue, and those for edges (lung, bone, Y = enhanced).
SOFT = ("A", "B", "SA", "SB", "UA", "UB")
SHARP = ("C", "D", "E", "EA", "EB", "L", "LungB", "YA", "YB", "YC", "YD")


class Metadata(NamedTuple):
    """A row: `upright` tells that slices are axial, head first, so that rows run to the back, columns to the left, slices up."""

    geometry: Geometry
    upright: bool
    slope: float
    intercept: float
    kernel: str


def read_metadata(paths: Iterable[Path], volumes: Container[str]) -> dict[str, Metadata]:
    """Return {volume id: Metadata} for those of `volumes` that are named.

    UsageError with all rows of theirs whose numbers cannot be read, and for a volume named twice in different ways.
    """
    found: dict[str, Metadata] = {}
    for path in paths:
        problems = []
        for row in table_with(path, COLUMNS).rows:
            name = row.values["VolumeName"].removesuffix(".nii.gz")
            if name not in volumes:
                continue
            try:
                metadata = _metadata(row.values)
            except (ValueError, TypeError) as error:
                text = f"{name}: spacing, size, slope and intercept as numbers wanted, got: {error}"
                problems.append(Problem(row.place, "unreadable number", text))
                continue
            if found.setdefault(name, metadata) != metadata:
                problems.append(Problem(row.place, "volume named twice", f"{name}: one row wanted, got another one that differs"))
        if problems:
            refuse(path, problems)
    return found


def sharpness(kernel: str) -> float | None:
    """Return a number that is larger for sharper kernels; None for a kernel that is not known.

    "['Br40f', '3']" -> 40 (Siemens counts up), "B" -> 0 and "YA" -> 100 (Philips; soft and sharp, no finer order is known)
    """
    name = kernel.strip("[]").split(",")[0].strip("' ")
    numbered = re.fullmatch(r"[A-Z][a-z]?(\d\d)[a-z]?", name)
    if numbered:
        return float(numbered[1])
    return 0.0 if name in SOFT else 100.0 if name in SHARP else None


def _metadata(values: Mapping[str, str]) -> Metadata:
    """Return what a row says. The z of slice 0 is set to 0: the table gives one slice's position and not which slice it is."""
    row_mm, column_mm = _numbers(values["XYSpacing"], 2)
    x, y, _ = _numbers(values["ImagePositionPatient"], 3)
    slice_mm, slope, intercept = (_positive(values["ZSpacing"]), float(values["RescaleSlope"]), float(values["RescaleIntercept"]))
    if not (math.isfinite(slope) and math.isfinite(intercept) and slope):
        raise ValueError(f"slope {slope}, intercept {intercept}")
    shape = (int(float(values["NumberofSlices"])), int(float(values["Rows"])), int(float(values["Columns"])))
    axial = _numbers(values["ImageOrientationPatient"], 6) == [1, 0, 0, 0, 1, 0]
    geometry = Geometry.from_arrays(shape, (x, y, 0), ((0, 0, slice_mm), (0, row_mm, 0), (column_mm, 0, 0)))
    return Metadata(geometry, axial and values["PatientPosition"] == "HFS", slope, intercept, values["ConvolutionKernel"])


def _numbers(text: str, count: int) -> list[float]:
    """Return the numbers of "[0.34, 0.34]", a list written as text."""
    try:
        numbers = [float(number) for number in json.loads(text)]
    except (json.JSONDecodeError, TypeError):
        raise ValueError(f"{text!r}, where a list like [1, 2] is wanted") from None
    if len(numbers) != count:
        raise ValueError(f"{text!r}, where {count} numbers are wanted")
    return numbers


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise ValueError(f"{text!r}, where a length in mm is wanted")
    return number
