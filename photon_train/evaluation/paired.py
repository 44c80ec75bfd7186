"""Evaluations on disk -> pairs that are compared question by question, without data, predictions or a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

from photon_data.errors import UsageError, first_few
from photon_data.questions.table import Problem, read_table, refuse
from photon_train.evaluation.cases import Case
from photon_train.evaluation.metric import POINTS, Metric, Patients, draw_patients, mean_of
from photon_train.evaluation.results import QUESTIONS, Settings


@dataclass(frozen=True)
class ScoredQuestion:
    """A line of per_question.jsonl."""

    id: str
    patient: str
    task: str
    subtask: str
    answer: str
    metric: str  # its main one
    scores: dict[str, float | None] = field(hash=False)


def read_scored(path: Path) -> dict[str, list[ScoredQuestion]]:
    """Return the questions by name of their predictions, of the folder of an evaluation or its per_question.jsonl.

    UsageError for another file, and for a question that occurs twice.
    """
    file = path / QUESTIONS if path.is_dir() else path
    table, problems = read_table(file), list[Problem]()
    found: dict[str, dict[str, ScoredQuestion]] = {}
    for row in table.rows:
        try:
            texts = [row.values[name] for name in ("id", "patient", "task", "subtask", "answer", "metric")]
            name, scores = row.values["predictions"], row.values["scores"]
            if not all(isinstance(text, str) for text in (*texts, name)) or not isinstance(scores, dict):
                raise ValueError
            if not all(score is None or type(score) in (int, float) for score in scores.values()):
                raise ValueError
        except (KeyError, ValueError):
            problems.append(Problem(row.place, "no scores", "expected a line of `photon eval`, found another"))
            continue
        if texts[0] in found.setdefault(name, {}):
            problems.append(
                Problem(row.place, "question twice", f"expected each question once, found {texts[0]!r} again")
            )
        id, patient, task, subtask, answer, metric = texts
        found[name][id] = ScoredQuestion(id, patient, task, subtask, answer, metric, scores)
    if problems := [*table.problems, *problems]:
        refuse(file, problems)
    return {name: sorted(questions.values(), key=lambda one: one.id) for name, questions in found.items()}


class Pair(NamedTuple):
    """Two evaluations of the same questions; both sides in the same order."""

    first: str
    one: list[Case]
    second: str
    other: list[Case]
    metrics: list[Metric[Case]]  # those that score single questions
    patients: Patients


def pairs_of(evaluations: Sequence[tuple[str, Sequence[ScoredQuestion]]], settings: Settings) -> list[Pair]:
    """Return the first evaluation with each later one; only the questions of both count.

    UsageError where these have other answers or patients, and where none is of both.
    """
    first, one = evaluations[0]
    found = []
    for second, other in evaluations[1:]:
        theirs = {question.id: question for question in other}
        both = [(question, theirs[question.id]) for question in one if question.id in theirs]
        if odd := [a.id for a, b in both if (a.answer, a.patient, a.task) != (b.answer, b.patient, b.task)]:
            others = f"others for {len(odd)}: {first_few(odd)}"
            raise UsageError(f"{second}: expected the answers, patients and tasks of {first}, found {others}")
        if not both:
            raise UsageError(f"{second}: expected questions of {first}, found none; were they made from the same data?")
        metrics = [_metric(name) for name in dict.fromkeys(name for question in one for name in question.scores)]
        patients = draw_patients([question.patient for question in one], settings.bootstrap, settings.seed)
        # A metric needs no more of a case than a line has.
        cases = [cast(list[Case], [pair[side] for pair in both]) for side in (0, 1)]
        found.append(Pair(first, cases[0], second, cases[1], metrics, patients))
    return found


def _metric(name: str) -> Metric[Case]:
    """Return the mean of the scores of that name, of questions that have one."""

    def score(question: Any) -> float:
        return float(question.scores[name]) / POINTS

    return mean_of(name, lambda question: cast(Any, question).scores.get(name) is not None, score)
