"""Native planes -> the target grid in one pass, linear, float32, rounded to nearest.

Axis-aligned scans are streamed plane by plane through separable interpolation, so memory does not grow with their
length. Oblique, sheared or to-be-smoothed scans go through SimpleITK's general resampler, whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from photon_data.grid import AxisMap, aligned_axes, axis_map, grid_to_native, resize_map
from photon_data.recipe import Recipe
from photon_data.volume import Geometry

# SimpleITK's float32 output is made in blocks of this many planes.
BLOCK_PLANES = 64


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
        np.rint(hu, out=hu)
        np.clip(hu, *self.window_hu, out=hu)
        np.copyto(out, hu, casting="unsafe")


class PlaneInterpolator:
    """Linear interpolation of planes of `shape` [y, x] along both axes, in float32 buffers that it owns and reuses."""

    def __init__(self, rows: AxisMap, columns: AxisMap, shape: tuple[int, int]) -> None:
        self.rows, self.columns = rows, columns
        n_rows, n_columns = len(rows.low), len(columns.low)
        self.plane = np.empty(shape, np.float32)
        self.low_rows, self.high_rows = (np.empty((n_rows, shape[1]), np.float32) for _ in range(2))
        self.high = np.empty((n_rows, n_columns), np.float32)

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


def resample(
    planes: Iterator[np.ndarray], native: Geometry, grid: Geometry, values: Values, recipe: Recipe
) -> np.ndarray:
    """Return the int16 array [z, y, x] of the scan on `grid`; every plane is consumed, even those that the grid cuts
    off.
    """
    axes = aligned_axes(native)
    blur = _blur_voxels(native, grid) if recipe.antialias else np.zeros(3)
    if axes is None or blur.any():
        return _resample_whole(planes, native, grid, values, blur)
    return _resample_streamed(planes, native, grid, values, axes)


def _resample_streamed(
    planes: Iterator[np.ndarray], native: Geometry, grid: Geometry, values: Values, axes: tuple[int, int, int]
) -> np.ndarray:
    """Stream the planes of a scan whose array axes run along the grid's axes `axes`: two planes are held at a time."""
    matrix = grid_to_native(native, grid)
    maps = [
        axis_map(matrix[a, 3] + matrix[a, axis] * np.arange(grid.shape_zyx[axis]), native.shape_zyx[a])
        for a, axis in enumerate(axes)
    ]
    depth, rows, columns = maps
    array = np.full(grid.shape_zyx, np.rint(values.pad_hu), np.int16)
    inside = array.transpose(axes)[tuple(slice(m.start, m.stop) for m in maps)]
    interpolate = PlaneInterpolator(rows, columns, native.shape_zyx[1:])
    below, here, scratch = (np.empty(inside.shape[1:], np.float32) for _ in range(3))
    needed = set(depth.low) | set(depth.high)
    for k, plane in enumerate(planes):
        if k not in needed:
            continue
        below, here = here, below
        values.rescale(interpolate(plane, here))
        for i in np.flatnonzero(depth.high == k):
            start = here if depth.low[i] == k else below
            np.copyto(scratch, here)
            values.to_int16(_lerp(start, scratch, depth.weight[i], scratch), inside[i])
    return array


def _resample_whole(
    planes: Iterator[np.ndarray], native: Geometry, grid: Geometry, values: Values, blur_voxels: np.ndarray
) -> np.ndarray:
    """Resample a scan of any affine geometry with SimpleITK: its grid becomes index space, the affine a transform."""
    import SimpleITK as sitk

    planes = iter(planes)
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
    array = np.empty(grid.shape_zyx, np.int16)
    for z in range(0, grid.shape_zyx[0], BLOCK_PLANES):
        block = array[z : z + BLOCK_PLANES]
        sampled = sitk.Resample(
            image,
            block.shape[::-1],
            to_index,
            sitk.sitkLinear,
            grid.world((z, 0, 0)).tolist(),
            grid.spacing_zyx_mm[::-1],
            np.eye(3).ravel().tolist(),
            values.pad_stored,
            sitk.sitkFloat32,
        )
        values.to_int16(values.rescale(sitk.GetArrayFromImage(sampled)), block)
    return array


def _blur_voxels(native: Geometry, grid: Geometry) -> np.ndarray:
    """Return the Gaussian sigma per array axis, in native voxels, that leaves what the target spacing can hold.

    sigma = sqrt(f^2 - 1) / (2 sqrt(2 ln 2)), f = target / native spacing (Cardoso et al., MICCAI 2015); 0 where not
    down-sampled.
    """
    world = np.abs(np.asarray(native.steps_lps)).argmax(axis=1)
    factor = np.asarray(grid.spacing_zyx_mm)[2 - world] / np.asarray(native.spacing_zyx_mm)
    return np.sqrt(np.maximum(factor**2 - 1, 0)) / np.sqrt(8 * np.log(2))


def resize(array: np.ndarray, shape_zyx: tuple[int, int, int]) -> np.ndarray:
    """Return the int16 array [z, y, x] resized trilinearly (align_corners=False, no smoothing), rounded to nearest."""
    depth, rows, columns = (resize_map(n_out, n_in) for n_out, n_in in zip(shape_zyx, array.shape, strict=True))
    interpolate = PlaneInterpolator(rows, columns, array.shape[1:])
    out = np.empty(shape_zyx, np.int16)
    flat = np.empty(shape_zyx[1:], np.float32)
    low, high = (np.empty(array.shape[1:], np.float32) for _ in range(2))
    for i, weight in enumerate(depth.weight):
        np.copyto(low, array[depth.low[i]])
        np.copyto(high, array[depth.high[i]])
        interpolate(_lerp(low, high, weight, low), flat)
        np.copyto(out[i], np.rint(flat, out=flat), casting="unsafe")
    return out
