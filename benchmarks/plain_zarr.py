"""How the peers' results are stored: a zarr v3 array with zarr's own defaults."""

from __future__ import annotations

import numpy as np
import zarr


def save(array_zyx: np.ndarray, out: str) -> None:
    """Write int16 HU [364, 364, 364] into the folder `out`."""
    if array_zyx.shape != (364, 364, 364):
        raise RuntimeError(f"364 x 364 x 364 voxels wanted, got {array_zyx.shape}")
    zarr.create_array(out, data=np.ascontiguousarray(array_zyx, np.int16), overwrite=True)
