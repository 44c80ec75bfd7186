"""What a person points at (a store, a raw scan) -> what the model reads, and where it lies. Nothing is written."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from photon_data.errors import UsageError
from photon_data.files import Location
from photon_data.prepare_file import prepare_volume
from photon_data.private import names_left_out
from photon_data.questions.question import UID
from photon_data.readers import open_scan
from photon_data.readers.find import find_one_scan, find_scans
from photon_data.recipe import Policy, Recipe
from photon_data.scan import Source
from photon_data.store import is_store, open_volume, read_metadata
from photon_data.volume import Geometry, Volume


class ScanInput(NamedTuple):
    """One scan, ready to be asked about."""

    id: str
    model: Volume  # int16 HU on the model grid: the bytes of a store's "model" array
    volume: Volume  # int16 HU on the prepared grid, of a store without it on the model grid
    native: Geometry  # the grid of the raw scan
    seconds: dict[str, float]  # {"read", "prepare"}; both volumes of a store are read later
    store: str = ""  # its place; "" of a raw scan


def open_scans(
    places: Sequence[str], recipe: Recipe | None, policy: Policy | None, series: str | None
) -> list[ScanInput]:
    """Return the scans at places, earlier ones first; `series` is that of the last. Raises what `open_input` does."""
    last = len(places) - 1
    scans = [open_input(place, recipe, policy, series if i == last else None) for i, place in enumerate(places)]
    if twice := [id for id, count in Counter(scan.id for scan in scans).items() if count > 1]:
        raise UsageError(f"--prior: expected other scans than SCAN, found {twice[0]} twice; leave one out")
    return scans


def open_input(
    place: str,
    recipe: Recipe | None = None,
    policy: Policy | None = None,
    series: str | None = None,
    id: str | None = None,
) -> ScanInput:
    """Return the scan at `place`: a store (path or URL), a NIfTI, NRRD or MetaImage file, or a DICOM series.

    `series` names one of the scans of a folder, as `find_one_scan` takes it, or is its number from 1 in the order in
    which that lists them, or a SeriesInstanceUID; `id` is the one that a store must have.

    A raw scan is prepared in memory by `recipe`, as `photon-data prepare` would; a store is as it was prepared.
    UsageError where there is not one scan; Refused, with the words of `prepare`, for one that must not become a store.
    """
    if is_store(place):
        return open_store(place, id)
    start, source = time.perf_counter(), find_one_scan(Path(place), series and _name_of(Path(place), series))
    with names_left_out(source):
        return _prepared(source, recipe or Recipe(), policy or Policy(), start)


def _name_of(folder: Path, series: str) -> str:
    """Return what `find_one_scan` calls the scan of a folder that a number or a UID names; else `series` itself."""
    if UID.fullmatch(series):  # a key is the start of the hash of the SeriesInstanceUID
        return f"#{hashlib.sha256(series.encode()).hexdigest()[:8]}"
    if not (series.isdecimal() and len(series) <= 3):
        return series
    sources, _ = find_scans(folder)
    if series in {name for one in sources for name in (one.path, one.id, one.path.rpartition("#")[2])}:
        return series
    if not 1 <= int(series) <= len(sources):
        raise UsageError(f"--series: expected a number from 1 to {len(sources)}, found {series} in {folder}")
    return sources[int(series) - 1].path


def _prepared(source: Source, recipe: Recipe, policy: Policy, start: float) -> ScanInput:
    scan = open_scan(source, policy)
    reading = time.perf_counter() - start

    def timed_planes() -> Iterator[np.ndarray]:
        nonlocal reading
        begun = time.perf_counter()
        for plane in scan.planes():
            reading += time.perf_counter() - begun
            yield plane
            begun = time.perf_counter()
        reading += time.perf_counter() - begun

    prepared = prepare_volume(replace(scan, planes=timed_planes), recipe, policy)
    seconds = {"read": reading, "prepare": time.perf_counter() - start - reading}
    return ScanInput(source.id, prepared.model, prepared.volume, scan.geometry, seconds)


def open_store(place: str, id: str | None = None) -> ScanInput:
    """Return the scan of a store, as it was prepared, of that id if one is given. Raises what `open_volume` raises."""
    start = time.perf_counter()
    model, volume = open_volume(place, "model", id=id), open_volume(place, None, id=id)
    metadata = read_metadata(Location(place), "")
    assert metadata is not None, "open_volume has read it"
    native = Geometry.from_json(metadata["facts"]["geometry"])
    return ScanInput(
        metadata["id"], model, volume, native, {"read": time.perf_counter() - start, "prepare": 0.0}, place
    )
