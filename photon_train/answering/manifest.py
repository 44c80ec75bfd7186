"""Rows of a manifest -> predictions in a file: batch by batch, resumable; a failure does not stop the others.

The file has one JSON object a line and no header. While it grows it holds whole lines only, of one run at a time; when
a run ends they are in the order of their ids. The settings that it was made with stand beside it, in
`<name>.settings.json`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TextIO, TypeVar

import numpy as np
import torch

from photon_data.errors import UsageError, is_out_of_memory, unforeseen
from photon_data.files import Location, jsonl_bytes
from photon_data.json_text import from_json
from photon_train.answering.predictor import Encoded, Predictor, ReadVolumes, Reply, recipe_of, settings_of
from photon_train.answering.request import (
    Asked,
    ReadAhead,
    Request,
    RequestGroup,
    batches_of,
    group_rows,
    reader_count,
    reading_ahead,
)
from photon_train.pruners import OWN_NUMBER
from photon_train.rows import Prediction, Row, question_digest, read_predictions

logger = logging.getLogger(__name__)
T = TypeVar("T")
WAIT_S = 1.0  # between two looks for the parts of others


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
    recipes: int = 0  # by so many recipes the stores were prepared
    waited_s: float = 0.0  # for volumes to be read
    batch: int = 0  # questions that were answered together at the end


def predict_rows(
    predictor: Predictor,
    rows: Sequence[Row],
    output: Path,
    shard: Shard = WHOLE,
    *,
    on_start: Callable[[int, int], object] = lambda total, before: None,
    on_batch: Callable[[RequestGroup, Sequence[Reply]], object] = lambda group, replies: None,
) -> Outcome:
    """Answer the rows that `output` does not answer yet, and return what became of them.

    The same rows in any order, in one run or several, give the same predictions. An answer to another question than
    the row of its id asks now does not count, nor does one about a store that was prepared by another recipe. What
    fails is written with its `error`; the next call tries it again. `on_start` is called with the numbers of rows in
    all and answered before; `on_batch` for each group of a batch, once the batch is on disk. UsageError for rows
    without an id of their own, and for an output of other settings, of a running process, or of something else.
    """
    _check_ids(rows)
    groups, problems = group_rows(rows, predictor.processor, choices=predictor.settings.choices)
    recipes = _recipes_of(groups)
    digests = {request.id: request.digest for group in groups for request in group.requests}
    expected = _Expected(settings_of(predictor), digests, recipes)
    groups = [group for group in groups if shard.holds(group)]
    failed = dict(problems) if shard.number == 0 else {}
    ids = {request.id for group in groups for request in group.requests} | failed.keys()
    path = shard.path(output)
    with _prediction_file(path, expected) as file:
        if path != output:
            file.done |= _answered_ids(output, expected)
        before = len(ids & file.done)
        on_start(len(ids), before)
        file.append(Prediction(id=id, error=reason) for id, reason in sorted(failed.items()))
        with reading_ahead(lambda place: predictor.read(groups[place]), reader_count()) as ahead:
            for batch, replies in _Run(predictor, groups, ahead).batches(file.done):
                new = [pair for pair in zip(batch, replies, strict=True) if pair[0].request.id not in file.done]
                file.append(reply.prediction for _, reply in new)
                failed |= {reply.prediction.id: reply.prediction.error for _, reply in new if reply.prediction.error}
                for place, part in groupby(new, lambda pair: pair[0].group):
                    on_batch(groups[place], [reply for _, reply in part])
    parts = [Shard(number, shard.parts).path(output) for number in range(shard.parts)]
    merged = shard.parts == 1 or _merge_parts(parts, output, {str(row["id"]) for row in rows}, expected)
    answered, kinds = len(ids) - before - len(failed), len(set(recipes.values()))
    return Outcome(answered, before, failed, merged, len(file.changed), kinds, ahead.waited_s, predictor.batch)


def wait_for_parts(output: Path, rows: Sequence[Row]) -> list[Prediction]:
    """Return what the output has, once that is a line for each row: the part that ends last writes it."""
    digests: dict[str, str | None] = dict.fromkeys(str(row["id"]) for row in rows)
    for row in rows:
        with suppress(ValueError, KeyError, TypeError):  # of a row that cannot be asked, any line will do
            digests[str(row["id"])] = question_digest(row)
    while True:
        found = read_predictions(output) if output.exists() else []
        if digests.keys() <= {p.id for p in found if p.can_answer(digests.get(p.id))}:
            return found
        time.sleep(WAIT_S)


def _check_ids(rows: Sequence[Row]) -> None:
    if without := sum(not isinstance(row.get("id"), str) or not row["id"] for row in rows):
        raise UsageError(f"expected a text in 'id' of every row, found that {without} of {len(rows)} have none")
    if twice := [name for name, count in Counter(row["id"] for row in rows).items() if count > 1]:
        raise UsageError(f"expected ids that occur once, found {len(twice)} that occur more often, {twice[0]!r} first")


def _recipes_of(groups: Sequence[RequestGroup]) -> dict[str, str]:
    """Return {id: digests of the recipes of its volumes} of the requests whose stores can be read."""
    with ThreadPoolExecutor(16) as pool:
        found = pool.map(lambda group: _result_or_failure(lambda: recipe_of(group.videos)), groups)
        pairs = [*zip(groups, found, strict=True)]
    return {r.id: recipe for group, recipe in pairs if recipe and isinstance(recipe, str) for r in group.requests}


class _Failure(NamedTuple):
    """Why something failed."""

    reason: str
    is_memory: bool = False  # it may do with less


@dataclass
class _Run:
    """Answers the requests of groups. What it holds of a group goes once its last request is answered."""

    predictor: Predictor
    groups: Sequence[RequestGroup]
    ahead: ReadAhead[ReadVolumes]
    volumes: dict[int, ReadVolumes] = field(default_factory=dict)  # of groups that are not encoded yet, by their place
    encoded: dict[int, Encoded | _Failure] = field(default_factory=dict)

    def batches(self, done: set[str]) -> Iterator[tuple[list[Asked], list[Reply]]]:
        """Yield batches and their replies. While one is answered, the volumes of the next are read.

        A batch is left out if all its requests are `done`. A whole batch is computed even for one that is missing:
        where an earlier run was cut off has no influence on an answer.
        """
        alone = str(self.predictor.model.config.scheduler) in OWN_NUMBER
        batches = batches_of(self.groups, self._size, alone=alone)
        left = (batch for batch in batches if not {asked.request.id for asked in batch} <= done)
        batch, following = next(left, None), next(left, None)
        while batch:
            self.ahead.ask([asked.group for asked in (*batch, *(following or ())) if asked.group not in self.encoded])
            yield batch, self._replies(batch)
            last = batch[-1].group
            self.encoded = {place: one for place, one in self.encoded.items() if place == last}
            self.volumes.clear()  # of those that could not be encoded
            batch, following = following, next(left, None)

    def _size(self) -> int:
        return max(1, self.predictor.batch // self.predictor.settings.samples)

    def _replies(self, batch: Sequence[Asked]) -> list[Reply]:
        """Return a reply to each request. A volume that cannot be read costs its own requests only."""
        for place in dict.fromkeys(asked.group for asked in batch):
            if place in self.encoded:
                continue
            if not self.groups[place].videos:
                self.encoded[place] = Encoded(None, {"read": 0.0, "encode": 0.0})
                continue
            found = _result_or_failure(partial(self.ahead.get, place))
            if isinstance(found, _Failure):
                self.encoded[place] = found
            else:
                self.volumes[place] = found
        readable = [asked for asked in batch if not isinstance(self.encoded.get(asked.group), _Failure)]
        replies = {reply.prediction.id: reply for reply in self._tried(readable)} if readable else {}
        for asked in batch:
            if isinstance(failure := self.encoded.get(asked.group), _Failure):
                replies[asked.request.id] = _failed(asked.request, failure)
        return [replies[asked.request.id] for asked in batch]

    def _tried(self, batch: Sequence[Asked]) -> list[Reply]:
        """Return a reply to each request; where they fail together, or there are too many, each half is tried."""
        failure = None
        if len(batch) <= self._size() or len(batch) == 1:
            found = _result_or_failure(partial(self._together, batch))
            if not isinstance(found, _Failure):
                return found
            if len(batch) == 1:
                return [_failed(batch[0].request, found)]
            failure = found
        half = (len(batch) + 1) // 2
        if failure and failure.is_memory:
            self.predictor.batch = half * self.predictor.settings.samples
            logger.warning("memory did not suffice for %d questions at a time: %d from now on", len(batch), half)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return self._tried(batch[:half]) + self._tried(batch[half:])

    def _together(self, batch: Sequence[Asked]) -> list[Reply]:
        new = [place for place in dict.fromkeys(asked.group for asked in batch) if place not in self.encoded]
        if new:
            read = [self.volumes[place] for place in new]
            self.encoded |= dict(
                zip(new, self.predictor.encode_together([self.groups[p] for p in new], read), strict=True)
            )
            for place in new:
                del self.volumes[place]
        encoded = [one for asked in batch if isinstance(one := self.encoded[asked.group], Encoded)]
        return self.predictor.answer(encoded, [asked.request for asked in batch])


def _result_or_failure(work: Callable[[], T]) -> T | _Failure:
    """Return what the work returns, or why it failed: the edge of a work item, whose reason goes into the file."""
    try:
        return work()
    except Exception as error:
        known = isinstance(error, ValueError | OSError | torch.OutOfMemoryError)
        return _Failure(str(error) if known else unforeseen(error), is_out_of_memory(error))


def _failed(request: Request, failure: _Failure) -> Reply:
    row = Prediction(request.id, error=failure.reason, volume_id=str(request.row.get("volume_id", "")))
    return Reply(row, np.zeros(0, bool), np.zeros(0, np.float32))


@dataclass
class _PredictionFile:
    """An open file of predictions."""

    lines: TextIO
    done: set[str]  # ids that have an answer in it
    changed: set[str]  # ids whose answer was removed, since their question changed

    def append(self, predictions: Iterable[Prediction]) -> None:
        """Add predictions. They are on disk when this returns."""
        for prediction in predictions:
            self.lines.write(prediction.to_json())
            self.done.add(prediction.id)
        self.lines.flush()
        os.fsync(self.lines.fileno())


class _Expected(NamedTuple):
    """What a run would make: an answer that was made by other settings, or to another question, does not count."""

    settings: Mapping[str, Any]
    digests: Mapping[str, str]  # {id: `question_digest`}
    recipes: Mapping[str, str] = {}  # {id: `recipe_of` its volumes}; an id without one takes any

    def has(self, prediction: Prediction) -> bool:
        """Return whether the prediction answers what is asked now, if it has an answer."""
        return prediction.can_answer(self.digests.get(prediction.id), self.recipes.get(prediction.id, ""))


@contextmanager
def _prediction_file(path: Path, expected: _Expected) -> Iterator[_PredictionFile]:
    """Open a file of predictions, new or not, and remove what has to be answered again.

    That is a line that a kill cut off, lines with an error, and answers to what is not expected. UsageError for a file
    of other settings, of a running process, or of something else. Unless the block raises, the lines are in the order
    of their ids then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("a") as lock:  # a file that is never replaced
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            found = "found that another run is writing it; wait or choose another"
            raise UsageError(f"{path}: expected a file of its own, {found}") from None
        _match_settings(path, expected.settings)
        done, changed = _repair(path, expected)
        with path.open("a", encoding="utf-8") as lines:
            yield _PredictionFile(lines, done, changed)
        predictions = read_predictions(path)
        if predictions != sorted(predictions, key=lambda p: p.id):
            _write(path, predictions)


