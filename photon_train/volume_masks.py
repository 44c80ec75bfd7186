"""Masks on disk -> how many of their voxels lie in each token, once for every volume that is asked about."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from photon_data.errors import UsageError
from photon_train.masks import CountedMask, counted_masks
from photon_train.scan_input import prepared_grid
from photon_train.token_grid import token_cells


class VolumeMasks(NamedTuple):
    """Masks by volume id, and why those of a volume could not be read."""

    masks: dict[str, list[CountedMask]]
    unread: dict[str, str]


def volumes_with_masks(folder: Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return where each volume is that has a folder of masks, by id; rows of several volumes or none are left out.

    UsageError where there is no such volume.
    """
    places = {row["volume_id"]: str(row["videos"][0]) for row in rows if len(row["videos"]) == 1}
    found = {id: place for id, place in sorted(places.items()) if id and (folder / id).is_dir()}
    if not found:
        raise UsageError(f"--masks: a folder named by volume id for some of {len(places)} volumes wanted, found none in {folder}")
    return found


def counted_by_volume(
    folder: Path,
    places: Mapping[str, str],
    tokens_zyx: tuple[int, int, int],
    each: Callable[[], object] = lambda: None,
    names: Container[str] | None = None,
) -> VolumeMasks:
    """Return the masks of each volume on its tokens (`names`: only those); one that cannot be read costs itself.

    `each` is called after each.
    """
    found = VolumeMasks({}, {})
    for id, place in places.items():
        try:
            cells = token_cells(prepared_grid(place), tokens_zyx)
            found.masks[id] = counted_masks(folder / id, cells, names)
        except (ValueError, OSError) as error:
            found.unread[id] = str(error)
        each()
    return found
