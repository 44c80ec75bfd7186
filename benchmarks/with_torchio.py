"""TorchIO, as its documentation chains its transforms."""

from __future__ import annotations

import torchio as tio
from plain_zarr import save


def prepare(scan: str, out: str) -> None:
    """To RAS+ (its canonical orientation), 1 mm, 364^3, clipped."""
    chain = tio.Compose(
        [tio.ToCanonical(), tio.Resample(1), tio.CropOrPad(364, padding_mode=-1000), tio.Clamp(-1000, 1000)]
    )
    image = chain(tio.ScalarImage(scan))
    save(image.data[0].round().numpy().transpose(2, 1, 0), out)
