"""Learning rates as a function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from typing import Any

from photon_train.training.config import TrainConfig


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
