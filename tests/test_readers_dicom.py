"""DICOM series against SimpleITK's series reader, against the formula of the standard, and against damage."""

from __future__ import annotations

import errno
import os
import sys
import warnings

import numpy as np
import pytest
import SimpleITK as sitk
from dicom_files import (
    AXIAL,
    CORONAL,
    OBLIQUE,
    SAGITTAL,
    header,
    normal_of,
    save,
    set_pixels,
    stored_values,
    write_enhanced,
    write_series,
)
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import RTStructureSetStorage, SegmentationStorage, generate_uid
from reading import voxels as stored

from photon_data.errors import Refused
from photon_data.readers.dicom import open_series
from photon_data.readers.dicom_series import SCOUT
from photon_data.readers.find import find_scans, group_series
from photon_data.recipe import Policy
from photon_data.scan import Source, names_below

SHUFFLED = ["q.dcm", "b.dcm", "z.dcm", "a.dcm", "m.dcm", "c.dcm", "k.dcm"]


def source_of(files):
    return Source("id", "folder", names_below("", files), "dicom", 0, 0)


def open_files(files, max_voxels=10**9):
    return open_series(source_of(files), Policy(max_voxels=max_voxels))


def stacks(files):
    """Return the (key, files) of every stack among files."""
    return [stack[:2] for series in group_series(list(files)).series for stack in series.stacks]


def aside(files):
    """Return what is left aside among files, by kind."""
    grouped = group_series(list(files))
    return sum((series.aside for series in grouped.series), grouped.aside)


def hu(scan):
    return stored(scan).astype(float) * scan.slope + scan.intercept


def refusal(files, max_voxels=10**9):
    """Return the Refused that opening and reading the files to the end raises."""
    with pytest.raises(Refused) as caught:
        for _ in open_files(files, max_voxels).planes():
            pass
    assert "secret" not in caught.value.message.lower()
    return caught.value


def read_with_sitk(folder):
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return reader.Execute()


@pytest.mark.parametrize(
    ("orientation", "step", "syntax", "dtype", "bits"),
    [
        (AXIAL, 2.5, "explicit", np.int16, 16),
        (AXIAL, -2.5, "implicit", np.uint16, 12),
        (CORONAL, 0.7, "big-endian", np.uint16, 16),
        (SAGITTAL, -3.0, "rle", np.int16, 16),
        (OBLIQUE, 1.25, "jpeg-lossless", np.uint16, 16),
        (OBLIQUE, -1.25, "jpeg2000", np.int16, 16),
    ],
)
def test_a_series_equals_simpleitks_in_values_and_geometry(tmp_path, orientation, step, syntax, dtype, bits):
    values = stored_values(dtype=dtype, low=0 if dtype == np.uint16 else -900)
    step_lps = step * normal_of(orientation)
    files = write_series(
        tmp_path, values, orientation=orientation, step_lps=step_lps, syntax=syntax, bits=bits, names=SHUFFLED
    )
    ours, theirs = open_files(sorted(files)), read_with_sitk(tmp_path)
    assert np.array_equal(hu(ours), sitk.GetArrayFromImage(theirs))
    assert ours.dtype == stored(ours).dtype == dtype
    assert np.allclose(ours.geometry.origin_lps, theirs.GetOrigin(), atol=1e-6)
    assert np.allclose(ours.geometry.spacing_zyx_mm, theirs.GetSpacing()[::-1], atol=1e-5)
    assert np.allclose(ours.geometry.direction_xyz.ravel(), theirs.GetDirection(), atol=1e-6)


@pytest.mark.parametrize("orientation", [AXIAL, CORONAL, OBLIQUE])
def test_a_marked_voxel_lies_where_the_formula_of_the_standard_puts_it(tmp_path, orientation):
    values = np.zeros((7, 12, 10), np.int16)
    values[5, 9, 2] = 1000
    first, normal = np.array([-30.5, -40.25, 100.0]), normal_of(orientation)
    files = write_series(
        tmp_path, values, orientation=orientation, step_lps=-2.0 * normal, names=SHUFFLED, spacing_mm=(0.9, 0.6)
    )
    scan = open_files(sorted(files))
    [index] = np.argwhere(stored(scan) == 1000)
    # PS3.3 C.7.6.2.1.1: slice position + column index * column spacing * row cosines + row index * row spacing * ...
    row_cosines, column_cosines = np.array(orientation[:3]), np.array(orientation[3:])
    expected = first - 5 * 2.0 * normal + 2 * 0.6 * row_cosines + 9 * 0.9 * column_cosines
    assert np.allclose(scan.geometry.world(index), expected, atol=1e-4)


