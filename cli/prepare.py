"""The bodies of `photon-data prepare` and `inspect`: progress, the result, an estimate, tables of findings."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from typer import Context

from photon_cli.terminal import (
    STOPPED,
    ProgressBar,
    console,
    fail,
    fractions,
    given_options,
    pairs,
    print_lines,
    print_table,
    refuse_beside_manifest,
)
from photon_data.datasets.base import DataSet
from photon_data.datasets.combine import Collection, combine, missing_paths, read_dataset
from photon_data.datasets.declare import read_data_manifest
from photon_data.errors import UsageError, first_few
from photon_data.files import Location, jsonl_bytes
from photon_data.questions.kept import kept_questions
from photon_data.questions.splits import Count, leaks, refuse_leaks
from photon_data.readers.find import left_alone
from photon_data.recipe import Policy, Recipe, named_recipe
from photon_data.records import READY, VolumeRecord, read_lock, records_of
from photon_data.remarks import all_remarks, duplicates
from photon_data.store import WRITTEN
from photon_pipelines import collection
from photon_pipelines import plan as planning
from photon_pipelines.cluster import Stopped, Workers
from photon_pipelines.plan import Plan, Result
from photon_pipelines.request import Request, grids_of, notes_of_grids
from photon_pipelines.unpack import pending

# Measured by benchmarks/prepare_peers.py and prepare_scaling.py; good for an order of magnitude.
SECONDS_PER_VOLUME, SECONDS_PER_MB = 0.5, 0.006
COMPRESSED = 0.45
FILES_PER_STORE = {"model": 4, "volume": 6, "full": 9}
FULL_VOXELS = 15_000_000  # of a field of 380 x 380 x 350 mm at 1.5 mm
WORKER_GB, OBLIQUE_WORKER_GB = 0.4, 1.5
SHOWN_QUESTIONS = 10
ANSWER_LENGTH = 40


def request_of(context: Context, source: Path, out: str) -> Request:
    """Return the request that the options of `prepare` or `inspect` make; UsageError where they cannot be followed."""
    given = context.params
    fields = ["limit", "overwrite", "pictures", "allow_leaks"]
    if given["manifest"]:
        refuse_beside_manifest(context)
        fields += ["seed"] if given_options(context, ["seed"]) else []
        run: dict[str, Any] = {name: given[name] for name in fields}
        run |= {"prompt": given["prompt_style"], "policy": Policy(max_voxels=given["max_voxels"])}
        run |= _run_options(given)
        request = planning.request_of_manifest(source, given["only"], out, **run)
    else:
        policy_options = {"modality": "modality", "non_finite": "nan", "max_voxels": "max_voxels"}
        settings = [f"{key}={given[name]}" for key, name in policy_options.items() if given[name] is not None]
        recipe, policy = named_recipe(given["recipe"], [*given["settings"], *settings])
        if given.get("lock") and not given_options(context, ["recipe", "settings"]):
            recipe = Recipe.from_json(read_lock(given["lock"])["recipe"])
        fields += ["seed", "questions", "hu_source", "id_from", "id_prefix", "include", "exclude", "follow_links"]
        run = {name: given[name] for name in fields if name in given} | _run_options(given)
        if "split" in given:  # inspect asks no questions
            run |= {"prompt": given["prompt_style"], "fractions": fractions(given["split"])}
        columns = pairs(given["columns"], "--columns")
        request = Request(source, Location(out), recipe, policy=policy, columns=columns, **run)
    if request.lock and request.recipe.digest != Recipe.from_json(dict(request.lock["recipe"])).digest:
        expected = f"the lock's recipe ({request.lock['recipe']['name']})"
        found = f"another one ({request.recipe.name}, {request.recipe.digest})"
        raise UsageError(f"--lock: expected {expected}, found {found}; leave --recipe and --set out")
    if "pictures" in given and not request.out.is_shared:  # inspect writes nothing
        raise UsageError(f"expected a folder or an object store, found {request.out.url}: processes do not share it")
    return request


def _run_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what only `prepare` has: how it treats what OUT holds."""
    lock = read_lock(given["lock"]) if given.get("lock") else None
    return {
        "retry_failed": given.get("retry_failed", False),
        "paths": given.get("paths_in_manifests"),
        "grids": given.get("grids"),
        "check": given.get("check", "time"),
        "lock": lock,
    }


@contextmanager
def stopped_as_exit_code() -> Iterator[None]:
    """End the command with the exit code for a run that could not go on."""
    try:
        yield
    except Stopped as error:
        fail(f"Stopped: {error}. What is done is kept.", STOPPED)


