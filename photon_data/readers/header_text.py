"""The text at the start of a file that is a header by lines (NRRD, MetaImage), and where its data begin."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

from photon_data.errors import Refused
from photon_data.readers.stream import read_head

MAX_HEADER_BYTES = 1 << 20


class HeaderText(NamedTuple):
    """Lines of a header (without line ends) and the number of bytes it takes with its last line end."""

    lines: list[str]
    length: int


def read_lines(path: Path, is_last: Callable[[str], bool]) -> HeaderText:
    """Return the header up to and with the first line that `is_last`, or the whole of a short file that has no such line.

    Refused bad-header where it goes on beyond 1 MB. Bytes are read as Latin-1, which never fails.
    """
    head = BytesIO(read_head(path, MAX_HEADER_BYTES))
    lines = []
    for line in head:
        lines.append(line.decode("latin-1").rstrip())
        if is_last(lines[-1]):
            return HeaderText(lines, head.tell())
    if head.tell() == MAX_HEADER_BYTES:
        raise Refused("bad-header", f"{path.name}: a header of at most 1 MB wanted, found no end of it; export the scan again")
    return HeaderText(lines, head.tell())
