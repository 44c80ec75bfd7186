"""Scans of a body as the world saves them: any axis order, oblique or tilted, anisotropic, in several data types."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from photon_data.phantom.body import Body, Layer, Shape, block
from photon_data.phantom.plan import Slot, deal
from photon_data.volume import Geometry

CROP_MM = 364.0  # side of the cube around the centre of the field of view that the standard recipe keeps
SLAB = 16  # planes sampled at once: bounds the memory, changes no value
HU_RANGE = (-1024, 3071)


class Storage(NamedTuple):
    """How HU are stored: HU = slope * stored + intercept."""

    dtype: str
    slope: float = 1.0
    intercept: float = 0.0


STORAGES = (
    Storage("<i2"),
    Storage("<u2", intercept=-1024),
    Storage("<u1", slope=8, intercept=-1024),
    Storage("<f4"),
    Storage("<i2", intercept=-1024),
    Storage("<i2"),
)
SUFFIXES = (".nii.gz", ".nii", ".nii.gz")
POSES = ("straight", "oblique", "straight", "straight", "oblique", "straight", "oblique", "tilted")
WIDTHS_MM = (320, 345, 370, 400, 440, 480)
LENGTHS_MM = (315, 335, 364, 400, 450)
# Share of `size` in plane, and slice thickness: thin slices come with a coarser matrix, so that no scan grows huge.
SLICES = ((1, 5.0), (1, 4.0), (1, 3.0), (1, 2.5), (2 / 3, 1.5), (2 / 3, 1.0))


@dataclass(frozen=True)
class SimulatedScan:
    """One acquisition."""

    visible: Shape  # what the scan shows and the standard crop of it keeps
    geometry: Geometry
    axes: tuple[int, ...]  # the scanner axes (0 x, 1 y, 2 z) of the array axes, the slowest of the file first
    storage: Storage
    suffix: str
    noise_hu: float
    has_table: bool


def draw_scan(slot: Slot, rng: np.random.Generator, body: Body, size: int) -> SimulatedScan:
    """A scan of `body`, `size` voxels wide. Field of view and all else but the voxel size do not depend on `size`."""
    width_mm, length_mm = deal(slot, "width", WIDTHS_MM), deal(slot, "length", LENGTHS_MM)
    share, thickness_mm = deal(slot, "slices", SLICES)
    edges = _draw_axes(rng, deal(slot, "pose", POSES)) * [[width_mm], [width_mm], [length_mm]]
    x, y, z = (np.array(body.centre_lps) + rng.uniform((-6, -12, -5), (6, 12, 5))).tolist()
    counts = np.array([round(size * share)] * 2 + [round(length_mm / thickness_mm)])
    axes = rng.permutation(3)
    steps = (edges / counts[:, None])[axes] * rng.choice((-1, 1), 3)[:, None]
    origin = np.array((x, y, z)) - (counts[axes] - 1) / 2 @ steps
    return SimulatedScan(
        visible=block((x, y, z), edges) & block((x, y, z), CROP_MM * np.eye(3)),
        geometry=Geometry.from_arrays(counts[axes], origin, steps),
        axes=tuple(axes.tolist()),
        storage=deal(slot, "storage", STORAGES),
        suffix=deal(slot, "suffix", SUFFIXES),
        noise_hu=float(rng.uniform(8, 22)),
        has_table=bool(rng.random() < 0.7),
    )


def _draw_axes(rng: np.random.Generator, pose: str) -> np.ndarray:
    """Unit vectors (rows, LPS) of the scanner's x, y and z axis; perpendicular unless the gantry is tilted."""
    x, y, z = np.deg2rad(rng.uniform(-9, 9, 3)) * (pose == "oblique")
    cx, sx, cy, sy, cz, sz = np.cos(x), np.sin(x), np.cos(y), np.sin(y), np.cos(z), np.sin(z)
    axes = (
        np.array([[1, 0, 0], [0, cx, sx], [0, -sx, cx]])
        @ np.array([[cy, 0, -sy], [0, 1, 0], [sy, 0, cy]])
        @ np.array([[cz, sz, 0], [-sz, cz, 0], [0, 0, 1]])
    )
    tilt = np.deg2rad(rng.choice((-1, 1)) * rng.uniform(6, 14)) * (pose == "tilted")
    # The tilted gantry turns the slices about x; the table goes on moving along z.
    axes[1] = np.cos(tilt) * axes[1] + np.sin(tilt) * axes[2]
    return axes


def paint(layers: Sequence[Layer], geometry: Geometry) -> np.ndarray:
    """uint8 [shape of geometry]: 0 for air, n + 1 where layers[n] is the last one that holds the voxel's centre."""
    assert len(layers) < 255
    painted = np.zeros(geometry.shape_zyx, np.uint8)
    boxes = [_index_box(layer.shape, geometry) for layer in layers]
    for start in range(0, len(painted), SLAB):
        for value, (layer, (low, high)) in enumerate(zip(layers, boxes, strict=True), start=1):
            first, last = max(low[0], start), min(high[0], start + SLAB)
            if first < last and (low[1:] < high[1:]).all():
                box = tuple(slice(a, b) for a, b in zip((first, *low[1:]), (last, *high[1:]), strict=True))
                inside = layer.shape.contains(*_coordinates_lps(geometry, box))
                painted[box][np.broadcast_to(inside, painted[box].shape)] = value
    return painted


def _index_box(shape: Shape, geometry: Geometry) -> tuple[np.ndarray, np.ndarray]:
    """First and one past the last index, along every array axis, of the voxels that can lie in the shape."""
    corners = np.stack(np.meshgrid(*shape.bounds_lps.T, indexing="ij"), axis=-1).reshape(8, 3)
    index = geometry.index(corners)
    low, high = np.floor(index.min(axis=0)), np.ceil(index.max(axis=0)) + 1
    return low.clip(0, geometry.shape_zyx).astype(int), high.clip(0, geometry.shape_zyx).astype(int)


def _coordinates_lps(geometry: Geometry, box: tuple[slice, ...]) -> list[np.ndarray]:
    """World x, y and z of the voxels in a box, each as small as its own dependence on the axes allows."""
    coordinates = []
    for origin, steps in zip(geometry.origin_lps, zip(*geometry.steps_lps, strict=True), strict=True):
        offsets = [grid * step for grid, step in zip(np.ogrid[box], steps, strict=True) if step]
        coordinates.append(np.asarray(origin + sum(offsets[1:], offsets[0]), np.float32))
    return coordinates


def stored_planes(
    scan: SimulatedScan, painted: np.ndarray, layers: Sequence[Layer], rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """The stored values, slab by slab: HU of the layers (air -1000) with noise that is correlated within the slice."""
    hu = np.array([-1000, *(layer.hu for layer in layers)], np.float32)
    dtype = np.dtype(scan.storage.dtype)
    for start in range(0, len(painted), SLAB):
        slab = hu[painted[start : start + SLAB]]
        noise = rng.standard_normal(slab.shape, np.float32)
        for axis in (1, 2):
            if scan.axes[axis] != 2:
                noise = (noise + np.roll(noise, 1, axis)) * np.float32(np.sqrt(0.5))
        slab = slab + noise * np.float32(scan.noise_hu)
        stored = (slab.clip(*HU_RANGE) - scan.storage.intercept) / scan.storage.slope
        if dtype.kind != "f":
            stored = np.rint(stored).clip(np.iinfo(dtype).min, np.iinfo(dtype).max)
        yield stored.astype(dtype)
