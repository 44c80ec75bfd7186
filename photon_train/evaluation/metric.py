"""What a metric is, and 95 % intervals by resampling patients: questions about one person are right or wrong together.

A metric is sums over questions and a formula of these sums. The sums of resampled patients are then one matrix product.

Legend: n questions, k sums, P patients, W ways of weighting them (first all of them once, then the resampled ones).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import numpy as np

Case = TypeVar("Case")
Applies = Callable[[Case], bool]
Written = Callable[[Case, str], str]
POINTS = 100.0


def as_text(case: object, answer: str) -> str:
    """Return an answer as its text alone."""
    return answer


@dataclass(frozen=True)
class Metric(Generic[Case]):
    """A score between 0 and 1 of a set of questions."""

    name: str
    applies: Applies[Case]  # which questions it is for
    observe: Callable[[Sequence[Case]], np.ndarray]  # n cases -> float[n, k], what each of them adds
    formula: Callable[[np.ndarray], np.ndarray]  # sums float[..., k] -> float[...], NaN where it is not defined
    written: Written[Case] = as_text  # an answer as this metric reads it; baselines answer so
    by_question: bool = True  # the score of one question is what it adds; not so of a share of the "yes" alone
    is_mean: bool = True  # the score of all is the mean of those; not so of BLEU of a corpus
    is_costly: bool = False  # a model computes it: differences of it get no p-values
    of_text: bool = True  # it reads the text of a response; a metric of other data has baselines of its own

    def replicates(self, cases: Sequence[Case], patient_n: np.ndarray, weights_WP: np.ndarray) -> np.ndarray:
        """Return float[W], the score of the cases under every weighting of their patients."""
        with np.errstate(divide="ignore", invalid="ignore"):  # a division by zero gives NaN
            return np.asarray(self.formula(resampled_sums(self.observe(cases), patient_n, weights_WP)), float)

    @property
    def name_of_each(self) -> str:
        """The name of the score of one question."""
        return self.name if self.is_mean else f"{self.name}_sentence"

    def of_each(self, cases: Sequence[Case]) -> np.ndarray:
        """Return float[n], the score of each case alone."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(self.formula(self.observe(cases)), float)

    def value(self, cases: Sequence[Case]) -> float:
        """Return the score of the cases, each counting once."""
        return float(self.replicates(cases, np.zeros(len(cases), int), np.ones((1, 1)))[0])


def mean_of(
    name: str, applies: Applies[Case], score: Callable[[Case], float], written: Written[Case] = as_text
) -> Metric[Case]:
    """Return the metric that is the mean of a score per question."""
    return Metric(name, applies, lambda cases: with_ones(score(case) for case in cases), ratio, written)


def with_ones(scores: Iterable[float]) -> np.ndarray:
    """Return float[n, 2]: scores, and ones to divide their sum by."""
    return np.array([(score, 1.0) for score in scores]).reshape(-1, 2)


def ratio(sums: np.ndarray) -> np.ndarray:
    """Return first sum / second sum."""
    return np.asarray(sums[..., 0] / sums[..., 1])


@dataclass(frozen=True)
class Patients:
    """All patients of an evaluation, and how often each is drawn."""

    index: dict[str, int]
    weights: np.ndarray  # float[W, P]; the first row is all ones (nothing resampled), every other row sums to P

    def of(self, patients: Sequence[str]) -> np.ndarray:
        """Return int[n], the column of each."""
        return np.array([self.index[patient] for patient in patients], int)

    def means(self, observed_nk: Sequence[Sequence[float]], patients: Sequence[str]) -> np.ndarray:
        """Return float[k, W]: means of the observations, whose patients are given, under every weighting.

        NaN for a resampling without any of these patients.
        """
        sums_Wk = resampled_sums(
            np.insert(np.asarray(observed_nk, float), 0, 1.0, axis=1), self.of(patients), self.weights
        )
        with np.errstate(invalid="ignore"):
            return np.asarray((sums_Wk[:, 1:] / sums_Wk[:, :1]).T)


def draw_patients(patients: Sequence[str], replicates: int, seed: int) -> Patients:
    """Return the patients, each once, drawn `replicates` times with replacement; their order does not matter."""
    names = sorted(set(patients))
    chances = np.full(len(names), 1 / len(names))
    drawn = np.random.default_rng(seed).multinomial(len(names), chances, size=replicates)
    return Patients({name: i for i, name in enumerate(names)}, np.vstack([np.ones(len(names)), drawn]))


def resampled_sums(observed_nk: np.ndarray, patient_n: np.ndarray, weights_WP: np.ndarray) -> np.ndarray:
    """Return float[W, k], the sums of the observations under every weighting of their patients (columns)."""
    sums_Pk = np.zeros((weights_WP.shape[1], observed_nk.shape[1]))
    np.add.at(sums_Pk, patient_n, observed_nk)
    return np.asarray(weights_WP @ sums_Pk)


class Estimate(NamedTuple):
    """A number in points and its 95 % interval; None where it is not defined."""

    value: float | None
    low: float | None
    high: float | None


def estimate_of(replicates_W: np.ndarray) -> Estimate:
    """Return the first replicate in points, with the interval of the others."""
    return Estimate(points(float(replicates_W[0])), *map(points, interval(replicates_W)))


def interval(replicates_W: np.ndarray) -> tuple[float, float]:
    """Return the 2.5th and 97.5th percentile of the resampled values (all but the first), NaN where there are none."""
    resampled = replicates_W[1:][np.isfinite(replicates_W[1:])]
    if not len(resampled):
        return float("nan"), float("nan")
    low, high = np.percentile(resampled, (2.5, 97.5))
    return float(low), float(high)


def points(share: float) -> float | None:
    """Return a share in points with four decimals, None for NaN."""
    return round(POINTS * share, 4) if np.isfinite(share) else None
