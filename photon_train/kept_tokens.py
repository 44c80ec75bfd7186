"""Where the V visual tokens of a volume lie in the world, and how much of a mask lies in those that were kept.

A token is a box of the prepared grid. `cells` is the grid of these boxes: `model_grid(prepared_grid, tokens_zyx)`.
Token number = (t * H + h) * W + w: t counts slabs from the feet up, h rows from the front to the back, and w columns
from the patient's left to the right, since the model reads volumes with their last axis flipped.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from photon_data.errors import UsageError
from photon_data.files import Location, is_safe
from photon_data.mask_store import Masks, has_masks, open_masks
from photon_data.readers import open_scan
from photon_data.readers.find import find_one_scan, find_scans
from photon_data.recipe import Recipe
from photon_data.records import VOLUMES
from photon_data.resample import model_grid, target_grid
from photon_data.scan import Source
from photon_data.store import is_store, open_volume
from photon_data.volume import Geometry, Volume

OUTSIDE = -1  # the token of a point that the prepared grid does not reach


def tokens_at(world_lps: np.ndarray, cells: Geometry) -> np.ndarray:
    """Return int16[...], the token of each LPS point [..., 3]; OUTSIDE beyond the grid."""
    return _tokens_at_index(cells.index(world_lps), cells)


def _tokens_at_index(index_zyx: np.ndarray, cells: Geometry) -> np.ndarray:
    """Return int16[...] of fractional box indices [..., 3], rounded: a point on a face is the same everywhere."""
    box = np.floor(np.round(np.asarray(index_zyx, float) + 0.5, 9)).astype(np.int32)
    _, rows, columns = cells.shape_zyx
    inside = ((box >= 0) & (box < np.asarray(cells.shape_zyx))).all(-1)
    token = (box[..., 0] * rows + box[..., 1]) * columns + (columns - 1 - box[..., 2])
    return np.where(inside, token, OUTSIDE).astype(np.int16)


def token_boxes(cells: Geometry) -> np.ndarray:
    """Return int[*cells.shape_zyx]: the token of each box (z, y, x), as the world is oriented."""
    return np.arange(np.prod(cells.shape_zyx)).reshape(cells.shape_zyx)[..., ::-1]


def token_centres(cells: Geometry) -> np.ndarray:
    """Return float[V, 3]: the LPS centre of each token."""
    slab, row, column = np.unravel_index(np.arange(np.prod(cells.shape_zyx)), cells.shape_zyx)
    return cells.world(np.stack([slab, row, cells.shape_zyx[2] - 1 - column], -1))


def token_map(native: Geometry, cells: Geometry) -> np.ndarray:
    """Return int16 [z, y, x]: the token that holds each voxel centre of a scan, OUTSIDE beyond the grid."""
    tokens = np.empty(native.shape_zyx, np.int16)
    for z, plane in enumerate(token_planes(native, cells)):
        tokens[z] = plane
    return tokens


def token_planes(native: Geometry, cells: Geometry) -> Iterator[np.ndarray]:
    """Yield the planes [y, x] of `token_map`, for scans that are too large to hold it."""
    origin = cells.index(native.origin_lps)
    step_z, step_y, step_x = (cells.index(native.world(unit)) - origin for unit in np.eye(3))
    _, ny, nx = native.shape_zyx
    in_plane = np.arange(ny)[:, None, None] * step_y + np.arange(nx)[None, :, None] * step_x
    for z in range(native.shape_zyx[0]):
        yield _tokens_at_index(in_plane + (origin + z * step_z), cells)


def kept_voxels(keep_V: np.ndarray, grid: Geometry, cells: Geometry) -> np.ndarray:
    """Return bool [z, y, x] on the prepared grid itself: True in kept tokens."""
    return np.asarray(keep_V[token_boxes(cells)][np.ix_(*_boxes_of(grid, cells))])


def _boxes_of(grid: Geometry, cells: Geometry) -> list[np.ndarray]:
    """Return, along z, y and x, the box that holds each voxel of the prepared grid."""
    sides = zip(grid.shape_zyx, cells.shape_zyx, strict=True)
    return [(2 * np.arange(n) + 1) * boxes // (2 * n) for n, boxes in sides]


class MaskRecall(NamedTuple):
    """How much of a mask lies in kept tokens."""

    voxels: int
    inside: int  # of them, within the prepared grid: what is cut off can be in no token
    kept: int  # of them, in kept tokens
    recall: float  # kept / voxels; NaN for an empty mask
    chance: float  # expected recall of as many tokens drawn at random: inside / voxels * kept tokens / tokens


@dataclass
class CountedMask:
    """A mask, counted on the tokens once for every question on the scan."""

    name: str
    counts_V: np.ndarray  # int64, its voxels in each token
    voxels: int  # in all
    ml: float
    voxels_of: Callable[[], Volume]  # reads it again, to be drawn

    def recall(self, keep_V: np.ndarray) -> MaskRecall:
        """Return what share of it lies in the tokens of bool keep_V."""
        inside, kept = int(self.counts_V.sum()), int(self.counts_V[keep_V].sum())
        if self.voxels == 0:
            return MaskRecall(0, 0, 0, float("nan"), float("nan"))
        chance = inside / self.voxels * float(keep_V.mean())
        return MaskRecall(self.voxels, inside, kept, kept / self.voxels, chance)


def count_mask(name: str, voxels_of: Callable[[], Volume], cells: Geometry) -> CountedMask:
    """Return a mask (voxels that are not 0, on a grid of its own) counted on the tokens."""
    mask = voxels_of()
    index_zyx = np.argwhere(mask.numpy())
    tokens = tokens_at(mask.geometry.world(index_zyx), cells)
    counts_V = np.bincount(tokens[tokens != OUTSIDE], minlength=int(np.prod(cells.shape_zyx)))
    return CountedMask(name, counts_V, len(index_zyx), len(index_zyx) * mask.geometry.voxel_ml, voxels_of)


def counted_masks(folder: Path, cells: Geometry, names: Container[str] | None = None) -> list[CountedMask]:
    """Return the masks of a folder (NIfTI and the like, any grid; what is not 0 belongs to it), or those of `names`.

    UsageError for a folder without any; Refused for a file that cannot be read.
    """
    sources = find_scans(folder, label_maps=True).sources
    if not sources:
        raise UsageError(f"expected masks (.nii.gz and the like) in {folder}, found none")
    wanted = [source for source in sources if names is None or source.id in names]
    return [count_mask(source.id, partial(_voxels_of, source), cells) for source in wanted]


def _voxels_of(source: Source) -> Volume:
    """Return the voxels of a file that are not 0."""
    scan = open_scan(source)
    return Volume(np.stack([np.nan_to_num(plane) != 0 for plane in scan.planes()]), scan.geometry)


def counted_stored_masks(masks: Masks, cells: Geometry, names: Container[str] | None = None) -> list[CountedMask]:
    """Return the masks of a store, counted on the tokens by the voxels of the prepared grid, all or those of `names`.

    What lay outside of the grid in a file counts among its voxels, as so many of the grid's size.
    """
    wanted = [name for name in masks.names if names is None or name in names]
    labels = {name: [label for label in masks.labels if label.name == name] for name in wanted}
    used = {label.layer for own in labels.values() for label in own if label.value}
    counts = {layer: _counts_of_layer(masks, layer, cells) for layer in used}
    nothing_V, counted = np.zeros(np.prod(cells.shape_zyx), np.int64), []
    for name, own in labels.items():
        counts_V = sum((counts[label.layer][label.value] for label in own if label.value), nothing_V)
        beyond_ml = sum((label.source_voxels - label.inside_voxels) * label.source_voxel_ml for label in own)
        voxels = int(counts_V.sum()) + round(beyond_ml / masks.geometry.voxel_ml)
        ml = sum(label.source_voxels * label.source_voxel_ml for label in own)
        counted.append(CountedMask(name, counts_V, voxels, ml, partial(masks.mask, name)))
    return counted


def _counts_of_layer(masks: Masks, layer: int, cells: Geometry) -> np.ndarray:
    """Return int64[value, V]: the voxels of each value of a layer in each token."""
    array, tokens = np.asarray(masks.layers_lzyx[layer]), token_boxes(cells)
    slabs, rows, columns = _boxes_of(masks.geometry, cells)
    count_V, values = tokens.size, 1 + int(array.max())
    counts = np.zeros(values * count_V, np.int64)
    for plane, slab in zip(array, slabs, strict=True):
        if plane.any():
            tokens_yx = tokens[slab][np.ix_(rows, columns)]
            counts += np.bincount((plane * np.int64(count_V) + tokens_yx).ravel(), minlength=len(counts))
    return counts.reshape(values, count_V)


class MasksByVolume(NamedTuple):
    """Masks by volume id, and why those of a volume, or some of them, could not be read."""

    masks: dict[str, list[CountedMask]]
    unread: dict[str, str]


class CountedMasks(NamedTuple):
    """The masks of one volume, and why some of them could not be read."""

    counted: list[CountedMask]
    refused: Mapping[str, str]


class MaskFolder:
    """Where masks of volumes are: a prepared folder, or a folder with a folder of mask files per volume id."""

    def __init__(self, place: str | Path) -> None:
        self.out = Location(str(place))
        self.is_prepared = bool(self.out.exists(VOLUMES))

    def has(self, volume_id: str) -> bool:
        """Tell whether there is a store, or a folder, of the masks of a volume."""
        if self.is_prepared:
            return has_masks(self.out, volume_id)
        return self.out.is_local and (self.out.path / volume_id).is_dir()

    def counted(
        self, volume_id: str, place: str, tokens_zyx: tuple[int, int, int], names: Container[str] | None = None
    ) -> CountedMasks:
        """Return the masks of the volume at `place`, all or those of `names`; UsageError or Refused where not read."""
        if self.is_prepared:
            open_volume(place, None, id=volume_id)
            return self.stored(place, tokens_zyx, names)
        if is_store(place):
            grid = open_volume(place, None, id=volume_id).geometry
        else:  # a raw scan: its header says what it would be prepared to
            grid = target_grid(open_scan(find_one_scan(Path(place))).geometry, Recipe())
        return CountedMasks(counted_masks(self.out.path / volume_id, model_grid(grid, tokens_zyx), names), {})

    def stored(self, place: str, tokens_zyx: tuple[int, int, int], names: Container[str] | None = None) -> CountedMasks:
        """Return the masks that a prepared folder has of the store at `place`.

        UsageError for a raw scan, and for masks that were made for another content or recipe of the volume.
        """
        if not (place and is_store(place)):
            remedy = "give the store, or a folder of mask files"
            raise UsageError(f"--masks {self.out.url}: expected a store, found a raw scan; {remedy}")
        masks = open_masks(place, self.out.at(""))
        refused = {name: why for name, why in masks.refused.items() if names is None or name in names}
        return CountedMasks(counted_stored_masks(masks, model_grid(masks.geometry, tokens_zyx), names), refused)


def volumes_with_masks(home: MaskFolder, rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return {id: path} of the volumes, of rows of one, that have masks; UsageError where there is none."""
    places = {row["volume_id"]: str(row["videos"][0]) for row in rows if len(row["videos"]) == 1}
    found = {id: place for id, place in sorted(places.items()) if is_safe(id) and home.has(id)}
    if not found:
        expected = f"masks of some of {len(places)} volumes in {home.out.url}"
        remedy = "give the folder that photon-data prepare --masks wrote, or one with a folder of masks per volume id"
        raise UsageError(f"--masks: expected {expected}, found none; {remedy}")
    return found


def counted_by_volume(
    home: MaskFolder,
    places: Mapping[str, str],
    tokens_zyx: tuple[int, int, int],
    on_volume: Callable[[], object] = lambda: None,
    names: Container[str] | None = None,
) -> MasksByVolume:
    """Return the masks of each volume of `places`, all or those of `names`; `on_volume` is called after each volume."""
    found = MasksByVolume({}, {})
    for id, place in places.items():
        try:
            found.masks[id], refused = home.counted(id, place, tokens_zyx, names)
            if refused:
                found.unread[id] = "; ".join(f"mask {name} was refused: {why}" for name, why in refused.items())
        except (ValueError, OSError) as error:
            found.unread[id] = str(error)
        on_volume()
    return found
