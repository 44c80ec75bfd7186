"""The visible files below a folder, each once: links are followed, never in circles. And which of them are label maps.

Label maps (masks, segmentations) lie beside scans; they are told by name and by content, not by one of them alone.
"""

from __future__ import annotations

import gzip
import math
import os
import re
import stat
import struct
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import nibabel as nib
import numpy as np

HIDDEN_FOLDERS = ("__MACOSX",)
# What is in a folder that photon-data prepare or export wrote: no raw data.
OURS = (("dataset.json", "volumes.jsonl"), ("export.json", "volumes"))
# What a folder holds beside files, as it is counted.
LINK, BROKEN, SPECIAL = "(link)", "(link to a file that is not there)", "(special file)"
WRITTEN = "(prepared or exported folder)"


class Access:
    """How a search gets at the files of its source: at those of a disk. `Objects` of object_path.py does at a URL's."""

    def walk(self, folder: Any, onerror: Any = None) -> Iterator[tuple[Any, list[str], list[str]]]:
        """Yield what os.walk does; names that are removed from the second are not entered."""
        return os.walk(folder, onerror=onerror)

    def begin(self, headers: str) -> Counter[str]:
        """Begin a search that keeps headers in this folder ("" for none); return what it leaves alone, by kind."""
        return Counter()

    def end(self) -> None:
        """End a search."""

    def may_read(self, file: Path) -> bool:
        """Tell whether the system would let us open a file."""
        return os.access(file, os.R_OK)

    def parts(
        self, paths: Sequence[Path], kept: Callable[[Sequence[Path]], Collection[Path]] = lambda _: ()
    ) -> Iterator[Sequence[Path]]:
        """Yield paths that are opened next, but for those that are `kept`, in parts that are at hand at a time."""
        yield paths

    def judged(self, files: Sequence[Path], look: Callable[[Sequence[Path]], bool]) -> bool:
        """Return what `look`, which needs local files, says of some."""
        return look(files)

    def is_there(self, place: str) -> bool:
        """Tell whether there is a file or a folder of that name, see `place_name`."""
        return Path(place).exists()

    def path_of(self, place: str) -> Path:
        """Return the path of a place of this kind."""
        return Path(place)


DISK = Access()


def access_to(path: Path) -> Access:
    """Return how the files of a source are got at."""
    found: Access = getattr(path, "objects", DISK)
    return found


# Device and inode as one number: a run holds one for every file, and two take three times as much. Else a whole path.
Identity = int | str


class File(NamedTuple):
    """One file of a tree."""

    path: Path  # as it was reached
    identity: Identity | None  # None of a file that cannot be looked at
    by_link: bool


class Tree:
    """The files below a folder (or the one file it is).

    Files that lie there come first, then those that links to files lead to, then those behind links to folders; links
    go by name. A folder is entered once; one that holds the place where a walk began is not entered by a link.
    """

    def __init__(self, start: Path, *, follow_links: bool = True) -> None:
        self.start, self.follow_links, self.access = start, follow_links, access_to(start)
        self.counts: Counter[str] = Counter()  # of what is no file and not followed
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

        for place, folders, names in self.access.walk(folder, onerror=closed):
            here = place if isinstance(place, Path) else Path(place)
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
            visible = (here / name for name in sorted(names + links) if not is_hidden(name))
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
    with suppress(OSError):  # of a folder that may not be entered
        return any(all((folder / name).exists() for name in names) for names in OURS)
    return False


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
    # Some network file systems have no inodes.
    return facts.st_dev << 64 | facts.st_ino if facts.st_ino else os.path.realpath(path)


# --- label maps

# Words of a file's or folder's name, also as the end of a longer word ("lungmask") or before numbers ("label0001").
NAMED = re.compile(".*(segs?|segmentations?|labels?(tr|ts|val?)?|labelmaps?|masks?|msk|groundtruth)|gt|rois?|contours?")
# 3D Slicer's segmentations say so by their suffix.
SEGMENTATIONS = (".seg.nrrd", ".seg.nhdr")
# Planes that are not constant and are looked at, and how many different values label maps have in them: a few, or up
# to a byte's where nearly all neighbours are equal. A CT has hundreds, and negative ones.
PLANES, FEW_VALUES, MANY_VALUES, EQUAL_NEIGHBOURS = 4, 32, 256, 0.8
# Label maps shrink by this factor and more; a CT of 8 bits does not.
SHRINKS = 20
# The search looks at no more: of a larger plane, at more constant planes, at a header with larger extensions.
LARGEST_PLANE, MOST_VOXELS, MAX_EXTENSIONS = 1 << 24, 1 << 30, 1 << 24
BYTES = {"char", "signed char", "unsigned char", "uchar", "int8", "uint8", "int8_t", "uint8_t", "met_char", "met_uchar"}
INTEGER = re.compile(r"(met_|u|unsigned |signed )*(char|short|int|long)")


