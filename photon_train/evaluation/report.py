"""An evaluation -> scores.json and report.html, the same bytes for the same evaluation; and tables for the terminal."""

from __future__ import annotations

import json
import mimetypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from photon_data.files import Location, jsonl_bytes
from photon_data.report import page
from photon_train.evaluation.baselines import CONSTANT, MAJORITY
from photon_train.evaluation.cases import Case, grouped
from photon_train.evaluation.choice_metrics import ReliabilityBin
from photon_train.evaluation.kept import Kept
from photon_train.evaluation.metric import Estimate
from photon_train.evaluation.results import (
    ALL_TASKS,
    BLIND,
    MACRO,
    QUESTIONS,
    Answers,
    Comparison,
    Counterfactuals,
    Evaluation,
    Score,
    ScoredCase,
    TradeOff,
    formatted,
    formatted_interval,
    formatted_p,
    formatted_value,
    moved_tables,
    recall_tables,
    trade_off_table,
    trade_offs,
)

SCORES, REPORT = "scores.json", "report.html"
TEMPLATE = Path(__file__).parent / "report.html.j2"
SHOWN_CASES = 12
SHOWN_UNREAD = 50
# These look for the letter of a choice, which a question without letters does not ask for: all zeros say nothing.
OF_LETTERS = ("accuracy_contains_letter", "accuracy_letter_v2")


def write_report(
    evaluation: Evaluation, folder: Path, *, overlays: Mapping[str, Mapping[str, Path]] | None = None, title: str = ""
) -> list[Path]:
    """Write scores.json and report.html into `folder`, each whole or not at all, and return their paths.

    `overlays`: by name of the predictions, pictures (png, jpeg) by question id. The page holds those that it shows.
    """
    pictures = overlays or {}
    values = {
        "title": title or f"{evaluation.benchmark}: evaluation",
        "evaluation": evaluation,
        "sections": [_section(answers, pictures.get(answers.name, {})) for answers in evaluation.answers],
        "trade_offs": [(trade_off_table(one), _trade_off_chart(one)) for one in trade_offs(evaluation)],
        "differences": [_differences(evaluation.answers[0], comparison) for comparison in evaluation.comparisons],
        "moved": moved_tables(evaluation.counterfactuals),
        "moved_charts": _moved_charts(evaluation.counterfactuals),
    }
    blind_names = {CONSTANT: "constant", MAJORITY: "majority"}
    filters: dict[str, Callable[..., str]] = {
        "points": formatted,
        "interval": formatted_interval,
        "p": formatted_p,
        "three": _three,
        "flop": lambda tflop: f"{_three(tflop)} TFLOP" if tflop >= 0.1 else f"{_three(1000 * tflop)} GFLOP",
        "value": formatted_value,
        "blind_name": lambda name: blind_names.get(name, name.replace("_", " ")),
        "image": lambda path: page.data_url(path.read_bytes(), mimetypes.guess_type(path)[0] or "image/png"),
    }
    where, text = Location(str(folder)), json.dumps(to_json(evaluation), indent=1, ensure_ascii=False, allow_nan=False)
    where.write(REPORT, page.render(TEMPLATE, values, filters))
    where.write(SCORES, f"{text}\n".encode("utf-8", "backslashreplace"))
    return [folder / SCORES, folder / REPORT]