class PreparingBar(ProgressBar, planning.Callback):
    """Shows how far a run is, and prints at once every file that was refused or failed; see Callback."""

    total = done_bytes = 0

    def on_archive(self, name: str, done_bytes: int, total_bytes: int) -> None:  # noqa: D102
        done, total = done_bytes // 1_000_000, total_bytes // 1_000_000
        self.update(description="unpacking", completed=done, total=total, detail=f"MB, {name}")
        self.line(f"unpacking {name}: {done:,} of {total:,} MB")

    def on_file(self, count: int) -> None:  # noqa: D102
        self.update(description="looking for scans", detail=f"{count} files seen")

    def on_note(self, note: str) -> None:  # noqa: D102
        console.print(note, soft_wrap=True)

    def on_plan(self, todo: Plan, ignored: Mapping[str, int]) -> None:  # noqa: D102
        self.total, self.start_s = len(todo.jobs), time.monotonic()
        self.states = Counter(unchanged=len(todo.done))
        console.print(f"{self.total + len(todo.done)} scans found, {len(todo.done)} of them done before")
        _print_ignored(ignored)
        self.update(description="preparing", total=self.total, completed=0, detail="")

    def on_record(self, record: VolumeRecord) -> None:  # noqa: D102
        self.states[record.state] += 1
        self.done_bytes += record.bytes_in
        if not record.is_there and record.reason:
            console.print(f"{record.state} {record.name}: {record.reason}", soft_wrap=True)
        minutes = max((time.monotonic() - self.start_s) / 60, 1e-9)
        done = self.states.total()
        rate = (done - self.states["unchanged"]) / minutes
        states = ", ".join(f"{n} {state}" for state, n in self.states.items() if n)
        detail = f"{states}; {self.done_bytes / 1e6:.0f} MB, {rate:.0f} volumes/min"
        self.update(advance=1, detail=detail)
        self.line(f"{done} done, {self.total} to do in all: {detail}")


def _print_ignored(ignored: Mapping[str, int]) -> None:
    if ignored:
        console.print(f"files left alone: {left_alone(ignored)}", soft_wrap=True)


def print_result(request: Request, result: Result) -> None:
    """Print counts, the manifests, what is missing, and where to look."""
    states, kept, unmatched = result.states, result.kept, result.manifests.unmatched
    print_table(f"{len(result.records)} scans", [*states], [[*map(str, states.values())]], texts=0)
    codes = Counter(record.code for record in result.records if not record.is_there)
    print_lines(f"  {count} x {code}" for code, count in codes.most_common())
    if remembered := sum(not record.is_there and record.seconds is None for record in result.records):
        console.print(f"{remembered} of them were not read again: nothing changed since (--retry-failed reads them)")
    if there := [record.id for record in kept if record.is_there]:
        console.print(f"{len(there)} volumes of earlier runs were kept, {min(there)} first")
    for split, rows in result.manifests.rows.items():
        console.print(f"manifests/{split}.jsonl: {len(rows)} rows on {len({row['volume_id'] for row in rows})} volumes")
    if request.lock:
        same = "every volume and question is as in the lock, to the byte"
        print_lines(result.differences or [same])
    if result.left:
        found = f"{len(result.left)} rows that the manifests had are gone: {first_few(result.left, SHOWN_QUESTIONS)}"
        console.print(found, style="yellow", soft_wrap=True)
    if result.leak is not None:
        console.print(f"No manifests were written: {result.leak}", style="red", soft_wrap=True)
    if result.damaged:
        console.print(f"{len(result.damaged)} x archives that could not be read as a whole; see above", style="red")
    _print_counts(result.counts)
    if unmatched:
        console.print(f"{len(unmatched)} questions have no row:", style="red")
    print_lines(f"  {one.id} (volume {one.volume}): {one.reason}" for one in unmatched[:SHOWN_QUESTIONS])
    if len(unmatched) > SHOWN_QUESTIONS:
        console.print(f"  and {len(unmatched) - SHOWN_QUESTIONS} more")
    console.print(f"{request.out.url}: see report.html, volumes.jsonl", soft_wrap=True)


def _print_counts(counts: Sequence[Count]) -> None:
    """Print what is asked, and how far a constant answer gets."""
    if not any(found.constant_answer for found in counts):
        return
    rows = []
    for found in counts:
        low, middle, high = found.per_volume
        numbers = [f"{found.questions:,}", f"{found.volumes:,}", f"{low} to {high}, median {middle:g}"]
        answer = " ".join((found.constant_answer or "").split())
        answer = answer if len(answer) <= ANSWER_LENGTH else answer[:ANSWER_LENGTH] + "..."
        shares = ["" if s is None else f"{s:.1%}" for s in (found.constant_accuracy, found.constant_macro)]
        rows.append([found.dataset, found.task, found.split, *numbers, answer, *shares])
    names = [
        "data set",
        "task",
        "split",
        "questions",
        "volumes",
        "per volume",
        "best constant answer",
        "right",
        "macro",
    ]
    print_table("questions (all of it in questions.json)", names, rows)


