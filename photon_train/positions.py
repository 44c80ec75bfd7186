"""Multimodal rotary positions by the rule the published weights were trained with.

After a volume, text resumes at (max over t, h, w) + 1. transformers v5 resumes at start + max(h, w),
which for 10 slabs is 243 positions earlier.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

PADDING_POSITION = 1


def row_positions(kinds: list[int], next_volume: Callable[[int], Tensor]) -> Tensor:
    """Return int64[3, L], the (t, h, w) positions of a row of L tokens of kind 0 (text), 1 (image) or 2 (volume).

    `next_volume(kind)` is called once for each run that is not text, and returns its int64[3, n] counted from 0.
    Raises ValueError for a run of another length than its volume's.
    """
    pieces, start = [], 0
    for kind, run in itertools.groupby(kinds):
        length = sum(1 for _ in run)
        piece_3L = torch.arange(length).expand(3, -1) if kind == 0 else next_volume(kind)
        if piece_3L.shape[1] != length:
            raise ValueError(
                f"{piece_3L.shape[1]} visual tokens wanted for a volume, got {length}: was the prompt cut off inside it? "
                "Shorten the text, not the volume"
            )
        pieces.append(piece_3L + start)
        start = int(pieces[-1].max()) + 1
    return torch.cat(pieces, dim=1)


def volume_positions(grid_thw: list[int], merge: int, positions_per_slab: float) -> Tensor:
    """Return int64[3, n] from 0: t advances by positions_per_slab (truncated), h and w by merged patch."""
    t, h, w = grid_thw[0], grid_thw[1] // merge, grid_thw[2] // merge
    slabs = (torch.arange(t, dtype=torch.float32) * positions_per_slab).long()
    axes = torch.meshgrid(slabs, torch.arange(h), torch.arange(w), indexing="ij")
    return torch.stack(axes).reshape(3, -1)
