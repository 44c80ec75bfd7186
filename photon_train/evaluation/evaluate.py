"""Rows and predictions -> an evaluation: scores by a benchmark, intervals, baselines, costs, kept tokens.

Reads and writes no files. Legend: W ways of weighting the patients (see `metric`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from photon_data.errors import UsageError
from photon_train.evaluation import choice_metrics as choice
from photon_train.evaluation.baselines import CONSTANT, Baseline, answered, fit_baselines
from photon_train.evaluation.cases import AnyRow, Case, Gaps, Joined, case_of, grouped, join, rows_by_id
from photon_train.evaluation.choice_metrics import any_question, is_free_text
from photon_train.evaluation.kept import VolumeMask, mask_recalls, summarise_costs, summarise_kept
from photon_train.evaluation.metric import Metric, Patients, draw_patients, estimate_of, points
from photon_train.evaluation.results import (
    ALL_TASKS,
    Answers,
    Average,
    Comparison,
    Evaluation,
    Score,
    ScoredCase,
    Settings,
)
from photon_train.evaluation.text_metrics import bertscore, bleu, label_metrics, meteor_exact_stem, rouge
from photon_train.rows import Prediction, Row

if TYPE_CHECKING:
    from photon_train.configuration_photon import PhotonConfig

BLIND = "blind baselines"

_CLOSED = (
    *choice.ACCURACIES,
    choice.ACCURACY_YES_NO,
    *choice.YES_NO_METRICS,
    *choice.CLASS_METRICS,
    choice.CALIBRATION_ERROR,
)
_NUMERIC, _SIZES, _EXACT = choice.NUMERIC_METRICS, choice.SIZE_METRICS, choice.EXACT_NORMALISED
_BLEU_1, _ROUGE_1, _ROUGE_L = bleu(1, is_free_text), rouge("rouge1", is_free_text), rouge("rougeL", is_free_text)
# Which metrics each benchmark is scored by. The first one that applies to a question is its main one.
BENCHMARKS: dict[str, tuple[Metric[Case], ...]] = {
    # Accuracies of closed questions, corpus BLEU-1 and ROUGE-1 of open ones; sizes as sizes too.
    "3d-rad": (*_CLOSED, _BLEU_1, _ROUGE_1, _EXACT, *_SIZES),
    # As scored by Photon: strict equality, and mra_thresholds of numbers.
    "deeptumorvqa-v1": (choice.SCORE_V1, *_CLOSED, *_NUMERIC, choice.EXACT_STRICT, _EXACT),
    # Its own letter, mra_linear and bands of numbers, yes and no, and text without punctuation and case.
    "deeptumorvqa-v2": (choice.SCORE_V2, choice.ACCURACY_LETTER_V2, *_CLOSED, *_NUMERIC, _EXACT, choice.PARTIAL_MATCH),
    # Corpus BLEU-1 to 4, ROUGE-1 and L, METEOR of words and stems.
    "report": (
        rouge("rouge1", any_question),
        *(bleu(order, any_question) for order in (1, 2, 3, 4)),
        *(rouge("rougeL", any_question), meteor_exact_stem(any_question)),
    ),
    # Any questions: the metrics that suit the form of each.
    "vqa": (*_CLOSED, *_NUMERIC, *_SIZES, _BLEU_1, _ROUGE_1, _ROUGE_L, _EXACT),
}


def evaluate(
    benchmark: str,
    rows: Sequence[Row],
    predictions: Mapping[str, Iterable[Prediction]],
    *,
    train: Sequence[Row] = (),
    settings: Settings | None = None,
    config: PhotonConfig | None = None,
    masks: Mapping[str, Sequence[VolumeMask]] | None = None,
    questions: Mapping[str, Row] | None = None,
) -> Evaluation:
    """Return the scores of each named set of predictions of the rows, and of each later set against the first.

    benchmark  a key of BENCHMARKS
    rows       of a manifest; `train`: those that constant answers are chosen on (none: the evaluated ones)
    config     the model's, to count FLOPs
    masks      of volumes, by id, to see what was kept of them
    questions  what `check` has returned for the rows, so that they are not looked at again

    Without any predictions, only the baselines are scored, under the name BLIND. The same rows and predictions, in
    whatever order, give the same result. UsageError for predictions that do not match the rows (see `join`), an
    unknown benchmark, rows without answers, and rows that the benchmark has no metric for.
    """
    settings = settings or Settings()
    metrics = _metrics(benchmark, settings)
    if settings.labels and len(predictions) > 1:
        raise UsageError(f"expected one file of predictions beside labels of its responses, found {len(predictions)}")
    questions = rows_by_id(_chosen(rows, settings)) if questions is None else questions
    left_out = {row["id"] for row in rows} - questions.keys()
    files = [
        (name, join(questions, [one for one in found if one.id not in left_out], allow_partial=settings.allow_partial))
        for name, found in predictions.items()
    ]
    cases = [case_of(questions[id], Prediction(id)) for id in sorted(questions)]
    without = [case for case in cases if not any(metric.applies(case) for metric in metrics)]
    if without:
        raise UsageError(
            f"expected questions that {benchmark} has metrics for, found {len(without)} that need a {without[0].form}, "
            f"{without[0].id!r} first; vqa has metrics for all"
        )
    learning = sorted((row for row in train if row["answer"]), key=lambda row: row["id"])
    fitted = fit_baselines([case_of(row, Prediction(row["id"])) for row in learning], cases, metrics)
    patients = draw_patients([case.patient for case in cases], settings.bootstrap, settings.seed)
    scoring = _Scoring(metrics, fitted.baselines, patients, settings, config, masks or {})
    return Evaluation(
        benchmark=benchmark,
        settings=settings,
        questions=len(cases),
        patients=len(patients.index),
        answers=tuple(scoring.answers(*file) for file in files) or (scoring.baselines_alone(cases),),
        comparisons=tuple(scoring.comparison(*files[0], *other) for other in files[1:]),
        constants=fitted.constants,
        learned_on=fitted.learned_on,
        is_partial=any(joined.gaps for _, joined in files),
    )


def _chosen(rows: Sequence[AnyRow], settings: Settings) -> Sequence[AnyRow]:
    """Return the rows of the settings' tasks, at most their limit, in order. UsageError for a task that no row has."""
    names = {row["task"] or row["channel"] for row in rows}
    if unknown := sorted(set(settings.tasks) - names):
        raise UsageError(f"expected tasks of the data ({', '.join(sorted(names))}), found {', '.join(unknown)}")
    found = [row for row in rows if not settings.tasks or (row["task"] or row["channel"]) in settings.tasks]
    return found[: settings.limit]


