"""Checkpoints: complete or absent, readable by from_pretrained, without pickles.

RUN/checkpoint-120/     config.json, model.safetensors, tokenizer files    what from_pretrained and photon predict read
                        adapter.safetensors      with LoRA: what is trained; then there is no model.safetensors
                        optimizer.safetensors    optimizer state of every trained weight, by its name
                        state.json               position of the run

A run that goes on loads its model from there with from_pretrained, which is strict about names.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from photon_data.files import replace_folder, sync_tree
from photon_train.training.sharding import OptimizerState

STATE = "state.json"
OPTIMIZER = "optimizer.safetensors"
ADAPTER = "adapter.safetensors"
MERGED = "merged"
PREFIX = "checkpoint-"
PARTIAL = ".partial-"


def save_checkpoint(
    run: Path,
    state: dict[str, Any],
    model: Any,
    weights: dict[str, Tensor],
    optimizer_state: OptimizerState,
    processor: Any,
    keep: int,
) -> None:
    """Write RUN/checkpoint-STEP, then remove older ones but `keep`. `weights` are all of `model`, whole, by name."""
    with _new_folder(run / f"{PREFIX}{state['step']}") as folder:
        if any("lora_" in name for name in weights):
            trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
            save_file({name: weights[name].contiguous() for name in sorted(trained)}, folder / ADAPTER)
        else:
            model.save_pretrained(folder, state_dict=dict(weights))
        processor.save_pretrained(folder)
        flat = {f"{name}|{key}": value for name, values in optimizer_state.items() for key, value in values.items()}
        save_file({key: value.contiguous().clone() for key, value in flat.items()}, folder / OPTIMIZER)
        (folder / STATE).write_text(json.dumps(state, indent=1))
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old)


def checkpoints(run: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    named = [
        path for path in run.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdecimal()
    ]  # a copy may be "-best"
    found = [path for path in named if (path / STATE).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return the position of the run that a checkpoint was made at."""
    state: dict[str, Any] = json.loads((checkpoint / STATE).read_text())
    return state


def read_optimizer_state(checkpoint: Path) -> OptimizerState:
    """Return the optimizer state of every weight that has one."""
    found: OptimizerState = {}
    for key, value in load_file(checkpoint / OPTIMIZER).items():
        name, of_weight = key.split("|")
        found.setdefault(name, {})[of_weight] = value
    return found


def save_merged(model: Any, processor: Any, checkpoint: Path) -> None:
    """Write RUN/merged, an ordinary model for from_pretrained: a checkpoint with LoRA, updates added to weights.

    `model` is what the checkpoint holds, whole.
    """
    with _new_folder(checkpoint.parent / MERGED) as folder:
        model.merge_and_unload().save_pretrained(folder)
        processor.save_pretrained(folder)


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """Give an empty folder that is synced and renamed to the target at the end: a full disk leaves what was there."""
    partial = target.with_name(f"{PARTIAL}{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        sync_tree(partial)
        replace_folder(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
