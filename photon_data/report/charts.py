"""Small charts as inline SVG: coloured by the page's style, and saying in words what they show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from photon_data.report.page import Html, element

_WIDTH, _HEIGHT = 340, 150
_LEFT, _RIGHT, _TOP, _BOTTOM = 34, 12, 20, 22
_LINE = 32
# Room for names on the right of a spread, and the distance of spots that would cover each other.
_NAMES, _BESIDE = 104, 8
# Where the highest value is beyond this many times the 95th percentile, the last bar holds all that is beyond.
_FAR = 2.5
_MOST_BINS = 24
# Shares of voxels are drawn on a logarithmic axis that starts here.
_LEAST_SHARE = 1e-5


class Mark(NamedTuple):
    """A vertical line at a value, and what it says."""

    at: float
    label: str


class Dot(NamedTuple):
    """A value with its interval (None: not known) on a line of its own, and other values to see it against, by name."""

    label: str
    value: float
    low: float | None
    high: float | None
    marks: Mapping[str, float]


class Spot(NamedTuple):
    """A share from 0 to 1 (across) and a value (up) with its interval (None: not known), by name."""

    label: str
    share: float
    value: float
    low: float | None
    high: float | None


class Bins(NamedTuple):
    """Edges of equal bins on round numbers, and the number of values in each; `is_open`: the last also holds what is beyond."""

    edges: np.ndarray
    counts: np.ndarray
    is_open: bool


def binned(values: Sequence[float], *, include: Sequence[float] = ()) -> Bins:
    """Return at most about 24 equal bins on round edges that hold all `values` (at least one), and reach to `include`."""
    data = np.round(np.asarray(values, float), 6)
    far = max(_FAR * float(np.percentile(data, 95)), *include, -np.inf)
    is_open = bool(data.max() > far > data.min() >= 0)
    shown = np.minimum(data, far) if is_open else data
    low, high = min(shown.min(), *include, np.inf), max(shown.max(), *include, -np.inf)
    step = _round_step((high - low or abs(high) or 1.0) / _MOST_BINS)
    start = np.floor(np.round(low / step, 6))
    count = int(np.floor(np.round(high / step, 6)) - start) + 1
    edges = np.round((start + np.arange(count + 1)) * step, 9)
    return Bins(edges, np.histogram(np.minimum(shown, edges[-1]), edges)[0], is_open)


def histogram(values: Sequence[float], *, name: str, unit: str, mark: Mark | None = None) -> Html:
    """Return a figure: how many of `values` lie where, with a caption that says their range and middle."""
    if not len(values):
        return _figure(name, "nothing measured", Html(""))
    bins = binned(values, include=[mark.at] if mark else [])
    low, middle, high = (f"{v:.3g}" for v in (np.min(values), np.median(values), np.max(values)))
    words = f"{low} to {high} {unit}, middle {middle}" if low != high else f"{low} {unit}"
    x = _Scale(bins.edges[0], bins.edges[-1], _LEFT, _WIDTH - _RIGHT)
    y = _Scale(0, bins.counts.max(), _HEIGHT - _BOTTOM, _TOP)
    parts = [
        *_bars(bins, x, y, unit),
        _baseline(),
        *_x_labels(_ticks(bins), x),
        _text(_LEFT - 5, y(y.high) + 4, int(y.high), "end"),
    ]
    parts += [*_mark(mark, x)] if mark else []
    return _figure(name, words, _svg(f"Histogram, {name}: {words}", *parts))


def hu_profile(shares: np.ndarray, edges: np.ndarray, *, name: str, words: str) -> Html:
    """Return a figure of the share of voxels [n] between `edges` [n + 1] HU, on a logarithmic axis."""
    x = _Scale(edges[0], edges[-1], _LEFT, _WIDTH - _RIGHT)
    y = _Scale(np.log10(_LEAST_SHARE), 0, _HEIGHT - _BOTTOM, _TOP)
    labels = [_text(_LEFT - 5, y(power) + 4, text, "end") for power, text in ((0, "100%"), (-2, "1%"), (-4, ".01%"))]
    curve = _curve(np.log10(np.maximum(shares, _LEAST_SHARE)), x, y)
    ticks = [v for v in (-1000, -500, 0, 500, 1000) if edges[0] <= v <= edges[-1]]
    return _figure(name, words, _svg(f"{name}: {words}", *curve, _baseline(), *_x_labels(ticks, x), *labels))


def sparkline(counts: Sequence[float], *, words: str) -> Html:
    """Return a histogram as a curve the height of two lines of text, logarithmic, without axes."""
    total = float(np.sum(counts)) or 1.0
    levels = np.log10(np.maximum(np.asarray(counts, float) / total, _LEAST_SHARE))
    curve = _curve(levels, _Scale(0, len(counts), 0, 260), _Scale(np.log10(_LEAST_SHARE), 0, 39, 1))
    return element(
        "svg", *curve, viewBox="0 0 260 40", preserveAspectRatio="none", role="img", aria_label=words, class_="spark"
    )


def dots(lines: Sequence[Dot], *, name: str, words: str) -> Html:
    """Return a figure with a line from 0 to 100 per dot, its interval drawn through it; marks are strokes that say a name."""
    x = _Scale(0, 100, _LEFT, _WIDTH - _RIGHT)
    height = _LINE * len(lines) + _BOTTOM + 6
    parts = [part for number, dot in enumerate(lines) for part in _dot(dot, x, _LINE * (number + 1))]
    base = element("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=height - _BOTTOM, y2=height - _BOTTOM, class_="base")
    labels = [_text(x(value), height - 6, f"{value:g}", "middle") for value in (0, 25, 50, 75, 100)]
    return _figure(name, words, _svg(f"{name}: {words}", *parts, base, *labels, height=height))


def spread(spots: Sequence[Spot], *, name: str, words: str) -> Html:
    """Return a figure of values against shares, with their intervals; their names on the right, the highest first.

    Spots of nearly equal shares are drawn side by side; what they say when pointed at is exact.
    """
    ends = [end for spot in spots for end in (spot.low, spot.value, spot.high) if end is not None]
    low, high = (10 * math.floor(min(ends) / 10), 10 * math.ceil(max(ends) / 10)) if ends else (0, 100)
    x = _Scale(0, 1, _LEFT, _WIDTH - _NAMES)
    y = _Scale(low, max(high, low + 10), _HEIGHT - _BOTTOM, _TOP)
    named = sorted(spots, key=lambda spot: (-spot.value, spot.label))
    parts = [
        part for row, spot in enumerate(named) for part in _spot(spot, x(spot.share) + _aside(spot, spots, x), y, row)
    ]
    base = element("line", x1=_LEFT, x2=_WIDTH - _NAMES, y1=_HEIGHT - _BOTTOM, y2=_HEIGHT - _BOTTOM, class_="base")
    labels = [_text(_LEFT - 5, y(value) + 4, f"{value:g}", "end") for value in (y.low, y.high)]
    labels += [_text(x(share), _HEIGHT - 6, f"{share:.0%}", "middle") for share in (0, 0.5, 1)]
    return _figure(name, words, _svg(f"{name}: {words}", base, *labels, *parts))


def bars(shares: Sequence[float], *, name: str, words: str, top: float = 1.0) -> Html:
    """Return a figure with one bar per share, 0 to `top`."""
    x = _Scale(0, len(shares), _LEFT, _WIDTH - _RIGHT)
    y = _Scale(0, top, _HEIGHT - _BOTTOM, _TOP)
    parts = []
    for number, share in enumerate(shares):
        box = {
            "x": x(number) + 1,
            "y": y(share),
            "width": round(x(1) - x(0) - 2, 1),
            "height": round(y(0) - y(share), 1),
        }
        parts.append(element("rect", element("title", f"{number}: {share:.1%}"), class_="bar", **box))
    labels = [_text(_LEFT - 5, y(share) + 4, f"{share:.0%}", "end") for share in (0, top)]
    return _figure(name, words, _svg(f"{name}: {words}", *parts, _baseline(), *labels))


class _Scale(NamedTuple):
    """A straight line from values onto pixels."""

    low: float
    high: float
    at_low: float
    at_high: float

    def __call__(self, value: float) -> float:
        """Return the pixel of a value."""
        share = (value - self.low) / ((self.high - self.low) or 1.0)
        return round(float(self.at_low + share * (self.at_high - self.at_low)), 1)


def _round_step(least: float) -> float:
    """Return the smallest of 1, 2, 2.5, 5 times a power of ten that is not below `least`."""
    power = 10.0 ** np.floor(np.log10(least))
    return float(next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= least * (1 - 1e-9)))


def _ticks(bins: Bins) -> list[float]:
    every = max(1, -(-(len(bins.edges) - 1) // 5))
    return [float(edge) for edge in bins.edges[::every]]


def _bars(bins: Bins, x: _Scale, y: _Scale, unit: str) -> list[Html]:
    bars = []
    for number, count in enumerate(bins.counts):
        if count:
            low, high = bins.edges[number], bins.edges[number + 1]
            beyond = bins.is_open and number == len(bins.counts) - 1
            words = f"{low:g} {unit} or more: {count}" if beyond else f"{low:g} to {high:g} {unit}: {count}"
            height = max(1.0, y(0) - y(count))
            width = max(1.0, x(high) - x(low) - 1)
            box = {
                "x": x(low) + 0.5,
                "y": round(y(0) - height, 1),
                "width": round(width, 1),
                "height": round(height, 1),
            }
            bars.append(element("rect", element("title", words), class_="bar", **box))
    return bars


def _dot(dot: Dot, x: _Scale, at: float) -> list[Html]:
    """Return the label above a line at height `at`, and on it interval, marks and dot."""
    said = ", ".join([f"{dot.label}: {dot.value:.2f}", *(f"{name} {value:.2f}" for name, value in dot.marks.items())])
    parts = [_text(_LEFT, at - 9, f"{dot.label}  {dot.value:.2f}", "start")]
    if dot.low is not None and dot.high is not None:
        parts.append(element("line", x1=x(dot.low), x2=x(dot.high), y1=at, y2=at, class_="curve"))
    for name, value in dot.marks.items():
        title = element("title", f"{name} {value:.2f}")
        parts.append(element("line", title, x1=x(value), x2=x(value), y1=at - 6, y2=at + 6, class_="mark"))
    return [*parts, element("circle", element("title", said), cx=x(dot.value), cy=at, r=3.5, class_="bar")]


def _spot(spot: Spot, at: float, y: _Scale, row: int) -> list[Html]:
    """Return interval, circle and name of a spot `at` across; the name in a row of its own, with a line to it."""
    said = element("title", f"{spot.label}: {spot.value:.2f} at {spot.share:.1%}")
    name_y = _TOP + 14 * row
    parts = [element("line", x1=at, x2=_WIDTH - _NAMES + 8, y1=y(spot.value), y2=name_y - 4, class_="base")]
    if spot.low is not None and spot.high is not None:
        parts.append(element("line", x1=at, x2=at, y1=y(spot.low), y2=y(spot.high), class_="curve"))
    name = _text(_WIDTH - _NAMES + 10, name_y, f"{spot.label} {spot.value:.1f}", "start")
    return [*parts, element("circle", said, cx=at, cy=y(spot.value), r=3.5, class_="bar"), name]


def _aside(spot: Spot, spots: Sequence[Spot], x: _Scale) -> float:
    """Return by how many pixels a spot moves aside, so that those at nearly the same place all are seen."""
    near = [other for other in spots if abs(x(other.share) - x(spot.share)) < _BESIDE]
    return round((near.index(spot) - (len(near) - 1) / 2) * _BESIDE, 1)


def _curve(levels: np.ndarray, x: _Scale, y: _Scale) -> list[Html]:
    """Return an area and its outline over equal bins from x.low to x.high."""
    step = (x.high - x.low) / len(levels)
    points = " ".join(f"{x(x.low + (i + 0.5) * step)},{y(float(level))}" for i, level in enumerate(levels))
    feet = f"{x(x.high - step / 2)},{y(y.low)} {x(x.low + step / 2)},{y(y.low)}"
    return [
        element("polygon", points=f"{points} {feet}", class_="area"),
        element("polyline", points=points, class_="curve"),
    ]


def _mark(mark: Mark, x: _Scale) -> list[Html]:
    at = x(mark.at)
    line = element("line", x1=at, x2=at, y1=_TOP - 6, y2=_HEIGHT - _BOTTOM, class_="mark")
    return [line, _text(at, _TOP - 9, mark.label, "end" if at > _WIDTH / 2 else "start", "mark-label")]


def _baseline() -> Html:
    return element("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=_HEIGHT - _BOTTOM, y2=_HEIGHT - _BOTTOM, class_="base")


def _x_labels(values: Sequence[float], x: _Scale) -> list[Html]:
    return [_text(x(value), _HEIGHT - 6, f"{value:g}", "middle") for value in values]


def _text(x: float, y: float, words: object, anchor: str, class_: str | None = None) -> Html:
    return element("text", words, x=x, y=y, text_anchor=anchor, class_=class_)


def _svg(words: str, *parts: Html, height: int = _HEIGHT) -> Html:
    return element("svg", *parts, viewBox=f"0 0 {_WIDTH} {height}", role="img", aria_label=words)


def _figure(name: str, words: str, drawing: Html) -> Html:
    caption = element("figcaption", element("b", name), element("span", words))
    return element("figure", caption, drawing, class_="panel")
