"""A volume as a picture: axial, coronal and sagittal slice side by side, upright, to scale, with letters that say where is what.

Radiological convention: the patient's right is on the image's left, the head is up; sagittal slices face left.
A tilted scan is shown in the planes of its own grid, each with the letters its axes really have.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from photon_data.errors import UsageError
from photon_data.volume import BodyAxes, Geometry, Volume, body_axes, direction_letters, position_text, tilt_degrees

Window = tuple[float, float]
WINDOWS: dict[str, Window] = {
    "full": (-1000, 1000),
    "lung": (-1350, 150),
    "soft": (-160, 240),
    "mediastinum": (-125, 225),
    "bone": (-450, 1050),
}
# Not CT, or not in HU: from the darkest to the brightest percent of what is shown.
AUTO = "auto"

SCALE_BAR_MM = 50
_SHORTER_BARS_MM = (20, 10, 5, 2, 1)
_TILT_WORTH_SAYING = 1.0

_BACKGROUND, _TEXT, _MUTED, _OUTLINE = "#0b0d10", "#e8eaed", "#9aa0a6", "#ff5d8f"
_DIMMED = 0.6


class Plane(NamedTuple):
    """One of the three slices, in world axes (0 L, 1 P, 2 S): the axis through it, and those its rows and columns follow.

    Columns always grow rightwards with `right`; rows grow downwards with `down` (down_sign +1) or against it (-1).
    """

    name: str
    normal: int
    down: int
    down_sign: int
    right: int
    colour: str


PLANES = (
    Plane("axial", 2, 1, +1, 0, "#f2b84b"),
    Plane("coronal", 1, 2, -1, 0, "#6fcf97"),
    Plane("sagittal", 0, 2, -1, 1, "#6ab7ff"),
)


class Layout(NamedTuple):
    """Sizes in pixels that follow from the side of a panel."""

    panel: int
    gutter: int
    font: int
    line: int
    gap: int

    @classmethod
    def of(cls, size_px: int) -> Layout:
        """Return the layout for panels of `size_px`; UsageError below 96, where no letter can be read."""
        if size_px < 96:
            raise UsageError(f"size_px: 96 or more wanted, got {size_px}")
        font = max(10, size_px // 24)
        return cls(size_px, gutter=round(font * 1.7), font=font, line=round(font * 1.7), gap=max(2, size_px // 64))

    @property
    def room(self) -> int:
        """Side of the square inside of the gutters, which slices are fitted into."""
        return self.panel - 2 * self.gutter

    @property
    def canvas(self) -> tuple[int, int]:
        """Width and height of the whole picture: three panels above two lines of text."""
        return 3 * self.panel + 2 * self.gap, self.panel + 2 * self.line + self.gap


def three_planes(
    volume: Volume,
    *,
    window_hu: Window | str = "full",
    size_px: int = 320,
    at_lps: Sequence[float] | None = None,
    title: str | None = None,
    outlined_zyx: np.ndarray | None = None,
) -> Image.Image:
    """Return an RGB picture of the axial, coronal and sagittal slice through `at_lps` (mm; the middle of the grid if None).

    All three share one scale, so a thin slab looks thin; each panel is `size_px` wide and high. `window_hu` is (low, high),
    a name of WINDOWS, or "auto". Three slices are read from `volume.array_zyx`, nothing else. `outlined_zyx` are voxels of
    it (bool) around which a line is drawn; the others are dimmed.
    UsageError for an unknown window or a point outside of the volume.
    """
    layout, axes = Layout.of(size_px), body_axes(volume.geometry)
    at = slice_indices(volume.geometry, axes, at_lps)
    slices = [plane_slice(volume, axes, plane, at) for plane in PLANES]
    window = resolve_window(window_hu, slices)
    px_per_mm = layout.room / max(_extents_mm(volume.geometry))
    canvas = Image.new("RGB", layout.canvas, _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for number, (plane, values) in enumerate(zip(PLANES, slices, strict=True)):
        left = number * (layout.panel + layout.gap)
        box = _paste_slice(
            canvas, layout, left, to_grey(values, window), _size_px(volume.geometry, axes, plane, px_per_mm)
        )
        if outlined_zyx is not None:
            _draw_outline(canvas, layout, box, plane_slice(Volume(outlined_zyx, volume.geometry), axes, plane, at))
        _draw_letters(draw, layout, box, volume.geometry, axes, plane)
        _draw_ticks(draw, layout, box, volume.geometry, axes, plane, at)
        _draw_caption(draw, layout, left, plane, float(volume.geometry.world(at)[plane.normal]))
    _draw_scale_bar(draw, layout, px_per_mm)
    _draw_footer(draw, layout, title or "", _window_text(window_hu, window, volume.geometry))
    return canvas


def resolve_window(window_hu: Window | str, slices: Sequence[np.ndarray]) -> Window:
    """Return (low, high) of a pair, a name of WINDOWS, or "auto" (the percentiles 1 and 99 of `slices`); else UsageError."""
    if window_hu == AUTO:
        values = np.concatenate([np.ravel(values) for values in slices])
        low, high = np.percentile(values[np.isfinite(values)], (1, 99)) if np.isfinite(values).any() else (0, 1)
        return float(low), float(max(high, low + 1))
    if isinstance(window_hu, str):
        if window_hu not in WINDOWS:
            raise UsageError(f"a window wanted, {', '.join([*WINDOWS, AUTO])} or two numbers, got {window_hu!r}")
        return WINDOWS[window_hu]
    if len(window_hu) != 2 or not window_hu[0] < window_hu[1]:
        raise UsageError(f"a window of two numbers, low < high, wanted, got {tuple(window_hu)}")
    return float(window_hu[0]), float(window_hu[1])


def to_grey(values: np.ndarray, window: Window) -> np.ndarray:
    """Return uint8 of the same shape: the window's low and below is 0, its high and above 255, not-a-number 0."""
    low, high = window
    share = (np.asarray(values, np.float32) - low) / (high - low)
    return np.rint(np.clip(np.nan_to_num(share, nan=0.0), 0, 1) * 255).astype(np.uint8)


