"""The vision tower: Qwen2.5-VL's, with a patch embedding that is a matrix product, and windows ordered once.

Patches are brought into an order in which windows of one length follow each other, so that a block attends in a call
for each length (three, for a volume of 140 x 280 x 280) and moves nothing; the stock tower makes 2560 calls. The blocks
that attend within slabs bring their patches into the order of slabs and back.

Legend: V volumes, P patches, X voxels of a patch, N tokens (merged patches), H heads, d head_dim, D hidden size.
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    ALL_ATTENTION_FUNCTIONS,
    Qwen2_5_VisionPatchEmbed,
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLVisionAttention,
    eager_attention_forward,
    is_flash_attention_requested,
)
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from photon_train.attention import fuse_norms, rotate, signed

Grids = tuple[tuple[int, int, int], ...]  # (t, h, w) in patches, of each volume


class Spans(NamedTuple):
    """Which patches attend to each other: spans of them, those of one length one after the other."""

    runs: tuple[tuple[int, int], ...]  # number of spans, patches of each
    ends: Tensor  # int32, where spans end, from 0; for flash attention
    order_P: Tensor | None = None  # brings the patches into the order of the spans; None: they are
    back_P: Tensor | None = None


class Layout(NamedTuple):
    """How the patches of some volumes are ordered. Computed once for each combination of grids and device."""

    order_P: Tensor  # from slabs of merged 2 x 2 blocks, as they come, into windows of one length
    position_P2: Tensor  # (h, w) of each patch, in this order
    windows: Spans
    slabs: Spans
    back_N: Tensor  # brings merged patches back


class SpanAttention(Qwen2_5_VLVisionAttention):
    """Attention within spans, one call for each length."""

    def forward(self, hidden_states: Tensor, spans: Spans, rotation: tuple[Tensor, Tensor], **kwargs: Any) -> Tensor:  # type: ignore[override]
        """Return float[P, D], of patches in the order of the layout."""
        qk_P2Hd, v_P1Hd = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).split([2, 1], dim=1)
        qk_P2Hd = rotate(qk_P2Hd, *rotation)
        if spans.order_P is not None:
            qk_P2Hd, v_P1Hd = (x.index_select(0, spans.order_P) for x in (qk_P2Hd, v_P1Hd))
        out_PD = self._attend((*qk_P2Hd.unbind(1), v_P1Hd.squeeze(1)), spans, kwargs)
        return self.proj(out_PD if spans.back_P is None else out_PD.index_select(0, spans.back_P))

    def _attend(self, parts_PHd: tuple[Tensor, ...], spans: Spans, kwargs: dict[str, Any]) -> Tensor:
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        options = {"attention_mask": None, "scaling": self.scaling, "dropout": 0.0, "is_causal": False, **kwargs}
        if is_flash_attention_requested(self.config):  # all spans in one call
            longest = max(length for _, length in spans.runs)
            options |= {f"cu_seq_lens_{x}": spans.ends for x in "qk"} | {f"max_length_{x}": longest for x in "qk"}
            out_1PHd, _ = attend(self, *(x_PHd.transpose(0, 1)[None] for x_PHd in parts_PHd), **options)
            return out_1PHd[0].flatten(1)
        outputs = []
        sizes = [count * length for count, length in spans.runs]
        of_runs = [x_PHd.split(sizes) if len(sizes) > 1 else (x_PHd,) for x_PHd in parts_PHd]
        for (count, length), *run in zip(spans.runs, *of_runs, strict=True):
            qkv = (x_PHd.unflatten(0, (count, length)).transpose(1, 2) for x_PHd in run)
            outputs.append(attend(self, *qkv, **options)[0].reshape(count * length, -1))
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


class PatchEmbedding(Qwen2_5_VisionPatchEmbed):
    """A matrix product with the published weight [D, channels, d, h, w], of a convolution whose kernel is its input."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return float[P, D] for patches [P, X]."""
        weight_DX = self.proj.weight.flatten(1)
        return F.linear(hidden_states.to(weight_DX.dtype), weight_DX)


