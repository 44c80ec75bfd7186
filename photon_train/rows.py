"""Rows of a manifest, as training and predicting read them.

Manifest files -> rows that can be trained on, each checked when the run starts, not when its turn comes.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from photon_data.errors import UsageError
from photon_data.files import Location
from photon_data.questions import manifest
from photon_data.store import read_metadata

Row = Mapping[str, Any]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a manifest, relative stores made absolute. UsageError for a file that is not JSON lines throughout."""
    rows = manifest.read(path)
    for row in rows:
        videos = row.get("videos")
        if isinstance(videos, list) and all(isinstance(video, str) for video in videos):
            row["videos"] = [_absolute(video, path, f"id {row.get('id')!r}") for video in videos]
    return rows


def without_answer(row: Row) -> dict[str, Any]:
    """Return the row up to its last question: what the assistant says at the end is left out."""
    messages = list(row["messages"])
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    return {**row, "messages": messages}


def asked_of(row: Row) -> str:
    """Return 16 hexadecimal digits that change with what is asked: messages up to the answer, names of the volumes, choices.

    Where the volumes lie does not matter: a folder of stores and manifests can be moved.
    """
    names = [Path(video).name if isinstance(video, str | Path) else "" for video in row.get("videos") or ()]
    parts = [without_answer(row)["messages"], names, list(row.get("choices") or ())]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _absolute(video: str, path: Path, place: str) -> str:
    """Return where a store is; relative paths are relative to the folder that holds manifests/, and stay in it."""
    if "://" in video or Path(video).is_absolute():
        return video
    root = path.resolve().parent.parent
    found = (root / video).resolve()
    if not found.is_relative_to(root):
        raise UsageError(f"{place}: a path within {root} wanted, got {video}")
    return str(found)


def organ_masks_of(row: Row) -> tuple[str, ...]:
    """Return the names of the masks a row asks about: a JSON list in its `extra`. UsageError for anything else there."""
    listed = (row.get("extra") or {}).get("organ_masks") or "[]"
    try:
        names = json.loads(listed)
    except (ValueError, TypeError):
        names = None
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise UsageError(f"{row.get('id')}: a JSON list of names wanted in extra.organ_masks, got {listed!r}")
    return tuple(names)


logger = logging.getLogger(__name__)
SHOWN = 10


class TrainRow(NamedTuple):
    """One conversation. `head` is its text up to the end of its last volume: rows of equal heads and volumes share a prefix."""

    id: str
    videos: tuple[str, ...]
    messages: list[dict[str, Any]]
    head: str
    answers_before_head: bool  # something to learn stands before the end of the last volume
    volume_id: str = ""
    organ_masks: tuple[str, ...] = ()  # names of the masks it asks about

    @property
    def size(self) -> int:
        """Characters of its text: what it costs beside its volumes, roughly."""
        return sum(len(message["content"]) for message in self.messages)


def read_train_rows(manifests: Sequence[str | Path]) -> list[TrainRow]:
    """Return the rows of all manifests, in order. UsageError for a file that cannot be read, ids used twice, no answers."""
    paths = [Path(manifest) for manifest in manifests]
    rows = [_train_row(row, f"{path}:{number}") for path in paths for number, row in enumerate(read_rows(path), 1)]
    if not rows:
        raise UsageError("manifests with rows wanted, got no manifest; see photon-data prepare")
    seen: set[str] = set()
    twice = [row.id for row in rows if row.id in seen or seen.add(row.id)]  # type: ignore[func-returns-value]
    if twice:
        raise UsageError(f"an id for every row wanted, {len(twice)} occur again: {_first(twice)}; was a manifest given twice?")
    silent = [row.id for row in rows if not any(m["role"] == "assistant" for m in row.messages)]
    if silent:
        raise UsageError(f"an answer in every row wanted, {len(silent)} of {len(rows)} have none: {_first(silent)}")
    return rows


def _train_row(row: Row, place: str) -> TrainRow:
    try:
        messages = [dict(message) for message in row["messages"]]
        videos, contents = tuple(row.get("videos") or ()), [message["content"] for message in messages]
        if not all(isinstance(text, str) for text in (*videos, *contents)):
            raise TypeError("videos or content")
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{place}: a row with messages and videos wanted ({error!r}), got {str(row)[:80]!r}") from None
    last = max((i for i, content in enumerate(contents) if TAG in content), default=-1)
    head = json.dumps([[m["role"], m["content"]] for m in messages[:last]])
    if last >= 0:
        head += messages[last]["role"] + contents[last][: contents[last].rindex(TAG)]
    early = any(message["role"] == "assistant" for message in messages[: max(last, 0)])
    id, volume_id = str(row.get("id") or place), str(row.get("volume_id") or "")
    return TrainRow(id, videos, messages, head, early, volume_id, organ_masks_of(row))


def missing_stores(rows: Iterable[TrainRow]) -> dict[str, list[str]]:
    """Return the volumes that are not whole stores, each with the ids of the rows that need it."""
    needed: dict[str, list[str]] = {}
    for row in rows:
        for video in row.videos:
            needed.setdefault(video, []).append(row.id)
    return {video: ids for video, ids in needed.items() if not _is_there(video)}


def _is_there(video: str) -> bool:
    if video.endswith(NIFTI):
        return Path(video).is_file()
    return read_metadata(Location(video), "") is not None


def check_stores(rows: Sequence[TrainRow], on_bad_row: str) -> list[TrainRow]:
    """Return the rows whose stores are there. With on_bad_row "stop", UsageError that names the others."""
    missing = missing_stores(rows)
    for video, ids in missing.items():
        logger.warning("%s is not a whole store: without it go %d rows, %s", video, len(ids), _first(ids))
    if missing and on_bad_row == "stop":
        video, ids = next(iter(missing.items()))
        raise UsageError(
            f"{len(missing)} stores of the manifests are not there or not whole, {video} first, which row {ids[0]} wants; "
            "prepare them again, or leave their rows out with on_bad_row=skip"
        )
    return [row for row in rows if not any(video in missing for video in row.videos)]


def _first(ids: Sequence[str]) -> str:
    return ", ".join(ids[:SHOWN]) + (", ..." if len(ids) > SHOWN else "")


TAG = "<video>"


NIFTI = (".nii", ".nii.gz")
