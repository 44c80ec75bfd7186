"""Schedulers that ITS is compared with, written from their papers: which visual tokens of a volume stay.

Two places. After layer its (`fastv`: after a layer of its own) a scheduler is a function SchedulerContext -> Selection.
Before the decoder it is a function VolumeContext -> Choice: it sees a volume without its question, so that questions
share all that is computed of the volume, and the lower layers are saved too.

    after a layer        its, none, random, uniform, foreground, fastv (arXiv 2403.06764)
    before the decoder   visionzip (2412.04467), divprune (2503.02175), nucleus (MedPruner, 2603.11625)

A new one: a function here, in `SCHEDULERS` or `CHOOSERS`, and its name in configuration_photon.py. None of them has
weights. Kept tokens keep their positions.

Legend: B rows, L tokens of a row, V visual tokens of a volume, N those of all volumes, D features, H heads, K key
heads, G = H / K, d head_dim, P patches of all volumes, S patches of a slab.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from photon_train.configuration_photon import BEFORE_DECODER, PhotonConfig
from photon_train.scheduling import SchedulerContext, Selection, its, min_max

CHOSEN = 2  # columns behind the features of a token: its score, and 1 where it stays, else 0
DOMINANT, CONTEXTUAL = 54, 10  # of 64 tokens that VisionZip keeps: as they are, and with others added


# After a layer: SchedulerContext -> Selection.


def none(context: SchedulerContext) -> Selection:
    """Keep every visual token."""
    return _highest(torch.zeros_like(context.inputs.foreground_BL), context, keep_ratio=1.0)


def random(context: SchedulerContext) -> Selection:
    """Keep `keep_ratio` of each row, the same pseudo-random choice for every row of that many visual tokens."""
    rank_BL = context.inputs.visual_BL.cumsum(1)
    generator = torch.Generator().manual_seed(context.config.scheduler_seed)
    draw_L = torch.rand(rank_BL.shape[1] + 1, generator=generator)
    if context.config.keep_per_slab:
        draw_L[1:] = highest_of_each(draw_L[1:], slabs_of(len(draw_L) - 1, context.config))
    return _highest(draw_L.to(rank_BL.device)[rank_BL], context, context.config.keep_ratio)


def uniform(context: SchedulerContext) -> Selection:
    """Keep `keep_ratio` of each row, evenly spaced in sequence order."""
    rank_BL, keep_ratio = context.inputs.visual_BL.cumsum(1), context.config.keep_ratio
    count_B1 = rank_BL[:, -1:].clamp_min(1)
    number_B1 = _number_to_keep(count_B1, keep_ratio)
    steps_BL = (rank_BL * number_B1) // count_B1 > ((rank_BL - 1) * number_B1) // count_B1
    return _highest(steps_BL.float(), context, keep_ratio)


def foreground(context: SchedulerContext) -> Selection:
    """Keep `keep_ratio` of each row: tokens with most foreground voxels first, ties in sequence order."""
    return _highest(context.inputs.foreground_BL, context, context.config.keep_ratio)


def fastv(context: SchedulerContext) -> Selection:
    """Keep `keep_ratio` of each row: what the last token of the prompt attends to most, mean over heads of its softmax.

    One row of attention, [heads x tokens]: the layer itself keeps its fused kernel. Answers that are learned come after
    the prompt and are not looked at. The scores get no gradient.
    """
    prompt_BL = context.inputs.prompt_BL
    with torch.no_grad(), torch.autocast(prompt_BL.device.type, enabled=False):
        q_BHLd, k_BKLd = context.rotated_qk()
        last_B = prompt_BL.shape[1] - 1 - prompt_BL.flip(1).long().argmax(1)
        q_BHd = q_BHLd[torch.arange(len(last_B), device=last_B.device), :, last_B].float()
        q_BKGd = q_BHd.unflatten(1, (k_BKLd.shape[1], -1)) * q_BHd.shape[-1] ** -0.5
        logits = torch.einsum("bkgd,bkld->bkgl", q_BKGd, k_BKLd.float())
        seen = prompt_BL[:, None, None]
        score_BL = logits.masked_fill(~seen, torch.finfo(logits.dtype).min).softmax(-1).mean(dim=(1, 2))
    return _highest(score_BL, context, context.config.keep_ratio)


def _highest(score_BL: Tensor, context: SchedulerContext, keep_ratio: float) -> Selection:
    """Return the selection of the `keep_ratio` highest scores of each row, ties in sequence order. p is 1."""
    visual_BL = context.inputs.visual_BL
    number_B1 = _number_to_keep(visual_BL.sum(1, keepdim=True), keep_ratio)
    order_BL = score_BL.masked_fill(~visual_BL, -torch.inf).argsort(dim=1, descending=True, stable=True)
    keep_BL = visual_BL & (order_BL.argsort(dim=1) < number_B1)
    return selection_of(score_BL, keep_BL, visual_BL, context.config)


def selection_of(score_BL: Tensor, keep_BL: Tensor, visual_BL: Tensor, config: PhotonConfig) -> Selection:
    """Return the selection of a scheduler without a threshold: p is 1."""
    score_BL = score_BL.float().masked_fill(~visual_BL, 0.0)
    saliency_BL = min_max(score_BL, visual_BL, config.saliency_epsilon)
    threshold_B = torch.full_like(score_BL[:, 0], math.nan)
    return Selection(score_BL, saliency_BL, torch.ones_like(score_BL), keep_BL, threshold_B)


def _number_to_keep(count_B1: Tensor, keep_ratio: float) -> Tensor:
    return (count_B1 * keep_ratio).round().long().clamp_min(1)


# Before the decoder: VolumeContext -> Choice.


class VolumeContext(NamedTuple):
    """What a scheduler before the decoder decides by: one volume, in the order of its tokens."""

    tokens_VD: Tensor  # as they would go into the decoder
    received_V: Tensor | None  # float32, see `attention_received`; None where the scheduler did not ask for it
    keys_Vd: Tensor | None  # float32, likewise
    config: PhotonConfig

    @property
    def number(self) -> int:
        """How many tokens the configuration's `keep_ratio` is."""
        return max(round(len(self.tokens_VD) * self.config.keep_ratio), 1)


