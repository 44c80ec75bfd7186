"""What is wrong with a body: lesions placed where the scan, and the cube that a model is given of it, will show them whole."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from photon_data.phantom.anatomy import Body, Layer
from photon_data.phantom.plan import Occurrence
from photon_data.phantom.shapes import NoRoomError, Shape, Sphere, Vector, ellipsoid, half_space, place_sphere

SUBSTANCES_HU = {
    "ground-glass": (-600, -500),
    "fat": (-110, -90),
    "fluid": (0, 12),
    "soft tissue": (35, 60),
    "calcified": (350, 450),
    "dense": (950, 1000),
}
GAP_MM = 2.0  # from a lesion to the border of its organ or of the view; twice that between lesions
ATTEMPTS = 30
CLEAR_MM = 4.0  # more of that to the border between two parts of an organ: nobody should doubt which part it is
FURTHER_MM = (12, 20)  # diameters of the second and third lesion, which also stay below the first
PLACES: dict[str, Vector] = {  # which way the named part lies from the middle of the organ
    "upper half": (0, 0, 1),
    "upper pole": (0, 0, 1),
    "lower half": (0, 0, -1),
    "lower pole": (0, 0, -1),
    "left lobe": (1, 0, 0),
    "right lobe": (-1, 0, 0),
    "": (0, 0, 0),
}


@dataclass(frozen=True)
class Lesion:
    """One lesion of a finding; number 1 is the largest. An effusion has no diameter (0) and no organ mask ("")."""

    number: int
    shape: Shape
    hu: int
    diameter_mm: int
    organ_mask: str


def draw_lesions(
    rng: np.random.Generator, body: Body, visible: Shape, occurrences: dict[str, Occurrence]
) -> dict[str, tuple[Lesion, ...]]:
    """The lesions of every occurring finding, by its name, the largest first. Round ones lie whole within `visible`."""
    for _ in range(ATTEMPTS):
        try:
            return _draw_all(rng, body, visible, occurrences)
        except NoRoomError:
            continue  # one body in some hundred is too small or cut too close for the sizes that were drawn
    raise NoRoomError(f"no room for {list(occurrences)} in {ATTEMPTS} attempts")


def lesion_layers(lesions: dict[str, tuple[Lesion, ...]]) -> list[Layer]:
    """The lesions as layers to paint after the body."""
    return [
        Layer(lesion.shape, lesion.hu, name, lesion.number, lesion.organ_mask)
        for name, members in lesions.items()
        for lesion in members
    ]


def _draw_all(
    rng: np.random.Generator, body: Body, visible: Shape, occurrences: dict[str, Occurrence]
) -> dict[str, tuple[Lesion, ...]]:
    lesions: dict[str, tuple[Lesion, ...]] = {}
    free = visible
    if "pleural_effusion" in occurrences:
        effusion = _draw_effusion(rng, body, occurrences["pleural_effusion"])
        lesions["pleural_effusion"] = (effusion,)
        free = visible - effusion.shape
    for name, occurrence in occurrences.items():
        if occurrence.finding.diffuse:
            lesions[name] = _draw_diffuse(rng, body, occurrence)
        elif name != "pleural_effusion":
            lesions[name] = _draw_round(rng, body, free, occurrence)
    return lesions


def _draw_round(rng: np.random.Generator, body: Body, free: Shape, occurrence: Occurrence) -> tuple[Lesion, ...]:
    organ = _organ_mask(occurrence)
    away = PLACES[occurrence.place]
    x, y, z = (m + CLEAR_MM * a for m, a in zip(body.middles_lps[organ], away, strict=True))
    home = body.organs[organ] & half_space((x, y, z), away) & free
    hu = _draw_whole(rng, SUBSTANCES_HU[occurrence.substance])
    largest = _draw_whole(rng, occurrence.size_bin_mm)
    low, high = FURTHER_MM
    further = [_draw_whole(rng, (low, max(low, min(high, largest - 4)))) for _ in range(occurrence.count - 1)]
    lesions, taken = [], list[Sphere]()
    for number, diameter in enumerate((largest, *further), start=1):
        taken.append(place_sphere(rng, home, diameter / 2, GAP_MM, taken))
        ball = ellipsoid(taken[-1].centre_lps, (diameter / 2, diameter / 2, diameter / 2))
        lesions.append(Lesion(number, ball, hu, diameter, organ))
    return tuple(lesions)


def _draw_diffuse(rng: np.random.Generator, body: Body, occurrence: Occurrence) -> tuple[Lesion, ...]:
    """All of the organ, at one attenuation."""
    hu = _draw_whole(rng, SUBSTANCES_HU[occurrence.substance])
    masks = enumerate(occurrence.finding.organ_masks, start=1)
    return tuple(Lesion(number, body.organs[mask], hu, 0, mask) for number, mask in masks)


def _draw_effusion(rng: np.random.Generator, body: Body, occurrence: Occurrence) -> Lesion:
    """Fluid behind the lung of one who lies on the back, deeper towards the diaphragm."""
    lung = _organ_mask(occurrence)
    x, y, z = body.middles_lps[lung]
    surface = half_space((x, y + float(rng.uniform(32, 44)), z), (0, 0.95, -0.3))
    return Lesion(1, body.organs[lung] & surface, _draw_whole(rng, SUBSTANCES_HU["fluid"]), 0, "")


def _organ_mask(occurrence: Occurrence) -> str:
    return next(mask for mask in occurrence.finding.organ_masks if mask.endswith(occurrence.side))


def _draw_whole(rng: np.random.Generator, low_high: tuple[int, int]) -> int:
    """A whole number from low to high, both included."""
    return int(rng.integers(low_high[0], low_high[1] + 1))
