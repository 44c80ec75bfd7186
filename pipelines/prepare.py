"""A folder of raw scans -> stores, manifests and a report. Everything it leaves is whole; run it again and it goes on.

The whole of `photon-data prepare`: find, prepare, write manifests, report.

Everything that preparing checks, without the writing.
"""

from __future__ import annotations

import json
import platform
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from photon_data.errors import UsageError
from photon_data.files import Location
from photon_data.prepare_file import Job, already_there, recipe_digest
from photon_data.questions.counts import Count, count
from photon_data.questions.manifest import digests
from photon_data.questions.rows import Manifests, build, write
from photon_data.questions.splits import leaks, refuse_leaks
from photon_data.recipe import Recipe
from photon_data.records import (
    DATASET,
    STATES,
    UNCHANGED,
    VolumeRecord,
    read_records,
    write_records,
)
from photon_data.report import render_report
from photon_data.store import is_whole, open_volume, read_metadata, store_name
from photon_pipelines.cluster import Workers, execute
from photon_pipelines.lock import exclusive, refresh
from photon_pipelines.plan import Data, Order, gather
from photon_pipelines.unpack import pending, unpack_all

# volumes.jsonl is written again at least this often; a run that is killed has to read refused files of this span again.
SNAPSHOT_S = 30
LIBRARIES = ("photon-ct", "numpy", "SimpleITK", "nibabel", "zarr", "numcodecs", "isal", "dask")


@dataclass(frozen=True)
class Outcome:
    """What a run did: the records of its inputs, and of volumes that earlier runs left and this one did not look at."""

    records: list[VolumeRecord]
    kept: list[VolumeRecord]

    @property
    def counts(self) -> dict[str, int]:
        """How many inputs ended in each state; they add up to all inputs."""
        found = Counter(record.state for record in self.records)
        return {state: found[state] for state in STATES}

    @property
    def complete(self) -> bool:
        """Whether every input has its store."""
        return all(record.is_there for record in self.records)

    @property
    def rows(self) -> list[VolumeRecord]:
        """All rows of volumes.jsonl, by id."""
        return sorted([*self.records, *self.kept], key=lambda record: record.id)


@dataclass(frozen=True)
class Plan:
    """What a run will do.

    jobs    to execute
    done    records of inputs whose volumes are there already
    kept    records of volumes of earlier runs that are no input of this one
    before  records that earlier runs left of the jobs' sources: they stand until the job is done
    """

    jobs: list[Job]
    done: list[VolumeRecord]
    kept: list[VolumeRecord]
    before: list[VolumeRecord]


def plan(jobs: Sequence[Job], out: Location, recipe: Recipe) -> Plan:
    """Return which of the jobs have to be done; UsageError if the result would mix recipes. Reads, writes nothing."""
    before = {record.id: record for record in read_records(out)}
    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(lambda job: _unchanged(job, before.get(job.source.id)), jobs))
        ids = {job.source.id for job in jobs}
        others = [replace(record, state=UNCHANGED) for record in before.values() if record.is_there and record.id not in ids]
        digests = list(threads.map(lambda record: _digest(out, record), others))
    kept = [record for record, digest in zip(others, digests, strict=True) if digest]
    strange = [record for record, digest in zip(others, digests, strict=True) if digest not in (None, recipe.digest)]
    if strange:
        raise UsageError(
            f"one recipe per folder wanted, but {out.url} holds {len(strange)} volumes of another recipe that are not "
            f"among these inputs, {strange[0].id} first; use another folder, or prepare all of them again"
        )
    todo = [job for job, done in zip(jobs, found, strict=True) if done is None]
    left = [before[job.source.id] for job in todo if job.source.id in before]
    return Plan(todo, [done for done in found if done], kept, left)


