"""A volume as a picture: axial, coronal and sagittal slice side by side, upright, to scale, with letters for sides.

Radiological convention: the patient's right is on the image's left, the head is up; sagittal slices face left.
A tilted scan is shown in the planes of its own grid, each with the letters of its own axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from photon_data.errors import UsageError
from photon_data.volume import Geometry, Volume, body_axes, direction_letters, position_text, tilt_degrees

Window = tuple[float, float]
WINDOWS: dict[str, Window] = {
    "full": (-1000, 1000),
    "lung": (-1350, 150),
    "soft": (-160, 240),
    "mediastinum": (-125, 225),
    "bone": (-450, 1050),
}
# The window of data that is not CT, or not in HU: the percentiles 1 and 99 of what is shown.
AUTO = "auto"

# The scale bar has the first of these lengths that fits into half a panel.
SCALE_BARS_MM = (50, 20, 10, 5, 2, 1)
_SMALLEST_PANEL_PX = 96

_BACKGROUND, _TEXT, _MUTED, _OUTLINE = "#0b0d10", "#e8eaed", "#9aa0a6", "#ff5d8f"
CONTOUR = "#12b76a"  # to be seen on black and on white
_DIMMED = 0.6

Draw = ImageDraw.ImageDraw
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels
Voxel = tuple[int, int, int]


class Plane(NamedTuple):
    """One of the three slices of an upright grid (see `Upright`), by array axes: through it, downwards, rightwards."""

    name: str
    normal: int
    down: int
    right: int
    colour: str

    @property
    def down_sign(self) -> int:
        """-1 where indices decrease downwards: the head is up."""
        return -1 if self.down == 0 else 1


PLANES = (
    Plane("axial", 0, 1, 2, "#f2b84b"),
    Plane("coronal", 1, 0, 2, "#6fcf97"),
    Plane("sagittal", 2, 0, 1, "#6ab7ff"),
)


class Layout(NamedTuple):
    """Sizes in pixels that follow from the side of a panel."""

    panel: int
    gutter: int  # around a slice; a line of text below the panels is as high
    font: int
    gap: int

    @classmethod
    def of(cls, size_px: int) -> Layout:
        """Return the layout for panels of `size_px`; UsageError below 96, where no letter can be read."""
        if size_px < _SMALLEST_PANEL_PX:
            raise UsageError(f"size_px: expected {_SMALLEST_PANEL_PX} or more, found {size_px}")
        font = max(10, size_px // 24)
        return cls(size_px, round(font * 1.7), font, gap=max(2, size_px // 64))

    @property
    def room(self) -> int:
        """Side of the square inside of the gutters, which slices are fitted into."""
        return self.panel - 2 * self.gutter

    def canvas(self, lines: int) -> tuple[int, int]:
        """Return width and height of the whole picture: three panels above their captions and so many lines of text."""
        return 3 * self.panel + 2 * self.gap, self.panel + (1 + lines) * self.gutter + self.gap


class Upright:
    """A volume as if its array axes 0, 1, 2 ran to the head, the back and the left of the patient.

    `geometry` is that of the upright grid. Only the slices that are asked for are read from the array.
    """

    def __init__(self, volume: Volume) -> None:
        axes, native = body_axes(volume.geometry), volume.geometry
        self._array, self._stored_axis, self._sign = volume.array_zyx, axes.array_axis[::-1], axes.sign[::-1]
        stored = list(self._stored_axis)
        corner = [0, 0, 0]
        for axis, sign in zip(stored, self._sign, strict=True):
            corner[axis] = 0 if sign > 0 else native.shape_zyx[axis] - 1
        steps = np.asarray(native.steps_lps)[stored] * np.asarray(self._sign)[:, None]
        self.geometry = Geometry.from_arrays(np.asarray(native.shape_zyx)[stored], native.world(corner), steps)

    def slice(self, plane: Plane, at: Voxel) -> np.ndarray:
        """Return the slice of `plane` through voxel `at` of the upright grid, as seen: [down, right]."""
        index: list[int | slice] = [slice(None)] * 3
        through = at[plane.normal]
        last = self.geometry.shape_zyx[plane.normal] - 1
        index[self._stored_axis[plane.normal]] = through if self._sign[plane.normal] > 0 else last - through
        values = np.asarray(self._array[tuple(index)])
        if self._stored_axis[plane.down] > self._stored_axis[plane.right]:
            values = values.T
        return values[:: plane.down_sign * self._sign[plane.down], :: self._sign[plane.right]]


def three_planes(
    volume: Volume,
    *,
    window_hu: Window | str = "full",
    size_px: int = 320,
    at_lps: Sequence[float] | None = None,
    title: str | None = None,
    outlined_zyx: np.ndarray | None = None,
    contour_zyx: Any = None,
    note: str = "",
) -> Image.Image:
    """Return an RGB picture of the axial, coronal and sagittal slice through `at_lps` (None: the middle of the grid).

    All three share one scale, so a thin slab looks thin. Each panel is `size_px` wide and high.
    `window_hu` is (low, high), a name of WINDOWS, or "auto". Only three slices are read from `volume.array_zyx`.
    `outlined_zyx` (bool) marks voxels of it: a line is drawn around them, and the others are dimmed. `contour_zyx`
    (bool, or slices like one) gets a line of another colour (CONTOUR), and nothing is dimmed. `note` is a second line.
    UsageError for an unknown window or a point outside of the volume.
    """
    layout, upright = Layout.of(size_px), Upright(volume)
    grid = upright.geometry
    at = voxel_at(grid, at_lps)
    slices = [upright.slice(plane, at) for plane in PLANES]
    window = resolve_window(window_hu, slices)
    extents_mm = [n * s for n, s in zip(grid.shape_zyx, grid.spacing_zyx_mm, strict=True)]
    px_per_mm = layout.room / max(extents_mm)
    canvas = Image.new("RGB", layout.canvas(2 if note else 1), _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    draw.font = _font(layout.font)
    for number, (plane, values) in enumerate(zip(PLANES, slices, strict=True)):
        panel_left = number * (layout.panel + layout.gap)
        width, height = (max(1, round(extents_mm[axis] * px_per_mm)) for axis in (plane.right, plane.down))
        left, top = panel_left + (layout.panel - width) // 2, (layout.panel - height) // 2
        box = left, top, left + width, top + height
        grey = Image.fromarray(np.ascontiguousarray(to_grey(values, window)))
        canvas.paste(grey.resize((width, height), Image.Resampling.BILINEAR).convert("RGB"), box)
        if outlined_zyx is not None:
            marked = Upright(Volume(outlined_zyx, volume.geometry)).slice(plane, at)
            _draw_outline(canvas, box, marked, _OUTLINE, thickness=max(1, layout.panel // 240), dimmed=_DIMMED)
        if contour_zyx is not None:
            marked = Upright(Volume(contour_zyx, volume.geometry)).slice(plane, at)
            _draw_outline(canvas, box, marked, CONTOUR, thickness=max(1, layout.panel // 240), dimmed=1)
        _draw_letters(draw, layout, box, plane, grid)
        _draw_ticks(draw, layout, box, plane, grid, at)
        _draw_caption(draw, layout, panel_left, plane, float(grid.world(at)[2 - plane.normal]))
    _draw_scale_bar(draw, layout, px_per_mm)
    tilt = tilt_degrees(volume.geometry)
    tilted = f"own planes of a scan tilted by {tilt:.0f}°, " if tilt >= 1 else ""
    name, unit = f"{window_hu} " if isinstance(window_hu, str) else "", "" if window_hu == AUTO else " HU"
    shown = f"{tilted}{name}window {window[0]:g} to {window[1]:g}{unit}"
    _draw_footer(draw, layout, title or "", shown)
    if note:
        _draw_footer(draw, layout, note, "", row=1)
    return canvas


def resolve_window(window_hu: Window | str, slices: Sequence[np.ndarray]) -> Window:
    """Return (low, high) of a pair, a name, or "auto" (percentiles 1 and 99 of `slices`); UsageError for others."""
    if window_hu == AUTO:
        values = np.concatenate([np.ravel(values) for values in slices])
        low, high = np.percentile(values[np.isfinite(values)], (1, 99)) if np.isfinite(values).any() else (0, 1)
        return float(low), float(max(high, low + 1))
    window = WINDOWS.get(window_hu, ()) if isinstance(window_hu, str) else window_hu
    if len(window) != 2 or not window[0] < window[1]:
        names = ", ".join([*WINDOWS, AUTO])
        raise UsageError(f"expected a window, {names} or two numbers, low < high; found {window_hu!r}")
    return float(window[0]), float(window[1])


def to_grey(values: np.ndarray, window: Window) -> np.ndarray:
    """Return uint8 of the same shape: the window's low and below is 0, its high and above 255, not-a-number 0."""
    low, high = window
    share = (np.asarray(values, np.float32) - low) / (high - low)
    return np.rint(np.clip(np.nan_to_num(share, nan=0.0), 0, 1) * 255).astype(np.uint8)


