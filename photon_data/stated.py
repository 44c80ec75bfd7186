"""What a data set's own table says of the grid of one of its files, and how that agrees with the file's header."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from photon_data.errors import Refused
from photon_data.volume import Geometry

# Published tables round spacing to four digits or more.
SPACING_SHARE = 0.005


class Stated(NamedTuple):
    """A grid that a table states for one file.

    geometry  shape, spacing and directions
    instead   True: the header is blank and this grid takes its place; False: the header counts, and has to agree with this
    """

    geometry: Geometry
    instead: bool

    def to_json(self) -> dict[str, Any]:
        """Return the plain dict that `from_json` reads back."""
        return {"geometry": self.geometry.to_json(), "instead": self.instead}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Stated:
        """Return the Stated that `to_json` wrote."""
        return cls(Geometry.from_json(data["geometry"]), data["instead"])


def agreed(native: Geometry, stated: Stated) -> Geometry:
    """Return the grid to go by; Refused ("table-conflict") where shape, or the header that counts, differs from the table.

    Of a header that counts, shape and spacing are compared, axis by axis as they lie in the file.
    """
    table = stated.geometry
    if native.shape_zyx != table.shape_zyx:
        raise _conflict("voxels", native.shape_zyx, table.shape_zyx)
    if not stated.instead and not np.allclose(native.spacing_zyx_mm, table.spacing_zyx_mm, rtol=SPACING_SHARE):
        raise _conflict("mm", native.spacing_zyx_mm, table.spacing_zyx_mm)
    return table if stated.instead else native


def _conflict(unit: str, found: tuple[float, ...], said: tuple[float, ...]) -> Refused:
    in_file, in_table = (" x ".join(f"{value:.4g}" for value in values) for values in (found, said))
    return Refused(
        "table-conflict",
        f"a header that agrees with the data set's table wanted, found {in_file} {unit} (z, y, x) in the file and {in_table} in "
        "the table; one of the two belongs to another version or file",
    )
