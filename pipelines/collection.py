"""A prepared folder as a collection, to which every run adds (docs/collection.md).

What it holds, what the next run would do, and what can go (`prepare.prune`); what a run left; to which scan an id
belongs, and where its store lies: earlier runs, namesakes, moved scans, withdrawn volumes.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from photon_data.bucket import source_at_hand
from photon_data.errors import UsageError, first_few
from photon_data.files import Location, fingerprint, is_safe
from photon_data.mask_store import id_at, read_rows
from photon_data.mask_store import orphans as masks_alone
from photon_data.override import SKIPPED
from photon_data.private import HEADERS, KEYED, private_folder, read_key
from photon_data.questions.manifest import Manifests
from photon_data.questions.splits import Count
from photon_data.readers.find import find_scans
from photon_data.readers.object_path import is_there, source_path
from photon_data.records import (
    MANY,
    PRUNED,
    REFUSED,
    STATES,
    SUFFIX,
    SomeWork,
    VolumeRecord,
    places_of,
    record_of,
    records_of,
    store_names,
)
from photon_data.scan import Source, is_url, place_name
from photon_data.store import read_metadata


class SourceStatus(NamedTuple):
    """What a prepared folder knows of one source folder, and what the next run would find there."""

    root: str
    there: int  # volumes with a store
    codes: Mapping[str, int]  # why others have none
    unchanged: int
    changed: int
    new: int  # scans without a row: of a data set, also those that no question needs
    gone: list[VolumeRecord] | None  # volumes whose scan is not there; None where the folder itself is not


def status(out: Location) -> list[SourceStatus]:
    """Return the state of each source folder of a prepared one. UsageError where nothing was prepared."""
    records, masks, private = records_of(out), read_rows(out), private_folder(out)
    headers = str(private / HEADERS) if private.exists() else ""
    return [
        _status(
            root, [r for r in records if r.root == root], [row.source for row in masks if row.root == root], headers
        )
        for root in sorted({r.root or "" for r in records})
    ]


def _status(root: str, records: Sequence[VolumeRecord], masks: Sequence[str], headers: str) -> SourceStatus:
    codes: dict[str, int] = {}
    for record in records:
        if not record.is_there:
            codes[str(record.code)] = codes.get(str(record.code), 0) + 1
    there, sources = len(records) - sum(codes.values()), _sources(root, headers)
    if sources is None:
        return SourceStatus(root, there, codes, 0, 0, 0, None)
    found = [(record, sources[record.source]) for record in records if record.source in sources]
    blocked = tuple(source.path.rstrip("#") for source in sources.values() if source.problem)
    same = sum((record.bytes_in, record.mtime_ns) == (source.bytes, source.mtime_ns) for record, source in found)
    # Nothing is known of what lies in a folder that cannot be listed.
    gone = [r for r in records if r.source not in sources and not any(_is_below(r.source, path) for path in blocked)]
    strangers = _without_masks(sources.keys() - {record.source for record in records}, masks)
    return SourceStatus(root, there, codes, same, len(found) - same, len(strangers), gone)


def _without_masks(paths: Iterable[str], masks: Iterable[str]) -> list[str]:
    """Return the paths that are not among the files, folders and globs that masks were made from."""
    places, globs = set(masks), dict[str, list[str]]()
    for place in places:
        globs.setdefault(str(PurePosixPath(place).parent), []).append(place)

    def is_mask(path: str) -> bool:
        parents = list(map(str, PurePosixPath(path).parents))
        fitting = (one for one in globs.get(parents[0], ()) if fnmatchcase(path, one))
        return not places.isdisjoint([path, *parents]) or any(fitting)

    return [path for path in paths if not is_mask(path)]


def _is_below(path: str, folder: str) -> bool:
    return folder in ("", ".") or path == folder or path.startswith((f"{folder}/", f"{folder}#"))


def _sources(root: str, headers: str) -> dict[str, Source] | None:
    """Return the scans of a source folder by their paths; None where it is not there now, or empty: not mounted.

    Of a URL, what the folder `headers` keeps is not read again, see `find_scans`.
    """
    if not root or not (is_url(root) or Path(root).is_dir()):
        return None
    try:
        found = find_scans(source_path(root), headers=headers if is_url(root) else "")
    except UsageError:
        return None
    return {source.path: source for source in found.sources} or None


def to_prune(out: Location, ids: Iterable[str] | None = None) -> dict[str, str]:
    """Return {id: why} of the volumes that `prune` takes away: those in `ids`, or all that have no scan any more.

    A volume goes when its scan is gone from its source folder (if that is there), when its scan is refused now, and
    when volumes.jsonl has no row of it. UsageError for ids that the folder does not have.
    """
    records = {record.id: record for record in records_of(out)}
    stores = {record.place for record in records.values()}
    lying = [(place, place.rpartition("/")[2]) for place in store_names(out)]
    orphans = [name for place, name in lying if name[0] != "." and place not in stores and is_safe(name)]
    if ids is not None:
        asked = list(dict.fromkeys(ids))
        if unknown := [id for id in asked if id not in records]:
            raise UsageError(f"expected ids of volumes in {out.url}, found {len(unknown)} others: {first_few(unknown)}")
        return dict.fromkeys(asked, "named")
    gone = (record for part in status(out) for record in part.gone or () if record.code != PRUNED)
    found = {record.id: "its scan is gone" for record in gone}
    found |= {id: f"refused now: {r.reason}" for id, r in records.items() if not r.is_there and out.exists(r.place)}
    found |= {name.removesuffix(SUFFIX): "no row in volumes.jsonl" for name in orphans}
    return dict.fromkeys(map(id_at, masks_alone(out, records.values())), "masks without a volume") | found


# --- what a run left


class Result(NamedTuple):
    """What a run left."""

    records: list[VolumeRecord]  # of its inputs
    kept: list[VolumeRecord]  # as in the plan
    manifests: Manifests  # no rows where splits leak
    counts: list[Count]  # what the questions are, by data set, task and split
    differences: list[str]  # from the lock of the request
    left: list[str]  # ids of rows that manifests had before, and have no more
    leak: str | None  # what several splits have in common; None where they are apart, or where leaks are allowed
    damaged: Sequence[str]  # the archives that could not be unpacked as a whole, and why
    masks: Sequence[VolumeRecord] = ()  # what became of the masks of its volumes

    @property
    def states(self) -> dict[str, int]:
        """How many inputs ended in each state; they add up to all inputs."""
        return count_states(self.records)

    @property
    def complete(self) -> bool:
        """Whether every input has its store and every question its row."""
        has_stores = all(one.is_there or one.code == SKIPPED for one in [*self.records, *self.masks])
        is_whole = self.leak is None and not self.damaged and not self.differences
        has_masks = not any((row.facts or {}).get("refused") for row in self.masks)
        return has_stores and has_masks and not self.manifests.unmatched and is_whole


def count_states(records: Sequence[VolumeRecord]) -> dict[str, int]:
    """Return {state: number of records} with every state."""
    found = Counter(record.state for record in records)
    return {state: found[state] for state in STATES}


# --- whose an id is


def ids_of_earlier_runs(source: Path, out: Location, id_prefix: str, records: Sequence[VolumeRecord]) -> dict[str, str]:
    """Return the ids that scans of the source have in OUT, by their paths; UsageError where their names are lost."""
    source = source.absolute()
    refuse_lost_names(out, records)
    root, found = place_name(source if source.is_dir() else source.parent), {}
    roots = {record.root for record in records}  # a URL did not move because a store does not answer
    unclear = {place for place in roots if place is None or not (is_url(place) or Path(place).exists())}
    for record in sorted(records, key=lambda record: record.root == root):  # a root that is not recorded, or that moved
        if record.root == root or (record.root in unclear and record.id.startswith(id_prefix)):
            found[record.source] = record.id
    return found


def notes_of_old_ids(sources: Sequence[Source]) -> list[str]:
    """Return a sentence about scans that have ids made from names, which stay."""
    old = [source.id for source in sources if source.hidden and not KEYED.search(source.id)]
    remedy = "prepare into another folder to have keyed ones"
    return [f"{len(old)} scans keep ids that were made from names, {old[0]} first; {remedy}"] if old else []


def refuse_lost_names(out: Location, records: Iterable[VolumeRecord]) -> None:
    """UsageError where rows hide names that are in no private file: nobody could tell whose ids they are."""
    hidden = [record for record in records if record.hidden]
    key = read_key(out) if hidden else None
    if any(not (record.root and (key or not KEYED.search(record.id))) for record in hidden):
        expected = f"{private_folder(out)} with the key and the names of {out.url}"
        raise UsageError(f"expected {expected}, found none; bring it back, or use another output folder")


def refuse_namesakes(
    sources: Sequence[Source],
    records: Sequence[VolumeRecord],
    out: Location,
    strays: Collection[str],
    together: Collection[str] = (),
    *,
    overwrite: bool = False,
) -> None:
    """UsageError for scans whose ids belong to other scans, and for scans that have another id already.

    `strays` are the places of stores that no row names.
    The folders of `together`, those of declared data sets, are looked through together: which of two scans of one id is
    meant is known then.
    """
    known = {record.id: record for record in records if record.is_there}
    # Most have the id and the place of their row. The others alone are looked up, which takes memory.
    sources = [source for source in sources if not _is_at(known.get(source.id), source)]
    folded = {source.id.casefold() for source in sources}
    places = {_path(source.root, source.path) for source in sources}
    owners = {id_: record for record in records if (id_ := record.id.casefold()) in folded}
    ids = {place: r.id for r in known.values() if r.root and (place := _path(r.root, r.source)) in places}
    found = []
    for source in sources:
        owner, place = owners.get(source.id.casefold()), _path(source.root, source.path)
        if owner is not None and owner.root not in together and not _is_same_scan(source, owner, overwrite):
            found.append(f"{source.id} is {_place(owner.hidden, owner.source, owner.root)}, not {_place_of(source)}")
        elif ids.get(place, source.id) != source.id:
            found.append(f"{_place_of(source)} is {ids[place]}, not {source.id}")
        elif owner is None and _is_stray_of_another(source, strays, out):
            found.append(f"{source.id} is a store without a row in volumes.jsonl, and of another scan")
    if found:
        remedy = "give the scans of this source other ids with --id-prefix NAME, or prune what is gone"
        raise UsageError(f"expected ids that nobody has in {out.url}, found {len(found)}: {first_few(found)}; {remedy}")


def _path(root: str, path: str) -> str:
    return os.path.join(root, path)  # noqa: PTH118 - not a file


def _place(hidden: bool, path: str, root: str | None) -> str:
    return "a scan of another source" if hidden else f"{path} of {root or 'a source that is not recorded'}"


def _place_of(source: Source) -> str:
    return "this one" if source.hidden else f"{source.path} of {source.root}"


def _is_at(owner: VolumeRecord | None, source: Source) -> bool:
    return owner is not None and (owner.root, owner.source) == (source.root, source.path)


def _is_same_scan(source: Source, owner: VolumeRecord, overwrite: bool) -> bool:
    """Tell whether a record is of this scan: at its place, its successor there, or the same content moved."""
    if owner.root is None and overwrite:
        return True
    if _is_at(owner, source):
        return True
    if owner.root == source.root:
        return not is_there(owner.root, owner.source.partition("#")[0])
    if owner.source != source.path or owner.bytes_in != source.bytes:
        return False
    if not owner.is_there:  # nothing is lost: it is read again
        return True
    return owner.mtime_ns == source.mtime_ns or owner.fingerprint == _fingerprint(source)


def _is_stray_of_another(source: Source, strays: Collection[str], out: Location) -> bool:
    """Tell whether there is a store of this id that no row knows, made from another content."""
    found = [read_metadata(out, place) for place in places_of(source.id) if place in strays]
    return any(metadata and metadata["fingerprint"] != _fingerprint(source) for metadata in found)


def _fingerprint(source: Source) -> str:
    """Return the fingerprint of a source's content; objects are fetched for it."""
    with source_at_hand(source) as at_hand:
        return fingerprint(at_hand.files)


