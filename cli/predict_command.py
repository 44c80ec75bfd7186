"""The options of `photon predict`; what they ask for is done in predict_scan.py and predict_rows.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from photon_cli.exits import MISUSE, OK, PARTIAL
from photon_cli.options import edges, fail, is_default

# What makes sense with one scan only, and with a manifest only.
OF_SCAN = ("recipe", "settings", "stream", "json_", "at")
OF_ROWS = ("output", "choices", "shard")


def predict(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="A model: a directory or a hub id.")],
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[SCAN QUESTION...]", help="A store or a raw scan, and what to ask about it.")
    ] = None,
    manifest: Annotated[Path | None, typer.Option(help="Rows to answer (jsonl of ms-swift), instead of SCAN.")] = None,
    output: Annotated[Path | None, typer.Option(help="With --manifest: the predictions (jsonl), gone on with if there.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
    stream: Annotated[bool, typer.Option(help="Print tokens as they come.")] = False,
    choices: Annotated[bool, typer.Option(help="Score the choices of rows that have some, instead of generating.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
    sample: Annotated[bool, typer.Option(help="Draw tokens instead of taking the likeliest.")] = False,
    temperature: Annotated[float, typer.Option(min=0.01, help="With --sample.")] = 1.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0, help="With --sample.")] = 1.0,
    seed: Annotated[int, typer.Option(help="With --sample.")] = 0,
    questions_per_batch: Annotated[int, typer.Option(min=1, help="Questions on one volume answered together.")] = 16,
    scheduler: Annotated[str | None, typer.Option(help="its, none, random, uniform or foreground; the model's own.")] = None,
    keep_ratio: Annotated[float | None, typer.Option(help="Share of tokens kept by random, uniform, foreground.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (bfloat16 on a GPU), float32, bfloat16 or float16.")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    shard: Annotated[str | None, typer.Option(help="I/N: only part I of N, from 0; torchrun sets it itself.")] = None,
    overlay: Annotated[
        Path | None, typer.Option(help="Folder for what was kept: a picture and NIfTI files per question.")
    ] = None,
    window: Annotated[str, typer.Option(help="Of the picture: full, lung, mediastinum, soft, bone, or low,high in HU.")] = "full",
    at: Annotated[
        str | None, typer.Option(help="World point x,y,z (LPS mm) of the picture; else the most salient kept token.")
    ] = None,
    masks: Annotated[
        Path | None, typer.Option(help="Masks of the scan (with --manifest: a folder per volume id): recall by kept tokens.")
    ] = None,
    recipe: Annotated[str, typer.Option(help="How a raw scan is prepared: chest_ct, abdomen_ct or wide_ct.")] = "chest_ct",
    settings: Annotated[list[str], typer.Option("--set", help="Change the recipe: spacing_mm=1.5,1.5,1.5.")] = [],  # noqa: B006
) -> None:
    """Answer questions about one scan, or the rows of a manifest."""
    words = words or []
    if bool(manifest) == bool(words) or (manifest is None) != (output is None) or len(words) == 1:
        fail('SCAN "question" ... wanted, or --manifest ROWS --output PREDICTIONS.', MISUSE)
    given = [name for name in (OF_SCAN if manifest else OF_ROWS) if not is_default(context, name)]
    if given:
        options = ", ".join({"json_": "--json", "settings": "--set"}.get(name, f"--{name}") for name in given)
        fail(f"{options}: {'SCAN' if manifest else '--manifest'} wanted beside it; the two ways do not mix.", MISUSE)
    if manifest and masks and not overlay:
        fail("--masks: --overlay wanted beside it, where the recalls of a manifest's masks are written.", MISUSE)
    with edges():
        from photon_cli import predict_model, predict_rows, predict_scan
        from photon_cli.kept import KeptOrder, view_of
        from photon_cli.options import make_recipe
        from photon_train.answering.predictor import AnswerSettings

        answers = AnswerSettings(max_new_tokens, sample, temperature, top_p, seed, choices, questions_per_batch)
        chosen = predict_model.Model(model, answers, device, dtype, revision, scheduler, keep_ratio)
        kept = KeptOrder(overlay, view_of(window, at), masks)
        if manifest and output:
            good = predict_rows.predict_rows(chosen, manifest, output, shard, kept)
        else:
            place, *questions = words
            look = predict_scan.Look(json_, stream)
            predict_scan.predict_scan(chosen, place, questions, make_recipe(recipe, settings, None, None), look, kept)
            good = True
    raise typer.Exit(OK if good else PARTIAL)
