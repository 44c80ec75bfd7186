"""AbdomenAtlas 3.0 Mini: 9,262 abdominal CTs by BDMAP id, each with up to five machine-made reports in one table.

Its CTs, which DeepTumorVQA asks about too, lie below a folder as <anywhere>/BDMAP_00000001/ct.nii.gz, or in tar
archives under these names. DeepTumorVQA's questions are made from these very reports: the annotation `benchmark` keeps
its CTs out.
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
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

from isal import igzip, isal_zlib

from photon_data.datasets.base import UNPACK, DataSet, FoundVolumes, OnFile, SourceVolume, read_rows
from photon_data.errors import UsageError, first_few
from photon_data.files import Location, write_whole
from photon_data.json_text import from_json
from photon_data.questions.question import Question
from photon_data.questions.table import read_text
from photon_data.readers.find import find_scans
from photon_data.scan import Source

KEY = "BDMAP ID"
_REPORTS = "radiologist note, structured report, narrative report, fusion structured report, fusion narrative report"
REPORTS = tuple(_REPORTS.split(", "))
FACTS = ("sex", "age", "scanner", "contrast")
NO_TEXT = ("", "nan", "none", "n/a")


def read(entry: DataSet, on_file: OnFile) -> tuple[FoundVolumes, list[Question]]:
    """Return the CTs below the entry's roots and one question per report; UsageError."""
    files = entry.annotations
    found = find_cts(entry, on_file)
    splits = _splits(entry, files.get("splits", ()))
    benchmark = sorted(_ids_in(files.get("benchmark", ())))
    left_out = {name: "in DeepTumorVQA's benchmark" for name in benchmark if splits.get(name) != "test"}
    notes = list(found.notes)
    questions = _questions(entry, splits, notes)
    return found._replace(left_out=left_out, notes=notes), questions


def _questions(entry: DataSet, splits: dict[str, str], notes: list[str]) -> list[Question]:
    """Return a question per row whose report (the columns that the entry names, in order) is not empty."""
    columns = entry.wording.report
    if not columns or any(column not in REPORTS for column in columns):
        found = ", ".join(columns) or "none"
        raise entry.error(f"expected some of {', '.join(REPORTS)} in `questions: {{report: ...}}`, found {found}")
    originals = original_ids(entry.annotations.get("ids", ()))
    questions, empty, unsplit = [], [], []
    for path, row in read_rows(entry.annotations.get("reports", ()), (KEY, *columns)):
        ct = row.values[KEY].strip()
        if not ID.fullmatch(ct):
            raise UsageError(f"{path}, {row.place}: expected an id like BDMAP_00000001 in {KEY!r}, found {ct!r}")
        texts = [row.values[column].strip() for column in columns]
        answer = "\n".join(text for text in texts if text.lower() not in NO_TEXT)
        if not answer:
            empty.append(ct)
        elif splits and ct not in splits:
            unsplit.append(ct)
        else:
            facts = {name: row.values.get(name, "") for name in FACTS}
            extra = {**facts, "subtask": "+".join(columns), "source_id": originals.get(ct, "")}
            questions.append(Question(f"report/{ct}", ct, "", answer, splits.get(ct), ct, "report", extra=extra))
    if empty:
        notes.append(f"{len(empty)} CTs have no text in {', '.join(columns)} and make no question, {empty[0]} first")
    if unsplit:
        notes.append(f"{len(unsplit)} CTs are in none of the lists of splits and make no question, {unsplit[0]} first")
    return questions


def _splits(entry: DataSet, paths: Sequence[Path]) -> dict[str, str]:
    """Return {id: split} of lists called IID_train.csv, IID_test.csv, OOD_...; UsageError for an id in two splits."""
    splits: dict[str, str] = {}
    twice = []
    for path in paths:
        split = path.stem.rpartition("_")[2]
        twice += [name for name in sorted(_ids_in([path])) if splits.setdefault(name, split) != split]
    if twice:
        found = f"{len(twice)} in several ({first_few(twice)})"
        raise entry.error(f"expected one split per CT, found {found}; give IID or OOD lists only")
    return splits


# --- CTs below a folder

ID = re.compile(r"BDMAP_\d{8}")
# AbdomenAtlas_ID_mapping.csv: which scan of which public data set became which id.
ORIGINAL, RENAMED = "original id", "AbdomenAtlas_id"


def find_cts(entry: DataSet, on_file: OnFile) -> FoundVolumes:
    """Return the CTs of an entry, by BDMAP id; UsageError for an id that is there twice below the roots.

    Masks beside the CTs are left alone. A CT below the roots goes before one that was unpacked (option `unpack`).
    """
    unpacked: Path | None = entry.options.get(UNPACK)
    found: dict[str, Source] = {}
    for root in entry.roots:
        for source in _cts_below(root, on_file):
            if unpacked and source.files[0].is_relative_to(unpacked.absolute()):
                continue
            if (other := found.setdefault(source.id, source)).files != source.files:
                both = f"{other.files[0]} and {source.files[0]}"
                raise entry.error(f"expected every CT once, found {both}; narrow `root`")
    if unpacked and unpacked.exists():
        found = {source.id: source for source in _cts_below(unpacked, on_file)} | found
    archives = [] if unpacked else find_archives(entry.roots)
    hint = "name a folder to unpack what is needed, as `options: {unpack: FOLDER}`, or extract them with tar -xf"
    notes = [f"{len(archives)} archives are not read, {archives[0].name} first: {hint}"] if archives else []
    return FoundVolumes([SourceVolume(entry, found[name]) for name in sorted(found)], notes=notes)


def _cts_below(root: Path, on_file: OnFile) -> Iterator[Source]:
    for source in find_scans(root, on_file=on_file, label_maps=True).sources:
        parts = (root.name, *Path(source.path).parts)
        if parts[-1] == SCAN and ID.fullmatch(parts[-2]):
            yield replace(source, id=parts[-2])


def _ids_in(paths: Iterable[Path]) -> set[str]:
    """Return every BDMAP id anywhere in some text files; UsageError for a file without any."""
    ids = {path: ID.findall(read_text(path, (path.suffix.lower(),))) for path in paths}
    for path, found in ids.items():
        if not found:
            raise UsageError(f"{path}: expected BDMAP ids (BDMAP_00000001), found none")
    return set().union(*ids.values())


def original_ids(paths: Iterable[Path]) -> dict[str, str]:
    """Return {BDMAP id: id in the data set it was taken from}. Some scans were taken twice, under two BDMAP ids."""
    rows = (row.values for _, row in read_rows(paths, (ORIGINAL, RENAMED)))
    return {values[RENAMED].strip(): values[ORIGINAL].strip() for values in rows}


# --- CTs out of tar archives: <anything>/BDMAP_00000001/ct.nii.gz -> FOLDER/BDMAP_00000001/ct.nii.gz
#
# Archives come from strangers. Only regular files of that name are taken, and the path to write is made from the id
# alone: no name, link or device in an archive leads anywhere. A CT is there whole or not at all.

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


def _marker(archive: Path) -> str:
    """Return the name of the file that says which CTs are in an archive. One that was read to its end has it."""
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
