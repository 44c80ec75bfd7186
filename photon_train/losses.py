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


def answer_shares(answers_3N: Tensor, rows: int) -> Tensor:
    """Return float32[B]: the share that each row has of the batch's answer tokens, and so of its losses."""
    share_N = torch.full(answers_3N[0].shape, 1 / max(answers_3N.shape[1], 1), device=answers_3N.device)
    return torch.zeros(rows, device=answers_3N.device).index_add_(0, answers_3N[0], share_N)


class AnswerLosses(NamedTuple):
    """Means over all answer tokens of the batch, by what their row is trained for; the sum is the batch's loss."""

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
) -> AnswerLosses:
    """Return the three losses, 0-d float32, 0 (with a gradient of 0) for what no token is trained for.

    perturbed_B: None for no row.

    Perturbed rows are trained to be unsure (robustness: minus the entropy of p), flipped ones not to answer (flip:
    -log(1 - p(y) + flip_epsilon)), the others to answer (ce: -log p(y)).
    """
    flipped_N, count = flipped_B[rows_N], max(len(labels_N), 1)
    logits_NV = logits_NV.float()
    logp_N = -F.cross_entropy(logits_NV, labels_N, reduction="none")
    perturbed_N, robustness = torch.zeros_like(flipped_N), 0 * logp_N.sum()
    if perturbed_B is not None:  # else the entropy of nothing would be computed, over the whole vocabulary
        perturbed_N, logp_NV = perturbed_B[rows_N], F.log_softmax(logits_NV, dim=-1)
        robustness = (logp_NV.exp() * logp_NV).sum(-1).mul(perturbed_N).sum() / count
    answered_N = ~(perturbed_N | flipped_N)
    ce = -(logp_N * answered_N).sum() / count
    not_y_N = torch.log(1 - logp_N.exp() + flip_epsilon)
    flip = -torch.where(flipped_N & ~perturbed_N, not_y_N, 0.0).sum() / count
    return AnswerLosses(ce, robustness, flip)


def band_losses(p_BL: Tensor, visual_BL: Tensor, low: float, high: float) -> Tensor:
    """Return float32[B]: relu(r - high) + relu(low - r), r the mean p of a row's visual tokens."""
    r_B = (p_BL * visual_BL).sum(1) / visual_BL.sum(1).clamp_min(1)
    return F.relu(r_B - high) + F.relu(low - r_B)
