import os
import subprocess
import sys

import nibabel
import numpy as np
import pytest
from scans import AXIS_ORDERS, frame, rotated, to_sitk

from photon_data.volume import Geometry, Volume, inverse

GRIDS = [frame((4, 5, 6), AXIS_ORDERS[i]) for i in (0, 5, 13, 22, 38, 47)]
GRIDS += [rotated(GRIDS[0], (10, 0, 0)), rotated(GRIDS[2], (7, -20, 33))]


@pytest.mark.parametrize("geometry", GRIDS)
def test_world_positions_equal_those_of_itk(geometry):
    image = to_sitk(np.zeros(geometry.shape_zyx, np.int16), geometry)
    for z, y, x in [(0, 0, 0), (3, 4, 5), (1, 0, 2)]:
        assert np.allclose(geometry.world((z, y, x)), image.TransformIndexToPhysicalPoint((x, y, z)), atol=1e-9)
        assert np.allclose(geometry.index(image.TransformIndexToPhysicalPoint((x, y, z))), (z, y, x), atol=1e-9)


@pytest.mark.parametrize("geometry", GRIDS)
def test_a_volume_handed_to_other_libraries_keeps_every_voxel_at_its_world_position(geometry):
    pytest.importorskip("torchio")
    array = np.random.default_rng(1).integers(-1000, 1000, geometry.shape_zyx).astype(np.int16)
    volume = Volume(array, geometry)
    image, nifti, tio = volume.to_sitk(), volume.to_nibabel(), volume.to_torchio()
    for z, y, x in [(0, 0, 0), (3, 4, 5), (2, 1, 4)]:
        at_lps = geometry.world((z, y, x))
        assert image[image.TransformPhysicalPointToIndex(at_lps.tolist())] == array[z, y, x]
        for affine, voxels in ((nifti.affine, np.asarray(nifti.dataobj)), (tio.affine, tio.data[0].numpy())):
            i, j, k = np.rint(np.linalg.inv(affine) @ [-at_lps[0], -at_lps[1], at_lps[2], 1])[:3].astype(int)
            assert voxels[i, j, k] == array[z, y, x]


def test_an_axis_aligned_grid_has_itks_identity_direction_and_the_given_centre():
    grid = Geometry.axis_aligned((4, 6, 10), (2, 1, 0.5), (7, -3, 11))
    assert np.array_equal(grid.direction_xyz, np.eye(3))
    # Half of (10 - 1) * 0.5, (6 - 1) * 1, (4 - 1) * 2 to the low side of the centre.
    assert grid.origin_lps == (7 - 2.25, -3 - 2.5, 11 - 3)
    assert nibabel.aff2axcodes(grid.affine_ras) == ("L", "P", "S")


def test_orientation_names_the_way_each_array_axis_goes():
    assert frame((2, 2, 2)).orientation == "SPL"
    assert frame((2, 2, 2), ((2, 1, 0), (-1, 1, -1))).orientation == "RPI"


def test_a_sheared_grid_is_kept_and_not_handed_to_itk():
    sheared = Geometry.from_arrays((3, 3, 3), (0, 0, 0), ((0, 0.8, 3), (0, 1, 0), (1, 0, 0)))
    assert not sheared.is_orthogonal()
    with pytest.raises(ValueError, match="sheared"):
        Volume(np.zeros((3, 3, 3)), sheared).to_sitk()
    assert Volume(np.zeros((3, 3, 3), np.int16), sheared).to_nibabel().header["qform_code"] == 0


@pytest.mark.parametrize("steps", [np.zeros((3, 3)), np.full((3, 3), np.nan), [[0, 0, 1], [0, 0, 2], [1, 0, 0]]])
def test_steps_that_span_no_volume_are_refused(steps):
    with pytest.raises(ValueError, match="expected finite, independent"):
        Geometry.from_arrays((2, 2, 2), (0, 0, 0), steps)


def test_an_array_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"expected an array of shape \(2, 3, 4\)"):
        Volume(np.zeros((4, 3, 2)), frame((2, 3, 4)))


def test_geometry_survives_json():
    for geometry in GRIDS:
        assert Geometry.from_json(geometry.to_json()) == geometry