class HeaderLines(Protocol):
    """The text of a header."""

    @property
    def lines(self) -> list[str]: ...  # noqa: D102


def is_label_map(path: str, files: Sequence[Path], text_of: Callable[[Path], HeaderLines] | None) -> bool:
    """Tell whether a file is a label map: its `path` below the source says so, and what it holds is one.

    `text_of` reads the header of a file that has a text; without one, it is a NIfTI file.

    Content: integers from 0 on, few different ones. A file that cannot be looked at is none: opening it says why.
    """
    if path.lower().endswith(SEGMENTATIONS):
        return True
    if not is_named_as_one(path):
        return False
    with suppress(Exception):  # damaged headers make libraries raise anything
        return _text_header_is_one(files, text_of(files[0]).lines) if text_of else _nifti_is_one(files)
    return False


def is_named_as_one(path: str) -> bool:
    """Tell whether a folder or the file of a path relative to the source is named as label maps are."""
    words = [word.strip("0123456789") for word in re.split(r"[^a-z0-9]+", path.lower())]
    return any(NAMED.fullmatch(word) for word in words)


def _nifti_is_one(files: Sequence[Path]) -> bool:
    if not _has_sane_header(files[0]):
        return False
    image = nib.load(files[0], keep_file_open=True)
    assert isinstance(image, nib.nifti1.Nifti1Pair)
    count, size = math.prod(image.shape), image.get_data_dtype().itemsize
    if image.ndim < 3 or math.prod(image.shape[:2]) > LARGEST_PLANE:
        return False
    if size == 1 and count > SHRINKS * files[-1].stat().st_size:
        return True
    looked_at, values = 0, np.empty(0)
    for z in range(image.shape[2]):
        plane = np.asarray(image.dataobj[(slice(None), slice(None), z, *[0] * (image.ndim - 3))])
        values = np.union1d(values, plane)
        if not (np.isfinite(values).all() and values[0] >= 0 and (values == np.rint(values)).all()):
            return False
        equal = float((plane[1:] == plane[:-1]).mean()) if len(plane) > 1 else 1.0
        if len(values) > (MANY_VALUES if equal >= EQUAL_NEIGHBOURS else FEW_VALUES):
            return False
        looked_at += bool((plane != plane.flat[0]).any())
        if looked_at == PLANES:
            break
        if (z + 1) * plane.size > MOST_VOXELS:
            return False
    return True


def _has_sane_header(path: Path) -> bool:
    """Tell whether the extensions of a NIfTI header are small: nibabel reads them whole, and gzip can hold GBs."""
    is_pair = path.name.lower().endswith((".hdr", ".hdr.gz"))
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
        head = file.read(MAX_EXTENSIONS + 1 if is_pair else nib.Nifti2Header.sizeof_hdr)
    if is_pair:
        return len(head) <= MAX_EXTENSIONS
    for order in "<>":
        size, offset = struct.unpack_from(f"{order}i104xf", head)
        if size == nib.Nifti2Header.sizeof_hdr:
            (offset,) = struct.unpack_from(f"{order}q", head, 168)
        if size in (nib.Nifti1Header.sizeof_hdr, nib.Nifti2Header.sizeof_hdr):
            return bool(offset <= MAX_EXTENSIONS)
    return False


def _text_header_is_one(files: Sequence[Path], lines: Sequence[str]) -> bool:
    """Tell whether an NRRD or MetaImage header is one of bytes, or of integers that shrink as label maps do."""
    pairs = (re.split(":|=", line.lower(), maxsplit=1) for line in lines if re.search("[:=]", line))
    fields = {key.strip(): value.strip() for key, value in pairs}
    kind = fields.get("type") or fields.get("elementtype", "")
    count = math.prod(map(int, (fields.get("sizes") or fields.get("dimsize", "")).split()))
    return kind in BYTES or (bool(INTEGER.match(kind)) and 2 * count > SHRINKS * files[-1].stat().st_size)
