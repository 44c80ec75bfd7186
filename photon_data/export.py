"""A prepared volume -> a file or folder of a format that others read; and the writer of repeatable NIfTI files."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import nibabel
import numcodecs
import numpy as np
import zarr

from photon_data.files import write_whole
from photon_data.store import FILL_HU, ome_datasets
from photon_data.volume import Geometry, Volume

# Fiji reads chunks of zarr v2 one by one; this many voxels are 2 MB.
CHUNK_ZYX = (64, 128, 128)


class Format(NamedTuple):
    """A format that others read."""

    suffix: str  # of the names of files
    write: Callable[[Volume, Path], None]  # whole or not at all


def nifti_header(geometry: Geometry, dtype: str, slope: float = 1.0, intercept: float = 0.0) -> bytes:
    """Return the 352 bytes before the voxels. sform and qform agree; a sheared grid has a sform only."""
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


def write_nifti(path: Path, header: bytes, planes: Iterable[np.ndarray], compresslevel: int = 1) -> None:
    """Write header and voxels, gzipped if the name ends in .gz; the name appears when the file is complete.

    The gzip stream carries neither time nor file name, so the same voxels always give the same bytes.
    """
    with write_whole(path) as temporary, temporary.open("wb") as raw:
        file = gzip.GzipFile("", "wb", compresslevel, raw, mtime=0) if path.suffix == ".gz" else raw
        with file:
            file.write(header)
            for plane in planes:
                file.write(plane.tobytes())


def _write_int16_nifti(volume: Volume, path: Path) -> None:
    """Write int16 HU as .nii.gz, axes L, P, S: what the authors' code reads."""
    write_nifti(path, nifti_header(volume.geometry, "<i2"), volume.numpy().astype("<i2", copy=False), compresslevel=3)


def _write_ome_zarr_04(volume: Volume, path: Path) -> None:
    """Write an OME-Zarr 0.4 image (zarr v2, zlib, "/" between chunk numbers), which Fiji and older viewers read."""
    multiscale = {
        "version": "0.4",
        "name": path.name,
        "axes": [{"name": axis, "type": "space", "unit": "millimeter"} for axis in "zyx"],
        "datasets": ome_datasets(volume.geometry),
    }
    with write_whole(path) as temporary:
        group = zarr.create_group(temporary, zarr_format=2, attributes={"multiscales": [multiscale]})
        array = group.create_array(
            "0",
            shape=volume.geometry.shape_zyx,
            chunks=CHUNK_ZYX,
            dtype="<i2",
            compressors=numcodecs.Zlib(level=1),
            chunk_key_encoding={"name": "v2", "separator": "/"},
            fill_value=FILL_HU,
        )
        array[...] = volume.numpy()


FORMATS = {"nifti": Format(".nii.gz", _write_int16_nifti), "ome-zarr-0.4": Format(".ome.zarr", _write_ome_zarr_04)}
