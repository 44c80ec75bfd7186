"""`--hu-source`: who says what slope and intercept turn stored values into Hounsfield units."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from photon_data.errors import UsageError
from photon_data.join import AMBIGUOUS, by_source
from photon_data.prepare import Rescale
from photon_data.scan import Source
from photon_data.tables import read_table

HEADER, STORED = "header", "stored"
COLUMNS = ("volume", "slope", "intercept")
# A scan that the table does not name is refused on its own: these are no slope and no intercept.
NOT_IN_TABLE = Rescale(math.nan, math.nan, "table")


def rescaling(said: str, sources: Iterable[Source], columns: Mapping[str, str]) -> Callable[[Source], Rescale | None]:
    """Return what gives each source its rescaling: None for the header's, (1, 0) for `stored`, or the rows of a table.

    `said` is "header", "stored" or the path of a csv, tsv or jsonl with columns volume, slope, intercept (`columns` maps
    these names to the table's). UsageError for a table that cannot be read or names a volume twice.
    """
    if said == HEADER:
        return lambda source: None
    if said == STORED:
        return lambda source: Rescale(1.0, 0.0, "stored")
    if not Path(said).is_file():
        raise UsageError(f"--hu-source: header, stored or a table wanted, got {said!r}, which is no file")
    named = _read(Path(said), sources, columns)
    return lambda source: named.get(source.id, NOT_IN_TABLE)


def _read(path: Path, sources: Iterable[Source], columns: Mapping[str, str]) -> dict[str, Rescale]:
    sources = list(sources)
    find, ids = by_source(sources), {source.id for source in sources}
    volume, slope, intercept = (columns.get(name, name) for name in COLUMNS)
    named: dict[str, Rescale] = {}
    for place, values in read_table(path).rows:
        try:
            numbers = float(values[slope]), float(values[intercept])
            found = find(str(values[volume]))
        except (KeyError, TypeError, ValueError):
            raise UsageError(
                f"{path.name}, {place}: {volume} (text), {slope}, {intercept} (numbers) wanted, got {values}"
            ) from None
        if found in ids:
            if found in named:
                raise UsageError(f"{path.name}, {place}: one row per volume wanted, got a second one for {found}")
            named[found] = Rescale(*numbers, "table")
        elif found.startswith(AMBIGUOUS):
            raise UsageError(f"{path.name}, {place}: the name of one scan wanted, got {values[volume]!r}, {found}")
    return named
