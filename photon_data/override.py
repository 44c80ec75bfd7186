"""What a person says of one scan in place of its header: where its voxels lie, and which part of it counts.

A table gives it (`--overrides`, see `questions/override_table.py`). It is no part of the recipe, but of the volume's
resume key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from photon_data.errors import refusal
from photon_data.scan import Change, Scan
from photon_data.volume import RAS_LPS, Geometry

OVERRIDE = "override"
# The code of a refusal by a person, who gives the reason.
SKIPPED = "skipped"
LEAST_SIDE = 2


@dataclass(frozen=True)
class Override:
    """One row of the table; what is None or empty is left to the header, the recipe, the policy."""

    affine: list[list[float]] | None = None  # [4][4]: voxel (x, y, z), as the file has them, to RAS mm
    spacing_mm: list[float | None] | None = None  # along z, y, x; the first voxel stays where it is
    crop: list[list[int | None]] | None = None  # [[first, end], ...] along z, y, x, in voxels of the file
    centre_lps: list[float] | None = None  # mm: of the target grid, in place of the recipe's choice
    rescale: list[float] | None = None  # slope, intercept
    policy: Mapping[str, Any] = field(default_factory=dict)  # fields that differ for this scan
    skip: str = ""  # the reason why it is left out
    row: Mapping[str, str] = field(default_factory=dict)  # the cells as they were given, without the scan's name

    def key(self) -> dict[str, Any]:
        """Return what decides voxels and is in no other part of a resume key; empty where nothing is."""
        parts = {name: getattr(self, name) for name in ("affine", "spacing_mm", "crop", "centre_lps")}
        return {name: value for name, value in parts.items() if value is not None}

    def to_json(self) -> dict[str, Any]:
        """Return the plain dict whose items are the fields."""
        return asdict(self)

    def apply(self, scan: Scan) -> Scan:
        """Return the scan with this geometry and crop, and with the change that both make; Refused."""
        if scan.slices and (self.affine or (self.spacing_mm and self.spacing_mm[0]) or _is_cut(self.crop, 0)):
            expected = "no affine, spacing along z or crop along z for a series whose slices are repaired"
            raise refusal("bad-override", "", expected, "one", "take it out of the overrides, or convert the series")
        geometry = scan.geometry
        if self.affine:
            affine = np.array(self.affine)
            steps, origin = (RAS_LPS @ affine[:3, :3]).T[::-1], RAS_LPS @ affine[:3, 3]
            geometry = Geometry.from_arrays(geometry.shape_zyx, origin, steps)
        if self.spacing_mm:
            now = geometry.spacing_zyx_mm
            scale = [1.0 if mm is None else mm / old for mm, old in zip(self.spacing_mm, now, strict=True)]
            steps = np.asarray(geometry.steps_lps) * np.array(scale)[:, None]
            geometry = Geometry.from_arrays(geometry.shape_zyx, geometry.origin_lps, steps)
        planes, whole = scan.planes, geometry
        if self.crop:
            geometry, planes = self._cropped(geometry, planes)
        if geometry == scan.geometry:
            return scan
        change = Change(OVERRIDE, in_words(scan.geometry), in_words(geometry))
        uncropped = whole if self.crop else None
        return replace(scan, geometry=geometry, planes=planes, uncropped=uncropped, changes=(*scan.changes, change))

    def facts(self, scan: Scan, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Return what is recorded of this override beside the `facts` of its volume; nothing where it did not matter.

        `scan` is as it was opened: with this geometry, but with the slope and intercept of its header.
        """
        changes = list(facts.get("changes", ()))
        if self.rescale:
            words = [f"HU = {a:g} x stored {b:+g}" for a, b in ((scan.slope, scan.intercept), self.rescale)]
            changes.append(Change(OVERRIDE, *words)._asdict())
        if self.centre_lps:
            before, after = (
                ", ".join(f"{mm:.1f}" for mm in each) for each in (scan.geometry.centre_lps, self.centre_lps)
            )
            change = Change(OVERRIDE, f"centre of the scan at ({before}) mm LPS", f"centre of the grid at ({after})")
            changes.append(change._asdict())
        mattered = self.key() or self.rescale or self.policy.keys() & facts.get("policy", {}).keys()
        return {"override": dict(self.row), "changes": changes} if mattered else {}

    def _cropped(
        self, geometry: Geometry, planes: Callable[[], Iterator[np.ndarray]]
    ) -> tuple[Geometry, Callable[[], Iterator[np.ndarray]]]:
        assert self.crop is not None
        parts = []
        for (first, end), size in zip(self.crop, geometry.shape_zyx, strict=True):
            low, high = first or 0, size if end is None else end
            if not low + LEAST_SIDE <= high <= size:
                found = f"{low}:{high} of {' x '.join(map(str, geometry.shape_zyx))} (z, y, x)"
                raise refusal("bad-override", "", "a crop of 2 voxels or more within the scan", found, "correct it")
            parts.append(slice(low, high))
        origin, shape = geometry.world([part.start for part in parts]), [part.stop - part.start for part in parts]

        def cropped() -> Iterator[np.ndarray]:
            for k, plane in enumerate(planes()):  # all of them: the reader checks the end of the file
                if parts[0].start <= k < parts[0].stop:
                    yield plane[parts[1], parts[2]]

        return Geometry.from_arrays(shape, origin, geometry.steps_lps), cropped


def _is_cut(crop: list[list[int | None]] | None, axis: int) -> bool:
    return crop is not None and crop[axis] != [None, None]


def in_words(geometry: Geometry) -> str:
    """Return "9 x 8 x 7 voxels (z, y, x) of 5 x 0.7 x 0.7 mm towards SPL, the first at L 1.0, P 2.0, S -3.0 mm"."""
    shape, spacing = (" x ".join(f"{n:.5g}" for n in each) for each in (geometry.shape_zyx, geometry.spacing_zyx_mm))
    first = ", ".join(f"{letter} {mm:.1f}" for letter, mm in zip("LPS", geometry.origin_lps, strict=True))
    return f"{shape} voxels (z, y, x) of {spacing} mm towards {geometry.orientation}, the first at {first} mm"
