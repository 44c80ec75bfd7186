"""Predictor: a loaded model that encodes volumes once, then generates answers about them or scores given ones.

A batch may hold questions on several volumes: a prefix has a row for each of them, which questions are put behind.

Legend: V visual tokens of a row, B rows, L tokens of a padded row, P tokens of a prefix.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from photon_data.errors import UsageError
from photon_data.files import Location
from photon_data.questions.table import VIDEO_TAG
from photon_data.store import NIFTI, read_metadata
from photon_data.volume import Volume
from photon_train.answering.generation import AnswerSettings, generate, score_choices
from photon_train.answering.request import Request, RequestGroup, answer_ids, request_of, texts_of_choices
from photon_train.costs import peak_memory_mib
from photon_train.modeling_photon import PhotonForConditionalGeneration
from photon_train.prefix import Prefix
from photon_train.processing_photon import PhotonProcessor
from photon_train.rows import Prediction, choices_of, pack_mask, volume_id_of
from photon_train.scheduling import Scheduled, visual_mask

VOLUMES = "pixel_values_videos"
NOT_FINITE = "expected finite logits, found NaN or infinity; use another checkpoint, or --dtype float32"


class ReadVolumes(NamedTuple):
    """The volumes of a group as the model reads them, on the CPU."""

    inputs: dict[str, Any]  # volumes as the processor has them stored; {} for text alone
    recipe: str = ""  # digests of the recipes that their stores were made by, "+" between them; "" where there are none
    seconds: float = 0.0


class Encoded(NamedTuple):
    """What a group shares."""

    prefix: Prefix | None  # None for text alone
    seconds_each: dict[str, float]  # by stage, each request's share
    recipe: str = ""
    row: int = 0  # of the prefix, which has a row for each group that it was computed for


class Reply(NamedTuple):
    """A prediction, and what it says of the visual tokens."""

    prediction: Prediction
    keep_V: np.ndarray  # bool, True for kept ones
    saliency_V: np.ndarray  # float32


class _Texts(NamedTuple):
    """What was generated for a row, or chosen."""

    texts: list[str]  # one, or so many samples
    token_logprobs: list[float]  # of the first
    choice_scores: dict[str, float]
    choice_scores_per_token: dict[str, float]


@dataclass
class Predictor:
    """A model that answers. `encodings` counts the volumes, or sets of them, that were encoded."""

    model: PhotonForConditionalGeneration
    processor: PhotonProcessor
    settings: AnswerSettings = field(default_factory=AnswerSettings)
    batch: int = 16  # questions that are answered together
    encodings: int = 0

    def read(self, group: RequestGroup) -> ReadVolumes:
        """Return the volumes of a group, in pinned memory for a GPU, which scales them. Any thread may call this.

        Raises what reading volumes raises.
        """
        start = time.perf_counter()
        id = volume_id_of(group.requests[0].row)
        inputs = self.processor.volumes([(video, id) for video in group.videos], as_stored=True)
        if self.model.device.type == "cuda" and inputs:
            inputs[VOLUMES] = [volume.pin_memory() for volume in inputs[VOLUMES]]
        return ReadVolumes(inputs, recipe_of(group.videos), time.perf_counter() - start)

    @torch.no_grad()
    def encode_together(self, groups: Sequence[RequestGroup], read: Sequence[ReadVolumes]) -> list[Encoded]:
        """Return what each group shares, all computed in one pass. The groups have volumes, and are of one shape."""
        with _timed(self.model) as seconds:
            ids = [self.processor.ids(group.requests[0].row)[: group.requests[0].start] for group in groups]
            facts = {name: torch.cat([one.inputs[name] for one in read]) for name in read[0].inputs if name != VOLUMES}
            stored = [volume.to(self.model.device, non_blocking=True) for one in read for volume in one.inputs[VOLUMES]]
            patches_PX = torch.cat(list(map(self.processor.patches_of, stored)))
            prefix = self.model.encode_prefix({"input_ids": torch.stack(ids), **facts, VOLUMES: patches_PX})
        self.encodings += len(groups)
        encoded = []
        for row, (group, one) in enumerate(zip(groups, read, strict=True)):
            count = len(group.requests)
            stages = {"read": one.seconds / count, "encode": seconds[0] / len(groups) / count}
            encoded.append(Encoded(prefix, stages, one.recipe, row))
        return encoded

    def encode(self, group: RequestGroup) -> Encoded:
        """Return what a group shares, which may be text alone. Raises what reading its volumes raises."""
        if not group.videos:
            return Encoded(None, {"read": 0.0, "encode": 0.0})
        return self.encode_together([group], [self.read(group)])[0]

    @torch.no_grad()
    def answer(
        self, encoded: Encoded | Sequence[Encoded], requests: Sequence[Request], streamer: Any = None, **following: Any
    ) -> list[Reply]:
        """Return a reply to each request, behind what all share, or what the group of each shares, of one shape.

        A `streamer` (of transformers) needs a single request. `following`: logits processors and stopping criteria that
        follow `generate`, a row for each request in order.
        """
        encoded = [encoded] * len(requests) if isinstance(encoded, Encoded) else encoded
        replies: dict[int, Reply] = {}
        for scored in (True, False):
            part = [i for i, r in enumerate(requests) if bool(self.settings.choices and choices_of(r.row)) == scored]
            if part:
                shared, own = [encoded[i] for i in part], [requests[i] for i in part]
                found = self._replies(shared, own, scored, streamer, following)
                replies |= dict(zip(part, found, strict=True))
        return [replies[i] for i in range(len(requests))]

    def _replies(
        self,
        encoded: Sequence[Encoded],
        requests: Sequence[Request],
        scored: bool,
        streamer: Any,
        following: Mapping[str, Any],
    ) -> Iterator[Reply]:
        with _timed(self.model) as seconds:
            copies = 1 if scored else self.settings.samples
            inputs = self._inputs(
                [one for one in encoded for _ in range(copies)], [one for one in requests for _ in range(copies)]
            )
            if scored:
                found, scheduled = self._chosen(inputs, requests)
            else:
                found, scheduled = self._generated(inputs, requests, streamer, following)
        visual_BL = visual_mask(inputs["input_ids"], self.model.config)
        text_tokens_B = (inputs["attention_mask"].bool() & ~visual_BL).sum(1).tolist()
        seen = _seen(visual_BL, scheduled)
        for number, (request, own, texts) in enumerate(zip(requests, encoded, found, strict=True)):
            keep_V, saliency_V, threshold = seen[number * copies]
            seconds_each = {**own.seconds_each, "answer": seconds[0] / len(requests)}
            prediction = Prediction(
                id=request.id,
                response=texts.texts[0],
                asked=request.digest,
                volume_id=str(request.row.get("volume_id", "")),
                scheduler=str(self.model.config.scheduler),
                visual_tokens=len(keep_V),
                kept_tokens=int(keep_V.sum()),
                text_tokens=text_tokens_B[number * copies],
                threshold=threshold,
                kept=pack_mask(keep_V),
                choice_scores=texts.choice_scores,
                choice_scores_per_token=texts.choice_scores_per_token,
                token_logprobs=[round(value, 5) for value in texts.token_logprobs],
                samples=texts.texts if copies > 1 else [],
                recipe=own.recipe,
                seconds={stage: round(value, 6) for stage, value in seconds_each.items()},
                peak_memory_mib=round(peak_memory_mib(self.model.device), 1),
            )
            if not all(map(math.isfinite, texts.token_logprobs)):
                prediction = Prediction(request.id, error=NOT_FINITE, volume_id=prediction.volume_id)
            yield Reply(prediction, keep_V, saliency_V)

    def _inputs(self, encoded: Sequence[Encoded], requests: Sequence[Request]) -> dict[str, Any]:
        """Return the model inputs of whole rows, left-padded where the questions begin."""
        places = [(one.prefix, one.row) for one in encoded if one.prefix is not None]
        if places:
            suffixes = [request.suffix_L for request in requests]
            return _rows_of(places).followed_by(suffixes, self.processor.tokenizer.pad_token_id)
        inputs = self.processor(rows=[request.row for request in requests])
        return {name: inputs[name].to(self.model.device) for name in ("input_ids", "attention_mask")}

    def _chosen(self, inputs: Mapping[str, Any], requests: Sequence[Request]) -> tuple[list[_Texts], Scheduled | None]:
        """Return for each request its likeliest choice, in the form that the prompt asks for."""
        said = [texts_of_choices(request.row) for request in requests]
        ids = [
            [answer_ids(request, text, self.processor) for text in own.values()]
            for request, own in zip(requests, said, strict=True)
        ]
        scores, scheduled = score_choices(self.model, inputs, ids)
        found = []
        for own, values in zip(said, scores, strict=True):
            sums = {choice: math.fsum(value) for choice, value in zip(own, values, strict=True)}
            means = {choice: sums[choice] / len(value) for choice, value in zip(own, values, strict=True)}
            # Where one score is not a number, no choice is the best.
            best = min(range(len(own)), key=lambda i: (math.isfinite(list(sums.values())[i]), -list(sums.values())[i]))
            found.append(_Texts([list(own.values())[best]], values[best], sums, means))
        return found, scheduled

    def _generated(
        self, inputs: Mapping[str, Any], requests: Sequence[Request], streamer: Any, following: Mapping[str, Any]
    ) -> tuple[list[_Texts], Scheduled | None]:
        """Return for each request what was generated, so many times as there are to be samples."""
        copies = self.settings.samples
        names = [f"{request.id}\n{copy}" if copy else request.id for request in requests for copy in range(copies)]
        tokenizer = self.processor.tokenizer
        made = generate(self.model, inputs, names, self.settings, tokenizer.pad_token_id, streamer, **following)
        texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in made.tokens]
        found = []
        for b in range(0, len(texts), copies):
            own = made.logprobs[b : b + copies]  # where one is not finite, it stands for all: there is no answer
            odd = (logprobs for logprobs in own if not all(map(math.isfinite, logprobs)))
            found.append(_Texts(texts[b : b + copies], next(odd, own[0]), {}, {}))
        return found, made.scheduled


@contextmanager
def _timed(model: PhotonForConditionalGeneration) -> Iterator[list[float]]:
    """Yield a list that holds the seconds of the block after it, work queued on a GPU included."""
    seconds: list[float] = []
    start = time.perf_counter()
    yield seconds
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    seconds.append(time.perf_counter() - start)


def _seen(visual_BL: Tensor, scheduled: Scheduled | None) -> list[tuple[np.ndarray, np.ndarray, float | None]]:
    """Return of each row which visual tokens were kept, their saliency, and the threshold; without volumes, of none."""
    if scheduled is None:
        return [(np.zeros(0, bool), np.zeros(0, np.float32), None)] * len(visual_BL)
    tensors = (visual_BL, scheduled.keep_BL, scheduled.selection.saliency_BL, scheduled.selection.threshold_B)
    rows = zip(*(tensor.detach().float().cpu().numpy() for tensor in tensors), strict=True)
    return [
        (keep_L[visual_L > 0] > 0, saliency_L[visual_L > 0], None if math.isnan(threshold) else float(threshold))
        for visual_L, keep_L, saliency_L, threshold in rows
    ]


def _rows_of(places: Sequence[tuple[Prefix, int]]) -> Prefix:
    """Return one prefix with a row for each place, a prefix and a row of it; of one place for all, that row alone."""
    prefixes = {id(prefix): prefix for prefix, _ in places}
    if len(set(places_of := [(id(prefix), row) for prefix, row in places])) == 1:
        places_of = places_of[:1]
    parts = []
    for key, run in groupby(places_of, lambda place: place[0]):
        rows, prefix = [row for _, row in run], prefixes[key]
        parts.append(prefix if rows == [*range(len(prefix.input_ids_1P))] else prefix.selected(rows))
    if len(parts) == 1:
        return parts[0]
    joined: Prefix = tree_map(lambda *each: torch.cat(each) if isinstance(each[0], Tensor) else each[0], *parts)
    return joined


def recipe_of(videos: Sequence[Any]) -> str:
    """Return the digests of the recipes that stores were made by, "+" between them; "" for other volumes.

    A volume in memory may have `stores` that it is made of.
    """
    places = [
        place
        for video in videos
        for place in ([str(video)] if isinstance(video, str | Path) else getattr(video, "stores", ()))
    ]
    found = (read_metadata(Location(place), "") for place in places if not place.endswith(NIFTI))
    return "+".join(dict.fromkeys(str(metadata["digest"]) for metadata in found if metadata))


def answer_questions(
    predictor: Predictor,
    questions: Sequence[str],
    volumes: Sequence[Volume],
    volume_id: str,
    seconds: Mapping[str, float],
    streamer: Any = None,
) -> tuple[list[Reply], dict[str, float]]:
    """Return replies to questions about scans, with ids q1, q2, ..., and the seconds of each stage in all.

    `volumes` are int16 HU on the grid that the model reads, and `seconds` is what "read" and "prepare" took so far.
    With a `streamer` of transformers, which is given their tokens, the questions are answered one by one. UsageError
    for a question that is empty or holds special tokens, and for a volume on another grid.
    """
    about: dict[str, Any] = {"volume_id": volume_id, "videos": list(volumes)}
    messages = ([{"role": "user", "content": VIDEO_TAG * len(volumes) + question}] for question in questions)
    rows = [{"id": f"q{number}", **about, "messages": each} for number, each in enumerate(messages, start=1)]
    try:
        group = RequestGroup(tuple(volumes), [request_of(row, predictor.processor) for row in rows])
        encoded = predictor.encode(group)
    except ValueError as error:
        raise UsageError(str(error)) from None
    seconds_each = {stage: value / len(questions) for stage, value in seconds.items()}
    seconds_each["read"] += encoded.seconds_each["read"]
    encoded = encoded._replace(seconds_each={**seconds_each, "encode": encoded.seconds_each["encode"]})
    size = predictor.batch if streamer is None else 1
    parts = (group.requests[start : start + size] for start in range(0, len(group.requests), size))
    replies = [reply for part in parts for reply in predictor.answer(encoded, part, streamer)]
    stages = [*encoded.seconds_each, "answer"]
    return replies, {stage: sum(reply.prediction.seconds.get(stage, 0.0) for reply in replies) for stage in stages}


def settings_of(predictor: Predictor) -> dict[str, Any]:
    """Return what predictions depend on besides their rows and volumes: settings, dtype, and digests of the rest.

    Those are of the configuration, the weights, and what makes ids of rows: tokenizer and chat template.
    """
    config = predictor.model.config
    # The same model may have another name or come from another version of the library.
    decisive = {k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    weights = hashlib.sha256()
    for name, value in sorted(predictor.model.state_dict().items()):
        flat = value.detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // 64)][:64]  # up to 64 evenly spaced values of every tensor
        weights.update(name.encode() + sample.float().cpu().numpy().tobytes())
    return {
        **asdict(predictor.settings),
        "scheduler": str(config.scheduler),
        "keep_ratio": config.keep_ratio,
        "dtype": str(predictor.model.dtype),
        "config": _digest(decisive),
        "weights": weights.hexdigest()[:16],
        "template": _digest(_template_of(predictor.processor.tokenizer)),
        "end": _digest(predictor.model.generation_config.eos_token_id),
    }


def _template_of(tokenizer: Any) -> list[Any]:
    """Return what decides how messages become ids."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    # How a tokenizer was last called is part of its state.
    return [tokenizer.chat_template, {k: v for k, v in state.items() if k not in ("padding", "truncation")}]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
