"""A request's body -> files in a private folder, counted and timed -> one scan, whose store is made.

The files have names that lead nowhere. What becomes of them happens in a process of its own (see child.py): archives
unpacked, one scan found, its store made. All that reads a stranger's bytes is there, limited in memory and time; the
server itself only stores and forwards them.
"""

from __future__ import annotations

import asyncio
import re
import stat
import zipfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from photon_data.errors import Refused, UsageError, first_few, refusal
from photon_data.files import NO_SPACE
from photon_data.prepare_file import Job, prepare_file
from photon_data.readers.find import find_scans, left_alone
from photon_data.readers.header import SUFFIXES
from photon_data.recipe import Policy, Recipe
from photon_data.records import REFUSED, NoSpace
from photon_data.scan import Source
from photon_pipelines import child
from photon_pipelines.serving.volumes import Limits

MAX_FIELD_BYTES = 200
MAX_NAME_BYTES = 200
# What a name may be to be kept: headers name their data files. Others are numbered.
PLAIN_NAME = re.compile(r"\w[\w .()+,=@-]{0,199}")
SUFFIX = re.compile(r"(\.(nii|hdr|img|nrrd|raw|mha|mhd|nhdr|zraw|dcm|ima|dicom|zip))?(\.gz)?$", re.IGNORECASE)


def place_for(folder: Path, name: str, number: int) -> Path:
    """Return a new path for file `number`, in `folder` or one level below; its name is the last part of `name`.

    "a/IM1" -> folder/IM1; a second "b/IM1" -> folder/-2/IM1; "../.x.dcm" -> folder/file-3.dcm. The folders that a name
    leads through do not count. No file can be named like the folder that is made for a second one.
    """
    last = re.split(r"[/\\]", name)[-1].strip()
    if not PLAIN_NAME.fullmatch(last) or ".." in last or len(last.encode("utf-8", "replace")) > MAX_NAME_BYTES:
        found = SUFFIX.search(last)
        last = f"file-{number}{found[0].lower() if found else ''}"
    if not (folder / last).exists():
        return folder / last
    (folder / f"-{number}").mkdir()
    return folder / f"-{number}" / last


async def receive(chunks: AsyncIterator[bytes], content_type: str, folder: Path, limits: Limits) -> dict[str, str]:
    """Write the files of a multipart body into `folder`; return its other fields.

    Refused for a body that is no multipart or is damaged, without a file, or over the limits. OSError on a full disk.
    """
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        found = "another content type"
        raise refusal("not-multipart", "", "multipart/form-data with files", found, "curl -F file=@scan.nii.gz does it")
    parts = _Parts(folder, limits)
    try:
        parser = MultipartParser(options[b"boundary"], parts.callbacks())  # type: ignore[arg-type]
        async with asyncio.timeout(limits.seconds):
            async for chunk in chunks:
                parser.write(chunk)
        parser.finalize()
    except FormParserError:
        raise refusal("damaged-upload", "", "a whole multipart body", "a damaged one", "send it again") from None
    except TimeoutError:
        expected = f"an upload of at most {limits.seconds:.0f} s"
        raise refusal(
            "upload-timeout", "", expected, "one that is still coming", "send it over a faster line"
        ) from None
    finally:
        parts.close()
    if not parts.is_ended:
        raise refusal("damaged-upload", "", "a whole multipart body", "one that was cut off", "send it again")
    if not parts.files:
        raise refusal("no-file", "", "at least one file", "none", "curl -F file=@scan.nii.gz does it")
    return {name: value.decode("utf-8", "replace") for name, value in parts.fields.items()}


@dataclass
class _Parts:
    """What the parser has found so far. Its callbacks get data, start, end."""

    folder: Path
    limits: Limits
    files: int = 0
    size: int = 0
    fields: dict[str, bytes] = field(default_factory=dict)
    is_ended: bool = False
    file: BinaryIO | None = None
    field_name: str = ""
    header: bytes = b""
    value: bytes = b""
    disposition: bytes = b""

    def callbacks(self) -> dict[str, object]:
        names = (
            "part_begin",
            "header_field",
            "header_value",
            "header_end",
            "headers_finished",
            "part_data",
            "part_end",
        )
        return {f"on_{name}": getattr(self, name) for name in (*names, "end")}

    def part_begin(self) -> None:
        self.header = self.value = self.disposition = b""

    def header_field(self, data: bytes, start: int, end: int) -> None:
        self.header += data[start:end]

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self.value += data[start:end]

    def header_end(self) -> None:
        if self.header.lower() == b"content-disposition":
            self.disposition = self.value
        self.header = self.value = b""

    def headers_finished(self) -> None:
        _, options = parse_options_header(self.disposition)
        if b"filename" in options:
            self.files += 1
            if self.files > self.limits.files:
                raise too_many(self.limits)
            name = options[b"filename"].decode("utf-8", "replace")
            self.file = place_for(self.folder, name, self.files).open("xb")
        else:
            self.field_name = options.get(b"name", b"").decode("utf-8", "replace")[:MAX_FIELD_BYTES]
            if len(self.fields) > 20:
                raise refusal("too-large", "", "a few fields beside the files", "many", "send the files alone")
            self.fields[self.field_name] = b""

    def part_data(self, data: bytes, start: int, end: int) -> None:
        self.size += end - start
        if self.size > self.limits.bytes:
            raise too_large(self.limits)
        if self.file is not None:
            self.file.write(data[start:end])
            return
        self.fields[self.field_name] += data[start:end]
        if len(self.fields[self.field_name]) > MAX_FIELD_BYTES:
            raise refusal("too-large", "", f"fields of at most {MAX_FIELD_BYTES} bytes", "a longer one", "shorten it")

    def part_end(self) -> None:
        self.close()

    def end(self) -> None:
        self.is_ended = True

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None


