"""The test scan: a CT-like 512 x 512 x 350 int16 .nii.gz of 0.7 x 0.7 x 1 mm, made once and kept in the temporary
folder.

It shows a body with fat, lungs, heart, a spine with a screw, and a table, with 15 (rim) to 25 HU (middle) of noise in
the body, and -1024 in the corners. The axes are stored as dcm2niix does (towards left, anterior, superior); the oblique
variant has the same voxels in a turned frame.

The gzip file has two members, header and voxels, so that many files of different content cost one compression.
"""

from __future__ import annotations

import gzip
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

SHAPE_ZYX = (350, 512, 512)
SPACING_XYZ_MM = (0.7, 0.7, 1.0)
GZIP_LEVEL = 6
OBLIQUE_DEGREES = (8.0, 5.0)  # about x, then about z
FOLDER = Path(tempfile.gettempdir()) / "photon-benchmarks"


def test_scan(oblique: bool = False) -> Path:
    """Return the path of the scan; it is made when it is not there."""
    return _scan(FOLDER / ("oblique.nii.gz" if oblique else "aligned.nii.gz"), "test scan", oblique)


def test_scans(count: int) -> Path:
    """Return a folder of `count` scans that differ in their header's text only, so in their content."""
    folder = FOLDER / f"scans-{count}"
    for index in range(count):
        _scan(folder / f"scan{index:02d}.nii.gz", f"test scan {index}", oblique=False)
    return folder


def test_series(syntax: str = "explicit", slices: int = SHAPE_ZYX[0]) -> Path:
    """Return the folder of the scan as a DICOM series, with 140 elements in each header, as scanners write them.

    `syntax` is "explicit", "rle", "jpeg-lossless" or "jpeg2000"; as many of the first slices as `slices` says.
    """
    folder = FOLDER / f"series-{syntax}-{slices}"
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for z, plane in enumerate(voxels()[:slices]):
            _slice(z, plane, partial / f"{z:04d}.dcm", syntax)
        partial.rename(folder)
    return folder


def _slice(z: int, hu: np.ndarray, path: Path, syntax: str) -> None:
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, RLELossless

    ds, meta = Dataset(), FileMetaDataset()
    ds.file_meta, meta.TransferSyntaxUID = meta, ExplicitVRLittleEndian
    ds.SOPClassUID = meta.MediaStorageSOPClassUID = CTImageStorage
    ds.SOPInstanceUID = meta.MediaStorageSOPInstanceUID = f"1.2.826.0.1.{z + 1}"
    ds.SeriesInstanceUID, ds.StudyInstanceUID, ds.PatientID, ds.Modality = "1.2.826.0.2", "1.2.826.0.3", "P1", "CT"
    ds.ImageType, ds.InstanceNumber, ds.AcquisitionNumber, ds.KVP = ["ORIGINAL", "PRIMARY", "AXIAL"], z + 1, 1, 120
    ds.ImagePositionPatient, ds.ImageOrientationPatient = [-179.2, -179.2, float(z)], [1, 0, 0, 0, 1, 0]
    ds.PixelSpacing, ds.SliceThickness, ds.ConvolutionKernel = list(SPACING_XYZ_MM[:2]), SPACING_XYZ_MM[2], "B30f"
    for number in range(90):
        ds.private_block(0x0019, "VENDOR CT", create=True).add_new(number, "DS", f"{1.5 * number:.2f}")
    for number in range(8):
        ds.private_block(0x0029, "VENDOR HEADER", create=True).add_new(number, "OB", bytes(600))
    ds.RescaleSlope, ds.RescaleIntercept = 1, -1024
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = *hu.shape, 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
    stored = hu + np.int16(1024)
    ds.PixelData = stored.tobytes()
    if syntax == "rle":
        ds.compress(RLELossless, generate_instance_uid=False)
    elif syntax != "explicit":
        _compress(ds, stored, path, {"jpeg-lossless": "JPEG", "jpeg2000": "JPEG2000"}[syntax])
    ds.save_as(path, enforce_file_format=True)


