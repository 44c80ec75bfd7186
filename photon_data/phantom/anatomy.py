"""Healthy bodies: organs and tissue as shapes in LPS millimetres (+x to the patient's left, +y to the back, +z to the head)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from photon_data.phantom.shapes import Shape, Vector, bands, column, ellipsoid

# Semi-axes of the standard body: x, y, z.
TORSO_MM = (176, 112, 330)
CAGE_MM = (152, 99, 320)


@dataclass(frozen=True)
class Layer:
    """A shape filled with one HU. Its voxels have the value `label` in the mask `structure`, and 1 in the organ mask `within`."""

    shape: Shape
    hu: float
    structure: str = ""
    label: int = 1
    within: str = ""


@dataclass(frozen=True)
class Body:
    """A patient: organs by the name of their mask, and all tissue in painting order (later layers replace earlier ones).

    `middles_lps` are the points that part lungs and kidneys into upper and lower, and the liver into left and right.
    """

    centre_lps: Vector
    organs: dict[str, Shape]
    middles_lps: dict[str, Vector]
    layers: tuple[Layer, ...]
    table: Layer


@dataclass(frozen=True)
class Frame:
    """From the standard body to this patient: scaled along x, y, z, then moved."""

    scale: Vector
    origin_lps: Vector

    def point(self, centre: Vector) -> Vector:
        """World position of a point of the standard body."""
        x, y, z = (o + s * c for o, s, c in zip(self.origin_lps, self.scale, centre, strict=True))
        return x, y, z

    def length(self, semi_axes: Vector) -> Vector:
        """Size in this patient of a size in the standard body."""
        x, y, z = (s * a for s, a in zip(self.scale, semi_axes, strict=True))
        return x, y, z

    def ellipsoid(self, centre: Vector, semi_axes: Vector) -> Shape:
        """An ellipsoid of the standard body, in this patient."""
        return ellipsoid(self.point(centre), self.length(semi_axes))

    def column(self, centre: Vector, semi_axes: Vector) -> Shape:
        """A column of the standard body, in this patient."""
        return column(self.point(centre), self.length(semi_axes))


def draw_body(rng: np.random.Generator) -> Body:
    """A patient of some size, somewhere on the table; the midline is within 8 mm of x = 0, so that a side is a sign of x."""
    width, depth, height = rng.uniform((0.92, 0.94, 0.86), (1.04, 1.06, 0.96)).tolist()
    x, y, z = rng.uniform((-8, -120, -600), (8, 120, 600)).tolist()
    frame = Frame((width, depth, height), (x, y, z))
    organs, middles_lps = _draw_organs(frame, rng)
    layers = (*_trunk(frame), *_draw_bowel(frame, rng), *_draw_organ_layers(organs, rng), *_skeleton(frame, organs))
    return Body(frame.point((0, 0, -8)), organs, middles_lps, layers, _table(frame))


def _draw_organs(frame: Frame, rng: np.random.Generator) -> tuple[dict[str, Shape], dict[str, Vector]]:
    """Organs that do not overlap, by mask name, and the middles of those that have parts."""
    middles_lps = {"liver": frame.point((-22, 0, 0))}

    def near(name: str, centre: Vector, semi_axes: Vector) -> Shape:
        x, y, z = (np.array(centre) + rng.uniform(-4, 4, 3)).tolist()
        a, b, c = (np.array(semi_axes) * rng.uniform(0.96, 1.04)).tolist()
        middles_lps.setdefault(name, frame.point((x, y, z)))
        return frame.ellipsoid((x, y, z), (a, b, c))

    spine, aorta = frame.column((0, 66, 10), (22, 19, 320)), frame.column((17, 38, 10), (10, 10, 320))
    spleen = near("spleen", (97, 30, -40), (31, 46, 50))
    lobes = near("liver", (-72, -2, -44), (70, 80, 66)) | near("liver", (8, -34, -22), (80, 46, 42))
    heart = near("heart", (22, -28, 48), (52, 44, 52)) - lobes
    kidneys = {
        "kidney_right": near("kidney_right", (-60, 48, -116), (31, 29, 50)),
        "kidney_left": near("kidney_left", (60, 46, -108), (31, 29, 50)) - spleen,
    }
    lungs = {
        "lung_right": near("lung_right", (-76, 3, 72), (58, 78, 110)),
        "lung_left": near("lung_left", (78, 3, 72), (55, 76, 108)),
    }
    vessels_and_bone = spine | aorta
    liver = lobes - (kidneys["kidney_right"] | spleen | vessels_and_bone)
    organs = {"heart": heart, "aorta": aorta, "spine": spine, "spleen": spleen, "liver": liver}
    organs |= {name: kidney - spine for name, kidney in kidneys.items()}
    organs |= {name: lung - (heart | lobes | spleen | vessels_and_bone) for name, lung in lungs.items()}
    return organs, middles_lps


def _draw_organ_layers(organs: dict[str, Shape], rng: np.random.Generator) -> list[Layer]:
    """Every organ with its HU in a scan with contrast agent; the spine comes with the skeleton."""
    lung, heart, liver, kidney, spleen = rng.uniform((-870, 110, 105, 160, 112), (-820, 140, 125, 190, 132)).tolist()
    hu = {"lung_left": lung, "lung_right": lung, "heart": heart, "aorta": heart + 40, "liver": liver}
    hu |= {"kidney_left": kidney, "kidney_right": kidney, "spleen": spleen}
    return [Layer(organs[name], value, name) for name, value in hu.items()]


def _trunk(frame: Frame) -> list[Layer]:
    """Skin and fat, muscle, fat between the bowels, soft tissue between the lungs, trachea."""
    a, b, c = CAGE_MM
    return [
        Layer(frame.column((0, 0, 0), TORSO_MM), -100),
        Layer(frame.column((0, 0, 0), (a + 8, b + 3, c)), 50),
        Layer(frame.column((0, -6, -190), (a - 14, b - 18, 160)), -95),
        Layer(frame.column((0, 0, 130), (a - 10, b - 8, 160)), 45),
        Layer(frame.column((0, 18, 250), (8, 8, 160)), -1000),
    ]


def _draw_bowel(frame: Frame, rng: np.random.Generator) -> list[Layer]:
    """Loops in front of the kidneys, some holding gas: things that are no lesion."""
    loops = []
    for hu in (25, 25, 25, 25, 25, 25, -1000, -1000, -1000):
        x, y, z = rng.uniform((-95, -65, -230), (95, -5, -95)).tolist()
        a, b, c = (rng.uniform(14, 26, 3) if hu > 0 else rng.uniform(6, 11, 3)).tolist()
        loops.append(Layer(frame.ellipsoid((x, y, z), (a, b, c)), hu))
    return loops


def _skeleton(frame: Frame, organs: dict[str, Shape]) -> list[Layer]:
    """Ribs slanting down to the front, sternum, and the spine: vertebrae with discs between and the canal behind."""
    a, b, c = CAGE_MM
    cage = frame.column((0, 0, 130), (a, b, 220)) - frame.column((0, 0, 0), (a - 7, b - 6, c))
    vertebrae = bands(frame.origin_lps, (0, 0, 1), 30 * frame.scale[2], 0.8)
    return [
        Layer(cage & bands(frame.origin_lps, (0, -0.35, 0.94), 26, 0.4), 450),
        Layer(frame.column((0, -93, 100), (18, 6, 85)), 350),
        Layer(frame.column((0, 92, 10), (16, 13, 320)), 400),
        Layer(frame.column((0, 92, 10), (9, 7, 320)), 30),
        Layer(organs["spine"], 90, "spine"),
        Layer(organs["spine"] & vertebrae, 280, "spine"),
    ]


def _table(frame: Frame) -> Layer:
    """A curved, light scanner table under the back."""
    x, y, z = frame.point((0, TORSO_MM[1] + 6, 0))
    hollow, underside = ellipsoid((x, y - 600, z), (600, 600, 1e5)), ellipsoid((x, y - 590, z), (604, 604, 1e5))
    return Layer((underside - hollow) & column((x, y, z), (210, 60, 1e4)), -700)
