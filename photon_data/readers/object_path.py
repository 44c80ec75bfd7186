"""A path below a URL, by which the search of find.py looks at objects as it looks at local files.

Names, sizes and versions come from one listing, bytes by ranges: the first kilobytes of an object once (in a folder of
more than MOST_HEADS twice), more where a reader asks for more. So a bucket and a folder with the same names give the
same scans, ids and refusals.

What was read of files that are no DICOM is kept in the private folder beside OUT: a run with nothing to do reads
nothing. (Headers of DICOM are kept as local ones are, see dicom_cache.py.)
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import stat
import tempfile
import threading
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path, PosixPath
from types import SimpleNamespace
from typing import Any, BinaryIO, ClassVar

from photon_data.bucket import Bucket, Entry, Listing, checked_url, fetched
from photon_data.readers.dicom_file import FIRST_BYTES, MORE_BYTES
from photon_data.readers.tree import Access
from photon_data.scan import change_mark, is_url

OBJECTS = "objects"  # the folder of what is kept, in the private one
NO_PATH = "(name that is no path)"  # how such objects are counted among what is left alone
# Heads in memory: 256 MB. Between a look at a file and its header lie some folders of a series each.
MOST_HEADS = 1 << 14
PART = MOST_HEADS // 16  # of the heads of one folder, since several are looked at at a time
# What a buffer asks for; and how far an object may have been read of which that beginning is kept.
BUFFER_BYTES, KEPT_BYTES = 1 << 10, 1 << 12


def source_path(text: str | Path) -> Path:
    """Return SOURCE as a path that can be searched: of a URL too. UsageError for a URL that holds more than a place."""
    text = str(text)
    if not is_url(text) or text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    url = checked_url(text)
    kind = type("ObjectPath", (ObjectPath,), {"objects": Objects(url), "__slots__": ()})
    path: Path = kind(url)
    return path


def is_there(root: str, path: str) -> bool:
    """Tell whether there is a file or a folder of that name in a source folder, or under a URL; OSError."""
    return Bucket(root).exists(path) if is_url(root) else Path(root, path).exists()


class Objects(Access):
    """What lies below a URL, and what was read of it so far."""

    def __init__(self, url: str) -> None:
        self.url, self.bucket = url, Bucket(url)  # of the listing, once there is one
        # The first bytes of an object; True or False for what `judged` was told, the entry being that of all files.
        self.known: dict[str, tuple[Entry, bytes | bool]] = {}
        self.place: Path | None = None  # where what is known is kept
        self._heads: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()

    @cached_property
    def listing(self) -> Listing:
        """The listing, made when it is first needed."""
        found = Bucket(self.url).listing()
        self.bucket = Bucket(found.url)
        return found

    @cached_property
    def folders(self) -> dict[str, tuple[set[str], list[str]]]:
        """The folders that the names of the listing say there are: the folders and the files directly in each."""
        folders: dict[str, tuple[set[str], list[str]]] = {"": (set(), [])}

        def folder_of(name: str) -> tuple[set[str], list[str]]:
            if name not in folders:
                folders[name] = (set(), [])
                parent, _, own = name.rpartition("/")
                folder_of(parent)[0].add(own)
            return folders[name]

        for name in self.listing.entries:
            folder, _, file = name.rpartition("/")
            folder_of(folder)[1].append(file)
        return folders

    @cached_property
    def prefix(self) -> str:
        """What every path below the URL begins with, as a path says it."""
        return str(PosixPath(self.listing.url))

    def walk(self, folder: ObjectPath, onerror: Any = None) -> Iterator[tuple[ObjectPath, list[str], list[str]]]:
        """Yield what os.walk does; a listing has no errors."""
        folders, files = self.folders[folder.name_there]
        names = sorted(folders)
        yield folder, names, files
        for name in names:
            yield from self.walk(folder / name)

    def begin(self, headers: str) -> Counter[str]:
        """Read what earlier runs kept beside this folder of headers, if there is one; names that are no paths count."""
        unsafe = self.listing.unsafe
        if headers:
            self.remember(Path(headers).parent)
        return Counter({NO_PATH: unsafe})

    def may_read(self, file: Path) -> bool:
        """Return True: a store says no when it is asked for the bytes."""
        return True

    def is_there(self, place: str) -> bool:
        """Tell whether there is an object, or a folder of some, at this URL; OSError."""
        return Bucket(place).exists("")

    def path_of(self, place: str) -> Path:
        """Return the path of a URL."""
        return source_path(place)

    def parts(
        self, paths: Sequence[Path], kept: Callable[[Sequence[Path]], Collection[Path]] = lambda _: ()
    ) -> Iterator[Sequence[Path]]:
        """Yield paths that are opened next, in parts of which the first bytes are in memory then."""
        there = kept(paths)
        size = PART if sum(path not in there for path in paths) > PART else max(len(paths), 1)
        for start in range(0, len(paths), size):
            part = paths[start : start + size]
            self.read_heads(path.name_there for path in part if isinstance(path, ObjectPath) and path not in there)
            yield part

    def read_heads(self, names: Iterable[str]) -> None:
        """Read the first bytes of many objects at once, for those that open them next."""
        entries = self.listing.entries
        names = [one for one in names if one not in self._heads and self._kept(one) is None and entries[one].size]
        for start in range(0, len(names), PART):
            part = names[start : start + PART]
            stops = [min(FIRST_BYTES, entries[name].size) for name in part]
            for name, head in self.bucket.heads(part, stops).items():
                self._keep_head(name, head)

    def head(self, name: str) -> bytes:
        """Return the first bytes of an object: FIRST_BYTES, fewer of a shorter one, or those that are kept."""
        with self._lock:
            if head := self._heads.get(name):
                return head
        if isinstance(kept := self._kept(name), bytes):
            return kept
        head = self.bucket.read(name, 0, min(FIRST_BYTES, self.listing.entries[name].size))
        self._keep_head(name, head)
        return head

    def _keep_head(self, name: str, head: bytes) -> None:
        with self._lock:
            self._heads[name] = head
            while len(self._heads) > MOST_HEADS:
                self._heads.popitem(last=False)

    def was_read(self, name: str, stop: int) -> None:
        """Keep the first bytes of an object that was read to there, unless that is more than a text header takes."""
        with self._lock:
            known, head = self.known.get(name), self._heads.get(name)
            if stop > KEPT_BYTES:  # a header of DICOM, which is kept elsewhere once it is parsed
                self.known.pop(name, None)
                self._heads.pop(name, None)
            elif head is not None and not (known and isinstance(known[1], bytes) and len(known[1]) >= stop):
                self.known[name] = (self.listing.entries[name], head[:stop])

    def judged(self, files: Sequence[Path], look: Callable[[Sequence[Path]], bool]) -> bool:
        """Return what `look` says of local copies of objects, which are fetched for it, whole, once."""
        with suppress(Exception):  # what cannot be looked at is none of what it looks for: opening it says why
            return self._said([file.name_there for file in files if isinstance(file, ObjectPath)], look)
        return False

    def _said(self, names: Sequence[str], look: Callable[[Sequence[Path]], bool]) -> bool:
        """Return what `look` says of local copies of objects; what it said is kept, under the first of them."""
        entries = [self.listing.entries[name] for name in names]
        facts = [(name, *entry) for name, entry in zip(names, entries, strict=True)]
        listed = Entry(sum(entry.size for entry in entries), change_mark(facts))
        known, kept = self.known.get(names[0], (None, None))
        if known == listed and isinstance(kept, bool):
            return kept
        with fetched(self.listing.url, names, listed) as files:
            said = look(files)
        self.known[names[0]] = (listed, said)
        return said

    def _kept(self, name: str) -> bytes | bool | None:
        entry, said = self.known.get(name, (None, None))
        return said if entry is not None and entry == self.listing.entries.get(name) else None

    def remember(self, private: Path) -> None:
        """Read what earlier runs kept in the private folder, and keep what this one reads there; see `end`."""
        self.place = private / OBJECTS / hashlib.sha256(self.url.encode()).hexdigest()[:16]
        with suppress(OSError, ValueError, TypeError, AttributeError, zlib.error):
            for name, (size, mark, said) in json.loads(zlib.decompress(self.place.read_bytes())).items():
                self.known[name] = (Entry(size, mark), said if isinstance(said, bool) else base64.b64decode(said))

    def end(self) -> None:
        """Write what was read of objects that are still there, for its owner only; let go of all.

        A full disk keeps nothing.
        """
        rows = {
            name: [*entry, said if isinstance(said, bool) else base64.b64encode(said).decode("ascii")]
            for name, (entry, said) in self.known.items()
            if name in self.listing.entries
        }
        if self.place and rows:
            with suppress(OSError):
                for private in (self.place.parent.parent, self.place.parent):
                    private.mkdir(mode=0o700, parents=True, exist_ok=True)
                self.place.touch(mode=0o600)
                self.place.write_bytes(zlib.compress(json.dumps(rows).encode(), 1))
        self.known, self._heads = {}, OrderedDict()
        for name in ("listing", "folders", "prefix"):  # those of millions take memory; who asks again is told of now
            self.__dict__.pop(name, None)


class ObjectPath(PosixPath):
    """A path as pathlib has it, whose text is the URL with one "/" behind its scheme. It reads objects, and no disk.

    `source_path` makes a class of its own for every URL: paths that come of paths know their objects by it.
    """

    __slots__ = ()
    objects: ClassVar[Objects]

    @property
    def name_there(self) -> str:
        """Its name below the URL; "" for the folder of the URL itself."""
        text = os.path.normpath(self) if ".." in self.parts else str(self)
        return text[len(self.objects.prefix) + 1 :]

    @property
    def url(self) -> str:
        """The URL that it stands for."""
        if self == PosixPath(self.objects.url):  # nothing needs to be listed for that
            return self.objects.url
        return f"{self.objects.listing.url}/{self.name_there}".rstrip("/")

    def _entry(self) -> Entry | None:
        return self.objects.listing.entries.get(self.name_there)

    def is_file(self, **_: Any) -> bool:
        """Tell whether there is an object of that name."""
        return self._entry() is not None

    def is_dir(self, **_: Any) -> bool:
        """Tell whether there are objects below that name."""
        return self.name_there in self.objects.folders

    def exists(self, **_: Any) -> bool:
        """Tell whether it is either."""
        return self.is_file() or self.is_dir()

    def is_symlink(self) -> bool:
        """Return False: stores have no links."""
        return False

    def absolute(self) -> ObjectPath:
        """Return itself."""
        return self

    def resolve(self, strict: bool = False) -> ObjectPath:
        """Return it without ".."."""
        return type(self)(os.path.normpath(self))

    def stat(self, **_: Any) -> Any:
        """Return what is asked of a file's status; the time is a number that changes with the version."""
        entry = self._entry()
        if entry is None and not self.is_dir():
            raise FileNotFoundError(2, os.strerror(2), self.name)
        size, mark = entry or (0, 0)
        same = {"st_dev": 0, "st_ino": hash(str(self)) or 1, "st_mtime_ns": mark, "st_ctime_ns": mark}
        return SimpleNamespace(st_mode=stat.S_IFREG if entry else stat.S_IFDIR, st_size=size, **same)

    lstat = stat

    def iterdir(self) -> Generator[ObjectPath, None, None]:
        """Yield what lies directly below it."""
        folders, files = self.objects.folders[self.name_there]
        return (self / name for name in sorted([*folders, *files]))

    def open(self, mode: str = "r", buffering: int = -1, *_: Any, **__: Any) -> Any:
        """Return an open file that reads ranges; for bytes alone."""
        assert mode == "rb", "objects are read, and as bytes"
        file = _RangedFile(self.objects, self.name_there, self.stat().st_size)
        return file if buffering == 0 else io.BufferedReader(file, BUFFER_BYTES)


