"""A folder -> the scans in it, from names and a glance at headers. No voxel is read, and nothing can stop the search.

Each scan gets an id, made from where its files lie: safe in file systems and URLs, one per scan, the same in every run.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import count
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from photon_data.errors import HEAD_BYTES, Refused, UsageError, first_few, is_dicom, unreadable
from photon_data.readers.dicom_header import SAME_POSITION_MM, PlaneHeader, along_normal, read_planes, require_pydicom
from photon_data.readers.header import metaimage_data_file, nifti_data_file, nrrd_data_file
from photon_data.scan import Source

# Suffix -> what finds the file with the voxels, where that can be another one.
DATA_FILES = {".hdr": nifti_data_file, ".hdr.gz": nifti_data_file, ".nrrd": nrrd_data_file, ".nhdr": nrrd_data_file}
DATA_FILES |= {".mha": metaimage_data_file, ".mhd": metaimage_data_file}
SUFFIXES = dict.fromkeys((".nii.gz", ".hdr.gz", ".nii", ".hdr"), "nifti")
SUFFIXES |= {".nrrd": "nrrd", ".nhdr": "nrrd", ".mha": "metaimage", ".mhd": "metaimage"}
DICOM_SUFFIXES = (".dcm", ".ima", ".dicom")
HIDDEN_FOLDERS = ("__MACOSX",)
# Files that are no scans are counted by suffix; a longer "suffix" may be a piece of somebody's name.
MAX_SUFFIX = 6

MAX_ID = 150
# Digits of the path's hash that tell ids apart: none where the name is free, more while two are still the same.
DIGITS = (0, 6, 16, 64)


class Found(NamedTuple):
    """The scans of a folder, sorted by path, and how many other files it has of each suffix (or of each "(kind)")."""

    sources: list[Source]
    ignored: dict[str, int]


def left_alone(ignored: Mapping[str, int]) -> str:
    """Return `Found.ignored` in words, "2 (DICOM scout, no CT volume), 5 .txt"."""
    return ", ".join(f"{count} {kind}" for kind, count in ignored.items()) or "nothing"


def find_scans(root: Path, *, id_from: str = "path", on_file: Callable[[int], None] = lambda count: None) -> Found:
    """Return the scans below `root` (or the one file it is), sorted, with ids by `assign_ids`, and what was left alone.

    Hidden files and folders, AppleDouble files and __MACOSX are passed over. Links are not followed. A link to a
    visible file in the root is passed over, since that file is found. A link to a hidden file in the root is taken
    (DataLad keeps files so). Other links are counted as ignored. A file with a scan's suffix is always a source,
    whatever it holds; opening it says what is wrong. What cannot be read is a source with its `problem` set. `on_file`
    gets the number of files seen so far.

    UsageError where there is no `root`, or for an unknown `id_from`.
    """
    if not root.exists():
        raise UsageError(f"expected a folder or a file with scans, but there is no {root}; check the path")
    search = _Search(root.absolute())
    seen = count(1)
    for folder in search.folders():
        candidates = []
        for path in folder:
            on_file(next(seen))
            if search.is_candidate(path):
                candidates.append(path)
        search.add_folder(candidates)
    pairs = sorted(search.sources, key=lambda pair: pair[0].path)
    ids = assign_ids([named for named, _ in pairs], id_from)
    return Found([replace(source, id=name) for name, (_, source) in zip(ids, pairs, strict=True)], search.counts())


def find_one_scan(path: Path) -> Source:
    """Return the scan that a file is or that a folder holds; UsageError where there is none, or more than one."""
    sources, ignored = find_scans(path)
    if len(sources) != 1:
        names = f", {first_few([source.path for source in sources], 10)}" if sources else ""
        others = f" (files left alone: {left_alone(ignored)})" if ignored else ""
        raise UsageError(f"expected one scan, found {len(sources)} in {path}{names}{others}; give the path of one")
    return sources[0]


class _Search:
    """What has been found so far: sources that still lack an id, what ids are made from, and what is left alone."""

    def __init__(self, start: Path) -> None:
        self.start = start
        self.root = start if start.is_dir() else start.parent
        self.sources: list[tuple[Named, Source]] = []
        self.leftover: list[Path] = []
        self.data_files: set[Path] = set()
        self.ignored: Counter[str] = Counter()

    def folders(self) -> Iterator[list[Path]]:
        """Yield the visible files, folder by folder. A folder that cannot be listed becomes a source."""
        if self.root != self.start:
            yield [self.start]
            return

        def closed(error: OSError) -> None:
            parts = self._parts(Path(error.filename))
            problem = f"expected a folder that can be listed, found: {error.strerror}; change its permissions"
            self._add(parts or (self.root.name,), "/".join(parts) or ".", [], "folder", Refused("unreadable", problem))

        for here, folders, names in os.walk(self.start, onerror=closed):
            links = [name for name in folders if Path(here, name).is_symlink()]
            folders[:] = sorted(name for name in folders if name not in links and not _is_hidden(name))
            yield [Path(here, name) for name in sorted(names + links) if not _is_hidden(name)]

    def is_candidate(self, path: Path) -> bool:
        """Tell whether an entry of a folder is to be looked at; links and special files that are not are counted."""
        if path == self.start:
            return True
        try:
            mode = path.lstat().st_mode
        except OSError:
            return True  # it is there and cannot be read: a source with a problem
        if not stat.S_ISLNK(mode):
            self.ignored["(special file)"] += not stat.S_ISREG(mode)
            return stat.S_ISREG(mode)
        root, target = self.root.resolve(), Path(os.path.realpath(path))
        is_inside = target.is_relative_to(root) and target.exists()
        if is_inside and not any(_is_hidden(part) for part in target.relative_to(root).parts):
            return False  # it is found anyway
        is_taken = is_inside and target.is_file()  # found in no other way: it is hidden
        self.ignored["(link)"] += not is_taken
        return is_taken

    def add_folder(self, files: Iterable[Path]) -> None:
        slices = []
        for path in files:
            suffix = next((s for s in SUFFIXES if path.name.lower().endswith(s)), None)
            if suffix:
                self._add_file(path, suffix)
            elif _may_be_dicom(path):
                slices.append(path)
            else:
                self.leftover.append(path)
        if slices:
            self._add_dicom(slices)

    def counts(self) -> dict[str, int]:
        """Return how many files were left alone, by suffix; data files of headers belong to their scans."""
        suffixes = [path.suffix.lower() or "(no suffix)" for path in self.leftover if path not in self.data_files]
        rest = Counter("(other)" if s[0] == "." and len(s) > MAX_SUFFIX else s for s in suffixes)
        return dict(sorted((self.ignored + rest).items()))

    def _parts(self, path: Path) -> tuple[str, ...]:
        return path.relative_to(self.root).parts

    def _add(
        self, words: tuple[str, ...], path: str, files: list[Path], file_format: str, why: Refused | None = None
    ) -> None:
        size, mtime_ns = 0, 0
        for file in files:
            try:
                facts = file.stat()
                size, mtime_ns = size + facts.st_size, max(mtime_ns, facts.st_mtime_ns)
                if not os.access(file, os.R_OK):
                    raise PermissionError(errno.EACCES, "permission denied")
            except OSError as error:
                why = why or unreadable(file, error)
        source = Source("", path, tuple(files), file_format, size, mtime_ns)
        if why:
            source = replace(source, problem=why.message, code=why.code)
        self.sources.append((Named(path, words), source))

    def _add_file(self, path: Path, suffix: str) -> None:
        data, parts = path, self._parts(path)
        if suffix in DATA_FILES:
            with suppress(Refused, OSError):  # opening the source says what is wrong with it
                data = DATA_FILES[suffix](path)
        self.data_files.add(data)
        words = (*parts[:-1], path.name[: -len(suffix)])
        self._add(words, "/".join(parts), [path] if data == path else [path, data], SUFFIXES[suffix])

    def _add_dicom(self, files: list[Path]) -> None:
        """Add the series among the DICOM files of one folder, and each file that is unreadable or damaged."""
        parts = self._parts(files[0])[:-1]
        try:
            grouped = group_series(files)
        except Refused as refused:
            self._add((*parts, "s"), "/".join(parts) + "#", files, "dicom", refused)
            return
        for key, members in grouped.series:
            words = (*parts[:-1], f"{parts[-1]}__s{key}") if parts else (f"s{key}",)
            self._add(words, "/".join(parts) + f"#{key}", members, "dicom")
        for path, why in grouped.unreadable:
            self._add((*parts, path.name), "/".join((*parts, path.name)), [path], "dicom", why)
        self.ignored.update({"(DICOM without image)": grouped.ignored, "(DICOM scout, no CT volume)": grouped.scouts})


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in HIDDEN_FOLDERS


def _may_be_dicom(path: Path) -> bool:
    """Tell whether the name says so; without a suffix (UIDs end in numbers), whether the file has the magic."""
    name = path.name.lower()
    if name.endswith(DICOM_SUFFIXES):
        return True
    if name == "dicomdir" or not (path.suffix == "" or path.suffix[1:].isdigit()):
        return False
    try:
        with path.open("rb") as file:
            return is_dicom(file.read(HEAD_BYTES))
    except OSError:
        return True


class Grouped(NamedTuple):
    """What the DICOM files of one folder are."""

    series: list[tuple[str, list[Path]]]  # (key, files sorted by name) of each image stack, sorted by key
    unreadable: list[tuple[Path, Refused]]  # what is not DICOM or is damaged
    ignored: int  # files without an image: structures, reports, presentation states, segmentations, doses
    scouts: int  # files of stacks that are LOCALIZER by their ImageType, every image of them


def group_series(files: list[Path]) -> Grouped:
    """Return the image stacks among the files of one folder, from their headers alone.

    The key is the start of a hash of the SeriesInstanceUID. One series may hold several stacks: images that differ in
    size or orientation (a scout beside the slices is counted and left out), multi-frame files, and acquisitions, where
    splitting by AcquisitionNumber leaves no position taken twice. Its largest stack (among equals the one with the
    first file name) has the bare key; the others follow as key-2, key-3, ... Refused("dicom-extra-missing") without
    pydicom.
    """
    require_pydicom()
    by_series: dict[str, list[PlaneHeader]] = {}
    unread: list[tuple[Path, Refused]] = []
    ignored = 0
    for path in sorted(files):
        try:
            planes = read_planes(path)
        except (Refused, OSError) as error:
            unread.append((path, unreadable(path, error) if isinstance(error, OSError) else error))
        else:
            ignored += not planes
            for plane in planes[:1]:
                by_series.setdefault(plane.series, []).append(plane)
    series, scouts = [], 0
    for key, planes in sorted(by_series.items()):
        stacks = [part for stack in _stacks(planes) for part in _acquisitions(stack)]
        for n, stack in enumerate(sorted(stacks, key=lambda part: -len(part)), 1):
            if all(plane.localizer for plane in stack):
                scouts += len(stack)
            else:
                series.append((key if n == 1 else f"{key}-{n}", [plane.path for plane in stack]))
    return Grouped(series, unread, ignored, scouts)


def _stacks(planes: list[PlaneHeader]) -> list[list[PlaneHeader]]:
    """Split planes by size, orientation and container: [axial axial scout axial] -> [axial axial axial] [scout]."""
    stacks: list[list[PlaneHeader]] = []
    kind = attrgetter("rows", "columns", "container")
    for plane in planes:
        same = (stack for stack in stacks if kind(plane) == kind(stack[0]) and plane.is_parallel_to(stack[0]))
        if (stack := next(same, None)) is None:
            stacks.append(stack := [])
        stack.append(plane)
    return stacks


def _acquisitions(planes: list[PlaneHeader]) -> list[list[PlaneHeader]]:
    """Split a stack by AcquisitionNumber if positions are taken twice in it, and in none of its acquisitions."""
    parts: dict[str, list[PlaneHeader]] = {}
    for plane in planes:
        parts.setdefault(plane.acquisition, []).append(plane)
    if _has_duplicates(planes) and not any(len(part) == 1 or _has_duplicates(part) for part in parts.values()):
        return list(parts.values())
    return [planes]


def _has_duplicates(planes: Sequence[PlaneHeader]) -> bool:
    """Tell whether two planes lie at one position; False where positions are not known."""
    if any(plane.position_lps is None or plane.orientation is None for plane in planes):
        return False
    return bool((np.diff(np.sort(along_normal(planes))) < SAME_POSITION_MM).any())


class Named(NamedTuple):
    """What an id is made from: the path relative to the source, and its words without the scan's suffix."""

    path: str
    words: tuple[str, ...]


