"""Byte-for-byte repeatable NIfTI-1 files, streamed plane by plane."""

from __future__ import annotations

import gzip
from collections.abc import Iterable
from pathlib import Path

import nibabel
import numpy as np

from photon_data.volume import Geometry


def nifti_header(geometry: Geometry, dtype: str, slope: float = 1.0, intercept: float = 0.0) -> bytes:
    """The 352 bytes before the voxels. sform and qform agree; a sheared grid has a sform only, as a qform cannot hold it."""
    header = nibabel.Nifti1Header(endianness="<")
    header.set_data_shape(geometry.shape_zyx[::-1])
    header.set_data_dtype(dtype)
    header.set_sform(geometry.affine_ras, code=1)
    if geometry.is_orthogonal():
        header.set_qform(geometry.affine_ras, code=1)
    else:
        header["pixdim"][1:4] = geometry.spacing_zyx_mm[::-1]
    header.set_xyzt_units("mm")
    header["vox_offset"] = 352
    header.set_slope_inter(slope, intercept)
    return header.binaryblock + bytes(4)


def write_nifti(path: Path, header: bytes, planes: Iterable[np.ndarray]) -> None:
    """Write header and voxels, gzipped if the name ends in .gz; the name appears when the file is complete.

    The gzip stream carries neither time nor file name, so the same voxels always give the same bytes.
    """
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as raw:
        if path.suffix == ".gz":
            with gzip.GzipFile(filename="", mode="wb", compresslevel=1, fileobj=raw, mtime=0) as packed:
                packed.write(header)
                for plane in planes:
                    packed.write(plane.tobytes())
        else:
            raw.write(header)
            for plane in planes:
                raw.write(plane.tobytes())
    partial.replace(path)
