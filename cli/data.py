"""photon-data: raw CT scans -> verified stores and manifests."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Context, Exit, Option, Typer, confirm

from photon_cli import terminal
from photon_cli.terminal import OK, PARTIAL, ProgressBar, console, errors_as_exit_codes, fail, run_app
from photon_data.recipe import MAX_VOXELS

app = Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, help=__doc__
)

Out = Annotated[str, Argument(help="Folder or URL (s3://...) that photon-data prepare wrote.")]
Overwrite = Annotated[bool, Option(help="Write again what is there.")]


def _show_version(is_asked: bool) -> None:
    if is_asked:
        from importlib.metadata import version

        from photon_data.interpolate import description

        console.print(f"photon-data {version('photon-ct')}; interpolation: {description()}", highlight=False)
        raise Exit


@app.callback()
def _options(
    version: Annotated[
        bool, Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options of no command."""


@app.command()
def prepare(
    context: Context,
    paths: terminal.SourceAndOut = None,
    manifest: terminal.Manifest = None,
    only: terminal.Only = [],  # noqa: B006 - typer copies it
    prompt_style: Annotated[
        str | None, Option(help="Style of the questions: plain, letters, 3d-rad, deeptumorvqa; else the manifest's.")
    ] = None,
    recipe: terminal.RecipeName = "chest_ct",
    settings: terminal.Settings = [],  # noqa: B006
    questions: Annotated[Path | None, Option(help="A table: id, volume, question, answer, split.")] = None,
    columns: terminal.Columns = [],  # noqa: B006
    split: Annotated[str, Option(help="Shares per split where the table has none.")] = "train=0.8,val=0.1,test=0.1",
    seed: Annotated[int, Option(help="Seed of the split.")] = 0,
    allow_leaks: Annotated[bool, Option(help="Write manifests even if a patient is in two splits.")] = False,
    modality: terminal.Modality = None,
    nan: terminal.Nan = None,
    hu_source: terminal.HuSource = "header",
    accept: terminal.Accept = [],  # noqa: B006
    repair: terminal.Repair = [],  # noqa: B006
    overrides: terminal.Overrides = None,
    id_from: terminal.IdFrom = "auto",
    id_prefix: terminal.IdPrefix = "",
    include: terminal.Include = [],  # noqa: B006
    exclude: terminal.Exclude = [],  # noqa: B006
    follow_links: terminal.FollowLinks = True,
    limit: terminal.Limit = None,
    masks: Annotated[
        str | None, Option(help="The masks of a scan: 'labelsTr/{name}.nii.gz', '{folder}/segmentations/*.nii.gz'.")
    ] = None,
    mask_labels: Annotated[Path | None, Option(help="A table or dataset.json: names of a label map's values.")] = None,
    overwrite: Overwrite = False,
    lock: Annotated[
        Path | None, Option(help="A dataset.lock: make the same bytes again, and say what differs.")
    ] = None,
    retry_failed: Annotated[bool, Option(help="Read again what was refused, timed out or crashed before.")] = False,
    paths_in_manifests: Annotated[
        str | None, Option("--paths", help="Of stores in manifests: absolute, or relative to OUT, which can then move.")
    ] = None,
    grids: Annotated[
        str | None,
        Option(help="volume (and the model grid), full (also the whole field at 1.5 mm) or model (alone); else OUT's."),
    ] = None,
    check: Annotated[str, Option(help="A scan is unchanged by its size and time, or by its content.")] = "time",
    dry_run: Annotated[bool, Option(help="Say what would happen; write nothing.")] = False,
    workers: terminal.WorkerCount = None,
    scheduler: terminal.Scheduler = None,
    timeout: terminal.Timeout = 1800,
    memory: terminal.Memory = None,
    max_voxels: terminal.MaxVoxels = MAX_VOXELS,
    pictures: Annotated[int, Option(min=0, help="Volumes shown as pictures in the report.")] = 48,
) -> None:
    """Turn raw scans into stores and manifests. Run it again to go on, or after files changed."""
    with errors_as_exit_codes():
        from photon_cli import prepare as body
        from photon_pipelines import prepare as pipeline
        from photon_pipelines.cluster import Workers

        request = body.request_of(context, *terminal.source_and_out(paths, manifest, "SOURCE OUT"))
        where = Workers(workers, scheduler, timeout, memory)
        if dry_run:
            from photon_cli.inspect import print_estimate

            print_estimate(request, where)
            return
        with body.stopped_as_exit_code(), body.PreparingBar("looking for scans") as bar:
            result = pipeline.prepare(request, where, bar)
        body.print_result(request, result)
    raise Exit(OK if result.complete else PARTIAL)


