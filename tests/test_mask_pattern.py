"""Which files a pattern finds for a scan, what the masks are called, and what it cannot mean."""

import glob
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from dicom_files import stored_values, write_series
from raw import write_scan

from photon_data.errors import Refused, UsageError
from photon_data.files import Location
from photon_data.readers.find import find_scans
from photon_data.readers.mask_pattern import Folders, common_words, masks_of, scans_alone, usual_pattern
from photon_data.recipe import Recipe
from photon_data.scan import MaskPattern, Source, names_below
from photon_pipelines.mask_plan import find_masks
from photon_pipelines.plan import gather
from photon_pipelines.request import Request


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def scan_at(root, path, format="nifti", id="v1", hidden=False):
    return Source(id, path, (path.partition("#")[0],), format, 0, 0, root=str(root), hidden=hidden)


def found(root, pattern, path, **more):
    masks = masks_of(MaskPattern(pattern), scan_at(root, path, **more))
    return {mask.name: mask.files[0].resolve().relative_to(root.resolve()).as_posix() for mask in masks}


@pytest.mark.parametrize(
    ("pattern", "scan", "expected"),
    [
        ("labelsTr/{name}.nii.gz", "imagesTr/c1.nii.gz", {"": "labelsTr/c1.nii.gz"}),
        ("labelsTr/{case}.nii.gz", "imagesTr/c1_0000.nii.gz", {"": "labelsTr/c1.nii.gz"}),
        ("{name}_seg.nii.gz", "p/deep/ct.nii.gz", {"": "p/deep/ct_seg.nii.gz"}),
        ("./{name}_seg.nii.gz", "p/deep/ct.nii.gz", {"": "p/deep/ct_seg.nii.gz"}),
        ("{folder}/../all/{parent}_{id}.nrrd", "p/deep/ct.nii.gz", {"": "p/all/deep_v1.nrrd"}),
        ("{folder}/seg", "p/ct.nii.gz", {"liver": "p/seg/liver.nii.gz", "more__lung": "p/seg/more/lung.mha"}),
        ("{folder}/seg/*.nii.gz", "p/ct.nii.gz", {"liver": "p/seg/liver.nii.gz"}),
        ("{folder}/seg/**/*", "p/ct.nii.gz", {"liver": "p/seg/liver.nii.gz", "lung": "p/seg/more/lung.mha"}),
        ("{name}_*_m.nii.gz", "q/a.nii.gz", {"left": "q/a_left_m.nii.gz", "right": "q/a_right_m.nii.gz"}),
        ("{name}*.nii.gz", "q/a.nii.gz", {"_left_m": "q/a_left_m.nii.gz", "_right_m": "q/a_right_m.nii.gz"}),
        ("{name}_*.nii.gz", "q/x[1]*.nii.gz", {"m": "q/x[1]*_m.nii.gz"}),
        ("{folder}/*.nii.gz", "d/series#1a2b", {"spleen": "d/series/spleen.nii.gz"}),
        ("{folder}/../{name}.nii.gz", "d/series#1a2b", {"": "d/series.nii.gz"}),
        ("{folder}_masks", "p/deep/ct.nii.gz", {"lung": "p/deep_masks/lung.mha"}),
        ("{name}_seg.nii.gz", "top.nii", {"": "top_seg.nii.gz"}),
        ("nothing/{name}.nii.gz", "top.nii", {}),
        ("{name}.nii", "top.nii", {}),  # the scan itself
    ],
)
def test_a_pattern_finds_the_masks_of_the_usual_layouts(tmp_path, pattern, scan, expected):
    touch(tmp_path, "imagesTr/c1.nii.gz", "labelsTr/c1.nii.gz", "labelsTr/c12.nii.gz", "labelsTr/c1_0000.nii")
    touch(tmp_path, "p/deep/ct_seg.nii.gz", "p/all/deep_v1.nrrd", "p/seg/liver.nii.gz", "p/seg/more/lung.mha")
    touch(tmp_path, "p/seg/.hidden.nii.gz", "p/seg/notes.txt", "p/ct.nii.gz", "q/a.nii.gz", "q/a_left_m.nii.gz")
    touch(tmp_path, "q/a_right_m.nii.gz", "q/x[1]*.nii.gz", "q/x[1]*_m.nii.gz", "q/x1y_m.nii.gz", "top.nii")
    touch(tmp_path, "top_seg.nii.gz", "d/series/1.dcm", "d/series/spleen.nii.gz", "d/series.nii.gz")
    touch(tmp_path, "p/deep_masks/lung.mha")
    assert found(tmp_path, pattern, scan, format="dicom" if "#" in scan else "nifti") == expected


