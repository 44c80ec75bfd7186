"""What a row asks, and one answer to it: a prediction, which is a line of the file that `photon eval` reads.

The file has one JSON object a line and no header. While it grows it holds whole lines only, of one run at a time; when
a run ends they are in the order of their ids. The settings that it was made with stand beside it, in
`<name>.settings.json`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

from photon_data.errors import UsageError
from photon_data.files import Location, jsonl_bytes
from photon_data.json_text import fields_of, from_json
from photon_data.questions.table import read_text

Row = Mapping[str, Any]
MOST_TOKENS = 1 << 31


def without_answer(row: Row) -> dict[str, Any]:
    """Return the row up to its last question: what the assistant says at the end is left out."""
    messages = list(row["messages"])
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    return {**row, "messages": messages}


def prompt_of(row: Row) -> str:
    """Return what the user says last, with the <video> tags; "" where the user says nothing."""
    return next((str(one["content"]) for one in reversed(row["messages"]) if one["role"] == "user"), "")


def question_digest(row: Row) -> str:
    """Return 16 hexadecimal digits of the messages up to the answer, the choices, and the volumes' names.

    The folders of the volumes do not matter: they can be moved. A volume in memory may have a `name`.
    """
    names = [
        Path(video).name if isinstance(video, str | Path) else getattr(video, "name", "")
        for video in row.get("videos") or ()
    ]
    parts = [without_answer(row)["messages"], names, list(choices_of(row))]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def choices_of(row: Row) -> tuple[str, ...]:
    """Return the choices of a row; without any it has none, or an empty text in their place (docs/manifests.md).

    UsageError for what is no list of texts: the characters of "yes|no" are no choices.
    """
    choices = row.get("choices") or ()
    if not isinstance(choices, list | tuple) or not all(isinstance(choice, str) for choice in choices):
        raise UsageError(f'{row.get("id")}: expected a list of texts in choices, found {choices!r}; write ["A", "B"]')
    return tuple(choice for choice in choices if choice != "")


def organ_masks_of(row: Row) -> tuple[str, ...]:
    """Return the names of the masks a row asks about: a JSON list in its `extra`. UsageError for anything else."""
    listed = (row.get("extra") or {}).get("organ_masks") or "[]"
    try:
        names = from_json(listed)
    except (ValueError, TypeError):
        names = None
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise UsageError(f"{row.get('id')}: expected a JSON list of names in extra.organ_masks, found {listed!r}")
    return tuple(names)


@dataclass(frozen=True)
class Prediction:
    """An answer to one question. Scoring needs `id` and `response`; the rest is for diagnosis and costs."""

    id: str
    response: str = ""
    error: str = ""  # why there is no response
    asked: str = ""  # the `question_digest` of the row; "" when it is not known, and after an error
    volume_id: str = ""
    scheduler: str = ""
    visual_tokens: int = 0
    kept_tokens: int = 0
    text_tokens: int = 0
    threshold: float | None = None  # None for a scheduler without one
    kept: str = ""  # which visual tokens were kept, see `pack_mask`; "" when nothing was scheduled
    choice_scores: dict[str, float] = field(default_factory=dict)  # log-probability of each choice as the answer
    choice_scores_per_token: dict[str, float] = field(default_factory=dict)  # that, divided by its number of tokens
    token_logprobs: list[float] = field(default_factory=list)  # of each token of the response, its end marker included
    samples: list[str] = field(default_factory=list)  # drawn answers, where there are several; `response` is the first
    recipe: str = ""  # digests of the recipes that the stores were prepared by, "+" between them
    seconds: dict[str, float] = field(default_factory=dict)  # by stage; shared stages are divided among their questions
    peak_memory_mib: float = 0.0  # the most that the process had used by then; 0 when it is not known

    def can_answer(self, digest: str | None, recipe: str = "") -> bool:
        """Return False if this answers another question than that of the digest, or of volumes of another recipe.

        None stands for any question, "" for any recipe.
        """
        is_of_recipe = not (self.recipe and recipe) or self.recipe == recipe
        return is_of_recipe and (not self.asked or digest is None or digest == self.asked)

    def check(self) -> None:
        """Raise ValueError for numbers that no model counts, and for kept tokens that are not those of the volume."""
        try:
            self.id.encode()
            kept = bytes.fromhex(self.kept)
        except ValueError:
            raise ValueError("expected `id` in UTF-8 and `kept` in hexadecimal digits, found others") from None
        if not 0 <= self.kept_tokens <= self.visual_tokens <= MOST_TOKENS or not 0 <= self.text_tokens <= MOST_TOKENS:
            raise ValueError(f"expected 0 <= `kept_tokens` <= `visual_tokens` < {MOST_TOKENS:,}, found other numbers")
        if kept and len(kept) != (self.visual_tokens + 7) // 8:
            raise ValueError(f"expected `kept` of {self.visual_tokens} tokens, found {8 * len(kept)} bits")

    def to_json(self) -> str:
        """Return the line of the file, with its line end."""
        return jsonl_bytes([asdict(self)]).decode()


def read_predictions(path: Path) -> list[Prediction]:
    """Return the predictions of a file, duplicates too, without unknown keys; UsageError for what is no prediction.

    Other tools write `null` for what they do not know. A key of ours with a value of another type is refused: what it
    should mean would be guessed.
    """
    lines, found = read_text(path, (path.suffix.lower(),)).split("\n"), []
    for place, line in ((f"{path}:{number}", line) for number, line in enumerate(lines, start=1) if line.strip()):
        try:
            row = from_json(line)
        except ValueError as error:
            raise UsageError(f"{place}: expected a line of JSON ({error}); was the file cut off?") from None
        if not isinstance(row, dict) or {type(row.get("id")), type(row.get("response", ""))} != {str}:
            raise UsageError(f"{place}: expected an object with texts `id` and `response`, found {line.strip()[:80]!r}")
        known = {name: value for name, value in row.items() if value is not None}
        try:
            found.append(Prediction(**fields_of(Prediction, known)))
            found[-1].check()
        except ValueError as error:
            raise UsageError(f"{place}: {error}; correct it, or leave that key out") from None
    return found


def pack_mask(keep_V: np.ndarray) -> str:
    """Return a bool mask over the visual tokens as hexadecimal text: [1 1 0 0 0 0 0 1] -> "c1"."""
    return np.packbits(keep_V.astype(bool)).tobytes().hex()


def unpack_mask(kept: str, tokens: int) -> np.ndarray:
    """Return the bool mask [tokens] that `pack_mask` made."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(kept), np.uint8), count=tokens).astype(bool)


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
