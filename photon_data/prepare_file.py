"""One scan, start to end: a file or series on disk -> the volume and the model grid -> its store and its record.

`prepare_volume` decides every voxel and writes nothing; `prepare_file` is what a worker does with one source.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from photon_data.errors import Refused, UsageError, refusal
from photon_data.files import Location, fingerprint
from photon_data.hounsfield import (
    Probe,
    has_padding,
    lacks_undeclared,
    refuse_implausible,
    refuse_scaled_before,
    volume_statistics,
)
from photon_data.lock import refuse_taken
from photon_data.override import SKIPPED, Override
from photon_data.private import without_words
from photon_data.readers import open_scan
from photon_data.readers.find import find_one_scan
from photon_data.readers.nifti import BLANK, GIVEN
from photon_data.recipe import ALGORITHM, EARLIER, Policy, Recipe
from photon_data.records import PREPARED, READY, UNCHANGED, VolumeRecord, record_of, recorded, store_name
from photon_data.resample import (
    Values,
    body_box_lps,
    full_grid,
    grid_to_native,
    margins_mm,
    on_model_grid,
    resample,
    target_grid,
    voxels_between,
)
from photon_data.scan import Change, Rescale, Scan, Source, TableGrid
from photon_data.store import WRITTEN, arrays_digest, grids_of, is_whole, model_digest, read_metadata, write_store
from photon_data.volume import Geometry, Prepared, Volume, inverse

# Parts of the resume key of a volume with padding, which is set aside before anything is interpolated, and of one in
# which padding was looked for that no header declares.
PADDING_FIRST, NONE_UNDECLARED = "padding-first", "no undeclared padding"
# Part of it where it is not this.
USUAL = WRITTEN["volume"]

_version = cache(version)  # looked up for every refusal


@dataclass(frozen=True, slots=True)
class Job:
    """All that decides what becomes of one source, in whatever process it is run."""

    source: Source
    out: str
    recipe: Recipe
    policy: Policy = field(default_factory=Policy)
    # What a table or a data set says of the values and of the grid, where it is not the header that counts.
    rescale: Rescale | None = None
    stated: TableGrid | None = None
    overwrite: bool = False  # prepare it even if its store is there
    grids: str = "volume"  # which are written: see WRITTEN of store.py
    write: bool = True  # False: do everything but write; the record is then "ready"
    override: Override | None = None  # what a person says of this scan
    holder: str = ""  # the token of the run that holds OUT: nothing is written when another one holds it
    deep: bool = False  # where its store lies, see `store_name`

    @property
    def place(self) -> str:
        """Where its store lies, or will, below the output folder."""
        return store_name(self.source.id, self.deep)

    def to_json(self) -> dict[str, Any]:
        """Return the plain dict that `from_json` reads back."""
        data = asdict(self)
        data["source"] = self.source.to_json()
        data["stated"] = self.stated and self.stated.to_json()
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Job:
        """Return the Job that `to_json` wrote."""
        parts = {
            "source": Source.from_json(data["source"]),
            "recipe": Recipe.from_json(data["recipe"]),
            "policy": Policy(**data["policy"]),
            "rescale": data["rescale"] and Rescale(*data["rescale"]),
            "stated": data["stated"] and TableGrid.from_json(data["stated"]),
            "override": data["override"] and Override(**data["override"]),
        }
        return cls(**{**data, **parts})

    def adjusted(self, override: Override | None, accepted: Mapping[str, Any]) -> Job:
        """Return the job with what a person accepts of all scans and says of this one."""
        if override is None:
            return replace(self, policy=replace(self.policy, **accepted))
        source, policy = self.source, replace(self.policy, **{**accepted, **override.policy})
        if override.skip:
            reason = without_words(override.skip, source.path) if source.hidden else override.skip
            source = replace(source, problem=f"a person left it out: {reason}", code=SKIPPED)
        said = override.rescale
        rescale = Rescale(said[0], said[1], "table") if said else self.rescale
        return replace(self, source=source, policy=policy, rescale=rescale, override=override)

    def key(
        self, content: str, facts: Mapping[str, Any], digest: str | None = None, grids: Sequence[str] = USUAL
    ) -> str:
        """Return the resume key: a hash of all that decides the store's bytes.

        `content` is the fingerprint of the source's files. Of the `facts` of its volume, the choices of the policy that
        mattered count, and padding: earlier versions interpolated it, or did not look for what is undeclared. `digest`
        is that of the recipe, where it is not this one's: stores of earlier versions. `grids` are those of the store.
        """
        parts: list[Any] = [content, digest or self.recipe.digest, self.rescale, ALGORITHM]
        parts += [self.stated.to_json()] if self.stated else []
        parts += [said] if self.override and (said := self.override.key()) else []
        parts += [dict(facts["policy"])] if facts.get("policy") else []
        parts += [PADDING_FIRST] if has_padding(facts, self.recipe) else []
        parts += [NONE_UNDECLARED] if lacks_undeclared(facts, self.recipe) else []
        parts += [] if tuple(grids) == USUAL else [list(grids)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def refusal_key(self) -> str:
        """Return the key of a refusal: a hash of all but the file that decides whether it is refused."""
        parts = [self.recipe.digest, vars(self.policy), self.rescale, ALGORITHM, _version("photon-ct")]
        parts += [self.stated.to_json()] if self.stated else []
        parts += [said] if self.override and (said := self.override.key()) else []
        parts += [self.grids] if self.grids == "full" else []  # a field may be too large, where the grid is not
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def record(self, state: str, **more: Any) -> VolumeRecord:
        """Return a record of this job's source in the given state."""
        return record_of(self, state, **more)

    def record_of_store(self, state: str, metadata: dict[str, Any]) -> VolumeRecord:
        """Return the record of this job's source, whose store has the given metadata (see `read_metadata`)."""
        more = {name: metadata[name] for name in ("fingerprint", "key", "facts")}
        more |= {"arrays_sha256": arrays_digest(metadata), "model_sha256": model_digest(metadata)}
        more |= {"store_bytes": metadata["bytes"], "store_sha256": metadata["sha256"]}
        return self.record(state, store=self.place, **more)


