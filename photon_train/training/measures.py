"""What is logged of an optimizer step: sums over its groups and devices, then means."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from photon_train.layout import visual_mask
from photon_train.modeling_photon import PhotonOutput
from photon_train.training.dataset import Batch

PARTS = ("ce", "band", "robustness", "flip", "grounding")
# Sums over the rows of a step; `kept_square` gives the spread of the keep ratio between rows.
SUMS = (
    "loss",
    *PARTS,
    "groups",
    "questions",
    "volumes",
    "tokens",
    "scheduled_rows",
    "kept_share",
    "kept_square",
    "threshold",
    "decided_rows",
    "visual_tokens",
    "visual_tokens_kept",
    "right",
    "skipped_groups",
)


def sums_of(output: PhotonOutput, batch: Batch, config: Any) -> dict[str, Tensor | float]:
    """Return the sums of one group; of a group with weight 0, nothing but that it was skipped."""
    if batch.weight == 0:
        return {"skipped_groups": float(bool(batch.error))}
    rows = len(batch.ids)
    losses: dict[str, Any] = {"loss": output.loss, **{name: getattr(output, name) for name in PARTS}}
    found = {name: value.detach() * batch.weight for name, value in losses.items()}
    tokens = batch.inputs["attention_mask"].sum()
    return {
        **found,
        "groups": 1.0,
        "questions": rows,
        "volumes": batch.volumes,
        "tokens": tokens,
        **_of_schedule(output, batch, config),
    }


def _of_schedule(output: PhotonOutput, batch: Batch, config: Any) -> dict[str, Tensor | float]:
    """Return sums over rows: what p says would be kept, whatever the phase, and what was."""
    visual_BL = visual_mask(batch.inputs["input_ids"], config) & batch.inputs["attention_mask"].bool()
    count_B = visual_BL.sum(1)
    scheduled = output.scheduled
    if scheduled is None or config.scheduler != "its":
        return {"visual_tokens": count_B.sum(), "visual_tokens_kept": count_B.sum()}
    share_B = ((scheduled.probability_BL > config.keep_probability) & visual_BL).sum(1) / count_B.clamp_min(1)
    decided_B = ~scheduled.threshold_B.isnan()
    return {
        "visual_tokens": count_B.sum(),
        "visual_tokens_kept": (scheduled.keep_BL & visual_BL).sum(),
        "scheduled_rows": (count_B > 0).sum(),
        "kept_share": share_B.sum(),
        "kept_square": share_B.square().sum(),
        "threshold": scheduled.threshold_B.nan_to_num(0.0).sum(),
        "decided_rows": decided_B.sum(),
    }


class Sums:
    """Adds up `SUMS`, here and over all processes."""

    def __init__(self) -> None:
        self._sums: dict[str, Any] = dict.fromkeys(SUMS, 0.0)

    def add(self, sums: dict[str, Tensor | float]) -> None:
        """Add the sums of one group, without waiting for the device."""
        for name, value in sums.items():
            self._sums[name] = self._sums[name] + value

    def over(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the sums over all processes."""
        own = torch.tensor([float(self._sums[name]) for name in SUMS], dtype=torch.float64, device=accelerator.device)
        return dict(zip(SUMS, accelerator.reduce(own, "sum").tolist(), strict=True))


def means(sums: dict[str, float], slots: int) -> dict[str, float]:
    """Return the row of the log: losses as means over the groups of a step, keep ratio and threshold over its rows."""
    rows = {name: sums[name] / slots for name in ("loss", *PARTS)}
    if sums["scheduled_rows"]:
        mean = sums["kept_share"] / sums["scheduled_rows"]
        rows["keep_ratio"] = mean
        rows["keep_ratio_spread"] = max(sums["kept_square"] / sums["scheduled_rows"] - mean**2, 0.0) ** 0.5
    if sums["decided_rows"]:
        rows["threshold"] = sums["threshold"] / sums["decided_rows"]
    counts = ("questions", "volumes", "tokens", "visual_tokens", "visual_tokens_kept", "skipped_groups")
    return {**rows, **{name: sums[name] for name in counts}}
