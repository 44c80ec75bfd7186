"""The masks of a prepared folder: the labels of a volume on its grids, in as few layers as their overlaps need.

OUT/masks.jsonl                   a row per volume whose masks were asked for
OUT/masks/<id>.ome.zarr/0/        uint8 [layer, z, y, x] on the grid of the volume
                       /model/0/  likewise, on the model grid

Two masks of one layer share no voxel, so each has a value of its own there; masks that overlap lie in different layers
(as in 3D Slicer's .seg.nrrd). The metadata say which layer and value a mask has, and which volume they belong to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from photon_data.errors import UsageError, name_hint
from photon_data.files import Location
from photon_data.json_text import fields_of
from photon_data.records import MASKS as FOLDER
from photon_data.records import SHELF, SUFFIX, VolumeRecord, places_of, store_name, store_names
from photon_data.store import GRIDS, model_digest, read_metadata, verify_store, write_images
from photon_data.stored_array import open_array
from photon_data.volume import Geometry, Volume

ROWS = "masks.jsonl"
MOST_VALUES = 255  # of a layer; 0 is no mask
REMEDY = "run photon-data prepare --masks again"


@dataclass(frozen=True)
class Label:
    """A value of a file, and where it is in the store. A mask is all labels of its name."""

    name: str
    source_value: int  # in its file
    layer: int
    value: int  # in that layer; 0 where the mask is empty in its file
    source_voxels: int  # in its file
    inside_voxels: int  # of them, those that the grid of the volume reaches
    source_voxel_ml: float
    voxels: int = 0  # on the grid of the volume


class Box(NamedTuple):
    """The part of an array [z, y, x] that is not 0."""

    z: slice
    y: slice
    x: slice


def box_of(array: np.ndarray) -> Box | None:
    """Return the smallest box around the voxels that are not 0; None where all are."""
    planes = np.flatnonzero(array.any(axis=(1, 2)))
    if not len(planes):
        return None
    z = slice(planes[0], planes[-1] + 1)
    rows, columns = (np.flatnonzero(array[z].any(axis=axes)) for axes in ((0, 2), (0, 1)))
    return Box(z, slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))


class Layers:
    """Labels on the two grids of a volume, one after the other put into the first layer where they have room."""

    def __init__(self, grid: Geometry, model: Geometry) -> None:
        self.geometries = (grid, model)
        self.arrays: list[tuple[np.ndarray, np.ndarray]] = []
        self.counts: list[int] = []  # of values in each layer
        self.labels: list[Label] = []

    def add(self, labels: Sequence[Label], on_grids: Sequence[np.ndarray]) -> None:
        """Add the labels of one file, whose arrays on the two grids have the file's own values."""
        self.labels += [label for label in labels if not label.source_voxels]
        marked = [label for label in labels if label.source_voxels]
        boxes = [box_of(array) for array in on_grids]
        for start in range(0, len(marked), MOST_VALUES):
            part = marked[start : start + MOST_VALUES]
            numbers = np.zeros(1 + max(label.source_value for label in marked), np.uint8)
            numbers[[label.source_value for label in part]] = np.arange(1, len(part) + 1)
            pieces = [(g, box, numbers[on_grids[g][box]]) for g, box in enumerate(boxes) if box]
            layer = self._layer_for(pieces, len(part))
            before, voxels = self.counts[layer], np.zeros(1 + len(part), np.int64)
            for g, box, piece in pieces:
                self.arrays[layer][g][box] += np.where(piece, piece + np.uint8(before), np.uint8(0))
                if g == 0:
                    voxels += np.bincount(piece.ravel(), minlength=len(voxels))
            self.counts[layer] += len(part)
            self.labels += [
                replace(label, layer=layer, value=before + number, voxels=int(voxels[number]))
                for number, label in enumerate(part, 1)
            ]

    def _layer_for(self, pieces: Sequence[tuple[int, Box, np.ndarray]], values: int) -> int:
        """Return the first layer with so many values left that no piece overlaps; a new one where there is none."""
        for layer, arrays in enumerate(self.arrays):
            overlaps = (bool(((arrays[g][box] != 0) & (piece != 0)).any()) for g, box, piece in pieces)
            if self.counts[layer] + values <= MOST_VALUES and not any(overlaps):
                return layer
        grid, model = (np.zeros(geometry.shape_zyx, np.uint8) for geometry in self.geometries)
        self.arrays.append((grid, model))
        self.counts.append(0)
        return len(self.arrays) - 1


