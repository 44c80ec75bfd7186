"""The body of `photon eval`: files -> an evaluation -> files, and its tables on the terminal."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from photon_cli.segmentation import AUTO, mask_folder, segment
from photon_cli.terminal import ProgressBar, console, print_lines, print_table
from photon_data.errors import UsageError
from photon_data.files import NO_SPACE, Location, jsonl_bytes, write_whole
from photon_data.lock import exclusive
from photon_data.questions.table import read_values
from photon_train.answering.scan import open_input
from photon_train.evaluation.baselines import CONSTANT, MAJORITY
from photon_train.evaluation.cases import Answered, Answering, grouped, scored_row
from photon_train.evaluation.counterfactual import Counterfactuals, summarise
from photon_train.evaluation.evaluate import ALL_TASKS, check, compared, evaluate
from photon_train.evaluation.imported import join_results, read_results
from photon_train.evaluation.metric import draw_patients
from photon_train.evaluation.paired import pairs_of, read_scored
from photon_train.evaluation.report import (
    both_averages,
    cases_to_picture,
    comparison_to_json,
    main_scores,
    shown_scores,
    write_questions,
    write_report,
)
from photon_train.evaluation.results import (
    Answers,
    Comparison,
    Evaluation,
    FormattedTable,
    Settings,
    formatted,
    formatted_interval,
    formatted_p,
    formatted_value,
    moved_tables,
    recall_tables,
    trade_off_table,
    trade_offs,
)
from photon_train.evaluation.text_metrics import LabelTable, read_labels
from photon_train.kept_tokens import CountedMask, MaskFolder, counted_by_volume, volumes_with_masks
from photon_train.overlay import PICTURE, Canvas, folders_of, picture
from photon_train.rows import Row, read_predictions, read_rows, unpack_mask, volume_id_of


def answered_before(predictions: Sequence[Path], model: str | None) -> Answering:
    """Return the answering of files that exist, with the configuration of the model directory, if one is named."""
    config = None
    if model:
        from photon_train.checkpoint import loading
        from photon_train.configuration_photon import PhotonConfig

        with loading(model):
            config = PhotonConfig.from_pretrained(model)
    return lambda rows: ([Answered(path, read_predictions(path)) for path in predictions], config)


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
    masks: str | None,
    overlays: int,
    *,
    answers_now: bool,
    verbose: bool = False,
) -> Evaluation:
    """Read rows, have them answered, evaluate, write and print; return the evaluation.

    What can be refused is refused before a model answers.

    masks        a prepared folder, a folder per volume id, or "auto" (`segment`): the recall of its masks by kept
                 tokens is measured
    overlays     so many cases of the first file get pictures
    answers_now  a model reads the volumes: relative paths are looked for where training looks for them
    verbose      print every table, not only the main scores
    """
    read_data = read_rows if answers_now or masks or overlays else read_values
    rows, training_rows = _rows_of(data, read_data), _rows_of(train)
    questions = check(benchmark, rows, settings)
    chosen = [*questions.values()]
    is_first = os.environ.get("RANK", "0") == "0"  # torchrun's others answer their part, and end then
    home, volumes = _masked(masks, chosen) if masks and (is_first or not answers_now) else (None, {})
    with ExitStack() as held:  # the folder, from where something is written on
        if answers_now and is_first:
            held.enter_context(exclusive(Location(str(output))))
        files, config = answering(chosen)
        if config:
            settings = replace(settings, grid_zyx=config.tokens_thw)
        named = dict(zip(_names_of([one.path for one in files]), files, strict=True))
        counted = _counted(home, volumes, settings) if home else {}
        evaluation = evaluate(
            benchmark,
            rows,
            {name: one.predictions for name, one in named.items()},
            train=training_rows,
            settings=settings,
            config=config,
            masks=counted,
            questions=questions,
        )
        if any(one.on_edited for one in files):
            evaluation = replace(evaluation, counterfactuals=_counterfactuals(named, questions, settings))
        if not answers_now:
            held.enter_context(exclusive(Location(str(output))))
        pictures = _pictures(evaluation, rows, overlays, output / "overlays") if overlays else {}
        paths = [*write_report(evaluation, output, overlays=pictures), write_questions(evaluation, output)]
    print_evaluation(evaluation, verbose=verbose)
    if home and not any(answers.mask_recalls for answers in evaluation.answers):
        grid = " x ".join(map(str, settings.grid_zyx))
        reason = f"no prediction says which of {grid} tokens it kept; --config MODEL says the grid"
        console.print(f"no recall of masks: {reason}")
    console.print(f"page: {paths[1]}; beside it {paths[0].name} and {paths[2].name}", soft_wrap=True)
    return evaluation


def _rows_of(paths: Sequence[Path], read: Callable[[Path], list[dict[str, Any]]] = read_values) -> list[dict[str, Any]]:
    """Return the rows of manifests, of other makers' too: a row without an id is called after its line."""
    return [scored_row(row, f"{path.stem}-{number}") for path in paths for number, row in enumerate(read(path), 1)]