def check(benchmark: str, rows: Sequence[AnyRow], settings: Settings) -> dict[str, AnyRow]:
    """Return the rows that are scored by id, in order: those of the settings' tasks, at most their limit.

    Raises the UsageError that `evaluate` would raise for any predictions: useful before a model makes them.
    """
    _metrics(benchmark, settings)
    return rows_by_id(_chosen(rows, settings))


def _metrics(benchmark: str, settings: Settings) -> list[Metric[Case]]:
    if benchmark not in BENCHMARKS:
        raise UsageError(f"expected one of {', '.join(BENCHMARKS)} as benchmark, found {benchmark!r}")
    of_labels = label_metrics(*settings.labels) if settings.labels else []
    return [*BENCHMARKS[benchmark], *of_labels, *([bertscore(any_question)] if settings.with_bertscore else [])]


@dataclass(frozen=True)
class _Scoring:
    """How the cases of every file of predictions are scored: `masks` by volume id, `config` of the model."""

    metrics: Sequence[Metric[Case]]
    baselines: Mapping[str, Baseline]
    patients: Patients
    settings: Settings
    config: PhotonConfig | None
    masks: Mapping[str, Sequence[VolumeMask]]

    def answers(self, name: str, joined: Joined) -> Answers:
        cases = joined.cases
        counted = any(case.prediction.visual_tokens for case in cases)
        timed = any(case.prediction.seconds for case in cases)
        return Answers(
            name=name,
            gaps=joined.gaps,
            scores=scores_of(table_of(cases, self.metrics, self.patients), self.baseline_tables(cases)),
            unparsed=dict(sorted(Counter(case.task for case in cases if choice.what_is_read(case) is None).items())),
            scored_cases=tuple(self.scored(cases)),
            costs=summarise_costs(cases, self.config) if timed or (counted and self.config) else None,
            kept=summarise_kept(cases, self.settings.grid_zyx) if counted else None,
            mask_recalls=mask_recalls(cases, self.masks, self.patients) if self.masks else None,
            reliability=choice.reliability_of(cases),
        )

    def baselines_alone(self, cases: Sequence[Case]) -> Answers:
        """Return the best constant answers as if a model had given them."""
        tables = self.baseline_tables(cases)
        return Answers(BLIND, Gaps(len(cases)), scores_of(tables[CONSTANT], tables))

    def baseline_tables(self, cases: Sequence[Case]) -> dict[str, ScoreTable]:
        of_text = [metric for metric in self.metrics if metric.of_text]
        tables = {name: table_of(cases, of_text, self.patients, answer) for name, answer in self.baselines.items()}
        if self.settings.labels:
            reference, responses = self.settings.labels
            for name, value in (("labels_all_negative", 0), ("labels_all_positive", 1)):
                tables[name] = table_of(cases, label_metrics(reference, responses.constant(value)), self.patients)
        return tables

    def scored(self, cases: Sequence[Case]) -> Iterator[ScoredCase]:
        scores: dict[str, dict[str, float | None]] = {case.id: {} for case in cases}
        for metric in (metric for metric in self.metrics if metric.by_question):
            if found := [case for case in cases if metric.applies(case)]:
                for case, value in zip(found, metric.of_each(found).tolist(), strict=True):
                    scores[case.id][metric.name_of_each] = points(value)
        for case in cases:
            main = next(metric for metric in self.metrics if metric.applies(case))
            own, name = scores[case.id], main.name_of_each
            yield ScoredCase(case, main.name, name, own[name] or 0.0, choice.what_is_read(case), own)

    def comparison(self, first: str, one: Joined, second: str, other: Joined) -> Comparison:
        """Return second - first of what both have over as many questions."""
        return compared(first, one.cases, second, other.cases, self.metrics, self.patients, self.settings)


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
    answers = {case.id: baseline(case) for case in cases} if baseline else {}
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
    questions, people = sum(part.questions for part in parts), frozenset().union(*(part.patients for part in parts))

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


