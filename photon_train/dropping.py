"""Dropping tokens for good: the gather of those that stay, and the surrogate gradient (SGP) of the keep probability.

Legend: B rows, L tokens, M tokens after pruning, D features. Statistics are over the visual tokens of one row, in
float32: a row never sees its batch mates.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from photon_train.configuration_photon import PhotonConfig


class Gather(NamedTuple):
    """The chosen positions of every row, in order, against the right edge.

    [1 1 0 1], [0 1 0 0] on [a b c d] -> [a b d], [- - b]
    """

    index_BM: Tensor  # int64, position in the row before (any position in an empty slot)
    mask_BM: Tensor  # bool, attention mask of the new rows: False at the empty slots, on the left of shorter rows
    place_BL: Tensor  # int64, where in the new row each token stands; of one that is not in it, the last one before it

    def __call__(self, x_BL: Tensor, dim: int = 1) -> Tensor:
        """Return `x_BL[b, index_BM[b]]` along `dim`; dimension 0 of x is the row. Empty slots hold any value."""
        shape = [1] * x_BL.ndim
        shape[0], shape[dim] = self.index_BM.shape
        index = self.index_BM.view(shape).expand(*(n if d != dim else -1 for d, n in enumerate(x_BL.shape)))
        return x_BL.gather(dim, index)


def gather_of(mask_BL: Tensor, longest: int | None = None) -> Gather:
    """Return the gather that packs the True positions of each row together.

    longest: how many the longest row has. Where the host does not know it, it waits for the device.
    """
    rank_BL = mask_BL.cumsum(1)
    count_B1 = rank_BL[:, -1:]
    longest = int(count_B1.max()) if longest is None else longest
    order_BL = mask_BL.to(torch.uint8).argsort(dim=1, stable=True)
    index_BM = order_BL[:, mask_BL.shape[1] - longest :]
    return Gather(index_BM, mask_BL.gather(1, index_BM), longest - 1 - (count_B1 - rank_BL))


def everything(mask_BL: Tensor) -> Gather:
    """Return the gather that leaves all tokens, and the empty slots between them, where they are."""
    place_BL = torch.arange(mask_BL.shape[1], device=mask_BL.device).expand_as(mask_BL)
    return Gather(place_BL, mask_BL, place_BL)


def prune(
    h_BLD: Tensor, p_BL: Tensor, visual_BL: Tensor, kept: Gather, config: PhotonConfig, loss_scale_B: Tensor
) -> Tensor:
    """Return h_BMD, the kept tokens of h_BLD; empty slots are 0.

    Backwards, h gets the upstream gradient at kept positions and 0 at dropped ones; p gets `surrogate_gradient`.
    """
    return _Prune.apply(h_BLD, p_BL, visual_BL, kept.index_BM, kept.mask_BM, loss_scale_B, config)


class _Prune(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_BLD: Tensor, p_BL: Tensor, visual_BL: Tensor, *how: Any) -> Tensor:
        index_BM, mask_BM, loss_scale_B, ctx.config = how
        ctx.save_for_backward(h_BLD, p_BL, visual_BL, index_BM, mask_BM, loss_scale_B)
        kept_BMD = h_BLD.gather(1, index_BM[..., None].expand(-1, -1, h_BLD.shape[-1]))
        return kept_BMD * mask_BM[..., None]

    @staticmethod
    def backward(ctx: Any, g_BMD: Tensor) -> tuple[Tensor | None, ...]:
        h_BLD, p_BL, visual_BL, index_BM, mask_BM, loss_scale_B = ctx.saved_tensors
        index_BMD = index_BM[..., None].expand_as(g_BMD)
        grad_h_BLD = torch.zeros_like(h_BLD).scatter_add(1, index_BMD, g_BMD * mask_BM[..., None])
        grad_p_BL = None
        if ctx.needs_input_grad[1]:
            grad_p_BL = surrogate_gradient(h_BLD, grad_h_BLD, p_BL, visual_BL, ctx.config, loss_scale_B)
        return grad_h_BLD, grad_p_BL, None, None, None, None, None


def surrogate_gradient(
    x_BLD: Tensor, g_BLD: Tensor, p_BL: Tensor, visual_BL: Tensor, config: PhotonConfig, loss_scale_B: Tensor
) -> Tensor:
    """Return the gradient float32[B, L] for p, 0 off the visual tokens (the paper's SGP).

    g_BLD is the upstream gradient, 0 at dropped tokens. z is eta = <x, g>, standardised and clipped.
    Direction d = 0.5 - r, r = 0.5 + 0.5 tanh(z). Magnitude s = sum |x g| over its mean, clipped.
    Gradient = beta d s max(p (1 - p), floor).

    Mean and sigma are those of the row. Above sigma's floor the gradient does not depend on the size of the loss, and
    at the floor it does: so `loss_scale_B`, by which the row's own loss was multiplied, is taken out of g and put back
    at the end. Then K copies of a row together move p as far as the row alone. 0: the row has no loss.
    """
    scale_B1 = loss_scale_B[:, None]
    g_BLD = g_BLD.float() / torch.where(scale_B1 == 0, 1.0, scale_B1)[..., None]
    xg_BLD = x_BLD.float() * g_BLD
    eta_BL = xg_BLD.sum(-1) * (-1.0 if config.sgp_strict else 1.0)
    mean_B1, sigma_B1 = mean_std(eta_BL, visual_BL)
    z_BL = (eta_BL - mean_B1) / sigma_B1.clamp_min(config.sgp_sigma_floor)
    z_BL = z_BL.clamp(-config.sgp_z_clip, config.sgp_z_clip)
    direction_BL = -0.5 * torch.tanh(z_BL)
    if not config.sgp_strict:
        direction_BL = direction_BL - mean_std(direction_BL, visual_BL)[0]
    size_BL = xg_BLD.abs().sum(-1)
    scale_BL = size_BL / mean_std(size_BL, visual_BL)[0].clamp_min(config.sgp_scale_floor)
    scale_BL = scale_BL.clamp(config.sgp_scale_min, config.sgp_scale_max)
    slope_BL = (p_BL * (1 - p_BL)).clamp_min(config.sgp_saturation_floor)
    return (scale_B1 * config.sgp_beta * direction_BL * scale_BL * slope_BL).masked_fill(~visual_BL, 0.0)


def mean_std(x_BL: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased standard deviation [B, 1] of the masked entries of each row; 0 where there are none."""
    count_B1 = mask_BL.sum(1, keepdim=True).clamp_min(1)
    mean_B1 = (x_BL * mask_BL).sum(1, keepdim=True) / count_B1
    variance_B1 = ((x_BL - mean_B1).square() * mask_BL).sum(1, keepdim=True) / count_B1
    return mean_B1, variance_B1.sqrt()
