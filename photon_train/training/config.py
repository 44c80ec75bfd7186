"""What a training run is: one frozen value, saved beside the run and read back when it goes on; and the ready runs."""

from __future__ import annotations

import math
import os
import platform
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_type_hints

import torch
from dask.system import CPU_COUNT  # knows affinity and control groups, on any system

from photon_data.errors import UsageError, name_hint
from photon_data.json_text import from_json
from photon_data.yaml_text import read_yaml, value_of
from photon_train.configuration_photon import PhotonConfig


@dataclass(frozen=True)
class TrainConfig:
    """A training run. A step is an optimizer step. A group, one volume with its questions, is a micro-batch."""

    stage: str = "s1"  # s1 (patch embedding), s1c (everything, no pruning), s2 (everything, with pruning)
    model: str = ""  # checkpoint to start from: a directory or a hub id
    revision: str = ""  # of a hub id
    data: tuple[str, ...] = ()  # manifests to train on
    eval: tuple[str, ...] = ()  # manifests to evaluate on, after `eval_every` steps and at the end
    output: str = ""  # the run's folder

    # Curriculum of stage 2: questions seen before tokens are weighted, dropped, and some rows flipped. 0: what
    # photon.soft_start, hard_start and flip_start say (steps, or shares of the run). Those win where they are given.
    soft_after: int = 0
    hard_after: int = 0
    flip_after: int = 0

    # Learning rate of each module at its peak; 0 freezes it.
    lr_patch_embedding: float = 1e-5
    lr_vision: float = 5e-6
    lr_merger: float = 5e-6
    lr_language_model: float = 1e-5
    lr_threshold: float = 1e-5
    freeze: tuple[str, ...] = ()  # glob patterns of further parameters to freeze, e.g. "*.bias"
    lora_rank: int = 0  # above 0: train low-rank updates of the language model's linear layers, not its weights
    lora_alpha: int = 16

    questions_per_step: int = 16  # over all devices and accumulation steps together
    groups_per_step: int = 0  # above 0: a step is so many volumes with their questions, however many these are
    questions_per_volume: int = 8  # at most this many share one encoding of their volume
    groups_per_forward: int = 1  # so many groups of one shape go through the model together (same loss, fewer kernels)
    share_prefix: bool = True  # False: encode the volume for every question anew (same loss, for comparison)
    epochs: int = 3
    max_steps: int = 0  # ends the run earlier, and is what schedules count to; 0: none
    schedule: str = "cosine"  # of the learning rates
    warmup: float = 0.05  # share of the run in which the learning rates rise
    weight_decay: float = 0.1
    adam_beta2: float = 0.95
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm; 0: never
    # fp32; bf16: what is computed with, float32 weights stay in the optimizer (with FSDP2: in the parts of each
    # process); autocast: weights and residual stream in float32, cast for each use.
    precision: str = "bf16"
    attention: str = "sdpa"
    compile: bool = False  # torch.compile of whole layers: fewer calls, after minutes of compiling; needs a compiler
    gradient_checkpointing: bool = True  # compute the language model's activations again in the backward pass
    vision_gradient_checkpointing: bool = True  # and those of the vision tower
    # Folder of masks by volume id: scores learn to point at the masks that a row names in `organ_masks`. For models
    # that start from nothing; not part of the published recipe.
    grounding: str = ""
    augment: str = "none"  # torchio on training volumes: none, intensity, affine (without reflections), both
    max_length: int = 4096  # tokens of a row
    workers: int = -1  # processes that read stores; -1: by the number of CPUs
    prefetch: int = 2  # batches that each of them keeps ready
    eval_every: int = 0  # steps; 0: at the end only
    # Answers while it trains: how photon eval would score them. "": only the loss of the true answers.
    eval_benchmark: str = ""  # a benchmark of photon eval; vqa has metrics for all questions
    eval_questions: int = 200  # so many rows of `eval` are answered, drawn by the seed; 0: all
    eval_max_new_tokens: int = 64
    best_metric: str = ""  # a logged score of evaluations, such as eval_loss or eval/accuracy_robust
    best_mode: str = "max"  # or min: whether the best is the highest or the lowest
    patience: int = 0  # evaluations without a better one after which the run ends; 0: never
    save_every: int = 500  # steps; 0: at the end only
    keep_checkpoints: int = 2  # older ones are removed
    on_bad_row: str = "stop"  # or skip: a row that cannot be read
    on_nan: str = "stop"  # or skip: a loss that is not finite
    track: tuple[str, ...] = ("tensorboard",)  # names of accelerate trackers: tensorboard, wandb, ...
    seed: int = 0
    photon: dict[str, Any] = field(default_factory=dict)  # of PhotonConfig: its_layer, soft_start, band_low, ...

    def __post_init__(self) -> None:
        """UsageError for a setting that no run can have."""

        def check(name: str, good: bool, expected: str) -> None:
            if not good:
                raise UsageError(f"{name}: expected {expected}, found {getattr(self, name)!r}")

        for name, choices in CHOICES.items():
            check(name, getattr(self, name) in choices, f"one of {', '.join(choices)}")
        for name, least in LEAST.items():
            check(name, getattr(self, name) >= least, f"at least {least}")
        check("warmup", 0 <= self.warmup < 1, "a share of the run, from 0 to below 1")
        evaluates = bool(self.eval)
        for name in ("eval_benchmark", "best_metric"):
            check(name, evaluates or not getattr(self, name), "none without eval, which says what is evaluated")
        known = self.best_metric in ("", *FORCED) or (self.eval_benchmark and self.best_metric.startswith(OF_ANSWERS))
        check("best_metric", bool(known), f"one of {', '.join(FORCED)}, or {OF_ANSWERS}... of an eval_benchmark")
        check("best_mode", self.best_metric != "eval_loss" or self.best_mode == "min", "min, the best eval_loss")
        check("patience", not self.patience or bool(self.best_metric), "0 without best_metric, which it waits for")
        in_place = self.augment in ("none", "intensity") or not self.grounding
        check("augment", in_place, "none or intensity with grounding, whose masks do not move with the volume")
        fields = PhotonConfig.__dataclass_fields__
        for name in (name for name in self.photon if name not in fields):
            raise UsageError(f"expected a setting of PhotonConfig, found 'photon.{name}'; {name_hint(name, fields)}")

    @property
    def group_size(self) -> int:
        """How many questions a group has at most: never more than a step."""
        return (
            self.questions_per_volume
            if self.groups_per_step
            else min(self.questions_per_volume, self.questions_per_step)
        )

    @property
    def step_size(self) -> str:
        """What a step consists of, in words."""
        if self.groups_per_step:
            return f"{self.groups_per_step} volumes with up to {self.questions_per_volume} questions"
        return f"about {self.questions_per_step} questions, up to {self.group_size} of a volume"

    @property
    def learning_rates(self) -> dict[str, float]:
        """Peak learning rate of each module, by its name in `setup.MODULES`."""
        return {f.name.removeprefix("lr_"): getattr(self, f.name) for f in fields(self) if f.name.startswith("lr_")}

    def to_json(self) -> dict[str, Any]:
        """Return the plain dict that `with_values` reads back."""
        return asdict(self)

    def flat(self) -> dict[str, Any]:
        """Return the settings as trackers take them: numbers and texts by name, "photon.band_low" too."""
        photon = {f"photon.{name}": value for name, value in self.photon.items()}
        own = {name: value for name, value in self.to_json().items() if name != "photon"}
        return {
            name: ",".join(value) if isinstance(value, tuple) else value for name, value in {**own, **photon}.items()
        }


