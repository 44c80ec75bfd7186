"""Recall of masks as tables."""

from __future__ import annotations

from collections.abc import Sequence

from photon_train.evaluation.mask_recall import Asked, MaskRecalls, Recall
from photon_train.evaluation.words import Sheet, told, told_interval

_RECALL = ("recall", "chance", "above chance", "95 %", "pairs", "volumes", "patients")
_ASKED = (
    *("asked about (chance)", "above", "95 %"),
    *("other organ (chance)", "above", "95 %"),
    *("difference", "95 %", "pairs"),
)


def sheets(recalls: MaskRecalls) -> list[Sheet]:
    """Return the tables, what was asked about first; those without lines are left out."""
    found = [
        _asked("Organs, in questions about them and in questions about another organ", "organ", recalls.organs),
        _asked("Lesions, in questions about them and in questions about another organ", "lesion", recalls.lesions),
        Sheet("Masks by volume, all questions", ("volume", *_RECALL), [_line(one) for one in recalls.by_size]),
        Sheet("Masks by name, all questions", ("mask", *_RECALL), [_line(one) for one in recalls.by_mask]),
    ]
    return [sheet for sheet in found if sheet.lines]


def _line(one: Recall) -> tuple[str, ...]:
    counts = (f"{count:,}" for count in (one.pairs, one.volumes, one.patients))
    return (one.name, told(one.recall), told(one.chance), told(one.above_chance), told_interval(one.above_chance), *counts)


def _asked(title: str, what: str, lines: Sequence[Asked]) -> Sheet:
    return Sheet(title, (what, *_ASKED), [_asked_line(one) for one in lines])


def _asked_line(one: Asked) -> tuple[str, ...]:
    halves = [
        text
        for part in (one.own, one.other)
        for text in (f"{told(part.recall)} ({told(part.chance)})", told(part.above_chance), told_interval(part.above_chance))
    ]
    difference = (told(one.own_minus_other), told_interval(one.own_minus_other))
    return (one.name, *halves, *difference, f"{one.own.pairs:,} and {one.other.pairs:,}")
