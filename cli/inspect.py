"""What is told before anything is written: the estimate of a dry run, the findings and proposals of `inspect`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from photon_cli.terminal import (
    ProgressBar,
    console,
    print_lines,
    print_table,
)
from photon_data.datasets.base import DataSet
from photon_data.datasets.combine import Collection, combine, missing_paths, read_dataset
from photon_data.datasets.declare import read_data_manifest
from photon_data.errors import UsageError, first_few
from photon_data.files import jsonl_bytes, write_whole
from photon_data.override import COLUMNS as OVERRIDES
from photon_data.override import proposed_rows, proposed_table
from photon_data.questions.kept import collect
from photon_data.questions.splits import leaks_of, refuse_leaks
from photon_data.readers.find import left_alone
from photon_data.records import READY, VolumeRecord
from photon_data.report import all_remarks, duplicates
from photon_data.scan import place_name
from photon_data.store import WRITTEN
from photon_pipelines import plan as planning
from photon_pipelines.cluster import Workers
from photon_pipelines.mask_plan import find_masks
from photon_pipelines.plan import Plan
from photon_pipelines.request import (
    Request,
    grids_of,
    notes_of_grids,
    one_recipe,
    out_of,
    recipe_of,
)
from photon_pipelines.unpack import pending

# Measured by benchmarks/prepare_peers.py and prepare_scaling.py; good for an order of magnitude.
SECONDS_PER_VOLUME, SECONDS_PER_MB = 0.5, 0.006
COMPRESSED = 0.45
FILES_PER_STORE = {"model": 4, "volume": 6, "full": 9}
FULL_VOXELS = 15_000_000  # of a field of 380 x 380 x 350 mm at 1.5 mm
WORKER_GB, OBLIQUE_WORKER_GB = 0.4, 1.5


class InspectingBar(ProgressBar, planning.Callback):
    """Shows how many scans were looked for, and read."""

    done = total = 0

    def on_file(self, count: int) -> None:  # noqa: D102
        self.update(description="looking for scans", detail=f"{count} files seen")

    def on_plan(self, todo: Plan, ignored: Mapping[str, int]) -> None:  # noqa: D102
        self.total = len(todo.jobs)
        print_lines([f"{len(todo.done)} scans did not change since they were inspected"] if todo.done else [])
        self.update(description="reading scans", detail="")

    def on_record(self, record: VolumeRecord) -> None:  # noqa: D102
        self.done += 1
        self.count(self.done, self.total)


def print_estimate(request: Request, workers: Workers) -> None:
    """Print what `prepare` would do and about what it needs; nothing is written."""
    if request.datasets:
        print_lines(map(str, pending(request.datasets, request.limit)))
        readable = tuple(entry for entry in request.datasets if not any(one.is_all for one in pending([entry])))
        if not readable:
            return
        request = replace(request, datasets=readable)
    gathered = planning.gather(request, keeps_headers=False)
    print_lines(gathered.notes)
    todo = planning.plan(gathered.jobs, request, gathered.rows)
    collect(gathered.questions, gathered.jobs, request.out, gathered.rows, allow_leaks=request.allow_leaks)
    print_lines(notes_of_grids(todo.before, todo.done, request))
    costs = _costs(request, todo, workers)
    if request.with_masks:
        found = find_masks(request, gathered.jobs)
        megabytes = sum(one.source.bytes for one in found.values()) / 1e6
        there = sum(not one.source.problem for one in found.values())
        costs.append(("masks", f"of {there} of {len(found)} scans, {megabytes:,.0f} MB"))
        without = [id for id, one in found.items() if one.source.problem]
        costs += [("scans without masks", f"{len(without)}: {first_few(without)}")] if without else []
    source = "SOURCE" if any(job.source.hidden for job in gathered.jobs) else place_name(request.source)
    title = f"photon-data prepare {source} {request.out.url} (dry run)"
    print_table(title, ["", ""], [*costs, ("files left alone", left_alone(gathered.ignored))])


def _costs(request: Request, todo: Plan, workers: Workers) -> list[tuple[str, str]]:
    """Return what is to do and about what it needs, as lines of a table."""
    megabytes = sum(job.source.bytes for job in todo.jobs) / 1e6
    count, scans = workers.local_count(), len(todo.jobs)
    seconds = (SECONDS_PER_VOLUME * scans + SECONDS_PER_MB * megabytes) / count
    unit, unit_s, digits = ("s", 1, 0) if seconds < 120 else ("min", 60, 0) if seconds < 7200 else ("h", 3600, 1)
    time_text = f"about {seconds / unit_s:.{digits}f} {unit} with {count} local workers"
    memory = f"about {WORKER_GB * count:.1f} GB for axis-aligned scans"
    recipe, grids = request.recipe, WRITTEN[written := grids_of(request)]
    sizes = {"volume": math.prod(recipe.shape_zyx), "model": math.prod(recipe.model_shape_zyx), "full": FULL_VOXELS}
    voxels = sum(sizes[grid] for grid in grids)
    gigabytes = 2 * voxels * COMPRESSED * scans / 1e9
    return [
        ("to prepare", f"{scans} scans, {megabytes:,.0f} MB"),
        ("done before", f"{len(todo.done)} scans"),
        ("known to be refused", f"{sum(job.source.problem is not None for job in todo.jobs)} scans"),
        ("time", "depends on the cluster" if workers.scheduler else time_text),
        ("memory", f"{memory}, up to {OBLIQUE_WORKER_GB * count:.1f} GB for oblique ones"),
        ("disk", f"about {gigabytes:,.1f} GB in {FILES_PER_STORE[written] * scans} files"),
    ]


def print_findings(
    source: Path, records: Sequence[VolumeRecord], ignored: Mapping[str, int], json_file: Path | None
) -> bool:
    """Print a row per scan, write them to `json_file` if given, and return whether all could be prepared."""
    names = ["id", "format", "voxels z y x", "mm z y x", "axes", "HU", "findings"]
    place = "" if any(record.hidden for record in records) else f" in {place_name(source)}"
    print_table(f"{len(records)} scans{place}", names, map(_findings, records))
    same = (", ".join(record.name for record in group) for group in duplicates(records))
    print_lines(f"the same content: {sources}" for sources in same)
    print_lines([f"files left alone: {left_alone(ignored)}"] if ignored else [])
    if json_file:
        with write_whole(json_file) as temporary:
            rows = ({**record.row(), "findings": all_remarks(record)} for record in records)
            temporary.write_bytes(jsonl_bytes(rows))
    return all(record.state == READY for record in records)


def print_proposals(records: Sequence[VolumeRecord], table: Path | None) -> None:
    """Print how refused scans can be let pass, by code; write a table for --overrides to `table` if given.

    The table has paths of scans: where these are hidden, it is readable for its owner only.
    """
    rows = proposed_rows(records)
    found = Counter((row["code"], ", ".join(f"{key} {row[key]}" for key in OVERRIDES if row[key])) for row in rows)
    print_lines(f"{count} x {code}: {cells}" for (code, cells), count in found.most_common())
    if rows:
        remedy = "for all scans of a code: prepare --accept; for single ones: a table, prepare --overrides"
        console.print(f"these can be let pass, ? is yours to choose ({remedy})", soft_wrap=True)
    if table:
        with write_whole(table) as temporary:
            temporary.touch(mode=0o600 if any(record.hidden for record in records) else 0o666)
            temporary.write_text(proposed_table(records), encoding="utf-8")
        console.print(f"{table}: {len(rows)} rows for --overrides", soft_wrap=True)


def _findings(record: VolumeRecord) -> list[str]:
    """Return a scan's line of the table."""
    facts = record.facts
    if facts is None:
        accept = f" [--accept {record.accept}]" if record.accept else ""
        return [record.id, "", "", "", "", "", f"{record.state} ({record.code}): {record.reason}{accept}"]
    geometry, hu = facts["geometry"], facts["hu_before"]
    changes = [f"{change['code']}: {change['after']}" for change in facts.get("changes", ())]
    return [
        record.id,
        facts["format"],
        " ".join(str(n) for n in geometry["shape_zyx"]),
        " ".join(f"{s:.2f}" for s in geometry["spacing_zyx_mm"]),
        geometry["orientation_zyx"],
        f"{hu['min']:.0f} to {hu['max']:.0f}",
        "; ".join([*changes, *all_remarks(record)]) or "fine",
    ]


