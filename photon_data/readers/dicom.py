"""Planes of a DICOM series -> their order along the slice normal and the Geometry of the stack, or why they make none.

DICOM series: the files of one folder -> series, and one series -> Scan. Needs the extra `dicom` (pydicom).

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

from photon_data.errors import Refused, first_few
from photon_data.readers.checks import frame, grid_shape, unreadable
from photon_data.readers.dicom_header import Plane, read_planes
from photon_data.readers.dicom_pixels import require_decodable, stored_planes
from photon_data.scan import Scan, Source
from photon_data.volume import Geometry

SAME_DIRECTION = 1e-3  # largest difference of direction cosines within one stack: 0.2 mm at the edge of a body
SAME_SPACING = 1e-3  # largest relative difference of pixel spacings within one stack
SAME_POSITION_MM = 0.01
# How far a slice may lie from its place on the regular grid, as a part of the slice distance: a tenth; up to a quarter where this
# is what positions rounded to 0.1 mm make of thin slices. A missing slice puts others off by half a distance or more.
OFF_GRID, OFF_GRID_ROUNDED, ROUNDING_MM = 0.1, 0.25, 0.1


def belong_together(plane: Plane, other: Plane) -> bool:
    """Tell whether two planes can be of one stack: same size, same orientation, same container of frames."""
    same = (plane.rows, plane.columns, plane.container) == (other.rows, other.columns, other.container)
    return same and _same_orientation(plane, other)


def _same_orientation(plane: Plane, other: Plane) -> bool:
    if plane.orientation is None or other.orientation is None:
        return plane.orientation is other.orientation
    return bool(np.abs(plane.orientation - other.orientation).max() < SAME_DIRECTION)


def has_duplicates(planes: Sequence[Plane]) -> bool:
    """Tell whether two planes lie at one position; False where positions are not known."""
    if any(plane.position_lps is None or plane.orientation is None for plane in planes):
        return False
    return bool((np.diff(np.sort(_along_normal(planes))) < SAME_POSITION_MM).any())


def stack(planes: Sequence[Plane], max_voxels: int) -> tuple[list[Plane], Geometry]:
    """Return the planes in order along the slice normal (row x column direction) and the grid [slice, row, column] they form.

    The slice step is the vector from the first to the last position / (n - 1): with a tilted gantry it is not parallel to the
    normal, and the grid is sheared; less than the rounding of positions is no tilt. Every plane lies within a tenth of the slice
    distance of its place on that line. Refused: dicom-no-geometry, dicom-mixed, two-d, several-volumes, dicom-duplicate-slices,
    dicom-missing-slices, too-large, bad-geometry.
    """
    _require_geometry(planes)
    _require_one_kind(planes)
    along = _along_normal(planes)
    order = np.argsort(along, kind="stable")
    planes, along = [planes[i] for i in order], along[order]
    _require_one_plane_per_position(along)
    positions = np.array([plane.position_lps for plane in planes])
    step = _slice_step(positions, _normal_of(planes[0]))
    _require_regular(along, positions, step)
    return planes, _geometry(planes[0], len(planes), step, max_voxels)


def _geometry(first: Plane, slices: int, step: np.ndarray, max_voxels: int) -> Geometry:
    """Return the grid of PS3.3 C.7.6.2.1.1: down a column by the row distance, along a row by the column distance."""
    assert first.orientation is not None and first.spacing_mm is not None
    (along_row, down_column), (row_mm, column_mm) = first.orientation, first.spacing_mm
    steps = (step, down_column * row_mm, along_row * column_mm)
    shape_zyx = grid_shape((first.columns, first.rows, slices), first.path.name, max_voxels)
    return frame(shape_zyx, first.position_lps, steps, first.path.name, "export the series again")


def _slice_step(positions: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """Return the vector [3] from one slice to the next, mm, for sorted positions [n, 3]."""
    length = positions[-1] - positions[0]
    straight = (length @ normal) * normal
    return (straight if np.linalg.norm(length - straight) <= ROUNDING_MM else length) / (len(positions) - 1)


def _normal_of(plane: Plane) -> np.ndarray:
    return np.cross(*np.asarray(plane.orientation))


def _along_normal(planes: Sequence[Plane]) -> np.ndarray:
    """Return the position of each plane along the slice normal of the first, mm [n]; for axial scans the patient's z."""
    return np.array([plane.position_lps for plane in planes]) @ _normal_of(planes[0])


