"""What the report needs of one prepared volume, worked out once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from photon_data.problems import attention, cut_mm, cut_remarks, other_remarks
from photon_data.records import VolumeRecord
from photon_data.upright import body_axes
from photon_data.volume import Geometry


class Row(NamedTuple):
    """One volume: its record, remarks, and its measures along the world axes L, P, S (None where not measured)."""

    record: VolumeRecord
    cut_remarks: list[str]
    other_remarks: list[str]
    attention: float
    spacing_lps_mm: tuple[float, ...] | None
    extent_lps_mm: tuple[float, ...] | None
    cut_mm: list[tuple[float, float]]

    @property
    def facts(self) -> dict[str, Any]:
        """What was measured, empty where nothing was."""
        return self.record.facts or {}


def rows_of(records: Sequence[VolumeRecord], *, modality: str) -> list[Row]:
    """Return a row for each volume that is there, those that most need eyes first."""
    rows = [_row(record, modality) for record in records if record.is_there]
    return sorted(rows, key=lambda row: (-row.attention, row.record.id))


def _row(record: VolumeRecord, modality: str) -> Row:
    facts, other = record.facts or {}, other_remarks(record, modality=modality)
    spacing, extent = _measures(facts["geometry"]) if facts.get("geometry") else (None, None)
    return Row(record, cut_remarks(record), other, attention(record, other), spacing, extent, cut_mm(facts))


def _measures(native: dict[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return spacing and extent in mm along L, P, S; the extent of a tilted scan is that of the box around it."""
    geometry = Geometry.from_json(native)
    spacing = tuple(geometry.spacing_zyx_mm[axis] for axis in body_axes(geometry).array_axis)
    corners = geometry.corners_lps()
    return spacing, tuple(float(mm) for mm in np.ptp(corners, axis=0))
