"""One answer, as it travels from `photon predict` to `photon eval`: a line of preds.jsonl, joined to questions by id.

preds.jsonl while it grows: whole lines only, under one set of settings, by one process at a time.

The file has no header. What it was made with stands in `<name>.settings.json` beside it.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from photon_data.errors import UsageError
from photon_data.files import Location, jsonl_bytes, to_jsonl


@dataclass(frozen=True)
class Prediction:
    """An answer to one question. Only `id` and `response` are needed to score it; the rest says what of, and what it cost.

    asked: what was asked under this id, see `photon_train.rows.asked_of`; "" when not known, and of what failed.
    seconds: by stage (read, prepare, encode, answer), this question's share of what it shares with others.
    choice_scores: for each choice, by its text, the log-probability of its tokens as the answer; {} when not asked for.
    kept: which visual tokens were kept, see `pack_mask`; "" when nothing was scheduled.
    peak_memory_mib: the most memory its process had used by then (allocated on a GPU, resident on a CPU); 0 when not known.
    error: why there is no response; "" when there is one.
    """

    id: str
    response: str = ""
    error: str = ""
    asked: str = ""
    volume_id: str = ""
    scheduler: str = ""
    visual_tokens: int = 0
    kept_tokens: int = 0
    text_tokens: int = 0
    threshold: float | None = None
    kept: str = ""
    choice_scores: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_mib: float = 0.0

    def answers(self, asked: str | None) -> bool:
        """Tell whether this may be the answer to a question whose `asked_of` is given; None: no such question is known of."""
        return not self.asked or asked is None or asked == self.asked

    def to_json(self) -> str:
        """Return the line, with its line end."""
        return to_jsonl([asdict(self)])


def read_predictions(path: Path) -> list[Prediction]:
    """Return the predictions of a file, in its order, duplicates included; further keys are left out.

    UsageError for a file that cannot be read and, with the line, for what is no prediction.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(str(error)) from None
    return [_prediction(line, f"{path}:{number}") for number, line in enumerate(lines, start=1) if line.strip()]


def _prediction(line: str, where: str) -> Prediction:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{where}: a line of JSON wanted ({error}); was the file cut off?") from None
    if not isinstance(row, dict) or not isinstance(row.get("id"), str) or not isinstance(row.get("response", ""), str):
        raise UsageError(f"{where}: an object with texts `id` and `response` wanted, got {line.strip()[:80]!r}")
    names = {f.name for f in fields(Prediction)}
    return Prediction(**{name: value for name, value in row.items() if name in names})


def pack_mask(keep_V: np.ndarray) -> str:
    """Return a bool mask over the visual tokens as hexadecimal text: [1 1 0 0 0 0 0 1] -> "c1"."""
    return np.packbits(keep_V.astype(bool)).tobytes().hex()


def unpack_mask(kept: str, tokens: int) -> np.ndarray:
    """Return the bool mask [tokens] that `pack_mask` made."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(kept), np.uint8), count=tokens).astype(bool)


class PredictionFile:
    """An open file of predictions. `done` are the ids that have an answer in it, `changed` those whose answer left it."""

    def __init__(self, lines: TextIO, done: set[str], changed: set[str]) -> None:
        self.done, self.changed = done, changed
        self._lines = lines

    def append(self, predictions: Iterable[Prediction]) -> None:
        """Add predictions, on disk when this returns."""
        predictions = list(predictions)
        self._lines.write("".join(prediction.to_json() for prediction in predictions))
        self._lines.flush()
        os.fsync(self._lines.fileno())
        self.done |= {prediction.id for prediction in predictions}


@contextmanager
def prediction_file(path: Path, settings: Mapping[str, Any], asked: Mapping[str, str]) -> Iterator[PredictionFile]:
    """Open or begin a file of predictions; what is to be done again leaves it.

    That is a line that a kill cut off, lines with an error, and answers to another question than `asked` ({id: `asked_of`})
    says is asked now. UsageError where it was made with other settings, is being written by another process, or is no file of
    predictions.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _begin(path, settings)
    with _settings_path(path).open() as own:
        try:
            fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{path}: a file of its own wanted, another run is writing it; wait or choose another") from None
        done, changed = _recover(path, asked)
        with path.open("a", encoding="utf-8") as lines:
            yield PredictionFile(lines, done, changed)


def answered(path: Path, settings: Mapping[str, Any], asked: Mapping[str, str]) -> set[str]:
    """Return the ids that a finished file answers; none where there is no such file. UsageError as `prediction_file`."""
    if not path.exists():
        return set()
    _begin(path, settings)
    return {p.id for p in read_predictions(path) if not p.error and p.answers(asked.get(p.id))}


def merge(parts: Iterable[Path], output: Path, settings: Mapping[str, Any], wanted: set[str], asked: Mapping[str, str]) -> bool:
    """Add the predictions of all parts to `output`, by id, if they have every wanted id then; tell whether they do."""
    try:
        there = (p for part in (output, *parts) if part.exists() for p in read_predictions(part))
        found = {p.id: p for p in there if p.answers(asked.get(p.id))}
    except UsageError:  # a part is in the middle of a line: its writer comes here too, or has yet to go on
        return False
    if not wanted <= found.keys():
        return False
    _begin(output, settings)
    content = jsonl_bytes(asdict(found[name]) for name in sorted(found))
    Location(str(output.parent)).write(output.name, content)
    return True


def _settings_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.settings.json")


def _begin(path: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings beside a new file; UsageError where an older one was made with others."""
    place = _settings_path(path)
    wanted = json.loads(json.dumps(settings))
    if not place.exists():
        if path.exists() and path.stat().st_size:
            raise UsageError(f"{path}: a new file wanted, or one with {place.name} beside it, which says how it was made")
        Location(str(path.parent)).write(place.name, (json.dumps(wanted, indent=1) + "\n").encode())
        return
    found = json.loads(place.read_text(encoding="utf-8"))
    differences = [
        f"{name} was {found.get(name)!r} and is {wanted.get(name)!r}"
        for name in sorted(wanted.keys() | found.keys())
        if found.get(name) != wanted.get(name)
    ]
    if differences:
        raise UsageError(f"{path}: the settings it was made with wanted, but {'; '.join(differences)}. Choose another --output")


def _recover(path: Path, asked: Mapping[str, str]) -> tuple[set[str], set[str]]:
    """Return the ids that have an answer in the file, which keeps just these lines, and those that are asked otherwise now."""
    if not path.exists():
        return set(), set()
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        Location(str(path.parent)).write(path.name, whole)
    found = read_predictions(path)
    changed = {p.id for p in found if not p.answers(asked.get(p.id))}
    good = {p.id: p for p in found if not p.error and p.id not in changed}
    if len(good) < len(found):
        Location(str(path.parent)).write(path.name, jsonl_bytes(asdict(prediction) for prediction in good.values()))
    return set(good), changed
