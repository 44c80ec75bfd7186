"""Padding of any value is air before anything is interpolated, wherever it is declared; undeclared, where it is far
below air or refused.
"""

from dataclasses import replace

import nibabel
import numpy as np
import pytest
from dicom_files import write_series
from reading import open_file
from scans import as_scan, ct_like, frame

import photon_data
from photon_data.errors import Refused
from photon_data.hounsfield import has_padding, lacks_undeclared
from photon_data.prepare_file import Job, prepare_file, prepare_volume
from photon_data.recipe import Policy, Recipe
from photon_data.records import VolumeRecord
from photon_data.report import all_remarks
from photon_data.scan import Rescale, Source, names_below

SHAPE = (12, 40, 44)
RECIPE = Recipe(shape_zyx=(30, 36, 40), model_shape_zyx=(14, 28, 28))
Y, X = np.mgrid[-1 : 1 : SHAPE[1] * 1j, -1 : 1 : SHAPE[2] * 1j]
CIRCLE = np.broadcast_to(X**2 + Y**2 > 0.8, SHAPE)  # cuts into the body: padding lies beside tissue
METAL = np.zeros(SHAPE, bool)
METAL[5:8, 18:21, 20:24] = True


def body():
    hu = ct_like(SHAPE).clip(-1000, 3000)
    hu[hu == 0] = 1  # beside the circle it could not be told from padding
    hu[METAL] = 3071
    hu[METAL[::-1]] = 0
    return hu


def series(folder, hu, padding, dtype=np.uint16, bits=16, slices=None, intercept=-1024, syntax="explicit", **tags):
    """Write HU as a series whose circle holds the stored value(s) `padding`, declared by `tags` in those `slices`."""
    stored = (hu.astype(int) - intercept).astype(dtype)
    stored[CIRCLE] = np.broadcast_to(np.asarray(padding).astype(dtype), SHAPE)[CIRCLE]

    def edit(ds, z):
        for keyword, value in tags.items() if slices is None or z in slices else ():
            ds.add_new(keyword, "SS" if value < 0 else "US", value)

    write_series(folder, stored, rescale=(1, intercept), bits=bits, edit=edit, syntax=syntax)
    return folder


def prepared(folder):
    return photon_data.prepare(folder, RECIPE)


def cut_out():
    """What the volume is where the circle is air."""
    return np.where(CIRCLE, -1000, body())


VALUE, LIMIT = "PixelPaddingValue", "PixelPaddingRangeLimit"
IN_TWO = np.where(np.arange(SHAPE[2]) % 2, 60000, 63536)


@pytest.mark.parametrize(
    ("padding", "options", "tags"),
    [
        (63536, {}, {VALUE: 63536}),
        (63536, {"dtype": np.int16}, {VALUE: 63536}),  # written as unsigned: -2000
        (-2000, {"dtype": np.int16}, {VALUE: -2000}),
        (-2000, {"dtype": np.int16, "syntax": "implicit"}, {VALUE: -2000}),
        (63536, {"syntax": "big-endian"}, {VALUE: 63536}),
        (63536, {"syntax": "jpeg-lossless"}, {VALUE: 63536}),
        (63536, {"bits": 12}, {VALUE: 63536}),  # in bits that are not stored
        (4095, {"bits": 12}, {VALUE: 4095}),  # as metal
        (0, {}, {VALUE: 0}),
        (1024, {}, {VALUE: 1024}),  # as water
        (500, {"dtype": np.int16, "intercept": 0}, {VALUE: 500}),  # as bone
        (63536, {"slices": [0, 4]}, {VALUE: 63536}),
        (IN_TWO, {}, {VALUE: 60000, LIMIT: 63536}),
        (IN_TWO, {}, {VALUE: 63536, LIMIT: 60000}),
    ],
)
def test_declared_padding_is_air_before_it_is_interpolated_and_metal_stays(tmp_path, padding, options, tags):
    result = prepared(series(tmp_path / "s", body(), padding, **options, **tags))
    scan = open_file(tmp_path / "s")
    expected = prepare_volume(as_scan(cut_out(), scan.geometry), RECIPE)
    difference = np.abs(result.volume.array_zyx.astype(int) - expected.volume.array_zyx)
    assert difference.max() <= 1 and difference.mean() < 1e-3  # a half is rounded either way
    assert result.facts["padding_voxels"] == CIRCLE.sum()
    assert result.facts["hu_before"]["max"] == 3071
    assert np.array_equal(photon_data.read(tmp_path / "s").array_zyx, cut_out())


