"""Which split a question belongs to, what splits must not have in common, and what the rows of each are."""

from __future__ import annotations

import hashlib
import math
import re
from bisect import bisect
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from statistics import mean, median
from types import MappingProxyType
from typing import Any, NamedTuple

from photon_data.errors import UsageError, first_few
from photon_data.files import RESERVED
from photon_data.questions.question import Question

FRACTIONS: Mapping[str, float] = MappingProxyType({"train": 0.8, "val": 0.1, "test": 0.1})
ALL = "all"  # the split of volumes without questions
_SHOWN = 10


def assign_splits(
    questions: Sequence[Question], *, fractions: Mapping[str, float] = FRACTIONS, seed: int = 0
) -> list[Question]:
    """Return the questions, each with a split: that of the table, or, if the table has none, one drawn by patient.

    A volume whose patient no question names counts as a patient. The draw depends on patient, seed and fractions only:
    rows added later move nobody. Fractions are met on average; of few patients a split can stay empty. UsageError for
    splits of some rows only, split names that cannot be file names, fractions that do not add up to 1, or a volume of
    two patients.
    """
    without = [q.id for q in questions if q.split is None]
    if not without:
        check_split_names({str(q.split) for q in questions})
        return list(questions)
    if len(without) < len(questions):
        found = f"{len(without)} of {len(questions)} without ({first_few(without, _SHOWN)})"
        raise UsageError(f"expected a split for every question or for none, found {found}; fill them in")
    _check_fractions(fractions)
    names = sorted(name for name, fraction in fractions.items() if fraction)  # their order changes nothing
    ends = list(accumulate(fractions[name] for name in names))

    def draw(patient: str) -> str:
        point = int.from_bytes(hashlib.sha256(f"{seed}:{patient}".encode()).digest()[:8]) / 2**64
        return names[min(bisect(ends, point), len(names) - 1)]

    patients: dict[str, str] = {}  # of the volumes whose patient a question names
    for q in questions:
        if q.patient is not None and patients.setdefault(q.volume, q.patient) != q.patient:
            found = f"{patients[q.volume]!r} and {q.patient!r} for {q.volume!r} (question {q.id})"
            raise UsageError(f"expected one patient per volume, found {found}; correct the table")
    return [replace(q, split=draw(patients.get(q.volume, q.volume))) for q in questions]


def check_split_names(splits: Iterable[str]) -> None:
    """UsageError for a split that cannot name a file, or two that differ only in upper and lower case."""
    seen: dict[str, str] = {}
    for split in sorted(splits):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", split) or RESERVED.fullmatch(split):
            expected = "split names of at most 100 letters, digits, '.', '_' and '-', that Windows keeps for no device"
            raise UsageError(f"expected {expected}, found {split!r}; rename it in the table")
        other = seen.setdefault(split.casefold(), split)
        if other != split:
            found = f"{other!r} and {split!r}"
            raise UsageError(f"expected one spelling per split, found {found}; make them equal in the table")


def _check_fractions(fractions: Mapping[str, float]) -> None:
    check_split_names(fractions)
    values = fractions.values()
    if any(value < 0 for value in values) or not math.isclose(sum(values), 1, abs_tol=1e-6):
        found = ", ".join(f"{name}={fraction:g}" for name, fraction in fractions.items()) or "none"
        raise UsageError(f"expected fractions that add up to 1, found {found}; try train=0.8,val=0.1,test=0.1")


class Leak(NamedTuple):
    """Something that is in several splits."""

    kind: str  # "patient", "source" (its id in the data set it is from), "volume", "content" (bytes under several ids)
    key: str  # the patient, the source's id, the volume's id, or the fingerprint
    splits: tuple[str, ...]  # sorted
    volumes: tuple[str, ...]  # their ids, sorted


