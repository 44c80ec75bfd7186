"""What can be wrong with a person's data: exceptions with a sentence to read, and refusals that all readers share."""

from __future__ import annotations

import difflib
import struct
import traceback
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

# As many bytes as it takes to tell a NIfTI header from anything else.
HEAD_BYTES = 352
# Remedies that many refusals share.
COPY_AGAIN, EXPORT_AGAIN = "copy or download it again", "export it again"
SHORT_TEXT = "a short text, perhaps an error message"
DOWNLOAD_AGAIN = "the download failed (not found, or no access): log in and download it again"
# What lies in place of a scan that was not downloaded, as its lower-case text begins: what it is, and what to do.
_PLACEHOLDERS = {
    b"version https://git-lfs.github.com/": ("a Git LFS pointer", "run git lfs pull in its repository"),
    b"version https://hawser.github.com/": ("a Git LFS pointer", "run git lfs pull in its repository"),
    b"/annex/objects/": ("a git-annex pointer", "run git annex get (or datalad get) in its repository"),
    b"<!doctype html": ("a web page", DOWNLOAD_AGAIN),
    b"<html": ("a web page", DOWNLOAD_AGAIN),
    b"<": ("an XML text, as servers answer errors", DOWNLOAD_AGAIN),
    b"{": ("a JSON text, as servers answer errors", DOWNLOAD_AGAIN),
}
_MAGICS = {
    b"\x1f\x8b": "gzip data",
    b"\xff\xd8\xff": "a JPEG picture",
    b"\x89PNG": "a PNG picture",
    b"PK\x03\x04": "a ZIP archive",
    b"%PDF": "a PDF document",
    b"\x89HDF": "an HDF5 file",
    b"NRRD": "an NRRD file",
    b"BZh": "bzip2 data",
    b"\x28\xb5\x2f\xfd": "zstandard data",
    b"\xfd7zXZ": "xz data",
}
PACKED = ("a ZIP archive", "bzip2 data", "zstandard data", "xz data")


class Refused(ValueError):
    """A scan that must not become a store, and why: a stable slug to group by ("truncated"), and a sentence to read.

    Neither may quote free text of a header: that is where patients' names are. `found` is the part of the sentence that
    says what is there; `accept` is what `--accept` takes to let this very scan pass, "CODE=?" where a person has to
    choose, and "" where nothing does.
    """

    def __init__(self, code: str, message: str, *, found: str = "", accept: str = "") -> None:
        super().__init__(message)
        self.code, self.message, self.found, self.accept = code, message, found or message, accept


class UsageError(ValueError):
    """A command, option or table that cannot be followed: expected, found, what to do. Nothing was written."""


def refusal(code: str, name: str, expected: str, found: object, remedy: str, accept: str = "") -> Refused:
    """Return the refusal of a file (or, without a name, of several) in one sentence: expected X, found Y; do Z."""
    sentence = f"{name and name + ': '}expected {expected}, found {found}; {remedy}"
    return Refused(code, sentence, found=str(found), accept=accept)


def not_a(kind: str, path: Path, remedy: str) -> Refused:
    """Return the refusal of a file that is not the `kind` its name says: "empty" or "not-a-scan"."""
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    found, remedy = _placeholder(head) or (_looks_like(head), remedy)
    if found == SHORT_TEXT:
        remedy = "look into it, and download it again"
    elif found in PACKED:
        remedy = "unpack it, and prepare what is in it"
    return refusal("not-a-scan" if head else "empty", path.name, kind, found, remedy)


def refuse_placeholder(path: Path) -> None:
    """Raise Refused for a file without bytes, and for one that stands for a scan that was not downloaded."""
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if not head or _placeholder(head):
        raise not_a("a scan", path, COPY_AGAIN)


def is_dicom(head: bytes) -> bool:
    """Tell whether a file begins as DICOM: with the magic after 128 bytes of preamble, or with a bare data set."""
    return head[128:132] == b"DICM" or _begins_data_set(head)


