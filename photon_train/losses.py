"""What stage 2 is trained for: the phases of a run, its losses, and the perturbations of volumes.

The phase follows from the optimizer step, which the trainer restores on resume.

Legend: B rows, L tokens, N answer tokens of the batch, V vocabulary, P patch rows, X voxels of a patch.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from photon_train.configuration_photon import PhotonConfig

IGNORED = -100  # the label of what is not to be learned


class Phase(Enum):
    """What happens to visual tokens after layer its. Evaluation is always HARD."""

    DENSE = "dense"  # nothing is weighted or dropped
    SOFT = "soft"  # hidden states are multiplied by p, nothing is dropped
    HARD = "hard"  # dropped for good, with surrogate gradients
    FLIP = "flip"  # as HARD, and some rows keep the complement


def phase_at(config: PhotonConfig, step: int, total_steps: int | None = None) -> Phase:
    """Return the phase of optimizer step `step`, from 0. Raises ValueError where fractions lack `total_steps`."""
    starts = {Phase.FLIP: config.flip_start, Phase.HARD: config.hard_start, Phase.SOFT: config.soft_start}
    for phase, start in starts.items():
        if isinstance(start, float):
            if total_steps is None:
                raise ValueError(f"expected total_steps, found None: a phase starts at the fraction {start}; pass it")
            start *= total_steps
        if step >= start:
            return phase
    return Phase.DENSE


def next_labels(labels_BL: Tensor, mask_BL: Tensor) -> Tensor:
    """Return what each position should predict, int64[B, L]: the next token's label; IGNORED at padding."""
    next_BL = F.pad(labels_BL[:, 1:], (0, 1), value=IGNORED)
    is_followed_BL = F.pad(mask_BL[:, 1:], (0, 1)).bool()
    return next_BL.masked_fill(~(mask_BL.bool() & is_followed_BL), IGNORED)


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


class Perturbation(Enum):
    """What is done to a volume's patch rows."""

    SHUFFLE_PATCHES = "rows in another order"
    SHUFFLE_VOXELS = "rows in another order, and the voxels in each row"
    KEEP_PATCHES = "some of the rows stay, the others are 0"
    KEEP_VOXELS = "some of the voxel positions stay, the others are 0"
    NOISE = "uniform noise"
    ZEROS = "zeros"


def draw_perturbation(config: PhotonConfig, generator: torch.Generator) -> Perturbation:
    """Return one perturbation, drawn by the configuration's chances."""
    chances = config.perturbation_chances
    index = torch.multinomial(torch.tensor(list(chances.values())), 1, generator=generator)
    return Perturbation[list(chances)[int(index)].upper()]


def perturb(patches_PX: Tensor, how: Perturbation, config: PhotonConfig, generator: torch.Generator) -> Tensor:
    """Return a new float[P, X], the patch rows of one volume, perturbed. Draws from the (CPU) generator only."""

    def permuted(n: int) -> Tensor:
        return torch.randperm(n, generator=generator).to(patches_PX.device)

    rows, voxels = patches_PX.shape
    match how:
        case Perturbation.SHUFFLE_PATCHES:
            return patches_PX[permuted(rows)]
        case Perturbation.SHUFFLE_VOXELS:
            order_PX = torch.rand(rows, voxels, generator=generator).argsort(1).to(patches_PX.device)
            return patches_PX[permuted(rows)].gather(1, order_PX)
        case Perturbation.KEEP_PATCHES:
            kept = permuted(rows)[: round(config.perturb_kept_patches * rows)]
            return torch.zeros_like(patches_PX).index_copy(0, kept, patches_PX[kept])
        case Perturbation.KEEP_VOXELS:
            kept = permuted(voxels)[: round(config.perturb_kept_voxels * voxels)]
            return torch.zeros_like(patches_PX).index_copy(1, kept, patches_PX[:, kept])
        case Perturbation.NOISE:
            return torch.rand(rows, voxels, generator=generator).to(patches_PX)
        case Perturbation.ZEROS:
            return torch.zeros_like(patches_PX)
