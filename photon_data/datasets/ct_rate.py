"""CT-RATE: reports, labels of 18 abnormalities and conversations (VQA) on its volumes, which lie in a tree.

The tree has two incompatible versions, which the path tells apart (see docs/datasets.md):

v1  dataset/train, dataset/valid: headers are blank and values raw; spacing, slope and intercept are in the metadata
v2  dataset/train_fixed, dataset/valid_fixed: headers are right and values are HU; the metadata must not be applied

The array of v1 is taken to lie as that of v2 does (x to the left, y to the back, z up). Nothing in the file could
confirm this, so v2 is used if both exist.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from photon_data.datasets.base import DataSet, FoundVolumes, OnFile, SourceVolume, read_rows
from photon_data.errors import UsageError, first_few
from photon_data.questions.question import Question, with_made_ids
from photon_data.questions.table import Problem, read_text, refuse
from photon_data.readers.find import find_scans
from photon_data.scan import Rescale, Source, TableGrid
from photon_data.volume import Geometry

REPORT_COLUMNS = ("ClinicalInformation_EN", "Technique_EN", "Findings_EN", "Impressions_EN")
_LABELS = """Medical material, Arterial wall calcification, Cardiomegaly, Pericardial effusion,
    Coronary artery wall calcification, Hiatal hernia, Lymphadenopathy, Emphysema, Atelectasis, Lung nodule,
    Lung opacity, Pulmonary fibrotic sequela, Pleural effusion, Mosaic attenuation pattern, Peribronchial thickening,
    Consolidation, Bronchiectasis, Interlobular septal thickening"""
LABELS = tuple(re.split(r",\s+", _LABELS))
YES_NO = {"0": "No", "1": "Yes", "0.0": "No", "1.0": "Yes"}
# Stands in a report where a section is missing.
NOT_GIVEN = "not given."
VQA_TAGS = re.compile(
    r"<(?:image|long_answer|short_answer|multiple_choice|report_generation|free_response|description|conversation)>"
)
PIECE = 1 << 20
BETWEEN = re.compile(r"[\s,]*")


def read(entry: DataSet, on_file: OnFile) -> tuple[FoundVolumes, list[Question] | None]:
    """Return CT-RATE's volumes and the questions of those annotations that the entry names: reports, labels, vqa."""
    found = find_volumes(entry, on_file)
    files = entry.annotations
    if not files.keys() & {"reports", "labels", "vqa"}:
        return found, None
    notes = list(found.notes)
    questions = [*_reports(entry, files.get("reports", ()), notes), *_labels(files.get("labels", ()))]
    questions += with_made_ids(list(_vqa(files.get("vqa", ()), notes)))
    return found._replace(notes=notes), questions


def _reports(entry: DataSet, paths: Sequence[Path], notes: list[str]) -> Iterator[Question]:
    """Yield a question per volume with the report's columns as its answer; "Not given." is no answer."""
    columns = entry.wording.report or ("Findings_EN",)
    if unknown := [column for column in columns if column not in REPORT_COLUMNS]:
        raise entry.error(f"expected some of {', '.join(REPORT_COLUMNS)} in `report`, found {unknown[0]!r}")
    empty: list[str] = []
    for path, row in read_rows(paths, ("VolumeName", *columns)):
        volume = _volume(path, row.place, row.values["VolumeName"])
        texts = [row.values[column].strip() for column in columns]
        answer = "\n".join(text for text in texts if text and text.casefold() != NOT_GIVEN)
        if answer:
            yield _question(volume, f"report/{volume}", "", answer, "report", {"subtask": "+".join(columns)})
        else:
            empty.append(volume)
    if empty:
        notes.append(f"{len(empty)} reports are empty or 'Not given.' and make no question, {empty[0]} first")


def _labels(paths: Sequence[Path]) -> Iterator[Question]:
    """Yield 18 questions per volume. The labels are predictions of a text classifier on the reports, not a person's."""
    for path, row in read_rows(paths, ("VolumeName", *LABELS)):
        volume = _volume(path, row.place, row.values["VolumeName"])
        for label in LABELS:
            answer = YES_NO.get(row.values[label].strip())
            if answer is None:
                found = f"expected 0 or 1 in {label!r}, found {row.values[label]!r}"
                raise UsageError(f"{path}, {row.place}: {volume}: {found}")
            extra = {"subtask": label, "answer_type": "yes-no", "choices": ["Yes", "No"]}
            extra |= {"letter": "A" if answer == "Yes" else "B", "labelled_by": "RadBERT"}
            text = f"Does this CT scan show {label[0].lower()}{label[1:]}?"
            yield _question(volume, f"label/{volume}/{label}", text, answer, "abnormality", extra)


