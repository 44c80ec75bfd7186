"""What it would change to clip a scan at -1000 HU before it is interpolated, instead of after (docs/stores.md).

    python benchmarks/clip_first.py

A cylinder of tissue in air, with noise as of smooth to very sharp kernels; then one that a circle of padding cuts off.
"""

from __future__ import annotations

from unittest.mock import patch

import numpy as np

from photon_data import hounsfield
from photon_data.prepare_file import prepare_volume
from photon_data.recipe import Policy, Recipe
from photon_data.scan import Scan
from photon_data.volume import Geometry

RECIPE = Recipe(shape_zyx=(48, 160, 160), model_shape_zyx=(14, 28, 28))
SHAPE = (36, 192, 192)


def prepared(hu: np.ndarray, clip: bool) -> np.ndarray:
    """Return the volume of a scan whose values are clipped first or not."""
    array = np.maximum(hu, -1000) if clip else hu
    geometry = Geometry.axis_aligned(array.shape, (1.25, 0.78, 0.78), (0, 0, 0))
    scan = Scan(geometry, array.dtype, 1.0, 0.0, lambda: iter(array), "phantom")
    return prepare_volume(scan, RECIPE, Policy(modality="other")).volume.numpy().astype(int)


def main() -> None:
    """Print the differences."""
    _, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij")
    body, circle = y**2 / 0.4 + x**2 / 0.6 < 1, y**2 + x**2 < 0.45
    noise = np.random.default_rng(0).normal(0, 1, SHAPE)
    noise += np.roll(noise, 1, 1) + np.roll(noise, 1, 2)  # neighbours are alike, as after reconstruction
    noise /= noise.std()
    place = prepared(np.where(body, 500, -1000).astype(np.int16), clip=False)
    tissue, air = place == 500, place == -1000
    for deviation in (12, 30, 60, 150):
        hu = (np.where(body, 40, -1000) + deviation * noise).astype(np.int16)
        change = prepared(hu, clip=True) - prepared(hu, clip=False)
        print(
            f"noise of {deviation:3d} HU: {np.mean(change != 0):4.0%} of all voxels change; "
            f"tissue by {change[tissue].mean():.2f} HU (at most {np.abs(change[tissue]).max()}), "
            f"air by {change[air].mean():.2f} (at most {np.abs(change[air]).max()})"
        )
    hu = (np.where(body, 40, -1000) + 30 * noise).astype(np.int16)
    right = prepared(np.where(circle, hu, -1000).astype(np.int16), clip=False)
    for padding in (-1024, -1100, -1200, -1400, -1501, -2000):
        scan = np.where(circle, hu, padding).astype(np.int16)
        seen = np.abs(prepared(scan, clip=False) - right)
        with patch.object(hounsfield, "LEAST_PADDING", 2.0):  # more than all voxels: it is never seen
            left = np.abs(prepared(scan, clip=False) - right)
        print(
            f"padding of {padding}: the body's cut edge is off by at most {seen.max()} HU; "
            f"where undeclared padding is not looked for, {left.max()} HU, {np.mean(left > 50):.2%} > 50"
        )


if __name__ == "__main__":
    main()
