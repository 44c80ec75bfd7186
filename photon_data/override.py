"""What a person says of one scan in place of its header: where its voxels lie, which part of it counts, its scaling.

Tables give it, of overrides (`--overrides`) and of slopes (`--hu-source`); a table of overrides is proposed for refused
scans. An override is no part of the recipe, but of the volume's resume key.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from photon_data.errors import UsageError, name_hint, refusal
from photon_data.hounsfield import STORED
from photon_data.questions.question import Match, by_name
from photon_data.questions.table import Problem, Table, as_name, number, read_table, refuse
from photon_data.readers.stream import SPACING_MM
from photon_data.recipe import accepted
from photon_data.records import VolumeRecord
from photon_data.scan import Change, Rescale, Scan, Source
from photon_data.volume import RAS_LPS, Geometry

OVERRIDE = "override"
# The code of a refusal by a person, who gives the reason.
SKIPPED = "skipped"
LEAST_SIDE = 2


@dataclass(frozen=True)
class Override:
    """One row of the table; what is None or empty is left to the header, the recipe, the policy."""

    affine: list[list[float]] | None = None  # [4][4]: voxel (x, y, z), as the file has them, to RAS mm
    spacing_mm: list[float | None] | None = None  # along z, y, x; the first voxel stays where it is
    crop: list[list[int | None]] | None = None  # [[first, end], ...] along z, y, x, in voxels of the file
    centre_lps: list[float] | None = None  # mm: of the target grid, in place of the recipe's choice
    rescale: list[float] | None = None  # slope, intercept
    policy: Mapping[str, Any] = field(default_factory=dict)  # fields that differ for this scan
    skip: str = ""  # the reason why it is left out
    row: Mapping[str, str] = field(default_factory=dict)  # the cells as they were given, without the scan's name

    def key(self) -> dict[str, Any]:
        """Return what decides voxels and is in no other part of a resume key; empty where nothing is."""
        parts = {name: getattr(self, name) for name in ("affine", "spacing_mm", "crop", "centre_lps")}
        return {name: value for name, value in parts.items() if value is not None}

    def to_json(self) -> dict[str, Any]:
        """Return the plain dict whose items are the fields."""
        return asdict(self)

    def apply(self, scan: Scan) -> Scan:
        """Return the scan with this geometry and crop, and with the change that both make; Refused."""
        if scan.slices and (self.affine or (self.spacing_mm and self.spacing_mm[0]) or _is_cut(self.crop, 0)):
            expected = "no affine, spacing along z or crop along z for a series whose slices are repaired"
            raise refusal("bad-override", "", expected, "one", "take it out of the overrides, or convert the series")
        geometry = scan.geometry
        if self.affine:
            affine = np.array(self.affine)
            steps, origin = (RAS_LPS @ affine[:3, :3]).T[::-1], RAS_LPS @ affine[:3, 3]
            geometry = Geometry.from_arrays(geometry.shape_zyx, origin, steps)
        if self.spacing_mm:
            now = geometry.spacing_zyx_mm
            scale = [1.0 if mm is None else mm / old for mm, old in zip(self.spacing_mm, now, strict=True)]
            steps = np.asarray(geometry.steps_lps) * np.array(scale)[:, None]
            geometry = Geometry.from_arrays(geometry.shape_zyx, geometry.origin_lps, steps)
        planes, whole = scan.planes, geometry
        if self.crop:
            geometry, planes = self._cropped(geometry, planes)
        if geometry == scan.geometry:
            return scan
        change = Change(OVERRIDE, _in_words(scan.geometry), _in_words(geometry))
        uncropped = whole if self.crop else None
        return replace(scan, geometry=geometry, planes=planes, uncropped=uncropped, changes=(*scan.changes, change))

    def facts(self, scan: Scan, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Return what is recorded of this override beside the `facts` of its volume; nothing where it did not matter.

        `scan` is as it was opened: with this geometry, but with the slope and intercept of its header.
        """
        changes = list(facts.get("changes", ()))
        if self.rescale:
            words = [f"HU = {a:g} x stored {b:+g}" for a, b in ((scan.slope, scan.intercept), self.rescale)]
            changes.append(Change(OVERRIDE, *words)._asdict())
        if self.centre_lps:
            before, after = (
                ", ".join(f"{mm:.1f}" for mm in each) for each in (scan.geometry.centre_lps, self.centre_lps)
            )
            change = Change(OVERRIDE, f"centre of the scan at ({before}) mm LPS", f"centre of the grid at ({after})")
            changes.append(change._asdict())
        mattered = self.key() or self.rescale or self.policy.keys() & facts.get("policy", {}).keys()
        return {"override": dict(self.row), "changes": changes} if mattered else {}

    def _cropped(
        self, geometry: Geometry, planes: Callable[[], Iterator[np.ndarray]]
    ) -> tuple[Geometry, Callable[[], Iterator[np.ndarray]]]:
        assert self.crop is not None
        parts = []
        for (first, end), size in zip(self.crop, geometry.shape_zyx, strict=True):
            low, high = first or 0, size if end is None else end
            if not low + LEAST_SIDE <= high <= size:
                found = f"{low}:{high} of {' x '.join(map(str, geometry.shape_zyx))} (z, y, x)"
                raise refusal("bad-override", "", "a crop of 2 voxels or more within the scan", found, "correct it")
            parts.append(slice(low, high))
        origin, shape = geometry.world([part.start for part in parts]), [part.stop - part.start for part in parts]

        def cropped() -> Iterator[np.ndarray]:
            for k, plane in enumerate(planes()):  # all of them: the reader checks the end of the file
                if parts[0].start <= k < parts[0].stop:
                    yield plane[parts[1], parts[2]]

        return Geometry.from_arrays(shape, origin, geometry.steps_lps), cropped


