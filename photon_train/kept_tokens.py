"""Where the visual tokens of a volume lie in the world, and which of them holds a voxel of any scan or mask.

A token is a box of the prepared grid (about 36.4 mm a side for 364 mm in ten). Token number = (t * H + h) * W + w: t counts
slabs from the feet up, h rows from the front to the back, and w columns from the patient's left to the right, since the model
reads volumes with their last axis flipped.

Legend: V visual tokens of one volume; arrays of a scan are [z, y, x].

Masks on disk -> how many voxels of each lie in each token.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from photon_data.errors import UsageError
from photon_data.grid import model_grid
from photon_data.readers import open_scan
from photon_data.readers.find import find_scans
from photon_data.scan import Scan
from photon_data.volume import Geometry, Volume

OUTSIDE = -1  # the token of a point that the prepared grid does not reach


class MaskRecall(NamedTuple):
    """How much of a mask lies in kept tokens.

    voxels    of the mask
    inside    of them, within the prepared grid: what is cut off can be in no token
    kept      of them, in kept tokens
    recall    kept / voxels; NaN for an empty mask
    chance    expected recall of as many tokens drawn at random: inside / voxels * kept tokens / tokens; NaN as above
    """

    voxels: int
    inside: int
    kept: int
    recall: float
    chance: float


def token_cells(grid: Geometry, tokens_zyx: tuple[int, int, int]) -> Geometry:
    """Return the boxes of the tokens, as a grid of `tokens_zyx` "voxels" over the prepared grid (axis-aligned, not flipped).

    Cutting the model grid into patches gives the same boxes: it covers the same field of view (align_corners=False).
    """
    return model_grid(grid, tokens_zyx)


def tokens_at(world_lps: np.ndarray, cells: Geometry) -> np.ndarray:
    """Return int16[...], the token of each LPS point [..., 3]; OUTSIDE beyond the grid."""
    return _tokens(cells.index(world_lps), cells)


def token_centres(cells: Geometry) -> np.ndarray:
    """Return float[V, 3]: the LPS centre of each token."""
    return cells.world(_boxes(cells))


def token_boxes(cells: Geometry) -> np.ndarray:
    """Return int[*cells.shape_zyx]: the token of each box (z, y, x), as the world is oriented."""
    return _tokens(np.stack(np.meshgrid(*map(np.arange, cells.shape_zyx), indexing="ij"), -1), cells)


def token_map(native: Geometry, cells: Geometry) -> np.ndarray:
    """Return int16 [z, y, x]: the token that holds each voxel centre of a scan, OUTSIDE beyond the grid."""
    origin = cells.index(native.origin_lps)
    step_z, step_y, step_x = (cells.index(native.world(unit)) - origin for unit in np.eye(3))
    _, ny, nx = native.shape_zyx
    in_plane = np.arange(ny)[:, None, None] * step_y + np.arange(nx)[None, :, None] * step_x
    tokens = np.empty(native.shape_zyx, np.int16)
    for z in range(native.shape_zyx[0]):
        tokens[z] = _tokens(in_plane + (origin + z * step_z), cells)
    return tokens


def value_planes(values_V: np.ndarray, tokens_zyx: np.ndarray) -> Iterator[np.ndarray]:
    """Yield [y, x] of values_V's type for each plane of a `token_map`: the value of each voxel's token, 0 beyond the grid."""
    by_token = np.append(values_V, np.zeros(1, values_V.dtype))  # OUTSIDE is the last of these
    for plane in tokens_zyx:
        yield by_token[plane]


def kept_voxels(keep_V: np.ndarray, grid: Geometry, cells: Geometry) -> np.ndarray:
    """Return bool [z, y, x] on the prepared grid itself: True in kept tokens."""
    kept_boxes = keep_V[token_boxes(cells)]
    nearest = [(2 * np.arange(n) + 1) * boxes // (2 * n) for n, boxes in zip(grid.shape_zyx, cells.shape_zyx, strict=True)]
    voxels: np.ndarray = kept_boxes[np.ix_(*nearest)]
    return voxels


def mask_recall(mask: Volume, cells: Geometry, keep_V: np.ndarray) -> MaskRecall:
    """Return how much of a mask (voxels that are not 0, on a grid of its own) the kept tokens hold, and what chance would."""
    counts_V, voxels = mask_counts(mask, cells)
    return recall_of(counts_V, voxels, keep_V)


def mask_counts(mask: Volume, cells: Geometry) -> tuple[np.ndarray, int]:
    """Return int64[V], the mask's voxels in each token, and how many it has in all. One mask, many keep sets: count once."""
    index_zyx = np.argwhere(mask.numpy())
    tokens = tokens_at(mask.geometry.world(index_zyx), cells)
    return np.bincount(tokens[tokens != OUTSIDE], minlength=int(np.prod(cells.shape_zyx))), len(index_zyx)