def voxel_at(grid: Geometry, at_lps: Sequence[float] | None) -> Voxel:
    """Return the voxel of an upright grid at a world point, or in the middle.

    Between two voxels it is the one further left, back or up: the same slices are shown whatever way an axis is stored.
    """
    shape = np.asarray(grid.shape_zyx)
    fraction = np.round((shape - 1) / 2 if at_lps is None else grid.index(at_lps), 6)
    if not ((fraction >= -0.5) & (fraction <= shape - 0.5)).all():
        ends = np.stack([grid.corners_lps().min(0), grid.corners_lps().max(0)]).round(1).T.tolist()
        found = [float(mm) for mm in at_lps or ()]
        raise UsageError(f"expected a point within the volume, L, P, S in {ends} mm; found {found}")
    z, y, x = (int(i) for i in np.clip(np.floor(fraction + 0.5), 0, shape - 1))
    return z, y, x


def _draw_outline(
    canvas: Image.Image, box: Box, marked: np.ndarray, colour: str, *, thickness: int, dimmed: float
) -> None:
    """Draw the inner edge of the marked voxels of a slice, and multiply the other voxels by `dimmed`."""
    shown = canvas.crop(box)
    eroded = inside = np.asarray(Image.fromarray(marked).resize(shown.size, Image.Resampling.NEAREST), bool)
    for _ in range(thickness):
        padded = np.pad(eroded, 1)
        eroded = eroded & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    pixels = np.array(shown)
    pixels[~inside] = pixels[~inside] * dimmed
    canvas.paste(Image.fromarray(pixels), box)
    canvas.paste(colour, box, Image.fromarray((inside & ~eroded).astype(np.uint8) * 255))


