"""Grounding: masks of training volumes teach the scores of layer its to point at what a question asks about.

A model that starts from nothing has no reason to score the liver's tokens high when asked about the liver. One that
starts from Qwen2.5-VL was shown where things are. Not part of the published recipe.

The model knows nothing of this: a hook on its scheduling layer records queries and keys, and the loss is added to the
model's.

Legend: B rows, L tokens, V visual tokens of a volume, H query heads, K key heads, d head_dim.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from photon_data.errors import UsageError, first_few
from photon_data.files import is_safe
from photon_train.decoder import PhotonDecoderLayer
from photon_train.kept_tokens import MaskFolder, counted_by_volume
from photon_train.rows import TrainRow
from photon_train.scheduling import alignment, gather_of, question_mask, visual_mask
from photon_train.training.batches import Batch
from photon_train.training.setup import LossFactory

logger = logging.getLogger(__name__)
Callback = Callable[[int, int], object]  # volumes whose masks are counted, of how many


def grounding_of(folder: str, callback: Callback | None = None) -> LossFactory | None:
    """Return what `setup.start` makes the loss with, for the folder in `TrainConfig.grounding`; None for no folder."""

    def made(model: Any, rows: Sequence[TrainRow]) -> GroundingLoss:
        config = _scheduling_layer(model).config
        if config.drops_before_decoder(config.scheduler):
            found = f"{config.scheduler}, which drops tokens before it"
            raise UsageError(f"grounding: expected a scheduler that lets all tokens reach layer its, found {found}")
        tokens_zyx = config.tokens_thw
        return GroundingLoss(model, mask_shares(rows, folder, tokens_zyx, callback))

    return made if folder else None


def mask_shares(
    rows: Sequence[TrainRow], folder: str | Path, tokens_zyx: tuple[int, int, int], callback: Callback | None = None
) -> dict[str, Tensor]:
    """Return float32[V] by row id: the share of the masks a row names (`organ_masks`) that lies in each visual token.

    `folder` is a prepared one with masks, or holds a folder of masks for each volume id. Rows that name no mask, rows
    of several volumes, and rows whose masks are missing or empty are left out. UsageError where that leaves no volume.
    """
    home = MaskFolder(folder)
    named = [row for row in rows if row.organ_masks and len(row.videos) == 1 and is_safe(row.volume_id)]
    has = {id: home.has(id) for id in {row.volume_id for row in named}}
    named = [row for row in named if has[row.volume_id]]
    if not named:
        expected = "expected masks of some of the volumes, and rows that name them in organ_masks"
        raise UsageError(f"grounding: {expected}, found none in {folder}; set grounding='' to train without")
    volumes = {row.volume_id: row.videos[0] for row in named}
    names = {name for row in named for name in row.organ_masks}
    done = itertools.count(1)
    each = (lambda: callback(next(done), len(volumes))) if callback else (lambda: None)
    counted, unread = counted_by_volume(home, volumes, tokens_zyx, each, names)
    for volume_id, reason in unread.items():
        logger.warning("grounding: the masks of %s cannot be read: %s", volume_id, reason)
    shares = {}
    for row in named:
        masks = {mask.name: mask for mask in counted.get(row.volume_id, [])}
        counts_V = sum((masks[name].counts_V for name in row.organ_masks if name in masks), np.zeros(1))
        if total := counts_V.sum():
            shares[row.id] = torch.from_numpy(counts_V / total).float()
    if not shares:
        found = f"none; of {first_few(sorted(unread))}: {next(iter(unread.values()))}" if unread else "none"
        raise UsageError(f"grounding: expected masks that rows name in organ_masks in {folder}, found {found}")
    return shares


class GroundingLoss:
    """The loss of a model's scores, given the shares of `mask_shares`. Call it between a forward and its backward.

    The hook stays on the layer: some versions of transformers run it again when a checkpointed layer is computed again
    during backward. What it computes then is not recorded.
    """

    def __init__(self, model: nn.Module, shares: Mapping[str, Tensor]) -> None:
        self._shares = shares
        self._layer = _scheduling_layer(model)
        self._in_forward = False
        self._qk: tuple[Tensor, Tensor] | None = None
        model.register_forward_pre_hook(lambda *_: setattr(self, "_in_forward", True))
        self._layer.register_forward_pre_hook(self._record, with_kwargs=True)

    def _record(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # with_qk: only a prefix, whose questions come in the next call.
        if layer.training and not kwargs.get("with_qk"):
            qk = layer.rotated_qk(args[0], kwargs["position_embeddings"], kwargs.get("prefix"))
            self._qk = qk if self._in_forward else None

    def __call__(self, batch: Batch) -> Tensor | None:
        """Return the mean loss, 0-d, of the rows whose masks are known and whose volume is not perturbed; None without.

        Of several groups, the weighted mean over them, in which one without such rows counts as 0.
        """
        qk, self._qk, self._in_forward = self._qk, None, False
        perturbed = batch.inputs["perturbed"].tolist() if "perturbed" in batch.inputs else [False] * len(batch.ids)
        known = [
            None if batch.error or is_perturbed else self._shares.get(id)
            for id, is_perturbed in zip(batch.ids, perturbed, strict=True)
        ]
        first = next((share_V for share_V in known if share_V is not None), None)
        if first is None or qk is None:
            return None
        config, ids_BL = self._layer.config, batch.inputs["input_ids"]
        visual_BL = visual_mask(ids_BL, config)
        share_BV = torch.stack([torch.zeros_like(first) if share_V is None else share_V for share_V in known])
        nowhere_BL = torch.zeros_like(visual_BL, dtype=torch.float32)
        question_BL = batch.inputs.get("question_mask")
        question_BL = question_mask(ids_BL, config) if question_BL is None else question_BL.bool()
        q_BHLd, k_BKLd = qk
        with torch.autocast(q_BHLd.device.type, enabled=False):
            score_BL = question_scores(q_BHLd, k_BKLd, question_BL & batch.inputs["attention_mask"].bool(), visual_BL)
            grounding_BL = nowhere_BL.masked_scatter(visual_BL, share_BV.to(ids_BL.device))
            losses_B = grounding_losses(score_BL, visual_BL, grounding_BL)
        weights, start = list[float](), 0
        for size, share in zip(batch.group_sizes or [len(known)], batch.group_shares or [1.0], strict=True):
            count = sum(share_V is not None for share_V in known[start : start + size])
            weights += [share / max(count, 1)] * size
            start += size
        return (losses_B * losses_B.new_tensor(weights)).sum()


def _scheduling_layer(model: nn.Module) -> Any:
    """Return the layer after which tokens are dropped: it alone sees the prefix."""
    layers: Any = (module for module in model.modules() if isinstance(module, PhotonDecoderLayer))
    return next(layer for layer in layers if layer.self_attn.layer_idx == layer.config.drop_layer)


def question_scores(q_BHLd: Tensor, k_BKLd: Tensor, question_BL: Tensor, visual_BL: Tensor) -> Tensor:
    """Return float32[B, L], 0 off the visual tokens: scores as those of ITS, but every question token weighs the same.

    ITS cuts centrality off at 0: where all of it is cut off, nothing would be learned.
    """
    question = gather_of(question_BL)
    is_question_BQ = question.mask_BM.float()
    w_BQ = is_question_BQ / is_question_BQ.sum(-1, keepdim=True).clamp_min(1)
    return alignment(question(q_BHLd, dim=2), k_BKLd, w_BQ, visual_BL)


def grounding_losses(score_BL: Tensor, visual_BL: Tensor, grounding_BL: Tensor) -> Tensor:
    """Return float32[B]: the cross entropy of the scores' softmax over the visual tokens with where the masks lie.

    0 for rows whose `grounding_BL` is 0 everywhere: nothing is known of them.
    """
    logp_BL = score_BL.masked_fill(~visual_BL, -torch.inf).log_softmax(1).masked_fill(~visual_BL, 0.0)
    return -(grounding_BL * logp_BL).sum(1)
