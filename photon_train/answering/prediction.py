"""What a row asks, and one answer to it: a prediction, which is a line of the file that `photon eval` reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from photon_data.errors import UsageError
from photon_data.files import jsonl_bytes
from photon_data.json_text import fields_of, from_json
from photon_data.questions.table import read_text

Row = Mapping[str, Any]


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


MOST_TOKENS = 1 << 31


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