def prepare(
    scan: str | Path | Volume,
    recipe: Recipe | None = None,
    policy: Policy | None = None,
    rescale: Rescale | None = None,
    grids: str = "volume",
) -> Prepared:
    """Return a scan as it would be in a store: `.volume`, `.model` (int16 HU) and `.facts`. Nothing is written.

    With grids="full" there is also `.full`, the whole field of the scan at 1.5 mm.

    `scan` is a file or a folder of one DICOM series, or a Volume of Hounsfield units. Refused if it must not become a
    store, UsageError where the path holds no scan or several.

    >>> recipe = photon_data.Recipe(shape_zyx=(40, 32, 32), model_shape_zyx=(14, 28, 28))
    >>> prepared = photon_data.prepare("a.nii.gz", recipe)
    >>> prepared.volume.geometry.spacing_zyx_mm, prepared.model.array_zyx.shape
    ((1.0, 1.0, 1.0), (14, 28, 28))
    >>> volume = photon_data.read("a.nii.gz")  # the same from memory
    >>> bool((photon_data.prepare(volume, recipe).volume.numpy() == prepared.volume.numpy()).all())
    True
    """
    policy = policy or Policy()
    if isinstance(scan, Volume):
        array = scan.numpy()
        opened = Scan(scan.geometry, array.dtype, 1.0, 0.0, lambda: iter(array), "array")
    else:
        source = find_one_scan(Path(scan))
        opened = open_scan(source, policy)
    return prepare_volume(opened, recipe or Recipe(), policy, rescale, grids=grids)