def _masked(masks: str, rows: Sequence[Row]) -> tuple[MaskFolder, dict[str, str]]:
    """Return where the masks are, and {id: path} of the volumes that have some; "auto" has the others segmented."""
    places = {str(row["volume_id"]): str(row["videos"][0]) for row in rows if len(row["videos"]) == 1}
    if masks == AUTO:
        segment(places)
    home = mask_folder(masks, places.values())
    return home, volumes_with_masks(home, rows)


def _counterfactuals(
    answered: Mapping[str, Answered], questions: Mapping[str, Row], settings: Settings
) -> Counterfactuals:
    """Return what edits of the volumes have changed."""
    people = [str(row["patient"] or row["volume_id"]) for row in questions.values()]
    patients = draw_patients(people, settings.bootstrap, settings.seed)
    base = {name: one.predictions for name, one in answered.items()}
    return summarise(questions, base, {name: one.on_edited for name, one in answered.items()}, patients)


def import_results(path: Path, form: str, columns: Mapping[str, str], data: Sequence[Path], output: Path) -> bool:
    """Write the results of another tool as predictions of the data's questions, and beside them a list of those that
    answer none for sure. Print the counts; return whether there are none of these. UsageError for a file that exists.
    """
    if output.exists():
        raise UsageError(f"{output}: expected a new file, found one; choose another --output or remove it")
    results = read_results(path, form, columns)
    imported = join_results(results, _rows_of(data))
    places = (f"{one.place}: {one.reason}" for one in imported.left_out[:10])
    if not imported.predictions:
        raise UsageError("\n  ".join([f"{path}: expected answers to questions of the data, found none", *places]))
    folder, left_out = Location(str(output.parent)), output.with_name(f"{output.stem}.left_out.jsonl")
    folder.write(output.name, jsonl_bytes(asdict(one) for one in imported.predictions))
    console.print(
        f"{len(imported.predictions):,} of {len(results):,} results answer a question: {output}", soft_wrap=True
    )
    if imported.left_out:
        folder.write(left_out.name, jsonl_bytes(one._asdict() for one in imported.left_out))
        print_lines(places)
        console.print(f"left out: {len(imported.left_out):,}, all in {left_out}", soft_wrap=True)
    return not imported.left_out


