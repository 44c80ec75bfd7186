"""Which DICOM files form one volume: over folders, in passes and phases, beside copies, torn by their headers."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
from dicom_files import AXIAL, header, save, set_pixels, stored_values, write_series
from pydicom import dcmread
from pydicom.uid import (
    BasicTextSRStorage,
    ComputedRadiographyImageStorage,
    EncapsulatedPDFStorage,
    GrayscaleSoftcopyPresentationStateStorage,
    RTDoseStorage,
    SecondaryCaptureImageStorage,
    XRayRadiationDoseSRStorage,
    generate_uid,
)
from reading import voxels

from photon_data.errors import Refused
from photon_data.readers import open_scan
from photon_data.readers.find import find_scans

VALUES = stored_values((8, 6, 5))
COPIES = {"(copy of a DICOM slice)": 8}


def found(root):
    """Return {path, "KEY" for the series' key: voxels, or the refusal} of every scan below a folder."""
    scans = {}
    for source in find_scans(root).sources:
        try:
            scans[re.sub("#[0-9a-f]{8}", "#KEY", source.path)] = voxels(open_scan(source))
        except Refused as refused:
            scans[re.sub("#[0-9a-f]{8}", "#KEY", source.path)] = refused
    return scans


def assert_scans(root, expected):
    scans = found(root)
    assert sorted(scans) == sorted(expected)
    for path, values in expected.items():
        np.testing.assert_array_equal(scans[path], values)


def put(**tags):
    """Return an edit that sets tags of a header: a value, or a list with one for each slice."""

    def edit(ds, z):
        for keyword, value in tags.items():
            setattr(ds, keyword, value[z] if isinstance(value, list) else value)

    return edit


# --- several folders


def test_a_series_over_folders_is_one_scan_of_the_folder_above_whatever_their_number(tmp_path):
    uid, other = generate_uid(), stored_values((8, 6, 5), seed=7)
    write_series(tmp_path / "a/DIR000", VALUES, uid=uid, slices=[0, 1, 2, 3, 4])
    write_series(tmp_path / "a/DIR001", VALUES, uid=uid, slices=[5, 6, 7], names=[f"IM{z}" for z in range(8)])
    one_each = generate_uid()
    for z in range(8):
        write_series(tmp_path / f"b/{z}", other, uid=one_each, slices=[z], names=["image"] * 8)
    assert_scans(tmp_path, {"a#KEY": VALUES, "b#KEY": other})
    ids = {source.path.partition("#")[0]: source.id for source in find_scans(tmp_path).sources}
    assert re.fullmatch("a__s[0-9a-f]{8}", ids["a"]) and re.fullmatch("b__s[0-9a-f]{8}", ids["b"])


def test_every_other_slice_in_a_folder_of_its_own_is_still_one_scan(tmp_path):
    uid = generate_uid()
    write_series(tmp_path / "odd", VALUES, uid=uid, slices=[1, 3, 5, 7])
    write_series(tmp_path / "even", VALUES, uid=uid, slices=[0, 2, 4, 6])
    assert_scans(tmp_path, {"#KEY": VALUES})


def test_a_slice_that_is_missing_between_two_folders_is_refused_not_two_halves(tmp_path):
    uid = generate_uid()
    write_series(tmp_path / "a", VALUES, uid=uid, slices=[0, 1, 2, 3])
    write_series(tmp_path / "b", VALUES, uid=uid, slices=[5, 6, 7])
    [(path, refused)] = found(tmp_path).items()
    assert (path, refused.code) == ("#KEY", "dicom-missing-slices") and "2 folders" in refused.message


def test_folders_that_are_whole_scans_under_one_uid_stay_scans_of_their_own(tmp_path):
    uid, others = generate_uid(), [stored_values((8, 6, 5), seed=seed) for seed in (1, 2)]
    write_series(tmp_path / "p0", VALUES, uid=uid)
    write_series(tmp_path / "p1", others[0], uid=uid)
    write_series(tmp_path / "p2", others[1], uid=uid, first_lps=(-30.5, -40.25, 113.0), step_lps=(0, 0, 4))
    shutil.copytree(tmp_path / "p0", tmp_path / "p0 again")
    expected = {"p0#KEY": VALUES, "p0 again#KEY": VALUES, "p1#KEY": others[0], "p2#KEY": others[1]}
    assert_scans(tmp_path, expected)
    # Another patient whose slices would go on where those of p0 end.
    away = {"first_lps": (-30.5, -40.25, 120.0), "edit": put(PatientID="OTHER")}
    write_series(tmp_path / "p3", VALUES, uid=uid, **away)
    assert_scans(tmp_path, expected | {"p3#KEY": VALUES})


def test_folders_that_are_acquisitions_far_apart_stay_scans_of_their_own(tmp_path):
    uid, other = generate_uid(), stored_values((8, 6, 5), seed=1)
    write_series(tmp_path / "chest", VALUES, uid=uid, edit=put(AcquisitionNumber=1))
    away = {"first_lps": (-30.5, -40.25, 160.0), "edit": put(AcquisitionNumber=2)}
    write_series(tmp_path / "pelvis", other, uid=uid, **away)
    assert_scans(tmp_path, {"chest#KEY": VALUES, "pelvis#KEY": other})


def test_folders_without_a_series_uid_are_never_put_together(tmp_path):
    write_series(tmp_path / "a", VALUES, slices=[0, 1, 2, 3], edit=put(SeriesInstanceUID=""))
    write_series(tmp_path / "b", VALUES, slices=[4, 5, 6, 7], edit=put(SeriesInstanceUID=""))
    assert_scans(tmp_path, {"a#KEY": VALUES[:4], "b#KEY": VALUES[4:]})


# --- copies


def test_copies_of_slices_are_dropped_and_counted_under_any_name_and_compression(tmp_path):
    uid = generate_uid()
    files = write_series(tmp_path, VALUES, uid=uid)
    for file in files[:5]:
        shutil.copy(file, file.with_name(f"{file.stem} (1).dcm"))
    save(dcmread(files[5]), tmp_path / "rle.dcm", "rle")  # the same image by its UID
    (tmp_path / "key images").mkdir()
    shutil.copy(files[6], tmp_path / "key images/1.dcm")
    again = dcmread(files[7])
    again.SOPInstanceUID = again.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    again.save_as(tmp_path / "exported again.dcm")
    assert_scans(tmp_path, {"#KEY": VALUES})
    assert find_scans(tmp_path).ignored == COPIES


def test_an_image_that_differs_from_the_one_at_its_place_is_no_copy(tmp_path):
    uid = generate_uid()
    files = write_series(tmp_path, VALUES, uid=uid)
    other = dcmread(files[3])
    other.PixelData = bytes(len(other.PixelData))
    other.save_as(tmp_path / "003 (1).dcm")
    [refused] = found(tmp_path).values()
    assert refused.code == "dicom-duplicate-slices" and "no tag of their headers tells them apart" in refused.message


def test_empty_slices_of_two_phases_are_no_copies(tmp_path):
    uid, second = generate_uid(), stored_values((8, 6, 5), seed=1)
    first = VALUES.copy()
    first[:2] = second[:2] = 0
    for n, values in enumerate((first, second), 1):
        names = [f"{n}-{z}.dcm" for z in range(8)]
        write_series(tmp_path, values, uid=uid, names=names, edit=put(TemporalPositionIdentifier=n))
    assert_scans(tmp_path, {"#KEY": first, "#KEY-2": second})
    assert find_scans(tmp_path).ignored == {}


# --- passes and phases


@pytest.mark.parametrize(
    "tags",
    [
        ({"AcquisitionNumber": 1}, {"AcquisitionNumber": 2}),
        ({"TemporalPositionIdentifier": 1}, {"TemporalPositionIdentifier": 2}),
        ({"AcquisitionTime": "101500"}, {"AcquisitionTime": "101530.5"}),
        (
            {"AcquisitionTime": [f"1015{z:02}" for z in range(8)]},
            {"AcquisitionTime": [f"1016{z:02}" for z in range(8)]},
        ),
        ({"ImageType": ["A"] * 8}, {"ImageType": ["B"] * 8}),
        ({"ConvolutionKernel": "B30f"}, {"ConvolutionKernel": "B70f"}),
    ],
)
@pytest.mark.parametrize("first_z_mm", [100, 101, 113.75])
def test_passes_are_told_apart_by_the_tag_that_differs_at_the_same_places_or_between_them(tmp_path, tags, first_z_mm):
    uid, second = generate_uid(), stored_values((8, 6, 5), seed=1)
    first_lps = (-30.5, -40.25, first_z_mm)  # slices every 2.5 mm, of the first pass from 100 to 117.5 mm
    for n, values in enumerate((VALUES, second)):
        edit = put(**tags[n])
        place = {"first_lps": first_lps} if n else {}
        write_series(tmp_path, values, uid=uid, names=[f"{n}-{z}.dcm" for z in range(8)], edit=edit, **place)
    assert_scans(tmp_path, {"#KEY": VALUES, "#KEY-2": second})


def test_phases_by_kernels_are_four_scans(tmp_path):
    uid, volumes = generate_uid(), [stored_values((8, 6, 5), seed=seed) for seed in range(4)]
    for n, values in enumerate(volumes):
        edit = put(TemporalPositionIdentifier=1 + n // 2, ConvolutionKernel="AB"[n % 2])
        write_series(tmp_path, values, uid=uid, names=[f"{n}-{z}.dcm" for z in range(8)], edit=edit)
    assert_scans(tmp_path, dict(zip(("#KEY", "#KEY-2", "#KEY-3", "#KEY-4"), volumes, strict=True)))


def test_what_no_tag_tells_apart_is_refused_with_what_differs(tmp_path):
    uid = generate_uid()
    for n in range(2):
        # Each pass in two acquisitions, of halves: no tag gives whole volumes.
        edit = put(AcquisitionNumber=[1 + 2 * n + z // 4 for z in range(8)])
        names = [f"{n}-{z}.dcm" for z in range(8)]
        write_series(tmp_path, stored_values((8, 6, 5), seed=n), uid=uid, names=names, edit=edit)
    [refused] = found(tmp_path).values()
    assert refused.code == "several-volumes" and "AcquisitionNumber (4 values)" in refused.message


def test_a_missing_slice_between_two_acquisitions_is_refused_not_two_halves(tmp_path):
    write_series(tmp_path, VALUES, slices=[0, 1, 2, 4, 5, 6, 7], edit=put(AcquisitionNumber=[z // 4 for z in range(8)]))
    [refused] = found(tmp_path).values()
    assert refused.code == "dicom-missing-slices" and "AcquisitionNumber (2 values)" in refused.message


# --- headers that tear a stack apart


@pytest.mark.parametrize(("angle", "code"), [(2e-3, None), (8e-3, "dicom-mixed"), (3e-2, "dicom-mixed")])
@pytest.mark.parametrize("turned", [[4, 5, 6, 7], [1, 3, 5, 7], [2]])
def test_an_orientation_that_varies_is_one_stack_or_a_refusal(tmp_path, angle, code, turned):
    def edit(ds, z):
        ds.ImageOrientationPatient = ["1", f"{angle}", "0", f"-{angle}", "1", "0"] if z in turned else list(AXIAL)

    write_series(tmp_path, VALUES, edit=edit)
    [(path, content)] = found(tmp_path).items()
    assert path == "#KEY"
    if code:
        assert content.code == code and "orientation" in content.message
    else:
        np.testing.assert_array_equal(content, VALUES)


def test_two_halves_of_other_orientations_that_lack_a_slice_between_them_are_refused(tmp_path):
    def edit(ds, z):
        ds.ImageOrientationPatient = ["1", "0.002", "0", "-0.002", "1", "0"] if z > 4 else list(AXIAL)

    write_series(tmp_path, VALUES, slices=[0, 1, 2, 3, 5, 6, 7], edit=edit)
    [refused] = found(tmp_path).values()
    assert refused.code == "dicom-missing-slices"


def test_a_size_that_changes_on_the_way_is_refused_not_two_halves(tmp_path):
    uid = generate_uid()
    write_series(tmp_path, VALUES, uid=uid, slices=[0, 1, 2, 3])
    write_series(tmp_path, stored_values((8, 7, 5)), uid=uid, slices=[4, 5, 6, 7])
    [refused] = found(tmp_path).values()
    assert refused.code == "dicom-mixed" and "rows or columns" in refused.message


def test_two_tilts_of_one_series_are_two_scans_as_before(tmp_path):
    uid, tilted = generate_uid(), (1, 0, 0, 0, 0.99955, 0.03)
    write_series(tmp_path, VALUES, uid=uid)
    names = [f"t{z}.dcm" for z in range(8)]
    write_series(tmp_path, VALUES, uid=uid, orientation=tilted, first_lps=(-30.5, -40.25, 110.0), names=names)
    assert_scans(tmp_path, {"#KEY": VALUES, "#KEY-2": VALUES})


# --- numbers


def test_decimal_commas_are_read_as_points(tmp_path):
    def commas(path):
        data = path.read_bytes()
        for text in (b"0.8\\0.7", b"-40.25", b"107.5", b"0.5 ", b"-1024.5 "):
            data = data.replace(text, text.replace(b".", b","))
        path.write_bytes(data)

    for file in write_series(tmp_path, VALUES, rescale=(0.5, -1024.5)):
        commas(file)
    [source] = find_scans(tmp_path).sources
    scan = open_scan(source)
    assert (scan.slope, scan.intercept) == (0.5, -1024.5)
    assert scan.geometry.spacing_zyx_mm == pytest.approx((2.5, 0.8, 0.7))
    assert scan.geometry.origin_lps == pytest.approx((-30.5, -40.25, 100))


@pytest.mark.parametrize(
    ("text", "by", "code", "word"),
    [
        (b"0.8\\0.7", b"0.8,0.7", "dicom-no-geometry", "pixel spacing"),
        (b"0.8\\0.7", b"wide\\-1", "dicom-no-geometry", "pixel spacing"),
        (b"-30.5\\-40.25", b"-30,5,-40.25", "dicom-no-geometry", "position"),
        (b"-1024.5 ", b"minus a ", "dicom-bad-rescale", "slope"),
    ],
)
def test_numbers_that_cannot_be_read_are_one_refusal_that_names_them(tmp_path, text, by, code, word):
    for file in write_series(tmp_path, VALUES, rescale=(1, -1024.5)):
        data = file.read_bytes()
        assert text in data
        file.write_bytes(data.replace(text, by))
    [refused] = found(tmp_path).values()
    assert refused.code == code and word in refused.message


@pytest.mark.parametrize("keywords", [("RescaleSlope", "RescaleIntercept"), ("RescaleIntercept",), ("RescaleSlope",)])
def test_a_rescaling_that_some_slices_lack_is_refused(tmp_path, keywords):
    def edit(ds, z):
        for keyword in keywords if z in (2, 5) else ():
            delattr(ds, keyword)

    write_series(tmp_path, VALUES, edit=edit)
    [refused] = found(tmp_path).values()
    assert refused.code == "dicom-bad-rescale" and "2 of 8" in refused.message and "002.dcm" in refused.message


@pytest.mark.parametrize(
    ("sop_class", "tags"),
    [("CT", {"ImagePositionPatient": ["0", "0", "5"], "ImageOrientationPatient": list(AXIAL)}), ("SC", {}), ("CT", {})],
)
def test_a_multi_frame_file_with_one_position_or_none_is_refused_as_that(tmp_path, sop_class, tags):
    own = {"sop_class": SecondaryCaptureImageStorage} if sop_class == "SC" else {}
    ds = header(generate_uid(), NumberOfFrames=8, PixelSpacing=["1", "1"], **own, **tags)
    set_pixels(ds, VALUES)
    save(ds, tmp_path / "volume.dcm")
    [refused] = found(tmp_path).values()
    assert refused.code == "dicom-multiframe" and "8 frames" in refused.message
    assert ("only one" if tags else "no position") in refused.message


# --- what lies beside scans


def test_what_is_no_volume_of_a_clinical_folder_is_left_aside_by_kind(tmp_path):
    write_series(tmp_path / "ct", VALUES, edit=put(ImageType=["ORIGINAL\\PRIMARY\\AXIAL"] * 8))
    number = iter(range(99))

    def add(sop_class=None, image=None, **tags):
        ds = header(generate_uid(), *([sop_class] if sop_class else []), **tags)
        if image is not None:
            set_pixels(ds, image)
            ds.PhotometricInterpretation, ds.SamplesPerPixel = tags.get("PhotometricInterpretation", "MONOCHROME2"), 1
        save(ds, tmp_path / f"other-{next(number)}")

    grey = np.zeros((6, 5), np.uint16)
    add(SecondaryCaptureImageStorage, grey)
    add(SecondaryCaptureImageStorage, grey, PhotometricInterpretation="RGB")
    add(None, grey, ImageType=["DERIVED", "SECONDARY", "SCREEN SAVE"])  # a dose sheet that is called a CT image
    add(None, grey, PhotometricInterpretation="PALETTE COLOR")
    add(ComputedRadiographyImageStorage, grey)
    for sop_class in (
        *(BasicTextSRStorage, XRayRadiationDoseSRStorage, GrayscaleSoftcopyPresentationStateStorage),
        *(EncapsulatedPDFStorage, RTDoseStorage),
    ):
        add(sop_class)
    assert_scans(tmp_path, {"ct#KEY": VALUES})
    assert find_scans(tmp_path).ignored == {
        "(DICOM secondary capture)": 4,
        "(DICOM Computed Radiography Image)": 1,
        "(DICOM Basic Text SR)": 1,
        "(DICOM X-Ray Radiation Dose SR)": 1,
        "(DICOM Grayscale Softcopy Presentation State)": 1,
        "(DICOM Encapsulated PDF)": 1,
        "(DICOM RT Dose)": 1,
    }


def test_captures_that_know_where_they_lie_are_a_scan(tmp_path):
    def edit(ds, z):
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage

    write_series(tmp_path, VALUES, edit=edit)
    assert_scans(tmp_path, {"#KEY": VALUES})
