"""Rows of a manifest, as training and predicting read them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from photon_data import manifest
from photon_data.errors import UsageError

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
