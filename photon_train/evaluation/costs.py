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
    """Costs of the predictions that say them.

    seconds                 by stage, and of all stages ("total")
    questions_per_second    questions / seconds of all stages, one after the other
    prefill_tflop           mean TFLOP of a prefill as it was kept, each question by itself; None without a model's config
    prefill_tflop_unpruned  the same with every token kept
    peak_memory_mib         the most that any process had used; None when no prediction says
    """

    predictions: int
    seconds: dict[str, Seconds]
    questions_per_second: float | None
    prefill_tflop: float | None
    prefill_tflop_unpruned: float | None
    peak_memory_mib: float | None = None


def costs(cases: Sequence[Case], config: PhotonConfig | None = None) -> Costs | None:
    """Return what the predictions cost, None where they do not say; `config` is the model's, for FLOPs."""
    timed = [case.prediction.seconds for case in cases if case.prediction.seconds]
    counted = [case for case in cases if case.prediction.visual_tokens] if config else []
    if not timed and not counted:
        return None
    stages = sorted({stage for seconds in timed for stage in seconds})
    by_stage = {stage: _seconds([seconds.get(stage, 0.0) for seconds in timed]) for stage in stages}
    if timed:
        by_stage["total"] = _seconds([sum(seconds.values()) for seconds in timed])
    spent = by_stage["total"].total if timed else 0.0
    pruned, unpruned = _tflop(counted, config) if config and counted else (None, None)
    peak = max((case.prediction.peak_memory_mib for case in cases), default=0.0) or None
    return Costs(len(timed) or len(counted), by_stage, len(timed) / spent if spent else None, pruned, unpruned, peak)


def _seconds(values: Sequence[float]) -> Seconds:
    middle, high = np.percentile(values, (50, 95))
    return Seconds(float(np.mean(values)), float(middle), float(high), float(np.sum(values)))


def _tflop(cases: Sequence[Case], config: PhotonConfig) -> tuple[float, float]:
    """Return mean TFLOP as kept and unpruned, of the config's volume shape; equal prompts are counted once."""
    prompts = [(case.prediction.text_tokens, case.prediction.visual_tokens, case.prediction.kept_tokens) for case in cases]
    each = {prompt: _of_prompt(config, *prompt) for prompt in set(prompts)}
    kept, full = np.mean([each[prompt] for prompt in prompts], axis=0) / 1e12
    return float(kept), float(full)


def _of_prompt(config: PhotonConfig, text: int, visual: int, kept: int) -> tuple[int, int]:
    prompt = prompt_size(text, visual)
    full = without_scheduling(config, prompt, config.patches_thw).total()
    return (with_its(config, prompt, config.patches_thw, kept).total() if kept < visual else full), full