def recall_of(counts_V: np.ndarray, voxels: int, keep_V: np.ndarray) -> MaskRecall:
    """Return the recall of a mask of `voxels` voxels, `counts_V` of them in each token, by the tokens of bool keep_V."""
    inside, kept = int(counts_V.sum()), int(counts_V[keep_V].sum())
    if voxels == 0:
        return MaskRecall(0, 0, 0, float("nan"), float("nan"))
    return MaskRecall(voxels, inside, kept, kept / voxels, inside / voxels * float(keep_V.mean()))


def _tokens(index_zyx: np.ndarray, cells: Geometry) -> np.ndarray:
    """Return int16[...] of fractional box indices [..., 3]. Rounded, so that a point on a face falls alike on every machine."""
    box = np.floor(np.round(np.asarray(index_zyx, float) + 0.5, 9)).astype(np.int32)
    _, rows, columns = cells.shape_zyx
    inside = ((box >= 0) & (box < np.asarray(cells.shape_zyx))).all(-1)
    token = (box[..., 0] * rows + box[..., 1]) * columns + (columns - 1 - box[..., 2])
    return np.where(inside, token, OUTSIDE).astype(np.int16)


def _boxes(cells: Geometry) -> np.ndarray:
    """Return int[V, 3]: the box (z, y, x) of each token."""
    slab, row, column = np.unravel_index(np.arange(np.prod(cells.shape_zyx)), cells.shape_zyx)
    return np.stack([slab, row, cells.shape_zyx[2] - 1 - column], -1)


class CountedMask(NamedTuple):
    """A mask by its name: its voxels in each token (int64[V]), in all, and its volume. It serves every question on the scan."""

    name: str
    counts_V: np.ndarray
    voxels: int
    ml: float

    def recall(self, keep_V: np.ndarray) -> MaskRecall:
        """Return what share of it the kept tokens hold."""
        return recall_of(self.counts_V, self.voxels, keep_V)


def counted_masks(folder: Path, cells: Geometry, names: Container[str] | None = None) -> list[CountedMask]:
    """Return the masks of a folder (NIfTI and the like, any grid; what is not 0 belongs to it), by name.

    `names`: only those. UsageError for a folder without any; Refused for a file that cannot be read.
    """
    sources = find_scans(folder).sources
    if not sources:
        raise UsageError(f"masks wanted (.nii.gz and the like), found none in {folder}")
    wanted = [source for source in sources if names is None or source.id in names]
    return [_counted(source.id, _mask(open_scan(source)), cells) for source in wanted]


def _counted(name: str, mask: Volume, cells: Geometry) -> CountedMask:
    counts_V, voxels = mask_counts(mask, cells)
    return CountedMask(name, counts_V, voxels, voxels * mask.geometry.voxel_ml)


def _mask(scan: Scan) -> Volume:
    return Volume(np.stack([plane != 0 for plane in scan.planes()]), scan.geometry)
