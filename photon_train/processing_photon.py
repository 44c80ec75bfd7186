"""A volume and a conversation -> what the model takes: patches, token ids, labels, masks.

volume -> model grid -> [0, 1] -> last axis flipped -> patches; messages -> chat template -> ids, with one
<|video_pad|> per visual token where the text says <video>.

Legend: B rows, L tokens of a row, V volumes, P patches, X voxels of a patch; axis 3 is (t, h, w).
"""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoProcessor, AutoTokenizer, BatchFeature

from photon_data.questions.table import VIDEO_TAG
from photon_data.store import NIFTI, open_volume
from photon_train.checkpoint import write_digests
from photon_train.configuration_photon import IGNORED, PhotonConfig, hub_options
from photon_train.rows import volume_id_of
from photon_train.scheduling import ROLE_LINE, prefix_length, question_mask, visual_mask

VOLUME_TEXT = "<|vision_start|><|video_pad|><|vision_end|>"
SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
MARKERS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>")
SPECIALS = (*MARKERS, "<|image_pad|>", "<image>")
TEMPLATE_S = 10  # a template takes less than a millisecond

Messages = str | Sequence[Mapping[str, Any]]


class Sample(NamedTuple):
    """One conversation."""

    volumes: list[Any]  # in the order of their tags
    messages: list[dict[str, Any]]  # content: text with VIDEO_TAG where a volume stands
    name: str
    volume_id: str | None = None  # that the store of its one volume must have


