"""One volume, many questions: everything up to the end of the last volume is computed once, through layer its.

Legend: K questions, P tokens of the prefix, L tokens of a whole row, Q of the longest question; other
axes as in decoder.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from photon_train.packing import behind, prefix_length, visual_mask

if TYPE_CHECKING:
    from photon_train.modeling_photon import PhotonForConditionalGeneration

PER_VOLUME = ("video_grid_thw", "second_per_grid_ts")


class Prefix(NamedTuple):
    """What is the same for every question. Never modified; with gradients, a part of the graph."""

    input_ids_1P: Tensor
    volumes: dict[str, Tensor]  # video_grid_thw, second_per_grid_ts
    keys_values: tuple[tuple[Tensor, Tensor], ...]  # of layers 0..its, each [1, K heads, P, d]
    h_1PD: Tensor  # after layer its
    q_1HPd: Tensor  # of layer its, rotated
    k_1KPd: Tensor
    body_1P: Tensor  # share of body voxels, for the foreground scheduler

    @property
    def length(self) -> int:
        """P."""
        return self.input_ids_1P.shape[1]

    def into(self, cache: Cache, rows: int) -> Cache:
        """Return the cache with layers 0..its holding a copy of the prefix for each row."""
        for layer, (keys, values) in enumerate(self.keys_values):
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), layer)
        return cache

    def followed_by(self, questions: Sequence[Tensor], pad_token_id: int = 0) -> dict[str, Any]:
        """Return model inputs for K rows: the prefix, padding, a question's ids.

        For training, give labels of the same shape beside them: -100 over the prefix and the padding.
        Raises ValueError for an empty question.
        """
        if not questions or any(len(question) == 0 for question in questions):
            raise ValueError(f"questions of at least one token wanted, got lengths {[len(q) for q in questions]}")
        input_ids = behind(self.input_ids_1P, questions, pad_token_id)
        mask = behind(torch.ones_like(self.input_ids_1P), [torch.ones_like(question) for question in questions], 0)
        volumes = {name: torch.cat([value] * len(questions)) for name, value in self.volumes.items()}
        return {"input_ids": input_ids, "attention_mask": mask, "prefix": self, **volumes}


def encode_prefix(model: PhotonForConditionalGeneration, inputs: Mapping[str, Any]) -> Prefix:
    """Return the prefix of one row of model inputs: its tokens up to the last <|vision_end|>.

    Raises ValueError for a batch, and for a row without a whole volume.
    """
    ids_1P = _up_to_last_volume(model, inputs)
    volumes = {name: torch.as_tensor(inputs[name]).to(model.device) for name in PER_VOLUME if inputs.get(name) is not None}
    position_31P, _ = model.model.get_rope_index(ids_1P, **volumes)
    patches_PX = inputs["pixel_values_videos"].to(model.device)
    encoded = model.model.get_video_features(patches_PX, volumes["video_grid_thw"], return_dict=True)
    h_1PD, q_1HPd, k_1KPd, cache = model.model.language_model.through_its(model.model.embed(ids_1P, encoded), position_31P)
    return Prefix(
        input_ids_1P=ids_1P,
        volumes=volumes,
        keys_values=tuple((layer.keys, layer.values) for layer in cache.layers if layer.is_initialized),
        h_1PD=h_1PD,
        q_1HPd=q_1HPd,
        k_1KPd=k_1KPd,
        body_1P=model.body_share(visual_mask(ids_1P, model.config), patches_PX, None),
    )


def answer(
    model: PhotonForConditionalGeneration,
    prefix: Prefix,
    questions: Sequence[Tensor],
    pad_token_id: int = 0,
    **kwargs: Any,
) -> Any:
    """Return the answers' ids int64[K, n], padded behind the end marker; kwargs are generate's.

    Each question is the int64[q] ids that follow the prefix, to the end of the prompt (`PhotonProcessor.questions`).
    With return_dict_in_generate=True, return what generate returns, prompts included.
    """
    rows = prefix.followed_by(questions, pad_token_id)
    found = model.generate(**rows, **{"do_sample": False, "pad_token_id": pad_token_id, **kwargs})
    return found[:, rows["input_ids"].shape[1] :] if isinstance(found, Tensor) else found


def _up_to_last_volume(model: PhotonForConditionalGeneration, inputs: Mapping[str, Any]) -> Tensor:
    ids_BL, mask_BL = inputs["input_ids"].to(model.device), inputs.get("attention_mask")
    if len(ids_BL) != 1:
        raise ValueError(f"one row wanted, got {len(ids_BL)}: a prefix belongs to one volume or set of volumes")
    if mask_BL is not None:
        ids_BL = ids_BL[:, mask_BL[0].bool()]
    length = prefix_length(ids_BL[0], model.config)
    if not length or inputs.get("pixel_values_videos") is None:
        raise ValueError("a row with a whole volume wanted, found no <|vision_end|> or no pixel_values_videos")
    return ids_BL[:, :length]
