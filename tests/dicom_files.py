"""Synthetic DICOM series for tests, written with pydicom: any order, orientation, bit layout and transfer syntax."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
    generate_uid,
)

AXIAL, CORONAL, SAGITTAL = (1, 0, 0, 0, 1, 0), (1, 0, 0, 0, 0, -1), (0, 1, 0, 0, 0, -1)
# Turned by 20 degrees about z, then by 10 about x; as decimal strings of a header.
OBLIQUE = (0.93969262, 0.33682409, 0.05939117, -0.34202014, 0.92541658, 0.16317591)
SITK_COMPRESSORS = {"jpeg-lossless": "JPEG", "jpeg2000": "JPEG2000"}
NUMBERS = count(10**9)
PLAIN = {"explicit": ExplicitVRLittleEndian, "implicit": ImplicitVRLittleEndian, "big-endian": ExplicitVRBigEndian}


def stored_values(shape_zyx=(7, 12, 10), dtype=np.int16, low=-900, high=1500, seed=0):
    return np.random.default_rng(seed).integers(low, high, shape_zyx).astype(dtype)


def header(uid, sop_class=CTImageStorage, **tags):
    """Return a data set with what every image of a series has, and a patient whose name must turn up nowhere."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = sop_class
    # Of one length: those of `generate_uid` differ by up to four characters, and with them what comes behind.
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = f"1.2.826.0.1.3680043.8.498.{next(NUMBERS)}"
    ds.SeriesInstanceUID, ds.StudyInstanceUID, ds.Modality = uid, "1.2.3", "CT"
    ds.PatientName, ds.PatientID = "Doe^Secret", "SECRET"
    for keyword, value in tags.items():
        setattr(ds, keyword, value)
    return ds


def set_pixels(ds, stored, bits=16):
    """Put a plane [row, column] (or frames [n, row, column]) into a data set, uncompressed."""
    ds.Rows, ds.Columns = stored.shape[-2:]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = stored.dtype.itemsize * 8, bits, bits - 1
    ds.PixelRepresentation = int(stored.dtype.kind == "i")
    ds.PixelData = stored.tobytes()
    ds["PixelData"].VR = "OW"


def save(ds, path, syntax="explicit"):
    """Write a data set that `set_pixels` filled under one of PLAIN, SITK_COMPRESSORS or "rle"."""
    ds.file_meta.TransferSyntaxUID = PLAIN.get(syntax, ExplicitVRLittleEndian)
    if syntax == "big-endian":
        ds.PixelData = (
            np.frombuffer(ds.PixelData, f"<u{ds.BitsAllocated // 8}").astype(f">u{ds.BitsAllocated // 8}").tobytes()
        )
    elif syntax == "rle":
        ds.compress(RLELossless, generate_instance_uid=False)
    elif syntax in SITK_COMPRESSORS:
        compress_with_sitk(ds, path, SITK_COMPRESSORS[syntax])
    implicit, little = syntax == "implicit", syntax != "big-endian"
    ds.save_as(path, implicit_vr=implicit, little_endian=little, enforce_file_format=True)


def compress_with_sitk(ds, path, compressor):
    writer, scratch = sitk.ImageFileWriter(), str(path) + ".scratch"
    writer.SetImageIO("GDCMImageIO")
    writer.SetFileName(scratch)
    writer.UseCompressionOn()
    writer.SetCompressor(compressor)
    dtype = f"{'i' if ds.PixelRepresentation else 'u'}{ds.BitsAllocated // 8}"
    writer.Execute(sitk.GetImageFromArray(np.frombuffer(ds.PixelData, dtype).reshape(1, ds.Rows, ds.Columns)))
    made = dcmread(scratch)
    Path(scratch).unlink()
    ds.file_meta.TransferSyntaxUID = made.file_meta.TransferSyntaxUID
    ds.PixelData = made.PixelData
    ds["PixelData"].is_undefined_length = True


def normal_of(orientation):
    return np.cross(orientation[:3], orientation[3:])


def decimals(values):
    """Return numbers as the decimal strings of a header, at most 16 characters each."""
    return [f"{float(v):.8g}" for v in values]


def write_series(
    folder,
    stored,
    *,
    orientation=AXIAL,
    spacing_mm=(0.8, 0.7),
    first_lps=(-30.5, -40.25, 100.0),
    step_lps=None,
    names=None,
    uid=None,
    syntax="explicit",
    bits=16,
    rescale=(1, -1024),
    slices=None,
    edit=None,
):
    """Write planes of `stored` [z, y, x] as one series and return its files in order of z.

    step_lps: from slice to slice, 2.5 mm along the normal unless given. slices: the indices to write. rescale: one
    (slope, intercept) or one per slice. edit(ds, z) changes a header before it is saved.
    """
    folder.mkdir(parents=True, exist_ok=True)
    step = np.asarray(2.5 * normal_of(orientation) if step_lps is None else step_lps)
    uid, paths = uid or generate_uid(), []
    for z in range(len(stored)) if slices is None else slices:
        ds = header(uid, ImageOrientationPatient=decimals(orientation), PixelSpacing=decimals(spacing_mm))
        ds.ImagePositionPatient = decimals(np.asarray(first_lps) + z * step)
        ds.RescaleSlope, ds.RescaleIntercept = rescale[z] if isinstance(rescale, list) else rescale
        set_pixels(ds, stored[z], bits)
        if edit is not None:
            edit(ds, z)
        paths.append(folder / (names[z] if names else f"{z:03d}.dcm"))
        save(ds, paths[-1], syntax)
    return paths


def write_enhanced(
    path, stored, *, step_lps=(0, 0, 2.5), first_lps=(-30.5, -40.25, 100.0), order=None, compressed=False
):
    """Write `stored` [z, y, x] as one Enhanced CT file whose frames come in `order`."""
    order = list(range(len(stored))) if order is None else order
    ds = header(
        generate_uid(), EnhancedCTImageStorage, NumberOfFrames=len(stored), ImageType=["ORIGINAL", "PRIMARY", "VOLUME"]
    )
    shared = Dataset()
    shared.PlaneOrientationSequence = Sequence([item(ImageOrientationPatient=decimals(AXIAL))])
    shared.PixelMeasuresSequence = Sequence([item(PixelSpacing=decimals((0.8, 0.7)))])
    shared.PixelValueTransformationSequence = Sequence([item(RescaleSlope=1, RescaleIntercept=-1024)])
    ds.SharedFunctionalGroupsSequence = Sequence([shared])
    places = [decimals(np.asarray(first_lps) + z * np.asarray(step_lps)) for z in order]
    ds.PerFrameFunctionalGroupsSequence = Sequence(
        [item(PlanePositionSequence=Sequence([item(ImagePositionPatient=place)])) for place in places]
    )
    set_pixels(ds, stored[order])
    save(ds, path, "rle" if compressed else "explicit")


def item(**tags):
    ds = Dataset()
    for keyword, value in tags.items():
        setattr(ds, keyword, value)
    return ds
