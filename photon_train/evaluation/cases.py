"""A question and the answer it got, as every metric sees it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from photon_data.manifest import VIDEO_TAG
from photon_data.prompts import LETTERS
from photon_train.predictions import Prediction
from photon_train.rows import organ_masks_of

# A size is lengths with units, "30x13 mm"; it is scored as words too.
Form = Literal["yes-no", "choice", "number", "size", "text"]

# What 3D-RAD's own prompt puts before the answer of an open question.
_NO_CHOICE = "-. "
_SAID: dict[str, Form] = {"number": "number", "yes-no": "yes-no", "measurement": "size"}
_NUMBER_AND_UNIT = re.compile(r"[-+]?\d+(?:\.\d+)?\s*(?:mm|cm|HU|%|ml|cc|cm\^3)?", re.IGNORECASE)


@dataclass(frozen=True)
class Case:
    """One question with its response.

    form        what kind of answer is wanted; `closed`: its choices were put to the model
    label       the answer as the row has it ("B. No", "B" or "No"), what a strict comparison is made with
    answer      the answer's text ("No"); letter: its letter, "" for a question without choices
    prediction  where the response is from; of a baseline, an empty one
    organ_masks, lesion   names of the masks it asks about, where the row names some
    """

    id: str
    patient: str
    volume_id: str
    task: str
    subtask: str
    form: Form
    closed: bool
    question: str
    label: str
    answer: str
    letter: str
    choices: tuple[str, ...]
    response: str
    prediction: Prediction
    organ_masks: tuple[str, ...] = ()
    lesion: str = ""


def case_of(row: Mapping[str, Any], prediction: Prediction) -> Case:
    """Return the case of a manifest's row; a row without a patient stands for itself by its volume."""
    extra = row.get("extra") or {}
    label = str(row["answer"]).strip()
    answer = (extra.get("plain_answer") or label).strip()
    choices = tuple(row["choices"])
    closed = _is_closed(row, label, answer, choices)
    response = prediction.response.strip()
    if not closed and label.startswith(_NO_CHOICE):
        label, response = label.removeprefix(_NO_CHOICE), response.removeprefix(_NO_CHOICE)
    return Case(
        id=row["id"],
        patient=row["patient"] or row["volume_id"],
        volume_id=row["volume_id"],
        task=row["task"] or row["channel"],
        subtask=extra.get("subtask") or row["kind"],
        form=_form(extra.get("answer_type", ""), answer, choices, closed),
        closed=closed,
        question=extra.get("plain_question") or text_of(row),
        label=label,
        answer=answer,
        letter=extra.get("letter") or (LETTERS[choices.index(answer)] if answer in choices else ""),
        choices=choices,
        response=response,
        prediction=prediction,
        organ_masks=organ_masks_of(row),
        lesion=extra.get("lesion") or "",
    )


def text_of(row: Mapping[str, Any]) -> str:
    """Return the text of the user's turn, without the volume."""
    return str(row["messages"][0]["content"]).replace(VIDEO_TAG, "")


def _is_closed(row: Mapping[str, Any], label: str, answer: str, choices: tuple[str, ...]) -> bool:
    """Tell whether the choices were put: DeepTumorVQA has them for its free-text questions too, which do not show them."""
    if not choices or not (row.get("extra") or {}).get("mc_question"):
        return bool(choices)
    return label != answer or f"\nA. {choices[0]}" in text_of(row)


def _form(said: str, answer: str, choices: tuple[str, ...], closed: bool) -> Form:
    if {choice.lower() for choice in choices} == {"yes", "no"} or (not choices and answer.lower() in ("yes", "no")):
        return "yes-no"
    if closed:
        return "choice"
    if said in _SAID:
        return _SAID[said]
    return "number" if not said and _NUMBER_AND_UNIT.fullmatch(answer) else "text"


def as_text(case: Case, answer: str) -> str:
    """Return an answer as its text alone."""
    return answer


def as_letter(case: Case, answer: str) -> str:
    """Return an answer as its letter: "B"; "" where it is no choice of this question."""
    return LETTERS[case.choices.index(answer)] if answer in case.choices else ""


def as_letter_and_text(case: Case, answer: str) -> str:
    """Return an answer as "B. No"."""
    return f"{as_letter(case, answer)}. {answer}"


def as_label(case: Case, answer: str) -> str:
    """Return an answer written as the question's own label is."""
    if case.letter and case.label == case.letter:
        return as_letter(case, answer)
    return as_letter_and_text(case, answer) if case.letter and case.label.startswith(f"{case.letter}. ") else answer
