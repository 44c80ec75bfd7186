"""One run on several processes: which launchers it takes, and how weights and optimizer state leave and enter it whole.

With DDP every process holds everything; with FSDP2 processes share weights, gradients and optimizer state. Every
process calls every function of this file, in the same order.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, GradientAccumulationPlugin
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy

from photon_data.errors import UsageError
from photon_train.training.config import TrainConfig

OptimizerState = dict[str, dict[str, Tensor]]  # name of a weight -> {"exp_avg": ..., "exp_avg_sq": ..., "step": ...}


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Return the accelerator of this process: one device, or what torchrun or `accelerate launch` set up.

    UsageError for processes that cannot share the groups of a step evenly, for FSDP 1 and for DeepSpeed.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise UsageError(
            "expected DDP or FSDP2, found DeepSpeed; launch with torchrun, or with `distributed_type: FSDP` and "
            "`fsdp_version: 2` to share the weights"
        )
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),  # else torchrun on CPUs gives separate runs of one process each
        mixed_precision="bf16" if config.precision == "bf16" else "no",
        log_with=list(config.track) or None,
        project_dir=config.output,
        # groups_per_step decides about accumulation, not the launcher.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        # Early phases leave the threshold predictor, and groups of text the vision tower, without a gradient. Buffers
        # are constants: DDP would send them before every forward, and wait for processes with less to evaluate.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)],
    )
    check_processes(config, accelerator.num_processes)
    if is_sharded(accelerator):
        if not accelerator.is_fsdp2:
            raise UsageError("expected FSDP2, found FSDP 1, which has no names for weights; set `fsdp_version: 2`")
        plugin = accelerator.state.fsdp_plugin
        plugin.activation_checkpointing = False  # the run checkpoints activations itself, for either half of the model
        if config.precision == "bf16":  # rounds what layers compute with, not what they return or add up
            plugin.mixed_precision_policy = MixedPrecisionPolicy(
                torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
    return accelerator


def check_processes(config: TrainConfig, processes: int) -> None:
    """UsageError when this many processes, as accelerate counts them, cannot make the steps of the run together."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != processes:  # each would train alone
        raise UsageError(
            f"expected the {launched} processes that were launched, found that accelerate sees {processes}; "
            "launch with torchrun"
        )
    if config.groups_per_step % processes:
        raise UsageError(
            f"groups_per_step: expected a multiple of the {processes} processes, found {config.groups_per_step}; "
            "change either of them"
        )


def is_sharded(accelerator: Accelerator) -> bool:
    """Tell whether processes share the weights module by module, and so must call the same modules."""
    return bool(accelerator.distributed_type is DistributedType.FSDP)


def gather_weights(model: nn.Module, unwrapped: nn.Module) -> dict[str, Tensor]:
    """Return all weights of a prepared model by name, whole, on the CPU. With FSDP2, {} but in the main process.

    A weight with two names is there once: copied from a device, it would become two weights.
    """
    names = {name for name, _ in unwrapped.named_parameters(remove_duplicate=False)}
    second_names = names - {name for name, _ in unwrapped.named_parameters()}
    weights: Any = get_model_state_dict(model, options=_whole(cpu_offload=True))
    return {name: value for name, value in weights.items() if name not in second_names}


def gather_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> OptimizerState:
    """Return the optimizer's state of every weight that has one; where and how as in `gather_weights`."""
    found: Any = get_optimizer_state_dict(model, optimizer, options=_whole(cpu_offload=True))
    return dict(found.get("state", {}))


def load_optimizer_state(
    model: nn.Module, unwrapped: nn.Module, optimizer: torch.optim.Optimizer, state: OptimizerState
) -> None:
    """Set the optimizer's state to what `gather_optimizer_state` returned. A weight that had none has none again."""
    groups: Any = get_optimizer_state_dict(model, optimizer, options=_whole())["param_groups"]
    whole: Any = {"state": state, "param_groups": groups}
    set_optimizer_state_dict(model, optimizer, optim_state_dict=whole, options=_whole(strict=False))
    for name, parameter in unwrapped.named_parameters():
        if name not in state:  # torch made one, which counts a step
            optimizer.state.pop(parameter, None)


def _whole(*, cpu_offload: bool = False, strict: bool = True) -> StateDictOptions:
    return StateDictOptions(full_state_dict=True, cpu_offload=cpu_offload, strict=strict)
