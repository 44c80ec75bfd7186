"""The body of `photon eval`: files -> an evaluation -> files, and its tables on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from photon_cli.terminal import ProgressBar, console, print_lines, print_table
from photon_data.errors import UsageError
from photon_data.questions.table import read_values, volume_id_of
from photon_data.recipe import Recipe
from photon_train.answering.prediction import read_predictions, unpack_mask
from photon_train.answering.scan import open_input
from photon_train.evaluation.baselines import CONSTANT, MAJORITY
from photon_train.evaluation.cases import grouped
from photon_train.evaluation.evaluate import check, evaluate
from photon_train.evaluation.report import (
    both_averages,
    cases_to_picture,
    formatted,
    formatted_interval,
    formatted_value,
    recall_tables,
    trade_off_table,
    trade_offs,
    write_report,
)
from photon_train.evaluation.results import Answers, Comparison, Evaluation, Settings
from photon_train.evaluation.text_metrics import LabelTable, read_labels
from photon_train.kept_tokens import CountedMask, counted_by_volume, volumes_with_masks
from photon_train.overlay import PICTURE, Canvas, folders_of, picture
from photon_train.rows import read_rows

if TYPE_CHECKING:
    from photon_train.configuration_photon import PhotonConfig

# Rows -> the files of their predictions, and the configuration of the model that made them, if it is known.
Answering = Callable[[list[dict[str, Any]]], tuple[Sequence[Path], "PhotonConfig | None"]]


def answered_before(predictions: Sequence[Path], model: str | None) -> Answering:
    """Return the answering of files that exist, with the configuration of the model directory, if one is named."""
    if not model:
        return lambda rows: (predictions, None)
    from photon_train.configuration_photon import PhotonConfig

    config = PhotonConfig.from_pretrained(model)
    return lambda rows: (predictions, config)


def label_tables(paths: Sequence[Path]) -> tuple[LabelTable, LabelTable] | None:
    """Return the labels of the references and of the responses; None without paths, UsageError for a number but two."""
    if len(paths) not in (0, 2):
        raise UsageError(f"expected two tables of labels, the references' and the responses', found {len(paths)}")
    return (read_labels(paths[0]), read_labels(paths[1])) if paths else None


def score(
    benchmark: str,
    answering: Answering,
    data: Sequence[Path],
    output: Path,
    settings: Settings,
    train: Sequence[Path],
    masks: Path | None,
    overlays: int,
    *,
    answers_now: bool,
) -> Evaluation:
    """Read rows, have them answered, evaluate, write and print; return the evaluation.

    What can be refused is refused before a model answers.

    masks        a folder per volume id: the recall of its masks by kept tokens is measured
    overlays     so many cases of the first file get pictures
    answers_now  a model reads the volumes: relative paths are looked for where training looks for them
    """
    read_data = read_rows if answers_now or masks or overlays else read_values
    rows = [row for path in data for row in read_data(path)]
    training_rows = [row for path in train for row in read_values(path)]
    check(benchmark, rows, settings)
    volumes = volumes_with_masks(masks, rows) if masks else {}
    files, config = answering(rows)
    if config:
        settings = replace(settings, grid_zyx=config.tokens_thw)
    predictions = dict(zip(_names_of(files), map(read_predictions, files), strict=True))
    counted = _counted(masks, volumes, settings) if masks else {}
    evaluation = evaluate(
        benchmark, rows, predictions, train=training_rows, settings=settings, config=config, masks=counted
    )
    pictures = _pictures(evaluation, rows, overlays, output / "overlays") if overlays else {}
    paths = write_report(evaluation, output, overlays=pictures)
    print_evaluation(evaluation)
    if masks and not any(answers.mask_recalls for answers in evaluation.answers):
        grid = " x ".join(map(str, settings.grid_zyx))
        reason = f"no prediction says which of {grid} tokens it kept; --config MODEL says the grid"
        console.print(f"no recall of masks: {reason}")
    console.print(f"written: {', '.join(map(str, paths))}", soft_wrap=True)
    return evaluation


def _names_of(paths: Sequence[Path]) -> list[str]:
    """Return a name for each file: its stem, or with its folders where two stems are the same."""
    if len({path.resolve() for path in paths}) < len(paths):
        raise UsageError("--predictions: expected different files, found one of them twice")
    stems = [path.stem for path in paths]
    return stems if len(set(stems)) == len(stems) else [path.with_suffix("").as_posix() for path in paths]


def _counted(folder: Path, volumes: Mapping[str, str], settings: Settings) -> dict[str, list[CountedMask]]:
    """Return the masks of the volumes, counted on the tokens; print which could not be read."""
    with ProgressBar("masks of volumes", total=len(volumes)) as bar:
        found = counted_by_volume(folder, volumes, settings.grid_zyx, lambda: bar.update(advance=1))
    console.print(f"masks of {len(found.masks)} of {len(volumes)} volumes")
    print_lines(f"no masks of {volume_id}: {reason}" for volume_id, reason in found.unread.items())
    return found.masks


def _pictures(
    evaluation: Evaluation, rows: Sequence[Mapping[str, Any]], most: int, folder: Path
) -> dict[str, dict[str, Path]]:
    """Write pictures of cases of the first file of predictions; return {name of the file: {question id: picture}}.

    Predictions do not have the saliency of tokens: the planes go through the kept token nearest to the middle. A volume
    that cannot be shown is named, and does not stop the others.
    """
    first, tokens_zyx, pictures = evaluation.answers[0], evaluation.settings.grid_zyx, dict[str, Path]()
    volumes = {row["id"]: (str(row["videos"][0]), volume_id_of(row)) for row in rows if len(row["videos"]) == 1}
    cases = [case for case in cases_to_picture(first, most) if case.id in volumes]
    fitting = [case for case in cases if case.prediction.visual_tokens == prod(tokens_zyx)]
    for (volume, id), group in grouped(fitting, lambda case: volumes[case.id]).items():
        try:
            scan = open_input(volume, Recipe(), id=id)
            canvas = Canvas(scan.volume, scan.native, tokens_zyx)
            for case in group:
                keep_V = unpack_mask(case.prediction.kept, case.prediction.visual_tokens)
                path = folders_of(folder, case.id, 1)[0] / PICTURE
                path.parent.mkdir(parents=True, exist_ok=True)
                picture(canvas, keep_V, keep_V.astype(np.float32), case.question).save(path)
                pictures[case.id] = path
        except (ValueError, OSError) as error:
            console.print(f"no overlay of {volume}: {error}", soft_wrap=True)
    return {first.name: pictures}


def print_evaluation(evaluation: Evaluation) -> None:
    """Print the averages of every file of predictions, and the differences between them."""
    console.print(f"{evaluation.benchmark}: {evaluation.questions:,} questions, {evaluation.patients:,} patients")
    learned = f"constant answers were chosen on {evaluation.learned_on}"
    console.print(f"{learned}; scores in points, 95 % intervals by patient")
    for answers in evaluation.answers:
        _print_scores(answers)
        if answers.unparsed:
            counts = ", ".join(f"{count} of {task}" for task, count in answers.unparsed.items())
            console.print(f"responses that mean no answer, counted as wrong: {counts}")
        _print_costs(answers)
        for table in recall_tables(answers.mask_recalls) if answers.mask_recalls else []:
            print_table(*table, texts=1)
    for comparison in evaluation.comparisons:
        _print_differences(comparison)
    for trade_off in trade_offs(evaluation):
        print_table(*trade_off_table(trade_off), texts=1)


def _print_scores(answers: Answers) -> None:
    rows = []
    for score, by_question in both_averages(answers.scores):
        blind = {name: formatted_value(value) for name, value in score.baselines.items()}
        fixed = [blind.pop(name, formatted_value(None)) for name in (CONSTANT, MAJORITY)]
        cells = [formatted(score.estimate), formatted_interval(score.estimate), *fixed, " ".join(blind.values())]
        counts = [str(score.questions), str(score.patients)]
        rows.append([score.task, score.metric, *cells, formatted(by_question.estimate), *counts])
    title = answers.name + (f"\n{answers.gaps.sentence()}" if answers.gaps else "")
    names = ["macro", "95 %", "constant", "majority", "other blind rules", "by question", "n", "patients"]
    print_table(title, ["task", "metric", *names], rows, texts=2)


def _print_differences(comparison: Comparison) -> None:
    rows = []
    for pair in both_averages(comparison.scores):
        cells = [text(one.estimate) for one in pair for text in (formatted, formatted_interval)]
        rows.append([pair[0].task, pair[0].metric, *cells, str(pair[0].questions)])
    names = ["task", "metric", "macro", "95 %", "by question", "95 %", "n"]
    print_table(f"{comparison.second} minus {comparison.first}", names, rows, texts=2)


def _print_costs(answers: Answers) -> None:
    costs = answers.costs
    if costs and costs.questions_per_second:
        stages = ", ".join(f"{stage} {seconds.mean:.3f}" for stage, seconds in costs.seconds.items())
        console.print(f"seconds per question: {stages}; {costs.questions_per_second:.2f} questions per second")
    if costs and costs.prefill_tflop is not None:
        unpruned = f"{costs.prefill_tflop_unpruned:.2f} unpruned"
        console.print(f"prefill: {costs.prefill_tflop:.2f} TFLOP a question, {unpruned}")
    if costs and costs.peak_memory_mib:
        console.print(f"peak memory: {costs.peak_memory_mib:,.0f} MiB")
    if answers.kept:
        console.print(f"visual tokens kept: {answers.kept.mean_ratio:.1%}")
