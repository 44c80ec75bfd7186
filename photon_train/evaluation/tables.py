"""Metrics over tasks and subtasks, with both averages, intervals, and baselines beside them.

Numbers as tables tell them, on the terminal and on the page.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from photon_train.evaluation.baselines import CONSTANT, Baseline, answering, grouped
from photon_train.evaluation.cases import Case
from photon_train.evaluation.metric import Metric, Patients, interval

# "subtask": of that subtask alone. Of a task: the mean of its subtasks, all alike or each as often as it has questions.
Average = Literal["subtask", "macro_over_subtasks", "question_weighted"]
ALL_TASKS = "all"
POINTS = 100.0


class Key(NamedTuple):
    """What a score is of."""

    metric: str
    task: str
    subtask: str
    average: Average


class Replicated(NamedTuple):
    """A score under every weighting of the patients, and of how much it is.

    values    float[W], between 0 and 1
    weight    float[W], questions, as often as their patients are drawn
    questions, patients   how many questions, and the columns of whose
    """

    values: np.ndarray
    weight: np.ndarray
    questions: int
    patients: frozenset[int]


class Estimate(NamedTuple):
    """A number in points and its 95 % interval; None where it is not defined."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Score:
    """One number of a table, in points (0 to 100).

    estimate        with its interval, by resampling patients
    baselines       the same metric over the same questions of blind answers, by their names
    above_constant  by how much it is above the best constant answer, resampled together
    """

    metric: str
    task: str
    subtask: str
    average: Average
    estimate: Estimate
    questions: int
    patients: int
    baselines: dict[str, float | None] = field(default_factory=dict)
    above_constant: Estimate | None = None


Table = dict[Key, Replicated]


def table_of(cases: Sequence[Case], metrics: Sequence[Metric], patients: Patients) -> Table:
    """Return every metric of every subtask, task, and of all tasks together, over the cases it applies to."""
    return _table(metrics, patients, lambda metric: [case for case in cases if metric.applies(case)])


def table_of_baseline(cases: Sequence[Case], baseline: Baseline, metrics: Sequence[Metric], patients: Patients) -> Table:
    """Return the same of a baseline's answers; of metrics that need a model's scores there is none."""
    answers = {case.id: answer for case in cases if (answer := baseline.answer(case)) is not None}

    def answered(metric: Metric) -> list[Case]:
        blind = (answering(case, metric, answers[case.id]) for case in cases if case.id in answers)
        return [case for case in blind if metric.applies(case)]

    return _table(metrics, patients, answered)


def scores_of(table: Table, blind: dict[str, Table]) -> list[Score]:
    """Return the scores of a table, task by task, with those of the baselines that answer the very same questions."""
    return [_score(key, table[key], blind) for key in _task_by_task(table)]


def differences(first: Table, second: Table) -> list[Score]:
    """Return second - first of what both have over as many questions, patients resampled together."""
    return [
        Score(*key, estimate_of(second[key].values - first[key].values), first[key].questions, len(first[key].patients))
        for key in _task_by_task(first)
        if key in second and second[key].questions == first[key].questions
    ]


def _task_by_task(table: Table) -> list[Key]:
    """Return the keys by task, all tasks together last; of one task, in the order of the metrics."""
    return sorted(table, key=lambda key: (key.task == ALL_TASKS, key.task))


def _table(metrics: Sequence[Metric], patients: Patients, of: Callable[[Metric], list[Case]]) -> Table:
    table: Table = {}
    for metric in metrics:
        everything: list[Replicated] = []
        by_task = grouped(of(metric), lambda case: case.task)
        for task in sorted(by_task):
            subtasks = grouped(by_task[task], lambda case: case.subtask)
            parts = {subtask: _replicated(metric, subtasks[subtask], patients) for subtask in sorted(subtasks)}
            table |= {Key(metric.name, task, subtask, "subtask"): part for subtask, part in parts.items()}
            table |= _averages(metric.name, task, [*parts.values()])
            everything += parts.values()
        if len(by_task) > 1:
            table |= _averages(metric.name, ALL_TASKS, everything)
    return table


def _replicated(metric: Metric, cases: Sequence[Case], patients: Patients) -> Replicated:
    columns = patients.of([case.patient for case in cases])
    counts_P = np.bincount(columns, minlength=patients.weights.shape[1]).astype(float)
    values = metric.replicates(cases, columns, patients.weights)
    return Replicated(values, patients.weights @ counts_P, len(cases), frozenset(columns.tolist()))


def _averages(metric: str, task: str, parts: Sequence[Replicated]) -> Table:
    """Return both averages over subtasks; one that is not defined (no "yes" in it, say) is left out."""
    values, weights = (np.stack([getattr(part, name) for part in parts]) for name in ("values", "weight"))
    there = np.isfinite(values)
    questions, who = sum(part.questions for part in parts), frozenset[int]().union(*(part.patients for part in parts))

    def mean(weight: np.ndarray) -> Replicated:
        with np.errstate(invalid="ignore"):
            averaged = np.where(there, values * weight, 0.0).sum(axis=0) / np.where(there, weight, 0.0).sum(axis=0)
        return Replicated(averaged, weights.sum(axis=0), questions, who)

    return {
        Key(metric, task, "", "macro_over_subtasks"): mean(np.ones_like(weights)),
        Key(metric, task, "", "question_weighted"): mean(weights),
    }


def _score(key: Key, one: Replicated, blind: dict[str, Table]) -> Score:
    same = {name: table[key] for name, table in blind.items() if key in table and table[key].questions == one.questions}
    above = estimate_of(one.values - same[CONSTANT].values) if CONSTANT in same else None
    values = {name: points(float(other.values[0])) for name, other in same.items()}
    return Score(*key, estimate_of(one.values), one.questions, len(one.patients), values, above)


def estimate_of(replicates: np.ndarray) -> Estimate:
    """Return the first of the replicates in points, with the interval of the others."""
    return Estimate(points(float(replicates[0])), *map(points, interval(replicates)))


def both_averages(scores: Sequence[Score]) -> list[tuple[Score, Score]]:
    """Return (macro over subtasks, question-weighted) of every metric of every task, in the order of the scores."""
    names = ("macro_over_subtasks", "question_weighted")
    macro, weighted = ([score for score in scores if score.average == name] for name in names)
    return list(zip(macro, weighted, strict=True))


def points(share: float) -> float | None:
    """Return a share in points with four decimals, None for NaN."""
    return round(POINTS * share, 4) if np.isfinite(share) else None


def told(estimate: Estimate | None) -> str:
    """Return "82.01", "-" for what is not defined."""
    return "-" if estimate is None or estimate.value is None else f"{estimate.value:.2f}"


def told_interval(estimate: Estimate | None) -> str:
    """Return "80.10 to 83.90"."""
    return "-" if estimate is None or estimate.low is None else f"{estimate.low:.2f} to {estimate.high:.2f}"


def told_value(value: float | None) -> str:
    """Return "82.01" for a number in points."""
    return told(Estimate(value, None, None))


class Sheet(NamedTuple):
    """A table as the terminal and the page have it: the first column names the line, numbers are text already."""

    title: str
    headings: tuple[str, ...]
    lines: list[tuple[str, ...]]