class Choice(NamedTuple):
    """What became of the tokens of a volume."""

    keep_V: Tensor  # bool
    score_V: Tensor  # float32, the scheduler's own ranking
    tokens_VD: Tensor  # those of the volume, or with others added to some


def visionzip(context: VolumeContext) -> Choice:
    """Keep what the patches of its slab attend to most, and in some further tokens the mean of those like them.

    Of 64 tokens 54 are dominant: those that receive most attention (`keep_per_slab`: of each slab). The other 10 are
    taken at even distances from the rest, and every token that is left is added, as a mean, to the one with the most
    similar key (cosine). Qwen2.5-VL has no class token: attention is that of all patches.
    """
    assert context.received_V is not None and context.keys_Vd is not None, "a scheduler of NEEDS_ATTENTION"
    received_V, number = context.received_V, min(context.number, len(context.received_V))
    targets = round(number * CONTEXTUAL / (DOMINANT + CONTEXTUAL))
    score_V = received_V
    if context.config.keep_per_slab:
        score_V = highest_of_each(received_V, slabs_of(len(received_V), context.config).to(received_V.device))
    keep_V = _top(score_V, number - targets)
    rest = (~keep_V).nonzero().flatten()
    if not targets:
        return Choice(keep_V, received_V, context.tokens_VD)
    is_target = torch.zeros_like(rest, dtype=torch.bool)
    is_target[torch.arange(targets, device=rest.device) * len(rest) // targets] = True
    target, other = rest[is_target], rest[~is_target]
    keys_Vd = F.normalize(context.keys_Vd, dim=-1)
    nearest = (keys_Vd[other] @ keys_Vd[target].T).argmax(1)
    sums = torch.zeros_like(context.tokens_VD[target]).index_add(0, nearest, context.tokens_VD[other])
    counts = torch.bincount(nearest, minlength=targets).clamp_min(1)
    merged_VD = context.tokens_VD.index_add(0, target, sums / counts[:, None].to(sums.dtype))
    return Choice(keep_V.index_fill(0, target, True), received_V, merged_VD)


def divprune(context: VolumeContext) -> Choice:
    """Keep tokens that are far from one another (1 - cosine): each next one has the farthest nearest kept token.

    The first is the one with the farthest nearest neighbour. Deterministic, no parameter; scores fall in the order in
    which tokens were taken.
    """
    with torch.no_grad():
        tokens_VD = F.normalize(context.tokens_VD.float(), dim=-1)
        distance_VV = 1 - tokens_VD @ tokens_VD.T
        others_VV = distance_VV.clone().fill_diagonal_(torch.inf)
        nearest_V, taken = others_VV.amin(1), list[Tensor]()
        for step in range(min(context.number, len(tokens_VD))):
            index = nearest_V.argmax()
            taken.append(index)
            nearest_V = distance_VV[index] if step == 0 else torch.minimum(nearest_V, distance_VV[index])
            nearest_V = nearest_V.index_fill(0, torch.stack(taken), -torch.inf)
        score_V = torch.zeros(len(tokens_VD), device=tokens_VD.device)
        score_V[torch.stack(taken)] = torch.arange(len(taken), 0, -1.0, device=tokens_VD.device)
    return Choice(score_V > 0, score_V, context.tokens_VD)


def nucleus(context: VolumeContext) -> Choice:
    """Keep the fewest tokens that receive `nucleus_mass` of the attention: as many as the volume needs."""
    assert context.received_V is not None, "a scheduler of NEEDS_ATTENTION"
    falling_V = context.received_V.sort(descending=True, stable=True).values.double().cumsum(0)
    number = int((falling_V < context.config.nucleus_mass * falling_V[-1]).sum()) + 1
    return Choice(_top(context.received_V, number), context.received_V, context.tokens_VD)


CHOOSERS: dict[str, Callable[[VolumeContext], Choice]] = {one.__name__: one for one in (visionzip, divprune, nucleus)}
NEEDS_ATTENTION = ("visionzip", "nucleus")
OWN_NUMBER = ("nucleus",)  # keep as many as the volume needs: the encodings of two volumes are of two lengths
BY_QK = ("its", "fastv")  # decide by queries and keys of the layer after which they drop
# What happens after layer its; tokens that are dropped before the decoder are not there any more.
SCHEDULERS: dict[str, Callable[[SchedulerContext], Selection]] = {
    **{one.__name__: one for one in (its, none, random, uniform, foreground, fastv)},
    **dict.fromkeys(BEFORE_DECODER, none),
}


def encode_and_choose(encode: Callable[[], Any], visual: Any, grid_thw: Tensor, config: PhotonConfig) -> Any:
    """Return what `encode` does, the vision tower's output, with float[V, D + CHOSEN] for each volume.

    Behind the features of a token stand its score and whether it stays: so both travel with the tokens wherever these
    are repeated or sliced, as generating does for beams. `chosen_of` takes them apart.
    """
    scheduler, received = str(config.scheduler), None
    if scheduler in NEEDS_ATTENTION:
        with attention_received(visual, grid_thw) as seen:
            output = encode()
        received = seen[0]
    else:
        output = encode()
    found, start = [], 0
    for tokens_VD in output.pooler_output:
        part = slice(start, start := start + len(tokens_VD))
        own_V, own_Vd = (None, None) if received is None else (received.received_N[part], received.keys_Nd[part])
        choice = CHOOSERS[scheduler](VolumeContext(tokens_VD, own_V, own_Vd, config))
        columns_V2 = torch.stack([choice.score_V, choice.keep_V], dim=1).to(tokens_VD)
        found.append(torch.cat([choice.tokens_VD, columns_V2], dim=1))
    output.pooler_output = found
    return output


def chosen_of(tokens_NX: Tensor, visual_BL: Tensor, width: int, config: PhotonConfig) -> tuple[Tensor, Selection]:
    """Return the tokens float[N, width], and what was chosen of them before the decoder."""
    tokens_ND, columns_N2 = tokens_NX.split([width, CHOSEN], dim=1)
    nowhere_BL = torch.zeros_like(visual_BL, dtype=columns_N2.dtype)
    score_BL, keep_BL = (nowhere_BL.masked_scatter(visual_BL, column_N) for column_N in columns_N2.detach().T)
    return tokens_ND, selection_of(score_BL, keep_BL > 0, visual_BL, config)


def _top(score_V: Tensor, number: int) -> Tensor:
    """Return bool[V], True at the `number` highest scores, ties in order: [3 1 3 2], 2 -> [1 0 1 0]."""
    order_V = score_V.argsort(descending=True, stable=True)
    return torch.zeros_like(score_V, dtype=torch.bool).index_fill(0, order_V[:number], True)


def slabs_of(tokens: int, config: PhotonConfig) -> Tensor:
    """Return int64[tokens], the z slab that each visual token of a row is in."""
    _, rows, columns = config.tokens_thw
    return torch.arange(tokens) // (rows * columns)


def highest_of_each(score_V: Tensor, slab_V: Tensor) -> Tensor:
    """Return scores by which the highest ones hold equally many of each slab: first the best of each, and so on.

    [3 1 | 2 0] in two slabs: the ranks in their slabs are [0 1 | 0 1], so that 3 and 2 come before 1 and 0.
    """
    by_score = score_V.argsort(descending=True, stable=True)
    order_V = by_score[slab_V[by_score].argsort(stable=True)]  # slab by slab, falling
    first_V = torch.searchsorted(slab_V[order_V].contiguous(), slab_V[order_V].contiguous())
    rank_V = torch.empty_like(order_V)
    rank_V[order_V] = torch.arange(len(order_V), device=order_V.device) - first_V
    place_V = by_score.argsort().double() / max(len(by_score), 1)  # of equal rank, the higher score first
    return -(rank_V + place_V).to(torch.float64)


# What the vision tower says.


class Received(NamedTuple):
    """Of the last block of the vision tower in which all patches of a slab see each other, by token in order."""

    received_N: Tensor  # float32: what a token's patches receive, mean of heads and patches; the mean over a slab is 1
    keys_Nd: Tensor  # float32: its keys before rotation, mean of heads and patches


@contextmanager
def attention_received(visual: Any, grid_thw: Tensor) -> Iterator[list[Received]]:
    """Yield a list that holds, after a forward of the vision tower in the block, what its tokens received.

    q and k are computed once more, within the block's own forward, where sharded weights are whole; nothing else of
    the tower changes, and it keeps its fused attention. No gradient.
    """
    found: list[Received] = []

    @torch.no_grad()
    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(("hidden_states",), args, strict=False)) | kwargs
        q_PHd, k_PHd, unrotated_PHd = visual.slab_qk(module, given, grid_thw)
        sizes = [rows * columns for slabs, rows, columns in grid_thw.tolist() for _ in range(slabs)]
        received_P = torch.cat(list(map(column_sums, q_PHd.split(sizes), k_PHd.split(sizes))))
        cells = visual.spatial_merge_size**2
        found.append(
            Received(*(x_P.unflatten(0, (-1, cells)).mean(1) for x_P in (received_P, unrotated_PHd.float().mean(1))))
        )

    with_all = [i for i in visual.fullatt_block_indexes if i < len(visual.blocks)]
    handle = visual.blocks[max(with_all)].attn.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


def column_sums(q_SHd: Tensor, k_SHd: Tensor) -> Tensor:
    """Return float32[S]: the column sums of softmax(q k^T / sqrt(d)), mean over heads. Their mean is 1."""
    with torch.autocast(q_SHd.device.type, enabled=False):
        q_HSd, k_HSd = q_SHd.transpose(0, 1).float(), k_SHd.transpose(0, 1).float()
        attention_HSS = (q_HSd @ k_HSd.transpose(1, 2) * q_SHd.shape[-1] ** -0.5).softmax(-1)
        return attention_HSS.sum(1).mean(0)
