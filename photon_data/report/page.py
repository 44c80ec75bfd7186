"""A page from a template, and its charts: one file that opens offline, where no text from a scan is taken for markup.

A chart is values turned into shapes with their places in pixels. The macro `figure` (macros.html.j2) writes them as
SVG. Every chart says in words what it shows. Colours come from the page's style, by the class of a shape.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

# Control characters, and those that turn the direction of a line, have no business on a page.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
# An absolute path in quotes may hold spaces; one without ends at the first.
_QUOTED_PATH = re.compile(r"""(['"])(?:/|[A-Za-z]:[\\/])(?:[^'"]*[\\/])?([^'"\\/]+)[\\/]?\1""")
_BARE_PATH = re.compile(r"""(?<![\w.:/<])(?:/|[A-Za-z]:\\)(?:[^\s/\\'"]+[/\\])+""")


def render(template: Path, values: Mapping[str, Any], filters: Mapping[str, Callable[..., Any]]) -> bytes:
    """Return the page that a template makes of `values`, as UTF-8; jinja2.UndefinedError for a name that they lack.

    `filters` are the template's own, beside `thousands` and `without_folders`. It may extend those beside this file.
    Every value is escaped. Control characters become U+FFFD; bytes of a file name that are no text become escapes.
    """
    environment = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: type(value)(_CONTROL.sub("\ufffd", value)) if isinstance(value, str) else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"thousands": "{:,}".format, "without_folders": without_folders, **filters}
    page = io.BytesIO()  # the pieces of a long page, each a text of its own, would take many times its size
    for piece in environment.get_template(template.name).generate(values):
        page.write(piece.encode("utf-8", "backslashreplace"))
    return page.getvalue()


def without_folders(text: str) -> str:
    """Return text with every absolute path reduced to its last part: whose machine it was is nobody's business.

    "cannot read '/home/me/scans/a.nii'" -> "cannot read 'a.nii'". Relative paths and URLs of object stores stay.
    """
    return _BARE_PATH.sub("", _QUOTED_PATH.sub(r"\1\2\1", text.replace("file://", "")))


def data_url(image: bytes, media_type: str) -> str:
    """Return an image as a URL that holds it."""
    return f"data:{media_type};base64,{base64.b64encode(image).decode()}"


# Sizes of charts in pixels.
_WIDTH, _HEIGHT = 340, 164
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 20, 36
_TICKS, _LABEL = 20, 4  # of numbers below an axis and of what they are: above the lower end
_FOREST_ROW, _SPARK_WIDTH, _SPARK_HEIGHT = 32, 260, 40
# On a scatter plot: the room for names on the right, and the distance of points that would cover each other.
_NAMES, _BESIDE = 104, 8
# Where the highest value is beyond this many times the 95th percentile, the last bin holds all that is beyond.
_FAR = 2.5
_MOST_BINS = 24
# Shares of voxels are drawn on a logarithmic axis that starts here.
_LEAST_SHARE = 1e-5


class Shape(NamedTuple):
    """An SVG element. `words`: the text of a `text`; of any other shape, what is said when one points at it."""

    tag: str
    attributes: Mapping[str, Any]
    words: str = ""


class Chart(NamedTuple):
    """A drawing of width x height pixels."""

    name: str
    words: str  # the caption
    kind: str = ""  # stands before the name where it is read aloud
    shapes: Sequence[Shape] = ()  # none: only name and words are shown
    width: int = _WIDTH
    height: int = _HEIGHT


class Mark(NamedTuple):
    """A vertical line at a value, and its label."""

    at: float
    label: str


class ForestRow(NamedTuple):
    """A value with its interval (None: not known), and other values to compare it with, by name."""

    label: str
    value: float
    low: float | None
    high: float | None
    marks: Mapping[str, float]


class ScatterPoint(NamedTuple):
    """A share from 0 to 1 (across) and a value (up) with its interval (None: not known), by name."""

    label: str
    share: float
    value: float
    low: float | None
    high: float | None


class Bins(NamedTuple):
    """Edges of equal bins on round numbers, and the number of values in each. If `is_open`, the last has no end."""

    edges: np.ndarray
    counts: np.ndarray
    is_open: bool


def binned(values: Sequence[float] | np.ndarray, *, include: Sequence[float] = ()) -> Bins:
    """Return about 24 equal bins or fewer, on round edges, that hold all `values` (not none) and reach to `include`."""
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


def _round_step(least: float) -> float:
    """Return the smallest of 1, 2, 2.5, 5 times a power of ten that is not below `least`."""
    power = 10.0 ** np.floor(np.log10(least))
    return float(next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= least * (1 - 1e-9)))


