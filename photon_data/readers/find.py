"""A folder -> the scans in it, from names and a glance at headers. Nothing can stop the search.

Each scan gets an id, made from where its files lie: safe in file systems and URLs, one per scan, the same in every run.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import chain, count
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from photon_data.errors import Refused, UsageError, first_few, refusal, unreadable
from photon_data.files import RESERVED
from photon_data.readers.dicom_cache import kept_files, read_headers
from photon_data.readers.dicom_file import PlaneHeader
from photon_data.readers.dicom_header import may_be_dicom, read_planes, require_pydicom
from photon_data.readers.dicom_series import NO_UID, Series, common_folder, series_of
from photon_data.readers.header import DATA_FILES, TEXT_HEADERS
from photon_data.readers.tree import File, Identity, Tree, access_to, is_label_map, is_named_as_one, matches
from photon_data.scan import SUFFIXES, Source, change_mark, is_url, names_below, place_name, suffix_of

# How files that are no scans are counted: by what they are, else by suffix.
LABEL_MAP, DIRECTORY, NO_IMAGE = "(label map)", "(DICOMDIR)", "(DICOM without image)"
NOT_INCLUDED, EXCLUDED = "(not in --include)", "(in --exclude)"
# A longer "suffix" may be a piece of somebody's name.
MAX_SUFFIX = 6

THREADS = 8  # which read headers: most of the time is spent in waiting for files
NO_IDS: Mapping[str, str] = MappingProxyType({})
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


def find_scans(
    root: Path,
    *,
    id_from: str = "path",
    id_prefix: str = "",
    known_ids: Mapping[str, str] = NO_IDS,
    on_file: Callable[[int], None] = lambda count: None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    follow_links: bool = True,
    label_maps: bool = False,
    headers: str = "",
) -> Found:
    """Return the scans below `root` (or the one file it is), sorted, with ids by `assign_ids`, and what was left alone.

    `known_ids` are those that scans have already, by their paths. New ones begin with `id_prefix`.

    Hidden files and folders, AppleDouble files, __MACOSX, and folders that we wrote are passed over. Links are
    followed. A file that is reached twice is one scan: where it lies below `root`, else under its first link. A file
    with a scan's suffix is always a source, whatever it holds (opening it says what is wrong), but for label maps,
    unless `label_maps`. What cannot be read is a source with its `problem` set. `on_file` gets the number of files seen
    so far.

    `include` and `exclude` are globs: one without "/" is for any folder or file name below `root`, one with "/" for a
    path relative to `root`, of a folder or a file; "*" is for "/" too.

    DICOM headers are read by threads, a folder each, and kept in the folder `headers`, if one is given.

    UsageError where there is no `root`, or for an unknown `id_from`.
    """
    if not root.exists():
        raise UsageError(f"expected a folder or a file with scans, but there is no {place_name(root)}; check the path")
    tree = Tree(root.absolute(), follow_links=follow_links)
    search, seen = _Search(tree, include, exclude, label_maps, headers), count(1)
    tree.counts += tree.access.begin(headers)
    try:
        for folder in tree.folders():
            for _ in folder:
                on_file(next(seen))
            search.add_folder(folder)
        search.add_closed_folders()
        search.add_series()
    finally:  # also where somebody stops it
        search.threads.shutdown(cancel_futures=True)
        tree.access.end()
    sources, ignored = sorted(search.sources, key=lambda source: source.path), search.counts()
    del tree, search  # what they know of every file takes memory
    ids = assign_ids([Named(source.path, source.id) for source in sources], id_from, id_prefix, known_ids)
    hidden = id_from == "hash"  # whoever does not want names in ids wants them nowhere
    for number, id in enumerate(ids):  # one by one: two of each would take more memory than all else
        sources[number] = replace(sources[number], id=id, hidden=hidden)
    return Found(sources, ignored)


def find_one_scan(path: Path, series: str | None = None) -> Source:
    """Return the scan that a file is, that a folder holds, or that is called `series` there; UsageError.

    "FOLDER#KEY" as path is FOLDER with "#KEY" as series. Names are those that the error lists, ids, or keys alone.
    """
    access, (folder, mark, key) = access_to(path), (place := place_name(path)).rpartition("#")
    if mark and series is None and not access.is_there(place) and access.is_there(folder):
        return find_one_scan(access.path_of(folder), f"#{key}")
    sources, ignored = find_scans(path)
    found = [one for one in sources if series in (None, one.path, one.id, one.path.rpartition("#")[2])]
    if series and not found:
        found = [one for one in sources if one.path.endswith(series)]
    if len(found) != 1:
        keys = [source.path.rpartition("#")[2] for source in found or sources]
        is_told = len(set(keys)) == len(keys)  # by its key alone: a folder's name may be a patient's
        listed = [
            f"#{key}" if is_told and one.format == "dicom" else one.path
            for key, one in zip(keys, found or sources, strict=True)
        ]
        names = f", {first_few(listed, 10)}" if listed else ""
        others = f" (files left alone: {left_alone(ignored)})" if ignored else ""
        wanted = f"one scan {series!r}" if series else "one scan"
        remedy = "name one: --series NAME" if len(sources) > 1 else "give the path of one"
        raise UsageError(f"expected {wanted}, found {len(found)} in {place}{names}{others}; {remedy}")
    (one,) = found
    return replace(one, id=f"s{one.path.rpartition('#')[2]}", hidden=True) if one.format == "dicom" else one


class _Search:
    """What has been found: sources, which have what their ids are made from as ids, and what is left alone."""

    def __init__(
        self, tree: Tree, include: Sequence[str], exclude: Sequence[str], label_maps: bool, headers: str
    ) -> None:
        self.tree, self.include, self.exclude = tree, include, exclude
        self.label_maps, self.headers = label_maps, headers
        self.threads = ThreadPoolExecutor(THREADS, "headers")
        self.grouping: deque[tuple[list[Path], Future[Grouped]]] = deque()
        self.root = tree.start if tree.start.is_dir() else tree.start.parent
        self.sources: list[Source] = []
        self.series: dict[str, list[Series]] = {}
        self.leftover: dict[Path, str] = {}  # how each is counted
        self.unclaimed: dict[Identity, Path] = {}  # those of them that lie in the tree: a link may say what they are
        self.taken: set[Identity] = set()
        self.data_files: set[Path] = set()
        self.ignored: Counter[str] = Counter()

    def add_folder(self, files: list[File]) -> None:
        """Add the scans among the files of one folder, or among those that links lead to; `files` are used up."""
        slices: dict[Path, list[Path]] = {}
        dicom = self._dicom_among([path for path, *_ in files if not suffix_of(path)])
        files.reverse()
        while files:
            path, identity, by_link = files.pop()
            if by_link and identity in self.taken:
                continue
            if reason := self._left_out(path):
                self.leftover[path] = reason
                continue
            if suffix := suffix_of(path):
                self._add_file(path, suffix)
            elif path in dicom:
                slices.setdefault(path.parent, []).append(path)
            else:
                if not (by_link and identity in self.unclaimed):
                    self._leave(path, identity)
                continue
            if identity is not None:
                self.taken.add(identity)
                self.leftover.pop(self.unclaimed.get(identity, path), None)
        for files_of_folder in slices.values():
            self.grouping.append((files_of_folder, self.threads.submit(group_series, files_of_folder, self.headers)))
        while len(self.grouping) > 4 * THREADS:
            self._add_grouped()

    def _dicom_among(self, files: Sequence[Path]) -> set[Path]:
        """Return the files that are DICOM, as it seems: threads look into those that their names do not tell."""
        found = kept_files(files, self.headers) if files and self.headers else set()
        others = [path for path in files if path not in found and not self._left_out(path)]
        for part in self.tree.access.parts(others):
            found |= {path for path, is_one in zip(part, self.threads.map(may_be_dicom, part), strict=True) if is_one}
        return found

    def add_closed_folders(self) -> None:
        """Add a source for each folder that cannot be listed."""
        for folder, error in self.tree.closed:
            problem = f"expected a folder that can be listed, found: {error.strerror}; change its permissions"
            path = "/".join(self._parts(folder))
            self._add(path or self.root.name, path or ".", [], "folder", Refused("unreadable", problem))

    def add_series(self) -> None:
        """Add the DICOM series. One that lies in several folders is grouped again as a whole."""
        while self.grouping:
            self._add_grouped()
        for _, parts in sorted(self.series.items()):
            for series in parts if len(parts) == 1 else self._regrouped(parts):
                self.ignored += series.aside
                for key, members, patient in series.stacks:
                    folder = "/".join(self._parts(common_folder(members)))
                    name = f"{folder}__s{key}" if folder else f"s{key}"
                    self._add(name, f"{folder}#{key}", members, "dicom", patient=patient)

    def counts(self) -> dict[str, int]:
        """Return how many files were left alone, by kind or suffix; data files of headers belong to their scans."""
        rest = Counter(kind for path, kind in self.leftover.items() if path not in self.data_files)
        return dict(sorted((self.ignored + self.tree.counts + rest).items()))

    def _parts(self, path: Path) -> tuple[str, ...]:
        return path.relative_to(self.root).parts

    def _left_out(self, path: Path) -> str:
        """Return how a file is counted that the globs leave out, "" for one that they do not."""
        parts = self._parts(path) if self.include or self.exclude else ()
        if self.include and not any(matches(parts, glob) for glob in self.include):
            return NOT_INCLUDED
        return EXCLUDED if any(matches(parts, glob) for glob in self.exclude) else ""

    def _leave(self, path: Path, identity: Identity | None) -> None:
        suffix = path.suffix.lower() or "(no suffix)"
        kind = "(other)" if suffix[0] == "." and len(suffix) > MAX_SUFFIX else suffix
        self.leftover[path] = DIRECTORY if path.name.lower() == "dicomdir" else kind
        if identity is not None:
            self.unclaimed[identity] = path

    def _add(
        self,
        name: str,
        path: str,
        files: list[Path],
        file_format: str,
        why: Refused | None = None,
        patient: str = "",
    ) -> None:
        root, facts = place_name(self.root), []
        # Neither the mark nor the name of one local file needs this.
        below = [path] if len(files) == 1 and not is_url(root) else [os.path.relpath(one, self.root) for one in files]
        for file, name_below in zip(files, below, strict=True):
            try:
                status = file.stat()
                facts.append((name_below, status.st_size, status.st_mtime_ns))
                if not self.tree.access.may_read(file):
                    raise PermissionError(errno.EACCES, "permission denied")
            except OSError as error:
                why = why or unreadable(file, error)
        size, mark = sum(size for _, size, _ in facts), change_mark(facts)
        names = names_below(root, below if is_url(root) else files)
        names = (path,) if names == (path,) else names  # one text, not two
        headers = self.headers if file_format == "dicom" else ""
        source = Source(name, path, names, file_format, size, mark, root=root, patient=patient, headers=headers)
        self.sources.append(replace(source, problem=why.message, code=why.code) if why else source)

    def _add_file(self, path: Path, suffix: str) -> None:
        data, name, why = path, "/".join(self._parts(path)), None
        if suffix in DATA_FILES:
            with suppress(Refused, OSError):  # opening the source says what is wrong with it
                data = DATA_FILES[suffix](path)
            if data != path and data.is_symlink() and not self.tree.follow_links:
                why = refusal("data-file", path.name, "a data file", "a link to one", "leave out --no-follow-links")
        files, file_format = [path] if data == path else [path, data], SUFFIXES[suffix]
        self.data_files.update(files[1:])
        is_one_file = path == self.tree.start  # somebody points at it
        text_of = TEXT_HEADERS.get(file_format)
        look = partial(is_label_map, name, text_of=text_of)
        if not (self.label_maps or is_one_file or why) and (
            look(files) if text_of else is_named_as_one(name) and self.tree.access.judged(files, look)
        ):
            self.ignored[LABEL_MAP] += 1
            return
        self._add(name[: -len(suffix)], name, files, file_format, why)

    def _add_grouped(self) -> None:
        """Keep the series of the folder that was looked at first; add its files that are unreadable or damaged."""
        files, future = self.grouping.popleft()
        parts = self._parts(files[0])[:-1]
        try:
            grouped = future.result()
        except Refused as refused:
            self._add("/".join((*parts, "s")), "/".join(parts) + "#", files, "dicom", refused)
            return
        for series in grouped.series:
            # Files without a series' UID belong together in one folder at most.
            key = "/".join((*parts, "")) if series.uid == NO_UID else series.uid
            self.series.setdefault(key, []).append(series)
        self._add_unreadable(grouped)

    def _regrouped(self, parts: Sequence[Series]) -> list[Series]:
        grouped = group_series([file for series in parts for file in series.files], self.headers)
        self._add_unreadable(grouped)
        return grouped.series

    def _add_unreadable(self, grouped: Grouped) -> None:
        for path, why in grouped.unreadable:
            name = "/".join(self._parts(path))
            self._add(name, name, [path], "dicom", why)
        self.ignored += grouped.aside


class Grouped(NamedTuple):
    """What DICOM files are."""

    series: list[Series]  # sorted by uid
    unreadable: list[tuple[Path, Refused]]  # what is not DICOM or is damaged
    aside: Counter[str]  # files that are no images of a volume, by "(kind)"


def group_series(files: Sequence[Path], headers: str = "") -> Grouped:
    """Return the series among files of one folder, or of one series in several; Refused("dicom-extra-missing").

    What was parsed before is taken from the folder `headers`.
    """
    require_pydicom()
    by_series, aside = dict[str, list[PlaneHeader]](), Counter[str]()
    unread: list[tuple[Path, Refused]] = []
    parts = access_to(files[0]).parts(sorted(files), partial(kept_files, cache=headers))
    read = chain.from_iterable(read_headers(part, read_planes, headers, trust=True) for part in parts)
    for path, content, error in read:
        if error:
            unread.append((path, unreadable(path, error) if isinstance(error, OSError) else error))
        elif content.planes:
            by_series.setdefault(content.planes[0].series, []).append(content.planes[0])
        else:
            aside[f"(DICOM {content.kind})" if content.kind else NO_IMAGE] += 1
    return Grouped([series_of(planes) for _, planes in sorted(by_series.items())], unread, aside)


class Named(NamedTuple):
    """What an id is made from: the path relative to the source, and the same without the scan's suffix."""

    path: str
    name: str


