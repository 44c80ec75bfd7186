"""What `evaluate` returns: scores, costs, what was kept, by file of predictions; and its tables.

The terminal and the page show the same tables, in which numbers are text already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from photon_train.evaluation.cases import Case, Gaps
from photon_train.evaluation.choice_metrics import ReliabilityBin
from photon_train.evaluation.kept import Costs, Kept, MaskRecalls, Recall, RecallContrast
from photon_train.evaluation.metric import Estimate
from photon_train.evaluation.text_metrics import LabelTable

ALL_TASKS = "all"  # the task of scores over all of them
MACRO = "macro_over_subtasks"  # the average that stands for a task
BLIND = "blind"  # the edit that puts the mean of all volumes in the place of each
QUESTIONS = "per_question.jsonl"  # a line per question, which later evaluations are compared with

# "subtask": of that subtask alone. Of a task: the mean of its subtasks, with equal weights ("macro_over_subtasks") or
# weighted by their numbers of questions.
Average = Literal["subtask", "macro_over_subtasks", "question_weighted"]


@dataclass(frozen=True)
class Settings:
    """How to evaluate."""

    allow_partial: bool = False  # leave questions without a prediction out, and say so, instead of refusing
    bootstrap: int = 1000  # resamplings of the patients
    seed: int = 0  # of the resamplings
    labels: tuple[LabelTable, LabelTable] | None = None  # findings of the reference reports, and of the responses
    with_bertscore: bool = False  # needs the package bert-score and its weights
    grid_zyx: tuple[int, int, int] = (10, 10, 10)  # of visual tokens
    tasks: tuple[str, ...] = ()  # only questions of these; none: of all
    limit: int | None = None  # only so many questions, the first ones of the data


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
    p_value: float | None = None  # of a difference: how often one as large comes by chance, answers swapped by patient


@dataclass(frozen=True)
class ScoredCase:
    """A case, what its response is read as (None: it means no answer), and its scores in points."""

    case: Case
    metric: str  # the first one that applies
    name_of_each: str  # of its score among `scores`
    score: float  # by this metric
    read: str | None = None
    scores: dict[str, float | None] = field(default_factory=dict)  # by every metric that scores single questions


@dataclass(frozen=True)
class Answers:
    """What became of one file of predictions."""

    name: str
    gaps: Gaps
    scores: tuple[Score, ...]
    unparsed: dict[str, int] = field(default_factory=dict)  # by task, responses that mean no answer
    scored_cases: tuple[ScoredCase, ...] = ()  # by id
    costs: Costs | None = None
    kept: Kept | None = None
    mask_recalls: MaskRecalls | None = None
    reliability: tuple[ReliabilityBin, ...] = ()  # of predictions with scores of the choices


@dataclass(frozen=True)
class Comparison:
    """second - first, patients resampled together, over the questions that both answered."""

    first: str
    second: str
    questions: int
    scores: tuple[Score, ...]


@dataclass(frozen=True)
class Moved:
    """How many answers of one set of predictions an edit has moved, in points, with intervals by patient."""

    predictions: str
    edit: str
    questions_of: str  # "all", or of a mirrored volume "a side", "no side"
    questions: int
    patients: int
    moved: Estimate
    expected: Estimate | None  # share that is as it should be: of a mirrored volume alone
    right_before: Estimate
    right_after: Estimate  # against the row's answer, mirrored where the volume is


@dataclass(frozen=True)
class MovedMore:
    """By how much one edit moves more answers than another, over the questions that both apply to."""

    predictions: str
    first: str
    second: str
    questions: int
    difference: Estimate


@dataclass(frozen=True)
class Counterfactuals:
    """All that edits have changed; `responses` by name of the predictions, id and edit."""

    moved: tuple[Moved, ...] = ()
    more: tuple[MovedMore, ...] = ()
    responses: Mapping[str, Mapping[str, Mapping[str, str]]] = field(default_factory=dict)


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
    is_partial: bool  # whether any file of predictions lacks questions or has others
    counterfactuals: Counterfactuals = field(
        default_factory=Counterfactuals
    )  # what edits of the volumes changed, where any were made


class FormattedTable(NamedTuple):
    """A table as the terminal and the page show it: the first column names the line, numbers are text already."""

    title: str
    headings: tuple[str, ...]
    lines: list[tuple[str, ...]]


@dataclass(frozen=True)
class Point:
    """One file of predictions: mean tokens and mean share kept, its score, and by how much it is above the first's."""

    name: str
    kept_tokens: float
    kept_share: float
    estimate: Estimate
    minus_first: Estimate | None
    questions_per_second: float | None


@dataclass(frozen=True)
class TradeOff:
    """What is lost with tokens that are not kept: score against share kept, a point for every file of predictions."""

    metric: str
    task: str
    points: tuple[Point, ...]


def trade_offs(evaluation: Evaluation) -> tuple[TradeOff, ...]:
    """Return one for each metric that is some question's main one, over the broadest task that it is of.

    There is none where fewer than two files of predictions say what they kept.
    """
    answers = evaluation.answers
    if len(answers) < 2 or not all(one.kept for one in answers):
        return ()
    main = {judged.metric for judged in answers[0].scored_cases}
    broadest = {score.metric: score for score in answers[0].scores if score.metric in main and score.average == MACRO}
    minus_first = {one.second: one.scores for one in evaluation.comparisons}
    return tuple(
        TradeOff(like.metric, like.task, tuple(_point(one, minus_first.get(one.name, ()), like) for one in answers))
        for like in broadest.values()
    )


