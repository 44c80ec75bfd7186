"""Rows of a manifest -> predictions in a file: grouped by volume, resumable, each failure at its own cost."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from photon_data.errors import UsageError, unforeseen
from photon_train.answering.prediction import Prediction, PredictionFile, answered, merge, prediction_file
from photon_train.answering.predictor import Asker, Encoded, Group, Prompt, Reply, group_rows, settings_of, with_seconds
from photon_train.rows import Row

T = TypeVar("T")


class Shard(NamedTuple):
    """Part `number` (from 0) of `parts`: a volume's rows go to the part that the hash of its name says."""

    number: int
    parts: int

    def has(self, group: Group) -> bool:
        """Tell whether the group is this part's."""
        name = group.name or group.prompts[0].id
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) % self.parts == self.number

    def path(self, output: Path) -> Path:
        """Return the file of this part: preds.jsonl -> preds.rank0of4.jsonl, or `output` itself where there is one part."""
        return output if self.parts == 1 else output.with_name(f"{output.stem}.rank{self.number}of{self.parts}{output.suffix}")


WHOLE = Shard(0, 1)


class Watch(NamedTuple):
    """Who is told what: the numbers of rows to do and done before; every batch when it is on disk."""

    on_start: Callable[[int, int], object] = lambda todo, done: None
    on_replies: Callable[[Group, Sequence[Reply]], object] = lambda group, replies: None


SILENT = Watch()


class Outcome(NamedTuple):
    """What became of the rows of this part: answered now, answered before, and failed {id: reason}.

    `changed`: how many were answered before, to another question or of another volume, and are done again.
    `merged`: the output holds all rows. Always so with one part; else the last part to end sees to it.
    """

    answered: int
    before: int
    failed: dict[str, str]
    merged: bool
    changed: int = 0


def predict_rows(
    asker: Asker,
    rows: Sequence[Row],
    output: Path,
    shard: Shard = WHOLE,
    watch: Watch = SILENT,
) -> Outcome:
    """Answer the rows that `output` does not answer yet, a volume at a time, and return what became of them.

    An answer to another question than the row of its id asks now is no answer. The same rows in any order, in one run or
    several, give the same predictions. A row or volume that fails is written with its `error` and tried again by the next call.
    UsageError for rows without an id of their own, and as `prediction_file`.
    """
    _check_ids(rows)
    grouped = group_rows(rows, asker.processor)
    groups = [group for group in grouped.groups if shard.has(group)]
    problems = grouped.problems if shard.number == 0 else {}
    mine = {prompt.id for group in groups for prompt in group.prompts} | problems.keys()
    asked = {prompt.id: prompt.asked for group in grouped.groups for prompt in group.prompts}
    settings, path = settings_of(asker), shard.path(output)
    failed: dict[str, str] = {}
    with prediction_file(path, settings, asked) as file:
        file.done |= answered(output, settings, asked) if path != output else set()
        before = len(mine & file.done)
        watch.on_start(len(mine), before)
        file.append(Prediction(id=name, error=reason) for name, reason in sorted(problems.items()))
        failed |= problems
        for group in groups:
            for replies in _new_replies(asker, group, file):
                failed |= {reply.prediction.id: reply.prediction.error for reply in replies if reply.prediction.error}
                watch.on_replies(group, replies)
    parts = [Shard(number, shard.parts).path(output) for number in range(shard.parts)]
    merged = shard.parts == 1 or merge(parts, output, settings, {str(row["id"]) for row in rows}, asked)
    return Outcome(len(mine) - before - len(failed), before, failed, merged, len(file.changed))


def _new_replies(asker: Asker, group: Group, file: PredictionFile) -> Iterator[list[Reply]]:
    """Yield the replies of a group that were not in the file, batch by batch, when they are.

    A batch is answered whole, even for one missing row: what a row's answer is computed with does not depend on where an
    earlier run was cut off.
    """
    batches = [b for b in group.batches(asker.settings.questions_per_batch) if not {p.id for p in b} <= file.done]
    if not batches:
        return
    encoded = _tried(lambda: asker.encode(group))
    for batch in batches:
        missing = {prompt.id for prompt in batch} - file.done
        replies = _failures(batch, encoded) if isinstance(encoded, str) else _answers(asker, encoded, batch)
        shared = {} if isinstance(encoded, str) else {k: s / len(group.prompts) for k, s in encoded.seconds.items()}
        new = [with_seconds(reply, shared) for reply in replies if reply.prediction.id in missing]
        file.append(reply.prediction for reply in new)
        yield new


def _answers(asker: Asker, encoded: Encoded, prompts: list[Prompt]) -> list[Reply]:
    """Return a reply to each prompt; where they fail together each is tried alone."""
    replies = _tried(lambda: asker.answer(encoded, prompts))
    if not isinstance(replies, str):
        return replies
    if len(prompts) == 1:
        return _failures(prompts, replies)
    return [reply for prompt in prompts for reply in _answers(asker, encoded, [prompt])]


def _tried(work: Callable[[], T]) -> T | str:
    """Return what the work returns, or why it failed: this is the edge of a work item, and the reason goes into the file."""
    try:
        return work()
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        return str(error)
    except Exception as error:
        return unforeseen(error)


def _failures(prompts: Sequence[Prompt], reason: str) -> list[Reply]:
    none = np.zeros(0, np.float32)
    rows = [Prediction(id=p.id, error=reason, volume_id=str(p.row.get("volume_id", ""))) for p in prompts]
    return [Reply(row, none.astype(bool), none) for row in rows]


def _check_ids(rows: Sequence[Row]) -> None:
    without = sum(not isinstance(row.get("id"), str) or not row["id"] for row in rows)
    if without:
        raise UsageError(f"a text in 'id' of every row wanted, {without} of {len(rows)} have none; predictions are joined by id")
    twice = [name for name, count in Counter(row["id"] for row in rows).items() if count > 1]
    if twice:
        raise UsageError(f"ids that occur once wanted, {len(twice)} occur more often, {twice[0]!r} first")
