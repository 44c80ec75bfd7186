"""CTs out of tar archives, as AbdomenAtlas comes: <anything>/BDMAP_00000001/ct.nii.gz -> FOLDER/BDMAP_00000001/ct.nii.gz.

Archives are streams from strangers. Only regular files of that name are taken; the path written is made from the id alone, so
that no name, link or device in an archive leads anywhere. A CT is there whole or not at all.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import re
import tarfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import IO, NamedTuple, TypeVar

from isal import igzip, isal_zlib

from photon_data.files import Location, sync

T = TypeVar("T")

SUFFIXES = (".tar.gz", ".tgz", ".tar")
MEMBER = re.compile(r"(?:.*/)?(BDMAP_[0-9]{8})/ct\.nii\.gz")
SCAN = "ct.nii.gz"
GZIP = b"\x1f\x8b"
CHUNK = 1 << 20
# What a tar ends with, at least: two empty blocks.
END = 2 * tarfile.BLOCKSIZE
# What reading a damaged archive raises; ValueError for headers that hold nonsense.
DAMAGE = (tarfile.TarError, EOFError, OSError, ValueError, zlib.error, isal_zlib.error)
# Markers of archives that were read to their end.
MARKERS = ".archives"


class Archive(NamedTuple):
    """A tar file as it lies there."""

    path: Path
    bytes: int
    mtime_ns: int


class Contents(NamedTuple):
    """What reading an archive came to.

    ids       of the CTs in it, in its order, as far as it could be read
    taken     ids of the CTs that were unpacked
    problems  why there are wanted CTs that could not be taken
    """

    ids: list[str]
    taken: list[str]
    problems: list[str]


class _Damaged(Exception):
    """An archive cannot be read on."""


def find_archives(roots: Iterable[Path]) -> list[Archive]:
    """Return the tar files below some folders, each once, by name."""
    paths = {path.absolute() for root in roots for path in root.glob("**/*") if path.name.endswith(SUFFIXES) and path.is_file()}
    stats = {path: path.stat() for path in sorted(paths, key=lambda path: (path.name, path))}
    return [Archive(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()]


def unpack(archive: Archive, folder: Path, wanted: Collection[str], on_bytes: Callable[[int], None]) -> Contents:
    """Unpack the wanted CTs of an archive below `folder`, each once, and return what came of it.

    `on_bytes` is called with the bytes of the archive read so far. An archive that was read to its end leaves a marker; of a
    damaged one everything before the damage is taken. OSError where nothing can be written.
    """
    found = Contents([], [], [])
    try:
        for member, read in _members(archive, on_bytes):
            name = MEMBER.fullmatch(member.name)
            if not name:
                continue
            is_wanted = name[1] in wanted and name[1] not in found.taken
            if not member.isreg() or member.issparse():
                if is_wanted:
                    found.problems.append(f"{member.name} is a link, a device or sparse, and is not taken")
                continue
            found.ids.append(name[1])
            if is_wanted:
                _put(folder, name[1], read)
                found.taken.append(name[1])
    except _Damaged as error:
        where = f"in or behind {found.ids[-1]}" if found.ids else "before the first CT"
        found.problems.append(f"a whole tar archive wanted, got damage {where}: {error}; download it again")
    else:
        marker = {"archive": str(archive.path), "bytes": archive.bytes, "mtime_ns": archive.mtime_ns, "ids": found.ids}
        Location(str(folder)).write(_marker(archive), json.dumps(marker).encode())
    return found


def ids_known(archive: Archive, folder: Path) -> list[str] | None:
    """Return the ids in an archive that was read to its end and has not changed; None where nothing says so."""
    try:
        marker = json.loads(Location(str(folder)).read(_marker(archive)) or b"null")
    except ValueError:
        return None
    if not isinstance(marker, dict) or (marker.get("bytes"), marker.get("mtime_ns")) != (archive.bytes, archive.mtime_ns):
        return None
    return [str(name) for name in marker["ids"]]


def _marker(archive: Archive) -> str:
    where = hashlib.sha256(str(archive.path).encode(errors="surrogateescape")).hexdigest()[:12]
    return f"{MARKERS}/{archive.path.name}-{where}.json"


def _members(archive: Archive, on_bytes: Callable[[int], None]) -> Iterator[tuple[tarfile.TarInfo, Iterator[bytes]]]:
    """Yield every member with its content, to be read before the next; _Damaged where that cannot go on."""
    with _guarded(lambda: archive.path.open("rb")) as raw:
        stream = _guarded(lambda: _Counted(raw))
        tar = _guarded(lambda: tarfile.open(fileobj=stream, mode="r|"))  # noqa: SIM115 - it holds nothing but `raw`
        while member := _guarded(tar.next):
            on_bytes(raw.tell())
            yield member, _content(tar, member, lambda: on_bytes(raw.tell()))
        _guarded(lambda: stream.refuse_more_than_the_end(tar.offset))
        on_bytes(archive.bytes)


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo, on_chunk: Callable[[], None]) -> Iterator[bytes]:
    file = _guarded(lambda: tar.extractfile(member))
    assert file is not None, f"{member.name} is no regular file"
    while chunk := _guarded(lambda: file.read(CHUNK)):
        yield chunk
        on_chunk()


def _guarded(step: Callable[[], T]) -> T:
    """Return what a step of reading returns; _Damaged where it fails, so that a failure to write is another thing."""
    try:
        return step()
    except DAMAGE as error:  # type: ignore[misc]  # isal's stub calls its error an instance
        raise _Damaged(str(error) or type(error).__name__) from None


class _Counted(io.RawIOBase):
    """A tar, decompressed, that knows where the last byte stood that is not 0.

    tarfile takes an unreadable header, and the end of a file that was cut off between two members, for the end of a tar.
    """

    def __init__(self, raw: IO[bytes]) -> None:
        is_gzip = raw.read(len(GZIP)) == GZIP
        raw.seek(0)
        self.file = igzip.open(raw) if is_gzip else raw
        self.position = self.last = 0

    def read(self, size: int = -1) -> bytes:
        """Return up to `size` bytes."""
        data: bytes = self.file.read(size)
        content = len(data.rstrip(b"\0"))
        self.last = self.position + content if content else self.last
        self.position += len(data)
        return data

    def refuse_more_than_the_end(self, offset: int) -> None:
        """Read to the end; ValueError unless only what ends a tar stands from `offset` on."""
        while self.read(CHUNK):
            pass
        if self.last > offset:
            raise ValueError(f"an unreadable header at byte {offset}")
        if self.position < offset + END:
            raise ValueError(f"no end of the tar at byte {self.position}")


def _put(folder: Path, name: str, chunks: Iterator[bytes]) -> None:
    """Write FOLDER/NAME/ct.nii.gz, whole or not at all."""
    partial, target = folder / f".{name}.partial", folder / name
    partial.unlink(missing_ok=True)  # of a run that was killed
    try:
        with partial.open("xb") as file:
            for chunk in chunks:
                file.write(chunk)
        sync(partial)
        if target.is_symlink():
            raise FileExistsError(errno.EEXIST, "a folder wanted, found a link", str(target))
        target.mkdir(exist_ok=True)
        partial.replace(target / SCAN)
    finally:
        partial.unlink(missing_ok=True)
    sync(target)
    sync(folder)
