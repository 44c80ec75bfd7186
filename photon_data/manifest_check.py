"""What is wrong with manifest rows. Strict, since ms-swift drops a bad row, or moves a volume to another question, silently."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from photon_data.location import Location
from photon_data.questions import TAG
from photon_data.tables import Problem, Row

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
