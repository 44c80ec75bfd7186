"""What is learned of an answer: to give it, to be unsure, or not to give it; and how much of a volume may be kept.

The last is learned from a loss of its own, and through the tokens that were kept: by a surrogate gradient (SGP) of the
keep probability.

Legend: B rows, L tokens of a padded row, M tokens after pruning, D features, N answer tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from photon_train.configuration_photon import IGNORED, PhotonConfig
from photon_train.scheduling import Gather, mean_std


def answers_of(labels_BL: Tensor, mask_BL: Tensor | None = None) -> Tensor:
    """Return int64[3, N] of each answer token: its row, the column of the token before it, which predicts it, itself.

    The token before is the last one that is no padding. The host waits for the device: best made on the CPU.
    """
    present_BL = torch.ones_like(labels_BL).bool() if mask_BL is None else mask_BL.bool()
    column_BL = torch.arange(labels_BL.shape[1], device=labels_BL.device).expand_as(labels_BL)
    last_BL = torch.where(present_BL, column_BL, -1).cummax(1).values
    before_BL = F.pad(last_BL[:, :-1], (1, 0), value=-1)
    rows_N, columns_N = ((labels_BL != IGNORED) & present_BL & (before_BL >= 0)).nonzero(as_tuple=True)
    return torch.stack([rows_N, before_BL[rows_N, columns_N], labels_BL[rows_N, columns_N]])


def answer_shares(answers_3N: Tensor, rows: int, weights_B: Tensor | None = None) -> Tensor:
    """Return float32[B]: the share that each row has of the batch's answer tokens, and so of its losses.

    weights_B: what each answer token of a row counts; default, the same for all.
    """
    if weights_B is None:
        share_N = torch.full(answers_3N[0].shape, 1 / max(answers_3N.shape[1], 1), device=answers_3N.device)
    else:
        share_N = weights_B.index_select(0, answers_3N[0])
    return torch.zeros(rows, device=answers_3N.device).index_add_(0, answers_3N[0], share_N)


class AnswerLosses(NamedTuple):
    """Means over all answer tokens of the batch, by what their row is trained for; the sum is the batch's loss.

    Where answer tokens have weights, the sums of what these make of them.
    """

    ce: Tensor
    robustness: Tensor
    flip: Tensor


def answer_losses(
    logits_NV: Tensor,
    labels_N: Tensor,
    rows_N: Tensor,
    perturbed_B: Tensor | None,
    flipped_B: Tensor,
    flip_epsilon: float,
    weights_B: Tensor | None = None,
) -> AnswerLosses:
    """Return the three losses, 0-d float32, 0 (with a gradient of 0) for what no token is trained for.

    perturbed_B: None for no row. weights_B: what each answer token of a row counts; default, one over their number.

    Perturbed rows are trained to be unsure (robustness: minus the entropy of p), flipped ones not to answer (flip:
    -log(1 - p(y) + flip_epsilon)), the others to answer (ce: -log p(y)).
    """

    def total(loss_N: Tensor) -> Tensor:
        if weights_B is None:
            return loss_N.sum() / max(len(labels_N), 1)
        return (loss_N * weights_B.index_select(0, rows_N)).sum()

    flipped_N = flipped_B[rows_N]
    logits_NV = logits_NV.float()
    logp_N = -F.cross_entropy(logits_NV, labels_N, reduction="none")
    perturbed_N, robustness = torch.zeros_like(flipped_N), 0 * logp_N.sum()
    if perturbed_B is not None:  # else the entropy of nothing would be computed, over the whole vocabulary
        perturbed_N, logp_NV = perturbed_B[rows_N], F.log_softmax(logits_NV, dim=-1)
        robustness = total((logp_NV.exp() * logp_NV).sum(-1).mul(perturbed_N))
    answered_N = ~(perturbed_N | flipped_N)
    ce = -total(logp_N * answered_N)
    not_y_N = torch.log(1 - logp_N.exp() + flip_epsilon)
    flip = -total(torch.where(flipped_N & ~perturbed_N, not_y_N, 0.0))
    return AnswerLosses(ce, robustness, flip)


def band_losses(p_BL: Tensor, visual_BL: Tensor, low: float, high: float) -> Tensor:
    """Return float32[B]: relu(r - high) + relu(low - r), r the mean p of a row's visual tokens."""
    r_B = (p_BL * visual_BL).sum(1) / visual_BL.sum(1).clamp_min(1)
    return F.relu(r_B - high) + F.relu(low - r_B)


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
