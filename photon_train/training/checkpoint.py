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

from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from photon_data.location import replace_folder, sync_tree

STATE = "state.json"
OPTIMIZER = "optimizer.safetensors"
ADAPTER = "adapter.safetensors"
MERGED = "merged"
PREFIX = "checkpoint-"
PARTIAL = ".partial-"


def save_checkpoint(
    accelerator: Accelerator, wrapped: nn.Module, optimizer: Any, processor: Any, run: Path, state: dict[str, Any], keep: int
) -> Path:
    """Write RUN/checkpoint-STEP and return its path; older ones but `keep` go once it is there. Every process calls it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(wrapped, options=options)
    moments = get_optimizer_state_dict(wrapped, optimizer.optimizer, options=options)
    target = run / f"{PREFIX}{state['step']}"
    if accelerator.is_main_process:
        with _whole(target) as partial:
            _write(partial, accelerator.unwrap_model(wrapped), weights, moments, processor, state)
        for old in checkpoints(run)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return target


def checkpoints(run: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    found = [path for path in run.glob(f"{PREFIX}*") if (path / STATE).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return the position of the run that a checkpoint was made at."""
    state: dict[str, Any] = json.loads((checkpoint / STATE).read_text())
    return state


def load_optimizer(wrapped: nn.Module, optimizer: Any, checkpoint: Path) -> None:
    """Set the moments to those of a checkpoint, and with LoRA the weights it holds."""
    options = StateDictOptions(full_state_dict=True, strict=False)
    _load_adapter(wrapped, checkpoint)
    set_optimizer_state_dict(wrapped, optimizer.optimizer, optim_state_dict=_read_moments(checkpoint), options=options)


def _load_adapter(model: nn.Module, checkpoint: Path) -> None:
    if (checkpoint / ADAPTER).is_file():
        options = StateDictOptions(full_state_dict=True, strict=False)
        set_model_state_dict(model, dict(load_file(checkpoint / ADAPTER)), options=options)


def save_merged(model: Any, processor: Any, checkpoint: Path) -> None:
    """Write a checkpoint with LoRA beside it as an ordinary model, its updates added to the weights, for from_pretrained.

    `model` is the one that the run began with, whole.
    """
    _load_adapter(model, checkpoint)
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


def _write(
    folder: Path, model: Any, weights: dict[str, Any], moments: dict[str, Any], processor: Any, state: dict[str, Any]
) -> None:
    if any("lora_" in name for name in weights):
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        save_file({name: weights[name].contiguous() for name in sorted(trained)}, folder / ADAPTER)
    else:
        model.save_pretrained(folder, state_dict=dict(weights))
    processor.save_pretrained(folder)
    tensors, plain = _flat(moments)
    save_file(tensors, folder / OPTIMIZER, metadata={"plain": json.dumps(plain)})
    (folder / STATE).write_text(json.dumps(state, indent=1))


def _flat(moments: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of an optimizer's state, by "weight|moment", and the rest as JSON."""
    tensors = {
        f"{name}|{moment}": value.contiguous().clone()
        for name, values in moments["state"].items()
        for moment, value in values.items()
    }
    return tensors, {"param_groups": moments["param_groups"]}


def _read_moments(checkpoint: Path) -> dict[str, Any]:
    state: dict[str, dict[str, Tensor]] = {}
    with safe_open(checkpoint / OPTIMIZER, framework="pt") as file:
        groups = json.loads(file.metadata()["plain"])["param_groups"]
        for key in file.keys():  # noqa: SIM118
            name, moment = key.split("|")
            state.setdefault(name, {})[moment] = file.get_tensor(key)
    return {"state": state, "param_groups": groups}
