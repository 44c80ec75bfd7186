"""What a run says of its steps: log.jsonl (a line a step), and curves.png and summary.json at its end.

A line says how fast the step was too. Of a few steps there can be a profile.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from accelerate import Accelerator
from torch.profiler import ProfilerActivity, profile, schedule

from photon_data.errors import UsageError
from photon_data.files import Location, write_whole
from photon_data.json_text import from_json
from photon_train.costs import peak_memory_mib, peak_tflops
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

PROFILE = "profile"  # folder of the run
TRACE, SNAPSHOT = "trace.json.gz", "memory.pickle"  # for perfetto.dev, and for pytorch.org/memory_viz
PROFILED = {"wait": 1, "warmup": 1, "active": 3, "repeat": 1}  # steps, of which the first ones start things up


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


def rates(
    row: dict[str, float], seconds: float, waited: float, accelerator: Accelerator, precision: str
) -> dict[str, float]:
    """Return what the log says of the time of a step, given its sums over all processes, and takes "flops" from them.

    tflops_per_second is of one device; mfu is its share of the device's peak in bfloat16, left out where that is not
    known, and for fp32.
    """
    tflops = row.pop("flops") / seconds / accelerator.num_processes / 1e12
    peak = None if precision == "fp32" else peak_tflops(accelerator.device)
    return {
        "seconds": seconds,
        "questions_per_second": row["questions"] / seconds,
        "volumes_per_second": row["volumes"] / seconds,
        "tokens_per_second": row["tokens"] / seconds,
        "tflops_per_second": tflops,
        **({"mfu": tflops / peak} if peak else {}),
        "data_wait_share": waited / seconds,
        "peak_memory_mib": peak_memory_mib(accelerator.device),
    }


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
    """Return the rows of a run's log; a last line that was cut off is left out. UsageError for a damaged one."""
    path = run / LOG
    try:
        lines = path.read_text().split("\n") if path.is_file() else []
        rows = [from_json(line) for line in lines[:-1] if line]
        if not all(type(row["step"]) is int for row in rows):
            raise TypeError("a step that is no whole number")
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(
            f"{path}: expected a line of JSON for each step, found {error!r:.200}; bring it back, or move it away"
        ) from None
    return rows


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


class Profiler:
    """A context that writes RUN/profile in the main process: a trace of three steps, and on a GPU their memory."""

    def __init__(self, run: Path, accelerator: Accelerator, *, enabled: bool) -> None:
        self._folder, self._on_gpu = run / PROFILE, accelerator.device.type == "cuda"
        self._profile: Any = None
        if enabled and accelerator.is_main_process:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])]
            self._profile = profile(
                activities=activities,
                schedule=schedule(**PROFILED),
                on_trace_ready=self._write,
                record_shapes=True,
                profile_memory=True,
            )

    def __enter__(self) -> Self:
        if self._profile:
            if self._on_gpu:
                torch.cuda.memory._record_memory_history(max_entries=200_000)
            self._profile.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._profile:
            self._profile.stop()

    def step(self) -> None:
        """Note that a step is over."""
        if self._profile:
            self._profile.step()

    def _write(self, traced: Any) -> None:
        with write_whole(self._folder) as folder:
            folder.mkdir()
            traced.export_chrome_trace(str(folder / TRACE))
            if self._on_gpu:
                torch.cuda.memory._dump_snapshot(str(folder / SNAPSHOT))
                torch.cuda.memory._record_memory_history(enabled=None)
