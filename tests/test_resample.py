"""Against SimpleITK, which resamples by a transform and an interpolator of its own."""

from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk
from scans import AXIS_ORDERS, as_scan, ct_like, frame, on_grid_by_itk, rotated, to_sitk

from photon_data.errors import Refused
from photon_data.prepare_file import prepare_volume
from photon_data.recipe import Policy, Recipe
from photon_data.resample import aligned_axes, margins_mm, target_grid
from photon_data.scan import Rescale
from photon_data.volume import Geometry

SMALL = Recipe(shape_zyx=(52, 48, 44), model_shape_zyx=(20, 40, 40))


def prepare_any(scan, recipe, rescale=None):
    """As prepare_volume, of intensities that need not be a CT's."""
    return prepare_volume(scan, recipe, Policy(modality="other"), rescale)


def resampled_by_itk(array, native, grid, recipe, slope=1.0, intercept=0.0):
    """What ITK makes of the scan, in float64 HU; shear is moved from the image into the transform."""
    image = sitk.GetImageFromArray(array.astype(np.float64) * slope + intercept)
    to_index = sitk.AffineTransform(3)
    columns = np.asarray(native.steps_lps)[::-1].T
    to_index.SetMatrix(np.linalg.inv(columns).ravel().tolist())
    to_index.SetTranslation((-np.linalg.inv(columns) @ native.origin_lps).tolist())
    return np.clip(on_grid_by_itk(image, grid, to_index, recipe.pad_hu), *recipe.window_hu)


def off_the_rim(native, grid):
    """True for the voxels of `grid` that are not exactly (1e-6 voxel) on the outer face of the scan.

    There ITK's own rounding decides whether a voxel is inside, differently for each axis order; ours is tested by hand
    below.
    """
    index = native.index(grid.world(np.stack(np.meshgrid(*map(np.arange, grid.shape_zyx), indexing="ij"), -1)))
    return (np.minimum(abs(index + 0.5), abs(index - native.shape_zyx + 0.5)) > 1e-6).all(-1)


def worst(array, native, recipe, **rescale):
    prepared = prepare_any(as_scan(array, native, **rescale), recipe)
    grid = prepared.volume.geometry
    assert prepared.volume.array_zyx.dtype == np.int16
    difference = np.abs(prepared.volume.array_zyx - resampled_by_itk(array, native, grid, recipe, **rescale))
    checked = off_the_rim(native, grid)
    assert checked.mean() > 0.9
    return difference[checked].max()


@pytest.mark.parametrize("order", AXIS_ORDERS)
def test_every_voxel_equals_itk_for_all_axis_orders(order):
    native = frame((21, 50, 66), order)
    assert worst(ct_like((21, 50, 66)), native, SMALL) <= 0.51


@pytest.mark.parametrize("order", AXIS_ORDERS[::7])
def test_an_axis_aligned_scan_placed_by_its_own_geometry_equals_itk_without_a_transform(order):
    array, native = ct_like((30, 41, 52), seed=4), frame((30, 41, 52), order, spacing_mm=(1.7, 0.8, 1.1))
    volume = prepare_any(as_scan(array, native), SMALL).volume
    expected = on_grid_by_itk(to_sitk(array, native), volume.geometry)
    difference = np.abs(np.clip(expected, -1000, 1000) - volume.array_zyx)
    assert difference[off_the_rim(native, volume.geometry)].max() <= 0.51


