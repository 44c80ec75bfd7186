"""An evaluation -> scores.json and report.html, the same bytes for the same evaluation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from photon_data.location import Location
from photon_train.evaluation.evaluate import Answers, Comparison, Evaluation
from photon_train.evaluation.report_html import render
from photon_train.evaluation.scores import Estimate, Score
from photon_train.evaluation.trade_off import trade_offs

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
