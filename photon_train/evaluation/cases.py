"""A case: a question of the data with its response, joined by id. What cannot be joined is an error, or is counted."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from photon_data.errors import UsageError
from photon_data.questions.question import LETTERS, SCAN_SUFFIX
from photon_data.questions.table import VIDEO_TAG
from photon_train.evaluation.parsing import parse_choice
from photon_train.rows import Prediction, Row, choices_of, organ_masks_of, plain_row, prompt_of, question_digest

if TYPE_CHECKING:  # scores are made without waiting for transformers
    from photon_train.configuration_photon import PhotonConfig

K = TypeVar("K")
V = TypeVar("V")
AnyRow = TypeVar("AnyRow", bound=Row)

# A size is lengths with units, "30x13 mm"; it is scored as text too.
Form = Literal["yes-no", "choice", "number", "size", "text"]


@dataclass(frozen=True)
class Case:
    """One question with its response."""

    id: str
    patient: str
    volume_id: str
    task: str
    subtask: str
    form: Form  # what kind of answer is expected
    closed: bool  # the question showed its choices
    question: str
    label: str  # the answer as the row has it ("B. No", "B" or "No"), which a strict comparison is made with
    answer: str  # its text ("No")
    letter: str  # of the answer, "" for a question without choices
    lettered: bool  # the question or its label has the letters of the choices, so that a response can have them
    choices: tuple[str, ...]
    response: str
    prediction: Prediction  # that the response is from; of a baseline, an empty one
    organ_masks: tuple[str, ...] = ()  # names of the masks it asks about, where the row names some
    lesion: str = ""  # name of the mask of a lesion, likewise

    @property
    def answer_is_no_choice(self) -> bool:
        """Whether no response can be right: the row is a bad one."""
        return self.closed and self.answer not in self.choices


@dataclass(frozen=True)
class Gaps:
    """Ids, sorted, of what could not be joined, and the number of questions."""

    questions: int
    missing: tuple[str, ...] = ()  # questions without a prediction
    failed: tuple[str, ...] = ()  # questions whose prediction is an error
    repeated: tuple[str, ...] = ()  # questions with more than one prediction: none of them counts
    changed: tuple[str, ...] = ()  # questions whose prediction answers another question, or is about another volume
    unknown: tuple[str, ...] = ()  # predictions of questions that are not in the data

    @property
    def unscored(self) -> int:
        """How many questions have no score."""
        return len(self.missing) + len(self.failed) + len(self.repeated) + len(self.changed)

    def __bool__(self) -> bool:
        return bool(self.unscored or self.unknown)

    def sentence(self) -> str:
        """Return what every table says of the gaps; "" where there are none."""
        counts = ", ".join(f"{len(ids)} {name}" for field, (name, _) in _GAPS.items() if (ids := getattr(self, field)))
        scored = f"{self.questions - self.unscored} of {self.questions} questions are scored"
        return f"PARTIAL: {scored}; predictions: {counts}" if self else ""


# How the sentence of a table and the list of an error name each kind of gap.
_GAPS = {
    "missing": ("missing", "without a prediction"),
    "failed": ("failed", "whose prediction is an error"),
    "repeated": ("repeated", "predicted more than once"),
    "changed": ("of other questions", "whose prediction answers another question or volume"),
    "unknown": ("of unknown ids", "not in the data"),
}


class Joined(NamedTuple):
    """Cases by id, and what is not among them."""

    cases: tuple[Case, ...]
    gaps: Gaps


class Answered(NamedTuple):
    """A file of predictions, what is in it, and by edit what was answered on edited volumes."""

    path: Path
    predictions: Sequence[Prediction]
    on_edited: Mapping[str, Sequence[Prediction]] = {}


# Rows -> what answers them, and the configuration of the model that made it, if that is known.
Answering = Callable[[list[dict[str, Any]]], tuple[Sequence[Answered], "PhotonConfig | None"]]


def join(questions: Mapping[str, Row], predictions: Iterable[Prediction], *, allow_partial: bool = False) -> Joined:
    """Return a case for every question with a prediction, sorted by id: the order of neither file matters.

    `questions` are those of `rows_by_id`. UsageError, which lists ids, for gaps. With `allow_partial` questions with
    gaps are left out; UsageError if then nothing is left.
    """
    predictions = list(predictions)
    times = Counter(p.id for p in predictions)
    single = {p.id: p for p in predictions if times[p.id] == 1 and p.id in questions}
    failed = {id for id, p in single.items() if p.error}
    changed = {id for id, p in single.items() if p.asked and not p.can_answer(question_digest(questions[id]))} - failed
    gaps = Gaps(
        questions=len(questions),
        missing=tuple(sorted(questions.keys() - times.keys())),
        failed=tuple(sorted(failed)),
        repeated=tuple(sorted(id for id, count in times.items() if count > 1 and id in questions)),
        changed=tuple(sorted(changed)),
        unknown=tuple(sorted(times.keys() - questions.keys())),
    )
    if gaps and not allow_partial:
        listed = [_listed(what, ids) for field, (_, what) in _GAPS.items() if (ids := getattr(gaps, field))]
        expected = f"expected one prediction for each of {gaps.questions} questions, found ids"
        raise UsageError("\n  ".join([expected, *listed]) + "\nallow partial results to leave them out")
    cases = [case_of(questions[id], single[id]) for id in sorted(single.keys() - failed - changed)]
    if not cases:
        raise UsageError(f"expected predictions of the data's questions, found none. {gaps.sentence()}")
    return Joined(tuple(cases), gaps)


def scored_row(row: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Return a `plain_row` with the columns that scoring reads. UsageError for what is no row of messages.

    Where columns of ours are missing, the answer is what the assistant says last, and the names of the volumes stand
    for their id and for the patient.
    """
    plain = plain_row(row, place)
    messages, names = plain["messages"], [volume_name(str(video)) for video in plain["videos"]]
    if not isinstance(messages, list) or not all(
        isinstance(one, Mapping) and all(isinstance(one.get(name), str) for name in ("role", "content"))
        for one in messages
    ):
        found = f"{str(messages)[:80]!r} in {place}; see docs/manifests.md"
        raise UsageError(f"expected a row with messages, each with the texts role and content, found {found}")
    said = messages[-1]["content"] if messages and messages[-1]["role"] == "assistant" else ""
    missing: dict[str, Any] = {"channel": place.rpartition("-")[0], "task": "", "kind": "", "choices": []}
    missing |= {"volume_id": names[0] if len(names) == 1 else "", "patient": " ".join(names), "answer": said}
    return missing | {name: value for name, value in plain.items() if value is not None}