class PhotonVisionTower(Qwen2_5_VisionTransformerPretrainedModel):
    """Qwen2.5-VL's vision tower in fewer calls."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.patch_embed = PatchEmbedding(
            config.patch_size, config.temporal_patch_size, config.in_channels, config.hidden_size
        )
        for block in self.blocks:
            block.attn = SpanAttention(config)
        fuse_norms(self)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(self, hidden_states: Tensor, grid_thw: Tensor, **kwargs: Any) -> Any:
        """Return the tokens, `pooler_output` [N, D], for patches float[P, X] and the grids int64[V, 3] of the volumes.

        Raises ValueError if they do not fit. `last_hidden_state` is in the order of the layout.
        """
        config: Any = self.config
        grids: Grids = tuple(map(tuple, grid_thw.tolist()))
        voxels = config.in_channels * config.temporal_patch_size * config.patch_size**2
        expected, found = (sum(t * h * w for t, h, w in grids), voxels), tuple(hidden_states.shape)
        if found != expected:
            raise ValueError(
                f"expected patches of shape {expected} for the grids {grid_thw.tolist()}, found {found}; "
                "make both with the processor"
            )
        layout = layout_of(grids, self._sizes, hidden_states.device)
        h_PD = self.patch_embed(hidden_states).index_select(0, layout.order_P)
        cos_Pd, sin_Pd = self.rotary_pos_emb(h_PD, layout.position_P2)  # float32, as the published weights were trained
        rotation = (cos_Pd[:, None, None], signed(sin_Pd)[:, None, None])
        for number, block in enumerate(self.blocks):
            spans = layout.slabs if number in self.fullatt_block_indexes else layout.windows
            h_PD = block(h_PD, None, spans=spans, rotation=rotation, **kwargs)
        return BaseModelOutputWithPooling(h_PD, self.merger(h_PD).index_select(0, layout.back_N))

    @property
    def _sizes(self) -> tuple[int, int, int]:
        patch: Any = self.patch_size
        return self.spatial_merge_size, self.window_size, patch

    def slab_qk(self, attention: Any, given: dict[str, Any], grid_thw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q and k, rotated, and k as it was, float[P, H, d], of a block's attention for the arguments given it.

        In the order in which the patches came, slab by slab; the blocks have them in that of the layout.
        """
        h_PD = given["hidden_states"]
        back_P = layout_of(tuple(map(tuple, grid_thw.tolist())), self._sizes, h_PD.device).order_P.argsort()
        qkv_P3Hd = attention.qkv(h_PD).unflatten(-1, (3, attention.num_heads, -1))
        q_PHd, k_PHd = rotate(qkv_P3Hd[:, :2], *given["rotation"]).unbind(1)
        return q_PHd[back_P], k_PHd[back_P], qkv_P3Hd[:, 1][back_P]


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept may be part of a backward pass
def layout_of(grids: Grids, sizes: tuple[int, int, int], device: torch.device) -> Layout:
    """Return the layout of volumes of these grids; `sizes` are those of a merged block, a window and a patch."""
    merge, window, patch = sizes
    cells, grid_V3 = merge**2, torch.tensor(grids)
    order_N, ends = get_vision_window_index(grid_V3, merge, window, patch)
    windows = sorted(order_N.split((ends.diff() // cells).tolist()), key=len)  # stable
    order_N = torch.cat(windows)
    order_P = (order_N[:, None] * cells + torch.arange(cells)).flatten()
    position_P2 = get_vision_position_ids(grid_V3, merge)[order_P]
    slabs = sorted((h * w, number) for number, (h, w) in enumerate((h, w) for t, h, w in grids for _ in range(t)))
    starts = torch.tensor([0, *itertools.accumulate(h * w for t, h, w in grids for _ in range(t))])
    by_slab_P = torch.cat([torch.arange(n) + starts[number] for n, number in slabs])  # slabs of one length together
    order_of_slabs_P = order_P.argsort()[by_slab_P]
    return Layout(
        order_P.to(device),
        position_P2.to(device),
        _spans([cells * len(window_N) for window_N in windows], device),
        _spans([n for n, _ in slabs], device)._replace(
            order_P=order_of_slabs_P.to(device), back_P=order_of_slabs_P.argsort().to(device)
        ),
        order_N.argsort().to(device),
    )


def _spans(lengths: list[int], device: torch.device) -> Spans:
    """Return spans of these lengths, equal ones together."""
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    runs = tuple((len(list(run)), length) for length, run in itertools.groupby(lengths))
    return Spans(runs, ends.to(device))