def test_two_slices_may_declare_two_values_and_every_slice_may_hold_either(tmp_path):
    stored = (body().astype(int) + 1024).astype(np.uint16)
    stored[CIRCLE] = np.broadcast_to(IN_TWO, SHAPE)[CIRCLE]

    def edit(ds, z):
        if z in (2, 9):
            ds.add_new(VALUE, "US", 60000 if z == 2 else 63536)

    write_series(tmp_path, stored, edit=edit)
    assert np.array_equal(photon_data.read(tmp_path).array_zyx, cut_out())


def test_slices_with_slopes_of_their_own_are_padded_too_and_take_no_other_slope(tmp_path):
    slopes = [(1, -1024) if z % 2 else (0.5, -1024) for z in range(SHAPE[0])]
    stored = np.stack([(plane.astype(int) + 1024) / slope for plane, (slope, _) in zip(body(), slopes, strict=True)])
    stored = stored.astype(np.uint16)
    stored[CIRCLE] = 63536
    write_series(tmp_path, stored, rescale=slopes, edit=lambda ds, z: ds.add_new(VALUE, "US", 63536))
    assert np.array_equal(photon_data.read(tmp_path).array_zyx, cut_out())
    assert prepared(tmp_path).facts["padding_voxels"] == CIRCLE.sum()
    for rescale in (Rescale(1.0, 0.0, "stored"), Rescale(1.0, -1024.0, "table")):
        with pytest.raises(Refused, match="slices with several; leave --hu-source out") as refusal:
            prepare_volume(open_file(tmp_path), RECIPE, Policy(modality="other"), rescale)
        assert refusal.value.code == "rescale"


def test_raw_values_do_not_pass_as_hu_because_of_their_padding(tmp_path):
    series(tmp_path, body() + 1024, 63536, intercept=0, **{VALUE: 63536})
    with pytest.raises(Refused, match="never applied"):
        prepared(tmp_path)
    series(tmp_path, body(), np.zeros(SHAPE), **{VALUE: 0, LIMIT: 65535})
    with pytest.raises(Refused, match="nothing but declared padding"):
        prepared(tmp_path)


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("slope", [1.0, -1.0])
def test_undeclared_padding_far_below_air_does_not_reach_into_tissue(dtype, turned, slope):
    rng = np.random.default_rng(0)
    padding = rng.choice([-2000, -3024, -8192], SHAPE) + rng.integers(-1, 2, SHAPE)
    array = (np.where(CIRCLE, padding, body()) / slope).astype(dtype)
    native = frame(SHAPE, spacing_mm=(2.5, 0.8, 0.7))
    if turned:
        native = replace(native, steps_lps=((0, 0.5, 2.5), *native.steps_lps[1:]))
    recipe = replace(RECIPE, window_hu=(-900.0, 900.0), pad_hu=-900.0)
    found = prepare_volume(as_scan(array, native, slope), recipe)
    clipped = np.where(CIRCLE, -900, body()).astype(dtype)
    expected = prepare_volume(as_scan(clipped, native), recipe)
    assert np.array_equal(found.volume.array_zyx, expected.volume.array_zyx)
    assert found.facts["padding_voxels"] == CIRCLE.sum()
    assert found.facts["hu_before"]["min"] < -8000


