"""What can be reached without a scan: one answer for everything, one per subtask, rules on the question's text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import NamedTuple

from photon_data.questions.question import LETTERS
from photon_train.evaluation.cases import Case, Form, grouped
from photon_train.evaluation.metric import Metric
from photon_train.evaluation.readings import parse_number_v1
from photon_train.rows import Prediction

CONSTANT, MAJORITY = "best_constant", "majority_per_subtask"
# So many of the most frequent answers are tried as the constant of an open question.
MOST_TRIED = 10


class Kind(NamedTuple):
    """Questions that may share one constant answer: of one task and one form of answer, with or without choices."""

    task: str
    form: Form
    closed: bool

    def __str__(self) -> str:
        return f"{self.task}, {self.form}, {'choices shown' if self.closed else 'open'}"


@dataclass(frozen=True)
class Constant:
    """One answer for all: its text, or the letter of a choice ("A") where that is right more often."""

    answer: str
    by_letter: bool = False

    def of(self, case: Case) -> str:
        """Return the answer to this case, as its text."""
        if not self.by_letter:
            return self.answer
        return case.choices[min(LETTERS.index(self.answer), len(case.choices) - 1)]


# A way of answering without the scan; None where it has no answer.
Baseline = Callable[[Case], str | None]


class Baselines(NamedTuple):
    """All of them."""

    baselines: Mapping[str, Baseline]
    constants: dict[str, str]  # the best answer by kind of question
    learned_on: str  # the rows that it was chosen on


def fit_baselines(training: Sequence[Case], evaluated: Sequence[Case], metrics: Sequence[Metric[Case]]) -> Baselines:
    """Return baselines with constants chosen on the training cases; of kinds that these lack, on the evaluated ones.

    A subtask that the training cases do not have gets its kind's best constant as its majority.
    """
    known = {_kind_of(case) for case in training}
    cases = [*training, *(case for case in evaluated if _kind_of(case) not in known)]
    constants = {kind: best_constant(group, metrics) for kind, group in grouped(cases, _kind_of).items()}
    by_subtask = grouped(cases, lambda case: (_kind_of(case), case.subtask))
    majority = {key: best_constant(group, metrics) for key, group in by_subtask.items()}

    def majority_answer(case: Case) -> str:
        kind = _kind_of(case)
        return majority.get((kind, case.subtask), constants[kind]).of(case)

    baselines: dict[str, Baseline] = {
        CONSTANT: lambda case: constants[_kind_of(case)].of(case),
        MAJORITY: majority_answer,
        "text_rule_last_prior": last_prior,
        "text_rule_any_prior": any_prior,
    }
    lacking = ", ".join(sorted({kind.task for kind in constants.keys() - known}))
    learned_on = "the training rows" + (f", which lack {lacking}: there on the evaluated rows" if lacking else "")
    best = {str(kind): constant.answer for kind, constant in sorted(constants.items())}
    return Baselines(baselines, best, learned_on if training else "the evaluated rows themselves")


def _kind_of(case: Case) -> Kind:
    return Kind(case.task, case.form, case.closed)


def best_constant(cases: Sequence[Case], metrics: Sequence[Metric[Case]]) -> Constant:
    """Return the answer that scores highest when it is always given.

    Closed and yes-no questions: the most frequent text or letter. Numbers and text: of the most frequent answers (and
    the median of numbers) the one that is best by the first metric that applies. Ties go to the more frequent, then
    to the first in the alphabet: the order of cases does not matter.
    """
    first, answers = cases[0], _ranked(case.answer for case in cases)
    if first.closed or first.form == "yes-no":
        letters = _ranked(case.letter for case in cases if case.letter and case.closed)
        if letters and letters[0][1] > answers[0][1]:
            return Constant(letters[0][0], by_letter=True)
        return Constant(answers[0][0])
    tried = [answer for answer, _ in answers[:MOST_TRIED]]
    if first.form == "number":
        numbers = [value for case in cases if (value := parse_number_v1(case.answer)) is not None]
        tried += [f"{median(numbers):g}"] if numbers else []
    metric = next((metric for metric in metrics if metric.applies(first)), None)
    if metric is None:
        return Constant(tried[0])
    return Constant(max(tried, key=lambda answer: metric.value([answered(case, metric, answer) for case in cases])))


def _ranked(answers: Iterable[str]) -> list[tuple[str, int]]:
    """Return answers with their counts, the most frequent first, equals by the alphabet."""
    return sorted(Counter(answers).items(), key=lambda item: (-item[1], item[0]))


def answered(case: Case, metric: Metric[Case], answer: str) -> Case:
    """Return the case with another answer, written as the metric reads it, and nothing of the model's prediction."""
    return replace(case, response=metric.written(case, answer), prediction=Prediction(case.id))


def last_prior(case: Case) -> str | None:
    """Answer 3D-RAD's longitudinal questions by the history that they tell: a list of 0 and 1.

    No prior is 1 -> "No Abnormality", the last is 1 -> "Refractory", else "Resolved". The rule was found on the
    training split.
    """
    priors = _priors(case)
    return priors and (_choice_named(case, "Refractory") if priors[-1] == "1" else any_prior(case))


def any_prior(case: Case) -> str | None:
    """Answer the same questions by another rule: any prior is 1 -> "Resolved", else "No Abnormality"."""
    priors = _priors(case)
    return priors and _choice_named(case, "Resolved" if "1" in priors else "No Abnormality")


def _priors(case: Case) -> str | None:
    """Return the history of a longitudinal question: "Emphysema: [0, 1]." -> "01"; None where it has none."""
    found = re.search(r"\[([01](?:\s*,\s*[01])*)\]", case.question) if "longitudinal" in case.task.lower() else None
    return "".join(re.findall("[01]", found[1])) if found else None


def _choice_named(case: Case, start: str) -> str | None:
    return next((choice for choice in case.choices if choice.startswith(start)), None)
