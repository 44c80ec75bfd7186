"""Pictures of what was kept for single cases, from the kept tokens that their predictions say.

Recall of masks as tables.

What is lost with the tokens that are not kept: score against share kept, of every file of predictions.

An evaluation as one page that opens offline: scores with intervals and baselines, costs, what was kept, single cases.

An evaluation -> scores.json and report.html, the same bytes for the same evaluation.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from photon_data.files import Location
from photon_data.recipe import Recipe
from photon_data.report.charts import Dot, Spot, bars, dots, spread
from photon_data.report.page import Html, document, element, encoded, table
from photon_train.answering.prediction import unpack_mask
from photon_train.answering.scan import open_input
from photon_train.evaluation.baselines import CONSTANT, MAJORITY
from photon_train.evaluation.cases import Case, grouped
from photon_train.evaluation.costs import Costs
from photon_train.evaluation.kept import Kept, MaskRecalls, Overlap, Recall, RecallContrast
from photon_train.evaluation.metric import Estimate
from photon_train.evaluation.tables import (
    Answers,
    Comparison,
    Evaluation,
    FormattedTable,
    Score,
    ScoredCase,
    both_averages,
    formatted,
    formatted_interval,
    formatted_value,
)
from photon_train.overlay import PICTURE, Canvas, folders_of, picture


class Overlays(NamedTuple):
    """Pictures by question id, and why a volume has none."""

    pictures: dict[str, Path]
    unshown: dict[str, str]


def pictured(answers: Answers, most: int) -> list[Case]:
    """Return at most `most` of the cases that the page shows, the worst and the best in turn, whose kept tokens are known."""
    worst, best = ([one.case for one in cases if one.case.prediction.kept] for cases in shown_cases(answers.scored_cases))
    half = max(most - most // 2, most - len(best))
    chosen = [*worst[:half], *best]
    return list({case.id: case for case in chosen}.values())[:most]


def write_pictures(cases: Sequence[Case], places: Mapping[str, str], tokens_zyx: tuple[int, int, int], folder: Path) -> Overlays:
    """Write a picture into a folder per case; `places` says where each question's volume is.

    Predictions do not say how salient tokens are: the planes go through the kept token nearest to the middle. Each volume is
    opened once, and one that cannot be shown costs its own pictures.
    """
    fitting = [case for case in cases if case.id in places and case.prediction.visual_tokens == np.prod(tokens_zyx)]
    found = Overlays({}, {})
    for place, group in grouped(fitting, lambda case: places[case.id]).items():
        try:
            scan = open_input(place, Recipe())
            canvas = Canvas(scan.volume, scan.native, tokens_zyx)
            for case in group:
                found.pictures[case.id] = _written(case, canvas, folders_of(folder, case.id, 1)[0])
        except (ValueError, OSError) as error:
            found.unshown[place] = str(error)
    return found


def _written(case: Case, canvas: Canvas, folder: Path) -> Path:
    keep_V = unpack_mask(case.prediction.kept, case.prediction.visual_tokens)
    folder.mkdir(parents=True, exist_ok=True)
    picture(canvas, keep_V, keep_V.astype(np.float32), case.question).save(folder / PICTURE)
    return folder / PICTURE


_RECALL = ("recall", "chance", "above chance", "95 %", "pairs", "volumes", "patients")
_ASKED = (
    *("asked about (chance)", "above", "95 %"),
    *("other organ (chance)", "above", "95 %"),
    *("difference", "95 %", "pairs"),
)


def sheets(recalls: MaskRecalls) -> list[FormattedTable]:
    """Return the tables, what was asked about first; those without lines are left out."""
    found = [
        _asked("Organs, in questions about them and in questions about another organ", "organ", recalls.organs),
        _asked("Lesions, in questions about them and in questions about another organ", "lesion", recalls.lesions),
        FormattedTable("Masks by volume, all questions", ("volume", *_RECALL), [_line(one) for one in recalls.by_size]),
        FormattedTable("Masks by name, all questions", ("mask", *_RECALL), [_line(one) for one in recalls.by_mask]),
    ]
    return [sheet for sheet in found if sheet.lines]


def _line(one: Recall) -> tuple[str, ...]:
    counts = (f"{count:,}" for count in (one.pairs, one.volumes, one.patients))
    numbers = (formatted(one.recall), formatted(one.chance), formatted(one.above_chance))
    return (one.name, *numbers, formatted_interval(one.above_chance), *counts)


def _asked(title: str, what: str, lines: Sequence[RecallContrast]) -> FormattedTable:
    return FormattedTable(title, (what, *_ASKED), [_asked_line(one) for one in lines])


def _asked_line(one: RecallContrast) -> tuple[str, ...]:
    halves = [
        text
        for part in (one.own, one.other)
        for text in (
            f"{formatted(part.recall)} ({formatted(part.chance)})",
            formatted(part.above_chance),
            formatted_interval(part.above_chance),
        )
    ]
    difference = (formatted(one.own_minus_other), formatted_interval(one.own_minus_other))
    return (one.name, *halves, *difference, f"{one.own.pairs:,} and {one.other.pairs:,}")


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
    main = {judged.metric for judged in answers[0].scored_cases}
    broadest = {score.metric: score for score in answers[0].scores if score.metric in main and score.average == MACRO}
    return tuple(TradeOff(score.metric, score.task, _points(evaluation, score)) for score in broadest.values())


def sheet(trade_off: TradeOff) -> FormattedTable:
    """Return the table of a trade-off."""
    title = f"{trade_off.metric}, {trade_off.task}, against visual tokens kept"
    return FormattedTable(title, HEADINGS, [_line_trade_off(point) for point in trade_off.points])


def _line_trade_off(point: Point) -> tuple[str, ...]:
    minus, rate = point.minus_first, point.questions_per_second
    scores = (formatted(point.estimate), formatted_interval(point.estimate), formatted(minus), formatted_interval(minus))
    return (point.name, f"{point.kept_tokens:.1f}", f"{point.kept_share:.1%}", *scores, f"{rate:.2f}" if rate else "-")


def _points(evaluation: Evaluation, like: Score) -> tuple[Point, ...]:
    minus = {one.second: _same(one.scores, like) for one in evaluation.comparisons}
    return tuple(_point(one, like, minus.get(one.name)) for one in evaluation.answers)


def _point(answers: Answers, like: Score, minus_first: Estimate | None) -> Point:
    assert answers.kept, "looked at before"
    predictions = [judged.case.prediction for judged in answers.scored_cases if judged.case.prediction.visual_tokens]
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


SHOWN_CASES = 12
_MEDIA = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}
_AVERAGES = ("metric", "macro", "95 % interval", "by question")
_ONE = ("subtask", "metric", "score", "95 % interval")
_COUNTS = ("above constant", "questions", "patients")
_BLIND = {CONSTANT: "constant", MAJORITY: "majority"}
_LONGEST = 400


def render(evaluation: Evaluation, overlays: Mapping[str, Mapping[str, Path]], title: str) -> bytes:
    """Return the page as UTF-8. `overlays`: by name of the predictions, pictures by question id, put beside their case."""
    sections = [_header(evaluation, title)]
    for number, answers in enumerate(evaluation.answers):
        sections.append(_section(answers, overlays.get(answers.name, {}), number))
    partial = [warning for answers in evaluation.answers for warning in _warning(answers.gaps.sentence())]
    sections += [_trade_off_section(one, partial) for one in trade_offs(evaluation)]
    sections += [_difference_section(comparison, partial) for comparison in evaluation.comparisons]
    return encoded(document(title, *sections))


def _header(evaluation: Evaluation, title: str) -> Html:
    tiles = [("questions", evaluation.questions), ("patients", evaluation.patients)]
    tiles += [(f"not scored, {answers.name}", answers.gaps.unscored) for answers in evaluation.answers if answers.gaps]
    words = (
        "Scores are points from 0 to 100. Intervals hold 95 % of "
        f"{evaluation.settings.bootstrap} resamplings of patients (seed {evaluation.settings.seed}). "
        f"Constant answers were chosen on {evaluation.learned_on}. "
        "Macro: the mean over subtasks; by question: the mean of subtasks by their numbers of questions. "
        "Constant: the best constant answer; majority: that of each subtask."
    )
    return element(
        "header",
        element("h1", title),
        element("div", *(_tile(*tile) for tile in tiles), class_="tiles"),
        element("p", words, class_="muted"),
        table(
            ("questions of", "best constant answer"), [(name, _short(answer)) for name, answer in evaluation.constants.items()]
        ),
    )


def _tile(name: str, count: int) -> Html:
    return element("div", element("b", f"{count:,}"), name, class_="tile")


def _section(answers: Answers, overlays: Mapping[str, Path], number: int) -> Html:
    partial = _warning(answers.gaps.sentence())
    parts = [element("h2", answers.name), *partial, _charts(answers)]
    for task in dict.fromkeys(score.task for score in answers.scores):
        own = [score for score in answers.scores if score.task == task]
        parts += [element("h3", task), *_tables(own, partial)]
    if answers.unparsed:
        rows = [(task, f"{count:,}") for task, count in answers.unparsed.items()]
        heading = element("h3", "Responses that mean no answer (counted as wrong)")
        parts += [heading, *partial, table(("task", "responses"), rows)]
    parts += [*_cost_parts(answers.costs), *partial] if answers.costs else []
    parts += [*_kept_parts(answers.kept), *partial] if answers.kept else []
    parts += [*_mask_parts(answers.mask_recalls), *partial] if answers.mask_recalls else []
    return element("section", *parts, *_case_parts(answers.scored_cases, overlays), id=f"predictions-{number}")


def _tables(scores: Sequence[Score], partial: Sequence[Html]) -> list[Html]:
    """Return the averages of one task, and its subtasks folded up."""
    blind = tuple(dict.fromkeys(name for score in scores for name in score.baselines))
    headings = (*(_BLIND.get(name, name.replace("_", " ")) for name in blind), *_COUNTS)
    averages = table((*_AVERAGES, *headings), (_average_line(*pair, blind) for pair in both_averages(scores)))
    single = [_single_line(score, blind) for score in scores if score.average == "subtask"]
    if not single:
        return [*partial, averages]
    inner = [*partial, table((*_ONE, *headings), single)]
    return [*partial, averages, element("details", element("summary", f"by subtask ({len(single)} scores)"), *inner)]


def _warning(partial: str) -> list[Html]:
    return [element("p", element("b", partial), class_="remarks")] if partial else []


def _average_line(macro: Score, weighted: Score, blind: Sequence[str]) -> list[object]:
    return [_tight(macro.metric), *_estimate(macro.estimate), formatted(weighted.estimate), *_beside(macro, blind)]


def _single_line(score: Score, blind: Sequence[str]) -> list[object]:
    return [score.subtask or "-", _tight(score.metric), *_estimate(score.estimate), *_beside(score, blind)]


def _beside(score: Score, blind: Sequence[str]) -> list[object]:
    """Return the cells of what stands beside a score, one for each of the blind baselines named."""
    above = score.above_constant
    words = f"{formatted(above)} ({formatted_interval(above)})" if above else "-"
    values = (formatted_value(score.baselines.get(name)) for name in blind)
    return [*values, _tight(words), f"{score.questions:,}", f"{score.patients:,}"]


def _estimate(estimate: Estimate) -> list[Html]:
    return [element("td", element("b", formatted(estimate)), class_="tight"), _tight(formatted_interval(estimate))]


def _tight(words: str) -> Html:
    return element("td", words, class_="tight")


def _charts(answers: Answers) -> Html:
    """Return a chart of each task's main metric, every average a line, baselines as marks."""
    main = {judged.metric for judged in answers.scored_cases} or {score.metric for score in answers.scores[:1]}
    groups: dict[str, list[Dot]] = {}
    for score, _ in both_averages(answers.scores):
        if score.metric in main and score.estimate.value is not None:
            marks = {name: value for name, value in score.baselines.items() if value is not None}
            low, high = score.estimate.low, score.estimate.high
            groups.setdefault(score.metric, []).append(Dot(score.task, score.estimate.value, low, high, marks))
    words = "macro over subtasks, points; line: 95 % interval; strokes: blind baselines"
    charts = [dots(lines, name=metric, words=words) for metric, lines in groups.items()]
    return element("div", *charts, class_="columns")


