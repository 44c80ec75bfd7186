"""The masks of a prepared folder: masks.jsonl with a row per volume, and what is wrong with the stores beside it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import product

from photon_data.errors import UsageError
from photon_data.files import Location
from photon_data.mask_store import FOLDER, REMEDY
from photon_data.records import SUFFIX, VolumeRecord, places_of, store_name, store_names
from photon_data.store import model_digest, read_metadata, verify_store

ROWS = "masks.jsonl"


def read_rows(out: Location) -> list[VolumeRecord]:
    """Return the rows of masks.jsonl, one for each volume whose masks were asked for; UsageError if damaged."""
    try:
        rows = [VolumeRecord.from_json(row) for row in out.rows(ROWS)]
        for row, (name, kind) in product(rows, (("volume", dict), ("refused", dict), ("lost", list))):
            if not isinstance((row.facts or {}).get(name, kind()), kind):
                raise ValueError(f"expected {kind.__name__} as the fact {name} of {row.id}, found another")
        return rows
    except (ValueError, TypeError) as error:
        raise UsageError(f"{out.at(ROWS)} is damaged: {error}; remove it, and {REMEDY}") from None


def write_rows(out: Location, rows: Iterable[VolumeRecord]) -> None:
    """Write masks.jsonl, whole, and take away the masks that a row refuses; without rows there is no such file."""
    by_id = {row.id: row for row in rows}
    for row in by_id.values():
        if not row.is_there:
            _remove(out, row.id)
    if by_id:
        out.write_rows(ROWS, (row.row() for _, row in sorted(by_id.items())))
    else:
        out.remove(ROWS)


def forget(out: Location, ids: Iterable[str]) -> None:
    """Take away the masks of volumes, with their rows."""
    gone = set(ids)
    for id in gone:
        _remove(out, id)
    if out.exists(ROWS):
        write_rows(out, [row for row in read_rows(out) if row.id not in gone])


def _remove(out: Location, id: str) -> None:
    for place in places_of(id, FOLDER):
        out.remove(place)


def id_at(place: str) -> str:
    """Return the id of the store at a place."""
    return place.rpartition("/")[2].removesuffix(SUFFIX)


def orphans(out: Location, records: Iterable[VolumeRecord]) -> list[str]:
    """Return the places of masks whose volume is not there."""
    there = {place_of(record) for record in records if record.is_there}
    return [place for place in store_names(out, FOLDER) if id_at(place)[0] != "." and place not in there]


def place_of(volume: VolumeRecord) -> str:
    """Return where the masks of a volume lie, or would: as deep as the volume."""
    return store_name(volume.id, volume.is_deep, FOLDER)


def is_stale(out: Location, row: VolumeRecord, volume: VolumeRecord) -> bool:
    """Tell whether masks were made for their volume as it was before."""
    digest = volume.model_sha256
    if digest is None and (metadata := read_metadata(out, volume.place)):  # rows of earlier versions
        digest = model_digest(metadata)
    return bool(row.is_there and ((row.facts or {}).get("volume") or {}).get("model_sha256") != digest)


def verify_masks(out: Location, records: Sequence[VolumeRecord]) -> Iterator[str]:
    """Yield what is wrong with the masks, a sentence each: damaged or missing, without a volume or a row, stale."""
    rows = {row.id: row for row in read_rows(out)}
    volumes = {record.id: record for record in records if record.is_there}
    for place in orphans(out, records):
        yield f"{place}: masks without a volume: prune takes them away"
    for place in store_names(out, FOLDER):
        id = id_at(place)
        if id in volumes and not (id in rows and rows[id].is_there):
            yield f"{place}: no row in {ROWS}: {REMEDY}, or remove it"
    for id, row in rows.items():
        if id in volumes and row.is_there:
            yield from verify_store(out, place_of(volumes[id]), row.store_sha256)
            if is_stale(out, row, volumes[id]):
                yield f"{place_of(volumes[id])}: made for another content or recipe of {id}: {REMEDY}"


def problems_of(row: VolumeRecord) -> list[str]:
    """Return what people should know of the masks of a volume, a sentence each: refused, or nothing left of one."""
    if not row.is_there:
        return [f"{row.state} masks of {row.id}: {row.reason}"]
    facts = row.facts or {}
    refused = [f"refused mask {name} of {row.id}: {why}" for name, why in facts.get("refused", {}).items()]
    lost = "nothing is left of it: it lies outside of the grid, or is smaller than its voxels"
    return refused + [f"mask {name} of {row.id}: {lost}" for name in facts.get("lost", ())]
