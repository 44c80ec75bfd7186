"""Scores of numbers. Two different ones are published as "MRA"; here each has a name of its own.

Scores of closed questions: four accuracies that differ in what counts as the letter, and what accuracy hides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from photon_train.evaluation.cases import Case, as_label, as_letter, as_letter_and_text
from photon_train.evaluation.metric import Metric, mean_of
from photon_train.evaluation.parsing import (
    choice,
    collapsed,
    contains_letter,
    letter_v2,
    number,
    number_v2,
    size_mm,
    without_punctuation,
    yes_no,
)

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


# Of a question with more different answers than this, no confusion table is made.
MOST_CLASSES = 12
_BLOCK = 64


def is_closed(case: Case) -> bool:
    """Choices were put."""
    return case.closed


def is_yes_no(case: Case) -> bool:
    """The answer is yes or no."""
    return case.form == "yes-no"


def is_choice(case: Case) -> bool:
    """Choices were put, other than yes and no."""
    return case.form == "choice"


def is_free_text(case: Case) -> bool:
    """Words were asked for, without choices."""
    return case.form in ("text", "size") and not case.closed


def meant(case: Case) -> str | None:
    """Return the answer that a response means, as its text; None where it cannot be told. Yes and no in lower case."""
    if case.choices and case.closed:
        index = choice(case.response, case.choices)
        if index is not None:
            return case.choices[index].lower() if is_yes_no(case) else case.choices[index]
    return yes_no(case.response) if is_yes_no(case) else None


def truth(case: Case) -> str:
    """Return the answer in the words of `meant`."""
    return case.answer.lower() if is_yes_no(case) else case.answer


def accuracies() -> list[Metric]:
    """Return the accuracies of closed questions, the robust one first.

    accuracy_robust             the letter, "B. No", or the text, read by `parsing.choice`
    accuracy_contains_letter    "B." stands in the response (3D-RAD, M3D)
    accuracy_normalised         response and label are equal, case and white space apart (Photon on 3D-RAD)
    accuracy_strict             they are equal to the letter (Photon on DeepTumorVQA v1)
    accuracy_scored_choice      the choice with the highest log-probability; of predictions that have them
    """
    return [
        mean_of("accuracy_robust", is_closed, _is_right, as_label),
        mean_of("accuracy_contains_letter", is_closed, _contains_letter, as_letter_and_text),
        mean_of("accuracy_normalised", is_closed, lambda case: collapsed(case.response) == collapsed(case.label), as_label),
        mean_of("accuracy_strict", is_closed, lambda case: case.response == case.label, as_label),
        mean_of("accuracy_scored_choice", has_scores, lambda case: _best_scored(case) == case.answer),
    ]


def accuracy_letter_v2() -> Metric:
    """Return the multiple-choice accuracy of DeepTumorVQA v2."""
    return mean_of("accuracy_letter_v2", is_closed, lambda case: letter_v2(case.response) == case.letter, as_letter)


def accuracy_yes_no() -> Metric:
    """Return the accuracy of yes-no questions that were put without choices; a response that is neither is wrong."""
    return mean_of("accuracy_yes_no", lambda case: is_yes_no(case) and not case.closed, _is_right)


def exact() -> Metric:
    """Return the share of free-text responses that equal the answer to the letter (DeepTumorVQA v1)."""
    return mean_of("exact_strict", is_free_text, lambda case: case.response == case.answer)


def exact_normalised() -> Metric:
    """Return the share that equal it without punctuation and case (DeepTumorVQA v2, categorical)."""
    return mean_of("exact_normalised", is_free_text, equal_normalised)


def partial_match() -> Metric:
    """Return the share of free-text responses that hold the answer, without punctuation and case (DeepTumorVQA v2)."""
    return mean_of(
        "partial_match", is_free_text, lambda case: without_punctuation(case.answer) in without_punctuation(case.response)
    )


def equal_normalised(case: Case) -> float:
    """1 for a response that equals the answer without punctuation and case, else 0."""
    return float(without_punctuation(case.response) == without_punctuation(case.answer))


def yes_no_metrics() -> list[Metric]:
    """Return sensitivity, specificity, their mean, F1 of "yes", and AUROC of predictions with scores.

    A response that is neither yes nor no is wrong: a missed yes, or a false one. DeepTumorVQA v2 takes it for a no, which is
    `specificity_unparsed_is_no`.
    """

    def metric(name: str, formula: Callable[[np.ndarray], np.ndarray]) -> Metric:
        return Metric(name, is_yes_no, _confusion, formula)

    return [
        metric("sensitivity", lambda s: s[..., 0] / (s[..., 0] + s[..., 1])),
        metric("specificity", lambda s: s[..., 2] / (s[..., 2] + s[..., 3])),
        metric("specificity_unparsed_is_no", lambda s: (s[..., 2] + s[..., 4]) / (s[..., 2] + s[..., 3])),
        metric("balanced_accuracy", lambda s: (s[..., 0] / (s[..., 0] + s[..., 1]) + s[..., 2] / (s[..., 2] + s[..., 3])) / 2),
        metric("f1_yes", lambda s: 2 * s[..., 0] / (2 * s[..., 0] + s[..., 1] + s[..., 3])),
        Auroc("auroc", lambda case: is_yes_no(case) and has_scores(case), _scores_and_labels, lambda sums: sums),
    ]


def class_metrics() -> list[Metric]:
    """Return the mean recall and the mean F1 over the answers that occur, of choices other than yes and no."""
    return [
        Metric("balanced_accuracy_classes", is_choice, _by_class, _mean_recall, as_label),
        Metric("macro_f1_classes", is_choice, _by_class, _mean_f1, as_label),
    ]


def has_scores(case: Case) -> bool:
    """All choices have a log-probability."""
    scores = case.prediction.choice_scores
    return case.closed and bool(scores) and all(choice in scores for choice in case.choices)


@dataclass(frozen=True)
class Auroc(Metric):
    """The chance that a random yes has a higher score than a random no, half of it for a tie."""

    def replicates(self, cases: Sequence[Case], patient_n: np.ndarray, weights_WP: np.ndarray) -> np.ndarray:
        """Return float[W]; NaN where all answers are the same."""
        observed = self.observe(cases)
        order = np.argsort(observed[:, 0], kind="stable")
        scores, labels, patients = observed[order, 0], observed[order, 1], patient_n[order]
        starts = np.flatnonzero(np.r_[True, np.diff(scores) > 0])
        blocks = range(0, len(weights_WP), _BLOCK)  # all of them at once would be gigabytes
        return np.concatenate([_auroc(weights_WP[at : at + _BLOCK, patients], labels, starts) for at in blocks])


def _auroc(weights_Wn: np.ndarray, labels: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return the AUROC of each weighting; cases by rising score, `starts` where a new score begins."""
    yes = np.add.reduceat(weights_Wn * labels, starts, axis=1)
    no = np.add.reduceat(weights_Wn * (1 - labels), starts, axis=1)
    below = np.cumsum(no, axis=1) - no
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray((yes * (below + no / 2)).sum(axis=1) / (yes.sum(axis=1) * no.sum(axis=1)))


