"""`--manifest` and `--only` -> the order they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from photon_data.datasets.declare import read_data_manifest
from photon_data.recipe import Policy
from photon_pipelines.plan import Order, one_recipe, out_of


def declared_order(path: Path, only: Sequence[str], out: str | None, *, max_voxels: int, **more: Any) -> Order:
    """Return the order for the data sets of a data_manifest.yaml; UsageError for what it cannot mean."""
    manifest = read_data_manifest(path)
    datasets = manifest.only(only)
    said = {"seed": manifest.seed, "policy": Policy(max_voxels=max_voxels), **more}
    return Order(source=path, out=out_of(manifest, out), recipe=one_recipe(datasets), datasets=datasets, **said)
