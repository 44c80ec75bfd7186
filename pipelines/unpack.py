"""Before anything is gathered: the CTs that questions ask for, out of the archives they come in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from photon_data.datasets.abdomenatlas_tree import find_cts
from photon_data.datasets.archives import Archive, find_archives, ids_known, unpack
from photon_data.datasets.base import UNPACK
from photon_data.datasets.combine import asked
from photon_data.datasets.declare import DataSet
from photon_data.errors import UsageError, first_few
from photon_data.files import Location
from photon_pipelines.lock import exclusive

# AbdomenAtlas 3.0: 571 GB of archives with 9,262 CTs.
CASE_GB = 0.062


class Pending(NamedTuple):
    """What one folder is to hold: the archives it is filled from, the ids of CTs that are asked for, and those not there."""

    folder: Path
    archives: list[Archive]
    asked: set[str]
    missing: set[str]

    @property
    def is_all(self) -> bool:
        """Whether every CT that is asked for is still to be unpacked, so that there is nothing to look at yet."""
        return self.missing == self.asked

    def __str__(self) -> str:
        """Return what unpacking would do, with its cost."""
        gigabytes = sum(archive.bytes for archive in self.archives) / 1e9
        names = first_few([archive.path.name for archive in self.archives])
        return (
            f"{len(self.archives)} archives ({names}), {gigabytes:,.1f} GB, about {gigabytes / CASE_GB:,.0f} CTs: prepare "
            f"unpacks the {len(self.missing):,} that are asked for and not there into {self.folder}, "
            f"up to about {len(self.missing) * CASE_GB:,.1f} GB"
        )


def pending(datasets: Sequence[DataSet], limit: int | None = None) -> list[Pending]:
    """Return what is to be unpacked for declared data sets, folder by folder; nothing is written. UsageError.

    Data sets that share a folder share their archives, which are then read once. `limit`: for the first CTs by id only.
    """
    folders: dict[Path, list[DataSet]] = {}
    for entry in datasets:
        if UNPACK in entry.options:
            folders.setdefault(entry.options[UNPACK], []).append(entry)
    found = []
    for folder, entries in folders.items():
        wanted, missing = set[str](), set[str]()
        for entry in entries:
            ours = set(sorted(asked(entry))[:limit])
            wanted |= ours
            missing |= ours - {source.id for source in find_cts(entry, lambda count: None)[0]}
        archives = find_archives(root for entry in entries for root in entry.roots)
        if missing and archives:
            found.append(Pending(folder, archives, wanted, missing))
    return found


def unpack_all(
    todo: Iterable[Pending],
    out: Location,
    on_archive: Callable[[str, int, int], None],
    on_note: Callable[[str], None],
) -> list[str]:
    """Unpack and return what could not be read, archive by archive. UsageError; OSError where nothing can be written.

    `on_archive` is told the archive being read, and of all archives to read the bytes that are done and that there are.
    """
    problems = []
    for one in todo:
        if out.is_local and out.path.resolve() == one.folder.resolve():
            raise UsageError(f"a folder of its own to unpack into wanted, got the output folder {one.folder}")
        with exclusive(Location(str(one.folder))):
            problems += _unpack_into(one, on_archive, on_note)
    for problem in problems:
        on_note(problem)
    return problems


def _unpack_into(todo: Pending, on_archive: Callable[[str, int, int], None], on_note: Callable[[str], None]) -> list[str]:
    missing, problems = set(todo.missing), []
    known = {archive: ids_known(archive, todo.folder) or [] for archive in todo.archives}
    to_read = [archive for archive, ids in known.items() if not ids or missing.intersection(ids)]
    done, total = 0, sum(archive.bytes for archive in to_read)
    for archive in to_read:
        if not missing:
            break
        found = unpack(archive, todo.folder, missing, partial(_tell, on_archive, archive, done, total))
        missing.difference_update(found.taken)
        problems += [f"{archive.path}: {problem}" for problem in found.problems]
        known[archive] = found.ids
        done += archive.bytes
    for note in _about_repeats(known):
        on_note(note)
    return problems


def _tell(on_archive: Callable[[str, int, int], None], archive: Archive, before: int, total: int, read: int) -> None:
    on_archive(archive.path.name, before + read, total)


def _about_repeats(ids: Mapping[Archive, Sequence[str]]) -> Iterator[str]:
    """Yield a note where archives hold a CT more than once."""
    holders: dict[str, list[str]] = {}
    for archive, names in ids.items():
        for name in names:
            holders.setdefault(name, []).append(archive.path.name)
    several = sorted(name for name, archives in holders.items() if len(archives) > 1)
    if several:
        where = ", ".join(holders[several[0]])
        yield f"{len(several)} CTs are archived more than once, {several[0]} in {where}: the first that can be read is taken"