def test_a_tilted_gantry_gives_a_sheared_grid_and_keeps_world_positions(tmp_path):
    values = stored_values()
    step = np.array([0.0, 0.9, 2.8])  # slices stay axial while the table moves along a tilted line
    scan = open_files(write_series(tmp_path, values, step_lps=step))
    assert not scan.geometry.is_orthogonal()
    assert np.allclose(scan.geometry.steps_lps, [step, (0, 0.8, 0), (0.7, 0, 0)], atol=1e-6)
    assert np.allclose(scan.geometry.world((6, 0, 0)), (-30.5, -40.25 + 6 * 0.9, 100 + 6 * 2.8), atol=1e-4)


def test_header_rounding_of_positions_is_no_missing_slice(tmp_path):
    def to_tenths(ds, z):
        ds.ImagePositionPatient = ["-30.5", "-40.3", f"{100 + z * 0.625:.1f}"]

    scan = open_files(write_series(tmp_path, stored_values(), edit=to_tenths))
    assert scan.geometry.spacing_zyx_mm[0] == pytest.approx(0.625, abs=0.02)


@pytest.mark.parametrize("digits", [3, 4, 6])
def test_rounded_direction_cosines_make_the_same_perpendicular_axes_as_in_itk(tmp_path, digits):
    rounded = np.round(OBLIQUE, digits)
    normal = normal_of(rounded) / np.linalg.norm(normal_of(rounded))
    geometry = open_files(write_series(tmp_path, stored_values(), orientation=rounded, step_lps=2.5 * normal)).geometry
    assert geometry.is_orthogonal()
    assert np.allclose(geometry.direction_xyz.ravel(), read_with_sitk(tmp_path).GetDirection(), atol=1e-6)


def test_positions_rounded_sideways_are_no_tilt(tmp_path):
    def jitter(ds, z):
        ds.ImagePositionPatient = ["-30.5", f"{-40.25 + 0.04 * (z % 2):.2f}", f"{100 + 2.5 * z:.1f}"]

    geometry = open_files(write_series(tmp_path, stored_values((8, 4, 5)), edit=jitter)).geometry
    assert np.allclose(geometry.steps_lps[0], (0, 0, 2.5))


def test_a_missing_slice_is_refused_with_its_place(tmp_path):
    refused = refusal(write_series(tmp_path, stored_values(), slices=[0, 1, 2, 4, 5, 6]))
    assert refused.code == "dicom-missing-slices"
    assert "5.00 mm between 105.00 and 110.00 mm" in refused.message


def test_spacing_that_changes_on_the_way_is_refused(tmp_path):
    assert (
        refusal(write_series(tmp_path, stored_values((12, 4, 5)), slices=[0, 1, 2, 3, 4, 6, 8, 10])).code
        == "dicom-missing-slices"
    )


def test_slices_beside_the_line_are_refused(tmp_path):
    def shift_one(ds, z):
        ds.ImagePositionPatient[0] += 4 * (z == 3)

    assert refusal(write_series(tmp_path, stored_values(), edit=shift_one)).code == "dicom-mixed"


def test_a_position_taken_twice_is_refused(tmp_path):
    values, uid = stored_values(), generate_uid()
    files = write_series(tmp_path, values, uid=uid) + write_series(tmp_path / "copy", values, uid=uid, slices=[2])
    refused = refusal(files)
    assert refused.code == "dicom-duplicate-slices"
    assert "105.00 mm" in refused.message


def test_two_phases_under_one_series_are_several_volumes(tmp_path):
    uid = generate_uid()
    files = [p for name in "ab" for p in write_series(tmp_path / name, stored_values(), uid=uid)]
    assert refusal(files).code == "several-volumes"


def test_two_acquisitions_under_one_series_become_two_scans(tmp_path):
    uid, values = generate_uid(), [stored_values(seed=n) for n in (1, 2)]
    for n in (0, 1):
        names = [f"{n}{z}.dcm" for z in range(7)]
        write_series(
            tmp_path, values[n], uid=uid, names=names, edit=lambda ds, z, n=n: setattr(ds, "AcquisitionNumber", n + 4)
        )
    found = stacks(tmp_path.iterdir())
    assert [key.partition("-")[2] for key, _ in found] == ["", "2"]
    for (_, files), expected in zip(found, values, strict=True):
        assert np.array_equal(stored(open_files(files)), expected)


