"""A table of overrides (`--overrides`) -> what a person says of each scan; and a table proposed for refused scans."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from photon_data.errors import UsageError, name_hint
from photon_data.override import LEAST_SIDE, Override
from photon_data.questions.manifest import by_name
from photon_data.questions.table import Problem, as_name, number, read_table, refuse
from photon_data.readers.stream import SPACING_MM
from photon_data.recipe import accepted
from photon_data.records import VolumeRecord
from photon_data.scan import Source
from photon_data.volume import Geometry

NAME, COMMENTS = "volume", ("code", "found")  # --propose writes the comments, nobody reads them
COLUMNS = ("affine", "spacing_mm", "slope", "intercept", "crop", "centre_lps_mm", "accept", "skip")
# What a proposal leaves to a person.
OPEN = "?"
# Refusals that another slope and intercept can undo, or an affine.
BY_RESCALE, BY_AFFINE = ("rescale", "not-in-table", "hu-implausible"), ("no-geometry",)


def read_overrides(path: Path, sources: Sequence[Source]) -> dict[str, Override]:
    """Return {id: override} of the sources that a table names.

    UsageError with all problems of the table, by line: a column that is not known, a cell that cannot be followed, a
    scan that is named twice, a name that is no scan's or that several have.
    """
    table = read_table(path)
    known = (NAME, *COLUMNS, *COMMENTS)
    unknown = [name for name in table.columns if name not in known]
    if table.rows and (unknown or NAME not in table.columns):
        hints = [f"{name!r}: {name_hint(name, known)}" for name in unknown] or [f"there is no {NAME!r}"]
        found = f"{', '.join(table.columns)} ({'; '.join(hints)})"
        raise UsageError(f"{path}: expected columns {NAME} and some of {', '.join(COLUMNS)}, found {found}")
    find, by_id = by_name((source.id, source.path) for source in sources), {source.id: source for source in sources}
    problems, made = list(table.problems), dict[str, Override]()
    is_hidden = any(source.hidden for source in sources)
    for place, values in table.rows:
        try:
            name = str(as_name(values.get(NAME)) or "").strip()
            match = find(name) if name else None
            if match is None or match.id is None:
                reason = match.reason if match else "empty"
                shown, reason = ("(name)", reason.partition(" (")[0]) if is_hidden else (repr(name), reason)
                raise ValueError(f"expected the name of one scan, found {shown}: {reason}")
            if match.id in made:
                shown = match.id if is_hidden else repr(name)
                raise ValueError(f"expected one row per scan, found a second one for {shown}")
            made[match.id] = _override({key: _cell(values.get(key)) for key in COLUMNS}, by_id[match.id])
        except ValueError as error:
            problems.append(Problem(place, "row that cannot be followed", str(error)))
    if problems:
        refuse(path, sorted(problems, key=lambda problem: problem.number))
    return made


def _cell(value: Any) -> str:
    """Return a cell as text: lists of JSON become what a csv would have, [[1, 0], [0, 1]] as "1, 0, 0, 1"."""
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    return "" if value is None else str(value).strip()


def _override(row: Mapping[str, str], source: Source) -> Override:
    """Return what one row says; ValueError for a cell that cannot be followed, and for a row that says nothing."""
    given = {name: text for name, text in row.items() if text}
    if undecided := [name for name, text in given.items() if OPEN in text and name != "skip"]:
        cells = ", ".join(f"{name} {given[name]}" for name in undecided)
        raise ValueError(f"expected a decision in place of {OPEN!r}, found {cells}; fill it in, or empty the cell")
    if not given:
        raise ValueError(f"expected something in one of {', '.join(COLUMNS)}, found nothing; leave the row out")
    if "skip" in given and len(given) > 1:
        raise ValueError(f"expected `skip` alone, found {', '.join(given)}")
    if len({"slope", "intercept"} & given.keys()) == 1:
        raise ValueError("expected slope and intercept, found one of them")
    policy = accepted(re.split(r"[\s,;]+", given["accept"])) if "accept" in given else {}
    affine = given.get("affine", "")
    if affine in ("sform", "qform"):
        if source.format != "nifti":
            raise ValueError(f"expected {affine} for a NIfTI, found one for {source.format}")
        policy, affine = policy | {"nifti_affine": affine}, ""
    if affine and "spacing_mm" in given:
        raise ValueError("expected affine or spacing_mm, found both; an affine has the spacing")
    rescale = [number(given["slope"]), number(given["intercept"])] if "slope" in given else None
    if rescale and not rescale[0]:
        raise ValueError("expected a slope other than 0, with which all voxels would be equal")
    return Override(
        affine=_affine(affine) if affine else None,
        spacing_mm=_of(given, "spacing_mm", _spacing),
        crop=_of(given, "crop", _crop),
        centre_lps=_of(given, "centre_lps_mm", lambda text: _numbers(text, 3)),
        rescale=rescale,
        policy=policy,
        skip=given.get("skip", ""),
        row=given,
    )


def _of(given: Mapping[str, str], name: str, read: Callable[[str], list[Any]]) -> list[Any] | None:
    try:
        return read(given[name]) if name in given else None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _numbers(text: str, count: int) -> list[float]:
    """Return the numbers of "1, 2.5 3" or "[1, 2.5, 3]"."""
    parts = re.split(r"[\s,;]+", text.translate(str.maketrans("[]()", "    ")).strip())
    if len(parts) != count:
        raise ValueError(f"expected {count} numbers, found {len(parts)} in {text!r}")
    return [number(part) for part in parts]


def _affine(text: str) -> list[list[float]]:
    rows = np.array(_numbers(text, 16), float).reshape(4, 4)
    if rows[3].tolist() != [0, 0, 0, 1]:
        raise ValueError(f"affine: expected 0, 0, 0, 1 as its last row, found {rows[3].tolist()}")
    try:
        spacing = Geometry.from_arrays((2, 2, 2), rows[:3, 3], rows[:3, :3].T).spacing_zyx_mm
    except ValueError:
        raise ValueError("affine: expected independent axes, found others") from None
    if not all(SPACING_MM[0] <= mm <= SPACING_MM[1] for mm in spacing):
        raise ValueError(f"affine: expected voxels of 0.001 to 100 mm, found {spacing}")
    return [[float(value) for value in row] for row in rows]


def _spacing(text: str) -> list[float | None]:
    """Return the mm along z, y, x of "2.5, 0.7, 0.7" or, where some stay as they are, "2.5, -, -"."""
    parts = re.split(r"[\s,;]+", text)
    if len(parts) != 3:
        raise ValueError(f"expected three numbers (z, y, x; - for the header's own), found {text!r}")
    spacing = [None if part == "-" else number(part) for part in parts]
    if not all(mm is None or SPACING_MM[0] <= mm <= SPACING_MM[1] for mm in spacing):
        raise ValueError(f"expected 0.001 to 100 mm, found {text!r}")
    return spacing


def _crop(text: str) -> list[list[int | None]]:
    """Return the [first, end] voxels along z, y, x of "10:200, :, 50:450"."""
    parts = [re.fullmatch(r"(\d*):(\d*)", part) for part in re.split(r"[\s,;]+", text)]
    if len(parts) != 3 or not all(parts):
        raise ValueError(f"expected first:end along z, y, x as in '10:200, :, 50:450', found {text!r}")
    crop = [[int(end) if end else None for end in part.groups()] for part in parts if part]
    if any(end is not None and end - (first or 0) < LEAST_SIDE for first, end in crop):
        raise ValueError(f"expected {LEAST_SIDE} voxels or more a side, found {text!r}")
    return crop


def proposed_rows(records: Iterable[VolumeRecord]) -> list[dict[str, str]]:
    """Return the rows of a table of overrides for scans that were refused, where an override can help.

    What repairs a fault safely is filled in; what a person has to choose is "?", which no run accepts.
    """
    rows = []
    for record in records:
        code, row = record.code or "", dict.fromkeys((NAME, *COLUMNS, *COMMENTS), "")
        row["accept"] = record.accept or ""
        row |= {"slope": OPEN, "intercept": OPEN} if code in BY_RESCALE else {}
        row |= {"affine": OPEN} if code in BY_AFFINE else {}
        if any(row.values()):
            rows.append({**row, NAME: record.source, "code": code, "found": record.reason or ""})
    return rows


def proposed_table(records: Iterable[VolumeRecord]) -> str:
    """Return `proposed_rows` as the text of a csv."""
    text = io.StringIO()
    writer = csv.DictWriter(text, (NAME, *COLUMNS, *COMMENTS), lineterminator="\n")
    writer.writeheader()
    writer.writerows(proposed_rows(records))
    return text.getvalue()
