"""The body of `photon-data show`: a store or a raw scan -> a PNG."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from photon_cli.options import numbers, numbers_or_name
from photon_data.errors import UsageError
from photon_data.picture import three_planes
from photon_data.readers import open_scan
from photon_data.readers.find import find_scans, left_alone
from photon_data.store import SUFFIX, open_volume
from photon_data.volume import Volume


def show(volume: str, output: Path | None, window: str, at: str | None, size_px: int) -> Path:
    """Write the picture and return where."""
    name, content = _open(volume)
    point = numbers(at, 3, "--at") if at else None
    picture = three_planes(content, window_hu=numbers_or_name(window, "--window"), size_px=size_px, at_lps=point, title=name)
    path = output or Path(f"{name}.png")
    picture.save(path)
    return path


def _open(place: str) -> tuple[str, Volume]:
    path = Path(place)
    if "://" in place or (path / "zarr.json").exists():
        return place.rstrip("/").rpartition("/")[2].removesuffix(SUFFIX), open_volume(place)
    if not path.exists():
        raise UsageError(f"a store or a scan wanted, but {place} does not exist")
    sources, ignored = find_scans(path)
    if len(sources) != 1:
        others = f"; files left alone: {left_alone(ignored)}" if ignored else ""
        raise UsageError(f"one scan wanted, got {len(sources)} in {place}; name one{others}")
    scan = open_scan(sources[0])
    planes = np.stack([plane.astype(np.float32) for plane in scan.planes()])
    return sources[0].id, Volume(planes * scan.slope + scan.intercept, scan.geometry)
