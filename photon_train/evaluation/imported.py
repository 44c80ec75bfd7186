"""Result files of other tools -> predictions of the data's questions, joined by volume and text, never by line.

The authors of Photon and ms-swift write a JSON line per answer: `response`, `labels`, `messages`, `videos`, and mostly
no id. What could be the answer to several questions, or to none, is left out and listed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from photon_data.errors import UsageError, name_hint
from photon_data.questions.table import TAG, Problem, TableRow, as_name, read_table, refuse
from photon_train.evaluation.cases import case_of, rows_by_id, volume_name
from photon_train.evaluation.readings import collapsed
from photon_train.rows import Prediction, Row, choices_of, question_digest

FORMATS = ("photon", "ms-swift", "table")
# Our names of the columns of a table. It needs a response, and an id or a volume and a question.
COLUMNS = ("id", "volume", "question", "response", "label")


class Result(NamedTuple):
    """An answer of another tool; what its file does not say is ""."""

    place: str  # "line 4"
    id: str
    volumes: tuple[str, ...]  # paths or names
    question: str
    response: str
    label: str  # the answer that the file takes for right


class LeftOut(NamedTuple):
    """A result that answers no question of the data for sure."""

    place: str
    reason: str
    volume: str
    question: str


class Imported(NamedTuple):
    """Predictions by id, and what is not among them by place in the file."""

    predictions: list[Prediction]
    left_out: list[LeftOut]


def read_results(path: Path, form: str, columns: Mapping[str, str]) -> list[Result]:
    """Return the results of a file in one of FORMATS. UsageError with all that is wrong in it.

    `columns` maps COLUMNS to those of a table: {"response": "Pred"}.
    """
    if form not in FORMATS:
        raise UsageError(f"expected --format {', '.join(FORMATS)}, found {form!r}")
    if columns and form != "table":
        raise UsageError(f"expected --columns beside --format table, found it beside {form}; leave it out")
    table, problems, results = read_table(path), list[Problem](), []
    if form == "table":
        _check_columns(path, table.columns, columns)
    for row in table.rows:
        try:
            results.append(_of_columns(row, columns) if form == "table" else _of_messages(row))
        except ValueError as error:
            problems.append(Problem(row.place, "no result", str(error)))
    if problems := [*table.problems, *problems]:
        refuse(path, problems)
    return results


def _check_columns(path: Path, found: Sequence[str], columns: Mapping[str, str]) -> None:
    unknown = [f"{name!r}, {name_hint(name, COLUMNS)}" for name in columns if name not in COLUMNS]
    unknown += [f"column {column!r}, {name_hint(column, found)}" for column in columns.values() if column not in found]
    if unknown:
        raise UsageError(f"{path}: expected --columns OURS=THEIRS of existing names, found {'; '.join(unknown)}")
    there = {name for name in COLUMNS if columns.get(name, name) in found}
    if "response" not in there or not ({"id"} <= there or {"volume", "question"} <= there):
        expected = "a response, and an id or a volume and a question"
        raise UsageError(f"{path}: expected columns for {expected}, found {', '.join(found)}; name them with --columns")


def _of_columns(row: TableRow, columns: Mapping[str, str]) -> Result:
    values = {name: _text(as_name(row.values.get(columns.get(name, name)))) for name in COLUMNS}
    volumes = (values["volume"],) if values["volume"] else ()
    return Result(row.place, values["id"], volumes, values["question"], values["response"], values["label"])


def _of_messages(row: TableRow) -> Result:
    """Return the result of a line of ms-swift; its older lines have a query instead of messages."""
    values = row.values
    messages = values.get("messages") or [{"role": "user", "content": values.get("query") or ""}]
    is_sound = isinstance(messages, list) and all(isinstance(one, dict) for one in messages)
    if not is_sound or "response" not in values:
        raise ValueError("expected `response` and a list of `messages`, found other keys; is this another --format?")
    asked = [_text(one.get("content")) for one in messages if one.get("role") == "user"]
    videos = values.get("videos") or values.get("images") or []
    videos = videos if isinstance(videos, list) else [videos]
    paths = [one.get("path") if isinstance(one, dict) else one for one in videos]
    label = values["labels"] if values.get("labels") is not None else values.get("label")
    texts = map(_text, (values.get("id"), asked[-1] if asked else "", values["response"], label))
    id, question, response, answer = texts
    return Result(row.place, id, tuple(map(_text, paths)), question, response, answer)


def _text(value: Any) -> str:
    """Return a text or a number as text, None as ""; ValueError for anything else."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, str | int | float)):
        raise ValueError(f"expected a text, found {str(value)[:60]!r}")
    return "" if value is None else str(value)


