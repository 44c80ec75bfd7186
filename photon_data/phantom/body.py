"""Bodies, their organs and lesions, as shapes in LPS mm (+x to the patient's left, +y to the back, +z to the head).

A shape is a function of world points, so that a scan of any geometry samples the same body.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from photon_data.phantom.plan import Occurrence, Occurrences

Vector = tuple[float, float, float]
EVERYWHERE = np.array([[-np.inf] * 3, [np.inf] * 3])

# Semi-axes of the standard body: x, y, z.
TORSO_MM = (176, 112, 330)
CAGE_MM = (152, 99, 320)

SUBSTANCES_HU = {
    "ground-glass": (-600, -500),
    "fat": (-110, -90),
    "fluid": (0, 12),
    "soft tissue": (35, 60),
    "calcified": (350, 450),
    "dense": (950, 1000),
}
GAP_MM = 2.0  # from a lesion to the border of its organ or of the view; twice that between lesions
CLEAR_MM = 4.0  # added at the border between two parts of an organ: nobody should doubt which part a lesion is in
FURTHER_MM = (12, 20)  # diameters of the second and third lesion, which also stay below the first
ATTEMPTS = 30
# The direction of a part of an organ from the organ's middle, by the first word of its name.
PARTS = {"upper": (0, 0, 1), "lower": (0, 0, -1), "left": (1, 0, 0), "right": (-1, 0, 0), "": (0, 0, 0)}


@dataclass(frozen=True)
class Shape:
    """A set of points. `a & b`, `a | b` and `a - b` are intersection, union and difference."""

    # A box [[low x, y, z], [high x, y, z]] around it, infinite where the shape has no end.
    bounds_lps: np.ndarray
    # Of three arrays x, y, z that broadcast against each other: on an axis-aligned grid they are three short vectors,
    # and only their combination has the size of the volume.
    contains: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]

    def __and__(self, other: Shape) -> Shape:
        (low, high), (other_low, other_high) = self.bounds_lps, other.bounds_lps
        bounds = np.array([np.maximum(low, other_low), np.minimum(high, other_high)])
        return Shape(bounds, lambda x, y, z: self.contains(x, y, z) & other.contains(x, y, z))

    def __or__(self, other: Shape) -> Shape:
        (low, high), (other_low, other_high) = self.bounds_lps, other.bounds_lps
        bounds = np.array([np.minimum(low, other_low), np.maximum(high, other_high)])
        return Shape(bounds, lambda x, y, z: self.contains(x, y, z) | other.contains(x, y, z))

    def __sub__(self, other: Shape) -> Shape:
        return Shape(self.bounds_lps, lambda x, y, z: self.contains(x, y, z) & ~other.contains(x, y, z))


def ellipsoid(centre_lps: Vector, semi_axes_mm: Vector) -> Shape:
    """All points within `semi_axes_mm` (along x, y, z) of the centre."""
    (cx, cy, cz), (a, b, c) = centre_lps, semi_axes_mm
    bounds = _bounds(centre_lps, semi_axes_mm)
    return Shape(bounds, lambda x, y, z: ((x - cx) / a) ** 2 + ((y - cy) / b) ** 2 + ((z - cz) / c) ** 2 <= 1)


def column(centre_lps: Vector, semi_axes_mm: Vector) -> Shape:
    """An upright column; its cross-section |x/a|^3 + |y/b|^3 <= 1 is a little squarer than an ellipse, like a torso."""
    (cx, cy, cz), (a, b, c) = centre_lps, semi_axes_mm

    def contains(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        u, v = np.abs((x - cx) / a), np.abs((y - cy) / b)
        return (u * u * u + v * v * v <= 1) & (np.abs(z - cz) <= c)  # u**3 goes through pow, twenty times slower

    return Shape(_bounds(centre_lps, semi_axes_mm), contains)


def half_space(point_lps: Vector, normal: Vector) -> Shape:
    """The side of the plane through `point_lps` that `normal` points to; everything for a normal of zeros."""
    (px, py, pz), (nx, ny, nz) = point_lps, normal
    return Shape(EVERYWHERE, lambda x, y, z: (x - px) * nx + (y - py) * ny + (z - pz) * nz >= 0)


def bands(point_lps: Vector, normal: Vector, period_mm: float, share: float) -> Shape:
    """Endless parallel slabs: one every `period_mm` along the unit `normal`, which fills `share` of it (ribs)."""
    (px, py, pz), (nx, ny, nz) = point_lps, normal

    def contains(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        return np.mod((x - px) * nx + (y - py) * ny + (z - pz) * nz, period_mm) < share * period_mm

    return Shape(EVERYWHERE, contains)


def block(centre_lps: Vector, edges_lps: np.ndarray) -> Shape:
    """A box with any three edge vectors (rows of `edges_lps`, mm), rotated or sheared: a field of view."""
    (cx, cy, cz), across = centre_lps, np.linalg.inv(edges_lps.T)

    def contains(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
        parts = [np.abs((x - cx) * nx + (y - cy) * ny + (z - cz) * nz) <= 0.5 for nx, ny, nz in across]
        return parts[0] & parts[1] & parts[2]

    return Shape(_bounds(centre_lps, np.abs(edges_lps).sum(axis=0) / 2), contains)


def _bounds(centre_lps: Vector, half_mm: Vector | np.ndarray) -> np.ndarray:
    return np.array(centre_lps) + np.outer([-1, 1], half_mm)


class Layer(NamedTuple):
    """A shape with one HU. Its voxels are `label` in the mask `structure`, and 1 in the organ mask `within`."""

    shape: Shape
    hu: float
    structure: str = ""
    label: int = 1
    within: str = ""
    diameter_mm: int = 0  # of a round lesion


# The lesions of every finding, by its name: the largest first, with label 1.
Lesions = dict[str, tuple[Layer, ...]]


@dataclass(frozen=True)
class Body:
    """A patient."""

    centre_lps: Vector
    organs: dict[str, Shape]  # by the name of their mask
    middles_lps: dict[str, Vector]  # where lungs and kidneys part into upper and lower, the liver into left and right
    layers: tuple[Layer, ...]  # all tissue in painting order: a later layer replaces earlier ones
    table: Layer  # of the scanner, curved and light, under the back


class Frame(NamedTuple):
    """From the standard body to this patient: scaled along x, y, z, then moved."""

    scale: Vector
    origin_lps: Vector

    def point(self, centre: Vector) -> Vector:
        """The world position of a point of the standard body."""
        x, y, z = (o + s * c for o, s, c in zip(self.origin_lps, self.scale, centre, strict=True))
        return x, y, z

    def place(self, shape: Callable[[Vector, Vector], Shape], centre: Vector, semi_axes: Vector) -> Shape:
        """An ellipsoid or a column of the standard body, in this patient."""
        a, b, c = (s * axis for s, axis in zip(self.scale, semi_axes, strict=True))
        return shape(self.point(centre), (a, b, c))


def draw_body(rng: np.random.Generator) -> Body:
    """A patient of some size, somewhere on the table. The midline is within 8 mm of x = 0: a side is a sign of x."""
    width, depth, height = rng.uniform((0.92, 0.94, 0.86), (1.04, 1.06, 0.96)).tolist()
    x, y, z = rng.uniform((-8, -120, -600), (8, 120, 600)).tolist()
    frame = Frame((width, depth, height), (x, y, z))
    organs, middles_lps = _draw_organs(frame, rng)
    tissue = [*_trunk(frame), *_draw_bowel(frame, rng)]
    # HU in a scan with contrast agent. The spine comes with the skeleton.
    lung, heart, liver, kidney, spleen = rng.uniform((-870, 110, 105, 160, 112), (-820, 140, 125, 190, 132)).tolist()
    hu = {"lung_left": lung, "lung_right": lung, "heart": heart, "aorta": heart + 40, "liver": liver}
    hu |= {"kidney_left": kidney, "kidney_right": kidney, "spleen": spleen}
    tissue += [Layer(organs[name], value, name) for name, value in hu.items()]
    x, y, z = frame.point((0, TORSO_MM[1] + 6, 0))
    hollow, underside = ellipsoid((x, y - 600, z), (600, 600, 1e5)), ellipsoid((x, y - 590, z), (604, 604, 1e5))
    table = Layer((underside - hollow) & column((x, y, z), (210, 60, 1e4)), -700)
    return Body(frame.point((0, 0, -8)), organs, middles_lps, (*tissue, *_skeleton(frame, organs)), table)


def _draw_organs(frame: Frame, rng: np.random.Generator) -> tuple[dict[str, Shape], dict[str, Vector]]:
    """Organs that do not overlap, by mask name, and the middles of those that have parts."""
    middles_lps = {"liver": frame.point((-22, 0, 0))}

    def near(name: str, centre: Vector, semi_axes: Vector) -> Shape:
        x, y, z = (np.array(centre) + rng.uniform(-4, 4, 3)).tolist()
        a, b, c = (np.array(semi_axes) * rng.uniform(0.96, 1.04)).tolist()
        middles_lps.setdefault(name, frame.point((x, y, z)))
        return frame.place(ellipsoid, (x, y, z), (a, b, c))

    spine, aorta = frame.place(column, (0, 66, 10), (22, 19, 320)), frame.place(column, (17, 38, 10), (10, 10, 320))
    spleen = near("spleen", (97, 30, -40), (31, 46, 50))
    lobes = near("liver", (-72, -2, -44), (70, 80, 66)) | near("liver", (8, -34, -22), (80, 46, 42))
    heart = near("heart", (22, -28, 48), (52, 44, 52)) - lobes
    kidney_right = near("kidney_right", (-60, 48, -116), (31, 29, 50))
    kidney_left = near("kidney_left", (60, 46, -108), (31, 29, 50)) - spleen
    lung_right = near("lung_right", (-76, 3, 72), (58, 78, 110))
    lung_left = near("lung_left", (78, 3, 72), (55, 76, 108))
    beside_lungs = heart | lobes | spleen | (spine | aorta)
    organs = {
        "heart": heart,
        "aorta": aorta,
        "spine": spine,
        "spleen": spleen,
        "liver": lobes - (kidney_right | spleen | (spine | aorta)),
        "kidney_right": kidney_right - spine,
        "kidney_left": kidney_left - spine,
        "lung_right": lung_right - beside_lungs,
        "lung_left": lung_left - beside_lungs,
    }
    return organs, middles_lps


def _trunk(frame: Frame) -> list[Layer]:
    """Skin and fat, muscle, fat between the bowels, soft tissue between the lungs, trachea."""
    a, b, c = CAGE_MM
    return [
        Layer(frame.place(column, (0, 0, 0), TORSO_MM), -100),
        Layer(frame.place(column, (0, 0, 0), (a + 8, b + 3, c)), 50),
        Layer(frame.place(column, (0, -6, -190), (a - 14, b - 18, 160)), -95),
        Layer(frame.place(column, (0, 0, 130), (a - 10, b - 8, 160)), 45),
        Layer(frame.place(column, (0, 18, 250), (8, 8, 160)), -1000),
    ]


def _draw_bowel(frame: Frame, rng: np.random.Generator) -> list[Layer]:
    """Loops in front of the kidneys, some with gas: things that are no lesion."""
    loops = []
    for hu in [25] * 6 + [-1000] * 3:
        x, y, z = rng.uniform((-95, -65, -230), (95, -5, -95)).tolist()
        a, b, c = (rng.uniform(14, 26, 3) if hu > 0 else rng.uniform(6, 11, 3)).tolist()
        loops.append(Layer(frame.place(ellipsoid, (x, y, z), (a, b, c)), hu))
    return loops


def _skeleton(frame: Frame, organs: Mapping[str, Shape]) -> list[Layer]:
    """Ribs slanting down to the front, sternum, and the spine: vertebrae with discs between and the canal behind."""
    a, b, c = CAGE_MM
    cage = frame.place(column, (0, 0, 130), (a, b, 220)) - frame.place(column, (0, 0, 0), (a - 7, b - 6, c))
    vertebrae = bands(frame.origin_lps, (0, 0, 1), 30 * frame.scale[2], 0.8)
    return [
        Layer(cage & bands(frame.origin_lps, (0, -0.35, 0.94), 26, 0.4), 450),
        Layer(frame.place(column, (0, -93, 100), (18, 6, 85)), 350),
        Layer(frame.place(column, (0, 92, 10), (16, 13, 320)), 400),
        Layer(frame.place(column, (0, 92, 10), (9, 7, 320)), 30),
        Layer(organs["spine"], 90, "spine"),
        Layer(organs["spine"] & vertebrae, 280, "spine"),
    ]


class NoRoomError(ValueError):
    """A lesion does not fit into its organ."""


def draw_lesions(rng: np.random.Generator, body: Body, visible: Shape, occurrences: Occurrences) -> Lesions:
    """The lesions of what occurs. Round ones lie whole within `visible`."""
    for _ in range(ATTEMPTS):
        try:
            return _draw_all(rng, body, visible, occurrences)
        except NoRoomError:
            continue  # one body in some hundred is too small or cut too close for the sizes that were drawn
    raise NoRoomError(f"expected room for {list(occurrences)}, found none in {ATTEMPTS} attempts")


def _draw_all(rng: np.random.Generator, body: Body, visible: Shape, occurrences: Occurrences) -> Lesions:
    lesions: Lesions = {}
    free = visible
    if effusion := occurrences.get("pleural_effusion"):
        # Fluid behind the lung of a patient who lies on the back, deeper towards the diaphragm.
        x, y, z = body.middles_lps[effusion.organ_mask]
        surface = half_space((x, y + float(rng.uniform(32, 44)), z), (0, 0.95, -0.3))
        hu, name = _draw_whole(rng, SUBSTANCES_HU["fluid"]), effusion.finding.name
        lesions[name] = (Layer(body.organs[effusion.organ_mask] & surface, hu, name),)
        free = visible - lesions[name][0].shape
    for name, occurrence in occurrences.items():
        if occurrence.finding.diffuse:
            hu = _draw_whole(rng, SUBSTANCES_HU[occurrence.substance])
            organs = enumerate(occurrence.finding.organ_masks, start=1)
            lesions[name] = tuple(Layer(body.organs[organ], hu, name, number, organ) for number, organ in organs)
        elif name not in lesions:  # the effusion is
            lesions[name] = tuple(_draw_round(rng, body, free, occurrence))
    return lesions


def _draw_round(rng: np.random.Generator, body: Body, free: Shape, occurrence: Occurrence) -> Iterator[Layer]:
    organ, direction = occurrence.organ_mask, PARTS[occurrence.place.partition(" ")[0]]
    x, y, z = (m + CLEAR_MM * d for m, d in zip(body.middles_lps[organ], direction, strict=True))
    home = body.organs[organ] & half_space((x, y, z), direction) & free
    hu = _draw_whole(rng, SUBSTANCES_HU[occurrence.substance])
    largest = _draw_whole(rng, occurrence.size_bin_mm)
    low, high = FURTHER_MM
    further = [_draw_whole(rng, (low, max(low, min(high, largest - 4)))) for _ in range(occurrence.count - 1)]
    taken: dict[Vector, float] = {}
    for number, diameter in enumerate((largest, *further), start=1):
        radius = diameter / 2
        centre = _draw_centre(rng, home, radius, taken)
        taken[centre] = radius
        yield Layer(ellipsoid(centre, (radius,) * 3), hu, occurrence.finding.name, number, organ, diameter)


def _draw_whole(rng: np.random.Generator, low_high: tuple[int, int]) -> int:
    return int(rng.integers(*low_high, endpoint=True))


def _draw_centre(rng: np.random.Generator, home: Shape, radius_mm: float, taken: Mapping[Vector, float]) -> Vector:
    """The centre of a sphere in `home`, GAP_MM from its border and twice that from {centre: radius}; NoRoomError."""
    centres = rng.uniform(home.bounds_lps[0], home.bounds_lps[1], (10_000, 3))
    for other, other_radius_mm in taken.items():
        distance = np.linalg.norm(centres - other, axis=1)
        centres = centres[distance > radius_mm + 2 * GAP_MM + other_radius_mm]
    centres = centres[home.contains(*centres.T)]
    # The 26 directions from the middle of a 3 x 3 x 3 cube to its other cells.
    steps = np.stack(np.meshgrid(*[[-1, 0, 1]] * 3), axis=-1).reshape(-1, 3)
    steps = steps[np.any(steps, axis=1)]
    reach = steps / np.linalg.norm(steps, axis=1, keepdims=True) * (radius_mm + GAP_MM)
    for start in range(0, len(centres), 500):  # most often one of the first fits
        surface = centres[start : start + 500, None] + reach
        fits = home.contains(*np.moveaxis(surface, -1, 0)).all(axis=1)
        if fits.any():
            x, y, z = centres[start + np.argmax(fits)].tolist()
            return x, y, z
    raise NoRoomError(f"no room for a sphere of radius {radius_mm} mm in {home.bounds_lps.round().tolist()}")