def prepare_volume(
    scan: Scan,
    recipe: Recipe,
    policy: Policy | None = None,
    rescale: Rescale | None = None,
    centre_lps: Sequence[float] | None = None,
    grids: str = "volume",
) -> Prepared:
    """Return the scan as `recipe` says; Refused if it must not become a store.

    `rescale` replaces the slope and intercept of the header, and `centre_lps` the recipe's centre of the grid. The
    facts hold a "policy" where its choices mattered, and "changes" where something was repaired or overridden. The
    planes are read a second time where they hold undeclared padding (what it is, all of them tell), and with
    grids="full" for the whole field: two grids at once would not be streamed.
    """
    native, values, body = scan.geometry, _values(scan, recipe, rescale), None
    depths = scan.slices.depths if scan.slices else None
    _refuse_smaller_than_a_voxel(native, recipe)
    if recipe.centre == "body" and centre_lps is None:
        body = body_box_lps(scan.planes(), native, values, depths)
    grid = target_grid(native, recipe, centre_lps if body is None else body.mean(axis=0))
    whole = full_grid(native) if grids == "full" else None

    def on(grid: Geometry, padding_hu: float | None = None) -> tuple[np.ndarray, Probe]:
        settings = values.slope, values.intercept, values.pad_stored
        floor_hu = recipe.window_hu[0]
        probe = Probe(native.shape_zyx, *settings, floor_hu=floor_hu, padding_hu=padding_hu, padded=scan.padded)
        return resample(map(probe.look, scan.planes()), native, grid, values, recipe.antialias, depths), probe

    array, probe = on(grid)
    choices, changes = _accept(probe, policy or Policy(), rescale, recipe)
    padding_hu = None if "modality" in choices else probe.undeclared_padding()
    if padding_hu is not None:
        array, probe = on(grid, padding_hu)
    choices, changes = dict(scan.choices) | choices, [*scan.changes, *changes]
    model = on_model_grid(array, grid, recipe)
    facts = _facts(scan, grid, values, rescale, probe, array) | ({"policy": choices} if choices else {})
    facts |= {"uncropped": scan.uncropped.to_json()} if scan.uncropped else {}
    facts |= {} if padding_hu is None else {"undeclared_padding_hu": padding_hu}
    facts |= {} if body is None else {"body_mm": dict(zip("xyz", body.T.tolist(), strict=True))}
    facts |= {"changes": [change._asdict() for change in changes]} if changes else {}
    if scan.slices:
        in_gaps = voxels_between(native, grid, scan.slices.gaps_in_depth)
        facts["slices"] = {**scan.slices.to_json(), "voxels_in_gaps": in_gaps}
    if whole is None:
        return Prepared(Volume(array, grid), model, facts)
    field, _ = on(whole, padding_hu)
    return Prepared(Volume(array, grid), model, facts | {"full_grid": whole.to_json()}, Volume(field, whole))


def _refuse_smaller_than_a_voxel(native: Geometry, recipe: Recipe) -> None:
    """Raise Refused for a scan that is thinner than one voxel of the grid: no voxel centre need lie within it."""
    extent_mm = native.extent_lps_mm
    if any(mm < least for mm, least in zip(extent_mm, recipe.spacing_mm[::-1], strict=True)):
        found = " x ".join(f"{mm:.3g}" for mm in extent_mm) + " mm"
        raise refusal("too-small", "", "at least one voxel of the grid a side", found, "check the spacing")


def _values(scan: Scan, recipe: Recipe, rescale: Rescale | None) -> Values:
    slope, intercept = (rescale.slope, rescale.intercept) if rescale else (scan.slope, scan.intercept)
    if rescale and scan.rescaled:
        found, remedy = "slices with several", "leave --hu-source out for it: the slices' own are applied"
        raise refusal("rescale", "", "one slope and intercept in the headers that --hu-source replaces", found, remedy)
    if rescale and np.isnan(slope):
        raise refusal("not-in-table", "", "a row for this scan in the --hu-source table", "none", "add one")
    if not (np.isfinite([slope, intercept]).all() and slope):
        expected, remedy = "a finite slope (not 0) and intercept", "--hu-source can give others"
        raise refusal("rescale", "", expected, f"{slope}, {intercept}", remedy)
    return Values(slope, intercept, recipe.window_hu, recipe.pad_hu)


def _accept(
    probe: Probe, policy: Policy, rescale: Rescale | None, recipe: Recipe
) -> tuple[dict[str, str], list[Change]]:
    """Return the choices of the policy without which this scan would be refused, and what they change; Refused."""
    choices, changes = {}, []
    if probe.non_finite:
        found = f"{probe.non_finite} NaN or infinite ones"
        if policy.non_finite == "refuse":
            raise refusal("non-finite", "", "finite voxels", found, "--nan fill pads them", "non-finite")
        choices["non_finite"] = policy.non_finite
        changes.append(Change("non-finite", f"expected finite voxels, found {found}", f"made {recipe.pad_hu:g} HU"))
    if rescale and rescale.given_by == "metadata":
        refuse_scaled_before(probe)
    try:
        refuse_implausible(probe.sample_hu(), *probe.range_hu())
    except Refused as refused:
        if policy.modality == "ct":
            raise
        choices["modality"] = policy.modality
        changes.append(Change(refused.code, refused.found, "taken as they are: no Hounsfield units are expected"))
    return choices, changes


def _facts(
    scan: Scan, grid: Geometry, values: Values, rescale: Rescale | None, probe: Probe, array: np.ndarray
) -> dict[str, Any]:
    """Return what is recorded of a volume, in the store and in volumes.jsonl: numbers only, no header text."""
    to_native = grid_to_native(scan.geometry, grid)
    cut_mm, pad_mm = margins_mm(scan.geometry, grid)
    return {
        "format": scan.format,
        "dtype": str(scan.dtype),
        "slope": values.slope,
        "intercept": values.intercept,
        "rescale": rescale.given_by if rescale else "header",
        "geometry": scan.geometry.to_json(),
        "grid": grid.to_json(),
        "grid_to_native_zyx": to_native.tolist(),
        "native_to_grid_zyx": inverse(to_native).tolist(),
        "cut_mm": cut_mm,
        "pad_mm": pad_mm,
        "padding_voxels": probe.padding,
        "hu_before": probe.statistics(),
        "hu_after": volume_statistics(array),
    }


