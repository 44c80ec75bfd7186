"""What a row asks, one answer to it (a prediction), and the file that takes predictions to `photon eval`.

The file has one JSON object a line and no header. While it grows it holds whole lines only, of one run at a time. The
settings that it was made with stand beside it, in `<name>.settings.json`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from photon_data.errors import UsageError
from photon_data.files import Location, jsonl_bytes

Row = Mapping[str, Any]


def without_answer(row: Row) -> dict[str, Any]:
    """Return the row up to its last question: what the assistant says at the end is left out."""
    messages = list(row["messages"])
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    return {**row, "messages": messages}


def question_digest(row: Row) -> str:
    """Return 16 hexadecimal digits of the messages up to the answer, the names of the volumes, and the choices.

    The folders of the volumes do not matter: stores and manifests can be moved.
    """
    names = [Path(video).name if isinstance(video, str | Path) else "" for video in row.get("videos") or ()]
    parts = [without_answer(row)["messages"], names, list(row.get("choices") or ())]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def organ_masks_of(row: Row) -> tuple[str, ...]:
    """Return the names of the masks a row asks about: a JSON list in its `extra`. UsageError for anything else."""
    listed = (row.get("extra") or {}).get("organ_masks") or "[]"
    try:
        names = json.loads(listed)
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
    seconds: dict[str, float] = field(default_factory=dict)  # by stage; shared stages are divided among their questions
    peak_memory_mib: float = 0.0  # the most that the process had used by then; 0 when it is not known

    def can_answer(self, digest: str | None) -> bool:
        """Return False if this answers another question than that of the digest; None stands for any."""
        return not self.asked or digest is None or digest == self.asked

    def to_json(self) -> str:
        """Return the line of the file, with its line end."""
        return jsonl_bytes([asdict(self)]).decode()


def read_predictions(path: Path) -> list[Prediction]:
    """Return the predictions of a file, in its order, duplicates included; unknown keys are ignored.

    UsageError for a file that cannot be read, and for a line that is no prediction.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(str(error)) from None
    return [_parsed(line, f"{path}:{number}") for number, line in enumerate(lines, start=1) if line.strip()]


def _parsed(line: str, place: str) -> Prediction:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{place}: expected a line of JSON ({error}); was the file cut off?") from None
    if not isinstance(row, dict) or not isinstance(row.get("id"), str) or not isinstance(row.get("response", ""), str):
        raise UsageError(f"{place}: expected an object with texts `id` and `response`, found {line.strip()[:80]!r}")
    names = {f.name for f in fields(Prediction)}
    return Prediction(**{name: value for name, value in row.items() if name in names})


def pack_mask(keep_V: np.ndarray) -> str:
    """Return a bool mask over the visual tokens as hexadecimal text: [1 1 0 0 0 0 0 1] -> "c1"."""
    return np.packbits(keep_V.astype(bool)).tobytes().hex()


def unpack_mask(kept: str, tokens: int) -> np.ndarray:
    """Return the bool mask [tokens] that `pack_mask` made."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(kept), np.uint8), count=tokens).astype(bool)


class PredictionFile:
    """An open file of predictions. `done`: ids that have an answer in it. `changed`: ids whose answer was removed."""

    def __init__(self, lines: TextIO, done: set[str], changed: set[str]) -> None:
        self.done, self.changed = done, changed
        self._lines = lines

    def append(self, predictions: Iterable[Prediction]) -> None:
        """Add predictions. They are on disk when this returns."""
        predictions = list(predictions)
        self._lines.write("".join(prediction.to_json() for prediction in predictions))
        self._lines.flush()
        os.fsync(self._lines.fileno())
        self.done |= {prediction.id for prediction in predictions}


@contextmanager
def prediction_file(path: Path, settings: Mapping[str, Any], digests: Mapping[str, str]) -> Iterator[PredictionFile]:
    """Open a file of predictions, new or not, and remove what has to be answered again.

    Removed are a line that a kill cut off, lines with an error, and answers to other questions than those of
    `digests` ({id: `question_digest`}). UsageError for a file that was made with other settings, that another process
    writes, or that holds something else than predictions.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _match_settings(path, settings)
    with _settings_path(path).open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"{path}: expected a file of its own, found that another run is writing it; wait or choose another"
            ) from None
        done, changed = _repair(path, digests)
        with path.open("a", encoding="utf-8") as lines:
            yield PredictionFile(lines, done, changed)


def _repair(path: Path, digests: Mapping[str, str]) -> tuple[set[str], set[str]]:
    """Rewrite the file with its valid answers alone; return their ids, and the ids of answers to changed questions."""
    if not path.exists():
        return set(), set()
    folder, content = Location(str(path.parent)), path.read_bytes()
    if not content.endswith(b"\n"):
        folder.write(path.name, content[: content.rfind(b"\n") + 1])
    found = read_predictions(path)
    changed = {p.id for p in found if not p.can_answer(digests.get(p.id))}
    valid = {p.id: p for p in found if not p.error and p.id not in changed}
    if len(valid) < len(found):
        folder.write(path.name, jsonl_bytes(asdict(prediction) for prediction in valid.values()))
    return set(valid), changed


def answered_ids(path: Path, settings: Mapping[str, Any], digests: Mapping[str, str]) -> set[str]:
    """Return the ids that a finished file answers; none where there is no file. UsageError as `prediction_file`."""
    if not path.exists():
        return set()
    _match_settings(path, settings)
    return {p.id for p in read_predictions(path) if not p.error and p.can_answer(digests.get(p.id))}


def merge_parts(
    parts: Iterable[Path], output: Path, settings: Mapping[str, Any], ids: set[str], digests: Mapping[str, str]
) -> bool:
    """Write the predictions of all parts (and `output`) into `output`, if these have all `ids`; return whether."""
    try:
        found = {
            p.id: p
            for part in (output, *parts)
            if part.exists()
            for p in read_predictions(part)
            if p.can_answer(digests.get(p.id))
        }
    except UsageError:  # the writer of a part is in the middle of a line; it merges later itself
        return False
    if not ids <= found.keys():
        return False
    _match_settings(output, settings)
    Location(str(output.parent)).write(output.name, jsonl_bytes(asdict(found[id]) for id in sorted(found)))
    return True


def _settings_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.settings.json")


def _match_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings beside a new file; UsageError for an older file that was made with others."""
    place = _settings_path(path)
    expected = json.loads(json.dumps(settings))
    if not place.exists():
        if path.exists() and path.stat().st_size:
            raise UsageError(
                f"{path}: expected {place.name} beside it, which says how it was made, found none; choose a new file"
            )
        Location(str(path.parent)).write(place.name, (json.dumps(expected, indent=1) + "\n").encode())
        return
    found = json.loads(place.read_text(encoding="utf-8"))
    differences = [
        f"{name} was {found.get(name)!r} and is {expected.get(name)!r}"
        for name in sorted(expected.keys() | found.keys())
        if found.get(name) != expected.get(name)
    ]
    if differences:
        raise UsageError(
            f"{path}: expected the same settings as before, found {'; '.join(differences)}; choose another --output"
        )
