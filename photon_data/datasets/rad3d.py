"""3D-RAD: 170,105 questions on 16,222 volumes of CT-RATE, in one csv per subtask.

3DRAD/{train,test}/Task<n>_<name>/<subtask>.csv

What its files need: volumes called test_* are CT-RATE's valid_*; the column `Subtask` counts files within a split (Task 5's 1 is
"c" in train and "b" in test), so a subtask is called by its file; the README swaps the names of tasks 1 and 2, folders are right.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from photon_data.datasets.base import Adapter, Collected, OnFile, table_with
from photon_data.datasets.ct_rate_tree import SUFFIX, find_volumes, parse_name
from photon_data.datasets.declare import DataSet
from photon_data.questions.question import Question, with_made_ids
from photon_data.questions.table import Problem, TableRow, refuse

CHOICES = ("Choice A", "Choice B", "Choice C", "Choice D")
COLUMNS = ("Task", "Subtask", "VolumeName", "Question", "Answer", "QuestionType", "AnswerChoice", *CHOICES)
TASK = re.compile(r"Task([1-6])_(\w+)")
# What a volume's name begins with here -> in CT-RATE.
PREFIXES = {"train": "train", "test": "valid"}
NOTHING = "-"
# Rows per split and task, as published.
PUBLISHED = {
    "train": {"1": 2081, "2": 6055, "3": 1573, "4": 100_170, "5": 13_158, "6": 13_158},
    "test": {"1": 1024, "2": 2666, "3": 1002, "4": 23_472, "5": 2873, "6": 2873},
}
MEASUREMENT = "3"


def read(entry: DataSet, on_file: OnFile) -> Collected:
    """Return the volumes of CT-RATE below the entry's roots and all questions; UsageError."""
    files = [file for folder in entry.annotations.get("questions", ()) for file in _files(entry, folder)]
    volumes = find_volumes(entry, on_file)  # before the questions: its tables are let go before those fill the memory
    questions = with_made_ids([question for file in files for question in read_subtask(file)])
    return volumes._replace(questions=questions, notes=[*volumes.notes, *_counts(files, questions)])


def _files(entry: DataSet, folder: Path) -> list[Path]:
    """Return the csv files of the folder 3DRAD, sorted."""
    files = sorted(path for split in PREFIXES for path in (folder / split).glob("Task*/*.csv") if not path.name.startswith("."))
    if not files:
        raise entry.wrong(f"the folder 3DRAD, with train/Task.../*.csv and test/Task.../*.csv, wanted, found none in {folder}")
    return files


def read_subtask(file: Path) -> Iterator[Question]:
    """Yield the questions of one csv, without ids, answers to the letter; UsageError with every row that is not as published."""
    split, named = file.parts[-3], TASK.fullmatch(file.parts[-2])
    if not named:
        refuse(file, [Problem("file", "no task", f"a folder like Task4_Existence_Detection wanted, got {file.parts[-2]!r}")])
    number, task = named.groups()
    problems: list[Problem] = []
    for row in table_with(file, COLUMNS).rows:
        volume = _volume(row.values["VolumeName"], split)
        wrong = [*_check(row.values, number, split, volume)]
        problems += [Problem(row.place, kind, text) for kind, text in wrong]
        if volume and not wrong:
            yield _question(row, volume, split, number, task, file.stem)
    if problems:
        refuse(file, problems)


def _check(values: Mapping[str, str], number: str, split: str, volume: str | None) -> Iterator[tuple[str, str]]:
    """Yield (kind, sentence) for everything in which a row contradicts its place or itself."""
    if values["Task"] != number:
        yield "another task", f"task {number}, as its folder is called, wanted, got {values['Task']!r}"
    if not volume:
        yield "no volume", f"a volume like {split}_1_a_1.nii.gz wanted, got {values['VolumeName']!r}"
    if not values["Question"].strip() or not values["Answer"].strip():
        yield "empty text", "a question and an answer wanted, got none"
    if values["QuestionType"] not in ("Open", "Close"):
        yield "no question type", f"Open or Close wanted, got {values['QuestionType']!r}"
    letter = values["AnswerChoice"]
    chosen = values.get(f"Choice {letter}", NOTHING)
    if values["QuestionType"] == "Close" and chosen != values["Answer"]:
        yield "answer is not its choice", f"the text of choice {letter} ({chosen!r}) wanted as answer, got {values['Answer']!r}"


def _volume(name: str, split: str) -> str | None:
    """Return CT-RATE's id: test_7_a_2.nii.gz -> valid_7_a_2; None for another kind of name."""
    prefix, _, rest = name.removesuffix(SUFFIX).partition("_")
    volume = f"{PREFIXES[split]}_{rest}"
    return volume if prefix == split and parse_name(volume) else None


def _question(row: TableRow, volume: str, split: str, number: str, task: str, subtask: str) -> Question:
    values = row.values
    parts = parse_name(volume)
    assert parts
    extra: dict[str, Any] = {"subtask": subtask, "answer_type": "measurement" if number == MEASUREMENT else "text"}
    extra |= {"publisher_volume": values["VolumeName"], "publisher_subtask": values["Subtask"]}
    if values["QuestionType"] == "Close":
        choices = [values[name] for name in CHOICES if values[name] != NOTHING]
        extra |= {"choices": choices, "letter": values["AnswerChoice"]}
        extra["answer_type"] = "yes-no" if choices == ["Yes", "No"] else "choice"
    return Question("", volume, values["Question"], values["Answer"], split, parts.patient, task, extra=extra)


def _counts(files: Iterable[Path], questions: Iterable[Question]) -> Iterator[str]:
    """Yield a note for every task that is there with another number of rows than was published."""
    found = Counter((question.split, question.task) for question in questions)
    folders = {(file.parts[-3], match[1], match[2]) for file in files if (match := TASK.fullmatch(file.parts[-2]))}
    for split, number, task in sorted(folders):
        published, there = PUBLISHED[split][number], found[split, task]
        if there != published:
            yield f"{split}, task {number} ({task}): {published} questions were published, {there} are here"


ADAPTER = Adapter(read, ("questions", "metadata", "no_chest"), ("version",), "ct-rate")
