"""DeepTumorVQA v1 and v2: questions on abdominal CTs by BDMAP id, from csv (headers with spaces) or json (snake case).

Three traps. Subtypes are spelled with "_" in some rows and with spaces in others. Choices are inside the text of the
multiple-choice question. benchmark/test_qa.json wraps its list in an object and has no column for the split.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from photon_data.datasets.abdomenatlas import ID, find_cts, original_ids
from photon_data.datasets.base import DataSet, FoundVolumes, OnFile, text_rows
from photon_data.errors import UsageError, nearest_name
from photon_data.json_text import from_json
from photon_data.questions.question import Question
from photon_data.questions.table import Problem, Table, TableRow, read_table, read_text, refuse

# The 42 subtypes of v2, with those of v1, in their published spelling, by the type of their answers.
_BY_TYPE = {
    "number": """organ volume measurement, organ HU measurement, lesion volume measurement, organ HU ratio,
        tumor burden percentage, largest lesion diameter, largest lesion slice, lesion counting,
        lesion count by location, organ aggregation, tumor organ HU difference""",
    "yes-no": """pancreatic lesion existence, liver lesion existence, kidney lesion existence, kidney tumor existence,
        kidney cyst existence, colon lesion existence, PDAC existence, PNET existence, lesion outlier,
        organ enlargement, pancreatic steatosis, pancreatic cyst resectability, pseudocyst determination,
        splenomegaly detection, portal hypertension assessment""",
    "text": """liver lesion clustering, kidney volume comparison, largest lesion attenuation, largest lesion location,
        inter-segment comparison, adjacent organ, bilateral kidney asymmetry, multi-organ lesion burden comparison,
        fatty liver, hepatic steatosis grading, pancreatic tumor staging, pancreatic lesion resectability,
        PDAC vs PNET classification, lesion type classification, splenomegaly grading, renal mass characterization""",
}
SUBTYPES = {subtype: kind for kind, subtypes in _BY_TYPE.items() for subtype in re.split(r",\s+", subtypes)}
BY_LOWER_CASE = {subtype.casefold(): subtype for subtype in SUBTYPES}
# Column in snake case -> our name, where they differ.
ALIASES = {"question_id": "qid", "multiple_choice_question": "mc_question"}
NEEDED = ("qid", "image_id", "question", "answer", "mc_question", "correct_option", "question_type", "question_subtype")
KEPT = ("spacing", "shape", "sex", "age", "scanner", "contrast", "lesion")
# Files without a column `split` are one split, by their name.
BY_NAME = {"test": "test", "train": "train", "val": "validation"}
MARK = re.compile(r"(?<!\S)([A-D]):\s")
BEHIND = {"A": "B", "B": "CD", "C": "D", "D": ""}  # the letters that end the text of a choice


def read(entry: DataSet, on_file: OnFile) -> tuple[FoundVolumes, list[Question]]:
    """Return the CTs below the entry's roots and the questions of its files; UsageError."""
    originals = original_ids(entry.annotations.get("ids", ()))
    questions = [q for path in entry.annotations.get("questions", ()) for q in read_questions(path, originals)]
    found = find_cts(entry, on_file)
    return found._replace(notes=[*found.notes, *_unpublished_subtypes(questions)]), questions


def read_questions(path: Path, originals: Mapping[str, str]) -> Iterator[Question]:
    """Yield the questions of one file; UsageError with every row that is not as published."""
    problems: list[Problem] = []
    split = next((split for start, split in BY_NAME.items() if path.stem.startswith(start)), "")
    for row in text_rows(path, _read_table(path), NEEDED):
        values = {name: value.strip() for name, value in row.values.items()}
        values["split"] = values.get("split") or split
        wrong = [*_check(values)]
        problems += [Problem(row.place, kind, f"{values['qid']}: {text}") for kind, text in wrong]
        if not wrong:
            yield _question(values, originals)
    if problems:
        refuse(path, problems)


