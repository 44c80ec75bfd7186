"""Everything that a step of a training run needs, in one value."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, GradientAccumulationPlugin
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy

from photon_data.errors import UsageError
from photon_train.training import zero
from photon_train.training.augment import Augment
from photon_train.training.config import TrainConfig
from photon_train.training.dataset import Batch, GroupDataset, Reading, Turn, batches
from photon_train.training.engine import Engine
from photon_train.training.plan import Group
from photon_train.training.rows import TrainRow

logger = logging.getLogger(__name__)


class TrainingStopped(RuntimeError):
    """The run cannot go on as it was asked to: a row that cannot be read, a loss that is not finite. Names the rows."""


@dataclass
class Run:
    """Everything a step needs. `state` is what a checkpoint restores."""

    config: TrainConfig
    engine: Engine
    processor: Any
    rows: Sequence[TrainRow]
    eval_rows: Sequence[TrainRow]
    total_steps: int
    state: dict[str, Any]
    watch: Callable[[dict[str, Any]], None]
    groundings: dict[str, Tensor] = field(default_factory=dict)

    @property
    def accelerator(self) -> Accelerator:
        """What this process is among the others."""
        return self.engine.accelerator

    @property
    def model(self) -> Any:
        """The model, as accelerate wrapped it."""
        return self.engine.model

    @property
    def photon(self) -> Any:
        """The model's PhotonConfig."""
        return self.processor.config

    @property
    def is_stage_2(self) -> bool:
        """Whether tokens are scheduled while training."""
        return bool(self.photon.scheduler == "its")

    @property
    def turn(self) -> Turn:
        """Which groups of a step are this process's."""
        return Turn(self.accelerator.process_index, self.accelerator.num_processes)

    @property
    def is_sharded(self) -> bool:
        """Whether processes share the weights module by module, and so must call the same ones."""
        return self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)

    @property
    def folder(self) -> Path:
        """Where the run's files go."""
        return Path(self.config.output)


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Return the accelerator of this process: one device, or what torchrun or `accelerate launch` set up.

    UsageError for groups that the processes cannot share evenly, FSDP 1, and settings of DeepSpeed that would be another run's.
    """
    # Early phases leave the threshold predictor, and text-only groups the vision tower, without gradient. Buffers are constants;
    # DDP would send them before every forward, and wait for a process that has a group less to evaluate.
    kwargs = [DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)]
    with_zero = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # where DeepSpeed is installed, accelerate imports it, and it wonders
    precision = "bf16" if config.precision == "bf16" else "no"
    accelerator = Accelerator(
        cpu=not (torch.cuda.is_available() or with_zero),  # else torchrun on CPUs gives so many runs of one process
        mixed_precision=precision,
        log_with=list(config.track) or None,
        project_dir=config.output,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # groups_per_step says it; a launcher must not
        kwargs_handlers=kwargs,
    )
    check_shares(config, accelerator.num_processes)
    if accelerator.distributed_type is DistributedType.FSDP:
        _configure_fsdp(accelerator)
    if with_zero:
        zero.configure(accelerator, config)
    return accelerator


def check_shares(config: TrainConfig, processes: int) -> None:
    """UsageError when so many processes, as accelerate sees them, cannot make the steps of the run together."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != processes:  # DeepSpeed without GPUs: each would train alone
        raise UsageError(f"{launched} processes were launched, accelerate sees {processes}; launch DDP where there are no GPUs")
    if config.groups_per_step % processes:
        raise UsageError(f"groups_per_step: a multiple of the {processes} processes wanted, got {config.groups_per_step}")


def make_engine(accelerator: Accelerator, model: Any, optimizer: torch.optim.Optimizer) -> Engine:
    """Return the model and its optimizer, spread over the processes."""
    is_zero = accelerator.distributed_type is DistributedType.DEEPSPEED
    model, prepared = accelerator.prepare(model, optimizer)
    return (zero.ZeroEngine if is_zero else Engine)(accelerator, model, prepared)


def _configure_fsdp(accelerator: Accelerator) -> None:
    """Refuse FSDP 1, and let FSDP 2 round to bfloat16 what layers compute with, not what they give back or add up."""
    if not accelerator.is_fsdp2:
        raise UsageError("FSDP2 wanted (fsdp_version: 2), got FSDP 1, which knows no weight by its name")
    accelerator.state.fsdp_plugin.activation_checkpointing = False  # the run's own, by half
    if accelerator.mixed_precision == "bf16":
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )


def _reading(run: Run, *, training: bool) -> Reading:
    """Return how groups are read: without anything random in evaluation."""
    config = run.config
    if not training:
        return Reading(config.share_prefix, config.max_length, same_calls=run.is_sharded, seed=config.seed)
    return Reading(
        config.share_prefix,
        config.max_length,
        robustness=run.photon.robustness_probability if run.is_stage_2 else 0.0,
        flip=run.photon.flip_probability if run.is_stage_2 else 0.0,
        augment=Augment(config.augment),
        groundings=run.groundings,
        same_calls=run.is_sharded,
        seed=config.seed,
    )


def read_ahead(run: Run, groups: Sequence[Group], *, training: bool, epoch: int = 0) -> Iterator[Batch]:
    """Yield the batches of groups in order, read by processes of their own while the device computes."""
    rows = run.rows if training else run.eval_rows
    dataset = GroupDataset(rows, groups, run.processor, _reading(run, training=training), epoch)
    pin = run.accelerator.device.type == "cuda"
    return batches(dataset, _worker_count(run.config), run.config.prefetch, pin)


def check_read(run: Run, batch: Batch) -> None:
    """Stop, or say so, when a group could not be read."""
    if not batch.error:
        return
    named = f"{len(batch.ids)} rows ({', '.join(batch.ids)}) cannot be read: {batch.error}"
    if run.config.on_bad_row == "stop":
        raise TrainingStopped(f"{named}. Repair the store, or leave such rows out with on_bad_row=skip")
    logger.warning("skipped: %s", named)


def _worker_count(config: TrainConfig) -> int:
    """Return how many processes read stores: as configured, or up to 8 of the CPUs that the compute leaves over."""
    if config.workers >= 0:
        return config.workers
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    spare = (os.cpu_count() or 1) // local - 1
    return max(min(spare, 8), 1)
