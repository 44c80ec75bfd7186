"""Masks beside scans are left aside; a scan that only has a mask's name, or lies in a folder of that name, is not."""

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from raw import write_scan
from scans import ct_like

from photon_data.readers.find import find_one_scan, find_scans
from photon_data.readers.tree import is_named_as_one

SHAPE = (16, 24, 28)
ORGANS = (ct_like(SHAPE) > 300).astype(np.int16) + 3 * (ct_like(SHAPE) < -700).astype(np.int16)
SPREAD = np.random.default_rng(0).integers(0, 5, SHAPE).astype(np.int16)


def found(root):
    result = find_scans(root)
    return [source.path for source in result.sources], result.ignored


@pytest.mark.parametrize(
    "name",
    [
        "labelsTr/case_001.nii.gz",
        "labelsTs/case_001.nii",
        "s0001/segmentations/liver.nii.gz",
        "case/segmentation.nii.gz",
        "segmentation-12.nii",
        "Mask/x.nii.gz",
        "ct_seg.nii.gz",
        "ct-seg.nii.gz",
        "CT_Label.nii",
        "ct-label.nii.gz",
        "ct_mask.nii.gz",
        "ct_lungmask.nii",
        "label0001.nii.gz",
        "ct.seg.nii.gz",
        "sub-01_seg-vert_msk.nii.gz",
        "gt/1.nii",
    ],
)
@pytest.mark.parametrize("values", [ORGANS, SPREAD, np.zeros(SHAPE, np.int16), ORGANS.astype(np.float32)])
def test_label_maps_are_left_aside_by_the_names_that_data_sets_give_them(tmp_path, name, values):
    write_scan(tmp_path / "p/ct.nii.gz")
    write_scan(tmp_path / name, array=values)
    assert found(tmp_path) == (["p/ct.nii.gz"], {"(label map)": 1})


def test_a_ct_is_a_scan_in_whatever_folder_and_under_whatever_name(tmp_path):
    ct = ct_like(SHAPE)
    write_scan(tmp_path / "labels/ct.nii.gz", array=ct)
    write_scan(tmp_path / "masked_mask.nii", array=(ct + 1024).astype(np.uint16))  # stored from 0 on
    write_scan(tmp_path / "segmentations/f_seg.nii.gz", array=ct.astype(np.float32) + 0.25)
    empty_first = ct.copy()
    empty_first[:12] = 0
    write_scan(tmp_path / "mask/cropped.nii.gz", array=empty_first)
    (tmp_path / "masks/broken.nii.gz").parent.mkdir()
    (tmp_path / "masks/broken.nii.gz").write_bytes(b"\x1f\x8b damaged")
    paths, ignored = found(tmp_path)
    assert paths == [
        "labels/ct.nii.gz",
        "mask/cropped.nii.gz",
        "masked_mask.nii",
        "masks/broken.nii.gz",
        "segmentations/f_seg.nii.gz",
    ]
    assert ignored == {}


def test_label_maps_of_other_formats_are_told_by_their_type_and_size(tmp_path):
    organs, ct = np.kron(ORGANS, np.ones((4, 4, 4), np.int16)), ct_like((64, 96, 112))
    for name, values, compressed in [
        ("a.seg.nrrd", organs, True),
        ("labels/b.mha", organs.astype(np.uint8), False),
        ("c-label.nrrd", organs.astype(np.uint8), False),
        ("d_mask.nrrd", organs, True),
        ("masks/e.mhd", organs, True),
        ("labels/ct.mha", ct, True),
        ("labels/ct.nrrd", ct, False),
    ]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        sitk.WriteImage(sitk.GetImageFromArray(values), tmp_path / name, compressed)
    assert found(tmp_path) == (["labels/ct.mha", "labels/ct.nrrd"], {"(label map)": 5})


def test_a_name_that_says_nothing_is_never_looked_into(tmp_path):
    write_scan(tmp_path / "imagesTr/organs.nii.gz", array=ORGANS)
    assert found(tmp_path) == (["imagesTr/organs.nii.gz"], {})
    assert not any(
        map(is_named_as_one, ("CT-RATE/train_1_a_1.nii.gz", "BDMAP_1/ct.nii.gz", "imagesTs/x.nii", "1.2.3/a.mha"))
    )


def test_who_points_at_a_label_map_or_asks_for_them_gets_it(tmp_path):
    path = write_scan(tmp_path / "masks/liver_mask.nii.gz", array=ORGANS)
    assert find_one_scan(path).path == "liver_mask.nii.gz"
    assert [source.path for source in find_scans(tmp_path, label_maps=True).sources] == ["masks/liver_mask.nii.gz"]


def test_a_large_mask_of_bytes_is_not_decoded(tmp_path, monkeypatch):
    write_scan(tmp_path / "masks/a.nii.gz", array=np.zeros(SHAPE, np.uint8))
    monkeypatch.setattr(nib.arrayproxy.ArrayProxy, "__getitem__", lambda *_: pytest.fail("decoded"))
    assert found(tmp_path) == ([], {"(label map)": 1})
