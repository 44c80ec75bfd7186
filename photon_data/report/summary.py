"""The report's charts over all volumes: spacing, field of view, what is cut off, intensities."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from photon_data.hounsfield import HISTOGRAM_RANGE
from photon_data.problems import AXES, CUT_WORTH_SAYING_MM
from photon_data.recipe import Recipe
from photon_data.report.charts import Mark, histogram, hu_profile
from photon_data.report.page import Html, element
from photon_data.report.rows import Row
from photon_data.upright import WAYS

_NAMES = tuple(f"{axis}, {way}" for axis, way in zip(AXES, WAYS, strict=True))


def summary_section(rows: Sequence[Row], recipe: Recipe) -> Html:
    """Return the charts of all volumes that were measured."""
    measured = [row for row in rows if row.spacing_lps_mm and row.extent_lps_mm]
    if not measured:
        return element("section", element("h2", "What the scans are like"), element("p", "No volume was measured."), id="summary")
    return element(
        "section",
        element("h2", "What the scans are like"),
        element(
            "p",
            f"{len(measured):,} volumes, as they were before resampling; axes are the body's, not the file's.",
            class_="muted",
        ),
        *_chapter("Native spacing", _spacing_charts(measured)),
        *_chapter("Extent, and the size of the grid", _extent_charts(measured, recipe)),
        *_chapter("Cut off, because it lies outside of the grid", _cut_charts(measured)),
        *_chapter("Intensities before resampling", _hu_charts(measured)),
        id="summary",
    )


def _chapter(heading: str, charts: list[Html]) -> tuple[Html, Html]:
    return element("h3", heading), element("div", *charts, class_="columns")


def _spacing_charts(rows: Sequence[Row]) -> list[Html]:
    spacings = [row.spacing_lps_mm for row in rows if row.spacing_lps_mm]
    return [histogram([s[axis] for s in spacings], name=name, unit="mm") for axis, name in enumerate(_NAMES)]


def _extent_charts(rows: Sequence[Row], recipe: Recipe) -> list[Html]:
    sizes_mm = [n * s for n, s in zip(recipe.shape_zyx, recipe.spacing_mm, strict=True)][::-1]
    extents = [row.extent_lps_mm for row in rows if row.extent_lps_mm]
    return [
        histogram([e[axis] for e in extents], name=name, unit="mm", mark=Mark(sizes_mm[axis], f"grid {sizes_mm[axis]:g} mm"))
        for axis, name in enumerate(_NAMES)
    ]


def _cut_charts(rows: Sequence[Row]) -> list[Html]:
    """Return, per axis, how much (both ends together) is lost by the volumes that lose anything."""
    charts = []
    for axis, name in enumerate(_NAMES):
        lost = [mm for mm in (sum(row.cut_mm[axis]) for row in rows) if mm >= CUT_WORTH_SAYING_MM]
        who = f"{len(lost):,} of {len(rows):,} volumes lose something"
        if lost:
            charts.append(histogram(lost, name=f"{name}: {who}", unit="mm"))
        else:
            charts.append(
                element("figure", element("figcaption", element("b", f"{name}:"), " no volume loses anything"), class_="panel")
            )
    return charts


def _hu_charts(rows: Sequence[Row]) -> list[Html]:
    statistics = [row.facts["hu_before"] for row in rows if row.facts.get("hu_before")]
    counts = [np.asarray(s["histogram"], float) for s in statistics if s.get("histogram")]
    shares = [count / count.sum() for count in counts if count.sum()]
    charts = []
    if shares:
        edges = np.linspace(*HISTOGRAM_RANGE, len(shares[0]) + 1)
        words = f"mean share of voxels in {len(shares[0])} bins, every volume counting the same"
        charts.append(hu_profile(np.mean(shares, axis=0), edges, name="HU", words=words))
    for key, name in (("p50", "HU in the middle (median) of each volume"), ("p99", "HU that 1 % of each volume exceed")):
        charts.append(histogram([s[key] for s in statistics if s.get(key) is not None], name=name, unit="HU"))
    return charts
