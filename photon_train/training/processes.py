"""The processes of a run: what accelerate is told, what FSDP2 shares among them, and how a signal ends them.

A signal that asks for the end is noted, and obeyed after the step: what was computed is saved.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from multiprocessing.queues import Queue
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, GradientAccumulationPlugin
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from photon_data.errors import UsageError
from photon_train.scheduling import ThresholdPredictor
from photon_train.training.config import TrainConfig

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # Ctrl-C; a cluster that stops a job; one that warns of it
SENT_ON_S = 5.0  # torchrun sends on what SLURM sends to all processes of a job: a signal so soon is the same one


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


def check_processes(config: TrainConfig, processes: int) -> None:
    """UsageError when this many processes, as accelerate counts them, cannot make the steps of the run together."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != processes:  # each would train alone
        found = f"found that accelerate sees {processes}; launch with torchrun"
        raise UsageError(f"expected the {launched} processes that were launched, {found}")
    if config.groups_per_step % processes:
        found = f"found {config.groups_per_step}; change either of them"
        raise UsageError(f"groups_per_step: expected a multiple of the {processes} processes, {found}")


def casts(config: TrainConfig) -> bool:
    """Tell whether weights stay in float32 and are cast for each use. FSDP2 shares them, and casts what it gathers."""
    shares = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return config.precision == "autocast" or (config.precision == "bf16" and shares)


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


class TrainingStopped(RuntimeError):
    """The run cannot go on under its settings: a row that cannot be read, a loss that is not finite. Names the rows."""


class TrainingInterrupted(Exception):
    """A signal ended the run; its message says which checkpoint holds what is done."""


class Interruption:
    """A context in which the first of SIGNALS only sets `asked`; one SENT_ON_S later raises KeyboardInterrupt.

    Processes that read ahead do as `read_on` says. In a thread that gets no signals nothing is noted.
    """

    def __init__(self) -> None:
        self.asked, self._asked_s = False, 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {sign: signal.signal(sign, self._note) for sign in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for sign, handler in self._before.items():
            signal.signal(sign, handler)

    def _note(self, sign: int, frame: FrameType | None) -> None:
        if not self.asked:
            self.asked, self._asked_s = True, time.monotonic()
        elif sign != signal.SIGUSR1 and time.monotonic() - self._asked_s > SENT_ON_S:  # USR1 may come every minute
            raise KeyboardInterrupt


def read_on(worker: int) -> None:
    """Make a process that reads ahead ignore a signal to all of its job: the step still needs it.

    Torch ends such a process by itself; where it does so with SIGTERM, it comes a second time. What torchrun sends on
    goes to the group of the process that trains: this one leaves it.

    A batch that cannot be sent, for want of open files, ends the process: Python would print why and drop the batch,
    and the run would wait for it for ever.
    """
    os.setpgid(0, 0)
    for sign in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(sign, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    Queue._on_queue_feeder_error = staticmethod(_end_reader)  # type: ignore[attr-defined]


def _end_reader(error: Exception, batch: object) -> None:
    print(f"a process that reads ahead cannot send a batch: {error}", file=sys.stderr, flush=True)
    os._exit(0)  # with another code torch raises wherever the run is by then: when it says why it ends, for example
