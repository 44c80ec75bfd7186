"""Instruction-conditioned token scheduling (ITS), and the gather of the tokens that stay.

A scheduler is a function SchedulerContext -> Selection. Those that ITS is compared with are in pruners.py; what the
keep probability learns is in losses.py.

Legend: B rows, L tokens, M tokens after pruning, D features, H query heads, K key heads, G = H / K, Q question tokens,
d head_dim, F descriptors, P patches, X voxels of a patch. All statistics are over the visual tokens of one row, in
float32: a row never sees its batch mates.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from photon_train.configuration_photon import Phase, PhotonConfig

logger = logging.getLogger(__name__)
ROLE_LINE = 3  # tokens of `<|im_start|>`, the role, a newline


class SchedulingInputs(NamedTuple):
    """What the decoder must know to schedule a batch."""

    visual_BL: Tensor  # bool, True at visual tokens
    question_BL: Tensor  # bool, True at question tokens
    foreground_BL: Tensor  # float, share of foreground voxels of a visual token; for the foreground scheduler
    phase: Phase
    perturbed_B: Tensor  # bool, True where the volume was perturbed
    flip_B: Tensor  # bool, True where the complement is to be kept
    loss_scale_B: Tensor  # float32, what a row's own loss is multiplied by before gradients: trainer's factor and share
    prompt_BL: Tensor  # bool, True up to the answer that is learned, without padding; for fastv
    drops: bool = True  # whether tokens may be dropped: not before the hard phase, nor by `none`
    question_tokens: int | None = None  # of the longest question, where the host knows it
    chosen: Selection | None = None  # what a scheduler before the decoder has decided
    scores: list[Scores] | None = None  # of ITS, once layer its has run: computed again for gradients, it finds them

    @property
    def detached_B(self) -> Tensor:
        """bool[B], True where p gets no gradient."""
        return self.perturbed_B | self.flip_B


class Scores(NamedTuple):
    """What ITS measures of a batch, without gradients."""

    score_BL: Tensor  # float32, u
    saliency_BL: Tensor  # float32, rho in [0, 1]
    features_BF: Tensor  # float32, descriptors of both
    decided_B1: Tensor  # bool, False where all scores of a row are equal


class SchedulerContext(NamedTuple):
    """What a scheduler decides by."""

    inputs: SchedulingInputs
    rotated_qk: Callable[[], tuple[Tensor, Tensor]]  # -> q[B, H, L, d], k[B, K, L, d] of layer its
    predictor: ThresholdPredictor | None
    config: PhotonConfig


class Selection(NamedTuple):
    """What a scheduler decided about the visual tokens; at text the values are 0, 0, 1, False."""

    score_BL: Tensor  # float32, u for ITS, else the scheduler's own ranking
    saliency_BL: Tensor  # float32, rho in [0, 1]
    probability_BL: Tensor  # float32, p
    keep_BL: Tensor  # bool
    threshold_B: Tensor  # float32, theta; NaN where nothing was compared with a threshold


class Scheduled(NamedTuple):
    """What became of the rows: the scheduler's selection, and the tokens that stayed."""

    selection: Selection
    flipped_B: Tensor  # bool, True where the complement of the selection was to be kept
    keep_BL: Tensor  # bool, True for text and kept visual tokens, False for dropped ones and padding
    kept: Gather  # where each token that stayed stood, and the attention mask of the shorter rows

    def detached(self) -> Scheduled:
        """Return it without gradients: a report keeps no graph alive, and no DDP bucket waits for it."""
        return self._replace(selection=Selection(*(x.detach() for x in self.selection)))

    def followed_by(self, mask_BL: Tensor, visual_BL: Tensor) -> Scheduled:
        """Return the same of B rows that begin with the row, or rows, of this, and keep all of what follows it."""
        rows, length, kept = len(mask_BL), self.keep_BL.shape[1], self.kept.index_BM.shape[1]
        score_BL, saliency_BL, keep_BL = (
            F.pad(x_1P.expand(rows, -1), (0, mask_BL.shape[1] - length), value=value)
            for x_1P, value in ((self.selection.score_BL, 0), (self.selection.saliency_BL, 0), (self.keep_BL, True))
        )
        behind_BS = torch.arange(length, mask_BL.shape[1], device=mask_BL.device).expand(rows, -1)
        index_BM = torch.cat([self.kept.index_BM.expand(rows, -1), behind_BS], dim=1)
        place_BL = torch.cat([self.kept.place_BL.expand(rows, -1), behind_BS - length + kept], dim=1)
        selection = Selection(
            score_BL,
            saliency_BL,
            torch.ones_like(score_BL),
            keep_BL & visual_BL,
            torch.full_like(score_BL[:, 0], math.nan),
        )
        gather = Gather(index_BM, mask_BL.gather(1, index_BM), place_BL)
        return Scheduled(selection, self.flipped_B.expand(rows), keep_BL & mask_BL, gather)