class PhotonProcessor:
    """Makes model inputs. The tokenizer says how text becomes ids, the configuration how voxels become patches."""

    def __init__(self, tokenizer: Any, config: PhotonConfig) -> None:
        self.tokenizer = tokenizer
        self.config = config
        # Not all that are control are flagged special (<tool_call>), and not all that are added are control.
        added = tokenizer.added_tokens_decoder.values()
        control = (str(token) for token in added if token.special or str(token).startswith("<"))
        self.specials = tuple(dict.fromkeys([*SPECIALS, *tokenizer.all_special_tokens, *control]))
        c = config
        ids = (c.im_start_token_id, c.im_end_token_id, c.vision_start_token_id, c.vision_end_token_id, c.video_token_id)
        for name, expected in zip(MARKERS, ids, strict=True):
            if (found := tokenizer.convert_tokens_to_ids(name)) != expected:
                raise ValueError(
                    f"{name}: expected id {expected}, as in the configuration, found {found} in the tokenizer; "
                    "take both of one model"
                )
        length = len(tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"])
        if length != ROLE_LINE:
            raise ValueError(f"expected a tokenizer with role lines of {ROLE_LINE} tokens, found {length}; use Qwen's")
        if tokenizer.chat_template:  # somebody's program: told now, not of each row, where it fails or does not end
            self._text([{"role": "user", "content": "?"}], for_training=False)

    @classmethod
    def from_pretrained(cls, path_or_id: str | Path, **kwargs: Any) -> Self:
        """Return the processor of a model directory or hub id. Settings of PhotonConfig may be given by name."""
        tokenizer = AutoTokenizer.from_pretrained(str(path_or_id), **hub_options(kwargs))
        return cls(tokenizer, PhotonConfig.from_pretrained(str(path_or_id), **kwargs))

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the tokenizer and config.json, and their digests."""
        files = self.tokenizer.save_pretrained(directory)
        self.config.save_pretrained(directory)
        write_digests(Path(directory), [*files, "config.json"])

    def __call__(
        self,
        volumes: Any = None,
        messages: Messages | Sequence[Messages] | None = None,
        *,
        rows: Sequence[Mapping[str, Any]] | None = None,
        for_training: bool = False,
        padding_side: str = "left",
        max_length: int | None = None,
        as_stored: bool = False,
    ) -> BatchFeature:
        """Return model inputs for one conversation, for a list of them, or for ms-swift `rows`.

        volumes: one or a list of them for one conversation; for a list of conversations, a list of such. A volume is
        a path (store of photon-data, or .nii.gz of the stored grid), a Volume, or an array [z, y, x] in HU.
        messages: chat messages, or a plain question, which is put behind the volumes. Text is a string with <video>
        tags or a list of parts ({"type": "text"}, {"type": "video"}; a part may carry its own volume).
        for_training: end with the given answer and add labels; else end where the assistant is to speak.
        as_stored: pixel_values_videos is a list of what `patches_of` takes, half the bytes on the way to a device.

        Gives input_ids, attention_mask, mm_token_type_ids int64[B, L], question_mask bool[B, L]; with volumes also
        pixel_values_videos float32[P, X], video_grid_thw int64[V, 3], second_per_grid_ts float32[V]; labels
        int64[B, L], -100 but for the answers and their end markers.
        Raises ValueError for tags that do not match the volumes, images, empty questions, special tokens in text, rows
        over max_length, and volumes of another shape.
        """
        samples = _samples(volumes, messages, rows)
        ids = [self._ids(sample, for_training, max_length) for sample in samples]
        padded = partial(pad_sequence, batch_first=True, padding_side=padding_side)
        input_ids = padded(ids, padding_value=self.tokenizer.pad_token_id)
        attention_mask = padded([torch.ones_like(ids_L) for ids_L in ids])
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "mm_token_type_ids": 2 * visual_mask(input_ids, self.config).long(),
            "question_mask": question_mask(input_ids, self.config) & attention_mask.bool(),
        }
        if for_training:
            inputs["labels"] = padded(list(map(self._labels, ids, samples)), padding_value=IGNORED)
        of_volumes = [(volume, sample.volume_id) for sample in samples for volume in sample.volumes]
        inputs |= self.volumes(of_volumes, as_stored=as_stored)
        return BatchFeature(inputs)

    def volumes(self, volumes: Sequence[tuple[Any, str | None]], *, as_stored: bool = False) -> dict[str, Any]:
        """Return what `__call__` gives of volumes, each with the id that its store must have, if any; {} for none."""
        if not volumes:
            return {}
        stored = [self.stored(volume, volume_id) for volume, volume_id in volumes]
        seconds = float(self.config.vision_config.temporal_patch_size)  # at one slice per second
        return {
            "pixel_values_videos": stored if as_stored else torch.cat(list(map(self.patches_of, stored))),
            "video_grid_thw": torch.tensor([self.config.patches_thw] * len(stored)),
            "second_per_grid_ts": torch.full((len(stored),), seconds),
        }

    def questions(self, texts: Sequence[str]) -> list[Tensor]:
        """Return for each text the ids that follow a prefix: the question, its end, and where the assistant begins."""
        rows = [self._ids(_sample([None], text, f"question {text!r}"), for_training=False) for text in texts]
        return [ids_L[prefix_length(ids_L, self.config) :] for ids_L in rows]

    def ids(self, row: Mapping[str, Any], for_training: bool = False) -> Tensor:
        """Return int64[L] of one ms-swift row as `__call__` makes them, without reading its volumes."""
        return self._ids(_sample_of_row(row, "row 0"), for_training)

    def training_ids(self, row: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return ids and labels int64[L] of one ms-swift row as `__call__` makes them, without reading its volumes."""
        sample = _sample_of_row(row, "row 0")
        ids = self._ids(sample, for_training=True)
        return ids, self._labels(ids, sample)

    def decode(self, ids: Tensor) -> list[str]:
        """Return the text of each row of ids, special tokens left out."""
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True)

    def patches(self, volume: Any, volume_id: str | None = None) -> tuple[Tensor, Tensor]:
        """Return the patches float32[P, X] of a volume (path, Volume or array) and its grid int64[3].

        UsageError for a path to a store that is not that of `volume_id`, where one is given.
        """
        return self.patches_of(self.stored(volume, volume_id)), torch.tensor(self.config.patches_thw)

    def stored(self, volume: Any, volume_id: str | None = None) -> Tensor:
        """Return what `patches_of` takes: int16 HU [z, y, x] where a volume has them on the model grid, else patches.

        Raises what `patches` does.
        """
        found = _read(volume, volume_id)
        voxels = torch.as_tensor(np.ascontiguousarray(found) if isinstance(found, np.ndarray) else found)
        whole = voxels.dtype == torch.int16 and voxels.shape == torch.Size(self.config.model_shape_zyx)
        return voxels if whole else self._patchified(self.scaled(voxels))

    def patches_of(self, stored: Tensor) -> Tensor:
        """Return float32[P, X] on the device of what `stored` returned. The values are the same on every device."""
        if stored.dtype != torch.int16:
            return stored
        return self._in_unit_range(self._patchified(stored))  # in this order half the bytes change their place

    def _patchified(self, volume_zyx: Tensor) -> Tensor:
        vision = self.config.vision_config
        sizes = (vision.temporal_patch_size, vision.patch_size, vision.spatial_merge_size)
        return patchify(volume_zyx.flip(-1), *sizes)[0]

    def scaled(self, hu_zyx: np.ndarray | Tensor) -> Tensor:
        """Return float32 on the model grid, in [0, 1], not flipped. Raises ValueError for another shape and for NaN."""
        given = torch.as_tensor(np.ascontiguousarray(hu_zyx) if isinstance(hu_zyx, np.ndarray) else hu_zyx)
        hu = given.float()
        found, model, stored = map(tuple, (hu.shape, self.config.model_shape_zyx, self.config.stored_shape_zyx))
        if found not in (model, stored):
            raise ValueError(
                f"expected a volume of shape {model} or {stored} (z, y, x), found {found}; "
                "photon-data prepare makes both from any scan"
            )
        if found != model:
            hu = F.interpolate(hu[None, None], size=model, mode="trilinear", align_corners=False)[0, 0]
        return self._in_unit_range(hu)

    def _in_unit_range(self, hu: Tensor) -> Tensor:
        """Return float32 in [0, 1] of int16 or float32, whatever the order of the voxels."""
        low, high = (end.float() for end in hu.aminmax())  # NaN if any voxel is, in one pass
        if hu.is_floating_point() and not (low.isfinite() and high.isfinite()):
            raise ValueError("expected finite voxels, found NaN or infinity; photon-data prepare says in which scan")
        width = high - low
        if self.config.intensity == "window":
            darkest, brightest = self.config.window_hu
            # Tensors: by a number that the host has, a GPU would not divide but multiply by its inverse.
            low, width = torch.full_like(low, darkest), torch.full_like(low, brightest - darkest)
        return (hu - low).div_(width.clamp_min(1e-6)).clamp_(0.0, 1.0)

    def visual_tokens(self) -> int:
        """Return how many tokens a volume becomes."""
        return math.prod(self.config.tokens_thw)

    def _ids(self, sample: Sample, for_training: bool, max_length: int | None = None) -> Tensor:
        """Return int64[L] of one sample, a <|video_pad|> for every visual token. ValueError for special tokens."""
        for message in sample.messages:
            if special := [token for token in self.specials if token in message["content"]]:
                raise ValueError(
                    f"{sample.name}: expected plain text and <video>, found {', '.join(special)}; leave special tokens "
                    "to the template"
                )
        text = self._text(
            [{**m, "content": m["content"].replace(VIDEO_TAG, VOLUME_TEXT)} for m in sample.messages], for_training
        )
        short = torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        ids = short.repeat_interleave(torch.where(visual_mask(short, self.config), self.visual_tokens(), 1))
        if max_length is not None and len(ids) > max_length:
            raise ValueError(
                f"{sample.name}: expected at most {max_length} tokens, found {len(ids)}; raise max_length (a volume "
                f"alone takes {self.visual_tokens()}) or leave the row out: cutting it would cut off the question"
            )
        return ids

    def _text(self, messages: Sequence[Mapping[str, Any]], for_training: bool) -> str:
        """Return what the model's chat template makes of messages; ValueError where it takes TEMPLATE_S seconds."""
        with _alarm(TEMPLATE_S, "expected a chat template that ends, found one that does not; is it the model's own?"):
            text: str = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=not for_training
            )
        return text

    def _labels(self, ids: Tensor, sample: Sample) -> Tensor:
        """Return int64[L]: the assistant's words and end markers; IGNORED elsewhere and where `loss` is false."""
        starts = (ids == self.config.im_start_token_id).nonzero().flatten().tolist()
        ends = (ids == self.config.im_end_token_id).nonzero().flatten().tolist()
        labels = torch.full_like(ids, IGNORED)
        for message, start, end in zip(sample.messages, starts, ends, strict=True):
            if message["role"] == "assistant" and message.get("loss", True) in (True, None):
                answer = slice(start + ROLE_LINE, end + 1)
                labels[answer] = ids[answer]
        return labels


