"""What the report needs of one prepared volume, worked out once.

The report's volumes: cards with pictures for those that most need eyes, one line for each of the rest.
"""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from photon_data.picture import AUTO, Window, three_planes
from photon_data.records import VolumeRecord
from photon_data.remarks import CUT_WORTH_SAYING_MM, attention, cut_mm, cut_remarks, other_remarks
from photon_data.report.charts import sparkline
from photon_data.report.page import Html, element, joined, table, without_folders
from photon_data.volume import LETTERS, Geometry, Volume, body_axes


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


def rows_of(records: Sequence[VolumeRecord]) -> list[Row]:
    """Return a row for each volume that is there, those that most need eyes first."""
    rows = [_row(record) for record in records if record.is_there]
    return sorted(rows, key=lambda row: (-row.attention, row.record.id))


def _row(record: VolumeRecord) -> Row:
    facts, other = record.facts or {}, other_remarks(record)
    spacing, extent = _measures(facts["geometry"]) if facts.get("geometry") else (None, None)
    return Row(record, cut_remarks(record), other, attention(record, other), spacing, extent, cut_mm(facts))


def _measures(native: dict[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return spacing and extent in mm along L, P, S; the extent of a tilted scan is that of the box around it."""
    geometry = Geometry.from_json(native)
    spacing = tuple(geometry.spacing_zyx_mm[axis] for axis in body_axes(geometry).array_axis)
    corners = geometry.corners_lps()
    return spacing, tuple(float(mm) for mm in np.ptp(corners, axis=0))


log = logging.getLogger(__name__)

OpenVolume = Callable[[VolumeRecord], Volume]

MOST_LINES = 5_000
PANEL_PX = 240
JPEG_QUALITY = 80
# Lung, soft tissue and bone can all be told apart in it.
CT_WINDOW: Window = (-1000, 500)

_HEADINGS = ("volume", "state", "native shape, spacing, axes", "cut off, mm", "HU before, after", "remarks")


def volumes_section(rows: Sequence[Row], open_volume: OpenVolume, pictures: int) -> Html:
    """Return cards for the first `pictures` rows, lines for the next 5,000, and a sentence on what is not listed."""
    seen, lines = rows[:pictures], rows[pictures : pictures + MOST_LINES]
    left = len(rows) - len(seen) - len(lines)
    parts = [element("h2", "Volumes"), element("p", _how_sorted(len(rows), len(seen)), class_="muted")]
    parts += [_card(row, open_volume) for row in seen]
    if lines:
        parts += [element("h3", f"{len(lines):,} more volumes" if seen else f"{len(lines):,} volumes"), _lines(lines)]
    if left > 0:
        parts.append(element("p", f"{left:,} more volumes are not listed here; volumes.jsonl has a row for every one."))
    return element("section", *parts, id="volumes")


def _how_sorted(count: int, shown: int) -> str:
    if not count:
        return "There are none."
    return (
        "Sorted by what needs eyes: the millimetres cut off, plus 50 for every other remark. "
        f"{shown:,} of {count:,} are shown with a picture, made from the model grid. "
        "A cut-off is by side of the body: R right, L left, A front, P back, I foot, S head."
    )


def _card(row: Row, open_volume: OpenVolume) -> Html:
    record, remarks = row.record, [element("li", remark) for remark in row.cut_remarks + row.other_remarks]
    text = element(
        "div",
        element("h3", record.id),
        element("p", without_folders(record.source), " · ", _state(record), class_="source"),
        *([element("ul", *remarks, class_="remarks")] if remarks else []),
        element("dl", *(part for name, value in _measured(row) for part in (element("dt", name), element("dd", value)))),
    )
    seen = element("div", _picture(record, open_volume), *_spark(row.facts.get("hu_before") or {}))
    return element("article", seen, text, class_="panel card")


def _picture(record: VolumeRecord, open_volume: OpenVolume) -> Html:
    """Return an image with the three planes inside of it, or a box that says why there is none."""
    try:
        window = AUTO if "modality" in (record.facts or {}).get("policy", {}) else CT_WINDOW
        image = three_planes(open_volume(record), window_hu=window, size_px=PANEL_PX)
    except Exception as error:
        # One store that is damaged or gone must not cost the whole page.
        log.warning("no picture of %s: %s", record.id, error)
        why = f"{type(error).__name__}: {without_folders(str(error))}"
        return element("div", "No picture could be made. ", why[:300], class_="none")
    file = io.BytesIO()
    image.save(file, "JPEG", quality=JPEG_QUALITY, optimize=True)
    data = base64.b64encode(file.getvalue()).decode()
    alt = f"Axial, coronal and sagittal slice through the middle of {record.id}"
    return element("img", src=f"data:image/jpeg;base64,{data}", alt=alt, width=image.width, height=image.height)


def _measured(row: Row) -> list[tuple[str, Any]]:
    """Return the (name, value) pairs of a card."""
    facts, native = row.facts, row.facts.get("geometry")
    pairs: list[tuple[str, Any]] = []
    if native and row.extent_lps_mm:
        pairs += [("native shape", f"{_times(native['shape_zyx'])} (z, y, x)"), ("spacing", f"{_spacing(native)} mm")]
        pairs += [
            ("axes z, y, x towards", native.get("orientation_zyx", "")),
            ("extent R-L, A-P, I-S", f"{_times(row.extent_lps_mm)} mm"),
        ]
    if facts.get("cut_mm"):
        pairs.append(("cut off", joined([_cut(row), " mm"])))
    if facts.get("format"):
        pairs.append(("stored as", f"{facts['format']}, {facts.get('dtype', '')}"))
    if facts.get("slope") is not None:
        pairs.append(("rescaled", f"{facts['slope']:g} × stored {facts.get('intercept', 0):+g} ({facts.get('rescale', '')})"))
    pairs += [(f"HU {when}", _hu(facts[f"hu_{when}"])) for when in ("before", "after") if facts.get(f"hu_{when}")]
    return pairs


def _lines(rows: Sequence[Row]) -> Html:
    return table(_HEADINGS, (_line(row) for row in rows))


def _line(row: Row) -> list[Html]:
    record, native = row.record, row.facts.get("geometry")
    name = joined([record.id, element("div", without_folders(record.source), class_="source")])
    shape = _times(native["shape_zyx"]) if native else ""
    grid = f"{_spacing(native)} mm, {native.get('orientation_zyx', '')}" if native else ""
    before, after = (_range(row.facts.get(f"hu_{when}") or {}) for when in ("before", "after"))
    return [
        element("td", name, class_="name"),
        element("td", _state(record), class_="tight"),
        element("td", shape, element("div", grid, class_="source"), class_="tight"),
        element("td", _cut(row, only_lost=True)),
        element("td", before, element("div", after, class_="source"), class_="tight"),
        element("td", "; ".join(row.other_remarks), class_="wide"),
    ]


def _state(record: VolumeRecord) -> Html:
    return element("span", record.state, class_=f"state {record.state}")


def _cut(row: Row, *, only_lost: bool = False) -> Html:
    """Return the mm cut off by side, as "R 0 · L 18", what is lost in bold; "nothing" where nothing is."""
    letters_mm = [pair for letters, ends in zip(LETTERS, row.cut_mm, strict=True) for pair in zip(letters, ends, strict=True)]
    lost = [(letter, mm) for letter, mm in letters_mm if mm >= CUT_WORTH_SAYING_MM]
    if not lost:
        return Html("nothing")
    return joined((_side(letter, mm) for letter, mm in (lost if only_lost else letters_mm)), " · ")


def _side(letter: str, mm: float) -> Html:
    return element("b", f"{letter}\u00a0{mm:.0f}") if mm >= CUT_WORTH_SAYING_MM else Html(f"{letter}\u00a00")


def _spark(before: dict[str, Any]) -> list[Html]:
    if not before.get("histogram"):
        return []
    words = "HU before, -1100 to 1100, logarithmic"
    return [sparkline(before["histogram"], words=f"Histogram: {words}"), element("p", words, class_="source")]


def _hu(statistics: dict[str, Any]) -> str:
    middle = ", ".join(f"{name} {statistics[key]:.0f}" for key, name in _PERCENTILES if statistics.get(key) is not None)
    return f"{_range(statistics)}; {middle}"


_PERCENTILES = (("p01", "1 %"), ("p50", "median"), ("p99", "99 %"))


def _range(statistics: dict[str, Any]) -> str:
    low, high = statistics.get("min"), statistics.get("max")
    return "" if low is None or high is None else f"{low:.0f} to {high:.0f}"


def _times(values: Sequence[float]) -> str:
    return " × ".join(f"{value:.0f}" for value in values)


def _spacing(native: dict[str, Any]) -> str:
    return " × ".join(f"{mm:.2f}" for mm in native["spacing_zyx_mm"])
