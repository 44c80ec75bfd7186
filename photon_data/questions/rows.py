"""What is wrong with manifest rows. Strict, since ms-swift drops a bad row, or moves a volume to another question, silently.

Questions and prepared volumes -> ms-swift rows: build, write, read. docs/manifests.md describes the rows.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal, NamedTuple

from photon_data.collector import paused
from photon_data.errors import UsageError
from photon_data.files import Location, jsonl_bytes
from photon_data.questions.join import by_name
from photon_data.questions.question import TAG, Question
from photon_data.questions.splits import ALL, check_names
from photon_data.questions.table import Problem, Row, read_table, refuse
from photon_data.records import VolumeRecord

# Columns of ours that hold one text each; ms-swift drops all of them but "channel".
OWN_TEXTS = ("id", "channel", "volume_id", "patient", "split", "task", "kind", "organ", "answer")
NEVER_EMPTY = ("id", "channel", "volume_id", "split")


def check_rows(rows: Sequence[Row], *, root: str | None, look: bool) -> list[Problem]:
    """Return what is wrong with the rows, in their order; `root` and `look` are those of `manifest.validate`."""
    problems: list[Problem] = []
    first_place: dict[str, str] = {}
    seen_videos: dict[str, str | None] = {}
    shape = _shape(rows[0].values) if rows else {}
    for place, values in rows:
        who = f"id {values.get('id')!r}"
        found = [*_check_columns(values, shape)] or [*_check_own(values)]
        if not found:
            found += _check_messages(values)
            for video in values["videos"]:
                if video not in seen_videos:
                    seen_videos[video] = _problem_of_video(video, root, look)
                found += [said for said in [seen_videos[video]] if said]
            earlier = first_place.setdefault(values["id"], place)
            if earlier != place:
                found.append(f"an id that occurs once wanted, first used at {earlier}")
        problems += [Problem(place, "row not sound", f"{who}: {said}") for said in found]
    return problems


def _shape(value: Any) -> Any:
    """Return the JSON type of a value, with that of every key of an object; lists are of one type by `_check_own`."""
    if isinstance(value, Mapping):
        return {key: _shape(item) for key, item in value.items()}
    return type(value).__name__


def _is_of_shape(row: Mapping[str, Any], shape: Mapping[str, Any]) -> bool:
    """Tell whether `_shape` of a row is this one, without making it: manifests have 100,000s of rows."""
    types = {name: type(value).__name__ for name, value in row.items()}
    if types == shape:
        return True
    inner = {name: wanted for name, wanted in shape.items() if isinstance(wanted, dict)}
    objects = [row[name] for name in inner if isinstance(row.get(name), Mapping)]
    same = {**types, **inner} == shape and len(objects) == len(inner)
    return same and all(map(_is_of_shape, objects, inner.values()))


def _check_columns(row: Mapping[str, Any], shape: Mapping[str, Any]) -> Iterator[str]:
    """Yield the columns that the first row has otherwise."""
    if _is_of_shape(row, shape):
        return
    own = _shape(row)
    for name in shape.keys() | own.keys():
        if shape.get(name) != own.get(name):
            wanted, got = shape.get(name, "no such column"), own.get(name, "none")
            yield f"column {name!r} as in the first row wanted ({wanted}), got {got}"


def _check_own(row: Mapping[str, Any]) -> Iterator[str]:
    """Yield the columns that are not there or not of their type."""
    for name in OWN_TEXTS:
        if not isinstance(row.get(name), str) or (name in NEVER_EMPTY and not row[name]):
            yield f"a text in {name!r} wanted, got {row.get(name)!r}"
    for name in ("videos", "choices"):
        values = row.get(name)
        if not isinstance(values, list) or not (_are_texts(values) and all(values)):
            yield f"a list of texts in {name!r} wanted, got {values!r}"
    extra = row.get("extra", {})
    if not isinstance(extra, dict) or not _are_texts(extra.values()):
        yield f"an object of texts in 'extra' wanted, got {extra!r}"
    messages = row.get("messages")
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        yield f"messages of a role and a content that is not empty wanted, got {messages!r}"


def _are_texts(values: Iterable[Any]) -> bool:
    return {*map(type, values)} <= {str}


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict) or message.keys() != {"role", "content"}:
        return False
    return isinstance(message["role"], str) and isinstance(message["content"], str) and bool(message["content"].strip())


def _check_messages(row: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the turns of a row whose columns are right."""
    messages, videos = row["messages"], row["videos"]
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != (["user", "assistant"] * len(turns))[: len(turns)]:
        yield f"user and assistant in turns, user first, wanted, got {', '.join(roles) or 'no message'}"
    found = [(message["role"], tag) for message in messages for tag in TAG.findall(message["content"])]
    in_place = [tag for role, tag in found if role == "user" and tag == "<video>"]
    if not videos or len(in_place) != len(videos):
        yield f"one <video> in a user turn per video wanted, got {len(in_place)} for {len(videos)}"
    for role, tag in found:
        if role != "user" or tag != "<video>":
            yield f"no {tag} in a turn of the {role} wanted"
    last = messages[-1]["content"] if roles[-1:] == ["assistant"] else ""
    if row["answer"] != last:
        yield f"the last turn of the assistant in 'answer' wanted ({last[:40]!r}), got {row['answer'][:40]!r}"


