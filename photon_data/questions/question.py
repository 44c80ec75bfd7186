"""A question about a volume, its id, and its wording: plain, or as in a publisher's own evaluation."""

from __future__ import annotations

import hashlib
import json
import string
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

LETTERS = string.ascii_uppercase
# What the `volume` of a question begins with that names no scan of its source: no id does, so it never gets a row.
UNKNOWN = "?"


@dataclass(frozen=True, slots=True)
class Question:
    """One question about one volume. What the table does not say is None."""

    id: str
    volume: str  # its id, its source path or its file name: `manifest.by_name` finds it
    question: str
    answer: str | None = None
    split: str | None = None
    patient: str | None = None
    task: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)  # other columns, verbatim, but "choices" is a list of texts
    dataset: str | None = None  # the name of its data set, where there are several


def with_made_ids(questions: list[Question]) -> list[Question]:
    """Return the questions with ids made from volume, question and, where these two repeat, a number.

    Repeats are numbered by their content: an id does not depend on where its row stands in a table.
    """

    def content(index: int) -> str:
        q = questions[index]
        return json.dumps([q.answer, q.split, q.patient, q.task, q.extra], sort_keys=True)

    repeats: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index, question in enumerate(questions):
        repeats[question.volume, question.question].append(index)
    made = list(questions)
    for (volume, text), indices in repeats.items():
        if len(indices) > 1:
            indices.sort(key=content)
        for number, index in enumerate(indices):
            digest = hashlib.sha256(json.dumps([volume, text, number]).encode()).hexdigest()
            id_ = f"q{digest[:16]}"  # without the letter, spreadsheets read 12345678e90 as a number
            q = questions[index]  # not `replace`, which takes three times as long: tables have 100,000s of rows
            made[index] = Question(id_, volume, text, q.answer, q.split, q.patient, q.task, q.extra, q.dataset)
    return made


def with_prompt_style(questions: Iterable[Question], style: str, choices: str) -> list[Question]:
    """Return the questions in a style of prompt (a key of PROMPTS), with choices "shown" or "hidden".

    What the style replaced stays in `extra`, as "plain_question" and "plain_answer".
    """
    made = []
    for question in questions:
        text, answer = PROMPTS[style](question, choices == "shown")
        if (text, answer) != (question.question, question.answer):
            plain = {"plain_question": question.question, "plain_answer": question.answer or ""}
            question = replace(question, question=text, answer=answer, extra=question.extra | plain)
        made.append(question)
    return made


def _plain(question: Question, shown: bool) -> tuple[str, str | None]:
    """The question, and below it its choices by letter if they are shown. The answer is the text of the choice."""
    choices = question.extra.get("choices") or []
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)] if shown else []
    return "\n".join([question.question, *lines]), question.answer


def _letters(question: Question, shown: bool) -> tuple[str, str | None]:
    """DeepTumorVQA v1's form: the published multiple-choice text, and the letter; plain where there are no choices."""
    if not (letter := _letter_of(question)):
        return _plain(question, shown)
    return str(question.extra.get("mc_question") or _plain(question, True)[0]), letter


def _rad3d(question: Question, shown: bool) -> tuple[str, str | None]:
    """The form of 3D-RAD's own evaluation of M3D and RadFM: four choices for every question, "-" for a missing one.

    "Choices: A. Yes B. No C. - D. -" -> "B. No"; open questions: "Choices: A. - B. - C. - D. -" -> "-. Upper lobes."
    """
    choices = [*question.extra.get("choices", ()), "-", "-", "-", "-"][:4]
    listed = " ".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
    text = f"{question.question}\nChoices: {listed}\nAnswer:"
    return text, question.answer and f"{_letter_of(question) or '-'}. {question.answer}"


def _letter_of(question: Question) -> str:
    """Return the letter of the answer: its own, else that of its place among the choices; "" where it is none."""
    by_place = {choice: letter for letter, choice in zip(LETTERS, question.extra.get("choices") or (), strict=False)}
    return str(question.extra.get("letter") or by_place.get(question.answer, ""))


# The last line of DeepTumorVQA's prompts, by type of answer.
_ANSWER_WITH = {
    "number": "Answer with a single number (no units, no extra words).",
    "yes-no": "Answer with 'yes' or 'no'.",
    "text": "Answer with the most appropriate short phrase.",
}


def _deeptumorvqa(question: Question, shown: bool) -> tuple[str, str | None]:
    """DeepTumorVQA v2's own prompt for volumes: the multiple-choice question and its letter if choices are shown."""
    extra = question.extra
    lines = ["You are given the full 3D abdominal CT volume (NIfTI, native voxel spacing)."]
    known = ", ".join(f"{name}={extra[name]}" for name in ("sex", "age", "scanner", "contrast") if extra.get(name))
    lines += [f"Patient: {known}."] if known else []
    if extra.get("answer_type") == "number" and extra.get("spacing"):
        lines.append(f"Voxel spacing (mm): {extra['spacing']}.  Volume shape: {extra.get('shape', '')}.")
    if shown and extra.get("mc_question"):
        lines += [str(extra["mc_question"]), "Answer with ONLY the single letter (A, B, C, or D)."]
        return "\n".join(lines), _letter_of(question) or None
    lines += [question.question, _ANSWER_WITH.get(extra.get("answer_type", ""), _ANSWER_WITH["text"])]
    return "\n".join(lines), question.answer


# Styles of prompt: a question, and whether its choices are shown -> the text of the user, the text of the assistant.
PROMPTS = {"plain": _plain, "letters": _letters, "3d-rad": _rad3d, "deeptumorvqa": _deeptumorvqa}
