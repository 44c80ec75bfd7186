"""A picture shows what is where: letters, sides, scale."""

import numpy as np
import pytest
from PIL import Image
from scans import AXIS_ORDERS, rotated

from photon_data.errors import UsageError
from photon_data.picture import PLANES, WINDOWS, Layout, Upright, resolve_window, three_planes, to_grey, voxel_at
from photon_data.volume import Geometry, Volume, body_axes, direction_letters, position_text, tilt_degrees

IDENTITY = ((0, 0, 1), (0, 1, 0), (1, 0, 0))


def marked() -> Volume:
    """Air with a bright block in the patient's left, front, upper corner; even and odd sides, three spacings."""
    array = np.full((20, 31, 44), -1000, np.int16)
    array[-5:, :8, -11:] = 1000
    return Volume(array, Geometry.axis_aligned(array.shape, (3.0, 1.5, 1.2), (5, -7, 100)))


def reordered(volume: Volume, order: tuple[int, ...], flips: tuple[int, ...]) -> Volume:
    """Return the same voxels at the same places, stored with other axes."""
    steps, shape = np.asarray(volume.geometry.steps_lps), np.asarray(volume.geometry.shape_zyx)
    origin = volume.geometry.world([0 if f > 0 else n - 1 for f, n in zip(flips, shape, strict=True)])
    signed = steps * np.asarray(flips)[:, None]
    array = volume.array_zyx[tuple(slice(None, None, f) for f in flips)].transpose(order)
    return Volume(array, Geometry.from_arrays(array.shape, origin, signed[list(order)]))


def tilted(volume: Volume, degrees: float) -> Volume:
    """Return the same array in a grid turned about the body's long axis."""
    return Volume(volume.array_zyx, rotated(volume.geometry, (0, 0, degrees)))


def panel(image: Image.Image, number: int, size_px: int = 320) -> np.ndarray:
    layout = Layout.of(size_px)
    left = number * (layout.panel + layout.gap)
    return np.asarray(image.convert("L"))[: layout.panel, left : left + layout.panel]


