"""One DICOM series -> Scan: its planes in order along the slice normal and the grid they form, or why they form none.

DICOM has no checksums: a bit flipped inside of the pixel data goes unnoticed unless a decoder trips over it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from photon_data.errors import EXPORT_AGAIN, first_few, refusal
from photon_data.readers.dicom_cache import read_headers
from photon_data.readers.dicom_file import SAME_POSITION_MM, PlaneHeader, along_normal, differing
from photon_data.readers.dicom_header import read_planes, require_pydicom
from photon_data.readers.dicom_pixels import require_decodable, stored_planes
from photon_data.readers.dicom_series import OFF_GRID_ROUNDED, ROUNDING_MM, SAME_SPACING, tolerance_mm
from photon_data.readers.stream import frame, grid_shape, wrong_values
from photon_data.recipe import ACCEPTANCES, Policy
from photon_data.scan import Change, Scan, Source, TrueSlices
from photon_data.volume import Geometry

ONE_FOLDER_EACH = "put each stack into a folder of its own"
UNEVEN = "dicom-missing-slices"


def open_series(source: Source, policy: Policy) -> Scan:
    """Return the Scan of one series: planes in order of position along the slice normal, geometry as its headers say.

    Slices at uneven distances, which the policy has repaired, come as they are, with their true positions.

    Planes hold stored values if all slices agree on slope, intercept and stored type. Otherwise they come rescaled as
    float32, with slope 1 and intercept 0. Where a header of the series declares padding, they are floats, and padding
    is NaN. MONOCHROME1 changes how a picture is shown, not its HU: it is taken as it is.
    """
    require_pydicom()
    planes: list[PlaneHeader] = []
    for path, content, error in read_headers(source.files, read_planes, source.headers):
        if error:
            raise error
        if not content.planes:
            raise refusal("dicom-no-geometry", path.name, "an image", "another kind of DICOM object", "leave it out")
        planes += content.planes
    _require_slices(planes)
    planes, geometry, slices = stack(planes, policy)
    require_decodable(planes)
    padded = any(plane.pixels.padding for plane in planes)
    if len({(plane.pixels.dtype, plane.slope, plane.intercept) for plane in planes}) > 1:
        rescaled = partial(_rescaled_planes, planes)
        scan = Scan(geometry, np.dtype(np.float32), 1.0, 0.0, rescaled, "dicom", padded=padded, rescaled=True)
    else:
        first, stored = planes[0], partial(stored_planes, planes)
        scan = Scan(geometry, first.pixels.dtype, first.slope, first.intercept, stored, "dicom", padded=padded)
    return scan if slices is None else _repaired(scan, planes, slices)


def _repaired(scan: Scan, planes: Sequence[PlaneHeader], slices: TrueSlices) -> Scan:
    """Return the scan with what is recorded of its uneven slices; the choices are what the repair took."""
    widest = max((high - low for low, high, _ in slices.gaps), default=0.0)
    missing = [count for *_, count in slices.gaps if count]
    choices = {"repair_slices": max(missing, default=0), "repair_gap_mm": round(widest, 2)}
    made = "resampled on the true positions of its slices, linearly between neighbours"
    made += f"; {sum(missing)} missing slices in {len(missing)} gap(s), {widest:.2f} mm at most" if missing else ""
    before = f"expected slices {slices.distance_mm:.2f} mm apart, found {_distances(planes, slices.distance_mm)}"
    return replace(scan, slices=slices, choices=choices, changes=(Change(UNEVEN, before, made),))


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


def stack(planes: Sequence[PlaneHeader], policy: Policy) -> tuple[list[PlaneHeader], Geometry, TrueSlices | None]:
    """Return the planes in order along the slice normal (row x column direction) and the grid [slice, row, column].

    With a tilted gantry the slice step is not parallel to the normal, and the grid is sheared. Where slices do not lie
    at one distance, and the policy repairs that, the grid has the usual distance and the slices lie in it. Refused.
    """
    _require_geometry(planes)
    _require_one_kind(planes)
    along = along_normal(planes)
    order = np.argsort(along, kind="stable")
    planes, along = [planes[i] for i in order], along[order]
    _require_one_plane_per_position(planes, along)
    positions, slices = np.array([plane.position_lps for plane in planes]), _uneven_slices(planes, policy)
    depths = np.arange(len(planes)) if slices is None else slices.depths
    # The step from one slice to the next. Less tilt than positions are rounded to is none.
    normal, length = planes[0].normal, positions[-1] - positions[0]
    straight = (length * normal).sum() * normal
    step = (straight if np.linalg.norm(length - straight) <= ROUNDING_MM else length) / depths[-1]
    aside = np.linalg.norm(positions - positions[0] - depths[:, None] * step, axis=1)
    if aside.max() > tolerance_mm(float(np.median(np.diff(along)))):
        found = f"some up to {aside.max():.2f} mm beside it"
        raise refusal("dicom-mixed", "", "slices on one straight line", found, ONE_FOLDER_EACH)
    return planes, _geometry(planes[0], round(depths[-1]) + 1, step, policy.max_voxels), slices


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


def _uneven_slices(planes: Sequence[PlaneHeader], policy: Policy) -> TrueSlices | None:
    """Return where sorted planes lie that do not lie at one distance, None where they do.

    Refused unless the policy repairs it. What lies closer than usual in the middle of others may belong to another
    volume, and is always refused; a finer part at one end is not.
    """
    along = along_normal(planes)
    gaps, extent = np.diff(along), along[-1] - along[0]
    median = float(np.median(gaps))
    if np.abs(along - np.linspace(along[0], along[-1], len(along))).max() <= tolerance_mm(median):
        return None
    usual = float(np.percentile(gaps, 50, method="lower"))
    close, missing = gaps < (1 - OFF_GRID_ROUNDED) * usual, np.rint(gaps / usual).astype(int) - 1
    widest = float(gaps.max())
    problem, accept = "", ""
    if close.any() and np.count_nonzero(np.diff(close)) != 1:
        problem = "slices that lie closer than usual may be of another volume: nothing repairs that"
    elif widest > policy.repair_gap_mm:
        problem = f"{widest:.2f} mm between slices is more than repair_gap_mm={policy.repair_gap_mm:g} allows to repair"
    elif missing.max() > policy.repair_slices:
        is_usual = missing.max() <= int(ACCEPTANCES[UNEVEN].usual or 0)
        value = "" if is_usual else f"={missing.max()}"
        accept = f"{UNEVEN}{value}"
        problem = f"--repair slices{value} resamples it on the true positions"
    if problem:
        remedy = f"export the missing slices, or one reconstruction with a constant distance; {problem}"
        raise refusal(UNEVEN, "", f"slices {median:.2f} mm apart", _distances(planes, median), remedy, accept)
    fine = float(np.percentile(gaps[close], 50, method="lower")) if close.any() else usual
    wide = [n for n, gap in enumerate(gaps) if gap > usual + tolerance_mm(usual)]
    ends = tuple((round(float(along[n]), 4), round(float(along[n + 1]), 4), int(missing[n])) for n in wide)
    return TrueSlices(tuple(along.tolist()), round(usual, 4), extent / max(1, round(extent / fine)), ends)


def _distances(planes: Sequence[PlaneHeader], usual: float) -> str:
    """Return in words which distances of sorted planes are not the usual one."""
    along = along_normal(planes)
    gaps = np.diff(along)
    off = np.abs(gaps - usual)
    odd = np.argsort(-off, kind="stable")[: np.count_nonzero(off > tolerance_mm(usual)) or 1]
    where = ", ".join(f"{gaps[i]:.2f} mm between {along[i]:.2f} and {along[i + 1]:.2f} mm" for i in sorted(odd[:3]))
    found = f"{len(odd)} other distance(s) along the slice normal: {where}"
    found += f"; {_apart(planes)}" if differing(planes) else ""
    folders = len({plane.path.parent for plane in planes})
    return found + (f"; they lie in {folders} folders" if folders > 1 else "")


def _geometry(first: PlaneHeader, slices: int, step: np.ndarray, max_voxels: int) -> Geometry:
    """Return the grid of PS3.3 C.7.6.2.1.1: down a column by the row distance, along a row by the column distance."""
    assert first.orientation is not None and first.spacing_mm is not None
    (along_row, down_column), (row_mm, column_mm) = first.orientation, first.spacing_mm
    steps = (step, down_column * row_mm, along_row * column_mm)
    shape_zyx = grid_shape((first.columns, first.rows, slices), first.path.name, max_voxels)
    return frame(shape_zyx, first.position_lps, steps, first.path.name, EXPORT_AGAIN)
