"""Manifests: questions and prepared volumes -> ms-swift rows, one list per split; checked, and written as JSON lines.

docs/manifests.md describes the rows. The volume of a question is found by its name, and never guessed. The check is
strict, because ms-swift drops a bad row, or gives a volume to another question, without a word.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import lru_cache
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

from photon_data.errors import UsageError
from photon_data.files import LazyRows, Location, is_safe
from photon_data.questions.question import Match, Question, by_name
from photon_data.questions.splits import ALL, check_split_names
from photon_data.questions.table import TAG, VIDEO_TAG, Problem, TableRow, as_json, read_lines, read_table, refuse
from photon_data.records import VolumeRecord

FOLDER, SUFFIX = "manifests", ".jsonl"
# Columns that hold one text each. ms-swift drops all of them but "channel".
TEXT_COLUMNS = ("id", "channel", "volume_id", "patient", "split", "task", "kind", "organ", "answer")
NEVER_EMPTY = ("id", "channel", "volume_id", "split")
# Keys of Question.extra that are columns of a row; the other keys share the column "extra".
EXTRA_COLUMNS = ("kind", "organ", "choices")
# `datasets` and pyarrow read a column of JSON texts as times where a text is one of these.
TIME_STAMP = re.compile(r"\d{4}-\d\d-\d\d(?:[T ]\d\d(?::\d\d(?::\d\d)?)?(?:Z|[+-]\d\d(?::?\d\d)?)?)?", re.ASCII)
# In place of an empty list, which has no type: readers of JSON lines give a column that of its first rows.
NO_CHOICES = ("",)


class Unmatched(NamedTuple):
    """A question without a row."""

    id: str
    volume: str  # as the question names it
    reason: str


class Manifests(NamedTuple):
    """What `build` returns."""

    rows: Mapping[str, Sequence[dict[str, Any]]]  # by split, sorted by volume and question id; every split has rows
    unmatched: list[Unmatched]  # by question id
    without_questions: list[str]  # ids of prepared volumes that no question is about, sorted


def build(
    questions: Sequence[Question] | None,
    records: Iterable[VolumeRecord],
    *,
    out: Path | str,
    instruction: str,
    dataset: str | None = None,
    paths: str = "absolute",
    by_id: bool = False,
) -> Manifests:
    """Return the rows of every split, and the questions that have none.

    Every question has a row or is unmatched. Its `volume` is an id, or a name unless `by_id` (see `by_name`). Without
    questions every prepared volume gets one row of split "all": the instruction, no answer. Rows do not depend on the
    order of questions or records. `out` is the folder or URL that holds the stores of `records`. The stores' paths are
    "absolute" or "relative" to `out`. The first half of "channel" is the question's data set, else `dataset` (default:
    the name of `out`). UsageError for questions without a split (`splits.assign_splits` gives them one) or with a split
    that cannot name a file.
    """
    place, known = Location(str(out)), {record.id: record for record in sorted(records, key=lambda record: record.id)}
    at = place.at if paths == "absolute" else str
    dataset = dataset or place.at("").rstrip("/").rpartition("/")[2]
    extra_names, mixed = list[str](), set[str]()

    def row(q: Question, volume_id: str) -> dict[str, Any]:
        record = known[volume_id]
        q = q if q.patient or not record.patient else replace(q, patient=record.patient)
        return _row(q, volume_id, at(str(record.store)), q.dataset or dataset, extra_names, mixed)

    if questions is None:
        there = [record.id for record in known.values() if record.is_there]
        of_volume = LazyRows(there, lambda id_: row(Question(id_, id_, instruction, split=ALL), id_))
        return Manifests({ALL: of_volume} if there else {}, [], [])
    if without := [q.id for q in questions if not q.split]:
        found = f"{len(without)} without, {without[0]!r} first"
        raise UsageError(f"expected a split for every question, found {found}; assign splits first")
    check_split_names({str(q.split) for q in questions})
    find = _by_id(known) if by_id else by_name((record.id, record.source) for record in known.values())
    matched, unmatched = [], []
    for q in questions:
        volume_id, reason, _ = find(q.volume)
        record = known.get(volume_id or "")
        if record is not None and record.is_there:
            matched.append((q, record.id))
        else:
            why = reason if record is None else f"{record.state}: {record.reason}"
            unmatched.append(Unmatched(q.id, q.volume, why))
    extra_names = sorted({name for q, _ in matched for name in q.extra} - set(EXTRA_COLUMNS))
    mixed = {name for name in extra_names if _is_mixed(_as_text(q.extra.get(name)) for q, _ in matched)}
    asked = defaultdict[str, list[tuple[Question, str]]](list)
    for q, volume_id in sorted(matched, key=lambda pair: (pair[1], pair[0].id)):
        asked[str(q.split)].append((q, volume_id))
    rows = {split: LazyRows(pairs, lambda pair: row(*pair)) for split, pairs in sorted(asked.items())}
    others = known.keys() - {volume_id for _, volume_id in matched}
    return Manifests(rows, sorted(unmatched), sorted(id_ for id_ in others if known[id_].is_there))


def _by_id(ids: Container[str]) -> Callable[[str], Match]:
    return lambda name: Match(name) if name in ids else Match(None, "no such volume")


def _row(
    question: Question, volume_id: str, video: str, dataset: str, extra_names: Sequence[str], mixed: Collection[str]
) -> dict[str, Any]:
    """Return one row. All questions of a table have the same columns with the same types; what is missing is empty.

    Time stamps in the columns `mixed` are written as JSON texts, in quotes.
    """
    extra = question.extra
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
        "kind": _as_text(extra.get("kind")),
        "organ": _as_text(extra.get("organ")),
        "choices": list(extra.get("choices") or NO_CHOICES),
        "answer": question.answer or "",
    }
    if extra_names:
        # Not columns of their own: ms-swift obeys columns of some names, such as system, image and label.
        texts = {name: _as_text(extra.get(name)) for name in extra_names}
        row["extra"] = texts | {name: json.dumps(texts[name]) for name in mixed if _is_time(texts[name])}
    return row


def _as_text(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    value = as_json(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)


def _is_mixed(texts: Iterable[str]) -> bool:
    """Tell whether some texts of a column, but not all, are time stamps."""
    return len({_is_time(text) for text in texts}) > 1


def _is_time(text: str) -> bool:
    try:
        return bool(TIME_STAMP.fullmatch(text) and datetime.fromisoformat(text))
    except ValueError:  # the 30th of February
        return False


def write(manifests: Manifests, out: Path | str) -> list[str]:
    """Write manifests/<split>.jsonl below the folder or URL `out`; return the names of the old manifests it removed.

    Each manifest is whole or not there. Those of splits without rows go after the others are in place, so that no run
    trains on old rows; other files stay. UsageError, and nothing is written, for rows that `validate` refuses.
    """
    place = Location(str(out))
    named = {f"{FOLDER}/{split}{SUFFIX}": rows for split, rows in manifests.rows.items()}
    for name, rows in named.items():
        if problems := validate(rows, root=place.url, check_stores=False):
            refuse(name, problems)
    for name, rows in named.items():
        place.write_rows(name, rows)
    old = [name for name in manifest_names(place) if name not in named and _is_manifest(place, name)]
    for name in old:
        place.remove(name)
    return old


def refuse_unsound(source: Path | str, questions: Iterable[Question]) -> None:
    """UsageError for questions of `source` whose rows `write` would refuse: before scans are read, not after."""
    problems: list[Problem] = []
    first_places: dict[tuple[str | None, str], str] = {}
    for number, question in enumerate(questions, 1):
        place = f"question {number}"
        row = _row(question, "volume", "/store", "data", (), ())
        found = [*_check_columns(row)] or [*_check_messages(row)]
        earlier = first_places.setdefault((question.split, question.id), place)
        if earlier != place:
            found.append(f"expected an id that occurs once, found it as {earlier} too; rename one")
        problems += [Problem(place, "unsound row", f"id {question.id!r}: {text}") for text in found]
    if problems:
        refuse(source, problems)


def _is_manifest(out: Location, name: str) -> bool:
    """Tell whether the first line of a JSON-lines file is a row as `build` makes it."""
    try:
        row = next(out.rows(name), None)
    except ValueError:
        return False
    return isinstance(row, dict) and {"messages", "videos", "volume_id"} <= row.keys()


def manifest_names(out: Location) -> list[str]:
    """Return the names below `out` of the manifests that are there, sorted."""
    names = (name for name in out.names(FOLDER) if name.endswith(SUFFIX) and not name.startswith("."))
    return [f"{FOLDER}/{name}" for name in names if is_safe(name)]


def digests(out: Location) -> dict[str, str]:
    """Return {name: SHA-256} of the manifests that are there."""
    return {name: str(out.sha256(name)) for name in manifest_names(out)}


def validate(
    manifest: Sequence[Mapping[str, Any]] | Path, *, root: Path | str | None = None, check_stores: bool = True
) -> list[Problem]:
    """Return the problems of rows or of a file, by line; empty for a sound manifest.

    `root` is the folder that relative stores lie in; without it every store must be an absolute path or a URL.
    `check_stores=False` accepts stores of another machine. UsageError for a file that cannot be read.
    """
    problems: list[Problem] = []
    rows: Iterable[TableRow | Problem]
    if not isinstance(manifest, Path):
        rows = (TableRow(f"line {number}", dict(row)) for number, row in enumerate(manifest, 1))
    elif manifest.suffix == SUFFIX:
        rows = read_lines(manifest)
    else:
        _, rows, problems = read_table(manifest)
    first_places: dict[str, str] = {}
    folder = None if root is None else str(root)
    problem_of = lru_cache(1024)(lambda video: _problem_of_video(video, folder, check_stores))
    types: Any = None  # those of the first row
    for one in rows:
        if isinstance(one, Problem):
            problems.append(one)
            continue
        place, row = one
        types = _types(row) if types is None else types
        found = [*_compare_types(_types(row), types)] or [*_check_columns(row)]
        if not found:
            found += _check_messages(row)
            found += filter(None, map(problem_of, row["videos"]))
            earlier = first_places.setdefault(row["id"], place)
            if earlier != place:
                found.append(f"expected an id that occurs once, found it at {earlier} too")
        problems += [Problem(place, "unsound row", f"id {row.get('id')!r}: {text}") for text in found]
    return sorted(problems, key=lambda problem: problem.number)


def _types(value: Any) -> Any:
    """Return the name of a value's type; for an object, those of its values: ms-swift gives each column one type."""
    return {key: _types(item) for key, item in value.items()} if type(value) is dict else type(value).__name__


