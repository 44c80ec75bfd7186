"""photon: train, evaluate and ask Photon, a 3D-CT language model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Context, Exit, Option, Typer, echo
from typer.core import TyperCommand, TyperGroup

from photon_cli import terminal
from photon_cli.terminal import OK, PARTIAL, errors_as_exit_codes, fail, run_app

app = Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, help=__doc__
)

# Options of photon predict that belong to a raw scan only, to one scan only, and to rows only.
OF_RAW = ("recipe", "settings", "series")
OF_SCAN = (*OF_RAW, "prior", "stream", "as_json", "at")
OF_ROWS = ("output", "choices", "shard")
# Options of photon eval that belong to a model only, and to files of predictions only.
OF_MODEL = (
    *("choices", "max_new_tokens", "batch", "adapter", "device", "dtype", "revision"),
    *("schedulers", "keep", "counterfactual"),
)
OF_FILES = ("predictions", "config")
OVERLAYS_WITH_MODEL = 6


@app.command()
def init(
    source: Annotated[str | None, Option("--from", help="Qwen2.5-VL checkpoint: a directory or a hub id.")] = None,
    output: Annotated[Path | None, Option(help="Where to write the stage-1 start made of --from.")] = None,
    tiny: Annotated[Path | None, Option(help="Where to write a small random model with its own tokenizer.")] = None,
    stage: Annotated[int, Option(min=1, max=2, help="With --tiny: 2 adds a threshold predictor.")] = 1,
    revision: terminal.Revision = None,
    seed: Annotated[int, Option(help="Seed of the new weights.")] = 0,
    model_shape: Annotated[str, Option(help="With --tiny: voxels z,y,x it reads; multiples of 14,28,28.")] = "",
) -> None:
    """Write a model to start training from: --from MODEL --output DIR, or --tiny DIR."""
    target = tiny or output
    if target is None or (tiny is None) == (source is None) or (source is None) != (output is None):
        fail("photon: expected either --tiny DIR, or --from MODEL with --output DIR")
    if target.exists() and any(target.iterdir()):
        fail(f"photon: expected an empty or new directory, found files in {target}; choose another")
    with errors_as_exit_codes():
        from photon_train import tiny as models

        try:
            if source is None:
                shape = {"model_shape_zyx": tuple(int(n) for n in model_shape.split(","))} if model_shape else {}
                model = models.tiny(target, stage, seed, **shape)
            else:
                model = models.start_from(source, target, revision, seed)
        except ValueError as error:
            fail(f"photon: {error}")
    echo(f"stage {model.config.stage}, {model.num_parameters():,} parameters: {target}")


class _Resumes(TyperCommand):
    """`--resume` alone is `--resume run`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give --resume its value."""
        following = [*args, ""][1:]
        args = [f"{a}=run" if a == "--resume" and b != "auto" else a for a, b in zip(args, following, strict=True)]
        return super().parse_args(ctx, args)


@app.command(cls=_Resumes)
def train(
    stage: Annotated[str, Argument(help="s1 (patch embedding), s1c (all), s2 (with pruning); tiny-s1, tiny-s2.")],
    data: Annotated[list[str] | None, Option(help="Manifest to train on. Repeatable.")] = None,
    model: Annotated[str | None, Option(help="Checkpoint to start from: a directory or a hub id.")] = None,
    output: Annotated[Path | None, Option(help="Folder of the run.")] = None,
    evaluate_on: Annotated[list[str] | None, Option("--eval", help="Manifest to evaluate on. Repeatable.")] = None,
    config: Annotated[Path | None, Option(help="YAML or JSON file of settings.")] = None,
    settings: Annotated[list[str], Option("--set", help="key=value. Repeatable.")] = [],  # noqa: B006 - typer copies it
    resume: Annotated[
        str | None, Option(metavar="[auto]", help="Go on from the last checkpoint in --output; auto: or begin.")
    ] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Check every row, make one step, describe the run.")] = False,
    profile: Annotated[
        bool, Option("--profile", help="Write a trace of three steps, on a GPU their memory too, to OUTPUT/profile.")
    ] = False,
) -> None:
    """Train a stage on prepared volumes; stop it at any moment, go on with --resume."""
    if resume not in (None, "run", "auto"):
        fail(f"--resume: expected nothing or auto behind it, found {resume}")
    given = {"data": data, "model": model, "output": str(output) if output else None, "eval": evaluate_on}
    with errors_as_exit_codes():
        from photon_cli import train as body

        run = body.train_config(stage, config, settings, {name: value for name, value in given.items() if value})
        if dry_run:
            body.dry_run(run)
        else:
            body.train(run, "auto" if resume == "auto" else resume is not None, profile=profile)


@app.command()
def predict(
    context: Context,
    model: Annotated[str, Option(help="A model: a directory or a hub id.")],
    words: Annotated[
        list[str] | None, Argument(metavar="[SCAN QUESTION...]", help="A store or a raw scan, and questions about it.")
    ] = None,
    data: Annotated[list[Path], Option(help="Manifest of rows to answer, instead of SCAN. Repeatable.")] = [],  # noqa: B006
    manifest: Annotated[str | None, Option(hidden=True)] = None,
    output: Annotated[Path | None, Option(help="With --data: predictions (jsonl); goes on with what it has.")] = None,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object instead of text.")] = False,
    stream: Annotated[bool, Option(help="Print tokens as they come.")] = False,
    series: terminal.SeriesName = None,
    prior: Annotated[list[str], Option(help="An earlier scan of the patient, shown before SCAN. Repeatable.")] = [],  # noqa: B006
    choices: terminal.Choices = False,
    max_new_tokens: terminal.MaxNewTokens = 512,
    samples: Annotated[int, Option(min=1, help="So many drawn answers to each question; with --sample.")] = 1,
    sample: Annotated[bool, Option(help="Draw tokens instead of taking the likeliest.")] = False,
    temperature: Annotated[float, Option(min=0.01, help="With --sample.")] = 1.0,
    top_p: Annotated[float, Option(min=0.01, max=1.0, help="With --sample.")] = 1.0,
    seed: Annotated[int, Option(help="With --sample.")] = 0,
    batch: terminal.Batch = "auto",
    adapter: terminal.Adapter = None,
    scheduler: terminal.SchedulerName = None,
    keep_ratio: terminal.KeepRatio = None,
    device: terminal.Device = "auto",
    dtype: terminal.Dtype = "auto",
    compile: terminal.Compile = False,
    revision: terminal.Revision = None,
    shard: Annotated[str | None, Option(help="I/N: only part I of N, from 0; torchrun sets it itself.")] = None,
    overlay: Annotated[Path | None, Option(help="Folder for what was kept: a picture and NIfTI per question.")] = None,
    window: Annotated[
        str,
        Option(help="Of pictures: asked (by the question), full, lung, mediastinum, soft, bone, or low,high in HU."),
    ] = "asked",
    at: terminal.At = None,
    masks: Annotated[
        str | None, Option(help="Masks: a prepared folder, or of files (--data: a folder per volume id): recall.")
    ] = None,
    recipe: terminal.RecipeName = "chest_ct",
    settings: terminal.Settings = [],  # noqa: B006
) -> None:
    """Answer questions about one scan, or the rows of manifests."""
    scan_path, *questions = words or [""]
    if manifest is not None:
        fail(f"--manifest: expected rows as --data; --manifest is the YAML of photon-data. Say --data {manifest}")
    if bool(data) == bool(words) or bool(data) != bool(output) or bool(words) != bool(questions):
        fail('expected SCAN "question" ..., or --data ROWS --output PREDICTIONS')
    if misplaced := terminal.given_options(context, OF_SCAN if data else OF_ROWS):
        fail(f"{misplaced}: expected {'SCAN' if data else '--data'} beside it; the two ways do not mix")
    if samples > 1 and (not sample or choices):
        fail("--samples: expected --sample beside it, and no --choices: without drawing all answers are the same")
    if samples > 1 and stream:
        fail("--stream: expected no --samples beside it; several answers cannot be printed as they come")
    if data and masks and not overlay:
        fail("--masks: expected --overlay beside it; the recalls of the rows' masks are written there")
    with errors_as_exit_codes():
        from photon_cli import predict as body
        from photon_data.recipe import named_recipe
        from photon_data.store import is_store
        from photon_train.answering.generation import AnswerSettings
        from photon_train.answering.loading import model_shape_of
        from photon_train.answering.scan import open_scans

        overlays = body.overlays_of(overlay, window, at, masks)
        answers = AnswerSettings(max_new_tokens, sample, temperature, top_p, seed, choices, samples)
        chosen = {"device": device, "scheduler": scheduler, "keep_ratio": keep_ratio, "adapter": adapter}
        load = body.loader(model, answers, dtype, revision, batch=body.batch_of(batch), compile=compile, **chosen)
        if output:
            is_complete = body.predict_rows(load, device, data, output, shard, overlays)
        else:
            # Read before the model is loaded: most of what can be wrong is wrong with the scan.
            places, made_by, policy = [*prior, scan_path], None, None
            if not all(map(is_store, places)):
                made_by, policy = named_recipe(recipe, settings)
                made_by = replace(made_by, model_shape_zyx=model_shape_of(model, revision))
            if is_store(scan_path) and (needless := terminal.given_options(context, OF_RAW)):
                fail(f"{needless}: expected a raw scan beside it, found the store {scan_path}; leave it out")
            scans = open_scans(places, made_by, policy, series)
            is_complete = body.predict_scan(load, model, scans, questions, overlays, as_json=as_json, stream=stream)
    raise Exit(OK if is_complete else PARTIAL)


class _ScoresUnlessNamed(TyperGroup):
    """`photon eval vqa ...` is `photon eval score vqa ...`; import and compare are named."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take what begins with no name of a command for the words of `score`."""
        return super().parse_args(ctx, args if args and args[0] in self.commands else ["score", *args])