@pytest.mark.parametrize(
    ("hu", "dtype"), [(-1100, np.int16), (-1200, np.uint16), (-1400, np.float32), (-1499, np.int16)]
)
@pytest.mark.parametrize("turned", [False, True])
def test_one_value_alone_below_air_is_undeclared_padding_and_does_not_reach_into_tissue(hu, dtype, turned):
    native = frame(SHAPE, spacing_mm=(2.5, 0.8, 0.7))
    if turned:
        native = replace(native, steps_lps=((0, 0.5, 2.5), *native.steps_lps[1:]))
    shift = -2000 if dtype == np.uint16 else 0
    array = (np.where(CIRCLE, hu, body()) - shift).astype(dtype)
    found = prepare_volume(as_scan(array, native, 1.0, shift), RECIPE, grids="full")
    expected = prepare_volume(as_scan((cut_out() - shift).astype(dtype), native, 1.0, shift), RECIPE, grids="full")
    for grid in ("volume", "model", "full"):
        assert np.array_equal(getattr(found, grid).numpy(), getattr(expected, grid).numpy())
    assert found.facts["undeclared_padding_hu"] == hu
    assert found.facts["padding_voxels"] == CIRCLE.sum()
    assert found.facts["hu_before"]["min"] == hu
    record = VolumeRecord("a", "a", "prepared", 1, 1, facts=found.facts)
    assert any(f"undeclared padding: {hu} HU was made air" in remark for remark in all_remarks(record))
    assert "undeclared_padding_hu" not in expected.facts


@pytest.mark.parametrize("deviation", [30, 100, 170])
@pytest.mark.parametrize("clipped_at", [-1055, -1100, -1200])
def test_noise_of_air_that_a_scanner_clipped_is_no_padding(deviation, clipped_at):
    noise = np.random.default_rng(0).normal(0, deviation, SHAPE)
    array = (body() + noise).clip(clipped_at).astype(np.int16)
    found = prepare_volume(as_scan(array, frame(SHAPE)), RECIPE)
    assert "undeclared_padding_hu" not in found.facts
    assert found.facts["padding_voxels"] == 0


def test_a_value_below_air_within_the_window_or_of_no_hu_or_of_few_voxels_stays():
    array, native = np.where(CIRCLE, -1200, body()).astype(np.int16), frame(SHAPE)
    few = body()
    few[0, :6, :6] = -1200
    wide = replace(RECIPE, window_hu=(-1300.0, 1000.0))
    for scan, recipe, policy in (
        (array, wide, Policy()),
        (few, RECIPE, Policy()),
        (array - 3000, RECIPE, Policy(modality="other")),
    ):
        found = prepare_volume(as_scan(scan.astype(np.int16), native), recipe, policy)
        assert "undeclared_padding_hu" not in found.facts


def test_noise_of_air_is_interpolated_before_it_is_clipped_as_the_paper_has_it():
    rng = np.random.default_rng(0)
    noisy = (ct_like(SHAPE) + np.rint(rng.normal(0, 100, SHAPE))).clip(-1490, None).astype(np.int16)
    native = frame(SHAPE, spacing_mm=(2.0, 2.0, 2.0), origin_lps=(0.0, 0.0, 0.0))
    half = Recipe(shape_zyx=(1, 1, 1), spacing_mm=(2.0, 2.0, 2.0), model_shape_zyx=(1, 1, 1))
    half = replace(half, shape_zyx=(11, 39, 43))  # halfway between the scan's voxels
    found = prepare_volume(as_scan(noisy, native), half)
    eight = [noisy[z : z + 11, y : y + 39, x : x + 43].astype(float) for z in (0, 1) for y in (0, 1) for x in (0, 1)]
    expected = np.clip(np.mean(eight, axis=0), -1000, 1000)
    assert np.abs(found.volume.array_zyx - expected).max() <= 0.51
    assert found.facts["padding_voxels"] == 0


