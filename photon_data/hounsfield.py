"""Intensities of a scan: rescaling, statistics, non-finite voxels, and whether they can be Hounsfield units."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from photon_data.errors import EXPORT_AGAIN, Refused, refusal
from photon_data.recipe import Recipe

# Statistics other than min and max come from a regular sample of about this many voxels.
SAMPLE_VOXELS = 500_000
HISTOGRAM_BINS, HISTOGRAM_RANGE = 64, (-1100.0, 1100.0)
# Beyond this a float counts as infinite: interpolating it would overflow.
LARGEST = 1e30

AIR_HU, TISSUE_HU, ABSURD_HU = (-1100, -850), (-200, 300), -4000
LEAST_AIR, LEAST_TISSUE, MOST_ABSURD = 0.001, 0.005, 0.9
# A second rescaling puts air and lung into the first range, and fat into the other. The noise of sharp kernels, as
# wide above the mode of air as below it, and padding may lie there too. Lossy compression spreads padding a little;
# more of that passes below TWICE_AIR_HU, where a second intercept of -1000 or -1024 puts no air.
TWICE_HU, TWICE_AIR_HU, MOST_TWICE = ((-4000, -1700), (-1300, -1150)), -2300, 0.05
PADDINGS, LOSSY, LOSSY_BELOW, NEAR_HU, FAR_HU = 2, 2, 16, 50, (720, 1000)
# More than this share as dense as bone is soft tissue that was never rescaled, where "air" is padding: one value, and
# not one that HU are clipped to.
DENSE_HU, MOST_DENSE, CLIPPED_HU, MOST_OF_AIR = 700, 0.25, (-1000, -1024), 0.9
# Beyond all bone, more than this share of one value is padding that the header does not declare.
BEYOND_BONE_HU, MOST_BEYOND_BONE = 1500, 0.05
# Lower than the noise of air: padding, whose value must not reach into tissue.
FAR_BELOW_AIR_HU = -1500.0
# From there to here one value is padding that no header declares, where it takes this share of a scan and has less
# than a tenth as many voxels around it. Noise that a scanner clipped has as many until its deviation is 180 HU.
BELOW_AIR_HU, LEAST_PADDING, AROUND_HU, LEAST_ALONE = -1050.0, 0.01, 20, 10
LARGEST_12_BITS_HU = 3071
# No more values, all of them whole and the lowest 0, are those of a label map (TotalSegmentator has 118).
MOST_LABELS = 128


HEADER, STORED = "header", "stored"  # values of --hu-source that are no table


class Probe:
    """Collects statistics of a scan's stored values, plane by plane; `slope` and `intercept` turn them into HU.

    `fill` replaces what is no number, and `floor_hu` what lies far below air and below it: neither may be interpolated.
    It replaces `padding_hu` too, a value in whole HU (see `undeclared_padding`). With `padded`, NaN is declared
    padding: it is counted apart and is in no statistics.
    """

    def __init__(
        self,
        shape_zyx: tuple[int, int, int],
        slope: float,
        intercept: float,
        fill: float = 0.0,
        *,
        floor_hu: float = -np.inf,
        padding_hu: float | None = None,
        padded: bool = False,
    ) -> None:
        self.slope, self.intercept, self.fill, self.floor_hu, self.padded = slope, intercept, fill, floor_hu, padded
        self.padding_hu = padding_hu
        self.step = max(1, round(np.cbrt(np.prod(shape_zyx, dtype=float) / SAMPLE_VOXELS)))
        self.count = self.non_finite = self.padding = 0
        self.low, self.high = np.inf, -np.inf
        self.samples: list[np.ndarray] = []

    def look(self, plane: np.ndarray) -> np.ndarray:
        """Return the plane to go on with: itself, or a copy without NaN, infinite values and padding."""
        image: Any = ~np.isnan(plane) if self.padded else ...  # all of it
        values = plane[image]
        if plane.dtype.kind == "f":
            with np.errstate(invalid="ignore"):
                finite = np.abs(plane) < LARGEST
            bad = plane.size - int(np.count_nonzero(finite))
            if bad:
                self.padding += plane.size - values.size
                self.non_finite += bad - (plane.size - values.size)
                plane = np.where(finite, plane, self.fill).astype(plane.dtype)
                values = plane[image]
        low, high = (float(values.min()), float(values.max())) if values.size else (np.inf, -np.inf)
        self.low, self.high = min(self.low, low), max(self.high, high)
        if self.count % self.step == 0:
            every = (slice(None, None, self.step),) * 2
            sample = plane[every].astype(np.float32)
            self.samples.append(sample[image[every]] if self.padded else sample)
        self.count += 1
        return self._with_floor(plane, low, high)

    def _with_floor(self, plane: np.ndarray, low: float, high: float) -> np.ndarray:
        """Return a plane, of which low and high are the ends, with the floor in place of what lies far below air."""
        limit = (min(self.floor_hu, FAR_BELOW_AIR_HU) - self.intercept) / self.slope
        is_far = low < limit if self.slope > 0 else high > limit
        if not is_far and self.padding_hu is None:
            return plane
        floor = (self.floor_hu - self.intercept) / self.slope
        if plane.dtype.kind != "f":
            floor = np.clip(np.rint(floor), np.iinfo(plane.dtype).min, np.iinfo(plane.dtype).max)
        far = plane < limit if self.slope > 0 else plane > limit
        if self.padding_hu is not None:
            far |= np.rint(self._hu(plane)) == self.padding_hu
        self.padding += int(np.count_nonzero(far))
        return np.where(far, plane.dtype.type(floor), plane)

    def undeclared_padding(self) -> float | None:
        """Return the value in whole HU of padding that lies not far below air, and below the floor; None without."""
        highest = min(BELOW_AIR_HU, self.floor_hu)
        if not self.range_hu()[0] < highest:
            return None
        values, counts = np.unique(np.rint(self.sample_hu()), return_counts=True)
        candidates = np.where((values >= FAR_BELOW_AIR_HU) & (values < highest), counts, 0)
        count, value = candidates.max(), values[candidates.argmax()]
        around = counts[np.abs(values - value) <= AROUND_HU].sum() - count
        is_padding = count >= max(LEAST_PADDING * counts.sum(), LEAST_ALONE * around, 1)
        return float(value) if is_padding else None

    def _hu(self, stored: np.ndarray) -> np.ndarray:
        return stored.astype(np.float32) * np.float32(self.slope) + np.float32(self.intercept)

    def sample_stored(self) -> np.ndarray:
        """Return the sampled voxels as they are stored, flat; Refused where all of them are padding."""
        sample = np.concatenate([s.ravel() for s in self.samples])
        if not sample.size:
            raise refusal("hu-implausible", "", "an image", "nothing but declared padding", EXPORT_AGAIN)
        return sample

    def sample_hu(self) -> np.ndarray:
        """Return the sampled voxels as HU, flat."""
        return self._hu(self.sample_stored())

    def range_hu(self) -> tuple[float, float]:
        """Return the lowest and the highest HU of all voxels."""
        low, high = sorted(end * self.slope + self.intercept for end in (self.low, self.high))
        return low, high

    def statistics(self) -> dict[str, Any]:
        """Return min and max (exact), mean and percentiles (sampled), the number of non-finite voxels, a histogram."""
        sample = self.sample_hu()
        histogram = np.histogram(sample, HISTOGRAM_BINS, HISTOGRAM_RANGE)[0]
        return {**_statistics(sample, *self.range_hu(), self.non_finite), "histogram": histogram.tolist()}


def has_padding(facts: Mapping[str, Any], recipe: Recipe) -> bool:
    """Tell whether a volume has padding, declared or below air, that must not be interpolated with tissue.

    Stores of earlier versions did not count it, or not all; their statistics tell where it is likely.
    """
    if facts.get("padding_voxels"):
        return True
    before = facts.get("hu_before") or {}
    low, high = (before.get(end, 0.0) for end in ("min", "max"))
    if "padding_voxels" in facts:
        return False
    is_low = low < min(recipe.window_hu[0], FAR_BELOW_AIR_HU)
    return bool(is_low or (facts.get("format") == "dicom" and high >= LARGEST_12_BITS_HU))


def lacks_undeclared(facts: Mapping[str, Any], recipe: Recipe) -> bool:
    """Tell whether undeclared padding was looked for in a volume that may have some, and was not found.

    It may where a share of LEAST_PADDING lies below air. In stores of earlier versions nobody looked.
    """
    if "undeclared_padding_hu" in facts or "modality" in facts.get("policy", {}):
        return False
    return bool((facts.get("hu_before") or {}).get("p01", 0.0) < min(BELOW_AIR_HU, recipe.window_hu[0]))


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
    body = _Counts(*np.unique(np.rint(sample_hu[sample_hu > ABSURD_HU]), return_counts=True))
    size = max(body.number.sum(), 1)
    air, tissue = (body.within(a - 0.5, b + 0.5).number.sum() / size for a, b in (AIR_HU, TISSUE_HU))
    is_shifted = absurd >= MOST_ABSURD or _air_rescaled_twice(body) / size > MOST_TWICE
    beyond = body.within(BEYOND_BONE_HU, np.inf)
    is_padded = beyond.number.max(initial=0) / size > MOST_BEYOND_BONE
    is_raw = body.within(DENSE_HU, np.inf).number.sum() / size > MOST_DENSE and _is_padding(body)
    if not (is_shifted or is_padded or is_raw) and air >= LEAST_AIR and tissue >= LEAST_TISSUE:
        return
    remedy = "--hu-source gives another slope and intercept, --modality other turns this check off"
    if low == 0 and 1 < body.hu.size <= MOST_LABELS and np.array_equal(sample_hu, np.rint(sample_hu)):
        guess = f"{body.hu.size} whole numbers are labels of a mask"
        remedy = "--masks PATTERN takes it as the mask of a scan, --exclude leaves it out"
    elif low >= 0 or (is_raw and air >= LEAST_AIR):
        guess = "the rescaling was never applied"
    elif is_padded:
        guess = f"{beyond.hu[beyond.number.argmax()]:.0f} is padding that no header declares, set it to air before"
    elif is_shifted or (air >= LEAST_AIR and low < AIR_HU[0]):
        guess = "the rescaling seems to have been applied twice"
    else:
        guess = "these are not the intensities of a CT, or they were windowed or rescaled before"
    found = f"{low:.0f} to {high:.0f} with median {np.median(sample_hu):.0f}, "
    found += f"{air:.1%} air and {tissue:.1%} soft tissue: {guess}"
    expected = "Hounsfield units (air near -1000, tissue near 0)"
    raise refusal("hu-implausible", "", expected, found, remedy, "hu-implausible=?")


class _Counts(NamedTuple):
    """How many voxels of a sample have each value in whole HU, ascending."""

    hu: np.ndarray
    number: np.ndarray

    def within(self, low: float, high: float) -> _Counts:
        """Return those strictly between two values."""
        kept = (self.hu > low) & (self.hu < high)
        return _Counts(self.hu[kept], self.number[kept])


def _is_padding(body: _Counts) -> bool:
    """Tell whether the air among whole HU is nearly all of one value, and that no end of a clipped range."""
    values, counts = body.within(AIR_HU[0] - 0.5, AIR_HU[1] + 0.5)
    return bool(counts.max(initial=0) > MOST_OF_AIR * counts.sum()) and values[counts.argmax()] not in CLIPPED_HU


def _air_rescaled_twice(body: _Counts) -> float:
    """Return how many of the whole HU lie where a second intercept puts them, and are neither padding nor noise.

    Noise is judged by the mode of air: of every 50 HU below it, what exceeds the same 50 HU above it is no noise.
    """
    parts = [body.within(low, high) for low, high in TWICE_HU]
    values, counts = (np.concatenate(both) for both in zip(*parts, strict=True))
    for _ in range(PADDINGS):
        if values.size:
            peak = values[counts.argmax()]
            kept = np.abs(values - peak) > (LOSSY if peak > TWICE_AIR_HU else LOSSY_BELOW)
            values, counts = values[kept], counts[kept]
    air, edges = np.histogram(body.hu, np.arange(AIR_HU[0], AIR_HU[1] + 1, 10), weights=body.number)
    mode = edges[air.argmax()] + 5
    at_mode = body.number[np.abs(body.hu - mode) < NEAR_HU].sum() / (2 * NEAR_HU)
    is_far = (mode - values > FAR_HU[0]) & (mode - values < FAR_HU[1])
    if counts[is_far].sum() / (FAR_HU[1] - FAR_HU[0]) > at_mode / 2:  # it is no mode, hence all this no noise
        return float(counts.sum())
    depths = np.arange(0, mode - TWICE_HU[0][0] + 50, 50)
    below = np.histogram(mode - values, depths, weights=counts)[0]
    excess = below - np.histogram(body.hu - mode, depths, weights=body.number)[0]
    return float(np.maximum(excess, 0).sum())
