"""Questions and prepared volumes -> ms-swift rows, one list per split, and the manifests that hold them.

docs/manifests.md describes the rows.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from photon_data.errors import UsageError
from photon_data.files import Location, jsonl_bytes
from photon_data.questions.join import by_name
from photon_data.questions.manifest import FOLDER, SUFFIX, VIDEO_TAG, is_manifest, manifest_names, validate
from photon_data.questions.question import Question
from photon_data.questions.splits import ALL, check_split_names
from photon_data.questions.table import refuse
from photon_data.records import VolumeRecord

# Keys of Question.extra that are columns of a row; the other keys share the column "extra".
EXTRA_COLUMNS = ("kind", "organ", "choices")


class Unmatched(NamedTuple):
    """A question without a row: its id, the volume that it names, and the reason."""

    id: str
    volume: str
    reason: str


class Manifests(NamedTuple):
    """What `build` returns.

    rows                {split: rows}, sorted by volume id, then question id; every split has rows
    unmatched           the questions without a row, by question id
    without_questions   ids of prepared volumes that no question is about, sorted
    """

    rows: dict[str, list[dict[str, Any]]]
    unmatched: list[Unmatched]
    without_questions: list[str]


def build(
    questions: Sequence[Question] | None,
    records: Iterable[VolumeRecord],
    *,
    out: Path | str,
    instruction: str,
    dataset: str | None = None,
) -> Manifests:
    """Return the rows of every split, and the questions that have none.

    Every question has a row or is unmatched. Without questions every prepared volume gets one row of split "all": the
    instruction, no answer. Rows do not depend on the order of questions or records.

    `out` is the folder or URL that holds the stores of `records`. `dataset` is the first half of "channel" for
    questions that do not name their data set (default: the name of `out`). UsageError for questions without a split
    (`splits.assign_splits` gives them one) or with a split that cannot name a file.
    """
    records = sorted(records, key=lambda record: record.id)
    prepared = [record for record in records if record.is_there]
    if questions is None:
        questions = [Question(record.id, record.id, instruction, split=ALL) for record in prepared]
    without_split = [question.id for question in questions if not question.split]
    if without_split:
        raise UsageError(
            f"expected a split for every question, found {len(without_split)} without, {without_split[0]!r} first; "
            "assign splits first"
        )
    check_split_names({str(question.split) for question in questions})
    matched, unmatched = _match(questions, records)
    place = Location(str(out))
    videos = {record.id: place.at(str(record.store)) for record in prepared}
    dataset = dataset or place.at("").rstrip("/").rpartition("/")[2]
    extra_names = sorted({name for question, _ in matched for name in question.extra} - set(EXTRA_COLUMNS))
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for question, volume_id in matched:
        row = _row(question, volume_id, videos[volume_id], question.dataset or dataset, extra_names)
        rows[row["split"]].append(row)
    with_questions = {volume_id for _, volume_id in matched}
    return Manifests(dict(sorted(rows.items())), unmatched, [name for name in videos if name not in with_questions])


def _match(
    questions: Sequence[Question], records: Sequence[VolumeRecord]
) -> tuple[list[tuple[Question, str]], list[Unmatched]]:
    """Return (question, volume id) by volume id, then question id; and the questions without a prepared volume."""
    find = by_name((record.id, record.source) for record in records)
    not_prepared = {record.id: f"{record.state}: {record.reason}" for record in records if not record.is_there}
    matched, unmatched = [], []
    for question in questions:
        match = find(question.volume)
        if match.id and match.id not in not_prepared:
            matched.append((question, match.id))
        else:
            reason = match.reason or not_prepared[str(match.id)]
            unmatched.append(Unmatched(question.id, question.volume, reason))
    return sorted(matched, key=lambda pair: (pair[1], pair[0].id)), sorted(unmatched)


def _row(question: Question, volume_id: str, video: str, dataset: str, extra_names: Sequence[str]) -> dict[str, Any]:
    """Return one row. All questions of a table have the same columns with the same types; what is missing is empty."""
    messages = [{"role": "user", "content": VIDEO_TAG + question.question}]
    if question.answer:
        messages.append({"role": "assistant", "content": question.answer})
    row: dict[str, Any] = {
        "id": question.id,
        "messages": messages,
        "videos": [video],
        "channel": f"{dataset}/{question.task}" if question.task else dataset,
        "volume_id": volume_id,
        "patient": question.patient or "",
        "split": question.split,
        "task": question.task or "",
        "kind": _as_text(question.extra.get("kind")),
        "organ": _as_text(question.extra.get("organ")),
        "choices": list(question.extra.get("choices", [])),
        "answer": question.answer or "",
    }
    if extra_names:
        # Not columns of their own: ms-swift obeys columns of some names, such as system, image and label.
        row["extra"] = {name: _as_text(question.extra.get(name)) for name in extra_names}
    return row


def _as_text(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def write(manifests: Manifests, out: Path | str) -> list[str]:
    """Write manifests/<split>.jsonl below the folder or URL `out`; return the names of the old manifests it removed.

    Each manifest is whole or not there. Manifests of splits without rows are removed after the others are in place, so
    that no run trains on old rows; other files in manifests/ stay. UsageError, and nothing is written, for rows that
    `manifest.validate` has a problem with.
    """
    place = Location(str(out))
    named = {f"{FOLDER}/{split}{SUFFIX}": rows for split, rows in manifests.rows.items()}
    for name, rows in named.items():
        problems = validate(rows, root=place.url, check_stores=False)
        if problems:
            refuse(name, problems)
    for name, rows in named.items():
        place.write(name, jsonl_bytes(rows))
    old = [name for name in manifest_names(place) if name not in named and is_manifest(place.read(name) or b"")]
    for name in old:
        place.remove(name)
    return old
