"""A volume as the rows of patches that the vision tower reads."""

import torch
from torch import Tensor


def patchify(volume_zyx: Tensor, slices: int, patch: int, merge: int) -> tuple[Tensor, Tensor]:
    """Return the patches float[P, slices * patch ** 2] and their grid int64[3] (t, h, w).

    Rows go slab by slab, and within a slab by blocks of merge x merge patches, because each block becomes one token; a row
    is (d, h, w) flattened. Raises ValueError when the volume is not a whole number of blocks.
    """
    block = (slices, patch * merge, patch * merge)
    if volume_zyx.ndim != 3 or any(n == 0 or n % b for n, b in zip(volume_zyx.shape, block, strict=True)):
        raise ValueError(
            f"a volume of whole blocks wanted, a multiple of {block} voxels (z, y, x), got {tuple(volume_zyx.shape)}; "
            "resample it, or crop it"
        )
    t, h, w = (n // size for n, size in zip(volume_zyx.shape, (slices, patch, patch), strict=True))
    blocks = volume_zyx.reshape(t, slices, h // merge, merge, patch, w // merge, merge, patch)
    rows = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7)
    return rows.reshape(t * h * w, slices * patch**2), torch.tensor([t, h, w])