@app.command()
def inspect(
    context: Context,
    paths: terminal.SourceAndOut = None,
    manifest: terminal.Manifest = None,
    only: terminal.Only = [],  # noqa: B006
    recipe: terminal.RecipeName = "chest_ct",
    settings: terminal.Settings = [],  # noqa: B006
    modality: terminal.Modality = None,
    nan: terminal.Nan = None,
    hu_source: terminal.HuSource = "header",
    accept: terminal.Accept = [],  # noqa: B006
    repair: terminal.Repair = [],  # noqa: B006
    overrides: terminal.Overrides = None,
    columns: terminal.Columns = [],  # noqa: B006
    id_from: terminal.IdFrom = "auto",
    id_prefix: terminal.IdPrefix = "",
    include: terminal.Include = [],  # noqa: B006
    exclude: terminal.Exclude = [],  # noqa: B006
    follow_links: terminal.FollowLinks = True,
    limit: terminal.Limit = None,
    workers: terminal.WorkerCount = None,
    scheduler: terminal.Scheduler = None,
    timeout: terminal.Timeout = 1800,
    memory: terminal.Memory = None,
    max_voxels: terminal.MaxVoxels = MAX_VOXELS,
    json_file: Annotated[Path | None, Option("--json", help="Also write one JSON row per scan here.")] = None,
    propose: Annotated[
        Path | None, Option(help="Also write a csv for --overrides: how to repair what is refused.")
    ] = None,
) -> None:
    """Report what is wrong or odd with raw scans; writes no stores.

    With OUT, what is found is kept there: nothing is read again that did not change, here and in prepare.
    """
    with errors_as_exit_codes():
        from photon_cli import inspect as body
        from photon_cli.prepare import request_of, stopped_as_exit_code
        from photon_pipelines.cluster import Workers
        from photon_pipelines.inspect import inspect as inspect_scans

        source, out = terminal.source_and_out(paths, manifest, "SOURCE [OUT]")
        where = Workers(workers, scheduler, timeout, memory)
        if manifest:
            terminal.refuse_beside_manifest(context, "limit", "json_file", "propose", "accept", "repair", "overrides")
            is_fine = body.inspect_manifest(manifest, only, out, where)
        else:
            request = request_of(context, source, out=out or "memory://inspected")
            with stopped_as_exit_code(), body.InspectingBar("looking for scans") as bar:
                records, ignored, notes = inspect_scans(request, where, bar)
            is_fine = body.print_findings(source, records, ignored, json_file)
            body.print_proposals(records, propose)
            terminal.print_lines(notes)
    raise Exit(OK if is_fine else PARTIAL)


@app.command()
def status(out: Out) -> None:
    """Say what a prepared folder holds, and what the next run would do."""
    with errors_as_exit_codes():
        from photon_cli.prepare import print_status
        from photon_data.files import Location

        print_status(Location(out))


