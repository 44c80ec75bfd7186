"""What is lost with the tokens that are not kept: score against share kept, of every file of predictions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from photon_train.evaluation.evaluate import Answers, Evaluation
from photon_train.evaluation.scores import Estimate, Score
from photon_train.evaluation.words import Sheet, told, told_interval

HEADINGS = ("predictions", "tokens kept", "share", "score", "95 %", "minus the first", "95 %", "questions/s")
MACRO = "macro_over_subtasks"


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
    """The points of one metric, of all tasks that it is of."""

    metric: str
    task: str
    points: tuple[Point, ...]


def trade_offs(evaluation: Evaluation) -> tuple[TradeOff, ...]:
    """Return one for each metric that is some question's main one; none where fewer than two files say what they kept."""
    answers = evaluation.answers
    if len(answers) < 2 or not all(one.kept for one in answers):
        return ()
    main = {judged.metric for judged in answers[0].judged}
    broadest = {score.metric: score for score in answers[0].scores if score.metric in main and score.average == MACRO}
    return tuple(TradeOff(score.metric, score.task, _points(evaluation, score)) for score in broadest.values())


def sheet(trade_off: TradeOff) -> Sheet:
    """Return the table of a trade-off."""
    title = f"{trade_off.metric}, {trade_off.task}, against visual tokens kept"
    return Sheet(title, HEADINGS, [_line(point) for point in trade_off.points])


def _line(point: Point) -> tuple[str, ...]:
    minus, rate = point.minus_first, point.questions_per_second
    scores = (told(point.estimate), told_interval(point.estimate), told(minus), told_interval(minus))
    return (point.name, f"{point.kept_tokens:.1f}", f"{point.kept_share:.1%}", *scores, f"{rate:.2f}" if rate else "-")


def _points(evaluation: Evaluation, like: Score) -> tuple[Point, ...]:
    minus = {one.second: _same(one.scores, like) for one in evaluation.comparisons}
    return tuple(_point(one, like, minus.get(one.name)) for one in evaluation.answers)


def _point(answers: Answers, like: Score, minus_first: Estimate | None) -> Point:
    assert answers.kept, "looked at before"
    predictions = [judged.case.prediction for judged in answers.judged if judged.case.prediction.visual_tokens]
    return Point(
        name=answers.name,
        kept_tokens=float(np.mean([prediction.kept_tokens for prediction in predictions])),
        kept_share=answers.kept.mean_ratio,
        estimate=_same(answers.scores, like) or Estimate(None, None, None),
        minus_first=minus_first,
        questions_per_second=answers.costs.questions_per_second if answers.costs else None,
    )


def _same(scores: tuple[Score, ...], like: Score) -> Estimate | None:
    """Return the estimate of the same metric, task and average."""
    key = (like.metric, like.task, like.average)
    return next((score.estimate for score in scores if (score.metric, score.task, score.average) == key), None)
