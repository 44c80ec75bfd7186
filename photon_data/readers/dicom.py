"""One DICOM series -> Scan: its planes in order along the slice normal and the grid they form, or why they form none.

DICOM has no checksums: a bit flipped inside of the pixel data goes unnoticed unless a decoder trips over it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from photon_data.errors import EXPORT_AGAIN, first_few, refusal
from photon_data.readers.dicom_header import read_planes, require_pydicom
from photon_data.readers.dicom_pixels import require_decodable, stored_planes
from photon_data.readers.dicom_plane import SAME_POSITION_MM, PlaneHeader, along_normal, differing
from photon_data.readers.dicom_series import ROUNDING_MM, SAME_SPACING, tolerance_mm
from photon_data.readers.stream import frame, grid_shape, wrong_values
from photon_data.scan import Scan, Source
from photon_data.volume import Geometry

ONE_FOLDER_EACH = "put each stack into a folder of its own"


def open_series(source: Source, max_voxels: int) -> Scan:
    """Return the Scan of one series: planes in order of position along the slice normal, geometry as its headers say.

    Planes hold stored values if all slices agree on slope, intercept and stored type. Otherwise they come rescaled as
    float32, with slope 1 and intercept 0. Where a header of the series declares padding, they are floats, and padding
    is NaN. MONOCHROME1 changes how a picture is shown, not its HU: it is taken as it is.
    """
    require_pydicom()
    planes: list[PlaneHeader] = []
    for path in source.files:
        if not (of_file := read_planes(path).planes):
            raise refusal("dicom-no-geometry", path.name, "an image", "another kind of DICOM object", "leave it out")
        planes += of_file
    _require_slices(planes)
    planes, geometry = stack(planes, max_voxels)
    require_decodable(planes)
    padded = any(plane.pixels.padding for plane in planes)
    if len({(plane.pixels.dtype, plane.slope, plane.intercept) for plane in planes}) > 1:
        rescaled = partial(_rescaled_planes, planes)
        return Scan(geometry, np.dtype(np.float32), 1.0, 0.0, rescaled, "dicom", padded=padded, rescaled=True)
    first, stored = planes[0], partial(stored_planes, planes)
    return Scan(geometry, first.pixels.dtype, first.slope, first.intercept, stored, "dicom", padded=padded)


def _require_slices(planes: Sequence[PlaneHeader]) -> None:
    """Refuse what is no stack of grey slices in HU, whatever its geometry."""
    name = planes[0].path.name
    if any(plane.color for plane in planes):
        raise wrong_values("rgb", name, "colour: a screenshot")
    _require_places_of_frames(planes)
    bare = [plane for plane in planes if not plane.is_rescaled]
    if 0 < len(bare) < len(planes):
        found = f"{len(bare)} of {len(planes)} without one of them, {bare[0].path.name} first"
        raise refusal("dicom-bad-rescale", "", "a slope and an intercept in every slice", found, EXPORT_AGAIN)
    if not all(np.isfinite([plane.slope, plane.intercept]).all() and plane.slope != 0 for plane in planes):
        expected = "a finite slope other than 0 and an intercept"
        raise refusal("dicom-bad-rescale", name, expected, "none in some slices", EXPORT_AGAIN)


def _require_places_of_frames(planes: Sequence[PlaneHeader]) -> None:
    """Refuse a file of several frames that does not say where each of them lies."""
    for path in dict.fromkeys(plane.path for plane in planes if plane.frames > 1):
        of_file = [plane for plane in planes if plane.path == path]
        places = {tuple(plane.position_lps) for plane in of_file if plane.position_lps is not None}
        frames = of_file[0].frames
        if len(of_file) < frames or len(places) < 2 or any(plane.position_lps is None for plane in of_file):
            found = f"{frames} frames and {'the place of only one' if places else 'no position'}"
            remedy = "export it as Enhanced CT or single slices"
            raise refusal("dicom-multiframe", path.name, "one position per frame", found, remedy)


def _rescaled_planes(planes: Sequence[PlaneHeader]) -> Iterator[np.ndarray]:
    for plane, stored in zip(planes, stored_planes(planes), strict=True):
        yield (stored * plane.slope + plane.intercept).astype(np.float32)


def stack(planes: Sequence[PlaneHeader], max_voxels: int) -> tuple[list[PlaneHeader], Geometry]:
    """Return the planes in order along the slice normal (row x column direction) and the grid [slice, row, column].

    With a tilted gantry the slice step is not parallel to the normal, and the grid is sheared. Refused.
    """
    _require_geometry(planes)
    _require_one_kind(planes)
    along = along_normal(planes)
    order = np.argsort(along, kind="stable")
    planes, along = [planes[i] for i in order], along[order]
    _require_one_plane_per_position(planes, along)
    positions = np.array([plane.position_lps for plane in planes])
    # The step from one slice to the next. Less tilt than positions are rounded to is none.
    normal, length = planes[0].normal, positions[-1] - positions[0]
    straight = (length @ normal) * normal
    step = (straight if np.linalg.norm(length - straight) <= ROUNDING_MM else length) / (len(positions) - 1)
    _require_regular(planes, positions, step)
    return planes, _geometry(planes[0], len(planes), step, max_voxels)


def _require_geometry(planes: Sequence[PlaneHeader]) -> None:
    names = {"position_lps": "position", "orientation": "orientation", "spacing_mm": "pixel spacing"}
    for plane in planes:
        missing = [name for field, name in names.items() if getattr(plane, field) is None]
        if missing:
            expected = "patient position, orientation and pixel spacing"
            found = f"no usable {', '.join(missing)}: a scout, a screenshot or a damaged header"
            raise refusal("dicom-no-geometry", plane.path.name, expected, found, "export the reconstructed slices")


def _require_one_kind(planes: Sequence[PlaneHeader]) -> None:
    first, spacings = planes[0], np.array([plane.spacing_mm for plane in planes])
    differences = {
        "series": any(p.series != first.series for p in planes),
        "rows or columns": any((p.rows, p.columns) != (first.rows, first.columns) for p in planes),
        "orientation": not all(p.is_parallel_to(first) for p in planes),
        "pixel spacing": not np.allclose(spacings, spacings[0], rtol=SAME_SPACING, atol=0),
    }
    mixed = [name for name, differs in differences.items() if differs]
    if mixed:
        found = f"{len(planes)} images that differ in {', '.join(mixed)}"
        raise refusal("dicom-mixed", "", "slices of one kind", found, ONE_FOLDER_EACH)


def _apart(planes: Sequence[PlaneHeader]) -> str:
    """Return in words what tells the planes apart."""
    return f"they differ in {tags}" if (tags := differing(planes)) else "no tag of their headers tells them apart"


def _require_one_plane_per_position(planes: Sequence[PlaneHeader], along: np.ndarray) -> None:
    """Refuse planes, sorted by position `along` the normal [n], where some or all positions are taken twice."""
    first_of_each = np.flatnonzero(np.r_[True, np.diff(along) >= SAME_POSITION_MM])
    times = np.diff(np.r_[first_of_each, len(along)])
    if len(times) == 1:
        raise refusal("two-d", "", "a stack of slices", f"{len(along)} image(s) at one position", "leave it out")
    if times.max() == 1:
        return
    if times.min() == times.max():
        found = f"{times[0]} at each of {len(times)} positions (phases, or reconstructions under one series); "
        remedy = "convert it to one file per volume" if planes[0].frames > 1 else ONE_FOLDER_EACH
        raise refusal("several-volumes", "", "one image per position", found + _apart(planes), remedy)
    at = first_few([f"{mm:.2f}" for mm in along[first_of_each][times > 1]])
    found = f"several at {np.count_nonzero(times > 1)} of {len(times)} positions ({at} mm along the slice normal); "
    remedy = f"remove the ones that do not belong, or {ONE_FOLDER_EACH}"
    raise refusal("dicom-duplicate-slices", "", "one image per position", found + _apart(planes), remedy)


def _require_regular(planes: Sequence[PlaneHeader], positions: np.ndarray, step: np.ndarray) -> None:
    """Refuse sorted slices that leave the regular line: in depth (some are missing) or sideways (they do not fit)."""
    along = along_normal(planes)
    count, gaps = len(along), np.diff(along)
    usual = float(np.median(gaps))
    tolerance = tolerance_mm(usual)
    if np.abs(along - np.linspace(along[0], along[-1], count)).max() > tolerance:
        off = np.abs(gaps - usual)
        odd = np.argsort(-off, kind="stable")[: np.count_nonzero(off > tolerance) or 1]
        where = ", ".join(f"{gaps[i]:.2f} mm between {along[i]:.2f} and {along[i + 1]:.2f} mm" for i in sorted(odd[:3]))
        found = f"{len(odd)} other distance(s) along the slice normal: {where}"
        found += f"; {_apart(planes)}" if differing(planes) else ""
        folders = len({plane.path.parent for plane in planes})
        found += f"; they lie in {folders} folders" if folders > 1 else ""
        remedy = "export the missing slices, or one reconstruction with a constant distance"
        raise refusal("dicom-missing-slices", "", f"slices {usual:.2f} mm apart", found, remedy)
    aside = np.linalg.norm(positions - positions[0] - np.arange(count)[:, None] * step, axis=1)
    if aside.max() > tolerance:
        found = f"some up to {aside.max():.2f} mm beside it"
        raise refusal("dicom-mixed", "", "slices on one straight line", found, ONE_FOLDER_EACH)


def _geometry(first: PlaneHeader, slices: int, step: np.ndarray, max_voxels: int) -> Geometry:
    """Return the grid of PS3.3 C.7.6.2.1.1: down a column by the row distance, along a row by the column distance."""
    assert first.orientation is not None and first.spacing_mm is not None
    (along_row, down_column), (row_mm, column_mm) = first.orientation, first.spacing_mm
    steps = (step, down_column * row_mm, along_row * column_mm)
    shape_zyx = grid_shape((first.columns, first.rows, slices), first.path.name, max_voxels)
    return frame(shape_zyx, first.position_lps, steps, first.path.name, EXPORT_AGAIN)