def leaks(
    rows: Iterable[Mapping[str, Any]], fingerprints: Mapping[str, str | None] = MappingProxyType({})
) -> list[Leak]:
    """Return what manifest rows of different splits have in common, patients first; empty if there is nothing.

    `fingerprints` are those of the volumes' source files, by volume id; `extra` of a row may name its source, as
    "source_id". What a row lacks is not compared.
    """
    kinds = ("patient", "source", "volume", "content")
    # Of each kind {key: (split, volume)}; sets of both where a key has several, since most have one.
    found: list[dict[str, tuple[Any, Any]]] = [{} for _ in kinds]
    for row in rows:
        own = row["split"], row["volume_id"]
        source = row.get("extra", {}).get("source_id")
        for places, key in zip(found, (row["patient"], source, own[1], fingerprints.get(own[1])), strict=True):
            if key and (earlier := places.setdefault(key, own)) != own:
                splits, volumes = earlier if type(earlier[0]) is set else ({earlier[0]}, {earlier[1]})
                splits.add(own[0])
                volumes.add(own[1])
                places[key] = splits, volumes
    return [
        Leak(kind, key, tuple(sorted(splits)), tuple(sorted(volumes)))
        for kind, places in zip(kinds, found, strict=True)
        for key, (splits, volumes) in sorted(places.items(), key=lambda item: item[0])
        if type(splits) is set and len(splits) > 1 and (kind != "content" or len(volumes) > 1)
    ]


def leaks_of(questions: Iterable[Question]) -> list[Leak]:
    """Return what questions of different splits have in common, before their volumes are read."""
    return leaks({"volume_id": q.volume, "patient": q.patient, "split": q.split, "extra": q.extra} for q in questions)


def refuse_leaks(found: Sequence[Leak]) -> None:
    """UsageError with the first leaks, if there are any."""
    lines = [f"  {kind} {key} in {' and '.join(splits)} (volumes {first_few(v)})" for kind, key, splits, v in found]
    if len(lines) > _SHOWN:
        lines[_SHOWN:] = [f"  and {len(lines) - _SHOWN} more"]
    if lines:
        raise UsageError(
            f"expected splits without overlap, found {len(found)} x the same patient, source, volume or content in "
            "several\n" + "\n".join(lines) + "\nGive each patient one split (of several data sets: in `splits`, or by "
            "leaving out the ids of a benchmark), or name patients in a column `patient`, or allow leaks expressly."
        )


@dataclass(frozen=True)
class Count:
    """The questions of one task of one data set in one split."""

    dataset: str
    task: str
    split: str
    questions: int
    volumes: int
    patients: int  # 0 where the table names none
    per_volume: tuple[int, float, int]  # least, median and most questions
    answers: dict[str, int]  # the five most frequent, with their numbers
    distinct_answers: int
    # The most frequent answer (None: no question has one), the share of questions on which it is right, and the mean of
    # its shares in the subtasks, which papers print.
    constant_answer: str | None
    constant_accuracy: float | None
    constant_macro: float | None
    majority_macro: float | None  # with the best constant answer of each subtask


def count(rows: Iterable[Mapping[str, Any]]) -> list[Count]:
    """Return a Count per data set, task and split of manifest rows, sorted."""
    groups = defaultdict[tuple[str, str, str], _Tally](_Tally)
    for row in rows:
        groups[row["channel"].partition("/")[0], row["task"], row["split"]].add(row)
    return [groups[key].counted(*key) for key in sorted(groups)]


class _Tally:
    """The rows of one task of one data set in one split, as far as a Count tells of them."""

    def __init__(self) -> None:
        self.volumes, self.patients = Counter[str](), set[str]()
        self.by_subtask = defaultdict[str, Counter[str]](Counter)

    def add(self, row: Mapping[str, Any]) -> None:
        """Count a row."""
        self.volumes[row["volume_id"]] += 1
        if row["patient"]:
            self.patients.add(row["patient"])
        if row["answer"]:
            self.by_subtask[row.get("extra", {}).get("subtask", "")][row["answer"]] += 1

    def counted(self, dataset: str, task: str, split: str) -> Count:
        """Return the Count of all rows."""
        per_volume, subtasks = sorted(self.volumes.values()), list(self.by_subtask.values())
        answers = sum(subtasks, Counter[str]())
        # Of equally frequent answers the first in the alphabet: the report does not depend on the order of rows.
        ranked = sorted(answers.items(), key=lambda item: (-item[1], item[0]))
        best = ranked[0][0] if ranked else None
        return Count(
            dataset=dataset,
            task=task,
            split=split,
            questions=sum(per_volume),
            volumes=len(per_volume),
            patients=len(self.patients),
            per_volume=(per_volume[0], median(per_volume), per_volume[-1]),
            answers=dict(ranked[:5]),
            distinct_answers=len(answers),
            constant_answer=best,
            constant_accuracy=None if best is None else round(answers[best] / answers.total(), 4),
            constant_macro=None if best is None else round(mean(c[best] / c.total() for c in subtasks), 4),
            majority_macro=None if best is None else round(mean(max(c.values()) / c.total() for c in subtasks), 4),
        )
