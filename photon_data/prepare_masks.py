"""The mask files of one scan -> its masks on the grids of its volume -> their store and their record.

A mask is read in a geometry of its own. The nearest of its voxels is taken once for each voxel of the volume's grid,
and once for each of the model grid; nothing is interpolated.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from photon_data.errors import Refused, refusal
from photon_data.files import Location, fingerprint
from photon_data.lock import refuse_taken
from photon_data.mask_store import Box, Label, Layers, belongs_to, box_of, write_masks
from photon_data.private import without_names
from photon_data.readers import open_scan
from photon_data.readers.mask_pattern import LARGEST_VALUE
from photon_data.recipe import Policy, Recipe
from photon_data.records import MASKS, PREPARED, UNCHANGED, VolumeRecord, record_of, recorded, store_name
from photon_data.resample import aligned_axes, grid_to_native, model_grid
from photon_data.scan import SUFFIXES, MaskFile, Source, names_below, suffix_of
from photon_data.store import is_whole, read_metadata
from photon_data.volume import Geometry

# Part of every key: raise it when the same files would give other bytes.
ALGORITHM = 1
# How far from whole numbers values may be: some programs store labels as floats.
WHOLE = 1e-3
# More different values than any table of labels has, as a scan that is taken for a mask has them.
MOST_LABELS = 1024
# Masks are of another scan where more of their marked voxels lie outside of this one.
MOST_OUTSIDE = 0.5


@dataclass(frozen=True)
class MaskJob:
    """All that decides what becomes of the masks of one volume, in whatever process they are read."""

    source: Source  # their files together; its id is the volume's
    masks: tuple[MaskFile, ...]
    labels: Mapping[int, str]  # names of the values of a label map
    volume: VolumeRecord
    out: str
    recipe: Recipe
    policy: Policy = field(default_factory=Policy)
    overwrite: bool = False
    holder: str = ""  # the token of the run that holds OUT

    def to_json(self) -> dict[str, Any]:
        """Return the plain dict that `from_json` reads back."""
        return {
            **vars(self),
            "source": self.source.to_json(),
            "masks": [[mask.name, list(map(str, mask.files))] for mask in self.masks],
            "labels": list(self.labels.items()),
            "volume": self.volume.to_json(),
            "recipe": self.recipe.to_json(),
            "policy": vars(self.policy),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> MaskJob:
        """Return the MaskJob that `to_json` wrote."""
        parts: dict[str, Any] = {
            "source": Source.from_json(data["source"]),
            "masks": tuple(MaskFile(name, tuple(map(Path, files))) for name, files in data["masks"]),
            "labels": dict(data["labels"]),
            "volume": VolumeRecord.from_json(data["volume"]),
            "recipe": Recipe.from_json(data["recipe"]),
            "policy": Policy(**data["policy"]),
        }
        return cls(**{**data, **parts})

    @property
    def place(self) -> str:
        """Where the masks lie below the output folder: as deep as their volume."""
        return store_name(self.source.id, self.volume.is_deep, MASKS)

    def key(self, content: str) -> str:
        """Return the resume key: a hash of all that decides the store's bytes, the volume's own bytes among it."""
        return self._hash(content)

    def refusal_key(self) -> str:
        """Return the key of a refusal: a hash of all but the files that decides whether they are refused."""
        return self._hash(self.policy.max_voxels, version("photon-ct"))

    def _hash(self, *more: Any) -> str:
        names, volume = [mask.name for mask in self.masks], self.volume
        parts = [names, sorted(self.labels.items()), volume.id, volume.model_sha256, (volume.facts or {}).get("grid")]
        parts += [self.recipe.digest, self.policy.nifti_affine, ALGORITHM, *more]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def record_of_store(self, state: str, metadata: dict[str, Any]) -> VolumeRecord:
        """Return the record of the masks, whose store has the given metadata; its facts are counts and names.

        masks, empty  how many masks there are, and how many of them are empty in their files
        lost          names of those of which nothing is left, since it lies outside of the grid or between its voxels
        refused       {name: why} of files that could not be read
        volume        which one they belong to
        """
        more: dict[str, Any] = {name: metadata[name] for name in ("fingerprint", "key")}
        facts, by_name = metadata["facts"], dict[str, list[Label]]()
        for label in (Label(**label) for label in facts["labels"]):
            by_name.setdefault(label.name, []).append(label)
        more["facts"] = {
            "volume": facts["volume"],
            "masks": len(by_name),
            "empty": sum(not any(label.source_voxels for label in labels) for labels in by_name.values()),
            "lost": [
                name
                for name, labels in by_name.items()
                if all(not label.voxels for label in labels) and any(label.source_voxels for label in labels)
            ],
            "refused": facts["refused"],
        }
        more |= {"store_bytes": metadata["bytes"], "store_sha256": metadata["sha256"]}
        return record_of(self, state, store=self.place, **more)


def prepare_masks(job: MaskJob) -> VolumeRecord:
    """Return the record of the masks of a volume, whose store is then there unless they were refused or failed.

    One of several files that is refused costs only its masks: the facts name it under "refused". Raises NoSpace if the
    disk is full.
    """
    return recorded(job, _prepare)


def _prepare(job: MaskJob) -> VolumeRecord:
    if job.source.problem:
        raise Refused(job.source.code, job.source.problem)
    content = fingerprint(job.source.files)
    if done := masks_there(job, content):
        return done
    of_volume = dict(job.volume.facts or {})
    grid, slices = Geometry.from_json(of_volume["grid"]), of_volume.get("slices")
    native = Geometry.from_json(of_volume.get("uncropped") or of_volume["geometry"])
    model = model_grid(grid, job.recipe.model_shape_zyx)
    layers, refused, codes = Layers(grid, model), dict[str, str](), list[str]()
    for mask in job.masks:
        try:
            read = read_mask(mask, job.policy)
            _refuse_elsewhere(read, native, mask.files[0].name)
            if slices:
                _refuse_even(read.geometry, native, slices, mask.files[0].name)
        except Refused as error:
            message = error.message.removeprefix(f"{mask.files[0].name}: ")
            refused[mask.name] = without_names(message, mask.files) if job.source.hidden else message
            codes.append(error.code)
            continue
        layers.add(_labels(read, mask.name, job.labels, grid), [nearest(read, at) for at in (grid, model)])
    if len(refused) == len(job.masks):
        first = next(iter(refused.values()))
        raise Refused(
            codes[0], first if len(refused) == 1 else f"all {len(refused)} files are refused, one since: {first}"
        )
    out = Location(job.out)
    refuse_taken(out, job.holder)
    identity: dict[str, Any] = {"id": job.source.id, "key": job.key(content), "fingerprint": content}
    identity |= {"recipe": job.recipe.to_json(), "digest": job.recipe.digest}
    facts = {
        "volume": belongs_to(job.volume.id, job.volume.model_sha256, of_volume["grid"]),
        "grids": {"volume": grid.to_json(), "model": model.to_json()},
        "refused": refused,
    }
    return job.record_of_store(PREPARED, write_masks(layers, out, job.place, identity, facts))


def masks_there(job: MaskJob, content: str) -> VolumeRecord | None:
    """Return the record of masks that were made of just this content for this volume, None if there are none."""
    out, name = Location(job.out), job.place
    metadata = None if job.overwrite else read_metadata(out, name)
    if metadata is None or metadata["key"] != job.key(content) or not is_whole(out, name, metadata):
        return None
    return job.record_of_store(UNCHANGED, metadata)


class LabelMap(NamedTuple):
    """A mask file as it is: its values and where they lie."""

    array_zyx: np.ndarray  # uint8 or uint16
    geometry: Geometry
    counts: np.ndarray  # voxels of each value
    box: Box | None  # around what is marked


def read_mask(mask: MaskFile, policy: Policy) -> LabelMap:
    """Return the values of a mask file on its own grid; Refused unless they are few and whole, from 0 on."""
    path = mask.files[0]
    source = Source("", path.name, names_below("", mask.files), SUFFIXES[suffix_of(path) or ".nii"], 0, 0)
    scan = open_scan(source, policy)
    array, counts = np.zeros(scan.geometry.shape_zyx, np.uint8), np.zeros(LARGEST_VALUE + 1, np.int64)
    for z, plane in enumerate(scan.planes()):
        values = plane if (scan.slope, scan.intercept) == (1, 0) else plane * scan.slope + scan.intercept
        if values.dtype.kind == "f":
            whole = np.rint(values)
            if not (np.abs(values - whole) <= WHOLE).all():  # false for NaN too
                raise _no_labels(path, "others")
            values = whole
        low, high = values.min(), values.max()
        if low < 0 or high > LARGEST_VALUE:
            raise _no_labels(path, f"{low:g} to {high:g}")
        if high > np.iinfo(array.dtype).max:
            array = array.astype(np.uint16)
        array[z] = values
        if high:
            counts += np.bincount(array[z].ravel(), minlength=len(counts))
        else:
            counts[0] += array[z].size
    if (found := int((counts[1:] > 0).sum())) > MOST_LABELS:
        raise _no_labels(path, f"{found} different ones, as in a scan")
    return LabelMap(array, scan.geometry, counts, box_of(array))


def _no_labels(path: Path, found: str) -> Refused:
    expected = f"whole numbers of 0 to {LARGEST_VALUE}, at most {MOST_LABELS} different ones"
    return refusal("mask-values", path.name, expected, found, "name its file in the pattern only if it is a mask")


def _refuse_elsewhere(read: LabelMap, native: Geometry, name: str) -> None:
    """Raise Refused for a mask that is plainly of another scan, or has lost its place."""
    mine = read.geometry
    remedy = "it is of another scan, or its header was lost on the way"
    if sorted(mine.shape_zyx) == sorted(native.shape_zyx):
        distances = np.linalg.norm(mine.corners_lps()[:, None] - native.corners_lps()[None], axis=-1)
        apart = max(distances.min(axis=0).max(), distances.min(axis=1).max())
        if apart > min(native.spacing_zyx_mm):
            expected = "a grid of as many voxels as the scan's at the scan's place"
            raise refusal("mask-elsewhere", name, expected, f"corners {apart:.3g} mm apart", remedy)
        return
    marked = int(read.counts[1:].sum())
    inside = int(inside_counts(read, native)[1:].sum())
    if marked and marked - inside > MOST_OUTSIDE * marked:
        found = f"{marked - inside:,} of {marked:,} marked voxels outside of it"
        raise refusal("mask-elsewhere", name, "a mask within the field of the scan", found, remedy)


def _refuse_even(mine: Geometry, native: Geometry, slices: Mapping[str, Any], name: str) -> None:
    """Raise Refused for a mask with a plane for each slice of a repaired series, but at even distances.

    `slices` are those of the facts, see `TrueSlices`. Its planes would lie beside the slices that they were drawn on.
    """
    depths = (np.array(slices["positions_mm"]) - slices["positions_mm"][0]) / slices["step_mm"]
    if sorted(mine.shape_zyx) != sorted((len(depths), *native.shape_zyx[1:])):
        return
    middle = (np.array(native.shape_zyx[1:]) - 1) / 2
    true = mine.index(native.world(np.insert(np.tile(middle, (len(depths), 1)), 0, depths, axis=1)))
    axis = int(np.ptp(true, axis=0).argmax())
    even = np.arange(len(depths)) if true[-1, axis] > true[0, axis] else np.arange(len(depths))[::-1]
    apart = float(np.abs(true[:, axis] - even).max() * mine.spacing_zyx_mm[axis])
    if apart > min(native.spacing_zyx_mm):
        found = f"one for each of {len(depths)} slices at even distances, up to {apart:.3g} mm beside them"
        remedy = "put them on a grid with the missing slices"
        raise refusal("mask-elsewhere", name, "planes where the slices of the repaired series lie", found, remedy)


def inside_counts(read: LabelMap, grid: Geometry) -> np.ndarray:
    """Return the voxels of each value whose centres lie within the box of a grid."""
    counts = np.zeros(len(read.counts), np.int64)
    if (box := read.box) is None:
        return counts
    matrix = grid_to_native(grid, read.geometry)  # from an index of the file to one of the grid

    def are_inside(zyx: np.ndarray) -> np.ndarray:
        at = np.round(zyx @ matrix[:3, :3].T + matrix[:3, 3], 9)
        return ((at >= -0.5) & (at < np.asarray(grid.shape_zyx) - 0.5)).all(axis=1)

    if are_inside(np.array(list(product(*((axis.start, axis.stop - 1) for axis in box))))).all():  # then all between is
        counts[1:] = read.counts[1:]
        return counts
    for z in range(box.z.start, box.z.stop):
        plane = read.array_zyx[z]
        yx = np.argwhere(plane)
        inside = are_inside(np.insert(yx, 0, z, axis=1))
        counts += np.bincount(plane[tuple(yx[inside].T)], minlength=len(counts))
    return counts


def _labels(read: LabelMap, name: str, names: Mapping[int, str], grid: Geometry) -> list[Label]:
    """Return the labels of a file that have voxels, and those that a table or the file's name promises."""
    inside, ml = inside_counts(read, grid), read.geometry.voxel_ml
    values = [int(value) for value in np.flatnonzero(read.counts[1:]) + 1]
    values += sorted(set(names) - set(values)) if not name else []
    labels = [
        Label(name or names.get(value, str(value)), value, 0, 0, int(read.counts[value]), int(inside[value]), ml)
        for value in values
    ]
    return labels or ([Label(name, 0, 0, 0, 0, 0, ml)] if name else [])


