"""What a person points at (a store, a raw scan) -> what the model reads, and where it lies. Nothing is written."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from photon_data.files import Location
from photon_data.prepare_file import prepare_volume
from photon_data.private import names_left_out
from photon_data.readers import open_scan
from photon_data.readers.find import find_one_scan
from photon_data.recipe import Policy, Recipe
from photon_data.scan import Source
from photon_data.store import is_store, open_volume, read_metadata
from photon_data.volume import Geometry, Volume


class ScanInput(NamedTuple):
    """One scan, ready to be asked about."""

    id: str
    model: Volume  # int16 HU on the model grid, in memory: the bytes of a store's "model" array
    volume: Volume  # int16 HU on the prepared grid, of a store without it on the model grid; of a store, read lazily
    native: Geometry  # the grid of the raw scan
    seconds: dict[str, float]  # {"read", "prepare"}
    store: str = ""  # its place; "" of a raw scan


def open_input(
    place: str, recipe: Recipe, policy: Policy | None = None, series: str | None = None, id: str | None = None
) -> ScanInput:
    """Return the scan at `place`: a store (path or URL), a NIfTI, NRRD or MetaImage file, or a DICOM series.

    `series` names one of the scans of a folder, as `find_one_scan` takes it; `id` is the one that a store must have.

    A raw scan is prepared in memory by `recipe`, as `photon-data prepare` would; a store is as it was prepared.
    UsageError where there is not one scan; Refused, with the words of `prepare`, for one that must not become a store.
    """
    if is_store(place):
        return open_store(place, id)
    start, source = time.perf_counter(), find_one_scan(Path(place), series)
    with names_left_out(source):
        return _prepared(source, recipe, policy or Policy(), start)


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
    lazy = open_volume(place, grid="model", id=id)
    model, metadata = Volume(lazy.numpy(), lazy.geometry), read_metadata(Location(place), "")
    assert metadata is not None, "open_volume has read it"
    seconds = {"read": time.perf_counter() - start, "prepare": 0.0}
    native = Geometry.from_json(metadata["facts"]["geometry"])
    return ScanInput(metadata["id"], model, open_volume(place, None, id=id), native, seconds, place)
