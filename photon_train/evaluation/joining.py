"""Questions and predictions, joined by id: what is missing, repeated or too much is an error, or counted and said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from photon_data.errors import UsageError
from photon_train.evaluation.cases import Case, case_of
from photon_train.predictions import Prediction
from photon_train.rows import asked_of

SHOWN = 10


@dataclass(frozen=True)
class Gaps:
    """Ids, sorted, of what could not be joined.

    missing     questions without a prediction
    failed      questions whose prediction is an error
    repeated    questions with more than one prediction: none of them counts
    changed     questions whose prediction answers another question, or the same of another volume
    unknown     predictions of questions that are not in the data
    """

    questions: int
    missing: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    @property
    def unscored(self) -> int:
        """How many questions have no score."""
        return len(self.missing) + len(self.failed) + len(self.repeated) + len(self.changed)

    def __bool__(self) -> bool:
        return bool(self.unscored or self.unknown)

    def sentence(self) -> str:
        """What every table says of them; "" where there are none."""
        if not self:
            return ""
        parts = {
            "missing": self.missing,
            "failed": self.failed,
            "repeated": self.repeated,
            "of other questions": self.changed,
            "of unknown ids": self.unknown,
        }
        counts = ", ".join(f"{len(ids)} {name}" for name, ids in parts.items() if ids)
        return f"PARTIAL: {self.questions - self.unscored} of {self.questions} questions are scored; predictions: {counts}"


@dataclass(frozen=True)
class Joined:
    """Cases by id, and what is not among them."""

    cases: tuple[Case, ...]
    gaps: Gaps


def join(rows: Iterable[Mapping[str, Any]], predictions: Iterable[Prediction], *, allow_partial: bool = False) -> Joined:
    """Return a case for every question with a prediction, sorted by id: the order of neither file matters.

    UsageError, listing ids, for a question that occurs twice; for missing, failed, repeated and unknown predictions, and those
    that say they answer another question, too unless `allow_partial`, which leaves those questions out. UsageError if then
    nothing is left.
    """
    asked = by_id(rows)
    answers = list(predictions)
    times = Counter(prediction.id for prediction in answers)
    given = {prediction.id: prediction for prediction in answers if times[prediction.id] == 1}
    failed = {id for id, prediction in given.items() if prediction.error and id in asked}
    changed = {id for id, p in given.items() if p.asked and id in asked and not p.answers(asked_of(asked[id]))} - failed
    gaps = Gaps(
        questions=len(asked),
        missing=tuple(sorted(asked.keys() - times.keys())),
        failed=tuple(sorted(failed)),
        repeated=tuple(sorted(id for id, count in times.items() if count > 1 and id in asked)),
        changed=tuple(sorted(changed)),
        unknown=tuple(sorted(times.keys() - asked.keys())),
    )
    if gaps and not allow_partial:
        raise UsageError(_complaint(gaps))
    cases = [case_of(asked[id], given[id]) for id in sorted(asked.keys() & given.keys() - failed - changed)]
    if not cases:
        raise UsageError(f"predictions of the data's questions wanted, got none. {gaps.sentence()}")
    return Joined(tuple(cases), gaps)


def by_id(rows: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return the rows by id; UsageError for an id that occurs twice, or a row without an answer to compare with."""
    asked: dict[str, Mapping[str, Any]] = {}
    twice, blank = [], []
    for row in rows:
        twice += [row["id"]] if row["id"] in asked else []
        blank += [] if row["answer"] else [row["id"]]
        asked[row["id"]] = row
    for ids, wanted in ((twice, "every question once"), (blank, "questions with an answer")):
        if ids:
            raise UsageError(f"{wanted} wanted in the data, got {_listed('otherwise', sorted(set(ids)))}")
    return asked


def _complaint(gaps: Gaps) -> str:
    lists = [
        _listed("without a prediction", gaps.missing),
        _listed("whose prediction is an error", gaps.failed),
        _listed("predicted more than once", gaps.repeated),
        _listed("whose prediction answers another question or volume", gaps.changed),
        _listed("not in the data", gaps.unknown),
    ]
    found = "\n  ".join(line for line in lists if line)
    return f"one prediction for each of {gaps.questions} questions wanted, got ids\n  {found}\nallow partial results to go on"


def _listed(what: str, ids: Sequence[str]) -> str:
    """Return "2 what: a, b", "" for no ids."""
    rest = f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else ""
    return f"{len(ids)} {what}: {', '.join(ids[:SHOWN])}{rest}" if ids else ""
