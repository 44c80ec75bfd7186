"""DeepSpeed's ZeRO behind the interface of `Engine`.

DeepSpeed keeps gradients, float32 weights and moments in pieces of its own, and its checkpoints are pickles. Here weights and
moments leave and enter it by name: a checkpoint is the same with and without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from photon_data.errors import UsageError
from photon_train.training.config import TrainConfig
from photon_train.training.engine import Engine, Moments
from photon_train.training.parameters import norms_by_module

MOMENTS = ("exp_avg", "exp_avg_sq")
OURS = ("optimizer", "scheduler")


def configure(accelerator: Accelerator, config: TrainConfig) -> None:
    """Set what a step is in DeepSpeed's configuration, whatever the launcher's file says of it.

    Raises UsageError for what would be another run: stage 0, moments on a disk, an optimizer or schedule of its own,
    `on_nan=skip`.
    """
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    plugin = accelerator.state.deepspeed_plugin
    settings = plugin.deepspeed_config
    if plugin.zero_stage not in (1, 2, 3):
        raise UsageError(f"zero_stage 1, 2 or 3 wanted with DeepSpeed, got {plugin.zero_stage}; launch DDP instead")
    if "nvme" in (plugin.offload_optimizer_device, plugin.offload_param_device):
        raise UsageError("offloading to cpu or none wanted with DeepSpeed, got nvme, whose moments no checkpoint would hold")
    if own := [name for name in OURS if name in settings]:
        raise UsageError(f"no {' and no '.join(own)} wanted in DeepSpeed's configuration: lr_*, weight_decay and schedule say it")
    if config.on_nan == "skip":
        raise UsageError("on_nan=stop wanted with DeepSpeed, got skip: it cannot forget gradients")
    unset_hf_deepspeed_config()  # weights are loaded whole, and then shared
    settings |= {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": config.groups_per_step // accelerator.num_processes,
        "train_batch_size": config.groups_per_step,
        "gradient_clipping": config.max_grad_norm,
        "fp16": {"enabled": False},
        "bf16": {"enabled": config.precision == "bf16"},
        "zero_force_ds_cpu_optimizer": False,  # offloaded, accelerate would put an Adam in that is compiled at the first run
    }


class ZeroEngine(Engine):
    """A model and its optimizer in DeepSpeed's engine, which counts the groups of a step as we do."""

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: Any) -> None:
        super().__init__(accelerator, model, optimizer)
        self._states = self._begun()

    @property
    def _engine(self) -> Any:
        return self.model

    @property
    def _is_stage_3(self) -> bool:
        return bool(self._engine.zero_optimization_stage() == 3)

    @property
    def _named(self) -> list[tuple[str, nn.Parameter]]:
        return list(self._engine.module.named_parameters())

    @contextmanager
    def group(self, last: bool) -> Iterator[None]:
        """As in Engine; before the last, DeepSpeed is only told to count."""
        yield
        if not last:
            self._engine.step()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss, which is scaled already."""
        self._engine.backward(loss, scale_wrt_gas=False)

    def gradient_norms(self) -> dict[str, float]:
        """As in Engine. Every gradient is put together for it, one by one."""
        from deepspeed.utils import safe_get_full_grad

        return norms_by_module((name, safe_get_full_grad(p)) for name, p in self._named if p.requires_grad)

    def move(self, max_norm: float) -> None:
        """Make an optimizer step; `configure` told DeepSpeed the norm."""
        self._engine.step()

    def forget(self) -> None:
        """Nothing: DeepSpeed forgets gradients when it steps."""

    def weights(self) -> dict[str, Tensor]:
        """As in Engine: those that are trained in float32, whatever is computed with."""
        from deepspeed.utils import safe_get_full_fp32_param as get

        return self._kept((name, get(p) if p.requires_grad else _gathered(p)) for name, p in self._named)

    def moments(self) -> Moments:
        """As in Engine."""
        from deepspeed.utils import safe_get_full_optimizer_state as get

        step = self._states[0]["step"]
        trained = [(name, p) for name, p in self._named if p.requires_grad]
        found = {moment: self._kept((name, get(p, moment)) for name, p in trained) for moment in MOMENTS}
        return {name: {**{m: found[m][name] for m in MOMENTS}, "step": step.clone()} for name in found[MOMENTS[0]]}

    def load_moments(self, moments: Moments) -> None:
        """As in Engine. DeepSpeed counts one step for all weights; those without moments get zeros."""
        step = max((values["step"] for values in moments.values()), default=torch.tensor(0.0))
        for state in self._states:
            state["step"] = step.clone()
        for name, p in self._named:
            for moment in MOMENTS if name in moments else ():
                self._set_moment(p, moments[name][moment].to(self.accelerator.device), moment)

    def _set_moment(self, parameter: Any, value: Tensor, moment: str) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if not self._is_stage_3:
            safe_set_full_optimizer_state(parameter, value, moment)
            return
        size, place = parameter.partition_numel(), self.accelerator.process_index  # the last piece is padded
        piece = torch.zeros(size, device=value.device)
        own = value.flatten()[place * size : (place + 1) * size]
        piece[: len(own)] = own
        safe_set_local_optimizer_state(parameter, piece, moment)

    def _begun(self) -> list[dict[str, Tensor]]:
        """Return the states of the pieces of weights that this process updates: zeros, which DeepSpeed would make as it steps."""
        zero = self._engine.optimizer
        pieces = zero.fp32_partitioned_groups_flat if self._is_stage_3 else zero.single_partition_of_fp32_groups
        for piece in pieces:
            zeros = {moment: torch.zeros_like(piece, requires_grad=False) for moment in MOMENTS}
            zero.optimizer.state[piece] |= {**zeros, "step": torch.tensor(0.0)}
        if not self._is_stage_3:
            zero._lazy_init_hp_params_optimizer_state()  # it would do so behind the first group's step, and forget the others
        return [zero.optimizer.state[piece] for piece in pieces]

    def _kept(self, found: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Return what every process puts together, in the main one."""
        is_main = self.accelerator.is_main_process
        return {name: value.cpu() for name, value in found if is_main}


def _gathered(parameter: nn.Parameter) -> Tensor:
    """Return a weight that is not trained, whole."""
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter]):
        return parameter.detach().clone()
