"""Questions and predictions, joined by id: what is missing, repeated or too much is an error, or counted and said.

A question and the answer it got, as every metric sees it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from photon_data.errors import UsageError
from photon_data.questions.manifest import VIDEO_TAG
from photon_data.questions.question import LETTERS
from photon_train.answering.prediction import Prediction
from photon_train.rows import asked_of, organ_masks_of

SHOWN = 10


@dataclass(frozen=True)
class Gaps:
    """Ids, sorted, of what could not be joined.

    missing     questions without a prediction
    failed      questions whose prediction is an error
    repeated    questions with more than one prediction: none of them counts
    changed     questions whose prediction answers another question, or the same of another volume
    unknown     predictions of questions that are not in the data
    """

    questions: int
    missing: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    @property
    def unscored(self) -> int:
        """How many questions have no score."""
        return len(self.missing) + len(self.failed) + len(self.repeated) + len(self.changed)

    def __bool__(self) -> bool:
        return bool(self.unscored or self.unknown)

    def sentence(self) -> str:
        """What every table says of them; "" where there are none."""
        if not self:
            return ""
        parts = {
            "missing": self.missing,
            "failed": self.failed,
            "repeated": self.repeated,
            "of other questions": self.changed,
            "of unknown ids": self.unknown,
        }
        counts = ", ".join(f"{len(ids)} {name}" for name, ids in parts.items() if ids)
        return f"PARTIAL: {self.questions - self.unscored} of {self.questions} questions are scored; predictions: {counts}"


@dataclass(frozen=True)
class Joined:
    """Cases by id, and what is not among them."""

    cases: tuple[Case, ...]
    gaps: Gaps


def join(rows: Iterable[Mapping[str, Any]], predictions: Iterable[Prediction], *, allow_partial: bool = False) -> Joined:
    """Return a case for every question with a prediction, sorted by id: the order of neither file matters.

    UsageError, listing ids, for a question that occurs twice; for missing, failed, repeated and unknown predictions, and those
    that say they answer another question, too unless `allow_partial`, which leaves those questions out. UsageError if then
    nothing is left.
    """
    asked = by_id(rows)
    answers = list(predictions)
    times = Counter(prediction.id for prediction in answers)
    given = {prediction.id: prediction for prediction in answers if times[prediction.id] == 1}
    failed = {id for id, prediction in given.items() if prediction.error and id in asked}
    changed = {id for id, p in given.items() if p.asked and id in asked and not p.answers(asked_of(asked[id]))} - failed
    gaps = Gaps(
        questions=len(asked),
        missing=tuple(sorted(asked.keys() - times.keys())),
        failed=tuple(sorted(failed)),
        repeated=tuple(sorted(id for id, count in times.items() if count > 1 and id in asked)),
        changed=tuple(sorted(changed)),
        unknown=tuple(sorted(times.keys() - asked.keys())),
    )
    if gaps and not allow_partial:
        raise UsageError(_complaint(gaps))
    cases = [case_of(asked[id], given[id]) for id in sorted(asked.keys() & given.keys() - failed - changed)]
    if not cases:
        raise UsageError(f"predictions of the data's questions wanted, got none. {gaps.sentence()}")
    return Joined(tuple(cases), gaps)


def by_id(rows: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return the rows by id; UsageError for an id that occurs twice, or a row without an answer to compare with."""
    asked: dict[str, Mapping[str, Any]] = {}
    twice, blank = [], []
    for row in rows:
        twice += [row["id"]] if row["id"] in asked else []
        blank += [] if row["answer"] else [row["id"]]
        asked[row["id"]] = row
    for ids, wanted in ((twice, "every question once"), (blank, "questions with an answer")):
        if ids:
            raise UsageError(f"{wanted} wanted in the data, got {_listed('otherwise', sorted(set(ids)))}")
    return asked


def _complaint(gaps: Gaps) -> str:
    lists = [
        _listed("without a prediction", gaps.missing),
        _listed("whose prediction is an error", gaps.failed),
        _listed("predicted more than once", gaps.repeated),
        _listed("whose prediction answers another question or volume", gaps.changed),
        _listed("not in the data", gaps.unknown),
    ]
    found = "\n  ".join(line for line in lists if line)
    return f"one prediction for each of {gaps.questions} questions wanted, got ids\n  {found}\nallow partial results to go on"


def _listed(what: str, ids: Sequence[str]) -> str:
    """Return "2 what: a, b", "" for no ids."""
    rest = f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else ""
    return f"{len(ids)} {what}: {', '.join(ids[:SHOWN])}{rest}" if ids else ""


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
