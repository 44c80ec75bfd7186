"""Intensities of a scan: rescaling, statistics, non-finite voxels, and whether they can be Hounsfield units."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np

from photon_data.errors import Refused

# Statistics other than min and max come from a regular sample of about this many voxels.
SAMPLE_VOXELS = 500_000
HISTOGRAM_BINS, HISTOGRAM_RANGE = 64, (-1100.0, 1100.0)
# Beyond this a float counts as infinite: interpolating it would overflow.
LARGEST = 1e30

AIR_HU, TISSUE_HU, ABSURD_HU = (-1100, -850), (-200, 300), -4000
LEAST_AIR, LEAST_TISSUE, MOST_ABSURD = 0.001, 0.005, 0.9
# Below air there is noise, or padding of one value; more than this share of other values is air rescaled twice.
BELOW_AIR_HU, MOST_BELOW_AIR = (-4000, -1150), 0.05


class Rescale(NamedTuple):
    """HU = slope * stored + intercept, and who gives them."""

    slope: float
    intercept: float
    # "stored": nobody, values are taken as they are. "table": a user's table, which is followed. "metadata": a table of
    # a data set of raw files; a file that holds HU already is refused.
    given_by: Literal["stored", "table", "metadata"]


class Probe:
    """Collects statistics of a scan's stored values, plane by plane; `slope` and `intercept` turn them into HU."""

    def __init__(self, shape_zyx: tuple[int, int, int], slope: float, intercept: float, fill: float = 0.0) -> None:
        self.slope, self.intercept, self.fill = slope, intercept, fill
        self.step = max(1, round(np.cbrt(np.prod(shape_zyx, dtype=float) / SAMPLE_VOXELS)))
        self.count = self.non_finite = 0
        self.low, self.high = np.inf, -np.inf
        self.samples: list[np.ndarray] = []

    def look(self, plane: np.ndarray) -> np.ndarray:
        """Return the plane to go on with: itself, or a copy in which `fill` replaces voxels that are not finite."""
        if plane.dtype.kind == "f":
            with np.errstate(invalid="ignore"):
                finite = np.abs(plane) < LARGEST
            bad = plane.size - int(np.count_nonzero(finite))
            if bad:
                self.non_finite += bad
                plane = np.where(finite, plane, self.fill).astype(plane.dtype)
        if plane.size:
            self.low, self.high = min(self.low, float(plane.min())), max(self.high, float(plane.max()))
        if self.count % self.step == 0:
            self.samples.append(plane[:: self.step, :: self.step].astype(np.float32))
        self.count += 1
        return plane

    def sample_stored(self) -> np.ndarray:
        """Return the sampled voxels as they are stored, flat."""
        return np.concatenate([s.ravel() for s in self.samples])

    def sample_hu(self) -> np.ndarray:
        """Return the sampled voxels as HU, flat."""
        return self.sample_stored() * np.float32(self.slope) + np.float32(self.intercept)

    def range_hu(self) -> tuple[float, float]:
        """Return the lowest and the highest HU of all voxels."""
        low, high = sorted(end * self.slope + self.intercept for end in (self.low, self.high))
        return low, high

    def statistics(self) -> dict[str, Any]:
        """Return min and max (exact), mean and percentiles (sampled), the number of non-finite voxels, a histogram."""
        sample = self.sample_hu()
        histogram = np.histogram(sample, HISTOGRAM_BINS, HISTOGRAM_RANGE)[0]
        return {**_statistics(sample, *self.range_hu(), self.non_finite), "histogram": histogram.tolist()}


def volume_statistics(array: np.ndarray) -> dict[str, Any]:
    """Return the same statistics of a finished int16 volume, without the histogram."""
    step = max(1, round(np.cbrt(array.size / SAMPLE_VOXELS)))
    sample = array[::step, ::step, ::step].astype(np.float32).ravel()
    return _statistics(sample, float(array.min()), float(array.max()), 0)


def _statistics(sample: np.ndarray, low: float, high: float, non_finite: int) -> dict[str, Any]:
    p01, p50, p99 = np.percentile(sample, [1, 50, 99])
    numbers = {"min": low, "max": high, "mean": float(sample.mean(dtype=float)), "p01": p01, "p50": p50, "p99": p99}
    return {**{k: round(float(v), 2) for k, v in numbers.items()}, "non_finite": non_finite}


def refuse_scaled_before(probe: Probe) -> None:
    """Raise Refused when stored values, which a table says are raw, look like Hounsfield units."""
    try:
        refuse_implausible(probe.sample_stored(), probe.low, probe.high)
    except Refused:
        return
    raise Refused(
        "scaled-before",
        f"expected raw values, since a table gives slope and intercept, found Hounsfield units: {probe.low:.0f} to "
        f"{probe.high:.0f} with air near -1000, which would be scaled twice; take the files that the table is of "
        "(of CT-RATE, these are v2 in a folder of v1)",
    )


def refuse_implausible(sample_hu: np.ndarray, low: float, high: float) -> None:
    """Raise Refused when intensities from `low` to `high` cannot be Hounsfield units of a CT.

    A CT shows air (AIR_HU) around or inside the body and soft tissue (TISSUE_HU). Raw values are all positive; an
    intercept applied twice pushes tissue to -1000 and air below, or everything to about -8192. Padding far below -1000
    outside of the reconstruction circle is normal and is not counted against a scan that also has air and tissue.
    """
    absurd = float(np.mean(sample_hu < ABSURD_HU))
    body = sample_hu[sample_hu > ABSURD_HU]
    size = max(body.size, 1)
    air, tissue = (np.count_nonzero((body >= a) & (body <= b)) / size for a, b in (AIR_HU, TISSUE_HU))
    below = np.rint(body[(body > BELOW_AIR_HU[0]) & (body < BELOW_AIR_HU[1])])
    padding = np.unique(below, return_counts=True)[1].max(initial=0)
    is_shifted = absurd >= MOST_ABSURD or (below.size - padding) / size > MOST_BELOW_AIR
    if not is_shifted and air >= LEAST_AIR and tissue >= LEAST_TISSUE:
        return
    if low >= 0:
        guess = "no value is negative, so the rescaling was never applied"
    elif is_shifted or (air >= LEAST_AIR and low < AIR_HU[0]):
        guess = "the rescaling seems to have been applied twice"
    else:
        guess = "these are not the intensities of a CT, or they were windowed or rescaled before"
    raise Refused(
        "hu-implausible",
        f"expected Hounsfield units (air near -1000, tissue near 0), found {low:.0f} to {high:.0f} with median "
        f"{np.median(sample_hu):.0f}, {air:.1%} air and {tissue:.1%} soft tissue: {guess}; "
        "--hu-source gives another slope and intercept, --modality other turns this check off",
    )
