"""One source to its record: which stores are made again, and which are recognised, under which policy."""

import hashlib
import json
from dataclasses import replace

import nibabel
import numpy as np
import pytest
from raw import write_scan
from scans import ct_like

from photon_data import open_volume
from photon_data.errors import Refused, UsageError
from photon_data.files import Location
from photon_data.prepare_file import Job, fingerprint, opened, prepare, prepare_file, prepare_volume, recipe_digest
from photon_data.readers.find import find_scans
from photon_data.recipe import Policy, Recipe
from photon_data.records import store_name
from photon_data.store import CHECKSUMS, OWN_DIGEST, write_store
from photon_data.volume import Geometry, Volume

SMALL = Recipe(shape_zyx=(40, 32, 32), model_shape_zyx=(14, 28, 28))


def job_of(path, out, **more):
    return Job(find_scans(path).sources[0], str(out), SMALL, **more)


def conflicting(path):
    """A scan whose qform lies 30 mm above its sform."""
    image = nibabel.load(write_scan(path))
    moved = image.affine.copy()
    moved[2, 3] += 30
    image.set_qform(moved, 1)
    nibabel.save(image, path)
    return path


def with_nan(path):
    array = ct_like((16, 24, 28)).astype(np.float32)
    array[3, 4, 5] = np.nan
    return write_scan(path, array=array)


def bright(path):
    """Intensities of a magnetic resonance image: none is negative."""
    return write_scan(path, array=np.random.default_rng(0).integers(0, 255, (16, 24, 28)).astype(np.uint8))