def test_stores_of_versions_that_interpolated_padding_are_made_anew_and_all_others_are_kept():
    recipe = Recipe()

    def before(low, high, file_format="nifti", **more):
        return {"format": file_format, "hu_before": {"min": low, "max": high}, **more}

    assert has_padding(before(-3024, 1500), recipe)
    assert has_padding(before(-1024, 62512, "dicom"), recipe)
    assert not has_padding(before(-1024, 3000, "dicom"), recipe)
    assert not has_padding(before(-1400, 30000), recipe)
    assert not has_padding(before(-3024, 1500, padding_voxels=0), recipe)
    assert has_padding(before(-1024, 1500, padding_voxels=7), recipe)
    wide = replace(recipe, window_hu=(-4000.0, 1000.0))
    assert not has_padding(before(-3024, 1500), wide)


@pytest.mark.parametrize(
    "statistics",
    [
        {"min": -1200, "p01": -1200},
        {"min": -1400, "p01": -1200},  # noise below it
        {"min": -3024, "p01": -3024},  # and another padding far below
    ],
)
def test_stores_of_versions_that_did_not_look_for_undeclared_padding_are_made_anew_once(tmp_path, statistics):
    job = Job(Source("a", "a", (), "nifti", 1, 1), str(tmp_path), Recipe())
    for padding_voxels in (0, 7):  # of declared padding
        facts = {"format": "nifti", "hu_before": statistics, "padding_voxels": padding_voxels}
        without_statistics = {**facts, "hu_before": {}}
        assert job.key("content", facts) != job.key("content", without_statistics)  # as they made it
        assert lacks_undeclared(facts, job.recipe)
        assert not lacks_undeclared(facts | {"policy": {"modality": "other"}}, job.recipe)
        assert not lacks_undeclared(facts | {"undeclared_padding_hu": -1200}, job.recipe)
        assert not lacks_undeclared(facts, replace(job.recipe, window_hu=(-4000.0, 1000.0)))
    assert not lacks_undeclared({"hu_before": {"min": -1400, "p01": -1024}}, job.recipe)


def test_a_store_with_declared_padding_made_before_undeclared_was_looked_for_is_made_anew(tmp_path, monkeypatch):
    array = np.where(CIRCLE, -1200, body())
    array[0, :6, :6] = -2000  # far below air: padding of every version
    nibabel.save(nibabel.Nifti1Image(array.T.astype(np.int16), np.diag([-1.3, -1.2, 2.7, 1.0])), tmp_path / "a.nii")
    job = Job(Source("a", "a.nii", (str(tmp_path / "a.nii"),), "nifti", 1, 1), str(tmp_path / "out"), RECIPE)
    with monkeypatch.context() as earlier:
        earlier.setattr("photon_data.hounsfield.Probe.undeclared_padding", lambda probe: None)
        earlier.setattr("photon_data.prepare_file.lacks_undeclared", lambda facts, recipe: False)
        old = prepare_file(job)
    new, again = prepare_file(job), prepare_file(job)
    assert [old.state, new.state, again.state] == ["prepared", "prepared", "unchanged"]
    assert old.facts["padding_voxels"] == 36 and new.facts["undeclared_padding_hu"] == -1200
    assert old.arrays_sha256 != new.arrays_sha256


def test_a_padded_scan_is_unchanged_when_it_is_prepared_again(tmp_path):
    series(tmp_path / "raw", body(), 63536, **{VALUE: 63536})
    names = names_below("", sorted((tmp_path / "raw").iterdir()))
    job = Job(Source("a", "a", names, "dicom", 1, 1), str(tmp_path / "out"), RECIPE)
    first, second = prepare_file(job), prepare_file(job)
    assert (first.state, second.state) == ("prepared", "unchanged")
    series(tmp_path / "raw", body(), 4, intercept=-1200)  # as -1196 HU that nobody declares
    third, fourth = prepare_file(job), prepare_file(job)
    assert (third.state, fourth.state) == ("prepared", "unchanged")
    assert fourth.facts["undeclared_padding_hu"] == -1196
    assert first.key != job.key(str(first.fingerprint), {**(first.facts or {}), "padding_voxels": 0})
