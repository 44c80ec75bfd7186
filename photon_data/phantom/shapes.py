"""Solid shapes in world coordinates (LPS millimetres), told point by point, so that any scan geometry samples the same body.

`contains(x, y, z)` takes three arrays that broadcast against each other: on an axis-aligned grid they are three short vectors and
only their combination is volume-sized.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

Vector = tuple[float, float, float]
EVERYWHERE = np.array([[-np.inf] * 3, [np.inf] * 3])


@dataclass(frozen=True)
class Shape:
    """A set of points. `a & b`, `a | b` and `a - b` are intersection, union and difference.

    `bounds_lps` is a box [[low x, y, z], [high x, y, z]] around it, infinite where the shape has no end.
    """

    bounds_lps: np.ndarray
    contains: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]

    def __and__(self, other: Shape) -> Shape:
        low = np.maximum(self.bounds_lps[0], other.bounds_lps[0])
        high = np.minimum(self.bounds_lps[1], other.bounds_lps[1])
        return Shape(np.array([low, high]), lambda x, y, z: self.contains(x, y, z) & other.contains(x, y, z))

    def __or__(self, other: Shape) -> Shape:
        low = np.minimum(self.bounds_lps[0], other.bounds_lps[0])
        high = np.maximum(self.bounds_lps[1], other.bounds_lps[1])
        return Shape(np.array([low, high]), lambda x, y, z: self.contains(x, y, z) | other.contains(x, y, z))

    def __sub__(self, other: Shape) -> Shape:
        return Shape(self.bounds_lps, lambda x, y, z: self.contains(x, y, z) & ~other.contains(x, y, z))


def ellipsoid(centre_lps: Vector, semi_axes_mm: Vector) -> Shape:
    """All points within `semi_axes_mm` (along x, y, z) of the centre."""
    (cx, cy, cz), (a, b, c) = centre_lps, semi_axes_mm
    return Shape(
        _box(centre_lps, semi_axes_mm),
        lambda x, y, z: ((x - cx) / a) ** 2 + ((y - cy) / b) ** 2 + ((z - cz) / c) ** 2 <= 1,
    )


def column(centre_lps: Vector, semi_axes_mm: Vector) -> Shape:
    """An upright column whose cross-section |x/a|^3 + |y/b|^3 <= 1 is a little squarer than an ellipse, like a torso."""
    (cx, cy, cz), (a, b, c) = centre_lps, semi_axes_mm
    return Shape(
        _box(centre_lps, semi_axes_mm),
        lambda x, y, z: (_cube(np.abs((x - cx) / a)) + _cube(np.abs((y - cy) / b)) <= 1) & (np.abs(z - cz) <= c),
    )


def half_space(point_lps: Vector, normal: Vector) -> Shape:
    """The side of the plane through `point_lps` that `normal` looks to; everything for a normal of zeros."""
    (px, py, pz), (nx, ny, nz) = point_lps, normal
    return Shape(EVERYWHERE, lambda x, y, z: (x - px) * nx + (y - py) * ny + (z - pz) * nz >= 0)


def bands(point_lps: Vector, normal: Vector, period_mm: float, share: float) -> Shape:
    """Endless parallel slabs, one every `period_mm` along the unit `normal`, each filling `share` of it: ribs, vertebrae."""
    (px, py, pz), (nx, ny, nz) = point_lps, normal
    return Shape(
        EVERYWHERE,
        lambda x, y, z: np.mod((x - px) * nx + (y - py) * ny + (z - pz) * nz, period_mm) < share * period_mm,
    )


def block(centre_lps: Vector, edges_lps: np.ndarray) -> Shape:
    """A box with any three edge vectors (rows of `edges_lps`, mm), rotated or sheared: a field of view."""
    (cx, cy, cz), across = centre_lps, np.linalg.inv(edges_lps.T)

    def contains(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        parts = [np.abs((x - cx) * nx + (y - cy) * ny + (z - cz) * nz) <= 0.5 for nx, ny, nz in across]
        return parts[0] & parts[1] & parts[2]

    return Shape(_box(centre_lps, np.abs(edges_lps).sum(axis=0) / 2), contains)


class NoRoomError(ValueError):
    """A lesion does not fit where it was to be."""


class Sphere(NamedTuple):
    """A place for a round lesion."""

    centre_lps: Vector
    radius_mm: float


def place_sphere(rng: np.random.Generator, home: Shape, radius_mm: float, gap_mm: float, taken: Sequence[Sphere]) -> Sphere:
    """A sphere that lies in `home` with `gap_mm` to spare on all sides, and twice that from every sphere in `taken`.

    NoRoomError if none of 10,000 random places fits.
    """
    centres = rng.uniform(home.bounds_lps[0], home.bounds_lps[1], (10_000, 3))
    for other in taken:
        distance = np.linalg.norm(centres - other.centre_lps, axis=1)
        centres = centres[distance > radius_mm + 2 * gap_mm + other.radius_mm]
    centres = centres[home.contains(*centres.T)]
    reach = _directions() * (radius_mm + gap_mm)
    for start in range(0, len(centres), 500):  # most often one of the first fits
        surface = centres[start : start + 500, None] + reach
        fits = home.contains(*np.moveaxis(surface, -1, 0)).all(axis=1)
        if fits.any():
            x, y, z = centres[start + np.argmax(fits)].tolist()
            return Sphere((x, y, z), radius_mm)
    raise NoRoomError(f"no room for a sphere of radius {radius_mm} mm in {home.bounds_lps.round().tolist()}")


def _directions() -> np.ndarray:
    """The 26 unit vectors [26, 3] from the middle of a 3 x 3 x 3 cube to its other cells."""
    steps = np.stack(np.meshgrid(*[[-1, 0, 1]] * 3), axis=-1).reshape(-1, 3)
    steps = steps[np.any(steps, axis=1)]
    return steps / np.linalg.norm(steps, axis=1, keepdims=True)


def _box(centre_lps: Vector, half_mm: Vector | np.ndarray) -> np.ndarray:
    return np.array(centre_lps) + np.outer([-1, 1], half_mm)


def _cube(u: np.ndarray) -> np.ndarray:
    return u * u * u  # u**3 goes through pow, twenty times slower
