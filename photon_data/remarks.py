"""What a person should know about a prepared (or inspected) scan, in short plain sentences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

from photon_data.hounsfield import BELOW_AIR_HU, FAR_BELOW_AIR_HU
from photon_data.records import VolumeRecord
from photon_data.volume import ENDS, WAYS, Geometry, body_axes, tilt_degrees

# World axes by the names they have in `facts`.
AXES = ("x", "y", "z")

# Less than this is not called cut off.
SMALLEST_CUT_MM = 1.0
COARSE_RATIO, COARSE_MM = 3.0, 5.0
FEW_SLICES = 10
EMPTY_SHARE_OF_GRID = 0.7
TILT_DEGREES = 5.0
# A CT of a body holds air and bone. One without them may be scaled wrongly, or be cut out of a larger scan.
BONE_HU, AIR_HU = 300, -900

# A remark on anything but what is cut off weighs as much as this many millimetres cut off.
_REMARK_MM = 50.0


def all_remarks(record: VolumeRecord) -> list[str]:
    """Return remarks on what was measured of one scan, most important first; none where nothing was measured."""
    return cut_remarks(record) + other_remarks(record)


def is_hu(facts: Mapping[str, Any]) -> bool:
    """Tell whether values are in HU: false where a policy accepted values that cannot be."""
    return "modality" not in facts.get("policy", {})


def cut_remarks(record: VolumeRecord) -> list[str]:
    """Return a sentence for each axis of the body along which something is cut off.

    "18 mm of the scan lie outside of the grid at its left end", and at its right end where that loses something too.
    """
    remarks = []
    for ends, names in zip(ends_mm(record.facts or {}, "cut_mm"), ENDS, strict=True):
        lost = [(mm, name) for mm, name in zip(ends, names, strict=True) if mm >= SMALLEST_CUT_MM]
        if lost:
            remark = f"{lost[0][0]:.0f} mm of the scan lie outside of the grid at its {lost[0][1]} end"
            for mm, name in lost[1:]:
                amount = "as much" if round(mm) == round(lost[0][0]) else f"{mm:.0f} mm"
                remark += f", and {amount} at its {name} end"
            remarks.append(remark)
    return remarks


def other_remarks(record: VolumeRecord) -> list[str]:
    """Return the remarks on everything but what is cut off: intensities, geometry, how much of the grid is filled."""
    facts = record.facts or {}
    return _on_values(facts, in_hu=is_hu(facts)) + _on_geometry(facts) + _on_empty_grid(facts)


def attention(record: VolumeRecord, other: list[str]) -> float:
    """Return how much a volume needs eyes, to sort by: mm cut off, plus 50 for each of the `other_remarks`."""
    return sum(max(0.0, mm) for ends in ends_mm(record.facts or {}, "cut_mm") for mm in ends) + _REMARK_MM * len(other)


def ends_mm(facts: Mapping[str, Any], key: str) -> list[tuple[float, float]]:
    """Return "cut_mm" or "pad_mm" as (low end, high end), for the world axes L, P, S; zeros where not measured."""
    ends = (facts.get(key) or {}).get
    return [(float(low), float(high)) for low, high in (ends(axis) or (0.0, 0.0) for axis in AXES)]


def duplicates(records: Iterable[VolumeRecord]) -> list[list[VolumeRecord]]:
    """Return the groups, larger ones first, of two or more records whose files have the very same content."""
    by_content = sorted((r for r in records if r.fingerprint), key=lambda record: str(record.fingerprint))
    groups = (list(group) for _, group in groupby(by_content, lambda record: record.fingerprint))
    return sorted((group for group in groups if len(group) > 1), key=lambda group: (-len(group), group[0].id))


def _on_values(facts: Mapping[str, Any], *, in_hu: bool) -> list[str]:
    before, after = facts.get("hu_before") or {}, facts.get("hu_after") or {}
    low, high = before.get("min"), before.get("max")
    remarks = [f"NaN or infinite voxels were filled: {before['non_finite']:,}"] if before.get("non_finite") else []
    if low is not None and low == high:
        return [*remarks, f"all voxels have the same value, {low:g}"]
    if after.get("min") is not None and after["min"] == after.get("max"):
        remarks.append(f"all voxels of the prepared volume have the same value, {after['min']:g}")
    if (padding := facts.get("undeclared_padding_hu")) is not None:
        remarks.append(f"undeclared padding: {padding:g} HU was made air before it was interpolated")
    elif in_hu and low is not None and FAR_BELOW_AIR_HU <= low < BELOW_AIR_HU and before.get("p01") == low:
        remarks.append(f"at least 1 % of the voxels are {low:g} HU: undeclared padding? It reaches into its neighbours")
    if in_hu and high is not None and high < BONE_HU:
        remarks.append(f"HU maximum {high:g} is below {BONE_HU}: no bone?")
    if in_hu and low is not None and low > AIR_HU:
        remarks.append(f"HU minimum {low:g} is above {AIR_HU}: no air?")
    return remarks


def _on_geometry(facts: Mapping[str, Any]) -> list[str]:
    if not facts.get("geometry"):
        return []
    geometry = Geometry.from_json(facts["geometry"])
    spacings, remarks = geometry.spacing_zyx_mm, []
    if slices := facts.get("slices"):
        missing = sum(count for *_, count in slices["gaps"])
        found = f"{missing} missing slices were interpolated" if missing else "its slices lie at uneven distances"
        remarks.append(found)
    for name, axis in zip(AXES, body_axes(geometry).array_axis, strict=True):
        spacing, in_plane = spacings[axis], max(spacings[:axis] + spacings[axis + 1 :])
        if spacing > COARSE_RATIO * in_plane:
            found = f"over three times the in-plane spacing ({in_plane:.2f} mm)"
            remarks.append(f"spacing {spacing:.1f} mm along {name} is {found}")
        elif spacing > COARSE_MM:
            remarks.append(f"spacing {spacing:.1f} mm along {name} is coarse")
        if geometry.shape_zyx[axis] < FEW_SLICES:
            remarks.append(f"only {geometry.shape_zyx[axis]} slices along {name}")
    if not geometry.is_orthogonal(1e-3):
        remarks.append("its axes are not perpendicular (tilted gantry?)")
    if (tilt := tilt_degrees(geometry)) >= TILT_DEGREES:
        remarks.append(f"its axes are tilted by {tilt:.0f}° against the body's")
    return remarks


def _on_empty_grid(facts: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each axis along which the scan fills little of the grid."""
    if not facts.get("grid"):
        return []
    sizes_zyx_mm = [n * s for n, s in zip(facts["grid"]["shape_zyx"], facts["grid"]["spacing_zyx_mm"], strict=True)]
    remarks = []
    for ends, size_mm, way in zip(ends_mm(facts, "pad_mm"), sizes_zyx_mm[::-1], WAYS, strict=True):
        empty = sum(max(0.0, mm) for mm in ends)
        if empty > EMPTY_SHARE_OF_GRID * size_mm:
            remarks.append(f"the scan covers {size_mm - empty:.0f} of the grid's {size_mm:.0f} mm from {way}")
    return remarks