@contextmanager
def _alarm(seconds: float, message: str) -> Iterator[None]:
    """Raise ValueError(message) in the block once it takes so long; in the main thread only, which gets signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> NoReturn:
        raise ValueError(message)

    before = signal.signal(signal.SIGALRM, stop)
    pending_s, _ = signal.setitimer(signal.ITIMER_REAL, seconds)  # of a lost Ctrl-C that is to come again
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, pending_s)


def _samples(volumes: Any, messages: Any, rows: Any) -> list[Sample]:
    if rows is None and messages is None and isinstance(volumes, Mapping):
        rows = [volumes]
    if rows is not None:
        return [_sample_of_row(row, f"row {i}") for i, row in enumerate(rows)]
    if messages is None:
        raise ValueError("expected messages, found None; pass a question or chat messages")
    if isinstance(messages, str) or not messages or isinstance(messages[0], Mapping):
        volumes, messages = [volumes], [messages]
    volumes = [None] * len(messages) if volumes is None else volumes
    if len(volumes) != len(messages):
        raise ValueError(f"expected volumes of {len(messages)} conversations, found {len(volumes)}; None is text only")
    of_each = [[] if v is None else list(v) if isinstance(v, list | tuple) else [v] for v in volumes]
    return [_sample(v, m, f"row {i}") for i, (v, m) in enumerate(zip(of_each, messages, strict=True))]


def _sample_of_row(row: Mapping[str, Any], name: str) -> Sample:
    name = str(row.get("id", name))
    if row.get("images"):
        raise ValueError(f"{name}: expected a CT volume, found images {row['images']}; Photon reads 3D volumes")
    return _sample(row.get("videos") or [], row["messages"], name)._replace(volume_id=volume_id_of(row))


def _sample(volumes: Sequence[Any], messages: Messages, name: str) -> Sample:
    """Return a checked sample; a system message goes in front where there is none."""
    if isinstance(messages, str):
        messages = [{"role": "user", "content": VIDEO_TAG * len(volumes) + messages}]
    volumes, plain = list(volumes), []
    for message in messages:
        parts, text = message["content"], ""
        for part in [{"type": "text", "text": parts}] if isinstance(parts, str) else parts:
            kind = part.get("type")
            if kind not in ("text", "video", "volume"):
                raise ValueError(f"{name}: expected parts of type text or video, found {kind!r}; take the others out")
            text += part["text"] if kind == "text" else VIDEO_TAG
            if kind != "text" and part.get(kind) is not None:  # the part carries its volume
                volumes.append(part[kind])
        plain.append({**message, "content": text})
    _check(plain, len(volumes), name)
    return Sample(volumes, plain if plain[0]["role"] == "system" else [SYSTEM, *plain], name)


def _check(messages: Sequence[Mapping[str, Any]], volumes: int, name: str) -> None:
    """Raise ValueError where <video> tags and volumes do not match, or text is empty."""
    if not messages:
        raise ValueError(f"{name}: expected at least one message, found none; add a question")
    for role, content in ((message["role"], message["content"]) for message in messages):
        if VIDEO_TAG in content and role != "user":
            raise ValueError(f"{name}: expected <video> in user turns only, found one in a {role} turn; remove it")
        if role == "user" and not content.replace(VIDEO_TAG, "").strip():
            raise ValueError(f"{name}: expected a question, found an empty one; say what is asked of the volume")
    tags = sum(message["content"].count(VIDEO_TAG) for message in messages)
    if tags != volumes:
        raise ValueError(
            f"{name}: expected as many volumes as <video> tags, found {volumes} volumes for {tags} tags; match them"
        )


def _read(volume: Any, volume_id: str | None = None) -> np.ndarray | Tensor:
    """Return the voxels [z, y, x] in HU of a path, a Volume or an array."""
    if isinstance(volume, np.ndarray | Tensor):
        return volume
    if isinstance(volume, str | Path):
        if str(volume).endswith(NIFTI):
            return _read_nifti(volume)
        volume = open_volume(volume, grid="model", id=volume_id)
    return np.asarray(volume.array_zyx[...])


def _read_nifti(path: str | Path) -> np.ndarray:
    """Return [z, y, x] of a file prepared as the authors do: axes to the left, to the back, up. Refuse others."""
    import nibabel  # late: stores do not need it

    image: Any = nibabel.load(path)
    axes = nibabel.orientations.aff2axcodes(image.affine)
    if axes != ("L", "P", "S"):
        raise ValueError(
            f"{path}: expected axes L, P, S (ITK's RAI), found {', '.join(axes)}; photon-data prepare resamples scans"
        )
    return np.asarray(image.dataobj, dtype=np.float32).transpose(2, 1, 0)


def patchify(volume_zyx: Tensor, slices: int, patch: int, merge: int) -> tuple[Tensor, Tensor]:
    """Return the patches float[P, slices * patch ** 2] and their grid int64[3] (t, h, w).

    Rows go slab by slab, and within a slab by blocks of merge x merge patches, because each block becomes one token.
    A row is (d, h, w) flattened. Raises ValueError when the volume is not a whole number of blocks.
    """
    block = (slices, patch * merge, patch * merge)
    if volume_zyx.ndim != 3 or any(n == 0 or n % b for n, b in zip(volume_zyx.shape, block, strict=True)):
        found = tuple(volume_zyx.shape)
        raise ValueError(
            f"expected a shape (z, y, x) in multiples of {block} voxels, found {found}; resample or crop it"
        )
    t, h, w = (n // size for n, size in zip(volume_zyx.shape, (slices, patch, patch), strict=True))
    blocks = volume_zyx.reshape(t, slices, h // merge, merge, patch, w // merge, merge, patch)
    rows = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7)
    return rows.reshape(t * h * w, slices * patch**2), torch.tensor([t, h, w])


AutoProcessor.register(PhotonConfig, PhotonProcessor)