def _compare_types(own: Mapping[str, Any], first: Mapping[str, Any]) -> Iterator[str]:
    for name in own.keys() | first.keys() if own != first else ():
        if own.get(name) != first.get(name):
            expected = f"column {name!r} as in the first row ({first.get(name, 'no such column')})"
            yield f"expected {expected}, found {own.get(name, 'none')}"


def _check_columns(row: Mapping[str, Any]) -> Iterator[str]:
    """Yield the columns of ours that are missing or of another type."""
    for name in TEXT_COLUMNS:
        if not isinstance(row.get(name), str) or (name in NEVER_EMPTY and not row[name]):
            yield f"expected a text in {name!r}, found {row.get(name)!r}"
    for name in ("videos", "choices"):
        values = row.get(name)
        is_none = name == "choices" and values == list(NO_CHOICES)
        if not isinstance(values, list) or not (is_none or (_are_texts(values) and all(values))):
            yield f"expected a list of texts in {name!r}, found {values!r}"
    extra = row.get("extra", {})
    if not isinstance(extra, dict) or not _are_texts(extra.values()):
        yield f"expected an object of texts in 'extra', found {extra!r}"
    messages = row.get("messages")
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        yield f"expected messages with a role and a content that is not empty, found {messages!r}"


def _are_texts(values: Iterable[Any]) -> bool:
    return {*map(type, values)} <= {str}


