"""What answers cost: seconds by stage, questions per second, and FLOPs of the prefill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from photon_train.evaluation.cases import Case
from photon_train.flops import prompt_size, with_its, without_scheduling

if TYPE_CHECKING:
    from photon_train.configuration_photon import PhotonConfig


@dataclass(frozen=True)
class Seconds:
    """Of one stage over all questions: mean, median, 95th percentile, sum."""

    mean: float
    median: float
    p95: float
    total: float


@dataclass(frozen=True)
class Costs:
    """Costs of the predictions that have them; None is what they do not tell."""

    predictions: int
    seconds: dict[str, Seconds]  # by stage, and of all stages ("total")
    questions_per_second: float | None  # questions / seconds of all stages, one after the other
    prefill_tflop: float | None  # mean of a prefill with the kept tokens, each question alone
    prefill_tflop_unpruned: float | None  # the same with every token kept
    peak_memory_mib: float | None = None  # the most that any process had used


def summarise_costs(cases: Sequence[Case], config: PhotonConfig | None = None) -> Costs | None:
    """Return what the predictions cost, None where they have no costs; `config` is the model's, for FLOPs."""
    timed = [case.prediction.seconds for case in cases if case.prediction.seconds]
    counted = [case for case in cases if case.prediction.visual_tokens] if config else []
    if not timed and not counted:
        return None
    stages = sorted({stage for seconds in timed for stage in seconds})
    seconds = {stage: _seconds([each.get(stage, 0.0) for each in timed]) for stage in stages}
    rate = None
    if timed:
        seconds["total"] = _seconds([sum(each.values()) for each in timed])
        rate = len(timed) / seconds["total"].total if seconds["total"].total else None
    pruned, unpruned = _tflop(counted, config) if config and counted else (None, None)
    peak = max((case.prediction.peak_memory_mib for case in cases), default=0.0) or None
    return Costs(len(timed) or len(counted), seconds, rate, pruned, unpruned, peak)


def _seconds(values: Sequence[float]) -> Seconds:
    middle, high = np.percentile(values, (50, 95))
    return Seconds(float(np.mean(values)), float(middle), float(high), float(np.sum(values)))


def _tflop(cases: Sequence[Case], config: PhotonConfig) -> tuple[float, float]:
    """Return the mean TFLOP as kept and unpruned, on volumes of the config's shape; equal prompts are computed once."""

    def flops(text: int, visual: int, kept: int) -> tuple[int, int]:
        prompt = prompt_size(text, visual)
        full = without_scheduling(config, prompt, config.patches_thw).total()
        return (with_its(config, prompt, config.patches_thw, kept).total() if kept < visual else full), full

    predictions = [case.prediction for case in cases]
    prompts = [(one.text_tokens, one.visual_tokens, one.kept_tokens) for one in predictions]
    by_prompt = {prompt: flops(*prompt) for prompt in set(prompts)}
    kept, full = np.mean([by_prompt[prompt] for prompt in prompts], axis=0) / 1e12
    return float(kept), float(full)