class _RangedFile(io.RawIOBase):
    """An object as an open file: the last range is in memory."""

    def __init__(self, objects: Objects, name: str, size: int) -> None:
        self.objects, self.name, self.size = objects, name, size
        self.at = self.start = self.furthest = 0
        self.data = b""
        self._stand_in: BinaryIO | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.size}[whence])
        return self.at

    def readinto(self, view: Any) -> int:
        if self.at >= self.size:
            return 0
        if not self.start <= self.at < self.start + len(self.data):
            self._load(len(view))
        begin = self.at - self.start
        piece = self.data[begin : begin + len(view)]
        view[: len(piece)] = piece
        self.at += len(piece)
        self.furthest = max(self.furthest, self.at)
        return len(piece)

    def _load(self, count: int) -> None:
        if self.at < FIRST_BYTES:
            self.start, self.data = 0, self.objects.head(self.name)
        if not self.start <= self.at < self.start + len(self.data):
            stop = min(self.size, self.at + max(count, MORE_BYTES))
            self.start, self.data = self.at, self.objects.bucket.read(self.name, self.at, stop)

    def fileno(self) -> int:
        """Return the number of an empty file of this length: os.fstat of it is how readers ask for the length."""
        if self._stand_in is None:
            self._stand_in = tempfile.TemporaryFile()  # noqa: SIM115 - closed with this file
            self._stand_in.truncate(self.size)
        return self._stand_in.fileno()

    def close(self) -> None:
        if not self.closed:
            self.objects.was_read(self.name, self.furthest)
            if self._stand_in is not None:
                self._stand_in.close()
        super().close()
