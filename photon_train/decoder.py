"""Vision tower and decoder with scheduling: Qwen2.5-VL's, and between layers its and its + 1 visual tokens are dropped.

`PhotonTextModel._scheduled` reads as the paper's algorithm. With nothing to schedule the stock forward runs. A `Prefix`
is what the questions on one volume share: every token up to the end of the last volume, computed through layer its.

Legend: B rows, L tokens of a padded row, M tokens after pruning (packed to the right edge), N visual tokens of
the batch, D hidden size, P tokens of a shared prefix, H query heads, K key heads in k and v, d head_dim; axis 3 is
(t, h, w).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLDecoderLayer,
    Qwen2_5_VLModel,
    Qwen2_5_VLPreTrainedModel,
    Qwen2_5_VLTextModel,
    apply_rotary_pos_emb,
)
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from photon_train.configuration_photon import Phase, PhotonConfig
from photon_train.pruners import (
    BEFORE_DECODER,
    SCHEDULERS,
    chosen_of,
    encode_and_choose,
    selection_of,
)
from photon_train.scheduling import (
    Gather,
    Scheduled,
    SchedulerContext,
    SchedulingInputs,
    Selection,
    ThresholdHead,
    ThresholdPredictor,
    gather_of,
    prune,
    visual_mask,
    warn_of_undecided,
)
from photon_train.vision import PhotonVisionTower


@dataclass
class PhotonTextOutput(BaseModelOutputWithPast):
    """The decoder's output, and what was scheduled on the way."""

    scheduled: Scheduled | None = None


class Prefix(NamedTuple):
    """What is the same for every question on a volume. Never modified; with gradients, a part of the graph.

    `PhotonForConditionalGeneration.encode_prefix` makes it.
    """

    input_ids_1P: Tensor
    volumes: dict[str, Tensor]  # video_grid_thw, second_per_grid_ts
    keys_values: tuple[tuple[Tensor, Tensor], ...]  # of layers 0..its, each [1, K heads, P, d]
    h_1PD: Tensor  # after layer its
    foreground_1P: Tensor  # share of foreground voxels of each visual token, for the foreground scheduler
    q_1HPd: Tensor | None = None  # of layer its, rotated
    k_1KPd: Tensor | None = None
    # Where no question has a say in what stays: what of the prefix did. Keys, values and h are then of these tokens,
    # and of all layers.
    scheduled: Scheduled | None = None

    @property
    def length(self) -> int:
        """P."""
        return self.input_ids_1P.shape[1]

    def into(self, cache: Cache, rows: int) -> Cache:
        """Return the cache with the layers of the prefix holding a copy of it for each row."""
        for layer, (keys, values) in enumerate(self.keys_values):
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), layer)
        return cache

    def volumes_of(self, rows: int) -> dict[str, Tensor]:
        """Return `volumes` of so many rows."""
        return {name: torch.cat([value] * rows) for name, value in self.volumes.items()}

    def followed_by(self, questions: Sequence[Tensor], pad_token_id: int = 0) -> dict[str, Any]:
        """Return model inputs of B rows: prefix, padding, the ids of a question. Raises ValueError for an empty one."""
        lengths = [len(question) for question in questions]
        if not all(lengths) or not lengths:
            raise ValueError(f"expected questions of at least one token, found lengths {lengths}; leave empty ones out")
        input_ids = with_suffixes(self.input_ids_1P, questions, pad_token_id)
        mask = with_suffixes(torch.ones_like(self.input_ids_1P), [torch.ones_like(q) for q in questions], 0)
        return {"input_ids": input_ids, "attention_mask": mask, "prefix": self, **self.volumes_of(len(questions))}


