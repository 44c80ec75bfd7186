"""How long a step took, and how much of it went by waiting for data.

Learning rates as a function of the step: nothing to save, nothing to restore.

How a model in training does on rows it is not trained on.

The training loop.

for every step: for every group of this device: loss, backward; then clip, move, log; now and then evaluate and save.

One step of a run that leaves nothing behind: what would be trained, for how long, in how much memory.
"""

from __future__ import annotations

import logging
import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from photon_train.answering.predictor import peak_memory_mib
from photon_train.losses import Phase, phase_at
from photon_train.modeling_photon import PhotonOutput
from photon_train.training.batches import Batch, plan_epoch
from photon_train.training.checkpoint import checkpoints, save_checkpoint, save_merged
from photon_train.training.config import TrainConfig
from photon_train.training.log import Log, Sums, means, read_log, sums_of, write_summary
from photon_train.training.setup import Run, TrainingStopped, check_read, load_model, read_ahead, start
from photon_train.training.sharding import LANGUAGE_MODEL, MODULES, module_of


class Clock:
    """Seconds since the last restart, and how many of them were waits."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin a step."""
        self._started, self._waited = time.perf_counter(), 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count what happens within as waiting."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - started

    def row(self, questions: float, volumes: float) -> dict[str, float]:
        """Return the timing of the step, with rates from the questions and volumes of all devices."""
        seconds = time.perf_counter() - self._started
        return {
            "seconds": seconds,
            "questions_per_second": questions / seconds,
            "volumes_per_second": volumes / seconds,
            "data_wait_share": self._waited / seconds,
        }


def rate_factor(config: TrainConfig, step: int, total_steps: int) -> float:
    """Return what every peak rate is multiplied by in optimizer step `step`, counted from 0.

    Rises in a line over the warm-up (the last step of which has 1), then falls to 0 along a cosine or a line, or stays.
    """
    rising = math.ceil(config.warmup * total_steps)
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(total_steps - rising, 1)
    return {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[config.schedule]


def set_rates(optimizer: Any, config: TrainConfig, step: int, total_steps: int) -> dict[str, float]:
    """Set the optimizer's rates for a step and return them by module."""
    factor = rate_factor(config, step, total_steps)
    for group in optimizer.param_groups:
        group["lr"] = config.rates[group["module"]] * factor
    return {group["module"]: group["lr"] for group in optimizer.param_groups}


def evaluate(run: Run) -> dict[str, float]:
    """Return the mean loss over groups, the share of rows whose answer would be decoded exactly, and the keep ratio.

    An answer counts when every token of it, end marker included, is the likeliest after those before it.
    """
    groups = [
        group for step in plan_epoch(run.eval_rows, run.config.questions_per_volume, run.turn.world, 0, 0) for group in step
    ]
    sums = Sums()
    run.model.eval()
    with torch.no_grad(), run.accelerator.autocast():
        for batch in read_ahead(run, run.turn.of([groups]), training=False):
            batch = batch.to(run.accelerator.device)
            check_read(run, batch)
            output = run.model(**batch.inputs, answers_only=True) if batch.weight or run.is_sharded else None
            if output is None or batch.weight == 0:
                sums.add({"skipped_groups": float(bool(batch.error))})
                continue
            sums.add(sums_of(output, replace(batch, weight=1.0), run.photon) | {"right": _right(output, len(batch.ids))})
    run.model.train()
    total = sums.over(run.accelerator)
    found = {"eval_loss": total["loss"] / max(total["groups"], 1), "eval_exact": total["right"] / max(total["questions"], 1)}
    if total["visual_tokens"]:
        found["eval_keep_ratio"] = total["visual_tokens_kept"] / total["visual_tokens"]
    return found | {"eval_questions": total["questions"], "eval_skipped_groups": total["skipped_groups"]}


def _right(output: PhotonOutput, rows: int) -> torch.Tensor:
    """Return how many rows have all their answer tokens right."""
    logits_NV, labels_N, rows_N = output.logits, output.answer_labels_N, output.answer_rows_N
    assert logits_NV is not None and labels_N is not None and rows_N is not None, "the batch has labels"
    wrong_N = (logits_NV.argmax(-1) != labels_N).float()
    return (torch.zeros(rows, device=rows_N.device).index_add_(0, rows_N, wrong_N) == 0).sum()


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
    loss, sums = output.loss, sums_of(output, batch, run.photon)
    if run.recorder is not None and batch.grounding is not None:
        grounding = run.recorder.loss(batch.inputs, batch.grounding)
        loss = loss + grounding
        if batch.weight:
            added = grounding.detach() * batch.weight
            sums |= {"grounding": added, "loss": sums["loss"] + added}
    run.engine.backward(loss * scale)
    return sums


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


def dry_run(config: TrainConfig) -> str:
    """Return a description of the run, after one step of it on real rows in a temporary folder; "" but in the main process.

    Every row is checked against its store, as at the start of a run. Raises what that raises.
    """
    with tempfile.TemporaryDirectory(prefix="photon-") as folder:
        trial = start(replace(config, output=folder, track=()), resume=False)
        whole = trial.total_steps
        trial.total_steps, trial.eval_rows = 1, []
        started = time.perf_counter()
        last = run_steps(trial).get("last")
        seconds = time.perf_counter() - started
    if last is None:
        return ""
    volumes = len({video for row in trial.rows for video in row.videos})
    lines = [
        f"stage {config.stage}: {len(trial.rows)} rows on {volumes} volumes, all stores are there",
        *_modules(trial),
        f"{whole} steps in {config.epochs} epochs, each of {config.groups_per_step} volumes with up to "
        f"{config.questions_per_volume} questions",
        f"first step: loss {last['loss']:.4f}, {last['seconds']:.2f} s with start-up ({seconds:.2f} s with saving), "
        f"{last['data_wait_share']:.0%} waiting for data, {last['peak_memory_mib']:.0f} MiB",
        f"at this pace {whole * last['seconds'] / 3600:.2f} h",
    ]
    return "\n".join(lines)


def _modules(run: Run) -> list[str]:
    """Return a line per module: how much of it is trained, at which peak rate."""
    model = run.accelerator.unwrap_model(run.model)
    lines = []
    for module in (*MODULES, LANGUAGE_MODEL):
        own = [parameter for name, parameter in model.named_parameters() if module_of(name) == module]
        trained = sum(_size(p) for p in own if p.requires_grad)
        if own:
            rate = f"learning rate {run.config.rates[module]:g}" if trained else "frozen"
            lines.append(f"  {module:16} {trained:,} of {sum(map(_size, own)):,} parameters, {rate}")
    return lines


def _size(parameter: Any) -> int:
    """Return how many numbers a weight has, of which this process may hold none."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
