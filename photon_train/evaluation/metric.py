"""95 % intervals by resampling patients: questions about one person are right or wrong together.

What a metric is: sums over questions and a formula of them, so that a resampled patient is a row of a matrix product.

Legend: n questions, k sums, P patients, W ways of weighting the patients (the first: all of them once; then resampled ones).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from photon_train.evaluation.cases import Case, as_text

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


@dataclass(frozen=True)
class Metric:
    """A score between 0 and 1 of a set of questions.

    applies     which questions it is for
    observe     n cases -> float[n, k], what each of them adds
    formula     sums float[..., k] -> float[...], NaN where it is not defined
    written     how an answer has to be written for this metric to see it; blind baselines are written so
    of_words    whether it looks at the response's words; what looks elsewhere has other baselines
    """

    name: str
    applies: Callable[[Case], bool]
    observe: Callable[[Sequence[Case]], np.ndarray]
    formula: Callable[[np.ndarray], np.ndarray]
    written: Callable[[Case, str], str] = as_text
    of_words: bool = True

    def replicates(self, cases: Sequence[Case], patient_n: np.ndarray, weights_WP: np.ndarray) -> np.ndarray:
        """Return float[W], the score of the cases under every weighting of their patients."""
        return self.of_sums(resampled_sums(self.observe(cases), patient_n, weights_WP))

    def of_sums(self, sums: np.ndarray) -> np.ndarray:
        """Return the formula's value; what is divided by nothing is NaN."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(self.formula(sums), float)

    def value(self, cases: Sequence[Case]) -> float:
        """Return the score of the cases, each counting once."""
        return float(self.replicates(cases, np.zeros(len(cases), int), np.ones((1, 1)))[0])


def resampled_sums(observed_nk: np.ndarray, patient_n: np.ndarray, weights_WP: np.ndarray) -> np.ndarray:
    """Return float[W, k], the sums of what was observed under every weighting of the patients (columns) it is of."""
    sums_Pk = np.zeros((weights_WP.shape[1], observed_nk.shape[1]))
    np.add.at(sums_Pk, patient_n, observed_nk)
    sums_Wk: np.ndarray = weights_WP @ sums_Pk
    return sums_Wk


def mean_of(
    name: str,
    applies: Callable[[Case], bool],
    score: Callable[[Case], float],
    written: Callable[[Case, str], str] = as_text,
) -> Metric:
    """Return the metric that is the mean of a score per question."""
    return Metric(name, applies, lambda cases: with_ones(score(case) for case in cases), ratio, written)


def with_ones(scores: Iterable[float]) -> np.ndarray:
    """Return float[n, 2]: scores, and ones to divide their sum by."""
    values = np.fromiter(scores, float)
    return np.stack([values, np.ones_like(values)], axis=1)


def ratio(sums: np.ndarray) -> np.ndarray:
    """Return first sum / second sum."""
    return np.asarray(sums[..., 0] / sums[..., 1])