def run_plan(
    todo: Plan, out: Location, workers: Workers, on_record: Callable[[VolumeRecord], None] = lambda record: None
) -> Outcome:
    """Execute a plan and return its outcome; volumes.jsonl is kept up to date, also when the run is stopped or interrupted.

    Call it while holding `exclusive(out)`. Raises NoSpace, Stopped, KeyboardInterrupt: everything done by then stays done.
    """
    sweep(out)
    records, clock = list(todo.done), _Snapshots(out, todo)
    try:
        with closing(execute(todo.jobs, workers)) as done:
            for record in done:
                records.append(record)
                on_record(record)
                clock.maybe_write(records)
    finally:
        write_records(out, rows_so_far(todo, records))
    return Outcome(records, todo.kept)


def rows_so_far(todo: Plan, records: Sequence[VolumeRecord]) -> list[VolumeRecord]:
    """Return the rows of volumes.jsonl in the middle of a run: what is done, and of the rest what earlier runs left."""
    ended = {record.id for record in records}
    return Outcome([*records, *(record for record in todo.before if record.id not in ended)], todo.kept).rows


class _Snapshots:
    """Writes volumes.jsonl every SNAPSHOT_S, more rarely when writing it takes long."""

    def __init__(self, out: Location, todo: Plan) -> None:
        self.out, self.todo = out, todo
        self.next = time.monotonic() + SNAPSHOT_S

    def maybe_write(self, records: Sequence[VolumeRecord]) -> None:
        """Write if it is time."""
        start = time.monotonic()
        if start < self.next:
            return
        refresh(self.out)
        write_records(self.out, rows_so_far(self.todo, records))
        end = time.monotonic()
        self.next = end + max(SNAPSHOT_S, 20 * (end - start))


def write_dataset(
    out: Location, recipe: Recipe, outcome: Outcome, source: str, manifests: dict[str, str] | None = None
) -> dict[str, Any]:
    """Write dataset.json and return what it says: recipe, digest, versions, counts, SHA-256 of manifests (None: not finished)."""
    dataset = {
        "format": 1,
        "source": source,
        "recipe": recipe.to_json(),
        "digest": recipe.digest,
        "versions": versions(),
        "counts": {**outcome.counts, "kept": len(outcome.kept)},
        "manifests": manifests,
    }
    out.write(DATASET, (json.dumps(dataset, indent=1, ensure_ascii=False) + "\n").encode(errors="backslashreplace"))
    return dataset


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that made the bytes."""
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}


def sweep(out: Location) -> None:
    """Remove what a killed run left half-written. Call it only while holding `exclusive(out)`."""
    for folder in ("volumes", "manifests", ""):
        for name in out.names(folder):
            if name.startswith(".") and name.endswith(".partial"):
                out.remove(str(Path(folder, name)))


def _unchanged(job: Job, before: VolumeRecord | None) -> VolumeRecord | None:
    """Return the record of a finished store whose source still has the size and time that volumes.jsonl recorded."""
    same = before and before.fingerprint and (before.bytes_in, before.mtime_ns) == (job.source.bytes, job.source.mtime_ns)
    return already_there(job, before.fingerprint) if before and before.fingerprint and same else None


def _digest(out: Location, record: VolumeRecord) -> str | None:
    """Return the digest of the recipe that a record's store was made by; None where that store is not there any more."""
    name = store_name(record.id)
    metadata = read_metadata(out, name)
    if metadata is None or metadata["sha256"] != record.store_sha256 or not is_whole(out, name, metadata):
        return None
    return recipe_digest(metadata)


REPORT, COUNTS = "report.html", "questions.json"


class Result(NamedTuple):
    """What a run left: the outcome per file, the manifests, what is in them, and why there are none if splits leak.

    `damaged` says which archives could not be unpacked as a whole, and why.
    """

    outcome: Outcome
    manifests: Manifests
    counts: list[Count]
    leak: str | None = None
    damaged: Sequence[str] = ()

    @property
    def complete(self) -> bool:
        """Whether every input has its store and every question its row."""
        return self.outcome.complete and not self.manifests.unmatched and self.leak is None and not self.damaged