def has_masks(out: Location, volume_id: str) -> bool:
    """Tell whether there is a store of the masks of a volume."""
    return any(out.exists(name) for name in places_of(volume_id, FOLDER))


def write_masks(
    layers: Layers, out: Location, name: str, identity: dict[str, Any], facts: dict[str, Any]
) -> dict[str, Any]:
    """Write the masks of the volume `identity["id"]`, replacing those that are there; return the store's metadata.

    `facts` say which volume they belong to, see `belongs_to`.
    """
    if not layers.arrays:  # every mask is empty
        layers._layer_for((), 0)
    stacks = map(np.stack, zip(*layers.arrays, strict=True))
    images = dict(zip(("volume", "model"), zip(stacks, layers.geometries, strict=True), strict=True))
    ours = {**identity, "facts": {**facts, "labels": [asdict(label) for label in layers.labels]}}
    return write_images(images, out, name, ours, fill=0)


def belongs_to(volume_id: str, model_sha256: str | None, grid: Mapping[str, Any]) -> dict[str, Any]:
    """Return what masks record of their volume: its id, a hash of its voxels on the model grid, and its grid."""
    return {"id": volume_id, "model_sha256": model_sha256, "grid": dict(grid)}


class Masks(NamedTuple):
    """The masks of a volume, read lazily."""

    labels: tuple[Label, ...]
    layers_lzyx: Any  # uint8 [layer, z, y, x], a zarr array
    geometry: Geometry  # of each layer
    refused: Mapping[str, str]  # {name: why} of masks that could not be read when the store was made

    @property
    def names(self) -> list[str]:
        """The names of all masks, empty ones too."""
        return list(dict.fromkeys(label.name for label in self.labels))

    def mask(self, name: str) -> Volume:
        """Return one mask, bool [z, y, x]; UsageError for a name that is not there."""
        found = [label for label in self.labels if label.name == name]
        if not found:
            why = self.refused.get(name) or name_hint(name, self.names)
            raise UsageError(f"expected the name of a mask, found {name!r}; {why}")
        marked = np.zeros(self.geometry.shape_zyx, bool)
        for layer in {label.layer for label in found if label.value}:
            values = [label.value for label in found if label.layer == layer and label.value]
            marked |= np.isin(np.asarray(self.layers_lzyx[layer]), values)
        return Volume(marked, self.geometry)


def home_of(store: str) -> str:
    """Return OUT of a store OUT/volumes/ID.ome.zarr or OUT/volumes/ab/ID.ome.zarr."""
    above, parent, _ = store.rstrip("/").rsplit("/", 2)
    return above.rpartition("/")[0] if SHELF.fullmatch(parent) else above


def open_masks(volume: str | Path, out: str | Path | None = None, grid: Literal["volume", "model"] = "volume") -> Masks:
    """Return the masks that belong to the store of a volume: those beside it, or those of the prepared folder `out`.

    `volume` is the volume's store, a folder or fsspec URL. UsageError where there are none, where a part of them is
    lost, and where they were made for another volume: for one of another id, recipe or content.

    >>> masks = photon_data.open_masks("a.ome.zarr", out=".")
    >>> masks.names, masks.mask("liver").array_zyx.shape
    (['liver'], (40, 32, 32))
    """
    store = Location(str(volume))
    of_volume = read_metadata(store, "")
    if of_volume is None:
        raise UsageError(f"expected the store of a volume, found none at {volume}")
    home = Location(str(out) if out is not None else home_of(store.at("")))
    flat, deep = places_of(of_volume["id"], FOLDER)
    name = deep if home.exists(deep) else flat
    metadata = read_metadata(home, name)
    if metadata is None or metadata["facts"].get("volume") is None:
        raise UsageError(f"expected masks of {of_volume['id']}, found none at {home.at(name)}; {REMEDY}")
    grid_json = of_volume["facts"].get("grid")
    grid_json = grid_json if isinstance(grid_json, dict) else {}
    if metadata["facts"]["volume"] != belongs_to(of_volume["id"], model_digest(of_volume), grid_json):
        found = "those of another volume, or of this one as it was when they were made"
        raise UsageError(f"expected masks of {of_volume['id']} as it is in {volume}, found {found}; {REMEDY}")
    try:
        layers = open_array(Location(home.at(name)), metadata, GRIDS[grid], dtype="uint8")
        labels = tuple(Label(**fields_of(Label, label)) for label in metadata["facts"]["labels"])
        refused = dict[str, str](metadata["facts"].get("refused", {}))
        geometry = Geometry.from_json(metadata["facts"]["grids"][grid])
        if layers.shape[1:] != geometry.shape_zyx or any(not 0 <= label.layer < layers.shape[0] for label in labels):
            raise ValueError("layers of another shape")
    except UsageError as error:
        raise UsageError(f"{error}; {REMEDY}") from None
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UsageError(
            f"expected whole metadata, found damaged ones in {home.at(name)} ({error!r}); {REMEDY}"
        ) from None
    return Masks(labels, layers, geometry, refused)