FORCED = ("eval_loss", "eval_forced_exact")  # what every evaluation gives
OF_ANSWERS = "eval/"  # begins the name of every score of answers, in points
MADE_WITH = "made_with"  # what RUN/config.json says beside the settings
CHOICES = {
    "stage": ("s1", "s1c", "s2"),
    "precision": ("fp32", "bf16", "autocast"),
    "augment": ("none", "intensity", "affine", "both"),
    "best_mode": ("max", "min"),
    "on_bad_row": ("stop", "skip"),
    "on_nan": ("stop", "skip"),
    "schedule": ("cosine", "linear", "constant"),
}
LEAST = {
    "workers": -1,
    **dict.fromkeys(("lora_rank", "max_steps", "eval_every", "save_every", "weight_decay", "max_grad_norm", "seed"), 0),
    **dict.fromkeys(("groups_per_step", "soft_after", "hard_after", "flip_after"), 0),
    **{f.name: 0 for f in fields(TrainConfig) if f.name.startswith("lr_")},
    **dict.fromkeys(("questions_per_step", "questions_per_volume", "groups_per_forward", "epochs", "max_length"), 1),
    **dict.fromkeys(("eval_questions", "patience"), 0),
    **dict.fromkeys(("keep_checkpoints", "prefetch", "eval_max_new_tokens"), 1),
}


