"""AbdomenAtlas 3.0 Mini: 9,262 abdominal CTs by BDMAP id, each with up to five machine-made reports in one table.

DeepTumorVQA's questions are made from these very reports: the annotation `benchmark` keeps its CTs out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from photon_data.datasets.abdomenatlas_tree import ID, find_cts, ids_in, original_ids
from photon_data.datasets.base import DataSet, FoundVolumes, OnFile, read_rows
from photon_data.errors import UsageError, first_few
from photon_data.questions.question import Question

KEY = "BDMAP ID"
_REPORTS = "radiologist note, structured report, narrative report, fusion structured report, fusion narrative report"
REPORTS = tuple(_REPORTS.split(", "))
FACTS = ("sex", "age", "scanner", "contrast")
NO_TEXT = ("", "nan", "none", "n/a")


def read(entry: DataSet, on_file: OnFile) -> tuple[FoundVolumes, list[Question]]:
    """Return the CTs below the entry's roots and one question per report; UsageError."""
    files = entry.annotations
    found = find_cts(entry, on_file)
    splits = _splits(entry, files.get("splits", ()))
    benchmark = sorted(ids_in(files.get("benchmark", ())))
    left_out = {name: "in DeepTumorVQA's benchmark" for name in benchmark if splits.get(name) != "test"}
    notes = list(found.notes)
    questions = _questions(entry, splits, notes)
    return found._replace(left_out=left_out, notes=notes), questions


def _questions(entry: DataSet, splits: dict[str, str], notes: list[str]) -> list[Question]:
    """Return a question per row whose report (the columns that the entry names, in order) is not empty."""
    columns = entry.wording.report
    if not columns or any(column not in REPORTS for column in columns):
        found = ", ".join(columns) or "none"
        raise entry.error(f"expected some of {', '.join(REPORTS)} in `questions: {{report: ...}}`, found {found}")
    originals = original_ids(entry.annotations.get("ids", ()))
    questions, empty, unsplit = [], [], []
    for path, row in read_rows(entry.annotations.get("reports", ()), (KEY, *columns)):
        ct = row.values[KEY].strip()
        if not ID.fullmatch(ct):
            raise UsageError(f"{path}, {row.place}: expected an id like BDMAP_00000001 in {KEY!r}, found {ct!r}")
        texts = [row.values[column].strip() for column in columns]
        answer = "\n".join(text for text in texts if text.lower() not in NO_TEXT)
        if not answer:
            empty.append(ct)
        elif splits and ct not in splits:
            unsplit.append(ct)
        else:
            facts = {name: row.values.get(name, "") for name in FACTS}
            extra = {**facts, "subtask": "+".join(columns), "source_id": originals.get(ct, "")}
            questions.append(Question(f"report/{ct}", ct, "", answer, splits.get(ct), ct, "report", extra=extra))
    if empty:
        notes.append(f"{len(empty)} CTs have no text in {', '.join(columns)} and make no question, {empty[0]} first")
    if unsplit:
        notes.append(f"{len(unsplit)} CTs are in none of the lists of splits and make no question, {unsplit[0]} first")
    return questions


def _splits(entry: DataSet, paths: Sequence[Path]) -> dict[str, str]:
    """Return {id: split} of lists called IID_train.csv, IID_test.csv, OOD_...; UsageError for an id in two splits."""
    splits: dict[str, str] = {}
    twice = []
    for path in paths:
        split = path.stem.rpartition("_")[2]
        twice += [name for name in sorted(ids_in([path])) if splits.setdefault(name, split) != split]
    if twice:
        found = f"{len(twice)} in several ({first_few(twice)})"
        raise entry.error(f"expected one split per CT, found {found}; give IID or OOD lists only")
    return splits