def volume_name(path: str) -> str:
    """Return the name that a path ends in, without the suffix of a scan or a store."""
    name = PurePosixPath(path.replace("\\", "/").rstrip("/")).name.removesuffix(".ome.zarr")
    return SCAN_SUFFIX.sub("", name)


def rows_by_id(rows: Iterable[AnyRow]) -> dict[str, AnyRow]:
    """Return the rows by id, in order; UsageError for an id that occurs twice, or a row without an answer."""
    found = list(rows)
    repeated = sorted(id for id, count in Counter(row["id"] for row in found).items() if count > 1)
    if repeated:
        raise UsageError(f"expected every question once in the data, found {_listed('that occur again', repeated)}")
    blank = sorted(row["id"] for row in found if not row["answer"])
    if blank:
        raise UsageError(f"expected questions with an answer in the data, found {_listed('without one', blank)}")
    other = sorted(row["id"] for row in found if case_of(row, Prediction(row["id"])).answer_is_no_choice)
    if other:
        what = _listed("whose answer is none of their choices", other)
        raise UsageError(f"expected answers that are one of the choices, found {what}; correct or remove these rows")
    return {row["id"]: row for row in found}


def _listed(what: str, ids: Sequence[str]) -> str:
    return f"{len(ids)} {what}: {', '.join(ids[:10])}" + (f" and {len(ids) - 10} more" if len(ids) > 10 else "")


