"""The body of `photon eval`: files -> an evaluation -> files, and its tables on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich.table import Table

from photon_cli.bar import Bar
from photon_cli.options import console
from photon_data.errors import UsageError
from photon_data.questions import manifest
from photon_data.recipe import Recipe
from photon_train.answering.prediction import read_predictions, unpack_mask
from photon_train.evaluation.baselines import CONSTANT, MAJORITY
from photon_train.evaluation.cases import grouped
from photon_train.evaluation.evaluate import check, evaluate
from photon_train.evaluation.report import cases_to_picture, recall_tables, trade_off_table, trade_offs, write_report
from photon_train.evaluation.tables import (
    Answers,
    Comparison,
    Evaluation,
    FormattedTable,
    Settings,
    both_averages,
    formatted,
    formatted_interval,
    formatted_value,
)
from photon_train.evaluation.text_metrics import read_labels
from photon_train.kept_tokens import CountedMask, counted_by_volume, volumes_with_masks
from photon_train.overlay import PICTURE, Canvas, folders_of, picture
from photon_train.rows import read_rows

if TYPE_CHECKING:
    from photon_train import PhotonConfig


class Given(NamedTuple):
    """Files of predictions, and the configuration of the model that made them, if it is known."""

    predictions: Sequence[Path]
    config: PhotonConfig | None


Answerer = Callable[[list[dict[str, Any]]], Given]


def files(predictions: Sequence[Path], model: str | None) -> Given:
    """Return files that are there, and the configuration of the model directory named, if any."""
    if not model:
        return Given(predictions, None)
    from photon_train import PhotonConfig

    return Given(predictions, PhotonConfig.from_pretrained(model))


def run(
    benchmark: str,
    answers: Answerer,
    data: Sequence[Path],
    output: Path,
    *,
    train: Sequence[Path] = (),
    labels: Sequence[Path] = (),
    masks: Path | None = None,
    overlays: int = 0,
    with_volumes: bool = False,
    settings: Settings,
) -> Evaluation:
    """Read, have the rows answered, evaluate, write and print; return the evaluation. What can be refused is, before answering.

    answers        rows -> the files of their predictions
    labels         tables of the references' and the responses'
    masks          a folder per volume id: their recall by kept tokens
    overlays       pictures of so many cases of the first file
    with_volumes   the rows' volumes are needed: relative ones are looked for where training looks for them
    """
    if len(labels) not in (0, 2):
        raise UsageError(f"two tables of labels wanted, the references' and the responses', got {len(labels)}")
    settings = replace(settings, labels=(read_labels(labels[0]), read_labels(labels[1])) if labels else None)
    rows = _rows(data, with_volumes)
    learning = [row for path in train for row in manifest.read(path)]
    check(benchmark, rows, settings)
    places = volumes_with_masks(masks, rows) if masks else {}
    given = answers(rows)
    if given.config:
        settings = replace(settings, grid_zyx=given.config.tokens_thw)
    named = dict(zip(names_of(given.predictions), map(read_predictions, given.predictions), strict=True))
    counted = _counted(masks, places, settings) if masks else {}
    evaluation = evaluate(benchmark, rows, named, train=learning, settings=settings, config=given.config, masks=counted)
    pictures = _pictures(evaluation, rows, overlays, output / "overlays")
    paths = write_report(evaluation, output, overlays=pictures)
    show(evaluation)
    if masks and not any(answers.mask_recalls for answers in evaluation.answers):
        grid = " x ".join(map(str, settings.grid_zyx))
        console.print(
            f"no recall of masks: no prediction says which of {grid} tokens it kept; --config MODEL says the grid"
        )
    console.print(f"written: {', '.join(map(str, paths))}", soft_wrap=True)
    return evaluation


def _counted(folder: Path, places: Mapping[str, str], settings: Settings) -> dict[str, list[CountedMask]]:
    """Return the masks of the volumes, counted under a bar; say which could not be read."""
    with Bar("masks of volumes") as bar:
        bar.update(total=len(places))
        found = counted_by_volume(folder, places, settings.grid_zyx, lambda: bar.update(advance=1))
    console.print(f"masks of {len(found.masks)} of {len(places)} volumes")
    for id, reason in found.unread.items():
        console.print(f"no masks of {id}: {reason}", soft_wrap=True)
    return found.masks


def _pictures(
    evaluation: Evaluation, rows: Sequence[Mapping[str, Any]], most: int, folder: Path
) -> dict[str, dict[str, Path]]:
    """Write pictures of cases of the first file of predictions, and return them as `write_report` takes them.

    Predictions do not say how salient tokens are: the planes go through the kept token nearest to the middle. Each volume is
    opened once. One that cannot be shown costs its own pictures, and is named.
    """
    if not most:
        return {}
    from photon_train.answering.scan import open_input

    first, tokens_zyx, pictures = evaluation.answers[0], evaluation.settings.grid_zyx, dict[str, Path]()
    places = {row["id"]: str(row["videos"][0]) for row in rows if len(row["videos"]) == 1}
    cases = [case for case in cases_to_picture(first, most) if case.id in places]
    fitting = [case for case in cases if case.prediction.visual_tokens == prod(tokens_zyx)]
    for place, group in grouped(fitting, lambda case: places[case.id]).items():
        try:
            scan = open_input(place, Recipe())
            canvas = Canvas(scan.volume, scan.native, tokens_zyx)
            for case in group:
                keep_V = unpack_mask(case.prediction.kept, case.prediction.visual_tokens)
                path = folders_of(folder, case.id, 1)[0] / PICTURE
                path.parent.mkdir(parents=True, exist_ok=True)
                picture(canvas, keep_V, keep_V.astype(np.float32), case.question).save(path)
                pictures[case.id] = path
        except (ValueError, OSError) as error:
            console.print(f"no overlay of {place}: {error}", soft_wrap=True)
    return {first.name: pictures}


def _rows(data: Sequence[Path], with_volumes: bool) -> list[dict[str, Any]]:
    read = read_rows if with_volumes else manifest.read
    return [row for path in data for row in read(path)]


def names_of(paths: Sequence[Path]) -> list[str]:
    """Return a name for each file: its stem, or with its folders where two have the same; UsageError for a file given twice."""
    if len({path.resolve() for path in paths}) < len(paths):
        raise UsageError("different files of predictions wanted, got one of them twice")
    stems = [path.stem for path in paths]
    return stems if len(set(stems)) == len(stems) else [path.with_suffix("").as_posix() for path in paths]


def show(evaluation: Evaluation) -> None:
    """Print the averages of every file of predictions, and the differences between them."""
    console.print(f"{evaluation.benchmark}: {evaluation.questions:,} questions, {evaluation.patients:,} patients")
    console.print(
        f"constant answers were chosen on {evaluation.learned_on}; scores in points, 95 % intervals by patient"
    )
    for answers in evaluation.answers:
        console.print(_table(answers))
        if answers.unparsed:
            counts = ", ".join(f"{count} of {task}" for task, count in answers.unparsed.items())
            console.print(f"responses that mean no answer, counted as wrong: {counts}")
        _say_costs(answers)
        for masks in recall_tables(answers.mask_recalls) if answers.mask_recalls else []:
            console.print(_of_sheet(masks))
    for comparison in evaluation.comparisons:
        console.print(_differences(comparison))
    for trade_off in trade_offs(evaluation):
        console.print(_of_sheet(trade_off_table(trade_off)))


def _table(answers: Answers) -> Table:
    title = answers.name + (f"\n{answers.gaps.sentence()}" if answers.gaps else "")
    table = _columns(
        title, ("macro", "95 %", "constant", "majority", "other blind rules", "by question", "n", "patients")
    )
    for score, weighted in both_averages(answers.scores):
        rules = [formatted_value(value) for name, value in score.baselines.items() if name not in (CONSTANT, MAJORITY)]
        blind = [formatted_value(score.baselines.get(name)) for name in (CONSTANT, MAJORITY)]
        cells = [formatted(score.estimate), formatted_interval(score.estimate), *blind, " ".join(rules)]
        counts = (f"{score.questions}", f"{score.patients}")
        table.add_row(score.task, score.metric, *cells, formatted(weighted.estimate), *counts)
    return table


def _differences(comparison: Comparison) -> Table:
    table = _columns(f"{comparison.second} minus {comparison.first}", ("macro", "95 %", "by question", "95 %", "n"))
    for score, weighted in both_averages(comparison.scores):
        cells = [text for one in (score, weighted) for text in (formatted(one.estimate), formatted_interval(one.estimate))]
        table.add_row(score.task, score.metric, *cells, f"{score.questions}")
    return table


def _of_sheet(sheet: FormattedTable) -> Table:
    table = Table(title=sheet.title)
    for number, name in enumerate(sheet.headings):
        table.add_column(name, justify="right" if number else "left")
    for line in sheet.lines:
        table.add_row(*line)
    return table


def _columns(title: str, numbers: Iterable[str]) -> Table:
    table = Table(title=title)
    for name in ("task", "metric"):
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def _say_costs(answers: Answers) -> None:
    costs, kept = answers.costs, answers.kept
    if costs and costs.questions_per_second:
        stages = ", ".join(f"{stage} {seconds.mean:.3f}" for stage, seconds in costs.seconds.items())
        console.print(f"seconds per question: {stages}; {costs.questions_per_second:.2f} questions per second")
    if costs and costs.prefill_tflop is not None:
        console.print(
            f"prefill: {costs.prefill_tflop:.2f} TFLOP a question, {costs.prefill_tflop_unpruned:.2f} unpruned"
        )
    if costs and costs.peak_memory_mib:
        console.print(f"peak memory: {costs.peak_memory_mib:,.0f} MiB")
    if kept:
        console.print(f"visual tokens kept: {kept.mean_ratio:.1%}")
