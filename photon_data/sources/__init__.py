"""Data sets as their publishers lay them out -> plain volumes and questions: one small file each, one signature."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from photon_data.sources import abdomenatlas, ct_rate, deeptumorvqa, m3d, rad3d, table
from photon_data.sources.collected import Adapter, Collected

__all__ = ["ADAPTERS", "Adapter", "Collected"]

ADAPTERS: Mapping[str, Adapter] = MappingProxyType(
    {
        "ct-rate": ct_rate.ADAPTER,
        "3d-rad": rad3d.ADAPTER,
        "deeptumorvqa": deeptumorvqa.ADAPTER,
        "abdomenatlas3": abdomenatlas.ADAPTER,
        "table": table.TABLE,
        "folder": table.FOLDER,
        "phantom": table.PHANTOM,
        "m3d": m3d.ADAPTER,
    }
)
