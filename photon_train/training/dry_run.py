"""One step of a run that leaves nothing behind: what would be trained, for how long, in how much memory."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from typing import Any

from photon_train.training.config import TrainConfig
from photon_train.training.loop import run_steps
from photon_train.training.parameters import LANGUAGE_MODEL, MODULES, module_of
from photon_train.training.run import Run
from photon_train.training.start import start


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