@pytest.mark.parametrize(
    "pattern", ["masks/*.nii.gz", "{patient}.nii.gz", "{name", "{}/a.nii.gz", "{folder}/*/mask.nii.gz", ""]
)
def test_a_pattern_that_cannot_be_meant_is_refused(pattern):
    with pytest.raises(UsageError, match="--masks: expected"):
        MaskPattern(pattern)


def test_names_belong_to_label_maps_alone():
    assert MaskPattern("{name}_seg.nii.gz", {1: "liver"}).labels
    with pytest.raises(UsageError, match="--mask-labels"):
        MaskPattern("{folder}/*.nii.gz", {1: "liver"})


def test_masks_of_one_name_and_files_that_are_not_read_are_refused(tmp_path):
    touch(tmp_path, "p/ct.nii.gz", "p/l/mask.nii.gz", "p/r/mask.nii.gz", "p/seg.dcm")
    with pytest.raises(Refused, match="more than once"):
        found(tmp_path, "{folder}/**/*.nii.gz", "p/ct.nii.gz")
    with pytest.raises(Refused, match="DICOM SEG"):
        found(tmp_path, "{folder}/seg.dcm", "p/ct.nii.gz")


def test_names_of_masks_do_not_tell_a_hidden_name(tmp_path):
    touch(tmp_path, "Doe/1.dcm", "Doe/doe_liver.nii.gz")
    with pytest.raises(Refused, match="without a name of the scan"):
        found(tmp_path, "{folder}/*.nii.gz", "Doe#1a", format="dicom", hidden=True)
    (tmp_path / "Doe/doe_liver.nii.gz").rename(tmp_path / "Doe/Doe_liver.nii.gz")
    assert list(found(tmp_path, "{folder}/{parent}_*.nii.gz", "Doe#1a", format="dicom", hidden=True)) == ["liver"]


@pytest.mark.parametrize(
    ("persons", "told", "others"),
    [
        (
            [("Doe^Jane", "KL-77")],
            ["Doe_liver", "JANE-lung", "kidney_kl3", "aorta77", "lung_of_jane2"],
            ["liver", "dose"],
        ),
        ([("Li^Wei", "1")], ["li_1", "wei2"], ["live_1", "weight", "mask-1"]),
        ([("Müller^Ö", "x")], ["müller-spleen", "meinmüller"], ["muller", "x-ray"]),
        ([("Roe^Ann", "y"), ("Poe^Zoe", "z")], ["poe", "roe"], ["toe"]),
    ],
)
def test_a_mask_called_after_a_patient_whom_headers_alone_name_gets_a_number(tmp_path, persons, told, others):
    def edit(ds, z):
        ds.SpecificCharacterSet, (ds.PatientName, ds.PatientID) = "ISO_IR 192", persons[z % len(persons)]

    files = write_series(tmp_path / "a1", stored_values((2, 4, 4)), edit=edit)
    touch(tmp_path, *(f"a1/seg/{name}.nii.gz" for name in [*told, *others]))
    source = replace(scan_at(tmp_path, "a1#1a", "dicom", hidden=True), names=names_below(str(tmp_path), files))
    pattern = MaskPattern("{folder}/seg/*.nii.gz")
    names = {mask.files[0].name.removesuffix(".nii.gz"): mask.name for mask in masks_of(pattern, source)}
    assert {name: names[name] for name in others} == {name: name for name in others}
    numbers = {names[name] for name in told}
    assert len(numbers) == len(told) and all(re.fullmatch(r"mask-\d", name) for name in numbers - set(others))
    shown = masks_of(pattern, replace(source, hidden=False))
    assert {mask.name for mask in shown} == {*told, *others}


def test_a_word_of_a_hidden_name_is_told_as_little_but_for_words_that_most_patients_share(tmp_path):
    paths = [f"pancreas_00{i}/{name}/ct" for i, name in enumerate(["DOE_JANE", "ROE_TIM", "POE_ANN"])]
    touch(tmp_path, *(f"{path}/{name}.nii.gz" for path in paths for name in ("pancreas", "left_jane")))
    sources = [
        replace(scan_at(tmp_path, f"{path}#1a", "dicom", id=path[:12], hidden=True), patient=path) for path in paths
    ]
    words = common_words(sources)
    assert words == {"pancreas"}
    (tmp_path / paths[1] / "left_jane.nii.gz").rename(tmp_path / paths[1] / "left.nii.gz")
    with pytest.raises(Refused, match="without a name of the scan"):
        masks_of(MaskPattern("{folder}/*.nii.gz"), sources[0], words)
    assert [mask.name for mask in masks_of(MaskPattern("{folder}/*.nii.gz"), sources[1], words)] == ["left", "pancreas"]
    assert common_words(sources[:2]) == common_words([replace(source, patient="") for source in sources]) == set()