def join_results(results: Iterable[Result], rows: Sequence[Row]) -> Imported:
    """Return predictions for the rows that the results answer, with the digest of what was asked, sorted by id.

    By id, where the file has one. Else the volume's file name and the whole text of the question must be those of one
    row; of several rows, the one with the same answer. Of a question that the data have several times, all results must
    be the same. A result whose label is not the row's answer is left out, and so are results that differ about one row.
    """
    by_id, index = rows_by_id(rows), _index_of(rows)
    answers: dict[str, list[Result]] = defaultdict(list)
    repeated: dict[tuple[str, ...], list[Result]] = defaultdict(list)
    left_out = []

    def leave_out(result: Result, reason: str) -> None:
        left_out.append(
            LeftOut(result.place, reason, ", ".join(map(volume_name, result.volumes)), result.question[:200])
        )

    for result in results:
        if result.id:
            found = [by_id[result.id]] if result.id in by_id else []
            reason = f"no question of the data has the id {result.id!r}"
        else:
            found, reason = _found(result, index)
        if result.label and len(found) > 1:
            found = [row for row in found if collapsed(result.label) in _answers_of(row)] or found
        if len(found) == 1 and result.label and collapsed(result.label) not in _answers_of(found[0]):
            leave_out(result, f"its label is {result.label[:60]!r}, the answer of {found[0]['id']} is another")
        elif len(found) == 1:
            answers[found[0]["id"]].append(result)
        elif found:
            repeated[tuple(sorted(row["id"] for row in found))].append(result)
        else:
            leave_out(result, reason)
    for ids, alike in repeated.items():
        if len(alike) == len(ids) and len({result.response for result in alike}) == 1:
            for id, result in zip(ids, alike, strict=True):
                answers[id].append(result)
        else:
            for result in alike:
                leave_out(result, f"ambiguous: it may answer {len(ids)} questions ({', '.join(ids[:5])})")
    predictions = []
    for id, same in sorted(answers.items()):
        if len({result.response for result in same}) == 1:
            volume, asked = str(by_id[id].get("volume_id") or ""), question_digest(by_id[id])
            predictions.append(Prediction(id, same[0].response, asked=asked, volume_id=volume))
        else:
            for result in same:
                leave_out(result, f"ambiguous: {len(same)} different responses to {id}")
    return Imported(predictions, sorted(left_out, key=lambda one: int(one.place.rpartition(" ")[2])))


_Index = dict[tuple[str, ...], dict[str, Row]]  # rows by id, by the names of their volumes


def _index_of(rows: Iterable[Row]) -> _Index:
    index: _Index = defaultdict(dict)
    for row in rows:
        videos = tuple(volume_name(str(video)) for video in row.get("videos") or ())
        for names in {videos, tuple(name.rpartition("__")[2] for name in videos), (str(row.get("volume_id") or ""),)}:
            index[names][row["id"]] = row
    return index


def _found(result: Result, index: _Index) -> tuple[list[Row], str]:
    """Return the rows that a result may answer, and why there are none."""
    names = tuple(map(volume_name, result.volumes))
    # 3D-RAD calls CT-RATE's valid_1_a_1 test_1_a_1.
    renamed = tuple(f"valid_{name[5:]}" if name.startswith("test_") else name for name in names)
    of_volume = index.get(names) or index.get(renamed) or {}
    if not (names and of_volume):
        return [], f"no question of the data is about the volume {', '.join(names) or '(none)'}"
    text = _plain(result.question)
    same = [row for row in of_volume.values() if text in set(_texts_of(row))]
    return same or [
        row for row in of_volume.values() if _is_within(row, text)
    ], "no question of its volume has this text"


def _texts_of(row: Row) -> Iterator[str]:
    """Yield the ways in which the question of a row is put: with and without its choices."""
    extra = row.get("extra") or {}
    asked = [message["content"] for message in row["messages"] if message["role"] == "user"][-1:]
    yield from (_plain(str(text)) for text in (*asked, extra.get("plain_question"), extra.get("mc_question")) if text)


def _is_within(row: Row, text: str) -> bool:
    """Return whether a text is the question of a row and then its choices, whatever stands around these."""
    choices = choices_of(row)
    starts = [question for question in _texts_of(row) if text.startswith(f"{question} ")]
    return bool(starts and choices) and all(_plain(choice) in text[len(max(starts, key=len)) :] for choice in choices)


def _plain(text: str) -> str:
    """Return a question without <video> and with single spaces."""
    return " ".join(TAG.sub(" ", text).split())


def _answers_of(row: Row) -> set[str]:
    """Return the ways in which a row's answer may be written, collapsed: "b", "no", "b. no"."""
    case = case_of(row, Prediction(row["id"]))
    texts = [str(row["answer"]), case.label, case.answer]
    texts += [case.letter, f"{case.letter}. {case.answer}"] if case.letter else []
    return {collapsed(text) for text in texts}
