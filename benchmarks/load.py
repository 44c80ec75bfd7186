"""One training sample, disk to tensor: the store's model grid against a 364^3 .nii.gz with MONAI Resize +
ScaleIntensity.

Every way runs in one process and one thread, as in a worker of a data loader, interleaved.

python benchmarks/load.py [--repeats 7]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numcodecs import blosc
from scan import test_scan
from tables import print_place, print_table
from with_photon import prepare

from photon_data import open_volume

SHAPE_ZYX = (140, 280, 280)
AUTHORS = "364^3 .nii.gz: SimpleITK ReadImage, MONAI Resize + ScaleIntensity (the authors')"
MONAI = "364^3 .nii.gz: MONAI LoadImage, Resize, ScaleIntensity"
INT16, FLOAT32 = "store: int16, to be scaled on the device", "store: float32 in [0, 1]"
BY_ZARR = f"{INT16}; read by zarr-python"
LOW_HU, RANGE_HU = -1000, 2000
Way = Callable[[], torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    blosc.set_nthreads(1)
    with tempfile.TemporaryDirectory() as folder:
        store = prepare(str(test_scan()), folder)
        nifti = str(Path(folder, "volume.nii.gz"))
        open_volume(store).to_nibabel().to_filename(nifti)
        ways, missing = _all_ways(store, nifti)
        tensors = {name: way() for name, way in ways.items()}
        print_results(_interleaved(ways, options.repeats), missing)
    for name in (AUTHORS, MONAI):
        if name in tensors:
            print(f"Largest difference from {name}: {float((tensors[FLOAT32] - tensors[name]).abs().max()):.1e}")


def int16(store: str) -> torch.Tensor:
    """Return HU as int16 [1, 140, 280, 280]."""
    return torch.from_numpy(open_volume(store, "model").numpy())[None]


def by_zarr(store: str) -> torch.Tensor:
    """Return the same, decoded by zarr-python."""
    return torch.from_numpy(open_volume(store, "model").array_zyx[:, :, :])[None]


def float32(store: str) -> torch.Tensor:
    """Return [1, 140, 280, 280] in [0, 1]: converted plane by plane, so that later passes meet the cache."""
    hu = open_volume(store, "model").array_zyx[...]
    unit = np.empty(hu.shape, np.float32)
    for plane, out in zip(hu, unit, strict=True):
        np.multiply(plane, np.float32(1 / RANGE_HU), out=out)
        out -= np.float32(LOW_HU / RANGE_HU)
    return torch.from_numpy(unit)[None]


def _all_ways(store: str, nifti: str) -> tuple[dict[str, Way], list[str]]:
    """Return the ways whose libraries are here, and a sentence for each library that is not."""
    ways: dict[str, Way] = {}
    missing = []
    try:
        ways |= _monai_ways(nifti)
    except ModuleNotFoundError as error:
        missing.append(f"{error.name} is not installed (benchmarks/requirements.txt)")
    ways |= {INT16: lambda: int16(store), FLOAT32: lambda: float32(store), BY_ZARR: lambda: by_zarr(store)}
    return ways, missing


def _monai_ways(nifti: str) -> dict[str, Way]:
    import SimpleITK as sitk
    from monai.transforms import Compose, LoadImage, Resize, ScaleIntensity

    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    scale = ScaleIntensity(0, 1)
    authors = Compose([Resize(SHAPE_ZYX, mode="trilinear"), scale])
    loading = Compose([LoadImage(ensure_channel_first=True), Resize(SHAPE_ZYX[::-1], mode="trilinear"), scale])

    def by_authors() -> Any:
        return authors(
            torch.from_numpy(sitk.GetArrayFromImage(sitk.ReadImage(nifti)).astype(np.float32))[None]
        ).as_tensor()

    return {AUTHORS: by_authors, MONAI: lambda: loading(nifti).as_tensor().permute(0, 3, 2, 1)}


def _interleaved(ways: dict[str, Way], repeats: int) -> dict[str, tuple[float, float]]:
    """Return the median wall and CPU milliseconds of each way."""
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start, cpu = time.perf_counter(), time.process_time()
            way()
            measured[name].append((1e3 * (time.perf_counter() - start), 1e3 * (time.process_time() - cpu)))
    return {name: (median(w for w, _ in runs), median(c for _, c in runs)) for name, runs in measured.items()}


def print_results(results: dict[str, tuple[float, float]], missing: list[str]) -> None:
    """Print the table; the ratio is to the authors' way, by CPU time."""
    base = results.get(AUTHORS, (float("nan"), float("nan")))[1]
    print_place("zarr", "numcodecs", "monai", "torch", "SimpleITK")
    print_table(
        ("way", "wall ms", "CPU ms", "times as fast (CPU)"),
        [(name, f"{wall:.0f}", f"{cpu:.0f}", f"{base / cpu:.1f}") for name, (wall, cpu) in results.items()],
    )
    for line in missing:
        print(line)


if __name__ == "__main__":
    main()
