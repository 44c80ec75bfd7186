"""Tables of an evaluation as the terminal and the page show them: numbers are text already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from photon_train.evaluation.kept import MaskRecalls, Recall, RecallContrast
from photon_train.evaluation.metric import Estimate
from photon_train.evaluation.results import Answers, Counterfactuals, Evaluation, Score

MACRO = "macro_over_subtasks"


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
