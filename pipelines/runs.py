"""Ready training runs, as functions; variants derive from one another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from photon_data.errors import UsageError
from photon_train.training.config import TrainConfig


def s1() -> TrainConfig:
    """Return stage 1 as published: the 3D patch embedding only, from Qwen2.5-VL, on volumes with captions."""
    return TrainConfig(
        stage="s1",
        lr_patch_embedding=1.25e-4,
        lr_vision=0.0,
        lr_merger=0.0,
        lr_language_model=0.0,
        lr_threshold=0.0,
        groups_per_step=32,
    )


def s1c() -> TrainConfig:
    """Return the dense fine-tuning as published: everything, from stage 1, no pruning."""
    return replace(
        s1(),
        stage="s1c",
        lr_patch_embedding=5e-6,
        lr_vision=5e-6,
        lr_merger=5e-6,
        lr_language_model=1e-5,
        groups_per_step=16,
    )


def s2() -> TrainConfig:
    """Return stage 2 as published: everything, from stage 1, with token scheduling.

    The authors count the curriculum in forward passes (4000, 8000, 9000) of which two make an optimizer step.
    """
    curriculum = {"soft_start": 2000, "hard_start": 4000, "flip_start": 4500}
    return replace(s1c(), stage="s2", lr_threshold=1e-5, photon=curriculum)


def tiny_s1() -> TrainConfig:
    """Return a first stage that the tiny model learns easy phantoms with, in minutes on a CPU: it has nothing to start from,
    so everything is trained. Give it the phantoms' masks too (`grounding`): Qwen2.5-VL was shown where things are, it was not.

    The patch embedding sums over 2744 voxels that rise and fall together: it learns a hundredth as fast. Steps of fewer
    volumes, and deeper models, stay at chance for long.
    """
    return TrainConfig(
        stage="s1",
        lr_patch_embedding=2e-5,
        lr_vision=2e-3,
        lr_merger=2e-3,
        lr_language_model=2e-3,
        lr_threshold=0.0,
        groups_per_step=8,
        questions_per_volume=8,
        epochs=30,
        weight_decay=0.05,
        adam_beta2=0.98,
        precision="fp32",
        gradient_checkpointing=False,
        vision_gradient_checkpointing=False,
        save_every=0,
    )


def tiny_s2() -> TrainConfig:
    """Return a second stage for what `tiny_s1` made: the whole curriculum in a dozen epochs, keeping about half of the tokens."""
    settings = {"soft_start": 0.1, "hard_start": 0.3, "flip_start": 0.9, "band_high": 0.5}
    return replace(
        tiny_s1(),
        stage="s2",
        lr_vision=5e-4,
        lr_merger=5e-4,
        lr_language_model=5e-4,
        lr_patch_embedding=5e-6,
        lr_threshold=1e-2,
        epochs=12,
        photon=settings,
    )


RUNS: dict[str, Callable[[], TrainConfig]] = {"s1": s1, "s1c": s1c, "s2": s2, "tiny-s1": tiny_s1, "tiny-s2": tiny_s2}


def named_run(name: str) -> TrainConfig:
    """Return the ready run of that name; UsageError for others."""
    if name not in RUNS:
        raise UsageError(f"a stage wanted, one of {', '.join(RUNS)}, got {name!r}")
    return RUNS[name]()
