"""The target grid of a scan, and the one pass of its native planes onto it: linear, float32, rounded to nearest.

Axis-aligned scans are streamed plane by plane through separable interpolation, so memory does not grow with their
length. Of oblique and sheared scans, what the grid reaches is held. Smoothing is streamed too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from photon_data.errors import refusal
from photon_data.interpolate import Interpolator, affine, axis_map, between, gaussian, resize, roomy, smoothed
from photon_data.recipe import Recipe
from photon_data.volume import Geometry, Volume

# A scan counts as axis-aligned when no voxel of it is further than this from the aligned grid: at 1000 HU/mm, 0.01 HU.
ALIGNED_MM = 1e-5
# How finely the body is looked for, and what is denser than lung, noise included.
BODY_STEP_MM, BODY_HU = 4.0, -300
# The spacing of a whole field, and how large one may be: 0.8 GB, 700 x 700 x 2700 mm.
FULL_MM, FULL_VOXELS = 1.5, 400_000_000


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
    if depths is not None and (axes is None or blur.any()):
        planes, depths = _evened_out(planes, depths), None
    if blur.any():
        planes = _smoothed(planes, [gaussian(sigma**2) for sigma in blur])
    if axes is None:
        return _resample_whole(planes, native, grid, values)
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


def _smoothed(planes: Iterator[np.ndarray], weights: list[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the planes, float32, smoothed along each axis; as many are held as weights along axis 0 reach."""
    reach = len(weights[0]) - 1
    both = np.concatenate([weights[0][:0:-1], weights[0]])
    held: list[np.ndarray] = []
    for plane in planes:
        flat = smoothed(smoothed(plane.astype(np.float32), weights[1], 0), weights[2], 1)
        held = [*(held or [flat] * reach), flat][-len(both) :]
        if len(held) == len(both):
            yield _weighted_sum(held, both)
    for _ in range(reach):
        held = [*held, held[-1]][-len(both) :]
        if len(held) == len(both):
            yield _weighted_sum(held, both)


def _weighted_sum(planes: list[np.ndarray], weights: np.ndarray) -> np.ndarray:
    total = planes[0] * weights[0]
    for plane, weight in zip(planes[1:], weights[1:], strict=True):
        total += plane * weight
    return total


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
        maps.append(axis_map(position[spans[a]], n_in))
    depth, rows, columns = maps
    array = np.empty(grid.shape_zyx, np.int16)
    turned = array.transpose(axes)
    for a, span in enumerate(spans):
        for beyond in (slice(span.start), slice(span.stop, None)):
            turned[(slice(None),) * a + (beyond,)] = np.rint(values.pad_hu)
    inside = turned[tuple(spans)]
    interpolate = Interpolator(rows, columns, native.shape_zyx[1:], values.slope, values.intercept)
    below, here = (np.empty(inside.shape[1:], np.float32) for _ in range(2))
    needed = {*depth.low, *depth.high}
    for k, plane in enumerate(planes):
        if k not in needed:
            continue
        below, here = here, below
        interpolate(plane, here)
        for i in np.flatnonzero(depth.high == k):
            start = here if depth.low[i] == k else below
            between(start, here, depth.weight[i], values.window_hu, inside[i])
    return array


def _resample_whole(planes: Iterator[np.ndarray], native: Geometry, grid: Geometry, values: Values) -> np.ndarray:
    """Resample a scan of any affine geometry. Only the part that the grid reaches is held, 16-bit integers as such."""
    matrix = grid_to_native(native, grid)[:3]
    corners = product(*((0, n - 1) for n in grid.shape_zyx))
    ends = np.stack([(matrix * [*corner, 1]).sum(axis=1) for corner in corners], axis=1)
    sizes = np.array(native.shape_zyx)
    first = np.clip(np.floor(ends.min(axis=1)) - 1, 0, np.maximum(sizes - 2, 0)).astype(int)
    last = np.clip(np.ceil(ends.max(axis=1)) + 2, first + 2, sizes).astype(int)
    array = np.full(grid.shape_zyx, np.rint(values.pad_hu), np.int16)  # first: what is freed sooner lies behind it
    part, whole = tuple(map(slice, first, last)), np.empty(0)
    for k, plane in enumerate(planes):
        if k == 0:
            kept = plane.dtype if plane.dtype == np.uint16 else np.promote_types(plane.dtype, np.int16)
            whole = roomy(tuple(last - first), kept if kept.itemsize == 2 else np.dtype(np.float32))
        if first[0] <= k < last[0]:
            whole[k - first[0]] = plane[part[1:]]
    matrix[:, 3] -= first
    for axis in np.flatnonzero(sizes == 1):  # made two voxels long, each half as thick
        whole = np.repeat(whole, 2, axis)
        matrix[axis] = 2 * matrix[axis] + [0, 0, 0, 0.5]
    affine(whole, matrix, values.slope, values.intercept, values.window_hu, array)
    return array


def on_model_grid(array: np.ndarray, grid: Geometry, recipe: Recipe) -> Volume:
    """Return the int16 volume on the recipe's model grid; smoothed before where the recipe smooths."""
    model = model_grid(grid, recipe.model_shape_zyx)
    if not recipe.antialias:
        return Volume(resize(array, recipe.model_shape_zyx), model)
    values = Values(1.0, 0.0, recipe.window_hu, recipe.pad_hu)
    return Volume(resample(iter(array), grid, model, values, antialias=True), model)


def _blur_voxels(native: Geometry, grid: Geometry) -> np.ndarray:
    """Return the Gaussian sigma per array axis, in native voxels, that leaves what the target spacing can hold.

    sigma = sqrt(f^2 - 1) / (2 sqrt(2 ln 2)), f = target / native spacing (Cardoso et al., MICCAI 2015); 0 where f < 1.
    """
    world = np.abs(np.asarray(native.steps_lps)).argmax(axis=1)
    factor = np.asarray(grid.spacing_zyx_mm)[2 - world] / np.asarray(native.spacing_zyx_mm)
    return np.sqrt(np.maximum(factor**2 - 1, 0)) / np.sqrt(8 * np.log(2))
