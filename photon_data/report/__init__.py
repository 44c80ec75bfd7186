"""The report of a prepared folder: one HTML page that opens offline and shows in a minute what became of the scans.

This file works out what the page shows, with the remarks on each scan, which `inspect` prints too; report.html.j2 lays
it out.
"""

from __future__ import annotations

import io
import logging
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from photon_data.errors import first_few
from photon_data.hounsfield import BELOW_AIR_HU, FAR_BELOW_AIR_HU, HISTOGRAM_RANGE
from photon_data.picture import AUTO, Window, three_planes
from photon_data.recipe import Recipe
from photon_data.records import STATES, VolumeRecord
from photon_data.report.page import Chart, Mark, data_url, histogram, hu_profile, render, sparkline, without_folders
from photon_data.volume import ENDS, LETTERS, WAYS, Geometry, Volume, body_axes, tilt_degrees

log = logging.getLogger(__name__)

OpenVolume = Callable[[VolumeRecord], Volume]

NO_PICTURE = "No picture could be made."  # what a page says in the place of one
TEMPLATE = Path(__file__).parent / "report.html.j2"
MOST_VOLUME_LINES, MOST_REFUSED_LINES, MOST_DUPLICATE_LINES, MOST_CHANGED_LINES = 5_000, 2_000, 200, 2_000
PANEL_PX, JPEG_QUALITY = 240, 80
# Lung, soft tissue and bone can all be told apart in it.
CT_WINDOW: Window = (-1000, 500)


def render_report(
    records: Sequence[VolumeRecord],
    *,
    recipe: Recipe,
    open_volume: OpenVolume,
    title: str,
    source: str,
    pictures: int = 48,
    tools: Mapping[str, str] | None = None,
    masks: Sequence[VolumeRecord] = (),
) -> bytes:
    """Return the page as UTF-8: the same bytes for the same records, recipe and stores.

    `open_volume` returns the model grid of a record; it is called for at most `pictures` of them, and what it raises is
    shown in that volume's place. `tools` maps names to versions; `masks` are rows of masks.jsonl. Of absolute paths, in
    `source` too, only the last part is shown.
    """
    volumes, measures = _ranked(records)
    measured = len(measures.extent_lps_mm)
    counts = Counter(record.state for record in records)
    listed = volumes[pictures : pictures + MOST_VOLUME_LINES]
    changed = _changed_lines(records)
    same_content = [(len(group), first_few([record.id for record in group], 10)) for group in duplicates(records)]
    values = {
        "title": title,
        "source": re.sub(r"//[^/@]*@", "//", source) if "://" in source else Path(source).name or source,
        "inputs": len(records),
        "counts": {state: counts[state] for state in [*STATES, *sorted(set(counts) - set(STATES))]},
        "bytes_read": sum(record.bytes_in for record in records),
        "bytes_of_stores": sum(record.store_bytes or 0 for record in records),
        "recipe": recipe,
        "tools": tools or {},
        "measured": measured,
        "chapters": _summary_charts(measures, recipe) if measured else {},
        "lost": _lost_groups(records),
        "changed": changed[:MOST_CHANGED_LINES],
        "changed_left": len(changed[MOST_CHANGED_LINES:]),
        "same_content": same_content[:MOST_DUPLICATE_LINES],
        "same_content_left": len(same_content[MOST_DUPLICATE_LINES:]),
        "masks": len(masks),
        "masks_there": sum(row.is_there for row in masks),
        "mask_problems": _masks_that_need_eyes(masks)[:MOST_REFUSED_LINES],
        "volumes": len(volumes),
        "cards": [_card(reported(record), open_volume) for record in volumes[:pictures]],
        "lines": listed,
        "volumes_left": len(volumes) - len(volumes[:pictures]) - len(listed),
        "cut_shown_mm": SMALLEST_CUT_MM,
        "without_picture": NO_PICTURE,
    }
    return render(TEMPLATE, values, {"size": _size, "reported": reported, "times": _times})


