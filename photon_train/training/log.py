"""What a run says of its steps: log.jsonl (a line a step), and curves.png and summary.json at its end."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from photon_data.files import Location
from photon_train.configuration_photon import PhotonConfig
from photon_train.modeling_photon import PhotonOutput
from photon_train.scheduling import visual_mask
from photon_train.training.batches import Batch
from photon_train.training.config import OF_ANSWERS

LOG, CURVES, SUMMARY = "log.jsonl", "curves.png", "summary.json"

# Title of a panel -> the logged values in it.
PANELS = {
    "loss (per step)": ("loss", "ce"),
    "parts of the loss": ("band", "robustness", "flip", "grounding"),
    "kept share of visual tokens": ("keep_ratio", "eval_keep_ratio"),
    "threshold": ("threshold",),
    "evaluation": ("eval_loss", "eval_forced_exact"),
    "gradient norms": tuple(f"grad_norm/{m}" for m in ("patch_embedding", "vision", "language_model", "threshold")),
    "questions and samples per second": ("questions_per_second", "volumes_per_second"),
    "tokens per second": ("tokens_per_second",),
    "model FLOPs utilisation": ("mfu",),
    "share of time waiting for data": ("data_wait_share",),
}

MOST_LINES = 8  # of them in a panel: the first ones, which a benchmark is judged by

LOSSES = ("loss", "ce", "band", "robustness", "flip", "grounding")
COUNTS = ("questions", "volumes", "tokens", "visual_tokens", "visual_tokens_kept", "skipped_groups")
# Sums over rows: kept_square gives the spread of the keep ratio between them; right are those answered exactly.
OF_ROWS = ("scheduled_rows", "kept_share", "kept_square", "threshold", "decided_rows", "right", "flops")
SUMS = (*LOSSES, "groups", *COUNTS, *OF_ROWS, "interrupted")  # interrupted: processes that were asked to end


def sums_of(loss: Tensor, output: PhotonOutput, batch: Batch, config: PhotonConfig) -> dict[str, Any]:
    """Return what one micro-batch adds to `Sums`; of one with weight 0, nothing but that it was skipped.

    loss: all of it, the model's and what was added. The keep ratio is what would be kept, whatever the phase.
    """
    if batch.weight == 0:
        return {"skipped_groups": float(bool(batch.error))}
    visual_BL = visual_mask(batch.inputs["input_ids"], config) & batch.inputs["attention_mask"].bool()
    count_B = visual_BL.sum(1)
    sums = {
        "loss": loss.detach() * batch.weight,
        **{name: output[name].detach() * batch.weight for name in ("ce", "band", "robustness", "flip")},
        "groups": batch.groups,
        "questions": len(batch.ids),
        "volumes": batch.volumes,
        "tokens": batch.inputs["attention_mask"].sum(),
        "visual_tokens": count_B.sum(),
        "visual_tokens_kept": count_B.sum(),
    }
    if output.scheduled is None or config.scheduler == "none":
        return sums
    selection = output.scheduled.selection
    is_its = config.scheduler == "its"
    chosen_BL = selection.probability_BL > config.keep_probability if is_its else selection.keep_BL
    share_B = (chosen_BL & visual_BL).sum(1) / count_B.clamp_min(1)
    return sums | {
        "visual_tokens_kept": (output.scheduled.keep_BL & visual_BL).sum(),
        "scheduled_rows": (count_B > 0).sum(),
        "kept_share": share_B.sum(),
        "kept_square": share_B.square().sum(),
        "threshold": selection.threshold_B.nan_to_num(0.0).sum(),
        "decided_rows": (~selection.threshold_B.isnan()).sum(),
    }


class Sums:
    """Adds up `SUMS`, in this process and over all processes."""

    def __init__(self) -> None:
        self._sums: dict[str, Any] = dict.fromkeys(SUMS, 0.0)

    def add(self, sums: dict[str, Any]) -> None:
        """Add the sums of one micro-batch, without waiting for the device."""
        for name, value in sums.items():
            self._sums[name] = self._sums[name] + value

    def over(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the sums over all processes."""
        own = torch.tensor([float(self._sums[name]) for name in SUMS], dtype=torch.float64, device=accelerator.device)
        return dict(zip(SUMS, accelerator.reduce(own, "sum").tolist(), strict=True))


def means(sums: dict[str, float], groups: int) -> dict[str, float]:
    """Return the row of the log: losses as means over the groups of a step, keep ratio and threshold over its rows."""
    row = {name: sums[name] / groups for name in LOSSES}
    if rows := sums["scheduled_rows"]:
        row["keep_ratio"] = mean = sums["kept_share"] / rows
        row["keep_ratio_spread"] = max(sums["kept_square"] / rows - mean**2, 0.0) ** 0.5
    if rows := sums["decided_rows"]:
        row["threshold"] = sums["threshold"] / rows
    return {**row, **{name: sums[name] for name in COUNTS}}


class Log:
    """log.jsonl of a run. Lines of steps after `from_step`, left by a run that was killed, are dropped."""

    def __init__(self, run: Path, from_step: int) -> None:
        self.run = run
        kept = [row for row in read_log(run) if row["step"] <= from_step]
        self.last: dict[str, Any] = kept[-1] if kept else {}
        self._write_all(kept)

    def write(self, row: dict[str, Any]) -> None:
        """Append one line, or replace that of the same step; what is not finite becomes null, for JSON has no NaN."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        if self.last.get("step") == row["step"]:
            self._write_all([*read_log(self.run)[:-1], finite])
        else:
            with (self.run / LOG).open("a") as file:
                file.write(json.dumps(finite) + "\n")
        self.last = finite

    def _write_all(self, rows: Sequence[dict[str, Any]]) -> None:
        Location(str(self.run)).write(LOG, "".join(json.dumps(row) + "\n" for row in rows).encode())


def read_log(run: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's log; a last line that was cut off is left out."""
    path = run / LOG
    lines = path.read_text().split("\n") if path.is_file() else []
    return [json.loads(line) for line in lines[:-1] if line]


def write_summary(run: Path, steps: int, seconds: float, more: dict[str, Any]) -> dict[str, Any]:
    """Write summary.json and curves.png of a run that ended, in a session of so many seconds; return the summary."""
    rows = read_log(run)
    summary = {
        "steps": steps,
        "seconds_of_this_session": seconds,
        "first": rows[0],
        "last": rows[-1],
        "questions_trained": sum(row["questions"] for row in rows if not row.get("skipped_steps")),
        "groups_skipped": sum(row["skipped_groups"] for row in rows),
        "steps_skipped": sum(row.get("skipped_steps", 0) for row in rows),
        **more,
    }
    Location(str(run)).write(SUMMARY, json.dumps(summary, indent=1).encode())
    draw_curves(rows, run / CURVES)
    return summary


def draw_curves(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the logged values over the steps, a panel for each kind that was logged."""
    import matplotlib  # late: half a second

    matplotlib.use("Agg")
    from matplotlib import pyplot

    logged = {name for row in rows for name in row}
    answers = tuple(dict.fromkeys(name for row in rows for name in row if name.startswith(OF_ANSWERS)))
    titled = {**PANELS, "answers (points)": answers[:MOST_LINES]}
    panels = {title: own for title, names in titled.items() if (own := [name for name in names if name in logged])}
    figure, axes = pyplot.subplots(-(-len(panels) // 2), 2, figsize=(11, 1.3 * len(panels) + 1), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, names) in zip(axes.flat, panels.items(), strict=False):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            axis.plot(*zip(*points, strict=True), label=name, linewidth=1, marker="." if len(points) < 50 else None)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("optimizer step", fontsize=8)
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