@pytest.mark.parametrize("degrees", [(40, 0, 40), (45, 0, 0), (44, 46, 30), (-40, 35, 130)])
def test_letters_of_an_oblique_orientation_never_repeat(degrees):
    for order in AXIS_ORDERS[::5]:
        letters = rotated(frame((3, 3, 3), order), degrees).orientation
        assert sorted("RAI".find(a) if a in "RAI" else "LPS".find(a) for a in letters) == [0, 1, 2]


def test_letters_of_orientation_are_nibabels_where_the_axes_are_clear():
    for order in AXIS_ORDERS:
        geometry = rotated(frame((3, 3, 3), order), (10, -15, 20))
        assert geometry.orientation == "".join(nibabel.aff2axcodes(geometry.affine_ras))[::-1]


def test_the_frame_of_an_oblique_scan_has_the_same_bits_on_every_cpu():
    script = """if True:
        import nibabel
        import numpy as np
        from photon_data.readers.nifti import _qform
        from photon_data.resample import grid_to_native
        from photon_data.volume import Geometry, inverse

        for seed in range(20):
            random = np.random.default_rng(seed)
            scan = Geometry.from_arrays((30, 60, 70), random.normal(size=3), np.eye(3) + random.normal(0, 0.2, (3, 3)))
            grid = Geometry.axis_aligned((16, 20, 20), (2, 1.1, 0.7), scan.centre_lps)
            there = grid_to_native(scan, grid)
            assert np.allclose(inverse(there), np.linalg.inv(there), rtol=1e-9)
            header = nibabel.Nifti1Header()
            for letter, number in zip("bcd", random.uniform(-0.57, 0.57, 3)):
                header[f"quatern_{letter}"] = number
            print(_qform(header).tolist())
            print(grid, there.tolist(), inverse(there).tolist(), scan.corners_lps().tolist(), scan.voxel_ml)
    """
    # Of numpy's BLAS, where that is OpenBLAS on x86: sums of two orders, and fused ones.
    kernels = ("Prescott", "Nehalem", "Haswell")
    said = [
        subprocess.check_output([sys.executable, "-c", script], env={**os.environ, "OPENBLAS_CORETYPE": kernel})
        for kernel in kernels
    ]
    assert said[0] == said[1] == said[2] != b""


def test_the_inverse_is_that_of_hand_arithmetic_rows_exchanged_where_a_pivot_is_0():
    found = inverse(np.array([[0.0, 2, 0], [4, 0, 0], [1, 0, 8]]))
    assert found.tolist() == [[0, 0.25, 0], [0.5, 0, 0], [0, -0.03125, 0.125]]
    with pytest.raises(ValueError, match="expected a regular matrix"):
        inverse(np.array([[1.0, 2], [2, 4]]))


@pytest.mark.parametrize("grid", GRIDS)
def test_the_extent_is_that_of_the_box_around_the_corners(grid):
    assert grid.extent_lps_mm == pytest.approx(np.ptp(grid.corners_lps(), axis=0))


def test_axes_are_perpendicular_up_to_the_tolerance_of_their_cosine():
    tilted = np.array([[0, 0.3, 2.0], [0, 0.7, 0], [-0.7, 0, 0]])  # a gantry tilted by 8.5 degrees: cosine 0.148
    assert not Geometry.from_arrays((4, 5, 6), (0, 0, 0), tilted).is_orthogonal(0.148)
    assert Geometry.from_arrays((4, 5, 6), (0, 0, 0), tilted).is_orthogonal(0.149)
    assert all(grid.is_orthogonal(1e-9) for grid in GRIDS)


def test_a_voxel_has_the_volume_that_its_steps_span():
    assert Geometry.from_arrays((4, 5, 6), (0, 0, 0), [[0, 0.3, 2], [0, 0.7, 0], [-0.5, 0, 0]]).voxel_ml == 0.0007
    for grid in GRIDS:
        assert grid.voxel_ml == pytest.approx(abs(np.linalg.det(grid.steps_lps)) / 1000)
    for steps in ([[1, 0, 0], [0, 1, 0], [1, 1, 0]], [[1, 0, 0], [0, np.nan, 0], [0, 0, 1]], np.eye(3) * 1e-4):
        with pytest.raises(ValueError, match="independent steps"):
            Geometry.from_arrays((4, 5, 6), (0, 0, 0), steps)