def _draw_letters(draw: Draw, layout: Layout, box: Box, plane: Plane, grid: Geometry) -> None:
    """Write at each edge of a slice which side of the body is there, from the steps of the slice's own axes."""
    left, top, right, bottom = box
    away, x, y = layout.gutter / 2, (left + right) / 2, (top + bottom) / 2
    to_right = np.asarray(grid.steps_lps[plane.right])
    to_bottom = plane.down_sign * np.asarray(grid.steps_lps[plane.down])
    edges = [((right + away, y), to_right), ((left - away, y), -to_right)]
    edges += [((x, bottom + away), to_bottom), ((x, top - away), -to_bottom)]
    for place, direction in edges:
        draw.text(place, direction_letters(direction), _TEXT, anchor="mm")


def _draw_ticks(draw: Draw, layout: Layout, box: Box, plane: Plane, grid: Geometry, at: Voxel) -> None:
    """Mark at the edges of a slice, each in its colour, where the other two planes cut it."""
    left, top, right, bottom = box
    length = layout.gutter // 3
    for other in PLANES:
        share = (at[other.normal] + 0.5) / grid.shape_zyx[other.normal]
        if other.normal == plane.right:
            x = left + int((right - left) * share)
            draw.line([(x, top), (x, top + length)], other.colour)
            draw.line([(x, bottom - 1 - length), (x, bottom - 1)], other.colour)
        elif other.normal == plane.down:
            y = top + int((bottom - top) * (share if plane.down_sign > 0 else 1 - share))
            draw.line([(left, y), (left + length, y)], other.colour)
            draw.line([(right - 1 - length, y), (right - 1, y)], other.colour)


def _draw_caption(draw: Draw, layout: Layout, panel_left: int, plane: Plane, mm: float) -> None:
    left, right = panel_left + layout.gutter / 2, panel_left + layout.panel - layout.gutter / 2
    middle = layout.panel + layout.gutter // 2
    draw.text((left, middle), plane.name, plane.colour, anchor="lm")
    draw.text((right, middle), position_text(2 - plane.normal, mm), _MUTED, anchor="rm")


def _draw_scale_bar(draw: Draw, layout: Layout, px_per_mm: float) -> None:
    longest_mm = layout.room / px_per_mm / 2
    mm = next((mm for mm in SCALE_BARS_MM if mm <= longest_mm), SCALE_BARS_MM[-1])
    left, y = layout.gutter // 2, layout.panel - layout.gutter // 2
    right = left + max(1, round(mm * px_per_mm))
    draw.line([(left, y), (right, y)], _TEXT, width=2)
    for x in (left, right):
        draw.line([(x, y - 3), (x, y + 3)], _TEXT)
    draw.text((left, y - 5), f"{mm} mm", _TEXT, anchor="lb", stroke_width=1, stroke_fill=_BACKGROUND)


def _draw_footer(draw: Draw, layout: Layout, title: str, window: str, row: int = 0) -> None:
    """Write title and window in one line; the middle of a title that is too long is left out."""
    font, middle = _font(layout.font), layout.panel + (1 + row) * layout.gutter + layout.gutter // 2
    inset, width = layout.gutter / 2, layout.canvas(1)[0]
    draw.text((width - inset, middle), window, _MUTED, anchor="rm")
    room = width - 3 * inset - font.getlength(window)
    text = " ".join(title.split())
    if font.getlength(text) > room:
        shortened = (f"{text[:n]}...{text[-n:]}" for n in range(len(text) // 2, 0, -1))
        text = next((shorter for shorter in shortened if font.getlength(shorter) <= room), "")
    draw.text((inset, middle), text, _TEXT, anchor="lm")


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Return Pillow's own typeface: the same on every machine."""
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font