def inspect_manifest(path: Path, only: Sequence[str], out: str | None, workers: Workers) -> bool:
    """Print what each data set of a manifest has and lacks, and the costs; return whether nothing is missing."""
    manifest = read_data_manifest(path)
    datasets, location = manifest.only(only), out_of(manifest, out)
    found = [_inspect_dataset(entry, manifest.seed) for entry in datasets]
    names = ["data set", "questions", "volumes needed", "there", "missing", "about it"]
    print_table(f"data sets of {path}", names, [line for _, line in found])
    parts = [part for part, _ in found if part]
    if not parts:
        return False
    readable = tuple(entry for part in parts for entry in part.datasets)
    recipe = one_recipe(readable)
    request = Request(path, location, recipe, seed=manifest.seed, datasets=readable)
    combined = combine(parts, manifest.seed)
    todo = planning.plan(planning.jobs_of(request, combined), request)
    print_table("for the volumes that are there", ["", ""], _costs(request, todo, workers))
    refuse_leaks(leaks_of(combined.questions))
    return len(parts) == len(datasets) and not combined.unmatched


def _inspect_dataset(entry: DataSet, seed: int) -> tuple[Collection | None, list[str]]:
    """Return a data set, if it can be read, and its line of the table."""
    if missing := missing_paths(entry):
        return None, [entry.name, "?", "?", "?", f"{len(missing)} files or folders", first_few(missing)]
    try:
        archives = pending([entry])
        if whole := next((one for one in archives if one.is_all), None):
            return None, [entry.name, "?", f"{len(whole.requested):,}", "0", f"{len(whole.missing):,}", str(whole)]
        part = read_dataset(entry, instruction=recipe_of(entry)[0].instruction, seed=seed)
    except UsageError as error:
        return None, [entry.name, "?", "?", "?", "?", str(error)]
    found, lacking = {q.volume for q in part.questions}, sorted({question.volume for question in part.unmatched})
    numbers = [len(part.questions) + len(part.unmatched), len(found) + len(lacking), len(found), len(lacking)]
    about = [*map(str, archives), *part.notes, *([f"missing: {first_few(lacking)}"] if lacking else [])]
    return part, [entry.name, *(f"{number:,}" for number in numbers), "; ".join(about)]
