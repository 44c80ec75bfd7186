"""The body of `photon train`: what is resolved, shown while it trains, and said at the end."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from transformers.utils.logging import disable_progress_bar

from photon_cli.terminal import INTERRUPTED, STOPPED, ProgressBar, console, fail
from photon_data.errors import UsageError
from photon_data.files import Location
from photon_data.lock import exclusive
from photon_train.checkpoint import checkpoints
from photon_train.training import loop
from photon_train.training.config import OF_ANSWERS, TrainConfig, named_run, read_config, with_values
from photon_train.training.grounding import grounding_of
from photon_train.training.processes import TrainingInterrupted
from photon_train.training.setup import AnsweringFactory, start

SHOWN_SCORES = 3  # of the answers to rows of eval, in a line
PLAIN_LINES = 20  # without a terminal a training run prints about this many lines, however long it takes


def train_config(stage: str, file: Path | None, settings: Sequence[str], given: dict[str, Any]) -> TrainConfig:
    """Return the configuration of the named run, changed by the file, then by --set, then by the `given` options."""
    config = named_run(stage)
    in_file = read_config(file) if file else {}
    config = with_values(config, in_file)
    changes = {}
    for setting in settings:  # unlike in other options, a comma belongs to the value
        name, equals, value = (part.strip() for part in setting.partition("="))
        if not equals or not name:
            raise UsageError(f"--set: expected key=value, found {setting!r}; for example questions_per_step=16")
        changes[name] = value
    if not torch.cuda.is_available() and config.precision != "fp32" and "precision" not in {*changes, *in_file}:
        console.print(f"no GPU: precision=fp32, not the {config.precision} of {stage}; --set precision=... is obeyed")
        changes["precision"] = "fp32"
    return with_values(config, {**changes, **given})


def dry_run(config: TrainConfig) -> None:
    """Make one step of the run, and describe it."""
    with _stopped_as_exit_codes(config):
        grounding = grounding_of(config.grounding) if config.grounding else None
        if description := loop.dry_run(config, grounding, _answering_of(config)):
            console.print(description, soft_wrap=True)


def train(config: TrainConfig, resume: bool | Literal["auto"], *, profile: bool = False) -> None:
    """Train, as the only writer of the run's folder. Ends with Exit where the run is stopped."""
    is_first = os.environ.get("RANK", "0") == "0"  # of torchrun's processes; it holds the folder for all of them
    with _stopped_as_exit_codes(config), exclusive(Location(config.output)) if is_first else nullcontext():
        _train(config, resume, profile)


@contextmanager
def _stopped_as_exit_codes(config: TrainConfig) -> Iterator[None]:
    """Say how a run was stopped, and what it left."""
    disable_progress_bar()  # transformers' own bar
    try:
        yield
    except loop.TrainingStopped as error:
        fail(f"Stopped: {error}", STOPPED)
    except TrainingInterrupted as error:
        fail(f"Interrupted: {error}. Go on with --resume.", INTERRUPTED)
    except KeyboardInterrupt:
        kept = checkpoints(Path(config.output))
        found = f"{kept[-1].name} is the last checkpoint" if kept else "no checkpoint was written yet"
        fail(f"Interrupted: {found} in {config.output}. Go on with --resume auto.", INTERRUPTED)


def _answering_of(config: TrainConfig) -> AnsweringFactory | None:
    """Return what evaluates answers while the model trains, if anything does: its metrics need the extra `eval`."""
    if not config.eval_benchmark:
        return None
    from photon_train.training.evaluation import answering_of

    return answering_of(config)


def _train(config: TrainConfig, resume: bool | Literal["auto"], profile: bool) -> None:
    """Train, with progress."""
    bar, masks = _TrainingBar("training"), ProgressBar("masks of volumes")

    def on_masks(done: int, total: int) -> None:
        masks.count(done, total)
        masks.line(f"masks of {done} of {total} volumes")

    with masks if config.grounding else nullcontext():
        grounding = grounding_of(config.grounding, on_masks) if config.grounding else None
        run = start(config, resume=resume, callback=bar.on_row, grounding=grounding, answering=_answering_of(config))
    first_step, bar.total_steps = run.state["step"], run.total_steps
    if run.accelerator.is_main_process:
        console.print_json(data=run.config.to_json())
        console.print(f"{len(run.rows)} rows, step {first_step} of {run.total_steps}, {run.accelerator.device}")
        if run.curriculum:
            console.print(run.curriculum)
    bar.update(total=run.total_steps, completed=first_step)
    with bar:
        summary = loop.run_steps(run, profile)
    if summary:
        if summary["stopped_early"]:
            console.print(f"no better {config.best_metric} in {config.patience} evaluations: ended early")
        if best := summary.get("best"):
            console.print(f"best: checkpoint-{best['step']} ({best['metric']} {best['value']:.4g})", soft_wrap=True)
        files = f"checkpoint-{summary['steps']}, curves.png, summary.json, log.jsonl"
        console.print(f"{run.folder}: {files}", soft_wrap=True)


class _TrainingBar(ProgressBar):
    total_steps = 0

    def on_row(self, row: dict[str, Any]) -> None:
        # The first step always has a plain line: in stage 2 it says what is kept at the start.
        parts = [f"loss {row['loss']:.3f}"]
        if row.get("keep_ratio") is not None:
            theta = f" at theta {row['threshold']:.3f}" if row.get("threshold") else ""
            parts.append(f"{row['phase']}, keeps {row['keep_ratio']:.1%}{theta}")
        tokens = f"{row['tokens_per_second']:.0f} tokens/s"
        tokens += f", MFU {row['mfu']:.1%}" if row.get("mfu") else ""
        parts.append(f"{row['questions_per_second']:.1f} questions/s, {tokens}, {row['data_wait_share']:.0%} waiting")
        if row.get("eval_loss") is not None:
            parts.append(f"eval loss {row['eval_loss']:.3f}, forced exact {row['eval_forced_exact']:.1%}")
            answers = [name for name in row if name.startswith(OF_ANSWERS) and row[name] is not None]
            parts += [f"{name.removeprefix(OF_ANSWERS)} {row[name]:.1f}" for name in answers[:SHOWN_SCORES]]
        text = ", ".join(parts)
        self.update(completed=row["step"], detail=text)
        is_due = row["step"] % max(self.total_steps // PLAIN_LINES, 1) == 0 or "eval_loss" in row
        if row["step"] == 1 or (is_due and not console.is_terminal):
            console.print(f"step {row['step']}/{self.total_steps}  {text}", soft_wrap=True)