def _point(answers: Answers, minus_first: Sequence[Score], like: Score) -> Point:
    def same(scores: Sequence[Score]) -> Estimate | None:
        key = (like.metric, like.task, like.average)
        return next((score.estimate for score in scores if (score.metric, score.task, score.average) == key), None)

    predictions = [judged.case.prediction for judged in answers.scored_cases]
    assert answers.kept, "trade_offs has looked"
    return Point(
        name=answers.name,
        kept_tokens=float(np.mean([one.kept_tokens for one in predictions if one.visual_tokens])),
        kept_share=answers.kept.mean_ratio,
        estimate=same(answers.scores) or Estimate(None, None, None),
        minus_first=same(minus_first),
        questions_per_second=answers.costs.questions_per_second if answers.costs else None,
    )


def trade_off_table(trade_off: TradeOff) -> FormattedTable:
    """Return the table of a trade-off."""
    headings = ("predictions", "tokens kept", "share", "score", "95 %", "minus the first", "95 %", "questions/s")
    lines = []
    for point in trade_off.points:
        scores = [form(one) for one in (point.estimate, point.minus_first) for form in (formatted, formatted_interval)]
        rate = f"{point.questions_per_second:.2f}" if point.questions_per_second else "-"
        lines.append((point.name, f"{point.kept_tokens:.1f}", f"{point.kept_share:.1%}", *scores, rate))
    return FormattedTable(f"{trade_off.metric}, {trade_off.task}, against visual tokens kept", headings, lines)


def recall_tables(recalls: MaskRecalls) -> list[FormattedTable]:
    """Return the tables of the recall of masks, what was asked about first; those without lines are left out."""

    def of_all(title: str, mask: str, found: Sequence[Recall]) -> FormattedTable:
        headings = (mask, "recall", "chance", "above chance", "95 %", "pairs", "volumes", "patients")
        lines = []
        for one in found:
            scores = (*map(formatted, (one.recall, one.chance, one.above_chance)), formatted_interval(one.above_chance))
            lines.append((one.name, *scores, f"{one.pairs:,}", f"{one.volumes:,}", f"{one.patients:,}"))
        return FormattedTable(f"{title}, all questions", headings, lines)

    tables = [
        _own_and_other("Organs", "organ", recalls.organs),
        _own_and_other("Lesions", "lesion", recalls.lesions),
        of_all("Masks by volume", "volume", recalls.by_size),
        of_all("Masks by name", "mask", recalls.by_mask),
    ]
    return [table for table in tables if table.lines]


def _own_and_other(title: str, mask: str, found: Sequence[RecallContrast]) -> FormattedTable:
    """Return a line per mask: in questions about it, in questions about another organ, and the difference."""

    def cells(half: Recall) -> tuple[str, ...]:
        recall = f"{formatted(half.recall)} ({formatted(half.chance)})"
        return recall, formatted(half.above_chance), formatted_interval(half.above_chance)

    halves = ("asked about (chance)", "above", "95 %", "other organ (chance)", "above", "95 %")
    lines = []
    for one in found:
        difference = (formatted(one.own_minus_other), formatted_interval(one.own_minus_other))
        pairs = f"{one.own.pairs:,} and {one.other.pairs:,}"
        lines.append((one.name, *cells(one.own), *cells(one.other), *difference, pairs))
    title = f"{title}, in questions about them and in questions about another organ"
    return FormattedTable(title, (mask, *halves, "difference", "95 %", "pairs"), lines)


def moved_tables(found: Counterfactuals) -> list[FormattedTable]:
    """Return the table of the answers that edits of the volumes moved, and that of what one moved more than another."""
    headings = ("predictions", "edit", "answers with", "moved", "95 %", "as mirrored", "right before", "right after")
    lines: list[tuple[str, ...]] = [
        (
            *(one.predictions, one.edit, one.questions_of, formatted(one.moved), formatted_interval(one.moved)),
            *map(formatted, (one.expected, one.right_before, one.right_after)),
            *(f"{one.questions:,}", f"{one.patients:,}"),
        )
        for one in found.moved
    ]
    tables = [FormattedTable("Answers moved by an edit of the volume", (*headings, "questions", "patients"), lines)]
    lines = [
        (
            *(one.predictions, f"{one.first} minus {one.second}", formatted(one.difference)),
            *(formatted_interval(one.difference), f"{one.questions:,}"),
        )
        for one in found.more
    ]
    tables.append(
        FormattedTable(
            "What one edit moves more than another",
            ("predictions", "edits", "moved more", "95 %", "questions"),
            lines,
        )
    )
    return [table for table in tables if table.lines]


def formatted(estimate: Estimate | None) -> str:
    """Return "82.01", "-" for what is not defined."""
    return formatted_value(estimate.value if estimate else None)


def formatted_value(value: float | None) -> str:
    """Return "82.01" for a number in points, "-" for None."""
    return "-" if value is None else f"{value:.2f}"


def formatted_p(score: Score) -> str:
    """Return "0.012", "-" where there is none."""
    return "-" if score.p_value is None else f"{score.p_value:.3f}"


def formatted_interval(estimate: Estimate | None) -> str:
    """Return "80.10 to 83.90", "-" for what is not defined."""
    return "-" if estimate is None or estimate.low is None else f"{estimate.low:.2f} to {estimate.high:.2f}"
