"""AbdomenAtlas 3.0 Mini: 9,262 abdominal CTs by BDMAP id, each with up to five machine-made reports in one table.

DeepTumorVQA's questions are made from these very reports: its benchmark ids belong under `benchmark`, which keeps them out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from photon_data.datasets.abdomenatlas_tree import ID, find_cts, ids_in, original_ids
from photon_data.datasets.base import UNPACK, Adapter, Collected, OnFile, each_row
from photon_data.datasets.declare import DataSet
from photon_data.questions.question import Question
from photon_data.questions.table import Problem, refuse

KEY = "BDMAP ID"
REPORTS = (
    "radiologist note",
    "structured report",
    "narrative report",
    "fusion structured report",
    "fusion narrative report",
)
FACTS = ("sex", "age", "scanner", "contrast")
NO_TEXT = ("", "nan", "none", "n/a")
TEST = "test"


def read(entry: DataSet, on_file: OnFile) -> Collected:
    """Return the CTs below the entry's roots and one question per report that is there; UsageError."""
    files = entry.annotations
    sources, notes = find_cts(entry, on_file)
    splits = _splits(entry, files.get("splits", ()))
    benchmark = ids_in(files.get("benchmark", ()))
    kept_out = {name: "in DeepTumorVQA's benchmark" for name in sorted(benchmark) if splits.get(name) != TEST}
    questions = _questions(entry, files.get("reports", ()), splits, original_ids(files.get("ids", ())), notes)
    return Collected(sources, questions, left_out=kept_out, notes=notes)


def _questions(
    entry: DataSet, paths: Sequence[Path], splits: dict[str, str], originals: dict[str, str], notes: list[str]
) -> list[Question]:
    """Return a question per row whose report (the columns that the entry names, in order) is not empty."""
    columns = entry.policy.report
    if not columns or any(column not in REPORTS for column in columns):
        got = ", ".join(columns) or "none"
        raise entry.wrong(f"`questions: {{report: ...}}` with one or more of {', '.join(REPORTS)} wanted, got {got}")
    questions, empty, unsplit = [], [], []
    for path, row in each_row(paths, (KEY, *columns)):
        ct = row.values[KEY].strip()
        if not ID.fullmatch(ct):
            refuse(path, [Problem(row.place, "no CT", f"an id like BDMAP_00000001 wanted in {KEY!r}, got {ct!r}")])
        texts = [row.values[column].strip() for column in columns]
        answer = "\n".join(text for text in texts if text.lower() not in NO_TEXT)
        facts = {name: row.values.get(name, "") for name in FACTS}
        extra = {**facts, "subtask": "+".join(columns), "source_id": originals.get(ct, "")}
        if not answer:
            empty.append(ct)
        elif splits and ct not in splits:
            unsplit.append(ct)
        else:
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
        for name in sorted(ids_in([path])):
            if splits.setdefault(name, split) != split:
                twice.append(name)
    if twice:
        raise entry.wrong(
            f"one split per CT wanted, got {len(twice)} in several, {twice[0]} first; name the lists of IID or of OOD"
        )
    return splits


ADAPTER = Adapter(read, ("reports", "splits", "benchmark", "ids"), (UNPACK,), "abdomenatlas")
