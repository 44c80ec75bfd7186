"""Slices at uneven distances, and missing ones: resampled on their true positions, if a person accepts that."""

from dataclasses import replace

import numpy as np
import pytest
from dicom_files import AXIAL, OBLIQUE, normal_of, write_series

from photon_data.errors import Refused, UsageError
from photon_data.prepare_file import Job, prepare, prepare_file
from photon_data.readers.find import find_scans
from photon_data.recipe import Policy, Recipe, accepted

REPAIR = Policy(modality="other", repair_slices=3)
COLUMN = Recipe(spacing_mm=(1.0, 1.0, 1.0), shape_zyx=(7, 4, 4), model_shape_zyx=(7, 4, 4))


def series(folder, positions_mm, values, shape=(4, 4), **more):
    """Write slices of one value each, 1 mm pixels, at positions along the normal from z = 100 mm on."""
    stored = np.broadcast_to(np.array(values, np.int16)[:, None, None], (len(values), *shape))
    normal = normal_of(more.get("orientation", AXIAL))

    def place(ds, z):
        ds.ImagePositionPatient = [f"{v:.9g}" for v in np.array((-30.0, -40.0, 100.0)) + positions_mm[z] * normal]

    options = {"spacing_mm": (1, 1), "rescale": (1, 0), "edit": place, **more}
    write_series(folder, np.ascontiguousarray(stored), **options)
    return folder


def refused(folder, policy=REPAIR):
    with pytest.raises(Refused) as caught:
        prepare(folder, COLUMN, policy)
    return caught.value


