"""The report's charts over all volumes: spacing, field of view, what is cut off, intensities.

The QC report: one HTML page that opens offline, so that a person sees in a minute what became of a folder of scans.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from photon_data.errors import first_few
from photon_data.hounsfield import HISTOGRAM_RANGE
from photon_data.recipe import Recipe
from photon_data.records import STATES, VolumeRecord
from photon_data.remarks import AXES, CUT_WORTH_SAYING_MM, duplicates
from photon_data.report.charts import Mark, histogram, hu_profile
from photon_data.report.page import Html, document, element, encoded, joined, table, without_folders
from photon_data.report.volumes import OpenVolume, Row, rows_of, volumes_section
from photon_data.volume import WAYS

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


MOST_REFUSED_LINES = 2_000
MOST_DUPLICATE_LINES = 200
_LONGEST_REASON = 600
# Longer lists of one code are folded up.
_SHORT_LIST = 25


def render_report(
    records: Sequence[VolumeRecord],
    *,
    recipe: Recipe,
    open_volume: OpenVolume,
    title: str,
    source: str,
    pictures: int = 48,
    tools: Mapping[str, str] | None = None,
) -> bytes:
    """Return the page as UTF-8: the same bytes for the same records, recipe and stores.

    `open_volume` gives the model grid of a record, for at most `pictures` of them; what it raises is said in that volume's
    place. `tools` maps names to versions. Of absolute paths, in `source` too, only the last part is shown.
    """
    rows = rows_of(records)
    page = document(
        title,
        _header(records, recipe, title, source),
        summary_section(rows, recipe),
        _lost_section(records),
        _duplicates_section(records),
        volumes_section(rows, open_volume, pictures),
        _recipe_section(recipe, tools or {}),
    )
    return encoded(page)


def _header(records: Sequence[VolumeRecord], recipe: Recipe, title: str, source: str) -> Html:
    counts = Counter(record.state for record in records)
    states = [*STATES, *sorted(set(counts) - set(STATES))]
    tiles = [_tile(state, counts[state]) for state in states]
    sums = f"{len(records):,} inputs = " + " + ".join(f"{counts[state]:,} {state}" for state in states)
    read, kept = sum(record.bytes_in for record in records), sum(record.store_bytes or 0 for record in records)
    links = (("summary", "what the scans are like"), ("lost", "refused and failed"), ("volumes", "volumes"), ("recipe", "recipe"))
    return element(
        "header",
        element("h1", title),
        element("p", f"from {_shown_source(source)}", class_="source"),
        element("div", _tile("inputs", len(records)), *tiles, class_="tiles"),
        element("p", f"{sums}. {_size(read)} read, {_size(kept)} of stores.", class_="muted"),
        element("p", _recipe_words(recipe), class_="muted"),
        element("nav", *(element("a", text, href=f"#{name}") for name, text in links)),
    )


def _recipe_words(recipe: Recipe) -> str:
    shape, spacing = (" × ".join(f"{value:g}" for value in triple) for triple in (recipe.shape_zyx, recipe.spacing_mm))
    low, high = recipe.window_hu
    return f"Recipe {recipe.name}: {shape} voxels of {spacing} mm (z, y, x), HU {low:g} to {high:g}, digest {recipe.digest}."


def _tile(name: str, count: int) -> Html:
    return element("div", element("b", f"{count:,}"), name, class_=f"tile {name}")


def _lost_section(records: Sequence[VolumeRecord]) -> Html:
    """Return every refused and failed input with its reason, by code, the most frequent first."""
    groups = defaultdict(list)
    for record in records:
        if not record.is_there:
            groups[record.state, record.code or "no code"].append(record)
    parts = [element("h2", "Refused and failed")]
    if not groups:
        parts.append(element("p", "None: every input became a volume." if records else "There was no input.", class_="muted"))
    shares = fair_shares([len(group) for group in groups.values()], MOST_REFUSED_LINES)
    together = list(zip(groups.items(), shares, strict=True))
    for ((state, code), group), share in sorted(together, key=lambda item: (-len(item[0][1]), item[0][0])):
        parts.append(_lost_group(state, code, group, share))
    return element("section", *parts, id="lost")


def _lost_group(state: str, code: str, group: Sequence[VolumeRecord], lines: int) -> Html:
    told = element("span", state, class_=f"state {state}")
    shown = [(record.id, without_folders(record.source), _reason(record)) for record in group[:lines]]
    parts = [element("summary", f"{code}: {len(group):,} ", told), table(("volume", "source", "reason"), shown, class_="reasons")]
    if len(group) > lines:
        parts.append(element("p", f"{len(group) - lines:,} more with this code are not listed here; volumes.jsonl has them all."))
    return element("details", *parts, open="" if len(group) <= _SHORT_LIST else None)


def _reason(record: VolumeRecord) -> str:
    reason = without_folders(record.reason or "no reason was recorded")
    return reason if len(reason) <= _LONGEST_REASON else reason[:_LONGEST_REASON] + "..."


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


def _duplicates_section(records: Sequence[VolumeRecord]) -> Html:
    """Return the groups of inputs with the very same content; nothing where there are none."""
    groups = duplicates(records)
    if not groups:
        return Html("")
    lines = [(len(group), first_few([record.id for record in group], 10)) for group in groups]
    parts = [element("h2", "Same content more than once"), table(("files", "volumes"), lines[:MOST_DUPLICATE_LINES])]
    if len(lines) > MOST_DUPLICATE_LINES:
        parts.append(element("p", f"{len(lines) - MOST_DUPLICATE_LINES:,} more groups are not listed here."))
    return element("section", *parts, id="duplicates")


def _recipe_section(recipe: Recipe, tools: Mapping[str, str]) -> Html:
    settings = [(name, _setting(value)) for name, value in recipe.to_json().items()]
    panels = [table(("setting", "value"), [*settings, ("digest", recipe.digest)])]
    panels += [table(("tool", "version"), tools.items())] if tools else []
    text = element("p", "Triples are in z, y, x order.", class_="muted")
    return element("section", element("h2", "Recipe"), text, element("div", *panels, class_="columns"), id="recipe")


def _setting(value: object) -> Html:
    values = value if isinstance(value, list | tuple) else [value]
    return joined((f"{v:g}" if isinstance(v, float) else v for v in values), ", ")


def _shown_source(source: str) -> str:
    """Return a folder's name without its path, a URL without its user."""
    return re.sub(r"//[^/@]*@", "//", source) if "://" in source else Path(source).name or source


def _size(count: int) -> str:
    """Return bytes as people say them."""
    value, units = float(count), ["bytes", "kB", "MB", "GB", "TB", "PB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "bytes" else f"{value:.3g} {units[0]}"