evals = Typer(cls=_ScoresUnlessNamed, rich_markup_mode=None, help="Score, import and compare predictions.")
app.add_typer(evals, name="eval")


@evals.command(name="score")
def evaluate(
    context: Context,
    benchmark: Annotated[
        str, Argument(help="3d-rad, deeptumorvqa-v1, deeptumorvqa-v2, report or vqa. Or: import, compare (--help).")
    ],
    data: Annotated[list[Path], Option(help="A manifest with the questions and answers. Repeatable.")],
    output: Annotated[Path, Option(help="Folder for the page and the scores; with --model, predictions too.")],
    predictions: Annotated[
        list[Path], Option(help="A file of predictions. Repeatable. Without it and --model: blind baselines.")
    ] = [],  # noqa: B006
    model: Annotated[str | None, Option(help="Model that answers now: a directory or a hub id.")] = None,
    choices: terminal.Choices = False,
    max_new_tokens: terminal.MaxNewTokens = 512,
    batch: terminal.Batch = "auto",
    adapter: terminal.Adapter = None,
    device: terminal.Device = "auto",
    dtype: terminal.Dtype = "auto",
    revision: terminal.Revision = None,
    schedulers: Annotated[
        str,
        Option(help="The model under each: its,none,random,uniform,foreground,fastv,visionzip,divprune,nucleus."),
    ] = "",
    keep: Annotated[
        str, Option(help="What they keep (its, none, nucleus: their own): match-its, a share 0.4, or 390 tokens.")
    ] = "match-its",
    counterfactual: Annotated[
        list[str],
        Option(help="Ask again on edited volumes: any of 'erase=asked,other,kept,dropped flip=lr'. Repeatable."),
    ] = [],  # noqa: B006
    masks: Annotated[
        str | None, Option(help="Masks, a prepared folder or a folder per volume id, or auto: recall by kept tokens.")
    ] = None,
    overlays: Annotated[
        int | None, Option(min=0, help="Pictures of so many worst and best cases; 6 with --model, else 0.")
    ] = None,
    train: Annotated[list[Path], Option(help="A manifest to choose constant answers on. Repeatable.")] = [],  # noqa: B006
    labels: Annotated[list[Path], Option(help="Twice: tables of labels of the answers, of the responses.")] = [],  # noqa: B006
    config: Annotated[str | None, Option(help="Model directory behind --predictions: its FLOPs are counted.")] = None,
    bertscore: Annotated[bool, Option(help="BERTScore too; needs the package bert-score.")] = False,
    tasks: Annotated[str, Option(help="Only questions of these tasks: a,b.")] = "",
    limit: Annotated[int | None, Option(min=1, help="Only the first N questions of the data.")] = None,
    allow_partial: Annotated[bool, Option(help="Leave questions without a prediction out, and say so.")] = False,
    bootstrap: terminal.Bootstrap = 1000,
    seed: terminal.BootstrapSeed = 0,
    verbose: Annotated[bool, Option("--verbose", help="Print all tables of the page.")] = False,
) -> None:
    """Score a model or predictions on a benchmark's questions, with intervals and blind baselines.

    `photon eval import` reads result files of other tools, `photon eval compare` tells what evaluations differ by.
    """
    if misplaced := terminal.given_options(context, OF_FILES if model else OF_MODEL):
        fail(f"{misplaced}: expected {'no --model' if model else '--model'} beside it; the two ways do not mix")
    pictures = overlays if overlays is not None else OVERLAYS_WITH_MODEL if model else 0
    with errors_as_exit_codes():
        from photon_cli import eval as body
        from photon_train.evaluation.cases import Answering
        from photon_train.evaluation.results import Settings

        answering: Answering
        if model:
            from photon_cli.benchmark import answer_benchmark
            from photon_cli.predict import batch_of, loader
            from photon_train.answering.generation import AnswerSettings
            from photon_train.evaluation.counterfactual import edits_of

            edits = edits_of(counterfactual, bool(masks))
            answers = AnswerSettings(max_new_tokens, choices=choices)
            load = loader(model, answers, dtype, revision, batch=batch_of(batch), device=device, adapter=adapter)
            answering = answer_benchmark(load, schedulers, keep, output / "predictions", edits, masks)
        else:
            answering = body.answered_before(predictions, config)
        scoring = Settings(allow_partial, bootstrap, seed, body.label_tables(labels), bertscore)
        scoring = replace(scoring, tasks=tuple(name.strip() for name in tasks.split(",") if name.strip()), limit=limit)
        evaluation = body.score(
            benchmark,
            answering,
            data,
            output,
            scoring,
            train,
            masks,
            pictures,
            answers_now=bool(model),
            verbose=verbose,
        )
    raise Exit(PARTIAL if evaluation.is_partial else OK)