def _difference_section(comparison: Comparison, partial: Sequence[Html]) -> Html:
    lines = [
        [macro.task, _tight(macro.metric), *_estimate(macro.estimate), *_estimate(weighted.estimate), f"{macro.questions:,}"]
        for macro, weighted in both_averages(comparison.scores)
    ]
    return element(
        "section",
        element("h2", f"{comparison.second} minus {comparison.first}"),
        element("p", f"{comparison.questions:,} questions that both answered; patients resampled together.", class_="muted"),
        *partial,
        table(("task", *_AVERAGES, "95 % interval", "questions"), lines),
    )


def _trade_off_section(trade_off: TradeOff, partial: Sequence[Html]) -> Html:
    spots = [
        Spot(point.name, point.kept_share, value, low, high)
        for point in trade_off.points
        for value, low, high in [point.estimate]
        if value is not None
    ]
    numbers = sheet(trade_off)
    words = "macro over subtasks, points, against the share of visual tokens kept; line: 95 % interval; equal shares side by side"
    return element(
        "section",
        element("h2", numbers.title),
        *partial,
        element("div", spread(spots, name=trade_off.metric, words=words), class_="columns"),
        _sheet_table(numbers),
    )


def _sheet_table(sheet: FormattedTable) -> Html:
    return table(sheet.headings, ([*map(_tight, line)] for line in sheet.lines))


