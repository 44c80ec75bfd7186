"""The training loop, and its log.

for every step: for every micro-batch of this rank: loss, backward; then clip, step, log; now and then validate, save.

A run leaves log.jsonl (a line a step), curves.png and summary.json for people.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from photon_data.files import Location
from photon_train.checkpoint import checkpoints, save_checkpoint, save_merged
from photon_train.configuration_photon import Phase, PhotonConfig, phase_at
from photon_train.modeling_photon import PhotonOutput, peak_memory_mib
from photon_train.rows import TrainRow
from photon_train.scheduling import visual_mask
from photon_train.training.batches import Batch, MicroBatch, MicroBatches, plan_epoch, read_ahead
from photon_train.training.config import TrainConfig
from photon_train.training.setup import (
    LANGUAGE_MODEL,
    MODULES,
    LossFactory,
    Run,
    gradient_norms,
    load_model,
    module_of,
    set_learning_rates,
    start,
)

logger = logging.getLogger(__name__)

LOG, CURVES, SUMMARY = "log.jsonl", "curves.png", "summary.json"

# Title of a panel -> the logged values in it.
PANELS = {
    "loss (per step)": ("loss", "ce"),
    "parts of the loss": ("band", "robustness", "flip", "grounding"),
    "kept share of visual tokens": ("keep_ratio", "eval_keep_ratio"),
    "threshold": ("threshold",),
    "evaluation": ("eval_loss", "eval_exact"),
    "gradient norms": tuple(f"grad_norm/{m}" for m in ("patch_embedding", "vision", "language_model", "threshold")),
    "questions per second": ("questions_per_second",),
    "share of time waiting for data": ("data_wait_share",),
}

LOSSES = ("loss", "ce", "band", "robustness", "flip", "grounding")
COUNTS = ("questions", "volumes", "tokens", "visual_tokens", "visual_tokens_kept", "skipped_groups")
# Sums over rows: kept_square gives the spread of the keep ratio between them; right are those answered exactly.
OF_ROWS = ("scheduled_rows", "kept_share", "kept_square", "threshold", "decided_rows", "right")
SUMS = (*LOSSES, "groups", *COUNTS, *OF_ROWS)


class TrainingStopped(RuntimeError):
    """The run cannot go on under its settings: a row that cannot be read, a loss that is not finite. Names the rows."""


def run_steps(run: Run) -> dict[str, Any]:
    """Train from `run.state` to the end; validate and save on the way. Return the summary, which is also written."""
    log = Log(run.folder, run.state["step"]) if run.accelerator.is_main_process else None
    session = started = time.perf_counter()
    for batches in _steps_left(run):
        waited = time.perf_counter() - started
        row = _step(run, batches)
        seconds = time.perf_counter() - started
        row |= {
            "seconds": seconds,
            "questions_per_second": row["questions"] / seconds,
            "volumes_per_second": row["volumes"] / seconds,
            "data_wait_share": waited / seconds,
            "peak_memory_mib": peak_memory_mib(run.accelerator.device),
        }
        last = run.state["step"] == run.total_steps
        if run.eval_rows and (last or _is_due(run, run.config.eval_every)):
            row |= validate(run)
        if log is not None:
            log.write(row)
            run.accelerator.log({k: v for k, v in row.items() if isinstance(v, int | float)}, step=row["step"])
            run.callback(row)
        if last or _is_due(run, run.config.save_every):
            keep = run.config.keep_checkpoints
            save_checkpoint(run.folder, run.state, run.accelerator, run.model, run.optimizer, run.processor, keep)
        if last:
            break
        started = time.perf_counter()
    return _finish(run, time.perf_counter() - session)


def _is_due(run: Run, every: int) -> bool:
    return every > 0 and run.state["step"] % every == 0


def _steps_left(run: Run) -> Iterator[list[Batch]]:
    """Yield this rank's batches of each step that is left, and count the epochs in `run.state`."""
    config, state = run.config, run.state
    per_rank = config.groups_per_step // run.accelerator.num_processes
    for epoch in range(state["epoch"], config.epochs) if state["step"] < run.total_steps else ():
        plan = plan_epoch(run.rows, config.questions_per_volume, config.groups_per_step, config.seed, epoch)
        steps = plan[state["step_in_epoch"] :]
        batches = _read(run, run.rows, steps, training=True, epoch=epoch)
        for _ in steps:
            yield [next(batches) for _ in range(per_rank)]
        state |= {"epoch": epoch + 1, "step_in_epoch": 0}


def _read(
    run: Run, rows: Sequence[TrainRow], steps: Sequence[Sequence[MicroBatch]], *, training: bool, epoch: int = 0
) -> Iterator[Batch]:
    """Yield this rank's batches of the steps. One that cannot be read stops the run, or is named and has weight 0."""
    rank, world_size = run.accelerator.process_index, run.accelerator.num_processes
    own = [micro_batch for step in steps for micro_batch in step[rank::world_size]]
    dataset = MicroBatches(rows, own, run.processor, run.config, training, epoch, run.accelerator.is_fsdp2)
    for batch in read_ahead(dataset, run.accelerator.device):
        if batch.error:
            message = f"{len(batch.ids)} rows ({', '.join(batch.ids)}) cannot be read: {batch.error}"
            if run.config.on_bad_row == "stop":
                raise TrainingStopped(f"{message}. Repair the store, or leave such rows out with on_bad_row=skip")
            logger.warning("skipped: %s", message)
        yield batch


