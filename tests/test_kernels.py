"""The compiled interpolation against its reference in numpy, to the bit; both against SimpleITK and earlier digests."""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scans import AXIS_ORDERS, as_scan, ct_like, frame, on_grid_by_itk, rotated
from typer.testing import CliRunner

from photon_cli.data import app
from photon_data import interpolate
from photon_data.interpolate import VARIABLE, axis_map, compiled, gaussian
from photon_data.prepare_file import prepare_volume
from photon_data.recipe import Policy, Recipe
from photon_data.resample import Values, resample, target_grid

ROOT = Path(__file__).parents[1]
SMALL = Recipe(shape_zyx=(30, 26, 28), model_shape_zyx=(14, 28, 28), window_hu=(-1000.5, 900.0))
DTYPES = [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64, np.float32, np.float64]
TURNS = [(12, 0, 0), (5, -30, 70), (90, 0, 45), (0, 0, 0.02), (180, 170, -91)]


def build(folder, **environment):
    """Build the extension into a folder; return its file, None where it could not be built."""
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build",
        "--build-base",
        str(folder / "base"),
        "--build-lib",
        str(folder),
    ]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, check=True, capture_output=True)
    return next((folder / "photon_data").glob("_kernels*[!c]"), None)


@pytest.fixture(scope="module", autouse=True)
def extension(tmp_path_factory):
    """The extension of this checkout: it is built here where it is not installed. CI has a compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(VARIABLE, raising=False)
        if compiled() is None:
            has_compiler = any(map(shutil.which, ("cc", "gcc", "clang", "cl")))
            assert has_compiler or "CI" not in os.environ, "CI must test the compiled code"
            if not has_compiler:
                pytest.skip("no compiler")
            file = build(tmp_path_factory.mktemp("kernels"))
            assert file, "the compiler failed"
            spec = importlib.util.spec_from_file_location("photon_data._kernels", file)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            patch.setattr(interpolate, "_kernels", module)
        yield


def both(monkeypatch, make):
    """What `make` returns with the compiled code, and with numpy."""
    monkeypatch.delenv(VARIABLE, raising=False)
    assert compiled() is not None
    first = make()
    monkeypatch.setenv(VARIABLE, "numpy")
    assert compiled() is None
    return first, make()


def prepared(array, native, recipe=SMALL, **rescale):
    """The volume and the model grid of intensities that need not be a CT's."""
    result = prepare_volume(as_scan(array, native, **rescale), recipe, Policy(modality="other"))
    return result.volume.numpy(), result.model.numpy()


def stored(dtype, shape=(12, 21, 25)):
    """Values from end to end of what a CT may have, with a rescaling that gives HU."""
    low, high = (0, 255) if np.dtype(dtype).itemsize == 1 else (0, 4000)
    low, high = (-128, 127) if dtype == np.int8 else (low, high)
    values = np.random.default_rng(5).uniform(low, high, shape).astype(dtype)
    slope = 3500 / (high - low)
    return values, {"slope": slope, "intercept": -1200.0 - low * slope}


@pytest.mark.parametrize("dtype", DTYPES)
def test_aligned_scans_of_every_axis_order_and_type_are_equal_to_the_bit(monkeypatch, dtype):
    array, rescale = stored(dtype)
    for order in AXIS_ORDERS:
        native = frame(array.shape, order, spacing_mm=(1.9, 0.8, 1.1))
        fast, slow = both(monkeypatch, lambda n=native: prepared(array, n, **rescale))
        assert all(map(np.array_equal, fast, slow)), order


