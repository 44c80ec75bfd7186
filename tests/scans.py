"""Small scans for tests: arrays with a frame, in memory, and what SimpleITK makes of them."""

import itertools

import numpy as np
import SimpleITK as sitk

from photon_data.scan import Scan
from photon_data.volume import Geometry

# All 48 ways to store an axis-aligned volume: which world axis each array axis runs along, and which way.
AXIS_ORDERS = list(itertools.product(itertools.permutations((0, 1, 2)), itertools.product((1, -1), repeat=3)))


def ct_like(shape_zyx, seed=0, dtype=np.int16):
    """Air, a body of soft tissue with lungs and bone, and noise everywhere."""
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape_zyx), indexing="ij")
    hu = np.where(y**2 / 0.6 + x**2 / 0.8 < 1, 40.0, -1000.0)
    hu[(y**2 + (abs(x) - 0.4) ** 2 < 0.09) & (abs(z) < 0.7)] = -850
    hu[(y - 0.5) ** 2 + x**2 < 0.02] = 700
    return np.clip(hu + rng.normal(0, 60, shape_zyx), -1024, 3000).astype(dtype)


def frame(shape_zyx, order=((0, 1, 2), (1, 1, 1)), spacing_mm=(2.2, 0.9, 0.7), origin_lps=(-31.7, 12.4, -90.3)):
    """A geometry whose array axis a runs along world axis (z, y, x)[order[0][a]], in direction order[1][a]."""
    axes, signs = order
    steps = np.zeros((3, 3))
    for a in range(3):
        steps[a, 2 - axes[a]] = signs[a] * spacing_mm[a]
    return Geometry.from_arrays(shape_zyx, origin_lps, steps)


def rotated(geometry, degrees_xyz):
    """The same grid turned about the world origin, about x, then y, then z."""
    turn = np.eye(3)
    for axis, degrees in enumerate(degrees_xyz):
        c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        i, j = [k for k in range(3) if k != axis]
        one = np.eye(3)
        one[i, i], one[i, j], one[j, i], one[j, j] = c, -s, s, c
        turn = one @ turn
    steps = np.asarray(geometry.steps_lps) @ turn.T
    return Geometry.from_arrays(geometry.shape_zyx, turn @ np.asarray(geometry.origin_lps), steps)


def as_scan(array, geometry, slope=1.0, intercept=0.0):
    return Scan(geometry, array.dtype, slope, intercept, lambda: iter(array), "memory")


def on_grid_by_itk(image, grid, transform=None, pad_hu=-1000.0):
    """What ITK makes of an image on an axis-aligned grid: an array of float64."""
    size, spacing = grid.shape_zyx[::-1], grid.spacing_zyx_mm[::-1]
    identity, transform = np.eye(3).ravel().tolist(), transform or sitk.Transform()
    out = sitk.Resample(
        image, size, transform, sitk.sitkLinear, grid.origin_lps, spacing, identity, pad_hu, sitk.sitkFloat64
    )
    return sitk.GetArrayFromImage(out)


def to_sitk(array, geometry):
    """The array as an ITK image, built from the geometry's raw numbers."""
    steps = np.asarray(geometry.steps_lps)
    spacing = np.sqrt((steps**2).sum(1))
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing[::-1].tolist())
    image.SetOrigin(geometry.origin_lps)
    image.SetDirection((steps / spacing[:, None])[::-1].T.ravel().tolist())
    return image
