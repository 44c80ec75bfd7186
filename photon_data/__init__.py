"""A scan on disk -> a volume -> a store -> manifest rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from photon_data.store import open_volume
    from photon_data.volume import Geometry, Volume

__all__ = ["Geometry", "Volume", "open_volume"]


def __getattr__(name: str) -> Any:
    """Import the public names when they are first used: `photon-data --help` must not wait for zarr."""
    from importlib import import_module

    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{'store' if name == 'open_volume' else 'volume'}"), name)
