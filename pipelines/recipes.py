"""Ready recipes, as functions; variants derive from one another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from photon_data.errors import UsageError
from photon_data.recipe import Recipe, with_settings


def chest_ct() -> Recipe:
    """Return the published preprocessing of Photon: 1 mm, 364^3, [-1000, 1000] HU, model grid 140 x 280 x 280."""
    return Recipe()


def abdomen_ct() -> Recipe:
    """Return the same grid for abdominal scans, with an instruction of their own."""
    return replace(chest_ct(), name="abdomen_ct", instruction="Describe the findings of this abdominal CT scan.")


def wide_ct() -> Recipe:
    """Return a grid of 504 x 504 x 504 mm at 1.4 mm that cuts off almost no scan, at Photon's number of model voxels."""
    return replace(chest_ct(), name="wide_ct", spacing_mm=(1.4, 1.4, 1.4), shape_zyx=(360, 360, 360))


RECIPES: dict[str, Callable[[], Recipe]] = {"chest_ct": chest_ct, "abdomen_ct": abdomen_ct, "wide_ct": wide_ct}


def named_recipe(name: str, settings: Sequence[str]) -> Recipe:
    """Return the named recipe with "key=value" settings applied; UsageError for what it does not know."""
    if name not in RECIPES:
        raise UsageError(f"recipe: one of {', '.join(RECIPES)} wanted, got {name!r}")
    return with_settings(RECIPES[name](), list(settings))