def test_masks_that_look_like_scans_are_not_prepared_as_scans(tmp_path):
    write_scan(tmp_path / "images/a.nii.gz")
    write_scan(tmp_path / "annotations/a.nii.gz", array=np.ones((16, 24, 28), np.uint8))
    sources = find_scans(tmp_path).sources
    assert len(sources) == 2
    alone, count = scans_alone(sources, MaskPattern("annotations/{name}.nii.gz"))
    assert ([source.path for source in alone], count) == (["images/a.nii.gz"], 1)
    with pytest.raises(UsageError, match="masks of each other"):
        scans_alone(sources, MaskPattern("{folder}/../*/{name}*.nii.gz"))


def test_inspect_knows_which_usual_pattern_fits_most_scans(tmp_path):
    touch(tmp_path, "imagesTr/a_0000.nii.gz", "imagesTr/b_0000.nii.gz", "labelsTr/a.nii.gz", "labelsTr/b.nii.gz")
    scans = [scan_at(tmp_path, f"imagesTr/{name}_0000.nii.gz") for name in "ab"]
    assert usual_pattern(scans) == ("labelsTr/{case}.nii.gz", 2)
    assert usual_pattern([]) is None


def asked(tmp_path, pattern):
    out = Location(str(tmp_path / "out"))
    request = Request(tmp_path / "raw", out, Recipe(), masks=MaskPattern(pattern))
    return find_masks(request, gather(request).jobs)


def test_a_pattern_that_finds_nothing_at_all_is_a_misuse_and_says_where_it_looked(tmp_path):
    write_scan(tmp_path / "raw/p/ct.nii.gz")
    with pytest.raises(UsageError, match=r"p/ct.nii.gz they would be .*raw/labels/ct.nii.gz"):
        asked(tmp_path, "labels/{name}.nii.gz")
    assert not (tmp_path / "out").exists()


def test_a_file_of_two_scans_is_a_mask_of_neither_unless_they_share_a_place(tmp_path):
    ones = np.ones((16, 24, 28), np.uint8)
    for name in ("p_1", "p_1_2", "other"):
        write_scan(tmp_path / f"raw/{name}.nii.gz")
        write_scan(tmp_path / f"raw/m/{name}_liver_mask.nii.gz", array=ones)
    found = asked(tmp_path, "m/{name}_*_mask.nii.gz")
    assert {id: one.source.code for id, one in found.items() if one.source.problem} == {
        "p_1": "mask-names",
        "p_1_2": "mask-names",
    }
    assert not any(one.source.problem for one in asked(tmp_path, "{folder}/m/*_mask.nii.gz").values())


def test_a_data_set_of_a_manifest_has_a_pattern_of_its_own(tmp_path):
    from photon_data.datasets.declare import read_data_manifest

    (tmp_path / "labels.csv").write_text("value,name\n1,liver\n")
    text = "datasets:\n  x:\n    adapter: folder\n    root: raw\n    masks: {}\n"
    for masks, expected in [
        ("'{name}_seg.nii.gz'", MaskPattern("{name}_seg.nii.gz")),
        ("{files: '{name}_seg.nii.gz', labels: labels.csv}", MaskPattern("{name}_seg.nii.gz", {1: "liver"})),
    ]:
        (tmp_path / "m.yaml").write_text(text.replace("{}", masks))
        (entry,) = read_data_manifest(Path(tmp_path / "m.yaml")).datasets
        assert entry.masks == expected
    (tmp_path / "m.yaml").write_text(text.replace("{}", "'labels/*.nii.gz'"))
    with pytest.raises(UsageError, match="line 5: --masks"):
        read_data_manifest(tmp_path / "m.yaml")


def test_a_folder_is_listed_once_however_many_scans_it_has_and_the_same_masks_are_found(tmp_path, monkeypatch):
    listed = []
    names = ["a_1.nii", "a_2.nii", "a_10.nii", "b_1.nii", "ab_1.nii", ".a_3.nii", "a_x.txt", "b[1]_1.nii", "a"]
    for name in names:
        (tmp_path / name).touch()
    real = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: listed.append(path) or real(path))
    folders = Folders()
    globs = ["a_*.nii", "a_?.nii", "b_*", "*_1.nii", ".a*", "none_*", "[[]a]*", "a"] * 3
    for pattern in globs:
        place = str(tmp_path / pattern)
        assert sorted(folders.matches(place)) == sorted(map(Path, glob.glob(place)))  # noqa: PTH207 - as Python finds them
    assert len([path for path in listed if path == str(tmp_path)]) == 1
