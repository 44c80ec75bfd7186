"""Which split a question belongs to, and whether anything of one split is also in another."""

from __future__ import annotations

import hashlib
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

from photon_data.errors import UsageError, first_few
from photon_data.questions.question import Question

FRACTIONS: Mapping[str, float] = MappingProxyType({"train": 0.8, "val": 0.1, "test": 0.1})

# The split of volumes without questions.
ALL = "all"

_SHOWN = 10


def assign_splits(
    questions: Sequence[Question], *, fractions: Mapping[str, float] = FRACTIONS, seed: int = 0
) -> list[Question]:
    """Return the questions, each with a split: that of the table, or, if the table has none, one drawn by patient.

    All questions of a patient get the same split. If no question about a volume names its patient, the volume counts as
    a patient. The draw depends on patient, seed and fractions only: rows added later move nobody. Fractions are met on
    average, so with few patients a split can stay empty. UsageError for a table with splits for some rows only, split
    names that cannot be file names, fractions that do not add up to 1, or a volume of two patients.
    """
    without = [question.id for question in questions if question.split is None]
    if not without:
        check_split_names({str(question.split) for question in questions})
        return list(questions)
    if len(without) < len(questions):
        found = f"{len(without)} of {len(questions)} without ({first_few(without, _SHOWN)})"
        raise UsageError(f"expected a split for every question or for none, found {found}; fill them in")
    ends = _ends(fractions)
    patients = _patients(questions)
    return [replace(q, split=_draw(patients.get(q.volume, q.volume), seed, ends)) for q in questions]


def check_split_names(splits: Iterable[str]) -> None:
    """UsageError for a split that cannot name a file, or two that differ only in upper and lower case."""
    seen: dict[str, str] = {}
    for split in sorted(splits):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", split):
            expected = "split names of letters, digits, '.', '_' and '-'"
            raise UsageError(f"expected {expected}, found {split!r}; rename it in the table")
        other = seen.setdefault(split.casefold(), split)
        if other != split:
            raise UsageError(
                f"expected one spelling per split, found {other!r} and {split!r}; make them equal in the table"
            )


def _ends(fractions: Mapping[str, float]) -> list[tuple[float, str]]:
    """Return (upper end, split) of each split's part of [0, 1), by name: the order of the fractions changes nothing."""
    check_split_names(fractions)
    if any(fraction < 0 for fraction in fractions.values()) or not math.isclose(
        sum(fractions.values()), 1, abs_tol=1e-6
    ):
        found = ", ".join(f"{name}={fraction:g}" for name, fraction in fractions.items()) or "none"
        raise UsageError(f"expected fractions that add up to 1, found {found}; try train=0.8,val=0.1,test=0.1")
    ends, end = [], 0.0
    for name, fraction in sorted(fractions.items()):
        if fraction:
            end += fraction
            ends.append((end, name))
    return ends


def _draw(key: str, seed: int, ends: Sequence[tuple[float, str]]) -> str:
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    point = int.from_bytes(digest[:8]) / 2**64
    return next((name for end, name in ends if point < end), ends[-1][1])


def _patients(questions: Iterable[Question]) -> dict[str, str]:
    """Return {volume: patient} of the volumes whose patient a question names; UsageError for a volume of two."""
    patients: dict[str, str] = {}
    for question in questions:
        if question.patient is not None:
            other = patients.setdefault(question.volume, question.patient)
            if other != question.patient:
                found = f"{other!r} and {question.patient!r} for {question.volume!r} (question {question.id})"
                raise UsageError(f"expected one patient per volume, found {found}; correct the table")
    return patients


class Leak(NamedTuple):
    """Something that is in several splits.

    kind      "patient", "source" (one id in the data set it was taken from), "volume" (one id) or "content" (volumes of
              different ids with the same bytes)
    key       the patient, the source's id, the volume's id, or the fingerprint
    splits    the splits that it is in, sorted
    volumes   ids of its volumes, sorted
    """

    kind: str
    key: str
    splits: tuple[str, ...]
    volumes: tuple[str, ...]


def leaks(
    rows: Iterable[Mapping[str, Any]], fingerprints: Mapping[str, str | None] = MappingProxyType({})
) -> list[Leak]:
    """Return what manifest rows of different splits have in common, patients first; empty if there is nothing.

    `fingerprints` are those of the volumes' source files, by volume id; `extra` of a row may name its source, as
    "source_id". What a row lacks is not compared.
    """
    kinds = ("patient", "source", "volume", "content")
    found: dict[tuple[int, str], tuple[set[str], set[str]]] = defaultdict(lambda: (set(), set()))
    for row in rows:
        volume = row["volume_id"]
        source = row.get("extra", {}).get("source_id")
        for kind, key in enumerate((row["patient"], source, volume, fingerprints.get(volume))):
            if key:
                splits, volumes = found[kind, key]
                splits.add(row["split"])
                volumes.add(volume)
    return [
        Leak(kinds[kind], key, tuple(sorted(splits)), tuple(sorted(volumes)))
        for (kind, key), (splits, volumes) in sorted(found.items(), key=lambda item: item[0])
        if len(splits) > 1 and (kinds[kind] != "content" or len(volumes) > 1)
    ]


def refuse_leaks(found: Sequence[Leak]) -> None:
    """UsageError with the first leaks, if there are any."""
    if not found:
        return
    lines = [
        f"expected splits without overlap, found {len(found)} x the same patient, source, volume or content in several"
    ]
    for leak in found[:_SHOWN]:
        lines.append(f"  {leak.kind} {leak.key} in {' and '.join(leak.splits)} (volumes {first_few(leak.volumes)})")
    if len(found) > _SHOWN:
        lines.append(f"  and {len(found) - _SHOWN} more")
    lines.append(
        "Give each patient one split (of several data sets: in `splits`, or by leaving out the ids of a benchmark), or "
        "name patients in a column `patient`, or allow leaks expressly."
    )
    raise UsageError("\n".join(lines))