def _task_by_task(table: ScoreTable) -> list[tuple[Key, Replicated]]:
    """Return the entries by task, all tasks together last; of one task, in the order of the metrics."""
    return sorted(table.items(), key=lambda item: (item[0].task == ALL_TASKS, item[0].task))


def compared(
    first: str,
    one: Sequence[Case],
    second: str,
    other: Sequence[Case],
    metrics: Sequence[Metric[Case]],
    patients: Patients,
    settings: Settings,
) -> Comparison:
    """Return second - first over the questions that both answered, with intervals and p-values by patient."""
    both = {case.id for case in one} & {case.id for case in other}
    subtrahend, minuend = ([case for case in cases if case.id in both] for cases in (one, other))
    table, larger = (table_of(cases, metrics, patients) for cases in (subtrahend, minuend))
    chances = _p_values(
        subtrahend, minuend, [metric for metric in metrics if metric.of_text and not metric.is_costly], settings
    )
    scores = tuple(
        Score(
            *key,
            estimate_of(larger[key].values - value.values),
            value.questions,
            len(value.patients),
            p_value=chances.get(key),
        )
        for key, value in _task_by_task(table)
        if key in larger and larger[key].questions == value.questions
    )
    return Comparison(first, second, len(both), scores)


def _p_values(
    one: Sequence[Case], other: Sequence[Case], metrics: Sequence[Metric[Case]], settings: Settings
) -> dict[Key, float]:
    """Return by score how often a difference at least as large comes by chance, by a permutation test of patients.

    If both are equally good, the answers of any patient can be swapped between them. They are, for a random half of
    the patients, as often as patients are resampled; the observed difference counts as one of these.
    """
    names = sorted({case.patient for case in one})
    if not (names and settings.bootstrap):
        return {}
    drawn = np.random.default_rng([settings.seed, 1]).random((settings.bootstrap, len(names))) < 0.5
    swapped = np.vstack([np.zeros(len(names)), drawn])
    index = {f"{name}\n{side}": i + side * len(names) for side in (0, 1) for i, name in enumerate(names)}
    cases = [replace(case, patient=f"{case.patient}\n{side}") for side in (0, 1) for case in (one, other)[side]]
    first, second = (
        table_of(cases, metrics, Patients(index, np.hstack(weights)))
        for weights in ((1 - swapped, swapped), (swapped, 1 - swapped))
    )
    found = {}
    for key in first.keys() & second.keys():
        differences = np.abs(second[key].values - first[key].values)
        if np.isfinite(differences).all():
            found[key] = float(np.mean(differences >= differences[0] - 1e-12))
    return found
