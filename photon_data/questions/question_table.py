"""A table of questions about volumes -> `Question`s, or one error with everything that is wrong in the table."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import math
import tokenize
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from photon_data.errors import UsageError, name_hint, nearest_name
from photon_data.json_text import from_json
from photon_data.questions.question import Question, with_made_ids
from photon_data.questions.table import TAG, Problem, Table, TableRow, as_name, read_table, refuse

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