class CountingArray:
    """Slices like a zarr array, and counts what was read."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape, self.voxels_read = array, array.shape, 0

    def __getitem__(self, index: tuple) -> np.ndarray:
        part = self.array[index]
        self.voxels_read += part.size
        return part


@pytest.mark.parametrize(
    ("direction", "letters"),
    [
        ((1, 0, 0), "L"),
        ((-2, 0, 0), "R"),
        ((0, 3, 0), "P"),
        ((0, -1, 0), "A"),
        ((0, 0, 1), "S"),
        ((0, 0, -0.5), "I"),
        ((1, -0.5, 0), "LA"),
        ((1, 0.2, 0), "L"),
        ((-0.3, 0.5, 0.9), "SPR"),
    ],
)
def test_a_direction_is_said_in_the_letters_of_its_parts_the_largest_first(direction, letters):
    assert direction_letters(np.array(direction)) == letters


def test_body_axes_of_the_identity_grid_are_x_y_z():
    axes = body_axes(Geometry.from_arrays((2, 3, 4), (0, 0, 0), IDENTITY))
    assert axes.array_axis == (2, 1, 0) and axes.sign == (1, 1, 1)


def test_body_axes_of_a_sagittal_scan_are_found_by_its_steps():
    geometry = Geometry.from_arrays((2, 3, 4), (0, 0, 0), ((-3, 0, 0), (0, 0, -1), (0, 1, 0)))
    axes = body_axes(geometry)
    assert axes.array_axis == (0, 2, 1) and axes.sign == (-1, 1, -1)


def test_body_axes_differ_even_where_two_steps_lean_towards_the_same_axis():
    steps = ((0.1, 0.75, 0.65), (0.0, 0.8, -0.6), (1, 0, 0))
    axes = body_axes(Geometry.from_arrays((2, 3, 4), (0, 0, 0), steps))
    assert sorted(axes.array_axis) == [0, 1, 2] and axes.array_axis == (2, 1, 0)


@pytest.mark.parametrize("degrees", [0, 12, 30])
def test_the_tilt_is_the_angle_it_was_turned_by(degrees):
    assert tilt_degrees(tilted(marked(), degrees).geometry) == pytest.approx(degrees, abs=1e-5)


def test_positions_have_a_letter_in_place_of_a_sign():
    assert [position_text(0, 3.04), position_text(1, -3), position_text(2, -12.36), position_text(2, -1e-9)] == [
        "L 3.0 mm",
        "A 3.0 mm",
        "I 12.4 mm",
        "S 0.0 mm",
    ]


def test_the_marked_corner_is_shown_on_the_side_of_its_letters():
    volume = marked()
    corner = volume.geometry.world((18, 3, 40))
    image = three_planes(volume, at_lps=corner)
    for number, (rows, columns) in enumerate([("front", "left"), ("head", "left"), ("head", "front")]):
        bright = np.argwhere(panel(image, number)[30:-30, 30:-30] > 250).mean(0) / 260
        assert bright[0] < 0.5, f"{rows} belongs at the top of panel {number}"
        assert (bright[1] > 0.5) == (columns == "left"), f"{columns} in panel {number}"


@pytest.mark.parametrize("at", [None, (18, 3, 40)])
def test_all_48_axis_orders_of_a_volume_give_the_same_picture(at):
    volume = marked()
    point = None if at is None else volume.geometry.world(at)
    expected = np.asarray(three_planes(volume, at_lps=point, size_px=160))
    assert len(AXIS_ORDERS) == 48
    for order, flips in AXIS_ORDERS:
        other = three_planes(reordered(volume, order, flips), at_lps=point, size_px=160)
        assert np.array_equal(np.asarray(other), expected), (order, flips)


def test_all_48_axis_orders_of_a_tilted_volume_give_the_same_picture():
    volume = tilted(marked(), 20)
    expected = np.asarray(three_planes(volume, size_px=160))
    for order, flips in AXIS_ORDERS:
        assert np.array_equal(np.asarray(three_planes(reordered(volume, order, flips), size_px=160)), expected), (
            order,
            flips,
        )


def test_a_slice_holds_the_voxels_of_its_plane_seen_from_the_right_side():
    array = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    volume = Volume(array, Geometry.from_arrays(array.shape, (0, 0, 0), IDENTITY))
    axial, coronal, sagittal = (Upright(volume).slice(plane, (1, 2, 3)) for plane in PLANES)
    assert np.array_equal(axial, array[1])
    assert np.array_equal(coronal, array[::-1, 2])
    assert np.array_equal(sagittal, array[::-1, :, 3])


def test_the_letters_of_a_tilted_scan_are_those_of_its_own_axes(monkeypatch):
    written = []
    monkeypatch.setattr("PIL.ImageDraw.ImageDraw.text", lambda self, place, text, *rest, **more: written.append(text))
    three_planes(tilted(marked(), 20))
    # Turned by 20 degrees from L towards P: columns run towards LP, rows of the axial slice towards PR.
    assert written[:4] == ["LP", "RA", "PR", "AL"]
    assert "tilted by 20°" in written[-2]


def test_voxels_are_shown_in_their_physical_proportions():
    volume = Volume(np.zeros((10, 50, 100), np.int16), Geometry.axis_aligned((10, 50, 100), (5, 2, 1), (0, 0, 0)))
    image = three_planes(volume, window_hu=(-2, -1), size_px=400)
    room = Layout.of(400).room
    for number, (down, right) in enumerate([(room, room), (room / 2, room), (room / 2, room)]):
        rows, columns = np.nonzero(panel(image, number, 400) == 255)
        assert np.ptp(rows) + 1 == pytest.approx(down, abs=2) and np.ptp(columns) + 1 == pytest.approx(right, abs=2)


def test_the_middle_between_two_voxels_is_the_same_place_whatever_way_the_axis_is_stored():
    volume = marked()
    for order, flips in AXIS_ORDERS:
        grid = Upright(reordered(volume, order, flips)).geometry
        assert np.allclose(grid.world(voxel_at(grid, None)), volume.geometry.world((10, 15, 22)))


def test_only_three_slices_are_read():
    volume = marked()
    lazy = CountingArray(volume.array_zyx)
    three_planes(Volume(lazy, volume.geometry))
    assert lazy.voxels_read == 31 * 44 + 20 * 44 + 20 * 31


def test_a_point_outside_of_the_volume_is_an_error():
    with pytest.raises(UsageError, match="expected a point within the volume"):
        three_planes(marked(), at_lps=(1000, 0, 0))


def test_a_window_maps_its_ends_to_black_and_white_and_no_number_to_black():
    grey = to_grey(np.array([-500, -100, 0, 100, 500, np.nan, np.inf, -np.inf]), (-100, 100))
    assert grey.tolist() == [0, 0, 128, 255, 255, 0, 255, 0]


def test_int16_does_not_overflow_in_a_wide_window():
    assert to_grey(np.array([-32768, 32767], np.int16), (-32768, 32767)).tolist() == [0, 255]


def test_windows_are_named_given_or_taken_from_what_is_seen():
    assert resolve_window("lung", []) == WINDOWS["lung"]
    assert resolve_window((-160, 240), []) == (-160, 240)
    assert resolve_window("auto", [np.arange(101.0), np.array([np.nan])]) == (1, 99)
    assert resolve_window("auto", [np.full(3, 7)]) == (7, 8)


@pytest.mark.parametrize("window", ["brain", (10, 10), (1, 2, 3)])
def test_a_window_that_is_none_is_an_error(window):
    with pytest.raises(UsageError, match="window"):
        three_planes(marked(), window_hu=window)


@pytest.mark.parametrize("shape", [(1, 300, 300), (300, 1, 2), (1, 1, 1)])
def test_the_thinnest_volumes_have_a_picture(shape):
    volume = Volume(np.zeros(shape, np.float32), Geometry.axis_aligned(shape, (1, 1, 1), (0, 0, 0)))
    assert three_planes(volume, size_px=96, title="a title far too long for so small a picture " * 3).width > 288


def test_an_outline_runs_around_the_marked_voxels_on_their_side_and_the_rest_is_dimmed():
    volume = Volume(np.full((30, 40, 40), 1000, np.int16), Geometry.axis_aligned((30, 40, 40), (4, 4, 4), (0, 0, 0)))
    inside = np.zeros((30, 40, 40), bool)
    inside[:, :, 20:] = True  # the patient's left, on the right of axial and coronal panels
    plain = np.asarray(three_planes(volume, title="?"))
    drawn = np.asarray(three_planes(volume, title="?", outlined_zyx=inside))
    row, left = 160, Layout.of(320).panel + Layout.of(320).gap  # the middle of the coronal panel
    white = np.flatnonzero((plain[row, left : left + 320] == 255).all(-1))
    pixels = drawn[row, left : left + 320][white]
    half = len(white) // 2
    assert (pixels[5 : half - 2] == 153).all()  # 0.6 of white
    assert (pixels[half + 3 : -5] == 255).all()
    edge = np.flatnonzero((pixels == (255, 93, 143)).all(-1))
    assert half <= edge[0] <= half + 1 and len(white) - 1 in edge
