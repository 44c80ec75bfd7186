"""3D-RAD: 170,105 questions on 16,222 volumes of CT-RATE, in one csv per subtask.

3DRAD/{train,test}/Task<n>_<name>/<subtask>.csv

Three traps. Volumes called test_* are CT-RATE's valid_*. The column `Subtask` counts the files of a split, so a subtask
gets the name of its file. The README swaps the names of tasks 1 and 2, the folders are right.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from photon_data.datasets.base import DataSet, FoundVolumes, OnFile, read_rows
from photon_data.datasets.ct_rate import SUFFIX, VOLUME, find_volumes, split_and_patient
from photon_data.errors import UsageError
from photon_data.questions.question import Question, with_made_ids
from photon_data.questions.table import Problem, refuse

CHOICES = ("Choice A", "Choice B", "Choice C", "Choice D")
COLUMNS = ("Task", "Subtask", "VolumeName", "Question", "Answer", "QuestionType", "AnswerChoice", *CHOICES)
TASK = re.compile(r"Task([1-6])_(\w+)")
# The beginning of a volume's name here -> in CT-RATE.
PREFIXES = {"train": "train", "test": "valid"}
NOTHING = "-"
# Rows per split and task, as published.
PUBLISHED = {
    "train": {"1": 2081, "2": 6055, "3": 1573, "4": 100_170, "5": 13_158, "6": 13_158},
    "test": {"1": 1024, "2": 2666, "3": 1002, "4": 23_472, "5": 2873, "6": 2873},
}


def read(entry: DataSet, on_file: OnFile) -> tuple[FoundVolumes, list[Question]]:
    """Return the volumes of CT-RATE below the entry's roots and all questions; UsageError."""
    files: list[Path] = []
    for folder in entry.annotations.get("questions", ()):
        paths = [path for split in PREFIXES for path in (folder / split).glob("Task*/*.csv")]
        ours = sorted(path for path in paths if not path.name.startswith("."))
        if not ours:
            raise entry.error(f"expected the folder 3DRAD, with train/Task*/*.csv or test/Task*/*.csv, found {folder}")
        files += ours
    found = find_volumes(entry, on_file)  # before the questions: its tables are freed before those fill the memory
    questions = with_made_ids([question for file in files for question in read_subtask(file)])
    return found._replace(notes=[*found.notes, *_counts(files, questions)]), questions


def read_subtask(file: Path) -> Iterator[Question]:
    """Yield the questions of one csv, without ids; UsageError with all rows that are not as published."""
    split, folder = file.parts[-3], TASK.fullmatch(file.parts[-2])
    if not folder:
        raise UsageError(f"{file}: expected a folder like Task4_Existence_Detection, found {file.parts[-2]!r}")
    number, task = folder.groups()
    problems: list[Problem] = []
    for _, row in read_rows([file], COLUMNS):
        prefix, _, rest = row.values["VolumeName"].removesuffix(SUFFIX).partition("_")
        name = f"{PREFIXES[split]}_{rest}"  # test_7_a_2.nii.gz -> valid_7_a_2
        volume = name if prefix == split and VOLUME.fullmatch(name) else None
        wrong = [*_check(row.values, number, split, volume)]
        problems += [Problem(row.place, kind, text) for kind, text in wrong]
        if volume and not wrong:
            _, patient = split_and_patient(volume)
            texts = row.values["Question"], row.values["Answer"]
            yield Question("", volume, *texts, split, patient, task, extra=_extra(row.values, number, file.stem))
    if problems:
        refuse(file, problems)


def _check(values: Mapping[str, str], number: str, split: str, volume: str | None) -> Iterator[tuple[str, str]]:
    """Yield (kind, sentence) for everything in which a row contradicts its place or itself."""
    if values["Task"] != number:
        yield "another task", f"expected task {number}, as its folder is called, found {values['Task']!r}"
    if not volume:
        yield "no volume", f"expected a volume like {split}_1_a_1.nii.gz, found {values['VolumeName']!r}"
    if not values["Question"].strip() or not values["Answer"].strip():
        yield "empty text", "expected a question and an answer, found none"
    if values["QuestionType"] not in ("Open", "Close"):
        yield "no question type", f"expected Open or Close, found {values['QuestionType']!r}"
    letter, answer = values["AnswerChoice"], values["Answer"]
    chosen = values.get(f"Choice {letter}", NOTHING)
    if values["QuestionType"] == "Close" and chosen != answer:
        yield "answer is not its choice", f"expected the text of choice {letter} ({chosen!r}), found {answer!r}"


def _extra(values: Mapping[str, str], number: str, subtask: str) -> dict[str, Any]:
    extra: dict[str, Any] = {"subtask": subtask, "answer_type": "measurement" if number == "3" else "text"}
    extra |= {"publisher_volume": values["VolumeName"], "publisher_subtask": values["Subtask"]}
    if values["QuestionType"] == "Close":
        choices = [values[name] for name in CHOICES if values[name] != NOTHING]
        extra |= {"choices": choices, "letter": values["AnswerChoice"]}
        extra["answer_type"] = "yes-no" if choices == ["Yes", "No"] else "choice"
    return extra


def _counts(files: Iterable[Path], questions: Iterable[Question]) -> Iterator[str]:
    """Yield a note for every task that has another number of rows than was published."""
    found = Counter((question.split, question.task) for question in questions)
    folders = {(file.parts[-3], match[1], match[2]) for file in files if (match := TASK.fullmatch(file.parts[-2]))}
    for split, number, task in sorted(folders):
        if (there := found[split, task]) != (published := PUBLISHED[split][number]):
            yield f"{split}, task {number} ({task}): {published} questions were published, {there} are here"
