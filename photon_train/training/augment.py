"""Augmentation of training volumes with torchio: never a reflection, which would swap left and right."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from photon_data import open_volume
from photon_train.processing_photon import NIFTI

AIR_HU = -1000


@dataclass(frozen=True)
class Augment:
    """What is done to a volume, drawn anew for every reading. kind: none, intensity, affine or both."""

    kind: str = "none"
    degrees: float = 5.0
    translation_mm: float = 10.0
    scale: float = 0.1
    noise_hu: float = 25.0
    log_gamma: float = 0.1

    def __call__(self, path: str, rng: random.Random) -> Any:
        """Return the path when nothing is to be done, else int16 HU [z, y, x] on the model grid."""
        if self.kind == "none" or path.endswith(NIFTI):
            return path
        volume = open_volume(path, grid="model")
        return self.applied(volume.numpy(), volume.geometry.spacing_zyx_mm, rng)

    def applied(self, hu_zyx: np.ndarray, spacing_zyx_mm: tuple[float, float, float], rng: random.Random) -> np.ndarray:
        """Return the augmented array. torchio draws from torch's generator, which is left as it was."""
        import torchio  # an extra

        image = torchio.ScalarImage(
            tensor=torch.from_numpy(hu_zyx[None].astype(np.float32)), affine=np.diag([*spacing_zyx_mm, 1.0])
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rng.getrandbits(63))
            for transform in self._transforms(torchio):
                image = transform(image)
        low, high = float(hu_zyx.min()), float(hu_zyx.max())
        return np.rint(image.data[0].numpy()).clip(low, high).astype(np.int16)

    def _transforms(self, torchio: Any) -> list[Any]:
        found = []
        if self.kind in ("affine", "both"):
            found.append(
                torchio.RandomAffine(
                    scales=self.scale, degrees=self.degrees, translation=self.translation_mm, default_pad_value=AIR_HU
                )
            )
        if self.kind in ("intensity", "both"):
            found += [torchio.RandomGamma(log_gamma=self.log_gamma), torchio.RandomNoise(std=(0, self.noise_hu))]
        return found
