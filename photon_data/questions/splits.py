"""Which question belongs to which split, and whether anything of one split is also in another."""

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
from photon_data.records import VolumeRecord

FRACTIONS: Mapping[str, float] = MappingProxyType({"train": 0.8, "val": 0.1, "test": 0.1})

# The split of volumes that nobody asked a question about.
ALL = "all"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SHOWN = 10


class Leak(NamedTuple):
    """What is in several splits.

    kind      "patient", "source" (one id in the data set it was taken from), "volume" (one id) or "content" (volumes of
              different ids whose source files hold the same bytes)
    key       the patient, the source's id, the volume's id, or the fingerprint
    splits    that it is in, sorted
    volumes   ids of the volumes concerned, sorted
    """

    kind: str
    key: str
    splits: tuple[str, ...]
    volumes: tuple[str, ...]


def assign_splits(
    questions: Sequence[Question], *, fractions: Mapping[str, float] = FRACTIONS, seed: int = 0
) -> list[Question]:
    """Return the questions, each with a split: the table's own, or, where it has none, one drawn by patient.

    All questions of a patient (of a volume, where no row of it names a patient) go the same way, and that way depends on
    the key, the seed and the fractions only: rows added later move nobody. Fractions are met on average, so with few
    patients a split can stay empty. UsageError for a table that has splits for some rows only, for split names that
    cannot be file names, for fractions that do not add up to 1, for a volume of two patients.
    """
    without = [question.id for question in questions if question.split is None]
    if 0 < len(without) < len(questions):
        few = first_few(without, _SHOWN)
        raise UsageError(
            f"a split for every question or for none wanted, got {len(without)} of {len(questions)} without ({few}); fill them in"
        )
    if not without:
        check_split_names({question.split for question in questions if question.split})
        return list(questions)
    ranges = _ranges(fractions)
    patients = _patients(questions)
    return [replace(q, split=_draw(patients.get(q.volume, q.volume), seed, ranges)) for q in questions]


def check_split_names(splits: Iterable[str]) -> None:
    """UsageError where a split cannot name a file, or two splits are told apart by upper and lower case only."""
    seen: dict[str, str] = {}
    for split in sorted(splits):
        if not _NAME.fullmatch(split):
            raise UsageError(
                f"split names of letters, digits, '.', '_' and '-' wanted, got {split!r}; rename it in the table"
            )
        other = seen.setdefault(split.casefold(), split)
        if other != split:
            raise UsageError(
                f"one spelling per split wanted, got {other!r} and {split!r}; make them equal in the table"
            )


def leaks(rows: Iterable[Mapping[str, Any]], records: Iterable[VolumeRecord]) -> list[Leak]:
    """Return what manifest rows of different splits have in common, patients first; empty where they are apart.

    Rows without a patient are compared by what else they have; `extra` may name the source, as "source_id".
    """
    fingerprints = {record.id: record.fingerprint for record in records}
    found: dict[tuple[int, str], list[set[str]]] = defaultdict(lambda: [set(), set()])
    for row in rows:
        volume = row["volume_id"]
        source = row.get("extra", {}).get("source_id")
        for rank, key in enumerate((row["patient"], source, volume, fingerprints.get(volume))):
            if key:
                splits, volumes = found[rank, key]
                splits.add(row["split"])
                volumes.add(volume)
    kinds = ("patient", "source", "volume", "content")
    several = [
        Leak(kinds[rank], key, tuple(sorted(splits)), tuple(sorted(volumes)))
        for (rank, key), (splits, volumes) in sorted(found.items(), key=lambda item: item[0])
        if len(splits) > 1
    ]
    return [leak for leak in several if leak.kind != "content" or len(leak.volumes) > 1]


def refuse_leaks(found: Sequence[Leak]) -> None:
    """UsageError that tells the first leaks, if there are any."""
    if not found:
        return
    lines = [
        f"{len(found)} x the same patient, source, volume or content in several splits; splits without overlap wanted"
    ]
    for leak in found[:_SHOWN]:
        lines.append(f"  {leak.kind} {leak.key} in {' and '.join(leak.splits)} (volumes {first_few(leak.volumes)})")
    if len(found) > _SHOWN:
        lines.append(f"  and {len(found) - _SHOWN} more")
    lines.append(
        "Give each patient one split (of several data sets: in `splits`, or by leaving out the ids of a benchmark), or name "
        "patients in a column `patient`, or allow leaks expressly."
    )
    raise UsageError("\n".join(lines))


def _ranges(fractions: Mapping[str, float]) -> list[tuple[float, str]]:
    """Return (upper end, split) by name: whoever lists the same fractions in another order gets the same splits."""
    check_split_names(fractions)
    if any(fraction < 0 for fraction in fractions.values()) or not math.isclose(
        sum(fractions.values()), 1.0, abs_tol=1e-6
    ):
        got = ", ".join(f"{name}={fraction:g}" for name, fraction in fractions.items())
        raise UsageError(
            f"fractions that add up to 1 wanted, got {got or 'none'}; for example train=0.8,val=0.1,test=0.1"
        )
    ends, end = [], 0.0
    for name, fraction in sorted(fractions.items()):
        if fraction:
            end += fraction
            ends.append((end, name))
    return ends


def _draw(key: str, seed: int, ranges: Sequence[tuple[float, str]]) -> str:
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    point = int.from_bytes(digest[:8]) / 2**64
    return next((name for end, name in ranges if point < end), ranges[-1][1])


def _patients(questions: Iterable[Question]) -> dict[str, str]:
    """Return {volume: patient} of the volumes for which any question names one; UsageError for a volume of two patients."""
    patients: dict[str, str] = {}
    for question in questions:
        if question.patient is not None:
            other = patients.setdefault(question.volume, question.patient)
            if other != question.patient:
                raise UsageError(
                    f"one patient per volume wanted, got {other!r} and {question.patient!r} for {question.volume!r} "
                    f"(question {question.id}); correct the table"
                )
    return patients
