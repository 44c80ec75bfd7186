"""One answer, as it travels from `photon predict` to `photon eval`: a line of preds.jsonl, joined to questions by id."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from photon_data.errors import UsageError
from photon_data.records import to_jsonl


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
