"""Anybody's data: a folder of scans, alone or with a table of questions."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatch

from photon_data.datasets.base import Adapter, Collected, OnFile
from photon_data.datasets.declare import DataSet
from photon_data.questions.question import Question, read_questions
from photon_data.readers.find import find_scans, left_alone
from photon_data.scan import Source

SCANS, QUESTIONS = "scans", "questions.jsonl"


def read_table(entry: DataSet, on_file: OnFile) -> Collected:
    """Return the scans of a folder and the questions of tables, whose columns the option `columns` can map."""
    questions = []
    for path in entry.annotations.get("questions", ()):
        questions += read_questions(path, entry.options.get("columns"))
    return _collected(entry, on_file, questions)


def read_folder(entry: DataSet, on_file: OnFile) -> Collected:
    """Return the scans of a folder; each gets the instruction as its question."""
    return _collected(entry, on_file, None)


def read_phantom(entry: DataSet, on_file: OnFile) -> Collected:
    """Return what `photon-data phantom ROOT` made: scans, and questions whose task is their kind."""
    roots = tuple(root / SCANS for root in entry.roots)
    questions = [q for root in entry.roots for q in read_questions(root / QUESTIONS)]
    named = [replace(question, task=question.extra.get("kind")) for question in questions]
    return _collected(replace(entry, roots=roots), on_file, named)


def _collected(entry: DataSet, on_file: OnFile, questions: list[Question] | None) -> Collected:
    """Return the questions with the scans below the roots whose path matches the option `pattern`, ids after `id_prefix`."""
    pattern, id_from = entry.options.get("pattern", "*"), entry.options.get("id_from", "path")
    prefix = entry.options.get("id_prefix", "")
    found: list[Source] = []
    notes = []
    for root in entry.roots:
        scans = find_scans(root, id_from=id_from, on_file=on_file)
        found += [source for source in scans.sources if fnmatch(source.path, pattern)]
        notes += [f"files left alone in {root}: {left_alone(scans.ignored)}"] if scans.ignored else []
    sources = {prefix + source.id: replace(source, id=prefix + source.id) for source in found}
    if len(sources) < len(found):
        raise entry.wrong(f"ids of their own for {len(found)} scans wanted, got {len(sources)}; declare one data set per root")
    return Collected(list(sources.values()), questions, notes=notes)


_OPTIONS = ("pattern", "id_from", "id_prefix", "cohort")
TABLE = Adapter(read_table, ("questions",), (*_OPTIONS, "columns"))
FOLDER = Adapter(read_folder, (), _OPTIONS)
PHANTOM = Adapter(read_phantom, (), _OPTIONS)
