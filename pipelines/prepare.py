"""A folder of raw scans -> stores, manifests and a report. Everything it leaves is whole; run it again and it goes on."""

from __future__ import annotations

import json
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from photon_data.errors import UsageError
from photon_data.job import Job, already_there
from photon_data.location import Location
from photon_data.recipe import Recipe
from photon_data.records import STATES, UNCHANGED, VolumeRecord, from_jsonl, jsonl_bytes
from photon_data.store import is_whole, read_metadata, store_name
from photon_pipelines.execute import Workers, execute
from photon_pipelines.lock import refresh

VOLUMES, DATASET = "volumes.jsonl", "dataset.json"
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


def read_records(out: Location) -> list[VolumeRecord]:
    """Return the rows of volumes.jsonl, none if there is no such file; UsageError if it cannot be read."""
    content = out.read(VOLUMES)
    try:
        return [VolumeRecord.from_json(row) for row in from_jsonl((content or b"").decode())]
    except (ValueError, TypeError) as error:
        raise UsageError(f"{out.at(VOLUMES)} is damaged: {error}; remove it, stores are recognised without it") from None


def write_records(out: Location, records: Iterable[VolumeRecord]) -> None:
    """Write volumes.jsonl, whole."""
    out.write(VOLUMES, jsonl_bytes(record.to_json() for record in records))


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
    return str(metadata["digest"])
