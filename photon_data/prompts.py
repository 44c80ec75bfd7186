"""How a question is put and which text answers it: plainly, or to the letter as a publisher's own evaluation does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

from photon_data.questions import Question

LETTERS = "ABCDEFGH"


class Put(NamedTuple):
    """The text of the user's turn, and of the answer to it."""

    question: str
    answer: str | None


def put(questions: Iterable[Question], style: str, choices: str) -> list[Question]:
    """Return the questions as the style (a key of PROMPTS) puts them, with choices "shown" or "hidden".

    What a style changed stays in `extra`, under "plain_question" and "plain_answer".
    """
    return [_put(question, PROMPTS[style], choices == "shown") for question in questions]


def _put(question: Question, style: Callable[[Question, bool], Put], shown: bool) -> Question:
    text, answer = style(question, shown)
    if (text, answer) == (question.question, question.answer):
        return question
    extra = {**question.extra, "plain_question": question.question, "plain_answer": question.answer or ""}
    return replace(question, question=text, answer=answer, extra=extra)


def _plain(question: Question, shown: bool) -> Put:
    """The question, its choices by letter on lines below where they are shown; the answer is the text in either case."""
    choices = question.extra.get("choices") or []
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)] if shown else []
    return Put("\n".join([question.question, *lines]), question.answer)


def _rad3d(question: Question, shown: bool) -> Put:
    """3D-RAD's own evaluation of M3D and RadFM, which has four choices for every question, "-" where there is none.

    "Choices: A. Yes B. No C. - D. -" -> "B. No"; of an open question, "Choices: A. - B. - C. - D. -" -> "-. Upper lobes."
    """
    choices = [*question.extra.get("choices", ()), "-", "-", "-", "-"][:4]
    listed = " ".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
    text = f"{question.question}\nChoices: {listed}\nAnswer:"
    return Put(text, question.answer and f"{question.extra.get('letter') or '-'}. {question.answer}")


# The last line of DeepTumorVQA's prompts, by type of answer.
_ASKED_FOR = {
    "number": "Answer with a single number (no units, no extra words).",
    "yes-no": "Answer with 'yes' or 'no'.",
    "text": "Answer with the most appropriate short phrase.",
}


def _deeptumorvqa(question: Question, shown: bool) -> Put:
    """DeepTumorVQA v2's own prompt for volumes: with choices shown, its multiple-choice question and the letter; else free."""
    extra = question.extra
    lines = ["You are given the full 3D abdominal CT volume (NIfTI, native voxel spacing)."]
    known = ", ".join(f"{name}={extra[name]}" for name in ("sex", "age", "scanner", "contrast") if extra.get(name))
    lines += [f"Patient: {known}."] if known else []
    if extra.get("answer_type") == "number" and extra.get("spacing"):
        lines.append(f"Voxel spacing (mm): {extra['spacing']}.  Volume shape: {extra.get('shape', '')}.")
    if shown and extra.get("mc_question"):
        lines += [extra["mc_question"], "Answer with ONLY the single letter (A, B, C, or D)."]
        return Put("\n".join(lines), extra.get("letter"))
    lines += [question.question, _ASKED_FOR.get(extra.get("answer_type", ""), _ASKED_FOR["text"])]
    return Put("\n".join(lines), question.answer)


def _letters(question: Question, shown: bool) -> Put:
    """The multiple-choice text as published, choices inline, and the letter; what has no choices stays plain.

    It is the form of DeepTumorVQA v1's multiple-choice table.
    """
    extra = question.extra
    if not extra.get("letter"):
        return _plain(question, shown)
    return Put(extra.get("mc_question") or _plain(question, True).question, extra["letter"])


PROMPTS: Mapping[str, Callable[[Question, bool], Put]] = MappingProxyType(
    {"plain": _plain, "letters": _letters, "3d-rad": _rad3d, "deeptumorvqa": _deeptumorvqa}
)