def histogram(values: Sequence[float] | np.ndarray, *, name: str, unit: str, mark: Mark | None = None) -> Chart:
    """Return how many of `values` lie where; the words say their range and median."""
    if not len(values):
        return Chart(name, "nothing measured")
    edges, counts, is_open = binned(values, include=[mark.at] if mark else [])
    low, middle, high = (f"{v:.3g}" for v in (np.min(values), np.median(values), np.max(values)))
    words = f"{low} to {high} {unit}, middle {middle}" if low != high else f"{low} {unit}"
    x, y = _Scale(edges[0], edges[-1]), _up(0, counts.max())
    shapes = []
    for left, right, count in zip(edges, edges[1:], counts, strict=False):
        if count:
            beyond = is_open and right == edges[-1]
            said = f"{left:g} {unit} or more: {count:,}" if beyond else f"{left:g} to {right:g} {unit}: {count:,}"
            tall = max(1.0, y(0) - y(count))
            shapes.append(_bar(x(left) + 0.5, y(0) - tall, max(1.0, x(right) - x(left) - 1), tall, said))
    every = max(1, -(-len(counts) // 5))
    shapes += [_baseline(), *_x_labels(edges[::every].tolist(), x), *_axes(unit, "volumes")]
    shapes.append(_text(_LEFT - 5, y(y.high) + 4, short_count(int(y.high)), "end"))
    if mark:
        at = x(mark.at)
        shapes.append(_line(at, at, _TOP - 6, _HEIGHT - _BOTTOM, "mark"))
        shapes.append(_text(at, _TOP - 9, mark.label, "end" if at > _WIDTH / 2 else "start", "mark-label"))
    return Chart(name, words, "Histogram", shapes)


def short_count(count: int) -> str:
    """Return a count in at most four signs, which is the room beside an axis: 9999, 20k, 123k, 1.2M; rounded down."""
    for unit, one in (("k", 1_000), ("M", 1_000_000), ("G", 1_000_000_000)):
        if 10_000 <= count < 1_000 * one:
            tenths = 10 * count // one
            return (
                f"{tenths // 10}{unit}" if tenths >= 100 or not tenths % 10 else f"{tenths // 10}.{tenths % 10}{unit}"
            )
    return str(count)


def hu_profile(shares: np.ndarray, edges: np.ndarray, *, name: str, words: str) -> Chart:
    """Return the share of voxels [n] between `edges` [n + 1] HU, on a logarithmic axis."""
    x, y = _Scale(edges[0], edges[-1]), _up(np.log10(_LEAST_SHARE), 0)
    curve = _curve(shares, x, y)
    ticks = [v for v in (-1000, -500, 0, 500, 1000) if edges[0] <= v <= edges[-1]]
    labels = [_text(_LEFT - 5, y(power) + 4, text, "end") for power, text in ((0, "100%"), (-2, "1%"), (-4, ".01%"))]
    shapes = [*curve, _baseline(), *_x_labels(ticks, x), *labels, *_axes("HU", "voxels")]
    return Chart(name, words, "Profile", shapes)


def sparkline(counts: Sequence[float], *, words: str) -> Chart:
    """Return a histogram as a curve the height of two lines of text, logarithmic, without axes."""
    shares = np.asarray(counts, float) / (float(np.sum(counts)) or 1.0)
    x, y = _Scale(0, len(counts), 0, _SPARK_WIDTH), _Scale(np.log10(_LEAST_SHARE), 0, _SPARK_HEIGHT - 1, 1)
    return Chart("", words, "Histogram", _curve(shares, x, y), _SPARK_WIDTH, _SPARK_HEIGHT)


def _curve(shares: np.ndarray, x: _Scale, y: _Scale) -> list[Shape]:
    """Return an area and its outline, logarithmic, over equal bins from x.low to x.high."""
    levels, step = np.log10(np.maximum(shares, _LEAST_SHARE)), (x.high - x.low) / len(shares)
    points = " ".join(f"{x(x.low + (i + 0.5) * step)},{y(float(level))}" for i, level in enumerate(levels))
    feet = f"{x(x.high - step / 2)},{y(y.low)} {x(x.low + step / 2)},{y(y.low)}"
    return [
        Shape("polygon", {"points": f"{points} {feet}", "class": "area"}),
        Shape("polyline", {"points": points, "class": "curve"}),
    ]


def forest_plot(rows: Sequence[ForestRow], *, name: str, words: str) -> Chart:
    """Return a line from 0 to 100 per row: a circle at its value, its interval through it, strokes at its marks."""
    x, height = _Scale(0, 100), _FOREST_ROW * len(rows) + _BOTTOM + 6
    shapes = []
    for number, row in enumerate(rows, start=1):
        at, marks = _FOREST_ROW * number, [(f"{mark} {value:.2f}", x(value)) for mark, value in row.marks.items()]
        shapes.append(_text(_LEFT, at - 9, f"{row.label}  {row.value:.2f}", "start"))
        if row.low is not None and row.high is not None:
            shapes.append(_line(x(row.low), x(row.high), at, at, "curve"))
        shapes += [_line(place, place, at - 6, at + 6, "mark", said) for said, place in marks]
        said = ", ".join([f"{row.label}: {row.value:.2f}", *(said for said, _ in marks)])
        shapes.append(_circle(x(row.value), at, said))
    labels = [_text(x(value), height - _TICKS, f"{value:g}", "middle") for value in (0, 25, 50, 75, 100)]
    shapes += [_baseline(height), *labels, *_axes("points of 100", height=height)]
    return Chart(name, words, "Intervals", shapes, height=height)


def scatter_plot(points: Sequence[ScatterPoint], *, name: str, words: str, across: str) -> Chart:
    """Return values, in points, against shares (of what: `across`), with their intervals; their names on the right.

    The highest is named first.

    Points of nearly equal shares are drawn side by side; the number said when one points at them is exact.
    """
    ends = [end for point in points for end in (point.low, point.value, point.high) if end is not None]
    low, high = (10 * math.floor(min(ends) / 10), 10 * math.ceil(max(ends) / 10)) if ends else (0, 100)
    x, y = _Scale(0, 1, _LEFT, _WIDTH - _NAMES), _up(low, max(high, low + 10))
    shapes = [_baseline(right=_NAMES)]
    shapes += [_text(_LEFT - 5, y(value) + 4, f"{value:g}", "end") for value in (y.low, y.high)]
    shapes += [_text(x(share), _HEIGHT - _TICKS, f"{share:.0%}", "middle") for share in (0, 0.5, 1)]
    shapes += _axes(across, "points of 100", right=_NAMES)
    for row, point in enumerate(sorted(points, key=lambda point: (-point.value, point.label))):
        near = [other for other in points if abs(x(other.share) - x(point.share)) < _BESIDE]
        at = x(point.share) + round((near.index(point) - (len(near) - 1) / 2) * _BESIDE, 1)
        name_y = _TOP + 14 * row
        shapes.append(_line(at, _WIDTH - _NAMES + 8, y(point.value), name_y - 4, "base"))
        if point.low is not None and point.high is not None:
            shapes.append(_line(at, at, y(point.low), y(point.high), "curve"))
        shapes.append(_circle(at, y(point.value), f"{point.label}: {point.value:.2f} at {point.share:.1%}"))
        shapes.append(_text(_WIDTH - _NAMES + 10, name_y, f"{point.label} {point.value:.1f}", "start"))
    return Chart(name, words, "Scatter plot", shapes)


def bar_chart(
    shares: Sequence[float], *, name: str, words: str, axes: tuple[str, str], ends: tuple[str, str], top: float = 1.0
) -> Chart:
    """Return one bar per share, 0 to `top`. `axes`: what is across and what up; `ends`: the first and the last bar."""
    x, y = _Scale(0, len(shares)), _up(0, top)
    wide = x(1) - x(0) - 2
    bars = [_bar(x(i) + 1, y(share), wide, y(0) - y(share), f"{i}: {share:.1%}") for i, share in enumerate(shares)]
    labels = [_text(_LEFT - 5, y(share) + 4, f"{share:.0%}", "end") for share in (0, top)]
    left, right = ends
    labels += [_text(x(0), _HEIGHT - _TICKS, left, "start"), _text(x(len(shares)), _HEIGHT - _TICKS, right, "end")]
    return Chart(name, words, "Bars", [*bars, _baseline(), *labels, *_axes(*axes)])


class _Scale(NamedTuple):
    """A linear map from values to pixels."""

    low: float
    high: float
    at_low: float = _LEFT
    at_high: float = _WIDTH - _RIGHT

    def __call__(self, value: float) -> float:
        share = (value - self.low) / ((self.high - self.low) or 1.0)
        return round(float(self.at_low + share * (self.at_high - self.at_low)), 1)


def _up(low: float, high: float) -> _Scale:
    return _Scale(low, high, _HEIGHT - _BOTTOM, _TOP)


def _x_labels(values: Sequence[float], x: _Scale) -> list[Shape]:
    return [_text(x(value), _HEIGHT - _TICKS, f"{value:g}", "middle") for value in values]


def _axes(across: str, up: str = "", *, height: int = _HEIGHT, right: int = _RIGHT) -> list[Shape]:
    """Return what the numbers below, and those on the left, are of."""
    middle = (_TOP + height - _BOTTOM) / 2
    turned = Shape("text", {"text-anchor": "middle", "transform": f"translate(10 {middle}) rotate(-90)"}, up)
    return [_text((_LEFT + _WIDTH - right) / 2, height - _LABEL, across, "middle"), *([turned] if up else [])]


def _baseline(height: int = _HEIGHT, right: int = _RIGHT) -> Shape:
    return _line(_LEFT, _WIDTH - right, height - _BOTTOM, height - _BOTTOM, "base")


def _bar(x: float, y: float, width: float, height: float, words: str) -> Shape:
    box = {"x": round(x, 1), "y": round(y, 1), "width": round(width, 1), "height": round(height, 1)}
    return Shape("rect", {**box, "class": "bar"}, words)


def _circle(x: float, y: float, words: str) -> Shape:
    return Shape("circle", {"cx": x, "cy": y, "r": 3.5, "class": "bar"}, words)


def _line(x1: float, x2: float, y1: float, y2: float, class_: str, words: str = "") -> Shape:
    return Shape("line", {"x1": x1, "x2": x2, "y1": y1, "y2": y2, "class": class_}, words)


def _text(x: float, y: float, words: str, anchor: str, class_: str | None = None) -> Shape:
    return Shape("text", {"x": x, "y": y, "text-anchor": anchor, "class": class_}, words)