def slice_indices(geometry: Geometry, axes: BodyAxes, at_lps: Sequence[float] | None) -> tuple[int, int, int]:
    """Return the voxel (z, y, x) at a world point, or in the middle; between two voxels the one further left, back or up.

    The tie is broken in the world, not in the array: the same slices are shown whatever way an axis is stored.
    """
    shape = np.asarray(geometry.shape_zyx)
    fraction = np.round((shape - 1) / 2 if at_lps is None else geometry.index(at_lps), 6)
    if not ((fraction >= -0.5) & (fraction <= shape - 0.5)).all():
        ends = np.stack([geometry.corners_lps().min(0), geometry.corners_lps().max(0)]).round(1).T.tolist()
        raise UsageError(
            f"a point within the volume wanted, L, P, S in {ends} mm, got {[float(v) for v in at_lps or ()]}"
        )
    nearest = np.zeros(3, int)
    for axis, sign in zip(axes.array_axis, axes.sign, strict=True):
        nearest[axis] = np.floor(fraction[axis] + 0.5) if sign > 0 else np.ceil(fraction[axis] - 0.5)
    z, y, x = (int(v) for v in np.clip(nearest, 0, shape - 1))
    return z, y, x


def plane_slice(volume: Volume, axes: BodyAxes, plane: Plane, at: tuple[int, int, int]) -> np.ndarray:
    """Return the slice of `plane` through voxel `at`, as seen: [down, right]. Reads this slice only."""
    index: list[int | slice] = [slice(None)] * 3
    index[axes.array_axis[plane.normal]] = at[axes.array_axis[plane.normal]]
    values = np.asarray(volume.array_zyx[tuple(index)])
    if axes.array_axis[plane.down] > axes.array_axis[plane.right]:
        values = values.T
    return values[:: plane.down_sign * axes.sign[plane.down], :: axes.sign[plane.right]]


def _extents_mm(geometry: Geometry) -> list[float]:
    return [n * s for n, s in zip(geometry.shape_zyx, geometry.spacing_zyx_mm, strict=True)]


def _size_px(geometry: Geometry, axes: BodyAxes, plane: Plane, px_per_mm: float) -> tuple[int, int]:
    """Return width and height of a plane's slice on the picture."""
    extents = _extents_mm(geometry)
    width, height = (max(1, round(extents[axes.array_axis[w]] * px_per_mm)) for w in (plane.right, plane.down))
    return width, height


