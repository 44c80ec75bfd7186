"""Any data: a folder of scans, alone or with a table of questions."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatch

from photon_data.datasets.base import ID_FROM, DataSet, FoundVolumes, OnFile, SourceVolume
from photon_data.questions.question import Question
from photon_data.questions.question_table import read_questions
from photon_data.readers.find import check_id_prefix, find_scans, left_alone


def read_tables(entry: DataSet, on_file: OnFile) -> tuple[FoundVolumes, list[Question]]:
    """Return the scans of folders and the questions of tables, whose columns the option `columns` can map."""
    paths = entry.annotations.get("questions", ())
    questions = [q for path in paths for q in read_questions(path, entry.options.get("columns"))]
    return _scans(entry, on_file), questions


def read_folder(entry: DataSet, on_file: OnFile) -> tuple[FoundVolumes, None]:
    """Return the scans of folders; each gets the instruction as its question."""
    return _scans(entry, on_file), None


def read_phantoms(entry: DataSet, on_file: OnFile) -> tuple[FoundVolumes, list[Question]]:
    """Return what `photon-data phantom ROOT` made: scans, and questions whose task is their kind."""
    questions = [q for root in entry.roots for q in read_questions(root / "questions.jsonl")]
    scans = _scans(replace(entry, roots=tuple(root / "scans" for root in entry.roots)), on_file)
    return scans, [replace(question, task=question.extra.get("kind")) for question in questions]


def _scans(entry: DataSet, on_file: OnFile) -> FoundVolumes:
    """Return the scans below the roots whose path matches the option `pattern`; `id_prefix` begins their ids."""
    pattern, id_from = entry.options.get("pattern", "*"), entry.options.get(ID_FROM, "path")
    prefix = entry.options.get("id_prefix", "")
    check_id_prefix(prefix, f"{entry.place}, data set {entry.name}: id_prefix")
    volumes, notes = [], []
    for root in entry.roots:
        scans = find_scans(root, id_from=id_from, on_file=on_file)
        sources = [replace(source, id=prefix + source.id) for source in scans.sources if fnmatch(source.path, pattern)]
        volumes += [SourceVolume(entry, source) for source in sources]
        notes += [f"files left alone in {root}: {left_alone(scans.ignored)}"] if scans.ignored else []
    ids = {volume.source.id for volume in volumes}
    if len(ids) < len(volumes):
        found = f"{len(ids)} for {len(volumes)} scans"
        raise entry.error(f"expected one id per scan, found {found}; declare one data set per root")
    return FoundVolumes(volumes, notes=notes)