def _require_geometry(planes: Sequence[Plane]) -> None:
    wanted = {"position_lps": "position", "orientation": "orientation", "spacing_mm": "pixel spacing"}
    for plane in planes:
        lacking = [name for field, name in wanted.items() if getattr(plane, field) is None]
        if lacking:
            raise Refused(
                "dicom-no-geometry",
                f"{plane.path.name}: patient position, orientation and pixel spacing wanted, no usable {', '.join(lacking)} "
                "found: a scout, a screenshot or a damaged header; export the reconstructed slices",
            )


def _require_one_kind(planes: Sequence[Plane]) -> None:
    first = planes[0]
    differences = {
        "series": any(p.series != first.series for p in planes),
        "rows or columns": any((p.rows, p.columns) != (first.rows, first.columns) for p in planes),
        "orientation": not all(_same_orientation(p, first) for p in planes),
        "pixel spacing": any(not np.allclose(_spacing(p), _spacing(first), rtol=SAME_SPACING, atol=0) for p in planes),
    }
    mixed = [name for name, differs in differences.items() if differs]
    if mixed:
        raise Refused(
            "dicom-mixed",
            f"slices of one kind wanted, found {len(planes)} images that differ in {', '.join(mixed)}; "
            "put each stack into a folder of its own",
        )


def _spacing(plane: Plane) -> np.ndarray:
    return np.asarray(plane.spacing_mm)


def _require_one_plane_per_position(along: np.ndarray) -> None:
    """Refuse sorted positions [n] along the normal of which some, or all, are taken more than once."""
    first_of_each = np.flatnonzero(np.r_[True, np.diff(along) >= SAME_POSITION_MM])
    times = np.diff(np.r_[first_of_each, len(along)])
    if len(times) == 1:
        raise Refused("two-d", f"a stack of slices wanted, found {len(along)} image(s) at one position; leave it out")
    if times.max() == 1:
        return
    if times.min() == times.max():
        raise Refused(
            "several-volumes",
            f"one image per position wanted, found {times[0]} at each of {len(times)} positions (phases, or reconstructions "
            "under one series); put each volume into a folder of its own",
        )
    at = along[first_of_each][times > 1]
    raise Refused(
        "dicom-duplicate-slices",
        f"one image per position wanted, found several at {len(at)} of {len(times)} positions ({_mm(at)} along the slice "
        "normal); remove the copies",
    )


def _require_regular(along: np.ndarray, positions: np.ndarray, step: np.ndarray) -> None:
    """Refuse sorted slices that leave the regular line: in depth (something is missing) or sideways (they do not fit)."""
    count, gaps = len(along), np.diff(along)
    usual = float(np.median(gaps))
    tolerance = max(OFF_GRID * usual, min(ROUNDING_MM, OFF_GRID_ROUNDED * usual))
    if np.abs(along - np.linspace(along[0], along[-1], count)).max() > tolerance:
        odd = np.argsort(-np.abs(gaps - usual), kind="stable")[: np.count_nonzero(np.abs(gaps - usual) > tolerance) or 1]
        where = ", ".join(f"{gaps[i]:.2f} mm between {along[i]:.2f} and {along[i + 1]:.2f} mm" for i in sorted(odd[:3]))
        raise Refused(
            "dicom-missing-slices",
            f"slices {usual:.2f} mm apart wanted, found {len(odd)} other distance(s) along the slice normal: {where}; export the "
            "missing slices, or one reconstruction with a constant distance",
        )
    aside = np.linalg.norm(positions - positions[0] - np.arange(count)[:, None] * step, axis=1)
    if aside.max() > tolerance:
        raise Refused(
            "dicom-mixed",
            f"slices on one straight line wanted, found some up to {aside.max():.2f} mm beside it; put each stack into a folder "
            "of its own",
        )


def _mm(values: np.ndarray) -> str:
    return f"{first_few([f'{value:.2f}' for value in values])} mm"


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
