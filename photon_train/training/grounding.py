"""Masks on disk -> where in the volume each row's subject lies: what the grounding loss teaches the scores to point at.

A model that starts from nothing has no reason to score the liver's tokens high when asked about the liver; one that starts from
Qwen2.5-VL was shown where things are. Masks of the training volumes can stand in for that. Not part of the published recipe.

The model knows nothing of this: a hook on its scheduling layer records queries and keys, the loss is computed beside the model's.

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

from photon_data.errors import UsageError
from photon_train.answering.scan import counted_by_volume
from photon_train.decoder import PhotonDecoderLayer
from photon_train.kept_tokens import CountedMask
from photon_train.packing import gather_of, question_mask, visual_mask
from photon_train.rows import TrainRow
from photon_train.scheduling import alignment

logger = logging.getLogger(__name__)


def groundings(
    rows: Sequence[TrainRow],
    folder: Path,
    tokens_zyx: tuple[int, int, int],
    watch: Callable[[int, int], object] = lambda done, total: None,
) -> dict[str, Tensor]:
    """Return float32[V] by row id: the share of the masks a row names (`organ_masks`) that lies in each visual token.

    `folder` holds a folder of masks for each volume id. Rows that name none, of several volumes, or whose masks are not there or
    empty are left out. UsageError where that leaves nothing. `watch` is told how many volumes are done, of how many.
    """
    named = [row for row in rows if row.organ_masks and len(row.videos) == 1 and (folder / row.volume_id).is_dir()]
    if not named:
        raise UsageError(
            f"grounding: a folder of masks for some of the volumes wanted, with rows that name them in organ_masks, found none "
            f"in {folder}; set grounding='' to train without"
        )
    places = {row.volume_id: row.videos[0] for row in named}
    names = {name for row in named for name in row.organ_masks}
    done = itertools.count(1)
    masks, unread = counted_by_volume(folder, places, tokens_zyx, lambda: watch(next(done), len(places)), names)
    for volume_id, reason in unread.items():
        logger.warning("grounding: the masks of %s cannot be read: %s", volume_id, reason)
    shares = {row.id: _shares(row, {mask.name: mask for mask in masks.get(row.volume_id, [])}) for row in named}
    return {id: share for id, share in shares.items() if share is not None}


def _shares(row: TrainRow, masks: Mapping[str, CountedMask]) -> Tensor | None:
    counts_V = sum((masks[name].counts_V for name in row.organ_masks if name in masks), np.zeros(1))
    total = counts_V.sum()
    return torch.from_numpy(counts_V / total).float() if total else None


def of_rows(rows: Sequence[TrainRow], known: Mapping[str, Tensor], visual_KL: Tensor) -> Tensor:
    """Return float32[K, L]: what is known of each row, at its visual tokens; 0 elsewhere, and where nothing is."""
    grounding_KL = torch.zeros(visual_KL.shape)
    for row, visual_L, grounding_L in zip(rows, visual_KL, grounding_KL, strict=True):
        if row.id in known:
            grounding_L[visual_L] = known[row.id]
    return grounding_KL


class ScoreRecorder:
    """Records queries and keys of a model's scheduling layer in training, from which scores with a gradient are computed.

    The hook stays on the layer: gradient checkpointing runs the layer again during backward, hook included. What the hook
    computes then is not recorded.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layer = next(module for module in model.modules() if isinstance(module, PhotonDecoderLayer))
        self._in_forward = False
        self._qk: tuple[Tensor, Tensor] | None = None
        model.register_forward_pre_hook(lambda *_: self._enter(True))
        model.register_forward_hook(lambda *_: self._enter(False), always_call=True)
        self._layer.register_forward_pre_hook(self._record, with_kwargs=True)

    def _enter(self, entered: bool) -> None:
        self._in_forward = entered

    def _record(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if layer.training and not kwargs.get("with_qk"):  # with_qk: only a prefix, whose questions come in the next call
            qk = layer.rotated_qk(args[0], kwargs["position_embeddings"], kwargs.get("prefix"))
            self._qk = qk if self._in_forward else self._qk

    def loss(self, inputs: Mapping[str, Any], grounding_BL: Tensor) -> Tensor:
        """Return the mean grounding loss, 0-d, of the rows of the last forward for which `grounding_BL` is known.

        inputs: those of that forward; grounding_BL: as `of_rows` gives it.
        """
        assert self._qk is not None, "the model has run in training mode"
        (q_BHLd, k_BKLd), self._qk = self._qk, None
        config = self._layer.photon
        visual_BL = visual_mask(inputs["input_ids"], config)
        asked_BL = inputs.get("question_mask")
        asked_BL = question_mask(inputs["input_ids"], config) if asked_BL is None else asked_BL.bool()
        with torch.autocast(q_BHLd.device.type, enabled=False):
            score_BL = question_scores(q_BHLd, k_BKLd, asked_BL & inputs["attention_mask"].bool(), visual_BL)
            losses_B = grounding_losses(score_BL, visual_BL, grounding_BL)
        return losses_B.sum() / grounding_BL.any(1).sum().clamp_min(1)


def question_scores(q_BHLd: Tensor, k_BKLd: Tensor, question_BL: Tensor, visual_BL: Tensor) -> Tensor:
    """Return float32[B, L], 0 off the visual tokens: scores as those of ITS, but every question token weighs the same.

    Centrality is cut off at 0, and where all of it is, nothing is learned.
    """
    question = gather_of(question_BL)
    is_question_BQ = question.present_BM.float()
    w_BQ = is_question_BQ / is_question_BQ.sum(-1, keepdim=True).clamp_min(1)
    return alignment(question(q_BHLd, dim=2), k_BKLd, w_BQ, visual_BL)


def grounding_losses(score_BL: Tensor, visual_BL: Tensor, grounding_BL: Tensor) -> Tensor:
    """Return float32[B]: cross entropy of the scores' softmax over the visual tokens with where a row's subject lies.

    0 for rows whose `grounding_BL` is 0 everywhere: nothing is known of them.
    """
    logp_BL = score_BL.masked_fill(~visual_BL, -torch.inf).log_softmax(1).masked_fill(~visual_BL, 0.0)
    return -(grounding_BL * logp_BL).sum(1)