def _problem_of_video(video: str, root: str | None, look: bool) -> str | None:
    """Return what is wrong with the path or URL of a store, None if nothing is."""
    if "://" in video:
        folder, _, name = video.rpartition("/")
        return None if not look or Location(folder).exists(name) else f"a store wanted, {video} is not there"
    if not (PurePosixPath(video).is_absolute() or PureWindowsPath(video).is_absolute()):
        if root is None:
            return f"an absolute path or URL wanted, got {video!r}; ms-swift looks from the working directory"
        return None if not look or Location(root).exists(video) else f"a store wanted, {video} is not in {root}"
    return None if not look or Path(video).exists() else f"a store wanted, {video} is not there"


FOLDER = "manifests"
SUFFIX = ".jsonl"
VIDEO_TAG = "<video>"

# Keys of Question.extra that have a column of their own; the others share "extra".
_NAMED_EXTRAS = ("kind", "organ", "choices")

PathStyle = Literal["absolute", "relative", "url"]


class Unmatched(NamedTuple):
    """A question without a row: its id, the volume it asked for, and why there is none."""

    id: str
    volume: str
    why: str


class Manifests(NamedTuple):
    """What `build` makes.

    rows        {split: rows}, by volume id, then question id; a split without rows is not there
    unmatched   questions whose volume is not there, by question id: with the rows they make up all questions
    unasked     ids of volumes that are there and have no question, sorted
    """

    rows: dict[str, list[dict[str, Any]]]
    unmatched: list[Unmatched]
    unasked: list[str]


class Written(NamedTuple):
    """Paths or URLs of the manifests that `write` wrote, and of those it removed since their split is no more."""

    written: list[str]
    removed: list[str]


@paused()
def build(
    questions: Sequence[Question] | None,
    records: Iterable[VolumeRecord],
    *,
    out: Path | str,
    instruction: str,
    dataset: str | None = None,
    path_style: PathStyle = "absolute",
) -> Manifests:
    """Return the rows of every split, and what could not be joined.

    Without questions every volume that is there gets one row, of split "all": the instruction, no answer. `out` is the folder
    or URL that stores are recorded relative to; `dataset` is the first half of "channel" for questions that do not say theirs
    (the name of `out` if not given).
    `path_style` says how a row names its store: "absolute" (for an URL, that URL), "relative" to `out`, or "url" (file://...
    for a folder). Rows do not depend on the order of questions or records. UsageError for questions without a split
    (`splits.assign_splits` gives them one) or with a split that cannot name a file.
    """
    records = sorted(records, key=lambda record: record.id)
    there = [record for record in records if record.is_there]
    if questions is None:
        questions = [_default_question(record, instruction) for record in there]
    _check_splits(questions)
    asked, unmatched = _match(questions, records)
    where = Location(str(out))
    videos = {record.id: _video(record, where, path_style) for record in there}
    dataset = dataset or where.at("").rstrip("/").rpartition("/")[2]
    extras = sorted({name for question, _ in asked for name in question.extra} - set(_NAMED_EXTRAS))
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for question, record in asked:
        rows[str(question.split)].append(_row(question, record.id, videos[record.id], question.dataset or dataset, extras))
    seen = {record.id for _, record in asked}
    return Manifests(dict(sorted(rows.items())), unmatched, [record.id for record in there if record.id not in seen])