def compare_evaluations(
    paths: Sequence[Path], output: Path | None, bootstrap: int, seed: int, *, verbose: bool
) -> None:
    """Print how the evaluations of folders differ from the first, and write all differences to `output`, if given."""
    read = [(path, name, scored) for path in paths for name, scored in read_scored(path).items()]
    names = [name for _, name, _ in read]
    if len(set(names)) < len(names):
        names = [f"{path}: {name}" for path, name, _ in read]
    if len(set(names)) < len(names):
        raise UsageError("expected different evaluations, found one of them twice")
    questions = [scored for _, _, scored in read]
    settings = Settings(bootstrap=bootstrap, seed=seed)
    pairs = pairs_of([*zip(names, questions, strict=True)], settings)
    comparisons = [compared(*pair, settings) for pair in pairs]
    main = {(task, one.metric) for scored in questions for one in scored for task in (one.task, ALL_TASKS)}
    for comparison in comparisons:
        console.print(f"{comparison.second} and {comparison.first}: {comparison.questions:,} questions of both")
        _print_differences(comparison, None if verbose else main)
    if output:
        text = json.dumps([comparison_to_json(one) for one in comparisons], indent=1, ensure_ascii=False)
        Location(str(output.parent)).write(output.name, f"{text}\n".encode("utf-8", "backslashreplace"))


def _names_of(paths: Sequence[Path]) -> list[str]:
    """Return a name for each file: its stem, or with its folders where two stems are the same."""
    if len({path.resolve() for path in paths}) < len(paths):
        raise UsageError("--predictions: expected different files, found one of them twice")
    stems = [path.stem for path in paths]
    return stems if len(set(stems)) == len(stems) else [path.with_suffix("").as_posix() for path in paths]


def _counted(home: MaskFolder, volumes: Mapping[str, str], settings: Settings) -> dict[str, list[CountedMask]]:
    """Return the masks of the volumes, counted on the tokens; print which could not be read."""
    with ProgressBar("masks of volumes", total=len(volumes)) as bar:
        found = counted_by_volume(home, volumes, settings.grid_zyx, lambda: bar.update(advance=1))
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
            scan = open_input(volume, id=id)
            canvas = Canvas(scan.volume, scan.native, tokens_zyx)
            for case in group:
                keep_V = unpack_mask(case.prediction.kept, case.prediction.visual_tokens)
                path = folders_of(folder, case.id, 1)[0] / PICTURE
                path.parent.mkdir(parents=True, exist_ok=True)
                with write_whole(path) as temporary:
                    drawn = picture(canvas, keep_V, keep_V.astype(np.float32), case.question, case.prediction.response)
                    drawn.save(temporary, "PNG")
                pictures[case.id] = path
        except (ValueError, OSError) as error:
            if isinstance(error, OSError) and error.errno in NO_SPACE:
                raise
            console.print(f"no overlay of {volume}: {error}", soft_wrap=True)
    return {first.name: pictures}


def print_evaluation(evaluation: Evaluation, *, verbose: bool = False) -> None:
    """Print the main scores of every file of predictions, and what they differ by; verbose: all tables of the page."""
    number = f"{evaluation.questions:,} questions, {evaluation.patients:,} patients"
    chosen = [f"only {', '.join(evaluation.settings.tasks)}"] if evaluation.settings.tasks else []
    chosen += [f"only the first {evaluation.settings.limit}"] if evaluation.settings.limit else []
    console.print("; ".join([f"{evaluation.benchmark}: {number}", *chosen]))
    learned = f"constant answers were chosen on {evaluation.learned_on}"
    console.print(f"{learned}; scores in points, 95 % intervals by patient")
    against_kept = trade_offs(evaluation)
    for answers in evaluation.answers:
        if verbose:
            _print_scores(answers)
        elif not against_kept:
            _print_main_scores(answers)
        if answers.gaps:
            console.print(f"{answers.name}: {answers.gaps.sentence()}", soft_wrap=True)
        if answers.unparsed:
            counts = ", ".join(f"{count:,} of {task}" for task, count in answers.unparsed.items())
            console.print(
                f"{answers.name}: responses that mean no answer (wrong where one is read): {counts}", soft_wrap=True
            )
        if verbose or not against_kept:
            _print_costs(answers)
    for table in _recall_tables(evaluation, verbose=verbose):
        print_table(*table, texts=1)
    main = {(one.task, one.metric) for one, _ in main_scores(evaluation.answers[0])}
    for table in moved_tables(evaluation.counterfactuals):
        print_table(*table, texts=2)
    for comparison in evaluation.comparisons if verbose or not against_kept else ():
        _print_differences(comparison, None if verbose else main)
    for trade_off in against_kept:
        print_table(*trade_off_table(trade_off), texts=1)
    if not verbose:
        console.print("all metrics, subtasks and cases are on the page; --verbose prints the tables")


