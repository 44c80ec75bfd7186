"""Phantoms: their answers are found again in what was written, by nibabel and numpy alone."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from photon_data.phantom import draw_phantom, make_phantoms

SIZE = 112
HU_OF = {
    "ground-glass": (-600, -500),
    "fat": (-110, -90),
    "fluid": (0, 12),
    "soft tissue": (35, 60),
    "calcified": (350, 450),
}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("phantoms")
    make_phantoms(directory, 12, 0, size=SIZE)
    return directory


@pytest.fixture(scope="module")
def many() -> list[dict]:
    """The questions on 60 patients, who have 72 scans."""
    return [row for index in range(72) for row in draw_phantom(3, index, 64).questions]


def rows_of(directory: Path, form: str) -> list[dict]:
    rows = [json.loads(line) for line in (directory / "questions.jsonl").read_text().splitlines()]
    return [row for row in rows if row["id"].endswith(f"-{form}")]


def scan_paths(directory: Path) -> list[Path]:
    return sorted((directory / "scans").iterdir())


def scan_of(directory: Path, row: dict) -> nibabel.Nifti1Image:
    (path,) = (directory / "scans").glob(f"{row['volume']}.nii*")
    return nibabel.load(path)


def mask_of(directory: Path, row: dict, structure: str) -> np.ndarray:
    path = directory / "masks" / row["volume"] / f"{structure}.nii.gz"
    return np.asarray(nibabel.load(path).dataobj)


def world_lps(directory: Path, row: dict, mask: np.ndarray) -> np.ndarray:
    """Positions [n, 3] of the voxels of a mask."""
    return nibabel.affines.apply_affine(scan_of(directory, row).affine, np.argwhere(mask)) * (-1, -1, 1)


def majority_share(answers: list[str]) -> float:
    return max(Counter(answers).values()) / len(answers)


def bytes_under(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_a_finding_exists_exactly_where_its_mask_has_voxels(drawn):
    rows = rows_of(drawn, "existence")
    assert len(rows) == 12 * 5
    for row in rows:
        has_mask = (drawn / "masks" / row["volume"] / f"{row['lesion']}.nii.gz").exists()
        assert (row["answer"] == "yes") == has_mask, row["id"]
        assert not has_mask or mask_of(drawn, row, row["lesion"]).any(), row["id"]


def test_every_organ_asked_about_is_in_view(drawn):
    for row in rows_of(drawn, "existence"):
        for structure in row["organ_masks"]:
            volume_ml = (
                mask_of(drawn, row, structure).sum() * abs(np.linalg.det(scan_of(drawn, row).affine[:3, :3])) / 1e3
            )
            assert volume_ml > 80, (row["id"], structure)


def test_left_and_right_are_the_patients(drawn):
    rows = rows_of(drawn, "side")
    assert len(rows) == 3 * 6
    for row in rows:
        mask = mask_of(drawn, row, row["lesion"])
        for number in range(1, mask.max() + 1):
            x = world_lps(drawn, row, mask == number)[:, 0].mean()
            assert row["answer"] == ("left" if x > 0 else "right"), row["id"]


def test_lesions_are_as_many_as_labels_in_the_mask(drawn):
    rows = rows_of(drawn, "count")
    assert {row["answer"] for row in rows} == {"1", "2", "3"}
    for row in rows:
        labels = np.unique(mask_of(drawn, row, row["lesion"]))
        assert labels.tolist() == list(range(int(row["answer"]) + 1)), row["id"]


def test_a_location_is_that_of_every_lesion(drawn):
    rows = rows_of(drawn, "location")
    assert {row["organ"] for row in rows} == {"lungs", "liver", "kidneys"}
    for row in rows:
        lesion = mask_of(drawn, row, row["lesion"]) > 0
        centres = [world_lps(drawn, row, mask_of(drawn, row, name) > 0) for name in row["organ_masks"]]
        here = world_lps(drawn, row, lesion)
        if row["organ"] == "liver":  # the lobes part about 22 mm to the right of the spine
            border = world_lps(drawn, row, mask_of(drawn, row, "spine"))[:, 0].mean() - 22
            found = "left lobe" if here[:, 0].min() > border else "right lobe" if here[:, 0].max() < border else "?"
            assert row["answer"] == found, row["id"]
        else:
            organ = next(c for c in centres if np.sign(c[:, 0].mean()) == np.sign(here[:, 0].mean()))
            upper = here[:, 2].mean() > (organ[:, 2].min() + organ[:, 2].max()) / 2
            assert row["answer"].startswith("upper" if upper else "lower"), row["id"]


def test_the_diameter_is_the_extent_of_the_largest_lesion_within_one_voxel(drawn):
    rows = rows_of(drawn, "size")
    assert all(12 <= row["answer_value"] <= 45 and row["unit"] == "mm" for row in rows)
    for row in rows:
        mask = mask_of(drawn, row, row["lesion"])
        assert (mask == 1).sum() == np.bincount(mask[mask > 0]).max(), row["id"]
        voxels = np.argwhere(mask == 1)
        extent = voxels.max(axis=0) - voxels.min(axis=0) + 1
        # How many voxels a sphere spans along each array axis, sheared or not.
        rows_of_inverse = np.linalg.inv(scan_of(drawn, row).affine[:3, :3])
        wanted = row["answer_value"] * np.linalg.norm(rows_of_inverse, axis=1)
        assert np.abs(extent - wanted).max() <= 1, row["id"]
        assert row["answer"] == f"{row['answer_value']} mm"


def test_a_size_class_holds_the_diameter(drawn):
    for row in rows_of(drawn, "size-class"):
        numbers = [int(word) for word in row["answer"].split() if word.isdigit()]
        low, high = {"smaller": (0, numbers[-1]), "larger": (numbers[0], 99)}.get(row["answer"].split()[0], numbers)
        assert low < row["answer_value"] < high, row["id"]
        assert row["answer"] in row["choices"]


def test_the_voxels_of_a_lesion_have_the_attenuation_that_is_told(drawn):
    rows = rows_of(drawn, "attenuation-class")
    assert len({row["answer"] for row in rows}) == 5
    for row in rows:
        hu = scan_of(drawn, row).get_fdata()[mask_of(drawn, row, row["lesion"]) == 1]
        assert abs(hu.mean() - row["answer_value"]) < 3 * 25 * 2 / np.sqrt(len(hu)) + 0.5, row["id"]
        low, high = HU_OF[row["answer"]]
        assert low <= row["answer_value"] <= high


def test_lesions_lie_whole_within_the_scan_and_the_cube_around_its_centre(drawn):
    for row in rows_of(drawn, "size"):
        mask, scan = mask_of(drawn, row, row["lesion"]) > 0, scan_of(drawn, row)
        centre = nibabel.affines.apply_affine(scan.affine, (np.array(scan.shape) - 1) / 2) * (-1, -1, 1)
        assert np.abs(world_lps(drawn, row, mask) - centre).max() < 182, row["id"]
        voxels = np.argwhere(mask)
        assert voxels.min() >= 0 and (voxels.max(axis=0) < np.array(mask.shape)).all()
        border = np.ones(mask.shape, bool)
        border[1:-1, 1:-1, 1:-1] = False
        assert (mask & border).sum() < 0.05 * mask.sum(), row["id"]


def test_lesions_belong_to_the_mask_of_their_organ(drawn):
    for row in rows_of(drawn, "attenuation"):
        organ = sum(mask_of(drawn, row, name) for name in row["organ_masks"])
        assert (organ[mask_of(drawn, row, row["lesion"]) > 0] == 1).all(), row["id"]


def test_no_constant_answer_and_no_rule_on_the_text_beats_the_balanced_share(many):
    answers = defaultdict(list)
    for row in many:
        if row["choices"]:
            answers[row["split"], row["kind"], row["organ"], "any"].append(row)
            answers[row["split"], row["kind"], row["organ"], row["question"]].append(row)
    for key, rows in answers.items():
        assert majority_share([row["answer"] for row in rows]) <= 1 / len(rows[0]["choices"]) + 0.001, key


def test_no_number_is_right_often(many):
    numbers = defaultdict(list)
    for row in many:
        if not row["choices"]:
            numbers[row["kind"], row["organ"]].append(row["answer"])
    assert len(numbers) == 8
    assert all(majority_share(answers) < 0.25 for answers in numbers.values())


def test_twelve_phantoms_are_balanced_too(drawn):
    for split, most in (("train", 0.5), ("val", 0.5), ("test", 0.5)):
        for finding in ("lung_nodule", "liver_lesion", "kidney_lesion", "spleen_lesion", "pleural_effusion"):
            rows = [r for r in rows_of(drawn, "existence") if (r["split"], r["lesion"]) == (split, finding)]
            assert majority_share([r["answer"] for r in rows]) == most
    sides = [row["answer"] for row in rows_of(drawn, "side") if row["split"] == "train"]
    assert majority_share(sides) == 0.5


def test_a_finding_tells_nothing_about_another(many):
    answers = defaultdict(dict)
    for row in many:
        if row["kind"] == "existence":
            answers[row["lesion"]][row["volume"]] = row["answer"] == "yes"
    table = np.array([list(column.values()) for column in answers.values()])
    correlation = np.corrcoef(table) - np.eye(len(table))
    assert np.abs(correlation).max() < 0.5  # three standard errors: 72 scans are 36 independent pairs


def test_a_patient_is_in_one_split_and_some_have_two_scans(many):
    splits, scans = defaultdict(set), defaultdict(set)
    for row in many:
        splits[row["patient"]].add(row["split"])
        scans[row["patient"]].add(row["volume"])
    assert len(splits) == 60
    assert all(len(of_one) == 1 for of_one in splits.values())
    assert Counter(len(of_one) for of_one in scans.values()) == {1: 48, 2: 12}
    assert Counter(split for (split,) in splits.values()) == {"train": 36, "val": 12, "test": 12}


def test_ids_are_unique_and_several_wordings_ask_the_same(many):
    assert len({row["id"] for row in many}) == len(many)
    wordings = defaultdict(set)
    for row in many:
        wordings[row["id"][len(row["volume"]) :]].add(row["question"])
    assert all(len(texts) == 3 for texts in wordings.values())


def test_the_same_seed_gives_the_same_bytes_and_n_changes_no_volume(tmp_path):
    make_phantoms(tmp_path / "two", 2, 5, size=48)
    make_phantoms(tmp_path / "three", 3, 5, size=48)
    make_phantoms(tmp_path / "two", 2, 5, size=48)
    two, three = bytes_under(tmp_path / "two"), bytes_under(tmp_path / "three")
    assert three.pop("questions.jsonl").startswith(two.pop("questions.jsonl"))
    assert len(two) > 20
    assert all(three[name] == content for name, content in two.items())


def test_another_seed_gives_other_phantoms_and_does_not_mix_with_these(tmp_path):
    assert draw_phantom(1, 0, 48).scan.geometry != draw_phantom(2, 0, 48).scan.geometry
    make_phantoms(tmp_path, 1, 1, size=48)
    with pytest.raises(FileExistsError, match="phantom-1-0000"):
        make_phantoms(tmp_path, 1, 2, size=48)


def test_the_size_of_voxels_changes_no_answer_and_moves_no_organ(tmp_path):
    coarse, fine = (make_phantoms(tmp_path / str(size), 3, 7, size=size) for size in (72, 120))
    assert [p.questions for p in coarse] == [p.questions for p in fine]
    for phantom in coarse:
        row = phantom.questions[0]
        centres = [
            world_lps(tmp_path / size, row, mask_of(tmp_path / size, row, "liver")).mean(axis=0)
            for size in ("72", "120")
        ]
        assert np.abs(centres[0] - centres[1]).max() < 0.5


def test_two_scans_of_a_patient_show_one_body(drawn):
    one, two = rows_of(drawn, "existence")[0], rows_of(drawn, "existence")[5]
    assert one["patient"] == two["patient"] and one["volume"] != two["volume"]
    heart_one, heart_two = (world_lps(drawn, row, mask_of(drawn, row, "heart")).mean(axis=0) for row in (one, two))
    assert np.abs(heart_one - heart_two).max() < 1.5


def test_nibabel_and_simpleitk_find_a_voxel_at_the_same_place(drawn):
    sheared = 0
    for path in scan_paths(drawn):
        scan = nibabel.load(path)
        directions = scan.affine[:3, :3] / np.linalg.norm(scan.affine[:3, :3], axis=0)
        if not np.allclose(directions.T @ directions, np.eye(3), atol=1e-3):
            sheared += 1
            assert scan.header["sform_code"] == 1 and scan.header["qform_code"] == 0
            continue
        image = sitk.ReadImage(str(path))
        assert image.GetSize() == scan.shape
        for index in ((0, 0, 0), tuple(n - 1 for n in scan.shape), (3, 11, 7)):
            expected = nibabel.affines.apply_affine(scan.affine, index) * (-1, -1, 1)
            assert np.allclose(image.TransformIndexToPhysicalPoint(index), expected, atol=2e-3)
            assert image[index] == pytest.approx(scan.dataobj[index], abs=1e-3)
    assert 1 <= sheared <= 3


def test_masks_lie_on_their_scan(drawn):
    for path in scan_paths(drawn):
        scan = nibabel.load(path)
        for mask_path in (drawn / "masks" / path.name.split(".")[0]).iterdir():
            mask = nibabel.load(mask_path)
            assert mask.shape == scan.shape and mask.get_data_dtype() == np.uint8
            assert np.array_equal(mask.affine, scan.affine)


def test_scans_are_as_mixed_as_the_worlds(drawn):
    scans = [nibabel.load(path) for path in scan_paths(drawn)]
    assert len({path.name.split(".")[0] for path in scan_paths(drawn)}) == len(scans) == 12
    assert {path.suffix for path in scan_paths(drawn)} == {".gz", ".nii"}
    assert {str(scan.get_data_dtype()) for scan in scans} == {"int16", "uint16", "uint8", "float32"}
    assert len({nibabel.aff2axcodes(scan.affine) for scan in scans}) >= 8
    zooms = [np.sort(scan.header.get_zooms()) for scan in scans]
    extents = [np.sort(np.array(scan.shape) * scan.header.get_zooms()) for scan in scans]
    assert max(e[2] for e in extents) > 400 and min(e[0] for e in extents) < 330
    assert len({round(float(z[2]), 2) for z in zooms}) >= 4
    oblique = [np.count_nonzero(np.abs(scan.affine[:3, :3]) > 1e-3) > 3 for scan in scans]
    assert 3 <= sum(oblique) <= 8


def test_every_scan_shows_air_tissue_and_noise_in_hounsfield_units(drawn):
    for path in scan_paths(drawn):
        hu = nibabel.load(path).get_fdata()
        air = hu[np.abs(hu + 1000) < 150]
        assert air.size > 0.1 * hu.size, path.name
        assert abs(np.median(air) + 1000) < 5 and hu.min() >= -1024, path.name
        assert np.mean(np.abs(hu) < 200) > 0.1, path.name
        liver = np.asarray(nibabel.load(drawn / "masks" / path.name.split(".")[0] / "liver.nii.gz").dataobj) == 1
        assert 60 < np.median(hu[liver]) < 140 and np.std(hu[liver]) > 5, path.name


def test_progress_is_told_after_each_phantom(tmp_path):
    told = []
    made = make_phantoms(tmp_path, 2, 9, size=48, progress=lambda phantom: told.append(phantom.slot.volume))
    assert told == [phantom.slot.volume for phantom in made] == ["phantom-9-0000", "phantom-9-0001"]
    assert all(phantom.scan_path(tmp_path).exists() for phantom in made)


@pytest.fixture(scope="module")
def easy(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("easy")
    make_phantoms(directory, 12, 1, size=64, easy=True)
    return directory


def test_easy_findings_fill_their_organs_or_are_not_there(easy):
    questions = rows_of(easy, "existence")
    assert Counter(row["answer"] for row in questions) == {"yes": 12, "no": 12}
    for row in questions:
        there = (easy / "masks" / row["volume"] / f"{row['lesion']}.nii.gz").exists()
        assert there == (row["answer"] == "yes")
        if there:
            organs = sum(mask_of(easy, row, organ) for organ in row["organ_masks"])
            assert np.array_equal(mask_of(easy, row, row["lesion"]) > 0, organs > 0)


def test_captions_of_training_volumes_say_what_the_questions_ask_each_finding_first_once():
    phantoms = [draw_phantom(2, index, 64, easy=True) for index in range(24)]
    for phantom in phantoms:
        captions = [row["answer"].split(", ") for row in phantom.questions if row["kind"] == "caption"]
        told = {
            f"{row['lesion'].replace('_', ' ')} {row['answer']}"
            for row in phantom.questions
            if row["kind"] == "existence"
        }
        assert len(captions) == (len(told) if phantom.slot.split == "train" else 0)
        assert all(set(caption) == told for caption in captions)
        assert {caption[0] for caption in captions} == (told if captions else set())
    assert {phantom.slot.split for phantom in phantoms} == {"train", "val", "test"}


def test_small_evidence_is_a_fifth_of_a_token_and_the_larger_of_two_lesions_is_named():
    phantoms = [draw_phantom(4, index, 64, small=True) for index in range(120)]
    answers = Counter()
    for phantom in phantoms:
        first = [layer for layer in phantom.layers if layer.label == 1 and layer.diameter_mm]
        largest = {layer.structure: layer.diameter_mm for layer in first}
        assert all(np.pi / 6 * mm**3 < 0.22 * (364 / 5) ** 3 for mm in largest.values())
        asked = [row for row in phantom.questions if row["kind"] == "comparison"]
        assert len(asked) == (len(largest) == 2)
        for row in asked:
            noun = {"lung_nodule": "lung nodule", "liver_lesion": "liver lesion"}[max(largest, key=largest.get)]
            assert (row["answer"], sorted(row["choices"])) == (noun, ["liver lesion", "lung nodule"])
            answers[noun] += 1
        assert {row["kind"] for row in phantom.questions} <= {"existence", "side", "size", "comparison"}
    assert min(answers.values()) >= 10
