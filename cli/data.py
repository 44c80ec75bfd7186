"""photon-data: raw CT scans -> verified stores and manifests."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from photon_cli.exits import MISUSE, PARTIAL
from photon_cli.options import (
    console,
    edges,
    fail,
    fractions,
    is_default,
    make_recipe,
    pairs,
    print_any_text,
    refuse_beside_manifest,
)

T = TypeVar("T")

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, help=__doc__)

SourceArgument = Annotated[
    Path | None, typer.Argument(help="A folder of scans (searched through), or one scan; none with --manifest.")
]
OutArgument = Annotated[str, typer.Argument(help="Folder or URL (s3://...) for stores, manifests and the report.")]
RecipeOption = Annotated[str, typer.Option(help="chest_ct, abdomen_ct or wide_ct.")]
SetOption = Annotated[list[str], typer.Option("--set", help="Change the recipe: spacing_mm=1.5,1.5,1.5 (z, y, x). Repeatable.")]
ModalityOption = Annotated[str | None, typer.Option(help="ct refuses intensities that are no HU; other does not look.")]
NanOption = Annotated[str | None, typer.Option(help="refuse scans with NaN or infinite voxels, or fill those voxels.")]
HuOption = Annotated[str, typer.Option(help="header, stored (no scaling) or a table: volume, slope, intercept.")]
ColumnsOption = Annotated[list[str], typer.Option(help="Names in your tables: volume=VolumeName,question=Question.")]
IdOption = Annotated[str, typer.Option(help="Volume ids from the relative path, the file name, or a hash: path, name, hash.")]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Only the first N scans.")]
WorkersOption = Annotated[int | None, typer.Option(min=1, help="Local workers; from cores and memory if not given.")]
SchedulerOption = Annotated[str | None, typer.Option(help="Address or scheduler file of a Dask cluster to use.")]
TimeoutOption = Annotated[float, typer.Option(min=1, help="Seconds after which a file has failed.")]
MemoryOption = Annotated[float | None, typer.Option(min=0, help="GB of address space per worker, 0 for no limit.")]
VoxelsOption = Annotated[int, typer.Option(min=1, help="Refuse scans of more voxels than this.")]


ManifestOption = Annotated[
    Path | None, typer.Option("--manifest", help="Data sets as declared in this data_manifest.yaml, instead of SOURCE.")
]
OnlyOption = Annotated[list[str], typer.Option("--only", help="This data set of the manifest only. Repeatable.")]
PromptOption = Annotated[
    str | None,
    typer.Option(help="How questions are put: plain, letters, 3d-rad, deeptumorvqa; as the manifest says if not given."),
]
# What a manifest says for itself.
DECLARED = ("recipe", "settings", "questions", "columns", "split", "modality", "nan", "hu_source", "id_from")


@app.command()
def prepare(
    context: typer.Context,
    source: SourceArgument = None,
    out: Annotated[str | None, typer.Argument(help="Folder or URL (s3://...) for stores, manifests and the report.")] = None,
    manifest: ManifestOption = None,
    only: OnlyOption = [],  # noqa: B006 - typer copies it
    prompt_style: PromptOption = None,
    recipe: RecipeOption = "chest_ct",
    settings: SetOption = [],  # noqa: B006 - typer copies it
    questions: Annotated[Path | None, typer.Option(help="csv, tsv or jsonl: id, volume, question, answer, split.")] = None,
    columns: ColumnsOption = [],  # noqa: B006
    split: Annotated[str, typer.Option(help="Shares per split where the table has none.")] = "train=0.8,val=0.1,test=0.1",
    seed: Annotated[int, typer.Option(help="Seed of the split.")] = 0,
    allow_leaks: Annotated[bool, typer.Option(help="Write manifests even if a patient is in two splits.")] = False,
    modality: ModalityOption = None,
    nan: NanOption = None,
    hu_source: HuOption = "header",
    id_from: IdOption = "path",
    limit: LimitOption = None,
    overwrite: Annotated[bool, typer.Option(help="Prepare again what is there.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Say what would happen; write nothing.")] = False,
    workers: WorkersOption = None,
    scheduler: SchedulerOption = None,
    timeout: TimeoutOption = 1800,
    memory: MemoryOption = None,
    max_voxels: VoxelsOption = 1_000_000_000,
    pictures: Annotated[int, typer.Option(min=0, help="Volumes shown as pictures in the report.")] = 48,
) -> None:
    """Turn raw scans into stores and manifests. Run it again to go on, or after files changed."""
    from photon_cli import prepare_command
    from photon_cli.manifest_options import declared_order
    from photon_data.files import Location
    from photon_pipelines.cluster import Workers
    from photon_pipelines.plan import Order

    with edges():
        run: dict[str, Any] = {"limit": limit, "overwrite": overwrite, "pictures": pictures}
        run |= {"allow_leaks": allow_leaks, "prompt": prompt_style}
        if manifest:
            refuse_beside_manifest(context, DECLARED)
            seeds = {} if is_default(context, "seed") else {"seed": seed}
            order = declared_order(manifest, only, _only_out(source, out), max_voxels=max_voxels, **run, **seeds)
        else:
            made_by = make_recipe(recipe, settings, modality, nan, max_voxels)
            order = Order(
                source=_existing(source),
                out=Location(_given(out, "OUT")),
                recipe=made_by[0],
                policy=made_by[1],
                hu_source=hu_source,
                questions=questions,
                columns=pairs(columns, "--columns"),
                fractions=fractions(split),
                seed=seed,
                id_from=id_from,
                **run,
            )
        if not order.out.is_shared:
            fail(f"A folder or an object store wanted, got {order.out.url}, which the worker processes do not share.", MISUSE)
        crew = Workers(workers, scheduler, timeout, memory)
        if dry_run:
            prepare_command.estimate(order, crew)
            return
        done = prepare_command.prepare(order, crew)
    raise typer.Exit(0 if done else PARTIAL)


@app.command()
def inspect(
    context: typer.Context,
    source: SourceArgument = None,
    manifest: ManifestOption = None,
    only: OnlyOption = [],  # noqa: B006
    recipe: RecipeOption = "chest_ct",
    settings: SetOption = [],  # noqa: B006
    modality: ModalityOption = None,
    nan: NanOption = None,
    hu_source: HuOption = "header",
    columns: ColumnsOption = [],  # noqa: B006
    id_from: IdOption = "path",
    limit: LimitOption = None,
    workers: WorkersOption = None,
    scheduler: SchedulerOption = None,
    timeout: TimeoutOption = 1800,
    memory: MemoryOption = None,
    max_voxels: VoxelsOption = 1_000_000_000,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write one JSON row per scan here.")] = None,
) -> None:
    """Report what is wrong or odd with raw scans; writes no stores."""
    from photon_cli import inspect_command, inspect_manifest_command
    from photon_data.files import Location
    from photon_pipelines.cluster import Workers
    from photon_pipelines.plan import Order

    with edges():
        crew = Workers(workers, scheduler, timeout, memory)
        if manifest:
            refuse_beside_manifest(context, (*(name for name in DECLARED if name in context.params), "limit", "json_file"))
            good = inspect_manifest_command.inspect_manifest(manifest, only, _only_out(source, None), crew)
        else:
            made_by = make_recipe(recipe, settings, modality, nan, max_voxels)
            order = Order(
                source=_existing(source),
                out=Location("."),
                recipe=made_by[0],
                policy=made_by[1],
                hu_source=hu_source,
                columns=pairs(columns, "--columns"),
                id_from=id_from,
                limit=limit,
            )
            good = inspect_command.inspect(order, crew, json_file)
    raise typer.Exit(0 if good else PARTIAL)


@app.command()
def verify(out: OutArgument) -> None:
    """Check every byte of every store against what was recorded."""
    from photon_cli import verify_command
    from photon_data.files import Location

    with edges():
        good = verify_command.verify(Location(out))
    raise typer.Exit(0 if good else PARTIAL)


@app.command()
def show(
    volume: Annotated[str, typer.Argument(help="A store (folder or URL), or a raw scan.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="PNG to write; beside you, named after the volume.")
    ] = None,
    window: Annotated[str, typer.Option(help="full, lung, mediastinum, soft, bone, or low,high in HU.")] = "full",
    at: Annotated[str | None, typer.Option(help="World point x,y,z in LPS mm; the centre if not given.")] = None,
    size: Annotated[int, typer.Option(min=64, max=4096, help="Height of the picture's planes in pixels.")] = 480,
) -> None:
    """Write a picture of a volume: three planes, orientation letters, scale."""
    from photon_cli import show_command

    with edges():
        console.print(str(show_command.show(volume, output, window, at, size)), soft_wrap=True)


@app.command()
def export(
    out: OutArgument,
    format_: Annotated[str, typer.Option("--format", help="nifti (364^3 .nii.gz) or ome-zarr-0.4 (zarr v2, for Fiji).")],
    to: Annotated[Path | None, typer.Option(help="Folder to write to; OUT/FORMAT if not given.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Write again what is there.")] = False,
) -> None:
    """Write the prepared volumes in another format, with manifests that name those files."""
    from photon_cli import export_command
    from photon_data.files import Location

    with edges():
        export_command.export(Location(out), format_, to, overwrite)


@app.command()
def phantom(
    directory: Annotated[Path, typer.Argument(help="An empty or new folder.")],
    n: Annotated[int, typer.Option("--n", min=1, help="Number of scans.")] = 12,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same bytes.")] = 0,
    size: Annotated[int, typer.Option(min=64, help="Voxels across a slice: smaller is faster and coarser.")] = 384,
    easy: Annotated[bool, typer.Option("--easy", help="Whole organs affected, short questions: for tiny models.")] = False,
) -> None:
    """Make raw synthetic CTs with masks and questions whose answers are known."""
    from photon_cli import phantom_command

    with edges():
        phantom_command.phantom(directory, n, seed, size, easy)


def _given(value: T | None, name: str) -> T:
    if value is None:
        fail(f"{name} wanted, or --manifest data_manifest.yaml, got neither.", MISUSE)
    return value


def _only_out(source: Path | None, out: str | None) -> str | None:
    """Return the one place that may stand beside --manifest: OUT."""
    if source and out:
        fail(f"SOURCE or --manifest wanted, got both: {source}.", MISUSE)
    return str(source) if source else None


def _existing(given: Path | None) -> Path:
    source = _given(given, "SOURCE")
    if not source.exists():
        fail(f"A folder or file wanted, but {source} does not exist.", MISUSE)
    return source


def main() -> None:
    """Run the command line."""
    print_any_text()
    app()


if __name__ == "__main__":
    main()
