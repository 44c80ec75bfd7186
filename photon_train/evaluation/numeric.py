"""Scores of numbers. Two different ones are published as "MRA"; here each has a name of its own."""

from __future__ import annotations

from photon_train.evaluation.cases import Case
from photon_train.evaluation.metric import Metric, mean_of
from photon_train.evaluation.parsing import number, number_v2, size_mm

# As decimals: 1 - 0.70 is 0.30000000000000004, so that an error of exactly 0.30 passes, as it does where this was published.
THRESHOLDS = (0.50, 0.55, 0.60, 0.65, 0.70, 0.75, 0.80, 0.85, 0.90, 0.95)
BANDS = (0.05, 0.10, 0.20, 0.50)
SIZE_BANDS = (0.10, 0.20)
_LEAST = 1e-6


def is_number(case: Case) -> bool:
    """A number was asked for, without choices."""
    return case.form == "number"


def relative_error(said: float, true: float) -> float:
    """Return |said - true| / |true|, of which |true| is taken to be at least 1e-6: with a truth of 0 every miss is enormous."""
    return abs(said - true) / max(abs(true), _LEAST)


def mra_thresholds(response: str, answer: str) -> float:
    """Return the share of thresholds t = .50, .55 ... .95 for which the relative error is below 1 - t.

    Mean relative accuracy as DeepTumorVQA v1 was scored by Photon. Numbers by `parsing.number`; no number is 0. A relative
    error of 0.30 gives 0.5.
    """
    said, true = number(response), number(answer)
    if said is None or true is None:
        return 0.0
    error = relative_error(said, true)
    return sum(error < 1 - threshold for threshold in THRESHOLDS) / len(THRESHOLDS)


def mra_linear(response: str, answer: str) -> float:
    """Return max(0, 1 - relative error): mean relative accuracy of DeepTumorVQA v2. A relative error of 0.30 gives 0.7."""
    error = _error_v2(response, answer)
    return 0.0 if error is None else max(0.0, 1 - error)


def within(response: str, answer: str, band: float) -> float:
    """Return 1 for a relative error of at most `band`, else 0 (DeepTumorVQA v2)."""
    error = _error_v2(response, answer)
    return float(error is not None and error <= band)


def numeric_metrics() -> list[Metric]:
    """Return both MRAs and the tolerance bands."""

    def in_band(band: float) -> Metric:
        return mean_of(f"within_{round(100 * band)}_percent", is_number, lambda case: within(case.response, case.answer, band))

    return [
        mean_of("mra_thresholds", is_number, lambda case: mra_thresholds(case.response, case.answer)),
        mean_of("mra_linear", is_number, lambda case: mra_linear(case.response, case.answer)),
        *map(in_band, BANDS),
    ]


def is_size(case: Case) -> bool:
    """Lengths with units are the answer."""
    return not case.closed and case.form in ("size", "number") and size_mm(case.answer) is not None


def same_size(response: str, answer: str, band: float) -> float:
    """Return 1 for as many sides, each within `band` of its own, else 0; "2 cm" is "20 mm", and "20x15 mm" is "1.5 x 2 cm"."""
    said, true = size_mm(response), size_mm(answer)
    if said is None or true is None or len(said) != len(true):
        return 0.0
    return float(all(relative_error(a, b) <= band for a, b in zip(said, true, strict=True)))


def size_metrics() -> list[Metric]:
    """Return how often a size is right to 10 and to 20 percent, whatever its unit and the order of its sides."""

    def in_band(band: float) -> Metric:
        name = f"size_within_{round(100 * band)}_percent"
        return mean_of(name, is_size, lambda case: same_size(case.response, case.answer, band))

    return [*map(in_band, SIZE_BANDS)]


def _error_v2(response: str, answer: str) -> float | None:
    said, true = number_v2(response), number_v2(answer)
    return None if said is None or true is None else relative_error(said, true)