class Gather(NamedTuple):
    """The chosen positions of every row, in order, against the right edge or, where no cache goes on, the left one.

    [1 1 0 1], [0 1 0 0] on [a b c d] -> [a b d], [- - b] or [a b d], [b - -]
    """

    index_BM: Tensor  # int64, position in the row before (any position in an empty slot)
    mask_BM: Tensor  # bool, attention mask of the new rows: False at the empty slots of shorter rows
    place_BL: Tensor  # int64, where in the new row each token stands; of one that is not in it, the last one before it
    tokens: int | None = None  # how many there are in all rows, where the host knows it

    def __call__(self, x_BL: Tensor, dim: int = 1) -> Tensor:
        """Return `x_BL[b, index_BM[b]]` along `dim`; dimension 0 of x is the row. Empty slots hold any value."""
        shape = [1] * x_BL.ndim
        shape[0], shape[dim] = self.index_BM.shape
        index = self.index_BM.view(shape).expand(*(n if d != dim else -1 for d, n in enumerate(x_BL.shape)))
        return x_BL.gather(dim, index)


def gather_of(mask_BL: Tensor, longest: int | None = None, *, to_left: bool = False) -> Gather:
    """Return the gather that packs the True positions of each row together, against the right edge or the left one.

    longest: how many the longest row has. Where the host does not know it, it waits for the device.
    """
    rank_BL, tokens = mask_BL.cumsum(1), None
    count_B1 = rank_BL[:, -1:]
    if longest is None:
        longest, tokens = torch.stack([count_B1.max(), count_B1.sum()]).tolist()
    order_BL = mask_BL.to(torch.uint8).argsort(dim=1, stable=True, descending=to_left)
    index_BM = order_BL[:, :longest] if to_left else order_BL[:, mask_BL.shape[1] - longest :]
    place_BL = rank_BL - 1 if to_left else longest - 1 - (count_B1 - rank_BL)
    return Gather(index_BM, mask_BL.gather(1, index_BM), place_BL, tokens)


def everything(mask_BL: Tensor) -> Gather:
    """Return the gather that leaves all tokens, and the empty slots between them, where they are."""
    place_BL = torch.arange(mask_BL.shape[1], device=mask_BL.device).expand_as(mask_BL)
    return Gather(place_BL, mask_BL, place_BL)


def is_passive(config: PhotonConfig, phase: Phase) -> bool:
    """Tell whether all tokens pass layer its as they are: then questions share a prefix through all layers."""
    return config.scheduler == "none" or phase is Phase.DENSE


def visual_mask(input_ids_BL: Tensor, config: PhotonConfig) -> Tensor:
    """Return bool[B, L], True at the tokens that stand for a part of a volume."""
    return input_ids_BL == config.video_token_id


def prefix_length(ids_L: Tensor, config: PhotonConfig) -> int:
    """Return how many tokens there are to the end of the last volume, which rows may share; 0 for text alone."""
    ends = (ids_L == config.vision_end_token_id).nonzero()
    return int(ends[-1]) + 1 if len(ends) else 0


