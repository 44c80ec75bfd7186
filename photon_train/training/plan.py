"""Rows -> the groups of an epoch, in the order of its steps. The same for any number of devices.

[a1 a2 a3 b1 c1 c2] (letter: volume), 2 questions per volume, 2 groups per step -> [a3 a1 | b1] [c2 c1 | a2]
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from photon_train.training.rows import TrainRow

VOLUME_COST = 4000  # characters of text that cost as much as a volume, roughly; it only balances devices
WINDOW = 32  # steps within which groups of about equal cost are brought together
ALIKE = 1.25  # costs within this factor are


class Group(NamedTuple):
    """Rows that are computed together: indices into the manifest's rows.

    weight: what its loss counts, 1 but in the last step of an epoch: [g g g .] of 4 slots -> 4/3, 4/3, 4/3, 0.
    """

    rows: tuple[int, ...]
    number: int  # within its epoch: what random draws are seeded with
    weight: float = 1.0


def group_indices(rows: Sequence[TrainRow], questions_per_volume: int, rng: random.Random | None = None) -> list[tuple[int, ...]]:
    """Return every row index once, rows of one prefix together, at most `questions_per_volume`, as evenly as can be.

    With `rng`, which questions go together is drawn; else they keep their order. Rows without a volume are grouped as if
    they shared one.
    """
    shelves: dict[Hashable, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        shelves[index if row.answers_before_head else (row.videos, row.head if row.videos else "")].append(index)
    groups = []
    for shelf in shelves.values():
        if rng:
            rng.shuffle(shelf)
        parts = -(-len(shelf) // questions_per_volume)
        groups += [tuple(shelf[part::parts]) for part in range(parts)]
    return groups


def plan_epoch(
    rows: Sequence[TrainRow], questions_per_volume: int, groups_per_step: int, seed: int, epoch: int
) -> list[list[Group]]:
    """Return the steps of an epoch, each of exactly `groups_per_step` groups. Every row is in one group of weight above 0.

    Groups of about equal cost share a step, so that devices do not wait for each other; which, and in what order, is drawn
    from (seed, epoch). About: sorted by their exact length, volumes whose answers are "yes" would meet in one step, those of
    "no" in another, and a model would learn neither. The last step is filled up with groups of weight 0.
    """
    rng = random.Random(f"{seed} {epoch}")
    groups = group_indices(rows, questions_per_volume, rng)
    rng.shuffle(groups)
    size = WINDOW * groups_per_step
    steps = [step for at in range(0, len(groups), size) for step in _window(rows, groups[at : at + size], groups_per_step, rng)]
    steps.sort(key=len, reverse=True)  # stable: the short one goes last
    numbered = iter(range(len(groups)))
    return [_filled([Group(group, next(numbered)) for group in step], groups_per_step) for step in steps]


def steps_per_epoch(rows: Sequence[TrainRow], questions_per_volume: int, groups_per_step: int) -> int:
    """Return how many steps any epoch has."""
    return -(-len(group_indices(rows, questions_per_volume)) // groups_per_step)


def cost(rows: Sequence[TrainRow], group: Sequence[int]) -> int:
    """Return roughly what a group costs, in characters of text."""
    return sum(rows[index].size + VOLUME_COST * len(rows[index].videos) for index in group)


def _window(
    rows: Sequence[TrainRow], groups: list[tuple[int, ...]], groups_per_step: int, rng: random.Random
) -> list[list[tuple[int, ...]]]:
    offset = rng.random()  # no two lengths are told apart in every epoch
    ordered = sorted(groups, key=lambda group: math.floor(math.log(cost(rows, group), ALIKE) + offset))
    steps = [ordered[at : at + groups_per_step] for at in range(0, len(ordered), groups_per_step)]
    rng.shuffle(steps)
    return steps


def _filled(step: list[Group], slots: int) -> list[Group]:
    empty = slots - len(step)
    weight = slots / len(step)
    return [group._replace(weight=weight) for group in step] + [step[-1]._replace(weight=0.0)] * empty
