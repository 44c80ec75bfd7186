"""The target grid of a scan, and the one pass of its native planes onto it: linear, float32, rounded to nearest.

Axis-aligned scans are streamed plane by plane through separable interpolation, so memory does not grow with their
length. Oblique, sheared or to-be-smoothed scans go through SimpleITK's general resampler, whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from photon_data.errors import refusal
from photon_data.recipe import Recipe
from photon_data.volume import Geometry

# A scan counts as axis-aligned when no voxel of it is further than this from the aligned grid: at 1000 HU/mm, 0.01 HU.
ALIGNED_MM = 1e-5
# How finely the body is looked for, and what is denser than lung, noise included.
BODY_STEP_MM, BODY_HU = 4.0, -300
# The spacing of a whole field, and how large one may be: 0.8 GB, 700 x 700 x 2700 mm.
FULL_MM, FULL_VOXELS = 1.5, 400_000_000
# SimpleITK's float32 output is made in blocks of this many planes.
BLOCK_PLANES = 64


# Grids


def target_grid(native: Geometry, recipe: Recipe, centre_lps: Any = None) -> Geometry:
    """Return the recipe's grid, direction identity in LPS (ITK's "RAI"), around `centre_lps` or the scan's centre."""
    centre = native.centre_lps if centre_lps is None else centre_lps
    return Geometry.axis_aligned(recipe.shape_zyx, recipe.spacing_mm, centre)


def full_grid(native: Geometry) -> Geometry:
    """Return the grid of FULL_MM, direction identity in LPS, around all of a scan; Refused for one that is too large.

    An oblique scan lies within it: the grid holds the box around its corners.
    """
    low, high = native.corners_lps().min(axis=0), native.corners_lps().max(axis=0)
    shape_zyx = np.maximum(np.ceil(np.round((high - low) / FULL_MM, 6)), 1)[::-1].astype(int)
    if shape_zyx.prod() > FULL_VOXELS:
        found = " x ".join(map(str, shape_zyx))
        expected = f"a field of at most {FULL_VOXELS:,} voxels of {FULL_MM} mm"
        raise refusal("too-large", "", expected, found, "check the spacing, or prepare it without --grids full")
    return Geometry.axis_aligned(shape_zyx, (FULL_MM,) * 3, (low + high) / 2)


def body_box_lps(
    planes: Iterator[np.ndarray], native: Geometry, values: Values, depths: np.ndarray | None = None
) -> np.ndarray:
    """Return the corners [low, high; x, y, z] of the box in LPS mm around the body in a scan; Refused where none is.

    The body is the largest piece of voxels denser than lung that holds together, at about 4 mm, after an opening: the
    couch is thinner, and falls off. All planes are read. `depths` as in `resample`.
    """
    import SimpleITK as sitk

    strides = np.maximum(np.asarray(BODY_STEP_MM / np.asarray(native.spacing_zyx_mm)).astype(int), 1)
    sampled = (plane[:: strides[1], :: strides[2]] for k, plane in enumerate(planes) if k % strides[0] == 0)
    dense = np.stack([values.rescale(plane.astype(np.float32)) > BODY_HU for plane in sampled])
    image = sitk.GetImageFromArray(dense.astype(np.uint8))
    pieces = sitk.ConnectedComponent(sitk.BinaryMorphologicalOpening(image, (1, 1, 1)))
    largest = sitk.GetArrayFromImage(sitk.RelabelComponent(pieces)) == 1
    if not largest.any():
        found, remedy = f"nothing denser than {BODY_HU} HU", "--set centre=scan takes the field of view's centre"
        raise refusal("no-body", "", "a body to put the grid around", found, remedy)
    index = np.argwhere(largest) * strides.astype(float)
    if depths is not None:
        index[:, 0] = depths[index[:, 0].astype(int)]
    world = native.world(index)
    return np.stack([world.min(axis=0), world.max(axis=0)]).round(3)


def model_grid(grid: Geometry, shape_zyx: tuple[int, int, int]) -> Geometry:
    """Return the grid of `shape_zyx` voxels that covers the same box as `grid` (align_corners=False)."""
    spacing = np.asarray(grid.spacing_zyx_mm) * np.asarray(grid.shape_zyx) / np.asarray(shape_zyx)
    return Geometry.axis_aligned(shape_zyx, spacing, grid.centre_lps)


