"""A scan on disk -> a volume -> a store -> rows of questions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from photon_data.mask_store import open_masks
    from photon_data.prepare_file import prepare
    from photon_data.readers import read
    from photon_data.recipe import Policy, Recipe
    from photon_data.store import open_volume
    from photon_data.volume import Geometry, Volume

HOMES = {
    "Geometry": "volume",
    "Policy": "recipe",
    "Recipe": "recipe",
    "Volume": "volume",
    "open_masks": "mask_store",
    "open_volume": "store",
    "prepare": "prepare_file",
    "read": "readers",
}
__all__ = ["Geometry", "Policy", "Recipe", "Volume", "open_masks", "open_volume", "prepare", "read"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `photon-data --help` must not wait for zarr."""
    from importlib import import_module

    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
