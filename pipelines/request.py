"""What `photon-data prepare` is requested to do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from photon_data.datasets.base import DataSet
from photon_data.datasets.declare import DataManifest, read_data_manifest
from photon_data.errors import UsageError
from photon_data.files import Location
from photon_data.hounsfield import HEADER
from photon_data.json_text import from_json
from photon_data.questions.splits import FRACTIONS
from photon_data.recipe import Policy, Recipe, named_recipe
from photon_data.records import DATASET, VolumeRecord
from photon_data.scan import MaskPattern
from photon_data.store import WRITTEN, read_metadata
from photon_data.store import grids_of as grids_in

PATHS = ("absolute", "relative")


@dataclass(frozen=True)
class Request:
    """A request about a folder of scans with tables about it, or about the data sets of a data_manifest.yaml.

    Every data set has its own recipe name, policy, questions and splits; the fields from `hu_source` are a folder's.
    """

    source: Path  # a folder of scans (of a URL too, see `source_path`), one scan, or the data_manifest.yaml
    out: Location
    recipe: Recipe
    policy: Policy = field(default_factory=Policy)  # for data sets, only its max_voxels counts
    datasets: tuple[DataSet, ...] = ()  # none for a folder of scans
    # What is accepted of all scans, whatever policy they have: {field of the policy: value}, see `accepted`.
    accept: Mapping[str, Any] = field(default_factory=dict)
    overrides: Path | None = None  # a table of what a person says of single scans
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

    masks: MaskPattern | None = None  # which files are the masks of a scan; None: masks are left as they are
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

    @property
    def with_masks(self) -> bool:
        """Whether masks are asked for, of the folder's scans or of those of a data set."""
        return self.masks is not None or any(entry.masks for entry in self.datasets)


def paths_of(request: Request) -> str:
    """Return whether manifests name stores by "absolute" or "relative" paths: as requested, else as OUT has them."""
    if request.paths is None:
        try:
            return str(from_json(request.out.read(DATASET) or b"{}").get("paths", PATHS[0]))
        except (ValueError, AttributeError):
            return PATHS[0]
    if request.paths not in PATHS:
        raise UsageError(f"--paths: expected {' or '.join(PATHS)}, found {request.paths!r}")
    return request.paths


def request_of_manifest(path: Path, only: Sequence[str], out: str | None, **options: Any) -> Request:
    """Return the request for the data sets of a data_manifest.yaml, or for those named in `only`.

    `options` are further fields of the request; the seed is the manifest's, if none is given.
    """
    manifest = read_data_manifest(path)
    datasets = manifest.only(only)
    options = {"seed": manifest.seed, **options}
    return Request(path, out_of(manifest, out), one_recipe(datasets), datasets=datasets, **options)


def out_of(manifest: DataManifest, out: str | None) -> Location:
    """Return where to write: what the command says, else what the manifest says; UsageError where neither does."""
    where = out or manifest.out
    if where is None:
        expected = f"an output folder as `out:` in {manifest.path.name} or after --manifest"
        raise UsageError(f"expected {expected}, found neither")
    return Location(where)


def one_recipe(datasets: Sequence[DataSet]) -> Recipe:
    """Return the one recipe of the data sets; UsageError where there are several, since a folder holds one."""
    recipes = {entry.name: recipe_of(entry)[0] for entry in datasets}
    if len({recipe.digest for recipe in recipes.values()}) > 1:
        found = ", ".join(f"{name} {recipe.name} ({recipe.digest})" for name, recipe in recipes.items())
        remedy = "prepare them one by one, with --only NAME OUT"
        raise UsageError(f"expected one recipe per output folder, found {found}; {remedy}")
    return next(iter(recipes.values()))


def recipe_of(entry: DataSet) -> tuple[Recipe, Policy]:
    """Return the recipe that an entry names, and its policy; UsageError with its place for one that is not known."""
    try:
        return named_recipe(entry.recipe.name, entry.recipe.settings)
    except UsageError as error:
        raise entry.error(str(error)) from None


def grids_of(request: Request) -> str:
    """Return which grids stores get, a key of WRITTEN: as requested, else as OUT has them."""
    if request.grids is None:
        try:
            found = from_json(request.out.read(DATASET) or b"{}").get("grids")
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
        there = [record for record in records if record.is_there]
        with ThreadPoolExecutor(16) as threads:
            known = threads.map(lambda record: read_metadata(request.out, record.place), there)
            for record, metadata in zip(there, known, strict=True):
                own = set(grids_in(metadata)) if metadata else wanted
                found += [record.id] if (wanted - own if missing else own - wanted) else []
        return found

    grids = grids_of(request)
    if lacking := other(before, missing=True):
        yield f"{len(lacking)} stores lack a grid of --grids {grids} and are made again, {lacking[0]} first"
    if request.grids is not None and (larger := other(done, missing=False)):
        yield f"{len(larger)} stores have more grids than --grids {grids} writes, and keep them without --overwrite"
