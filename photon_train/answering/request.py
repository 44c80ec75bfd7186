"""Rows -> requests: what is asked, without its given answer; those that share a prefix form a group.

Legend: L tokens of a row, N tokens of an answer.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from photon_data.errors import UsageError
from photon_data.questions.question import LETTERS
from photon_train.answering.prediction import Row, choices_of, prompt_of, question_digest, without_answer
from photon_train.scheduling import prefix_length

# A prompt that wants a letter, of a row that has no answer to show it; and 3D-RAD's, which wants "B. No".
WANTS_LETTER = re.compile(r"\bletter\b", re.IGNORECASE)
WANTS_LETTERED = re.compile(r"\bChoices: A\. .*\nAnswer:\s*$", re.DOTALL)


class Request(NamedTuple):
    """A row to answer, without its given answer."""

    row: Row
    suffix_L: Tensor  # int64, the ids behind the shared prefix
    digest: str  # the `question_digest` of the row
    start: int = 0  # tokens of the shared prefix

    @property
    def id(self) -> str:
        """The row's id."""
        return str(self.row["id"])


class RequestGroup(NamedTuple):
    """Requests on one prefix."""

    videos: tuple[Any, ...]  # paths or Volumes; none for text alone
    requests: list[Request]

    @property
    def name(self) -> str:
        """The paths of the volumes; "" for text alone, and for volumes in memory."""
        return "\n".join(str(video) for video in self.videos if isinstance(video, str | Path))

    @property
    def shape(self) -> tuple[int, int]:
        """Tokens of the prefix and number of volumes. Groups that agree in both can share a batch."""
        return self.requests[0].start, len(self.videos)


def request_of(row: Row, processor: Any) -> Request:
    """Return the row as a request of a PhotonProcessor, without its answer. ValueError for one that cannot be asked."""
    question = without_answer(row)
    ids_L = processor.ids(question)
    start = prefix_length(ids_L, processor.config)
    return Request(question, ids_L[start:].clone(), question_digest(row), start)


def texts_of_choices(row: Row) -> dict[str, str]:
    """Return {choice: what the assistant says for it}, in the form that the prompt asks for and the answer has.

    choices Yes, No: answer "No" -> {"Yes": "Yes", "No": "No"}; "B" -> {"Yes": "A", "No": "B"}; "B. No" -> "A. Yes", ...
    Of a row without an answer the prompt tells the form. UsageError for more choices than letters.
    """
    choices, answer = choices_of(row), str(row.get("answer") or "").strip()
    letters = dict(zip(choices, LETTERS, strict=False))
    lettered = {choice: f"{letter}. {choice}" for choice, letter in letters.items()}
    prompt = prompt_of(row)
    if answer in choices or (answer and answer not in (*letters.values(), *lettered.values())):
        return {choice: choice for choice in choices}
    wants_letter = answer in letters.values() if answer else bool(WANTS_LETTER.search(prompt))
    wants_lettered = answer in lettered.values() if answer else bool(WANTS_LETTERED.search(prompt))
    if (wants_letter or wants_lettered) and len(choices) > len(LETTERS):
        found = f"found {len(choices)}"
        raise UsageError(f"{row.get('id')}: expected at most {len(LETTERS)} choices of a prompt with letters, {found}")
    return letters if wants_letter else lettered if wants_lettered else {choice: choice for choice in choices}


def answer_ids(request: Request, text: str, processor: Any) -> Tensor:
    """Return int64[N]: the ids that the assistant answers `text` with, the end marker included, as training sees them.

    ValueError where the text changes how the prompt itself becomes ids.
    """
    answered = {**request.row, "messages": [*request.row["messages"], {"role": "assistant", "content": text}]}
    ids_L, prompt_L = processor.ids(answered, for_training=True), processor.ids(request.row)
    if not ids_L[: len(prompt_L)].equal(prompt_L):
        expected = "an answer that leaves the prompt's tokens as they are"
        raise ValueError(f"{request.id}: expected {expected}, found {text!r}; remove space at its start")
    end = int((ids_L == processor.config.im_end_token_id).nonzero()[-1]) + 1
    return ids_L[len(prompt_L) : end]
