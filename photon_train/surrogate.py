"""Surrogate gradient propagation (SGP): a gradient for the keep probability of tokens kept or dropped for good.

Legend: B rows, L tokens before pruning, M after, D features.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from photon_train.configuration_photon import PhotonConfig
from photon_train.packing import Gather


class SurrogateRule(NamedTuple):
    """The constants of SGP; the fields of PhotonConfig named sgp_*."""

    strict: bool
    sigma_floor: float
    z_clip: float
    beta: float
    scale_floor: float
    scale_min: float
    scale_max: float
    saturation_floor: float
    loss_scale: float = 1.0  # what the loss was multiplied by, e.g. 1 / accumulation steps

    @classmethod
    def of(cls, config: PhotonConfig) -> "SurrogateRule":
        """Return the rule that the configuration describes."""
        return cls(**{name: getattr(config, f"sgp_{name}") for name in cls._fields if name != "loss_scale"})


def prune(h_BLD: Tensor, p_BL: Tensor, visual_BL: Tensor, kept: Gather, rule: SurrogateRule) -> Tensor:
    """Return h_BMD, the kept tokens of h_BLD; empty slots are 0.

    Backwards h gets the upstream gradient at the kept positions and 0 at the dropped, p gets `surrogate_gradient`.
    """
    pruned: Tensor = _Prune.apply(h_BLD, p_BL, visual_BL, kept.index_BM, kept.present_BM, rule)
    return pruned


def surrogate_gradient(x_BLD: Tensor, g_BLD: Tensor, p_BL: Tensor, visual_BL: Tensor, rule: SurrogateRule) -> Tensor:
    """Return the gradient float32[B, L] for p, 0 off the visual tokens (the paper's SGP).

    g_BLD is the upstream gradient, 0 at dropped tokens. eta = <x, g>, standardised and clipped; direction d = 0.5 - r,
    r = 0.5 + 0.5 tanh(z); magnitude s = sum |x g| over its mean, clipped; gradient = beta d s max(p (1 - p), floor).

    Both are relative to the row: a row of a batch counts as much for p as a row alone. Where the floor of sigma is reached
    the size of the loss matters, hence `loss_scale`: the gradient is that of the loss before scaling, times the scale, so
    that a step does not depend on how its rows are spread over accumulation steps and devices.
    """
    if rule.loss_scale == 0:
        return torch.zeros_like(p_BL)
    xg_BLD = x_BLD.float() * (g_BLD.float() / rule.loss_scale)
    eta_BL = xg_BLD.sum(-1) * (-1.0 if rule.strict else 1.0)
    mean_B1, sigma_B1 = _mean_sigma(eta_BL, visual_BL)
    z_BL = ((eta_BL - mean_B1) / sigma_B1.clamp_min(rule.sigma_floor)).clamp(-rule.z_clip, rule.z_clip)
    direction_BL = -0.5 * torch.tanh(z_BL)
    if not rule.strict:
        direction_BL = direction_BL - _mean_sigma(direction_BL, visual_BL)[0]
    size_BL = xg_BLD.abs().sum(-1)
    scale_BL = size_BL / _mean_sigma(size_BL, visual_BL)[0].clamp_min(rule.scale_floor)
    scale_BL = scale_BL.clamp(rule.scale_min, rule.scale_max)
    slope_BL = (p_BL * (1 - p_BL)).clamp_min(rule.saturation_floor)
    return (rule.loss_scale * rule.beta * direction_BL * scale_BL * slope_BL).masked_fill(~visual_BL, 0.0)


def _mean_sigma(x_BL: Tensor, visual_BL: Tensor) -> tuple[Tensor, Tensor]:
    count_B1 = visual_BL.sum(1, keepdim=True).clamp_min(1)
    mean_B1 = (x_BL * visual_BL).sum(1, keepdim=True) / count_B1
    variance_B1 = ((x_BL - mean_B1).square() * visual_BL).sum(1, keepdim=True) / count_B1
    return mean_B1, variance_B1.sqrt()


class _Prune(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_BLD: Tensor,
        p_BL: Tensor,
        visual_BL: Tensor,
        index_BM: Tensor,
        present_BM: Tensor,
        rule: SurrogateRule,
    ) -> Tensor:
        ctx.save_for_backward(h_BLD, p_BL, visual_BL, index_BM, present_BM)
        ctx.rule = rule
        return Gather(index_BM, present_BM)(h_BLD) * present_BM[..., None]

    @staticmethod
    def backward(ctx: Any, g_BMD: Tensor) -> tuple[Tensor | None, ...]:
        h_BLD, p_BL, visual_BL, index_BM, present_BM = ctx.saved_tensors
        index_BMD = index_BM[..., None].expand_as(g_BMD)
        grad_h_BLD = torch.zeros_like(h_BLD).scatter_add(1, index_BMD, g_BMD * present_BM[..., None])
        grad_p_BL = None
        if ctx.needs_input_grad[1]:
            grad_p_BL = surrogate_gradient(h_BLD, grad_h_BLD, p_BL, visual_BL, ctx.rule)
        return grad_h_BLD, grad_p_BL, None, None, None, None