CASES = {
    "affine": (conflicting, {"nifti_affine": "sform"}, "affine-conflict"),
    "other affine": (conflicting, {"nifti_affine": "qform"}, "affine-conflict"),
    "fill": (with_nan, {"non_finite": "fill"}, "non-finite"),
    "other": (bright, {"modality": "other"}, "hu-implausible"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_choice_makes_only_the_scan_anew_for_which_it_matters(tmp_path, case):
    make, choice, code = CASES[case]
    usual, chosen = Policy(), Policy(**choice)
    good = job_of(write_scan(tmp_path / "good.nii.gz"), tmp_path)
    odd = job_of(make(tmp_path / "odd.nii.gz"), tmp_path)
    assert (prepare_file(good).state, prepare_file(odd).code) == ("prepared", code)
    assert prepare_file(replace(good, policy=chosen)).state == "unchanged"
    made = prepare_file(replace(odd, policy=chosen))
    assert (made.state, made.facts["policy"]) == ("prepared", choice)
    assert prepare_file(replace(odd, policy=chosen)).state == "unchanged"
    assert prepare_file(replace(odd, policy=usual)).code == code  # its store is no store under this policy
    assert "policy" not in prepare_file(replace(good, policy=usual)).facts


def test_another_affine_is_another_store(tmp_path):
    job = job_of(conflicting(tmp_path / "a.nii.gz"), tmp_path)
    lowest = {}
    for affine in ("sform", "qform", "sform"):
        record = prepare_file(replace(job, policy=Policy(nifti_affine=affine)))
        assert record.state == "prepared"
        lowest[affine] = open_volume(tmp_path / record.store).geometry.origin_lps[2]
    assert lowest["qform"] - lowest["sform"] == pytest.approx(30)


@pytest.mark.parametrize("policy", [{}, {"non_finite": "fill"}, {"modality": "other", "nifti_affine": "sform"}])
def test_stores_whose_recipe_still_held_a_policy_are_recognised_under_that_policy(tmp_path, policy):
    """Recipes had the fields of a policy until d443086, and digests and resume keys were made as here."""
    job = job_of(with_nan(tmp_path / "a.nii.gz"), tmp_path, policy=Policy(**{"non_finite": "fill", **policy}))
    recipe = {**SMALL.to_json(), "modality": "ct", "non_finite": "fill", "nifti_affine": "auto", **policy}
    del recipe["centre"]  # is younger
    settings = {key: value for key, value in recipe.items() if key not in ("name", "instruction")}
    digest = hashlib.sha256(json.dumps([2, settings], sort_keys=True).encode()).hexdigest()[:16]
    content = fingerprint(job.source.files)
    key = hashlib.sha256(json.dumps([content, digest, None, 2]).encode()).hexdigest()
    prepared = prepare_volume(opened(job), SMALL, job.policy)
    prepared.facts.pop("policy")
    identity = {"id": "a", "key": key, "fingerprint": content, "recipe": recipe, "digest": digest}
    write_store(prepared, Location(str(tmp_path)), store_name("a"), identity)
    assert prepare_file(job).state == "unchanged"
    assert prepare_file(replace(job, policy=Policy())).code == "non-finite"
    assert prepare_file(replace(job, recipe=replace(SMALL, pad_hu=-900.0))).state == "prepared"


def test_of_an_early_store_that_was_smoothed_the_digest_is_its_own():
    recipe = Recipe(antialias=True).to_json() | {"modality": "other"}
    assert recipe_digest({"recipe": recipe, "digest": "of then"}) == "of then"


@pytest.mark.parametrize(("low", "state"), [(-1024, "unchanged"), (-1490, "prepared"), (-3024, "prepared")])
def test_of_the_stores_that_counted_no_padding_only_those_that_have_some_are_made_anew(tmp_path, low, state):
    array = ct_like((16, 24, 28))
    array[:, 0, :] = low
    job = job_of(write_scan(tmp_path / "a.nii.gz", array=array), tmp_path)
    record = prepare_file(job)
    root = tmp_path / record.store / "zarr.json"
    metadata = json.loads(root.read_text())
    ours = metadata["attributes"]["photon"]
    del ours["facts"]["padding_voxels"], ours["recipe"]["centre"], ours[OWN_DIGEST], ours[CHECKSUMS]
    ours["facts"].pop("undeclared_padding_hu", None)  # nobody looked
    ours["key"] = hashlib.sha256(json.dumps([record.fingerprint, SMALL.digest, None, 2]).encode()).hexdigest()
    root.write_text(json.dumps(metadata))
    assert [prepare_file(job).state for _ in range(2)] == [state, "unchanged"]


@pytest.mark.parametrize(("name", "value"), [("recipe", "text"), ("recipe", None), ("facts", []), ("key", 3)])
def test_a_store_whose_metadata_are_damaged_is_made_again(tmp_path, name, value):
    job = job_of(write_scan(tmp_path / "a.nii.gz"), tmp_path)
    root = tmp_path / prepare_file(job).store / "zarr.json"
    metadata = json.loads(root.read_text())
    metadata["attributes"]["photon"][name] = value
    root.write_text(json.dumps(metadata))
    assert prepare_file(job).state == "prepared"
    assert prepare_file(job).state == "unchanged"


def test_a_scan_is_prepared_in_memory_to_the_bytes_of_its_store(tmp_path):
    path = write_scan(tmp_path / "raw" / "a.nii.gz")
    record = prepare_file(job_of(path, tmp_path))
    prepared = prepare(path, SMALL)
    for grid, volume in (("volume", prepared.volume), ("model", prepared.model)):
        stored = open_volume(tmp_path / record.store, grid)
        assert stored.geometry == volume.geometry
        assert np.array_equal(stored.numpy(), volume.numpy())


def test_a_volume_in_memory_is_prepared_as_its_file_is(tmp_path):
    array = ct_like((16, 24, 28))
    path = write_scan(tmp_path / "raw" / "a.nii.gz", array=array, affine=np.diag([-0.875, -1.125, 2.0, 1.0]))
    volume = Volume(array, Geometry.from_arrays(array.shape, (0, 0, 0), [[0, 0, 2.0], [0, 1.125, 0], [0.875, 0, 0]]))
    assert np.array_equal(prepare(volume, SMALL).volume.numpy(), prepare(path, SMALL).volume.numpy())


@pytest.mark.parametrize("scans", [0, 2])
def test_several_scans_or_none_are_not_prepared_as_one(tmp_path, scans):
    for seed in range(scans):
        write_scan(tmp_path / f"{seed}.nii.gz", seed)
    with pytest.raises(UsageError, match=f"expected one scan, found {scans}"):
        prepare(tmp_path)


def test_what_must_not_become_a_store_is_refused_in_memory_too(tmp_path):
    with pytest.raises(Refused, match="Hounsfield units"):
        prepare(bright(tmp_path / "a.nii.gz"), SMALL)
