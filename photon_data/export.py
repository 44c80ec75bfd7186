"""A prepared volume -> one file or folder of a format that others read."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numcodecs
import zarr

from photon_data.location import replace_folder, sync, sync_tree
from photon_data.store import ome_datasets
from photon_data.volume import Volume

# Fiji reads chunks of zarr v2 one by one; this many voxels are 2 MB.
CHUNK_ZYX = (64, 128, 128)


class Format(NamedTuple):
    """How a format ends, and what writes a volume of it to a path, whole or not at all."""

    suffix: str
    write: Callable[[Volume, Path], None]


def write_nifti(volume: Volume, path: Path) -> None:
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
    {"nifti": Format(".nii.gz", write_nifti), "ome-zarr-0.4": Format(".ome.zarr", write_ome_zarr_04)}
)
