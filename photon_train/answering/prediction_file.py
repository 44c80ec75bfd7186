"""The file of predictions: one JSON object a line and no header.

While it grows it holds whole lines only, of one run at a time; when a run ends they are in the order of their ids. The
settings that it was made with stand beside it, in `<name>.settings.json`.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from photon_data.errors import UsageError
from photon_data.files import Location, jsonl_bytes
from photon_data.json_text import from_json
from photon_train.answering.prediction import Prediction, read_predictions


@dataclass
class PredictionFile:
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


class Expected(NamedTuple):
    """What a run would make: an answer that was made by other settings, or to another question, does not count."""

    settings: Mapping[str, Any]
    digests: Mapping[str, str]  # {id: `question_digest`}
    recipes: Mapping[str, str] = {}  # {id: `recipe_of` its volumes}; an id without one takes any

    def has(self, prediction: Prediction) -> bool:
        """Return whether the prediction answers what is asked now, if it has an answer."""
        return prediction.can_answer(self.digests.get(prediction.id), self.recipes.get(prediction.id, ""))


@contextmanager
def prediction_file(path: Path, expected: Expected) -> Iterator[PredictionFile]:
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
            yield PredictionFile(lines, done, changed)
        predictions = read_predictions(path)
        if predictions != sorted(predictions, key=lambda p: p.id):
            _write(path, predictions)


def _repair(path: Path, expected: Expected) -> tuple[set[str], set[str]]:
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


def answered_ids(path: Path, expected: Expected) -> set[str]:
    """Return the ids that a finished file answers; none where there is no file. UsageError as `prediction_file`.

    What has to be answered again is removed from it: who waits for it must not take that for the answer.
    """
    if not path.exists():
        return set()
    _match_settings(path, expected.settings)
    return _repair(path, expected)[0]


def merge_parts(parts: Iterable[Path], output: Path, ids: set[str], expected: Expected) -> bool:
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
