"""Which array axis runs along which axis of the body: what it takes to show any scan upright, and to speak of its "head end"."""

from __future__ import annotations

from functools import lru_cache
from itertools import permutations
from typing import NamedTuple

import numpy as np

from photon_data.volume import LETTERS, Geometry

# What people call the low and the high end of the world axes L, P, S, and the way from one to the other.
ENDS = (("right", "left"), ("front", "back"), ("foot", "head"))
WAYS = ("right to left", "front to back", "foot to head")

# A direction's second letter is said from 15 degrees on: "AR" is a little to the right of anterior.
_SECOND_LETTER = np.sin(np.radians(15))


class BodyAxes(NamedTuple):
    """Array axes in the order of the world axes L, P, S.

    array_axis[w]  the array axis (0 z, 1 y, 2 x) that runs most nearly along world axis w; each occurs once
    sign[w]        +1 where its indices grow with w, -1 where they grow against it
    """

    array_axis: tuple[int, int, int]
    sign: tuple[int, int, int]


@lru_cache(maxsize=64)
def body_axes(geometry: Geometry) -> BodyAxes:
    """Return the one-to-one assignment of array axes to world axes that leaves the least tilt over all three together."""
    cosines = _cosines(geometry)
    a, b, c = max(
        permutations(range(3)), key=lambda p: round(abs(cosines[p[0], 0]) + abs(cosines[p[1], 1]) + abs(cosines[p[2], 2]), 6)
    )
    return BodyAxes((a, b, c), (_sign(cosines[a, 0]), _sign(cosines[b, 1]), _sign(cosines[c, 2])))


def tilt_degrees(geometry: Geometry) -> float:
    """Return the largest angle between an array axis and the world axis it is assigned to; 0 for an axis-aligned grid."""
    axes, cosines = body_axes(geometry), _cosines(geometry)
    return float(np.degrees(np.arccos(min(1.0, min(abs(cosines[a, w]) for w, a in enumerate(axes.array_axis))))))


def direction_letters(direction_lps: np.ndarray) -> str:
    """Return the letters of a world direction, the largest part first: "L", or "LA" for one that leans 15 degrees or more."""
    unit = np.asarray(direction_lps, float) / np.linalg.norm(direction_lps)
    largest_first = sorted(range(3), key=lambda w: -round(abs(unit[w]), 6))
    told = [w for w in largest_first if abs(unit[w]) >= _SECOND_LETTER]
    return "".join(LETTERS[w][int(unit[w] > 0)] for w in told)


def position_text(world_axis: int, mm: float) -> str:
    """Return a coordinate with its letter in place of a sign, e.g. -12.34 on axis 2 as "I 12.3 mm"."""
    rounded = round(mm, 4)
    return f"{LETTERS[world_axis][int(rounded >= 0)]} {abs(rounded):.1f} mm"


def _cosines(geometry: Geometry) -> np.ndarray:
    """Return [array axis, world axis]: cosine of the angle between the two."""
    return np.asarray(geometry.steps_lps) / np.asarray(geometry.spacing_zyx_mm)[:, None]


def _sign(value: float) -> int:
    return 1 if value >= 0 else -1
