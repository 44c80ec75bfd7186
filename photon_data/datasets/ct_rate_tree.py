"""CT-RATE's metadata tables (train_metadata.csv, validation_metadata.csv) -> what they say of each volume.

CT-RATE's tree of volumes: which there are, in which of the two incompatible versions, and which of a scan are wanted.

v1  dataset/train, dataset/valid: headers are blank and values raw; spacing, slope and intercept stand in the metadata tables
v2  dataset/train_fixed, dataset/valid_fixed: headers are right and values are HU; the tables must not be applied again

The path says which one a file is, and preparing refuses it where header or intensities say otherwise. The array of v1 lies as
that of v2 does (x to the left, y to the back, z up); nothing in the file could confirm it, so v2 is taken where both are there.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from photon_data.datasets.base import Collected, OnFile, table_with
from photon_data.datasets.declare import DataSet
from photon_data.errors import UsageError
from photon_data.prepare import Rescale
from photon_data.questions.table import Problem, read_text, refuse
from photon_data.readers.find import find_scans
from photon_data.scan import Source, TableGrid
from photon_data.volume import Geometry

COLUMNS = (
    "VolumeName",
    "ConvolutionKernel",
    "PatientPosition",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "Rows",
    "Columns",
    "XYSpacing",
    "ZSpacing",
    "NumberofSlices",
    "RescaleSlope",
    "RescaleIntercept",
)

# Kernels without a number, of Philips: those for soft tissue, and those for edges (lung, bone, Y = enhanced).
SOFT = ("A", "B", "SA", "SB", "UA", "UB")
SHARP = ("C", "D", "E", "EA", "EB", "L", "LungB", "YA", "YB", "YC", "YD")


class Metadata(NamedTuple):
    """A row: `upright` tells that slices are axial, head first, so that rows run to the back, columns to the left, slices up."""

    geometry: Geometry
    upright: bool
    slope: float
    intercept: float
    kernel: str


def read_metadata(paths: Iterable[Path], volumes: Container[str]) -> dict[str, Metadata]:
    """Return {volume id: Metadata} for those of `volumes` that are named.

    UsageError with all rows of theirs whose numbers cannot be read, and for a volume named twice in different ways.
    """
    found: dict[str, Metadata] = {}
    for path in paths:
        problems = []
        for row in table_with(path, COLUMNS).rows:
            name = row.values["VolumeName"].removesuffix(".nii.gz")
            if name not in volumes:
                continue
            try:
                metadata = _metadata(row.values)
            except (ValueError, TypeError) as error:
                text = f"{name}: spacing, size, slope and intercept as numbers wanted, got: {error}"
                problems.append(Problem(row.place, "unreadable number", text))
                continue
            if found.setdefault(name, metadata) != metadata:
                problems.append(Problem(row.place, "volume named twice", f"{name}: one row wanted, got another one that differs"))
        if problems:
            refuse(path, problems)
    return found


def sharpness(kernel: str) -> float | None:
    """Return a number that is larger for sharper kernels; None for a kernel that is not known.

    "['Br40f', '3']" -> 40 (Siemens counts up), "B" -> 0 and "YA" -> 100 (Philips; soft and sharp, no finer order is known)
    """
    name = kernel.strip("[]").split(",")[0].strip("' ")
    numbered = re.fullmatch(r"[A-Z][a-z]?(\d\d)[a-z]?", name)
    if numbered:
        return float(numbered[1])
    return 0.0 if name in SOFT else 100.0 if name in SHARP else None


def _metadata(values: Mapping[str, str]) -> Metadata:
    """Return what a row says. The z of slice 0 is set to 0: the table gives one slice's position and not which slice it is."""
    row_mm, column_mm = _numbers(values["XYSpacing"], 2)
    x, y, _ = _numbers(values["ImagePositionPatient"], 3)
    slice_mm, slope, intercept = (_positive(values["ZSpacing"]), float(values["RescaleSlope"]), float(values["RescaleIntercept"]))
    if not (math.isfinite(slope) and math.isfinite(intercept) and slope):
        raise ValueError(f"slope {slope}, intercept {intercept}")
    shape = (int(float(values["NumberofSlices"])), int(float(values["Rows"])), int(float(values["Columns"])))
    axial = _numbers(values["ImageOrientationPatient"], 6) == [1, 0, 0, 0, 1, 0]
    geometry = Geometry.from_arrays(shape, (x, y, 0), ((0, 0, slice_mm), (0, row_mm, 0), (column_mm, 0, 0)))
    return Metadata(geometry, axial and values["PatientPosition"] == "HFS", slope, intercept, values["ConvolutionKernel"])


