"""The data file that a header in another file refers to: beside the header or below it, never anywhere else."""

from __future__ import annotations

from pathlib import Path

from photon_data.errors import Refused

MAX_REFERENCE = 255


def beside(header: Path, reference: str) -> Path:
    """Return the data file that `reference`, a text of the header, means. It is trusted no further than the header's folder.

    Refused data-file: several files or a pattern of names; a path that leads out, by dots, links or a root; no such file.
    """
    words = reference.split()
    if not words or words[0].upper() == "LIST" or "%" in reference:
        raise Refused("data-file", f"{header.name}: one data file wanted, its header lists several; save the scan as one file")
    folder = header.parent.resolve()
    data = folder / reference.strip()
    if "\0" in reference or len(reference) > MAX_REFERENCE or not data.resolve().is_relative_to(folder):
        raise Refused("data-file", f"{header.name}: a data file in its own folder wanted, it points elsewhere; move it there")
    if not data.is_file():
        raise Refused("data-file", f"{header.name}: its data file beside it wanted, there is none; copy both files")
    return header.parent / reference.strip()
