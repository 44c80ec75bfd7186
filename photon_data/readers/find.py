"""Names for volumes, made from where their files lie: safe in file systems and URLs, one per scan, the same in every run.

A folder -> the scans in it, from names and a glance at headers; no voxel is read and nothing in it can stop the search.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from photon_data.errors import Refused, UsageError
from photon_data.readers import dicom, metaimage, nifti, nrrd
from photon_data.readers.checks import unreadable
from photon_data.readers.stream import HEAD_BYTES, is_dicom, read_head
from photon_data.scan import Source

ID_FROM = ("path", "name", "hash")
MAX_LENGTH = 150
# Digits of the path's hash that tell names apart: none where the name is free, more while two are still the same.
DIGITS = (0, 6, 16, 64)


class Named(NamedTuple):
    """What a scan's id is made from: its path relative to the source, and the words of that path without the scan's suffix."""

    path: str
    words: tuple[str, ...]


def assign_ids(scans: Sequence[Named], id_from: str) -> list[str]:
    """Return an id for each scan, no two alike even where case does not count; UsageError for an unknown `id_from`.

    path: a/b/x.nii.gz -> "a__b__x"      name: -> "x"      hash: -> "v" + 12 digits of the path's sha256, which names nobody

    What is not A-Z a-z 0-9 . _ - becomes "-". Where that changed a name, cut it to 150 characters, or where two scans would
    share it, 6 digits of the hash of its path (with suffix) are appended.
    """
    if id_from not in ID_FROM:
        raise UsageError(f"ids from path, name or hash wanted, got {id_from!r}")
    if id_from == "hash":
        return [f"v{_digest(scan.path)[:12]}" for scan in scans]
    words = [scan.words if id_from == "path" else scan.words[-1:] for scan in scans]
    plain = ["__".join(w) for w in words]
    levels = [0 if name == _safe(name) else 1 for name in plain]
    while True:
        ids = [_name(_safe(name), scan.path, DIGITS[level]) for name, scan, level in zip(plain, scans, levels, strict=True)]
        count = Counter(name.casefold() for name in ids)
        shared = [count[name.casefold()] > 1 for name in ids]
        if not any(shared):
            return ids
        levels = [level + clash for level, clash in zip(levels, shared, strict=True)]


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip(".-")[: MAX_LENGTH - 1 - DIGITS[1]] or "v"


def _name(safe: str, path: str, digits: int) -> str:
    return f"{safe[: MAX_LENGTH - 1 - digits]}-{_digest(path)[:digits]}" if digits else safe


def _digest(path: str) -> str:
    return hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()


class _Kind(NamedTuple):
    """A file format by its name, and where the voxels of a header of it lie."""

    name: str
    data_file: Callable[[Path], Path]


NIFTI = _Kind(nifti.NAME, nifti.data_file)
NRRD = _Kind(nrrd.NAME, nrrd.data_file)
META = _Kind(metaimage.NAME, metaimage.data_file)
# Longest first: x.nii.gz loses all of .nii.gz.
SUFFIXES = {
    ".nii.gz": NIFTI,
    ".hdr.gz": NIFTI,
    ".nii": NIFTI,
    ".hdr": NIFTI,
    ".nrrd": NRRD,
    ".nhdr": NRRD,
    ".mha": META,
    ".mhd": META,
}
DICOM_SUFFIXES = (".dcm", ".ima", ".dicom")
DICOM, FOLDER = "dicom", "folder"
HIDDEN_FOLDERS = ("__MACOSX",)
# What is counted of files that are no scans; a longer "suffix" may be a piece of somebody's name.
MAX_SUFFIX = 6
LINK, SPECIAL, NO_IMAGE, SCOUT = "(link)", "(special file)", "(DICOM without image)", "(DICOM scout, no CT volume)"
NO_SUFFIX, OTHER = "(no suffix)", "(other)"


class Found(NamedTuple):
    """The scans of a folder, sorted by path, and how many other files it has of each suffix (or of each "(kind)")."""

    sources: list[Source]
    ignored: dict[str, int]


def left_alone(ignored: Mapping[str, int]) -> str:
    """Return `Found.ignored` in words, "2 (DICOM scout, no CT volume), 5 .txt"."""
    return ", ".join(f"{count} {kind}" for kind, count in ignored.items()) or "nothing"


@dataclass
class _Finding:
    """What has been found so far: sources that still lack an id, what ids are made from, and what is left over."""

    root: Path
    sources: list[tuple[Named, Source]] = field(default_factory=list)
    leftover: list[Path] = field(default_factory=list)
    claimed: set[Path] = field(default_factory=set)
    ignored: Counter[str] = field(default_factory=Counter)

    def add(self, words: tuple[str, ...], path: str, files: tuple[Path, ...], kind: str, why: Refused | None = None) -> None:
        """Add one source; `words` name it, `path` is relative to the root, `why` says that it cannot become a volume."""
        size, mtime_ns, unread = _measure(files)
        why = why or unread
        source = Source("", path, files, kind, size, mtime_ns)
        self.sources.append((Named(path, words), replace(source, problem=why.message, code=why.code) if why else source))

    def place(self, path: Path) -> tuple[str, ...]:
        """Return the parts of a path below the root."""
        return path.relative_to(self.root).parts

    def counts(self) -> dict[str, int]:
        """Return how many files were left aside, by suffix; data files of headers belong to their scans."""
        rest = Counter(_suffix(path) for path in self.leftover if path not in self.claimed)
        return dict(sorted((self.ignored + rest).items()))


def find_scans(root: Path, *, id_from: str = "path", on_file: Callable[[int], None] | None = None) -> Found:
    """Return the scans below `root` (or the one file it is) and what was left aside.

    Recursive and sorted. Hidden files and folders, AppleDouble files and __MACOSX are passed over. Links are not followed: one
    into the root leads to a file that is found anyway (or hidden, as DataLad keeps them: that one is taken), others are counted
    as ignored. A file with a scan's suffix is always a source, whatever it holds; opening it says what is wrong. What cannot be
    read is a source with its `problem` set. `on_file` is called with the number of files seen so far.

    UsageError where there is no `root`, or `id_from` is not path, name or hash (see `assign_ids`).
    """
    if not root.exists():
        raise UsageError(f"a folder or a file with scans wanted, there is no {root}")
    root = root.absolute()
    finding = _Finding(root if root.is_dir() else root.parent)
    seen = 0
    for folder in _folders(root, finding):
        ours = []
        for path in folder:
            seen += 1
            if on_file:
                on_file(seen)
            if path == root or _is_ours(path, finding):
                ours.append(path)
        _sort_out(ours, finding)
    pairs = sorted(finding.sources, key=lambda pair: pair[0].path)
    ids = assign_ids([named for named, _ in pairs], id_from)
    return Found([replace(source, id=name) for name, (_, source) in zip(ids, pairs, strict=True)], finding.counts())


def _folders(root: Path, finding: _Finding) -> Iterator[list[Path]]:
    """Yield the visible entries that are no folders, folder by folder; a folder that cannot be listed becomes a source."""
    if not root.is_dir():
        yield [root]
        return

    def closed(error: OSError) -> None:
        place = finding.place(Path(error.filename))
        why = Refused("unreadable", f"a folder that can be listed wanted: {error.strerror}; change its permissions")
        finding.add(place or (finding.root.name,), "/".join(place) or ".", (), FOLDER, why)

    for here, folders, names in os.walk(root, onerror=closed):
        links = [name for name in folders if Path(here, name).is_symlink()]
        folders[:] = sorted(name for name in folders if name not in links and not _is_hidden(name))
        yield [Path(here, name) for name in sorted(names + links) if not _is_hidden(name)]


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in HIDDEN_FOLDERS


def _is_ours(path: Path, finding: _Finding) -> bool:
    """Tell whether an entry of a folder is to be looked at; links and special files that are not are counted."""
    try:
        mode = path.lstat().st_mode
    except OSError:
        return True  # it is there and cannot be read: a source with a problem
    if stat.S_ISLNK(mode):
        return _is_link_ours(path, finding)
    if not stat.S_ISREG(mode):
        finding.ignored[SPECIAL] += 1
    return stat.S_ISREG(mode)


def _is_link_ours(path: Path, finding: _Finding) -> bool:
    """Tell whether a link leads to a file of the root that is found in no other way, because it is hidden."""
    root, target = finding.root.resolve(), Path(os.path.realpath(path))
    if not target.is_relative_to(root) or not target.exists():
        finding.ignored[LINK] += 1
        return False
    is_found_anyway = not any(_is_hidden(part) for part in target.relative_to(root).parts)
    if not is_found_anyway and not target.is_file():
        finding.ignored[LINK] += 1
    return not is_found_anyway and target.is_file()


def _sort_out(files: Iterable[Path], finding: _Finding) -> None:
    """Add the sources among the files of one folder."""
    slices = []
    for path in files:
        suffix = next((s for s in SUFFIXES if path.name.lower().endswith(s)), None)
        if suffix:
            _add_file(path, suffix, finding)
        elif _may_be_dicom(path):
            slices.append(path)
        else:
            finding.leftover.append(path)
    if slices:
        _add_dicom(slices, finding)


def _add_file(path: Path, suffix: str, finding: _Finding) -> None:
    kind = SUFFIXES[suffix]
    try:
        data = kind.data_file(path)
    except (Refused, OSError):
        data = path  # opening the source says what is wrong with it
    finding.claimed.add(data)
    place = finding.place(path)
    words = (*place[:-1], path.name[: -len(suffix)])
    finding.add(words, "/".join(place), (path,) if data == path else (path, data), kind.name)


def _may_be_dicom(path: Path) -> bool:
    """Tell whether a name says so, or a name without a suffix (UIDs end in numbers) whose file has the magic or is unreadable."""
    name = path.name.lower()
    if name.endswith(DICOM_SUFFIXES):
        return True
    if name == "dicomdir" or not (path.suffix == "" or path.suffix[1:].isdigit()):
        return False
    try:
        return is_dicom(read_head(path, HEAD_BYTES))
    except OSError:
        return True


def _add_dicom(files: list[Path], finding: _Finding) -> None:
    """Add the series among the DICOM files of one folder, and each file that is unreadable or damaged."""
    place = finding.place(files[0])[:-1]
    try:
        grouped = dicom.group_series(files)
    except Refused as refused:
        finding.add((*place, "s"), "/".join(place) + "#", tuple(files), DICOM, refused)
        return
    for key, members in grouped.series:
        words = (*place[:-1], f"{place[-1]}__s{key}") if place else (f"s{key}",)
        finding.add(words, "/".join(place) + f"#{key}", tuple(members), DICOM)
    for path, why in grouped.unreadable:
        finding.add((*place, path.name), "/".join((*place, path.name)), (path,), DICOM, why)
    finding.ignored.update({NO_IMAGE: grouped.ignored, SCOUT: grouped.scouts})


def _measure(files: Sequence[Path]) -> tuple[int, int, Refused | None]:
    """Return bytes together, time of the last change, and, where a file cannot be read, why."""
    size, mtime_ns, why = 0, 0, None
    for path in files:
        try:
            facts = path.stat()
            size, mtime_ns = size + facts.st_size, max(mtime_ns, facts.st_mtime_ns)
            if not os.access(path, os.R_OK):
                raise PermissionError(errno.EACCES, "permission denied")
        except OSError as error:
            why = why or unreadable(path, error)
    return size, mtime_ns, why


def _suffix(path: Path) -> str:
    """Return the suffix to count a file by; long ones may be a piece of somebody's name and are not told apart."""
    suffix = path.suffix.lower()
    return NO_SUFFIX if not suffix else suffix if len(suffix) <= MAX_SUFFIX else OTHER