def _numbers(text: str, count: int) -> list[float]:
    """Return the numbers of "[0.34, 0.34]", a list written as text."""
    try:
        numbers = [float(number) for number in json.loads(text)]
    except (json.JSONDecodeError, TypeError):
        raise ValueError(f"{text!r}, where a list like [1, 2] is wanted") from None
    if len(numbers) != count:
        raise ValueError(f"{text!r}, where {count} numbers are wanted")
    return numbers


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise ValueError(f"{text!r}, where a length in mm is wanted")
    return number


VOLUME = re.compile(r"(train|valid)_([1-9]\d*)_[a-z]+_[1-9]\d*")
SUFFIX = ".nii.gz"
V1, V2 = "v1", "v2"


class Name(NamedTuple):
    """What a volume's name tells: train_17051_a_2 -> train, train_17051."""

    split: str
    patient: str


@lru_cache(100_000)
def parse_name(volume: str) -> Name | None:
    """Return what a volume id tells, None for a text that is none."""
    match = VOLUME.fullmatch(volume)
    return Name(match[1], f"{match[1]}_{match[2]}") if match else None


def volume_id(place: str) -> str | None:
    """Return the id in a name or path, train_1/train_1_a/train_1_a_1.nii.gz -> train_1_a_1; None in a text without one."""
    name = place.strip().rpartition("/")[2].removesuffix(SUFFIX)
    return name if VOLUME.fullmatch(name) else None


def find_volumes(entry: DataSet, on_file: OnFile) -> Collected:
    """Return the volumes below the roots of an entry, each once, with what the metadata say of them, no questions; UsageError."""
    notes: list[str] = []
    by_version = _by_version(entry, on_file, notes)
    both = by_version[V1].keys() & by_version[V2].keys()
    if both:
        notes.append(f"{len(both)} volumes are there as v1 and as v2, {min(both)} first; v2 is taken")
    found = {**by_version[V1], **by_version[V2]}
    metadata = read_metadata(entry.annotations.get("metadata", ()), found)
    rescale, stated, sources = {}, {}, []
    for volume, source in sorted(found.items()):
        said = metadata.get(volume)
        is_v1 = volume not in by_version[V2]
        problem = _problem(said) if is_v1 else None
        sources.append(replace(source, problem=problem, code="ct-rate-v1") if problem and not source.problem else source)
        if said and not problem:
            stated[volume] = TableGrid(said.geometry, replaces_header=is_v1)
            if is_v1:
                rescale[volume] = Rescale(said.slope, said.intercept, "metadata")
    left_out = _no_chest(entry.annotations.get("no_chest", ()))
    chest = [source.id for source in sources if source.id not in left_out]
    left_out |= _other_reconstructions(entry, chest, metadata)
    return Collected(sources, None, rescale, stated, left_out, notes)


def _by_version(entry: DataSet, on_file: OnFile, notes: list[str]) -> dict[str, dict[str, Source]]:
    """Return {version: {id: source}}; UsageError for a volume that is there twice, and where no path tells the version."""
    found: dict[str, dict[str, Source]] = {V1: {}, V2: {}}
    unnamed, unclear = [], []
    for root in entry.roots:
        for source in find_scans(root, on_file=on_file).sources:
            volume = volume_id(source.path)
            if not volume:
                unnamed.append(source.path)
                continue
            version = entry.options.get("version") or _version(root, source.path)
            if version not in found:
                unclear.append(source.path)
                continue
            other = found[version].setdefault(volume, replace(source, id=volume))
            if other.files != source.files:
                raise entry.wrong(
                    f"every volume once wanted, got {other.files[0]} and {source.files[0]}; narrow `root` to one of them"
                )
    if unclear:
        raise entry.wrong(
            f"train, valid (v1), train_fixed or valid_fixed (v2) in the path of every volume wanted, not found in that of "
            f"{len(unclear)}, {unclear[0]} first; keep the publisher's folders, or say `version: v1` or `v2` under `options`"
        )
    if unnamed:
        notes.append(f"{len(unnamed)} scans without a name of CT-RATE are left alone, {unnamed[0]} first")
    return found


