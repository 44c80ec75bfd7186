"""Raw scans on disk, written by nibabel."""

from pathlib import Path

import nibabel
import numpy as np
from scans import ct_like


def write_scan(path: Path, seed=0, shape_zyx=(16, 24, 28), spacing_mm=(2.0, 1.1, 0.9), array=None, affine=None) -> Path:
    """A small CT as NIfTI, axes L, P, S unless `affine` (to RAS) says otherwise."""
    array = ct_like(shape_zyx, seed) if array is None else array
    if affine is None:
        affine = np.diag([-spacing_mm[2], -spacing_mm[1], spacing_mm[0], 1.0])
        affine[:3, 3] = (11, -7, 100 + seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(array.transpose(2, 1, 0), affine)
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    nibabel.save(image, path)
    return path