def prepare_file(job: Job) -> VolumeRecord:
    """Return the record of a job's source, whose store is then there unless it was refused or failed.

    Raises NoSpace if the disk is full.
    """
    return recorded(job, _prepare)


def _rescaled_twice(facts: Mapping[str, Any]) -> bool:
    """Tell whether a table came on top of slopes per slice, as in earlier versions: only such DICOM is float32."""
    return facts.get("format") == "dicom" and facts.get("dtype") == "float32" and facts.get("rescale") != "header"


def _prepare(job: Job) -> VolumeRecord:
    source = job.source
    if source.problem:
        raise Refused(source.code, source.problem)
    try:
        scan = opened(job)  # first: of a file that its header refuses, not every byte is read
    except Refused:
        is_there = not job.overwrite and read_metadata(Location(job.out), job.place)
        if is_there and (done := already_there(job, fingerprint(source.files))):
            return done
        raise
    content = fingerprint(source.files)
    if done := already_there(job, content):
        return done
    said = job.override
    centre = said.centre_lps if said else None
    prepared = prepare_volume(scan, job.recipe, job.policy, job.rescale, centre, job.grids)
    if said:
        prepared.facts.update(said.facts(scan, prepared.facts))
    if not job.write:
        return job.record(READY, fingerprint=content, facts=prepared.facts)
    out = Location(job.out)
    refuse_taken(out, job.holder)
    identity = {
        "id": source.id,
        "key": job.key(content, prepared.facts, grids=WRITTEN[job.grids]),
        "fingerprint": content,
        "recipe": job.recipe.to_json(),
        "digest": job.recipe.digest,
    }
    metadata = write_store(prepared, out, job.place, identity, job.grids)
    return job.record_of_store(PREPARED, metadata)


def opened(job: Job) -> Scan:
    """Return the job's scan, its header read and found sound, on the grid that is stated for it; Refused."""
    affine = GIVEN if job.override and job.override.affine else None
    scan = open_scan(job.source, job.policy, affine=BLANK if job.stated and job.stated.replaces_header else affine)
    scan = replace(scan, geometry=job.stated.reconcile(scan.geometry)) if job.stated else scan
    return job.override.apply(scan) if job.override else scan


def already_there(job: Job, content: str, row: VolumeRecord | None = None) -> VolumeRecord | None:
    """Return the record of a store that was made from just this content and recipe, None if there is none.

    Policies may differ, except in the choices that changed this store: those must be equal. It may have more grids.
    Where `row` records this very store, nothing that the row has is computed again.
    """
    if job.overwrite or not job.write:
        return None
    out, name = Location(job.out), job.place
    metadata = read_metadata(out, name, row.store_sha256 if row else None)
    if metadata is None or not is_whole(out, name, metadata):
        return None
    choices = metadata["facts"].get("policy", {})
    earlier = {key: metadata["recipe"].get(key, usual) for key, usual in EARLIER.items()}
    needed = choices | {key: value for key, value in earlier.items() if value != EARLIER[key]}
    is_same = (
        recipe_digest(metadata) == job.recipe.digest
        and metadata["key"] == job.key(content, metadata["facts"], metadata["digest"], grids_of(metadata))
        and set(WRITTEN[job.grids]) <= set(grids_of(metadata))
        and not _rescaled_twice(metadata["facts"])
        and job.policy.allows(needed)
    )
    if row and row.facts == metadata["facts"]:  # packed already
        metadata["facts"] = row.facts
    return job.record_of_store(UNCHANGED, metadata) if is_same else None


def recipe_digest(metadata: Mapping[str, Any]) -> str:
    """Return the digest of the recipe that a store was made by, also of a store whose recipe still held a policy.

    Of one with `antialias`, it is what the store says: versions whose recipe held a policy did less under that name.
    """
    recipe = metadata["recipe"]
    if recipe.get("antialias") or all(recipe.get(key, usual) == usual for key, usual in EARLIER.items()):
        return str(metadata["digest"])
    try:
        return Recipe.from_json(recipe).digest
    except UsageError:  # a recipe of another version
        return str(metadata["digest"])