# --- masks.jsonl, and what is wrong with the stores beside it


def read_rows(out: Location) -> list[VolumeRecord]:
    """Return the rows of masks.jsonl, one for each volume whose masks were asked for; UsageError if damaged."""
    try:
        rows = [VolumeRecord.from_json(row) for row in out.rows(ROWS)]
        for row, (name, kind) in product(rows, (("volume", dict), ("refused", dict), ("lost", list))):
            if not isinstance((row.facts or {}).get(name, kind()), kind):
                raise ValueError(f"expected {kind.__name__} as the fact {name} of {row.id}, found another")
        return rows
    except (ValueError, TypeError) as error:
        raise UsageError(f"{out.at(ROWS)} is damaged: {error}; remove it, and {REMEDY}") from None


def write_rows(out: Location, rows: Iterable[VolumeRecord]) -> None:
    """Write masks.jsonl, whole, and take away the masks that a row refuses; without rows there is no such file."""
    by_id = {row.id: row for row in rows}
    for row in by_id.values():
        if not row.is_there:
            _remove(out, row.id)
    if by_id:
        out.write_rows(ROWS, (row.row() for _, row in sorted(by_id.items())))
    else:
        out.remove(ROWS)


def forget(out: Location, ids: Iterable[str]) -> None:
    """Take away the masks of volumes, with their rows."""
    gone = set(ids)
    for id in gone:
        _remove(out, id)
    if out.exists(ROWS):
        write_rows(out, [row for row in read_rows(out) if row.id not in gone])


def _remove(out: Location, id: str) -> None:
    for place in places_of(id, FOLDER):
        out.remove(place)


def id_at(place: str) -> str:
    """Return the id of the store at a place."""
    return place.rpartition("/")[2].removesuffix(SUFFIX)


def orphans(out: Location, records: Iterable[VolumeRecord]) -> list[str]:
    """Return the places of masks whose volume is not there."""
    there = {place_of(record) for record in records if record.is_there}
    return [place for place in store_names(out, FOLDER) if id_at(place)[0] != "." and place not in there]


def place_of(volume: VolumeRecord) -> str:
    """Return where the masks of a volume lie, or would: as deep as the volume."""
    return store_name(volume.id, volume.is_deep, FOLDER)


def is_stale(out: Location, row: VolumeRecord, volume: VolumeRecord) -> bool:
    """Tell whether masks were made for their volume as it was before."""
    digest = volume.model_sha256
    if digest is None and (metadata := read_metadata(out, volume.place)):  # rows of earlier versions
        digest = model_digest(metadata)
    return bool(row.is_there and ((row.facts or {}).get("volume") or {}).get("model_sha256") != digest)


def verify_masks(out: Location, records: Sequence[VolumeRecord]) -> Iterator[str]:
    """Yield what is wrong with the masks, a sentence each: damaged or missing, without a volume or a row, stale."""
    rows = {row.id: row for row in read_rows(out)}
    volumes = {record.id: record for record in records if record.is_there}
    for place in orphans(out, records):
        yield f"{place}: masks without a volume: prune takes them away"
    for place in store_names(out, FOLDER):
        id = id_at(place)
        if id in volumes and not (id in rows and rows[id].is_there):
            yield f"{place}: no row in {ROWS}: {REMEDY}, or remove it"
    for id, row in rows.items():
        if id in volumes and row.is_there:
            yield from verify_store(out, place_of(volumes[id]), row.store_sha256)
            if is_stale(out, row, volumes[id]):
                yield f"{place_of(volumes[id])}: made for another content or recipe of {id}: {REMEDY}"


def problems_of(row: VolumeRecord) -> list[str]:
    """Return what people should know of the masks of a volume, a sentence each: refused, or nothing left of one."""
    if not row.is_there:
        return [f"{row.state} masks of {row.id}: {row.reason}"]
    facts = row.facts or {}
    refused = [f"refused mask {name} of {row.id}: {why}" for name, why in facts.get("refused", {}).items()]
    lost = "nothing is left of it: it lies outside of the grid, or is smaller than its voxels"
    return refused + [f"mask {name} of {row.id}: {lost}" for name in facts.get("lost", ())]
