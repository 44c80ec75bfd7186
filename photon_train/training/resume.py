"""Whether a run that goes on is the one that was begun, and what changes when it is made longer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from photon_data.errors import UsageError
from photon_train.configuration_photon import PhotonConfig, phase_starts
from photon_train.rows import TrainRow
from photon_train.training.config import TrainConfig, with_values

# What may change when a run goes on: settings that no step depends on, and its length.
FREE_TO_CHANGE = (
    *("output", "workers", "prefetch", "track", "on_bad_row", "on_nan", "groups_per_forward"),
    *("eval_every", "save_every", "keep_checkpoints", "patience", "epochs", "max_steps"),
)
OF_ANSWERS = ("eval_benchmark", "eval_questions", "eval_max_new_tokens")  # free where no best checkpoint is chosen
ROUND_ALIKE = {"bf16", "autocast"}  # precisions: both have float32 weights, and earlier versions called autocast bf16
# Files and folders, which may be moved: rows are compared by what they say, and weights are in the checkpoint.
MAY_MOVE = ("data", "eval", "model", "grounding")


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


def keep_begun_phases(photon: PhotonConfig, state: dict[str, Any], total_steps: int) -> None:
    """Leave every phase where it began: shares of a longer run would move it behind steps that are made.

    A run of 10 steps with soft 0.2, hard 0.4 and flip 0.9 that goes on after step 5, to 20 steps: 2, 4, 18.
    """
    for phase, begun in state.get("phases", {}).items():
        now = {phase.value: start for phase, start in phase_starts(photon, total_steps).items()}
        if begun < state["step"] and now[phase] != begun:  # else no step was made in it
            setattr(photon, f"{phase}_start", begun)


@dataclass(frozen=True)
class Best:
    """The best evaluation so far, a part of the run's state."""

    step: int = 0  # of its checkpoint; 0 for none
    value: float = 0.0
    waited: int = 0  # evaluations since then

    def after(self, step: int, value: float | None, mode: str) -> Best:
        """Return the best after one more evaluation. None or NaN is never better; nor is an equal value."""
        is_better = value is not None and value == value and (not self.step or self._is_below(value, mode))
        return Best(step, value) if is_better and value is not None else Best(self.step, self.value, self.waited + 1)

    def _is_below(self, value: float, mode: str) -> bool:
        return value > self.value if mode == "max" else value < self.value