def _three(value: float) -> str:
    """Return three digits of a number, all of a large one: 0.0293, 18.8, 1,240."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def write_questions(evaluation: Evaluation, folder: Path) -> Path:
    """Write per_question.jsonl into `folder`, a line per question and file of predictions, and return its path.

    It holds what was asked of whom, the answer, the response, what was read from it (null: nothing) and all scores.
    """
    names = ("id", "patient", "volume_id", "task", "subtask", "answer")
    rows = (
        {
            "predictions": answers.name,
            **{name: getattr(one.case, name) for name in names},
            "response": one.case.prediction.response,
            "read": one.read,
            "metric": one.name_of_each,
            "scores": one.scores,
            **({"counterfactual": edited[one.case.id]} if one.case.id in edited else {}),
        }
        for answers in evaluation.answers
        for edited in [evaluation.counterfactuals.responses.get(answers.name, {})]
        for one in answers.scored_cases
    )
    Location(str(folder)).write(QUESTIONS, jsonl_bytes(rows))
    return folder / QUESTIONS


def to_json(evaluation: Evaluation) -> dict[str, Any]:
    """Return the evaluation as plain values: scores in points, intervals as [low, high], single questions left out."""
    labels = evaluation.settings.labels
    return {
        "benchmark": evaluation.benchmark,
        "questions": evaluation.questions,
        "patients": evaluation.patients,
        "partial": evaluation.is_partial,
        "settings": {**asdict(replace(evaluation.settings, labels=None)), "labels": labels is not None},
        "constants": {"learned_on": evaluation.learned_on, "answers": evaluation.constants},
        "predictions": [
            {
                "name": answers.name,
                "gaps": asdict(answers.gaps),
                "unparsed": answers.unparsed,
                "calibration": [_rounded(one._asdict()) for one in answers.reliability],
                "scores": [_score_to_json(score) for score in answers.scores],
                "costs": _rounded(answers.costs and asdict(answers.costs)),
                "kept": _rounded(answers.kept and asdict(answers.kept)),
                "masks": _rounded(answers.mask_recalls and asdict(answers.mask_recalls)),
            }
            for answers in evaluation.answers
        ],
        "differences": [comparison_to_json(comparison) for comparison in evaluation.comparisons],
        "trade_offs": [_rounded(asdict(trade_off)) for trade_off in trade_offs(evaluation)],
        "counterfactuals": {
            "moved": [_rounded(vars(one)) for one in evaluation.counterfactuals.moved],
            "moved_more": [_rounded(vars(one)) for one in evaluation.counterfactuals.more],
        },
    }


def comparison_to_json(comparison: Comparison) -> dict[str, Any]:
    """Return the differences of two files of predictions as plain values."""
    row = {name: getattr(comparison, name) for name in ("first", "second", "questions")}
    return row | {"second_minus_first": [_score_to_json(score) for score in comparison.scores]}


def _score_to_json(score: Score) -> dict[str, Any]:
    row = {name: getattr(score, name) for name in ("metric", "task", "subtask", "average")}
    row |= {"value": score.estimate.value, "interval": list(score.estimate[1:])}
    row |= {"questions": score.questions, "patients": score.patients}
    row |= {"baselines": score.baselines} if score.baselines else {}
    row |= {"p_value": score.p_value} if score.p_value is not None else {}
    if score.above_constant:
        row["above_constant"] = {"value": score.above_constant.value, "interval": list(score.above_constant[1:])}
    return row


def _rounded(value: Any) -> Any:
    """Return plain values with floats of 6 digits, an estimate as {"value", "interval"}."""
    if isinstance(value, Estimate):
        return {"value": value.value, "interval": [value.low, value.high]}
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _section(answers: Answers, pictures: Mapping[str, Path]) -> dict[str, Any]:
    tasks = []
    for task, scores in grouped(shown_scores(answers), lambda score: score.task).items():
        blind = list(dict.fromkeys(name for score in scores for name in score.baselines))
        subtasks = [score for score in scores if score.average == "subtask"]
        tasks.append({"name": task, "blind": blind, "averages": both_averages(scores), "subtasks": subtasks})
    worst, best = shown_cases(answers.scored_cases)
    return {
        "answers": answers,
        "charts": _score_charts(answers),
        "tasks": tasks,
        "kept_charts": _kept_charts(answers.kept) if answers.kept else [],
        "recall_tables": recall_tables(answers.mask_recalls) if answers.mask_recalls else [],
        "reliability": _reliability_chart(answers.reliability) if answers.reliability else [],
        "unread": [one for one in answers.scored_cases if one.read is None][:SHOWN_UNREAD],
        "worst": worst,
        "best": best,
        "pictures": pictures,
    }


def shown_scores(answers: Answers) -> list[Score]:
    """Return the scores without those that do not apply: of letters, where no question of the task has letters."""
    if not answers.scored_cases:  # of baselines alone
        return list(answers.scores)
    lettered = {one.case.task for one in answers.scored_cases if one.case.lettered}
    if lettered:
        lettered.add(ALL_TASKS)
    return [score for score in answers.scores if score.metric not in OF_LETTERS or score.task in lettered]


def main_scores(answers: Answers) -> list[tuple[Score, Score]]:
    """Return both averages of the main metrics: for each task, those that its questions are judged by."""
    main = {(one.case.task, one.metric) for one in answers.scored_cases}
    overall = {metric for _, metric in main}
    first = {score.task: score.metric for score in reversed(answers.scores)}  # of baselines alone
    return [
        (macro, weighted)
        for macro, weighted in both_averages(answers.scores)
        if (macro.task, macro.metric) in main
        or (macro.task == ALL_TASKS and macro.metric in overall)
        or (not main and first[macro.task] == macro.metric)
    ]


def _differences(first: Answers, comparison: Comparison) -> tuple[Comparison, list[Any], list[Any]]:
    """Return a comparison with both averages of its differences: those that apply, and those of the main metrics."""
    shown = {(score.task, score.metric) for score in shown_scores(first)}
    main = {(macro.task, macro.metric) for macro, _ in main_scores(first)}
    averages = both_averages(comparison.scores)
    apply, judged = ([pair for pair in averages if (pair[0].task, pair[0].metric) in names] for names in (shown, main))
    return comparison, apply, judged or apply


def _reliability_chart(bins: Sequence[ReliabilityBin]) -> list[page.Chart]:
    points = [
        page.ScatterPoint(f"{one.questions} questions", one.confidence, 100 * one.accuracy, None, None) for one in bins
    ]
    words = "accuracy, points, against the probability of the chosen answer; calibrated: 70 points at 70 %, and so on"
    return [page.scatter_plot(points, name="Reliability", words=words, across="probability of the answer")]


def _score_charts(answers: Answers) -> list[page.Chart]:
    """Return a chart of each main metric, every task a line, baselines as marks."""
    main = {judged.metric for judged in answers.scored_cases} or {score.metric for score in answers.scores[:1]}
    rows: dict[str, list[page.ForestRow]] = {}
    for score, _ in both_averages(answers.scores):
        value, low, high = score.estimate
        if score.metric in main and value is not None:
            marks = {name: blind for name, blind in score.baselines.items() if blind is not None}
            rows.setdefault(score.metric, []).append(page.ForestRow(score.task, value, low, high, marks))
    words = "macro over subtasks, points; line: 95 % interval; strokes: blind baselines"
    return [page.forest_plot(lines, name=metric, words=words) for metric, lines in rows.items()]


def _kept_charts(kept: Kept) -> list[page.Chart]:
    shares = [count / kept.predictions for count in kept.ratio_counts]
    words = f"of the questions, by the share of visual tokens that was kept; mean {kept.mean_ratio:.1%}"
    axes, ends = ("share of visual tokens kept", "questions"), ("0%", "100%")
    name = "Share of visual tokens kept"
    charts = [page.bar_chart(shares, name=name, words=words, axes=axes, ends=ends, top=max(shares))]
    if kept.slabs:
        axes, ends = (f"the {len(kept.slabs)} slabs of tokens", "share kept"), ("foot", "head")
        words = "of the visual tokens of a slab, over all questions"
        charts.append(page.bar_chart(kept.slabs, name="Share kept by slab", words=words, axes=axes, ends=ends))
    return charts


def shown_cases(judged: Sequence[ScoredCase]) -> tuple[list[ScoredCase], list[ScoredCase]]:
    """Return the worst and the best cases, by score, then the model's confidence, then id; the tasks take turns."""

    def confidence(one: ScoredCase) -> float:
        """By how much the first choice is above the second, 0 without scores."""
        ranked = sorted(one.case.prediction.choice_scores.values(), reverse=True)
        return ranked[0] - ranked[1] if len(ranked) > 1 else 0.0

    def first(key: Callable[[ScoredCase], tuple[float, float, str]]) -> list[ScoredCase]:
        """The first case of each task (by name), then the second of each, and so on."""
        queues = sorted(grouped(sorted(judged, key=key), lambda one: one.case.task).items())
        rounds = zip_longest(*(cases for _, cases in queues))
        return [one for cases in rounds for one in cases if one is not None][:SHOWN_CASES]

    worst = first(lambda one: (one.score, -confidence(one), one.case.id))
    best = first(lambda one: (-one.score, -confidence(one), one.case.id))
    return [one for one in worst if one.score < 100], [one for one in best if one.score > 0]