def _scores_and_labels(cases: Sequence[Case]) -> np.ndarray:
    """Return float[n, 2]: log-probability of yes over no, and 1 for a yes."""
    return np.array([(_yes_over_no(case), truth(case) == "yes") for case in cases], float)


def _yes_over_no(case: Case) -> float:
    scores = {text.lower(): score for text, score in case.prediction.choice_scores.items()}
    return scores["yes"] - scores["no"]


def _best_scored(case: Case) -> str:
    return max(case.choices, key=lambda text: case.prediction.choice_scores[text])


def _is_right(case: Case) -> float:
    return float(meant(case) == truth(case))


def _contains_letter(case: Case) -> float:
    return float(contains_letter(case.response, case.letter))


def _confusion(cases: Sequence[Case]) -> np.ndarray:
    """Return float[n, 5]: found yes, missed yes, right no, false yes or neither, of which neither."""
    rows = []
    for case in cases:
        said, is_yes = meant(case), truth(case) == "yes"
        right = said == truth(case)
        outcomes = (is_yes and right, is_yes and not right, not is_yes and right, not is_yes and not right)
        rows.append((*outcomes, not is_yes and said is None))
    return np.array(rows, float)


def _by_class(cases: Sequence[Case]) -> np.ndarray:
    """Return float[n, 3 * classes]: is of the class, and was said to be, was said to be; [n, 0] for too many classes."""
    classes = sorted({case.answer for case in cases})
    if len(classes) > MOST_CLASSES:
        return np.zeros((len(cases), 0))
    said = [meant(case) for case in cases]
    table = [
        [(case.answer == name, case.answer == name == word, word == name) for name in classes]
        for case, word in zip(cases, said, strict=True)
    ]
    return np.array(table, float).reshape(len(cases), -1)


def _mean_recall(sums: np.ndarray) -> np.ndarray:
    parts = sums.reshape(*sums.shape[:-1], -1, 3)
    return _mean_where(parts[..., 0] > 0, parts[..., 1] / parts[..., 0])


def _mean_f1(sums: np.ndarray) -> np.ndarray:
    parts = sums.reshape(*sums.shape[:-1], -1, 3)
    return _mean_where(parts[..., 0] > 0, 2 * parts[..., 1] / (parts[..., 0] + parts[..., 2]))


def _mean_where(there: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the mean over the last axis of the values that are there."""
    return np.asarray(np.where(there, values, 0.0).sum(axis=-1) / there.sum(axis=-1))
