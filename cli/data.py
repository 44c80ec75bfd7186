"""photon-data: raw CT scans -> verified stores and manifests."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from photon_cli import options
from photon_cli.terminal import (
    MISUSE,
    OK,
    PARTIAL,
    ProgressBar,
    console,
    errors_as_exit_codes,
    escape_unprintable,
    fail,
)

if TYPE_CHECKING:
    from photon_data.volume import Volume

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, help=__doc__
)

Out = Annotated[str, typer.Argument(help="Folder or URL (s3://...) that photon-data prepare wrote.")]
# A data_manifest.yaml says these for itself.
DECLARED = ("recipe", "settings", "questions", "columns", "split", "modality", "nan", "hu_source", "id_from")


@app.command()
def prepare(
    context: typer.Context,
    paths: options.SourceAndOut = None,
    manifest: options.Manifest = None,
    only: options.Only = [],  # noqa: B006 - typer copies it
    prompt_style: Annotated[
        str | None,
        typer.Option(
            help="Style of the questions: plain, letters, 3d-rad, deeptumorvqa; as the manifest says if not given."
        ),
    ] = None,
    recipe: options.RecipeName = "chest_ct",
    settings: options.Settings = [],  # noqa: B006
    questions: Annotated[
        Path | None, typer.Option(help="csv, tsv or jsonl: id, volume, question, answer, split.")
    ] = None,
    columns: options.Columns = [],  # noqa: B006
    split: Annotated[
        str, typer.Option(help="Shares per split where the table has none.")
    ] = "train=0.8,val=0.1,test=0.1",
    seed: Annotated[int, typer.Option(help="Seed of the split.")] = 0,
    allow_leaks: Annotated[bool, typer.Option(help="Write manifests even if a patient is in two splits.")] = False,
    modality: options.Modality = None,
    nan: options.Nan = None,
    hu_source: options.HuSource = "header",
    id_from: options.IdFrom = "path",
    limit: options.Limit = None,
    overwrite: Annotated[bool, typer.Option(help="Prepare again what is there.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Say what would happen; write nothing.")] = False,
    workers: options.WorkerCount = None,
    scheduler: options.Scheduler = None,
    timeout: options.Timeout = 1800,
    memory: options.Memory = None,
    max_voxels: options.MaxVoxels = 1_000_000_000,
    pictures: Annotated[int, typer.Option(min=0, help="Volumes shown as pictures in the report.")] = 48,
) -> None:
    """Turn raw scans into stores and manifests. Run it again to go on, or after files changed."""
    run: dict[str, Any] = {"limit": limit, "overwrite": overwrite, "pictures": pictures, "allow_leaks": allow_leaks}
    run |= {"prompt": prompt_style, **({"seed": seed} if options.given_options(context, ["seed"]) else {})}
    with errors_as_exit_codes():
        from photon_cli.prepare import PreparingBar, print_estimate, print_result, stopped_as_exit_code
        from photon_data.files import Location
        from photon_pipelines.cluster import Workers
        from photon_pipelines.plan import FolderRequest, Request, request_of_manifest
        from photon_pipelines.prepare import prepare as run_request

        source, out = options.source_and_out(paths, manifest, "SOURCE OUT")
        request: Request
        if manifest:
            _refuse_beside_manifest(context, DECLARED)
            request = request_of_manifest(manifest, only, out, max_voxels=max_voxels, **run)
        else:
            made_by, policy = options.make_recipe(recipe, settings, modality, nan, max_voxels)
            run |= {
                "columns": options.pairs(columns, "--columns"),
                "fractions": options.fractions(split),
                "questions": questions,
            }
            request = FolderRequest(
                source, Location(out), made_by, policy=policy, hu_source=hu_source, id_from=id_from, **run
            )
        if not request.out.is_shared:
            fail(
                f"expected a folder or an object store, found {request.out.url}: worker processes do not share it",
                MISUSE,
            )
        where = Workers(workers, scheduler, timeout, memory)
        if dry_run:
            print_estimate(request, where)
            return
        with stopped_as_exit_code(), PreparingBar() as bar:
            result = run_request(request, where, bar)
        print_result(request, result)
    raise typer.Exit(OK if result.complete else PARTIAL)


@app.command()
def inspect(
    context: typer.Context,
    paths: options.SourceAndOut = None,
    manifest: options.Manifest = None,
    only: options.Only = [],  # noqa: B006
    recipe: options.RecipeName = "chest_ct",
    settings: options.Settings = [],  # noqa: B006
    modality: options.Modality = None,
    nan: options.Nan = None,
    hu_source: options.HuSource = "header",
    columns: options.Columns = [],  # noqa: B006
    id_from: options.IdFrom = "path",
    limit: options.Limit = None,
    workers: options.WorkerCount = None,
    scheduler: options.Scheduler = None,
    timeout: options.Timeout = 1800,
    memory: options.Memory = None,
    max_voxels: options.MaxVoxels = 1_000_000_000,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write one JSON row per scan here.")] = None,
) -> None:
    """Report what is wrong or odd with raw scans; writes no stores."""
    with errors_as_exit_codes():
        from photon_cli.prepare import inspect_manifest, print_findings, stopped_as_exit_code
        from photon_data.files import Location
        from photon_pipelines.cluster import Workers
        from photon_pipelines.plan import FolderRequest
        from photon_pipelines.prepare import inspect as run_request

        source, out = options.source_and_out(paths, manifest, "SOURCE")
        where = Workers(workers, scheduler, timeout, memory)
        if manifest:
            _refuse_beside_manifest(context, (*DECLARED, "limit", "json_file"))
            is_fine = inspect_manifest(manifest, only, out, where)
        else:
            made_by, policy = options.make_recipe(recipe, settings, modality, nan, max_voxels)
            tables: dict[str, Any] = {
                "hu_source": hu_source,
                "columns": options.pairs(columns, "--columns"),
                "id_from": id_from,
            }
            request = FolderRequest(source, Location("."), made_by, policy=policy, limit=limit, **tables)
            with stopped_as_exit_code(), console.status("reading scans"):
                records, ignored = run_request(request, where)
            is_fine = print_findings(source, records, ignored, json_file)
    raise typer.Exit(OK if is_fine else PARTIAL)


def _refuse_beside_manifest(context: typer.Context, parameters: tuple[str, ...]) -> None:
    given = options.given_options(context, parameters)
    if given:
        fail(f"expected --manifest alone, found {given} beside it; say it in the manifest", MISUSE)


@app.command()
def verify(out: Out) -> None:
    """Check every byte of every store against what was recorded."""
    with errors_as_exit_codes():
        from rich.progress import track

        from photon_data.errors import UsageError
        from photon_data.files import Location
        from photon_data.records import VOLUMES, read_records
        from photon_pipelines.verify import verify_output

        location = Location(out)
        if not location.exists(VOLUMES):
            raise UsageError(f"expected the output of photon-data prepare, but {location.url} has no {VOLUMES}")
        stores = sum(record.is_there for record in read_records(location))
        problems = 0
        is_silent = not console.is_terminal
        for problem in verify_output(
            location, lambda items: track(items, "verifying", console=console, disable=is_silent)
        ):
            problems += 1
            console.print(problem, soft_wrap=True, style="red")
        console.print(f"{stores} stores checked, {problems} problems")
    raise typer.Exit(PARTIAL if problems else OK)


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
    with errors_as_exit_codes():
        from photon_data.picture import three_planes
        from photon_data.store import SUFFIX, open_volume

        if "://" in volume or (Path(volume) / "zarr.json").exists():
            name, content = volume.rstrip("/").rpartition("/")[2].removesuffix(SUFFIX), open_volume(volume)
        else:
            name, content = _read_scan(Path(volume))
        point = options.numbers(at, 3, "--at") if at else None
        picture = three_planes(content, window_hu=options.window_of(window), size_px=size, at_lps=point, title=name)
        path = output or Path(f"{name}.png")
        picture.save(path)
        console.print(str(path), soft_wrap=True)


@app.command()
def export(
    out: Out,
    format_: Annotated[
        str, typer.Option("--format", help="nifti (364^3 .nii.gz) or ome-zarr-0.4 (zarr v2, for Fiji).")
    ],
    to: Annotated[Path | None, typer.Option(help="Folder to write to; OUT/FORMAT if not given.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Write again what is there.")] = False,
) -> None:
    """Write the prepared volumes in another format, with manifests that name those files."""
    with errors_as_exit_codes():
        from photon_data.files import Location
        from photon_pipelines.export import export_all

        location = Location(out)
        if to is None and not location.is_local:
            fail(f"expected --to FOLDER, since {location.url} is no local folder", MISUSE)
        with ProgressBar("exporting") as bar:
            done = export_all(
                location,
                format_,
                to or location.path / format_,
                overwrite=overwrite,
                progress=lambda done, total: bar.update(completed=done, total=total),
            )
        console.print(done)


@app.command()
def phantom(
    directory: Annotated[Path, typer.Argument(help="An empty or new folder.")],
    n: Annotated[int, typer.Option("--n", min=1, help="Number of scans.")] = 12,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same bytes.")] = 0,
    size: Annotated[int, typer.Option(min=64, help="Voxels across a slice: smaller is faster and coarser.")] = 384,
    easy: Annotated[
        bool, typer.Option("--easy", help="Whole organs affected, short questions: for tiny models.")
    ] = False,
) -> None:
    """Make raw synthetic CTs with masks and questions whose answers are known."""
    with errors_as_exit_codes():
        from photon_data.phantom import make_phantoms

        with ProgressBar("painting") as bar:
            bar.update(total=n)
            try:
                made = make_phantoms(directory, n, seed, size=size, easy=easy, progress=lambda _: bar.update(advance=1))
            except FileExistsError as error:
                fail(str(error), MISUSE)
        questions = sum(len(phantom.questions) for phantom in made)
        console.print(
            f"{n} scans in {directory}/scans, masks in {directory}/masks, {questions} questions", soft_wrap=True
        )


def _read_scan(path: Path) -> tuple[str, Volume]:
    """Return the id and the Hounsfield units of a raw scan, by its header's slope and intercept."""
    import numpy as np

    from photon_data.errors import UsageError
    from photon_data.readers import find_scans, left_alone, open_scan
    from photon_data.volume import Volume

    if not path.exists():
        raise UsageError(f"expected a store or a scan, but {path} does not exist")
    sources, ignored = find_scans(path)
    if len(sources) != 1:
        others = f"; files left alone: {left_alone(ignored)}" if ignored else ""
        raise UsageError(f"expected one scan, found {len(sources)} in {path}; name one{others}")
    scan = open_scan(sources[0])
    planes = np.stack([plane.astype(np.float32) for plane in scan.planes()])
    return sources[0].id, Volume(planes * scan.slope + scan.intercept, scan.geometry)


def main() -> None:
    """Run the command line."""
    escape_unprintable()
    app()


if __name__ == "__main__":
    main()