def _recall_tables(evaluation: Evaluation, *, verbose: bool) -> list[FormattedTable]:
    """Return the tables of what was kept of masks; without `verbose`, the mean of the first table of the first file."""
    tables = [table for one in evaluation.answers if one.mask_recalls for table in recall_tables(one.mask_recalls)]
    return tables if verbose else [table._replace(lines=table.lines[:1]) for table in tables[:1]]


def _print_main_scores(answers: Answers) -> None:
    pairs = main_scores(answers)
    others = list(dict.fromkeys(name for one, _ in pairs for name in one.baselines if name != CONSTANT))
    shown = [name for name in others if name != MAJORITY]
    rows = [
        [
            *(one.task, one.metric, formatted(one.estimate), formatted_interval(one.estimate)),
            *(formatted_value(one.baselines.get(name)) for name in (CONSTANT, *shown)),
            *(f"{one.questions:,}", f"{one.patients:,}"),
        ]
        for one, _ in pairs
    ]
    names = ["score", "95 %", "constant", *(name.replace("_", " ") for name in shown), "n", "patients"]
    print_table(answers.name, ["task", "metric", *names], rows, texts=2)


def _print_scores(answers: Answers) -> None:
    rows = []
    for score, by_question in both_averages(shown_scores(answers)):
        blind = {name: formatted_value(value) for name, value in score.baselines.items()}
        fixed = [blind.pop(name, formatted_value(None)) for name in (CONSTANT, MAJORITY)]
        cells = [formatted(score.estimate), formatted_interval(score.estimate), *fixed, " ".join(blind.values())]
        counts = [str(score.questions), str(score.patients)]
        rows.append([score.task, score.metric, *cells, formatted(by_question.estimate), *counts])
    names = ["macro", "95 %", "constant", "majority", "other blind rules", "by question", "n", "patients"]
    print_table(answers.name, ["task", "metric", *names], rows, texts=2)


def _print_differences(comparison: Comparison, main: Collection[tuple[str, str]] | None) -> None:
    """Print the differences of the main metrics, given as (task, metric); None: of all, by question too."""
    rows = []
    for pair in both_averages(comparison.scores):
        if main is None or (pair[0].task, pair[0].metric) in main:
            cells = [
                text
                for one in pair
                for text in (formatted(one.estimate), formatted_interval(one.estimate), formatted_p(one))
            ]
            rows.append(
                [pair[0].task, pair[0].metric, *(cells if main is None else cells[:3]), f"{pair[0].questions:,}"]
            )
    names = ["macro", "95 %", "p", *(["by question", "95 %", "p"] if main is None else []), "n"]
    print_table(f"{comparison.second} minus {comparison.first}", ["task", "metric", *names], rows, texts=2)


def _print_costs(answers: Answers) -> None:
    costs = answers.costs
    if costs and costs.questions_per_second:
        stages = ", ".join(f"{stage} {seconds.mean:.3f}" for stage, seconds in costs.seconds.items())
        console.print(f"seconds per question: {stages}; {costs.questions_per_second:.2f} questions per second")
    if costs and costs.prefill_tflop is not None:
        unpruned = f"{costs.prefill_tflop_unpruned:.2f} unpruned"
        shared = f"sharing a volume: {costs.shared_tflop:.2f}, {costs.shared_tflop_unpruned:.2f} unpruned"
        console.print(f"prefill: {costs.prefill_tflop:.2f} TFLOP a question, {unpruned}; {shared}")
    if costs and costs.peak_memory_mib:
        console.print(f"peak memory: {costs.peak_memory_mib:,.0f} MiB")
    if answers.kept:
        console.print(f"visual tokens kept: {answers.kept.mean_ratio:.1%}")
