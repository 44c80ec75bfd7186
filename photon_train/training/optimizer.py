"""AdamW for weights that are computed with in bfloat16: it keeps them in float32, and rounds after each step.

A step of 1e-5 of a weight is below the rounding of bfloat16 (4e-3): without the copies nothing would be learned.
Weights in float32 are their own copy. One fused kernel updates many weights.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from photon_data.errors import UsageError
from photon_train.checkpoint import OPTIMIZER, float32_weights, whole

MASTER = "master"  # of a weight's state: the float32 copy
AT_A_TIME = 2**28  # weights whose gradients are in float32 at a time: 1 GiB


class MasterAdamW(Optimizer):
    """AdamW whose state and weights are float32, whatever the weights of the model are."""

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float], eps: float = 1e-8) -> None:
        super().__init__(groups, {"lr": 1.0, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient."""
        for group in self.param_groups:
            for weights in _parts([weight for weight in group["params"] if weight.grad is not None]):
                states = [self._state_of(weight) for weight in weights]
                masters = [own.get(MASTER, weight) for own, weight in zip(states, weights, strict=True)]
                torch._fused_adamw_(
                    masters,
                    [weight.grad.float() for weight in weights if weight.grad is not None],
                    [own["exp_avg"] for own in states],
                    [own["exp_avg_sq"] for own in states],
                    [],
                    [own["step"].add_(1) for own in states],
                    lr=float(group["lr"]),
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    amsgrad=False,
                    maximize=False,
                )
                if weights[0].dtype != torch.float32:
                    torch._foreach_copy_(weights, masters)

    def _state_of(self, weight: Tensor) -> dict[str, Tensor]:
        own: dict[str, Tensor] = self.state[weight]
        if "step" not in own:
            own["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
            own["exp_avg"], own["exp_avg_sq"] = (torch.zeros_like(weight, dtype=torch.float32) for _ in range(2))
        if weight.dtype != torch.float32 and MASTER not in own:
            own[MASTER] = weight.float()
        return own

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state over as it is; torch would round it to the dtype of the weights."""
        super().load_state_dict(state_dict)
        names, weights = (
            [weight for group in groups for weight in group["params"]]
            for groups in (state_dict["param_groups"], self.param_groups)
        )
        for name, weight in zip(names, weights, strict=True):
            if own := state_dict["state"].get(name):
                self.state[weight] = {key: value.to(weight.device) for key, value in own.items()}


def _parts(weights: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yield weights of one dtype that have AT_A_TIME entries together, or one weight."""
    for dtype in sorted({weight.dtype for weight in weights}, key=str):
        part: list[Tensor] = []
        for weight in (weight for weight in weights if weight.dtype == dtype):
            if part and sum(other.numel() for other in part) + weight.numel() > AT_A_TIME:
                yield part
                part = []
            part.append(weight)
        yield part


def _moments(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, dict[str, Tensor]]:
    """Return {weight: {key: tensor}} of a file of moments; UsageError where they are not those of such weights."""
    state: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, value in load_file(file).items():
        name, _, key_of_weight = key.partition("|")
        if name not in shapes or value.shape not in ((), shapes[name]):
            found = f"{key} of shape {tuple(value.shape)}"
            raise UsageError(f"{file}: expected moments of the model's weights, found {found}; copy it again")
        state[name][key_of_weight] = value
    if len(kinds := {tuple(sorted(own.keys() - {MASTER})) for own in state.values()}) > 1:
        raise UsageError(f"{file}: expected the same moments of all weights, found {sorted(kinds)}; copy it again")
    return dict(state)


def load_optimizer_state(checkpoint: Path, model: nn.Module, unwrapped: nn.Module, optimizer: Optimizer) -> None:
    """Set the optimizer's state to that of a checkpoint, and the float32 weights of the run to those that it had.

    They may have been the model's own then and be copies in the state now, or the other way round: FSDP2 and autocast
    have no copies. A weight that had no state has none again.
    """
    state = _moments(checkpoint / OPTIMIZER, {name: weight.shape for name, weight in unwrapped.named_parameters()})
    masters: dict[str, Any] = {name: own.pop(MASTER) for name, own in state.items() if MASTER in own}
    rounded = {name for name, weight in unwrapped.named_parameters() if weight.dtype != torch.float32} & state.keys()
    masters |= float32_weights(checkpoint, rounded - masters.keys())
    for name in rounded & masters.keys():
        state[name][MASTER] = masters.pop(name)
    if masters:
        set_model_state_dict(model, masters, options=whole(strict=False))
    groups: Any = get_optimizer_state_dict(model, optimizer, options=whole())["param_groups"]
    all_of_it: Any = {"state": dict(state), "param_groups": groups}
    set_optimizer_state_dict(model, optimizer, optim_state_dict=all_of_it, options=whole(strict=False))
    for name, parameter in unwrapped.named_parameters():
        if name not in state:  # it had no state when saved; torch made one that counts a step
            optimizer.state.pop(parameter, None)
