"""Checkpoints: complete or absent, readable by from_pretrained, without pickles, made by any number of processes.

RUN/checkpoint-120/     config.json, model.safetensors, tokenizer files    what from_pretrained and photon predict read
                        adapter.safetensors      with LoRA: what is trained; then there is no model.safetensors
                        optimizer.safetensors    optimizer state of every trained weight, by its name
                        state.json               position of the run

A run that goes on loads its model from there with from_pretrained, which is strict about names. With FSDP2 processes
share weights and optimizer state: they are gathered before they are written, and distributed after they were read.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from photon_data.files import write_whole

STATE = "state.json"
OPTIMIZER = "optimizer.safetensors"
ADAPTER = "adapter.safetensors"
PREFIX = "checkpoint-"


def save_checkpoint(
    run: Path, state: dict[str, Any], accelerator: Accelerator, model: Any, optimizer: Any, processor: Any, keep: int
) -> None:
    """Write RUN/checkpoint-STEP, then remove older ones but `keep`. Every process calls this; the main one writes.

    `model` and `optimizer` are what accelerate prepared.
    """
    unwrapped: Any = accelerator.unwrap_model(model)
    weights = _gather_weights(model, unwrapped)
    optimizer_state = get_optimizer_state_dict(model, optimizer.optimizer, options=_whole(cpu_offload=True))
    if accelerator.is_main_process:
        with _new_folder(run / f"{PREFIX}{state['step']}") as folder:
            if any("lora_" in name for name in weights):
                trained = [name for name, parameter in unwrapped.named_parameters() if parameter.requires_grad]
                save_file({name: weights[name].contiguous() for name in sorted(trained)}, folder / ADAPTER)
            else:
                unwrapped.save_pretrained(folder, state_dict=weights)
            processor.save_pretrained(folder)
            by_weight: Any = optimizer_state.get("state", {})  # {name of a weight: {"exp_avg": ..., "step": ...}}
            flat = {f"{name}|{key}": value for name, own in by_weight.items() for key, value in own.items()}
            save_file({key: value.contiguous().clone() for key, value in flat.items()}, folder / OPTIMIZER)
            (folder / STATE).write_text(json.dumps(state, indent=1))
        for old in checkpoints(run)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def _gather_weights(model: nn.Module, unwrapped: nn.Module) -> dict[str, Tensor]:
    """Return all weights of a prepared model by name, whole, on the CPU. With FSDP2, {} but in the main process.

    A weight with two names is there once: copied from a device, it would become two weights.
    """
    names = {name for name, _ in unwrapped.named_parameters(remove_duplicate=False)}
    second_names = names - {name for name, _ in unwrapped.named_parameters()}
    weights: Any = get_model_state_dict(model, options=_whole(cpu_offload=True))
    return {name: value for name, value in weights.items() if name not in second_names}


def load_optimizer_state(checkpoint: Path, model: nn.Module, unwrapped: nn.Module, optimizer: Optimizer) -> None:
    """Set the optimizer's state to that of a checkpoint. A weight that had none has none again."""
    state: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, value in load_file(checkpoint / OPTIMIZER).items():
        name, key_of_weight = key.split("|")
        state[name][key_of_weight] = value
    groups: Any = get_optimizer_state_dict(model, optimizer, options=_whole())["param_groups"]
    whole: Any = {"state": dict(state), "param_groups": groups}
    set_optimizer_state_dict(model, optimizer, optim_state_dict=whole, options=_whole(strict=False))
    for name, parameter in unwrapped.named_parameters():
        if name not in state:  # it had no state when saved; torch made one that counts a step
            optimizer.state.pop(parameter, None)


def _whole(*, cpu_offload: bool = False, strict: bool = True) -> StateDictOptions:
    return StateDictOptions(full_state_dict=True, cpu_offload=cpu_offload, strict=strict)


def checkpoints(run: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first. A copy of one under another name ("-best") is none."""
    steps = {path: path.name.removeprefix(PREFIX) for path in run.glob(f"{PREFIX}*") if (path / STATE).is_file()}
    return sorted((path for path, step in steps.items() if step.isdecimal()), key=lambda path: int(steps[path]))


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return the position of the run that a checkpoint was made at."""
    return dict(json.loads((checkpoint / STATE).read_text()))


def save_merged(model: Any, processor: Any, run: Path) -> None:
    """Write RUN/merged, an ordinary model for from_pretrained: a whole model with LoRA, updates added to weights."""
    with _new_folder(run / "merged") as folder:
        model.merge_and_unload().save_pretrained(folder)
        processor.save_pretrained(folder)


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """Give an empty folder that becomes the target; its name is always the same, so that a killed run's is removed."""
    with write_whole(target, target.with_name(f".partial-{target.name}")) as folder:
        folder.mkdir()
        yield folder
