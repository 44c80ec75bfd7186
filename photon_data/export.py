"""Byte-for-byte repeatable NIfTI-1 files, streamed plane by plane.

A prepared volume -> one file or folder of a format that others read.
"""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import nibabel
import numcodecs
import numpy as np
import zarr

from photon_data.files import replace_folder, sync, sync_tree
from photon_data.store import ome_datasets
from photon_data.volume import Geometry, Volume


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


# Fiji reads chunks of zarr v2 one by one; this many voxels are 2 MB.
CHUNK_ZYX = (64, 128, 128)


class Format(NamedTuple):
    """How a format ends, and what writes a volume of it to a path, whole or not at all."""

    suffix: str
    write: Callable[[Volume, Path], None]


def write_nifti_export(volume: Volume, path: Path) -> None:
    """Write int16 HU as .nii.gz, axes L, P, S, sform and qform alike: what the authors' code reads. The same bytes every time."""
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("wb") as file, gzip.GzipFile("", "wb", compresslevel=3, fileobj=file, mtime=0) as packed:
        packed.write(volume.to_nibabel().to_bytes())
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)


def write_ome_zarr_04(volume: Volume, path: Path) -> None:
    """Write an OME-Zarr 0.4 image (zarr v2, zlib, "/" between chunk numbers), which Fiji and older viewers read."""
    temporary = path.with_name(f".{path.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    group = zarr.create_group(temporary, zarr_format=2, attributes={"multiscales": [_multiscale(volume, path.name)]})
    array = group.create_array(
        "0",
        shape=volume.geometry.shape_zyx,
        chunks=CHUNK_ZYX,
        dtype="<i2",
        compressors=numcodecs.Zlib(level=1),
        chunk_key_encoding={"name": "v2", "separator": "/"},
        fill_value=0,
    )
    array[...] = volume.numpy()
    sync_tree(temporary)
    replace_folder(temporary, path)


def _multiscale(volume: Volume, name: str) -> dict[str, object]:
    return {
        "version": "0.4",
        "name": name,
        "axes": [{"name": axis, "type": "space", "unit": "millimeter"} for axis in "zyx"],
        "datasets": ome_datasets(volume.geometry),
    }


FORMATS: Mapping[str, Format] = MappingProxyType(
    {"nifti": Format(".nii.gz", write_nifti_export), "ome-zarr-0.4": Format(".ome.zarr", write_ome_zarr_04)}
)
