"""Rows -> those that can be trained on -> the steps of an epoch, each of micro-batches, in their order.

Every row is looked at when a run starts, its text and its stores: what would stop it at step 10,000 stops it in the
first seconds. A run that goes on must be the one that was begun.

A micro-batch is what settings call a group: one volume with some of its questions. An epoch has every row once.

[a1 a2 a3 b1 c1 c2] (letter: volume), 2 questions per volume, 3 questions per step -> [a3 a1 | b1] [c2 c1 | a2]
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import random
from collections import defaultdict
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Dataset

from photon_data.errors import UsageError, first_few
from photon_data.files import Location
from photon_data.store import NIFTI, is_whole, read_metadata
from photon_train.configuration_photon import IGNORED
from photon_train.rows import TrainRow, volume_id_of
from photon_train.training.config import TrainConfig, with_values, worker_count

logger = logging.getLogger(__name__)

FEW = 2000  # rows that one process looks at in a second or two
NAMED = 10  # rows that an error names
VOLUME_COST = 4000  # characters of text that cost about as much as a volume; it only balances devices
WINDOW = 32  # steps within which micro-batches of similar cost are brought together
SIMILAR = 1.25  # costs within this factor

# What may change when a run goes on: settings that no step depends on, and its length.
FREE_TO_CHANGE = (
    *("output", "workers", "prefetch", "track", "on_bad_row", "on_nan", "groups_per_forward"),
    *("eval_every", "save_every", "keep_checkpoints", "patience", "epochs", "max_steps"),
)
OF_ANSWERS = ("eval_benchmark", "eval_questions", "eval_max_new_tokens")  # free where no best checkpoint is chosen
ROUND_ALIKE = {"bf16", "autocast"}  # precisions: both have float32 weights, and earlier versions called autocast bf16
# Files and folders, which may be moved: rows are compared by what they say, and weights are in the checkpoint.
MAY_MOVE = ("data", "eval", "model", "grounding")


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


def rows_with_stores(rows: Sequence[TrainRow], on_bad_row: str) -> list[TrainRow]:
    """Return the rows whose stores are there, whole, and their own. On_bad_row "stop": UsageError names the others."""
    needed = defaultdict(list)
    for row in rows:
        for video in row.videos:
            needed[video, volume_id_of(row._asdict())].append(row.id)
    found = {video: _id_of_whole(video) for video, _ in needed}
    wrong = {
        (video, id): "not a whole store" if found[video] is None else f"the store of {found[video]}, not of {id}"
        for video, id in needed
        if found[video] is None or (found[video] and id and found[video] != id)
    }
    for place, why in wrong.items():
        ids = needed[place]
        logger.warning("%s is %s: %d rows are left out, %s", place[0], why, len(ids), first_few(ids, 10))
    if wrong and on_bad_row == "stop":
        place, why = next(iter(wrong.items()))
        raise UsageError(
            f"expected whole stores for all rows, found {len(wrong)} missing, not whole or of another volume: "
            f"{place[0]} first, of row {needed[place][0]}, is {why}; prepare them again, or leave their rows out with "
            "on_bad_row=skip"
        )
    bad = {id for place in wrong for id in needed[place]}
    return [row for row in rows if row.id not in bad]


def _id_of_whole(video: str) -> str | None:
    """Return the id that a whole store has, "" for a file of another format, None where there is neither."""
    if video.endswith(NIFTI):
        return "" if Path(video).is_file() else None
    metadata = read_metadata(Location(video), "")
    return metadata["id"] if metadata is not None and is_whole(Location(video), "", metadata) else None


def rows_with_texts(
    rows: Sequence[TrainRow], processor: Any, config: TrainConfig, accelerator: Accelerator
) -> list[TrainRow]:
    """Return the rows a PhotonProcessor makes into ids and labels. On_bad_row "stop": UsageError names the others.

    Processes share the work. Their volumes are not read: `rows_with_stores` looks at those.
    """
    checks = _Checks(rows[accelerator.process_index :: accelerator.num_processes], processor, config.max_length)
    workers = worker_count(config) if len(checks) > FEW else 0
    batches = DataLoader(checks, 256, num_workers=workers, collate_fn=list)
    wrong = dict(gather_object([problem for batch in batches for problem in batch if problem]))
    if not wrong:
        return list(rows)
    ordered = [wrong[row.id] for row in rows if row.id in wrong]
    more = f"\n  and {len(ordered) - NAMED} more" if len(ordered) > NAMED else ""
    listed = "\n  ".join(ordered[:NAMED]) + more
    if config.on_bad_row == "stop":
        raise UsageError(
            f"expected rows that can all be trained on, found {len(wrong)} of {len(rows)} that cannot:\n  {listed}\n"
            "mend them, or leave them out with on_bad_row=skip"
        )
    if len(wrong) == len(rows):
        raise UsageError(f"expected rows that can be trained on, found none of {len(rows)}:\n  {listed}")
    logger.warning("%d of %d rows are left out:\n  %s", len(wrong), len(rows), listed)
    return [row for row in rows if row.id not in wrong]


class _Checks(Dataset[tuple[str, str] | None]):
    """Of each row, its id and what is wrong with it, or None."""

    def __init__(self, rows: Sequence[TrainRow], processor: Any, max_length: int) -> None:
        self.rows, self.processor, self.max_length = rows, processor, max_length

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[str, str] | None:
        row = self.rows[index]
        try:
            self._check(row._asdict())
        except Exception as error:  # the edge of a work item: whatever a row's text does to the tokenizer
            return row.id, f"{row.id}: {str(error).removeprefix(f'{row.id}: ')}"
        return None

    def _check(self, row: dict[str, Any]) -> None:
        ids, labels = self.processor.training_ids(row)
        if len(ids) > self.max_length:
            raise ValueError(f"expected at most {self.max_length} tokens, found {len(ids)}; raise max_length")
        answers = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        if not all(answer.strip() for answer in answers):
            raise ValueError("expected an answer, found an empty one; say it, or take the row out")
        if not (labels != IGNORED).any():
            raise ValueError("expected something to learn, found `loss: false` at every answer; take the row out")


def rows_digest(rows: Sequence[TrainRow]) -> str:
    """Return the SHA-256 of rows: their ids, their texts and their volumes, by id and name. Folders do not count."""
    names = ([row.id, row.volume_id, [Path(video).name for video in row.videos], row.messages] for row in rows)
    text = "\n".join(json.dumps(each, sort_keys=True) for each in names)
    return hashlib.sha256(text.encode()).hexdigest()


def check_same_run(config: TrainConfig, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """UsageError when the run that goes on would not be the one that was begun.

    saved, now: states of the run. With LoRA the model that the run was begun from is read again, and may not move.
    """
    begun_with = f"that {config.output} was begun with"
    if saved["rows"] != now["rows"]:
        raise UsageError(f"expected the rows {begun_with}, found others; start a new run on changed manifests")
    if config.best_metric and saved.get("eval_rows") != now["eval_rows"]:
        remedy = "the best checkpoint so far was chosen on them; start a new run for others"
        raise UsageError(f"expected the rows of eval {begun_with}, found others; {remedy}")
    begun, current = vars(with_values(TrainConfig(), saved["settings"])), vars(config)
    moved = [name for name in MAY_MOVE if bool(begun[name]) == bool(current[name]) or name == "eval"]
    if config.lora_rank:
        moved.remove("model")
    free = {*FREE_TO_CHANGE, *moved, *(() if begun["best_metric"] else OF_ANSWERS)}
    if {begun["precision"], current["precision"]} <= ROUND_ALIKE:
        free.add("precision")
    changed = [name for name in begun if name not in free and current[name] != begun[name]]
    if changed:
        found = ", ".join(f"{name}={current[name]!r} (was {begun[name]!r})" for name in changed)
        raise UsageError(f"expected the settings {begun_with}, found {found}; start a new run for others")


def check_length(config: TrainConfig, state: dict[str, Any], total_steps: int) -> None:
    """UsageError for a run that would be shorter than what was made of it."""
    if total_steps < state["step"]:
        found = f"found {total_steps}; raise epochs or max_steps"
        raise UsageError(f"expected at least the {state['step']} steps that {config.output} has made, {found}")
