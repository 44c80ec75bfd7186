"""DICOM series: the files of one folder -> series, and one series -> Scan. Needs the extra `dicom` (pydicom).

Codes of refusal beside those that all formats share:

    dicom-extra-missing     pydicom is not installed
    dicom-unreadable        a header that cannot be read
    dicom-no-geometry       an image without position, orientation or pixel spacing, or no image at all
    dicom-multiframe        frames without positions
    dicom-mixed             images that differ in size, orientation, spacing or series, or lie beside the line of the others
    dicom-missing-slices    slice distances differ
    dicom-duplicate-slices  some positions are taken twice (all of them: several-volumes)
    dicom-bad-rescale       a slope of zero, not finite, or a table in its place
    dicom-undecodable       pixels that nothing here decodes, or that the header does not describe

DICOM has no checksums: a bit flipped inside of the pixel data goes unnoticed unless a decoder trips over it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np

from photon_data.errors import Refused
from photon_data.readers.checks import unreadable
from photon_data.readers.dicom_geometry import belong_together, has_duplicates, stack
from photon_data.readers.dicom_header import Plane, read_planes
from photon_data.readers.dicom_pixels import require_decodable, stored_planes
from photon_data.scan import Scan, Source


class Grouped(NamedTuple):
    """What the files of one folder are.

    series      (key, files sorted by name) of each image stack, sorted by key
    unreadable  (file, why) of what is not DICOM or is damaged
    ignored     number of DICOM files that hold no image: structures, reports, presentation states, segmentations, doses
    scouts      number of files of stacks that are LOCALIZER by their ImageType, every image of them
    """

    series: list[tuple[str, list[Path]]]
    unreadable: list[tuple[Path, Refused]]
    ignored: int
    scouts: int


def group_series(files: list[Path]) -> Grouped:
    """Return the image stacks among the files of one folder, from their headers alone.

    The key is the start of a hash of the SeriesInstanceUID. One series may hold several stacks: images that differ in size or
    orientation (a scout beside the slices, which is counted and left out), multi-frame files, and acquisitions, where splitting
    by AcquisitionNumber leaves no position taken twice. Its largest stack has the bare key, whatever lies beside it; the others
    follow as key-2, key-3, ...
    Refused("dicom-extra-missing") without pydicom.
    """
    _require_pydicom()
    by_series: dict[str, list[Plane]] = {}
    strange, ignored = [], 0
    for path in sorted(files):
        try:
            planes = read_planes(path)
        except Refused as refused:
            strange.append((path, refused))
            continue
        except OSError as error:
            strange.append((path, unreadable(path, error)))
            continue
        ignored += not planes
        for plane in planes[:1]:
            by_series.setdefault(plane.series, []).append(plane)
    stacks = [named for key, planes in sorted(by_series.items()) for named in _named_stacks(key, planes)]
    series = [(key, [plane.path for plane in planes]) for key, planes in stacks if not _is_scout(planes)]
    return Grouped(series, strange, ignored, sum(len(planes) for _, planes in stacks if _is_scout(planes)))


def open_series(source: Source, *, max_voxels: int) -> Scan:
    """Return the Scan of one series: planes in order of position along the slice normal, geometry as its headers say.

    Stored values with one slope and intercept, if all slices agree on these and on the stored type; otherwise planes come
    rescaled as float32, with slope 1 and intercept 0. MONOCHROME1 changes how a picture is shown, not its HU: taken as it is.
    Refused: what `read_planes`, `stack` and `require_decodable` refuse, and rgb, dicom-multiframe, dicom-bad-rescale,
    dicom-extra-missing.
    """
    _require_pydicom()
    planes = [plane for path in source.files for plane in _image_planes(path)]
    _require_slices(planes)
    planes, geometry = stack(planes, max_voxels)
    require_decodable(planes)
    if len({(plane.encoding.dtype, plane.slope, plane.intercept) for plane in planes}) > 1:
        return Scan(geometry, np.dtype(np.float32), 1.0, 0.0, lambda: _rescaled_planes(planes), "dicom")
    first = planes[0]
    return Scan(geometry, first.encoding.dtype, first.slope, first.intercept, lambda: stored_planes(planes), "dicom")


def _rescaled_planes(planes: Sequence[Plane]) -> Iterator[np.ndarray]:
    for plane, stored in zip(planes, stored_planes(planes), strict=True):
        yield (stored * plane.slope + plane.intercept).astype(np.float32)


def _is_scout(planes: Sequence[Plane]) -> bool:
    return all(plane.localizer for plane in planes)


def _named_stacks(key: str, planes: list[Plane]) -> list[tuple[str, list[Plane]]]:
    """Return (key, planes) of each stack of a series, the largest first; among equals the one with the first file name."""
    stacks = [part for whole in _alike(planes) for part in _acquisitions(whole)]
    stacks.sort(key=lambda part: -len(part))  # stable: planes came sorted by name
    return [(key if n == 1 else f"{key}-{n}", part) for n, part in enumerate(stacks, 1)]


def _alike(planes: list[Plane]) -> list[list[Plane]]:
    """Split planes into stacks of one size and orientation: [axial axial scout axial] -> [axial axial axial] [scout]."""
    stacks: list[list[Plane]] = []
    for plane in planes:
        home = next((part for part in stacks if belong_together(plane, part[0])), None)
        if home is None:
            stacks.append(home := [])
        home.append(plane)
    return stacks


def _acquisitions(planes: list[Plane]) -> list[list[Plane]]:
    """Split a stack by AcquisitionNumber if positions are taken twice in it and in none of its acquisitions of several slices."""
    parts: dict[str, list[Plane]] = {}
    for plane in planes:
        parts.setdefault(plane.acquisition, []).append(plane)
    if has_duplicates(planes) and not any(len(part) == 1 or has_duplicates(part) for part in parts.values()):
        return list(parts.values())
    return [planes]


def _image_planes(path: Path) -> list[Plane]:
    planes = read_planes(path)
    if not planes:
        raise Refused("dicom-no-geometry", f"{path.name}: an image wanted, found another kind of DICOM object; leave it out")
    return planes


def _require_slices(planes: Sequence[Plane]) -> None:
    """Refuse what is no stack of grey slices in HU, whatever its geometry."""
    name = planes[0].path.name
    if any(plane.color for plane in planes):
        raise Refused("rgb", f"{name}: one grey value per pixel wanted, found colour: a screenshot; export the slices")
    if any(plane.frames > 1 and plane.position_lps is None for plane in planes):
        raise Refused(
            "dicom-multiframe",
            f"{name}: one position per frame wanted, found a multi-frame file without; export it as Enhanced CT or single slices",
        )
    if not all(np.isfinite([plane.slope, plane.intercept]).all() and plane.slope != 0 for plane in planes):
        raise Refused(
            "dicom-bad-rescale",
            f"{name}: a finite slope other than 0 and an intercept wanted, found none in some slices; export the series again",
        )


def _require_pydicom() -> None:
    if find_spec("pydicom") is None:
        raise Refused("dicom-extra-missing", "pydicom wanted to read DICOM, not installed; pip install 'photon-ct[dicom]'")
