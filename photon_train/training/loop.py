"""The training loop.

for every step: for every micro-batch of this rank: loss, backward; then clip, step, log; now and then evaluate, save.

Legend: B rows of a micro-batch, L tokens of a padded row, M tokens of a row after pruning.
"""

from __future__ import annotations

import itertools
import logging
import math
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from photon_train import costs
from photon_train.checkpoint import PREFIX, checkpoints, save_checkpoint, save_merged
from photon_train.configuration_photon import Phase, PhotonConfig, phase_at
from photon_train.modeling_photon import PhotonOutput
from photon_train.rows import TrainRow
from photon_train.scheduling import is_passive, visual_mask
from photon_train.training.batches import Batch, MicroBatches, read_ahead
from photon_train.training.config import TrainConfig
from photon_train.training.log import Log, Profiler, Sums, means, rates, write_summary
from photon_train.training.plan import MicroBatch, plan_epoch
from photon_train.training.processes import Interruption, TrainingInterrupted, TrainingStopped
from photon_train.training.setup import (
    LANGUAGE_MODEL,
    MODULES,
    AnsweringFactory,
    Best,
    LossFactory,
    Run,
    gradient_norms,
    load_model,
    module_of,
    set_learning_rates,
    start,
)

logger = logging.getLogger(__name__)


def run_steps(run: Run, profile: bool = False) -> dict[str, Any]:
    """Train from `run.state` to the end; evaluate and save on the way. Return the summary, which is also written.

    TrainingInterrupted after SIGINT, SIGTERM or SIGUSR1 to any of the processes: all of them save after their step.
    With `profile`, RUN/profile tells what a few of the first steps spend their time and memory on.
    """
    log = Log(run.folder, run.state["step"]) if run.accelerator.is_main_process else None
    session = started = time.perf_counter()
    with Interruption() as interruption, Profiler(run.folder, run.accelerator, enabled=profile) as profiler:
        if run.state.pop("evaluation_due", False):  # it was interrupted before
            found = _evaluate(run)
            _record(run, log, {**(log.last if log else {}), **found}, found)
        for groups, batches in _steps_left(run):
            waited = time.perf_counter() - started
            row, interrupted = _step(run, batches, groups, interruption)
            row |= rates(row, time.perf_counter() - started, waited, run.accelerator, run.config.precision)
            is_due = bool(run.eval_rows) and (_is_due(run, run.config.eval_every) or _is_last(run))
            if is_due and interrupted and not _is_last(run):
                run.state["evaluation_due"] = True
            elif is_due:
                row |= _evaluate(run)
            _record(run, log, row, row)
            last = _is_last(run)
            is_best = run.state["best"]["step"] == run.state["step"]
            if last or interrupted or is_best or _is_due(run, run.config.save_every):
                _save(run)
            profiler.step()
            if last:
                break
            if interrupted:
                run.accelerator.end_training()
                raise TrainingInterrupted(f"checkpoint-{run.state['step']} of {run.folder} holds what is done")
            started = time.perf_counter()
    return _finish(run, time.perf_counter() - session)


def _record(run: Run, log: Log | None, row: dict[str, Any], new: dict[str, Any]) -> None:
    """Write a row of the log, in the main process; trackers get what is `new` in it, so that none shows it twice."""
    if log is not None:
        log.write(row)
        run.accelerator.log({k: v for k, v in new.items() if isinstance(v, int | float)}, step=row["step"])
        run.callback(row)


def _save(run: Run) -> None:
    parts = (run.accelerator, run.model, run.optimizer, run.processor)
    save_checkpoint(*(run.folder, run.state, *parts), keep=run.config.keep_checkpoints, best=run.state["best"]["step"])


def _is_last(run: Run) -> bool:
    """Return whether the run ends with the step that was made: all are made, or evaluations get no better."""
    stops_early = 0 < run.config.patience <= run.state["best"]["waited"]
    return bool(run.state["step"] >= run.total_steps or stops_early)


def _evaluate(run: Run) -> dict[str, Any]:
    """Return what the log says of the model as it is, and note in the state whether it is the best so far."""
    step, config = run.state["step"], run.config
    found: dict[str, Any] = validate(run)
    if run.answering:
        found |= run.answering(run.model, step)
    if config.best_metric:
        best = Best(**run.state["best"]).after(step, found.get(config.best_metric), config.best_mode)
        run.state["best"] = asdict(best)
    return found


def _is_due(run: Run, every: int) -> bool:
    return every > 0 and run.state["step"] % every == 0


def _steps_left(run: Run) -> Iterator[tuple[int, list[Batch]]]:
    """Yield for each step that is left how many groups this rank has, and these; count the epochs in `run.state`."""
    config, state, processes = run.config, run.state, run.accelerator.num_processes
    first, done = state["epoch"], state["step_in_epoch"]
    epochs = range(first, config.epochs) if not _is_last(run) else ()
    plans = (plan_epoch(run.rows, config, epoch, processes)[done if epoch == first else 0 :] for epoch in epochs)
    for step, batches in _read(run, run.rows, itertools.chain.from_iterable(plans), training=True):
        if step[0].epoch != state["epoch"]:
            state |= {"epoch": step[0].epoch, "step_in_epoch": 0}
        yield len(step) // processes, batches


