"""Masks on disk -> how many voxels of each lie in each token."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import NamedTuple

import numpy as np

from photon_data.errors import UsageError
from photon_data.readers import find_scans, open_scan
from photon_data.scan import Scan
from photon_data.volume import Geometry, Volume
from photon_train.token_grid import MaskRecall, mask_counts, recall_of


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
