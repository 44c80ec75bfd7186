"""Scores over tasks and subtasks with both averages, intervals and baselines; and the results that hold them.

Legend: W ways of weighting the patients (see `metric`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from photon_train.evaluation.baselines import CONSTANT, Baseline, answered
from photon_train.evaluation.cases import Case, Gaps, grouped
from photon_train.evaluation.costs import Costs
from photon_train.evaluation.kept import Kept, MaskRecalls
from photon_train.evaluation.metric import Estimate, Metric, Patients, estimate_of, points
from photon_train.evaluation.text_metrics import LabelTable

# "subtask": of that subtask alone. Of a task: the mean of its subtasks, all alike or each as often as it has questions.
Average = Literal["subtask", "macro_over_subtasks", "question_weighted"]
ALL_TASKS = "all"


@dataclass(frozen=True)
class Score:
    """One number of a table, in points (0 to 100)."""

    metric: str
    task: str
    subtask: str
    average: Average
    estimate: Estimate
    questions: int
    patients: int
    baselines: dict[str, float | None] = field(default_factory=dict)  # the same metric over the same questions, by name
    above_constant: Estimate | None = None  # score minus that of the best constant answer, patients resampled together


@dataclass(frozen=True)
class Settings:
    """How to evaluate."""

    allow_partial: bool = False  # leave questions without a prediction out, and say so, instead of refusing
    bootstrap: int = 1000  # resamplings of the patients
    seed: int = 0  # of the resamplings
    labels: tuple[LabelTable, LabelTable] | None = None  # findings of the reference reports, and of the responses
    with_bertscore: bool = False  # needs the package bert-score and its weights
    grid_zyx: tuple[int, int, int] = (10, 10, 10)  # of visual tokens


@dataclass(frozen=True)
class ScoredCase:
    """A case and its score by the first metric that applies to it, in points."""

    case: Case
    metric: str
    score: float


@dataclass(frozen=True)
class Answers:
    """What became of one file of predictions."""

    name: str
    gaps: Gaps
    scores: tuple[Score, ...]
    unparsed: dict[str, int]  # by task, how many responses mean no choice, yes or no, or number; they count as wrong
    scored_cases: tuple[ScoredCase, ...]  # by id
    costs: Costs | None
    kept: Kept | None
    mask_recalls: MaskRecalls | None = None


@dataclass(frozen=True)
class Comparison:
    """second - first, patients resampled together, over the questions that both answered."""

    first: str
    second: str
    questions: int
    scores: tuple[Score, ...]


@dataclass(frozen=True)
class Evaluation:
    """All results."""

    benchmark: str
    settings: Settings
    questions: int
    patients: int
    answers: tuple[Answers, ...]
    comparisons: tuple[Comparison, ...]
    constants: dict[str, str]  # the best constant answer by kind of question
    learned_on: str  # the rows on which it was chosen

    @property
    def is_partial(self) -> bool:
        """Whether any file of predictions lacks questions or has others."""
        return any(answers.gaps for answers in self.answers)


class Key(NamedTuple):
    """What a score is of."""

    metric: str
    task: str
    subtask: str
    average: Average


class Replicated(NamedTuple):
    """A score under every weighting of the patients."""

    values: np.ndarray  # float[W], between 0 and 1
    weight: np.ndarray  # float[W], the number of questions, each as often as its patient is drawn
    questions: int
    patients: frozenset[int]  # columns of `Patients`


ScoreTable = dict[Key, Replicated]


def table_of(
    cases: Sequence[Case], metrics: Sequence[Metric[Case]], patients: Patients, baseline: Baseline | None = None
) -> ScoreTable:
    """Return every metric of every subtask, task, and of all tasks together, over the cases it applies to.

    With a `baseline` its answers are scored, written as each metric reads them, where it has one.
    """
    answers = {case.id: baseline.answer(case) for case in cases} if baseline else {}
    table: ScoreTable = {}
    for metric in metrics:
        found = cases
        if baseline:
            found = [answered(case, metric, text) for case in cases if (text := answers[case.id]) is not None]
        by_task = grouped((case for case in found if metric.applies(case)), lambda case: case.task)
        everything: list[Replicated] = []
        for task in sorted(by_task):
            subtasks = grouped(by_task[task], lambda case: case.subtask)
            parts = {name: _replicated(metric, subtasks[name], patients) for name in sorted(subtasks)}
            table |= {Key(metric.name, task, name, "subtask"): part for name, part in parts.items()}
            table |= _averages(metric.name, task, [*parts.values()])
            everything += parts.values()
        if len(by_task) > 1:
            table |= _averages(metric.name, ALL_TASKS, everything)
    return table


def _replicated(metric: Metric[Case], cases: Sequence[Case], patients: Patients) -> Replicated:
    columns = patients.of([case.patient for case in cases])
    counts_P = np.bincount(columns, minlength=patients.weights.shape[1]).astype(float)
    values = metric.replicates(cases, columns, patients.weights)
    return Replicated(values, patients.weights @ counts_P, len(cases), frozenset(columns.tolist()))


def _averages(metric: str, task: str, parts: Sequence[Replicated]) -> ScoreTable:
    """Return both averages over subtasks; one that is not defined (no "yes" in it, say) is left out."""
    values, weights = np.stack([part.values for part in parts]), np.stack([part.weight for part in parts])
    defined = np.isfinite(values)
    questions, people = (
        sum(part.questions for part in parts),
        frozenset[int]().union(*(part.patients for part in parts)),
    )

    def mean(weight: np.ndarray) -> Replicated:
        with np.errstate(invalid="ignore"):
            averaged = np.where(defined, values * weight, 0.0).sum(axis=0) / np.where(defined, weight, 0.0).sum(axis=0)
        return Replicated(averaged, weights.sum(axis=0), questions, people)

    return {
        Key(metric, task, "", "macro_over_subtasks"): mean(np.ones_like(weights)),
        Key(metric, task, "", "question_weighted"): mean(weights),
    }


def scores_of(table: ScoreTable, baselines: Mapping[str, ScoreTable]) -> tuple[Score, ...]:
    """Return the scores of a table, task by task, with those of the baselines that answer the very same questions."""
    found = []
    for key, one in _task_by_task(table):
        same = {name: t[key] for name, t in baselines.items() if key in t and t[key].questions == one.questions}
        above = estimate_of(one.values - same[CONSTANT].values) if CONSTANT in same else None
        values = {name: points(float(other.values[0])) for name, other in same.items()}
        found.append(Score(*key, estimate_of(one.values), one.questions, len(one.patients), values, above))
    return tuple(found)


def differences(first: ScoreTable, second: ScoreTable) -> tuple[Score, ...]:
    """Return second - first of what both have over as many questions, patients resampled together."""
    return tuple(
        Score(*key, estimate_of(second[key].values - one.values), one.questions, len(one.patients))
        for key, one in _task_by_task(first)
        if key in second and second[key].questions == one.questions
    )


def _task_by_task(table: ScoreTable) -> list[tuple[Key, Replicated]]:
    """Return the entries by task, all tasks together last; of one task, in the order of the metrics."""
    return sorted(table.items(), key=lambda item: (item[0].task == ALL_TASKS, item[0].task))


def both_averages(scores: Sequence[Score]) -> list[tuple[Score, Score]]:
    """Return (macro over subtasks, question-weighted) of every metric of every task, in the order of the scores."""
    names = ("macro_over_subtasks", "question_weighted")
    macro, weighted = ([score for score in scores if score.average == name] for name in names)
    return list(zip(macro, weighted, strict=True))


class FormattedTable(NamedTuple):
    """A table as the terminal and the page show it: the first column names the line, numbers are text already."""

    title: str
    headings: tuple[str, ...]
    lines: list[tuple[str, ...]]


def formatted(estimate: Estimate | None) -> str:
    """Return "82.01", "-" for what is not defined."""
    return formatted_value(estimate.value if estimate else None)


def formatted_value(value: float | None) -> str:
    """Return "82.01" for a number in points, "-" for None."""
    return "-" if value is None else f"{value:.2f}"


def formatted_interval(estimate: Estimate | None) -> str:
    """Return "80.10 to 83.90", "-" for what is not defined."""
    return "-" if estimate is None or estimate.low is None else f"{estimate.low:.2f} to {estimate.high:.2f}"