class ReportedVolume(NamedTuple):
    """A volume: its record, remarks, and its measures along the world axes L, P, S (None where not measured)."""

    record: VolumeRecord
    cut_remarks: list[str]
    other_remarks: list[str]  # on intensities, geometry, how much of the grid is filled
    attention: float  # how much it needs eyes, to sort by: mm cut off, plus 50 for each of the other remarks
    spacing_lps_mm: tuple[float, ...] | None
    extent_lps_mm: tuple[float, ...] | None
    cut_mm: list[tuple[float, float]]

    @property
    def facts(self) -> Mapping[str, Any]:
        """What was measured, empty where nothing was."""
        return self.record.facts or {}

    @property
    def sides_mm(self) -> list[tuple[str, float]]:
        """The mm cut off at each side of the body, by its letter: R, L, A, P, I, S."""
        return list(zip(chain.from_iterable(LETTERS), chain.from_iterable(self.cut_mm), strict=True))


class Measures(NamedTuple):
    """What the charts show of the volumes that were measured: numbers, since there may be a million of them."""

    spacing_lps_mm: np.ndarray  # [n, 3]
    extent_lps_mm: np.ndarray  # [n, 3]
    cut_lps_mm: np.ndarray  # [n, 3], at both ends together
    hu: Mapping[str, Sequence[float]]  # {"p50": ..., "p99": ...}, where it was measured
    shares: np.ndarray  # of voxels in each bin, summed over the volumes
    profiles: int  # how many volumes these are


def _ranked(records: Sequence[VolumeRecord]) -> tuple[list[VolumeRecord], Measures]:
    """Return the volumes that are there, those that most need eyes first, and what the charts show of them."""
    there = sorted((record for record in records if record.is_there), key=lambda record: record.id)
    attention_mm, numbers, hu = array("d"), array("d"), {"p50": array("d"), "p99": array("d")}
    shares, profiles = np.zeros(0), 0
    for record in there:
        volume = reported(record)
        attention_mm.append(volume.attention)
        if not (volume.spacing_lps_mm and volume.extent_lps_mm):
            continue
        numbers.extend((*volume.spacing_lps_mm, *volume.extent_lps_mm, *map(sum, volume.cut_mm)))
        statistics = volume.facts.get("hu_before") or {}
        counts = statistics.get("histogram") or []
        if total := sum(counts):
            shares, profiles = np.asarray(counts, float) / total + (shares if profiles else 0), profiles + 1
        for key, found in hu.items():
            if statistics.get(key) is not None:
                found.append(statistics[key])
    table = np.asarray(numbers).reshape(-1, 3, 3)
    measures = Measures(table[:, 0], table[:, 1], table[:, 2], hu, shares, profiles)
    return [there[i] for i in np.argsort(-np.asarray(attention_mm), kind="stable")], measures


def reported(record: VolumeRecord) -> ReportedVolume:
    """Return what is said of a volume; no remarks and no measures where nothing was measured."""
    facts = record.facts or {}
    cut_mm = _ends_mm(facts, "cut_mm")
    other, spacing, extent = _on_values(facts, in_hu=is_hu(facts)), None, None
    if facts.get("geometry"):
        geometry = Geometry.from_json(facts["geometry"])
        spacing = tuple(geometry.spacing_zyx_mm[axis] for axis in body_axes(geometry).array_axis)
        extent = geometry.extent_lps_mm
        other += _on_slices(facts.get("slices")) + _on_geometry(geometry)
    other += _on_empty_grid(facts)
    attention = sum(max(0.0, mm) for mm in chain.from_iterable(cut_mm)) + _REMARK_MM * len(other)
    return ReportedVolume(record, _on_cuts(cut_mm), other, attention, spacing, extent, cut_mm)


