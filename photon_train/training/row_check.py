"""Every row is looked at when a run starts: what would stop it at step 10,000 stops it in the first seconds."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Dataset

from photon_data.errors import UsageError
from photon_train.configuration_photon import IGNORED
from photon_train.processing_photon import PhotonProcessor
from photon_train.rows import TrainRow
from photon_train.training.config import TrainConfig, worker_count

logger = logging.getLogger(__name__)

FEW = 2000  # rows that one process looks at in a second or two
NAMED = 10  # rows that an error names


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
