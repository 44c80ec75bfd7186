"""How gradients become steps, and what a checkpoint holds of weights and moments: on one device, with DDP and with FSDP2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from photon_train.training.parameters import norms_by_module

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
