"""Rows of a manifest -> predictions in a file: volume by volume, resumable; a failure does not stop the others."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from photon_data.errors import UsageError, unforeseen
from photon_train.answering.prediction import Prediction, answered_ids, merge_parts, prediction_file
from photon_train.answering.predictor import Encoded, Predictor, Reply, Request, RequestGroup, group_rows, settings_of
from photon_train.rows import Row

T = TypeVar("T")


class Shard(NamedTuple):
    """Part `number` (from 0) of `parts`. A hash of a volume's path says which part its rows belong to."""

    number: int
    parts: int

    def holds(self, group: RequestGroup) -> bool:
        """Return whether the group belongs to this part."""
        name = group.name or group.requests[0].id
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) % self.parts == self.number

    def path(self, output: Path) -> Path:
        """Return the file of this part: preds.jsonl -> preds.rank0of4.jsonl; `output` itself for one part."""
        part = f"{output.stem}.rank{self.number}of{self.parts}{output.suffix}"
        return output if self.parts == 1 else output.with_name(part)


WHOLE = Shard(0, 1)


class Outcome(NamedTuple):
    """What became of the rows of this part."""

    answered: int  # now
    before: int  # answered by earlier runs
    failed: dict[str, str]  # {id: reason}
    merged: bool  # whether the output holds all rows: always with one part, else once the last part has ended
    changed: int = 0  # rows that had an answer to another question, or about another volume


def predict_rows(
    predictor: Predictor,
    rows: Sequence[Row],
    output: Path,
    shard: Shard = WHOLE,
    *,
    on_start: Callable[[int, int], object] = lambda total, before: None,
    on_batch: Callable[[RequestGroup, Sequence[Reply]], object] = lambda group, replies: None,
) -> Outcome:
    """Answer the rows that `output` does not answer yet, a volume at a time, and return what became of them.

    The same rows in any order, in one run or several, give the same predictions. An answer to another question than
    the row of its id asks now does not count. What fails is written with its `error`; the next call tries it again.
    `on_start` is called with the numbers of rows in all and answered before; `on_batch` after each batch is on disk.
    UsageError for rows without an id of their own, and as `prediction_file`.
    """
    _check_ids(rows)
    groups, problems = group_rows(rows, predictor.processor)
    digests = {request.id: request.digest for group in groups for request in group.requests}
    groups = [group for group in groups if shard.holds(group)]
    failed = dict(problems) if shard.number == 0 else {}
    ids = {request.id for group in groups for request in group.requests} | failed.keys()
    settings, path = settings_of(predictor), shard.path(output)
    with prediction_file(path, settings, digests) as file:
        if path != output:
            file.done |= answered_ids(output, settings, digests)
        before = len(ids & file.done)
        on_start(len(ids), before)
        file.append(Prediction(id=id, error=reason) for id, reason in sorted(failed.items()))
        for group in groups:
            for replies in _new_replies(predictor, group, file.done):
                file.append(reply.prediction for reply in replies)
                failed |= {reply.prediction.id: reply.prediction.error for reply in replies if reply.prediction.error}
                on_batch(group, replies)
    parts = [Shard(number, shard.parts).path(output) for number in range(shard.parts)]
    merged = shard.parts == 1 or merge_parts(parts, output, settings, {str(row["id"]) for row in rows}, digests)
    return Outcome(len(ids) - before - len(failed), before, failed, merged, len(file.changed))


def _check_ids(rows: Sequence[Row]) -> None:
    if without := sum(not isinstance(row.get("id"), str) or not row["id"] for row in rows):
        raise UsageError(f"expected a text in 'id' of every row, found that {without} of {len(rows)} have none")
    if twice := [name for name, count in Counter(row["id"] for row in rows).items() if count > 1]:
        raise UsageError(f"expected ids that occur once, found {len(twice)} that occur more often, {twice[0]!r} first")


def _new_replies(predictor: Predictor, group: RequestGroup, done: set[str]) -> Iterator[list[Reply]]:
    """Yield, batch by batch, the replies to those requests of a group that are not `done`.

    A whole batch is computed even for one missing row: where an earlier run was cut off has no influence on an answer.
    """
    size = predictor.settings.questions_per_batch
    batches = [batch for batch in group.batches(size) if not {request.id for request in batch} <= done]
    encoded = _result_or_reason(lambda: predictor.encode(group)) if batches else ""
    for batch in batches:
        missing = {request.id for request in batch} - done
        replies = _failures(batch, encoded) if isinstance(encoded, str) else _replies(predictor, encoded, batch)
        yield [reply for reply in replies if reply.prediction.id in missing]


def _replies(predictor: Predictor, encoded: Encoded, requests: list[Request]) -> list[Reply]:
    """Return a reply to each request; where they fail together each is tried alone."""
    replies = _result_or_reason(lambda: predictor.answer(encoded, requests))
    if not isinstance(replies, str):
        return replies
    if len(requests) == 1:
        return _failures(requests, replies)
    return [reply for request in requests for reply in _replies(predictor, encoded, [request])]


def _result_or_reason(work: Callable[[], T]) -> T | str:
    """Return what the work returns, or why it failed: the edge of a work item, whose reason goes into the file."""
    try:
        return work()
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        return str(error)
    except Exception as error:
        return unforeseen(error)


def _failures(requests: Sequence[Request], reason: str) -> list[Reply]:
    rows = [Prediction(id=r.id, error=reason, volume_id=str(r.row.get("volume_id", ""))) for r in requests]
    return [Reply(row, np.zeros(0, bool), np.zeros(0, np.float32)) for row in rows]