def question_mask(input_ids_BL: Tensor, config: PhotonConfig) -> Tensor:
    """Return bool[B, L], True at the text of a user turn that holds a volume, wherever in the turn it stands.

    The first volume and its two markers are not part of the question. Of further volumes, only the patches are not:
    the published weights were trained so. A turn without end marker runs to the end of the row.
    """
    starts_turn_BL = input_ids_BL == config.im_start_token_id
    turn_BL = starts_turn_BL.cumsum(1)

    def so_far_in_turn(flag_BL: Tensor) -> Tensor:
        count_BL = flag_BL.cumsum(1)
        before_turn_BL = torch.where(starts_turn_BL, count_BL - flag_BL.long(), 0).cummax(1).values
        return count_BL - before_turn_BL

    visual_BL, turn_index_BL = visual_mask(input_ids_BL, config), turn_BL.clamp_max(turn_BL.shape[1] - 1)
    visual_in_turn = torch.zeros_like(turn_BL).scatter_add(1, turn_index_BL, visual_BL.long())
    has_volume_BL = visual_in_turn.gather(1, turn_index_BL) > 0
    in_role_line_BL = so_far_in_turn(torch.ones_like(starts_turn_BL)) <= ROLE_LINE
    ended_BL = so_far_in_turn(input_ids_BL == config.im_end_token_id) > 0
    volume_ends_BL = input_ids_BL == config.vision_end_token_id
    begun_BL = so_far_in_turn(input_ids_BL == config.vision_start_token_id)
    closed_before_BL = so_far_in_turn(volume_ends_BL) - volume_ends_BL.long()
    in_first_volume_BL = (begun_BL >= 1) & (closed_before_BL == 0)
    outside_BL = in_role_line_BL | ended_BL | in_first_volume_BL | visual_BL | (turn_BL == 0)
    return has_volume_BL & ~outside_BL


def scheduling_inputs(
    config: PhotonConfig,
    phase: Phase,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    question_BL: Tensor | None = None,
    perturbed_B: Tensor | None = None,
    flip_B: Tensor | None = None,
) -> SchedulingInputs:
    """Return what is known of each row before the decoder runs; `foreground_BL` is left 0."""
    if isinstance(attention_mask, dict):  # generate makes these for caches of fixed length
        raise ValueError(
            "expected a DynamicCache, found one of fixed length; unset cache_implementation or use scheduler='none'"
        )
    no_B = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    perturbed_B = no_B if perturbed_B is None else perturbed_B.bool().to(no_B.device)
    if flip_B is None:
        flip_B = torch.rand(len(no_B)) < config.flip_probability if phase is Phase.FLIP else no_B
    question_BL = question_mask(input_ids, config) if question_BL is None else question_BL.bool()
    visual_BL = visual_mask(input_ids, config)
    return SchedulingInputs(
        visual_BL=visual_BL,
        question_BL=question_BL if attention_mask is None else question_BL & attention_mask.bool(),
        foreground_BL=torch.zeros(input_ids.shape, device=input_ids.device),
        phase=phase,
        perturbed_B=perturbed_B,
        flip_B=flip_B.to(no_B.device) & ~perturbed_B,
        loss_scale_B=torch.ones(len(input_ids), device=input_ids.device),
        drops=not is_passive(config, phase) and phase is not Phase.SOFT,
        prompt_BL=torch.ones_like(visual_BL) if attention_mask is None else attention_mask.bool(),
        scores=[],
    )


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32, whatever the dtype of its weights or autocast."""

    def forward(self, input: Tensor) -> Tensor:
        """Return float32."""
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input.float(), self.weight.float(), self.bias.float())


class ThresholdHead(Float32Linear):
    """The last layer of the predictor: it starts at `initial_threshold` whatever the scores are."""

    def __init__(self, width: int, config: PhotonConfig) -> None:
        super().__init__(width, 1)
        share = config.initial_threshold / config.threshold_max
        self.initial_bias = math.log(share / (1.0 - share))

    def initialise(self) -> None:
        """Set the weight to zero and the bias so that the sigmoid gives the threshold."""
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, self.initial_bias)


class ThresholdPredictor(nn.Module):
    """theta from twelve descriptors of a row's scores. Names as published; `pos_proj` is stored and never used."""

    def __init__(self, config: PhotonConfig) -> None:
        super().__init__()
        hidden = config.text_config.hidden_size
        width = config.predictor_width or hidden // 8
        self.threshold_max = config.threshold_max
        mlp = nn.Sequential(Float32Linear(12, width), nn.GELU(), ThresholdHead(width, config))
        self.predictor = nn.ModuleDict({"mlp": mlp})
        self.pos_proj = nn.Linear(1, hidden, bias=False).requires_grad_(False)

    def forward(self, features_BF: Tensor) -> Tensor:
        """Return theta float32[B] from float32[B, 12]."""
        return self.threshold_max * torch.sigmoid(self.predictor["mlp"](features_BF).squeeze(-1))


