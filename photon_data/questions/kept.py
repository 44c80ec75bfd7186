"""OUT/questions: the questions of every data set in a prepared folder. Manifests are made from all of them."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

from photon_data.errors import UsageError, first_few
from photon_data.files import Location, digest_of, is_safe, refuse_unsafe
from photon_data.json_text import fields_of, from_json
from photon_data.questions.manifest import EXTRA_COLUMNS, NO_CHOICES, digests, manifest_names
from photon_data.questions.question import UNKNOWN, Question
from photon_data.questions.splits import ALL, leaks_of, refuse_leaks
from photon_data.questions.table import VIDEO_TAG
from photon_data.records import DATASET, DATASET_DIGEST, Rows, Work, read_again

FOLDER, SUFFIX = "questions", ".jsonl"


def file_of(name: str) -> str:
    """Return the name below OUT of the file of a data set's questions; UsageError for a name that is none of a file."""
    return f"{FOLDER}/{refuse_unsafe(name + SUFFIX, 'the name of a data set or table')}"


def keep_questions(out: Location, name: str, questions: Iterable[Question]) -> None:
    """Write the questions of a data set, whole."""
    rows = ({column: getattr(question, column) for column in Question.__slots__} for question in questions)
    out.write_rows(file_of(name), rows)


def kept_questions(out: Location, anew: Container[str] = ()) -> dict[str, list[Question]]:
    """Return the questions that `out` holds, by data set; UsageError for a file that cannot be read or has changed.

    dataset.json says what was written, while it is sound and the run before has ended. Those `anew` are not compared:
    they are written again. A folder of an earlier version has no such files: its manifests have the questions.
    """
    found, recorded = {}, _recorded(out)
    for name in _names(out):
        file = file_of(name)
        try:
            if name not in anew and file in recorded and recorded[file] != out.sha256(file):
                raise ValueError(f"it differs from what {DATASET} records")
            found[name] = [Question(**fields_of(Question, row)) for row in out.rows(file)]
        except ValueError as error:
            remedy = "bring it back, or remove it and prepare its data set again"
            raise UsageError(f"{out.at(file)} is damaged: {error}; {remedy}") from None
    return found or _questions_of_manifests(out)


def _recorded(out: Location) -> dict[str, Any]:
    """Return {name: SHA-256} of what the last run wrote; {} where nothing sound says so, or a run has not ended."""
    try:
        dataset = from_json(out.read(DATASET) or b"")
        return dict(dataset["manifests"]) if dataset[DATASET_DIGEST] == digest_of(dataset, DATASET_DIGEST) else {}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def collect(
    own: Mapping[str, list[Question]], works: Sequence[Work], out: Location, rows: Rows | None, *, allow_leaks: bool
) -> dict[str, list[Question]]:
    """Return the questions of all data sets that OUT holds, with a run's own in place of their earlier ones.

    UsageError for a name or a question's id that two data sets have, and for leaks.
    """
    kept, roots = kept_questions(out, own), {work.source.root for work in works}
    own_again = own.keys() & kept.keys()
    known = read_again(out, rows).records if own_again else []
    ids = {work.source.id for work in works} | {record.id for record in known if record.root in roots}
    for name in own_again:
        earlier = {question.volume for question in kept[name] if not question.volume.startswith(UNKNOWN)}
        if earlier and not earlier & ids:
            found = f"questions about other scans, {first_few(sorted(earlier))}"
            remedy = "rename the table, or give --id-prefix"
            raise UsageError(f"expected that {out.at(file_of(name))} is of this source, found {found}; {remedy}")
    parts, owner = {**kept, **own}, dict[str, str]()
    for name, questions in parts.items():
        if again := [question.id for question in questions if owner.setdefault(question.id, name) != name]:
            found = f"{len(again)} of {owner[again[0]]} in {name}, {again[0]} first"
            remedy = f"change them, or remove {out.at(file_of(name))} if it is not needed"
            raise UsageError(f"expected question ids that no other data set has, found {found}; {remedy}")
    if not allow_leaks:
        refuse_leaks(leaks_of(question for questions in parts.values() for question in questions))
    return parts


def digests_of_all(out: Location) -> dict[str, str]:
    """Return {name: SHA-256} of the manifests that are there and of the files that they are made from."""
    return digests(out) | {file_of(name): digest for name, digest in question_digests(out).items()}


def question_digests(out: Location) -> dict[str, str]:
    """Return {data set: SHA-256 of the file of its questions}."""
    return {name: str(out.sha256(file_of(name))) for name in _names(out)}


def content_digests(questions: Mapping[str, Sequence[Question]]) -> dict[str, str]:
    """Return {data set: SHA-256 of what is asked}, which does not depend on the ids of volumes."""
    found = {}
    for name, part in questions.items():
        content = [(q.id, q.question, q.answer, q.split, q.task) for q in sorted(part, key=lambda q: q.id)]
        found[name] = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return found


def row_ids(out: Location) -> Iterator[str]:
    """Yield the ids of the rows of all manifests that can be read."""
    return (str(row.get("id")) for row in _rows(out))


def _names(out: Location) -> list[str]:
    listed = (name for name in out.names(FOLDER) if is_safe(name))
    names = (name for name in listed if name.endswith(SUFFIX) and not name.startswith("."))
    return sorted(name.removesuffix(SUFFIX) for name in names)


def _rows(out: Location) -> Iterator[dict[str, Any]]:
    for name in manifest_names(out):
        with contextlib.suppress(ValueError):  # it is written anew
            yield from (row for row in out.rows(name) if isinstance(row, dict))


def _questions_of_manifests(out: Location) -> dict[str, list[Question]]:
    found = defaultdict(list)
    for row in _rows(out):
        is_ours = {"id", "messages", "channel", "volume_id", "split"} <= row.keys()
        if is_ours and (row["split"], row["id"]) != (ALL, row["volume_id"]):  # that is a volume without a question
            found[row["channel"].partition("/")[0]].append(_question_of(row))
    return dict(found)


def _question_of(row: Mapping[str, Any]) -> Question:
    """Return the question that a row was made from."""
    text = next(message["content"] for message in row["messages"] if message["role"] == "user")
    extra = dict(row.get("extra") or {}) | {name: row[name] for name in EXTRA_COLUMNS if row.get(name)}
    if extra.get("choices") == list(NO_CHOICES):
        del extra["choices"]
    return Question(
        id=row["id"],
        volume=row["volume_id"],
        question=text.removeprefix(VIDEO_TAG),
        answer=row.get("answer") or None,
        split=row["split"],
        patient=row.get("patient") or None,
        task=row.get("task") or None,
        extra=extra,
        dataset=row["channel"].partition("/")[0],
    )
