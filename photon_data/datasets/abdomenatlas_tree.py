"""Abdominal CTs by BDMAP id, as AbdomenAtlas and DeepTumorVQA publish them: <anywhere>/BDMAP_00000001/ct.nii.gz."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from photon_data.datasets.archives import SCAN, find_archives
from photon_data.datasets.base import UNPACK, DataSet, FoundVolumes, OnFile, SourceVolume, read_rows
from photon_data.errors import UsageError
from photon_data.questions.table import read_text
from photon_data.readers.find import find_scans
from photon_data.scan import Source

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


def ids_in(paths: Iterable[Path]) -> set[str]:
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
