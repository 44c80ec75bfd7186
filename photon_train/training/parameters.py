"""Which weights a stage trains, and with which learning rate."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

from photon_data.errors import UsageError
from photon_train.training.config import TrainConfig

# Module -> a part of its parameters' names; the first that fits counts. What fits none is the language model.
MODULES = {
    "patch_embedding": "visual.patch_embed.",
    "merger": "visual.merger.",
    "vision": "visual.",
    "threshold": ".atp.predictor.",
}
LANGUAGE_MODEL = "language_model"
LORA_TARGETS = r".*language_model\.layers\..*_proj"
UNUSED = ".atp.pos_proj."  # stored, never used


def module_of(name: str) -> str:
    """Return the module that a parameter belongs to, by its name in the model."""
    return next((module for module, part in MODULES.items() if part in name), LANGUAGE_MODEL)


def with_lora(model: Any, config: TrainConfig) -> Any:
    """Return the model with trainable low-rank updates of the language model's linear layers (peft, an extra)."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=LORA_TARGETS)
    return get_peft_model(model, lora)


def choose_trained(model: nn.Module, config: TrainConfig) -> None:
    """Set requires_grad of every parameter. UsageError when nothing is left to train.

    A rate of 0 freezes a module. With LoRA the language model's own weights are frozen, its updates trained.
    """
    for name, parameter in model.named_parameters():
        module = module_of(name)
        frozen = config.rates[module] == 0 or UNUSED in name or any(fnmatch(name, pattern) for pattern in config.freeze)
        if config.lora_rank and module == LANGUAGE_MODEL and "lora_" not in name:
            frozen = True
        parameter.requires_grad_(not frozen)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError("a module with a learning rate above 0 wanted, got none: lr_* and freeze leave nothing to train")


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Return optimizer groups: a rate per module, weight decay for matrices only. `module` names the group in the log."""
    groups: dict[tuple[str, bool], list[Tensor]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[module_of(name), parameter.ndim > 1].append(parameter)
    return [
        {
            "params": parameters,
            "lr": config.rates[module],
            "weight_decay": config.weight_decay if decays else 0.0,
            "module": module,
        }
        for (module, decays), parameters in groups.items()
    ]


def norms_by_module(gradients: Iterable[tuple[str, Tensor | None]]) -> dict[str, float]:
    """Return the norm of the gradients of each module, given by name of the weight."""
    squares: dict[str, list[Tensor]] = defaultdict(list)
    for name, gradient in gradients:
        if gradient is not None:
            norm = torch.linalg.vector_norm(gradient.float())
            whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # a sharded gradient
            squares[module_of(name)].append(whole.square())
    return {module: float(torch.stack(values).sum().sqrt()) for module, values in squares.items()}
