"""A question about a volume: its id, how a table gives it, which volume it names, and how it is worded.

A prompt is plain, or as in a publisher's own evaluation. A table gives all its questions, or one error with everything
that is wrong in it.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import io
import json
import math
import re
import string
import tokenize
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from photon_data.errors import UsageError, first_few, name_hint, nearest_name
from photon_data.json_text import from_json
from photon_data.questions.table import TAG, Problem, Table, TableRow, as_name, read_table, refuse

LETTERS = string.ascii_uppercase
# What the `volume` of a question begins with that names no scan of its source: no id does, so it never gets a row.
UNKNOWN = "?"


@dataclass(frozen=True, slots=True)
class Question:
    """One question about one volume. What the table does not say is None."""

    id: str
    volume: str  # its id, its source path or its file name: `by_name` finds it
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


# --- a table of questions

# Columns with a meaning of their own: those that are fields of Question, and those that are keys of Question.extra.
FIELDS = ("id", "volume", "question", "answer", "split", "patient", "task")
NAMES = (*FIELDS, "kind", "organ", "choices")
REQUIRED = ("volume", "question")


def read_questions(path: Path, columns: Mapping[str, str] | None = None) -> list[Question]:
    """Return the questions of a csv, tsv, jsonl, json or parquet table, in its order.

    `columns` maps our names to the table's: {"volume": "VolumeName"}; `volume` and `question` are required. Questions
    and answers are kept to the letter, and other fields lose white space at both ends. Numbers of a json table become
    text as JSON writes them. A patient is one person in every Unicode form of the name. A table without ids gets them
    from `with_made_ids`. UsageError with all problems of the file.
    """
    table = read_table(path)
    fields, extra = _find_columns(path, table, columns or {})
    problems = list(table.problems)
    questions = [_to_question(row, fields, extra, problems) for row in table.rows]
    first_places: dict[str, str] = {}
    for row, question in zip(table.rows, questions, strict=True):
        who = f"id {question.id!r}: " if "id" in fields else ""
        if who and not question.id:
            text = "expected an id, found none; fill it in, or drop the column to have ids made"
            problems.append(Problem(row.place, "empty id", text))
        elif who and first_places.setdefault(question.id, row.place) != row.place:
            text = f"expected ids that occur once, found {question.id!r} again, first used at "
            problems.append(Problem(row.place, "duplicate id", text + first_places[question.id]))
        problems += _check_texts(row.place, question, who)
    if problems:
        refuse(path, sorted(problems, key=lambda problem: problem.number))
    return questions if "id" in fields else with_made_ids(questions)


def _find_columns(path: Path, table: Table, columns: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return {field of Question: column} and {key of Question.extra: column}; UsageError with all that is wrong."""
    if len(table.columns) == 1:
        remedy = "put ',' or ';' between the cells of a csv, or say in its first line what is between them, as sep=^"
        raise UsageError(f"{path}: expected columns, found one, {table.columns[0][:60]!r}; {remedy}")
    used = {name: columns.get(name, name) for name in NAMES if name in {*columns, *table.columns, *REQUIRED}}
    unknown = [name for name in columns if name not in NAMES]
    mistakes = [f"expected a column of ours before '=', found {name!r}; {name_hint(name, NAMES)}" for name in unknown]
    for name, column in used.items():
        if table.rows and column not in table.columns:
            near = nearest_name(column, table.columns)
            hint = f"try {name}={near}" if near else f"name the column that it is, as {name}=COLUMN"
            mistakes.append(f"expected column {column!r} for {name}, found none; {hint}")
    fields = {name: column for name, column in used.items() if name in FIELDS}
    special = {name: column for name, column in used.items() if name not in FIELDS}
    others = {column: column for column in table.columns if column not in used.values()}
    twice = [(name, column) for name, column in special.items() if name in others]
    mistakes += [f"{name!r} is a column and {column!r} is mapped to it too; rename one" for name, column in twice]
    if mistakes:
        raise UsageError("\n  ".join([f"{path}: expected other columns, found {', '.join(table.columns)}", *mistakes]))
    return fields, special | others


def _to_question(
    row: TableRow, fields: Mapping[str, str], extra_columns: Mapping[str, str], problems: list[Problem]
) -> Question:
    """Return the question of a row, its id empty where the table has none; values of a wrong type go to `problems`."""

    def read(name: str, column: str, convert: Callable[[Any], Any], default: Any) -> Any:
        try:
            return convert(row.values.get(column))
        except ValueError as error:
            problems.append(Problem(row.place, f"{name} of another type", f"{name}: {error}"))
            return default

    # A "?" is not empty, so that a text of a wrong type is one problem, not two.
    texts = {
        name: read(name, column, _to_text if name in ("question", "answer") else _to_name, "?")
        for name, column in fields.items()
    }
    if "patient" in texts:
        texts["patient"] = unicodedata.normalize("NFC", texts["patient"])
    optional = {name: text if text.strip() else None for name, text in texts.items() if name not in ("id", *REQUIRED)}
    extra = {name: row.values[column] for name, column in extra_columns.items() if column in row.values}
    if "choices" in extra_columns:
        extra["choices"] = read("choices", extra_columns["choices"], _to_choices, [])
    return Question(texts.get("id", ""), texts["volume"], texts["question"], **optional, extra=extra)


def _to_text(value: Any) -> str:
    """Return a text or finite number as text, null as ""; ValueError for anything else."""
    if value is None or isinstance(value, str):
        return value or ""
    is_number = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    if isinstance(value, bool) or not is_number:
        found = json.dumps(value, default=str)[:60]
        raise ValueError(f'expected text or a number, found {found}; write it as text, "Yes" for example')
    return json.dumps(value)