def _mask_parts(recalls: MaskRecalls) -> list[Html]:
    words = (
        "Recall: the share of a mask's voxels in kept tokens, points, mean over pairs of a question and a mask. Chance: the "
        "recall expected of as many tokens drawn at random. Other organ: the same masks in questions about another organ. "
        f"{recalls.predictions:,} questions."
    )
    tables = [part for one in sheets(recalls) for part in (element("h4", one.title), _sheet_table(one))]
    return [element("h3", "Organs and lesions in the kept tokens"), element("p", words, class_="muted"), *tables]


def _cost_parts(costs: Costs) -> list[Html]:
    rows = [
        (stage, *(f"{value:.3f}" for value in (seconds.mean, seconds.median, seconds.p95)), f"{seconds.total:.1f}")
        for stage, seconds in costs.seconds.items()
    ]
    words = [f"{costs.questions_per_second:.2f} questions per second." if costs.questions_per_second else ""]
    if costs.prefill_tflop is not None:
        words.append(
            f"Prefill: {costs.prefill_tflop:.2f} TFLOP a question, {costs.prefill_tflop_unpruned:.2f} with every token kept."
        )
    if costs.peak_memory_mib:
        words.append(f"Peak memory: {costs.peak_memory_mib:,.0f} MiB.")
    parts = [element("h3", "Costs"), element("p", " ".join(words))]
    return [*parts, table(("stage", "seconds, mean", "median", "95th percentile", "sum"), rows)] if rows else parts


