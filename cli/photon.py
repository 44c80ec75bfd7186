"""photon: train, evaluate and ask Photon, a 3D-CT language model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import typer

from photon_cli.exits import MISUSE, OK, PARTIAL

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, help=__doc__)
NOT_YET = {"ignore_unknown_options": True, "allow_extra_args": True}


@app.command()
def init(
    source: Annotated[str | None, typer.Option("--from", help="Qwen2.5-VL checkpoint: a directory or a hub id.")] = None,
    output: Annotated[Path | None, typer.Option(help="Where to write the stage-1 start made of --from.")] = None,
    tiny: Annotated[Path | None, typer.Option(help="Where to write a small random model with its own tokenizer.")] = None,
    stage: Annotated[int, typer.Option(min=1, max=2, help="With --tiny: 2 adds a threshold predictor.")] = 1,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the new weights.")] = 0,
) -> None:
    """Write a model to start training from: --from MODEL --output DIR, or --tiny DIR."""
    if (tiny is None) == (source is None) or (source is None) != (output is None):
        _fail("either --tiny DIR, or --from MODEL with --output DIR wanted")
    target = tiny or output
    assert target is not None, "one of the two is given"
    if target.exists() and any(target.iterdir()):
        _fail(f"an empty or new directory wanted, {target} has files; choose another")
    from photon_train import initial

    try:
        model = initial.tiny(target, stage, seed) if source is None else initial.start_from(source, target, revision, seed)
    except (ValueError, OSError) as error:
        _fail(str(error))
    typer.echo(f"stage {model.config.stage}, {model.num_parameters():,} parameters: {target}")


@app.command(context_settings=NOT_YET)
def train() -> None:
    """Train a model (not in this version)."""
    _fail("photon train is not in this version yet")


@app.command(name="eval")
def evaluate(
    benchmark: Annotated[str, typer.Argument(help="3d-rad, deeptumorvqa-v1, deeptumorvqa-v2, report or vqa.")],
    data: Annotated[list[Path], typer.Option(help="A manifest with the questions and answers. Repeatable.")],
    output: Annotated[Path, typer.Option(help="Folder for scores.json and report.html.")],
    predictions: Annotated[list[Path], typer.Option(help="A file of predictions; none scores blind baselines. Repeatable.")] = [],  # noqa: B006 - typer copies it
    train: Annotated[list[Path], typer.Option(help="A manifest to choose constant answers on. Repeatable.")] = [],  # noqa: B006
    labels: Annotated[list[Path], typer.Option(help="Twice: tables of labels of the answers, of the responses.")] = [],  # noqa: B006
    config: Annotated[str | None, typer.Option(help="The model that answered, a directory: its FLOPs are counted.")] = None,
    bertscore: Annotated[bool, typer.Option(help="BERTScore too; needs the package bert-score.")] = False,
    allow_partial: Annotated[bool, typer.Option(help="Leave questions without a prediction out, and say so.")] = False,
    bootstrap: Annotated[int, typer.Option(min=0, help="Resamplings of the patients.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the resamplings.")] = 0,
) -> None:
    """Score predictions of a benchmark's questions, with intervals and blind baselines."""
    try:
        from photon_cli import eval_command
    except ModuleNotFoundError as error:
        _fail(f"the extra `eval` wanted, {error.name} is not installed; pip install 'photon-ct[eval]'")
    from photon_cli.options import edges
    from photon_train.evaluation.evaluate import Settings

    settings = Settings(allow_partial=allow_partial, bootstrap=bootstrap, seed=seed, with_bertscore=bertscore)
    with edges():
        done = eval_command.run(benchmark, predictions, data, output, train=train, labels=labels, model=config, settings=settings)
    raise typer.Exit(PARTIAL if done.is_partial else OK)


@app.command(context_settings=NOT_YET)
def predict() -> None:
    """Answer questions about volumes (not in this version)."""
    _fail("photon predict is not in this version yet")


def _fail(message: str) -> NoReturn:
    typer.echo(f"photon: {message}", err=True)
    raise typer.Exit(MISUSE)


def main() -> None:
    """Run the command line."""
    app()
