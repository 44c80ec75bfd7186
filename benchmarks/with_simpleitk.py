"""SimpleITK in three passes, as people write it: orient, resample, crop and pad."""

from __future__ import annotations

import SimpleITK as sitk
from plain_zarr import save

SIDE = 364


def prepare(scan: str, out: str) -> None:
    """LPS, 1 mm, 364^3, clipped."""
    _three_passes(sitk.ReadImage(scan), out)


def prepare_series(folder: str, out: str) -> None:
    """The same of a DICOM series."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(folder))
    _three_passes(reader.Execute(), out)


def _three_passes(image: sitk.Image, out: str) -> None:
    image = sitk.DICOMOrient(image, "LPS")
    size = [round(n * mm) for n, mm in zip(image.GetSize(), image.GetSpacing(), strict=True)]
    image = sitk.Resample(
        image, size, sitk.Transform(), sitk.sitkLinear, image.GetOrigin(), (1, 1, 1), image.GetDirection(), -1000
    )
    image = sitk.Crop(image, *_halves([max(n - SIDE, 0) for n in image.GetSize()]))
    image = sitk.ConstantPad(image, *_halves([max(SIDE - n, 0) for n in image.GetSize()]), -1000)
    save(sitk.GetArrayFromImage(sitk.Clamp(image, lowerBound=-1000, upperBound=1000)), out)


def _halves(counts: list[int]) -> tuple[list[int], list[int]]:
    return [n // 2 for n in counts], [n - n // 2 for n in counts]
