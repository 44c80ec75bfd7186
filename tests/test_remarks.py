"""Remarks on a scan are made where they are due, and only there."""

import numpy as np
import pytest

from photon_data.records import PREPARED, REFUSED, VolumeRecord
from photon_data.report import all_remarks, duplicates, reported
from photon_data.volume import Geometry

GRID = Geometry.axis_aligned((364, 364, 364), (1, 1, 1), (0, 0, 0))
GOOD_HU = {"min": -1024.0, "max": 1800.0, "mean": -400.0, "p01": -1010.0, "p50": -300.0, "p99": 400.0, "non_finite": 0}


def record(shape=(300, 512, 512), spacing=(1.0, 0.7, 0.7), *, steps=None, **facts) -> VolumeRecord:
    geometry = Geometry.axis_aligned(shape, spacing, (0, 0, 0))
    if steps is not None:
        geometry = Geometry.from_arrays(shape, (0, 0, 0), steps)
    nothing = {axis: [0.0, 0.0] for axis in "xyz"}
    measured = {
        "geometry": geometry.to_json(),
        "grid": GRID.to_json(),
        "cut_mm": nothing,
        "pad_mm": nothing,
        "hu_before": GOOD_HU,
    }
    return VolumeRecord("a", "a.nii", PREPARED, 1, 1, facts={**measured, "hu_after": GOOD_HU, **facts})


def test_a_sound_scan_has_no_remarks():
    assert all_remarks(record()) == []
    assert reported(record()).attention == 0


@pytest.mark.parametrize("low", [(-1200.0, -1010.0), (-1024.0, -1024.0), (-3024.0, -3024.0)])
def test_noise_below_air_and_values_that_are_air_before_interpolation_have_no_remark(low):
    assert all_remarks(record(hu_before={**GOOD_HU, "min": low[0], "p01": low[1]})) == []


def test_what_was_not_measured_has_no_remarks():
    refused = VolumeRecord("a", "a.nii", REFUSED, 1, 1, code="truncated", reason="cut short")
    assert all_remarks(refused) == [] and reported(refused).attention == 0


@pytest.mark.parametrize(
    ("cut", "remark"),
    [
        ({"x": [0.0, 18.2]}, "18 mm of the scan lie outside of the grid at its left end"),
        ({"y": [12.0, 0.4]}, "12 mm of the scan lie outside of the grid at its front end"),
        ({"z": [24.1, 23.9]}, "24 mm of the scan lie outside of the grid at its foot end, and as much at its head end"),
        ({"z": [10, 30]}, "10 mm of the scan lie outside of the grid at its foot end, and 30 mm at its head end"),
    ],
)
def test_what_is_cut_off_is_said_by_side_of_the_body(cut, remark):
    assert all_remarks(record(cut_mm=cut)) == [remark]


@pytest.mark.parametrize(
    ("of", "remark"),
    [
        ({"spacing": (5.0, 0.7, 0.7)}, "spacing 5.0 mm along z is over three times the in-plane spacing (0.70 mm)"),
        ({"spacing": (6.0, 6.0, 6.0), "shape": (60, 60, 60)}, "spacing 6.0 mm along x is coarse"),
        ({"shape": (5, 512, 512)}, "only 5 slices along z"),
        ({"steps": ((0, 0.3, 1), (0, 0.7, 0), (0.7, 0, 0))}, "its axes are not perpendicular (tilted gantry?)"),
        ({"pad_mm": {"z": [150, 154]}}, "the scan covers 60 of the grid's 364 mm from foot to head"),
        ({"hu_before": {**GOOD_HU, "non_finite": 12}}, "NaN or infinite voxels were filled: 12"),
        (
            {"hu_before": {**GOOD_HU, "min": -1200.0, "p01": -1200.0}},
            "at least 1 % of the voxels are -1200 HU: undeclared padding? It reaches into its neighbours",
        ),
        (
            {"slices": {"gaps": [[1.0, 4.0, 2], [5.0, 6.4, 0], [9.0, 11.0, 1]]}},
            "3 missing slices were interpolated",
        ),
        ({"slices": {"gaps": [[5.0, 6.4, 0]]}}, "its slices lie at uneven distances"),
        ({"hu_before": {**GOOD_HU, "max": 214.0}}, "HU maximum 214 is below 300: no bone?"),
        ({"hu_before": {**GOOD_HU, "min": -200.0}}, "HU minimum -200 is above -900: no air?"),
        ({"hu_before": {**GOOD_HU, "min": 0.0, "max": 0.0}}, "all voxels have the same value, 0"),
        (
            {"hu_after": {**GOOD_HU, "min": -1000.0, "max": -1000.0}},
            "all voxels of the prepared volume have the same value, -1000",
        ),
    ],
)
def test_each_oddity_has_its_remark(of, remark):
    assert remark in all_remarks(record(**of))


def test_a_coarse_axis_is_named_by_the_body_not_by_the_file():
    sagittal = record(steps=((5, 0, 0), (0, 0, -0.7), (0, 0.7, 0)), shape=(40, 300, 300))
    assert all_remarks(sagittal) == ["spacing 5.0 mm along x is over three times the in-plane spacing (0.70 mm)"]


def test_a_tilted_scan_is_said_to_be():
    c, s = np.cos(0.3), np.sin(0.3)
    tilted = record(steps=((0, 0, 1), (-s * 0.7, c * 0.7, 0), (c * 0.7, s * 0.7, 0)))
    assert all_remarks(tilted) == ["its axes are tilted by 17° against the body's"]


def test_values_that_are_no_hu_are_not_judged_as_hu():
    assert all_remarks(record(hu_before={**GOOD_HU, "min": 0.0, "max": 255.0}, policy={"modality": "other"})) == []


def test_attention_is_the_millimetres_cut_off_and_fifty_for_each_other_remark():
    odd = record(cut_mm={"x": [10, 20]}, hu_before={**GOOD_HU, "max": 214.0})
    assert reported(odd).attention == 10 + 20 + 50


def test_files_of_the_same_content_are_found():
    a, b, c, d = (
        VolumeRecord(i, i, PREPARED, 1, 1, fingerprint=f) for i, f in zip("abcd", ["1", "2", "1", None], strict=True)
    )
    assert duplicates([a, b, c, d, d]) == [[a, c]]