def _repair(path: Path, expected: _Expected) -> tuple[set[str], set[str]]:
    """Leave the valid answers alone in the file; return their ids, and the ids of answers to changed questions."""
    if not path.exists():
        return set(), set()
    content = path.read_bytes()
    if not content.endswith(b"\n"):
        Location(str(path.parent)).write(path.name, content[: content.rfind(b"\n") + 1])
    found = read_predictions(path)
    changed = {p.id for p in found if not expected.has(p)}
    valid = {p.id: p for p in found if not p.error and p.id not in changed}
    if len(valid) < len(found):
        Location(str(path.parent)).write(path.name, jsonl_bytes(asdict(prediction) for prediction in valid.values()))
    return set(valid), changed


def _write(path: Path, predictions: Iterable[Prediction]) -> None:
    """Write the last prediction of each id, in the order of the ids."""
    last = {p.id: p for p in predictions}
    Location(str(path.parent)).write(path.name, jsonl_bytes(asdict(last[id]) for id in sorted(last)))


def _answered_ids(path: Path, expected: _Expected) -> set[str]:
    """Return the ids that a finished file answers; none where there is no file. UsageError as `_prediction_file`.

    What has to be answered again is removed from it: who waits for it must not take that for the answer.
    """
    if not path.exists():
        return set()
    _match_settings(path, expected.settings)
    return _repair(path, expected)[0]


