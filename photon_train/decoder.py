"""Vision tower and decoder with scheduling: Qwen2.5-VL's, and between layers its and its + 1 visual tokens are dropped.

`PhotonTextModel._scheduled` reads as the paper's algorithm. With nothing to schedule the stock forward runs. A `Prefix`
is what the questions on one volume share: every token up to the end of the last volume, computed through layer its,
or through all layers where no question decides which tokens stay.

Legend: B rows, L tokens of a padded row, M tokens after pruning (packed to the right edge; in training, to the left
one), N visual tokens of the batch, D hidden size, P tokens of a shared prefix, H query heads, K key heads in k and v,
d head_dim; axis 3 is (t, h, w).
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
    Qwen2_5_VLModel,
    Qwen2_5_VLPreTrainedModel,
    Qwen2_5_VLTextModel,
)
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from photon_train.attention import (
    PhotonAttention,
    PhotonRotaryEmbedding,
    SharedKeys,
    causal_mask,
    fuse_norms,
    pack,
    rope_index,
)
from photon_train.configuration_photon import Phase, PhotonConfig
from photon_train.losses import prune
from photon_train.prefix import Prefix
from photon_train.pruners import BY_QK, SCHEDULERS, chosen_of, encode_and_choose
from photon_train.scheduling import (
    Gather,
    Scheduled,
    SchedulerContext,
    SchedulingInputs,
    Selection,
    ThresholdHead,
    ThresholdPredictor,
    everything,
    gather_of,
    visual_mask,
    warn_of_undecided,
)
from photon_train.vision import PhotonVisionTower


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

    def __init__(self, config: PhotonConfig, layer: int) -> None:
        super().__init__(config.text_config, layer)
        self.config = config
        self.atp = ThresholdPredictor(config) if config.stage == 2 and layer == config.its_layer else None

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        scheduling: SchedulingInputs | None = None,
        prefix: Prefix | None = None,
        with_qk: bool = False,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Selection] | tuple[Tensor, Tensor, Tensor]:
        """Return h_BLD; with `scheduling`, (h_BLD, selection over prefix and row); with `with_qk`, (h_BLD, q, k)."""
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
        attention: Any = self.self_attn
        q_BHLd, k_BKLd = attention.rotated_qk(self.input_layernorm(h_BLD), position_embeddings)
        if prefix is not None:
            assert prefix.q_1HPd is not None and prefix.k_1KPd is not None, (
                "the scheduler has the prefix made with them"
            )
            q_BHLd = torch.cat([prefix.q_1HPd.expand(len(h_BLD), -1, -1, -1), q_BHLd], dim=2)
            k_BKLd = torch.cat([prefix.k_1KPd.expand(len(h_BLD), -1, -1, -1), k_BKLd], dim=2)
        return q_BHLd, k_BKLd


class PhotonTextModel(Qwen2_5_VLTextModel):
    """The decoder. Given `scheduling` it drops tokens after layer `its`, or before all; else it is the stock one."""

    def __init__(self, config: Any, photon_config: PhotonConfig) -> None:
        super().__init__(config)
        self.photon_config = photon_config
        for layer in {photon_config.its_layer, photon_config.drop_layer}:
            self.layers[layer] = PhotonDecoderLayer(photon_config, layer)
        for number, one in enumerate(self.layers):
            one.self_attn = PhotonAttention(config, number)
        self.rotary_emb = PhotonRotaryEmbedding(config)
        fuse_norms(self)
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
        h_BLD, position_3BL, mask_BL, scheduled = inputs_embeds, position_ids[-3:], attention_mask, None
        cache = DynamicCache(config=self.config) if use_cache and past_key_values is None else past_key_values
        if prefix is not None and cache is not None:
            cache = prefix.into(cache, len(h_BLD))
        # With a prefix, h_BLD are of the suffixes, position_3BL and mask_BL of whole rows.
        own_position_3BL = position_3BL if prefix is None else position_3BL[..., prefix.length :]
        if scheduling.chosen is not None or (prefix is not None and prefix.scheduled is not None):
            h_BLD, own_position_3BL, scheduled = self._chosen(h_BLD, own_position_3BL, scheduling, mask_BL, prefix)
            mask_BL = scheduled.kept.mask_BM
        shared = SharedKeys(prefix.keys_values if prefix else ()) if cache is None else None
        attend = self._attend(h_BLD, mask_BL, own_position_3BL, cache, shared) | kwargs
        if scheduled is not None:
            for layer in self.layers:
                h_BLD = layer(h_BLD, **attend)
            h_BMD = h_BLD if prefix is None else prefix.before(h_BLD)
            return PhotonTextOutput(self.norm(h_BMD), cache if use_cache else None, scheduled=scheduled)

        layers, its = list(self.layers), self.photon_config.drop_layer
        for layer in layers[:its]:
            h_BLD = layer(h_BLD, **attend)
        h_BLD, selection = layers[its](h_BLD, scheduling=scheduling, prefix=prefix, **attend)
        through = its + 1 if prefix is None else prefix.layers
        for layer in layers[its + 1 : through]:
            h_BLD = layer(h_BLD, **attend)
        h_BLD = h_BLD if prefix is None else prefix.before(h_BLD)
        # Behind the tokens of a row, empty slots need no mask: causal attention does not see them.
        to_left = self.training and cache is None
        h_BMD, scheduled = self._drop(h_BLD, selection, scheduling, mask_BL, to_left)
        if through < len(layers):
            if scheduling.drops:
                _prune_cache(cache, scheduled.kept, layers=through)
                position_3BL = _of_kept(scheduled, position_3BL)
                mask_BL = None if to_left or len(h_BMD) == 1 else scheduled.kept.mask_BM  # one row has no empty slot
            kept, packed = scheduled.kept, None
            if to_left and scheduling.drops and (packed := pack(h_BMD, kept.mask_BM, kept.tokens, self.config)):
                h_BMD, position_3BL = packed.join(h_BMD), packed.join(position_3BL, 1)
            shared = SharedKeys() if cache is None and mask_BL is not None else None
            attend = self._attend(h_BMD, mask_BL, position_3BL, cache, shared, through) | {"packed": packed} | kwargs
            for layer in layers[through:]:
                h_BMD = layer(h_BMD, **attend)
            h_BMD = packed.part(h_BMD) if packed else h_BMD
        return PhotonTextOutput(self.norm(h_BMD), cache if use_cache else None, scheduled=scheduled)

    def _chosen(
        self,
        h_BLD: Tensor,
        position_3BL: Tensor,
        scheduling: SchedulingInputs,
        mask_BL: Tensor | None,
        prefix: Prefix | None,
    ) -> tuple[Tensor, Tensor, Scheduled]:
        """Return h_BMD and the positions of what was chosen before the decoder, and what was scheduled.

        With a prefix that holds what was chosen, h_BLD and position_3BL are of the suffixes, which stay as they are.
        """
        if prefix is not None and prefix.scheduled is not None:
            whole_BL = torch.ones_like(scheduling.visual_BL) if mask_BL is None else mask_BL.bool()
            return h_BLD, position_3BL, prefix.scheduled.followed_by(whole_BL, scheduling.visual_BL)
        assert scheduling.chosen is not None, "one of the two has it"
        h_BMD, scheduled = self._drop(h_BLD, scheduling.chosen, scheduling, mask_BL)
        return h_BMD, _of_kept(scheduled, position_3BL), scheduled

    def choose(
        self, h_1PD: Tensor, position_31P: Tensor, scheduling: SchedulingInputs
    ) -> tuple[Tensor, Tensor, Scheduled]:
        """Return h_1MD and the positions of what was chosen of a prefix before the decoder, and what was scheduled.

        Raises ValueError where rows keep different numbers of tokens: they have no prefix in one.
        """
        h_1MD, position_31M, scheduled = self._chosen(h_1PD, position_31P, scheduling, None, None)
        if len(h_1MD) > 1 and not scheduled.kept.mask_BM.all():
            raise ValueError("expected rows that keep as many tokens, found others; encode one volume at a time")
        return h_1MD, position_31M, scheduled

    def prefix_through(
        self, layers: int, h_1PD: Tensor, position_31P: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None, tuple[tuple[Tensor, Tensor], ...]]:
        """Return what a Prefix holds of so many layers: h_1PD, q and k of the layer that drops, all keys and values."""
        shared, q_1HPd, k_1KPd = SharedKeys(is_prefix=True), None, None
        # In training, scores may be asked for from outside of the model, by a hook.
        is_asked = layers < len(self.layers) or self.photon_config.scheduler in BY_QK or torch.is_grad_enabled()
        attend = self._attend(h_1PD, None, position_31P, None, shared)
        for layer in self.layers[:layers]:
            if is_asked and layer is self.layers[self.photon_config.drop_layer]:
                h_1PD, q_1HPd, k_1KPd = layer(h_1PD, with_qk=True, **attend)
            else:
                h_1PD = layer(h_1PD, **attend)
        return h_1PD, q_1HPd, k_1KPd, shared.own()

    def _attend(
        self,
        h_BLD: Tensor,
        mask_BL: Tensor | None,
        position_3BL: Tensor,
        cache: Cache | None,
        shared: SharedKeys | None,
        first_layer: int = 0,
    ) -> dict[str, Any]:
        """Return what layers from `first_layer` on need to attend: causal mask, rotation, cache."""
        mask: Any
        if shared is not None and self.config._attn_implementation in ("sdpa", "eager"):
            mask = causal_mask(mask_BL, h_BLD, shared.length, self.config)
        else:
            before: Any = cache if shared is None else shared
            mask = create_causal_mask(self.config, h_BLD, mask_BL, before, layer_idx=first_layer)
        rotary = self.rotary_emb(h_BLD, position_3BL)
        return {"attention_mask": mask, "position_embeddings": rotary, "past_key_values": cache, "shared": shared}

    def _drop(
        self,
        h_BLD: Tensor,
        selection: Selection,
        scheduling: SchedulingInputs,
        mask_BL: Tensor | None,
        to_left: bool = False,
    ) -> tuple[Tensor, Scheduled]:
        """Return the hidden states h_BMD of the tokens that stay, and what was scheduled. M is L if all do."""
        visual_BL = scheduling.visual_BL
        mask_BL = torch.ones_like(visual_BL) if mask_BL is None else mask_BL.bool()
        p_BL = torch.where(scheduling.detached_B[:, None], selection.probability_BL.detach(), selection.probability_BL)
        flipped_B = scheduling.flip_B & ~selection.threshold_B.isnan()
        if self.photon_config.scheduler == "its" and not self.training:
            warn_of_undecided(selection, visual_BL & mask_BL)
        selection = selection._replace(probability_BL=p_BL)
        if not scheduling.drops:
            if scheduling.phase is Phase.SOFT:
                h_BLD = h_BLD * p_BL[..., None].to(h_BLD.dtype)
            return h_BLD, Scheduled(selection, flipped_B, mask_BL, everything(mask_BL))
        keep_BL = mask_BL & (selection.keep_BL ^ (visual_BL & flipped_B[:, None]) | ~visual_BL)
        kept = gather_of(keep_BL, to_left=to_left)
        h_BMD = prune(h_BLD, p_BL, visual_BL, kept, self.photon_config, scheduling.loss_scale_B)
        return h_BMD, Scheduled(selection, flipped_B, keep_BL, kept)


def _of_kept(scheduled: Scheduled, position_3BL: Tensor) -> Tensor:
    """Return the positions of the tokens that stay, as they were: [3, B, M]."""
    return scheduled.kept(position_3BL.transpose(0, 1), dim=2).transpose(0, 1)


def _prune_cache(cache: Cache | None, kept: Gather, layers: int) -> None:
    """Shorten the first `layers` layers to the kept tokens. Raises ValueError for caches of fixed length."""
    for layer in [] if cache is None else cache.layers[:layers]:
        if not isinstance(layer, DynamicLayer):
            raise ValueError(f"expected a cache of DynamicLayers, found {type(layer).__name__}; pass a DynamicCache")
        assert layer.keys is not None and layer.values is not None, "the layer has just run"
        layer.keys, layer.values = kept(layer.keys, dim=2), kept(layer.values, dim=2)


class PhotonModel(Qwen2_5_VLModel):
    """Vision tower and decoder. Reads volumes only; positions follow the published rule."""

    config: PhotonConfig

    def __init__(self, config: PhotonConfig) -> None:
        Qwen2_5_VLPreTrainedModel.__init__(self, config)  # the stock __init__ would build the stock decoder
        self.visual = PhotonVisionTower._from_config(config.vision_config)
        self.language_model = PhotonTextModel._from_config(config.text_config, photon_config=config)
        self.rope_deltas: Any = None
        self.post_init()

    def get_rope_index(
        self,
        input_ids: Tensor,
        mm_token_type_ids: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        second_per_grid_ts: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        """Return the positions int64[3, B, L], 1 at padding, and the deltas int64[B, 1]: next position minus L.

        mm_token_type_ids: 0 text, 1 image, 2 volume. See `attention.rope_index`.
        """
        images, volumes = ([] if grids is None else grids.tolist() for grids in (image_grid_thw, video_grid_thw))
        seconds = [1.0] * len(volumes) if second_per_grid_ts is None else torch.as_tensor(second_per_grid_ts).tolist()
        kind_BL = 2 * visual_mask(input_ids, self.config) if mm_token_type_ids is None else mm_token_type_ids
        mask_BL = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        found = rope_index(kind_BL.cpu(), mask_BL.cpu(), images, volumes, seconds, self.config)
        return found[0].to(input_ids.device), found[1].to(input_ids.device)

    def get_video_features(
        self, pixel_values_videos: Tensor, video_grid_thw: Any, chooses: bool = True, **kwargs: Any
    ) -> Any:
        """Return the stock output; where a scheduler chooses before the decoder, that of `encode_and_choose`."""
        encode = partial(super().get_video_features, pixel_values_videos, video_grid_thw, **kwargs)
        if not chooses or not self.config.drops_before_decoder(self.config.scheduler):
            return encode()
        return encode_and_choose(encode, self.visual, video_grid_thw, self.config)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        second_per_grid_ts: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        prefix: Prefix | None = None,
        scheduling: SchedulingInputs | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the decoder's output. With a prefix, `input_ids` are still whole rows."""
        checked = position_ids is not None  # whoever made positions has compared the text with the volumes
        if position_ids is None:
            position_ids, self.rope_deltas = self.get_rope_index(
                input_ids, mm_token_type_ids, None, video_grid_thw, second_per_grid_ts, attention_mask
            )
        volumes = mm_encoder_outputs["video"] if mm_encoder_outputs else None
        if volumes is None and pixel_values_videos is not None:
            drops = scheduling is None or scheduling.drops
            volumes = self.get_video_features(pixel_values_videos, video_grid_thw, chooses=drops, return_dict=True)
        if prefix is not None:
            input_ids, kwargs["prefix"] = input_ids[:, prefix.length :], prefix
        h_BLD, chosen = self.embed(input_ids, volumes, checked)
        return self.language_model(
            inputs_embeds=h_BLD,
            attention_mask=attention_mask,
            position_ids=position_ids,
            scheduling=None if scheduling is None else scheduling._replace(chosen=chosen),
            **kwargs,
        )

    def embed(self, input_ids_BL: Tensor, volumes: Any, checked: bool = False) -> tuple[Tensor, Selection | None]:
        """Return h_BLD, embedded text with the volumes' tokens in their places, and what was chosen of these.

        checked: they are as many.
        """
        h_BLD = self.get_input_embeddings()(input_ids_BL)
        if volumes is None:
            return h_BLD, None
        visual_ND = torch.cat(list(volumes.pooler_output)).to(h_BLD)
        is_visual_BL = visual_mask(input_ids_BL, self.config)
        if not checked and (found := int(is_visual_BL.sum())) != len(visual_ND):
            raise ValueError(
                f"expected {len(visual_ND)} visual tokens in the text, as many as the volumes give, found {found}; "
                "give every volume all its <|video_pad|> tokens: shorten the text, not the volume"
            )
        chosen, width = None, h_BLD.shape[2]
        if visual_ND.shape[1] > width:  # a scheduler has chosen among them before
            visual_ND, chosen = chosen_of(visual_ND, is_visual_BL, width, self.config)
        number_BL = (is_visual_BL.flatten().cumsum(0) - 1).clamp(0, len(visual_ND) - 1)
        of_place_BLD = visual_ND.index_select(0, number_BL).view_as(h_BLD)
        return torch.where(is_visual_BL[..., None], of_place_BLD, h_BLD), chosen
