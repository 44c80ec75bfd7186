"""The decoder with scheduling: Qwen2.5-VL's, and between layers its and its + 1 visual tokens are dropped.

`PhotonTextModel._scheduled` reads as the paper's algorithm. With nothing to schedule the stock forward runs.

Legend: B rows, L tokens of a padded row, M tokens after pruning (packed to the right edge), D hidden size, P tokens
of a shared prefix, H query heads, K key heads, d head_dim; axis 3 is (t, h, w).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLDecoderLayer,
    Qwen2_5_VLTextModel,
    apply_rotary_pos_emb,
)
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from photon_train.configuration_photon import PhotonConfig
from photon_train.losses import Phase
from photon_train.prefix import Prefix
from photon_train.scheduling import (
    SCHEDULERS,
    Scheduled,
    SchedulerContext,
    SchedulingInputs,
    Selection,
    ThresholdHead,
    ThresholdPredictor,
    warn_of_undecided,
)
from photon_train.surrogate import Gather, gather_of, prune


@dataclass
class PhotonTextOutput(BaseModelOutputWithPast):
    """The decoder's output, and what was scheduled on the way."""

    scheduled: Scheduled | None = None


class PhotonDecoderLayer(Qwen2_5_VLDecoderLayer):
    """Decoder layer `its`: also says which visual tokens to keep, from its own queries and keys.

    To train scores from outside the model, register a forward pre-hook with kwargs on this layer: `rotated_qk` of its
    arguments gives q and k with their gradients. Leave the hook in place during backward: some versions of transformers
    run hooks again when a checkpointed layer is recomputed.
    """

    def __init__(self, config: PhotonConfig) -> None:
        super().__init__(config.text_config, config.its_layer)
        self.config = config
        self.atp = ThresholdPredictor(config) if config.stage == 2 else None

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        scheduling: SchedulingInputs | None = None,
        prefix: Prefix | None = None,
        with_qk: bool = False,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Selection] | tuple[Tensor, Tensor, Tensor]:
        """Return h_BLD; given `scheduling`, also the selection for rows, prefix included; with_qk, also q and k."""
        # q and k are computed within this forward, where sharded weights are whole.
        rotated_qk = partial(self.rotated_qk, hidden_states, kwargs["position_embeddings"], prefix)
        h_BLD = super().forward(hidden_states, **kwargs)
        if with_qk:
            return h_BLD, *rotated_qk()
        if scheduling is None:
            return h_BLD
        context = SchedulerContext(scheduling, rotated_qk, self.atp, self.config)
        return h_BLD, SCHEDULERS[str(self.config.scheduler)](context)

    def rotated_qk(
        self, h_BLD: Tensor, position_embeddings: tuple[Tensor, Tensor], prefix: Prefix | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return q[B, H, L, d] and k[B, K, L, d] of this layer for its input, those of the prefix before them."""
        attention, normed_BLD = self.self_attn, self.input_layernorm(h_BLD)
        q_BHLd = attention.q_proj(normed_BLD).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        k_BKLd = attention.k_proj(normed_BLD).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        q_BHLd, k_BKLd = apply_rotary_pos_emb(q_BHLd, k_BKLd, *position_embeddings)
        if prefix is not None:
            q_BHLd = torch.cat([prefix.q_1HPd.expand(len(h_BLD), -1, -1, -1), q_BHLd], dim=2)
            k_BKLd = torch.cat([prefix.k_1KPd.expand(len(h_BLD), -1, -1, -1), k_BKLd], dim=2)
        return q_BHLd, k_BKLd


class PhotonTextModel(Qwen2_5_VLTextModel):
    """The decoder. Given `scheduling` it drops tokens after layer `its`; else it is the stock one."""

    def __init__(self, config: Any, photon_config: PhotonConfig) -> None:
        super().__init__(config)
        self.photon_config = photon_config
        self.layers[photon_config.its_layer] = PhotonDecoderLayer(photon_config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ThresholdHead):
            module.initialise()
        else:
            super()._init_weights(module)

    def forward(self, *args: Any, scheduling: SchedulingInputs | None = None, **kwargs: Any) -> Any:
        """Return the stock output, or with `scheduling` a PhotonTextOutput over the kept tokens."""
        if scheduling is None:
            return super().forward(*args, **kwargs)
        return self._scheduled(*args, scheduling=scheduling, **kwargs)

    @merge_with_config_defaults
    @capture_outputs
    def _scheduled(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        scheduling: SchedulingInputs,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        prefix: Prefix | None = None,
        **kwargs: Any,
    ) -> PhotonTextOutput:
        position_3BL, rows = position_ids[-3:], len(inputs_embeds)
        mask_BL = torch.ones_like(scheduling.visual_BL) if attention_mask is None else attention_mask.bool()
        cache = DynamicCache(config=self.config) if use_cache and past_key_values is None else past_key_values

        lower_cache, lower_position_3BL = cache, position_3BL
        if prefix is not None:  # inputs_embeds are of the suffixes
            lower_cache = prefix.into(DynamicCache(config=self.config) if cache is None else cache, rows)
            lower_position_3BL = position_3BL[..., prefix.length :]
        attend = self._attend(inputs_embeds, attention_mask, lower_position_3BL, lower_cache, first_layer=0) | kwargs
        h_BLD, selection = self._lower(inputs_embeds, {"scheduling": scheduling, "prefix": prefix}, attend)
        if prefix is not None:
            h_BLD = torch.cat([prefix.h_1PD.expand(rows, -1, -1), h_BLD], dim=1)

        h_BMD, scheduled = self._drop(h_BLD, selection, scheduling, mask_BL)
        kept, first = scheduled.kept, self.photon_config.its_layer + 1
        _prune_cache(cache, kept, layers=first)
        position_3BM = kept(position_3BL.transpose(0, 1), dim=2).transpose(0, 1)
        attend = self._attend(h_BMD, kept.mask_BM, position_3BM, cache, first_layer=first)
        for layer in self.layers[first:]:
            h_BMD = layer(h_BMD, **attend, **kwargs)
        return PhotonTextOutput(self.norm(h_BMD), cache if use_cache else None, scheduled=scheduled)

    def through_its(self, h_1PD: Tensor, position_31P: Tensor) -> tuple[Tensor, Tensor, Tensor, Cache]:
        """Return h_1PD after layer its, that layer's rotated q and k, and the cache of layers 0..its. For a prefix."""
        cache = DynamicCache(config=self.config)
        attend = self._attend(h_1PD, None, position_31P, cache, first_layer=0)
        h_1PD, q_1HPd, k_1KPd = self._lower(h_1PD, {"with_qk": True}, attend)
        return h_1PD, q_1HPd, k_1KPd, cache

    def _lower(self, h_BLD: Tensor, its_arguments: dict[str, Any], attend: dict[str, Any]) -> Any:
        """Return what layer its returns; it alone gets `its_arguments`."""
        layers: list[Any] = list(self.layers[: self.photon_config.its_layer + 1])
        settings = [layer.gradient_checkpointing for layer in layers]
        makes_or_has_prefix = "with_qk" in its_arguments or its_arguments["prefix"] is not None
        try:
            for layer in layers:  # checkpointing would throw away the keys that a prefix shares
                layer.gradient_checkpointing &= not makes_or_has_prefix
            for layer in layers[:-1]:
                h_BLD = layer(h_BLD, **attend)
            return layers[-1](h_BLD, **its_arguments, **attend)
        finally:
            for layer, setting in zip(layers, settings, strict=True):
                layer.gradient_checkpointing = setting

    def _attend(
        self, h_BLD: Tensor, mask_BL: Tensor | None, position_3BL: Tensor, cache: Cache | None, first_layer: int
    ) -> dict[str, Any]:
        """Return what layers from `first_layer` on need to attend: causal mask, rotary pair, cache."""
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=h_BLD,
            attention_mask=mask_BL,
            past_key_values=cache,
            layer_idx=first_layer,
        )
        rotary = self.rotary_emb(h_BLD, position_3BL)
        return {"attention_mask": mask, "position_embeddings": rotary, "past_key_values": cache}

    def _drop(
        self, h_BLD: Tensor, selection: Selection, scheduling: SchedulingInputs, mask_BL: Tensor
    ) -> tuple[Tensor, Scheduled]:
        """Return the hidden states h_BMD of the tokens that stay, and what was scheduled."""
        visual_BL, drops = scheduling.visual_BL, scheduling.phase in (Phase.HARD, Phase.FLIP)
        p_BL = selection.probability_BL
        p_BL = torch.where(scheduling.detached_B[:, None], p_BL.detach(), p_BL)
        if scheduling.phase is Phase.SOFT:
            h_BLD = h_BLD * p_BL[..., None].to(h_BLD.dtype)
        flipped_B = scheduling.flip_B & ~selection.threshold_B.isnan()
        kept_visual_BL = selection.keep_BL ^ (visual_BL & flipped_B[:, None]) if drops else visual_BL
        keep_BL = mask_BL & (kept_visual_BL | ~visual_BL)
        kept = gather_of(keep_BL)
        if self.photon_config.scheduler == "its":
            warn_of_undecided(selection, visual_BL & mask_BL & ~scheduling.perturbed_B[:, None])
        for_prune_BL = p_BL if drops else p_BL.detach()
        h_BMD = prune(h_BLD, for_prune_BL, visual_BL, kept, self.photon_config, scheduling.loss_scale)
        return h_BMD, Scheduled(selection._replace(probability_BL=p_BL), flipped_B, keep_BL, kept)


def _prune_cache(cache: Cache | None, kept: Gather, layers: int) -> None:
    """Shorten the first `layers` layers to the kept tokens. Raises ValueError for caches of fixed length."""
    for layer in [] if cache is None else cache.layers[:layers]:
        if not isinstance(layer, DynamicLayer):
            raise ValueError(f"expected a cache of DynamicLayers, found {type(layer).__name__}; pass a DynamicCache")
        assert layer.keys is not None and layer.values is not None, "the layer has just run"
        layer.keys, layer.values = kept(layer.keys, dim=2), kept(layer.values, dim=2)
