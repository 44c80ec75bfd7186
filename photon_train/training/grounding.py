"""Masks on disk -> where in the volume each row's subject lies: what the grounding loss teaches the scores to point at.

A model that starts from nothing has no reason to score the liver's tokens high when asked about the liver; one that starts from
Qwen2.5-VL was shown where things are. Masks of the training volumes can stand in for that. Not part of the published recipe.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from photon_data.errors import UsageError
from photon_train.answering.scan import counted_by_volume
from photon_train.kept_tokens import CountedMask
from photon_train.rows import TrainRow

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
