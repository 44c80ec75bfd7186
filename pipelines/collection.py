"""A prepared folder as a collection: what it holds, what the next run would do, and what can go (`prepare.prune`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from photon_data.errors import UsageError, first_few
from photon_data.files import Location, is_safe
from photon_data.mask_store import id_at, read_rows
from photon_data.mask_store import orphans as masks_alone
from photon_data.readers.find import find_scans
from photon_data.records import PRUNED, SUFFIX, VolumeRecord, records_of, store_names
from photon_data.scan import Source


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
    records, masks = records_of(out), read_rows(out)
    return [
        _status(root, [r for r in records if r.root == root], [row.source for row in masks if row.root == root])
        for root in sorted({r.root or "" for r in records})
    ]


def _status(root: str, records: Sequence[VolumeRecord], masks: Sequence[str]) -> SourceStatus:
    codes: dict[str, int] = {}
    for record in records:
        if not record.is_there:
            codes[str(record.code)] = codes.get(str(record.code), 0) + 1
    there, sources = len(records) - sum(codes.values()), _sources(root)
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


def _sources(root: str) -> dict[str, Source] | None:
    """Return the scans of a source folder by their paths; None where it is not there now, or empty: not mounted."""
    if not root or not Path(root).is_dir():
        return None
    return {source.path: source for source in find_scans(Path(root)).sources} or None


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
