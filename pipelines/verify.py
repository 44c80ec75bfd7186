"""Checks every byte that prepare left."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from photon_data.location import Location
from photon_data.manifest import FOLDER, SUFFIX, validate
from photon_data.records import VolumeRecord
from photon_data.store import store_name, verify_store
from photon_pipelines.prepare import read_records

NO_ROW = "no row in volumes.jsonl (its source is refused now, or a run was cut short): run prepare again, or remove it"
Watch = Callable[[list[VolumeRecord]], Iterable[VolumeRecord]]


def verify_output(out: Location, watch: Watch = iter) -> Iterator[str]:
    """Yield what is wrong, a sentence each: files missing, changed or surplus, stores without a row, unsound manifests."""
    records = [record for record in read_records(out) if record.is_there]
    for record in watch(records):
        yield from verify_store(out, store_name(record.id), record.store_sha256)
    known = {store_name(record.id) for record in records}
    for name in out.names("volumes"):
        if f"volumes/{name}" not in known:
            yield f"volumes/{name}: {NO_ROW}"
    for name in out.names(FOLDER):
        if name.endswith(SUFFIX) and out.is_local:
            yield from (f"{FOLDER}/{name}, {problem}" for problem in validate(out.path / FOLDER / name))
