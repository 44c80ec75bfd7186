"""Rows of manifests, as training, answering and evaluation read them; and the one rule for which rows share a prefix.

A row is an ms-swift row: `messages`, in which a <video> marks the place of each of its `videos`, and columns of ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from photon_data.errors import UsageError, first_few
from photon_data.questions.table import VIDEO_TAG, read_values, volume_id_of
from photon_train.answering.prediction import Row, organ_masks_of


class TrainRow(NamedTuple):
    """One conversation to learn from. Rows of equal `prefix` can be computed on one encoding of their volumes."""

    id: str
    videos: tuple[str, ...]
    messages: list[dict[str, Any]]
    prefix: Hashable
    volume_id: str = ""
    organ_masks: tuple[str, ...] = ()  # names of the masks it asks about


def prefix_of(row: Row) -> tuple[Any, ...]:
    """Return a key that is equal for rows that share a prefix: the same volumes behind the same text.

    [system "Be brief."] [user "Look: <video>Is it well?"] on a  ->  (a), (system, "Be brief."), (user, "Look: ")

    What stands behind the last <video> is the row's own. Equal keys mean equal tokens up to the end of the last volume.
    Volumes are equal when their paths are, those in memory when they are one object. All rows without a volume have
    one key: no text is encoded ahead for them. A row's `volume_id` counts too, since its store is compared with it.
    Raises KeyError or TypeError for a row without messages.
    """
    volumes: tuple[Hashable, ...]
    volumes = tuple(video if isinstance(video, str | Path) else id(video) for video in row.get("videos") or ())
    if not volumes:
        return ()
    if id_ := volume_id_of(row):
        volumes = ((*volumes, id_),)
    return volumes, *text_before_volumes(row)


def text_before_volumes(row: Row) -> tuple[tuple[str, str], ...]:
    """Return (role, text) of all that stands before the last <video>: (system, "Be brief."), (user, "Look: ")."""
    text = [(message["role"], message["content"]) for message in row["messages"]]
    while text and VIDEO_TAG not in text[-1][1]:
        text.pop()
    if text:
        role, content = text[-1]
        text[-1] = role, content[: content.rindex(VIDEO_TAG)]
    return tuple(text)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a manifest, paths of stores made absolute. UsageError for a file that is not JSON lines.

    Relative paths start at the folder that holds manifests/, and stay in it.
    """
    root = path.resolve().parent.parent

    def absolute(video: str, id: Any) -> str:
        if "://" in video or Path(video).is_absolute():
            return video
        found = (root / video).resolve()
        if not found.is_relative_to(root):
            raise UsageError(f"id {id!r}: expected a path within {root}, found {video}; write it as an absolute path")
        return str(found)

    rows = read_values(path)
    for row in rows:
        videos = row.get("videos")
        if isinstance(videos, list) and all(isinstance(video, str) for video in videos):
            row["videos"] = [absolute(video, row.get("id")) for video in videos]
    return rows


def plain_row(row: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Return an ms-swift row as the rest of the code reads it: an id, a list of videos, contents that are texts.

    ms-swift takes one video as a text, and contents in parts, of which some are volumes. A row without an id is called
    after its `place` in its manifest.
    """
    videos = row.get("videos")
    videos, messages = [videos] if isinstance(videos, str) else videos, row.get("messages")
    if isinstance(messages, list):
        messages, videos = _without_parts(messages, list(videos or ()))
    id = row.get("id")
    named = place if id in (None, "") else str(id) if type(id) is int else id
    return {**row, "id": named, "messages": messages, "videos": videos or []}


def _without_parts(messages: Sequence[Any], videos: list[Any]) -> tuple[list[Any], list[Any]]:
    """Return messages whose contents are texts, and the videos or those of their parts; odd parts stay as they are."""
    plain, found = [], list[Any]()
    for message in messages:
        parts = message.get("content") if isinstance(message, Mapping) else None
        kinds = {part.get("type") if isinstance(part, Mapping) else None for part in parts or ()}
        if not isinstance(parts, list) or not kinds <= {"text", "video"}:
            plain.append(message)
            continue
        texts = (VIDEO_TAG if part["type"] == "video" else str(part.get("text", "")) for part in parts)
        found += [part["video"] for part in parts if part["type"] == "video" and part.get("video") is not None]
        plain.append({**message, "content": "".join(texts)})
    return plain, videos or found


def read_train_rows(manifests: Sequence[str | Path]) -> list[TrainRow]:
    """Return the rows of all manifests, in order. UsageError for unreadable files, repeated ids, missing answers."""
    rows = [_train_row(row, f"{path}:{i}") for path in manifests for i, row in enumerate(read_rows(Path(path)), 1)]
    if not rows:
        raise UsageError("expected manifests with rows, found no manifest; see photon-data prepare")
    if again := [id for id, count in Counter(row.id for row in rows).items() for _ in range(count - 1)]:
        found = f"{len(again)} occur again: {first_few(again, 10)}"
        raise UsageError(f"expected an id of its own for every row, found that {found}; give every manifest once")
    if silent := [row.id for row in rows if not any(m["role"] == "assistant" for m in row.messages)]:
        found = f"{len(silent)} of {len(rows)} have none: {first_few(silent, 10)}"
        raise UsageError(
            f"expected an answer in every row, found that {found}; train on manifests of questions with answers"
        )
    return rows


def _train_row(row: Row, place: str) -> TrainRow:
    try:
        messages, videos = [dict(message) for message in row["messages"]], tuple(row.get("videos") or ())
        texts = [*videos, *(message[name] for message in messages for name in ("role", "content"))]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("videos, role or content is no text")
        if row.get("images"):
            raise TypeError("images, which Photon does not read")
    except (ValueError, KeyError, TypeError) as error:
        found = f"{str(row)[:80]!r} ({error!r}); see docs/manifests.md"
        raise UsageError(f"{place}: expected a row with messages and videos, found {found}") from None
    id, prefix = place if row.get("id") in (None, "") else str(row["id"]), prefix_of(row)
    if any(role == "assistant" for role, _ in prefix[1:]):
        prefix = (*prefix, id)  # what is learned before the last volume ends cannot be shared
    masks = organ_masks_of(row) if (row.get("extra") or {}).get("organ_masks") else ()
    return TrainRow(id, videos, messages, prefix, str(row.get("volume_id") or ""), masks)
