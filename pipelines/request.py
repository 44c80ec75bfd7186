"""What `photon-data prepare` is requested to do."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from photon_data.datasets.base import DataSet
from photon_data.errors import UsageError
from photon_data.files import Location
from photon_data.hounsfield import HEADER
from photon_data.questions.splits import FRACTIONS
from photon_data.recipe import Policy, Recipe
from photon_data.records import DATASET, VolumeRecord
from photon_data.store import WRITTEN, read_metadata, store_name
from photon_data.store import grids_of as grids_in


@dataclass(frozen=True)
class Request:
    """A request about a folder of scans with tables about it, or about the data sets of a data_manifest.yaml.

    Every data set has its own recipe name, policy, questions and splits; the fields from `hu_source` are a folder's.
    """

    source: Path  # a folder of scans, one scan, or the data_manifest.yaml
    out: Location
    recipe: Recipe
    policy: Policy = field(default_factory=Policy)  # for data sets, only its max_voxels counts
    datasets: tuple[DataSet, ...] = ()  # none for a folder of scans
    prompt: str | None = None  # style of the questions; None for the manifest's own, or for questions as they are
    seed: int = 0
    allow_leaks: bool = False
    limit: int | None = None  # only so many scans
    overwrite: bool = False
    check: str = "time"  # by what a scan counts as unchanged: its size and "time", or its "content", hashed again
    retry_failed: bool = False  # read again what was refused, timed out or crashed before
    lock: Mapping[str, Any] | None = None  # a dataset.lock whose bytes are to be made again
    pictures: int = 48  # volumes shown as pictures in the report
    paths: str | None = None  # of stores in manifests, "absolute" or "relative" to OUT; None: as OUT has them
    grids: str | None = None  # of stores, a key of WRITTEN; None: as OUT has them

    hu_source: str = HEADER  # "header", "stored", or the path of a table: see `rescaling`
    questions: Path | None = None  # a table of questions; None for one row per volume
    columns: Mapping[str, str] = field(default_factory=dict)  # {our name: name in the tables}
    # Share of each split, where the table of questions has no splits.
    fractions: Mapping[str, float] = field(default_factory=lambda: FRACTIONS)
    # What volume ids are made from: "path", "name", "hash" or "key"; "auto" is "key" for DICOM and "path" for others.
    id_from: str = "auto"
    id_prefix: str = ""  # what the ids of this source and the name of its questions begin with
    include: Sequence[str] = ()  # globs of what is looked at, and of what is not; see `find_scans`
    exclude: Sequence[str] = ()
    follow_links: bool = True


def grids_of(request: Request) -> str:
    """Return which grids stores get, a key of WRITTEN: as requested, else as OUT has them."""
    if request.grids is None:
        try:
            found = json.loads(request.out.read(DATASET) or b"{}").get("grids")
        except (ValueError, AttributeError):
            found = None
        return found if found in WRITTEN else "volume"
    if request.grids not in WRITTEN:
        raise UsageError(f"--grids: expected {', '.join(WRITTEN)}, found {request.grids!r}")
    return request.grids


def notes_of_grids(before: Iterable[VolumeRecord], done: Iterable[VolumeRecord], request: Request) -> Iterator[str]:
    """Yield what a changed --grids means for stores that are there, of scans to do and of those done before."""

    def other(records: Iterable[VolumeRecord], *, missing: bool) -> list[str]:
        wanted, found = set(WRITTEN[grids]), []
        for record in records:
            known = read_metadata(request.out, store_name(record.id)) if record.is_there else None
            there = set(grids_in(known)) if known else wanted
            found += [record.id] if (wanted - there if missing else there - wanted) else []
        return found

    grids = grids_of(request)
    if lacking := other(before, missing=True):
        yield f"{len(lacking)} stores lack a grid of --grids {grids} and are made again, {lacking[0]} first"
    if request.grids is not None and (larger := other(done, missing=False)):
        yield f"{len(larger)} stores have more grids than --grids {grids} writes, and keep them without --overwrite"
