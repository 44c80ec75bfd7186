"""photon: train, evaluate and ask Photon, a 3D-CT language model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from photon_cli import options
from photon_cli.terminal import MISUSE, OK, PARTIAL, errors_as_exit_codes, escape_unprintable, fail

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, help=__doc__
)

# Options of photon predict that belong to one scan only, and to rows only.
OF_SCAN = ("recipe", "settings", "stream", "as_json", "at")
OF_ROWS = ("output", "choices", "shard")
# Options of photon eval that belong to a model only, and to files of predictions only.
OF_MODEL = ("choices", "max_new_tokens", "questions_per_batch", "device", "dtype", "revision", "schedulers", "keep")
OF_FILES = ("predictions", "config")
OVERLAYS_WITH_MODEL = 6


@app.command()
def init(
    source: Annotated[
        str | None, typer.Option("--from", help="Qwen2.5-VL checkpoint: a directory or a hub id.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Where to write the stage-1 start made of --from.")] = None,
    tiny: Annotated[
        Path | None, typer.Option(help="Where to write a small random model with its own tokenizer.")
    ] = None,
    stage: Annotated[int, typer.Option(min=1, max=2, help="With --tiny: 2 adds a threshold predictor.")] = 1,
    revision: options.Revision = None,
    seed: Annotated[int, typer.Option(help="Seed of the new weights.")] = 0,
    model_shape: Annotated[
        str, typer.Option(help="With --tiny: voxels z,y,x of the grid it reads; multiples of 14,28,28.")
    ] = "",
) -> None:
    """Write a model to start training from: --from MODEL --output DIR, or --tiny DIR."""
    target = tiny or output
    if target is None or (tiny is None) == (source is None) or (source is None) != (output is None):
        fail("photon: expected either --tiny DIR, or --from MODEL with --output DIR", MISUSE)
    if target.exists() and any(target.iterdir()):
        fail(f"photon: expected an empty or new directory, found files in {target}; choose another", MISUSE)
    from photon_train import tiny as models

    try:
        if source is None:
            shape = {"model_shape_zyx": tuple(int(n) for n in model_shape.split(","))} if model_shape else {}
            model = models.tiny(target, stage, seed, **shape)
        else:
            model = models.start_from(source, target, revision, seed)
    except (ValueError, OSError) as error:
        fail(f"photon: {error}", MISUSE)
    typer.echo(f"stage {model.config.stage}, {model.num_parameters():,} parameters: {target}")


@app.command()
def train(
    stage: Annotated[
        str, typer.Argument(help="s1 (patch embedding), s1c (everything), s2 (with pruning); tiny-s1, tiny-s2.")
    ],
    data: Annotated[list[str] | None, typer.Option(help="Manifest to train on. Repeatable.")] = None,
    model: Annotated[str | None, typer.Option(help="Checkpoint to start from: a directory or a hub id.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the run.")] = None,
    evaluate_on: Annotated[
        list[str] | None, typer.Option("--eval", help="Manifest to evaluate on. Repeatable.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML or JSON file of settings.")] = None,
    settings: Annotated[list[str], typer.Option("--set", help="key=value. Repeatable.")] = [],  # noqa: B006 - typer copies it
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --output.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check every row, make one step, describe the run.")
    ] = False,
) -> None:
    """Train a stage on prepared volumes; stop it at any moment, go on with --resume."""
    given = {"data": data, "model": model, "output": str(output) if output else None, "eval": evaluate_on}
    with errors_as_exit_codes():
        from photon_cli.train import train as run

        run(stage, {name: value for name, value in given.items() if value}, config, settings, resume, dry_run)


@app.command()
def predict(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="A model: a directory or a hub id.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SCAN QUESTION...]", help="A store or a raw scan, and questions about it."),
    ] = None,
    data: Annotated[list[Path], typer.Option(help="A manifest of rows to answer, instead of SCAN. Repeatable.")] = [],  # noqa: B006
    manifest: Annotated[str | None, typer.Option(hidden=True)] = None,
    output: Annotated[
        Path | None, typer.Option(help="With --data: file of predictions (jsonl); goes on with what it has.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
    stream: Annotated[bool, typer.Option(help="Print tokens as they come.")] = False,
    choices: options.Choices = False,
    max_new_tokens: options.MaxNewTokens = 512,
    sample: Annotated[bool, typer.Option(help="Draw tokens instead of taking the likeliest.")] = False,
    temperature: Annotated[float, typer.Option(min=0.01, help="With --sample.")] = 1.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0, help="With --sample.")] = 1.0,
    seed: Annotated[int, typer.Option(help="With --sample.")] = 0,
    questions_per_batch: options.QuestionsPerBatch = 16,
    scheduler: Annotated[
        str | None, typer.Option(help="its, none, random, uniform or foreground; the model's own.")
    ] = None,
    keep_ratio: Annotated[
        float | None, typer.Option(help="Share of tokens kept by random, uniform, foreground.")
    ] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    revision: options.Revision = None,
    shard: Annotated[str | None, typer.Option(help="I/N: only part I of N, from 0; torchrun sets it itself.")] = None,
    overlay: Annotated[
        Path | None, typer.Option(help="Folder for what was kept: a picture and NIfTI files per question.")
    ] = None,
    window: Annotated[
        str, typer.Option(help="Of the picture: full, lung, mediastinum, soft, bone, or low,high in HU.")
    ] = "full",
    at: Annotated[
        str | None, typer.Option(help="World point x,y,z (LPS mm) of the picture; else the most salient kept token.")
    ] = None,
    masks: Annotated[
        Path | None,
        typer.Option(help="Masks of the scan (with --data: a folder per volume id): recall by kept tokens."),
    ] = None,
    recipe: Annotated[
        str, typer.Option(help="How a raw scan is prepared: chest_ct, abdomen_ct or wide_ct.")
    ] = "chest_ct",
    settings: Annotated[list[str], typer.Option("--set", help="Change the recipe: spacing_mm=1.5,1.5,1.5.")] = [],  # noqa: B006
) -> None:
    """Answer questions about one scan, or the rows of manifests."""
    scan_path, *questions = words or [""]
    _check_predict(context, manifest, bool(data), bool(output), bool(words), bool(questions))
    with errors_as_exit_codes():
        from photon_cli import predict as body
        from photon_train.answering.predictor import AnswerSettings

        overlays = body.overlays_of(overlay, window, at, masks)
        answers = AnswerSettings(max_new_tokens, sample, temperature, top_p, seed, choices, questions_per_batch)
        load = body.loading(model, answers, dtype, revision, device=device, scheduler=scheduler, keep_ratio=keep_ratio)
        is_complete = True
        if output:
            is_complete = body.predict_rows(load, device, data, output, shard, overlays)
        else:
            scan = body.open_for_model(scan_path, options.make_recipe(recipe, settings), model, revision)
            body.predict_scan(load, model, scan, questions, overlays, as_json=as_json, stream=stream)
    raise typer.Exit(OK if is_complete else PARTIAL)


def _check_predict(
    context: typer.Context, manifest: str | None, has_data: bool, has_output: bool, has_scan: bool, has_questions: bool
) -> None:
    """End the command where its options mean neither one scan nor rows, or both."""
    if manifest is not None:
        fail(
            f"--manifest: expected rows as --data; --manifest is the YAML of photon-data. Say --data {manifest}", MISUSE
        )
    if has_data == has_scan or has_data != has_output or has_scan != has_questions:
        fail('expected SCAN "question" ..., or --data ROWS --output PREDICTIONS', MISUSE)
    misplaced = options.given_options(context, OF_SCAN if has_data else OF_ROWS)
    if misplaced:
        fail(f"{misplaced}: expected {'SCAN' if has_data else '--data'} beside it; the two ways do not mix", MISUSE)
    if has_data and context.params["masks"] and not context.params["overlay"]:
        fail("--masks: expected --overlay beside it; the recalls of the rows' masks are written there", MISUSE)


@app.command(name="eval")
def evaluate(
    context: typer.Context,
    benchmark: Annotated[str, typer.Argument(help="3d-rad, deeptumorvqa-v1, deeptumorvqa-v2, report or vqa.")],
    data: Annotated[list[Path], typer.Option(help="A manifest with the questions and answers. Repeatable.")],
    output: Annotated[
        Path, typer.Option(help="Folder for scores.json and report.html; with --model, predictions too.")
    ],
    predictions: Annotated[list[Path], typer.Option(help="A file of predictions. Repeatable.")] = [],  # noqa: B006 - typer copies it
    model: Annotated[
        str | None,
        typer.Option(help="A model that answers now: a directory or a hub id. Without both: blind baselines."),
    ] = None,
    choices: options.Choices = False,
    max_new_tokens: options.MaxNewTokens = 512,
    questions_per_batch: options.QuestionsPerBatch = 16,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    revision: options.Revision = None,
    schedulers: Annotated[
        str, typer.Option(help="The model under each of these: its,none,random,uniform,foreground.")
    ] = "",
    keep: Annotated[
        str, typer.Option(help="Share of tokens kept by random, uniform, foreground: match-its or 0.4.")
    ] = "match-its",
    masks: Annotated[
        Path | None, typer.Option(help="Masks, a folder per volume id: their recall by the kept tokens.")
    ] = None,
    overlays: Annotated[
        int | None,
        typer.Option(min=0, help="So many worst and best cases get pictures of what was kept; 6 with --model, else 0."),
    ] = None,
    train: Annotated[list[Path], typer.Option(help="A manifest to choose constant answers on. Repeatable.")] = [],  # noqa: B006
    labels: Annotated[list[Path], typer.Option(help="Twice: tables of labels of the answers, of the responses.")] = [],  # noqa: B006
    config: Annotated[
        str | None, typer.Option(help="The model behind --predictions, a directory: its FLOPs are counted.")
    ] = None,
    bertscore: Annotated[bool, typer.Option(help="BERTScore too; needs the package bert-score.")] = False,
    allow_partial: Annotated[bool, typer.Option(help="Leave questions without a prediction out, and say so.")] = False,
    bootstrap: Annotated[int, typer.Option(min=0, help="Resamplings of the patients.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the resamplings.")] = 0,
) -> None:
    """Score a model or predictions on a benchmark's questions, with intervals and blind baselines."""
    misplaced = options.given_options(context, OF_FILES if model else OF_MODEL)
    if misplaced:
        fail(f"{misplaced}: expected {'no --model' if model else '--model'} beside it; the two ways do not mix", MISUSE)
    try:
        from photon_cli.eval import Answering, answered_before, score
    except ModuleNotFoundError as error:
        fail(f"photon: expected the extra `eval`, {error.name} is not installed; pip install 'photon-ct[eval]'", MISUSE)
    from photon_train.evaluation.results import Settings

    pictures = overlays if overlays is not None else OVERLAYS_WITH_MODEL if model else 0
    scoring = Settings(allow_partial=allow_partial, bootstrap=bootstrap, seed=seed, with_bertscore=bertscore)
    with errors_as_exit_codes():
        answering: Answering
        if model:
            from photon_cli.predict import answer_benchmark, loading
            from photon_train.answering.predictor import AnswerSettings

            answers = AnswerSettings(max_new_tokens, choices=choices, questions_per_batch=questions_per_batch)
            load = loading(model, answers, dtype, revision, device=device)
            answering = answer_benchmark(load, schedulers, keep, output / "predictions")
        else:
            answering = answered_before(predictions, config)
        evaluation = score(
            benchmark,
            answering,
            data,
            output,
            train=train,
            labels=labels,
            masks=masks,
            overlays=pictures,
            with_volumes=bool(model or masks or pictures),
            settings=scoring,
        )
    raise typer.Exit(PARTIAL if evaluation.is_partial else OK)


def main() -> None:
    """Run the command line."""
    escape_unprintable()
    app()