@pytest.mark.parametrize("turn", [(0, 0, 0), TURNS[0]])
def test_planes_off_their_alignment_or_of_other_strides_or_byte_order_are_equal_too(monkeypatch, turn):
    array, rescale = stored(np.int16)
    native = rotated(frame(array.shape), turn)
    expected = prepared(array, native, **rescale)
    off = np.frombuffer(b"x" + array.tobytes(), np.uint8)[1:].view(np.int16).reshape(array.shape)
    assert not off.flags.aligned
    turned = np.asfortranarray(array)
    swapped = array.astype(">i2")
    assert not swapped.dtype.isnative
    for other in (off, turned, swapped):
        fast, slow = both(monkeypatch, lambda o=other: prepared(o, native, **rescale))
        assert all(map(np.array_equal, fast, slow))
        assert all(map(np.array_equal, fast, expected))


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_oblique_scans_are_equal_to_the_bit(monkeypatch, dtype, turn):
    array, rescale = stored(dtype)
    native = rotated(frame(array.shape), turn)
    fast, slow = both(monkeypatch, lambda: prepared(array, native, **rescale))
    assert all(map(np.array_equal, fast, slow))


def test_an_oblique_scan_of_more_values_than_32_bits_count_is_equal_too(monkeypatch, tmp_path):
    scan = np.memmap(tmp_path / "sparse", np.int16, "w+", shape=(3, 30_000, 40_000))  # 7 GB, of which a page is written
    scan[1:, 29_990:, 39_990:] = np.random.default_rng(0).integers(-1000, 1000, (2, 10, 10))
    matrix = np.array([[0.1, 0.02, 0.01, 1.2], [0.03, 0.9, 0.1, 29_991.5], [0.02, 0.1, 0.8, 39_990.2]])

    def corner():
        out = np.full((6, 7, 8), 7, np.int16)
        interpolate.affine(scan, matrix, 1.0, 0.0, (-1000.0, 1000.0), out)
        return out

    in_c, in_numpy = both(monkeypatch, corner)
    assert np.array_equal(in_c, in_numpy) and len(np.unique(in_c)) > 100