def without_withdrawn(
    jobs: Sequence[SomeWork], records: Sequence[VolumeRecord]
) -> tuple[list[SomeWork], list[VolumeRecord]]:
    """Return the jobs without those whose scans `prune` took away for good, and the records of these."""
    gone = _withdrawn([job.source for job in jobs], records)
    pairs = [(job, gone[job.source.id]) for job in jobs if job.source.id in gone]
    left_out = [record_of(job, REFUSED, code=PRUNED, reason=r.reason, fingerprint=r.fingerprint) for job, r in pairs]
    return [job for job in jobs if job.source.id not in gone], left_out


def _withdrawn(sources: Iterable[Source], records: Iterable[VolumeRecord]) -> dict[str, VolumeRecord]:
    """Return {id: row of what was taken away} of scans that `prune` took by name: by their place, or by content."""
    pruned = [record for record in records if record.code == PRUNED]
    places = {(record.root, record.source): record for record in pruned}
    contents = {record.fingerprint: record for record in pruned if record.fingerprint}
    sizes, found = {record.bytes_in for record in pruned}, {}
    for source in sources:
        known = places.get((source.root, source.path))
        if known is None and contents and source.bytes in sizes:
            known = contents.get(_fingerprint(source))
        if known is not None:
            found[source.id] = known
    return found


def deep_ids(ids: Iterable[str], before: Mapping[str, VolumeRecord], strays: Collection[str]) -> set[str]:
    """Return which scans have their stores in one of 256 folders: as their rows say, else if there will be many.

    One among the `strays`, which no row names, is replaced where it lies: no scan gets two stores.
    """
    ids = set(ids)
    are_many = len(before.keys() | ids) >= MANY

    def is_deep(id: str) -> bool:
        row = before.get(id)
        if row and row.store:
            return row.is_deep
        flat, shelved = places_of(id)
        return shelved in strays or (are_many and flat not in strays)

    return {id for id in ids if is_deep(id)}