def its(context: SchedulerContext) -> Selection:
    """Keep what the question attends to: u -> rho -> p = sigmoid((rho - theta) / 0.2) -> keep iff p > 0.5.

    Where a question has no or one token, all scores are equal. Such a row has no threshold and keeps all tokens.
    """
    visual_BL, config = context.inputs.visual_BL, context.config
    assert context.predictor is not None, "the configuration allows 'its' with a predictor only"
    known = [] if context.inputs.scores is None else context.inputs.scores
    if not known:
        known.append(_scores(context))
    score_BL, saliency_BL, features_BF, decided_B1 = known[0]
    threshold_B = context.predictor(features_BF)
    p_BL = torch.sigmoid((saliency_BL - threshold_B[:, None]) / config.keep_temperature)
    p_BL = torch.where(visual_BL & decided_B1, p_BL, 1.0)
    keep_BL = visual_BL & ((p_BL > config.keep_probability) | ~decided_B1)
    return Selection(score_BL, saliency_BL, p_BL, keep_BL, torch.where(decided_B1[:, 0], threshold_B, math.nan))


def _scores(context: SchedulerContext) -> Scores:
    inputs, config, visual_BL = context.inputs, context.config, context.inputs.visual_BL
    # Autocast would round products of float32 to bfloat16.
    with torch.no_grad(), torch.autocast(visual_BL.device.type, enabled=False):
        q_BHLd, k_BKLd = context.rotated_qk()
        longest, floor = inputs.question_tokens, config.centrality_floor
        score_BL = instruction_scores(q_BHLd, k_BKLd, inputs.question_BL, visual_BL, floor, longest)
        saliency_BL = min_max(score_BL, visual_BL, config.saliency_epsilon)
        low_B1, high_B1 = _extremes(score_BL, visual_BL)
        decided_B1 = high_B1 - low_B1 > config.saliency_epsilon
        return Scores(score_BL, saliency_BL, descriptors(score_BL, saliency_BL, visual_BL), decided_B1)


def foreground_share(visual_BL: Tensor, patches_PX: Tensor | None, config: PhotonConfig) -> Tensor:
    """Return float32[B, L]: the share of a visual token's voxels that are foreground, 0 at text."""
    share_BL = torch.zeros(visual_BL.shape, device=visual_BL.device)
    if patches_PX is None:
        raise ValueError("foreground: expected pixel_values_videos, found encoded volumes; pass their patches too")
    patches_per_token = config.vision_config.spatial_merge_size**2
    share_P = (patches_PX > config.foreground_level).float().mean(1)
    return share_BL.masked_scatter(visual_BL, share_P.unflatten(0, (-1, patches_per_token)).mean(1))


def warn_of_undecided(selection: Selection, visual_BL: Tensor) -> None:
    """Log the rows whose scores are all equal. One host sync."""
    if rows := (visual_BL.any(1) & selection.threshold_B.isnan()).nonzero().flatten().tolist():
        logger.warning("rows %s: all kept, no visual token stands out for their question (none, or one token)", rows)


# Scores of ITS.


def instruction_scores(
    q_BHLd: Tensor,
    k_BKLd: Tensor,
    question_BL: Tensor,
    visual_BL: Tensor,
    centrality_floor: float,
    longest: int | None = None,
) -> Tensor:
    """Return u float32[B, L], 0 off the visual tokens: how well each one is aligned with the question.

    q and k are those of layer its, rotated. A question token weighs as much as its centrality, which is how much the
    others attend to it: w_t = c_t / max(sum c, floor), c_t = mean over heads of sum over t' != t of
    relu(q_t . k_t' / sqrt(d)).
    """
    question = gather_of(question_BL, longest)
    q_BHQd, k_BKQd, mask_BQ = question(q_BHLd, dim=2), question(k_BKLd, dim=2), question.mask_BM.float()
    others_QQ = 1 - torch.eye(mask_BQ.shape[1], device=mask_BQ.device)
    pairs_BQQ = mask_BQ[:, :, None] * mask_BQ[:, None, :] * others_QQ
    q_BKGQd = q_BHQd.float().unflatten(1, (k_BKQd.shape[1], -1))
    product = torch.einsum("bkgqd,bktd->bkgqt", q_BKGQd, k_BKQd.float()).mul(q_BHQd.shape[-1] ** -0.5)
    c_BQ = (product.relu().mean(dim=(1, 2)) * pairs_BQQ).sum(-1)
    w_BQ = c_BQ / c_BQ.sum(-1, keepdim=True).clamp_min(centrality_floor)
    return alignment(q_BHQd, k_BKLd, w_BQ, visual_BL)


