"""The visible files below a folder, each with what tells it from all others: links are followed, never in circles."""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from photon_data.readers.object_path import ObjectPath

HIDDEN_FOLDERS = ("__MACOSX",)
# What is in a folder that photon-data prepare or export wrote: no raw data.
OURS = (("dataset.json", "volumes.jsonl"), ("export.json", "volumes"))
# What a folder holds beside files, as it is counted.
LINK, BROKEN, SPECIAL = "(link)", "(link to a file that is not there)", "(special file)"
WRITTEN, NO_PATH = "(prepared or exported folder)", "(name that is no path)"

Identity = tuple[int, int] | str


class File(NamedTuple):
    """One file of a tree."""

    path: Path  # as it was reached
    identity: Identity | None  # device and inode; None where the system does not tell them
    by_link: bool


class Tree:
    """The files below a folder (or the one file it is).

    Files that lie there come first, then those that links to files lead to, then those behind links to folders; links
    go by name. A folder is entered once; one that holds the place where a walk began is not entered by a link.
    """

    def __init__(self, start: Path, *, follow_links: bool = True) -> None:
        self.start, self.follow_links = start, follow_links
        self.counts: Counter[str] = Counter()  # of what is no file and not followed
        if isinstance(start, ObjectPath):
            self.counts[NO_PATH] += start.objects.listing.unsafe
        self.closed: list[tuple[Path, OSError]] = []  # folders that cannot be listed
        self._links: list[Path] = []
        self._entered: set[Identity] = set()
        self._began: list[Path] = [Path(os.path.realpath(start))]

    def folders(self) -> Iterator[list[File]]:
        """Yield the files, those of one folder together."""
        if not self.start.is_dir():
            yield [File(self.start, _identity(self.start), by_link=False)]
            return
        yield from self._below(self.start, by_link=False)
        while self._links:
            links, self._links = sorted(self._links), []
            yield [file for link in links if (file := self._target(link))]
            for link in links:
                if link.is_dir() and self._may_enter(link):
                    self._began.append(Path(os.path.realpath(link)))
                    yield from self._below(link, by_link=True)

    def _below(self, folder: Path, *, by_link: bool) -> Iterator[list[File]]:
        def closed(error: OSError) -> None:
            self.closed.append((Path(error.filename), error))

        walk = folder.walk_there() if isinstance(folder, ObjectPath) else os.walk(folder, onerror=closed)
        for place, folders, names in walk:
            here = Path(place) if isinstance(place, str) else place
            identity = _identity(here)
            if by_link and identity in self._entered:
                folders.clear()
                continue
            if identity is not None:
                self._entered.add(identity)
            links = [name for name in folders if (here / name).is_symlink()]
            ours = [name for name in folders if _is_ours(here / name)]
            self.counts[WRITTEN] += len(ours)
            folders[:] = sorted(n for n in folders if n not in links and n not in ours and not is_hidden(n))
            visible = [here / name for name in sorted(names + links) if not is_hidden(name)]
            yield [file for path in visible if (file := self._file(path, by_link=by_link))]

    def _file(self, path: Path, *, by_link: bool) -> File | None:
        """Return a file that lies in a folder; links are kept for later, other things are counted."""
        try:
            facts = path.lstat()
        except OSError:
            return File(path, None, by_link)  # it is there and cannot be read: opening it says why
        if stat.S_ISREG(facts.st_mode):
            return File(path, _identity_of(path, facts), by_link)
        if not stat.S_ISLNK(facts.st_mode):
            self.counts[SPECIAL] += 1
        elif self.follow_links:
            self._links.append(path)
        else:
            self.counts[LINK] += 1
        return None

    def _target(self, link: Path) -> File | None:
        """Return the file that a link leads to, None for a folder; what leads nowhere is counted."""
        try:
            facts = link.stat()
        except PermissionError:
            return File(link, None, by_link=True)
        except OSError:
            self.counts[BROKEN] += 1
            return None
        if stat.S_ISREG(facts.st_mode):
            return File(link, _identity_of(link, facts), by_link=True)
        self.counts[SPECIAL] += not stat.S_ISDIR(facts.st_mode)
        return None

    def _may_enter(self, link: Path) -> bool:
        """Tell whether a link leads to a folder that was not entered and does not hold one where a walk began."""
        target = Path(os.path.realpath(link))
        is_above = any(start != target and start.is_relative_to(target) for start in self._began)
        self.counts[LINK] += is_above
        return not is_above and _identity(link) not in self._entered


def _is_ours(folder: Path) -> bool:
    def exists(path: Path) -> bool:
        return path.exists() if isinstance(path, ObjectPath) else os.path.exists(path)  # noqa: PTH110 - never raises

    return any(all(exists(folder / name) for name in names) for names in OURS)


def matches(parts: tuple[str, ...], glob: str) -> bool:
    """Tell whether a glob is for a path with these parts, or for a folder above it; see `find.find_scans`."""
    glob = glob.removeprefix("./").rstrip("/")
    if "/" not in glob:
        return any(fnmatchcase(part, glob) for part in parts)
    paths = ["/".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return any(fnmatchcase(path, shorter) for path in paths for shorter in (glob, glob.removeprefix("**/")))


def is_hidden(name: str) -> bool:
    """Tell whether a file or folder of this name is passed over."""
    return name.startswith(".") or name in HIDDEN_FOLDERS


def _identity(path: Path) -> Identity | None:
    try:
        return _identity_of(path, path.stat())
    except OSError:
        return None


def _identity_of(path: Path, facts: os.stat_result) -> Identity:
    if isinstance(path, ObjectPath):
        return str(path)
    # Some network file systems have no inodes.
    return (facts.st_dev, facts.st_ino) if facts.st_ino else os.path.realpath(path)


def facts_of(file: Path) -> tuple[int, int]:
    """Return the size and the time (of an object, its mark) of a file; OSError."""
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def require_readable(file: Path) -> None:
    """PermissionError for a local file that we may not read."""
    if not isinstance(file, ObjectPath) and not os.access(file, os.R_OK):
        raise PermissionError(errno.EACCES, "permission denied")