def too_large(limits: Limits) -> Refused:
    """Return the refusal of an upload of too many bytes."""
    return refusal(
        "too-large", "", f"at most {limits.bytes:,} bytes", "more", "--max-upload-gb of the server allows more"
    )


def too_many(limits: Limits) -> Refused:
    """Return the refusal of an upload of too many files."""
    return refusal("too-many-files", "", f"at most {limits.files:,} files", "more", "send one series alone")


# --- in the process of its own

ZIP = b"PK\x03\x04"
CHUNK = 1 << 20


def take_in(job: dict[str, Any]) -> dict[str, Any]:
    """Return the record of the scan in a folder of uploaded files: {"state", "code", "reason", "store", ...}.

    `job` has folder, out, id, series ("" for the only one), recipe, policy and limits, as JSON. The folder is a
    stranger's: no name in it may turn up in the record.
    """
    folder, limits = Path(job["folder"]), Limits(*job["limits"])
    try:
        unpack_all(folder, limits)
        source = _one_scan(folder, job["series"])
    except (Refused, UsageError) as error:
        return {"state": REFUSED, "code": getattr(error, "code", "unreadable"), "reason": str(error)}
    source = replace(source, id=job["id"], patient="", hidden=True)
    recipe, policy = Recipe.from_json(job["recipe"]), Policy(**job["policy"])
    return prepare_file(Job(source, job["out"], recipe, policy)).to_json()


def unpack_all(folder: Path, limits: Limits) -> None:
    """Put the files of the zip archives among the uploaded files in their place; Refused, NoSpace.

    The limits are for all archives together. An archive in an archive is left as it is.
    """
    archives = [path for path in sorted(folder.rglob("*")) if path.is_file() and _is_zip(path)]
    for number, path in enumerate(archives, start=1):
        target = folder / f"-zip-{number}"  # no uploaded file can have such a name
        target.mkdir()
        try:
            limits = _unpack(path, target, limits)
        except OSError as error:
            if error.errno in NO_SPACE:
                raise NoSpace(error.errno, "no space left to unpack an upload") from None
            raise _damaged() from None  # what bzip2 says of damage
        except Refused:
            raise
        except Exception:  # the edge of a work item: whatever a stranger's archive does to its parser
            raise _damaged() from None
        path.unlink()


def _damaged() -> Refused:
    return refusal("damaged-zip", "", "a whole zip archive", "a damaged one", "pack it again")


def _is_zip(path: Path) -> bool:
    if path.name.lower().endswith(tuple(SUFFIXES)):  # its reader says what is wrong with it
        return False
    with path.open("rb") as file:
        return file.read(len(ZIP)) == ZIP


def _unpack(archive: Path, folder: Path, limits: Limits) -> Limits:
    """Write the regular files of a zip archive into `folder`, by the last parts of their names; return what is left.

    Bytes are counted as they are written: what the archive says of its sizes does not count. Links are left aside.
    Refused for too many; what zipfile raises for damage.
    """
    left = limits.bytes
    with zipfile.ZipFile(archive) as members:
        infos = [one for one in members.infolist() if not one.is_dir() and not stat.S_ISLNK(one.external_attr >> 16)]
        if len(infos) > limits.files:
            raise too_many(limits)
        for number, info in enumerate(infos, start=1):
            if info.flag_bits & 1:
                raise refusal("encrypted", "", "an archive without a password", "one with", "pack it again without")
            with members.open(info) as packed, place_for(folder, info.filename, number).open("xb") as file:
                while data := packed.read(CHUNK):
                    left -= len(data)
                    if left < 0:
                        raise too_large(limits)
                    file.write(data)
    return limits._replace(bytes=left, files=limits.files - len(infos))


def _one_scan(folder: Path, series: str) -> Source:
    """Return the only scan in the folder, or the DICOM series of that key; Refused."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    found = find_scans(files[0] if len(files) == 1 else folder)
    sources = [source for source in found.sources if series in ("", _key(source))]
    if len(sources) == 1:
        return sources[0]
    if not found.sources:
        others = left_alone(found.ignored)
        raise refusal("no-scan", "", "a scan (NIfTI, NRRD, MetaImage or DICOM)", f"none among {others}", "send one")
    keys = [f"{_key(source)} ({len(source.names)} files)" for source in found.sources if source.format == "dicom"]
    names = f": {first_few(keys, 20)}" if len(keys) == len(found.sources) else ""
    remedy = "say which: the field series with one of these" if names else "send one at a time"
    raise refusal("several-scans", "", "one scan", f"{len(sources)} of {len(found.sources)}{names}", remedy)


def _key(source: Source) -> str:
    return source.path.rpartition("#")[2] if source.format == "dicom" else ""


def main(address_space_bytes: int) -> None:
    """Answer the server until it ends."""
    child.main(address_space_bytes, take_in)