def _paste_slice(
    canvas: Image.Image, layout: Layout, panel_left: int, grey: np.ndarray, size: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Draw a slice in the middle of its panel and return where it lies: left, top, right, bottom."""
    left, top = panel_left + (layout.panel - size[0]) // 2, (layout.panel - size[1]) // 2
    image = Image.fromarray(np.ascontiguousarray(grey)).resize(size, Image.Resampling.BILINEAR)
    canvas.paste(image.convert("RGB"), (left, top))
    return left, top, left + size[0], top + size[1]


def _draw_outline(canvas: Image.Image, layout: Layout, box: tuple[int, int, int, int], inside: np.ndarray) -> None:
    """Draw the edge of what is True in a slice, on its own side, and dim the rest."""
    enlarged = Image.fromarray(inside.astype(np.uint8)).resize(
        (box[2] - box[0], box[3] - box[1]), Image.Resampling.NEAREST
    )
    marked = np.asarray(enlarged, bool)
    deep = marked
    for _ in range(max(1, layout.panel // 240)):
        within = np.pad(deep, 1)
        deep = deep & within[:-2, 1:-1] & within[2:, 1:-1] & within[1:-1, :-2] & within[1:-1, 2:]
    shown = np.array(canvas.crop(box))
    shown[~marked] = shown[~marked] * _DIMMED
    canvas.paste(Image.fromarray(shown), box)
    canvas.paste(_OUTLINE, box, Image.fromarray((marked & ~deep).astype(np.uint8) * 255))


def _draw_letters(
    draw: ImageDraw.ImageDraw,
    layout: Layout,
    box: tuple[int, int, int, int],
    geometry: Geometry,
    axes: BodyAxes,
    plane: Plane,
) -> None:
    """Write at each edge of a slice where in the body that side is, from the steps of its own axes."""
    left, top, right, bottom = box
    away, centre = layout.gutter / 2, ((left + right) / 2, (top + bottom) / 2)
    to_right = axes.sign[plane.right] * np.asarray(geometry.steps_lps[axes.array_axis[plane.right]])
    to_bottom = plane.down_sign * axes.sign[plane.down] * np.asarray(geometry.steps_lps[axes.array_axis[plane.down]])
    for place, direction in (
        ((right + away, centre[1]), to_right),
        ((left - away, centre[1]), -to_right),
        ((centre[0], bottom + away), to_bottom),
        ((centre[0], top - away), -to_bottom),
    ):
        draw.text(place, direction_letters(direction), _TEXT, _font(layout.font), anchor="mm")


def _draw_ticks(
    draw: ImageDraw.ImageDraw,
    layout: Layout,
    box: tuple[int, int, int, int],
    geometry: Geometry,
    axes: BodyAxes,
    plane: Plane,
    at: tuple[int, int, int],
) -> None:
    """Mark at the edges of a slice, each in its colour, where the other two planes cut it."""
    left, top, right, bottom = box
    length = layout.gutter // 3
    for other in PLANES:
        if other.normal == plane.right:
            x = left + int((right - left) * _share(geometry, axes, plane.right, +1, at))
            draw.line([(x, top), (x, top + length)], other.colour)
            draw.line([(x, bottom - 1 - length), (x, bottom - 1)], other.colour)
        elif other.normal == plane.down:
            y = top + int((bottom - top) * _share(geometry, axes, plane.down, plane.down_sign, at))
            draw.line([(left, y), (left + length, y)], other.colour)
            draw.line([(right - 1 - length, y), (right - 1, y)], other.colour)


def _share(geometry: Geometry, axes: BodyAxes, world_axis: int, image_sign: int, at: tuple[int, int, int]) -> float:
    """Return how far along the picture's own direction (0 to 1) voxel `at` lies on a world axis."""
    axis = axes.array_axis[world_axis]
    count, index = geometry.shape_zyx[axis], at[axis]
    return ((index if axes.sign[world_axis] == image_sign else count - 1 - index) + 0.5) / count


def _draw_caption(draw: ImageDraw.ImageDraw, layout: Layout, panel_left: int, plane: Plane, mm: float) -> None:
    middle = layout.panel + layout.line // 2
    draw.text((panel_left + layout.gutter / 2, middle), plane.name, plane.colour, _font(layout.font), anchor="lm")
    place = (panel_left + layout.panel - layout.gutter / 2, middle)
    draw.text(place, position_text(plane.normal, mm), _MUTED, _font(layout.font), anchor="rm")


def _draw_scale_bar(draw: ImageDraw.ImageDraw, layout: Layout, px_per_mm: float) -> None:
    """Draw the bar into the lower left corner of the first panel: 50 mm, or less where the scan is too small for it."""
    longest_mm = layout.room / px_per_mm / 2
    mm = next((mm for mm in (SCALE_BAR_MM, *_SHORTER_BARS_MM) if mm <= longest_mm), _SHORTER_BARS_MM[-1])
    left, y = layout.gutter // 2, layout.panel - layout.gutter // 2
    right = left + max(1, round(mm * px_per_mm))
    draw.line([(left, y), (right, y)], _TEXT, width=2)
    for x in (left, right):
        draw.line([(x, y - 3), (x, y + 3)], _TEXT)
    draw.text(
        (left, y - 5), f"{mm} mm", _TEXT, _font(layout.font), anchor="lb", stroke_width=1, stroke_fill=_BACKGROUND
    )


def _draw_footer(draw: ImageDraw.ImageDraw, layout: Layout, title: str, window: str) -> None:
    font, middle = _font(layout.font), layout.panel + layout.line + layout.line // 2
    inset, width = layout.gutter / 2, layout.canvas[0]
    draw.text((width - inset, middle), window, _MUTED, font, anchor="rm")
    room = width - 3 * inset - font.getlength(window)
    draw.text((inset, middle), _shortened(title, font, room), _TEXT, font, anchor="lm")


def _shortened(text: str, font: ImageFont.FreeTypeFont, room: float) -> str:
    """Return one line of `text` that is no wider than `room` pixels, its middle left out if it must be."""
    text = " ".join(text.split())
    if font.getlength(text) <= room:
        return text
    keep = next((n for n in range(len(text) // 2, 0, -1) if font.getlength(text[:n] + "..." + text[-n:]) <= room), 0)
    return text[:keep] + "..." + text[-keep:] if keep else ""


def _window_text(asked: Window | str, window: Window, geometry: Geometry) -> str:
    name = f"{asked} " if isinstance(asked, str) else ""
    unit = "" if asked == AUTO else " HU"
    tilt = tilt_degrees(geometry)
    tilted = f"own planes of a scan tilted by {tilt:.0f}°, " if tilt >= _TILT_WORTH_SAYING else ""
    return f"{tilted}{name}window {window[0]:g} to {window[1]:g}{unit}"


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Return Pillow's own typeface: the same on every machine."""
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font