def test_phases_whose_every_slice_is_an_acquisition_stay_together_and_are_refused(tmp_path):
    uid = generate_uid()
    for n in (0, 10):
        names = [f"{n}{z}.dcm" for z in range(7)]
        write_series(
            tmp_path,
            stored_values(),
            uid=uid,
            names=names,
            edit=lambda ds, z, n=n: setattr(ds, "AcquisitionNumber", n + z),
        )
    [(_, files)] = stacks(tmp_path.iterdir())
    assert refusal(files).code == "several-volumes"


def test_acquisitions_that_follow_one_another_stay_one_scan(tmp_path):
    write_series(tmp_path, stored_values(), edit=lambda ds, z: setattr(ds, "AcquisitionNumber", z // 4))
    assert [len(files) for _, files in stacks(tmp_path.iterdir())] == [7]


def of_type(*values):
    return lambda ds, z: setattr(ds, "ImageType", list(values))


def test_scouts_in_the_same_series_and_in_one_of_their_own_are_counted_and_do_not_spoil_the_scan(tmp_path):
    uid, values, scout = generate_uid(), stored_values(), of_type("ORIGINAL", "PRIMARY", "LOCALIZER")
    within = write_series(
        tmp_path, stored_values((1, 30, 20)), orientation=CORONAL, uid=uid, names=["000-scout.dcm"], edit=scout
    )
    write_series(tmp_path, stored_values((2, 30, 20)), orientation=SAGITTAL, names=["s1.dcm", "s2.dcm"], edit=scout)
    files = write_series(tmp_path, values, uid=uid, edit=of_type("ORIGINAL", "PRIMARY", "AXIAL"))
    [(alone, _)] = stacks(files)
    assert stacks(tmp_path.iterdir()) == [(alone, files)]
    assert aside(tmp_path.iterdir()) == {SCOUT: 3}
    assert np.array_equal(stored(open_files(files)), values)
    assert refusal(files + within).code == "dicom-mixed"


def test_only_stacks_that_are_localizer_throughout_are_scouts(tmp_path):
    def first_only(ds, z):
        ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL" if z else "LOCALIZER"]

    a = write_series(tmp_path, stored_values(), edit=first_only)
    b = write_series(tmp_path, stored_values((1, 30, 20)), orientation=CORONAL, names=["looks-like-a-scout.dcm"])
    assert sorted(files for _, files in stacks(tmp_path.iterdir())) == sorted([a, b])
    assert not aside(tmp_path.iterdir())


def test_two_series_structures_and_strangers_in_one_folder_are_told_apart(tmp_path):
    a, b = (
        write_series(tmp_path, stored_values()),
        write_series(tmp_path, stored_values(), names=[f"x{z}.ima" for z in range(7)]),
    )
    save(header(generate_uid(), RTStructureSetStorage), tmp_path / "rs.dcm")
    segmentation = header(generate_uid(), SegmentationStorage)
    set_pixels(segmentation, np.zeros((4, 4), np.uint8), 8)
    save(segmentation, tmp_path / "seg.dcm")
    (tmp_path / "empty.dcm").touch()
    (tmp_path / "text.dcm").write_text("Doe^Secret " * 100)
    (tmp_path / "noise").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "broken-link.dcm").symlink_to(tmp_path / "nowhere")
    grouped = group_series(list(tmp_path.iterdir()))
    assert sorted(files for _, files in stacks(tmp_path.iterdir())) == sorted([a, b])
    assert all(len(key) == 8 and int(key, 16) >= 0 for key, _ in stacks(tmp_path.iterdir()))
    assert grouped.aside == {"(DICOM RT Structure Set)": 1, "(DICOM Segmentation)": 1}
    assert [path.name for path, _ in grouped.unreadable] == ["broken-link.dcm", "empty.dcm", "noise", "text.dcm"]
    assert [why.code for _, why in grouped.unreadable] == ["dicom-unreadable", "empty", "not-a-scan", "not-a-scan"]
    assert not any("secret" in why.message.lower() for _, why in grouped.unreadable)


def test_the_key_is_not_the_uid_and_does_not_depend_on_names(tmp_path):
    uid, values = generate_uid(), stored_values()
    [(first, _)] = stacks(write_series(tmp_path / "a", values, uid=uid))
    assert first == stacks(write_series(tmp_path / "b", values, uid=uid, names=SHUFFLED))[0][0]
    assert first not in uid


def test_slices_that_differ_in_rescaling_arrive_rescaled(tmp_path):
    values, rescale = stored_values(), [(1 + z / 4, -1000 - z) for z in range(7)]
    files = write_series(tmp_path, values, rescale=rescale)
    scan = open_files(files)
    expected = np.stack([values[z] * slope + intercept for z, (slope, intercept) in enumerate(rescale)])
    assert (scan.dtype, scan.slope, scan.intercept) == (np.float32, 1.0, 0.0)
    assert np.array_equal(stored(scan), expected.astype(np.float32))
    # one by one: SimpleITK's series reader takes the type of the first slice and drops the fractions of the others
    assert np.allclose(stored(scan), [sitk.GetArrayFromImage(sitk.ReadImage(str(p)))[0] for p in files], atol=1e-3)


def test_slices_that_differ_in_sign_arrive_as_one_type(tmp_path):
    values, uid = stored_values(low=0), generate_uid()
    files = write_series(tmp_path, values, uid=uid, slices=[0, 2, 4, 6])
    files += write_series(tmp_path, values.astype(np.uint16), uid=uid, slices=[1, 3, 5])
    assert np.array_equal(hu(open_files(files)), values - 1024.0)


def test_bits_above_the_stored_ones_are_ignored(tmp_path):
    values = stored_values(dtype=np.uint16, low=0, high=4096)
    overlay = (values | 0x5000).astype(np.uint16)
    assert np.array_equal(stored(open_files(write_series(tmp_path / "u", overlay, bits=12))), values)
    signed = stored_values(low=-2048, high=2048)
    files = write_series(tmp_path / "s", (signed & 0x0FFF).astype(np.int16), bits=12)
    assert np.array_equal(stored(open_files(files)), signed)
    assert np.array_equal(hu(open_files(files)), sitk.GetArrayFromImage(read_with_sitk(tmp_path / "s")))


def test_values_in_the_upper_bits_are_shifted_down(tmp_path):
    values = stored_values(dtype=np.uint16, low=0, high=4096)
    files = write_series(
        tmp_path, (values << 4).astype(np.uint16), bits=12, edit=lambda ds, z: setattr(ds, "HighBit", 15)
    )
    assert np.array_equal(stored(open_files(files)), values)


def test_eight_bit_values_come_as_stored(tmp_path):
    values = stored_values(dtype=np.uint8, low=0, high=255)
    assert np.array_equal(stored(open_files(write_series(tmp_path / "8", values, bits=8))), values)


def test_monochrome1_keeps_its_hu(tmp_path):
    values = stored_values()
    # PS3.3 C.7.6.3.1.2: shown inverted, after the rescaling that makes HU. ITK inverts the stored values themselves.
    files = write_series(tmp_path, values, edit=lambda ds, z: setattr(ds, "PhotometricInterpretation", "MONOCHROME1"))
    assert np.array_equal(hu(open_files(files)), values - 1024.0)


def as_series(tmp_path, name, count=3):
    """Return `count` slices made of one of pydicom's sample files."""
    files = []
    for z in range(count):
        ds = dcmread(get_testdata_file(name, download=False))
        ds.ImagePositionPatient, ds.ImageOrientationPatient = [0, 0, 2 * z], list(AXIAL)
        files.append(tmp_path / f"{z}-{name}")
        ds.save_as(files[-1])
    return files


@pytest.mark.parametrize(
    "name", ["MR_small_jpeg_ls_lossless", "MR_small_RLE", "MR_small_jp2klossless", "MR_small_bigendian"]
)
def test_every_lossless_syntax_decodes_to_the_plain_values(tmp_path, name):
    plain = stored(open_files(as_series(tmp_path, "MR_small.dcm")))
    assert np.array_equal(plain[0], dcmread(get_testdata_file("MR_small.dcm", download=False)).pixel_array)
    assert np.array_equal(stored(open_files(as_series(tmp_path, f"{name}.dcm"))), plain)


def test_rescaling_of_compressed_slices_is_neither_lost_nor_done_twice(tmp_path):
    values = stored_values(dtype=np.uint16, low=0, high=4096)
    scan = open_files(write_series(tmp_path, values, syntax="jpeg-lossless", rescale=(0.5, -7.25)))
    assert (scan.slope, scan.intercept) == (0.5, -7.25)
    assert np.array_equal(stored(scan), values)


@pytest.mark.parametrize("compressed", [False, True])
def test_an_enhanced_multi_frame_file_is_a_scan_in_order_of_its_positions(tmp_path, compressed):
    values = stored_values()
    write_enhanced(tmp_path / "e.dcm", values, order=[3, 1, 6, 0, 2, 5, 4], compressed=compressed)
    [(_, files)] = stacks([tmp_path / "e.dcm"])
    scan = open_files(files)
    assert np.array_equal(stored(scan), values)
    assert (scan.slope, scan.intercept) == (1, -1024)
    assert np.allclose(scan.geometry.steps_lps, [(0, 0, 2.5), (0, 0.8, 0), (0.7, 0, 0)])
    assert scan.geometry.origin_lps == (-30.5, -40.25, 100.0)


def test_a_multi_frame_file_without_positions_is_refused(tmp_path):
    ds = header(generate_uid(), NumberOfFrames=7)
    set_pixels(ds, stored_values())
    save(ds, tmp_path / "m.dcm")
    assert refusal([tmp_path / "m.dcm"]).code == "dicom-multiframe"


def delete(keyword):
    return lambda ds, z: delattr(ds, keyword)


def put(**tags):
    return lambda ds, z: [setattr(ds, keyword, value) for keyword, value in tags.items()]


@pytest.mark.parametrize(
    ("edit", "code"),
    [
        (delete("ImagePositionPatient"), "dicom-no-geometry"),
        (delete("ImageOrientationPatient"), "dicom-no-geometry"),
        (delete("PixelSpacing"), "dicom-no-geometry"),
        (put(PixelSpacing=["0", "0.7"]), "dicom-no-geometry"),
        (put(ImageOrientationPatient=["1", "0", "0", "1", "0", "0"]), "dicom-no-geometry"),
        (put(ImageOrientationPatient=["1", "0", "0"]), "dicom-no-geometry"),
        (put(ImagePositionPatient=["0", "0", "5"]), "two-d"),
        (put(RescaleSlope="0"), "dicom-bad-rescale"),
        (put(PhotometricInterpretation="PALETTE COLOR"), "rgb"),
        (put(SamplesPerPixel=3), "rgb"),
        (put(BitsAllocated=12, BitsStored=12), "dicom-undecodable"),
        (put(BitsStored=20), "dicom-undecodable"),
        (put(Rows=13), "truncated"),
        (put(Rows=0), "truncated"),
        (delete("PixelData"), "truncated"),
        (put(PixelData=bytes(20_000)), "dicom-undecodable"),
    ],
)
def test_a_header_that_makes_no_volume_is_refused_by_name(tmp_path, edit, code):
    assert refusal(write_series(tmp_path, stored_values(), edit=edit)).code == code


def test_mixed_spacings_sizes_and_series_are_refused(tmp_path):
    def in_two(change):
        return lambda ds, z: change(ds) if z > 3 else None

    spacing = in_two(lambda ds: setattr(ds, "PixelSpacing", ["0.8", "0.9"]))
    series = in_two(lambda ds: setattr(ds, "SeriesInstanceUID", "1.2.3"))
    for n, edit in enumerate((spacing, series)):
        assert refusal(write_series(tmp_path / str(n), stored_values(), edit=edit)).code == "dicom-mixed"


def test_one_slice_is_two_d_and_a_large_scan_is_too_large(tmp_path):
    files = write_series(tmp_path, stored_values())
    assert refusal(files[:1]).code == "two-d"
    assert refusal(files, max_voxels=7 * 12 * 10 - 1).code == "too-large"
    assert open_files(files, max_voxels=7 * 12 * 10).geometry.shape_zyx == (7, 12, 10)


@pytest.mark.parametrize("syntax", ["explicit", "big-endian", "rle", "jpeg2000", "jpeg-lossless"])
@pytest.mark.parametrize("kept", [0.97, 0.5, 0.05])
def test_a_file_cut_anywhere_is_refused(tmp_path, syntax, kept):
    files = write_series(tmp_path, stored_values((4, 60, 60)), syntax=syntax)
    os.truncate(files[2], int(files[2].stat().st_size * kept))
    assert refusal(files).code in ("truncated", "dicom-unreadable")


def test_an_unknown_transfer_syntax_is_refused_before_reading(tmp_path):
    files = write_series(tmp_path, stored_values(), syntax="rle")
    for path in files:
        ds = dcmread(path)
        ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.102"  # MPEG-4 video
        ds.save_as(path)
    with pytest.raises(Refused, match=r"MPEG-4.*convert the series") as caught:
        open_files(files)
    assert caught.value.code == "dicom-undecodable"


@pytest.mark.parametrize("syntax", ["jpeg-lossless", "jpeg2000", "rle"])
@pytest.mark.parametrize(
    "damage", [lambda frame: frame[: len(frame) // 2], lambda frame: frame[:70] + bytes(len(frame) - 70)]
)
def test_a_damaged_compressed_frame_is_refused(tmp_path, syntax, damage):
    files = write_series(tmp_path, stored_values((3, 60, 60)), syntax=syntax)
    ds = dcmread(files[1])
    ds.PixelData = encapsulate([damage(next(generate_frames(ds.PixelData, number_of_frames=1)))])
    ds.save_as(files[1])
    assert refusal(files).code == "dicom-undecodable"


@pytest.mark.parametrize("implicit", [True, False])
def test_a_bare_data_set_is_read_under_any_name(tmp_path, implicit):
    values = stored_values()
    files = write_series(tmp_path / "whole", values)
    bare = [tmp_path / name for name in ("a.ima", "b", "c.1.2.840", "d.img", "e.CT", "f.dcm", "g.0001")]
    for path, to in zip(files, bare, strict=True):
        ds = dcmread(path)
        del ds.file_meta
        ds.preamble = None
        ds.save_as(to, implicit_vr=implicit, little_endian=True, enforce_file_format=False)
    assert np.array_equal(stored(open_files(bare)), values)
    for path in files:  # the same with their group 2
        path.write_bytes(path.read_bytes()[132:])
    (tmp_path / "readme").write_text("no DICOM here " * 100)
    (tmp_path / "voxels.img").write_bytes(np.arange(4000, dtype="<i2").tobytes())
    found = find_scans(tmp_path)
    assert [len(source.files) for source in found.sources] == [7, 7]
    assert all(np.array_equal(stored(open_files(source.files)), values) for source in found.sources)
    assert found.ignored == {"(no suffix)": 1, ".img": 1}


def test_random_damage_raises_nothing_but_refused_and_warns_nobody(tmp_path, capfd):
    rng = np.random.default_rng(1)
    files = write_series(tmp_path, stored_values((3, 20, 20)), syntax="rle")
    sound = files[1].read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(150):
            damaged = bytearray(sound)
            for at in rng.integers(128, len(sound), rng.integers(1, 20)):
                damaged[at] = rng.integers(256)
            files[1].write_bytes(damaged)
            try:
                group_series(files)
                stored(open_files(files))
            except Refused as refused:
                assert "secret" not in refused.message.lower()
    assert "secret" not in "".join(capfd.readouterr()).lower()


def test_a_full_disk_is_no_fault_of_the_scan(monkeypatch, tmp_path):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    scan = open_files(write_series(tmp_path, stored_values(), syntax="jpeg2000"))
    monkeypatch.setattr("pydicom.dataset.Dataset.save_as", full)
    with pytest.raises(OSError, match="No space left"):
        stored(scan)


def test_without_pydicom_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(Refused, match=r"pip install 'photon-ct\[dicom\]'") as caught:
        group_series([tmp_path / "a.dcm"])
    assert caught.value.code == "dicom-extra-missing"


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("syntax", ["jpeg-lossless", "jpeg2000"])
def test_slices_that_are_decoded_together_are_told_apart_where_one_is_damaged(tmp_path, monkeypatch, syntax, in_memory):
    if not in_memory:
        monkeypatch.setattr("photon_data.readers.dicom_pixels.IN_MEMORY", False)
    values = stored_values((11, 12, 10))
    paths = write_series(tmp_path, values, syntax=syntax)
    scan = open_files(paths)
    np.testing.assert_array_equal(stored(scan), values)
    content = paths[6].read_bytes()
    at = content.index(b"\xff\xd8" if syntax == "jpeg-lossless" else b"\xff\x4f\xff\x51")
    paths[6].write_bytes(content[: at + 40] + bytes(60) + content[at + 100 :])
    with pytest.raises(Refused) as refused:
        stored(scan)
    assert refused.value.code == "dicom-undecodable" and refused.value.message.startswith(f"{paths[6].name}: ")