class Watcher(NamedTuple):
    """Told of progress: files seen while searching, notes on them, the plan before work starts, each record as it ends.

    Before that, of archives that are unpacked: the name, and of all archives the bytes that are read and that there are.
    """

    on_file: Callable[[int], None] = lambda count: None
    on_note: Callable[[str], None] = lambda note: None
    on_plan: Callable[[Plan, Mapping[str, int]], None] = lambda todo, ignored: None
    on_record: Callable[[VolumeRecord], None] = lambda record: None
    on_archive: Callable[[str, int, int], None] = lambda name, done, total: None


def prepare(order: Order, workers: Workers, watch: Watcher) -> Result:
    """Do what was ordered and return it. UsageError before any store is written; NoSpace and Stopped leave what is done.

    What can be wrong with tables is found before the first scan is read, and only one run at a time may write into a folder.
    """
    damaged = unpack_all(pending(order.datasets, order.limit), order.out, watch.on_archive, watch.on_note)
    data = gather(order, watch.on_file)
    for note in data.notes:
        watch.on_note(note)
    with exclusive(order.out):
        todo = plan(data.jobs, order.out, order.recipe)
        watch.on_plan(todo, data.ignored)
        write_dataset(order.out, order.recipe, Outcome(todo.done, todo.kept), str(order.source))
        outcome = run_plan(todo, order.out, workers, watch.on_record)
        return finish(order, outcome, data)._replace(damaged=damaged)


def finish(order: Order, outcome: Outcome, data: Data) -> Result:
    """Write manifests, counts, dataset.json and the report of a finished run.

    Splits that leak in a way that only content shows get no manifests, and old ones go: nobody trains on them by mistake.
    """
    out, rows = order.out, outcome.rows
    name = order.questions.stem if order.questions else None
    manifests = build(data.questions, rows, out=out.at(""), instruction=order.recipe.instruction, dataset=name)
    manifests = manifests._replace(unmatched=sorted([*manifests.unmatched, *data.unmatched]))
    leak = None if order.allow_leaks else _leak(manifests, rows)
    if leak is not None:
        manifests = manifests._replace(rows={})
    write(manifests, out.at(""))
    dataset = write_dataset(out, order.recipe, outcome, str(order.source), digests(out))
    _report(order, rows, dataset)
    counts = count(row for split in manifests.rows.values() for row in split)
    out.write(COUNTS, (json.dumps([found.to_json() for found in counts], indent=1, ensure_ascii=False) + "\n").encode())
    return Result(outcome, manifests, counts, leak)


def _leak(manifests: Manifests, rows: list[VolumeRecord]) -> str | None:
    """Return what several splits have in common, as a text; None where they are apart."""
    try:
        fingerprints = {record.id: record.fingerprint for record in rows}
        refuse_leaks(leaks((row for split in manifests.rows.values() for row in split), fingerprints))
    except UsageError as error:
        return str(error)
    return None


def _report(order: Order, rows: list[VolumeRecord], dataset: dict[str, Any]) -> None:
    page = render_report(
        rows,
        recipe=order.recipe,
        open_volume=lambda record: open_volume(order.out.at(record.store or ""), "model"),
        pictures=order.pictures,
        title=order.out.at("").rstrip("/").rpartition("/")[2],
        source=order.source.name,
        tools=dataset["versions"],
    )
    order.out.write(REPORT, page)


class Inspected(NamedTuple):
    """The record of every scan, by id ("ready" for one that would be prepared, else refused or failed), and `Data.ignored`."""

    records: list[VolumeRecord]
    ignored: Mapping[str, int]


def inspect_all(order: Order, workers: Workers) -> Inspected:
    """Return what there is to say of the scans of an order; nothing is written."""
    data = gather(order)
    jobs = [replace(job, write=False) for job in data.jobs]
    return Inspected(sorted(execute(jobs, workers), key=lambda record: record.id), data.ignored)
