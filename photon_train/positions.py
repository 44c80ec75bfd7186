"""Where tokens stand: the M-RoPE positions of a row.

Legend: B rows, L tokens of a padded row; axis 3 is (t, h, w).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from photon_train.configuration_photon import PhotonConfig


def rope_index(
    kind_BL: Tensor,
    mask_BL: Tensor,
    images: Iterable[list[int]],
    volumes: list[list[int]],
    seconds_per_slab: list[float],
    config: PhotonConfig,
) -> tuple[Tensor, Tensor]:
    """Return the positions int64[3, B, L], 1 at padding, and the deltas int64[B, 1]: next position minus L.

    kind_BL: 0 text, 1 image, 2 volume. All is on the CPU, as are images and volumes, the grids (t, h, w) in their
    order. After a volume, text resumes at (max over t, h, w) + 1, as the published weights were trained; transformers
    v5 resumes at start + max(h, w). t grows by tokens_per_second times seconds per slab in a volume, by 0 in an image.
    Raises ValueError for a run of visual tokens without a volume, or of another length than its volume's.
    """
    vision: Any = config.vision_config
    steps = [(grid, vision.tokens_per_second * s) for grid, s in zip(volumes, seconds_per_slab, strict=True)]
    left: dict[int, Any] = {1: zip(images, itertools.repeat(0.0)), 2: iter(steps)}
    position_3BL, delta_B1 = torch.ones((3, *kind_BL.shape), dtype=torch.int64), torch.zeros(len(kind_BL), 1).long()
    for row, (kind_L, mask_L) in enumerate(zip(kind_BL, mask_BL.bool(), strict=True)):
        pieces, start = [], 0
        for kind, run in itertools.groupby(kind_L[mask_L].tolist()):
            length = len(list(run))
            if kind == 0:
                piece_3L = torch.arange(length).expand(3, -1)
            elif (step := next(left[kind], None)) is not None:
                piece_3L = _grid_positions(step[0], step[1], vision.spatial_merge_size)
            else:
                raise ValueError(
                    f"expected a volume for every run of visual tokens, found {len(volumes)} for more runs; pass "
                    "all of them"
                )
            if piece_3L.shape[1] != length:
                raise ValueError(
                    f"expected {piece_3L.shape[1]} visual tokens for a volume, found {length}: was the prompt cut "
                    "off inside it? Shorten the text, not the volume"
                )
            pieces.append(piece_3L + start)
            start = int(pieces[-1].max()) + 1
        position_3BL[:, row, mask_L] = torch.cat(pieces, dim=1)
        delta_B1[row] = start - kind_BL.shape[1]
    return position_3BL, delta_B1


def _grid_positions(grid_thw: list[int], positions_per_slab: float, merge: int) -> Tensor:
    """Return int64[3, n] from 0: t grows by positions_per_slab (truncated), h and w by merged patch."""
    t, h, w = grid_thw[0], grid_thw[1] // merge, grid_thw[2] // merge
    slabs = (torch.arange(t, dtype=torch.float32) * positions_per_slab).long()
    axes = torch.meshgrid(slabs, torch.arange(h), torch.arange(w), indexing="ij")
    return torch.stack(axes).reshape(3, -1)