def _is_message(value: Any) -> bool:
    is_pair = isinstance(value, dict) and value.keys() == {"role", "content"} and _are_texts(value.values())
    return is_pair and bool(value["content"].strip())


def _check_messages(row: Mapping[str, Any]) -> Iterator[str]:
    """Yield the problems of the messages of a row whose columns are right."""
    messages, videos = row["messages"], row["videos"]
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != (["user", "assistant"] * len(turns))[: len(turns)]:
        yield f"expected user and assistant by turns, user first, found {', '.join(roles) or 'no message'}"
    tags = [(message["role"], tag) for message in messages for tag in TAG.findall(message["content"])]
    video_tags = tags.count(("user", VIDEO_TAG))
    if not videos or video_tags != len(videos):
        yield f"expected one <video> in a user turn per video, found {video_tags} for {len(videos)} videos"
    for role, tag in tags:
        if (role, tag) != ("user", VIDEO_TAG):
            yield f"expected no {tag} in a turn of the {role}; remove it"
    last = messages[-1]["content"] if roles[-1:] == ["assistant"] else ""
    if row["answer"] != last:
        yield f"expected the last turn of the assistant in 'answer' ({last[:40]!r}), found {row['answer'][:40]!r}"


def _problem_of_video(video: str, root: str | None, check_stores: bool) -> str | None:
    """Return what is wrong with the path or URL of a store, None if nothing is."""
    folder, name = root, video
    if "://" in video:
        folder, _, name = video.rpartition("/")
    elif video.startswith("/") or PureWindowsPath(video).is_absolute():
        folder = ""
    if folder is None:
        return f"expected an absolute path or URL, found {video!r}; ms-swift starts from the working directory"
    if not check_stores or (Location(folder).exists(name) if folder else Path(video).exists()):
        return None
    return f"expected a store at {video}{f' in {root}' if folder == root else ''}, found none"
