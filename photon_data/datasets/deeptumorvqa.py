"""The 42 subtypes of DeepTumorVQA v2, those of v1 among them, in their published spelling, and the type of answer of each.

DeepTumorVQA v1 and v2: questions on abdominal CTs by BDMAP id, from csv (headers with spaces) or json (snake case).

What its files need: subtypes are spelled with "_" in some rows and with spaces in others; choices stand inside the text of the
multiple-choice question; benchmark/test_qa.json wraps its list in an object and has no column for the split.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from photon_data.datasets.abdomenatlas_tree import ID, find_cts, original_ids
from photon_data.datasets.base import UNPACK, Adapter, Collected, OnFile, sound
from photon_data.datasets.declare import DataSet
from photon_data.errors import UsageError, nearest_name
from photon_data.questions.question import Question
from photon_data.questions.table import Problem, Table, TableRow, read_table, read_text, refuse

NUMBER = (
    "organ volume measurement",
    "organ HU measurement",
    "lesion volume measurement",
    "organ HU ratio",
    "tumor burden percentage",
    "largest lesion diameter",
    "largest lesion slice",
    "lesion counting",
    "lesion count by location",
    "organ aggregation",
    "tumor organ HU difference",
)
YES_NO = (
    "pancreatic lesion existence",
    "liver lesion existence",
    "kidney lesion existence",
    "kidney tumor existence",
    "kidney cyst existence",
    "colon lesion existence",
    "PDAC existence",
    "PNET existence",
    "lesion outlier",
    "organ enlargement",
    "pancreatic steatosis",
    "pancreatic cyst resectability",
    "pseudocyst determination",
    "splenomegaly detection",
    "portal hypertension assessment",
)
TEXT = (
    "liver lesion clustering",
    "kidney volume comparison",
    "largest lesion attenuation",
    "largest lesion location",
    "inter-segment comparison",
    "adjacent organ",
    "bilateral kidney asymmetry",
    "multi-organ lesion burden comparison",
    "fatty liver",
    "hepatic steatosis grading",
    "pancreatic tumor staging",
    "pancreatic lesion resectability",
    "PDAC vs PNET classification",
    "lesion type classification",
    "splenomegaly grading",
    "renal mass characterization",
)

SUBTYPES: dict[str, str] = {
    **dict.fromkeys(NUMBER, "number"),
    **dict.fromkeys(YES_NO, "yes-no"),
    **dict.fromkeys(TEXT, "text"),
}


# Normalised header -> our name, where they differ.
ALIASES = {"question_id": "qid", "multiple_choice_question": "mc_question"}
REQUIRED = ("qid", "image_id", "question", "answer", "mc_question", "correct_option", "question_type", "question_subtype")
KEPT = ("spacing", "shape", "sex", "age", "scanner", "contrast", "lesion")
# Files without a column `split` are one split, by their name.
BY_NAME = {"test": "test", "train": "train", "val": "validation"}
CHOICES = re.compile(r"(?s)(?:^|.*\s)A:\s(?P<A>.*?)\s+B:\s(?P<B>.*?)(?:\s+C:\s(?P<C>.*?))?(?:\s+D:\s(?P<D>.*?))?\s*")


def read(entry: DataSet, on_file: OnFile) -> Collected:
    """Return the CTs below the entry's roots and the questions of its files; UsageError."""
    originals = original_ids(entry.annotations.get("ids", ()))
    questions = [q for path in entry.annotations.get("questions", ()) for q in read_questions(path, originals)]
    sources, notes = find_cts(entry, on_file)
    return Collected(sources, questions, notes=[*notes, *_strange_subtypes(questions)])


def read_questions(path: Path, originals: Mapping[str, str]) -> Iterator[Question]:
    """Yield the questions of one file; UsageError with every row that is not as published."""
    table = sound(path, _in_our_words(_read(path)), REQUIRED)
    problems: list[Problem] = []
    of_file = next((split for start, split in BY_NAME.items() if path.stem.startswith(start)), None)
    for row in table.rows:
        wrong = [*_check(row.values, of_file)]
        problems += [Problem(row.place, kind, f"{row.values['qid']}: {text}") for kind, text in wrong]
        if not wrong:
            yield _question(row.values, of_file, originals)
    if problems:
        refuse(path, problems)