def _kept_parts(kept: Kept) -> list[Html]:
    rows = [
        (task, *(f"{tokens[name]:.0f}" for name in ("text_tokens", "visual_tokens", "kept_tokens")))
        for task, tokens in kept.tokens.items()
    ]
    shares = [count / kept.predictions for count in kept.ratio_counts]
    words = f"of the questions, by the share of visual tokens that was kept: 0 (left) to 1 (right); mean {kept.mean_ratio:.3f}"
    charts = [bars(shares, name="Share of visual tokens kept", words=words, top=max(shares))]
    if kept.slabs:
        charts.append(bars(kept.slabs, name="Share kept by slab", words="foot (left) to head (right)"))
    overlaps = [
        ("different questions on one volume", *_overlap(kept.questions_on_a_volume)),
        ("the same question on different volumes", *_overlap(kept.volumes_of_a_question)),
    ]
    return [
        element("h3", "What was kept"),
        element("div", *charts, class_="columns"),
        table(("task", "text tokens", "visual tokens", "kept"), rows),
        element("p", "Overlap of two kept sets: intersection / union."),
        table(("pairs of", "overlap", "of random sets of these sizes", "pairs", "groups"), overlaps),
    ]


def _overlap(overlap: Overlap) -> tuple[str, ...]:
    numbers = ("-" if value is None else f"{value:.3f}" for value in (overlap.jaccard, overlap.chance))
    return (*numbers, f"{overlap.pairs:,}", f"{overlap.groups:,}")


def _case_parts(judged: Sequence[ScoredCase], overlays: Mapping[str, Path]) -> list[Html]:
    worst, best = shown_cases(judged)
    parts: list[Html] = []
    for heading, cases in (("Worst cases", worst), ("Best cases", best)):
        if cases:
            parts += [element("h3", heading), *(_case(one, overlays.get(one.case.id)) for one in cases)]
    return parts


def shown_cases(judged: Sequence[ScoredCase]) -> tuple[list[ScoredCase], list[ScoredCase]]:
    """Return the worst and the best cases, the tasks taking turns; by score, then the model's own confidence, then id."""
    worst = _in_turns(judged, lambda one: (one.score, -_confidence(one), one.case.id))
    best = _in_turns(judged, lambda one: (-one.score, -_confidence(one), one.case.id))
    return [one for one in worst if one.score < 100], [one for one in best if one.score > 0]


def _in_turns(judged: Sequence[ScoredCase], key: Callable[[ScoredCase], tuple[float, float, str]]) -> list[ScoredCase]:
    """Return the first cases by the key, one of each task (by name) and then the next of each."""
    queues = sorted(grouped(sorted(judged, key=key), lambda one: one.case.task).items())
    return [one for turn in zip_longest(*(cases for _, cases in queues)) for one in turn if one is not None][:SHOWN_CASES]


