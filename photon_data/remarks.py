"""What a person should know about a prepared (or inspected) scan, in short plain sentences."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from photon_data.records import VolumeRecord
from photon_data.volume import ENDS, WAYS, Geometry, body_axes, tilt_degrees

# World axes by the names they have in `facts`.
AXES = ("x", "y", "z")

CUT_WORTH_SAYING_MM = 1.0
COARSE_RATIO = 3.0
COARSE_MM = 5.0
FEW_SLICES = 10
EMPTY_SHARE_OF_GRID = 0.7
TILT_DEGREES = 5.0
# A CT of a body holds air and bone; one whose values do not reach them may be scaled wrongly or cut out.
BONE_HU, AIR_HU = 300, -900

# One remark that is not about the field of view weighs as much as this many millimetres cut off.
_REMARK_MM = 50.0


def problems(record: VolumeRecord) -> list[str]:
    """Return remarks on what was measured of one scan, most important first; none where nothing was measured.

    Why a scan was refused is not repeated: that is `record.reason`.
    No remarks on HU are made where a policy accepted what cannot be HU.
    """
    return cut_remarks(record) + other_remarks(record)


def cut_remarks(record: VolumeRecord) -> list[str]:
    """Return a sentence for each axis of the body along which something is lost."""
    return [
        remark
        for ends, names in zip(cut_mm(record.facts or {}), ENDS, strict=True)
        for remark in _about_cut(ends, names)
    ]


def other_remarks(record: VolumeRecord) -> list[str]:
    """Return the remarks on everything but what is cut off: intensities, geometry, how much of the grid is filled."""
    facts = record.facts or {}
    return (
        _about_values(facts, is_ct="modality" not in facts.get("policy", {}))
        + _about_geometry(facts)
        + _about_room(facts)
    )


def attention(record: VolumeRecord, other: list[str]) -> float:
    """Return how much a volume needs eyes, to sort by: mm cut off, plus 50 for each of the `other_remarks`."""
    return sum(max(0.0, mm) for ends in cut_mm(record.facts or {}) for mm in ends) + _REMARK_MM * len(other)


def cut_mm(facts: dict[str, Any]) -> list[tuple[float, float]]:
    """Return (low end, high end) in mm that lie outside of the grid, for the world axes L, P, S; zeros where not measured."""
    return _ends_mm(facts, "cut_mm")


def duplicates(records: Iterable[VolumeRecord]) -> list[list[VolumeRecord]]:
    """Return the groups, larger ones first, of two or more records whose files have the very same content."""
    groups = defaultdict(list)
    for record in records:
        if record.fingerprint:
            groups[record.fingerprint].append(record)
    return sorted((group for group in groups.values() if len(group) > 1), key=lambda group: (-len(group), group[0].id))


def _about_cut(ends: tuple[float, float], names: tuple[str, str]) -> list[str]:
    """Return "18 mm of the scan lie outside of the grid at its left end", with the other end where that loses something too."""
    lost = [(mm, name) for mm, name in zip(ends, names, strict=True) if mm >= CUT_WORTH_SAYING_MM]
    if not lost:
        return []
    remark = f"{lost[0][0]:.0f} mm of the scan lie outside of the grid at its {lost[0][1]} end"
    for mm, name in lost[1:]:
        remark += f", and {'as much' if round(mm) == round(lost[0][0]) else f'{mm:.0f} mm'} at its {name} end"
    return [remark]


def _about_room(facts: dict[str, Any]) -> list[str]:
    """Return a sentence for each axis along which the scan fills little of the grid."""
    if not facts.get("grid"):
        return []
    sizes_mm = _extents_xyz_mm(facts["grid"])
    remarks = []
    for ends, size_mm, way in zip(_ends_mm(facts, "pad_mm"), sizes_mm, WAYS, strict=True):
        empty = sum(max(0.0, mm) for mm in ends)
        if empty > EMPTY_SHARE_OF_GRID * size_mm:
            remarks.append(f"the scan covers {size_mm - empty:.0f} of the grid's {size_mm:.0f} mm from {way}")
    return remarks


def _about_geometry(facts: dict[str, Any]) -> list[str]:
    if not facts.get("geometry"):
        return []
    geometry = Geometry.from_json(facts["geometry"])
    axes, tilt = body_axes(geometry), tilt_degrees(geometry)
    remarks = []
    for world_axis, array_axis in enumerate(axes.array_axis):
        remarks += _about_spacing(geometry, array_axis, AXES[world_axis])
        if geometry.shape_zyx[array_axis] < FEW_SLICES:
            remarks.append(f"only {geometry.shape_zyx[array_axis]} slices along {AXES[world_axis]}")
    if not geometry.is_orthogonal(1e-3):
        remarks.append("its axes are not perpendicular (tilted gantry?)")
    if tilt >= TILT_DEGREES:
        remarks.append(f"its axes are tilted by {tilt:.0f}° against the body's")
    return remarks


def _about_spacing(geometry: Geometry, array_axis: int, name: str) -> list[str]:
    spacing = geometry.spacing_zyx_mm[array_axis]
    other = max(s for axis, s in enumerate(geometry.spacing_zyx_mm) if axis != array_axis)
    if spacing > COARSE_RATIO * other:
        return [f"spacing {spacing:.1f} mm along {name} is over three times the in-plane spacing ({other:.2f} mm)"]
    return [f"spacing {spacing:.1f} mm along {name} is coarse"] if spacing > COARSE_MM else []


def _about_values(facts: dict[str, Any], *, is_ct: bool) -> list[str]:
    """Return remarks on the voxel values: filled, constant, or, for CT, without bone or air."""
    before, after = facts.get("hu_before") or {}, facts.get("hu_after") or {}
    low, high = before.get("min"), before.get("max")
    remarks = [f"NaN or infinite voxels were filled: {before['non_finite']:,}"] if before.get("non_finite") else []
    if low is not None and low == high:
        return [*remarks, f"all voxels have the same value, {low:g}"]
    if after.get("min") is not None and after["min"] == after.get("max"):
        remarks.append(f"all voxels of the prepared volume have the same value, {after['min']:g}")
    if is_ct and high is not None and high < BONE_HU:
        remarks.append(f"HU maximum {high:g} is below {BONE_HU}: no bone?")
    if is_ct and low is not None and low > AIR_HU:
        remarks.append(f"HU minimum {low:g} is above {AIR_HU}: no air?")
    return remarks


def _ends_mm(facts: dict[str, Any], key: str) -> list[tuple[float, float]]:
    measured = facts.get(key) or {}
    return [(float(low), float(high)) for low, high in (measured.get(axis) or (0.0, 0.0) for axis in AXES)]


def _extents_xyz_mm(grid: dict[str, Any]) -> list[float]:
    """Return the sizes in mm of an axis-aligned grid (`Geometry.to_json()`) along L, P, S."""
    return [n * s for n, s in zip(grid["shape_zyx"], grid["spacing_zyx_mm"], strict=True)][::-1]