def _merge_parts(parts: Iterable[Path], output: Path, ids: set[str], expected: _Expected) -> bool:
    """Write the predictions of all parts (and `output`) into `output`, if these have all `ids`; return whether."""
    try:
        lines = [p for part in (output, *parts) if part.exists() for p in read_predictions(part)]
    except UsageError:  # the writer of a part is in the middle of a line; it merges later itself
        return False
    found = [p for p in lines if expected.has(p)]
    if not ids <= {p.id for p in found}:
        return False
    _match_settings(output, expected.settings)
    _write(output, found)
    return True


def _match_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings beside a new file; UsageError for an older file with other settings."""
    place = path.with_name(f"{path.name}.settings.json")
    expected = json.loads(json.dumps(settings))
    if not place.exists():
        if path.exists() and path.stat().st_size:
            missing = f"{place.name} beside it, which says how it was made"
            raise UsageError(f"{path}: expected {missing}, found none; choose a new file")
        Location(str(path.parent)).write(place.name, (json.dumps(expected, indent=1) + "\n").encode())
        return
    try:
        found = dict(from_json(place.read_bytes()))
    except (ValueError, TypeError):
        raise UsageError(f"{place}: expected the settings of {path.name}, found damage; bring it back") from None
    both = [(name, found.get(name), expected.get(name)) for name in sorted(expected.keys() | found.keys())]
    differences = "; ".join(f"{name} was {old!r} and is {new!r}" for name, old, new in both if old != new)
    if differences:
        raise UsageError(f"{path}: expected the same settings as before, found {differences}; choose another --output")
