"""Manifests on disk: JSON lines of ms-swift rows, read and checked.

The check is strict, because ms-swift drops a bad row, or gives a volume to another question, without a word.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from photon_data.files import Location
from photon_data.questions.table import TAG, VIDEO_TAG, Problem, TableRow, read_table, refuse

FOLDER = "manifests"
SUFFIX = ".jsonl"

# Columns that hold one text each. ms-swift drops all of them but "channel".
TEXT_COLUMNS = ("id", "channel", "volume_id", "patient", "split", "task", "kind", "organ", "answer")
NEVER_EMPTY = ("id", "channel", "volume_id", "split")


def manifest_names(out: Location) -> list[str]:
    """Return the names below `out` of the manifests that are there, sorted."""
    return [f"{FOLDER}/{name}" for name in out.names(FOLDER) if name.endswith(SUFFIX) and not name.startswith(".")]


def digests(out: Location) -> dict[str, str]:
    """Return {name: SHA-256} of the manifests that are there."""
    return {name: hashlib.sha256(out.read(name) or b"").hexdigest() for name in manifest_names(out)}


def is_manifest(content: bytes) -> bool:
    """Tell whether the first line of a JSON-lines file is a row as `rows.build` makes it."""
    try:
        row = json.loads(content.partition(b"\n")[0])
    except ValueError:
        return False
    return isinstance(row, dict) and {"messages", "videos", "volume_id"} <= row.keys()


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a manifest, unchecked; UsageError with every line that is not a JSON object."""
    table = read_table(path)
    if table.problems:
        refuse(path, table.problems)
    return [row.values for row in table.rows]


def validate(
    manifest: Sequence[Mapping[str, Any]] | Path, *, root: Path | str | None = None, check_stores: bool = True
) -> list[Problem]:
    """Return the problems of rows or of a file, by line; empty for a sound manifest.

    `root` is the folder that relative stores lie in; without it every store must be an absolute path or a URL.
    `check_stores=False` accepts stores that do not exist here (they may lie on another machine). UsageError for a file
    that cannot be read.
    """
    problems: list[Problem] = []
    if isinstance(manifest, Path):
        _, rows, problems = read_table(manifest)
    else:
        rows = [TableRow(f"line {number}", dict(row)) for number, row in enumerate(manifest, 1)]
    first_places: dict[str, str] = {}
    video_problems: dict[str, str | None] = {}
    types = _types(rows[0].values) if rows else {}
    for place, row in rows:
        found = [*_compare_types(_types(row), types)] or [*_check_columns(row)]
        if not found:
            found += _check_messages(row)
            for video in row["videos"]:
                if video not in video_problems:
                    video_problems[video] = _problem_of_video(video, None if root is None else str(root), check_stores)
                found += filter(None, [video_problems[video]])
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
            expected, found = first.get(name, "no such column"), own.get(name, "none")
            yield f"expected column {name!r} as in the first row ({expected}), found {found}"


def _check_columns(row: Mapping[str, Any]) -> Iterator[str]:
    """Yield the columns of ours that are missing or of another type."""
    for name in TEXT_COLUMNS:
        if not isinstance(row.get(name), str) or (name in NEVER_EMPTY and not row[name]):
            yield f"expected a text in {name!r}, found {row.get(name)!r}"
    for name in ("videos", "choices"):
        values = row.get(name)
        if not isinstance(values, list) or not (_are_texts(values) and all(values)):
            yield f"expected a list of texts in {name!r}, found {values!r}"
    extra = row.get("extra", {})
    if not isinstance(extra, dict) or not _are_texts(extra.values()):
        yield f"expected an object of texts in 'extra', found {extra!r}"
    messages = row.get("messages")
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        yield f"expected messages with a role and a content that is not empty, found {messages!r}"


def _are_texts(values: Iterable[Any]) -> bool:
    return {*map(type, values)} <= {str}


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict) or message.keys() != {"role", "content"} or not _are_texts(message.values()):
        return False
    return bool(message["content"].strip())


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
    if "://" in video:
        folder, _, name = video.rpartition("/")
    elif PurePosixPath(video).is_absolute() or PureWindowsPath(video).is_absolute():
        folder, name = "", video
    elif root is not None:
        folder, name = root, video
    else:
        return f"expected an absolute path or URL, found {video!r}; ms-swift starts from the working directory"
    if not check_stores:
        return None
    exists = Location(folder).exists(name) if folder else Path(video).exists()
    return None if exists else f"expected a store at {video}{f' in {root}' if folder == root else ''}, found none"
