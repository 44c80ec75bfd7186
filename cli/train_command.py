"""The body of `photon train`."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from photon_cli.bar import Bar
from photon_cli.exits import STOPPED
from photon_cli.options import console, fail
from photon_data.errors import UsageError


def train(stage: str, given: dict[str, Any], config: Path | None, settings: list[str], resume: bool, dry_run: bool) -> None:
    """Train, or with `dry_run` make one step and say what the run would be. Exit code 3 when the run had to stop."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from photon_train.training.config import named_run, read_config, with_values
    from photon_train.training.grounding import grounding_of
    from photon_train.training.loop import TrainingStopped, run_steps
    from photon_train.training.loop import dry_run as try_step
    from photon_train.training.setup import start

    disable_progress_bar()  # ours is enough
    run_config = named_run(stage)
    if config:
        run_config = with_values(run_config, read_config(config))
    run_config = with_values(run_config, {**_pairs(settings), **given})
    if not torch.cuda.is_available():
        run_config = replace(run_config, precision="fp32")
    masks = _Masks("masks of volumes")
    grounding = grounding_of(run_config.grounding, None if dry_run else masks.show)
    try:
        if dry_run:
            if said := try_step(run_config, grounding):
                console.print(said, soft_wrap=True)
            return
        line = _Line("training")
        with masks if run_config.grounding else nullcontext():
            run = start(run_config, resume=resume, callback=line.show, grounding=grounding)
        if run.accelerator.is_main_process:
            console.print_json(data=run.config.to_json())
            console.print(f"{len(run.rows)} rows, step {run.state['step']} of {run.total_steps}, {run.accelerator.device}")
        with line.over(run.total_steps, run.state["step"]):
            summary = run_steps(run)
    except TrainingStopped as error:
        fail(f"Stopped: {error}", STOPPED)
    if summary:
        console.print(f"{run.folder}: checkpoint-{summary['steps']}, curves.png, summary.json, log.jsonl", soft_wrap=True)


def _pairs(settings: list[str]) -> dict[str, str]:
    """Return {"a": "1,2"} for ["a=1,2"]: here a comma belongs to the value."""
    found = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name.strip():
            raise UsageError(f"--set: key=value wanted, got {setting!r}; for example groups_per_step=4")
        found[name.strip()] = value.strip()
    return found


class _Masks(Bar):
    """How many volumes' masks are counted."""

    def show(self, done: int, total: int) -> None:
        """Show how far it is."""
        self.update(completed=done, total=total)
        self.line(f"masks of {done} of {total} volumes")


class _Line(Bar):
    """The line of a run; its plain lines are so many, however long it takes."""

    PLAIN_LINES = 20

    def over(self, total: int, done: int) -> Bar:
        """Return the context in which steps are shown."""
        self._total = total
        self.update(total=total, completed=done)
        return self

    def show(self, row: dict[str, Any]) -> None:
        """Show a row of the log; the first line of a stage 2 says how much is kept at its start."""
        text = _sentence(row)
        self.update(completed=row["step"], detail=text)
        plain = not console.is_terminal and (row["step"] % max(self._total // self.PLAIN_LINES, 1) == 0 or "eval_loss" in row)
        if plain or row["step"] == 1:
            console.print(f"step {row['step']}/{self._total}  {text}", soft_wrap=True)


def _sentence(row: dict[str, Any]) -> str:
    parts = [f"loss {row['loss']:.3f}"]
    if row.get("keep_ratio") is not None:
        parts.append(f"{row['phase']}, keeps {row['keep_ratio']:.1%} at theta {row.get('threshold') or float('nan'):.3f}")
    parts.append(f"{row['questions_per_second']:.1f} questions/s, {row['data_wait_share']:.0%} waiting")
    if row.get("eval_loss") is not None:
        parts.append(f"eval loss {row['eval_loss']:.3f}, exact {row['eval_exact']:.1%}")
    return ", ".join(parts)
