"""Photon: the model, its processor, and training."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from photon_train.configuration_photon import PhotonConfig
    from photon_train.modeling_photon import PhotonForConditionalGeneration
    from photon_train.processing_photon import PhotonProcessor

__all__ = ["PhotonConfig", "PhotonForConditionalGeneration", "PhotonProcessor"]
HOMES = {"PhotonConfig": "configuration", "PhotonForConditionalGeneration": "modeling", "PhotonProcessor": "processing"}


def __getattr__(name: str) -> Any:
    """Import the public names when they are first used: `photon --help` must not wait for torch."""
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{HOMES[name]}_photon"), name)


if "transformers" in sys.modules:  # its Auto classes know Photon once this is imported
    import_module(f"{__name__}.modeling_photon")
    import_module(f"{__name__}.processing_photon")
