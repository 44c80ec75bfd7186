"""Headers that are lines of text, and headers whose voxels lie in another file.

That file (or a link to it) lies in the header's folder. Refused "data-file" where it is missing, outside of it, or one
of several.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from photon_data.errors import EXPORT_AGAIN, refusal

# The field of a MetaImage header that is its last line: where the voxels are.
METAIMAGE_LAST = "ElementDataFile"
MAX_HEADER_BYTES = 1 << 20
MAX_REFERENCE = 255
DATA_FILE = ("data file", "datafile")
LIST_OF_FILES = re.compile(r"data ?file:\s*LIST\b", re.IGNORECASE)


class HeaderText(NamedTuple):
    """Lines of a header (without line ends) and the number of bytes it takes with its last line end."""

    lines: list[str]
    length: int


def nrrd_text(path: Path) -> HeaderText:
    """Return the header of an NRRD file, to the empty line that ends it or its list of data files; Refused."""
    return _text(path, lambda line: line == "" or LIST_OF_FILES.match(line) is not None)


def metaimage_text(path: Path) -> HeaderText:
    """Return the header of a MetaImage, to its last field; Refused."""
    return _text(path, lambda line: line.partition("=")[0].strip() == METAIMAGE_LAST)


def _text(path: Path, is_last: Callable[[str], bool]) -> HeaderText:
    """Return the header up to the first line that `is_last`, or the whole of a short file that has no such line."""
    lines, length = list[str](), 0
    with path.open("rb") as file:
        while line := file.readline(MAX_HEADER_BYTES - length):  # of an object, no more is read than that takes
            length += len(line)
            lines.append(line.decode("latin-1").rstrip())  # Latin-1 never fails
            if is_last(lines[-1]):
                return HeaderText(lines, length)
    if length == MAX_HEADER_BYTES:
        raise refusal("bad-header", path.name, "a header of at most 1 MB", "no end of it", EXPORT_AGAIN)
    return HeaderText(lines, length)


def nifti_data_file(path: Path) -> Path:
    """Return the file with the voxels of a NIfTI header: the .img or .img.gz beside it; Refused."""
    stem = path.name[: path.name.lower().rindex("hdr")]
    ends = ("IMG", "IMG.GZ") if "HDR" in path.name[len(stem) :] else ("img", "img.gz")
    found = [data for data in (path.with_name(stem + end) for end in ends) if data.is_file()]
    if len(found) != 1:
        raise refusal("data-file", path.name, "one .img or .img.gz beside it", len(found), "copy the pair")
    return found[0]


def nrrd_data_file(path: Path) -> Path:
    """Return the file with the voxels of an NRRD header: `path` itself, or one in its folder; Refused."""
    fields = (re.split(":=?", line, maxsplit=1) for line in nrrd_text(path).lines)
    references = [value[0] for key, *value in fields if key.strip().lower() in DATA_FILE and value]
    return _beside(path, references[0].strip()) if references else path


def metaimage_data_file(path: Path) -> Path:
    """Return the file with the voxels of a MetaImage header: `path` itself, or one in its folder; Refused."""
    key, _, value = "".join(metaimage_text(path).lines[-1:]).partition("=")
    is_detached = key.strip() == METAIMAGE_LAST and value.strip().upper() != "LOCAL"
    return _beside(path, value.strip()) if is_detached else path


def _beside(header: Path, reference: str) -> Path:
    words = reference.split()
    if not words or words[0].upper() == "LIST" or "%" in reference:
        raise refusal("data-file", header.name, "one data file", "a list in its header", "save it as one file")
    folder = header.parent.resolve()
    data = folder / reference  # may be a link: a cache keeps all of its files elsewhere
    if "\0" in reference or len(reference) > MAX_REFERENCE or not data.parent.resolve().is_relative_to(folder):
        raise refusal("data-file", header.name, "a data file in its folder", "a path that leads out", "move it there")
    if not data.is_file():
        raise refusal("data-file", header.name, "its data file beside it", "none", "copy both files")
    return header.parent / reference


# Suffix -> what finds the file with the voxels, where that can be another one.
DATA_FILES = {".hdr": nifti_data_file, ".hdr.gz": nifti_data_file, ".nrrd": nrrd_data_file, ".nhdr": nrrd_data_file}
DATA_FILES |= {".mha": metaimage_data_file, ".mhd": metaimage_data_file}
TEXT_HEADERS = {"nrrd": nrrd_text, "metaimage": metaimage_text}
