"""A volume as the rows of patches that the vision tower reads.

Multimodal rotary positions by the rule the published weights were trained with.

After a volume, text resumes at (max over t, h, w) + 1. transformers v5 resumes at start + max(h, w),
which for 10 slabs is 243 positions earlier.

A volume and a conversation -> what the model takes.

volume -> model grid -> [0, 1] -> last axis flipped -> patches; messages -> chat template -> ids, with one <|video_pad|> per
visual token where the text says <video>.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, BatchFeature

from photon_train.configuration_photon import PhotonConfig
from photon_train.packing import IGNORED, ROLE_LINE, prefix_length, question_mask, visual_mask
from photon_train.pretrained import hub_options
from photon_train.rows import NIFTI, TAG


def patchify(volume_zyx: Tensor, slices: int, patch: int, merge: int) -> tuple[Tensor, Tensor]:
    """Return the patches float[P, slices * patch ** 2] and their grid int64[3] (t, h, w).

    Rows go slab by slab, and within a slab by blocks of merge x merge patches, because each block becomes one token; a row
    is (d, h, w) flattened. Raises ValueError when the volume is not a whole number of blocks.
    """
    block = (slices, patch * merge, patch * merge)
    if volume_zyx.ndim != 3 or any(n == 0 or n % b for n, b in zip(volume_zyx.shape, block, strict=True)):
        raise ValueError(
            f"a volume of whole blocks wanted, a multiple of {block} voxels (z, y, x), got {tuple(volume_zyx.shape)}; "
            "resample it, or crop it"
        )
    t, h, w = (n // size for n, size in zip(volume_zyx.shape, (slices, patch, patch), strict=True))
    blocks = volume_zyx.reshape(t, slices, h // merge, merge, patch, w // merge, merge, patch)
    rows = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7)
    return rows.reshape(t * h * w, slices * patch**2), torch.tensor([t, h, w])


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


VOLUME_TEXT = "<|vision_start|><|video_pad|><|vision_end|>"
SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
SPECIALS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>", "<|image_pad|>", "<image>")
LPS = ("L", "P", "S")
FPS = 1.0

Messages = str | Sequence[Mapping[str, Any]]


class Sample(NamedTuple):
    """One conversation with its volumes (paths, stores, arrays or Volumes), in the order of their tags."""

    volumes: list[Any]
    messages: list[dict[str, Any]]  # content: text with TAG where a volume stands
    name: str


class PhotonProcessor:
    """Makes model inputs. The tokenizer says how text becomes ids, the configuration how voxels become patches."""

    def __init__(self, tokenizer: Any, config: PhotonConfig) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self._check_tokens()

    @classmethod
    def from_pretrained(cls, path_or_id: str | Path, **kwargs: Any) -> Self:
        """Return the processor of a model directory or hub id. Settings of PhotonConfig may be given by name."""
        where = hub_options(kwargs)
        tokenizer = AutoTokenizer.from_pretrained(str(path_or_id), **where)
        return cls(tokenizer, PhotonConfig.from_pretrained(str(path_or_id), **kwargs))

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the tokenizer and config.json."""
        self.tokenizer.save_pretrained(directory)
        self.config.save_pretrained(directory)

    def __call__(
        self,
        volumes: Any = None,
        messages: Messages | Sequence[Messages] | None = None,
        *,
        rows: Sequence[Mapping[str, Any]] | None = None,
        for_training: bool = False,
        padding_side: str = "left",
        max_length: int | None = None,
    ) -> BatchFeature:
        """Return model inputs for one conversation, for a list of them, or for ms-swift `rows`.

        volumes: one volume or a list of them for one conversation; for a list of conversations, a list of such. A volume is
        a path (store of photon-data, or .nii.gz of the stored grid), a Volume, or an array [z, y, x] in HU.
        messages: chat messages, or a plain question, which is put behind the volumes. Text is a string with <video> tags
        or a list of parts ({"type": "text"}, {"type": "video"}; a part may carry its own volume).
        for_training: end with the given answer and add labels; else end where the assistant is to speak.

        Gives input_ids, attention_mask, mm_token_type_ids int64[B, L], question_mask bool[B, L]; with volumes also
        pixel_values_videos float32[P, X], video_grid_thw int64[V, 3], second_per_grid_ts float32[V]; labels int64[B, L], -100
        but for the answers and their end markers.
        Raises ValueError for tags that do not match the volumes, images, empty questions, special tokens in text, rows
        over max_length, and volumes of another shape.
        """
        samples = _samples(volumes, messages, rows)
        ids = [self._ids(sample, for_training, max_length) for sample in samples]
        inputs = self._padded(ids, padding_side)
        if for_training:
            labels = [self._labels(row, sample) for row, sample in zip(ids, samples, strict=True)]
            inputs["labels"] = pad_sequence(labels, batch_first=True, padding_value=IGNORED, padding_side=padding_side)
        encoded = [self.patches(volume) for sample in samples for volume in sample.volumes]
        if encoded:
            inputs["pixel_values_videos"] = torch.cat([patches for patches, _ in encoded])
            inputs["video_grid_thw"] = torch.stack([grid for _, grid in encoded])
            inputs["second_per_grid_ts"] = torch.full((len(encoded),), self.config.vision_config.temporal_patch_size / FPS)
        return BatchFeature(inputs)

    def questions(self, texts: Sequence[str]) -> list[Tensor]:
        """Return for each text the ids that follow a prefix: the question, its end, and where the assistant begins."""
        found = []
        for text in texts:
            row = self._ids(_sample([None], text, f"question {text!r}"), for_training=False, max_length=None)
            found.append(row[prefix_length(row, self.config) :])
        return found

    def ids(self, row: Mapping[str, Any], for_training: bool = False) -> Tensor:
        """Return int64[L] of one ms-swift row as `__call__` makes them, without reading its volumes."""
        return self._ids(_samples(None, None, [row])[0], for_training, max_length=None)

    def training_ids(self, row: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the ids int64[L] of one ms-swift row and its labels, as a call with for_training gives them, without voxels."""
        (sample,) = _samples(None, None, [row])
        ids = self._ids(sample, for_training=True, max_length=None)
        return ids, self._labels(ids, sample)

    def decode(self, ids: Tensor) -> list[str]:
        """Return the text of each row of ids, special tokens left out."""
        texts: list[str] = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return texts

    # --- voxels

    def patches(self, volume: Any) -> tuple[Tensor, Tensor]:
        """Return the patches float32[P, X] of a volume (path, Volume or array) and its grid int64[3]."""
        vision = self.config.vision_config
        scaled_zyx = self.scaled(_read(volume))
        return patchify(scaled_zyx.flip(-1), vision.temporal_patch_size, vision.patch_size, vision.spatial_merge_size)

    def scaled(self, hu_zyx: np.ndarray | Tensor) -> Tensor:
        """Return float32 on the model grid, in [0, 1], not flipped. Raises ValueError for another shape and for NaN."""
        hu = torch.as_tensor(np.ascontiguousarray(hu_zyx) if isinstance(hu_zyx, np.ndarray) else hu_zyx).float()
        shape, wanted = tuple(hu.shape), tuple(self.config.model_shape_zyx)
        if shape not in (wanted, tuple(self.config.stored_shape_zyx)):
            raise ValueError(
                f"a volume of shape {wanted} or {tuple(self.config.stored_shape_zyx)} (z, y, x) wanted, got {shape}; "
                "photon-data prepare makes both from any scan"
            )
        if shape != wanted:
            hu = F.interpolate(hu[None, None], size=wanted, mode="trilinear", align_corners=False)[0, 0]
        darkest, brightest = hu.aminmax()  # NaN if any voxel is, in one pass
        if not (darkest.isfinite() and brightest.isfinite()):
            raise ValueError("finite voxels wanted, got NaN or infinity; photon-data prepare says which scan has them")
        low, high = (darkest, brightest) if self.config.intensity == "minmax" else self.config.window_hu
        return (hu - low).div_(max(float(high - low), 1e-6)).clamp_(0.0, 1.0)

    def visual_tokens(self) -> int:
        """Return how many tokens a volume becomes."""
        return math.prod(self.config.tokens_thw)

    # --- text

    def _ids(self, sample: Sample, for_training: bool, max_length: int | None) -> Tensor:
        """Return int64[L] of one sample, a <|video_pad|> for every visual token."""
        text = self.tokenizer.apply_chat_template(
            [
                {**m, "content": m["content"].replace(TAG, VOLUME_TEXT) if m["role"] == "user" else m["content"]}
                for m in sample.messages
            ],
            tokenize=False,
            add_generation_prompt=not for_training,
        )
        short = torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        repeats = torch.where(visual_mask(short, self.config), self.visual_tokens(), 1)
        ids = short.repeat_interleave(repeats)
        if max_length is not None and len(ids) > max_length:
            raise ValueError(
                f"{sample.name}: at most {max_length} tokens wanted, got {len(ids)}; raise max_length (a volume alone takes "
                f"{self.visual_tokens()}) or leave the row out: cutting it would cut off the question"
            )
        return ids

    def _padded(self, ids: list[Tensor], side: str) -> dict[str, Tensor]:
        ones = [torch.ones_like(row) for row in ids]
        padding = self.tokenizer.pad_token_id
        input_ids = pad_sequence(ids, batch_first=True, padding_value=padding, padding_side=side)
        attention_mask = pad_sequence(ones, batch_first=True, padding_side=side)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "mm_token_type_ids": 2 * visual_mask(input_ids, self.config).long(),
            "question_mask": question_mask(input_ids, self.config) & attention_mask.bool(),
        }

    def _labels(self, ids: Tensor, sample: Sample) -> Tensor:
        """Return int64[L]: the ids of the assistant's words and end markers, IGNORED elsewhere and where `loss` is false."""
        starts = (ids == self.config.im_start_token_id).nonzero().flatten().tolist()
        ends = (ids == self.config.im_end_token_id).nonzero().flatten().tolist()
        labels = torch.full_like(ids, IGNORED)
        for message, start, end in zip(sample.messages, starts, ends, strict=True):
            if message["role"] == "assistant" and message.get("loss", True) in (True, None):
                answer = slice(start + ROLE_LINE, end + 1)
                labels[answer] = ids[answer]
        return labels

    def _check_tokens(self) -> None:
        """Raise ValueError unless tokenizer and configuration agree on the special tokens and the role line."""
        wanted = {
            "<|im_start|>": self.config.im_start_token_id,
            "<|im_end|>": self.config.im_end_token_id,
            "<|vision_start|>": self.config.vision_start_token_id,
            "<|vision_end|>": self.config.vision_end_token_id,
            "<|video_pad|>": self.config.video_token_id,
        }
        for token, number in wanted.items():
            if (found := self.tokenizer.convert_tokens_to_ids(token)) != number:
                raise ValueError(
                    f"{token} has id {number} in the configuration, {found} in the tokenizer; take both of one model"
                )
        line = self.tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
        if len(line) != ROLE_LINE:
            raise ValueError(f"a role line of {ROLE_LINE} tokens wanted, this tokenizer makes {len(line)}; use Qwen's")


def _samples(volumes: Any, messages: Any, rows: Any) -> list[Sample]:
    """Return the samples of a call, whichever way it was made."""
    if rows is None and messages is None and isinstance(volumes, Mapping):
        rows = [volumes]
    if rows is not None:
        return [
            _sample(row.get("videos") or [], row["messages"], str(row.get("id", f"row {i}")), row.get("images"))
            for i, row in enumerate(rows)
        ]
    if messages is None:
        raise ValueError("messages wanted, got None; pass a question or chat messages")
    if isinstance(messages, str) or not messages or isinstance(messages[0], Mapping):
        return [_sample(_listed(volumes), messages, "row 0")]
    per_row = [None] * len(messages) if volumes is None else volumes
    if len(per_row) != len(messages):
        raise ValueError(f"volumes for {len(messages)} conversations wanted, got {len(per_row)}; None stands for text only")
    return [_sample(_listed(v), m, f"row {i}") for i, (v, m) in enumerate(zip(per_row, messages, strict=True))]


def _listed(volumes: Any) -> list[Any]:
    if volumes is None:
        return []
    return list(volumes) if isinstance(volumes, list | tuple) else [volumes]


def _sample(volumes: list[Any], messages: Messages, name: str, images: Any = None) -> Sample:
    """Return a checked sample; a system message goes in front where there is none."""
    if images:
        raise ValueError(f"{name}: a CT volume wanted, got images {images}; Photon reads 3D volumes, not pictures")
    if isinstance(messages, str):
        messages = [{"role": "user", "content": TAG * len(volumes) + messages}]
    volumes, plain = list(volumes), []
    for message in messages:
        text, own = _text_of(message, name)
        volumes += own
        plain.append({**message, "content": text})
    _check(plain, len(volumes), name)
    return Sample(volumes, plain if plain[0]["role"] == "system" else [SYSTEM, *plain], name)


def _text_of(message: Mapping[str, Any], name: str) -> tuple[str, list[Any]]:
    """Return the message's text, tags for its volumes, and those volumes it carries itself."""
    content = message["content"]
    if isinstance(content, str):
        return content, []
    text, own = "", []
    for part in content:
        kind = part.get("type")
        if kind == "text":
            text += part["text"]
        elif kind in ("video", "volume"):
            text += TAG
            own += [part[kind]] if part.get(kind) is not None else []
        else:
            raise ValueError(f"{name}: parts of type text or video wanted, got {kind!r}; Photon reads CT volumes, not pictures")
    return text, own


def _check(messages: Sequence[Mapping[str, Any]], volumes: int, name: str) -> None:
    """Raise ValueError for text that would say something else than it seems to."""
    if not messages:
        raise ValueError(f"{name}: at least one message wanted, got none")
    for message in messages:
        found = [token for token in SPECIALS if token in message["content"]]
        if found:
            raise ValueError(
                f"{name}: plain text and <video> wanted, got {', '.join(found)}; leave special tokens to the template"
            )
        if TAG in message["content"] and message["role"] != "user":
            raise ValueError(f"{name}: <video> wanted in user turns only, got one in a {message['role']} turn; remove it")
        if message["role"] == "user" and not message["content"].replace(TAG, "").strip():
            raise ValueError(f"{name}: a question wanted, got an empty one; say what is asked of the volume")
    tags = sum(message["content"].count(TAG) for message in messages)
    if tags != volumes:
        raise ValueError(
            f"{name}: as many volumes as <video> tags wanted, got {volumes} volumes for {tags} tags; add or remove one"
        )


def _read(volume: Any) -> np.ndarray | Tensor:
    """Return the voxels [z, y, x] in HU of a path, a Volume or an array."""
    if isinstance(volume, np.ndarray | Tensor):
        return volume
    if isinstance(volume, str | Path):
        if str(volume).endswith(NIFTI):
            return _read_nifti(volume)
        from photon_data import open_volume

        volume = open_volume(volume, grid="model")
    voxels: np.ndarray = np.asarray(volume.array_zyx[...])
    return voxels


def _read_nifti(path: str | Path) -> np.ndarray:
    """Return [z, y, x] of a file prepared as the authors do: axes to the left, to the back, up. Others are refused."""
    import nibabel

    image: Any = nibabel.load(path)
    axes = nibabel.orientations.aff2axcodes(image.affine)
    if axes != LPS:
        raise ValueError(f"{path}: axes L, P, S (ITK's RAI) wanted, got {', '.join(axes)}; photon-data prepare resamples scans")
    voxels: np.ndarray = np.asarray(image.dataobj, dtype=np.float32)
    return voxels.transpose(2, 1, 0)