def with_suffixes(prefix_P: Tensor, suffixes: Sequence[Tensor], padding: int) -> Tensor:
    """Return int64[B, L], a row for each suffix: [P P P . s s], [P P P s s s]."""
    suffix_BS = pad_sequence(list(suffixes), batch_first=True, padding_value=padding, padding_side="left")
    return torch.cat([prefix_P.expand(len(suffixes), -1), suffix_BS.to(prefix_P.device)], dim=1)


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
        attention, normed_BLD = self.self_attn, self.input_layernorm(h_BLD)
        q_BHLd = attention.q_proj(normed_BLD).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        k_BKLd = attention.k_proj(normed_BLD).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        q_BHLd, k_BKLd = apply_rotary_pos_emb(q_BHLd, k_BKLd, *position_embeddings)
        if prefix is not None:
            assert prefix.q_1HPd is not None and prefix.k_1KPd is not None, "a prefix through layer its"
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

        if prefix is not None and prefix.scheduled is not None:
            scheduled = prefix.scheduled.followed_by(mask_BL, scheduling.visual_BL)
            cache = prefix.into(DynamicCache(config=self.config) if cache is None else cache, rows)
            h_BSD = self._through(inputs_embeds, position_3BL[..., prefix.length :], scheduled.kept.mask_BM, cache)
            h_BMD = self.norm(torch.cat([prefix.h_1PD.expand(rows, -1, -1), h_BSD], dim=1))
            return PhotonTextOutput(h_BMD, cache if use_cache else None, scheduled=scheduled)
        if scheduling.chosen is not None:
            h_BMD, scheduled = self._drop(inputs_embeds, scheduling.chosen, scheduling, mask_BL)
            position_3BM = scheduled.kept(position_3BL.transpose(0, 1), dim=2).transpose(0, 1)
            h_BMD = self._through(h_BMD, position_3BM, scheduled.kept.mask_BM, cache, checkpointed=True)
            return PhotonTextOutput(self.norm(h_BMD), cache if use_cache else None, scheduled=scheduled)

        lower_cache, lower_position_3BL = cache, position_3BL
        if prefix is not None:  # inputs_embeds are of the suffixes
            lower_cache = prefix.into(DynamicCache(config=self.config) if cache is None else cache, rows)
            lower_position_3BL = position_3BL[..., prefix.length :]
        attend = self._attend(inputs_embeds, attention_mask, lower_position_3BL, lower_cache, first_layer=0) | kwargs
        h_BLD, selection = self._lower(inputs_embeds, {"scheduling": scheduling, "prefix": prefix}, attend)
        if prefix is not None:
            h_BLD = torch.cat([prefix.h_1PD.expand(rows, -1, -1), h_BLD], dim=1)

        h_BMD, scheduled = self._drop(h_BLD, selection, scheduling, mask_BL)
        kept, first = scheduled.kept, self.photon_config.drop_layer + 1
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

    def through_all(
        self, h_1PD: Tensor, position_31P: Tensor, scheduling: SchedulingInputs
    ) -> tuple[Tensor, Scheduled, Cache]:
        """Return h_1MD behind the last layer, what stayed of a prefix before the first, and the cache of all layers."""
        cache, here_1P = DynamicCache(config=self.config), torch.ones_like(scheduling.visual_BL)
        nothing_1P = torch.zeros(here_1P.shape, device=h_1PD.device)
        selection = scheduling.chosen or selection_of(
            nothing_1P, scheduling.visual_BL, scheduling.visual_BL, self.photon_config
        )
        h_1MD, scheduled = self._drop(h_1PD, selection, scheduling, here_1P)
        position_31M = scheduled.kept(position_31P.transpose(0, 1), dim=2).transpose(0, 1)
        return self._through(h_1MD, position_31M, None, cache), scheduled, cache

    def _through(
        self,
        h_BLD: Tensor,
        position_3BL: Tensor,
        mask_BL: Tensor | None,
        cache: Cache | None,
        checkpointed: bool = False,
    ) -> Tensor:
        """Return h_BLD behind the last layer; nothing is dropped on the way."""
        attend = self._attend(h_BLD, mask_BL, position_3BL, cache, first_layer=0)
        with _uncheckpointed([] if checkpointed else self.layers):
            for layer in self.layers:
                h_BLD = layer(h_BLD, **attend)
        return h_BLD

    def _lower(self, h_BLD: Tensor, its_arguments: dict[str, Any], attend: dict[str, Any]) -> Any:
        """Return what layer its returns; it alone gets `its_arguments`."""
        layers: list[Any] = list(self.layers[: self.photon_config.drop_layer + 1])
        makes_or_has_prefix = "with_qk" in its_arguments or its_arguments["prefix"] is not None
        with _uncheckpointed(layers if makes_or_has_prefix else []):
            for layer in layers[:-1]:
                h_BLD = layer(h_BLD, **attend)
            return layers[-1](h_BLD, **its_arguments, **attend)

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
        visual_BL, drops = scheduling.visual_BL, scheduling.drops
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
        h_BMD = prune(h_BLD, for_prune_BL, visual_BL, kept, self.photon_config, scheduling.loss_scale_B)
        return h_BMD, Scheduled(selection._replace(probability_BL=p_BL), flipped_B, keep_BL, kept)


