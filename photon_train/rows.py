"""Rows of manifests, as training, answering and evaluation read them, and predictions, which answer them.

A row is an ms-swift row: `messages`, in which a <video> marks the place of each of its `videos`, and columns of ours.
One rule says which rows share a prefix. A prediction is a line of the file that `photon eval` reads.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from photon_data.errors import UsageError, first_few
from photon_data.files import jsonl_bytes
from photon_data.json_text import fields_of, from_json
from photon_data.questions.table import VIDEO_TAG, read_text, read_values

Row = Mapping[str, Any]
MOST_TOKENS, MOST_MEASURED = 1 << 31, 10**12


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


def volume_id_of(row: Row) -> str | None:
    """Return the id that the store of a row must have; None where it names none, or several stores."""
    id = row.get("volume_id")
    return str(id) if id and len(row.get("videos") or ()) == 1 else None


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


def without_answer(row: Row) -> dict[str, Any]:
    """Return the row up to its last question: what the assistant says at the end is left out."""
    messages = list(row["messages"])
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    return {**row, "messages": messages}


def prompt_of(row: Row) -> str:
    """Return what the user says last, with the <video> tags; "" where the user says nothing."""
    return next((str(one["content"]) for one in reversed(row["messages"]) if one["role"] == "user"), "")


def question_digest(row: Row) -> str:
    """Return 16 hexadecimal digits of the messages up to the answer, the choices, and the volumes' names.

    The folders of the volumes do not matter: they can be moved. A volume in memory may have a `name`.
    """
    names = [
        Path(video).name if isinstance(video, str | Path) else getattr(video, "name", "")
        for video in row.get("videos") or ()
    ]
    parts = [without_answer(row)["messages"], names, list(choices_of(row))]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def choices_of(row: Row) -> tuple[str, ...]:
    """Return the choices of a row; without any it has none, or an empty text in their place (docs/manifests.md).

    UsageError for what is no list of texts: the characters of "yes|no" are no choices.
    """
    choices = row.get("choices") or ()
    if not isinstance(choices, list | tuple) or not all(isinstance(choice, str) for choice in choices):
        raise UsageError(f'{row.get("id")}: expected a list of texts in choices, found {choices!r}; write ["A", "B"]')
    return tuple(choice for choice in choices if choice != "")


def organ_masks_of(row: Row) -> tuple[str, ...]:
    """Return the names of the masks a row asks about: a JSON list in its `extra`. UsageError for anything else."""
    listed = (row.get("extra") or {}).get("organ_masks") or "[]"
    try:
        names = from_json(listed)
    except (ValueError, TypeError):
        names = None
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise UsageError(f"{row.get('id')}: expected a JSON list of names in extra.organ_masks, found {listed!r}")
    return tuple(names)


@dataclass(frozen=True)
class Prediction:
    """An answer to one question. Scoring needs `id` and `response`; the rest is for diagnosis and costs."""

    id: str
    response: str = ""
    error: str = ""  # why there is no response
    asked: str = ""  # the `question_digest` of the row; "" when it is not known, and after an error
    volume_id: str = ""
    scheduler: str = ""
    visual_tokens: int = 0
    kept_tokens: int = 0
    text_tokens: int = 0
    threshold: float | None = None  # None for a scheduler without one
    kept: str = ""  # which visual tokens were kept, see `pack_mask`; "" when nothing was scheduled
    choice_scores: dict[str, float] = field(default_factory=dict)  # log-probability of each choice as the answer
    choice_scores_per_token: dict[str, float] = field(default_factory=dict)  # that, divided by its number of tokens
    token_logprobs: list[float] = field(default_factory=list)  # of each token of the response, its end marker included
    samples: list[str] = field(default_factory=list)  # drawn answers, where there are several; `response` is the first
    recipe: str = ""  # digests of the recipes that the stores were prepared by, "+" between them
    seconds: dict[str, float] = field(default_factory=dict)  # by stage; shared stages are divided among their questions
    peak_memory_mib: float = 0.0  # the most that the process had used by then; 0 when it is not known

    def can_answer(self, digest: str | None, recipe: str = "") -> bool:
        """Return False if this answers another question than that of the digest, or of volumes of another recipe.

        None stands for any question, "" for any recipe.
        """
        is_of_recipe = not (self.recipe and recipe) or self.recipe == recipe
        return is_of_recipe and (not self.asked or digest is None or digest == self.asked)

    def check(self) -> None:
        """Raise ValueError for numbers that no model counts, and for kept tokens that are not those of the volume."""
        try:
            self.id.encode()
            kept = bytes.fromhex(self.kept)
        except ValueError:
            raise ValueError("expected `id` in UTF-8 and `kept` in hexadecimal digits, found others") from None
        if not 0 <= self.kept_tokens <= self.visual_tokens <= MOST_TOKENS or not 0 <= self.text_tokens <= MOST_TOKENS:
            raise ValueError(f"expected 0 <= `kept_tokens` <= `visual_tokens` < {MOST_TOKENS:,}, found other numbers")
        measured = (*self.seconds.values(), self.peak_memory_mib)
        if not all(0 <= value <= MOST_MEASURED for value in measured):  # their sums, too, are finite
            raise ValueError(f"expected 0 <= `seconds`, `peak_memory_mib` < {MOST_MEASURED:,}, found other numbers")
        if kept and len(kept) != (self.visual_tokens + 7) // 8:
            raise ValueError(f"expected `kept` of {self.visual_tokens} tokens, found {8 * len(kept)} bits")

    def to_json(self) -> str:
        """Return the line of the file, with its line end."""
        return jsonl_bytes([asdict(self)]).decode()


def read_predictions(path: Path) -> list[Prediction]:
    """Return the predictions of a file, duplicates too, without unknown keys; UsageError for what is no prediction.

    Other tools write `null` for what they do not know. A key of ours with a value of another type is refused: what it
    should mean would be guessed.
    """
    lines, found = read_text(path, (path.suffix.lower(),)).split("\n"), []
    for place, line in ((f"{path}:{number}", line) for number, line in enumerate(lines, start=1) if line.strip()):
        try:
            row = from_json(line)
        except ValueError as error:
            raise UsageError(f"{place}: expected a line of JSON ({error}); was the file cut off?") from None
        if not isinstance(row, dict) or {type(row.get("id")), type(row.get("response", ""))} != {str}:
            raise UsageError(f"{place}: expected an object with texts `id` and `response`, found {line.strip()[:80]!r}")
        known = {name: value for name, value in row.items() if value is not None}
        try:
            found.append(Prediction(**fields_of(Prediction, known)))
            found[-1].check()
        except ValueError as error:
            raise UsageError(f"{place}: {error}; correct it, or leave that key out") from None
    return found


def pack_mask(keep_V: np.ndarray) -> str:
    """Return a bool mask over the visual tokens as hexadecimal text: [1 1 0 0 0 0 0 1] -> "c1"."""
    return np.packbits(keep_V.astype(bool)).tobytes().hex()


def unpack_mask(kept: str, tokens: int) -> np.ndarray:
    """Return the bool mask [tokens] that `pack_mask` made."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(kept), np.uint8), count=tokens).astype(bool)
