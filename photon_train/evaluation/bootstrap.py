"""95 % intervals by resampling patients: questions about one person are right or wrong together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

INTERVAL = (2.5, 97.5)


@dataclass(frozen=True)
class Patients:
    """All patients of an evaluation, and how often each is drawn.

    weights: float[1 + replicates, patients]; the first row is all ones (nothing resampled), every other adds up to their number.
    """

    index: dict[str, int]
    weights: np.ndarray

    def of(self, patients: Sequence[str]) -> np.ndarray:
        """Return int[n], the column of each."""
        return np.array([self.index[patient] for patient in patients], int)


def draw(patients: Sequence[str], replicates: int, seed: int) -> Patients:
    """Return the patients, each once, drawn `replicates` times with replacement; their order does not matter."""
    names = sorted(set(patients))
    chances = np.full(len(names), 1 / len(names))
    drawn = np.random.default_rng(seed).multinomial(len(names), chances, size=replicates)
    return Patients({name: i for i, name in enumerate(names)}, np.vstack([np.ones(len(names)), drawn]))


def interval(replicates: np.ndarray) -> tuple[float, float]:
    """Return the 2.5th and 97.5th percentile of the resampled values (all but the first), NaN where there are none."""
    resampled = replicates[1:][np.isfinite(replicates[1:])]
    if not len(resampled):
        return float("nan"), float("nan")
    low, high = np.percentile(resampled, INTERVAL)
    return float(low), float(high)
