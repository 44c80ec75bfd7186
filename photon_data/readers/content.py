"""What the first bytes of a file say it is, whatever its name says."""

from __future__ import annotations

HEAD_BYTES = 352
GZIP_MAGIC = b"\x1f\x8b"
DICOM_MAGIC = b"DICM"

_MAGICS = (
    (GZIP_MAGIC, "gzip data"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"\x89PNG", "a PNG picture"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"%PDF", "a PDF document"),
    (b"\x89HDF", "an HDF5 file"),
    (b"NRRD", "an NRRD file"),
    (b"BZh", "bzip2 data"),
    (b"\x28\xb5\x2f\xfd", "zstandard data"),
    (b"\xfd7zXZ", "xz data"),
)


def is_dicom(head: bytes) -> bool:
    """Tell whether the first bytes of a file carry the DICOM magic after its 128 bytes of preamble."""
    return head[128:132] == DICOM_MAGIC


def is_nifti(head: bytes) -> bool:
    """Tell whether the first bytes of a file are a NIfTI-1 or NIfTI-2 header."""
    return head[344:348] in (b"n+1\0", b"ni1\0") or head[4:8] in (b"n+2\0", b"ni2\0")


def describe(head: bytes) -> str:
    """Return in words what the first 352 bytes of a file look like; never a quotation of them."""
    for magic, words in _MAGICS:
        if head.startswith(magic):
            return words
    if is_dicom(head):
        return "a DICOM file"
    if is_nifti(head):
        return "an uncompressed NIfTI file"
    if head and not head.strip(b"\0"):
        return "zeros"
    is_text = all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head)
    return "text" if is_text else "data of an unknown kind"
