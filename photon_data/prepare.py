"""The spine: one raw scan -> the volume and the model grid that a store holds, with what was measured on the way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np

from photon_data.errors import Refused
from photon_data.grid import grid_to_native, margins_mm, model_grid, target_grid
from photon_data.hounsfield import Probe, refuse_implausible, refuse_non_finite, refuse_scaled_before, volume_statistics
from photon_data.recipe import Recipe
from photon_data.resample import Values, resample, resize
from photon_data.scan import Scan
from photon_data.volume import Geometry, Volume


class Rescale(NamedTuple):
    """HU = slope * stored + intercept, and who says so.

    said_by  "stored": nobody, values are taken as they are; "table": a person's table, which is obeyed; "metadata": the
             table of a data set whose files hold raw values, so that stored values which are HU already are refused
    """

    slope: float
    intercept: float
    said_by: Literal["stored", "table", "metadata"]


class Prepared(NamedTuple):
    """A scan on the target grid: int16 HU, once at full size and once on the model grid, and its facts (see VolumeRecord)."""

    volume: Volume
    model: Volume
    facts: dict[str, Any]


def prepare_volume(scan: Scan, recipe: Recipe, rescale: Rescale | None = None) -> Prepared:
    """Return the scan as `recipe` wants it; Refused if it must not become a store.

    `rescale` replaces the slope and intercept of the header.
    """
    grid = target_grid(scan.geometry, recipe)
    _refuse_specks(scan.geometry, grid)
    values = _values(scan, recipe, rescale)
    probe = Probe(scan.geometry.shape_zyx, values.slope, values.intercept, values.pad_stored)
    array = resample(_watched(scan, probe), scan.geometry, grid, values, recipe)
    _refuse(probe, recipe, rescale)
    model = Volume(resize(array, recipe.model_shape_zyx), model_grid(grid, recipe.model_shape_zyx))
    volume = Volume(array, grid)
    return Prepared(volume, model, _facts(scan, grid, values, rescale, probe, array))


def _refuse_specks(native: Geometry, grid: Geometry) -> None:
    """Raise Refused for a scan that is thinner than one voxel of the grid: no voxel centre need lie within it."""
    corners = native.corners_lps()
    extent_mm, voxel_mm = corners.max(0) - corners.min(0), np.asarray(grid.spacing_zyx_mm[::-1])
    if (extent_mm < voxel_mm).any():
        found = " x ".join(f"{mm:.3g}" for mm in extent_mm)
        raise Refused("too-small", f"a scan of at least one voxel of the grid a side wanted, found {found} mm; check its spacing")


def _values(scan: Scan, recipe: Recipe, rescale: Rescale | None) -> Values:
    if rescale is not None and np.isnan(rescale.slope):
        raise Refused("not-in-table", "a row in the --hu-source table wanted, found none for this scan; add one")
    slope, intercept = (rescale.slope, rescale.intercept) if rescale else (scan.slope, scan.intercept)
    if not (np.isfinite(slope) and np.isfinite(intercept) and slope != 0):
        raise Refused(
            "rescale", f"a finite slope (not 0) and intercept wanted, got {slope} and {intercept}; --hu-source can give others"
        )
    return Values(slope, intercept, recipe.window_hu, recipe.pad_hu)


def _watched(scan: Scan, probe: Probe) -> Iterator[np.ndarray]:
    for plane in scan.planes():
        yield probe.look(plane)


def _refuse(probe: Probe, recipe: Recipe, rescale: Rescale | None) -> None:
    if recipe.non_finite == "refuse":
        refuse_non_finite(probe.non_finite)
    if rescale and rescale.said_by == "metadata":
        refuse_scaled_before(probe.sample_stored(), probe.low, probe.high)
    if recipe.modality == "ct":
        refuse_implausible(probe.sample_hu(), *probe.range_hu())


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
        "rescale": rescale.said_by if rescale else "header",
        "geometry": scan.geometry.to_json(),
        "grid": grid.to_json(),
        "grid_to_native_zyx": to_native.tolist(),
        "native_to_grid_zyx": np.linalg.inv(to_native).tolist(),
        "cut_mm": cut_mm,
        "pad_mm": pad_mm,
        "hu_before": probe.statistics(),
        "hu_after": volume_statistics(array),
    }
