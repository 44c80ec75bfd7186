"""Checkpoints: folders that hold a model, published or ours, and a run's moments and position.

Published ones have names of weights and one of three layouts; what does not fit is said. Ours are complete or absent,
readable by from_pretrained, without pickles, made by any number of processes.

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
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.utils.hub import cached_file

from photon_data.files import write_whole
from photon_train.configuration_photon import PhotonConfig, PhotonVisionConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "force_download", "subfolder")

STATE = "state.json"
OPTIMIZER = "optimizer.safetensors"
ADAPTER = "adapter.safetensors"
PREFIX = "checkpoint-"


class Layout(Enum):
    """What a checkpoint was trained as."""

    STOCK = "Qwen2.5-VL"
    STAGE1 = "Photon stage 1"
    STAGE2 = "Photon stage 2"


def register_published_names(class_name: str) -> None:
    """Make transformers read and write the published key names for this class."""
    renamings: list[Any] = [
        WeightRenaming(r"^visual", "model.visual"),
        WeightRenaming(r"^model(?!\.(language_model|visual))", "model.language_model"),
        WeightRenaming(r"visual\.vision_patch_embed", "visual.patch_embed"),
    ]
    register_checkpoint_conversion_mapping(class_name, renamings, overwrite=True)


def hub_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of from_pretrained that say where on the hub to look."""
    return {k: v for k, v in kwargs.items() if k in HUB_OPTIONS and v is not None}


def checkpoint_keys(path_or_id: str, **kwargs: Any) -> set[str]:
    """Return the tensor names of a local or hub checkpoint. Raises ValueError without whole safetensors files."""
    if Path(path_or_id).is_absolute() and not Path(path_or_id).is_dir():
        raise ValueError(f"expected a model directory or a hub id, found neither at {path_or_id}; check the path")
    options = hub_options(kwargs)
    optional = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_gated_repo": True}
    if index := cached_file(path_or_id, "model.safetensors.index.json", **options, **optional):
        return set(json.loads(Path(index).read_text())["weight_map"])
    single = cached_file(path_or_id, "model.safetensors", **options, **optional)
    if single is None:
        raise ValueError(
            f"expected model.safetensors or its index, found none in {path_or_id}; pickled weights (.bin, .pt) can run "
            "code and are not read: convert them to safetensors on a machine you can lose"
        )
    try:
        with safe_open(single, framework="pt") as tensors:
            return set(tensors.keys())
    except SafetensorError as error:
        raise ValueError(f"{single}: expected a complete safetensors file, found {error}; fetch it again") from error


def layout_of(keys: set[str]) -> Layout:
    """Return the layout that the tensor names show. Raises ValueError when they show none."""
    parts = {".atp.": Layout.STAGE2, "visual.vision_patch_embed.": Layout.STAGE1, "visual.patch_embed.": Layout.STOCK}
    for part, layout in parts.items():
        if any(part in key for key in keys):
            return layout
    raise ValueError(
        f"expected a Qwen2.5-VL or Photon checkpoint, found neither patch_embed nor vision_patch_embed "
        f"among {len(keys)} keys, such as {sorted(keys)[:3]}; check the path"
    )


def config_for(path: str, layout: Layout, stage: int | None, settings: dict[str, Any], **kwargs: Any) -> PhotonConfig:
    """Return the configuration to load a checkpoint for `stage` (default: its own; below it: ValueError)."""
    own_stage = 2 if layout is Layout.STAGE2 else 1
    stage = own_stage if stage is None else stage
    if stage < own_stage:
        raise ValueError(
            f"{layout.value} checkpoint: expected stage {own_stage}, found {stage}; for no pruning set scheduler='none'"
        )
    saved, _ = PhotonConfig.get_config_dict(path, **hub_options(kwargs))
    if layout is Layout.STOCK:
        # one channel and cubic patches in place of RGB frames
        rgb, fresh = saved["vision_config"], PhotonVisionConfig()
        cubic = {"in_channels": 1, "in_chans": 1, "temporal_patch_size": rgb.get("patch_size", fresh.patch_size)}
        settings = {"vision_config": {**rgb, **cubic, "tokens_per_second": fresh.tokens_per_second}, **settings}
    if stage == 2 and layout is not Layout.STAGE2:
        settings = {"scheduler": "its", **settings}
    return PhotonConfig.from_dict({**saved, **settings, "stage": stage})


def check_loaded(info: dict[str, Any], layout: Layout, stage: int) -> None:
    """Raise ValueError listing every key that is missing, unexpected or of another shape, save fresh weights."""

    def is_fresh(key: str) -> bool:
        fresh_predictor = stage == 2 and layout is not Layout.STAGE2 and ".atp." in key
        return fresh_predictor or (layout is Layout.STOCK and key == "model.visual.patch_embed.proj.weight")

    problems = [f"missing {key}" for key in sorted(info["missing_keys"]) if not is_fresh(key)]
    problems += [f"unexpected {key}" for key in sorted(info["unexpected_keys"])]
    problems += [
        f"{key}: expected shape {tuple(expected)}, found {tuple(found)}"
        for key, found, expected in sorted(info["mismatched_keys"])
        if not is_fresh(key)
    ]
    if problems:
        listed = "\n  ".join(problems)
        raise ValueError(
            f"expected a complete {layout.value} checkpoint, found {len(problems)} keys that do not fit:\n  {listed}\n"
            "Check that config.json belongs to these weights and that no shard is cut off."
        )


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
