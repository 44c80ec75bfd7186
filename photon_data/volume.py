"""A volume carries its frame: voxels (z, y, x) and where each of them lies in the world, LPS millimetres."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import combinations, permutations, product
from math import acos, degrees, isfinite, sqrt
from operator import mul
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import nibabel
    import SimpleITK
    import torchio

# World axes are L, P, S. A letter says which way an array axis points: `LETTERS[world_axis][increasing]`.
LETTERS = (("R", "L"), ("A", "P"), ("I", "S"))
# What people call the low and the high end of the world axes L, P, S, and the way from one to the other.
ENDS = (("right", "left"), ("front", "back"), ("foot", "head"))
WAYS = ("right to left", "front to back", "foot to head")
# RAS (NIfTI) and LPS (DICOM, ITK) differ in the sign of the first two world axes.
RAS_LPS = np.diag([-1.0, -1.0, 1.0])
# A direction gets a second letter from 15 degrees on: "AR" leans from anterior to the right.
_SECOND_LETTER = np.sin(np.radians(15))

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Geometry:
    """Where the voxels of an array [z, y, x] lie: origin_lps + z * steps_lps[0] + y * steps_lps[1] + x * steps_lps[2].

    A step goes from one voxel centre to the next, in millimetres (L, P, S): a column of the affine. Steps need not be
    orthogonal: a tilted gantry gives a sheared grid, and it is kept as it is.

    >>> grid = photon_data.Geometry.axis_aligned((40, 32, 32), spacing_zyx_mm=(2, 1, 1), centre_lps=(0, 0, 0))
    >>> grid.world((0, 0, 0)).tolist(), grid.index((0, 0, 0)).tolist()
    ([-15.5, -15.5, -39.0], [19.5, 15.5, 15.5])
    """

    shape_zyx: tuple[int, int, int]
    origin_lps: Triple
    steps_lps: tuple[Triple, Triple, Triple]

    @classmethod
    def from_arrays(cls, shape_zyx: Any, origin_lps: Any, steps_lps: Any) -> Geometry:
        """Return the Geometry of array-likes; ValueError for a step matrix that is singular or not finite."""
        z, y, x = np.asarray(steps_lps, float).reshape(3, 3).tolist()
        origin = np.asarray(origin_lps, float).reshape(3).tolist()
        steps, (nz, ny, nx) = (_triple(z), _triple(y), _triple(x)), map(int, shape_zyx)
        if not (all(map(isfinite, (*z, *y, *x, *origin))) and abs(_determinant(*steps)) >= 1e-9):
            raise ValueError(f"expected finite, independent steps, found {[z, y, x]}, origin {origin}")
        return cls((nz, ny, nx), _triple(origin), steps)

    @classmethod
    def axis_aligned(cls, shape_zyx: Any, spacing_zyx_mm: Any, centre_lps: Any) -> Geometry:
        """Return the grid with identity direction in LPS (ITK's "RAI") whose centre lies at `centre_lps`."""
        steps = np.diag(np.asarray(spacing_zyx_mm, float))[:, ::-1]
        origin = np.asarray(centre_lps, float) - _times((np.asarray(shape_zyx) - 1) / 2, steps)
        return cls.from_arrays(shape_zyx, origin, steps)

    @cached_property
    def spacing_zyx_mm(self) -> Triple:
        """Distance between neighbouring voxel centres along z, y, x."""
        return _triple(sqrt(x * x + y * y + z * z) for x, y, z in self.steps_lps)

    @property
    def voxel_ml(self) -> float:
        """Volume of a voxel, of a sheared grid too."""
        return abs(_determinant(*self.steps_lps)) / 1000

    @property
    def centre_lps(self) -> Triple:
        """World position of the middle of the grid (between voxels where a side is even)."""
        return _triple(self.world((np.asarray(self.shape_zyx) - 1) / 2))

    @property
    def direction_xyz(self) -> np.ndarray:
        """ITK's direction matrix [3, 3]: column a is the unit world direction of index axis a in (x, y, z) order."""
        return np.asarray(_cosines(self))[::-1].T

    @property
    def affine_ras(self) -> np.ndarray:
        """NIfTI's affine [4, 4]: voxel index (x, y, z) -> RAS millimetres."""
        affine = np.eye(4)
        affine[:3, :3] = RAS_LPS @ np.asarray(self.steps_lps)[::-1].T
        affine[:3, 3] = RAS_LPS @ np.asarray(self.origin_lps)
        return affine

    @property
    def orientation(self) -> str:
        """The direction that each array axis (z, y, x) increases towards by `body_axes`, e.g. "SPL" for our stores."""
        axes = body_axes(self)
        letters = {axis: LETTERS[w][int(axes.sign[w] > 0)] for w, axis in enumerate(axes.array_axis)}
        return "".join(letters[axis] for axis in range(3))

    def world(self, index_zyx: Any) -> np.ndarray:
        """Return the LPS position [..., 3] of (fractional) voxel indices [..., 3] in z, y, x order."""
        return _times(np.asarray(index_zyx, float), np.asarray(self.steps_lps)) + np.asarray(self.origin_lps)

    def index(self, world_lps: Any) -> np.ndarray:
        """Return the fractional voxel indices [..., 3] (z, y, x) of LPS positions [..., 3]."""
        return _times(np.asarray(world_lps, float) - np.asarray(self.origin_lps), inverse(np.asarray(self.steps_lps)))

    def corners_lps(self) -> np.ndarray:
        """Return the eight outer corners [8, 3] of the field of view (voxel edges, not centres)."""
        return self.world(np.array(list(product((0, 1), repeat=3))) * self.shape_zyx - 0.5)

    @property
    def extent_lps_mm(self) -> Triple:
        """Size along x, y, z of the box around the field of view."""
        steps = zip(self.shape_zyx, self.steps_lps, strict=True)
        along = [[n * abs(mm) for mm in step] for n, step in steps]
        return _triple(map(sum, zip(*along, strict=True)))

    def is_orthogonal(self, tolerance: float = 1e-4) -> bool:
        """Tell whether the axes are perpendicular (cosine below `tolerance`): false for a tilted gantry."""
        pairs = combinations(zip(self.steps_lps, self.spacing_zyx_mm, strict=True), 2)
        return all(abs(sum(map(mul, a, b))) < tolerance * a_mm * b_mm for (a, a_mm), (b, b_mm) in pairs)

    def to_json(self) -> dict[str, Any]:
        """Return the plain dict that `from_json` reads back, with the derived spacing and orientation for people."""
        return {
            "shape_zyx": list(self.shape_zyx),
            "origin_lps": list(self.origin_lps),
            "steps_lps": [list(step) for step in self.steps_lps],
            "spacing_zyx_mm": [round(s, 6) for s in self.spacing_zyx_mm],
            "orientation_zyx": self.orientation,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Geometry:
        """Return the Geometry that `to_json` wrote."""
        return cls.from_arrays(data["shape_zyx"], data["origin_lps"], data["steps_lps"])


def _determinant(z: Triple, y: Triple, x: Triple) -> float:
    """Return z . (y x x), the volume that three steps span: with the same bits on every CPU, and without numpy."""
    return z[0] * (y[1] * x[2] - y[2] * x[1]) + z[1] * (y[2] * x[0] - y[0] * x[2]) + z[2] * (y[0] * x[1] - y[1] * x[0])


def _triple(values: Any) -> Triple:
    a, b, c = map(float, values)
    return a, b, c


@dataclass(frozen=True)
class Volume:
    """Voxels with their frame. `array_zyx` is a numpy array or slices like one (a zarr array reads lazily).

    >>> grid = photon_data.Geometry.axis_aligned((40, 32, 32), spacing_zyx_mm=(2, 1, 1), centre_lps=(0, 0, 0))
    >>> photon_data.Volume(np.zeros((40, 32, 32), np.int16), grid).to_sitk().GetSpacing()
    (1.0, 1.0, 2.0)
    """

    array_zyx: Any
    geometry: Geometry

    def __post_init__(self) -> None:
        """ValueError when array and geometry disagree on the shape."""
        if tuple(self.array_zyx.shape) != self.geometry.shape_zyx:
            shape = self.geometry.shape_zyx
            raise ValueError(f"expected an array of shape {shape}, found {tuple(self.array_zyx.shape)}")

    def numpy(self) -> np.ndarray:
        """Return all voxels [z, y, x] in memory."""
        return np.asarray(self.array_zyx[...])

    def to_sitk(self) -> SimpleITK.Image:
        """Return a SimpleITK image; ValueError where its axes are not perpendicular, which ITK cannot hold."""
        import SimpleITK as sitk

        if not self.geometry.is_orthogonal():
            raise ValueError("expected perpendicular axes, as in SimpleITK, found a sheared grid; resample it first")
        image = sitk.GetImageFromArray(self.numpy())
        image.SetOrigin(self.geometry.origin_lps)
        image.SetSpacing(self.geometry.spacing_zyx_mm[::-1])
        image.SetDirection(self.geometry.direction_xyz.ravel().tolist())
        return image

    def to_nibabel(self) -> nibabel.Nifti1Image:
        """Return a nibabel image: array axes (x, y, z), affine to RAS millimetres in sform and qform."""
        import nibabel

        image = nibabel.Nifti1Image(self.numpy().transpose(2, 1, 0), self.geometry.affine_ras)
        image.header.set_xyzt_units("mm")
        image.set_sform(self.geometry.affine_ras, code=1)
        if self.geometry.is_orthogonal():
            image.set_qform(self.geometry.affine_ras, code=1)
        return image

    def to_torchio(self) -> torchio.ScalarImage:
        """Return a TorchIO image: tensor (1, x, y, z), affine to RAS millimetres. Needs the extra `torchio`."""
        import torchio

        return torchio.ScalarImage(tensor=self.numpy().transpose(2, 1, 0)[None].copy(), affine=self.geometry.affine_ras)


class Prepared(NamedTuple):
    """A scan on the target grid: int16 HU, at full size and on the model grid, and its facts (see VolumeRecord).

    `full` is its whole field, where that was asked for.
    """

    volume: Volume
    model: Volume
    facts: dict[str, Any]
    full: Volume | None = None


class BodyAxes(NamedTuple):
    """Array axes in the order of the world axes L, P, S: for letters, pictures and sentences ("at its head end")."""

    array_axis: tuple[int, int, int]  # [w]: the one (0 z, 1 y, 2 x) that runs most nearly along world axis w
    sign: tuple[int, int, int]  # [w]: +1 where its indices grow with w, -1 where they grow against it


@lru_cache(maxsize=64)
def body_axes(geometry: Geometry) -> BodyAxes:
    """Return the one-to-one assignment of array axes to world axes that leaves the least tilt over all three."""
    cosines = _cosines(geometry)

    def closeness(axes: tuple[int, ...]) -> float:
        a, b, c = axes
        return round(abs(cosines[a][0]) + abs(cosines[b][1]) + abs(cosines[c][2]), 6)

    a, b, c = max(permutations(range(3)), key=closeness)
    left, back, up = (1 if cosine >= 0 else -1 for cosine in (cosines[a][0], cosines[b][1], cosines[c][2]))
    return BodyAxes((a, b, c), (left, back, up))


def tilt_degrees(geometry: Geometry) -> float:
    """Return the largest angle between an array axis and its world axis by `body_axes`; 0 for an axis-aligned grid."""
    cosines, axes = _cosines(geometry), enumerate(body_axes(geometry).array_axis)
    return degrees(acos(min(1.0, *(abs(cosines[axis][world]) for world, axis in axes))))


def direction_letters(direction_lps: np.ndarray) -> str:
    """Return the letters of a world direction, the largest part first: "L", or "LA" if it leans 15 degrees or more."""
    unit = np.asarray(direction_lps, float) / np.linalg.norm(direction_lps)
    largest_first = sorted(range(3), key=lambda w: -round(abs(unit[w]), 6))
    return "".join(LETTERS[w][int(unit[w] > 0)] for w in largest_first if abs(unit[w]) >= _SECOND_LETTER)


def position_text(world_axis: int, mm: float) -> str:
    """Return a coordinate with its letter in place of a sign, e.g. -12.34 on axis 2 as "I 12.3 mm"."""
    rounded = round(mm, 4)
    return f"{LETTERS[world_axis][int(rounded >= 0)]} {abs(rounded):.1f} mm"


def inverse(matrix: np.ndarray) -> np.ndarray:
    """Return the inverse [n, n] of a matrix, to the same bits on every CPU; ValueError for a singular one.

    BLAS and LAPACK have kernels for each kind of CPU, and the last bits of their results differ. Here every product
    and sum is rounded by itself, in one order.
    """
    n = len(matrix)
    rows = np.hstack([matrix, np.eye(n)])
    for a in range(n):
        pivot = a + int(np.abs(rows[a:, a]).argmax())
        if not abs(rows[pivot, a]) > 0:  # NaN too
            raise ValueError(f"expected a regular matrix, found {matrix.tolist()}")
        rows[[a, pivot]] = rows[[pivot, a]]
        rows[a] *= 1 / rows[a, a]  # as OpenBLAS does: a grid that is not oblique gets its digits
        for b in range(n):
            if b != a:
                rows[b] -= rows[b, a] * rows[a]
    return rows[:, n:]


def _times(rows: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Return rows [..., 3] @ matrix [3, 3], to the same bits on every CPU; see `inverse`."""
    first, second, third = (rows[..., a, None] * matrix[a] for a in range(3))
    return first + second + third


def _cosines(geometry: Geometry) -> list[list[float]]:
    """Return [array axis][world axis]: the cosine of the angle between the two."""
    steps = zip(geometry.steps_lps, geometry.spacing_zyx_mm, strict=True)
    return [[mm / spacing_mm for mm in step] for step, spacing_mm in steps]