@app.command()
def prune(
    out: Out,
    ids: Annotated[Path | None, Option(help="File with an id per line: these volumes, for good.")] = None,
    yes: Annotated[bool, Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Take away volumes whose scans are gone or refused now, or those named, with their rows and questions."""
    with errors_as_exit_codes():
        from photon_data.files import Location
        from photon_data.questions.table import read_text
        from photon_pipelines import collection
        from photon_pipelines import prepare as pipeline

        location = Location(out)
        named = read_text(ids, (ids.suffix.lower(),)).split() if ids else None
        going = collection.to_prune(location, named)
        terminal.print_lines(f"{id}: {why}" for id, why in going.items())
        if not going:
            console.print("nothing to take away")
        elif yes or confirm(f"Take {len(going)} volumes away, with their rows and questions?"):
            result = pipeline.prune(location, going, for_good=ids is not None)
            console.print(f"{len(going)} volumes and {len(result.left)} rows of manifests are gone")


@app.command()
def verify(
    out: Out,
    workers: terminal.WorkerCount = None,
    scheduler: terminal.Scheduler = None,
    timeout: terminal.Timeout = 1800,
    memory: terminal.Memory = None,
) -> None:
    """Check every byte that prepare left against what was recorded, and say what was not checked."""
    with errors_as_exit_codes():
        from photon_cli.prepare import stopped_as_exit_code
        from photon_data.files import Location
        from photon_pipelines.cluster import Workers
        from photon_pipelines.verify import verify_output

        location, problems, stores = Location(out), 0, 0
        where = Workers(workers, scheduler, timeout, memory)
        with stopped_as_exit_code(), ProgressBar("verifying") as bar:
            unchecked: list[str] = []

            def count(done: int, total: int) -> None:
                nonlocal stores
                stores = done
                bar.count(done, total)

            for problem in verify_output(location, count, unchecked.append, where):
                problems += 1
                console.print(problem, soft_wrap=True, style="red")
        terminal.print_lines(f"not checked: {what}" for what in unchecked)
        console.print(f"{stores} stores checked, {problems} problems")
    raise Exit(PARTIAL if problems else OK)


@app.command()
def show(
    volume: Annotated[str, Argument(help="A store or a raw scan, each a path or a URL; FOLDER#KEY for a series.")],
    series: terminal.SeriesName = None,
    grid: Annotated[str | None, Option(help="Of a store: volume, model or full (the whole field).")] = None,
    output: Annotated[Path | None, Option("--output", "-o", help="PNG; beside you, named after the volume.")] = None,
    window: terminal.Window = "full",
    at: terminal.At = None,
    size: Annotated[int, Option(min=64, max=4096, help="Height of the picture's planes in pixels.")] = 480,
) -> None:
    """Write a picture of a volume: three planes, orientation letters, scale."""
    with errors_as_exit_codes():
        from photon_data.bucket import source_at_hand
        from photon_data.files import Location, write_whole
        from photon_data.picture import three_planes
        from photon_data.private import names_left_out
        from photon_data.readers import open_scan
        from photon_data.readers.find import find_one_scan
        from photon_data.readers.object_path import source_path
        from photon_data.records import SUFFIX
        from photon_data.scan import is_url
        from photon_data.store import ROOT, is_store, open_volume

        if is_store(volume) and (not is_url(volume) or Location(volume).exists(ROOT)):
            name = volume.rstrip("/").rpartition("/")[2].removesuffix(SUFFIX)
            content = open_volume(volume, grid)  # type: ignore[arg-type]
        elif grid:
            fail(f"--grid: expected a store, found {volume}; a raw scan has its own grid only")
        else:
            source = find_one_scan(source_path(volume), series)
            with names_left_out(source), source_at_hand(source) as at_hand:
                name, content = source.id, open_scan(at_hand).volume()
        point = terminal.numbers(at, 3, "--at") if at else None
        picture = three_planes(content, window_hu=terminal.window_of(window), size_px=size, at_lps=point, title=name)
        path = output or Path(f"{name}.png")
        with write_whole(path) as temporary:
            picture.save(temporary, "PNG")
        console.print(str(path), soft_wrap=True)


@app.command()
def export(
    out: Out,
    format_: Annotated[str, Option("--format", help="nifti (.nii.gz) or ome-zarr-0.4 (zarr v2, for Fiji).")],
    to: Annotated[Path | None, Option(help="Folder to write to; OUT/FORMAT if not given.")] = None,
    grid: Annotated[str, Option(help="volume, model, or full (the whole field).")] = "volume",
    overwrite: Overwrite = False,
    workers: terminal.WorkerCount = None,
    scheduler: terminal.Scheduler = None,
    timeout: terminal.Timeout = 1800,
    memory: terminal.Memory = None,
) -> None:
    """Write the prepared volumes in another format, with manifests that name those files."""
    with errors_as_exit_codes():
        from photon_cli.prepare import stopped_as_exit_code
        from photon_data.files import Location
        from photon_pipelines.cluster import Workers
        from photon_pipelines.export import export_all

        location = Location(out)
        if to is None and not location.is_local:
            fail(f"expected --to FOLDER, since {location.url} is no local folder")
        where, folder = Workers(workers, scheduler, timeout, memory), to or location.path / format_
        with stopped_as_exit_code(), ProgressBar("exporting") as bar:
            told = export_all(location, format_, folder, grid, overwrite=overwrite, progress=bar.count, workers=where)
        console.print(told)


@app.command()
def phantom(
    directory: Annotated[Path, Argument(help="An empty or new folder.")],
    n: Annotated[int, Option("--n", min=1, help="Number of scans.")] = 12,
    seed: Annotated[int, Option(min=0, help="The same seed gives the same bytes.")] = 0,
    size: Annotated[int, Option(min=64, help="Voxels across a slice: smaller is faster and coarser.")] = 384,
    easy: Annotated[bool, Option("--easy", help="Whole organs affected, short questions: for tiny models.")] = False,
) -> None:
    """Make raw synthetic CTs with masks and questions whose answers are known."""
    with errors_as_exit_codes():
        from photon_data.phantom import make_phantoms

        with ProgressBar("painting", total=n) as bar:
            try:
                made = make_phantoms(directory, n, seed, size=size, easy=easy, progress=lambda _: bar.update(advance=1))
            except FileExistsError as error:
                fail(str(error))
        where = f"{n} scans in {directory}/scans, masks in {directory}/masks"
        console.print(f"{where}, {sum(len(phantom.questions) for phantom in made)} questions", soft_wrap=True)


def main() -> None:
    """Run the command line."""
    run_app(app)


if __name__ == "__main__":
    main()
