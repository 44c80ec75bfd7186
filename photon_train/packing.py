"""Where things are in a row of token ids, and moving the chosen ones together.

Legend: B rows, L tokens of a padded row, M tokens of a packed-together row, K rows that begin alike with P tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from photon_train.configuration_photon import PhotonConfig

ROLE_LINE = 3  # `<|im_start|>`, the role, a newline
IGNORED = -100  # the label of what is not to be learned


class Gather(NamedTuple):
    """The chosen positions of every row, in order, against the right edge.

    [1 1 0 1], [0 1 0 0] on [a b c d] -> [a b d], [- - b]
    """

    index_BM: Tensor  # int64, position in the row it was taken from (any position where absent)
    present_BM: Tensor  # bool, False at the left edge of rows with fewer

    def __call__(self, x_BL: Tensor, dim: int = 1) -> Tensor:
        """Return `x_BL[b, index_BM[b]]` along `dim`; row b of x is at dimension 0. Absent slots hold leftovers."""
        shape = [1] * x_BL.ndim
        shape[0], shape[dim] = self.index_BM.shape
        index = self.index_BM.view(shape).expand(*(n if d != dim else -1 for d, n in enumerate(x_BL.shape)))
        return x_BL.gather(dim, index)


def gather_of(mask_BL: Tensor) -> Gather:
    """Return the gather that packs the True positions of each row together. One host sync: the longest row."""
    longest = int(mask_BL.sum(1).max())
    order_BL = mask_BL.to(torch.uint8).argsort(dim=1, stable=True)
    index_BM = order_BL[:, mask_BL.shape[1] - longest :]
    return Gather(index_BM, mask_BL.gather(1, index_BM))


def visual_mask(input_ids_BL: Tensor, config: PhotonConfig) -> Tensor:
    """Return bool[B, L], True at the tokens that stand for a part of a volume."""
    return input_ids_BL == config.video_token_id


def prefix_length(ids_L: Tensor, config: PhotonConfig) -> int:
    """Return how many tokens there are to the end of the last volume, which rows on it may share; 0 for text alone."""
    ends = (ids_L == config.vision_end_token_id).nonzero()
    return int(ends[-1]) + 1 if len(ends) else 0


def behind(shared_P: Tensor, own: Sequence[Tensor], padding: int) -> Tensor:
    """Return int64[K, L]: what rows share, padding, and what is each row's own.

    [P P P . q q]
    [P P P q q q]
    """
    own_KQ = pad_sequence(list(own), batch_first=True, padding_value=padding, padding_side="left")
    return torch.cat([shared_P.expand(len(own), -1), own_KQ.to(shared_P.device)], dim=1)


def question_mask(input_ids_BL: Tensor, config: PhotonConfig) -> Tensor:
    """Return bool[B, L], True at the text of a user turn that holds a volume, wherever in the turn it stands.

    The first volume with its two markers is no question; of further volumes the markers are, their patches are not
    (the published weights were trained so). A turn without end marker runs to the end of the row.
    """
    starts_turn_BL = input_ids_BL == config.im_start_token_id
    turn_BL = starts_turn_BL.cumsum(1)

    def so_far_in_turn(flag_BL: Tensor) -> Tensor:
        count_BL = flag_BL.cumsum(1)
        before_turn_BL = torch.where(starts_turn_BL, count_BL - flag_BL.long(), 0).cummax(1).values
        return count_BL - before_turn_BL

    visual_BL = visual_mask(input_ids_BL, config)
    visual_in_turn = torch.zeros_like(turn_BL).scatter_add(1, turn_BL.clamp_max(turn_BL.shape[1] - 1), visual_BL.long())
    has_volume_BL = visual_in_turn.gather(1, turn_BL.clamp_max(turn_BL.shape[1] - 1)) > 0
    in_role_line_BL = so_far_in_turn(torch.ones_like(starts_turn_BL)) <= ROLE_LINE
    ended_BL = so_far_in_turn(input_ids_BL == config.im_end_token_id) > 0
    volume_ends_BL = input_ids_BL == config.vision_end_token_id
    begun_BL = so_far_in_turn(input_ids_BL == config.vision_start_token_id)
    closed_before_BL = so_far_in_turn(volume_ends_BL) - volume_ends_BL.long()
    in_first_volume_BL = (begun_BL >= 1) & (closed_before_BL == 0)
    outside_BL = in_role_line_BL | ended_BL | in_first_volume_BL | visual_BL | (turn_BL == 0)
    return has_volume_BL & ~outside_BL