def assign_ids(
    scans: Sequence[Named], id_from: str, id_prefix: str = "", known_ids: Mapping[str, str] = NO_IDS
) -> list[str]:
    """Return an id for each scan, no two alike even where case does not count; UsageError for an unknown `id_from`.

    path: a/b/x.nii.gz -> "a__b__x"     name: -> "x"     hash: -> "v" + 12 digits of the path's sha256

    Each begins with `id_prefix`. What is not A-Z a-z 0-9 . _ - becomes "-". Where that changed a name, cut it to 150
    characters, where Windows keeps it for a device, or where two scans would share it, 6 digits of the hash of its path
    (with suffix) are appended. Scans whose paths are in `known_ids` keep the ids that they have there, and nobody else
    gets one of them.
    """
    if id_from not in ("path", "name", "hash"):
        raise UsageError(f"expected ids from path, name or hash, found {id_from!r}; choose one of them")
    if id_from == "hash":
        return [known_ids.get(scan.path, f"{id_prefix}v{_digest(scan.path)[:12]}") for scan in scans]
    start = 0 if id_from == "path" else -1
    plain = [id_prefix + "__".join(scan.name.split("/")[start:]) for scan in scans]
    levels = [int(name != _id(name) or bool(RESERVED.fullmatch(name))) for name in plain]
    gone = [known_ids[path] for path in known_ids.keys() - {scan.path for scan in scans}]
    while True:
        made = zip(plain, scans, levels, strict=True)
        ids = [known_ids.get(scan.path) or _id(name, scan.path, DIGITS[level]) for name, scan, level in made]
        times = Counter(name.casefold() for name in [*ids, *gone])
        named = zip(scans, ids, strict=True)
        shared = [times[name.casefold()] > 1 and scan.path not in known_ids for scan, name in named]
        if not any(shared):
            return ids
        levels = [level + clash for level, clash in zip(levels, shared, strict=True)]


def check_id_prefix(prefix: str, option: str = "--id-prefix") -> None:
    """UsageError for what ids cannot begin with: they name files."""
    if not re.fullmatch(r"([A-Za-z0-9_-][A-Za-z0-9._-]{0,49})?", prefix):
        raise UsageError(f"{option}: expected letters, digits, . _ and -, at most 50, found {prefix[:80]!r}")


def _id(name: str, path: str = "", digits: int = 0) -> str:
    safe = re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip(".-")[: MAX_ID - 1 - DIGITS[1]] or "v"
    return f"{safe[: MAX_ID - 1 - digits]}-{_digest(path)[:digits]}" if digits else safe


def _digest(path: str) -> str:
    return hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()