def _summary_charts(measures: Measures, recipe: Recipe) -> dict[str, list[Chart]]:
    """Return the charts of all volumes that were measured, by the heading that they stand under."""
    grid_mm = [n * s for n, s in zip(recipe.shape_zyx, recipe.spacing_mm, strict=True)][::-1]
    spacings, extents, cuts = [], [], []
    for axis, (letter, way) in enumerate(zip(AXES, WAYS, strict=True)):
        name = f"{letter}, {way}"
        spacings.append(histogram(measures.spacing_lps_mm[:, axis], name=name, unit="mm"))
        mark = Mark(grid_mm[axis], f"grid {grid_mm[axis]:g} mm")
        extents.append(histogram(measures.extent_lps_mm[:, axis], name=name, unit="mm", mark=mark))
        all_mm = measures.cut_lps_mm[:, axis]
        lost_mm = all_mm[all_mm >= SMALLEST_CUT_MM]
        losing = f"{name}: {len(lost_mm):,} of {len(all_mm):,} volumes lose something"
        nothing = Chart(f"{name}:", "no volume loses anything")
        cuts.append(histogram(lost_mm, name=losing, unit="mm") if len(lost_mm) else nothing)
    return {
        "Native spacing": spacings,
        "Extent, and the size of the grid": extents,
        "Cut off, because it lies outside of the grid": cuts,
        "Intensities before resampling": _hu_charts(measures),
    }


def _hu_charts(measures: Measures) -> list[Chart]:
    names = {"p50": "HU in the middle (median) of each volume", "p99": "HU that 1 % of each volume exceed"}
    charts, shares = [], measures.shares
    if measures.profiles:
        edges = np.linspace(*HISTOGRAM_RANGE, len(shares) + 1)
        words = f"mean share of voxels in {len(shares)} bins, every volume counting the same"
        charts.append(hu_profile(shares / measures.profiles, edges, name="HU", words=words))
    return charts + [histogram(measures.hu[key], name=name, unit="HU") for key, name in names.items()]


def _lost_groups(records: Sequence[VolumeRecord]) -> list[dict[str, Any]]:
    """Return the inputs that were refused, or that failed, by code, the most frequent first, and which to list."""
    groups = defaultdict(list)
    for record in records:
        if not record.is_there:
            groups[record.state, record.code or "no code"].append(record)
    shares = fair_shares([len(group) for group in groups.values()], MOST_REFUSED_LINES)
    lost = [
        {"state": state, "code": code, "inputs": len(group), "listed": group[:share]}
        for ((state, code), group), share in zip(groups.items(), shares, strict=True)
    ]
    return sorted(lost, key=lambda group: (-group["inputs"], group["state"], group["code"]))


def _changed_lines(records: Sequence[VolumeRecord]) -> list[tuple[str, str, str, str]]:
    """Return (id, code, before, after) of all that was repaired, accepted or overridden, by code and id."""
    there = (record for record in records if record.is_there)
    changes = ((record.id, change) for record in there for change in (record.facts or {}).get("changes", ()))
    lines = [(id, change["code"], change["before"], change["after"]) for id, change in changes]
    return sorted(lines, key=lambda line: (line[1], line[0]))


def _masks_that_need_eyes(masks: Sequence[VolumeRecord]) -> list[tuple[str, str, str]]:
    """Return (volume, mask, why) of masks that were refused, or of which nothing is left on the grid."""
    found = []
    for row in masks:
        facts = row.facts or {}
        found += [] if row.is_there else [(row.id, "all", row.reason or row.state)]
        found += [(row.id, name, why) for name, why in facts.get("refused", {}).items()]
        found += [(row.id, name, "nothing is left of it on the grid") for name in facts.get("lost", ())]
    return found


