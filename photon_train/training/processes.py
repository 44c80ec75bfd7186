"""The processes of a run: what accelerate is told, and what FSDP2 shares among them."""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, GradientAccumulationPlugin
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from photon_data.errors import UsageError
from photon_train.scheduling import ThresholdPredictor
from photon_train.training.config import TrainConfig


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Return the accelerator of this process: one device, or what torchrun or `accelerate launch` set up.

    UsageError for processes that cannot share the groups of a step evenly, for trackers that are not installed, for
    FSDP 1 and for DeepSpeed.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        remedy = "launch with torchrun, or with `distributed_type: FSDP` and `fsdp_version: 2` to share the weights"
        raise UsageError(f"expected DDP or FSDP2, found DeepSpeed; {remedy}")
    installed = [str(name.value) for name in get_available_trackers()]
    if missing := [name for name in config.track if name not in installed]:
        found = f"found {missing[0]}; install it, or leave it out"
        raise UsageError(f"track: expected trackers that are installed ({', '.join(installed)}), {found}")
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),  # else torchrun on CPUs gives separate runs of one process each
        mixed_precision="bf16" if casts(config) else "no",
        log_with=list(config.track) or None,
        project_dir=config.output,
        # groups_per_step decides about accumulation, not the launcher.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        # Early phases leave the threshold predictor, and groups of text the vision tower, without a gradient. Buffers
        # are constants: DDP would send them before every forward, and wait for processes with less to evaluate.
        kwargs_handlers=[
            DistributedDataParallelKwargs(
                find_unused_parameters=True, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        ],
    )
    torch.set_float32_matmul_precision("highest" if config.precision == "fp32" else "high")
    check_processes(config, accelerator.num_processes)
    if accelerator.distributed_type is DistributedType.FSDP:
        if config.eval_benchmark and config.lora_rank:
            raise UsageError("eval_benchmark: expected none with lora_rank and FSDP2, found both; launch with torchrun")
        if not accelerator.is_fsdp2:
            raise UsageError("expected FSDP2, found FSDP 1, which has no names for weights; set `fsdp_version: 2`")
        if config.groups_per_forward > 1:  # which groups are of one shape differs between processes
            expected = "expected 1 with FSDP2, whose processes all make as many calls"
            raise UsageError(f"groups_per_forward: {expected}, found {config.groups_per_forward}; launch with torchrun")
        plugin = accelerator.state.fsdp_plugin
        plugin.activation_checkpointing = False  # the run checkpoints activations itself, for either half of the model
        if config.precision != "fp32":  # rounds what layers compute with, not what they return or add up
            plugin.mixed_precision_policy = MixedPrecisionPolicy(
                torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
    return accelerator


def share_apart(accelerator: Accelerator, model: Any) -> None:
    """Make FSDP2 share the threshold predictor apart from its layer, so that `keep_float32` can tell them apart."""
    plugin, found = accelerator.state.fsdp_plugin, {type(module).__name__ for module in model.modules()}
    names = plugin.transformer_cls_names_to_wrap or model._no_split_modules
    plugin.transformer_cls_names_to_wrap = sorted({*names, ThresholdPredictor.__name__} & found)


def keep_float32(model: nn.Module) -> None:
    """Keep FSDP2 from rounding weights that compute in float32: in bfloat16 the threshold would move by steps of 3 %.

    FSDP2 has no way to say so of a part of what accelerate shares; its parts read their policy at the first forward.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule) and isinstance(module, ThresholdPredictor):
            for group in module._get_fsdp_state()._fsdp_param_groups:
                group.mp_policy = MixedPrecisionPolicy()


def casts(config: TrainConfig) -> bool:
    """Tell whether weights stay in float32 and are cast for each use. FSDP2 shares them, and casts what it gathers."""
    shares = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return config.precision == "autocast" or (config.precision == "bf16" and shares)


def check_processes(config: TrainConfig, processes: int) -> None:
    """UsageError when this many processes, as accelerate counts them, cannot make the steps of the run together."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != processes:  # each would train alone
        found = f"found that accelerate sees {processes}; launch with torchrun"
        raise UsageError(f"expected the {launched} processes that were launched, {found}")
    if config.groups_per_step % processes:
        found = f"found {config.groups_per_step}; change either of them"
        raise UsageError(f"groups_per_step: expected a multiple of the {processes} processes, {found}")
