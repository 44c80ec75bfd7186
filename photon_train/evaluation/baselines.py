"""What can be reached without looking at a scan: one answer for everything, one per subtask, rules on the question's words."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import NamedTuple, TypeVar

from photon_data.questions.question import LETTERS
from photon_train.answering.prediction import Prediction
from photon_train.evaluation.cases import Case, Form
from photon_train.evaluation.metric import Metric
from photon_train.evaluation.parsing import number

K = TypeVar("K")
V = TypeVar("V")

CONSTANT, MAJORITY = "best_constant", "majority_per_subtask"
# So many of the most frequent answers are tried as the constant of an open question.
MOST_TRIED = 10
_HISTORY = re.compile(r"\[([01](?:\s*,\s*[01])*)\]")
_LONGITUDINAL = "longitudinal"


class Kind(NamedTuple):
    """Questions that may share one constant answer: of one task, and one form of answer, with or without choices."""

    task: str
    form: Form
    closed: bool


@dataclass(frozen=True)
class Constant:
    """One answer for all: its text, or a choice by its place ("A") where that is right more often."""

    answer: str
    by_letter: bool = False

    def of(self, case: Case) -> str:
        """Return the answer to this case, as its text."""
        if not self.by_letter:
            return self.answer
        place = LETTERS.index(self.answer)
        return case.choices[min(place, len(case.choices) - 1)]


@dataclass(frozen=True)
class Baseline:
    """A way of answering without the scan; None where it has nothing to say."""

    name: str
    answer: Callable[[Case], str | None]


@dataclass(frozen=True)
class Learned:
    """All baselines, the best constant of each kind of question, and the kinds that the training cases do not have."""

    baselines: list[Baseline]
    constants: dict[Kind, Constant]
    not_in_training: set[Kind]


def learn(training: Sequence[Case], evaluated: Sequence[Case], metrics: Sequence[Metric]) -> Learned:
    """Return baselines with constants chosen on the training cases; of kinds that these do not have, on the evaluated ones.

    A subtask that the training cases do not have gets its kind's best constant as its majority.
    """
    known = {kind_of(case) for case in training}
    cases = [*training, *(case for case in evaluated if kind_of(case) not in known)]
    constants = {kind: best_constant(group, metrics) for kind, group in grouped(cases, kind_of).items()}
    by_subtask = grouped(cases, lambda case: (kind_of(case), case.subtask))
    majority = {key: best_constant(group, metrics) for key, group in by_subtask.items()}

    def constant_answer(case: Case) -> str:
        return constants[kind_of(case)].of(case)

    def majority_answer(case: Case) -> str:
        return majority.get((kind_of(case), case.subtask), constants[kind_of(case)]).of(case)

    blind = [Baseline(CONSTANT, constant_answer), Baseline(MAJORITY, majority_answer), *TEXT_RULES]
    return Learned(blind, constants, constants.keys() - known)


def kind_of(case: Case) -> Kind:
    """Return what kind of question a case is."""
    return Kind(case.task, case.form, case.closed)


def grouped(values: Iterable[V], key: Callable[[V], K]) -> dict[K, list[V]]:
    """Return the values (cases, say) by key, in order of first appearance."""
    groups: dict[K, list[V]] = defaultdict(list)
    for value in values:
        groups[key(value)].append(value)
    return dict(groups)


def best_constant(cases: Sequence[Case], metrics: Sequence[Metric]) -> Constant:
    """Return the answer that, always given, scores highest: for closed and yes-no questions, the most frequent text or letter.

    For numbers and words, the one of the most frequent answers (of numbers, their median too) that is best by the first metric
    that applies. Ties go to the more frequent, then to the first in the alphabet: the order of cases does not matter.
    """
    tried = ranked(case.answer for case in cases)
    if cases[0].closed or cases[0].form == "yes-no":
        letters = ranked(case.letter for case in cases if case.letter and case.closed)
        if letters and letters[0][1] > tried[0][1]:
            return Constant(letters[0][0], by_letter=True)
        return Constant(tried[0][0])
    answers = [answer for answer, _ in tried[:MOST_TRIED]]
    if cases[0].form == "number":
        answers += _middle(cases)
    metric = next((metric for metric in metrics if metric.applies(cases[0])), None)
    if metric is None or len(answers) == 1:
        return Constant(answers[0])
    scores = [metric.value([answering(case, metric, answer) for case in cases]) for answer in answers]
    return Constant(answers[scores.index(max(scores))])


def answering(case: Case, metric: Metric, answer: str) -> Case:
    """Return the case with another answer, written as the metric reads it, and nothing of the model's prediction."""
    return replace(case, response=metric.written(case, answer), prediction=Prediction(case.id))


def ranked(answers: Iterable[str]) -> list[tuple[str, int]]:
    """Return answers with their numbers, the most frequent first, equals by the alphabet."""
    return sorted(Counter(answers).items(), key=lambda item: (-item[1], item[0]))


def last_prior(case: Case) -> str | None:
    """By the history in 3D-RAD's longitudinal questions: no prior 1 -> "No Abnormality", last 1 -> "Refractory", else "Resolved".

    The rule was found on the training split.
    """
    priors = _priors(case)
    if priors is None:
        return None
    return _starting(case, "Refractory" if priors[-1] else "Resolved" if any(priors) else "No Abnormality")


def any_prior(case: Case) -> str | None:
    """By the same history: any prior 1 -> "Resolved", else "No Abnormality"."""
    priors = _priors(case)
    return None if priors is None else _starting(case, "Resolved" if any(priors) else "No Abnormality")


TEXT_RULES = (Baseline("text_rule_last_prior", last_prior), Baseline("text_rule_any_prior", any_prior))


def _priors(case: Case) -> list[bool] | None:
    found = _HISTORY.search(case.question) if _LONGITUDINAL in case.task.lower() else None
    return [digit == "1" for digit in re.findall("[01]", found[1])] if found else None


def _starting(case: Case, words: str) -> str | None:
    return next((choice for choice in case.choices if choice.startswith(words)), None)


def _middle(cases: Sequence[Case]) -> list[str]:
    values = [value for case in cases if (value := number(case.answer)) is not None]
    return [f"{median(values):g}"] if values else []