# What 3D-RAD's own prompt puts before the answer of an open question.
_OPEN_ANSWER = "-. "
_FORMS: dict[str, Form] = {"number": "number", "yes-no": "yes-no", "measurement": "size"}  # by the row's "answer_type"
_NUMBER_AND_UNIT = re.compile(r"[-+]?\d+(?:\.\d+)?\s*(?:mm|cm|HU|%|ml|cc|cm\^3)?", re.IGNORECASE)
_SIDE = r"[\d.,]+(?: ?(?:mm|cm))?"
_SIDES = re.compile(rf"{_SIDE}(?: *[x×*] *{_SIDE})+(?<=m)", re.IGNORECASE)  # "30x13 mm"
_FIRST_LETTER = re.compile(r"(?<!\w)A ?[.:)]")


def case_of(row: Row, prediction: Prediction) -> Case:
    """Return the case of a manifest's row; a row without a patient counts its volume as its patient."""
    extra = row.get("extra") or {}
    text, label = prompt_of(row).replace(VIDEO_TAG, ""), str(row["answer"]).strip()
    answer, choices = (extra.get("plain_answer") or label).strip(), choices_of(row)
    closed = bool(choices)
    # DeepTumorVQA's free-text questions have choices too, which they do not show.
    if choices and extra.get("mc_question"):
        closed = label != answer or f"\nA. {choices[0]}" in text
    # A table may have the letter for an answer, or "left" for "Left".
    if closed and answer not in choices and (meant := parse_choice(answer, choices)) is not None:
        answer = choices[meant]
    letter = extra.get("letter") or (LETTERS[choices.index(answer) :][:1] if answer in choices else "")
    response = prediction.response.strip()
    if not closed and label.startswith(_OPEN_ANSWER):
        label, response = label.removeprefix(_OPEN_ANSWER), response.removeprefix(_OPEN_ANSWER)
    case = Case(
        id=row["id"],
        patient=row["patient"] or row["volume_id"],
        volume_id=row["volume_id"],
        task=row["task"] or row["channel"],
        subtask=extra.get("subtask") or row["kind"],
        form=_form(extra.get("answer_type", ""), answer, choices, closed),
        closed=closed,
        question=extra.get("plain_question") or text,
        label=label,
        answer=answer,
        letter=letter,
        lettered=closed and bool(_FIRST_LETTER.search(text) or (letter and label[:2] in (letter, f"{letter}."))),
        choices=choices,
        response=response,
        prediction=prediction,
        organ_masks=organ_masks_of(row),
        lesion=extra.get("lesion") or "",
    )
    return replace(case, response=as_label(case, response)) if _was_chosen(case) else case


def _was_chosen(case: Case) -> bool:
    """Return whether the response is the choice with the highest score: it has no wording of its own then."""
    scores = case.prediction.choice_scores
    return (
        case.closed
        and case.response in case.choices
        and case.response == max(scores, key=scores.__getitem__, default="")
    )


def _form(answer_type: str, answer: str, choices: tuple[str, ...], closed: bool) -> Form:
    if {choice.lower() for choice in choices} == {"yes", "no"} or (not choices and answer.lower() in ("yes", "no")):
        return "yes-no"
    if closed:
        return "choice"
    is_number = not answer_type and _NUMBER_AND_UNIT.fullmatch(answer)
    is_size = not answer_type and _SIDES.fullmatch(answer)
    return _FORMS.get(answer_type, "number" if is_number else "size" if is_size else "text")


def as_letter(case: Case, answer: str) -> str:
    """Return an answer as its letter: "B"; "" where it is no choice of this question."""
    return LETTERS[case.choices.index(answer) :][:1] if answer in case.choices else ""


def as_letter_and_text(case: Case, answer: str) -> str:
    """Return an answer as "B. No"."""
    return f"{as_letter(case, answer)}. {answer}"


def as_label(case: Case, answer: str) -> str:
    """Return an answer written as the question's own label is."""
    if case.letter and case.label == case.letter:
        return as_letter(case, answer)
    return as_letter_and_text(case, answer) if case.letter and case.label.startswith(f"{case.letter}. ") else answer


def grouped(values: Iterable[V], key: Callable[[V], K]) -> dict[K, list[V]]:
    """Return the values (cases, say) by key, in order of first appearance."""
    groups: dict[K, list[V]] = defaultdict(list)
    for value in values:
        groups[key(value)].append(value)
    return dict(groups)
