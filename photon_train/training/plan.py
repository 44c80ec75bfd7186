"""Rows -> the steps of an epoch, each of micro-batches, in their order.

A micro-batch is what settings call a group: one volume with some of its questions. An epoch has every row once.

[a1 a2 a3 b1 c1 c2] (letter: volume), 2 questions per volume, 3 questions per step -> [a3 a1 | b1] [c2 c1 | a2]
"""

from __future__ import annotations

import itertools
import math
import random
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from photon_data.errors import UsageError
from photon_train.rows import TrainRow
from photon_train.training.config import TrainConfig

VOLUME_COST = 4000  # characters of text that cost about as much as a volume; it only balances devices
WINDOW = 32  # steps within which micro-batches of similar cost are brought together
SIMILAR = 1.25  # costs within this factor


class MicroBatch(NamedTuple):
    """Rows that are computed together."""

    rows: tuple[int, ...]  # indices into the manifest's rows
    number: int  # within its epoch; seeds what is random
    weight: float = 1.0  # of its loss: its share of the step, times the step's micro-batches; 0 for a filler
    epoch: int = 0


def plan_epoch(rows: Sequence[TrainRow], config: TrainConfig, epoch: int, processes: int = 1) -> list[list[MicroBatch]]:
    """Return the steps of an epoch, each with a multiple of `processes` micro-batches. Every row is in one.

    A step has about `questions_per_step` questions, or `groups_per_step` micro-batches: the epoch is cut into steps of
    as equal size as whole micro-batches allow. How many processes there are changes no step but for fillers.

    Micro-batches of similar cost share a step, so that devices do not wait for each other. Which ones do, and in what
    order they come, is drawn from the seed and the epoch. Costs are compared coarsely: sorted by exact length,
    volumes with the answer "yes" would be in one step and those with "no" in another, and a model would learn
    neither. A step is filled up with micro-batches of weight 0, which repeat its last one.
    """
    rng = random.Random(f"{config.seed} {epoch}")
    groups = group_rows(rows, config.group_size, rng)
    rng.shuffle(groups)
    count = _steps_of(groups, config)
    ordered, window = [], WINDOW * -(-len(groups) // count)
    for at in range(0, len(groups), window):
        offset = rng.random()  # so that no two lengths are told apart in every epoch
        costs = {group: math.floor(math.log(cost(rows, group), SIMILAR) + offset) for group in groups[at : at + window]}
        ordered += sorted(costs, key=costs.__getitem__)
    steps: list[list[tuple[int, ...]]] = [[] for _ in range(count)]
    total, before = sum(_size(group, config) for group in groups), 0
    for group in ordered:  # goes where its middle is
        size = _size(group, config)
        steps[(2 * before + size) * count // (2 * total)].append(group)
        before += size
    plan, numbers = [], itertools.count()
    for at in range(0, count, WINDOW):
        near = steps[at : at + WINDOW]
        rng.shuffle(near)
        for step in near:
            slots, size = -(-len(step) // processes) * processes, sum(_size(group, config) for group in step)
            own = [MicroBatch(group, next(numbers), slots * _size(group, config) / size, epoch) for group in step]
            plan.append(own + [own[-1]._replace(weight=0.0)] * (slots - len(own)))
    return plan


def steps_per_epoch(rows: Sequence[TrainRow], config: TrainConfig) -> int:
    """Return the number of steps of any epoch."""
    return _steps_of(group_rows(rows, config.group_size), config)


def check_shares(config: TrainConfig, rows: Sequence[TrainRow], steps: int, processes: int) -> None:
    """UsageError when the groups of most steps are too few for this many processes."""
    groups = len(group_rows(rows, config.group_size))
    if groups < steps * processes and not config.groups_per_step:
        fitting = config.questions_per_step // processes
        remedy = f"set questions_per_volume={fitting}" if fitting else f"set questions_per_step={processes} or more"
        found = f"found {groups} in {steps} steps of {config.questions_per_step} questions; {remedy}"
        raise UsageError(f"expected in every step a group for each of the {processes} processes, {found}")


def _steps_of(groups: Sequence[tuple[int, ...]], config: TrainConfig) -> int:
    """Return how many steps the groups make: so few that each has one, though the groups are of different sizes."""
    sizes = [_size(group, config) for group in groups]
    wanted = -(-sum(sizes) // (config.groups_per_step or config.questions_per_step))
    return max(1, min(wanted, sum(sizes) // max(sizes)))


def _size(group: tuple[int, ...], config: TrainConfig) -> int:
    """Return what a group counts in its step, and in the step's loss."""
    return 1 if config.groups_per_step else len(group)


def group_rows(
    rows: Sequence[TrainRow], questions_per_volume: int, rng: random.Random | None = None
) -> list[tuple[int, ...]]:
    """Return groups of row indices: rows of one prefix together, at most `questions_per_volume`, about equally many.

    With `rng`, which questions go together is drawn; else they keep their order. Rows without a volume have one prefix.
    """
    by_prefix: dict[Hashable, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        by_prefix[row.prefix].append(index)
    groups = []
    for indices in by_prefix.values():
        if rng:
            rng.shuffle(indices)
        parts = -(-len(indices) // questions_per_volume)
        groups += [tuple(indices[part::parts]) for part in range(parts)]
    return groups


def cost(rows: Sequence[TrainRow], group: Sequence[int]) -> int:
    """Return roughly what a group costs, in characters of text."""
    text = sum(len(message["content"]) for index in group for message in rows[index].messages)
    return text + VOLUME_COST * sum(len(rows[index].videos) for index in group)
