"""A raw scan is asked about as if it had been prepared: the same bytes, the same refusals."""

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from dicom_files import write_series
from raw import write_scan
from scans import ct_like

from photon_data import open_volume
from photon_data.errors import Refused, UsageError
from photon_data.prepare_file import Job, prepare_file
from photon_data.readers.find import find_scans
from photon_data.recipe import Recipe
from photon_train.answering.scan import open_input

SMALL = Recipe(shape_zyx=(40, 32, 32), model_shape_zyx=(14, 28, 28))
OBLIQUE = nibabel.affines.from_matvec(
    np.array([[-0.8, 0.6, 0], [-0.6, -0.8, 0], [0, 0, 1]]) @ np.diag([0.9, 1.1, 2.0]), (3, 5, 7)
)


def nifti(folder):
    return write_scan(folder / "raw" / "a.nii.gz", affine=OBLIQUE)


def itk(suffix):
    def write(folder):
        image = sitk.GetImageFromArray(ct_like((16, 24, 28)))
        image.SetSpacing((0.9, 1.1, 2.0))
        image.SetDirection((0, 1, 0, -1, 0, 0, 0, 0, 1))
        (folder / "raw").mkdir()
        sitk.WriteImage(image, folder / "raw" / f"a{suffix}")
        return folder / "raw" / f"a{suffix}"

    return write


def dicom(folder):
    write_series(folder / "raw" / "a", ct_like((16, 24, 28)), rescale=(1, 0))
    return folder / "raw" / "a"


@pytest.mark.parametrize("write", [nifti, itk(".nrrd"), itk(".mha"), dicom], ids=["nifti", "nrrd", "mha", "dicom"])
def test_a_raw_scan_and_its_store_give_the_same_bytes_and_grids(tmp_path, write):
    path = write(tmp_path)
    (source,) = find_scans(path).sources
    record = prepare_file(Job(source, str(tmp_path / "out"), SMALL))
    assert record.is_there, record.reason
    raw, store = open_input(str(path), SMALL), open_input(str(tmp_path / "out" / record.store), Recipe())
    assert raw.model.array_zyx.tobytes() == store.model.numpy().tobytes()
    assert raw.model.array_zyx.tobytes() == open_volume(tmp_path / "out" / record.store, "model").numpy().tobytes()
    assert raw.volume.numpy().tobytes() == store.volume.numpy().tobytes()
    assert (raw.id, raw.native, raw.model.geometry) == (store.id, store.native, store.model.geometry)
    assert set(raw.seconds) == set(store.seconds) == {"read", "prepare"}
    assert raw.seconds["prepare"] > 0 == store.seconds["prepare"]


def test_one_of_several_series_is_asked_about_by_its_name(tmp_path):
    for seed in range(2):
        names = [f"{seed}{z:02}.dcm" for z in range(16)]
        write_series(tmp_path / "raw", ct_like((16, 24, 28), seed), names=names, rescale=(1, 0))
    with pytest.raises(UsageError, match="found 2"):
        open_input(str(tmp_path / "raw"), SMALL)
    sources = find_scans(tmp_path / "raw").sources
    inputs = [open_input(str(tmp_path / "raw"), SMALL, series=source.path) for source in sources]
    assert [one.id for one in inputs] == [source.id for source in sources]
    assert inputs[0].model.array_zyx.tobytes() != inputs[1].model.array_zyx.tobytes()
    by_path = open_input(f"{tmp_path}/raw{sources[1].path}", SMALL)
    assert by_path.model.array_zyx.tobytes() == inputs[1].model.array_zyx.tobytes()


def cut_off(folder):
    path = nifti(folder)
    path.write_bytes(path.read_bytes()[:-200])
    return path


def no_ct(folder):
    return write_scan(
        folder / "raw" / "a.nii", array=np.random.default_rng(0).integers(0, 255, (16, 24, 28)).astype(np.uint8)
    )


def four_d(folder):
    (folder / "raw").mkdir()
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4, 3), np.int16), OBLIQUE), folder / "raw" / "a.nii")
    return folder / "raw" / "a.nii"


@pytest.mark.parametrize("write", [cut_off, no_ct, four_d])
def test_a_scan_that_prepare_refuses_is_refused_with_its_words(tmp_path, write):
    path = write(tmp_path)
    (source,) = find_scans(path).sources
    record = prepare_file(Job(source, str(tmp_path / "out"), SMALL))
    assert record.state == "refused"
    with pytest.raises(Refused) as refused:
        open_input(str(path), SMALL)
    assert refused.value.code == record.code
    assert refused.value.message.removeprefix(f"{path.name}: ") == record.reason


def test_a_folder_of_two_scans_or_of_none_is_not_one_scan(tmp_path):
    nifti(tmp_path)
    write_scan(tmp_path / "raw" / "b.nii")
    with pytest.raises(UsageError, match="found 2 in"):
        open_input(str(tmp_path / "raw"), SMALL)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="found 0 in"):
        open_input(str(tmp_path / "empty"), SMALL)
    with pytest.raises(UsageError, match="there is no"):
        open_input(str(tmp_path / "nowhere"), SMALL)


def test_a_refused_dicom_series_is_told_without_the_names_of_its_files_and_folders(tmp_path):
    names = [f"Doe_Jane_{z:03}.dcm" for z in range(16)]
    slices = [*range(7), *range(9, 16)]  # two are missing
    write_series(tmp_path / "Doe^Jane", np.zeros((16, 24, 28), np.uint16), names=names, slices=slices)
    with pytest.raises(Refused) as refused:
        open_input(str(tmp_path / "Doe^Jane"), Recipe())
    assert "Doe" not in str(refused.value)
    assert refused.value.__suppress_context__
