from dataclasses import replace

import numpy as np
import pytest
from scans import as_scan, ct_like, frame

from photon_data.errors import Refused
from photon_data.hounsfield import Probe, refuse_implausible
from photon_data.prepare_file import prepare_volume
from photon_data.recipe import Policy, Recipe

SHAPE = (24, 30, 36)
CT = Recipe(shape_zyx=(20, 20, 20), model_shape_zyx=(10, 10, 10))


def prepare(array, **rescale):
    return prepare_volume(as_scan(array, frame(array.shape), **rescale), CT)


Y, X = np.mgrid[-1 : 1 : SHAPE[1] * 1j, -1 : 1 : SHAPE[2] * 1j]
CIRCLE = X**2 + Y**2 > 1


def circle_padded(value):
    """A CT whose corners outside of the reconstruction circle hold a padding value, as scanners write it."""
    array = ct_like(SHAPE).astype(np.int32)
    array[:, CIRCLE] = value
    return array.astype(np.int16) if np.abs(array).max() < 1 << 15 else array


def head_like():
    """A brain in a thick skull, in noisy air: scaled twice, its brain lies where air should be and its skull where
    tissue is.
    """
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij")
    radius = np.sqrt(z**2 + y**2 + x**2)
    hu = np.select([radius < 0.7, radius < 0.85], [40.0, 1000.0], -1000.0)
    return (hu + np.random.default_rng(2).normal(0, 60, SHAPE)).astype(np.int16)


@pytest.mark.parametrize(
    "array",
    [
        head_like(),
        ct_like(SHAPE),
        ct_like(SHAPE).clip(-1000, 1000),
        circle_padded(-2000),
        circle_padded(-3024),
        circle_padded(-8192),
    ],
    ids=["head", "scanner", "clipped", "padded -2000", "padded -3024", "padded -8192"],
)
def test_hounsfield_units_as_scanners_and_data_sets_write_them_are_accepted(array):
    assert prepare(array).volume.array_zyx.min() == -1000


def sharp(spread_hu):
    """As a kernel for lungs with an extended range writes it: noise far below air, cut off nowhere."""
    return np.rint(ct_like(SHAPE) + np.random.default_rng(3).normal(0, spread_hu, SHAPE)).astype(np.int16)


def circle_of(*values, spread=0):
    """Padding of several values, each spread a little by lossy compression."""
    rng, shape = np.random.default_rng(4), (SHAPE[0], np.count_nonzero(CIRCLE))
    return circle_padded(rng.choice(values, shape) + rng.integers(-spread, spread + 1, shape))


@pytest.mark.parametrize(
    "array",
    [
        *(sharp(spread) for spread in (90, 130, 200)),
        circle_of(-3024, -2000),
        circle_of(-3024, spread=8),
        circle_of(-2000, spread=2),
        circle_of(-3024, -2000, spread=2),
        np.where(np.broadcast_to(CIRCLE, SHAPE), -3024, sharp(130)).astype(np.int16),
        head_like().clip(-1000, 1000),
    ],
)
def test_sharp_kernels_and_padding_of_two_values_or_of_lossy_compression_are_those_of_a_ct(array):
    assert prepare(array).volume.array_zyx.min() == -1000


@pytest.mark.parametrize(
    ("array", "said"),
    [
        *((circle_padded(value).astype(np.int32), f"{value} is padding") for value in (3071, 62512, 1700)),
        (circle_padded(-2000) + np.int16(1024), "never applied"),  # its padding lies where air should
        *((sharp(spread) - np.int16(1024), "applied twice") for spread in (1, 20, 90)),
        (circle_of(-2000) - np.int16(1024), "applied twice"),
        (2 * ct_like(SHAPE), "applied twice"),
        (2 * ct_like(SHAPE) - np.int16(1024), "applied twice"),
        (np.random.default_rng(0).integers(-3000, 3000, SHAPE), "applied twice"),  # no mode near air
    ],
)
def test_padding_beyond_bone_raw_values_and_air_in_a_second_place_are_no_ct(array, said):
    with pytest.raises(Refused, match=said):
        prepare(array)


