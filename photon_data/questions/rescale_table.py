"""A table of slopes and intercepts (`--hu-source`) -> the rescaling of each scan, or one error with all problems."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from photon_data.errors import UsageError, name_hint
from photon_data.hounsfield import STORED
from photon_data.questions.manifest import by_name
from photon_data.questions.table import Problem, as_name, number, read_table, refuse
from photon_data.scan import Rescale, Source

COLUMNS = ("volume", "slope", "intercept")
# A scan that the table of --hu-source does not name is refused on its own: these are no slope and no intercept.
NOT_IN_TABLE = Rescale(math.nan, math.nan, "table")


def read_rescales(path: Path, sources: Sequence[Source], columns: Mapping[str, str]) -> dict[str, Rescale]:
    """Return {id: rescaling} of the sources that a table names; its other rows may be about other scans.

    `columns` maps volume, slope and intercept to the table's names. UsageError with all problems of the table: a column
    that is missing, what is no number, a slope of 0, a volume that is named twice or means several scans, or no row for
    any of the sources.
    """
    table = read_table(path)
    volume, slope, intercept = (columns.get(name, name) for name in COLUMNS)
    missing = [name for name in (volume, slope, intercept) if table.rows and name not in table.columns]
    if missing:
        hints = "; ".join(f"{name!r}: {name_hint(name, table.columns)}" for name in missing)
        expected = f"columns {volume}, {slope}, {intercept}"
        raise UsageError(f"{path}: expected {expected}, found {', '.join(table.columns)} ({hints}); try --columns")
    find = by_name((source.id, source.path) for source in sources)
    problems, by_id = list(table.problems), dict[str, Rescale]()
    for place, values in table.rows:
        try:
            name = str(as_name(values.get(volume)) or "").strip()
            if not name:
                raise ValueError("expected a volume, found none; fill it in or leave the row out")
            match = find(name)
            if match.is_ambiguous:
                raise ValueError(f"expected the name of one scan, found {name!r}, {match.reason}")
            if match.id in by_id:
                raise ValueError(f"expected one row per volume, found a second one for {match.id}")
            rescale = Rescale(number(values.get(slope)), number(values.get(intercept)), "table")
            if not rescale.slope:
                raise ValueError(f"expected a slope, found {values[slope]!r}, with which all voxels would be equal")
            if match.id:
                by_id[match.id] = rescale
        except ValueError as error:
            problems.append(Problem(place, "row that cannot be followed", str(error)))
    if problems:
        refuse(path, sorted(problems, key=lambda problem: problem.number))
    if not by_id:
        found = f"none of {len(table.rows)} ({table.rows[0].values[volume]!r} first)"
        raise UsageError(f"{path}: expected rows for scans like {sources[0].path!r}, found {found}; correct the names")
    return by_id


def rescaling(hu_source: str, sources: Sequence[Source], columns: Mapping[str, str]) -> Callable[[Source], Rescale]:
    """Return the function that gives each source the slope and intercept that replace the header's.

    `hu_source` is "stored" (slope 1, intercept 0), or the path of a csv, tsv or jsonl with columns volume, slope,
    intercept; `columns` maps these names to the table's. UsageError with all problems of the table.
    """
    if hu_source == STORED:
        return lambda source: Rescale(1.0, 0.0, "stored")
    path = Path(hu_source)
    if not path.is_file():
        raise UsageError(f"--hu-source: expected header, stored or a table, found {hu_source!r}, which is no file")
    by_id = read_rescales(path, sources, columns)
    return lambda source: by_id.get(source.id, NOT_IN_TABLE)
