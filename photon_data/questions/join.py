"""The name by which a table calls a volume -> the one volume that is meant, or why there is none. Never a guess."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import cache

from photon_data.errors import first_few
from photon_data.records import VolumeRecord
from photon_data.scan import Source

# What a scan's file name can end with and its volume's name does without.
SCAN_SUFFIXES = (".nii.gz", ".nii", ".hdr", ".img.gz", ".img", ".nrrd", ".nhdr", ".mha", ".mhd", ".dcm")

AMBIGUOUS = "ambiguous"


def by_name(records: Iterable[VolumeRecord]) -> Callable[[str], VolumeRecord | str]:
    """Return a function that finds the record of a name; it returns the reason instead where the name is not one volume.

    A name is compared with ids; where none is equal, with source paths; where none is equal, with source paths without the
    scan's suffix and with file names, with suffix or without. Refused and failed volumes are found as well.
    """
    records = list(records)

    @cache  # most tables use ids, and the other indices take as long as all questions together
    def index(names: Callable[[VolumeRecord], set[str]]) -> dict[str, list[VolumeRecord]]:
        return _index(records, names)

    def find(name: str) -> VolumeRecord | str:
        found = next((level[name] for level in map(index, (_id, _source, _short_names)) if name in level), [])
        if not found:
            return "no such volume"
        if len(found) > 1:
            sources = first_few([record.source for record in found])
            return f"{AMBIGUOUS}: {len(found)} volumes have this name ({sources})"
        return found[0]

    return find


def by_source(sources: Iterable[Source]) -> Callable[[str], str]:
    """Return a function that finds the id of the source of a name, by the same rules; the reason where there is not one."""
    find = by_name(VolumeRecord(source.id, source.path, "", source.bytes, source.mtime_ns) for source in sources)

    def find_id(name: str) -> str:
        found = find(name)
        return found if isinstance(found, str) else found.id

    return find_id


def _index(records: list[VolumeRecord], names: Callable[[VolumeRecord], set[str]]) -> dict[str, list[VolumeRecord]]:
    index: dict[str, list[VolumeRecord]] = defaultdict(list)
    for record in sorted(records, key=lambda record: (record.source, record.id)):
        for name in names(record):
            index[name].append(record)
    return dict(index)


def _id(record: VolumeRecord) -> set[str]:
    return {record.id}


def _source(record: VolumeRecord) -> set[str]:
    return {record.source}


def _short_names(record: VolumeRecord) -> set[str]:
    base = record.source.rpartition("/")[2]
    return {_stem(record.source), base, _stem(base)}


def _stem(name: str) -> str:
    """Return a file name without its scan suffix: scan.v2.nii.gz -> scan.v2."""
    suffix = next((suffix for suffix in SCAN_SUFFIXES if name.lower().endswith(suffix)), "")
    return name[: len(name) - len(suffix)]