LAYOUTS = {
    "columns first": np.asfortranarray,
    "mirrored": lambda array: array[:, :, ::-1],
    "every other voxel": lambda array: np.repeat(array, 2, 2)[:, :, ::2],
    "upside down": lambda array: array[::-1],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_oblique_scan_whose_rows_are_not_whole_is_refused_by_both(monkeypatch, layout):
    array = LAYOUTS[layout](np.random.default_rng(0).integers(-1000, 1000, (6, 7, 8)).astype(np.int16))

    def refused():
        out = np.zeros((3, 3, 3), np.int16)
        with pytest.raises(ValueError, match="expected whole rows"):
            interpolate.affine(array, np.eye(3, 4), 1.0, 0.0, (-1000.0, 1000.0), out)

    both(monkeypatch, refused)


@pytest.mark.parametrize("turn", [(0, 0, 0), TURNS[0]])
def test_values_far_beyond_int16_are_cut_to_the_window(monkeypatch, turn):
    array = np.random.default_rng(1).choice([-3e38, -1e10, -4.3e6, -33000.0, 40.4, 33000.0, 8.4e6, 1e12], (12, 21, 25))
    native = rotated(frame(array.shape, spacing_mm=(1.5, 1.0, 1.1)), turn)
    values = Values(1.0, 0.0, (-32768.0, 32767.0), -1000.0)

    def on_grid():
        return resample(iter(array.astype(np.float32)), native, target_grid(native, SMALL), values, antialias=False)

    in_c, in_numpy = both(monkeypatch, on_grid)
    assert np.array_equal(in_c, in_numpy)
    assert (in_c.min(), in_c.max()) == (-32768, 32767)


@pytest.mark.parametrize("antialias", [False, True])
def test_scans_with_uneven_slices_and_one_slice_and_off_the_grid_are_equal_too(monkeypatch, antialias):
    array, native = ct_like((9, 30, 33)), frame((17, 30, 33))
    depths = np.array([0, 1, 2, 3.5, 5, 8, 11, 12, 16.0])
    values = Values(1.0, -24.0, (-1000, 1000), -1000.0)
    away = native.centre_lps[0] + 20, native.centre_lps[1], native.centre_lps[2] - 30
    for place in (native, rotated(native, (10, 20, 30))):
        for recipe, centre in ((SMALL, None), (SMALL, away), (SMALL, (1e4, 0, 0))):
            grid = target_grid(place, recipe, centre)
            arguments = place, grid, values, antialias, depths
            fast, slow = both(monkeypatch, lambda a=arguments: resample(iter(array), *a))
            assert np.array_equal(fast, slow)
            assert (fast > -1000).any() == (centre != (1e4, 0, 0))
    thin = rotated(frame((1, 30, 33), spacing_mm=(5, 1, 1)), (10, 20, 30))
    grid = target_grid(thin, SMALL)
    fast, slow = both(monkeypatch, lambda: resample(iter(array[:1]), thin, grid, values, antialias))
    expected = by_itk(array[:1] - 24.0, thin, grid)
    assert np.array_equal(fast, slow)
    assert antialias or np.mean(np.abs(fast - expected) > 0.5001) < 1e-3  # but for what lies on the rim


def by_itk(hu, native, grid):
    """What ITK makes of HU in float64: its interpolator, its transform."""
    to_index = sitk.AffineTransform(3)
    inverse = np.linalg.inv(np.asarray(native.steps_lps)).T[::-1]
    to_index.SetMatrix(inverse.ravel().tolist())
    to_index.SetTranslation((-inverse @ np.asarray(native.origin_lps)).tolist())
    return np.clip(on_grid_by_itk(sitk.GetImageFromArray(hu.astype(float)), grid, to_index, -1000.0), -1000, 1000)


def test_one_voxel_in_100_000_of_an_oblique_scan_differs_from_itk_by_one_hu_at_most():
    array = np.random.default_rng(1).integers(-1024, 1500, (90, 130, 140)).astype(np.int16)
    recipe = Recipe(shape_zyx=(110, 130, 130), model_shape_zyx=(14, 28, 28))
    native = rotated(frame(array.shape, spacing_mm=(1.2, 0.9, 0.9)), (11, -7, 23))
    found = prepare_volume(as_scan(array, native), recipe, Policy(modality="other")).volume
    difference = np.abs(found.numpy() - np.rint(by_itk(array, native, found.geometry)))
    assert difference.max() <= 1
    assert np.mean(difference > 0) <= 1e-5
    assert np.mean(found.numpy() > -1000) > 0.4


# Of version 0.1.0 before there was compiled code: SHA-256 of the volume, then the model grid.
DIGESTS = {
    ((0, 1, 2), (1, 1, 1)): "3b6f4e1e6f5370102e078a9f758a3d0d51e71f6663cfcd2b8b61147380b7fd24",
    ((0, 1, 2), (1, -1, -1)): "d1292c25c23d645479da28488ec99b8aa09d6ee9e3eef602c0c03d5d968de43a",
    ((2, 0, 1), (-1, 1, -1)): "9f8e6af273d8c9e4d16e35637d2feb4903a4f1d04665d031fd4585bb28fa139d",
}


@pytest.mark.parametrize("order", DIGESTS)
def test_stores_have_the_bytes_that_they_had_before(monkeypatch, order):
    array = (np.arange(40 * 50 * 60) * 7919 % 2503 - 1100).astype(np.int16).reshape(40, 50, 60)
    native = frame(array.shape, order, spacing_mm=(1.25, 0.75, 0.875))
    recipe = Recipe(shape_zyx=(52, 48, 44), model_shape_zyx=(20, 40, 40))

    def digest():
        return hashlib.sha256(b"".join(a.tobytes() for a in prepared(array, native, recipe))).hexdigest()

    assert both(monkeypatch, digest) == (DIGESTS[order], DIGESTS[order])


@pytest.mark.parametrize("turn", [(0, 0, 0), (9, 20, -30)])
def test_smoothing_is_that_of_itk_before_both_grids(turn):
    array = ct_like((30, 44, 48))
    native = rotated(frame(array.shape, spacing_mm=(1.0, 0.7, 0.8)), turn)
    recipe = Recipe(spacing_mm=(3, 1, 2), shape_zyx=(12, 40, 20), model_shape_zyx=(6, 20, 10), antialias=True)
    found = prepare_volume(as_scan(array, native), recipe, Policy(modality="other"))
    world = np.abs(np.asarray(native.steps_lps)).argmax(axis=1)
    factors = np.array(recipe.spacing_mm)[2 - world] / native.spacing_zyx_mm
    expected = by_itk(blurred(array, factors), native, found.volume.geometry)
    inside = np.s_[3:-3, 8:-8, 4:-4]
    assert np.abs(found.volume.numpy() - expected)[inside].max() <= 0.6
    model = blurred(found.volume.numpy(), (2, 2, 2))
    on_model = on_grid_by_itk(with_grid(model, found.volume.geometry), found.model.geometry)
    assert np.abs(found.model.numpy() - on_model)[1:-1, 1:-1, 1:-1].max() <= 0.6


def blurred(array, factors):
    """The Gaussian of Cardoso et al. by ITK: its full width at half maximum is what the coarse voxel has more."""
    variance = (np.asarray(factors, float) ** 2 - 1) / (8 * np.log(2))
    image = sitk.GetImageFromArray(array.astype(np.float32))
    return sitk.GetArrayFromImage(sitk.DiscreteGaussian(image, variance[::-1].tolist()))


def with_grid(array, geometry):
    image = sitk.GetImageFromArray(array)
    image.SetOrigin(geometry.origin_lps)
    image.SetSpacing(geometry.spacing_zyx_mm[::-1])
    return image


@pytest.mark.parametrize("variance", [0.0, 0.3, 1.4, 9.0])
def test_the_gaussian_has_the_variance_that_is_asked_for_and_a_sum_of_one(variance):
    weights = gaussian(variance)
    offsets = np.arange(len(weights))
    assert weights[0] + 2 * weights[1:].sum() == pytest.approx(1, abs=1e-6)
    assert 2 * (offsets**2 * weights).sum() == pytest.approx(variance, rel=0.15)  # 1 % of it is cut off


def test_memory_outside_of_the_arrays_is_never_touched():
    c, plane, out = compiled(), np.zeros((4, 5), np.int16), np.zeros((2, 2), np.float32)
    good = axis_map(np.array([0.0, 1.5]), 4)
    c.plane(plane, good, good, 1.0, 0.0, out)
    for index in (-1, 5):
        bad = good._replace(high=np.array([0, index]))
        with pytest.raises(ValueError, match="within the array"):
            c.plane(plane, good, bad, 1.0, 0.0, out)
    for wrong in (np.zeros((3, 2), np.float32), np.zeros((2, 2)), np.zeros(4, np.float32)):
        with pytest.raises(ValueError, match="expected"):
            c.plane(plane, good, good, 1.0, 0.0, wrong)
    with pytest.raises(ValueError, match="one shape"):
        c.between(out, out, 0.5, -1000.0, 1000.0, np.zeros((3, 2), np.int16))
    with pytest.raises(ValueError, match="two voxels"):
        c.affine(np.zeros((1, 5, 5), np.int16), (0.0,) * 12, 0.0, 1.0, 0.0, -1.0, 1.0, np.zeros((2, 2, 2), np.int16))


def test_the_version_says_which_code_interpolates(monkeypatch):
    def said():
        return CliRunner().invoke(app, ["--version"]).output

    compiled_is, numpy_is = both(monkeypatch, said)
    assert "interpolation: compiled" in compiled_is
    assert f"interpolation: numpy ({VARIABLE}=numpy)" in numpy_is
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setattr(interpolate, "_kernels", None)
    assert "numpy (installed without a compiler)" in said()
    monkeypatch.setattr(interpolate, "_kernels", type("Old", (), {"VERSION": 0}))
    assert "numpy (compiled for another version)" in said()


def test_without_a_compiler_the_package_is_built_all_the_same(tmp_path):
    assert build(tmp_path, CC="no-such-compiler", PATH="") is None
    assert (tmp_path / "photon_data" / "interpolate.py").exists()
