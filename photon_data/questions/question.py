"""A table of questions about volumes -> `Question`s, or one error that names everything wrong with the table.

How a question is put and which text answers it: plainly, or to the letter as a publisher's own evaluation does.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from photon_data.errors import UsageError, nearest_name
from photon_data.questions.table import TAG, Problem, Table, TableRow, read_table, refuse

# Columns with a meaning of their own; "kind", "organ" and "choices" live in Question.extra.
REQUIRED = ("volume", "question")
FIELDS = ("id", "volume", "question", "answer", "split", "patient", "task")
NAMES = (*FIELDS, "kind", "organ", "choices")


@dataclass(frozen=True, slots=True)
class Question:
    """One question about one volume.

    volume  what the table calls it: id, source path or file name (manifest.build joins it)
    answer, split, patient, task   None where the table has none
    extra   the remaining columns, verbatim; "choices", where there is such a column, as a list of texts
    dataset the data set it is of, where several are put together
    """

    id: str
    volume: str
    question: str
    answer: str | None = None
    split: str | None = None
    patient: str | None = None
    task: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    dataset: str | None = None


class _Layout(NamedTuple):
    """Which column of a table is what: {field of Question: column} and {key of Question.extra: column}."""

    fields: dict[str, str]
    extra: dict[str, str]


def read_questions(path: Path, columns: Mapping[str, str] | None = None) -> list[Question]:
    """Return the questions of a csv, tsv, jsonl or json table, in its order.

    `columns` maps our name to the table's, {"volume": "VolumeName"}; `volume` and `question` must be there. Texts of
    questions and answers are kept as they are; ids, volumes, splits, patients and tasks lose white space at both ends.
    Numbers of a json table become text as JSON writes them. A table without ids gets them made (`with_made_ids`).
    UsageError with all problems of the file together.
    """
    table = read_table(path)
    layout = _lay_out(path, table, columns or {})
    problems = list(table.problems)
    questions = [_to_question(row, layout, problems) for row in table.rows]
    has_ids = "id" in layout.fields
    if has_ids:
        problems += _check_ids(table.rows, questions)
    else:
        questions = with_made_ids(questions)
    for row, question in zip(table.rows, questions, strict=True):
        problems += _check(row.place, question, f"id {question.id!r}: " if has_ids else "")
    if problems:
        refuse(path, sorted(problems, key=lambda problem: problem.number))
    return questions


def with_made_ids(questions: list[Question]) -> list[Question]:
    """Return the questions with ids made from volume, question and the ordinal among repeats of these two.

    Repeats are counted in the order of their content, so that an id does not depend on where in a table its row stands.
    """
    repeats: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index, question in enumerate(questions):
        repeats[question.volume, question.question].append(index)
    made = list(questions)
    for (volume, text), indices in repeats.items():
        if len(indices) > 1:
            indices.sort(key=lambda index: _content(questions[index]))
        for ordinal, index in enumerate(indices):
            q = questions[index]  # not `replace`, which takes three times as long: tables have 100,000s of rows
            id_ = _make_id(volume, text, ordinal)
            made[index] = Question(id_, volume, text, q.answer, q.split, q.patient, q.task, q.extra, q.dataset)
    return made


def _make_id(volume: str, question: str, ordinal: int) -> str:
    # The letter keeps spreadsheets from taking an id for a number (12345678e90).
    text = json.dumps([volume, question, ordinal])
    return "q" + hashlib.sha256(text.encode()).hexdigest()[:16]


def _content(question: Question) -> str:
    fields = [question.answer, question.split, question.patient, question.task, question.extra]
    return json.dumps(fields, sort_keys=True)


def _lay_out(path: Path, table: Table, columns: Mapping[str, str]) -> _Layout:
    """Return which column is what; UsageError with the nearest name for each that is not there."""
    named = {
        name: columns.get(name, name) for name in NAMES if name in columns or name in table.columns or name in REQUIRED
    }
    wrong = [_unknown_name(name) for name in columns if name not in NAMES]
    if table.rows:
        wrong += [
            _missing(name, column, table.columns) for name, column in named.items() if column not in table.columns
        ]
    used = set(named.values())
    rest = {column: column for column in table.columns if column not in used}
    fields = {name: column for name, column in named.items() if name in FIELDS}
    special = {name: column for name, column in named.items() if name not in FIELDS}
    wrong += [
        f"{name!r} is a column and {special[name]!r} is mapped to it too; rename one"
        for name in special
        if name in rest
    ]
    if wrong:
        found = f"{path}: columns not as wanted; the table has {', '.join(table.columns)}"
        raise UsageError("\n  ".join([found, *wrong]))
    return _Layout(fields, special | rest)


def _unknown_name(name: str) -> str:
    near = nearest_name(name, NAMES)
    hint = f"did you mean {near!r}?" if near else "other columns are kept as they are"
    return f"one of {', '.join(NAMES)} wanted before '=', got {name!r}; {hint}"


def _missing(name: str, column: str, columns: Collection[str]) -> str:
    near = nearest_name(column, columns)
    hint = f"say {name}={near}" if near else f"say which column it is, as {name}=COLUMN"
    return f"column {column!r} wanted for {name}, not found; {hint}"


def _to_question(row: TableRow, layout: _Layout, problems: list[Problem]) -> Question:
    """Return the question of a row, without an id where the table has none; what is of a wrong type goes to `problems`."""

    def read(name: str, column: str, convert: Callable[[Any], Any], fallback: Any) -> Any:
        try:
            return convert(row.values.get(column))
        except ValueError as error:
            problems.append(Problem(row.place, f"{name} of another type", f"{name}: {error}"))
            return fallback  # which `_check` does not complain about

    texts = {name: read(name, column, _to_text, "?") for name, column in layout.fields.items()}
    extra = {name: row.values[column] for name, column in layout.extra.items() if column in row.values}
    if "choices" in layout.extra:
        extra["choices"] = read("choices", layout.extra["choices"], _to_choices, [])
    names = {name: texts.get(name, "").strip() for name in FIELDS if name not in ("question", "answer")}
    answer = texts.get("answer", "")
    return Question(
        id=names["id"],
        volume=names["volume"],
        question=texts["question"],
        answer=answer if answer.strip() else None,
        split=names["split"] or None,
        patient=names["patient"] or None,
        task=names["task"] or None,
        extra=extra,
    )


def _to_text(value: Any) -> str:
    """Return a text or number as text, null as ""; ValueError for anything else."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(
            f'text or a number wanted, got {json.dumps(value)[:60]}; write it as a text, "Yes" for example'
        )
    return json.dumps(value)