def _read_table(path: Path) -> Table:
    """Return a file's table under our names: "multiple-choice question" -> mc_question."""
    table = _read_json(path) if path.suffix.lower() == ".json" else read_table(path)
    plain = {name: re.sub(r"[\s-]+", "_", name.strip().lower()) for name in table.columns}
    ours = {name: ALIASES.get(words, words) for name, words in plain.items()}
    rows = [TableRow(row.place, {ours[name]: value for name, value in row.values.items()}) for row in table.rows]
    return Table(list(ours.values()), rows, table.problems)


def _read_json(path: Path) -> Table:
    """Return the table of a list of objects, or of an object {"questions": [...]}."""
    text = read_text(path, (".json",))
    try:
        content = from_json(text, strict=True)
    except ValueError as error:
        raise UsageError(f"{path}: expected JSON, found: {error}; download the damaged file again") from None
    items = content.get("questions") if isinstance(content, dict) else content
    if not isinstance(items, list) or not items or not all(isinstance(item, dict) for item in items):
        raise UsageError(f'{path}: expected a list of questions, or {{"questions": [...]}}, found something else')
    rows = [TableRow(f"item {number}", item) for number, item in enumerate(items, 1)]
    return Table(list(dict.fromkeys(chain(*items))), rows, [])


def _check(values: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield (kind, sentence) for everything that is wrong with a row."""
    if not ID.fullmatch(values["image_id"]):
        yield "no CT", f"expected an image id like BDMAP_00000001, found {values['image_id']!r}"
    if not values["split"]:
        yield "no split", f"expected a column `split`, or a file called {'_*, '.join(BY_NAME)}_*, found neither"
    if not values["question"] or not values["answer"]:
        yield "empty text", "expected a question and an answer, found none"
    if values["mc_question"]:
        letters = "ABCD"[: len(parse_choices(values["mc_question"]))]
        if not letters:
            yield "no choices", f"expected choices 'A: .. B: ..' in the text, found {values['mc_question'][-60:]!r}"
        elif values["correct_option"] not in tuple(letters):
            yield "no option", f"expected an option of A to {letters[-1]}, found {values['correct_option']!r}"


def parse_choices(text: str) -> list[str]:
    """Return the choices inside a multiple-choice text; none if they are not A, B (, C, D) in this order.

    "How large? A: small B: 2 to 4 cm C: large" -> ["small", "2 to 4 cm", "large"]
    """
    marks = [*MARK.finditer(text)]
    last_b = max((mark.start() for mark in marks if mark[1] == "B"), default=0)
    parts = [mark for mark in marks if mark[1] == "A" and mark.end() < last_b][-1:]
    for mark in marks if parts else ():
        if mark[1] in BEHIND[parts[-1][1]] and mark.start() > parts[-1].end():
            parts.append(mark)
    ends = [*(part.start() for part in parts[1:]), len(text)]
    choices = [text[part.end() : end].strip() for part, end in zip(parts, ends, strict=True)] if parts else []
    return choices if all(choices) else []


def _question(values: Mapping[str, str], originals: Mapping[str, str]) -> Question:
    ct, answer = values["image_id"], values["answer"]
    words = " ".join(values["question_subtype"].replace("_", " ").split())
    subtype = BY_LOWER_CASE.get(words.casefold(), words)  # the published spelling: organ hu_ratio -> organ HU ratio
    extra: dict[str, Any] = {name: values[name] for name in KEPT if name in values}
    extra |= {"publisher_id": values["qid"], "subtask": subtype, "organ": values.get("organ", "")}
    extra["answer_type"] = SUBTYPES.get(subtype) or ("yes-no" if answer.lower() in ("yes", "no") else "text")
    extra["source_id"] = originals.get(ct, "")
    if text := values["mc_question"]:
        extra |= {"mc_question": text, "choices": parse_choices(text), "letter": values["correct_option"]}
    task = values["question_type"].replace("_", " ").strip().lower()
    return Question(values["qid"], ct, values["question"], answer, values["split"], ct, task, extra=extra)


def _unpublished_subtypes(questions: list[Question]) -> Iterator[str]:
    unpublished = Counter(q.extra["subtask"] for q in questions if q.extra["subtask"] not in SUBTYPES)
    for subtype, count in sorted(unpublished.items()):
        near = nearest_name(subtype, SUBTYPES)
        yield f"{count} questions of a subtype that is not published, {subtype!r}" + (f" ({near!r}?)" if near else "")
