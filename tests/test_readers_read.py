"""read(path): a whole scan in HU, in every format, against nibabel and SimpleITK reading the same file."""

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from dicom_files import OBLIQUE, normal_of, stored_values, write_series
from raw import write_scan
from reading import AXIS_ORDERS

from photon_data.errors import Refused, UsageError
from photon_data.readers import read


def assert_is(volume, image):
    """Voxels and the world position of two corners are those of a SimpleITK image."""
    np.testing.assert_allclose(volume.numpy(), sitk.GetArrayFromImage(image), rtol=1e-6)
    for corner in ((0, 0, 0), tuple(n - 1 for n in volume.geometry.shape_zyx)):
        expected = image.TransformIndexToPhysicalPoint(corner[::-1])
        np.testing.assert_allclose(volume.geometry.world(corner), expected, atol=1e-3)


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz", "scan.nrrd", "scan.nhdr", "scan.mha", "scan.mhd"])
@pytest.mark.parametrize("axes", AXIS_ORDERS[::11])
def test_a_file_of_any_format_is_the_image_that_simpleitk_reads(tmp_path, name, axes):
    image = sitk.GetImageFromArray(np.random.default_rng(0).integers(-1000, 1000, (5, 6, 7)).astype(np.int16))
    image.SetSpacing((0.7, 0.8, 2.5))
    image.SetOrigin((-120.5, 33.25, 410.0))
    image.SetDirection(axes.ravel().tolist())
    sitk.WriteImage(image, str(tmp_path / name))
    volume = read(tmp_path / name)
    assert volume.numpy().dtype == np.int16
    assert_is(volume, image)
    assert_is(read(str(tmp_path)), image)


@pytest.mark.parametrize(("slope", "intercept"), [(1, -1024), (0.5, 0), (2.5, -1000.25)])
def test_slope_and_intercept_of_a_nifti_are_applied_as_nibabel_applies_them(tmp_path, slope, intercept):
    path = write_scan(tmp_path / "scan.nii", array=np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6))
    data = bytearray(path.read_bytes())
    header = nibabel.Nifti1Header(bytes(data[:348]), check=False)
    header["scl_slope"], header["scl_inter"] = slope, intercept
    data[:348] = header.binaryblock
    path.write_bytes(data)
    volume, image = read(path), nibabel.load(path)
    assert volume.numpy().dtype == np.float32
    np.testing.assert_allclose(volume.numpy().transpose(2, 1, 0), image.get_fdata(), rtol=1e-6)
    np.testing.assert_allclose(volume.geometry.affine_ras, image.affine, atol=1e-5)


@pytest.mark.parametrize(("dtype", "expected"), [("u1", "u1"), ("i4", "i4"), ("f4", "f4"), ("f8", "f4")])
def test_stored_integers_that_are_hu_keep_their_type_and_floats_become_float32(tmp_path, dtype, expected):
    array = np.arange(4 * 5 * 6).reshape(4, 5, 6).astype(dtype)
    volume = read(write_scan(tmp_path / "scan.nii.gz", array=array))
    assert volume.numpy().dtype == expected
    np.testing.assert_array_equal(volume.numpy(), array)


def test_a_folder_with_a_dicom_series_is_the_volume_that_simpleitk_reads(tmp_path):
    write_series(tmp_path, stored_values(), orientation=OBLIQUE, step_lps=1.25 * normal_of(OBLIQUE))
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path)))
    volume = read(tmp_path)
    assert volume.numpy().dtype == np.float32
    assert_is(volume, reader.Execute())


def test_slices_with_their_own_rescaling_come_in_hu(tmp_path):
    values, rescale = stored_values(), [(1 + z / 4, -1000 - z) for z in range(7)]
    write_series(tmp_path, values, rescale=rescale)
    expected = [values[z] * slope + intercept for z, (slope, intercept) in enumerate(rescale)]
    np.testing.assert_array_equal(read(tmp_path).numpy(), np.asarray(expected, np.float32))


def test_anything_but_one_scan_is_a_usage_error_and_damage_is_refused(tmp_path):
    write_scan(tmp_path / "a" / "one.nii.gz")
    two = write_scan(tmp_path / "a" / "two.nii.gz", seed=1)
    (tmp_path / "empty").mkdir()
    for path, message in (
        (tmp_path / "a", "found 2"),
        (tmp_path / "empty", "found 0"),
        (tmp_path / "b", "there is no"),
    ):
        with pytest.raises(UsageError, match=message):
            read(path)
    two.write_bytes(two.read_bytes()[:-9])
    with pytest.raises(Refused) as caught:
        read(two)
    assert caught.value.code == "truncated"


def test_of_two_affines_that_differ_the_option_picks_one(tmp_path):
    path = write_scan(tmp_path / "scan.nii")
    image = nibabel.load(path)
    image.set_qform(np.diag([2.0, 2.0, 2.0, 1.0]), 1)
    nibabel.save(image, tmp_path / "conflict.nii")
    with pytest.raises(Refused, match="nifti_affine"):
        read(tmp_path / "conflict.nii")
    assert read(tmp_path / "conflict.nii", nifti_affine="sform").geometry.spacing_zyx_mm == pytest.approx(
        (2.0, 1.1, 0.9)
    )