@evals.command(name="import")
def import_results(
    results: Annotated[Path, Argument(help="A result file of another tool.")],
    data: Annotated[list[Path], Option(help="A manifest with the questions that it answers. Repeatable.")],
    output: Annotated[Path, Option(help="A new file of predictions (jsonl), for photon eval.")],
    form: Annotated[str, Option("--format", help="photon (the authors'), ms-swift, or table (csv, jsonl, ...).")],
    columns: Annotated[
        list[str], Option(help="Of a table: id, volume, question, response, label as it names them: response=Pred.")
    ] = [],  # noqa: B006
) -> None:
    """Join the answers of another tool to the data's questions, by id or by volume and text, never by line."""
    with errors_as_exit_codes():
        from photon_cli import eval as body

        is_complete = body.import_results(results, form, terminal.pairs(columns, "--columns"), data, output)
    raise Exit(OK if is_complete else PARTIAL)


@evals.command()
def compare(
    evaluations: Annotated[list[Path], Argument(help="Folders of photon eval; each is compared with the first.")],
    output: Annotated[Path | None, Option(help="A JSON file for all differences.")] = None,
    bootstrap: terminal.Bootstrap = 1000,
    seed: terminal.BootstrapSeed = 0,
    verbose: Annotated[bool, Option("--verbose", help="Print all metrics.")] = False,
) -> None:
    """Tell by how much evaluations differ, question by question: intervals and p-values by patient."""
    if len(evaluations) < 2:
        fail("expected two or more evaluations, found one; photon eval compare A B")
    with errors_as_exit_codes():
        from photon_cli import eval as body

        body.compare_evaluations(evaluations, output, bootstrap, seed, verbose=verbose)


