"""A request's body -> files in a private folder, counted and timed, with names that lead nowhere.

The server only stores and forwards a stranger's bytes; they are read in a process of its own, see intake.py.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from photon_data.errors import Refused, refusal
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
