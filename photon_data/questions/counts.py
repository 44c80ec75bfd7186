"""What to know of manifests before a model is trained or judged on them: counts, balance, and blind baselines."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, median
from typing import Any

MOST_ANSWERS = 5


@dataclass(frozen=True)
class Count:
    """The questions of one task of one data set in one split.

    patients            0 where the table names none
    per_volume          [least, median, most] questions per volume
    answers             the most frequent answers with their numbers; distinct_answers is how many there are
    constant_answer     the answer that is right most often, if always given; None where no question has one
    constant_accuracy   the share of questions it is right on
    constant_macro      the same per subtask, then averaged over subtasks: what papers print; the answer is one for all
    majority_macro      with the best constant answer of each subtask
    """

    dataset: str
    task: str
    split: str
    questions: int
    volumes: int
    patients: int
    per_volume: tuple[int, float, int]
    answers: dict[str, int]
    distinct_answers: int
    constant_answer: str | None
    constant_accuracy: float | None
    constant_macro: float | None
    majority_macro: float | None

    def to_json(self) -> dict[str, Any]:
        """Return the count as a plain dict."""
        return asdict(self)


def count(rows: Iterable[Mapping[str, Any]]) -> list[Count]:
    """Return a Count per data set, task and split of manifest rows, sorted."""
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["channel"].partition("/")[0], row["task"], row["split"]].append(row)
    return [_count(*key, groups[key]) for key in sorted(groups)]


def _count(dataset: str, task: str, split: str, rows: Sequence[Mapping[str, Any]]) -> Count:
    per_volume = sorted(Counter(row["volume_id"] for row in rows).values())
    answered = [row for row in rows if row["answer"]]
    answers = Counter(row["answer"] for row in answered)
    # Of equally frequent answers the first in the alphabet, so that the report does not depend on the order of rows.
    ranked = sorted(answers.items(), key=lambda item: (-item[1], item[0]))
    best = ranked[0] if ranked else None
    by_subtask: dict[str, Counter[str]] = defaultdict(Counter)
    for row in answered:
        by_subtask[row.get("extra", {}).get("subtask", "")][row["answer"]] += 1
    return Count(
        dataset=dataset,
        task=task,
        split=split,
        questions=len(rows),
        volumes=len(per_volume),
        patients=len({row["patient"] for row in rows if row["patient"]}),
        per_volume=(per_volume[0], median(per_volume), per_volume[-1]),
        answers=dict(ranked[:MOST_ANSWERS]),
        distinct_answers=len(answers),
        constant_answer=best[0] if best else None,
        constant_accuracy=round(best[1] / len(answered), 4) if best else None,
        constant_macro=round(mean(c[best[0]] / c.total() for c in by_subtask.values()), 4) if best else None,
        majority_macro=round(mean(max(c.values()) / c.total() for c in by_subtask.values()), 4) if best else None,
    )
