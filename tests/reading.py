"""What the tests of the readers share: one file on disk -> its Scan, its voxels, or the code it is refused with."""

from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from photon_data.errors import Refused
from photon_data.readers import open_scan
from photon_data.readers.find import find_scans
from photon_data.recipe import Policy
from photon_data.scan import Scan

# Every way to lay three array axes along three world axes: signed permutation matrices, the left-handed ones too.
AXIS_ORDERS = [
    np.diag(signs)[list(order)] for order in permutations(range(3)) for signs in product((1.0, -1.0), repeat=3)
]


def open_file(path: Path, **options) -> Scan:
    (source,) = find_scans(path).sources
    return open_scan(source, Policy(**options))


def voxels(scan: Scan) -> np.ndarray:
    return np.stack([plane.copy() for plane in scan.planes()])


def refusal(path: Path, **options) -> Refused:
    with pytest.raises(Refused) as caught:
        voxels(open_file(path, **options))
    assert path.name.split(".")[0] in caught.value.message and len(caught.value.message) < 500
    return caught.value


def assert_equals_simpleitk(scan: Scan, path: Path) -> None:
    """The stored values scaled, and the world position of every corner, are SimpleITK's."""
    image = sitk.ReadImage(str(path))
    hu = voxels(scan) * scan.slope + scan.intercept
    np.testing.assert_allclose(sitk.GetArrayFromImage(image), hu, rtol=1e-6)
    for corner in product(*[(0, n - 1) for n in scan.geometry.shape_zyx]):
        expected = image.TransformIndexToPhysicalPoint(corner[::-1])
        np.testing.assert_allclose(scan.geometry.world(corner), expected, atol=1e-3)
