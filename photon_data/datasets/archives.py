"""CTs out of AbdomenAtlas' tar archives: <anything>/BDMAP_00000001/ct.nii.gz -> FOLDER/BDMAP_00000001/ct.nii.gz.

Archives come from strangers. Only regular files of that name are taken, and the path to write is made from the id
alone: no name, link or device in an archive leads anywhere. A CT is there whole or not at all.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import re
import shutil
import tarfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

from isal import igzip, isal_zlib

from photon_data.files import Location, write_whole
from photon_data.json_text import from_json

SUFFIXES = (".tar.gz", ".tgz", ".tar")
MEMBER = re.compile(r"(?:.*/)?(BDMAP_[0-9]{8})/ct\.nii\.gz")
SCAN = "ct.nii.gz"
GZIP = b"\x1f\x8b"
CHUNK = 1 << 20
# A few MB of gzip can hold a tar of billions of members, or of one whose name takes GBs.
MAX_MEMBERS, MAX_HEADER_BYTES = 1_000_000, 1 << 20
_GNU, _PAX = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK), (tarfile.XHDTYPE, tarfile.XGLTYPE)
LONG_HEADERS = (*_GNU, *_PAX, tarfile.SOLARIS_XHDTYPE)
SPARSE_GOES_ON = 482  # the byte of a header that says so


class Contents(NamedTuple):
    """What was found in an archive."""

    ids: list[str]  # of the CTs in it, in its order, as far as it could be read
    taken: list[str]  # ids of the CTs that were unpacked
    problems: list[str]  # why CTs that were asked for could not be taken


def find_archives(roots: Iterable[Path]) -> list[Path]:
    """Return the absolute paths of the tar files below some folders, each once, sorted by name."""
    paths = (path for root in roots for path in root.absolute().rglob("*"))
    found = {path for path in paths if path.name.endswith(SUFFIXES) and path.is_file()}
    return sorted(found, key=lambda path: (path.name, path))


def known_ids(archive: Path, folder: Path) -> list[str] | None:
    """Return the ids in an archive that was read to its end and has not changed since; None without such a marker."""
    try:
        marker = from_json(Location(str(folder)).read(_marker(archive)) or b"null")
    except ValueError:
        return None
    return marker.get("ids") if isinstance(marker, dict) and marker | _identity(archive) == marker else None


# The name of the file that says which CTs are in an archive. An archive that was read to its end has one.
def _marker(archive: Path) -> str:
    path_hash = hashlib.sha256(str(archive).encode(errors="surrogateescape")).hexdigest()[:12]
    return f".archives/{re.sub('[^A-Za-z0-9._-]', '-', archive.name)[-100:]}-{path_hash}.json"


def _identity(archive: Path) -> dict[str, Any]:
    stat = archive.stat()
    return {"archive": str(archive), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def unpack(archive: Path, folder: Path, ids: Collection[str], on_bytes: Callable[[int], None]) -> Contents:
    """Unpack the CTs with these ids from an archive to `folder`, each once, and return what was found.

    `on_bytes` gets the number of bytes of the archive that have been read so far. An archive that was read to its end
    leaves a marker; of a damaged one everything before the damage is taken. OSError if nothing can be written.
    """
    found, identity = Contents([], [], []), _identity(archive)
    try:
        stream = _Stream(archive, on_bytes)
        with stream.raw, tarfile.open(fileobj=stream, mode="r|", tarinfo=_StrictMember) as tar:
            count = 0
            while member := tar.next():
                count, tar.members = count + 1, []  # type: ignore[attr-defined]  # tarfile would keep all of them
                if count > MAX_MEMBERS:
                    raise tarfile.ReadError(f"more than {MAX_MEMBERS:,} members")
                match = MEMBER.fullmatch(member.name)
                name = match[1] if match else ""
                is_requested = name in ids and name not in found.taken
                if name and member.isreg() and not member.issparse():
                    found.ids.append(name)
                    if is_requested:
                        _write(tar, member, folder, name)
                        found.taken.append(name)
                elif is_requested:
                    found.problems.append(f"{member.name} is a link, a device or sparse, and is not taken")
            _refuse_content_after_end(tar)
    except (tarfile.TarError, ValueError) as error:  # ValueError for headers that hold nonsense
        where = f"in or after {found.ids[-1]}" if found.ids else "before the first CT"
        found.problems.append(f"expected a whole tar archive, found damage {where}: {error}; download it again")
    else:
        Location(str(folder)).write(_marker(archive), json.dumps({**identity, "ids": found.ids}).encode())
    return found


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path, name: str) -> None:
    if (folder / name).is_symlink():
        raise FileExistsError(errno.EEXIST, "expected a folder, found a link", str(folder / name))
    content = tar.extractfile(member)
    assert content is not None, f"{member.name} is no regular file"
    # The temporary name is always the same: the next run removes what a killed one left.
    with write_whole(folder / name / SCAN, folder / f".{name}.partial") as temporary, temporary.open("xb") as file:
        shutil.copyfileobj(content, file, CHUNK)


class _Stream(io.RawIOBase):
    """The bytes of a tar, decompressed if need be. It raises ReadError, so that an OSError is one of writing."""

    def __init__(self, path: Path, on_bytes: Callable[[int], None]) -> None:
        self.on_bytes, self.next = on_bytes, 0
        with _as_read_error():
            self.raw = path.open("rb")
            self.file: IO[bytes] = igzip.open(self.raw) if self.raw.peek(2)[:2] == GZIP else self.raw

    def read(self, size: int = -1) -> bytes:
        with _as_read_error():
            data, position = self.file.read(size), self.raw.tell()
        if position >= self.next:
            self.on_bytes(position)
            self.next = position + CHUNK
        return data


@contextlib.contextmanager
def _as_read_error() -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError, zlib.error, isal_zlib.error) as error:  # type: ignore[misc]  # isal's stub: an instance
        raise tarfile.ReadError(str(error) or type(error).__name__) from None


class _StrictMember(tarfile.TarInfo):
    """A member whose header can be read. tarfile takes a bad or missing one for the end; here an empty block is.

    Of a long name, of attributes (pax) and of a sparse file's map, tarfile reads as much as their header says.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            found = super().frombuf(buf, encoding, errors)
            if found.type in LONG_HEADERS and found.size > MAX_HEADER_BYTES:
                raise tarfile.ReadError(f"a name or attributes of {found.size:,} bytes")
            if found.type == tarfile.GNUTYPE_SPARSE and buf[SPARSE_GOES_ON]:
                raise tarfile.ReadError("a sparse file of many parts")
            return found
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):
                raise
            raise tarfile.ReadError(str(error)) from None

    def _proc_gnusparse_10(self, *_: object) -> None:
        raise tarfile.ReadError("a sparse file of many parts")


def _refuse_content_after_end(tar: tarfile.TarFile) -> None:
    """Read the rest, which is at least one empty block; this also checks the end of a compressed file. ReadError."""
    assert tar.fileobj
    rest = 0
    while data := tar.fileobj.read(CHUNK):
        rest += len(data)
        if data.strip(b"\0"):
            raise tarfile.ReadError("an unreadable header")
    if rest < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("no end of the tar")
