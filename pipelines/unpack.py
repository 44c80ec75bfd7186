"""The step before a prepare run reads its data sets: the CTs that their questions ask for, out of archives."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from photon_data.datasets.abdomenatlas import find_archives, find_cts, known_ids, unpack
from photon_data.datasets.base import UNPACK, DataSet
from photon_data.datasets.combine import requested_volumes
from photon_data.errors import UsageError, first_few
from photon_data.files import Location
from photon_data.lock import exclusive

# AbdomenAtlas 3.0: 571 GB of archives with 9,262 CTs.
CASE_GB = 0.062


class Pending(NamedTuple):
    """The work for one folder."""

    folder: Path
    archives: list[Path]  # to read
    requested: set[str]  # ids of CTs
    missing: set[str]  # of these, the ones that are not there

    @property
    def is_all(self) -> bool:
        """Whether every requested CT is still to be unpacked, so that there is nothing to look at yet."""
        return self.missing == self.requested

    def __str__(self) -> str:
        """Return what unpacking would do, with its cost."""
        gigabytes = sum(path.stat().st_size for path in self.archives) / 1e9
        names = first_few([path.name for path in self.archives])
        return (
            f"{len(self.archives)} archives ({names}), {gigabytes:,.1f} GB, about {gigabytes / CASE_GB:,.0f} CTs: "
            f"prepare unpacks the {len(self.missing):,} that are asked for and not there into {self.folder}, "
            f"up to about {len(self.missing) * CASE_GB:,.1f} GB"
        )


def pending(datasets: Iterable[DataSet], limit: int | None = None) -> list[Pending]:
    """Return what is to be unpacked for declared data sets, folder by folder; nothing is written. UsageError.

    Data sets that share a folder share their archives, which are then read once. `limit`: for the first CTs by id only.
    """
    folders: dict[Path, list[DataSet]] = defaultdict(list)
    for entry in datasets:
        if UNPACK in entry.options:
            folders[entry.options[UNPACK]].append(entry)
    found = []
    for folder, entries in folders.items():
        requested, missing = set[str](), set[str]()
        for entry in entries:
            ids = set(sorted(requested_volumes(entry))[:limit])
            requested |= ids
            missing |= ids - {volume.source.id for volume in find_cts(entry, lambda count: None).volumes}
        archives = find_archives(root for entry in entries for root in entry.roots)
        if missing and archives:
            found.append(Pending(folder, archives, requested, missing))
    return found


# A callback; it gets the name of the archive being read, and of all archives together the bytes done and the total.
OnArchive = Callable[[str, int, int], None]
# A callback; it gets a sentence for the user.
OnNote = Callable[[str], None]


def unpack_all(todo: Iterable[Pending], out: Location, on_archive: OnArchive, on_note: OnNote) -> list[str]:
    """Unpack and return what could not be read, archive by archive. UsageError; OSError if nothing can be written."""
    problems = []
    for one in todo:
        if out.is_local and out.path.resolve() == one.folder.resolve():
            raise UsageError(f"expected a folder of its own to unpack into, found the output folder {one.folder}")
        with exclusive(Location(str(one.folder))):
            problems += _unpack_into_folder(one, on_archive, on_note)
    for problem in problems:
        on_note(problem)
    return problems


def _unpack_into_folder(todo: Pending, on_archive: OnArchive, on_note: OnNote) -> list[str]:
    missing, problems, done = set(todo.missing), [], 0
    ids = {path: known_ids(path, todo.folder) or [] for path in todo.archives}
    to_read = {path: path.stat().st_size for path in todo.archives if not ids[path] or missing.intersection(ids[path])}
    for path, size in to_read.items():
        if not missing:
            break

        def on_bytes(count: int, name: str = path.name, before: int = done) -> None:
            on_archive(name, before + count, sum(to_read.values()))

        found = unpack(path, todo.folder, missing, on_bytes)
        missing.difference_update(found.taken)
        problems += [f"{path}: {problem}" for problem in found.problems]
        ids[path] = found.ids
        done += size
    counts = Counter(name for names in ids.values() for name in names)
    if several := sorted(name for name, count in counts.items() if count > 1):
        where = f"{several[0]} in {', '.join(path.name for path, names in ids.items() if several[0] in names)}"
        on_note(f"{len(several)} CTs are archived more than once, {where}: the first that can be read is taken")
    return problems
