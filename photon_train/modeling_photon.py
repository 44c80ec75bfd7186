"""Photon on transformers' Qwen2.5-VL: what differs is what is overridden here and in decoder.py.

Legend: B rows, L tokens of a padded row, M tokens after pruning, D hidden size, N answer tokens, P patches
or tokens of a prefix, X voxels of a patch, V vocabulary; axis 3 is (t, h, w).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLModel,
    Qwen2_5_VLPreTrainedModel,
)

from photon_train.configuration_photon import PhotonConfig
from photon_train.decoder import PhotonTextModel
from photon_train.losses import Objective, Phase, answer_losses, band_losses, phase_at
from photon_train.packing import IGNORED, Gather, visual_mask
from photon_train.packing import question_mask as question_mask_of
from photon_train.prefix import Prefix, answer, encode_prefix
from photon_train.pretrained import check_loaded, checkpoint_keys, config_for, hub_options, layout_of, register_published_names
from photon_train.processing_photon import PADDING_POSITION, row_positions, volume_positions
from photon_train.scheduling import Scheduled, SchedulingInputs
from photon_train.vision import PhotonVisionTower

RAGGED_INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids", "question_mask", "body")
PREFILL_ONLY = ("question_mask", "body", "pixel_values_videos", "mm_encoder_outputs", "prefix")


@dataclass
class PhotonOutput(ModelOutput):
    """What `PhotonForConditionalGeneration` returns.

    loss = ce + band + robustness + flip, 0-d; each is the mean over the answer tokens of the batch, a row's band
    loss weighted by its share of them. logits: in training, with labels, float[N, V] at the positions that predict an answer
    token, else float[B, M, V] (M = L when nothing was scheduled).
    answer_labels_N and answer_rows_N say what those positions should predict and in which row they are. rope_deltas
    int64[B, 1]: next position minus row length.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    ce: Tensor | None = None
    band: Tensor | None = None
    robustness: Tensor | None = None
    flip: Tensor | None = None
    answer_labels_N: Tensor | None = None
    answer_rows_N: Tensor | None = None
    scheduled: Scheduled | None = None
    rope_deltas: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class PhotonModel(Qwen2_5_VLModel):
    """Vision tower and decoder. Reads volumes only; positions follow the published rule."""

    config: PhotonConfig

    def __init__(self, config: PhotonConfig) -> None:
        Qwen2_5_VLPreTrainedModel.__init__(self, config)  # the stock __init__ would build the stock decoder
        self.visual = PhotonVisionTower._from_config(config.vision_config)
        self.language_model = PhotonTextModel._from_config(config.text_config, photon=config)
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
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Return position ids int64[3, B, L], 1 at padding, and rope deltas int64[B, 1] (next position minus L)."""
        vision = self.config.vision_config
        grids = [] if video_grid_thw is None else video_grid_thw.tolist()
        seconds = [1.0] * len(grids) if second_per_grid_ts is None else torch.as_tensor(second_per_grid_ts).tolist()
        paces = [vision.tokens_per_second * s for s in seconds]
        images = iter([] if image_grid_thw is None else [(grid, 0.0) for grid in image_grid_thw.tolist()])
        videos = iter(zip(grids, paces, strict=True))

        def next_volume(kind: int) -> Tensor:
            if (found := next(images if kind == 1 else videos, None)) is None:
                raise ValueError(
                    f"a volume for every run of visual tokens wanted, got {len(grids)} for more runs; pass pixel_values_videos "
                    "and video_grid_thw of all of them"
                )
            return volume_positions(found[0], vision.spatial_merge_size, found[1])

        kind_BL = (2 * visual_mask(input_ids, self.config) if mm_token_type_ids is None else mm_token_type_ids).cpu()
        present_BL = (torch.ones_like(input_ids) if attention_mask is None else attention_mask).bool().cpu()
        position_3BL = torch.full((3, *input_ids.shape), PADDING_POSITION)
        delta_B1 = torch.zeros(len(input_ids), 1, dtype=torch.int64)
        for row, present_L in enumerate(present_BL):
            own_3L = row_positions(kind_BL[row, present_L].tolist(), next_volume)
            position_3BL[:, row, present_L] = own_3L
            delta_B1[row] = own_3L.max() + 1 - input_ids.shape[1]
        return position_3BL.to(input_ids.device), delta_B1.to(input_ids.device)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        second_per_grid_ts: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        prefix: Prefix | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the decoder's output. With a prefix, `input_ids` are still whole rows."""
        if position_ids is None:
            if past_key_values is not None and past_key_values.get_seq_length() > 0:
                raise ValueError("position_ids wanted with a filled cache, got None: the cache is shorter than the text")
            position_ids, self.rope_deltas = self.get_rope_index(
                input_ids,
                mm_token_type_ids=mm_token_type_ids,
                video_grid_thw=video_grid_thw,
                second_per_grid_ts=second_per_grid_ts,
                attention_mask=attention_mask,
            )
        volumes = mm_encoder_outputs["video"] if mm_encoder_outputs else None
        if volumes is None and pixel_values_videos is not None:
            volumes = self.get_video_features(pixel_values_videos, video_grid_thw, return_dict=True)
        own_ids_BL = input_ids if prefix is None else input_ids[:, prefix.length :]
        return self.language_model(
            inputs_embeds=self.embed(own_ids_BL, volumes),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **({} if prefix is None else {"prefix": prefix}),
            **kwargs,
        )

    def embed(self, input_ids_BL: Tensor, volumes: Any) -> Tensor:
        """Return h_BLD: embedded text, with the volumes' tokens in their places."""
        h_BLD = self.get_input_embeddings()(input_ids_BL)
        if volumes is None:
            return h_BLD
        visual_ND = torch.cat(volumes.pooler_output).to(h_BLD)
        places_BL1 = visual_mask(input_ids_BL, self.config)[..., None]
        if (wanted := int(places_BL1.sum())) != len(visual_ND):
            raise ValueError(
                f"{wanted} visual tokens are in the text, the volumes give {len(visual_ND)}: every volume wants its "
                "<|video_pad|> tokens, none cut off; shorten the text, not the volume"
            )
        return h_BLD.masked_scatter(places_BL1, visual_ND)


