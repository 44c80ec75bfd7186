"""What is learned of an answer: to give it, to be unsure, or not to give it; and how much of a volume may be kept.

Legend: B rows, L tokens of a padded row, N answer tokens, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from photon_train.configuration_photon import IGNORED


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
