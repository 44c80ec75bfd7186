"""Linear interpolation of planes and volumes: in C where it was built (_kernels.c), else in numpy, with the same bits.

The numpy code is the reference. PHOTON_KERNELS=numpy takes it everywhere.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import numpy as np

try:
    import photon_data._kernels as _kernels
except ImportError:  # installed without a compiler
    _kernels = None

VARIABLE = "PHOTON_KERNELS"
# What a function of the C code takes and gives; an extension of an earlier checkout is not used.
VERSION = 2
# Integers and floats of C. Others become float32 before.
TYPES = "bBhHiIlLqQfd"
# A voxel exactly on the outer face of a scan falls the same way on every machine, which rounds its index by less.
RIM_VOXELS = 5e-10


def compiled() -> Any:
    """Return the module of the C code; None where numpy is used."""
    usable = os.environ.get(VARIABLE) != "numpy" and getattr(_kernels, "VERSION", None) == VERSION
    return _kernels if usable else None


def description() -> str:
    """Return which code interpolates, and why, for `photon-data --version`."""
    if compiled():
        return "compiled"
    if os.environ.get(VARIABLE) == "numpy":
        return f"numpy ({VARIABLE}=numpy)"
    return "numpy (installed without a compiler)" if _kernels is None else "numpy (compiled for another version)"


class AxisMap(NamedTuple):
    """How the output voxels along one axis sample the input: x[low] + weight * (x[high] - x[low])."""

    low: np.ndarray
    high: np.ndarray
    weight: np.ndarray


def axis_map(position: np.ndarray, n_in: int) -> AxisMap:
    """Return how outputs sample `n_in` voxels at `position` (float64 index); beyond the outer ones, the edge value."""
    position = np.clip(position, 0, n_in - 1)
    low = np.floor(position).astype(np.intp)
    return AxisMap(low, np.minimum(low + 1, n_in - 1), (position - low).astype(np.float32))


class Interpolator:
    """Linear interpolation of planes of `shape` [y, x] along both axes, in float32 buffers that it owns and reuses.

    What comes out is slope * value + intercept.
    """

    def __init__(
        self, rows: AxisMap, columns: AxisMap, shape: tuple[int, ...], slope: float = 1.0, intercept: float = 0.0
    ) -> None:
        self.rows, self.columns, self.slope, self.intercept = rows, columns, slope, intercept
        self.plane = np.empty(shape, np.float32)
        self.low_rows, self.high_rows = (np.empty((len(rows.low), shape[1]), np.float32) for _ in range(2))
        self.high = np.empty((len(rows.low), len(columns.low)), np.float32)

    def __call__(self, plane: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Return `out` [rows, columns] float32, filled with the plane's values at the mapped positions."""
        if c := compiled():
            dtype = plane.dtype.newbyteorder("=") if plane.dtype.char in TYPES else np.float32
            plane = np.require(plane, dtype, ["C", "A"])  # a copy of what is not aligned
            c.plane(plane, self.rows, self.columns, self.slope, self.intercept, out)
            return out
        np.copyto(self.plane, plane, casting="unsafe")  # once; mixed types cost every later pass a third more
        np.take(self.plane, self.rows.low, axis=0, out=self.low_rows, mode="clip")
        np.take(self.plane, self.rows.high, axis=0, out=self.high_rows, mode="clip")
        tall = _lerp(self.low_rows, self.high_rows, self.rows.weight[:, None], self.low_rows)
        np.take(tall, self.columns.low, axis=1, out=out, mode="clip")
        np.take(tall, self.columns.high, axis=1, out=self.high, mode="clip")
        out = _lerp(out, self.high, self.columns.weight, out)
        if self.slope != 1:
            out *= np.float32(self.slope)
        if self.intercept != 0:
            out += np.float32(self.intercept)
        return out


def between(
    low: np.ndarray, high: np.ndarray, weight: np.float32, window: tuple[float, float], out: np.ndarray
) -> None:
    """Write the plane at `weight` between two float32 planes into the int16 plane `out`, rounded and clipped."""
    if c := compiled():
        return c.between(low, high, weight, *window, out)
    mixed = np.rint(_lerp(low, high.copy(), weight, np.empty_like(high)))
    np.copyto(out, np.clip(mixed, *window, out=mixed), casting="unsafe")
    return None


def _lerp(low: np.ndarray, high: np.ndarray, weight: np.ndarray | np.float32, out: np.ndarray) -> np.ndarray:
    """Return low + weight * (high - low), float32, in `out` (may be `low`); `high` is used up."""
    high -= low
    high *= weight
    return np.add(low, high, out=out)