@contextmanager
def _uncheckpointed(layers: Iterable[Any]) -> Iterator[None]:
    """Keep the activations of layers in the block: checkpointing would throw away the keys that a prefix shares."""
    settings = [(layer, layer.gradient_checkpointing) for layer in layers]
    try:
        for layer, _ in settings:
            layer.gradient_checkpointing = False
        yield
    finally:
        for layer, setting in settings:
            layer.gradient_checkpointing = setting


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

        mm_token_type_ids: 0 text, 1 image, 2 volume. After a volume, text resumes at (max over t, h, w) + 1, as the
        published weights were trained; transformers v5 resumes at start + max(h, w). t grows by tokens_per_second times
        seconds per slab (1 by default) in a volume, by 0 in an image.
        Raises ValueError for a run of visual tokens without a volume, or of another length than its volume's.
        """
        vision, device = self.config.vision_config, input_ids.device
        images, volumes = ([] if grids is None else grids.tolist() for grids in (image_grid_thw, video_grid_thw))
        seconds = [1.0] * len(volumes) if second_per_grid_ts is None else torch.as_tensor(second_per_grid_ts).tolist()
        steps = [(grid, vision.tokens_per_second * s) for grid, s in zip(volumes, seconds, strict=True)]
        left = {1: zip(images, itertools.repeat(0.0)), 2: iter(steps)}
        kind_BL = 2 * visual_mask(input_ids, self.config) if mm_token_type_ids is None else mm_token_type_ids
        mask_BL = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        position_3BL, delta_B1 = torch.ones((3, *kind_BL.shape), dtype=torch.int64), torch.zeros(len(kind_BL), 1).long()
        for row, (kind_L, mask_L) in enumerate(zip(kind_BL.cpu(), mask_BL.bool().cpu(), strict=True)):
            pieces, start = [], 0
            for kind, run in itertools.groupby(kind_L[mask_L].tolist()):
                length = len(list(run))
                if kind == 0:
                    piece_3L = torch.arange(length).expand(3, -1)
                elif (grid := next(left[kind], None)) is not None:
                    piece_3L = _grid_positions(*grid, vision.spatial_merge_size)
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
        return position_3BL.to(device), delta_B1.to(device)

    def get_video_features(
        self, pixel_values_videos: Tensor, video_grid_thw: Any, chooses: bool = True, **kwargs: Any
    ) -> Any:
        """Return the stock output; where a scheduler chooses before the decoder, that of `encode_and_choose`."""
        encode = partial(super().get_video_features, pixel_values_videos, video_grid_thw, **kwargs)
        if not chooses or self.config.scheduler not in BEFORE_DECODER:
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
        h_BLD, chosen = self.embed(input_ids, volumes)
        return self.language_model(
            inputs_embeds=h_BLD,
            attention_mask=attention_mask,
            position_ids=position_ids,
            scheduling=None if scheduling is None else scheduling._replace(chosen=chosen),
            **kwargs,
        )

    def embed(self, input_ids_BL: Tensor, volumes: Any) -> tuple[Tensor, Selection | None]:
        """Return h_BLD, embedded text with the volumes' tokens in their places; and what was chosen of these."""
        h_BLD = self.get_input_embeddings()(input_ids_BL)
        if volumes is None:
            return h_BLD, None
        visual_ND = torch.cat(list(volumes.pooler_output)).to(h_BLD)
        is_visual_BL1 = visual_mask(input_ids_BL, self.config)[..., None]
        if (found := int(is_visual_BL1.sum())) != len(visual_ND):
            raise ValueError(
                f"expected {len(visual_ND)} visual tokens in the text, as many as the volumes give, found {found}; "
                "give every volume all its <|video_pad|> tokens: shorten the text, not the volume"
            )
        visual_ND, chosen = chosen_of(visual_ND, is_visual_BL1[..., 0], h_BLD.shape[2], self.config)
        return h_BLD.masked_scatter(is_visual_BL1, visual_ND), chosen


def _grid_positions(grid_thw: list[int], positions_per_slab: float, merge: int) -> Tensor:
    """Return int64[3, n] from 0: t grows by positions_per_slab (truncated), h and w by merged patch."""
    t, h, w = grid_thw[0], grid_thw[1] // merge, grid_thw[2] // merge
    slabs = (torch.arange(t, dtype=torch.float32) * positions_per_slab).long()
    axes = torch.meshgrid(slabs, torch.arange(h), torch.arange(w), indexing="ij")
    return torch.stack(axes).reshape(3, -1)