def _to_name(value: Any) -> str:
    return _to_text(as_name(value)).strip()


def _to_choices(value: Any) -> list[str]:
    """Return the choices of a list, of the text of a list (JSON or Python), or of texts with "|" between; ValueError.

    '["a", "b"]', "['a', 'b']", "a|b" -> ["a", "b"]
    """
    parts = _split_choices(value.strip()) if isinstance(value, str) else value
    if parts is None:
        return []
    choices = [_to_text(choice) for choice in parts] if isinstance(parts, list | tuple) else [""]
    if len(choices) == 1 or not all(choice.strip() for choice in choices):
        raise ValueError(_not_choices(value))
    return choices


def _split_choices(text: str) -> Any:
    """Return the list that a text writes, or what else it writes as JSON; ValueError where it is neither."""
    if not text.startswith(("[", "(", "{")) or (text[0] != "[" and "|" in text):
        return [part.strip() for part in text.split("|") if part.strip()]
    with contextlib.suppress(ValueError):
        return from_json(text)
    try:
        parts = ast.literal_eval(text)
        tokens = [*tokenize.generate_tokens(io.StringIO(text).readline)]
    except (ValueError, SyntaxError, MemoryError, RecursionError, tokenize.TokenError):
        raise ValueError(_not_choices(text)) from None
    # Python joins texts without a comma between them, as numpy prints lists: ['left' 'right'] would be one text.
    texts = sum(token.type == tokenize.STRING for token in tokens)
    is_sound = isinstance(parts, list | tuple) and texts == sum(isinstance(part, str) for part in parts)
    if not is_sound:
        raise ValueError(_not_choices(text))
    return parts


def _not_choices(found: Any) -> str:
    written = json.dumps(["A", "B"])
    return f"expected two or more texts, found {str(found)[:60]}; write them as A|B|C or as a JSON list, {written}"


def _check_texts(place: str, question: Question, who: str) -> Iterator[Problem]:
    """Yield what is wrong with the texts of a question; `who` begins the sentence."""
    for name in REQUIRED:
        if not getattr(question, name).strip():
            text = f"{who}expected a {name}, found none; fill it in or leave the row out"
            yield Problem(place, f"empty {name}", text)
    for text in (question.question, question.answer or "", *question.extra.get("choices", ())):
        if tag := TAG.search(text):
            found = f"a literal {tag[0]}; remove it"
            yield Problem(place, "tag in a text", f"{who}expected text without tags, found {found}")


# --- the volume that a question names

# The end of a scan's file name, which the name of a volume may lack.
SCAN_SUFFIX = re.compile(r"\.(nii(\.gz)?|img(\.gz)?|hdr|nrrd|nhdr|mha|mhd|dcm)\Z", re.IGNORECASE | re.ASCII)
# The end of a DICOM volume's source path: FOLDER#KEY, and -2, -3, ... for further stacks of the series.
SERIES_KEY = re.compile(r"#(?:([0-9a-f]{8,})(?:-\d+)?)?\Z")
UID = re.compile(r"[0-2](?:\.\d+)+")


class Match(NamedTuple):
    """The id of the volume that a name means; None, with the reason, if the name does not mean exactly one volume."""

    id: str | None
    reason: str = ""
    is_ambiguous: bool = False


def by_name(volumes: Iterable[tuple[str, str]]) -> Callable[[str], Match]:
    """Return the function that finds the volume of a name, among volumes given as (id, source path).

    A name is compared with the ids. If none is equal, it is compared with the source paths. If none is equal, it is
    compared with source paths without the scan's suffix (or, of a DICOM series, without its #KEY), and with file names
    (folder names) with and without suffix. If none is equal and it is a UID, it is compared with the keys of series.
    Names are equal if their composed Unicode forms are: macOS stores "é" as "e" and an accent.
    """
    in_order = sorted(volumes, key=lambda volume: (volume[1], volume[0]))

    def short_names(id_: str, path: str) -> set[str]:
        short = SERIES_KEY.sub("", SCAN_SUFFIX.sub("", path))
        return {short, path.rpartition("/")[2], short.rpartition("/")[2]} - {""}

    def series_key(id_: str, path: str) -> set[str]:
        key = SERIES_KEY.search(path)
        return {f"#{key[1][:8]}"} if key and key[1] else set()

    @cache  # most tables use ids, and the other indices take as long as all questions together
    def index(names_of: Callable[[str, str], set[str]]) -> dict[str, list[tuple[str, str]]]:
        made: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for volume in in_order:
            for name in {_composed(name) for name in names_of(*volume)}:
                made[name].append(volume)
        return dict(made)

    levels = (lambda id_, path: {id_}, lambda id_, path: {path}, short_names)

    def find(name: str) -> Match:
        name = _composed(name).removeprefix("./").rstrip("/")
        found = next((level[name] for level in map(index, levels) if name in level), [])
        if not found and UID.fullmatch(name):  # a key is the start of the hash of the SeriesInstanceUID
            found = index(series_key).get(f"#{hashlib.sha256(name.encode()).hexdigest()[:8]}", [])
        if len(found) > 1:
            look_alike = len({_composed(path) for _, path in found}) < len(found)
            names = first_few([f"{path} with id {id_}" if look_alike else path for id_, path in found])
            return Match(None, f"ambiguous: {len(found)} volumes have this name ({names})", is_ambiguous=True)
        return Match(found[0][0]) if found else Match(None, "no such volume")

    return find


def _composed(name: str) -> str:
    return name if name.isascii() else unicodedata.normalize("NFC", name)


# --- prompts


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