# Positions in mm and values of slices, and by hand the values on a grid of 1 mm.
BY_HAND = {
    "two missing": ([0, 1, 2, 5, 6], [10, 20, 40, 100, 0], [10, 20, 40, 60, 80, 100, 0]),
    "two places": ([0, 2, 3, 4, 6], [0, 10, 30, 30, -50], [0, 5, 10, 30, 30, -10, -50]),
    "uneven": ([0, 1, 2, 3.3, 4.1, 5, 6], [0, 0, 0, 130, 210, 300, 7], [0, 0, 0, 100, 200, 300, 7]),
    "finer at one end": ([0, 0.5, 1, 1.5, 2, 3, 4, 5, 6], [9, 1, 8, 1, 7, 6, 5, 4, 3], [9, 8, 7, 6, 5, 4, 3]),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_a_repaired_series_has_the_values_between_true_neighbours(tmp_path, case):
    positions, values, expected = BY_HAND[case]
    folder = series(tmp_path / "s", positions, values)
    prepared = prepare(folder, COLUMN, REPAIR)
    assert prepared.volume.numpy()[:, 2, 1].tolist() == expected
    assert (prepared.volume.numpy() == prepared.volume.numpy()[:, :1, :1]).all()
    assert prepared.volume.geometry.origin_lps[2] == pytest.approx(100)
    # Half a voxel of the grid, which may be finer than the usual distance, is around the outer slices.
    assert prepared.facts["cut_mm"]["z"] == [0, 0] and max(prepared.facts["pad_mm"]["z"]) <= 0.25


def test_what_was_found_and_what_was_made_is_recorded(tmp_path):
    facts = prepare(series(tmp_path / "s", [0, 1, 2, 5, 6], [10, 20, 40, 100, 0]), COLUMN, REPAIR).facts
    assert facts["policy"] == {"repair_slices": 2, "repair_gap_mm": 3.0, "modality": "other"}
    assert facts["slices"]["positions_mm"] == [100, 101, 102, 105, 106]
    assert (facts["slices"]["distance_mm"], facts["slices"]["gaps"]) == (1.0, ((102.0, 105.0, 2),))
    assert facts["slices"]["voxels_in_gaps"] == 2 * 4 * 4
    assert facts["hu_before"]["mean"] == 34  # of the five slices that there are
    change, _ = facts["changes"]
    assert change["code"] == "dicom-missing-slices"
    assert "3.00 mm between 102.00 and 105.00 mm" in change["before"]
    assert "2 missing slices in 1 gap(s), 3.00 mm at most" in change["after"]


def test_voxels_in_gaps_are_counted_within_the_scan_alone(tmp_path):
    folder = series(tmp_path / "s", [0, 1, 2, 5, 6], [10, 20, 40, 100, 0])
    wide = replace(COLUMN, shape_zyx=(7, 10, 10), spacing_mm=(0.5, 1, 1))  # z 101.5 to 104.5, y and x beyond the scan
    assert prepare(folder, wide, REPAIR).facts["slices"]["voxels_in_gaps"] == 5 * 4 * 4  # 102.5 to 104.5


ORIENTATIONS = {"axial": {}, "oblique": {"orientation": OBLIQUE}, "coronal": {"orientation": (1, 0, 0, 0, 0, -1)}}


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("way", ORIENTATIONS)
def test_a_ramp_with_missing_slices_is_the_ramp_of_the_whole_series(tmp_path, way, antialias):
    ramp = np.arange(20) * 25 - 200
    there = [z for z in range(20) if z not in (3, 8, 9, 15, 16, 17)]
    whole = series(tmp_path / "whole", np.arange(20) * 1.5, ramp, (24, 20), **ORIENTATIONS[way])
    part = series(tmp_path / "part", np.array(there) * 1.5, ramp[there], (24, 20), **ORIENTATIONS[way])
    recipe = Recipe(spacing_mm=(1.6, 1.2, 1.1), shape_zyx=(24, 20, 22), model_shape_zyx=(7, 4, 4), antialias=antialias)
    expected, found = prepare(whole, recipe, Policy(modality="other")), prepare(part, recipe, REPAIR)
    assert found.volume.geometry == expected.volume.geometry
    assert len(np.unique(expected.volume.numpy())) > 15
    assert np.abs(found.volume.numpy().astype(int) - expected.volume.numpy()).max() <= 1
    assert found.facts["slices"]["voxels_in_gaps"] > 0
    assert "slices" not in expected.facts


def test_a_tilted_gantry_with_missing_slices_keeps_its_shear(tmp_path):
    values = np.random.default_rng(0).integers(-500, 500, (12, 20, 18)).astype(np.int16)
    there, step = [0, 1, 2, 3, 6, 7, 8, 9, 10, 11], (0.0, 0.6, 2.0)
    write_series(tmp_path / "whole", values, step_lps=step, rescale=(1, 0))
    write_series(tmp_path / "part", values, step_lps=step, rescale=(1, 0), slices=there)
    recipe = Recipe(spacing_mm=(2.0, 1.0, 1.0), shape_zyx=(12, 20, 18), model_shape_zyx=(7, 4, 4))
    whole, part = (prepare(tmp_path / name, recipe, REPAIR) for name in ("whole", "part"))
    assert part.facts["geometry"] == whole.facts["geometry"]
    outside = [0, 1, 2, 3, 6, 7, 8, 9, 10, 11]  # of the gap: planes of the grid that lie on slices
    assert np.array_equal(part.volume.numpy()[outside], whole.volume.numpy()[outside])


@pytest.mark.parametrize("marked", [0, 2, 3, 5])
def test_a_marked_slice_keeps_its_world_position(tmp_path, marked):
    positions, values = [0, 2, 4, 10, 12, 14], np.zeros(6, int)
    values[marked] = 900
    folder = series(tmp_path / "s", positions, values)
    volume = prepare(folder, replace(COLUMN, shape_zyx=(31, 4, 4), spacing_mm=(0.5, 1, 1)), REPAIR).volume
    brightest = np.flatnonzero(volume.numpy()[:, 1, 1] == 900)
    world = volume.geometry.world([(z, 1, 1) for z in brightest])[:, 2]
    assert np.abs(world - 100 - positions[marked]).max() <= 1  # the outer half voxel repeats the edge


def test_the_body_is_found_where_it_is(tmp_path):
    def write(name, there):
        hu = np.full((30, 40, 40), -1000, np.int16)
        hu[8:25, 10:30, 12:28] = 40
        return write_series(tmp_path / name, hu, spacing_mm=(2, 2), step_lps=(0, 0, 2), rescale=(1, 0), slices=there)

    write("whole", range(30)), write("part", [z for z in range(30) if z not in (3, 4, 15)])
    recipe = Recipe(spacing_mm=(2, 2, 2), shape_zyx=(30, 40, 40), model_shape_zyx=(7, 4, 4), centre="body")
    whole, part = (prepare(tmp_path / name, recipe, replace(REPAIR, modality="ct")) for name in ("whole", "part"))
    assert np.abs(np.subtract(part.facts["body_mm"]["z"], whole.facts["body_mm"]["z"])).max() <= 4  # its own step


def test_without_the_flag_it_is_refused_and_the_sentence_names_the_flag(tmp_path):
    folder = series(tmp_path / "s", [0, 1, 2, 5, 6], [0, 1, 2, 3, 4])
    found = refused(folder, Policy(modality="other"))
    assert (found.code, found.accept) == ("dicom-missing-slices", "dicom-missing-slices")
    assert "--repair slices resamples" in found.message
    assert refused(folder, replace(REPAIR, repair_slices=1)).code == "dicom-missing-slices"
    assert prepare(folder, COLUMN, replace(REPAIR, repair_slices=2)).facts["policy"]["repair_slices"] == 2
    assert refused(folder, replace(REPAIR, repair_gap_mm=2.9)).accept == ""


# Positions in mm, and what would accept them: nothing where the repair could be wrong.
REFUSED = {
    "five missing": ([0, 1, 2, 8, 9, 10], "dicom-missing-slices=5"),
    "12 mm": ([0, 4, 8, 20, 24], ""),
    "two volumes, one between the other": ([0, 1, 2, 2.4, 3, 3.4, 4, 4.4, 5, 6], ""),
    "a stray slice": ([0, 1, 2, 2.5, 3, 4, 5], ""),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_made_up_or_may_be_two_volumes_stays_refused(tmp_path, case):
    positions, accept = REFUSED[case]
    found = refused(series(tmp_path / "s", positions, range(len(positions))))
    assert (found.code, found.accept) == ("dicom-missing-slices", accept)


@pytest.mark.parametrize(
    ("positions", "code"), [([0, 1, 1, 2, 3, 6, 7], "dicom-duplicate-slices"), ([0, 0, 1, 1], "several-volumes")]
)
def test_other_faults_stay_refused_with_the_flag(tmp_path, positions, code):
    assert refused(series(tmp_path / "s", positions, np.arange(len(positions)) * 3)).code == code


def test_slices_beside_the_line_stay_refused_with_the_flag(tmp_path):
    def aside(ds, z):
        ds.ImagePositionPatient = ["0", "3" if z == 2 else "0", str([0, 1, 2, 5, 6][z])]

    folder = tmp_path / "s"
    write_series(folder, np.zeros((5, 4, 4), np.int16), spacing_mm=(1, 1), edit=aside)
    assert refused(folder).code == "dicom-mixed"


def test_a_repair_makes_only_the_scan_anew_that_has_the_fault_and_a_wider_bound_makes_none(tmp_path):
    good = series(tmp_path / "raw" / "good", range(7), range(7))
    odd = series(tmp_path / "raw" / "odd", [0, 1, 2, 5, 6], [10, 20, 40, 100, 0])
    jobs = [Job(find_scans(folder).sources[0], str(tmp_path / "out"), COLUMN) for folder in (good, odd)]
    jobs = [replace(job, source=replace(job.source, id=name)) for job, name in zip(jobs, ("good", "odd"), strict=True)]

    def states(policy):
        return [prepare_file(replace(job, policy=policy)).state for job in jobs]

    assert states(Policy(modality="other")) == ["prepared", "refused"]
    assert states(REPAIR) == ["unchanged", "prepared"]
    assert states(replace(REPAIR, repair_slices=2, repair_gap_mm=3.0)) == ["unchanged", "unchanged"]
    assert states(replace(REPAIR, repair_slices=9)) == ["unchanged", "unchanged"]
    assert states(replace(REPAIR, repair_slices=1)) == ["unchanged", "refused"]
    assert states(replace(REPAIR, repair_slices=-1)) == ["unchanged", "refused"]


def test_codes_become_fields_of_the_policy():
    codes = ["non-finite", "affine-conflict=qform", "dicom-missing-slices", "hu-implausible", "too-large=5"]
    expected = {"non_finite": "fill", "nifti_affine": "qform", "repair_slices": 3, "modality": "other", "max_voxels": 5}
    assert accepted(codes) == expected
    assert accepted(["dicom-missing-slices=0"]) == {"repair_slices": 0}


@pytest.mark.parametrize(
    ("codes", "said"),
    [
        (["truncated"], "expected a code that can be accepted, found 'truncated'"),
        (["non-finit"], "did you mean 'non-finite'"),
        (["affine-conflict"], "expected affine-conflict=sform or qform"),
        (["affine-conflict=?"], "a person has to choose"),
        (["affine-conflict=auto"], "accepts nothing"),
        (["dicom-missing-slices=many"], "a whole number"),
        (["dicom-missing-slices=-1"], "accepts nothing"),
        (["affine-conflict=sform", "affine-conflict=qform"], "expected one value"),
    ],
)
def test_a_code_that_cannot_be_accepted_says_why(codes, said):
    with pytest.raises(UsageError, match=said.replace("(", r"\(")):
        accepted(codes)