def _read(
    run: Run, rows: Sequence[TrainRow], steps: Iterable[list[MicroBatch]], *, training: bool
) -> Iterator[tuple[list[MicroBatch], list[Batch]]]:
    """Yield each step and this rank's batches of it. What cannot be read stops the run, or is named and has weight 0.

    Steps are read ahead across epochs.
    """
    rank, world_size, size = run.accelerator.process_index, run.accelerator.num_processes, run.config.groups_per_forward
    dataset = MicroBatches(rows, run.processor, run.config, training, run.accelerator.is_fsdp2)
    ahead, steps = itertools.tee(steps)
    own = (step[rank::world_size] for step in ahead)
    parts = (groups[at : at + size] for groups in own for at in range(0, len(groups), size))
    read = read_ahead(dataset, parts, run.accelerator.device)
    for step in steps:
        batches = [batch for _ in range(-(-len(step) // world_size // size)) for batch in next(read)]
        for batch in batches:
            if batch.error:
                message = f"{len(batch.ids)} rows ({', '.join(batch.ids)}) cannot be read: {batch.error}"
                if run.config.on_bad_row == "stop":
                    raise TrainingStopped(f"{message}. Repair the store, or leave such rows out with on_bad_row=skip")
                logger.warning("skipped: %s", message)
        yield step, batches


def _step(run: Run, batches: list[Batch], groups: int, interruption: Interruption) -> tuple[dict[str, Any], bool]:
    """Make one optimizer step of so many groups; return its row of the log, and whether a process was asked to end."""
    step, sums = run.state["step"], Sums()
    phase = phase_at(run.processor.config, step, run.total_steps) if run.schedules else Phase.DENSE
    learning_rates = set_learning_rates(run.optimizer, run.config, step, run.total_steps)
    for batch in batches:
        is_last = batch is batches[-1]  # its backward makes gradients known to all processes
        with nullcontext() if is_last else run.accelerator.no_sync(run.model):
            sums.add(_micro_batch(run, batch.to(run.accelerator.device, run.processor), phase, groups))
    norms = gradient_norms(run.model)
    sums.add({"interrupted": float(interruption.asked)})
    total = sums.over(run.accelerator)
    row = means(total, groups * run.accelerator.num_processes) | {"flops": total["flops"]}
    skips = not _is_finite(run, row["loss"], norms, batches)
    if not skips:
        if run.config.max_grad_norm:
            run.accelerator.clip_grad_norm_(run.model.parameters(), run.config.max_grad_norm)
        run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.state |= {"step": step + 1, "step_in_epoch": run.state["step_in_epoch"] + 1}
    logged: dict[str, Any] = {
        "step": step + 1,
        "epoch": run.state["epoch"],
        "phase": phase.value,
        **row,
        "skipped_steps": int(skips),
        **{f"grad_norm/{module}": norm for module, norm in norms.items()},
        **{f"lr/{module}": learning_rate for module, learning_rate in learning_rates.items()},
    }
    return logged, total["interrupted"] > 0


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
    photon = run.processor.config
    sums = _sums_of(loss, output, batch, photon)
    if batch.weight:
        sums["flops"] = training_flops(photon, run.config, batch, output, phase)
    return sums if grounding is None else sums | {"grounding": grounding.detach() * batch.weight}


def _sums_of(loss: Tensor, output: PhotonOutput, batch: Batch, config: PhotonConfig) -> dict[str, Any]:
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


def training_flops(
    photon: PhotonConfig, config: TrainConfig, batch: Batch, output: PhotonOutput, phase: Phase
) -> Tensor:
    """Return the FLOPs that a micro-batch needs, 0-d float64: forward, and gradients of activations and weights.

    What is computed again, or for every question where once would do (all layers of a prefix that nothing is dropped
    of, or before the decoder), does not count. Frozen weights have no gradients.
    """
    layers: Any = costs.layers  # of tensors too
    length_B = batch.inputs["attention_mask"].sum(1).double()
    kept_B = length_B if output.scheduled is None else output.scheduled.kept.mask_BM.sum(1).double()
    shared: Any = batch.inputs.get("prefix") or 0
    count, prefixes = photon.text_config.num_hidden_layers, len(batch.inputs.get("group_sizes", ())) or 1
    lower = count if is_passive(photon, phase) else photon.drop_layer + 1
    if (
        output.scheduled is not None
        and photon.drops_before_decoder(photon.scheduler)
        and phase in (Phase.HARD, Phase.FLIP)
    ):
        lower, length_B, shared = count, kept_B, output.scheduled.keep_BL[0, :shared].sum()
    decoder = prefixes * layers(photon, lower, shared, shared) + layers(photon, count - lower, kept_B, kept_B).sum()
    decoder += layers(photon, lower, length_B - shared, length_B).sum()
    decoder += costs.head(photon) * len(output.answer_rows_N if output.answer_rows_N is not None else ())
    tower, embedding = costs.vision(photon, photon.patches_thw), costs.tower_weights(photon)[0]
    embedding *= 2 * math.prod(photon.patches_thw)
    with_weights = config.lr_language_model > 0 and not config.lora_rank
    through_tower = 3 if config.lr_vision else 2 if config.lr_patch_embedding else 1
    of_volume = through_tower * tower - (embedding if config.lr_vision else 0)  # voxels have no gradient
    return decoder * (3 if with_weights else 2) + batch.volumes * of_volume


def _is_finite(run: Run, loss: float, norms: dict[str, float], batches: list[Batch]) -> bool:
    """Tell whether loss and gradients are finite in all processes; where they are not, stop or warn."""
    infinite = not all(map(math.isfinite, (loss, *norms.values())))
    if not run.accelerator.reduce(torch.tensor(float(infinite), device=run.accelerator.device), "sum"):
        return True
    ids, norm = ", ".join(id for batch in batches for id in batch.ids), math.hypot(*norms.values())
    message = f"step {run.state['step'] + 1}: expected a finite loss and gradient, found {loss} and {norm} of {ids}"
    if run.config.on_nan == "stop":
        raise TrainingStopped(f"{message}; lower the learning rate, or leave such steps out with on_nan=skip")
    logger.warning("%s; the step is skipped", message)
    return False


def validate(run: Run) -> dict[str, float]:
    """Return how the model does on `eval_rows`: mean loss over groups, share of rows answered exactly, keep ratio.

    A row is answered exactly when every token of its answer, end marker included, is the likeliest after the true ones
    before it. That is not what it would generate: here answers also see all visual tokens in the layers up to its.
    """
    world_size = run.accelerator.num_processes
    groups = world_size * run.config.groups_per_forward
    steps = plan_epoch(run.eval_rows, replace(run.config, groups_per_step=groups, seed=0), 0, world_size)
    sums = Sums()
    run.model.eval()
    with torch.no_grad(), run.accelerator.autocast():
        read = _read(run, run.eval_rows, steps, training=False)
        for batch in (batch for _, batches in read for batch in batches):
            batch = batch.to(run.accelerator.device, run.processor)
            if batch.weight or run.accelerator.is_fsdp2:  # then every process calls the model
                output = run.model(**batch.inputs, answers_only=True)
            if batch.weight:
                right = {"right": _exact_answers(output, len(batch.ids))}
                counted = replace(batch, weight=float(batch.groups))  # every group alike
                sums.add(_sums_of(output.loss, output, counted, run.processor.config) | right)
            else:
                sums.add({"skipped_groups": float(bool(batch.error))})
    run.model.train()
    total = sums.over(run.accelerator)
    tokens = total["visual_tokens"]
    return {
        "eval_loss": total["loss"] / max(total["groups"], 1),
        "eval_forced_exact": total["right"] / max(total["questions"], 1),
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
    best = run.state["best"]
    if run.config.lora_rank:
        of_best = run.folder / f"{PREFIX}{best['step']}"
        chosen = of_best if of_best.is_dir() else checkpoints(run.folder)[-1]
        save_merged(load_model(run.config, chosen, verify=False)[0], run.processor, run.folder)
    more: dict[str, Any] = {"stopped_early": run.state["step"] < run.total_steps}
    if run.config.best_metric:
        more["best"] = {"metric": run.config.best_metric, **best}
    summary = write_summary(run.folder, run.state["step"], seconds, more)
    if summary["steps_skipped"] == summary["steps"]:
        raise TrainingStopped(
            f"all {summary['steps']} steps were skipped: nothing was learned; lower the learning rate"
        )
    if not summary["questions_trained"]:
        found = f"all {summary['groups_skipped']:.0f} groups of rows were left out"
        raise TrainingStopped(f"{found}: nothing was learned; repair their stores, which the warnings name")
    return summary


def dry_run(
    config: TrainConfig, grounding: LossFactory | None = None, answering: AnsweringFactory | None = None
) -> str:
    """Return a description of the run, after one step on real rows in a temporary folder; "" but in the main process.

    Every row is checked against its store, as at the start of a run. Raises what that raises.
    """
    with tempfile.TemporaryDirectory(prefix="photon-") as folder:
        made: dict[str, Any] = {"grounding": grounding, "answering": answering}
        trial = start(replace(config, output=folder, track=()), resume=False, **made)
        whole, curriculum = trial.total_steps, trial.curriculum
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
        f"{whole} steps in {config.epochs} epochs, each of {config.step_size}",
        *([curriculum] if curriculum else []),
        f"first step: loss {last['loss']:.4f}, {last['seconds']:.2f} s with start-up ({seconds:.2f} s with saving), "
        f"{last['data_wait_share']:.0%} waiting for data, {last['peak_memory_mib']:.0f} MiB",
        f"at this pace {whole * last['seconds'] / 3600:.2f} h",
    ]
    return "\n".join(lines)