def _vqa(paths: Sequence[Path], notes: list[str]) -> Iterator[Question]:
    """Yield every turn of the conversations about a volume as a question of its own, without tags and ids."""
    without = 0
    for path in paths:
        for number, item in enumerate(_stream_json_list(path), 1):
            if not item.get("image"):
                without += 1
                continue
            volume = _volume(path, f"item {number}", str(item["image"]))
            turns = item.get("conversations") or []
            speakers = [turn.get("from") for turn in turns]
            if not turns or speakers != ["human", "gpt"] * (len(turns) // 2):
                raise UsageError(f"{path}, item {number}: expected human and gpt in turns, found {speakers}")
            for turn, (human, reply) in enumerate(zip(turns[::2], turns[1::2], strict=True), 1):
                question, answer = (VQA_TAGS.sub("", said["value"]).strip() for said in (human, reply))
                extra = {"subtask": human.get("type") or "", "publisher_id": item.get("id", ""), "turn": turn}
                extra = {name: str(value) for name, value in extra.items()}
                yield _question(volume, "", question, answer, "vqa", extra)
    if without:
        notes.append(f"{without} conversations are about no volume and make no question")


def _volume(path: Path, place: str, name: str) -> str:
    if volume := volume_id(name):
        return volume
    raise UsageError(f"{path}, {place}: expected a volume like train_1_a_1.nii.gz, found {name!r}")


def _question(volume: str, id_: str, text: str, answer: str, task: str, extra: dict[str, Any]) -> Question:
    split, patient = split_and_patient(volume)
    return Question(id_, volume, text, answer, split, patient, task, extra=extra)


def _stream_json_list(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of one JSON list, read in pieces, since CT-RATE's has 1.2 GB; UsageError for anything else."""
    decode, count = json.JSONDecoder().raw_decode, 1
    try:
        with path.open(encoding="utf-8-sig") as file:
            text, at = file.read(PIECE).lstrip(), 1
            if not text.startswith("["):
                raise UsageError(f"{path}: expected one JSON list, found {text[:40]!r}")
            while True:
                between = BETWEEN.match(text, at)
                assert between
                at = between.end()
                if text.startswith("]", at):
                    return
                try:
                    item, at = decode(text, at)
                except json.JSONDecodeError as error:
                    if not (more := file.read(max(PIECE, len(text) - at))):
                        problem = f"{error.msg}; the file is cut off or damaged, download it again"
                        raise UsageError(f"{path}, item {count}: expected JSON, found: {problem}") from None
                    text, at = text[at:] + more, 0
                    continue
                if not isinstance(item, dict):
                    raise UsageError(f"{path}, item {count}: expected one JSON object, found {str(item)[:60]!r}")
                yield item
                count += 1
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: expected a readable file in UTF-8, found: {error}; download it again") from None


# --- the tree of volumes

VOLUME = re.compile(r"(?:train|valid)_[1-9]\d*_[a-z]+_[1-9]\d*")
SUFFIX = ".nii.gz"
V1, V2 = "v1", "v2"
# Of the metadata tables.
_COLUMNS = """VolumeName ConvolutionKernel PatientPosition ImagePositionPatient ImageOrientationPatient Rows
    Columns XYSpacing ZSpacing NumberofSlices RescaleSlope RescaleIntercept"""
COLUMNS = tuple(_COLUMNS.split())
# Philips' reconstruction kernels have no number: these are for soft tissue, and for edges (lung, bone, Y = enhanced).
SOFT = ("A", "B", "SA", "SB", "UA", "UB")
SHARP = ("C", "D", "E", "EA", "EB", "L", "LungB", "YA", "YB", "YC", "YD")


class Metadata(NamedTuple):
    """A row of a metadata table."""

    geometry: Geometry  # z of slice 0 is set to 0: the table gives the position of one slice, not which one
    upright: bool  # axial slices of a patient who lies head first: rows run to the back, columns to the left, slices up
    slope: float
    intercept: float
    kernel: str


def volume_id(text: str) -> str | None:
    """Return the id in a name or path, train_1/train_1_a/train_1_a_1.nii.gz -> train_1_a_1; None if there is none."""
    name = text.strip().rpartition("/")[2].removesuffix(SUFFIX)
    return name if VOLUME.fullmatch(name) else None


def split_and_patient(volume: str) -> tuple[str, str]:
    """Return what a volume id tells, train_17051_a_2 -> train, train_17051."""
    split, number, _, _ = volume.split("_")
    return split, f"{split}_{number}"


def find_volumes(entry: DataSet, on_file: OnFile) -> FoundVolumes:
    """Return the volumes below the roots of an entry, each once, with their metadata; UsageError."""
    notes: list[str] = []
    by_version = _by_version(entry, on_file, notes)
    if both := by_version[V1].keys() & by_version[V2].keys():
        notes.append(f"{len(both)} volumes are there as v1 and as v2, {min(both)} first; v2 is taken")
    sources = {**by_version[V1], **by_version[V2]}
    metadata = read_metadata(entry.annotations.get("metadata", ()), sources)
    volumes = []
    for name, source in sorted(sources.items()):
        row = metadata.get(name)
        if name in by_version[V2]:
            grid = TableGrid(row.geometry, replaces_header=False) if row else None
            volumes.append(SourceVolume(entry, source, table_grid=grid))
        elif row and row.upright:
            rescale = Rescale(row.slope, row.intercept, "metadata")
            volumes.append(SourceVolume(entry, source, rescale, TableGrid(row.geometry, replaces_header=True)))
        else:
            refused = replace(source, problem=NOT_UPRIGHT if row else NO_METADATA, code="ct-rate-v1")
            volumes.append(SourceVolume(entry, source if source.problem else refused))
    left_out = _no_chest(entry.annotations.get("no_chest", ()))
    left_out |= _other_reconstructions(entry, [name for name in sorted(sources) if name not in left_out], metadata)
    return FoundVolumes(volumes, left_out, notes)


# Why volumes of v1 cannot become stores.
NO_METADATA = (
    "expected a row in CT-RATE's metadata, since the headers of v1 are blank, found none; give the tables as "
    "`annotations: {metadata: [...]}`, or use v2 (train_fixed, valid_fixed)"
)
NOT_UPRIGHT = (
    "expected axial slices of a patient who lies head first, found another position or orientation in the metadata, "
    "which do not tell the order of the slices; use this volume's v2 (train_fixed, valid_fixed)"
)


def _by_version(entry: DataSet, on_file: OnFile, notes: list[str]) -> dict[str, dict[str, Source]]:
    """Return {version: {id: source}}; UsageError for a volume that is there twice, or a path without a version."""
    found: dict[str, dict[str, Source]] = {V1: {}, V2: {}}
    unnamed, unclear = [], []
    for root in entry.roots:
        for source in find_scans(root, on_file=on_file).sources:
            volume = volume_id(source.path)
            version = entry.options.get("version") or _version(root, source.path)
            if not volume:
                unnamed.append(source.path)
            elif version not in found:
                unclear.append(source.path)
            elif (other := found[version].setdefault(volume, replace(source, id=volume))).files != source.files:
                both = f"{other.files[0]} and {source.files[0]}"
                raise entry.error(f"expected every volume once, found {both}; narrow `root`")
    if unclear:
        raise entry.error(
            "expected train or valid (v1), or train_fixed or valid_fixed (v2), in every path, found none or both in "
            f"{len(unclear)}, {unclear[0]} first; keep the published folders, or set the option `version: v1` or `v2`"
        )
    if unnamed:
        notes.append(f"{len(unnamed)} scans without a name of CT-RATE are left alone, {unnamed[0]} first")
    return found


def _version(root: Path, path: str) -> str | None:
    parts = {root.name, *Path(path).parts[:-1]}
    is_v1, is_v2 = bool(parts & {"train", "valid"}), bool(parts & {"train_fixed", "valid_fixed"})
    return None if is_v1 == is_v2 else V1 if is_v1 else V2


def _no_chest(paths: Sequence[Path]) -> dict[str, str]:
    """Return {volume: reason} of lists whose lines are names or paths, with or without the suffix."""
    listed = {}
    for path in paths:
        for number, line in enumerate(read_text(path, (".txt",)).splitlines(), 1):
            if name := volume_id(line):
                listed[name] = "no chest CT (no_chest list)"
            elif line.strip():
                raise UsageError(f"{path}, line {number}: expected a name like train_1_a_1, found {line.strip()!r}")
    return listed


def _other_reconstructions(entry: DataSet, volumes: Sequence[str], metadata: Mapping[str, Metadata]) -> dict[str, str]:
    """Return {volume: reason} of the reconstructions of each scan but the one that the entry asks for."""
    scans: dict[str, list[str]] = defaultdict(list)
    for volume in sorted(volumes, key=lambda volume: int(volume.rpartition("_")[2])):
        scans[volume.rpartition("_")[0]].append(volume)
    several = [names for names in scans.values() if len(names) > 1 and entry.volumes != "all"]
    rank = _ranking(entry, [volume for names in several for volume in names], metadata)
    chosen = {min(names, key=rank) for names in several}  # the first of equal ones
    reason = f"another reconstruction than the {entry.volumes}"
    return {volume: reason for names in several for volume in names if volume not in chosen}


def _ranking(entry: DataSet, volumes: Sequence[str], metadata: Mapping[str, Metadata]) -> Callable[[str], float]:
    """Return a function that is smallest for the best reconstruction; UsageError if the metadata do not tell."""
    if entry.volumes in ("all", "first"):
        return lambda volume: 0
    if unknown := [volume for volume in volumes if volume not in metadata]:
        few = first_few(unknown)
        raise entry.error(f"expected metadata for `volumes: {entry.volumes}`, found none for {len(unknown)} ({few})")
    if entry.volumes == "thinnest":
        return lambda volume: metadata[volume].geometry.spacing_zyx_mm[0]
    sharp = {volume: sharpness(metadata[volume].kernel) for volume in volumes}
    if strange := Counter(metadata[volume].kernel for volume, value in sharp.items() if value is None):
        kernels = ", ".join(f"{kernel!r} ({count})" for kernel, count in strange.most_common(10))
        raise entry.error(f"expected kernels of known sharpness, found {kernels}; use `first`, `thinnest` or `all`")
    return lambda volume: -(sharp[volume] or 0)


def sharpness(kernel: str) -> float | None:
    """Return a number that is larger for sharper kernels; None for an unknown kernel.

    "['Br40f', '3']" -> 40 (Siemens' numbers grow), "B" -> 0 and "YA" -> 100 (Philips; no finer order is known)
    """
    name = kernel.strip("[]").split(",")[0].strip("' ")
    if numbered := re.fullmatch(r"[A-Z][a-z]?(\d\d)[a-z]?", name):
        return float(numbered[1])
    return 0.0 if name in SOFT else 100.0 if name in SHARP else None


def read_metadata(paths: Iterable[Path], volumes: Container[str]) -> dict[str, Metadata]:
    """Return {id: Metadata} of those of `volumes` that the tables name; UsageError for unusable or differing rows."""
    found: dict[str, Metadata] = {}
    for path in paths:
        problems = []
        for _, row in read_rows([path], COLUMNS):
            name = row.values["VolumeName"].removesuffix(SUFFIX)
            if name not in volumes:
                continue
            try:
                metadata = _metadata(row.values)
                if found.setdefault(name, metadata) != metadata:
                    raise ValueError("another row that differs")
            except (ValueError, OverflowError) as error:
                text = f"{name}: expected one row with numbers for spacing, size, slope and intercept, found {error}"
                problems.append(Problem(row.place, "unusable row", text))
        if problems:
            refuse(path, problems)
    return found


def _metadata(values: Mapping[str, str]) -> Metadata:
    row_mm, column_mm = _numbers(values["XYSpacing"], 2)
    x, y, _ = _numbers(values["ImagePositionPatient"], 3)
    slice_mm, slope, intercept = (float(values[name]) for name in ("ZSpacing", "RescaleSlope", "RescaleIntercept"))
    if not (0 < slice_mm < math.inf and 0 < abs(slope) < math.inf and math.isfinite(intercept)):
        raise ValueError(f"ZSpacing {slice_mm}, slope {slope}, intercept {intercept}")
    slices, rows, columns = (int(float(values[name])) for name in ("NumberofSlices", "Rows", "Columns"))
    steps = ((0, 0, slice_mm), (0, row_mm, 0), (column_mm, 0, 0))
    geometry = Geometry.from_arrays((slices, rows, columns), (x, y, 0), steps)
    axial = _numbers(values["ImageOrientationPatient"], 6) == [1, 0, 0, 0, 1, 0]
    upright = axial and values["PatientPosition"] == "HFS"
    return Metadata(geometry, upright, slope, intercept, values["ConvolutionKernel"])


def _numbers(text: str, count: int) -> list[float]:
    """Return the numbers of a list that is written as text, "[0.34, 0.34]"."""
    numbers = [float(number) for number in text.strip("[]").split(",")]
    if len(numbers) != count:
        raise ValueError(f"{text!r} where a list of {count} numbers belongs")
    return numbers
