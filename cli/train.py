"""The body of `photon train`: a run or a dry run, and its progress."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from photon_cli.terminal import STOPPED, ProgressBar, console, fail
from photon_data.errors import UsageError
from photon_train.training.config import TrainConfig, named_run, read_config, with_values
from photon_train.training.grounding import grounding_of
from photon_train.training.loop import TrainingStopped, dry_run, run_steps
from photon_train.training.setup import start

PLAIN_LINES = 20  # without a terminal a run prints about this many lines, however long it takes


def train(
    stage: str, given: dict[str, Any], file: Path | None, settings: Sequence[str], resume: bool, dry: bool
) -> None:
    """Train, or with `dry` make one step and describe the run. The exit code is 3 when the run had to stop.

    The configuration is that of the named run, changed by the file, then by --set, then by the `given` options.
    """
    disable_progress_bar()  # transformers' own bar
    config = named_run(stage)
    if file:
        config = with_values(config, read_config(file))
    changes = {}
    for setting in settings:  # unlike in other options, a comma belongs to the value
        name, equals, value = (part.strip() for part in setting.partition("="))
        if not equals or not name:
            raise UsageError(f"--set: expected key=value, found {setting!r}; for example groups_per_step=4")
        changes[name] = value
    config = with_values(config, {**changes, **given})
    config = config if torch.cuda.is_available() else replace(config, precision="fp32")
    try:
        if not dry:
            _run(config, resume)
        elif description := dry_run(config, grounding_of(config.grounding) if config.grounding else None):
            console.print(description, soft_wrap=True)
    except TrainingStopped as error:
        fail(f"Stopped: {error}", STOPPED)


def _run(config: TrainConfig, resume: bool) -> None:
    bar = _TrainingBar("training")
    masks = ProgressBar("masks of volumes")

    def on_masks(done: int, total: int) -> None:
        masks.count(done, total)
        masks.line(f"masks of {done} of {total} volumes")

    with masks if config.grounding else nullcontext():
        grounding = grounding_of(config.grounding, on_masks) if config.grounding else None
        run = start(config, resume=resume, callback=bar.on_row, grounding=grounding)
    first_step, bar.total_steps = run.state["step"], run.total_steps
    if run.accelerator.is_main_process:
        console.print_json(data=run.config.to_json())
        console.print(f"{len(run.rows)} rows, step {first_step} of {run.total_steps}, {run.accelerator.device}")
    bar.update(total=run.total_steps, completed=first_step)
    with bar:
        summary = run_steps(run)
    if summary:
        files = f"checkpoint-{summary['steps']}, curves.png, summary.json, log.jsonl"
        console.print(f"{run.folder}: {files}", soft_wrap=True)


class _TrainingBar(ProgressBar):
    total_steps = 0

    def on_row(self, row: dict[str, Any]) -> None:
        # The first step always has a plain line: in stage 2 it says what is kept at the start.
        text = _sentence(row)
        self.update(completed=row["step"], detail=text)
        is_due = row["step"] % max(self.total_steps // PLAIN_LINES, 1) == 0 or "eval_loss" in row
        if row["step"] == 1 or (is_due and not console.is_terminal):
            console.print(f"step {row['step']}/{self.total_steps}  {text}", soft_wrap=True)


def _sentence(row: dict[str, Any]) -> str:
    parts = [f"loss {row['loss']:.3f}"]
    if row.get("keep_ratio") is not None:
        theta = row.get("threshold") or float("nan")
        parts.append(f"{row['phase']}, keeps {row['keep_ratio']:.1%} at theta {theta:.3f}")
    parts.append(f"{row['questions_per_second']:.1f} questions/s, {row['data_wait_share']:.0%} waiting")
    if row.get("eval_loss") is not None:
        parts.append(f"eval loss {row['eval_loss']:.3f}, exact {row['eval_exact']:.1%}")
    return ", ".join(parts)
