"""CT-RATE: reports, labels of 18 abnormalities and conversations (VQA) on the volumes that ct_rate_tree.py finds."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from photon_data.datasets.base import DataSet, FoundVolumes, OnFile, read_rows
from photon_data.datasets.ct_rate_tree import find_volumes, split_and_patient, volume_id
from photon_data.errors import UsageError
from photon_data.questions.question import Question, with_made_ids

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
        for number, item in enumerate(stream_json_list(path), 1):
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


def stream_json_list(path: Path) -> Iterator[dict[str, Any]]:
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
