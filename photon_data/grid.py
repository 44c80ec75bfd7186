"""The target grid of a scan: where it lies, what of the scan it cuts off, and which native voxels each of its voxels
samples.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from photon_data.recipe import Recipe
from photon_data.volume import Geometry

# A scan counts as axis-aligned when no voxel of it is further than this from the aligned grid: at 1000 HU/mm, 0.01 HU.
ALIGNED_MM = 1e-5


class AxisMap(NamedTuple):
    """How the output voxels start..stop of one axis sample the input: x[low] + weight * (x[high] - x[low])."""

    start: int
    stop: int
    low: np.ndarray
    high: np.ndarray
    weight: np.ndarray


def target_grid(native: Geometry, recipe: Recipe) -> Geometry:
    """Return the recipe's grid, direction identity in LPS (ITK's "RAI"), centred on the centre of the scan's field of
    view.
    """
    return Geometry.axis_aligned(recipe.shape_zyx, recipe.spacing_mm, native.centre_lps)


def model_grid(grid: Geometry, shape_zyx: tuple[int, int, int]) -> Geometry:
    """Return the grid of `shape_zyx` voxels that covers the same box as `grid` (align_corners=False)."""
    spacing = np.asarray(grid.spacing_zyx_mm) * np.asarray(grid.shape_zyx) / np.asarray(shape_zyx)
    return Geometry.axis_aligned(shape_zyx, spacing, grid.centre_lps)


def aligned_axes(native: Geometry) -> tuple[int, int, int] | None:
    """Return, for each array axis of the scan, the axis (z, y, x) of an LPS-aligned array it runs along; None where
    oblique.
    """
    steps = np.abs(np.asarray(native.steps_lps))
    world = steps.argmax(axis=1)
    stray = steps.copy()
    stray[np.arange(3), world] = 0
    drift_mm = (stray * np.asarray(native.shape_zyx)[:, None]).sum(axis=0).max()
    if sorted(world) != [0, 1, 2] or drift_mm > ALIGNED_MM:
        return None
    a, b, c = (2 - int(w) for w in world)
    return a, b, c


def grid_to_native(native: Geometry, grid: Geometry) -> np.ndarray:
    """Return the matrix [4, 4] from a voxel index (z, y, x, 1) of the grid to the native index that it samples."""
    matrix = np.eye(4)
    origin = native.index(grid.origin_lps)
    matrix[:3, 3] = origin
    matrix[:3, :3] = (native.index(grid.world(np.eye(3))) - origin).T
    return matrix


def axis_map(position: np.ndarray, n_in: int) -> AxisMap:
    """Return the map of output voxels that sample an input axis of `n_in` voxels at `position` (float64 index,
    monotonic).

    As in ITK, index i covers [i - 0.5, i + 0.5): outputs in the outer half voxel repeat the edge value, those beyond
    are left out (start..stop). Rounding to 1e-9 makes a voxel exactly on the rim fall the same way on every machine.
    """
    position = np.round(position, 9)
    inside = np.flatnonzero((position >= -0.5) & (position < n_in - 0.5))
    start, stop = (int(inside[0]), int(inside[-1]) + 1) if len(inside) else (0, 0)
    return AxisMap(start, stop, *_neighbours(position[start:stop], n_in))


def resize_map(n_out: int, n_in: int) -> AxisMap:
    """Return the map of a linear resize with align_corners=False: positions beyond the outer voxel centres repeat the
    edge.
    """
    position = (np.arange(n_out) + 0.5) * (n_in / n_out) - 0.5
    return AxisMap(0, n_out, *_neighbours(position, n_in))


def _neighbours(position: np.ndarray, n_in: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    position = np.clip(position, 0, n_in - 1)
    low = np.floor(position).astype(np.intp)
    return low, np.minimum(low + 1, n_in - 1), (position - low).astype(np.float32)


def margins_mm(native: Geometry, grid: Geometry) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (cut_mm, pad_mm): per world axis x, y, z the mm at its [low, high] end.

    cut: of the scan that lie outside of the grid. pad: of the grid that lie outside of the scan. x grows to the
    patient's left, y to the back, z to the head. An oblique scan is measured by the box around its corners.
    """
    scan, box = native.corners_lps(), grid.corners_lps()
    low, high = scan.min(0) - box.min(0), box.max(0) - scan.max(0)
    ends = np.stack([low, high], -1).round(3) + 0.0
    cut, pad = np.maximum(-ends, 0) + 0.0, np.maximum(ends, 0)
    return tuple({axis: margin[i].tolist() for i, axis in enumerate("xyz")} for margin in (cut, pad))  # type: ignore[return-value]