@pytest.mark.parametrize("turn", [(12, 0, 0), (0, 0, 0.02), (5, -30, 70), (90, 0, 45)])
@pytest.mark.parametrize("dtype", [np.int16, np.float32, np.uint8])
def test_every_voxel_of_an_oblique_scan_equals_itk(turn, dtype):
    array = ct_like((25, 40, 50), dtype=np.int16)
    array = (array // 16 + 64).astype(dtype) if dtype == np.uint8 else array.astype(dtype)
    assert worst(array, rotated(frame((25, 40, 50)), turn), SMALL) <= 0.51


def test_a_tilted_gantry_is_resampled_as_it_was_acquired():
    native = Geometry.from_arrays((25, 40, 50), (-20, -15, -30), ((0, 0.7, 2.0), (0, 0.9, 0), (0.8, 0, 0)))
    assert aligned_axes(native) is None
    assert worst(ct_like((25, 40, 50)), native, SMALL) <= 0.51


@pytest.mark.parametrize(
    ("dtype", "slope", "intercept"),
    [
        (np.int16, 1.0, 0.0),
        (np.uint16, 1.0, -1024.0),
        (np.uint8, 8.5, -1024.0),
        (np.float32, 0.5, 3.25),
        (np.float64, -1, 0),
    ],
)
def test_rescaling_to_hu_happens_exactly_once(dtype, slope, intercept):
    stored = np.random.default_rng(0).uniform(0, 250, (20, 30, 40)).astype(dtype)
    assert worst(stored, frame((20, 30, 40)), SMALL, slope=slope, intercept=intercept) <= 0.51


def test_a_table_replaces_the_headers_rescaling():
    stored = np.random.default_rng(0).integers(0, 2000, (20, 30, 40)).astype(np.int16)
    native = frame((20, 30, 40))
    prepared = prepare_any(as_scan(stored, native, 1.0, -8192.0), SMALL, Rescale(1.0, -1024.0, "table"))
    expected = resampled_by_itk(stored, native, prepared.volume.geometry, SMALL, 1.0, -1024.0)
    assert np.abs(prepared.volume.array_zyx - expected).max() <= 0.51
    assert prepared.facts["intercept"] == -1024.0


@pytest.mark.parametrize("order", AXIS_ORDERS[::5])
def test_an_array_stored_in_another_axis_order_gives_the_same_volume(order):
    array = ct_like((24, 30, 36))
    straight = frame((24, 30, 36), spacing_mm=(1.9, 0.8, 0.7))
    axes, signs = order
    flips = tuple(slice(None, None, sign) for sign in signs)
    stored = array.transpose(axes)[flips]
    first = [(n - 1) if sign < 0 else 0 for n, sign in zip(stored.shape, signs, strict=True)]
    origin = straight.world([first[axes.index(axis)] for axis in range(3)])
    native = frame(stored.shape, order, [(1.9, 0.8, 0.7)[axis] for axis in axes], origin)
    same = prepare_any(as_scan(np.ascontiguousarray(stored), native), SMALL).volume.array_zyx.astype(int)
    difference = abs(same - prepare_any(as_scan(array, straight), SMALL).volume.array_zyx)
    assert difference.max() <= 1  # a half is rounded either way, as float32 sums in another order
    assert (difference > 0).mean() < 1e-3


@pytest.mark.parametrize("native", [frame((9, 11, 13), AXIS_ORDERS[19]), rotated(frame((9, 11, 13)), (20, 10, -40))])
def test_a_marked_voxel_is_found_again_at_its_world_position(native):
    marks = np.random.default_rng(7).integers(2, 7, (5, 3))
    for mark in marks:
        array = np.full(native.shape_zyx, -1000, np.int16)
        array[tuple(mark)] = 1000
        volume = prepare_any(as_scan(array, native), SMALL).volume
        brightest = np.unravel_index(volume.array_zyx.argmax(), volume.array_zyx.shape)
        away_mm = np.abs(volume.geometry.world(brightest) - native.world(mark))
        assert (away_mm <= 0.5001 * np.sqrt(3)).all()


def test_the_recorded_transform_takes_grid_voxels_to_native_ones_and_back():
    native = rotated(frame((9, 11, 13)), (20, 10, -40))
    prepared = prepare_any(as_scan(ct_like((9, 11, 13)), native), SMALL)
    index = np.array([3.0, 20.0, 31.0, 1.0])
    there = np.array(prepared.facts["grid_to_native_zyx"]) @ index
    assert np.allclose(native.world(there[:3]), prepared.volume.geometry.world(index[:3]))
    assert np.allclose(np.array(prepared.facts["native_to_grid_zyx"]) @ there, index)


def test_the_grid_is_centred_on_the_field_of_view_and_says_what_it_cuts_off_and_pads():
    # 100 x 40 x 60 voxels (z, y, x) of 1, 1, 2 mm: 100, 40, 120 mm; the grid is 52, 48, 44 mm.
    native = frame((100, 40, 60), spacing_mm=(1, 1, 2), origin_lps=(0, 0, 0))
    grid = target_grid(native, SMALL)
    assert grid.centre_lps == (59.0, 19.5, 49.5)
    cut, pad = margins_mm(native, grid)
    assert cut == {"x": [38, 38], "y": [0, 0], "z": [24, 24]}
    assert pad == {"x": [0, 0], "y": [4, 4], "z": [0, 0]}


@pytest.mark.parametrize(("sign", "rows"), [(1, range(1, 6)), (-1, range(2, 7))])
def test_a_voxel_exactly_on_the_rim_belongs_to_the_scan_at_its_first_face_only(sign, rows):
    # 5 voxels of 1 mm centred in 8: the outer faces lie exactly on voxel centres 1 and 6. As in ITK, [-0.5, n - 0.5) is
    # inside.
    native = frame((6, 5, 6), ((0, 1, 2), (1, sign, 1)), spacing_mm=(1, 1, 1))
    recipe = Recipe(shape_zyx=(6, 8, 6), model_shape_zyx=(3, 3, 3))
    volume = prepare_any(as_scan(np.full((6, 5, 6), 50, np.int16), native), recipe).volume.array_zyx
    assert np.flatnonzero(volume[3, :, 3] == 50).tolist() == list(rows)


def test_outside_of_the_scan_there_is_padding_and_only_there():
    native = frame((10, 10, 10), spacing_mm=(1, 1, 1))
    volume = prepare_any(as_scan(np.full((10, 10, 10), 77, np.int16), native), SMALL).volume.array_zyx
    assert (volume == 77).sum() == 1000
    assert set(np.unique(volume)) == {-1000, 77}


def test_values_are_rounded_to_nearest_and_clipped():
    array = np.array([-2000.0, -1000.4, 0.6, -0.6, 99.4, 5000.0], np.float32)
    planes = np.broadcast_to(array[:, None, None], (6, 6, 6)).copy()
    recipe = Recipe(shape_zyx=(6, 6, 6), model_shape_zyx=(3, 3, 3))
    volume = prepare_any(as_scan(planes, frame((6, 6, 6), spacing_mm=(1, 1, 1))), recipe).volume.array_zyx
    assert volume[:, 0, 0].tolist() == [-1000, -1000, 1, -1, 99, 1000]


def test_the_model_grid_equals_torchs_trilinear_resize():
    torch = pytest.importorskip("torch")
    prepared = prepare_any(as_scan(ct_like((40, 60, 50)), frame((40, 60, 50), spacing_mm=(1, 0.8, 0.9))), SMALL)
    full = torch.from_numpy(prepared.volume.array_zyx.astype(np.float64))[None, None]
    expected = torch.nn.functional.interpolate(full, size=(20, 40, 40), mode="trilinear", align_corners=False)
    assert np.abs(prepared.model.array_zyx - expected[0, 0].numpy()).max() <= 0.501
    # Both grids cover the same box.
    assert np.allclose(prepared.model.geometry.corners_lps(), prepared.volume.geometry.corners_lps())


@pytest.mark.parametrize("native", [frame((64, 64, 64), spacing_mm=(1, 1, 1)), rotated(frame((64, 64, 64)), (9, 9, 9))])
def test_antialiasing_takes_away_what_the_coarse_grid_cannot_hold_and_leaves_the_mean(native):
    stripes = np.where(np.arange(64) % 2, 400, -400).astype(np.int16)
    array = np.broadcast_to(stripes, (64, 64, 64)).copy()
    coarse = Recipe(spacing_mm=(4, 4, 4), shape_zyx=(10, 10, 10), model_shape_zyx=(5, 5, 5))
    smooth = Recipe(**{**coarse.to_json(), "antialias": True})
    plain_sd = prepare_any(as_scan(array, native), coarse).volume.array_zyx[3:7, 3:7, 3:7].std()
    inner = prepare_any(as_scan(array, native), smooth).volume.array_zyx[3:7, 3:7, 3:7]
    assert inner.std() < 25
    assert abs(inner.mean()) < 10
    assert plain_sd > inner.std() or plain_sd < 1  # stripes sampled exactly midway vanish without smoothing too


@pytest.mark.parametrize("turn", [(0, 0, 0), (3, 0, 0)])
def test_a_scan_smaller_than_a_voxel_is_refused_not_lost_between_voxels(turn):
    native = rotated(frame((6, 6, 6), spacing_mm=(1, 0.001, 1)), turn)
    coarse = Recipe(spacing_mm=(4, 4, 4), shape_zyx=(4, 4, 4), model_shape_zyx=(2, 2, 2))
    with pytest.raises(Refused, match="at least one voxel") as refusal:
        prepare_any(as_scan(ct_like((6, 6, 6)), native), coarse)
    assert refusal.value.code == "too-small"


def test_planes_that_the_grid_cuts_off_are_read_too():
    seen = []
    native = frame((200, 8, 8), spacing_mm=(1, 1, 1))
    scan = as_scan(ct_like((200, 8, 8)), native)
    array = ct_like((200, 8, 8))

    def planes():
        for k, plane in enumerate(array):
            seen.append(k)
            yield plane

    prepare_any(type(scan)(native, array.dtype, 1.0, 0.0, planes, "memory"), SMALL)
    assert seen == list(range(200))


def patient_on_a_couch(shape_zyx=(20, 70, 80), spacing_mm=(5.0, 4.0, 4.0)):
    """An ellipse of 120 x 80 mm around (50, -20) mm with a lung in it, a couch below, and noise."""
    y, x = ((np.arange(n) - (n - 1) / 2) * mm for n, mm in zip(shape_zyx[1:], spacing_mm[1:], strict=True))
    y, x = np.meshgrid(y, x, indexing="ij")
    hu = np.where(((x - 50) / 60) ** 2 + ((y + 20) / 40) ** 2 < 1, 40.0, -1000.0)
    hu[((x - 70) / 20) ** 2 + ((y + 20) / 20) ** 2 < 1] = -850
    hu[(np.abs(y - 40) < 3) & (np.abs(x) < 150)] = 100
    noisy = np.broadcast_to(hu, shape_zyx) + np.random.default_rng(0).normal(0, 100, shape_zyx)
    origin = [-(n - 1) / 2 * mm for n, mm in zip(shape_zyx[::-1], spacing_mm[::-1], strict=True)]
    return noisy.astype(np.int16), Geometry.from_arrays(shape_zyx, origin, np.diag(spacing_mm)[:, ::-1])


@pytest.mark.parametrize("padded", [False, True])
def test_the_grid_may_lie_around_the_body_without_the_couch_instead_of_the_field_of_view(padded):
    array, native = patient_on_a_couch()
    if padded:
        array[:, :9] = -3024
    by_scan, by_body = (prepare_volume(as_scan(array, native), replace(SMALL, centre=of)) for of in ("scan", "body"))
    assert by_scan.volume.geometry.centre_lps == pytest.approx((0, 0, 0))
    assert by_body.volume.geometry.centre_lps == pytest.approx((50, -20, 0), abs=4)
    box = by_body.facts["body_mm"]
    for axis, expected in {"x": (-10, 110), "y": (-60, 20), "z": (-47.5, 47.5)}.items():
        assert box[axis] == pytest.approx(expected, abs=6)
    assert "body_mm" not in by_scan.facts
    expected = resampled_by_itk(array.clip(-1500), native, by_body.volume.geometry, SMALL)
    inside = np.s_[10:-10, 10:-10, 10:-10]
    assert np.abs(by_body.volume.array_zyx - expected)[inside].max() <= 0.51


def test_a_scan_without_a_body_has_no_centre_of_one():
    array = np.full((10, 20, 20), -1000, np.int16)
    with pytest.raises(Refused, match="--set centre=scan") as refusal:
        prepare_any(as_scan(array, frame((10, 20, 20))), replace(SMALL, centre="body"))
    assert refusal.value.code == "no-body"
