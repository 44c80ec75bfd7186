"""MONAI, as its documentation chains its transforms."""

from __future__ import annotations

import numpy as np
from monai.transforms import Compose, LoadImaged, Orientationd, ResizeWithPadOrCropd, ScaleIntensityRanged, Spacingd
from plain_zarr import save


def prepare(scan: str, out: str) -> None:
    """Eager: each transform makes its array."""
    _prepare(scan, out, lazy=False)


def prepare_lazily(scan: str, out: str) -> None:
    """Lazy: MONAI merges the spatial transforms into one resampling."""
    _prepare(scan, out, lazy=True)


def _prepare(scan: str, out: str, lazy: bool) -> None:
    chain = Compose(
        [
            LoadImaged(keys="image", ensure_channel_first=True),
            Orientationd(keys="image", axcodes="LPS", labels=None),
            Spacingd(keys="image", pixdim=(1.0, 1.0, 1.0), mode="bilinear"),
            ResizeWithPadOrCropd(keys="image", spatial_size=(364, 364, 364), constant_values=-1000),
            ScaleIntensityRanged(keys="image", a_min=-1000, a_max=1000, b_min=-1000, b_max=1000, clip=True),
        ],
        lazy=lazy,
    )
    image = chain({"image": scan})["image"]
    save(np.rint(image.numpy()[0]).transpose(2, 1, 0), out)