def aligned_axes(native: Geometry) -> tuple[int, ...] | None:
    """Return, for each array axis of the scan, the axis (z, y, x) of the grid it runs along; None where oblique."""
    steps = np.abs(np.asarray(native.steps_lps))
    world = steps.argmax(axis=1)
    steps[np.arange(3), world] = 0
    drift_mm = (steps * np.asarray(native.shape_zyx)[:, None]).sum(axis=0).max()
    return tuple((2 - world).tolist()) if sorted(world) == [0, 1, 2] and drift_mm <= ALIGNED_MM else None


def grid_to_native(native: Geometry, grid: Geometry) -> np.ndarray:
    """Return the matrix [4, 4] from a voxel index (z, y, x, 1) of the grid to the native index that it samples."""
    matrix = np.eye(4)
    matrix[:3, 3] = native.index(grid.origin_lps)
    matrix[:3, :3] = (native.index(grid.world(np.eye(3))) - matrix[:3, 3]).T
    return matrix


def margins_mm(native: Geometry, grid: Geometry) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return (cut_mm, pad_mm): per world axis x, y, z the mm at its [low, high] end.

    cut: of the scan that lie outside of the grid. pad: of the grid that lie outside of the scan. x grows to the
    patient's left, y to the back, z to the head. An oblique scan is measured by the box around its corners.
    """
    scan, box = native.corners_lps(), grid.corners_lps()
    ends = np.stack([scan.min(0) - box.min(0), box.max(0) - scan.max(0)], -1).round(3) + 0.0
    cut, pad = np.maximum(-ends, 0) + 0.0, np.maximum(ends, 0)
    return dict(zip("xyz", cut.tolist(), strict=True)), dict(zip("xyz", pad.tolist(), strict=True))


# One pass


@dataclass(frozen=True)
class Values:
    """From stored values to int16: HU = slope * stored + intercept, rounded, clipped to window_hu."""

    slope: float
    intercept: float
    window_hu: tuple[float, float]
    pad_hu: float

    @property
    def pad_stored(self) -> float:
        """The stored value that stands for pad_hu."""
        return (self.pad_hu - self.intercept) / self.slope

    def rescale(self, stored: np.ndarray) -> np.ndarray:
        """Turn float32 stored values into HU, in place."""
        if self.slope != 1:
            stored *= np.float32(self.slope)
        if self.intercept != 0:
            stored += np.float32(self.intercept)
        return stored

    def to_int16(self, hu: np.ndarray, out: np.ndarray) -> None:
        """Write float32 HU (which is overwritten) into the int16 array `out`, rounded to nearest and clipped."""
        np.clip(np.rint(hu, out=hu), *self.window_hu, out=hu)
        np.copyto(out, hu, casting="unsafe")


def voxels_between(native: Geometry, grid: Geometry, spans: np.ndarray) -> int:
    """Return how many voxels of `grid` lie in the scan and strictly within one of `spans` [n, 2] along its axis 0."""
    matrix, ends, count = np.round(grid_to_native(native, grid), 12), np.sort(spans.ravel()), 0
    for z in range(grid.shape_zyx[0]):
        along = [np.float64(z), *np.ogrid[: grid.shape_zyx[1], : grid.shape_zyx[2]]]
        # An axis that does not matter is left out: of an aligned scan this is one number, a row, a column.
        depth, row, column = (
            np.round(m[3] + sum((m[a] * along[a] for a in range(3) if m[a]), np.zeros((1, 1))), 9) for m in matrix[:3]
        )
        before = np.searchsorted(ends, depth)
        within = (before % 2 == 1) & (np.searchsorted(ends, depth, "right") == before)
        for index, size in ((row, native.shape_zyx[1]), (column, native.shape_zyx[2])):
            within = within & (index >= -0.5) & (index < size - 0.5)
        count += int(np.count_nonzero(np.broadcast_to(within, grid.shape_zyx[1:])))
    return count


def resample(
    planes: Iterator[np.ndarray],
    native: Geometry,
    grid: Geometry,
    values: Values,
    antialias: bool,
    depths: np.ndarray | None = None,
) -> np.ndarray:
    """Return the int16 array [z, y, x] of the scan on `grid`.

    All planes are read, so that the reader checks the end of the file. `depths` are where the planes lie along axis 0
    of `native`, ascending from 0 to its last index, where they are not one at each index.
    """
    axes = aligned_axes(native)
    blur = _blur_voxels(native, grid) if antialias else np.zeros(3)
    if axes is None or blur.any():
        planes = planes if depths is None else _evened_out(planes, depths)
        return _resample_whole(planes, native, grid, values, blur)
    return _resample_streamed(planes, native, grid, values, axes, depths)


def _evened_out(planes: Iterator[np.ndarray], depths: np.ndarray) -> Iterator[np.ndarray]:
    """Yield a plane for each whole depth: float32, linear between the planes at its two neighbours in `depths`."""
    last, last_depth, whole = np.empty(0), 0.0, 0
    for depth, plane in zip(depths, planes, strict=True):
        plane = plane.astype(np.float32)  # a copy: the next one may reuse the buffer
        while whole <= depth:
            weight = (whole - last_depth) / (depth - last_depth) if whole < depth else 1.0
            yield plane if weight == 1 else last + np.float32(weight) * (plane - last)
            whole += 1
        last, last_depth = plane, depth


def _resample_streamed(
    planes: Iterator[np.ndarray],
    native: Geometry,
    grid: Geometry,
    values: Values,
    axes: tuple[int, ...],
    depths: np.ndarray | None,
) -> np.ndarray:
    """Stream the planes of a scan whose array axes run along the grid's axes `axes`: two planes are held at a time.

    As in ITK, native index i covers [i - 0.5, i + 0.5): voxels of the grid in the scan's outer half voxel repeat the
    edge value, those beyond are padding. Rounding to 1e-9 makes a voxel exactly on the rim fall the same way on every
    machine.
    """
    matrix = grid_to_native(native, grid)
    spans, maps = [], []
    for a, (axis, n_in) in enumerate(zip(axes, native.shape_zyx, strict=True)):
        position = np.round(matrix[a, 3] + matrix[a, axis] * np.arange(grid.shape_zyx[axis]), 9)
        within = np.flatnonzero((position >= -0.5) & (position < n_in - 0.5))
        spans.append(slice(within[0], within[-1] + 1) if len(within) else slice(0))
        if a == 0 and depths is not None:
            n_in, position = len(depths), np.interp(position, depths, np.arange(len(depths)))
        maps.append(_axis_map(position[spans[a]], n_in))
    depth, rows, columns = maps
    array = np.full(grid.shape_zyx, np.rint(values.pad_hu), np.int16)
    inside = array.transpose(axes)[tuple(spans)]
    interpolate = PlaneInterpolator(rows, columns, native.shape_zyx[1:])
    below, here, scratch = (np.empty(inside.shape[1:], np.float32) for _ in range(3))
    needed = {*depth.low, *depth.high}
    for k, plane in enumerate(planes):
        if k not in needed:
            continue
        below, here = here, below
        values.rescale(interpolate(plane, here))
        for i in np.flatnonzero(depth.high == k):
            np.copyto(scratch, here)
            start = here if depth.low[i] == k else below
            values.to_int16(_lerp(start, scratch, depth.weight[i], scratch), inside[i])
    return array


def _resample_whole(
    planes: Iterator[np.ndarray], native: Geometry, grid: Geometry, values: Values, blur_voxels: np.ndarray
) -> np.ndarray:
    """Resample a scan of any affine geometry with SimpleITK: its grid becomes index space, the affine a transform."""
    import SimpleITK as sitk

    first = next(planes)
    whole = np.empty(native.shape_zyx, np.float32 if first.dtype.kind == "f" else first.dtype)
    whole[0] = first
    for k, plane in enumerate(planes, 1):
        whole[k] = plane
    image = sitk.GetImageFromArray(whole)  # origin 0, spacing 1: its coordinates are voxel indices
    del whole
    if blur_voxels.any():
        image = sitk.DiscreteGaussian(sitk.Cast(image, sitk.sitkFloat32), (blur_voxels[::-1] ** 2).tolist())
    to_index = sitk.AffineTransform(3)
    inverse = np.linalg.inv(np.asarray(native.steps_lps)).T[::-1]
    to_index.SetMatrix(inverse.ravel().tolist())
    to_index.SetTranslation((-inverse @ np.asarray(native.origin_lps)).tolist())
    spacing_xyz, identity = grid.spacing_zyx_mm[::-1], np.eye(3).ravel().tolist()
    array = np.empty(grid.shape_zyx, np.int16)
    for z in range(0, len(array), BLOCK_PLANES):
        block = array[z : z + BLOCK_PLANES]
        place = block.shape[::-1], to_index, sitk.sitkLinear, grid.world((z, 0, 0)).tolist(), spacing_xyz, identity
        sampled = sitk.Resample(image, *place, values.pad_stored, sitk.sitkFloat32)
        values.to_int16(values.rescale(sitk.GetArrayFromImage(sampled)), block)
    return array


def _blur_voxels(native: Geometry, grid: Geometry) -> np.ndarray:
    """Return the Gaussian sigma per array axis, in native voxels, that leaves what the target spacing can hold.

    sigma = sqrt(f^2 - 1) / (2 sqrt(2 ln 2)), f = target / native spacing (Cardoso et al., MICCAI 2015); 0 where f < 1.
    """
    world = np.abs(np.asarray(native.steps_lps)).argmax(axis=1)
    factor = np.asarray(grid.spacing_zyx_mm)[2 - world] / np.asarray(native.spacing_zyx_mm)
    return np.sqrt(np.maximum(factor**2 - 1, 0)) / np.sqrt(8 * np.log(2))


def resize(array: np.ndarray, shape_zyx: tuple[int, int, int]) -> np.ndarray:
    """Return the int16 array [z, y, x] resized trilinearly (align_corners=False, no smoothing), rounded to nearest."""
    depth, rows, columns = (
        _axis_map((np.arange(n_out) + 0.5) * (n_in / n_out) - 0.5, n_in)
        for n_out, n_in in zip(shape_zyx, array.shape, strict=True)
    )
    interpolate = PlaneInterpolator(rows, columns, array.shape[1:])
    out, flat = np.empty(shape_zyx, np.int16), np.empty(shape_zyx[1:], np.float32)
    low, high = (np.empty(array.shape[1:], np.float32) for _ in range(2))
    for i, weight in enumerate(depth.weight):
        np.copyto(low, array[depth.low[i]])
        np.copyto(high, array[depth.high[i]])
        interpolate(_lerp(low, high, weight, low), flat)
        np.copyto(out[i], np.rint(flat, out=flat), casting="unsafe")
    return out


class AxisMap(NamedTuple):
    """How the output voxels along one axis sample the input: x[low] + weight * (x[high] - x[low])."""

    low: np.ndarray
    high: np.ndarray
    weight: np.ndarray


def _axis_map(position: np.ndarray, n_in: int) -> AxisMap:
    """Return how outputs sample `n_in` voxels at `position` (float64 index); beyond the outer ones, the edge value."""
    position = np.clip(position, 0, n_in - 1)
    low = np.floor(position).astype(np.intp)
    return AxisMap(low, np.minimum(low + 1, n_in - 1), (position - low).astype(np.float32))


class PlaneInterpolator:
    """Linear interpolation of planes of `shape` [y, x] along both axes, in float32 buffers that it owns and reuses."""

    def __init__(self, rows: AxisMap, columns: AxisMap, shape: tuple[int, ...]) -> None:
        self.rows, self.columns = rows, columns
        self.plane = np.empty(shape, np.float32)
        self.low_rows, self.high_rows = (np.empty((len(rows.low), shape[1]), np.float32) for _ in range(2))
        self.high = np.empty((len(rows.low), len(columns.low)), np.float32)

    def __call__(self, plane: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Return `out` [rows, columns] float32, filled with the plane's values at the mapped positions."""
        np.copyto(self.plane, plane, casting="unsafe")  # once; mixed types cost every later pass a third more
        np.take(self.plane, self.rows.low, axis=0, out=self.low_rows, mode="clip")
        np.take(self.plane, self.rows.high, axis=0, out=self.high_rows, mode="clip")
        tall = _lerp(self.low_rows, self.high_rows, self.rows.weight[:, None], self.low_rows)
        np.take(tall, self.columns.low, axis=1, out=out, mode="clip")
        np.take(tall, self.columns.high, axis=1, out=self.high, mode="clip")
        return _lerp(out, self.high, self.columns.weight, out)


def _lerp(low: np.ndarray, high: np.ndarray, weight: np.ndarray | np.float32, out: np.ndarray) -> np.ndarray:
    """Return low + weight * (high - low), float32, in `out` (may be `low`); `high` is used up."""
    high -= low
    high *= weight
    return np.add(low, high, out=out)
