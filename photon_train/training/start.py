"""A config -> a run that is ready to make its next step, from the start or from its last checkpoint."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoTokenizer

from photon_data.errors import UsageError
from photon_data.location import Location
from photon_train.modeling_photon import PhotonForConditionalGeneration
from photon_train.processing_photon import PhotonProcessor
from photon_train.training.checkpoint import ADAPTER, checkpoints, load_adapter, read_moments, read_state
from photon_train.training.config import TrainConfig, with_values
from photon_train.training.grounding import groundings
from photon_train.training.parameters import choose_trained, parameter_groups, with_lora
from photon_train.training.plan import steps_per_epoch
from photon_train.training.rows import TrainRow, check_stores, read_train_rows
from photon_train.training.run import Run, make_accelerator, make_engine

logger = logging.getLogger(__name__)
CONFIG = "config.json"
# What may change when a run goes on: nothing that a step depends on.
FREE_TO_CHANGE = (
    *("output", "workers", "prefetch", "eval_every", "save_every", "keep_checkpoints", "track", "eval", "on_bad_row", "on_nan"),
)


def read_config(path: Path) -> dict[str, Any]:
    """Return the settings of a .json or .yaml file. UsageError when it holds no object."""
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: a file of settings wanted ({error})") from None
    if not isinstance(found, dict):
        raise UsageError(f"{path}: settings by name wanted, got {type(found).__name__}")
    return found


def start(
    config: TrainConfig,
    *,
    resume: bool,
    watch: Callable[[dict[str, Any]], None] = lambda row: None,
    watch_masks: Callable[[int, int], object] = lambda done, total: None,
) -> Run:
    """Return the run. UsageError for what it cannot be made of; a folder that holds a run wants `resume`.

    `watch` is given each row of the log, `watch_masks` how many volumes' masks of how many are counted, if the run is grounded.
    """
    folder = Path(config.output)
    found = checkpoints(folder)
    if not resume and (folder / CONFIG).exists():
        raise UsageError(f"{folder} holds a run; go on with it with --resume, or choose another output")
    last = found[-1] if resume and found else None
    rows, eval_rows = _rows(config)
    accelerator = make_accelerator(config)
    model, processor = load_model(config, last)
    _check_resumed(config, last, rows, folder)
    known = groundings(rows, Path(config.grounding), processor.config.tokens_thw, watch_masks) if config.grounding else {}
    choose_trained(model, config)
    optimizer = torch.optim.AdamW(parameter_groups(model, config), lr=1.0, betas=(0.9, config.adam_beta2))
    steps = steps_per_epoch(rows, config.questions_per_volume, config.groups_per_step) * config.epochs
    total = min(steps, config.max_steps) if config.max_steps else steps
    engine = make_engine(accelerator, model, optimizer)
    engine.model.train()
    state: dict[str, Any] = {"step": 0, "epoch": 0, "step_in_epoch": 0, "rows": _digest(rows), "settings": config.to_json()}
    if last:
        state |= {name: read_state(last)[name] for name in ("step", "epoch", "step_in_epoch")}
        engine.load_moments(read_moments(last))
    if accelerator.is_main_process:
        Location(str(folder)).write(CONFIG, json.dumps(config.to_json(), indent=1).encode())
        accelerator.init_trackers("photon", init_kwargs={})
    return Run(config, engine, processor, rows, eval_rows, total, state, watch, known)


def load_model(config: TrainConfig, last: Path | None) -> tuple[Any, PhotonProcessor]:
    """Return the model to train, whole and in float32, and its processor; from a checkpoint of the run if there is one."""
    torch.manual_seed(config.seed)  # fresh parts
    with_adapter = last is not None and (last / ADAPTER).is_file()
    source = config.model if last is None or with_adapter else str(last)
    if not source:
        raise UsageError("model: a checkpoint to start from wanted, got none; photon init makes one")
    options: dict[str, Any] = {"revision": config.revision or None} if source == config.model else {}
    settings = _photon_settings(config)
    wanted = 2 if config.stage == "s2" else None
    model: Any = PhotonForConditionalGeneration.from_pretrained(
        source, stage=wanted, dtype=torch.float32, attn_implementation=config.attention, **settings, **options
    )
    model.config.use_cache = False
    processor = PhotonProcessor(AutoTokenizer.from_pretrained(source, **options), model.config)
    _set_checkpointing(model, config)
    if config.lora_rank:
        model = with_lora(model, config)
    if last is not None and with_adapter:
        load_adapter(model, last)
    return model, processor


def _photon_settings(config: TrainConfig) -> dict[str, Any]:
    """Return what of PhotonConfig the run sets: stages before the second train without dropping tokens."""
    scheduler = {"s1": "none", "s1c": "none", "s2": "its"}[config.stage]
    return {"scheduler": scheduler, **config.photon}


def _set_checkpointing(model: Any, config: TrainConfig) -> None:
    """Set it apart for the two halves, without reentry, which would lose the gradient of the threshold."""
    function = partial(checkpoint, use_reentrant=False)
    for part, wanted in (
        (model.model.language_model, config.gradient_checkpointing),
        (model.model.visual, config.vision_gradient_checkpointing),
    ):
        for module in part.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = wanted
                module._gradient_checkpointing_func = function


def _rows(config: TrainConfig) -> tuple[list[TrainRow], list[TrainRow]]:
    rows = check_stores(read_train_rows(config.data), config.on_bad_row)
    return rows, check_stores(read_train_rows(config.eval), config.on_bad_row) if config.eval else []


def _check_resumed(config: TrainConfig, last: Path | None, rows: list[TrainRow], folder: Path) -> None:
    """UsageError when the run that goes on would not be the one that was begun."""
    if last is None:
        return
    state = read_state(last)
    if state["rows"] != _digest(rows):
        raise UsageError(f"the rows that {folder} was begun with wanted, got others; start a new run on changed manifests")
    begun = with_values(TrainConfig(), state["settings"])
    same = replace(config, **{name: getattr(begun, name) for name in FREE_TO_CHANGE})
    changed = [
        f"{name}={getattr(same, name)!r} (was {value!r})" for name, value in vars(begun).items() if getattr(same, name) != value
    ]
    if changed:
        raise UsageError(
            f"the settings of {folder} wanted to go on with it, got {', '.join(changed)}; start a new run for others"
        )


def _digest(rows: list[TrainRow]) -> str:
    lines = [json.dumps([row.id, row.videos, row.messages], sort_keys=True) for row in rows]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
