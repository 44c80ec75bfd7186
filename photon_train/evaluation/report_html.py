"""An evaluation as one page that opens offline: scores with intervals and baselines, costs, what was kept, single cases."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

from photon_data.report.charts import Dot, Spot, bars, dots, spread
from photon_data.report.page import Html, document, element, encoded, table
from photon_train.evaluation.baselines import CONSTANT, MAJORITY, grouped
from photon_train.evaluation.costs import Costs
from photon_train.evaluation.evaluate import Answers, Comparison, Evaluation, Judged
from photon_train.evaluation.mask_recall import MaskRecalls
from photon_train.evaluation.mask_sheets import sheets
from photon_train.evaluation.scheduling import Kept, Overlap
from photon_train.evaluation.scores import Estimate, Score, both_averages
from photon_train.evaluation.trade_off import TradeOff, sheet, trade_offs
from photon_train.evaluation.words import Sheet, told, told_interval, told_value

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
    return element("section", *parts, *_case_parts(answers.judged, overlays), id=f"predictions-{number}")


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
    return [_tight(macro.metric), *_estimate(macro.estimate), told(weighted.estimate), *_beside(macro, blind)]


def _single_line(score: Score, blind: Sequence[str]) -> list[object]:
    return [score.subtask or "-", _tight(score.metric), *_estimate(score.estimate), *_beside(score, blind)]


def _beside(score: Score, blind: Sequence[str]) -> list[object]:
    """Return the cells of what stands beside a score, one for each of the blind baselines named."""
    above = score.above_constant
    words = f"{told(above)} ({told_interval(above)})" if above else "-"
    values = (told_value(score.baselines.get(name)) for name in blind)
    return [*values, _tight(words), f"{score.questions:,}", f"{score.patients:,}"]


def _estimate(estimate: Estimate) -> list[Html]:
    return [element("td", element("b", told(estimate)), class_="tight"), _tight(told_interval(estimate))]


def _tight(words: str) -> Html:
    return element("td", words, class_="tight")


def _charts(answers: Answers) -> Html:
    """Return a chart of each task's main metric, every average a line, baselines as marks."""
    main = {judged.metric for judged in answers.judged} or {score.metric for score in answers.scores[:1]}
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


def _sheet_table(sheet: Sheet) -> Html:
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


def _case_parts(judged: Sequence[Judged], overlays: Mapping[str, Path]) -> list[Html]:
    worst, best = shown_cases(judged)
    parts: list[Html] = []
    for heading, cases in (("Worst cases", worst), ("Best cases", best)):
        if cases:
            parts += [element("h3", heading), *(_case(one, overlays.get(one.case.id)) for one in cases)]
    return parts


def shown_cases(judged: Sequence[Judged]) -> tuple[list[Judged], list[Judged]]:
    """Return the worst and the best cases, the tasks taking turns; by score, then the model's own confidence, then id."""
    worst = _in_turns(judged, lambda one: (one.score, -_confidence(one), one.case.id))
    best = _in_turns(judged, lambda one: (-one.score, -_confidence(one), one.case.id))
    return [one for one in worst if one.score < 100], [one for one in best if one.score > 0]


def _in_turns(judged: Sequence[Judged], key: Callable[[Judged], tuple[float, float, str]]) -> list[Judged]:
    """Return the first cases by the key, one of each task (by name) and then the next of each."""
    queues = sorted(grouped(sorted(judged, key=key), lambda one: one.case.task).items())
    return [one for turn in zip_longest(*(cases for _, cases in queues)) for one in turn if one is not None][:SHOWN_CASES]


def _confidence(one: Judged) -> float:
    """Return by how much the first choice is above the second, 0 without scores."""
    ranked = sorted(one.case.prediction.choice_scores.values(), reverse=True)
    return ranked[0] - ranked[1] if len(ranked) > 1 else 0.0


def _case(one: Judged, overlay: Path | None) -> Html:
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