@pytest.mark.parametrize(
    ("array", "rescale", "said"),
    [
        (ct_like(SHAPE) + 1024, {}, "never applied"),
        (ct_like(SHAPE), {"slope": 1.0, "intercept": -1024.0}, "applied twice"),
        (ct_like(SHAPE), {"slope": 1.0, "intercept": -8192.0}, "applied twice"),
        (head_like(), {"slope": 1.0, "intercept": -1024.0}, "applied twice"),
        (ct_like(SHAPE) + 1024, {"slope": 1.0, "intercept": -8192.0}, "applied twice"),
        (circle_padded(-3024) + np.int16(1024), {}, "not the intensities of a CT"),
        (ct_like(SHAPE).clip(-160, 240), {}, "not the intensities of a CT"),
        (((ct_like(SHAPE).clip(-1000, 1000) + 1000) // 8).astype(np.uint8), {}, "never applied"),
        (np.full(SHAPE, -1000, np.int16), {}, "not the intensities of a CT"),
        (np.zeros(SHAPE, np.int16), {}, "never applied"),
        ((ct_like(SHAPE) > 0).astype(np.uint8), {}, "2 whole numbers are labels of a mask; --masks PATTERN"),
        (np.arange(np.prod(SHAPE)).reshape(SHAPE) % 118.0, {}, "118 whole numbers are labels of a mask"),
        ((ct_like(SHAPE) > 0) * 0.5, {}, "never applied"),  # no whole numbers
    ],
    ids=[
        "raw",
        "twice -1024",
        "twice -8192",
        "head twice",
        "raw with -8192",
        "raw with padding",
        "windowed",
        "8 bit",
        "only air",
        "only zeros",
        "mask",
        "label map",
        "half a mask",
    ],
)
def test_what_cannot_be_hounsfield_units_is_refused_with_a_guess_why(array, rescale, said):
    with pytest.raises(Refused, match=said) as refusal:
        prepare(array, **rescale)
    assert refusal.value.code == "hu-implausible"


def test_with_modality_other_nothing_is_said_about_intensities():
    array = np.random.default_rng(0).integers(0, 255, SHAPE).astype(np.uint8)
    prepared = prepare_volume(as_scan(array, frame(SHAPE)), CT, Policy(modality="other"))
    assert prepared.volume.array_zyx.max() > 0
    assert prepared.facts["policy"] == {"modality": "other"}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e38])
def test_voxels_that_are_no_numbers_are_counted_and_refused_or_filled_as_told(bad):
    array = ct_like(SHAPE).astype(np.float32)
    array[3, 4, 5] = array[12, 15, 18] = bad
    with pytest.raises(Refused, match="found 2 NaN or infinite"):
        prepare(array)
    filled = prepare_volume(as_scan(array, frame(SHAPE)), CT, Policy(non_finite="fill"))
    assert filled.facts["policy"] == {"non_finite": "fill"}
    assert filled.facts["hu_before"]["non_finite"] == 2
    padded = np.where(np.isfinite(array) & (abs(array) < 1e30), array, -1000)
    assert np.array_equal(filled.volume.array_zyx, prepare(padded).volume.array_zyx)


def test_filled_voxels_hold_the_padding_value_in_hu_whatever_the_rescaling():
    array = np.full((8, 8, 8), np.nan, np.float32)
    recipe, policy = replace(CT, pad_hu=-500.0), Policy(non_finite="fill", modality="other")
    volume = prepare_volume(as_scan(array, frame((8, 8, 8)), 2.0, -1024.0), recipe, policy).volume.array_zyx
    assert set(np.unique(volume)) == {-500}


@pytest.mark.parametrize(("slope", "intercept"), [(1.0, 0.0), (2.0, -1024.0), (-1.0, 5.0)])
def test_statistics_equal_numpys_where_every_voxel_is_sampled(slope, intercept):
    stored = ct_like((10, 20, 30))
    probe = Probe(stored.shape, slope, intercept)
    for plane in stored:
        probe.look(plane)
    hu = stored.astype(float) * slope + intercept
    statistics = probe.statistics()
    assert (statistics["min"], statistics["max"]) == (hu.min(), hu.max())
    assert abs(statistics["mean"] - hu.mean()) < 0.01
    assert abs(statistics["p99"] - np.percentile(hu, 99)) < 0.01
    assert sum(statistics["histogram"]) == ((hu >= -1100) & (hu <= 1100)).sum()


def test_a_large_scan_is_sampled_evenly_and_its_extremes_are_found_all_the_same():
    probe = Probe((160, 160, 160), 1.0, 0.0)
    for k in range(160):
        plane = np.full((160, 160), k, np.int16)
        if k == 101:
            plane[77, 33] = 9999
        probe.look(plane)
    assert len(probe.sample_hu()) < 1_000_000
    assert probe.statistics()["max"] == 9999
    assert abs(probe.statistics()["mean"] - 79.5) < 1


def test_air_and_tissue_shares_are_of_the_body_not_of_the_padding():
    sample = np.concatenate([np.full(8000, -8192.0), np.full(1500, -1000.0), np.full(500, 40.0)])
    refuse_implausible(sample, -8192, 40)
    with pytest.raises(Refused):
        refuse_implausible(np.full(10_000, -8192.0), -8192, -8192)
