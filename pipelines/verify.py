"""Checks every byte that prepare left: here, or where there are many stores, in processes of workers."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple

from photon_data.errors import UsageError
from photon_data.files import Location, digest_of
from photon_data.json_text import from_json
from photon_data.lock import LOCK as RUN_LOCK
from photon_data.mask_store import FOLDER as MASK_STORES
from photon_data.mask_store import REMEDY, verify_masks
from photon_data.mask_store import ROWS as MASK_ROWS
from photon_data.questions.kept import FOLDER as QUESTIONS
from photon_data.questions.manifest import FOLDER as MANIFESTS
from photon_data.questions.manifest import validate
from photon_data.records import (
    DATASET,
    DATASET_DIGEST,
    DIED,
    INSPECTED,
    LOCK,
    ROW_DIGEST,
    STORES,
    SUFFIX,
    VOLUMES,
    VolumeRecord,
    is_unfinished,
    read_records,
    records_of,
    store_names,
)
from photon_data.store import read_metadata, verify_store
from photon_pipelines import child
from photon_pipelines.cluster import Workers, execute, needs_of, pays

NO_ROW = "no row in volumes.jsonl (its source is refused now, or a run was cut short): run prepare again, or remove it"
EARLIER = "of an earlier version, which wrote no checksum of it: run prepare again"


class StoreJob(NamedTuple):
    """A store to check."""

    out: str
    name: str
    record: VolumeRecord | None  # None where volumes.jsonl cannot be read

    def to_json(self) -> dict[str, Any]:
        """Return what `check_store` takes."""
        return {"out": self.out, "name": self.name, "row": self.record and self.record.to_json()}


def verify_output(
    out: Location,
    progress: Callable[[int, int], object] = lambda done, total: None,
    unchecked: Callable[[str], object] = lambda what: None,
    workers: Workers | None = None,
) -> Iterator[str]:
    """Yield what is wrong, a sentence each: files missing, changed, unreadable or surplus, stores without a row.

    One that cannot be read does not stop the others. UsageError where nothing was prepared. `progress` gets the number
    of stores that are checked, and of all; `unchecked` what in `out` was not. Stores are read by `workers`, if given.
    """
    if not out.exists(VOLUMES):
        records_of(out)  # says so
    dataset = yield from _verify_dataset(out, unchecked)
    records = yield from _verify_rows(out, dataset, unchecked)
    known: dict[str, VolumeRecord | None] = {record.place: record for record in records or () if record.is_there}
    strangers = [place for place in (yield from _names(out, STORES)) if place not in known]
    if records is None:  # nothing says which stores belong here: each is checked by what it says itself
        known, strangers = dict.fromkeys(name for name in strangers if name.endswith(SUFFIX)), []
    jobs = (StoreJob(out.at(""), name, record) for name, record in known.items())
    for number, problems in enumerate(_check_stores(out, jobs, len(known), workers), 1):
        yield from problems
        progress(number, len(known))
    yield from (f"{name}: {NO_ROW}" for name in strangers)
    if records is not None:
        yield from _verify_masks(out, records)
    elif (yield from _names(out, MASK_STORES)):
        unchecked(f"{MASK_STORES} (which belong to the volumes that there should be)")
    del records, known, jobs  # manifests take as much
    yield from _verify_inspected(out)
    yield from _verify_manifests(out, dataset)
    parts = {STORES, VOLUMES, DATASET, MANIFESTS, QUESTIONS, INSPECTED, RUN_LOCK, LOCK, MASK_STORES, MASK_ROWS}
    parts |= set((dataset or {}).get("files") or ())
    for name in (yield from _names(out, "")):
        if name not in parts:
            unchecked(f"{name} (not a part of what prepare writes)")


def _verify_dataset(out: Location, unchecked: Callable[[str], object]) -> Generator[str, None, Any]:
    """Return dataset.json, None where it is not sound; check the files that it records."""
    try:
        dataset = from_json(out.read(DATASET) or b"")
        parts = dataset["manifests"], dataset.get("files"), dataset.get("counts")
        if not all(part is None or isinstance(part, dict) for part in parts):
            raise TypeError("expected objects")
        if not all(type(n) is int for n in (parts[2] or {}).values()):
            raise TypeError("expected whole numbers")
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        yield f"{DATASET}: not readable; run prepare again"
        return None
    if DATASET_DIGEST not in dataset and "files" not in dataset:  # both came with the same version
        unchecked(f"{DATASET} ({EARLIER})")
    elif dataset.get(DATASET_DIGEST) != digest_of(dataset, DATASET_DIGEST):
        yield f"{DATASET}: differs from its own digest; run prepare again"
    for name, digest in sorted((dataset.get("files") or {}).items()):
        yield from _compare(out, name, digest)
    return dataset


def _compare(out: Location, name: str, digest: str | None) -> Iterator[str]:
    """Yield what is wrong with a file that dataset.json records, or should."""
    try:
        found = out.sha256(name)
    except OSError as error:
        yield f"{name}: cannot be read ({error.strerror or error})"
        return
    if found is None:
        yield f"{name}: missing"
    elif found != digest:
        yield f"{name}: differs from what {DATASET} records"


def _verify_rows(
    out: Location, dataset: Any, unchecked: Callable[[str], object]
) -> Generator[str, None, list[VolumeRecord] | None]:
    """Return the records, None where volumes.jsonl cannot be read."""
    try:
        damaged, without, count = _digests(VOLUMES, out.rows(VOLUMES, may_be_cut=is_unfinished(out)))
        records = read_records(out)
    except (ValueError, RecursionError, OSError) as error:
        yield str(error) if isinstance(error, UsageError) else f"{VOLUMES}: cannot be read ({error})"
        unchecked("which volumes there should be")
        return None
    yield from damaged
    if without and (len(without) < count or DATASET_DIGEST in (dataset or {})):
        yield f"{VOLUMES}, row {without[0]}: expected its own digest, found none; run prepare again"
    elif without:
        unchecked(f"{len(without)} rows of {VOLUMES} ({EARLIER})")
    counts = (dataset or {}).get("counts")
    if dataset and dataset["manifests"] is not None and isinstance(counts, dict) and sum(counts.values()) != count:
        yield f"{VOLUMES}: {count} rows, where {DATASET} counts {sum(counts.values())}; run prepare again"
    return records


def _digests(
    name: str, rows: Iterable[dict[str, Any]], remedy: str = "run prepare again"
) -> tuple[list[str], list[int], int]:
    """Return what is wrong with the digests of rows, the numbers of rows without one, and how many rows there are."""
    damaged, without, number = list[str](), list[int](), 0
    for number, row in enumerate(rows, 1):
        if ROW_DIGEST not in row:
            without.append(number)
        elif row[ROW_DIGEST] != digest_of(row, ROW_DIGEST):
            damaged.append(f"{name}, row {number} ({row.get('id')}): differs from its own digest; {remedy}")
    return damaged, without, number


def _check_stores(out: Location, jobs: Iterable[StoreJob], count: int, workers: Workers | None) -> Iterator[list[str]]:
    """Yield what is wrong with each of the stores."""
    if workers is None or not pays(workers, count):
        yield from (check_store(job.to_json())["problems"] for job in jobs)
        return
    task = partial(child.run_isolated, module=__name__)
    with closing(execute([*jobs][::-1], task, workers, needs_of(out, VOLUMES))) as finished:
        for job, reply in finished:
            yield reply["problems"] if DIED not in reply else [f"{job.name}: could not be checked: {reply[DIED][1]}"]


def check_store(job: dict[str, Any]) -> dict[str, list[str]]:
    """Return what is wrong with a store, and where its row says another thing; both as JSON."""
    out, name, row = Location(job["out"]), job["name"], job["row"]
    problems = list(verify_store(out, name, row["store_sha256"] if row else None))
    return {"problems": problems + list(_verify_row(out, name, row) if row else ())}


def main(address_space_bytes: int) -> None:
    """Check stores until the parent ends."""
    child.main(address_space_bytes, check_store)


def _verify_row(out: Location, name: str, row: dict[str, Any]) -> Iterator[str]:
    """Yield where the row of a volume says another thing than its store."""
    if row["store"] != name:
        yield f"{row['id']}: its row names {row['store']} as its store, not {name}"
    try:
        metadata = read_metadata(out, name)
    except OSError:
        return
    if metadata is None:  # told already
        return
    for field in ("id", "fingerprint", "key", "facts"):
        if json.dumps(row[field], sort_keys=True) != json.dumps(metadata[field], sort_keys=True):
            yield f"{row['id']}: its row in {VOLUMES} has another {field} than {name}; run prepare again"


def _names(out: Location, folder: str) -> Generator[str, None, list[str]]:
    """Return the names in a folder, of stores their places; one that cannot be read is a problem and has none."""
    try:
        return store_names(out, folder) if folder in (STORES, MASK_STORES) else out.names(folder)
    except OSError as error:
        yield f"{folder or out.url}: cannot be read ({error.strerror or error})"
        return []


def _verify_masks(out: Location, records: Sequence[VolumeRecord]) -> Iterator[str]:
    try:
        yield from verify_masks(out, records)
        damaged, without, _ = _digests(MASK_ROWS, out.rows(MASK_ROWS))
        yield from damaged
        yield from (f"{MASK_ROWS}, row {number}: expected its own digest, found none; {REMEDY}" for number in without)
    except (ValueError, OSError) as error:
        yield str(error) if isinstance(error, UsageError) else f"{MASK_ROWS}: cannot be read ({error})"


def _verify_inspected(out: Location) -> Iterator[str]:
    """Yield what is wrong with the findings of `inspect`: by them, prepare leaves scans out."""
    try:
        damaged, without, _ = _digests(INSPECTED, out.rows(INSPECTED, may_be_cut=True), "remove the file")
        yield from damaged
        yield from (f"{INSPECTED}, row {number}: expected its own digest, found none; remove it" for number in without)
    except (ValueError, OSError) as error:
        yield f"{INSPECTED}: cannot be read ({error}); remove it"


def _verify_manifests(out: Location, dataset: Any) -> Iterator[str]:
    if dataset is None:
        return
    recorded = dataset["manifests"]
    if recorded is None:
        yield "the last run was cut short, manifests may be old: run prepare again"
        return
    found = set(recorded)
    for folder in (MANIFESTS, QUESTIONS):
        names = yield from _names(out, folder)
        found |= {f"{folder}/{name}" for name in names if name.endswith(".jsonl") and not name.startswith(".")}
    for name in sorted(found):
        problems = list(_compare(out, name, recorded.get(name)))
        yield from problems
        if not problems and out.is_local and name.startswith(MANIFESTS):
            try:
                yield from (f"{name}, {problem}" for problem in validate(out.path / name, root=out.path))
            except (ValueError, RecursionError, OSError) as error:
                yield f"{name}: cannot be checked ({error})"