def _to_choices(value: Any) -> list[str]:
    """Return choices as texts: from a list, the text of a JSON list, or texts with "|" between; ValueError for one alone."""
    if isinstance(value, str):
        value = (
            json.loads(value)
            if value.lstrip().startswith("[")
            else [part.strip() for part in value.split("|") if part.strip()]
        )
    choices = [_to_text(choice) for choice in value or []]
    if len(choices) == 1 or not all(choice.strip() for choice in choices):
        raise ValueError(f"two or more texts wanted, got {choices}; write them as A|B|C or as a JSON list")
    return choices


def _check(place: str, question: Question, who: str) -> Iterator[Problem]:
    """Yield what is wrong with one question by itself; `who` names it by the id it has in the table, if any."""
    for name in REQUIRED:
        if not getattr(question, name).strip():
            yield Problem(place, f"empty {name}", f"{who}a {name} wanted, got none; fill it in or leave the row out")
    for text in (question.question, question.answer or "", *question.extra.get("choices", ())):
        found = TAG.search(text)
        if found:
            yield Problem(place, "tag in a text", f"{who}text without tags wanted, got a literal {found[0]}; remove it")


def _check_ids(rows: list[TableRow], questions: list[Question]) -> Iterator[Problem]:
    """Yield a problem for every question without an id or with the id of an earlier one."""
    first: dict[str, str] = {}
    for row, question in zip(rows, questions, strict=True):
        if not question.id:
            yield Problem(
                row.place, "empty id", "an id wanted, got none; fill it in, or drop the column to have ids made"
            )
        elif question.id in first:
            said = f"ids that occur once wanted, got {question.id!r} again, first used at {first[question.id]}"
            yield Problem(row.place, "duplicate id", said)
        else:
            first[question.id] = row.place


LETTERS = "ABCDEFGH"


class Put(NamedTuple):
    """The text of the user's turn, and of the answer to it."""

    question: str
    answer: str | None


def with_prompt_style(questions: Iterable[Question], style: str, choices: str) -> list[Question]:
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