class PhotonForConditionalGeneration(Qwen2_5_VLForConditionalGeneration):
    """Photon: answers questions about CT volumes."""

    config: PhotonConfig
    config_class = PhotonConfig
    _no_split_modules = ["Qwen2_5_VLDecoderLayer", "PhotonDecoderLayer", "Qwen2_5_VLVisionBlock"]  # noqa: RUF012

    def __init__(self, config: PhotonConfig) -> None:
        Qwen2_5_VLPreTrainedModel.__init__(self, config)  # the stock __init__ would build the stock model
        self.model = PhotonModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, path_or_id: str, *, config: PhotonConfig | None = None, stage: int | None = None, **kwargs: Any
    ) -> Self:
        """Return the model of a local directory or hub id (with `revision`): Qwen2.5-VL, Photon stage 1 or stage 2.

        `stage=2` adds a fresh threshold predictor to a checkpoint without one. A Qwen2.5-VL checkpoint gets a fresh 3D
        patch embedding. Settings of PhotonConfig may be given by name. Raises ValueError for pickles and for any other
        missing, unexpected or misshapen key.
        """
        path_or_id = str(path_or_id)
        layout = layout_of(checkpoint_keys(path_or_id, **kwargs))
        if config is None:
            settings = {name: kwargs.pop(name) for name in list(kwargs) if name in PhotonConfig.__dataclass_fields__}
            config = config_for(path_or_id, layout, stage, **settings, **hub_options(kwargs))
        kwargs |= {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
        loaded: Any = super().from_pretrained(path_or_id, config=config, **kwargs)
        model, info = loaded
        check_loaded(info, layout, config.stage)
        return model

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        second_per_grid_ts: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: dict[str, Any] | None = None,
        question_mask: Tensor | None = None,
        body: Tensor | None = None,
        perturbed: Tensor | None = None,
        flip: Tensor | None = None,
        step: int | None = None,
        total_steps: int | None = None,
        prefix: Prefix | None = None,
        prefix_length: int | None = None,
        loss_scale: float = 1.0,
        answers_only: bool = False,
        **kwargs: Any,
    ) -> PhotonOutput:
        """Return a PhotonOutput.

        question_mask bool[B, L]: default, found from the special tokens.
        body float[B, L]: share of body voxels of each visual token, for `foreground`; default, from the volumes.
        perturbed bool[B]: rows whose volume was perturbed; they are trained for robustness.
        flip bool[B]: rows to flip; default, drawn from torch's CPU generator with `flip_probability`.
        step, total_steps: optimizer step and length of the run, for the curriculum; a training step without them
        drops tokens and flips nothing.
        prefix: what every row begins with, already computed.
        prefix_length: in place of a prefix: so many tokens of every row are the same and hold all volumes, which are given
        once (`pixel_values_videos`, `video_grid_thw`) and encoded once.
        answers_only: with labels, return logits at answer positions only, as in training: float[N, V].
        loss_scale: what a trainer will multiply the loss by; the surrogate gradient, which is not linear in it, wants to know.
        Raises ValueError for images, and for visual tokens that do not match the volumes.
        """
        if pixel_values is not None or image_grid_thw is not None:
            raise ValueError("a CT volume wanted (pixel_values_videos), got an image; Photon's vision tower reads 3D patches")
        if input_ids is None:
            raise ValueError("input_ids wanted, got None: visual and question tokens are found by their ids")
        if past_key_values is not None and past_key_values.get_seq_length() > 0:  # a decoding step: all is in the cache
            pixel_values_videos = mm_encoder_outputs = prefix = None
        if prefix_length is not None:
            prefix = self._shared_prefix(input_ids, prefix_length, pixel_values_videos, video_grid_thw, second_per_grid_ts)
            video_grid_thw = video_grid_thw.repeat(len(input_ids), 1) if video_grid_thw is not None else None
            second_per_grid_ts = second_per_grid_ts.repeat(len(input_ids)) if second_per_grid_ts is not None else None
            pixel_values_videos = None
        has_volumes = pixel_values_videos is not None or bool(mm_encoder_outputs)
        schedules = prefix is not None or (has_volumes and self.config.scheduler != "none")
        rows = None
        if schedules or labels is not None:
            phase = self._phase(step, total_steps)
            rows = self._rows(input_ids, attention_mask, question_mask, perturbed, flip, phase)
            rows = rows._replace(loss_scale=loss_scale)
        if rows is not None and schedules and self.config.scheduler == "foreground":
            body = self.body_share(rows.visual_BL, pixel_values_videos, prefix) if body is None else body
            rows = rows._replace(body_BL=body)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=False if use_cache is None and labels is not None else use_cache,
            pixel_values_videos=pixel_values_videos,
            video_grid_thw=video_grid_thw,
            second_per_grid_ts=second_per_grid_ts,
            mm_token_type_ids=mm_token_type_ids,
            mm_encoder_outputs=mm_encoder_outputs,
            scheduling=rows if schedules else None,
            prefix=prefix,
            **kwargs,
        )
        scheduled = getattr(outputs, "scheduled", None)
        h_BMD = outputs.last_hidden_state
        if labels is None:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            answered = {"logits": self.lm_head(h_BMD[:, kept])}
        else:
            assert rows is not None, "labels come with whole rows"
            answered = self._losses(h_BMD, labels, attention_mask, scheduled, rows, answers_only or self.training)
        return PhotonOutput(
            **answered,
            scheduled=None if scheduled is None else scheduled.detached(),
            rope_deltas=self.model.rope_deltas,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _shared_prefix(
        self, input_ids: Tensor, length: int, patches_PX: Tensor | None, grids: Tensor | None, seconds: Tensor | None
    ) -> Prefix:
        """Return the prefix of rows that begin alike, with gradients."""
        first = {"input_ids": input_ids[:1, :length], "pixel_values_videos": patches_PX, "video_grid_thw": grids}
        prefix = self.encode_prefix({**first, "second_per_grid_ts": seconds})
        if prefix.length != length:
            raise ValueError(f"a prefix up to the end of the last volume ({prefix.length} tokens) wanted, got {length}")
        return prefix

    def _phase(self, step: int | None, total_steps: int | None) -> Phase:
        return phase_at(self.config, step, total_steps) if self.training and step is not None else Phase.HARD

    def _rows(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        question_BL: Tensor | None,
        perturbed_B: Tensor | None,
        flip_B: Tensor | None,
        phase: Phase,
    ) -> SchedulingInputs:
        """Return what is known of each row before the decoder runs; `body_BL` is left 0."""
        if isinstance(attention_mask, dict):  # generate makes these for caches of fixed length
            raise ValueError(
                "a cache that can be shortened wanted (DynamicCache), got one of fixed length; leave cache_implementation "
                "unset, or choose scheduler='none'"
            )
        no_B = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        perturbed_B = no_B if perturbed_B is None else perturbed_B.bool().to(no_B.device)
        if flip_B is None:
            flip_B = torch.rand(len(no_B)) < self.config.flip_probability if phase is Phase.FLIP else no_B
        present_BL = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if question_BL is None:
            question_BL = question_mask_of(input_ids, self.config)
        return SchedulingInputs(
            visual_BL=visual_mask(input_ids, self.config),
            question_BL=question_BL.bool() & present_BL.bool(),
            body_BL=torch.zeros(input_ids.shape, device=input_ids.device),
            phase=phase,
            perturbed_B=perturbed_B,
            flip_B=flip_B.to(no_B.device) & ~perturbed_B,
        )

    def body_share(self, visual_BL: Tensor, patches_PX: Tensor | None, prefix: Prefix | None) -> Tensor:
        """Return float32[B, L]: the share of a visual token's voxels that are body, 0 at text."""
        body_BL = torch.zeros(visual_BL.shape, device=visual_BL.device)
        if prefix is not None:
            body_BL[:, : prefix.length] = prefix.body_1P
        elif patches_PX is not None:
            merged = self.config.vision_config.spatial_merge_size**2
            bright_P = (patches_PX > self.config.foreground_level).float().mean(1)
            body_BL = body_BL.masked_scatter(visual_BL, bright_P.unflatten(0, (-1, merged)).mean(1))
        elif visual_BL.any():
            raise ValueError("scheduler 'foreground' wants pixel_values_videos to tell body from air, got encoded volumes")
        return body_BL

    def _losses(
        self,
        h_BMD: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None,
        scheduled: Scheduled | None,
        rows: SchedulingInputs,
        answers_only: bool,
    ) -> dict[str, Tensor]:
        """Return the fields of PhotonOutput from `loss` to `answer_rows_N`."""
        if scheduled is not None:
            kept = Gather(scheduled.position_BM, scheduled.present_BM)
            labels, attention_mask = kept(labels), kept.present_BM
        targets_BM = _targets(labels, torch.ones_like(labels) if attention_mask is None else attention_mask)
        rows_N, columns_N = (targets_BM != IGNORED).nonzero(as_tuple=True)
        labels_N = targets_BM[rows_N, columns_N]
        if answers_only:  # the head is most of the memory of a step: only where there is something to predict
            logits = logits_NV = self.lm_head(h_BMD[rows_N, columns_N])
        else:
            logits = self.lm_head(h_BMD)
            logits_NV = logits[rows_N, columns_N]
        losses = answer_losses(logits_NV, labels_N, rows_N, _objective(rows, scheduled), self.config.flip_epsilon)
        share_B = torch.bincount(rows_N, minlength=len(labels)) / max(len(rows_N), 1)
        band = self._band(share_B, scheduled, rows) if self.training else torch.zeros_like(losses.ce)
        parts = {**losses._asdict(), "band": band}
        loss: Any = sum(parts.values())
        if self.training and not loss.requires_grad:  # text alone, in stage 1: a gradient of 0, so that every device has one
            loss = loss + 0 * sum(p.sum() for p in self.parameters() if p.requires_grad)
        return {
            "loss": loss,
            **parts,
            "logits": logits,
            "answer_labels_N": labels_N,
            "answer_rows_N": rows_N,
        }

    def _band(self, share_B: Tensor, scheduled: Scheduled | None, rows: SchedulingInputs) -> Tensor:
        """Return the band loss, 0-d, of the rows whose tokens a threshold decided and that are trained to answer."""
        if scheduled is None or rows.phase is Phase.DENSE:
            return torch.zeros_like(share_B[0])
        counts_B = ~(rows.detached_B | scheduled.threshold_B.isnan())
        band_B = band_losses(scheduled.probability_BL, rows.visual_BL, self.config.band_low, self.config.band_high)
        return (band_B * counts_B * share_B).sum()

    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Return what transformers' generate returns. Rows may be padded on either side.

        Raises ValueError without a cache: decoding sees the pruned keys of the prompt, which are nowhere else.
        """
        chosen = kwargs.get("generation_config") or self.generation_config
        if kwargs.get("use_cache", chosen.use_cache) is False:  # None: the default, True
            raise ValueError("use_cache=True wanted for generation, got False: what was kept of a volume is in the cache only")
        if inputs is not None:
            kwargs["input_ids"] = inputs
        ids_BL: Any = kwargs.get("input_ids")
        if ids_BL is not None and kwargs.get("video_grid_thw") is not None and kwargs.get("mm_token_type_ids") is None:
            kwargs["mm_token_type_ids"] = 2 * visual_mask(ids_BL, self.config).long()
        patches_PX = kwargs.get("pixel_values_videos")
        if self.config.scheduler == "foreground" and patches_PX is not None:  # generate encodes and forgets them
            kwargs["body"] = self.body_share(visual_mask(ids_BL, self.config), patches_PX, None)
        return super().generate(**_left_padded(kwargs))  # type: ignore[misc]

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        if outputs.scheduled is not None:  # the cache is now shorter than the prompt, by a different length per row
            model_kwargs["attention_mask"] = outputs.scheduled.present_BM.long()
        for name in PREFILL_ONLY:
            model_kwargs.pop(name, None)
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = None, every_n_layers: int = 1
    ) -> None:
        """Refuse the reentrant kind: what a layer gets by name, or returns beside h, loses its gradient there."""
        if gradient_checkpointing_func is None:
            gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        if enable and getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant", True):
            raise ValueError(
                "gradient checkpointing without reentry wanted, which may lose the gradient of the "
                "threshold; pass gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, every_n_layers)

    def encode_prefix(self, inputs: Mapping[str, Any]) -> Prefix:
        """Return what does not depend on the question; see prefix.encode_prefix."""
        return encode_prefix(self, inputs)

    def answer(self, prefix: Prefix, questions: Sequence[Tensor], **kwargs: Any) -> Any:
        """Return the answers to a batch of questions on a prefix; see prefix.answer."""
        return answer(self, prefix, questions, **kwargs)


def _objective(rows: SchedulingInputs, scheduled: Scheduled | None) -> Objective:
    """Return what each row is trained for. Only rows that a threshold decided can have been flipped."""
    if scheduled is None:
        return Objective(rows.perturbed_B, torch.zeros_like(rows.flip_B))
    return Objective(rows.perturbed_B, rows.flip_B & ~scheduled.threshold_B.isnan())


def _targets(labels_BL: Tensor, present_BL: Tensor) -> Tensor:
    """Return what each position should predict, int64[B, L]: the next token's label, IGNORED where there is none.

    Padding predicts nothing.
    """
    next_BL = F.pad(labels_BL[:, 1:], (0, 1), value=IGNORED)
    followed_BL = F.pad(present_BL[:, 1:], (0, 1)).bool()
    return next_BL.masked_fill(~(present_BL.bool() & followed_BL), IGNORED)


def _left_padded(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs of generate with each row's padding, wherever it is, moved to its left edge.

    [a b c .] -> [. a b c]
    """
    mask_BL = inputs.get("attention_mask")
    if mask_BL is None or inputs.get("prefix") is not None:
        return inputs
    order_BL = mask_BL.bool().to(torch.uint8).argsort(dim=1, stable=True)
    ragged = [name for name in RAGGED_INPUTS if inputs.get(name) is not None]
    return {**inputs, **{name: inputs[name].gather(1, order_BL) for name in ragged}}


register_published_names("PhotonForConditionalGeneration")