def _is_cut(crop: list[list[int | None]] | None, axis: int) -> bool:
    return crop is not None and crop[axis] != [None, None]


def _in_words(geometry: Geometry) -> str:
    """Return "9 x 8 x 7 voxels (z, y, x) of 5 x 0.7 x 0.7 mm towards SPL, the first at L 1.0, P 2.0, S -3.0 mm"."""
    shape, spacing = (" x ".join(f"{n:.5g}" for n in each) for each in (geometry.shape_zyx, geometry.spacing_zyx_mm))
    first = ", ".join(f"{letter} {mm:.1f}" for letter, mm in zip("LPS", geometry.origin_lps, strict=True))
    return f"{shape} voxels (z, y, x) of {spacing} mm towards {geometry.orientation}, the first at {first} mm"


# --- tables about single scans

NAME, COMMENTS = "volume", ("code", "found")  # --propose writes the comments, nobody reads them
COLUMNS = ("affine", "spacing_mm", "slope", "intercept", "crop", "centre_lps_mm", "accept", "skip")
# What a proposal leaves to a person.
OPEN = "?"
# Refusals that another slope and intercept can undo, or an affine.
BY_RESCALE, BY_AFFINE = ("rescale", "not-in-table", "hu-implausible"), ("no-geometry",)
RESCALE_COLUMNS = ("volume", "slope", "intercept")
# A scan that the table of --hu-source does not name is refused on its own: these are no slope and no intercept.
NOT_IN_TABLE = Rescale(math.nan, math.nan, "table")
HIDDEN_NAME = "(name)"

Made = TypeVar("Made")


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
    by_id = {source.id: source for source in sources}

    def read(values: Mapping[str, Any], id: str) -> Override:
        return _override({key: _cell(values.get(key)) for key in COLUMNS}, by_id[id])

    return _by_scan(path, table, NAME, sources, read)


def rescaling(hu_source: str, sources: Sequence[Source], columns: Mapping[str, str]) -> Callable[[Source], Rescale]:
    """Return the function that gives each source the slope and intercept that replace the header's.

    `hu_source` is "stored" (slope 1, intercept 0), or the path of a csv, tsv or jsonl with columns volume, slope,
    intercept; `columns` maps these names to the table's. Rows may be about other scans, if some are about these.
    UsageError with all problems of the table.
    """
    if hu_source == STORED:
        return lambda source: Rescale(1.0, 0.0, "stored")
    path = Path(hu_source)
    if not path.is_file():
        raise UsageError(f"--hu-source: expected header, stored or a table, found {hu_source!r}, which is no file")
    table = read_table(path)
    volume, slope, intercept = (columns.get(name, name) for name in RESCALE_COLUMNS)
    missing = [name for name in (volume, slope, intercept) if table.rows and name not in table.columns]
    if missing:
        hints = "; ".join(f"{name!r}: {name_hint(name, table.columns)}" for name in missing)
        expected = f"columns {volume}, {slope}, {intercept}"
        raise UsageError(f"{path}: expected {expected}, found {', '.join(table.columns)} ({hints}); try --columns")

    def read(values: Mapping[str, Any], id: str | None) -> Rescale:
        rescale = Rescale(number(values.get(slope)), number(values.get(intercept)), "table")
        if not rescale.slope:
            raise ValueError(f"expected a slope, found {values[slope]!r}, with which all voxels would be equal")
        return rescale

    by_id = _by_scan(path, table, volume, sources, read, may_be_others=True)
    if not by_id:
        first = _shown(sources, str(table.rows[0].values[volume])) if table.rows else "no row"
        found, one = f"none of {len(table.rows)} ({first} first)", _shown(sources, sources[0].path)
        raise UsageError(f"{path}: expected rows for scans like {one}, found {found}; correct the names")
    return lambda source: by_id.get(source.id, NOT_IN_TABLE)


def _by_scan(
    path: Path,
    table: Table,
    column: str,
    sources: Sequence[Source],
    read: Callable[[Mapping[str, Any], Any], Made],
    *,
    may_be_others: bool = False,
) -> dict[str, Made]:
    """Return {id: what `read` makes of its row} of the sources that a table names in `column`.

    UsageError with all problems of the rows. Those that `may_be_others` are read too, of id None, and left out.
    """
    find, problems, made = by_name((s.id, s.path) for s in sources), list(table.problems), dict[str, Made]()
    for place, values in table.rows:
        try:
            name = str(as_name(values.get(column)) or "").strip()
            match = find(name) if name else Match(None, "empty")
            is_other = may_be_others and name and not match.is_ambiguous
            if match.id is None and not is_other:
                shown = _shown(sources, name)
                reason = match.reason if shown != HIDDEN_NAME else match.reason.partition(" (")[0]
                raise ValueError(f"expected the name of one scan, found {shown}: {reason}")
            if match.id in made:
                raise ValueError(f"expected one row per scan, found a second one for {match.id}")
            found = read(values, match.id)
            if match.id is not None:
                made[match.id] = found
        except ValueError as error:
            problems.append(Problem(place, "row that cannot be followed", str(error)))
    if problems:
        refuse(path, sorted(problems, key=lambda problem: problem.number))
    return made


def _shown(sources: Sequence[Source], name: str) -> str:
    """Return what may be told of a scan's name: nothing where the names of scans are hidden."""
    return HIDDEN_NAME if any(source.hidden for source in sources) else repr(name)


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