def alignment(q_BHQd: Tensor, k_BKLd: Tensor, w_BQ: Tensor, visual_BL: Tensor) -> Tensor:
    """Return u float32[B, L], 0 off the visual tokens: mean over heads of the sum over t of w_t q_t . k_j / sqrt(d).

    No softmax, no causal mask. The result is rounded to q's dtype, as the published weights were trained.
    """
    q_BKGQd = q_BHQd.float().unflatten(1, (k_BKLd.shape[1], -1))
    weighted_BKGd = torch.einsum("bq,bkgqd->bkgd", w_BQ, q_BKGQd)
    per_head = torch.einsum("bkgd,bkld->bkgl", weighted_BKGd, k_BKLd.float()).mul(q_BHQd.shape[-1] ** -0.5)
    score_BL = per_head.mean(dim=(1, 2)).to(q_BHQd.dtype).float()
    return score_BL.masked_fill(~visual_BL, 0.0)


def min_max(score_BL: Tensor, visual_BL: Tensor, epsilon: float) -> Tensor:
    """Return rho in [0, 1]: the scores of each row's visual tokens, min-max scaled; 0 elsewhere."""
    low_B1, high_B1 = _extremes(score_BL, visual_BL)
    return ((score_BL - low_B1) / (high_B1 - low_B1 + epsilon)).masked_fill(~visual_BL, 0.0)


def descriptors(score_BL: Tensor, saliency_BL: Tensor, visual_BL: Tensor) -> Tensor:
    """Return float32[B, 12]; 0 for rows without visual tokens.

    rho: mean, biased std, min, max, lower quartile, median; u: mean, std, min, max; sign(u) log1p|u|: mean, max.
    """
    log_BL = score_BL.sign() * score_BL.abs().log1p()
    x_3BL = torch.stack([saliency_BL, score_BL, log_BL])
    (mean, std), (low, high) = mean_std(x_3BL, visual_BL), _extremes(x_3BL, visual_BL)
    columns = [mean[0], std[0], low[0], high[0], *_quantiles(saliency_BL, visual_BL, 0.25, 0.5)]
    columns += [mean[1], std[1], low[1], high[1], mean[2], high[2]]
    return torch.cat(columns, dim=1).masked_fill(~visual_BL.any(1, keepdim=True), 0.0)


def mean_std(x_BL: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased standard deviation [..., B, 1] of the masked x[..., B, L]; 0 where a row has none."""
    count_B1 = mask_BL.sum(-1, keepdim=True).clamp_min(1)
    mean_B1 = (x_BL * mask_BL).sum(-1, keepdim=True) / count_B1
    variance_B1 = ((x_BL - mean_B1).square() * mask_BL).sum(-1, keepdim=True) / count_B1
    return mean_B1, variance_B1.sqrt()


def _extremes(x_BL: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Return least and largest [..., B, 1] of the same; 0 where a row has none."""
    hidden_BL = ~mask_BL
    empty_B1 = hidden_BL.all(-1, keepdim=True)
    low_B1 = x_BL.masked_fill(hidden_BL, torch.inf).amin(-1, keepdim=True)
    high_B1 = x_BL.masked_fill(hidden_BL, -torch.inf).amax(-1, keepdim=True)
    return low_B1.masked_fill(empty_B1, 0.0), high_B1.masked_fill(empty_B1, 0.0)


def _quantiles(x_BL: Tensor, mask_BL: Tensor, *shares: float) -> list[Tensor]:
    """Return the linearly interpolated quantiles [B, 1], as torch.quantile, of the masked entries of each row."""
    sorted_BL = x_BL.masked_fill(~mask_BL, torch.inf).sort(1).values
    last_B1 = (mask_BL.sum(1, keepdim=True) - 1).clamp_min(0).float()
    ranks = [share * last_B1 for share in shares]
    below = [sorted_BL.gather(1, rank_B1.floor().long()) for rank_B1 in ranks]
    above = [sorted_BL.gather(1, rank_B1.ceil().long()) for rank_B1 in ranks]
    return [torch.lerp(low, high, rank_B1.frac()) for low, high, rank_B1 in zip(below, above, ranks, strict=True)]