def _confidence(one: ScoredCase) -> float:
    """Return by how much the first choice is above the second, 0 without scores."""
    ranked = sorted(one.case.prediction.choice_scores.values(), reverse=True)
    return ranked[0] - ranked[1] if len(ranked) > 1 else 0.0


def _case(one: ScoredCase, overlay: Path | None) -> Html:
    """Return a card: the question (beside its picture, if there is one), and what was answered."""
    case = one.case
    asked = [("question", case.question), ("choices", " | ".join(case.choices)), ("answer", case.answer)]
    asked += [("response", case.response or "(nothing)")]
    facts = [("score", f"{one.score:.1f} ({one.metric})"), ("task", f"{case.task} {case.subtask}"), ("volume", case.volume_id)]
    if case.prediction.visual_tokens:
        facts.append(("kept", f"{case.prediction.kept_tokens} of {case.prediction.visual_tokens} visual tokens"))
    name = element("h3", case.id)
    if overlay is None:
        return element("article", element("div", name, _list(asked)), element("div", _list(facts)), class_="panel card")
    text = element("div", name, _list([*asked, *facts]))
    return element("article", element("div", _picture(overlay, case.id)), text, class_="panel card")


def _list(pairs: Sequence[tuple[str, str]]) -> Html:
    shown = (part for name, value in pairs if value for part in (element("dt", name), element("dd", _short(value))))
    return element("dl", *shown)


def _picture(path: Path, id: str) -> Html:
    data = base64.b64encode(path.read_bytes()).decode()
    return element("img", src=f"data:{_MEDIA[path.suffix.lower()]};base64,{data}", alt=f"What was kept for {id}")


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."


SCORES, REPORT = "scores.json", "report.html"


def write(
    evaluation: Evaluation, folder: Path, *, overlays: Mapping[str, Mapping[str, Path]] | None = None, title: str = ""
) -> list[Path]:
    """Write scores.json and report.html into `folder`, each whole or not at all, and return their paths.

    `overlays` are, by name of the predictions, pictures (png, jpeg) by question id; those of the cases that are shown are put
    inside of the page.
    """
    where = Location(str(folder))
    page = render(evaluation, overlays or {}, title or f"{evaluation.benchmark}: evaluation")
    text = json.dumps(to_json(evaluation), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    for name, content in ((REPORT, page), (SCORES, text.encode("utf-8", "backslashreplace"))):
        where.write(name, content)
    return [folder / SCORES, folder / REPORT]


def to_json(evaluation: Evaluation) -> dict[str, Any]:
    """Return the evaluation as plain values: scores in points, intervals as [low, high], single questions left out."""
    settings = asdict(replace(evaluation.settings, labels=None))
    return {
        "benchmark": evaluation.benchmark,
        "questions": evaluation.questions,
        "patients": evaluation.patients,
        "partial": evaluation.is_partial,
        "settings": {**settings, "labels": evaluation.settings.labels is not None},
        "constants": {"learned_on": evaluation.learned_on, "answers": evaluation.constants},
        "predictions": [_answers(answers) for answers in evaluation.answers],
        "differences": [_comparison(comparison) for comparison in evaluation.comparisons],
        "trade_offs": [_rounded(asdict(trade_off)) for trade_off in trade_offs(evaluation)],
    }


def _answers(answers: Answers) -> dict[str, Any]:
    return {
        "name": answers.name,
        "gaps": asdict(answers.gaps),
        "unparsed": answers.unparsed,
        "scores": [_score(score) for score in answers.scores],
        "costs": _rounded(asdict(answers.costs)) if answers.costs else None,
        "kept": _rounded(asdict(answers.kept)) if answers.kept else None,
        "masks": _rounded(asdict(answers.mask_recalls)) if answers.mask_recalls else None,
    }


def _comparison(comparison: Comparison) -> dict[str, Any]:
    return {
        "first": comparison.first,
        "second": comparison.second,
        "questions": comparison.questions,
        "second_minus_first": [_score(score) for score in comparison.scores],
    }


def _score(score: Score) -> dict[str, Any]:
    """Return a flat row: {"metric", "task", "subtask", "average", "value", "interval", "questions", "patients", ...}."""
    row = {name: getattr(score, name) for name in ("metric", "task", "subtask", "average")}
    row |= {"value": score.estimate.value, "interval": list(score.estimate[1:])}
    row |= {"questions": score.questions, "patients": score.patients}
    row |= {"baselines": score.baselines} if score.baselines else {}
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
