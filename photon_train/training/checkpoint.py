"""Checkpoints: complete or absent, readable by from_pretrained, without pickles.

RUN/checkpoint-120/     config.json, model.safetensors, tokenizer files    what from_pretrained and photon predict read
                        adapter.safetensors                                with LoRA: what is trained; no model.safetensors
                        optimizer.safetensors                              moments of every trained weight, by its name
                        state.json                                         position of the run

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
from torch import Tensor, nn

from photon_data.files import replace_folder, sync_tree
from photon_train.training.sharding import Engine, Moments

STATE = "state.json"
OPTIMIZER = "optimizer.safetensors"
ADAPTER = "adapter.safetensors"
MERGED = "merged"
PREFIX = "checkpoint-"
PARTIAL = ".partial-"


def save_checkpoint(engine: Engine, processor: Any, run: Path, state: dict[str, Any], keep: int) -> Path:
    """Write RUN/checkpoint-STEP and return its path; older ones but `keep` go once it is there. Every process calls it."""
    weights, moments, accelerator = engine.weights(), engine.moments(), engine.accelerator
    target = run / f"{PREFIX}{state['step']}"
    if accelerator.is_main_process:
        with _whole(target) as partial:
            _write(partial, accelerator.unwrap_model(engine.model), weights, moments, processor, state)
        for old in checkpoints(run)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return target


def checkpoints(run: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    named = [path for path in run.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdecimal()]  # a copy may be "-best"
    found = [path for path in named if (path / STATE).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return the position of the run that a checkpoint was made at."""
    state: dict[str, Any] = json.loads((checkpoint / STATE).read_text())
    return state


def load_adapter(model: nn.Module, checkpoint: Path) -> None:
    """Set the weights of a model with LoRA, still whole, to those that a checkpoint holds."""
    model.load_state_dict(load_file(checkpoint / ADAPTER), strict=False)


def save_merged(model: Any, processor: Any, checkpoint: Path) -> None:
    """Write a checkpoint with LoRA beside it as an ordinary model, its updates added to the weights, for from_pretrained.

    `model` is what the checkpoint holds, whole.
    """
    with _whole(checkpoint.parent / MERGED) as partial:
        model.merge_and_unload().save_pretrained(partial)
        processor.save_pretrained(partial)


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """Give a new folder beside it, which is synced and renamed in the end: a disk that fills up leaves what was there."""
    partial = folder.with_name(f"{PARTIAL}{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        sync_tree(partial)
        replace_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(folder: Path, model: Any, weights: dict[str, Tensor], moments: Moments, processor: Any, state: dict[str, Any]) -> None:
    if any("lora_" in name for name in weights):
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        save_file({name: weights[name].contiguous() for name in sorted(trained)}, folder / ADAPTER)
    else:
        model.save_pretrained(folder, state_dict=dict(weights))
    processor.save_pretrained(folder)
    flat = {f"{name}|{moment}": value for name, values in moments.items() for moment, value in values.items()}
    save_file({key: value.contiguous().clone() for key, value in flat.items()}, folder / OPTIMIZER)
    (folder / STATE).write_text(json.dumps(state, indent=1))


def read_moments(checkpoint: Path) -> Moments:
    """Return the moments of every weight that has some."""
    found: Moments = {}
    for key, value in load_file(checkpoint / OPTIMIZER).items():
        name, moment = key.split("|")
        found.setdefault(name, {})[moment] = value
    return found
