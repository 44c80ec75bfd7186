"""Checks every byte that prepare left."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from photon_data.files import Location
from photon_data.json_text import from_json
from photon_data.questions.kept import digests_of_all
from photon_data.questions.manifest import FOLDER, validate
from photon_data.records import DATASET, records_of
from photon_data.store import store_name, verify_store
from photon_pipelines.masks import verify_masks

NO_ROW = "no row in volumes.jsonl (its source is refused now, or a run was cut short): run prepare again, or remove it"


def verify_output(out: Location, progress: Callable[[int, int], object] = lambda done, total: None) -> Iterator[str]:
    """Yield what is wrong, a sentence each: files missing, changed or surplus, stores without a row, unsound manifests.

    UsageError where nothing was prepared. `progress` gets the number of stores that are checked, and of all.
    """
    records = [record for record in records_of(out) if record.is_there]
    for number, record in enumerate(records, 1):
        yield from verify_store(out, store_name(record.id), record.store_sha256)
        progress(number, len(records))
    known = {store_name(record.id) for record in records}
    for name in out.names("volumes"):
        if f"volumes/{name}" not in known:
            yield f"volumes/{name}: {NO_ROW}"
    yield from verify_masks(out, records)
    yield from _verify_manifests(out)


def _verify_manifests(out: Location) -> Iterator[str]:
    try:
        recorded = from_json(out.read(DATASET) or b"")["manifests"]
    except (ValueError, KeyError, TypeError):
        yield f"{DATASET}: not readable; run prepare again"
        return
    if recorded is None:
        yield "the last run was cut short, manifests may be old: run prepare again"
        return
    found = digests_of_all(out)
    for name in sorted({*found, *recorded}):
        if name not in found:
            yield f"{name}: missing"
        elif found[name] != recorded.get(name):
            yield f"{name}: differs from what {DATASET} records"
        elif out.is_local and name.startswith(FOLDER):
            yield from (f"{name}, {problem}" for problem in validate(out.path / name, root=out.path))