def _step(run: Run, batches: list[Batch]) -> dict[str, Any]:
    """Make one optimizer step; return its row of the log."""
    step, sums = run.state["step"], Sums()
    phase = phase_at(run.processor.config, step, run.total_steps) if run.schedules else Phase.DENSE
    learning_rates = set_learning_rates(run.optimizer, run.config, step, run.total_steps)
    for batch in batches:
        is_last = batch is batches[-1]  # its backward makes gradients known to all processes
        with nullcontext() if is_last else run.accelerator.no_sync(run.model):
            sums.add(_micro_batch(run, batch.to(run.accelerator.device), phase, len(batches)))
    norms = gradient_norms(run.model)
    row = means(sums.over(run.accelerator), run.config.groups_per_step)
    if _is_finite(run, row["loss"], norms, batches):
        if run.config.max_grad_norm:
            run.accelerator.clip_grad_norm_(run.model.parameters(), run.config.max_grad_norm)
        run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.state |= {"step": step + 1, "step_in_epoch": run.state["step_in_epoch"] + 1}
    return {
        "step": step + 1,
        "epoch": run.state["epoch"],
        "phase": phase.value,
        **row,
        **{f"grad_norm/{module}": norm for module, norm in norms.items()},
        **{f"lr/{module}": learning_rate for module, learning_rate in learning_rates.items()},
    }


def _micro_batch(run: Run, batch: Batch, phase: Phase, accumulated: int) -> dict[str, Any]:
    """Add the gradients of a micro-batch; return its sums."""
    scale = batch.weight / accumulated
    inputs = dict(batch.inputs)
    if run.schedules:
        inputs |= {"step": run.state["step"], "total_steps": run.total_steps, "loss_scale": scale}
        inputs["flip"] = batch.flips if phase is Phase.FLIP else torch.zeros_like(batch.flips)
    with run.accelerator.autocast():
        output = run.model(**inputs)
    grounding = run.grounding(batch) if run.grounding else None
    loss = output.loss if grounding is None else output.loss + grounding
    run.accelerator.backward(loss * scale)
    sums = sums_of(loss, output, batch, run.processor.config)
    return sums if grounding is None else sums | {"grounding": grounding.detach() * batch.weight}


def sums_of(loss: Tensor, output: PhotonOutput, batch: Batch, config: PhotonConfig) -> dict[str, Any]:
    """Return what one micro-batch adds to `Sums`; of one with weight 0, nothing but that it was skipped.

    loss: all of it, the model's and what was added. The keep ratio is what p says, whatever the phase.
    """
    if batch.weight == 0:
        return {"skipped_groups": float(bool(batch.error))}
    visual_BL = visual_mask(batch.inputs["input_ids"], config) & batch.inputs["attention_mask"].bool()
    count_B = visual_BL.sum(1)
    sums = {
        "loss": loss.detach() * batch.weight,
        **{name: output[name].detach() * batch.weight for name in ("ce", "band", "robustness", "flip")},
        "groups": 1.0,
        "questions": len(batch.ids),
        "volumes": batch.volumes,
        "tokens": batch.inputs["attention_mask"].sum(),
        "visual_tokens": count_B.sum(),
        "visual_tokens_kept": count_B.sum(),
    }
    if output.scheduled is None or config.scheduler != "its":
        return sums
    selection = output.scheduled.selection
    share_B = ((selection.probability_BL > config.keep_probability) & visual_BL).sum(1) / count_B.clamp_min(1)
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


def _is_finite(run: Run, loss: float, norms: dict[str, float], batches: list[Batch]) -> bool:
    """Tell whether loss and gradients are finite in all processes; where they are not, stop or warn."""
    infinite = not all(map(math.isfinite, (loss, *norms.values())))
    if not run.accelerator.reduce(torch.tensor(float(infinite), device=run.accelerator.device), "sum"):
        return True
    ids = ", ".join(id for batch in batches for id in batch.ids)
    message = f"step {run.state['step'] + 1}: expected a finite loss, found {loss} for the rows {ids}"
    if run.config.on_nan == "stop":
        raise TrainingStopped(f"{message}; lower the learning rate, or leave such steps out with on_nan=skip")
    logger.warning("%s; the step is skipped", message)
    return False


