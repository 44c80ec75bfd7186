"""One JSON list of objects, read piece by piece: CT-RATE's questions are one list of 1.2 GB.

CT-RATE: reports, labels of 18 abnormalities and VQA on 50,188 chest volumes. Its tree is described in ct_rate_volumes.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from photon_data.datasets.base import Adapter, Collected, OnFile, each_row
from photon_data.datasets.ct_rate_tree import find_volumes, parse_name, volume_id
from photon_data.datasets.declare import DataSet
from photon_data.errors import UsageError
from photon_data.questions.question import Question, with_made_ids
from photon_data.questions.table import Problem, refuse

PIECE = 1 << 20
_BETWEEN = re.compile(r"[\s,]*")


def stream_json_list(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file that is one JSON list; UsageError for another content, or a file that ends early."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from _objects(file, path)
    except OSError as error:
        raise UsageError(f"{path}: a readable file wanted, got: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: UTF-8 wanted; download the file again") from None


def _objects(file: TextIO, path: Path) -> Iterator[dict[str, Any]]:
    decode = json.JSONDecoder().raw_decode
    text = file.read(PIECE).lstrip()
    if not text.startswith("["):
        raise UsageError(f"{path}: one JSON list wanted, got {text[:40]!r}")
    at, count = 1, 1
    while True:
        at = _skip(text, at)
        if text.startswith("]", at):
            return
        try:
            item, at = decode(text, at)
        except json.JSONDecodeError as error:
            more = file.read(max(PIECE, len(text) - at))
            if not more:
                raise UsageError(
                    f"{path}, item {count}: JSON wanted, got: {error.msg}; the file is cut off or damaged, download it again"
                ) from None
            text, at = text[at:] + more, 0
            continue
        if not isinstance(item, dict):
            raise UsageError(f"{path}, item {count}: one JSON object wanted, got {str(item)[:60]!r}")
        yield item
        count += 1


def _skip(text: str, at: int) -> int:
    match = _BETWEEN.match(text, at)
    assert match
    return match.end()


REPORT_COLUMNS = ("ClinicalInformation_EN", "Technique_EN", "Findings_EN", "Impressions_EN")
LABELS = (
    "Medical material",
    "Arterial wall calcification",
    "Cardiomegaly",
    "Pericardial effusion",
    "Coronary artery wall calcification",
    "Hiatal hernia",
    "Lymphadenopathy",
    "Emphysema",
    "Atelectasis",
    "Lung nodule",
    "Lung opacity",
    "Pulmonary fibrotic sequela",
    "Pleural effusion",
    "Mosaic attenuation pattern",
    "Peribronchial thickening",
    "Consolidation",
    "Bronchiectasis",
    "Interlobular septal thickening",
)
# Written out where a report lacks a section.
NOT_GIVEN = "not given."
VQA_TAGS = re.compile(
    r"<(?:image|long_answer|short_answer|multiple_choice|report_generation|free_response|description|conversation)>"
)


def read(entry: DataSet, on_file: OnFile) -> Collected:
    """Return CT-RATE's volumes and the questions of those annotations that the entry names: reports, labels, vqa."""
    volumes = find_volumes(entry, on_file)
    notes = list(volumes.notes)
    files = entry.annotations
    questions: list[Question] | None = None
    if files.keys() & {"reports", "labels", "vqa"}:
        questions = [*_reports(entry, files.get("reports", ()), notes), *_labels(files.get("labels", ()))]
        questions += with_made_ids(list(_vqa(files.get("vqa", ()), notes)))
    return volumes._replace(questions=questions, notes=notes)


def _reports(entry: DataSet, paths: Sequence[Path], notes: list[str]) -> Iterator[Question]:
    """Yield a question per volume whose answer is made of the report's columns; what is "Not given." or empty is no answer."""
    columns = entry.policy.report or ("Findings_EN",)
    unknown = [column for column in columns if column not in REPORT_COLUMNS]
    if unknown:
        raise entry.wrong(f"columns of a report ({', '.join(REPORT_COLUMNS)}) wanted in `report`, got {unknown[0]!r}")
    empty: list[str] = []
    for path, row in each_row(paths, ("VolumeName", *columns)):
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
    for path, row in each_row(paths, ("VolumeName", *LABELS)):
        volume = _volume(path, row.place, row.values["VolumeName"])
        for label in LABELS:
            said = {"0": "No", "1": "Yes", "0.0": "No", "1.0": "Yes"}.get(row.values[label].strip())
            if said is None:
                refuse(path, [Problem(row.place, "no label", f"{volume}: 0 or 1 wanted in {label!r}, got {row.values[label]!r}")])
            extra = {
                "subtask": label,
                "answer_type": "yes-no",
                "choices": ["Yes", "No"],
                "letter": "A" if said == "Yes" else "B",
                "labelled_by": "RadBERT",
            }
            text = f"Does this CT scan show {label[0].lower()}{label[1:]}?"
            yield _question(volume, f"label/{volume}/{label}", text, said, "abnormality", extra)


def _vqa(paths: Sequence[Path], notes: list[str]) -> Iterator[Question]:
    """Yield every turn of the conversations about a volume as a question of its own, in which tags are left out."""
    without = 0
    for path in paths:
        for number, item in enumerate(stream_json_list(path), 1):
            if not item.get("image"):
                without += 1
                continue
            place = f"item {number}"
            volume = _volume(path, place, str(item["image"]))
            for turn, (human, reply) in enumerate(_turns(path, place, item), 1):
                extra = {"subtask": str(human.get("type") or ""), "publisher_id": str(item.get("id", "")), "turn": str(turn)}
                yield _question(volume, "", _untagged(human["value"]), _untagged(reply["value"]), "vqa", extra)
    if without:
        notes.append(f"{without} conversations are about no volume and make no question")


def _turns(path: Path, place: str, item: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    turns = item.get("conversations") or []
    if not turns or [turn.get("from") for turn in turns] != ["human", "gpt"] * (len(turns) // 2):
        got = json.dumps([turn.get("from") for turn in turns])
        refuse(path, [Problem(place, "no conversation", f"human and gpt in turns wanted, got {got}")])
    return list(zip(turns[::2], turns[1::2], strict=True))


def _untagged(text: str) -> str:
    return VQA_TAGS.sub("", text).strip()


def _volume(path: Path, place: str, name: str) -> str:
    """Return the id of a volume from its name or path; refuse a text that is no name of CT-RATE."""
    volume = volume_id(name)
    if not volume:
        refuse(path, [Problem(place, "no volume", f"a volume like train_1_a_1.nii.gz wanted, got {name!r}")])
    return volume


def _question(volume: str, identity: str, text: str, answer: str, task: str, extra: dict[str, Any]) -> Question:
    name = parse_name(volume)
    assert name
    return Question(identity, volume, text, answer, name.split, name.patient, task, extra=extra)


ADAPTER = Adapter(read, ("metadata", "no_chest", "reports", "labels", "vqa"), ("version",), "ct-rate")
