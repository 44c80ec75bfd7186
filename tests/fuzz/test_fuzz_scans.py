"""Damaged scans of every format: read as they were, read as their header now says, or refused; nothing else."""

import gzip
import shutil

import numpy as np
import pytest
import SimpleITK as sitk
from dicom_files import header, save, set_pixels, stored_values
from hypothesis import given
from hypothesis import strategies as st
from mutations import budget, damaged_bytes, damaged_text, no_hang
from raw import write_scan
from test_dicom_headers import read as what_is_read
from test_dicom_headers import write

from photon_data import Volume
from photon_data.errors import Refused, UsageError
from photon_data.readers import open_scan, read
from photon_data.readers.find import find_scans
from photon_data.recipe import Policy

MOST_VOXELS = 200_000
SHAPE = (4, 6, 8)


def _read(path) -> Volume | None:
    """The volume, or None where it is refused; it is sane in any case."""
    with no_hang():
        try:
            volume = read(path, max_voxels=MOST_VOXELS)
        except (Refused, UsageError) as error:
            assert str(error).isprintable(), "an error quotes no control characters"
            return None
    array, geometry = volume.numpy(), volume.geometry
    assert array.shape == geometry.shape_zyx and min(array.shape) >= 2 and array.size <= MOST_VOXELS
    assert np.isfinite(geometry.affine_ras).all() and abs(np.linalg.det(geometry.affine_ras[:3, :3])) > 0
    return volume


def _same(a: Volume, b: Volume) -> bool:
    return a.geometry == b.geometry and np.array_equal(a.numpy(), b.numpy())


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, tuple[bytes, Volume]]:
    """By file name, the bytes of a small scan and what is in it."""
    folder = tmp_path_factory.mktemp("whole")
    image = sitk.ReadImage(str(write_scan(folder / "first.nii", shape_zyx=SHAPE)))
    image["note"] = "nobody"
    names = ("a.nii", "a.nii.gz", "plain.nrrd", "packed.nrrd", "plain.mha", "packed.mha")
    for name in names:
        sitk.WriteImage(image, str(folder / name), useCompression=name.startswith("packed"))
    return {name: ((folder / name).read_bytes(), read(folder / name)) for name in names}


@budget(250)
@given(st.data())
def test_a_damaged_nifti_header_gives_a_sane_volume_or_a_refusal(whole, tmp_path, data):
    content, _ = whole["a.nii"]
    (tmp_path / "b.nii").write_bytes(data.draw(damaged_bytes(content, within=360)))
    _read(tmp_path / "b.nii")


@budget(150)
@given(st.data())
def test_a_damaged_nifti_header_in_gzip_gives_a_sane_volume_or_a_refusal(whole, tmp_path, data):
    content, _ = whole["a.nii"]
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(data.draw(damaged_bytes(content, within=360)), 1))
    _read(tmp_path / "b.nii.gz")


@budget(150)
@given(st.data())
def test_damaged_gzip_is_read_as_it_was_or_refused(whole, tmp_path, data):
    content, before = whole["a.nii.gz"]
    (tmp_path / "b.nii.gz").write_bytes(data.draw(damaged_bytes(content)))
    found = _read(tmp_path / "b.nii.gz")
    assert found is None or _same(found, before)


def _damage_text_header(content, path, data, end):
    """Read a scan whose text header (to `end`) or whose bytes are damaged."""
    cut = content.index(end) + len(end)
    if data.draw(st.booleans()):
        text = data.draw(damaged_text(content[:cut].decode()))
        damaged = text.encode("utf-8", "surrogatepass") + content[cut:]
    else:
        damaged = data.draw(damaged_bytes(content))
    path.write_bytes(damaged)
    _read(path)


@budget(150)
@given(st.data(), st.sampled_from(["plain.nrrd", "packed.nrrd"]))
def test_a_damaged_nrrd_gives_a_sane_volume_or_a_refusal(whole, tmp_path, data, name):
    _damage_text_header(whole[name][0], tmp_path / name, data, b"\n\n")


@budget(150)
@given(st.data(), st.sampled_from(["plain.mha", "packed.mha"]))
def test_a_damaged_metaimage_gives_a_sane_volume_or_a_refusal(whole, tmp_path, data, name):
    _damage_text_header(whole[name][0], tmp_path / name, data, b"ElementDataFile = LOCAL\n")


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    """By transfer syntax, a folder of three slices."""
    made = {}
    for syntax in ("explicit", "implicit", "big-endian", "rle", "jpeg-lossless", "jpeg2000"):
        made[syntax] = tmp_path_factory.mktemp(syntax)
        for z, plane in enumerate(stored_values((3, 32, 40))):
            tags = {"ImagePositionPatient": [-10, -20, 5 * z], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}
            ds = header("1.2.3.4", PixelSpacing=[1, 2], RescaleSlope=1, RescaleIntercept=-1024, **tags)
            set_pixels(ds, plane)
            save(ds, made[syntax] / f"{z}.dcm", syntax)
    return made


@budget(120)
@given(st.data(), st.sampled_from(["explicit", "implicit", "big-endian", "rle", "jpeg-lossless", "jpeg2000"]))
def test_a_damaged_slice_of_dicom_leaves_sane_scans_and_refusals(series, tmp_path, data, syntax):
    folder = tmp_path / syntax
    shutil.copytree(series[syntax], folder, dirs_exist_ok=True)
    content = (folder / "1.dcm").read_bytes()
    damaged = data.draw(damaged_bytes(content, within=data.draw(st.sampled_from([132, 800, len(content)]))))
    (folder / "1.dcm").write_bytes(damaged)
    with no_hang():
        for source in find_scans(folder).sources:
            try:
                volume = open_scan(source, Policy(max_voxels=MOST_VOXELS)).volume()
            except Refused as error:
                assert "SECRET" not in str(error) and "Doe" not in str(error)
            else:
                assert volume.numpy().shape == volume.geometry.shape_zyx
                assert np.isfinite(volume.geometry.affine_ras).all() and np.isfinite(volume.numpy()).all()


@pytest.fixture(scope="module")
def headers(tmp_path_factory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("headers")
    syntaxes = ("explicit", "implicit", "rle")
    return [write(folder / f"{syntax}.dcm", syntax, n).read_bytes() for syntax in syntaxes for n in (1, 2)]


@budget(200)
@given(st.data())
def test_a_damaged_dicom_header_is_read_or_refused_as_by_pydicom(headers, tmp_path, data):
    content, path = data.draw(st.sampled_from(headers)), tmp_path / "a.dcm"
    path.write_bytes(content[:128] + data.draw(damaged_bytes(content[128:], within=1700)))
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert what_is_read(path) == what_is_read(path, monkeypatch)
