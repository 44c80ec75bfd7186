"""How gradients become steps, and what a checkpoint holds of weights and moments: on one device, with DDP and with FSDP2.

DeepSpeed's ZeRO behind the interface of `Engine`.

DeepSpeed keeps gradients, float32 weights and moments in pieces of its own, and its checkpoints are pickles. Here weights and
moments leave and enter it by name: a checkpoint is the same with and without it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from photon_data.errors import UsageError
from photon_train.training.config import TrainConfig

Moments = dict[str, dict[str, Tensor]]  # weight -> moment ("exp_avg", "exp_avg_sq", "step") -> value


class Engine:
    """A model and its optimizer, as accelerate prepared them. Every process calls every method, in the same order."""

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: Any) -> None:
        self.accelerator = accelerator
        self.model = model
        self.optimizer = optimizer

    @contextmanager
    def group(self, last: bool) -> Iterator[None]:
        """Enclose one forward and backward of a step; the last of a step makes gradients known to all processes."""
        with nullcontext() if last else self.accelerator.no_sync(self.model):
            yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss."""
        self.accelerator.backward(loss)

    def gradient_norms(self) -> dict[str, float]:
        """Return the norm of the gradients of each module that has any, of all processes."""
        return norms_by_module((name, p.grad) for name, p in self.model.named_parameters())

    def move(self, max_norm: float) -> None:
        """Make an optimizer step by gradients clipped to the norm (0: not clipped)."""
        if max_norm:
            self.accelerator.clip_grad_norm_(self.model.parameters(), max_norm)
        self.optimizer.step()

    def forget(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def weights(self) -> dict[str, Tensor]:
        """Return all weights by name, whole, in memory of the CPU; {} but in the main process where they are shared.

        A weight of two names is there once: copied from a device, it would be two weights.
        """
        found: Any = get_model_state_dict(self.model, options=_whole(cpu_offload=True))
        tied = self._second_names()
        return {name: value for name, value in found.items() if name not in tied}

    def _second_names(self) -> set[str]:
        model: nn.Module = self.accelerator.unwrap_model(self.model)
        every = (name for name, _ in model.named_parameters(remove_duplicate=False))
        return set(every) - {name for name, _ in model.named_parameters()}

    def moments(self) -> Moments:
        """Return the optimizer's state of every weight that has one; whole, as `weights`."""
        found: Any = get_optimizer_state_dict(self.model, self.optimizer.optimizer, options=_whole(cpu_offload=True))
        return dict(found.get("state", {}))

    def load_moments(self, moments: Moments) -> None:
        """Set the optimizer's state to what `moments` returned: weights that had none have none, and have made no step."""
        optimizer = self.optimizer.optimizer
        groups: Any = get_optimizer_state_dict(self.model, optimizer, options=_whole())["param_groups"]
        state: Any = {"state": moments, "param_groups": groups}
        set_optimizer_state_dict(self.model, optimizer, optim_state_dict=state, options=_whole(strict=False))
        model: nn.Module = self.accelerator.unwrap_model(self.model)
        for name, parameter in model.named_parameters():
            if name not in moments:  # torch made some, and counted a step
                optimizer.state.pop(parameter, None)


def _whole(*, cpu_offload: bool = False, strict: bool = True) -> StateDictOptions:
    return StateDictOptions(full_state_dict=True, cpu_offload=cpu_offload, strict=strict)


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


def norms_by_module(gradients: Iterable[tuple[str, Tensor | None]]) -> dict[str, float]:
    """Return the norm of the gradients of each module, given by name of the weight."""
    squares: dict[str, list[Tensor]] = defaultdict(list)
    for name, gradient in gradients:
        if gradient is not None:
            norm = torch.linalg.vector_norm(gradient.float())
            whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # a sharded gradient
            squares[module_of(name)].append(whole.square())
    return {module: float(torch.stack(values).sum().sqrt()) for module, values in squares.items()}


# Module -> a part of its parameters' names; the first that fits counts. What fits none is the language model.
MODULES = {
    "patch_embedding": "visual.patch_embed.",
    "merger": "visual.merger.",
    "vision": "visual.",
    "threshold": ".atp.predictor.",
}


LANGUAGE_MODEL = "language_model"


def module_of(name: str) -> str:
    """Return the module that a parameter belongs to, by its name in the model."""
    return next((module for module, part in MODULES.items() if part in name), LANGUAGE_MODEL)