def parse_choices(text: str) -> list[str]:
    """Return the choices inside of a multiple-choice text, none where they are not A, B (, C, D) in this order.

    "How large? A: small B: 2 to 4 cm C: large" -> ["small", "2 to 4 cm", "large"]
    """
    match = CHOICES.fullmatch(text)
    found = [choice.strip() for choice in match.groups() if choice is not None] if match else []
    return found if all(found) else []


def _read(path: Path) -> Table:
    """Return the table of a file; of an object {"questions": [...]}, the table of that list."""
    if path.suffix.lower() != ".json":
        return read_table(path)
    try:
        content = json.loads(read_text(path, (".json",)))
    except ValueError as error:
        raise UsageError(f"{path}: JSON wanted, got: {error}; the file is cut off or damaged, download it again") from None
    items = content.get("questions") if isinstance(content, dict) else content
    if not isinstance(items, list) or not items or not all(isinstance(item, dict) for item in items):
        raise UsageError(f'{path}: a list of questions, or {{"questions": [...]}}, wanted, got something else')
    columns = dict.fromkeys(name for item in items for name in item)
    return Table(list(columns), [TableRow(f"item {number}", item) for number, item in enumerate(items, 1)], [])


def _in_our_words(table: Table) -> Table:
    """Return the table with snake-case columns ("multiple-choice question" -> mc_question), its texts without outer spaces."""
    plain = {name: re.sub(r"[\s-]+", "_", name.strip().lower()) for name in table.columns}
    ours = {name: ALIASES.get(words, words) for name, words in plain.items()}
    rows = [TableRow(row.place, {ours[name]: _stripped(value) for name, value in row.values.items()}) for row in table.rows]
    return Table(list(ours.values()), rows, table.problems)


def _stripped(value: Any) -> Any:
    return value.strip() if isinstance(value, str) else value


def _check(values: Mapping[str, str], of_file: str | None) -> Iterator[tuple[str, str]]:
    if not ID.fullmatch(values["image_id"]):
        yield "no CT", f"an image id like BDMAP_00000001 wanted, got {values['image_id']!r}"
    if not (values.get("split") or of_file):
        yield "no split", f"a column `split`, or a file called {', '.join(f'{name}_*' for name in BY_NAME)}, wanted, got neither"
    if not values["question"] or not values["answer"]:
        yield "empty text", "a question and an answer wanted, got none"
    if values["mc_question"]:
        choices = parse_choices(values["mc_question"])
        if len(choices) < 2:
            yield "no choices", f"choices 'A: .. B: ..' in the text wanted, got {values['mc_question'][-60:]!r}"
        elif values["correct_option"] not in tuple("ABCD"[: len(choices)]):
            yield "no option", f"an option of A to {'ABCD'[len(choices) - 1]} wanted, got {values['correct_option']!r}"


def _question(values: Mapping[str, str], of_file: str | None, originals: Mapping[str, str]) -> Question:
    ct, answer = values["image_id"], values["answer"]
    subtype = _subtype(values["question_subtype"])
    extra: dict[str, Any] = {name: values[name] for name in KEPT if name in values}
    extra |= {"publisher_id": values["qid"], "subtask": subtype, "organ": values.get("organ", "")}
    extra["answer_type"] = SUBTYPES.get(subtype) or ("yes-no" if answer.lower() in ("yes", "no") else "text")
    extra["source_id"] = originals.get(ct, "")
    if values["mc_question"]:
        text = values["mc_question"]
        extra |= {"mc_question": text, "choices": parse_choices(text), "letter": values["correct_option"]}
    task = values["question_type"].replace("_", " ").strip().lower()
    split = values.get("split") or of_file
    return Question(values["qid"], ct, values["question"], answer, split, ct, task, extra=extra)


def _subtype(text: str) -> str:
    """Return the published spelling: liver_lesion_existence -> liver lesion existence, organ hu ratio -> organ HU ratio."""
    plain = " ".join(text.replace("_", " ").split())
    return _SPELLED.get(plain.casefold(), plain)


def _strange_subtypes(questions: list[Question]) -> Iterator[str]:
    strange = Counter(q.extra["subtask"] for q in questions if q.extra["subtask"] not in SUBTYPES)
    for subtype, count in sorted(strange.items()):
        near = nearest_name(subtype, SUBTYPES)
        yield f"{count} questions of a subtype that is not published, {subtype!r}" + (f" ({near!r}?)" if near else "")


_SPELLED = {subtype.casefold(): subtype for subtype in SUBTYPES}

ADAPTER = Adapter(read, ("questions", "ids"), (UNPACK,), "abdomenatlas")