def assign_ids(scans: Sequence[Named], id_from: str) -> list[str]:
    """Return an id for each scan, no two alike even where case does not count; UsageError for an unknown `id_from`.

    path: a/b/x.nii.gz -> "a__b__x"     name: -> "x"     hash: -> "v" + 12 digits of the path's sha256

    What is not A-Z a-z 0-9 . _ - becomes "-". Where that changed a name, cut it to 150 characters, or where two scans
    would share it, 6 digits of the hash of its path (with suffix) are appended.
    """
    if id_from not in ("path", "name", "hash"):
        raise UsageError(f"expected ids from path, name or hash, found {id_from!r}; choose one of them")
    if id_from == "hash":
        return [f"v{_digest(scan.path)[:12]}" for scan in scans]
    plain = ["__".join(scan.words if id_from == "path" else scan.words[-1:]) for scan in scans]
    levels = [int(name != _id(name)) for name in plain]
    while True:
        ids = [_id(name, scan.path, DIGITS[n]) for name, scan, n in zip(plain, scans, levels, strict=True)]
        times = Counter(map(str.casefold, ids))
        shared = [times[name.casefold()] > 1 for name in ids]
        if not any(shared):
            return ids
        levels = [level + clash for level, clash in zip(levels, shared, strict=True)]


def _id(name: str, path: str = "", digits: int = 0) -> str:
    safe = re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip(".-")[: MAX_ID - 1 - DIGITS[1]] or "v"
    return f"{safe[: MAX_ID - 1 - digits]}-{_digest(path)[:digits]}" if digits else safe


def _digest(path: str) -> str:
    return hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()
