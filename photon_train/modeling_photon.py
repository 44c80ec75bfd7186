"""Photon on transformers' Qwen2.5-VL: what differs is what is overridden here and in decoder.py.

volumes -> vision tower -> tokens in the text -> layers 0..its -> drop -> layers its + 1.. -> head -> losses

Legend: B rows, L tokens of a padded row, M tokens after pruning, D hidden size, N answer tokens, P patches
or tokens of a prefix, X voxels of a patch, V vocabulary; axis 3 is (t, h, w).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForImageTextToText, Qwen2_5_VLForConditionalGeneration
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLPreTrainedModel

from photon_train.checkpoint import (
    INDEX,
    check_finite,
    check_loaded,
    checkpoint_keys,
    register_published_names,
    saving,
    write_digests,
)
from photon_train.configuration_photon import IGNORED, MODEL_TYPE, Phase, PhotonConfig, config_for, layout_of, phase_at
from photon_train.decoder import PhotonModel
from photon_train.losses import answer_losses, answer_shares, answers_of, band_losses
from photon_train.prefix import Prefix
from photon_train.scheduling import (
    Scheduled,
    SchedulingInputs,
    foreground_share,
    is_passive,
    prefix_length,
    scheduling_inputs,
    visual_mask,
)

PER_TOKEN_INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids", "question_mask", "foreground")
PREFILL_ONLY = ("question_mask", "foreground", "pixel_values_videos", "mm_encoder_outputs", "prefix")


@dataclass
class PhotonOutput(ModelOutput):
    """Losses are means over the answer tokens of the batch; a row's band loss is weighted by its number of them."""

    loss: Tensor | None = None  # 0-d, ce + band + robustness + flip
    logits: Tensor | None = None  # float[B, M, V]; in training float[N, V], where an answer token is predicted
    ce: Tensor | None = None
    band: Tensor | None = None
    robustness: Tensor | None = None
    flip: Tensor | None = None
    answer_labels_N: Tensor | None = None  # what those positions should predict
    answer_rows_N: Tensor | None = None  # the row of each of them
    scheduled: Scheduled | None = None
    rope_deltas: Tensor | None = None  # int64[B, 1], next position minus L
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class PhotonForConditionalGeneration(Qwen2_5_VLForConditionalGeneration):
    """Photon: answers questions about CT volumes."""

    config: PhotonConfig
    config_class = PhotonConfig
    _no_split_modules = ["Qwen2_5_VLDecoderLayer", "PhotonDecoderLayer", "Qwen2_5_VLVisionBlock"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["atp"]  # noqa: RUF012 - rounded to bfloat16, a threshold would move in leaps

    def __init__(self, config: PhotonConfig) -> None:
        Qwen2_5_VLPreTrainedModel.__init__(self, config)  # the stock __init__ would build the stock model
        self.model = PhotonModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        config: PhotonConfig | None = None,
        stage: int | None = None,
        verify: bool = True,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Return the model of a local directory or hub id (with `revision`): Qwen2.5-VL, Photon stage 1 or stage 2.

        Takes what transformers takes: dtype, device_map, attn_implementation, output_loading_info (returns a pair) ...
        `stage=2` adds a fresh threshold predictor to a checkpoint without one. A Qwen2.5-VL checkpoint gets a fresh 3D
        patch embedding. Settings of PhotonConfig may be given by name. Raises ValueError for pickles, for any other
        missing, unexpected or misshapen key, for a weight that is not finite, and where a file is not as its
        digests.json says (`verify`).
        """
        path_or_id = str(pretrained_model_name_or_path)
        layout = layout_of(checkpoint_keys(path_or_id, verify, **kwargs))
        if config is None:
            fields = PhotonConfig.__dataclass_fields__.keys() - {"dtype"}  # which says how to load
            settings = {name: kwargs.pop(name) for name in list(kwargs) if name in fields}
            config = config_for(path_or_id, layout, stage, settings, **kwargs)
        kwargs |= {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
        loaded: Any = super().from_pretrained(path_or_id, config=config, **kwargs)
        model, info = loaded
        check_loaded(info, layout, config.stage)
        check_finite(model)
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: str | os.PathLike[Any], *args: Any, **kwargs: Any) -> None:
        """Write what `from_pretrained` reads, and its digests. OSError on a full disk."""
        with saving(folder := Path(save_directory)):
            super().save_pretrained(folder, *args, **kwargs)
        write_digests(folder, [*folder.glob("model*.safetensors"), INDEX, "config.json", "generation_config.json"])

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
        foreground: Tensor | None = None,
        question_tokens: int | None = None,
        answers: Tensor | None = None,
        perturbed: Tensor | None = None,
        flip: Tensor | None = None,
        step: int | None = None,
        total_steps: int | None = None,
        prefix: Prefix | int | None = None,
        group_sizes: Sequence[int] = (),
        answer_weights: Tensor | None = None,
        loss_scale: float = 1.0,
        answers_only: bool = False,
        **kwargs: Any,
    ) -> PhotonOutput:
        """Return a PhotonOutput. Raises ValueError for images, and for volumes that do not match the visual tokens.

        question_mask bool[B, L], foreground float[B, L] (shares): default, found from the ids and the volumes.
        question_tokens: of the longest question; answers: what `losses.answers_of` makes of labels. Who knows them, and
        position_ids and question_mask too, spares the host from waiting for the device.
        perturbed bool[B]: rows whose volume was perturbed; they are trained for robustness.
        flip bool[B]: rows to flip; default, drawn from torch's CPU generator with `flip_probability`.
        step, total_steps: optimizer step and length of the run; training without them drops tokens and flips nothing.
        prefix: what every row begins with, as `encode_prefix` returned it; or its length P: then all volumes are in
        the first P tokens, are given once, and are encoded once.
        group_sizes: how many rows, one behind the other, share each of several prefixes of one length P; () for one.
        answer_weights float[B]: what each answer token of a row counts in the losses; default, one over their number.
        loss_scale: what a trainer will multiply the loss by; the surrogate gradient is not linear in it. A row's share
        of the answer tokens counts too: a row moves the threshold as it would alone, times its share.
        answers_only: with labels, return logits at answer positions only, as in training.
        """
        if pixel_values is not None or image_grid_thw is not None:
            raise ValueError("expected a CT volume (pixel_values_videos), found an image; Photon reads 3D patches")
        if input_ids is None:
            raise ValueError("expected input_ids, found None; pass them: they say where volume and question stand")
        if past_key_values is not None and past_key_values.get_seq_length() > 0:  # a decoding step: all is in the cache
            pixel_values_videos = mm_encoder_outputs = prefix = None
            if position_ids is None:
                raise ValueError("expected position_ids, found None; pass them: a cache is shorter than its text")
        volumes: dict[str, Any] = {
            "pixel_values_videos": pixel_values_videos,
            "video_grid_thw": video_grid_thw,
            "second_per_grid_ts": second_per_grid_ts,
        }
        phase = phase_at(self.config, step, total_steps) if self.training and step is not None else Phase.HARD
        if isinstance(prefix, int):
            own = [slice(row, row + 1) for row in itertools.accumulate(group_sizes[:-1], initial=0)]
            ids_GP, position_3GP = torch.cat([input_ids[row, :prefix] for row in own]), None
            if position_ids is not None:
                position_3GP = torch.cat([position_ids[-3:, row, :prefix] for row in own], dim=1)
            prefix = self.encode_prefix({"input_ids": ids_GP, **volumes}, phase, position_3GP)
            if len(group_sizes) > 1:
                prefix = prefix.selected([group for group, rows in enumerate(group_sizes) for _ in range(rows)])
        if prefix is not None:
            volumes = prefix.volumes_of(len(input_ids))
            deep = prefix.layers > self.config.drop_layer + 1 and prefix.scheduled is None
            if deep and not is_passive(self.config, phase):
                expected = f"a prefix through {self.config.drop_layer + 1} layers"
                raise ValueError(f"expected {expected}, found one through {prefix.layers}; encode it again")

        patches_PX = volumes.get("pixel_values_videos")
        has_volumes = patches_PX is not None or bool(mm_encoder_outputs)
        schedules = prefix is not None or (has_volumes and self.config.scheduler != "none")
        rows = None
        if schedules or labels is not None:
            rows = scheduling_inputs(self.config, phase, input_ids, attention_mask, question_mask, perturbed, flip)
            rows = rows._replace(question_tokens=question_tokens)
            if labels is not None:
                answers = answers_of(labels, attention_mask) if answers is None else answers
                rows = rows._replace(loss_scale_B=loss_scale * answer_shares(answers, len(labels), answer_weights))
                if self.config.scheduler == "fastv":
                    rows = rows._replace(prompt_BL=rows.prompt_BL & ((labels != IGNORED).cumsum(1) == 0))
        if rows is not None and schedules and self.config.scheduler == "foreground":
            if foreground is None and prefix is not None:
                foreground = F.pad(prefix.foreground_1P, (0, input_ids.shape[1] - prefix.length))
            elif foreground is None:
                foreground = foreground_share(rows.visual_BL, patches_PX, self.config)
            rows = rows._replace(foreground_BL=foreground.expand(input_ids.shape))

        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=False if use_cache is None and labels is not None else use_cache,
            mm_token_type_ids=mm_token_type_ids,
            mm_encoder_outputs=mm_encoder_outputs,
            scheduling=rows if schedules else None,
            prefix=prefix,
            **volumes,
            **kwargs,
        )
        scheduled, h_BMD = getattr(outputs, "scheduled", None), outputs.last_hidden_state
        if rows is None or answers is None:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            answered = {"logits": self.lm_head(h_BMD[:, kept])}
        else:
            only = answers_only or self.training
            answered = self._losses(h_BMD, answers, scheduled, rows, perturbed is not None, only, answer_weights)
        return PhotonOutput(
            **answered,
            scheduled=None if scheduled is None else scheduled.detached(),
            rope_deltas=self.model.rope_deltas,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _losses(
        self,
        h_BMD: Tensor,
        answers: Tensor,
        scheduled: Scheduled | None,
        rows: SchedulingInputs,
        is_perturbed: bool,
        answers_only: bool,
        weights_B: Tensor | None,
    ) -> dict[str, Tensor]:
        """Return the fields of PhotonOutput from `loss` to `answer_rows_N`."""
        rows_N, columns_N, labels_N = answers
        flipped_B = torch.zeros_like(rows.flip_B)
        if scheduled is not None:
            columns_N = scheduled.kept.place_BL[rows_N, columns_N]
            flipped_B = scheduled.flipped_B
        # The head is most of the memory of a step: in training, only where there is something to predict.
        place_N = rows_N * h_BMD.shape[1] + columns_N
        logits = self.lm_head(h_BMD.flatten(0, 1).index_select(0, place_N) if answers_only else h_BMD)
        logits_NV = logits if answers_only else logits.flatten(0, 1).index_select(0, place_N)
        perturbed_B = rows.perturbed_B if is_perturbed else None
        how = (perturbed_B, flipped_B, self.config.flip_epsilon, weights_B)
        parts = answer_losses(logits_NV, labels_N, rows_N, *how)._asdict()
        parts["band"] = torch.zeros_like(parts["ce"])
        if self.training and scheduled is not None and rows.phase is not Phase.DENSE:
            # of the rows whose tokens a threshold decided and that are trained to answer
            counts_B = ~(rows.detached_B | scheduled.selection.threshold_B.isnan())
            p_BL, (low, high) = scheduled.selection.probability_BL, (self.config.band_low, self.config.band_high)
            share_B = answer_shares(answers, len(p_BL), weights_B)
            parts["band"] = (band_losses(p_BL, rows.visual_BL, low, high) * counts_B * share_B).sum()
        loss: Any = sum(parts.values())
        if self.training and not loss.requires_grad:  # text alone, in stage 1: every device needs a gradient, here of 0
            loss = loss + 0 * sum(p.sum() for p in self.parameters() if p.requires_grad)
        return {"loss": loss, **parts, "logits": logits, "answer_labels_N": labels_N, "answer_rows_N": rows_N}

    def encode_prefix(
        self, inputs: Mapping[str, Any], phase: Phase = Phase.HARD, position_31P: Tensor | None = None
    ) -> Prefix:
        """Return the prefix of one row of inputs, to its last <|vision_end|>. Raises ValueError if there is none.

        Rows without padding that are prefixes of one length give prefixes in one: a row of every tensor for each.
        It goes through all layers where no question decides what stays of it, else to the layer that drops.
        position_31P: of inputs that hold the prefix and nothing else, made together with them.
        """
        ids_1P, mask_BL = inputs["input_ids"].to(self.device), inputs.get("attention_mask")
        if mask_BL is not None:
            if len(ids_1P) != 1:
                raise ValueError(
                    f"expected one row, found {len(ids_1P)}; encode one volume or set of volumes at a time"
                )
            ids_1P = ids_1P[:, mask_BL[0].bool()]
        if position_31P is None:
            ids_1P = ids_1P[:, : prefix_length(ids_1P[0], self.config)]
        names = ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts")
        volumes = {name: torch.as_tensor(inputs[name]) for name in names if inputs.get(name) is not None}
        patches_PX = volumes.pop("pixel_values_videos", None)  # the others are for the host, and stay where they are
        if patches_PX is None or not ids_1P.numel():
            raise ValueError("expected a row with a whole volume, found no <|vision_end|> or no patches; pass both")
        patches_PX = patches_PX.to(self.device)
        grid_thw, text, scheduled = volumes["video_grid_thw"], self.model.language_model, None
        rows = scheduling_inputs(self.config, phase, ids_1P, question_BL=torch.zeros_like(ids_1P))  # they come later
        encoded = self.model.get_video_features(patches_PX, grid_thw, chooses=rows.drops, return_dict=True)
        h_1PD, chosen = self.model.embed(ids_1P, encoded, checked=position_31P is not None)
        if position_31P is None:
            position_31P, _ = self.model.get_rope_index(ids_1P, **volumes)
        layers = len(text.layers) if is_passive(self.config, phase) else self.config.drop_layer + 1
        if chosen is not None:
            h_1PD, position_31P, scheduled = text.choose(h_1PD, position_31P, rows._replace(chosen=chosen))
            layers = len(text.layers)
        h_1PD, q_1HPd, k_1KPd, keys_values = text.prefix_through(layers, h_1PD, position_31P)
        return Prefix(
            input_ids_1P=ids_1P,
            volumes=volumes,
            keys_values=keys_values,
            h_1PD=h_1PD,
            q_1HPd=q_1HPd,
            k_1KPd=k_1KPd,
            foreground_1P=foreground_share(visual_mask(ids_1P, self.config), patches_PX, self.config),
            scheduled=scheduled,
        )

    def answer(self, prefix: Prefix, questions: Sequence[Tensor], pad_token_id: int = 0, **kwargs: Any) -> Any:
        """Return the answers' ids int64[K, n], padded behind the end marker, for `PhotonProcessor.questions`.

        kwargs are generate's. With return_dict_in_generate=True, return what generate returns, prompts included.
        """
        rows = prefix.followed_by(questions, pad_token_id)
        found: Any = self.generate(**rows, **{"do_sample": False, "pad_token_id": pad_token_id, **kwargs})
        return found[:, rows["input_ids"].shape[1] :] if isinstance(found, Tensor) else found

    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Return what the stock generate does, for rows padded on either side. Raises ValueError without a cache."""
        if kwargs.get("use_cache") is False:
            raise ValueError("expected use_cache=True, found False; leave it out: only the cache has what was kept")
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() and self.config.scheduler != "none":
            raise ValueError(
                f"expected no past_key_values, found {cache.get_seq_length()} tokens of an earlier answer: which those "
                "are cannot be told once some were dropped; pass the whole conversation alone"
            )
        kwargs["use_cache"] = True  # whatever a file says that training wrote
        if inputs is not None:
            kwargs["input_ids"] = inputs
        ids_BL: Any = kwargs.get("input_ids")
        if ids_BL is not None and kwargs.get("video_grid_thw") is not None and kwargs.get("mm_token_type_ids") is None:
            kwargs["mm_token_type_ids"] = 2 * visual_mask(ids_BL, self.config).long()
        # generate encodes the volumes and forgets their patches
        if self.config.scheduler == "foreground" and (patches_PX := kwargs.get("pixel_values_videos")) is not None:
            kwargs["foreground"] = foreground_share(visual_mask(ids_BL, self.config), patches_PX, self.config)
        mask_BL = kwargs.get("attention_mask")
        if mask_BL is not None and kwargs.get("prefix") is None:  # padding to the left: [a b c .] -> [. a b c]
            order_BL = mask_BL.bool().to(torch.uint8).argsort(dim=1, stable=True)
            given = [name for name in PER_TOKEN_INPUTS if kwargs.get(name) is not None]
            kwargs |= {name: kwargs[name].gather(1, order_BL) for name in given}
        return super().generate(**kwargs)  # type: ignore[misc]

    def _update_model_kwargs_for_generation(self, outputs: Any, model_kwargs: Any, *args: Any, **kwargs: Any) -> Any:
        if outputs.scheduled is not None:  # the cache is now shorter than the prompt, by a different length per row
            model_kwargs["attention_mask"] = outputs.scheduled.kept.mask_BM.long()
        for name in PREFILL_ONLY:
            model_kwargs.pop(name, None)
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = None, every_n_layers: int = 1
    ) -> None:
        """Refuse the reentrant kind: what a layer gets by name, or returns beside h, loses its gradient there."""
        function = gradient_checkpointing_func or partial(checkpoint, use_reentrant=False)
        if enable and getattr(function, "keywords", {}).get("use_reentrant", True):
            raise ValueError(
                "expected gradient checkpointing without reentry, found the kind that loses the gradient of the "
                "threshold; pass gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        super()._set_gradient_checkpointing(enable, function, every_n_layers)


register_published_names("PhotonForConditionalGeneration")
AutoConfig.register(MODEL_TYPE, PhotonConfig)
AutoModelForImageTextToText.register(PhotonConfig, PhotonForConditionalGeneration)