def fair_shares(counts: Sequence[int], total: int) -> list[int]:
    """Return how many of each count to take so that `total` holds: small ones whole, the rest in equal parts.

    total 10: [1, 20, 30] -> [1, 4, 5]
    """
    shares, left = [0] * len(counts), total
    smallest_first = sorted(range(len(counts)), key=lambda i: counts[i])
    for position, i in enumerate(smallest_first):
        shares[i] = min(counts[i], left // (len(counts) - position))
        left -= shares[i]
    return shares


def _card(volume: ReportedVolume, open_volume: OpenVolume) -> dict[str, Any]:
    """Return a volume with the curve of its intensities, and its picture or why it has none."""
    counts = (volume.facts.get("hu_before") or {}).get("histogram")
    spark = sparkline(counts, words="HU before, -1100 to 1100, logarithmic") if counts else None
    card = {"volume": volume, "picture": None, "no_picture": "", "spark": spark}
    try:
        window = CT_WINDOW if is_hu(volume.facts) else AUTO
        image = three_planes(open_volume(volume.record), window_hu=window, size_px=PANEL_PX)
    except Exception as error:
        # One store that is damaged or gone must not cost the whole page.
        log.warning("no picture of %s: %s", volume.record.id, error)
        return card | {"no_picture": f"{type(error).__name__}: {without_folders(str(error))}"[:300]}
    file = io.BytesIO()
    image.save(file, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return card | {"picture": (data_url(file.getvalue(), "image/jpeg"), image.width, image.height)}


def _times(values: Iterable[float], form: str) -> str:
    """Return values with signs between them: [1, 2, 3] -> "1 × 2 × 3"."""
    return " × ".join(form % value for value in values)


def _size(count: int) -> str:
    """Return a number of bytes with its unit: 1230000 -> "1.23 MB"."""
    value, units = float(count), ["bytes", "kB", "MB", "GB", "TB", "PB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "bytes" else f"{value:.3g} {units[0]}"


# --- remarks: what a person should know about a prepared (or inspected) scan, in short plain sentences

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
    volume = reported(record)
    return volume.cut_remarks + volume.other_remarks


def is_hu(facts: Mapping[str, Any]) -> bool:
    """Tell whether values are in HU: false where a policy accepted values that cannot be."""
    return "modality" not in facts.get("policy", {})


def _on_cuts(cut_mm: Sequence[tuple[float, float]]) -> list[str]:
    """Return a sentence for each axis of the body along which something is cut off.

    "18 mm of the scan lie outside of the grid at its left end", and at its right end where that loses something too.
    """
    remarks = []
    for ends, names in zip(cut_mm, ENDS, strict=True):
        lost = [(mm, name) for mm, name in zip(ends, names, strict=True) if mm >= SMALLEST_CUT_MM]
        if lost:
            remark = f"{lost[0][0]:.0f} mm of the scan lie outside of the grid at its {lost[0][1]} end"
            for mm, name in lost[1:]:
                amount = "as much" if round(mm) == round(lost[0][0]) else f"{mm:.0f} mm"
                remark += f", and {amount} at its {name} end"
            remarks.append(remark)
    return remarks


def _ends_mm(facts: Mapping[str, Any], key: str) -> list[tuple[float, float]]:
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


def _on_slices(slices: Mapping[str, Any] | None) -> list[str]:
    if not slices:
        return []
    missing = sum(count for *_, count in slices["gaps"])
    return [f"{missing} missing slices were interpolated" if missing else "its slices lie at uneven distances"]


def _on_geometry(geometry: Geometry) -> list[str]:
    spacings, remarks = geometry.spacing_zyx_mm, list[str]()
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
    for ends, size_mm, way in zip(_ends_mm(facts, "pad_mm"), sizes_zyx_mm[::-1], WAYS, strict=True):
        empty = sum(max(0.0, mm) for mm in ends)
        if empty > EMPTY_SHARE_OF_GRID * size_mm:
            remarks.append(f"the scan covers {size_mm - empty:.0f} of the grid's {size_mm:.0f} mm from {way}")
    return remarks
