"""How many questions of each data set go into a split: caps, and weights that set their proportions."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from photon_data.errors import UsageError
from photon_data.questions import Question


class Share(NamedTuple):
    """What a data set gives to a split: at most `cap` questions, and `weight` parts of the whole (None: all it has)."""

    weight: float | None = None
    cap: int | None = None


def mixed(questions: Sequence[Question], shares: Mapping[str, Mapping[str, Share]], seed: int) -> list[Question]:
    """Return the questions that the shares {data set: {split: Share}} leave, in their order.

    Caps first. Then, in a split with weights, the data set that has the fewest questions per weight keeps all, and the others
    as many as their weight is worth: weights a 2, b 1 on 100 and 30 questions -> 60 and 30. No question is ever repeated.
    Who stays depends on the id and the seed alone, so rows added later change little. UsageError for a split in which some
    data sets have a weight and others have none, and for a share of a split that has no question.
    """
    groups: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index, question in enumerate(questions):
        groups[str(question.split)][str(question.dataset)].append(index)
    _refuse_unused(groups, shares)
    kept: list[int] = []
    for split, group in groups.items():
        wanted = {name: shares.get(name, {}).get(split, Share()) for name in group}
        for name, count in _counts(split, {name: len(indices) for name, indices in group.items()}, wanted).items():
            kept += _drawn(questions, group[name], count, seed)
    return [questions[index] for index in sorted(kept)]


def _counts(split: str, there: Mapping[str, int], shares: Mapping[str, Share]) -> dict[str, int]:
    """Return how many questions of each data set stay: {"a": 100, "b": 30} with weights 2 and 1 -> {"a": 60, "b": 30}."""
    counts = {name: min(n, shares[name].cap or n) for name, n in there.items()}
    weights = {name: share.weight for name, share in shares.items() if share.weight is not None}
    if not weights:
        return counts
    without = [name for name in counts if name not in weights]
    if without:
        raise UsageError(
            f"a weight for every data set of split {split!r} or for none wanted, got none for {', '.join(without)}; give it one"
        )
    unit = min(counts[name] / weight for name, weight in weights.items())
    return {name: round(unit * weight) for name, weight in weights.items()}


def _drawn(questions: Sequence[Question], indices: list[int], count: int, seed: int) -> list[int]:
    if count >= len(indices):
        return indices

    def order(index: int) -> bytes:
        return hashlib.sha256(f"{seed}:{questions[index].id}".encode()).digest()

    return sorted(indices, key=order)[:count]


def _refuse_unused(groups: Mapping[str, Mapping[str, list[int]]], shares: Mapping[str, Mapping[str, Share]]) -> None:
    for name, by_split in shares.items():
        for split in by_split:
            if name not in groups.get(split, {}):
                there = ", ".join(sorted(s for s, group in groups.items() if name in group)) or "none"
                raise UsageError(f"data set {name}: shares of its splits ({there}) wanted in `mix`, got {split!r}")