def validate(run: Run) -> dict[str, float]:
    """Return how the model does on `eval_rows`: mean loss over groups, share of rows answered exactly, keep ratio.

    A row is answered exactly when every token of its answer, end marker included, is the likeliest after the true ones
    before it.
    """
    world_size = run.accelerator.num_processes
    steps = plan_epoch(run.eval_rows, run.config.questions_per_volume, world_size, 0, 0)
    sums = Sums()
    run.model.eval()
    with torch.no_grad(), run.accelerator.autocast():
        for batch in _read(run, run.eval_rows, steps, training=False):
            batch = batch.to(run.accelerator.device)
            if batch.weight or run.accelerator.is_fsdp2:  # then every process calls the model
                output = run.model(**batch.inputs, answers_only=True)
            if batch.weight:
                right = {"right": _exact_answers(output, len(batch.ids))}
                sums.add(sums_of(output.loss, output, replace(batch, weight=1.0), run.processor.config) | right)
            else:
                sums.add({"skipped_groups": float(bool(batch.error))})
    run.model.train()
    total = sums.over(run.accelerator)
    tokens = total["visual_tokens"]
    return {
        "eval_loss": total["loss"] / max(total["groups"], 1),
        "eval_exact": total["right"] / max(total["questions"], 1),
        **({"eval_keep_ratio": total["visual_tokens_kept"] / tokens} if tokens else {}),
        "eval_questions": total["questions"],
        "eval_skipped_groups": total["skipped_groups"],
    }


def _exact_answers(output: PhotonOutput, rows: int) -> Tensor:
    """Return how many of the rows have the likeliest token everywhere in their answer."""
    logits_NV, labels_N, rows_N = output.logits, output.answer_labels_N, output.answer_rows_N
    assert logits_NV is not None and labels_N is not None and rows_N is not None, "the batch has labels"
    wrong_N = (logits_NV.argmax(-1) != labels_N).float()
    return (torch.zeros(rows, device=rows_N.device).index_add_(0, rows_N, wrong_N) == 0).sum()


def _finish(run: Run, seconds: float) -> dict[str, Any]:
    """Write what a run leaves at its end; return the summary, {} but in the main process."""
    run.accelerator.end_training()
    if not run.accelerator.is_main_process:
        return {}
    if run.config.lora_rank:
        save_merged(load_model(run.config, checkpoints(run.folder)[-1], verify=False)[0], run.processor, run.folder)
    return write_summary(run.folder, run.state["step"], seconds)


class Log:
    """log.jsonl of a run. Lines of steps after `from_step`, left by a run that was killed, are dropped."""

    def __init__(self, run: Path, from_step: int) -> None:
        self.path = run / LOG
        kept = [row for row in read_log(run) if row["step"] <= from_step]
        Location(str(run)).write(LOG, "".join(json.dumps(row) + "\n" for row in kept).encode())

    def write(self, row: dict[str, Any]) -> None:
        """Append one line; what is not finite becomes null, for JSON has no NaN."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        with self.path.open("a") as file:
            file.write(json.dumps(finite) + "\n")


def read_log(run: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's log; a last line that was cut off is left out."""
    path = run / LOG
    lines = path.read_text().split("\n") if path.is_file() else []
    return [json.loads(line) for line in lines[:-1] if line]


def write_summary(run: Path, steps: int, seconds: float) -> dict[str, Any]:
    """Write summary.json and curves.png of a run that ended, in a session of so many seconds; return the summary."""
    rows = read_log(run)
    summary = {
        "steps": steps,
        "seconds_of_this_session": seconds,
        "first": rows[0],
        "last": rows[-1],
        "questions_trained": sum(row["questions"] for row in rows),
        "groups_skipped": sum(row["skipped_groups"] for row in rows),
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
    panels = {title: own for title, names in PANELS.items() if (own := [name for name in names if name in logged])}
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


def dry_run(config: TrainConfig, grounding: LossFactory | None = None) -> str:
    """Return a description of the run, after one step on real rows in a temporary folder; "" but in the main process.

    Every row is checked against its store, as at the start of a run. Raises what that raises.
    """
    with tempfile.TemporaryDirectory(prefix="photon-") as folder:
        trial = start(replace(config, output=folder, track=()), resume=False, grounding=grounding)
        whole = trial.total_steps
        trial.total_steps, trial.eval_rows = 1, []
        started = time.perf_counter()
        last = run_steps(trial).get("last")
        seconds = time.perf_counter() - started
    if last is None:
        return ""
    volumes = len({video for row in trial.rows for video in row.videos})
    lines = [f"stage {config.stage}: {len(trial.rows)} rows on {volumes} volumes, all stores are there"]
    named = list(trial.accelerator.unwrap_model(trial.model).named_parameters())
    for module in (*MODULES, LANGUAGE_MODEL):
        if own := [parameter for name, parameter in named if module_of(name) == module]:
            trained = sum(parameter.numel() for parameter in own if parameter.requires_grad)
            how = f"learning rate {config.learning_rates[module]:g}" if trained else "frozen"
            lines.append(f"  {module:16} {trained:,} of {sum(p.numel() for p in own):,} parameters, {how}")
    lines += [
        f"{whole} steps in {config.epochs} epochs, each of {config.groups_per_step} volumes with up to "
        f"{config.questions_per_volume} questions",
        f"first step: loss {last['loss']:.4f}, {last['seconds']:.2f} s with start-up ({seconds:.2f} s with saving), "
        f"{last['data_wait_share']:.0%} waiting for data, {last['peak_memory_mib']:.0f} MiB",
        f"at this pace {whole * last['seconds'] / 3600:.2f} h",
    ]
    return "\n".join(lines)
