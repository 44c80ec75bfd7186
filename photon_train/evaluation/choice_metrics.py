"""Scores of answers that can be parsed (choices, yes and no, numbers, sizes), and of free text that must match.

Accuracy of closed questions is published in four ways, which differ in what counts as the letter. Two different
scores of numbers are published as "MRA". Each of these has a name of its own here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from photon_train.evaluation.cases import Case, Form, as_label, as_letter, as_letter_and_text
from photon_train.evaluation.metric import Applies, Metric, mean_of
from photon_train.evaluation.parsing import parse_choice, parse_quantity, parse_size, parse_yes_no
from photon_train.evaluation.readings import (
    Quantity,
    collapsed,
    parse_letter_v2,
    parse_number_v1,
    parse_number_v2,
    parse_yes_no_v2,
    without_punctuation,
)


class ReliabilityBin(NamedTuple):
    """Questions of about the same confidence; a calibrated model is right as often as its confidence says."""

    questions: int
    confidence: float
    accuracy: float


def any_question(case: Case) -> bool:
    """Return True: the metric is for every question."""
    return True


def is_free_text(case: Case) -> bool:
    """Return whether text is expected, without choices."""
    return case.form in ("text", "size") and not case.closed


def _expects(form: Form) -> Applies[Case]:
    return lambda case: case.form == form


_is_closed, _is_yes_no, _is_number = attrgetter("closed"), _expects("yes-no"), _expects("number")


def _is_size(case: Case) -> bool:
    return not case.closed and case.form in ("size", "number") and parse_size(case.answer) is not None


def _has_choice_scores(case: Case) -> bool:
    scores = case.prediction.choice_scores
    return case.closed and bool(scores) and all(math.isfinite(scores.get(choice, math.nan)) for choice in case.choices)


def parsed_answer(case: Case) -> str | None:
    """Return the answer that a response means, as its text; None where it cannot be told. Yes and no in lower case."""
    if case.closed:
        index = parse_choice(case.response, case.choices)
        if index is not None:
            return case.choices[index].lower() if _is_yes_no(case) else case.choices[index]
    return parse_yes_no(case.response) if _is_yes_no(case) else None


def _quantity(case: Case) -> Quantity | None:
    """Return the number of a response, that in the unit of the answer where it has several."""
    true = parse_quantity(case.answer)
    return parse_quantity(case.response, true.unit if true else "")


def what_is_read(case: Case) -> str | None:
    """Return what a response means as an answer of the expected form; None where it cannot be told. Text is itself."""
    if case.closed or _is_yes_no(case):
        return parsed_answer(case)
    if case.form in ("number", "size"):
        read = parse_size(case.response) if case.form == "size" else _quantity(case)
        return None if read is None else str(read)
    return case.response


def _true_answer(case: Case) -> str:
    return case.answer.lower() if _is_yes_no(case) else case.answer


def _is_right(case: Case) -> bool:
    return parsed_answer(case) == _true_answer(case)


def _has_letter_v2(case: Case) -> bool:
    return parse_letter_v2(case.response) == case.letter


def _best_scored(case: Case) -> str:
    return max(case.choices, key=lambda text: case.prediction.choice_scores[text])


ACCURACIES: tuple[Metric[Case], ...] = (
    # The letter, "B. No", or the text, read by `parse_choice`.
    mean_of("accuracy_robust", _is_closed, _is_right, as_label),
    # "B." stands anywhere in the response (3D-RAD, M3D).
    mean_of(
        "accuracy_contains_letter",
        _is_closed,
        lambda one: bool(one.letter) and f"{one.letter}." in one.response,
        as_letter_and_text,
    ),
    # Response and label are equal, case and white space apart (Photon on 3D-RAD).
    mean_of("accuracy_normalised", _is_closed, lambda one: collapsed(one.response) == collapsed(one.label), as_label),
    # They are equal to the letter (Photon on DeepTumorVQA v1).
    mean_of("accuracy_strict", _is_closed, lambda one: one.response == one.label, as_label),
    # The choice with the highest log-probability; of predictions that have them.
    mean_of("accuracy_scored_choice", _has_choice_scores, lambda one: _best_scored(one) == one.answer),
)
# Multiple choice of DeepTumorVQA v2.
ACCURACY_LETTER_V2 = mean_of("accuracy_letter_v2", _is_closed, _has_letter_v2, as_letter)
# Yes-no questions that show no choices; a response that is neither is wrong.
ACCURACY_YES_NO = mean_of("accuracy_yes_no", lambda case: _is_yes_no(case) and not case.closed, _is_right)


def _is_equal_normalised(case: Case) -> bool:
    return without_punctuation(case.response) == without_punctuation(case.answer)


# Free text that equals the answer to the letter (DeepTumorVQA v1), or without punctuation and case, or that contains it
# so (both DeepTumorVQA v2).
EXACT_STRICT = mean_of("exact_strict", is_free_text, lambda case: case.response == case.answer)
EXACT_NORMALISED = mean_of("exact_normalised", is_free_text, _is_equal_normalised)
PARTIAL_MATCH = mean_of(
    "partial_match", is_free_text, lambda case: without_punctuation(case.answer) in without_punctuation(case.response)
)


def _confusion(cases: Sequence[Case]) -> np.ndarray:
    """Return float[n, 5] of the answers: yes right, yes wrong, no right, no wrong, of which unparsed."""
    found = [(_true_answer(case) == "yes", _is_right(case), parsed_answer(case) is None) for case in cases]
    yes, right, unparsed = np.array(found, bool).reshape(-1, 3).T
    return np.stack([yes & right, yes & ~right, ~yes & right, ~yes & ~right, ~yes & unparsed], axis=1).astype(float)


def _scores_and_labels(cases: Sequence[Case]) -> np.ndarray:
    """Return float[n, 2]: log-probability of yes over no, and 1 for a yes."""
    rows = []
    for case in cases:
        scores = {text.lower(): score for text, score in case.prediction.choice_scores.items()}
        rows.append((scores["yes"] - scores["no"], _true_answer(case) == "yes"))
    return np.array(rows, float)


@dataclass(frozen=True)
class Auroc(Metric[Case]):
    """The chance that a random yes has a higher score than a random no, half of it for a tie."""

    def replicates(self, cases: Sequence[Case], patient_n: np.ndarray, weights_WP: np.ndarray) -> np.ndarray:
        """Return float[W]; NaN where all answers are the same."""
        observed = self.observe(cases)
        order = np.argsort(observed[:, 0], kind="stable")
        scores, is_yes, patients = observed[order, 0], observed[order, 1], patient_n[order]
        starts = np.flatnonzero(np.r_[True, np.diff(scores) > 0])  # where a new score begins
        found = []
        for at in range(0, len(weights_WP), 64):  # all of them at once would be gigabytes
            weights_Wn = weights_WP[at : at + 64, patients]
            yes = np.add.reduceat(weights_Wn * is_yes, starts, axis=1)
            no = np.add.reduceat(weights_Wn * (1 - is_yes), starts, axis=1)
            no_below = np.cumsum(no, axis=1) - no
            with np.errstate(divide="ignore", invalid="ignore"):
                found.append((yes * (no_below + no / 2)).sum(axis=1) / (yes.sum(axis=1) * no.sum(axis=1)))
        return np.concatenate(found)


def _of_confusion(name: str, formula: Callable[..., np.ndarray]) -> Metric[Case]:
    """Return the metric with a formula of the columns of `_confusion`."""
    return Metric(name, _is_yes_no, _confusion, lambda sums: formula(*np.moveaxis(sums, -1, 0)), by_question=False)


# Yes is positive. A response that is neither yes nor no is wrong: FN or FP. DeepTumorVQA v2 takes it for a no.
YES_NO_METRICS = (
    _of_confusion("sensitivity", lambda tp, fn, tn, fp, unparsed: tp / (tp + fn)),
    _of_confusion("specificity", lambda tp, fn, tn, fp, unparsed: tn / (tn + fp)),
    _of_confusion("specificity_unparsed_is_no", lambda tp, fn, tn, fp, unparsed: (tn + unparsed) / (tn + fp)),
    _of_confusion("balanced_accuracy", lambda tp, fn, tn, fp, unparsed: (tp / (tp + fn) + tn / (tn + fp)) / 2),
    _of_confusion("f1_yes", lambda tp, fn, tn, fp, unparsed: 2 * tp / (2 * tp + fn + fp)),
    Auroc(
        "auroc",
        lambda case: _is_yes_no(case) and _has_choice_scores(case),
        _scores_and_labels,
        lambda sums: sums,
        by_question=False,
    ),
)

CONFIDENCE_BINS = 10


def _confidence_bins(cases: Sequence[Case]) -> np.ndarray:
    """Return float[n, 3 * bins]: in the bin of its confidence each case adds 1, its confidence, and 1 if it is right.

    The confidence is the probability of the choice with the highest score, of all choices together 1.
    """
    rows = np.zeros((len(cases), CONFIDENCE_BINS, 3))
    for row, case in zip(rows, cases, strict=True):
        scores = np.array([case.prediction.choice_scores[text] for text in case.choices])
        confidence = 1 / np.exp(scores - scores.max()).sum()
        place = min(int(confidence * CONFIDENCE_BINS), CONFIDENCE_BINS - 1)
        row[place] = 1, confidence, _best_scored(case) == case.answer
    return rows.reshape(len(cases), 3 * CONFIDENCE_BINS)


def _calibration_error(sums: np.ndarray) -> np.ndarray:
    counts, confidence, right = np.moveaxis(sums.reshape(*sums.shape[:-1], -1, 3), -1, 0)
    return np.asarray(np.abs(confidence - right).sum(axis=-1) / counts.sum(axis=-1))


# ECE: the mean of |confidence - accuracy| of 10 bins of equal width, weighted by their questions. 0 is best.
CALIBRATION_ERROR = Metric(
    "calibration_error", _has_choice_scores, _confidence_bins, _calibration_error, by_question=False, of_text=False
)


def reliability_of(cases: Sequence[Case]) -> tuple[ReliabilityBin, ...]:
    """Return the bins that hold questions, of the cases with scores of all their choices."""
    sums = _confidence_bins([case for case in cases if _has_choice_scores(case)]).sum(axis=0).reshape(-1, 3)
    return tuple(ReliabilityBin(int(n), confidence / n, right / n) for n, confidence, right in sums if n)


# A question with more different answers than this has no confusion table.
MOST_CLASSES = 12


def _by_class(cases: Sequence[Case]) -> np.ndarray:
    """Return float[n, 3 * classes], 0 or 1: answer is the class, answer and response are, response is; or [n, 0]."""
    classes = sorted({case.answer for case in cases})
    if len(classes) > MOST_CLASSES:
        return np.zeros((len(cases), 0))
    pairs = [(case.answer, parsed_answer(case)) for case in cases]
    rows = [[(true == name, true == name == parsed, parsed == name) for name in classes] for true, parsed in pairs]
    return np.array(rows, float).reshape(len(cases), -1)


def _mean_of_classes(name: str, formula: Callable[..., np.ndarray]) -> Metric[Case]:
    """Return the mean over occurring answers of a formula of their counts: as answer, right, as response."""

    def mean(sums: np.ndarray) -> np.ndarray:
        true, right, given = np.moveaxis(sums.reshape(*sums.shape[:-1], -1, 3), -1, 0)
        return np.asarray(np.where(true > 0, formula(true, right, given), 0.0).sum(axis=-1) / (true > 0).sum(axis=-1))

    return Metric(name, _expects("choice"), _by_class, mean, as_label, by_question=False)


# Of choices other than yes and no.
CLASS_METRICS = (
    _mean_of_classes("balanced_accuracy_classes", lambda true, right, given: right / true),
    _mean_of_classes("macro_f1_classes", lambda true, right, given: 2 * right / (true + given)),
)


def _relative_error(value: float, true: float) -> float:
    """Return |value - true| / |true|. |true| counts as at least 1e-6: with a truth of 0 every miss is enormous."""
    return abs(value - true) / max(abs(true), 1e-6)


def _error(response: str, answer: str, parse: Callable[[str], float | None]) -> float:
    """Return the relative error of the number in a response, infinite where there is none."""
    value, true = parse(response), parse(answer)
    return math.inf if value is None or true is None else _relative_error(value, true)


# As decimals: 1 - 0.70 is 0.30000000000000004. An error of exactly 0.30 passes, as it does where this was published.
MRA_THRESHOLDS = (0.50, 0.55, 0.60, 0.65, 0.70, 0.75, 0.80, 0.85, 0.90, 0.95)


def share_of_thresholds(error: float) -> float:
    """Return the share of thresholds t = .50, .55 ... .95 for which a relative error is below 1 - t.

    Mean relative accuracy as DeepTumorVQA v1 was scored by Photon. No number is 0. A relative error of 0.30 gives 0.5.
    """
    return sum(error < 1 - threshold for threshold in MRA_THRESHOLDS) / len(MRA_THRESHOLDS)


def mra_thresholds_v1(response: str, answer: str) -> float:
    """Return the `share_of_thresholds` of the first number, whatever its unit."""
    return share_of_thresholds(_error(response, answer, parse_number_v1))


def mra_thresholds(response: str, answer: str) -> float:
    """Return the `share_of_thresholds` of the number that a response means: 1.2 cm is 12 mm, and 12 cm is not."""
    true = parse_quantity(answer)
    value = true and parse_quantity(response, true.unit)
    if not true or not value or (true.unit and value.unit and true.unit != value.unit):
        return 0.0
    return share_of_thresholds(_relative_error(value.value, true.value))


def mra_linear(response: str, answer: str) -> float:
    """Return max(0, 1 - relative error): mean relative accuracy of DeepTumorVQA v2. An error of 0.30 gives 0.7."""
    return max(0.0, 1 - _error(response, answer, parse_number_v2))


def within(response: str, answer: str, band: float) -> float:
    """Return 1 for a relative error of at most `band`, else 0 (DeepTumorVQA v2)."""
    return float(_error(response, answer, parse_number_v2) <= band)


def same_size(response: str, answer: str, band: float) -> float:
    """Return 1 for as many sides, each within `band` of its own, else 0; "20x15 mm" is "1.5 x 2 cm"."""
    size, true = parse_size(response), parse_size(answer)
    if size is None or true is None or size.bound != true.bound or len(size.sides_mm) != len(true.sides_mm):
        return 0.0
    return float(all(_relative_error(a, b) <= band for a, b in zip(size.sides_mm, true.sides_mm, strict=True)))


def _in_band(name: str, applies: Applies[Case], score: Callable[..., float], band: float) -> Metric[Case]:
    return mean_of(f"{name}_{band * 100:.0f}_percent", applies, lambda one: score(one.response, one.answer, band))


NUMERIC_METRICS: tuple[Metric[Case], ...] = (
    mean_of("mra_thresholds", _is_number, lambda case: mra_thresholds(case.response, case.answer)),
    mean_of("mra_thresholds_v1", _is_number, lambda case: mra_thresholds_v1(case.response, case.answer)),
    mean_of("mra_linear", _is_number, lambda case: mra_linear(case.response, case.answer)),
    *(_in_band("within", _is_number, within, band) for band in (0.05, 0.10, 0.20, 0.50)),
)
# How often a size is right, whatever its unit and the order of its sides.
SIZE_METRICS = tuple(_in_band("size_within", _is_size, same_size, band) for band in (0.10, 0.20))


def _score_v1(case: Case) -> float:
    if case.form == "number" and not case.closed:
        return mra_thresholds_v1(case.response, case.answer)
    return float(case.response == case.label)


def _score_v2(case: Case) -> float:
    if case.closed:
        return float(_has_letter_v2(case))
    if case.form == "number":
        return mra_linear(case.response, case.answer)
    if case.form == "yes-no":
        return float(parse_yes_no_v2(case.response) == case.answer.lower())
    return float(_is_equal_normalised(case))


# What each version of DeepTumorVQA averages over all its questions.
SCORE_V1 = mean_of("score_v1", any_question, _score_v1, as_label)
SCORE_V2 = mean_of(
    "score_v2", any_question, _score_v2, lambda case, answer: (as_letter if case.closed else as_label)(case, answer)
)