@paused()
def write(manifests: Manifests, out: Path | str) -> Written:
    """Write manifests/<split>.jsonl below the folder or URL `out`, each whole or not at all, and return what was done.

    Manifests of splits that are no more are removed after the others are in place, so that no run trains on old rows;
    files in manifests/ that are not rows of ours stay. UsageError, and nothing is written, for rows that are not sound.
    """
    for split, rows in manifests.rows.items():
        problems = check_rows([Row(f"line {number}", row) for number, row in enumerate(rows, 1)], root=str(out), look=False)
        if problems:
            refuse(f"{FOLDER}/{split}{SUFFIX}", problems)
    where = Location(str(out))
    names = [f"{FOLDER}/{split}{SUFFIX}" for split in manifests.rows]
    for name, rows in zip(names, manifests.rows.values(), strict=True):
        where.write(name, jsonl_bytes(rows))
    stale = [name for name in manifest_names(where) if name not in names and _is_ours(where.read(name) or b"")]
    for name in stale:
        where.remove(name)
    return Written([where.at(name) for name in names], [where.at(name) for name in stale])


def manifest_names(out: Location) -> list[str]:
    """Return the names below `out` of the manifests that are there, sorted."""
    return [f"{FOLDER}/{name}" for name in out.names(FOLDER) if name.endswith(SUFFIX) and not name.startswith(".")]


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a manifest; UsageError for a file that is not JSON lines throughout."""
    table = read_table(path)
    if table.problems:
        refuse(path, table.problems)
    return [row.values for row in table.rows]


def validate(manifest: Sequence[Mapping[str, Any]] | Path, *, root: Path | str | None = None, look: bool = True) -> list[str]:
    """Return what is wrong with rows or a file, each problem with line and id; empty for a sound manifest.

    `root` is the folder that relative stores are looked for in; without one every store must be absolute or a URL. With
    `look=False` nobody looks whether the stores are there (stores on another machine). UsageError for a file that cannot be read.
    """
    problems: list[Problem] = []
    if isinstance(manifest, Path):
        _, rows, problems = read_table(manifest)
    else:
        rows = [Row(f"line {number}", dict(row)) for number, row in enumerate(manifest, 1)]
    problems = problems + check_rows(rows, root=None if root is None else str(root), look=look)
    return [f"{problem.place}: {problem.text}" for problem in sorted(problems, key=lambda problem: problem.number)]


def _default_question(record: VolumeRecord, instruction: str) -> Question:
    return Question(id=record.id, volume=record.id, question=instruction, split=ALL)


def _check_splits(questions: Sequence[Question]) -> None:
    without = [question.id for question in questions if not question.split]
    if without:
        raise UsageError(
            f"a split for every question wanted, got {len(without)} without, {without[0]!r} first; assign splits first"
        )
    check_names({question.split for question in questions if question.split})


def _match(
    questions: Sequence[Question], records: Sequence[VolumeRecord]
) -> tuple[list[tuple[Question, VolumeRecord]], list[Unmatched]]:
    """Return the questions with their volumes, by volume id then question id, and those without, by question id."""
    find = by_name(records)
    asked, unmatched = [], []
    for question in questions:
        found = find(question.volume)
        if isinstance(found, VolumeRecord) and found.is_there:
            asked.append((question, found))
        else:
            why = found if isinstance(found, str) else f"{found.state}: {found.reason}"
            unmatched.append(Unmatched(question.id, question.volume, why))
    return sorted(asked, key=lambda pair: (pair[1].id, pair[0].id)), sorted(unmatched)


def _video(record: VolumeRecord, out: Location, path_style: PathStyle) -> str:
    assert record.store is not None, f"{record.id} is {record.state} and has no store"
    if path_style == "relative":
        return record.store
    place = out.at(record.store)
    return Path(place).as_uri() if path_style == "url" and out.is_local else place


def _row(question: Question, volume_id: str, video: str, dataset: str, extras: Sequence[str]) -> dict[str, Any]:
    """Return one row; columns and their types are the same for every question of a table, whatever it lacks."""
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
        "kind": _plain(question.extra.get("kind")),
        "organ": _plain(question.extra.get("organ")),
        "choices": list(question.extra.get("choices", [])),
        "answer": question.answer or "",
    }
    if extras:
        # In a key of their own: ms-swift takes a column called system, image or label for an instruction to itself.
        row["extra"] = {name: _plain(question.extra.get(name)) for name in extras}
    return row


def _plain(value: Any) -> str:
    """Return a value as text: itself, "" for null, anything else as JSON writes it."""
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def _is_ours(content: bytes) -> bool:
    try:
        row = json.loads(content.partition(b"\n")[0])
    except ValueError:
        return False
    return isinstance(row, dict) and {"messages", "videos", "volume_id"} <= row.keys()


def digests(out: Location) -> dict[str, str]:
    """Return {name: SHA-256} of the manifests that are there."""
    return {name: hashlib.sha256(out.read(name) or b"").hexdigest() for name in manifest_names(out)}