@app.command()
def serve(
    model: Annotated[str, Option(help="A model: a directory or a hub id.")],
    host: Annotated[
        str, Option(help="Address to listen at; beyond this machine only with --api-key-file.")
    ] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="Port; 0 for any that is free.")] = 8000,
    data: Annotated[str | None, Option(help="Output of photon-data prepare; its volumes may be asked about.")] = None,
    max_volumes: Annotated[int, Option(min=1, help="Uploaded volumes at a time.")] = 32,
    cache_gb: Annotated[float, Option(min=0, help="GB for encodings of volumes, on the model's device.")] = 8,
    api_key_file: Annotated[Path | None, Option(help="File with the key that clients must send.")] = None,
    keep: Annotated[Path | None, Option(help="Folder for uploads, which stay; else they go with the server.")] = None,
    max_upload_gb: Annotated[float, Option(min=0.001, help="Largest upload, and what a zip may unpack to.")] = 4,
    max_waiting: Annotated[int, Option(min=1, help="Questions that wait; more are turned away.")] = 256,
    timeout: Annotated[float, Option(min=1, help="Seconds until a question is given up, and to drain.")] = 300,
    upload_timeout: Annotated[float, Option(min=1, help="Seconds to send a scan, and to prepare it.")] = 600,
    memory: Annotated[float, Option(min=0, help="GB of address space to prepare a scan in, 0 for no limit.")] = 4,
    questions_per_batch: terminal.QuestionsPerBatch = 16,
    mcp: Annotated[
        Path | None, Option(help="Speak MCP over stdin and stdout instead; scans are read from this folder only.")
    ] = None,
    scheduler: terminal.SchedulerName = None,
    keep_ratio: terminal.KeepRatio = None,
    device: terminal.Device = "auto",
    dtype: terminal.Dtype = "auto",
    compile: terminal.Compile = False,
    revision: terminal.Revision = None,
    adapter: terminal.Adapter = None,
    recipe: terminal.RecipeName = "chest_ct",
    settings: terminal.Settings = [],  # noqa: B006
) -> None:
    """Answer questions over HTTP, in the form of OpenAI's API: upload a scan once, ask many times."""
    limits = (max_volumes, cache_gb, max_upload_gb, max_waiting, timeout, upload_timeout, memory)
    load = {"scheduler": scheduler, "keep_ratio": keep_ratio, "device": device, "dtype": dtype}
    load |= {"revision": revision, "adapter": adapter, "compile": compile}
    with errors_as_exit_codes():
        from photon_cli import serve as body

        options = body.Options(host, port, data, api_key_file, keep, *limits, recipe, settings)
        if mcp:
            body.serve_tools(model, load, questions_per_batch, options, mcp)
        else:
            body.serve(model, load, questions_per_batch, options)


