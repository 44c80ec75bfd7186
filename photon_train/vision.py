"""The vision tower, with windows of one length attended to in one call.

The stock layer makes 2560 small calls, one per window, for a volume of 140 x 280 x 280 in the 3B model; this one 88,
with the same bits. Flash attention takes all windows in one call and runs the stock layer.

Legend: P patches, W windows of one length, N patches of such a window, H heads, d head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    ALL_ATTENTION_FUNCTIONS,
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLVisionAttention,
    apply_rotary_pos_emb_vision,
    eager_attention_forward,
    is_flash_attention_requested,
)
from transformers.vision_utils import get_vision_window_index

_WINDOWS = WeakTensorKeyDictionary()  # cu_seqlens, which all layers of a forward share -> windows


class GroupedWindowAttention(Qwen2_5_VLVisionAttention):
    """Attention within windows, one call per distinct window length."""

    def forward(
        self, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: Any = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return float[P, D]; window i is patches cu_seqlens[i] to cu_seqlens[i + 1]."""
        if is_flash_attention_requested(self.config):
            return super().forward(hidden_states, cu_seqlens, position_embeddings, *args, **kwargs)
        q_PHd, k_PHd, v_PHd = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        q_PHd, k_PHd = apply_rotary_pos_emb_vision(q_PHd, k_PHd, *position_embeddings)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        indices, outputs = [], []
        for index_WN in _by_length(cu_seqlens):
            windows_WHNd = (x_PHd[index_WN].transpose(1, 2) for x_PHd in (q_PHd, k_PHd, v_PHd))
            out_WNHd, _ = attend(
                self, *windows_WHNd, attention_mask=None, scaling=self.scaling, dropout=0.0, is_causal=False, **kwargs
            )
            indices.append(index_WN.flatten())
            outputs.append(out_WNHd.flatten(0, 1).flatten(1))
        return self.proj(torch.cat(outputs)[torch.cat(indices).argsort()])


class PhotonVisionTower(Qwen2_5_VisionTransformerPretrainedModel):
    """Qwen2.5-VL's vision tower with grouped windows."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        for block in self.blocks:
            block.attn = GroupedWindowAttention(config)
        self.post_init()

    def forward(self, hidden_states: Tensor, grid_thw: Tensor, **kwargs: Any) -> Any:
        """Return the stock output for patches float[P, X]. Raises ValueError if they do not fit the grids [V, 3]."""
        config: Any = self.config
        voxels = config.in_channels * config.temporal_patch_size * config.patch_size**2
        expected, found = (int(grid_thw.prod(-1).sum()), voxels), tuple(hidden_states.shape)
        if found != expected:
            raise ValueError(
                f"expected patches of shape {expected} for the grids {grid_thw.tolist()}, found {found}; "
                "make both with the processor"
            )
        return super().forward(hidden_states, grid_thw, **kwargs)

    def slab_qk(self, attention: Any, given: dict[str, Any], grid_thw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q and k, rotated, and k as it was, float[P, H, d], of a block's attention for the arguments given it.

        In the order in which the patches came, slab by slab; the blocks have them in that of the windows.
        """
        config: Any = self.config
        size = self.spatial_merge_size
        order_N, _ = get_vision_window_index(grid_thw, size, config.window_size, config.patch_size)
        back_P = (order_N[:, None] * size**2 + torch.arange(size**2)).flatten().argsort()
        qkv_PHd = attention.qkv(given["hidden_states"]).unflatten(-1, (3, attention.num_heads, -1)).unbind(1)
        q_PHd, k_PHd = apply_rotary_pos_emb_vision(*qkv_PHd[:2], *given["position_embeddings"])
        return q_PHd[back_P], k_PHd[back_P], qkv_PHd[1][back_P]


def _by_length(cu_seqlens: Tensor) -> list[Tensor]:
    """Return the patches of the windows of each length, int64[W, N]. Only the first layer waits for the device."""
    if cu_seqlens not in _WINDOWS:
        ends = cu_seqlens.cpu()
        starts, lengths = ends[:-1], ends.diff()
        windows = [starts[lengths == n, None] + torch.arange(n) for n in lengths.unique().tolist() if n > 0]
        _WINDOWS[cu_seqlens] = [index_WN.long().to(cu_seqlens.device) for index_WN in windows]
    return _WINDOWS[cu_seqlens]
