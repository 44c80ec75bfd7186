"""The spine: one raw scan -> the volume and the model grid that a store holds, with what was measured on the way."""

from __future__ import annotations

from typing import Any

import numpy as np

from photon_data.errors import Refused, refusal
from photon_data.hounsfield import Probe, Rescale, refuse_implausible, refuse_scaled_before, volume_statistics
from photon_data.recipe import Policy, Recipe
from photon_data.resample import Values, grid_to_native, margins_mm, model_grid, resample, resize, target_grid
from photon_data.scan import Scan
from photon_data.volume import Geometry, Prepared, Volume


def prepare_volume(
    scan: Scan, recipe: Recipe, policy: Policy | None = None, rescale: Rescale | None = None
) -> Prepared:
    """Return the scan as `recipe` says; Refused if it must not become a store.

    `rescale` replaces the slope and intercept of the header. The facts hold a "policy" where its choices mattered.
    """
    native, grid = scan.geometry, target_grid(scan.geometry, recipe)
    _refuse_smaller_than_a_voxel(native, grid)
    values = _values(scan, recipe, rescale)
    probe = Probe(native.shape_zyx, values.slope, values.intercept, values.pad_stored)
    array = resample(map(probe.look, scan.planes()), native, grid, values, recipe.antialias)
    choices = dict(scan.choices) | _accept(probe, policy or Policy(), rescale)
    model = Volume(resize(array, recipe.model_shape_zyx), model_grid(grid, recipe.model_shape_zyx))
    facts = _facts(scan, grid, values, rescale, probe, array) | ({"policy": choices} if choices else {})
    return Prepared(Volume(array, grid), model, facts)


def _refuse_smaller_than_a_voxel(native: Geometry, grid: Geometry) -> None:
    """Raise Refused for a scan that is thinner than one voxel of the grid: no voxel centre need lie within it."""
    extent_mm = np.ptp(native.corners_lps(), axis=0)
    if (extent_mm < grid.spacing_zyx_mm[::-1]).any():
        found = " x ".join(f"{mm:.3g}" for mm in extent_mm) + " mm"
        raise refusal("too-small", "", "at least one voxel of the grid a side", found, "check the spacing")


def _values(scan: Scan, recipe: Recipe, rescale: Rescale | None) -> Values:
    slope, intercept = (rescale.slope, rescale.intercept) if rescale else (scan.slope, scan.intercept)
    if rescale and np.isnan(slope):
        raise refusal("not-in-table", "", "a row for this scan in the --hu-source table", "none", "add one")
    if not (np.isfinite([slope, intercept]).all() and slope):
        expected, remedy = "a finite slope (not 0) and intercept", "--hu-source can give others"
        raise refusal("rescale", "", expected, f"{slope}, {intercept}", remedy)
    return Values(slope, intercept, recipe.window_hu, recipe.pad_hu)


def _accept(probe: Probe, policy: Policy, rescale: Rescale | None) -> dict[str, str]:
    """Return the choices of the policy without which this scan would be refused; Refused where the policy says so."""
    choices = {}
    if probe.non_finite:
        if policy.non_finite == "refuse":
            found = f"{probe.non_finite} NaN or infinite ones"
            raise refusal("non-finite", "", "finite voxels", found, "--nan fill pads them")
        choices["non_finite"] = policy.non_finite
    if rescale and rescale.given_by == "metadata":
        refuse_scaled_before(probe)
    try:
        refuse_implausible(probe.sample_hu(), *probe.range_hu())
    except Refused:
        if policy.modality == "ct":
            raise
        choices["modality"] = policy.modality
    return choices


def _facts(
    scan: Scan, grid: Geometry, values: Values, rescale: Rescale | None, probe: Probe, array: np.ndarray
) -> dict[str, Any]:
    """Return what is recorded of a volume, in the store and in volumes.jsonl: numbers only, no header text."""
    to_native = grid_to_native(scan.geometry, grid)
    cut_mm, pad_mm = margins_mm(scan.geometry, grid)
    return {
        "format": scan.format,
        "dtype": str(scan.dtype),
        "slope": values.slope,
        "intercept": values.intercept,
        "rescale": rescale.given_by if rescale else "header",
        "geometry": scan.geometry.to_json(),
        "grid": grid.to_json(),
        "grid_to_native_zyx": to_native.tolist(),
        "native_to_grid_zyx": np.linalg.inv(to_native).tolist(),
        "cut_mm": cut_mm,
        "pad_mm": pad_mm,
        "hu_before": probe.statistics(),
        "hu_after": volume_statistics(array),
    }