def cases_to_picture(answers: Answers, most: int) -> list[Case]:
    """Return at most `most` cases that the page shows and whose kept tokens are known, half of them worst ones."""
    shown = shown_cases(answers.scored_cases)
    worst, best = ([one.case for one in cases if one.case.prediction.kept] for cases in shown)
    half = max(most - most // 2, most - len(best))
    return list({case.id: case for case in [*worst[:half], *best]}.values())[:most]


def _trade_off_chart(trade_off: TradeOff) -> page.Chart:
    points = [
        page.ScatterPoint(point.name, point.kept_share, value, low, high)
        for point in trade_off.points
        for value, low, high in [point.estimate]
        if value is not None
    ]
    words = "macro over subtasks, points, against the share of visual tokens kept"
    words += "; line: 95 % interval; equal shares side by side"
    return page.scatter_plot(points, name=trade_off.metric, words=words, across="share of visual tokens kept")


def _moved_charts(found: Counterfactuals) -> list[page.Chart]:
    """Return a chart for each file of predictions, every edit a line."""
    words = (
        "answers that an edit of the volume moved, of 100; line: 95 % interval; stroke: those that blind answers move"
    )
    charts = []
    for name, group in grouped(found.moved, lambda one: one.predictions).items():
        blind = {one.edit: one.moved.value for one in group if one.edit == BLIND and one.moved.value is not None}
        rows = [
            page.ForestRow(f"{one.edit}, {one.questions_of}", one.moved.value, one.moved.low, one.moved.high, blind)
            for one in group
            if one.moved.value is not None
        ]
        charts.append(page.forest_plot(rows, name=name, words=words))
    return charts


def both_averages(scores: Sequence[Score]) -> list[tuple[Score, Score]]:
    """Return (macro over subtasks, question-weighted) of every metric of every task, in the order of the scores."""
    macro, weighted = ([score for score in scores if score.average == name] for name in (MACRO, "question_weighted"))
    return list(zip(macro, weighted, strict=True))
