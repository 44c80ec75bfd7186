"""What is learned of an answer: to give it, to be unsure, or not to give it; and how much of a volume may be kept.

Legend: B rows, L tokens of a padded row, N answer tokens, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from photon_train.configuration_photon import IGNORED


def next_labels(labels_BL: Tensor, mask_BL: Tensor | None) -> Tensor:
    """Return what each position should predict, int64[B, L]: the next token's label; IGNORED at padding."""
    mask_BL = torch.ones_like(labels_BL) if mask_BL is None else mask_BL
    next_BL = F.pad(labels_BL[:, 1:], (0, 1), value=IGNORED)
    is_followed_BL = F.pad(mask_BL[:, 1:], (0, 1)).bool()
    return next_BL.masked_fill(~(mask_BL.bool() & is_followed_BL), IGNORED)


def answer_shares(labels_BL: Tensor, mask_BL: Tensor | None) -> Tensor:
    """Return float32[B]: the share that each row has of the batch's answer tokens, and so of its losses."""
    count_B = (next_labels(labels_BL, mask_BL) != IGNORED).sum(1)
    return count_B / count_B.sum().clamp_min(1)


class AnswerLosses(NamedTuple):
    """Means over all answer tokens of the batch, by what their row is trained for; the sum is the batch's loss."""

    ce: Tensor
    robustness: Tensor
    flip: Tensor


def answer_losses(
    logits_NV: Tensor, labels_N: Tensor, rows_N: Tensor, perturbed_B: Tensor, flipped_B: Tensor, flip_epsilon: float
) -> AnswerLosses:
    """Return the three losses, 0-d float32, 0 (with a gradient of 0) for what no token is trained for.

    Perturbed rows are trained to be unsure (robustness: minus the entropy of p), flipped ones not to answer (flip:
    -log(1 - p(y) + flip_epsilon)), the others to answer (ce: -log p(y)).
    """
    perturbed_N, flipped_N = perturbed_B[rows_N], flipped_B[rows_N]
    count = max(len(labels_N), 1)
    logp_NV = F.log_softmax(logits_NV.float(), dim=-1)
    logp_N = logp_NV.gather(1, labels_N[:, None]).squeeze(1)
    answered_N = ~(perturbed_N | flipped_N)
    ce = -(logp_N * answered_N).sum() / count
    robustness = (logp_NV.exp() * logp_NV).sum(-1).mul(perturbed_N).sum() / count
    not_y_N = torch.log(1 - logp_N.exp() + flip_epsilon)
    flip = -torch.where(flipped_N & ~perturbed_N, not_y_N, 0.0).sum() / count
    return AnswerLosses(ce, robustness, flip)


def band_losses(p_BL: Tensor, visual_BL: Tensor, low: float, high: float) -> Tensor:
    """Return float32[B]: relu(r - high) + relu(low - r), r the mean p of a row's visual tokens."""
    r_B = (p_BL * visual_BL).sum(1) / visual_BL.sum(1).clamp_min(1)
    return F.relu(r_B - high) + F.relu(low - r_B)
