"""What is looked at before a run begins or goes on: what would stop it at step 10,000 stops it in the first seconds.

Every row: its text and its stores. A run that goes on must be the one that was begun.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Dataset

from photon_data.errors import UsageError, first_few
from photon_data.files import Location
from photon_data.questions.table import volume_id_of
from photon_data.store import NIFTI, is_whole, read_metadata
from photon_train.configuration_photon import IGNORED
from photon_train.processing_photon import PhotonProcessor
from photon_train.rows import TrainRow
from photon_train.training.config import TrainConfig, with_values, worker_count

logger = logging.getLogger(__name__)

FEW = 2000  # rows that one process looks at in a second or two
NAMED = 10  # rows that an error names

# What may change when a run goes on: settings that no step depends on, and its length.
FREE_TO_CHANGE = (
    *("output", "workers", "prefetch", "track", "on_bad_row", "on_nan", "groups_per_forward"),
    *("eval_every", "save_every", "keep_checkpoints", "patience", "epochs", "max_steps"),
)
OF_ANSWERS = ("eval_benchmark", "eval_questions", "eval_max_new_tokens")  # free where no best checkpoint is chosen
ROUND_ALIKE = {"bf16", "autocast"}  # precisions: both have float32 weights, and earlier versions called autocast bf16
# Files and folders, which may be moved: rows are compared by what they say, and weights are in the checkpoint.
MAY_MOVE = ("data", "eval", "model", "grounding")


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
    rows: Sequence[TrainRow], processor: PhotonProcessor, config: TrainConfig, accelerator: Accelerator
) -> list[TrainRow]:
    """Return the rows that can be made into ids and labels. On_bad_row "stop": UsageError names the others.

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

    def __init__(self, rows: Sequence[TrainRow], processor: PhotonProcessor, max_length: int) -> None:
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