def _version(root: Path, path: str) -> str | None:
    parts = {root.name, *Path(path).parts[:-1]}
    if parts & {"train_fixed", "valid_fixed"}:
        return None if parts & {"train", "valid"} else V2
    return V1 if parts & {"train", "valid"} else None


def _problem(said: Metadata | None) -> str | None:
    """Return why a volume of v1 cannot become a store, None if it can."""
    if said is None:
        return (
            "a row in CT-RATE's metadata wanted, since the headers of v1 are blank, found none; give the tables as "
            "`annotations: {metadata: [...]}`, or use v2 (train_fixed, valid_fixed)"
        )
    if not said.upright:
        return (
            "axial slices of a patient who lies head first wanted, found another position or orientation in the metadata, which "
            "does not tell the order of the slices; use this volume's v2 (train_fixed, valid_fixed)"
        )
    return None


def _no_chest(paths: Sequence[Path]) -> dict[str, str]:
    """Return the volumes of no_chest lists, whose lines are names or paths, with or without the suffix."""
    listed = {}
    for path in paths:
        for number, line in enumerate(read_text(path, (".txt",)).splitlines(), 1):
            name = volume_id(line)
            if name:
                listed[name] = "no chest CT (no_chest list)"
            elif line.strip():
                raise UsageError(f"{path}, line {number}: the name of a volume (train_1_a_1) wanted, got {line.strip()!r}")
    return listed


def _other_reconstructions(entry: DataSet, volumes: Sequence[str], metadata: Mapping[str, Metadata]) -> dict[str, str]:
    """Return all volumes of scans with several reconstructions but the one of each scan that the entry wants."""
    if entry.volumes == "all":
        return {}
    scans: dict[str, list[str]] = defaultdict(list)
    for volume in volumes:
        scans[volume.rpartition("_")[0]].append(volume)
    several = {scan: sorted(names, key=_reconstruction) for scan, names in scans.items() if len(names) > 1}
    worth = _worth(entry, [volume for names in several.values() for volume in names], metadata)
    others = {}
    for names in several.values():
        best = min(names, key=worth)  # of equals the first
        others.update({volume: f"another reconstruction than the {entry.volumes}" for volume in names if volume != best})
    return others


def _worth(entry: DataSet, volumes: Sequence[str], metadata: Mapping[str, Metadata]) -> Callable[[str], float]:
    """Return what is smallest for the reconstruction that is wanted; UsageError where the metadata do not tell."""
    if entry.volumes == "first":
        return _reconstruction
    unknown = [volume for volume in volumes if volume not in metadata]
    if unknown:
        raise entry.wrong(
            f"`volumes: {entry.volumes}` needs metadata of every reconstruction, missing for {len(unknown)}, {unknown[0]} first"
        )
    if entry.volumes == "thinnest":
        return lambda volume: metadata[volume].geometry.spacing_zyx_mm[0]
    sharp = {volume: sharpness(metadata[volume].kernel) for volume in volumes}
    strange = Counter(metadata[volume].kernel for volume, value in sharp.items() if value is None)
    if strange:
        kernels = ", ".join(f"{kernel!r} ({count})" for kernel, count in strange.most_common(10))
        raise entry.wrong(f"kernels of known sharpness wanted, got {kernels}; say `volumes: first`, `thinnest` or `all`")
    return lambda volume: -(sharp[volume] or 0)


def _reconstruction(volume: str) -> float:
    return int(volume.rpartition("_")[2])
