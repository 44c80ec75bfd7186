"""The options of `photon eval`; what they ask for is done in eval_command.py, and by a model in eval_model.py."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from photon_cli.exits import MISUSE, OK, PARTIAL
from photon_cli.options import edges, fail, is_default

if TYPE_CHECKING:
    from photon_cli.predict_model import Model

# What makes sense with a model only, and without one only.
OF_MODEL = ("choices", "max_new_tokens", "questions_per_batch", "device", "dtype", "revision", "schedulers", "keep")
OF_FILES = ("predictions", "config")
USUAL_OVERLAYS = 6


def evaluate(
    context: typer.Context,
    benchmark: Annotated[str, typer.Argument(help="3d-rad, deeptumorvqa-v1, deeptumorvqa-v2, report or vqa.")],
    data: Annotated[list[Path], typer.Option(help="A manifest with the questions and answers. Repeatable.")],
    output: Annotated[Path, typer.Option(help="Folder for scores.json and report.html; with --model, predictions too.")],
    predictions: Annotated[list[Path], typer.Option(help="A file of predictions. Repeatable.")] = [],  # noqa: B006 - typer copies it
    model: Annotated[
        str | None, typer.Option(help="A model that answers now: a directory or a hub id. Without both: blind baselines.")
    ] = None,
    choices: Annotated[bool, typer.Option(help="Score the choices of rows that have some, instead of generating.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
    questions_per_batch: Annotated[int, typer.Option(min=1, help="Questions on one volume answered together.")] = 16,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (bfloat16 on a GPU), float32, bfloat16 or float16.")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    schedulers: Annotated[str, typer.Option(help="The model under each of these: its,none,random,uniform,foreground.")] = "",
    keep: Annotated[
        str, typer.Option(help="Share of tokens kept by random, uniform, foreground: match-its or 0.4.")
    ] = "match-its",
    masks: Annotated[Path | None, typer.Option(help="Masks, a folder per volume id: their recall by the kept tokens.")] = None,
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
    misplaced = [name for name in (OF_FILES if model else OF_MODEL) if not is_default(context, name)]
    if misplaced:
        told = ", ".join(f"--{name.replace('_', '-')}" for name in misplaced)
        fail(f"{told}: {'no --model' if model else '--model'} wanted beside it; the two ways do not mix.", MISUSE)
    try:
        from photon_cli import eval_command
    except ModuleNotFoundError as error:
        fail(f"photon: the extra `eval` wanted, {error.name} is not installed; pip install 'photon-ct[eval]'", MISUSE)
    from photon_train.evaluation.tables import Settings

    settings = Settings(allow_partial=allow_partial, bootstrap=bootstrap, seed=seed, with_bertscore=bertscore)
    pictures = overlays if overlays is not None else USUAL_OVERLAYS if model else 0
    with edges():
        if model:
            from photon_cli import eval_model

            asked = _model(model, choices, max_new_tokens, questions_per_batch, device, dtype, revision)
            order = eval_model.schedulers(schedulers, keep)
            answers: eval_command.Answerer = partial(eval_model.answer, asked, order, output / "predictions")
        else:
            given = eval_command.files(predictions, config)
            answers = lambda rows: given  # noqa: E731
        done = eval_command.run(
            benchmark,
            answers,
            data,
            output,
            train=train,
            labels=labels,
            masks=masks,
            overlays=pictures,
            with_volumes=bool(model or masks or pictures),
            settings=settings,
        )
    raise typer.Exit(PARTIAL if done.is_partial else OK)


def _model(
    place: str, choices: bool, max_new_tokens: int, questions_per_batch: int, device: str, dtype: str, revision: str | None
) -> Model:
    """Return the model, which answers with the likeliest tokens."""
    from photon_cli.predict_model import Model
    from photon_train.answering.predictor import AnswerSettings

    answers = AnswerSettings(max_new_tokens, choices=choices, questions_per_batch=questions_per_batch)
    return Model(place, answers, device, dtype, revision, scheduler=None, keep_ratio=None)
