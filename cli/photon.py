"""photon: train, evaluate and ask Photon, a 3D-CT language model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import typer

from photon_cli.eval_options import evaluate
from photon_cli.exits import MISUSE
from photon_cli.options import print_any_text
from photon_cli.predict_command import predict

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, help=__doc__)


@app.command()
def init(
    source: Annotated[str | None, typer.Option("--from", help="Qwen2.5-VL checkpoint: a directory or a hub id.")] = None,
    output: Annotated[Path | None, typer.Option(help="Where to write the stage-1 start made of --from.")] = None,
    tiny: Annotated[Path | None, typer.Option(help="Where to write a small random model with its own tokenizer.")] = None,
    stage: Annotated[int, typer.Option(min=1, max=2, help="With --tiny: 2 adds a threshold predictor.")] = 1,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the new weights.")] = 0,
    model_shape: Annotated[str, typer.Option(help="With --tiny: voxels z,y,x of the grid it reads; multiples of 14,28,28.")] = "",
) -> None:
    """Write a model to start training from: --from MODEL --output DIR, or --tiny DIR."""
    if (tiny is None) == (source is None) or (source is None) != (output is None):
        _fail("either --tiny DIR, or --from MODEL with --output DIR wanted")
    target = tiny or output
    assert target is not None, "one of the two is given"
    if target.exists() and any(target.iterdir()):
        _fail(f"an empty or new directory wanted, {target} has files; choose another")
    from photon_train import tiny as initial

    try:
        if source is None:
            settings = {"model_shape_zyx": tuple(int(n) for n in model_shape.split(","))} if model_shape else {}
            model = initial.tiny(target, stage, seed, **settings)
        else:
            model = initial.start_from(source, target, revision, seed)
    except (ValueError, OSError) as error:
        _fail(str(error))
    typer.echo(f"stage {model.config.stage}, {model.num_parameters():,} parameters: {target}")


@app.command()
def train(
    stage: Annotated[str, typer.Argument(help="s1 (patch embedding), s1c (everything), s2 (with pruning); tiny-s1, tiny-s2.")],
    data: Annotated[list[str] | None, typer.Option(help="Manifest to train on; may be given again.")] = None,
    model: Annotated[str | None, typer.Option(help="Checkpoint to start from: a directory or a hub id.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the run.")] = None,
    evaluate_on: Annotated[list[str] | None, typer.Option("--eval", help="Manifest to evaluate on; may be given again.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML or JSON file of settings.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="key=value; may be given again.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --output.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check every row, make one step, describe the run.")] = False,
) -> None:
    """Train a stage on prepared volumes; stop it at any moment, go on with --resume."""
    from photon_cli import train_command
    from photon_cli.options import edges

    given = {"data": data, "model": model, "output": str(output) if output else None, "eval": evaluate_on}
    with edges():
        train_command.train(stage, {k: v for k, v in given.items() if v}, config, settings or [], resume, dry_run)


app.command(name="eval")(evaluate)
app.command()(predict)


def _fail(message: str) -> NoReturn:
    typer.echo(f"photon: {message}", err=True)
    raise typer.Exit(MISUSE)


def main() -> None:
    """Run the command line."""
    print_any_text()
    app()