def resize(array: np.ndarray, shape_zyx: tuple[int, int, int]) -> np.ndarray:
    """Return the int16 array [z, y, x] resized trilinearly (align_corners=False, no smoothing), rounded to nearest."""
    depth, rows, columns = (
        axis_map((np.arange(n_out) + 0.5) * (n_in / n_out) - 0.5, n_in)
        for n_out, n_in in zip(shape_zyx, array.shape, strict=True)
    )
    out = np.empty(shape_zyx, np.int16)
    if c := compiled():
        c.resize(np.ascontiguousarray(array), depth, rows, columns, out)
        return out
    interpolate, flat = Interpolator(rows, columns, array.shape[1:]), np.empty(shape_zyx[1:], np.float32)
    low, high = (np.empty(array.shape[1:], np.float32) for _ in range(2))
    for i, weight in enumerate(depth.weight):
        np.copyto(low, array[depth.low[i]])
        np.copyto(high, array[depth.high[i]])
        interpolate(_lerp(low, high, weight, low), flat)
        np.copyto(out[i], np.rint(flat, out=flat), casting="unsafe")
    return out


def roomy(shape_zyx: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return an array for `affine` to read: not filled, with room for eight values after each row.

    Rows of 512 values all begin at the same few places of a cache, where they push out one another. With the room,
    `affine` takes up to 40 % less time, by the angle; no measured scan took more.
    """
    return np.empty((*shape_zyx[:-1], shape_zyx[-1] + 8), dtype)[..., : shape_zyx[-1]]


def affine(
    array: np.ndarray, matrix: np.ndarray, slope: float, intercept: float, window: tuple[float, float], out: np.ndarray
) -> None:
    """Write into the voxels of the int16 array `out` [z, y, x] what lies at matrix [3, 4] @ (z, y, x, 1) in `array`.

    `array` is int16, uint16 or float32, with at least two voxels along each axis; between its rows may be room
    (`roomy`), else ValueError. Trilinear in float64, rescaled, rounded to nearest and clipped. Native index i covers
    [i - 0.5, i + 0.5), as in ITK: in the outer half voxel the edge value is repeated. Voxels of `out` beyond are left
    as they are.
    """
    if c := compiled():
        return c.affine(array, tuple(matrix.ravel().tolist()), RIM_VOXELS, slope, intercept, *window, out)
    strides, rest = zip(*(divmod(stride, array.itemsize) for stride in array.strides), strict=True)
    if min(strides) < 1 or strides[2] != 1 or any(rest):
        raise ValueError(f"expected whole rows, one after the other, found strides of {array.strides} bytes")
    reach = 1 + sum((n - 1) * stride for n, stride in zip(array.shape, strides, strict=True))
    flat = np.lib.stride_tricks.as_strided(array, (reach,), (array.itemsize,), writeable=False)
    y, x = np.ogrid[: out.shape[1], : out.shape[2]]
    for z in range(len(out)):
        inside, at, weights = np.ones(out.shape[1:], bool), np.zeros(out.shape[1:], np.intp), []
        for m, n, stride in zip(matrix, array.shape, strides, strict=True):
            position = (m[3] + m[0] * z) + m[1] * y + m[2] * x
            inside &= (position >= -0.5 - RIM_VOXELS) & (position < n - 0.5 - RIM_VOXELS)
            position = np.clip(position, 0, n - 1)
            low = np.minimum(position.astype(np.intp), n - 2)
            at += low * stride
            weights.append(position - low)
        at, (wz, wy, wx) = at[inside], (weight[inside] for weight in weights)
        planes = [_trilinear(flat, at + k * strides[0], strides[1], wy, wx) for k in range(2)]
        hu = (planes[0] + wz * (planes[1] - planes[0])) * slope + intercept
        out[z][inside] = np.clip(np.rint(hu), *window)
    return None


def _trilinear(flat: np.ndarray, at: np.ndarray, stride: int, wy: np.ndarray, wx: np.ndarray) -> np.ndarray:
    """Return the values, float64, between the four neighbours in a plane of which `at` is the first."""
    rows = []
    for first in (at, at + stride):
        low, high = flat[first].astype(np.float64), flat[first + 1].astype(np.float64)
        rows.append(low + wx * (high - low))
    return rows[0] + wy * (rows[1] - rows[0])


def gaussian(variance: float) -> np.ndarray:
    """Return the weights at 0, 1, 2, ... of the discrete Gaussian of a variance in voxels^2, float32; they sum to 1.

    It is the one of which the Fourier transform is exp(variance * (cos w - 1)) (Lindeberg 1990), and cut off as
    SimpleITK's DiscreteGaussian does: where it holds 99 %, at 15 voxels at most.
    """
    spectrum = np.exp(variance * (np.cos(2 * np.pi * np.arange(257) / 512) - 1))
    weights = np.fft.irfft(spectrum, 512)[:16]
    sums = 2 * np.cumsum(weights) - weights[0]
    weights = weights[: int(np.searchsorted(sums, 0.99)) + 1]
    return (weights / (2 * weights.sum() - weights[0])).astype(np.float32)


def smoothed(array: np.ndarray, weights: np.ndarray, axis: int) -> np.ndarray:
    """Return the float32 plane smoothed along an axis; beyond its edge lies the edge value."""
    n, reach = array.shape[axis], len(weights) - 1
    wide = np.take(array, np.clip(np.arange(-reach, n + reach), 0, n - 1), axis=axis)
    part = lambda start: wide[(slice(None),) * axis + (slice(start, start + n),)]  # noqa: E731
    out = part(reach) * weights[0]
    for k in range(1, reach + 1):
        out += (part(reach - k) + part(reach + k)) * weights[k]
    return out
