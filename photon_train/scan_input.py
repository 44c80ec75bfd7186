"""What a person points at (a store, a raw scan) -> what the model reads and where it lies. Nothing is written."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from photon_data.errors import UsageError
from photon_data.job import Job, opened
from photon_data.location import Location
from photon_data.prepare import prepare_volume
from photon_data.readers import find_scans, left_alone
from photon_data.recipe import Recipe
from photon_data.store import ROOT, open_volume, read_metadata
from photon_data.volume import Geometry, Volume


class ScanInput(NamedTuple):
    """One scan, ready to be asked about.

    model    int16 HU on the model grid, in memory: the bytes of a store's "model" array
    volume   int16 HU on the prepared grid; of a store, read lazily
    native   the grid of the raw scan
    seconds  {"read", "prepare"}
    """

    id: str
    model: Volume
    volume: Volume
    native: Geometry
    seconds: dict[str, float]


def open_input(place: str, recipe: Recipe) -> ScanInput:
    """Return the scan at `place`: a store (path or URL), a NIfTI, NRRD or MetaImage file, or a folder with one DICOM series.

    A raw scan is prepared in memory by `recipe`, as `photon-data prepare` would; a store is as it was prepared.
    UsageError where there is not one scan; Refused for one that must not become a store, with the words of `prepare`.
    """
    return _from_store(place) if _is_store(place) else _from_raw(Path(place), recipe)


def prepared_grid(place: str) -> Geometry:
    """Return the prepared grid of the scan at `place`: of a store, without reading a voxel. Raises what open_input does."""
    return open_volume(place).geometry if _is_store(place) else open_input(place, Recipe()).volume.geometry


def _is_store(place: str) -> bool:
    return "://" in place or (Path(place) / ROOT).exists()


def _from_store(place: str) -> ScanInput:
    start = time.perf_counter()
    lazy = open_volume(place, grid="model")
    metadata = read_metadata(Location(place), "")
    assert metadata is not None, "open_volume has read it"
    model = Volume(lazy.numpy(), lazy.geometry)
    seconds = {"read": time.perf_counter() - start, "prepare": 0.0}
    native = Geometry.from_json(metadata["facts"]["geometry"])
    return ScanInput(metadata["id"], model, open_volume(place), native, seconds)


def _from_raw(path: Path, recipe: Recipe) -> ScanInput:
    start = time.perf_counter()
    sources, ignored = find_scans(path)
    if len(sources) != 1:
        others = f"; files left alone: {left_alone(ignored)}" if ignored else ""
        names = "".join(f"\n  {source.path}" for source in sources[:10])
        raise UsageError(f"one scan wanted, got {len(sources)} in {path}; name one{others}{names}")
    scan = opened(Job(sources[0], out="", recipe=recipe, write=False))
    watch = _Stopwatch(time.perf_counter() - start)
    prepared = prepare_volume(replace(scan, planes=watch.around(scan.planes)), recipe)
    seconds = {"read": watch.seconds, "prepare": time.perf_counter() - start - watch.seconds}
    return ScanInput(sources[0].id, prepared.model, prepared.volume, scan.geometry, seconds)


class _Stopwatch:
    """Adds up the time that a stream of planes takes itself, which is reading, while its reader resamples."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def around(self, planes: Callable[[], Iterator[np.ndarray]]) -> Callable[[], Iterator[np.ndarray]]:
        """Return a `planes` that gives the same, timed."""

        def timed() -> Iterator[np.ndarray]:
            stream, done = planes(), object()
            while True:
                start = time.perf_counter()
                plane = next(stream, done)
                self.seconds += time.perf_counter() - start
                if plane is done:
                    return
                yield plane  # type: ignore[misc]

        return timed
