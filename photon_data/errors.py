"""What can be wrong with a person's data: exceptions with a sentence to read, and refusals that all readers share."""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path

# As many bytes as it takes to tell a NIfTI header from anything else.
HEAD_BYTES = 352
# Remedies that many refusals share.
COPY_AGAIN, EXPORT_AGAIN = "copy or download it again", "export it again"
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


class Refused(ValueError):
    """A scan that must not become a store, and why: a stable slug to group by ("truncated"), and a sentence to read.

    Neither may quote free text of a header: that is where patients' names are.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message


class UsageError(ValueError):
    """A command, option or table that cannot be followed: expected, found, what to do. Nothing was written."""


def refusal(code: str, name: str, expected: str, found: object, remedy: str) -> Refused:
    """Return the refusal of a file (or, without a name, of several) in one sentence: expected X, found Y; do Z."""
    return Refused(code, f"{name and name + ': '}expected {expected}, found {found}; {remedy}")


def not_a(kind: str, path: Path, remedy: str) -> Refused:
    """Return the refusal of a file that is not the `kind` its name says: "empty" or "not-a-scan"."""
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if not head:
        return refusal("empty", path.name, kind, "a file without bytes", COPY_AGAIN)
    return refusal("not-a-scan", path.name, kind, _looks_like(head), remedy)


def is_dicom(head: bytes) -> bool:
    """Tell whether the first bytes of a file have the DICOM magic after its 128 bytes of preamble."""
    return head[128:132] == b"DICM"


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
    return "text" if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head) else "data of an unknown kind"


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


def unforeseen(error: Exception) -> str:
    """Return where an unforeseen error arose, without its text: that may quote a header, and headers name patients."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"an unforeseen {type(error).__name__} in {Path(frame.filename).name}, line {frame.lineno}"
