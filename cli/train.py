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
    stage: str, given: dict[str, Any], config: Path | None, settings: Sequence[str], resume: bool, dry: bool
) -> None:
    """Train, or with `dry` make one step and describe the run. The exit code is 3 when the run had to stop."""
    disable_progress_bar()  # transformers' own bar
    run_config = _config_of(stage, given, config, settings)
    try:
        if dry:
            if description := dry_run(run_config, grounding_of(run_config.grounding)):
                console.print(description, soft_wrap=True)
        else:
            _run(run_config, resume)
    except TrainingStopped as error:
        fail(f"Stopped: {error}", STOPPED)


def _config_of(stage: str, given: dict[str, Any], config: Path | None, settings: Sequence[str]) -> TrainConfig:
    """Return the configuration of the named run, changed by the file, then by --set, then by the command's options."""
    run_config = named_run(stage)
    if config:
        run_config = with_values(run_config, read_config(config))
    changes = {}
    for setting in settings:  # unlike in other options, a comma belongs to the value
        name, equals, value = setting.partition("=")
        if not equals or not name.strip():
            raise UsageError(f"--set: expected key=value, found {setting!r}; for example groups_per_step=4")
        changes[name.strip()] = value.strip()
    run_config = with_values(run_config, {**changes, **given})
    return run_config if torch.cuda.is_available() else replace(run_config, precision="fp32")


def _run(config: TrainConfig, resume: bool) -> None:
    bar = _TrainingBar("training")
    masks = ProgressBar("masks of volumes")

    def on_masks(done: int, total: int) -> None:
        masks.update(completed=done, total=total)
        masks.line(f"masks of {done} of {total} volumes")

    with masks if config.grounding else nullcontext():
        run = start(config, resume=resume, callback=bar.on_row, grounding=grounding_of(config.grounding, on_masks))
    first_step = run.state["step"]
    if run.accelerator.is_main_process:
        console.print_json(data=run.config.to_json())
        console.print(f"{len(run.rows)} rows, step {first_step} of {run.total_steps}, {run.accelerator.device}")
    bar.update(total=run.total_steps, completed=first_step)
    bar.total_steps = run.total_steps
    with bar:
        summary = run_steps(run)
    if summary:
        console.print(
            f"{run.folder}: checkpoint-{summary['steps']}, curves.png, summary.json, log.jsonl", soft_wrap=True
        )


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
        parts.append(
            f"{row['phase']}, keeps {row['keep_ratio']:.1%} at theta {row.get('threshold') or float('nan'):.3f}"
        )
    parts.append(f"{row['questions_per_second']:.1f} questions/s, {row['data_wait_share']:.0%} waiting")
    if row.get("eval_loss") is not None:
        parts.append(f"eval loss {row['eval_loss']:.3f}, exact {row['eval_exact']:.1%}")
    return ", ".join(parts)
