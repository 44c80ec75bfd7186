"""Headers of DICOM files, each parsed once: kept by folder, and taken from there while the files are the same.

CACHE/3f/3f9a...    zlib of {"version": ..., "files": {name: [facts, bytes and hash of the header, kind, plane]}}

It lies in the private folder beside OUT: it has names of files, and hashes. Who deletes it loses time and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from importlib.metadata import version
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from photon_data.errors import Refused
from photon_data.readers.dicom_file import Content, PixelLayout, PlaneHeader

# Raise it when the same header would give another plane.
FORMAT = 1
# Of 256 parts; so the whole has headers of a quarter of a million folders at most, in a few GB.
MOST_PER_PART, LARGEST = 1000, 1 << 26
_REMOVING = threading.Lock()
ARRAYS = ("position_lps", "orientation", "spacing_mm")


class Header(NamedTuple):
    """What is known of one file."""

    path: Path
    content: Content
    error: Refused | OSError | None  # why its header cannot be read; the content is empty then


def read_headers(
    files: Iterable[Path], parse: Callable[[Path], Content], cache: str = "", *, trust: bool = False
) -> Iterator[Header]:
    """Yield the header of each file: from the folder `cache` ("" for none) what was parsed before, else by `parse`.

    A file is known by name, size and times; unless these are to `trust`, its header's bytes are compared as well, and
    nothing is written. With `trust`, what is new is kept.
    """
    for folder, group in groupby(files, key=attrgetter("parent")):
        known = _read(cache, folder) if cache else {}
        rows, paths, is_new = dict[str, list[Any]](), list(group), False
        for path in paths:
            row = known.get(path.name)
            if row and _is_same(path, row, trust):
                yield Header(path, _content(path, row), None)
            else:
                row = None
                try:
                    before = _facts(path) if cache else ()
                    content = parse(path)
                    row = _row(before, content) if cache and before == _facts(path) else None
                    is_new = is_new or row is not None
                    yield Header(path, content, None)
                except (Refused, OSError) as error:
                    yield Header(path, Content("", []), error)
            if row:
                rows[path.name] = row
        if trust and is_new:
            _write(cache, folder, known | rows)


def kept_files(files: Iterable[Path], cache: str) -> set[Path]:
    """Return those of the files whose headers are kept, and that are by size and times as they were then."""
    found = set[Path]()
    for folder, group in groupby(files, key=attrgetter("parent")):
        known = _read(cache, folder) if cache else {}
        found |= {path for path in group if path.name in known and _is_same(path, known[path.name], trust=True)}
    return found


def _facts(path: Path) -> tuple[int, int, int]:
    """Return what changes with a file, the time of its last change by whomever among it."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _is_same(path: Path, row: list[Any], trust: bool) -> bool:
    """Tell whether a file is as its row says, its header to the byte unless size and times are to trust."""
    try:
        if _facts(path) != tuple(row[0]):
            return False
        if trust:
            return True
        with path.open("rb", buffering=0) as file:
            return _digest(file.read(row[1])) == row[2]
    except OSError:
        return False


def _digest(head: bytes) -> str:
    return hashlib.sha256(head).hexdigest()[:32]


def _row(facts: tuple[int, ...], content: Content) -> list[Any] | None:
    """Return the row of a plain header of one image or none; others are parsed each time."""
    if not content.head or len(content.planes) > 1:
        return None
    plane = next((_as_json(plane) for plane in content.planes), None)
    return [facts, len(content.head), _digest(content.head), content.kind, plane]


def _as_json(plane: PlaneHeader) -> dict[str, Any]:
    values = {key: value for key, value in plane._asdict().items() if key != "path"}
    return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in values.items()}


def _content(path: Path, row: list[Any]) -> Content:
    kind, plane = row[3], row[4]
    if plane is None:
        return Content(kind, [])
    arrays = {name: plane[name] and np.array(plane[name]) for name in ARRAYS}
    pixels = PixelLayout._make(plane["pixels"])
    pixels = pixels._replace(padding=pixels.padding and (pixels.padding[0], pixels.padding[1]))
    return Content(
        kind, [PlaneHeader(**{**plane, **arrays, "path": path, "tags": tuple(plane["tags"]), "pixels": pixels})]
    )


# --- the folder


def _version() -> list[Any]:
    return [FORMAT, version("photon-ct")]


def _place(cache: str, folder: Path) -> Path:
    name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:32]
    return Path(cache, name[:2], name)


def _read(cache: str, folder: Path) -> dict[str, list[Any]]:
    """Return {file name: row} of a folder; nothing where nothing is kept, or nothing that can be used."""
    with suppress(OSError, ValueError, KeyError, TypeError, zlib.error):
        content = zlib.decompressobj().decompress(_place(cache, folder).read_bytes(), LARGEST)
        found = json.loads(content)
        if found["version"] == _version():
            return dict(found["files"])
    return {}


def _write(cache: str, folder: Path, rows: dict[str, list[Any]]) -> None:
    """Keep the rows of a folder, readable for their owner only; a disk that is full keeps nothing."""
    place = _place(cache, folder)
    with suppress(OSError):
        there = {file.name for file in folder.iterdir()}
        files = {name: row for name, row in rows.items() if name in there}
        content = json.dumps({"version": _version(), "files": files}).encode("ascii")
        for private in (Path(cache).parent, Path(cache), place.parent):
            private.mkdir(mode=0o700, parents=True, exist_ok=True)
        place.touch(mode=0o600)
        place.write_bytes(zlib.compress(content, 1))  # what is written by halves is of no use, and nothing else
        with _REMOVING:  # else two threads would remove the same one, and the rest of one's would stay
            kept = sorted(place.parent.iterdir(), key=lambda entry: entry.stat().st_mtime_ns)
            for oldest in kept[: max(0, len(kept) - MOST_PER_PART)]:
                oldest.unlink(missing_ok=True)