@app.command()
def bench(
    size: Annotated[
        str | None, Option(help="3b: the published shapes; tiny: for a CPU. Default: by whether there is a GPU.")
    ] = None,
    what: Annotated[str, Option(help="Some of train,prefill,decode,predict; predict is from disk to answer.")] = "",
    questions: Annotated[str, Option(help="Questions on a volume: 1,8,40, or 1,4 for tiny.")] = "",
    output: Annotated[Path, Option(help="Folder for bench.json and a picture.")] = Path("bench"),
) -> None:
    """Measure training and answering with random weights, with and without scheduling, beside the published figures."""
    with errors_as_exit_codes():
        from photon_cli import bench as body

        is_complete = body.run(body.settings_of(size, what, questions), output)
    raise Exit(OK if is_complete else PARTIAL)


@app.command()
def demo(
    folder: Annotated[Path, Argument(help="Folder for all that it makes.")] = Path("demo"),
    quick: Annotated[bool, Option("--quick", help="A minute instead of several: the model learns nothing.")] = False,
) -> None:
    """Make synthetic CTs, prepare them, train a tiny model, score and ask it, and write a page about it all."""
    with errors_as_exit_codes():
        from photon_cli import demo as body

        body.Demo(folder, body.QUICK if quick else body.FULL).run()


def main() -> None:
    """Run the command line."""
    run_app(app)