def worker_count(config: TrainConfig) -> int:
    """Return how many processes read for each process that trains: up to 8 of the CPUs that the compute leaves over."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return config.workers if config.workers >= 0 else max(min(CPU_COUNT // processes - 1, 8), 1)


def read_config(path: Path) -> dict[str, Any]:
    """Return the settings of a .json or .yaml file. UsageError for one that cannot be read, or holds no object."""
    found = read_yaml(path, (".json", ".yaml", ".yml"), value_of)
    if not isinstance(found, dict):
        kind = type(found).__name__
        raise UsageError(f"{path}: expected settings by name, found {kind}; write lines of `name: value`")
    return {name: value for name, value in found.items() if name != MADE_WITH}


def made_with() -> dict[str, str]:
    """Return the versions of what a run is made with, by name, and the commit of this code where git knows it.

    "photon-commit": "1f3c...-dirty" for a checkout with changes.
    """
    found = {"python": platform.python_version(), "cuda": torch.version.cuda or ""}
    for name in ("photon-ct", "torch", "transformers", "accelerate", "safetensors", "numpy", "zarr"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    folder = Path(__file__).parent
    git = partial(subprocess.run, cwd=folder, capture_output=True, text=True, check=True, timeout=10)
    with suppress(OSError, subprocess.SubprocessError):
        # Fails in site-packages, which can lie in the folder of another project.
        git(["git", "ls-files", "--error-unmatch", Path(__file__).name])
        described = git(["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"])
        found["photon-commit"] = described.stdout.strip()
    return {name: value for name, value in found.items() if value}


def with_values(config: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
    """Return the config with fields set by name; "photon.soft_start" is of PhotonConfig. UsageError for unknown names.

    Values come from a JSON or YAML file, or are texts of a command line.
    """
    changes: dict[str, Any] = {}
    photon = dict(config.photon)
    for name, value in ((str(name), value) for name, value in values.items()):
        if name == "photon":
            if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
                raise UsageError(f"photon: expected settings by name, found {value!r:.100}")
            photon.update(value)
        elif name.startswith("photon."):
            if isinstance(value, str):  # 3 is a number of steps, 0.25 a share of the run
                with suppress(ValueError):
                    value = from_json(value)
            photon[name.removeprefix("photon.")] = value
        else:
            changes[name] = _converted(name, value)
    return replace(config, **changes, photon=photon)


def _converted(name: str, value: Any) -> Any:
    types = get_type_hints(TrainConfig)
    if name not in types:
        raise UsageError(f"expected a setting of a training run, found {name!r}; {name_hint(name, types)}")
    kind = types[name]
    try:
        if kind is bool:
            return {"true": True, "false": False}[str(value).lower()]
        if kind in (str, int, float):
            found = kind(value)
            # The values of a file have types of their own: true is no number, 3.7 no whole one, and a list no text.
            is_other = isinstance(value, bool) or not isinstance(value, str | int | float)
            is_rounded = kind is not str and not isinstance(value, str) and found != value
            if is_other or is_rounded or (kind is float and not math.isfinite(found)):
                raise ValueError
            return found
        parts = value.split(",") if isinstance(value, str) else list(value)
        if isinstance(value, Mapping) or not all(isinstance(part, str | int | float) for part in parts):
            raise ValueError
        return tuple(str(part) for part in parts if str(part))
    except (KeyError, ValueError, TypeError, OverflowError):
        names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
        raise UsageError(f"{name}: expected {names.get(kind, 'a list of texts')}, found {value!r:.100}") from None


def s1() -> TrainConfig:
    """Return stage 1 as published: the 3D patch embedding only, from Qwen2.5-VL, on volumes with captions."""
    return TrainConfig(
        stage="s1",
        lr_patch_embedding=1.25e-4,
        lr_vision=0.0,
        lr_merger=0.0,
        lr_language_model=0.0,
        lr_threshold=0.0,
        questions_per_step=32,
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
        questions_per_step=16,
    )


def s2() -> TrainConfig:
    """Return stage 2 as published: everything, from stage 1, with token scheduling.

    The authors count the curriculum in forward passes (4000, 8000, 9000), each of one question on each of 8 devices.
    Two of them make an optimizer step: of 16 questions, as here.
    """
    return replace(s1c(), stage="s2", lr_threshold=1e-5, soft_after=32_000, hard_after=64_000, flip_after=72_000)


def tiny_s1() -> TrainConfig:
    """Return a first stage in which the tiny model learns easy phantoms, in minutes on a CPU.

    The model has nothing to start from, so everything is trained. Give it the masks of the phantoms too
    (`grounding`): Qwen2.5-VL was shown where things are, the tiny model was not. The patch embedding sums over 2744
    voxels that rise and fall together, so its learning rate is a hundredth. With fewer volumes a step, or with more
    layers, the model stays at chance for long.
    """
    return TrainConfig(
        stage="s1",
        lr_patch_embedding=2e-5,
        lr_threshold=0.0,
        lr_vision=2e-3,
        lr_merger=2e-3,
        lr_language_model=2e-3,
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
    """Return a second stage after `tiny_s1`: the whole curriculum in 12 epochs. Keeping more than half adds a loss."""
    settings = {"soft_start": 0.1, "hard_start": 0.3, "flip_start": 0.9, "band_high": 0.5}
    rates: dict[str, Any] = dict.fromkeys(("lr_vision", "lr_merger", "lr_language_model"), 5e-4)
    rates |= {"lr_patch_embedding": 5e-6, "lr_threshold": 1e-2}
    return replace(tiny_s1(), stage="s2", epochs=12, photon=settings, **rates)


RUNS = {"s1": s1, "s1c": s1c, "s2": s2, "tiny-s1": tiny_s1, "tiny-s2": tiny_s2}


def named_run(name: str) -> TrainConfig:
    """Return the ready run of that name; UsageError for others."""
    if name not in RUNS:
        raise UsageError(f"stage: expected one of {', '.join(RUNS)}, found {name!r}")
    return RUNS[name]()