def print_status(out: Location) -> None:
    """Print what a prepared folder holds: volumes by source folder, questions by data set, and what a run would do."""
    records, parts = records_of(out), collection.status(out)
    gigabytes = sum(record.store_bytes or 0 for record in records if record.is_there) / 1e9
    names = ["source folder", "without a volume", "volumes", "unchanged", "changed", "new", "gone"]
    rows = []
    private = {record.root for record in records if record.hidden}
    for part in parts:
        root = "(private)" if part.root in private else part.root or "(not recorded)"
        without = ", ".join(f"{count} x {code}" for code, count in part.codes.items())
        found = ["?"] * 4 if part.gone is None else [part.unchanged, part.changed, part.new, len(part.gone)]
        rows.append([root, without, str(part.there), *map(str, found)])
    print_table(f"{out.url}: {gigabytes:,.2f} GB of stores", names, rows, texts=2)
    questions = kept_questions(out)
    if questions:
        counts = [[name, f"{len(own):,}"] for name, own in questions.items()]
        print_table("questions", ["data set", "questions"], counts, texts=1)
    if missing := [part.root for part in parts if part.gone is None and part.root not in private]:
        print_lines([f"not there now, so nothing is known of what changed: {first_few(missing)}"])
    print_lines(["The next prepare of a source does its changed and new scans. `prune` takes away what is gone."])


def print_estimate(request: Request, workers: Workers) -> None:
    """Print what `prepare` would do and about what it needs; nothing is written."""
    if request.datasets:
        print_lines(map(str, pending(request.datasets, request.limit)))
        readable = tuple(entry for entry in request.datasets if not any(one.is_all for one in pending([entry])))
        if not readable:
            return
        request = replace(request, datasets=readable)
    gathered = planning.gather(request)
    print_lines(gathered.notes)
    todo = planning.plan(gathered.jobs, request)
    planning.collect(gathered, request.out, request.allow_leaks)
    print_lines(notes_of_grids(todo.before, todo.done, request))
    costs = _costs(request, todo, workers)
    title = f"photon-data prepare {request.source} {request.out.url} (dry run)"
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
    print_table(f"{len(records)} scans in {source}", names, map(_findings, records))
    same = (", ".join(record.name for record in group) for group in duplicates(records))
    print_lines(f"the same content: {sources}" for sources in same)
    _print_ignored(ignored)
    if json_file:
        json_file.write_bytes(jsonl_bytes({**record.row(), "findings": all_remarks(record)} for record in records))
    return all(record.state == READY for record in records)


def _findings(record: VolumeRecord) -> list[str]:
    """Return a scan's line of the table."""
    facts = record.facts
    if facts is None:
        return [record.id, "", "", "", "", "", f"{record.state} ({record.code}): {record.reason}"]
    geometry, hu = facts["geometry"], facts["hu_before"]
    return [
        record.id,
        facts["format"],
        " ".join(str(n) for n in geometry["shape_zyx"]),
        " ".join(f"{s:.2f}" for s in geometry["spacing_zyx_mm"]),
        geometry["orientation_zyx"],
        f"{hu['min']:.0f} to {hu['max']:.0f}",
        "; ".join(all_remarks(record)) or "fine",
    ]


def inspect_manifest(path: Path, only: Sequence[str], out: str | None, workers: Workers) -> bool:
    """Print what each data set of a manifest has and lacks, and the costs; return whether nothing is missing."""
    manifest = read_data_manifest(path)
    datasets, location = manifest.only(only), planning.out_of(manifest, out)
    found = [_inspect_dataset(entry, manifest.seed) for entry in datasets]
    names = ["data set", "questions", "volumes needed", "there", "missing", "about it"]
    print_table(f"data sets of {path}", names, [line for _, line in found])
    parts = [part for part, _ in found if part]
    if not parts:
        return False
    readable = tuple(entry for part in parts for entry in part.datasets)
    recipe = planning.one_recipe(readable)
    request = Request(path, location, recipe, seed=manifest.seed, datasets=readable)
    combined = combine(parts, manifest.seed)
    todo = planning.plan(planning.jobs_of(request, combined), request)
    print_table("for the volumes that are there", ["", ""], _costs(request, todo, workers))
    refuse_leaks(leaks(map(planning.as_row, combined.questions)))
    return len(parts) == len(datasets) and not combined.unmatched


def _inspect_dataset(entry: DataSet, seed: int) -> tuple[Collection | None, list[str]]:
    """Return a data set, if it can be read, and its line of the table."""
    if missing := missing_paths(entry):
        return None, [entry.name, "?", "?", "?", f"{len(missing)} files or folders", first_few(missing)]
    try:
        archives = pending([entry])
        if whole := next((one for one in archives if one.is_all), None):
            return None, [entry.name, "?", f"{len(whole.requested):,}", "0", f"{len(whole.missing):,}", str(whole)]
        part = read_dataset(entry, instruction=planning.recipe_of(entry)[0].instruction, seed=seed)
    except UsageError as error:
        return None, [entry.name, "?", "?", "?", "?", str(error)]
    found, lacking = {q.volume for q in part.questions}, sorted({question.volume for question in part.unmatched})
    numbers = [len(part.questions) + len(part.unmatched), len(found) + len(lacking), len(found), len(lacking)]
    about = [*map(str, archives), *part.notes, *([f"missing: {first_few(lacking)}"] if lacking else [])]
    return part, [entry.name, *(f"{number:,}" for number in numbers), "; ".join(about)]