def _begins_data_set(head: bytes) -> bool:
    """Tell whether there are three elements of groups 2 or 8, their tags in ascending order, their lengths even."""
    order, at, last = "<" if head[1:2] == b"\0" else ">", 0, (0, 0)
    for _ in range(3):
        element = head[at : at + 12]
        if len(element) < 12:
            return False
        tag, vr = struct.unpack_from(order + "HH", element), element[4:6]
        if vr in (b"OB", b"OW", b"SQ", b"UN", b"UT"):
            length, start = struct.unpack_from(order + "L", element, 8)[0], 12
        elif vr.isalpha() and vr.isupper():
            length, start = struct.unpack_from(order + "H", element, 6)[0], 8
        else:  # implicit
            length, start = struct.unpack_from(order + "L", element, 4)[0], 8
        if tag <= last or tag[0] not in (2, 8) or length % 2:
            return False
        at, last = at + start + length, tag
    return True


def _placeholder(head: bytes) -> tuple[str, str] | None:
    """Return what stands in place of a scan, and what to do about it; None where the first bytes are not such."""
    if not head:
        return "a file without bytes", COPY_AGAIN
    packed = head.startswith(b"\x1f\x8b")
    text = head
    if packed:  # servers compress their answers
        try:
            text = zlib.decompressobj(31).decompress(head, HEAD_BYTES)
        except zlib.error:
            return None
    begin = text.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if b"<html" in begin and begin.startswith(b"<"):
        begin = b"<html"
    starts = [start for start in _PLACEHOLDERS if begin.startswith(start) and (len(start) > 1 or _is_text(text))]
    found = _PLACEHOLDERS[starts[0]] if starts else None
    return found and (f"{'gzip data of ' * packed}{found[0]}", found[1])


def _is_text(head: bytes) -> bool:
    """Tell whether bytes are a text in UTF-8 (its last letter may be cut) without control characters."""
    text = head.decode("utf-8", "replace").rstrip("\ufffd")
    return "\ufffd" not in text and all(letter.isprintable() or letter in "\t\n\r\ufeff" for letter in text)


def _looks_like(head: bytes) -> str:
    """Return in words what the first bytes of a file are; never a quotation of them."""
    for magic, words in _MAGICS.items():
        if head.startswith(magic):
            return words
    if is_dicom(head):
        return "a DICOM file"
    if head[344:348] in (b"n+1\0", b"ni1\0") or head[4:8] in (b"n+2\0", b"ni2\0"):
        return "an uncompressed NIfTI file"
    if not head.strip(b"\0"):
        return "zeros"
    if _is_text(head):
        return SHORT_TEXT if len(head) < HEAD_BYTES else "text"
    return "data of an unknown kind"


def unreadable(path: Path, error: OSError) -> Refused:
    """Return the refusal of a file that the system does not let us read."""
    return refusal("unreadable", path.name, "a readable file", f"'{error.strerror}'", "restore it or its permissions")


def first_few(names: Sequence[str], most: int = 3) -> str:
    """Return names in a sentence, "a, b, c, ..." where there are more than `most`."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is spelled most like `name`, in upper or lower case; None where none is like it."""
    by_lower = {other.casefold(): other for other in known}
    near = difflib.get_close_matches(name.casefold(), by_lower, n=1, cutoff=0.5)
    return by_lower[near[0]] if near else None


def name_hint(name: str, known: Iterable[str]) -> str:
    """Return "did you mean 'spacing_mm'?" for a misspelled name, else "there are a, b, c"."""
    known = list(known)
    near = nearest_name(name, known)
    return f"did you mean {near!r}?" if near else f"there are {', '.join(known)}"


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory did not suffice: Python's own, or in the words of a C++ library."""
    words = ["bad_alloc", "failed to allocate", "unable to allocate", "cannot allocate memory", "out of memory"]
    words += ["not enough memory"]
    is_library = isinstance(error, RuntimeError | OSError | SystemError)
    return isinstance(error, MemoryError) or (is_library and any(word in str(error).lower() for word in words))


def unforeseen(error: Exception) -> str:
    """Return where an unforeseen error arose, without its text: that may quote a header, and headers name patients."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"an unforeseen {type(error).__name__} in {Path(frame.filename).name}, line {frame.lineno}"