def _compress(ds: Any, stored: np.ndarray, path: Path, compressor: str) -> None:
    import SimpleITK as sitk
    from pydicom import dcmread

    writer = sitk.ImageFileWriter()
    writer.SetImageIO("GDCMImageIO")
    writer.SetFileName(str(path))
    writer.UseCompressionOn()
    writer.SetCompressor(compressor)
    writer.Execute(sitk.GetImageFromArray(stored[None]))
    made = dcmread(path)
    ds.file_meta.TransferSyntaxUID, ds.PixelData = made.file_meta.TransferSyntaxUID, made.PixelData


def voxels() -> np.ndarray:
    """Return the int16 HU [z, y, x] of the scan; the same on every call."""
    z, y, x = np.ogrid[-1 : 1 : SHAPE_ZYX[0] * 1j, -1 : 1 : SHAPE_ZYX[1] * 1j, -1 : 1 : SHAPE_ZYX[2] * 1j]
    rng = np.random.default_rng(0)
    return np.stack([_plane(float(height), y[0], x[0], rng) for height in z.ravel()])


def _plane(z: float, y: np.ndarray, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return one slice; `z`, `y` and `x` run from -1 to 1 over the field of view."""
    body = (x / 0.94) ** 2 + (y / 0.72) ** 2
    hu = np.full(body.shape, -1000, np.float32)
    hu[body < 1] = -90
    hu[body < 0.84] = 45
    for side in (-1, 1):
        hu[((x - 0.4 * side) / 0.3) ** 2 + ((y + 0.04) / 0.42) ** 2 + ((z - 0.15) / 0.75) ** 2 < 1] = -860
    hu[((x - 0.1) / 0.26) ** 2 + ((y + 0.16) / 0.24) ** 2 + (z / 0.3) ** 2 < 1] = 110
    hu[(x / 0.11) ** 2 + ((y - 0.42) / 0.12) ** 2 < 1] = 260 if z % 0.09 < 0.07 else 60
    hu[(x / 0.02) ** 2 + ((y - 0.3) / 0.05) ** 2 + (z / 0.04) ** 2 < 1] = 3000
    hu[(np.abs(x) < 0.6) & (np.abs(y - 0.78) < 0.012)] = -200
    sigma = np.where(body < 1, 25 - 10 * np.sqrt(body), 20).astype(np.float32)
    hu += sigma * rng.standard_normal(hu.shape, np.float32)
    hu[x**2 + y**2 > 1.3] = -1024
    return np.rint(hu).clip(-1024, 3071).astype(np.int16)


def _scan(path: Path, description: str, oblique: bool) -> Path:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_bytes(gzip.compress(_header(description, oblique), mtime=0) + _compressed_voxels())
        partial.replace(path)
    return path


def _compressed_voxels() -> bytes:
    path = FOLDER / "voxels.gz"
    if not path.exists():
        path.write_bytes(zlib.compress(voxels(), GZIP_LEVEL, wbits=31))
    return path.read_bytes()


def _header(description: str, oblique: bool) -> bytes:
    """Return a NIfTI-1 header and the four bytes after it, with sform and qform."""
    image = nib.Nifti1Image(np.empty(SHAPE_ZYX[::-1], np.int16), _affine_ras(oblique))
    image.header.set_xyzt_units("mm")
    image.set_qform(image.affine, code=1)
    image.set_sform(image.affine, code=1)
    image.header["descrip"] = description
    image.header["vox_offset"] = 352
    return image.header.binaryblock + bytes(4)


def _affine_ras(oblique: bool) -> np.ndarray:
    """Return voxel (x, y, z) -> RAS mm, with the centre of the scan at the origin."""
    affine = np.diag([-1.0, 1.0, 1.0, 1.0])
    affine[:3, :3] *= SPACING_XYZ_MM
    if oblique:
        (ca, cb), (sa, sb) = (f(np.deg2rad(OBLIQUE_DEGREES)) for f in (np.cos, np.sin))
        about_x = np.array([[1, 0, 0], [0, ca, -sa], [0, sa, ca]])
        about_z = np.array([[cb, -sb, 0], [sb, cb, 0], [0, 0, 1]])
        affine[:3, :3] = about_z @ about_x @ affine[:3, :3]
    affine[:3, 3] = -affine[:3, :3] @ (np.array(SHAPE_ZYX[::-1]) - 1) / 2
    return affine


if __name__ == "__main__":
    for oblique in (False, True):
        file = test_scan(oblique)
        print(f"{file}  {file.stat().st_size / 1e6:.1f} MB")