def nearest(read: LabelMap, grid: Geometry) -> np.ndarray:
    """Return the values [z, y, x] on a grid: of the nearest voxel of the file, 0 beyond its outer half voxel.

    As in ITK, voxel i covers [i - 0.5, i + 0.5). Rounding to 1e-9 makes a centre on a rim fall the same way on every
    machine.
    """
    out = np.zeros(grid.shape_zyx, read.array_zyx.dtype)
    if (box := read.box) is None:
        return out
    matrix, axes = grid_to_native(read.geometry, grid), aligned_axes(read.geometry)
    low, high = np.array([[axis.start, axis.stop] for axis in box]).T
    if axes is not None:
        index, spans = [], []
        for a, axis in enumerate(axes):
            at = np.floor(np.round(matrix[a, 3] + matrix[a, axis] * np.arange(grid.shape_zyx[axis]), 9) + 0.5)
            within = np.flatnonzero((at >= low[a]) & (at < high[a]))
            index.append(at[within].astype(np.intp))
            spans.append(slice(within[0], within[-1] + 1) if len(within) else slice(0))
        out.transpose(axes)[tuple(spans)] = read.array_zyx[np.ix_(*index)]
        return out
    # The part of the grid that the marked voxels reach.
    ends = grid.index(read.geometry.world(np.array(list(product(*zip(low, high, strict=True)))) - 0.5))
    start, stop = np.clip([np.floor(ends.min(0)), np.ceil(ends.max(0)) + 1], 0, grid.shape_zyx).astype(int)
    y, x = (np.arange(start[axis], stop[axis]) for axis in (1, 2))
    in_plane = y[:, None, None] * matrix[:3, 1] + x[None, :, None] * matrix[:3, 2] + matrix[:3, 3]
    for z in range(start[0], stop[0]):
        at = np.floor(np.round(in_plane + matrix[:3, 0] * z, 9) + 0.5).astype(np.intp)
        within = ((at >= low) & (at < high)).all(axis=-1)
        out[z, start[1] : stop[1], start[2] : stop[2]][within] = read.array_zyx[tuple(at[within].T)]
    return out
