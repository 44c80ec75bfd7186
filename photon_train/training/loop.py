"""The training loop.

for every step: for every group of this device: loss, backward; then clip, move, log; now and then evaluate and save.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from typing import Any

import torch

from photon_train.curriculum import Phase, phase_at
from photon_train.memory import peak_memory_mib
from photon_train.training.checkpoint import checkpoints, save_checkpoint, save_merged
from photon_train.training.clock import Clock
from photon_train.training.dataset import Batch
from photon_train.training.log import Log, read_log, write_summary
from photon_train.training.measures import Sums, means, sums_of
from photon_train.training.plan import plan_epoch
from photon_train.training.run import Run, TrainingStopped, check_read, read_ahead
from photon_train.training.schedule import set_rates
from photon_train.training.start import load_model
from photon_train.training.validation import evaluate

logger = logging.getLogger(__name__)


def run_steps(run: Run) -> dict[str, Any]:
    """Train from `run.state` to the end, evaluating and saving on the way; return the summary, which is also written."""
    log = Log(run.folder, run.state["step"]) if run.accelerator.is_main_process else None
    started, clock = time.perf_counter(), Clock()
    for step_batches in _steps_left(run, clock):
        row = _step(run, step_batches, clock)
        last = run.state["step"] == run.total_steps
        if run.eval_rows and (last or _is_due(run, run.config.eval_every)):
            row |= evaluate(run)
        _report(run, log, row)
        if last or _is_due(run, run.config.save_every):
            _save(run)
        if last:
            break
        clock.restart()
    return _finish(run, time.perf_counter() - started)


def _is_due(run: Run, every: int) -> bool:
    return every > 0 and run.state["step"] % every == 0


def _steps_left(run: Run, clock: Clock) -> Iterator[list[Batch]]:
    """Yield this process's batches of each step that is left, and count the steps in `run.state`."""
    left = range(run.state["epoch"], run.config.epochs) if run.state["step"] < run.total_steps else ()
    for epoch in left:
        yield from _steps_of(run, epoch, run.state["step_in_epoch"], clock)
        run.state |= {"epoch": epoch + 1, "step_in_epoch": 0}


def _steps_of(run: Run, epoch: int, done: int, clock: Clock) -> Iterator[list[Batch]]:
    """Yield this process's batches of each step of the epoch that is left."""
    steps = plan_epoch(run.rows, run.config.questions_per_volume, run.config.groups_per_step, run.config.seed, epoch)[done:]
    read = read_ahead(run, run.turn.of(steps), training=True, epoch=epoch)
    per_step = run.config.groups_per_step // run.turn.world
    for _ in steps:
        with clock.waiting():
            step = [next(read) for _ in range(per_step)]
        yield step


def _step(run: Run, step_batches: list[Batch], clock: Clock) -> dict[str, Any]:
    """Make one optimizer step; return its row of the log."""
    step, sums = run.state["step"], Sums()
    phase = phase_at(run.photon, step, run.total_steps) if run.is_stage_2 else Phase.DENSE
    rates = set_rates(run.engine.optimizer, run.config, step, run.total_steps)
    for number, batch in enumerate(step_batches):
        check_read(run, batch)
        last = number == len(step_batches) - 1
        with run.engine.group(last):
            sums.add(_group(run, batch.to(run.accelerator.device), phase, len(step_batches)))
    norms = run.engine.gradient_norms()
    total = sums.over(run.accelerator)
    row = means(total, run.config.groups_per_step)
    if _may_move(run, row, step_batches, norms):
        run.engine.move(run.config.max_grad_norm)
    run.engine.forget()
    run.state |= {"step": step + 1, "step_in_epoch": run.state["step_in_epoch"] + 1}
    timing = clock.row(total["questions"], total["volumes"])
    return {
        "step": step + 1,
        "epoch": run.state["epoch"],
        "phase": phase.value,
        **row,
        **{f"grad_norm/{module}": norm for module, norm in norms.items()},
        **{f"lr/{module}": rate for module, rate in rates.items()},
        **timing,
        "peak_memory_mib": peak_memory_mib(run.accelerator.device),
    }


def _group(run: Run, batch: Batch, phase: Phase, accumulated: int) -> dict[str, Any]:
    """Add a group's gradients; return its sums."""
    scale = batch.weight / accumulated
    inputs = dict(batch.inputs)
    if run.is_stage_2:
        inputs |= {"step": run.state["step"], "total_steps": run.total_steps, "loss_scale": scale}
        inputs["flip"] = batch.flips if phase is Phase.FLIP else torch.zeros_like(batch.flips)
    with run.accelerator.autocast():
        output = run.model(**inputs)
    run.engine.backward(output.loss * scale)
    return sums_of(output, batch, run.photon)


def _may_move(run: Run, row: dict[str, Any], step_batches: list[Batch], norms: dict[str, float]) -> bool:
    """Tell whether loss and gradients are finite; stop, or say so, if not. All processes decide alike."""
    bad = not all(map(math.isfinite, (row["loss"], *norms.values())))
    if not run.accelerator.reduce(torch.tensor(float(bad), device=run.accelerator.device), "sum"):
        return True
    ids = ", ".join(id for batch in step_batches for id in batch.ids)
    named = f"step {run.state['step'] + 1}: a finite loss wanted, got {row['loss']} for the rows {ids}"
    if run.config.on_nan == "stop":
        raise TrainingStopped(f"{named}. Lower the learning rate or go on without such steps with on_nan=skip")
    logger.warning("%s; the step is skipped", named)
    return False


def _report(run: Run, log: Log | None, row: dict[str, Any]) -> None:
    if log is not None:
        log.write(row)
        numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
        run.accelerator.log(numbers, step=row["step"])
        run.watch(row)


def _save(run: Run) -> None:
    save_checkpoint(run.engine, run.processor, run.folder, dict(run.state), run.config.keep_checkpoints)


def _finish(run: Run, seconds: float) -> dict[str, Any]:
    run.accelerator.end_training()
    if not run.accelerator.is_main_process:
        return {}
    if run.config.lora_rank:
        checkpoint = checkpoints(run.folder)[-1]
        save_merged(load_model(run.config, checkpoint)[0], run.processor, checkpoint)
    rows = read_log(run.folder)
    last = rows[-1]
    summary = {"steps": run.state["step"], "seconds_of_this_session": seconds, "first": rows[0], "last": last}
    summary["questions_trained"] = sum(row["questions"] for row in rows)
    summary["groups_skipped"] = sum(row["skipped_groups"] for row in rows)
    write_summary(run.folder, summary)
    return summary
