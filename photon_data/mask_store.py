"""Masks <-> store: the labels of one volume on its grids, in as few layers as their overlaps need.

OUT/masks/<id>.ome.zarr/0/        uint8 [layer, z, y, x] on the grid of the volume
                       /model/0/  likewise, on the model grid

Two masks of one layer share no voxel, so each has a value of its own there; masks that overlap lie in different layers
(as in 3D Slicer's .seg.nrrd). The metadata say which layer and value a mask has, and which volume they belong to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from photon_data.errors import UsageError, name_hint
from photon_data.files import Location
from photon_data.json_text import fields_of
from photon_data.records import MASKS as FOLDER
from photon_data.records import SHELF, places_of
from photon_data.store import GRIDS, model_digest, read_metadata, write_images
from photon_data.stored_array import open_array
from photon_data.volume import Geometry, Volume

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
