"""Predictor: a loaded model that encodes a volume once, then generates answers about it or scores given ones.

A request is a row to answer. Requests that share a prefix form a group, and are answered in batches.

Legend: V visual tokens of a row, B rows, L tokens of a padded row, M tokens of a row after pruning; of scored
answers: R answers of all rows together, N tokens of the longest answer, C tokens of the vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from photon_data.errors import UsageError
from photon_data.questions.table import VIDEO_TAG
from photon_data.volume import Volume
from photon_train.answering.prediction import Prediction, choices_of, pack_mask, question_digest, without_answer
from photon_train.checkpoint import loading
from photon_train.configuration_photon import PhotonConfig
from photon_train.decoder import Prefix
from photon_train.modeling_photon import PhotonForConditionalGeneration, peak_memory_mib
from photon_train.processing_photon import PhotonProcessor
from photon_train.rows import Row, prefix_of
from photon_train.scheduling import Scheduled, prefix_length, visual_mask

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class AnswerSettings:
    """How questions are answered."""

    max_new_tokens: int = 512
    sample: bool = False  # draw from the distribution (temperature, top_p) instead of taking the likeliest token
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    choices: bool = False  # score the row's `choices` where it has some, instead of generating
    questions_per_batch: int = 16  # on one volume, answered together


class Request(NamedTuple):
    """A row to answer, without its given answer."""

    row: Row
    suffix_L: Tensor  # int64, the ids behind the shared prefix
    digest: str  # the `question_digest` of the row

    @property
    def id(self) -> str:
        """The row's id."""
        return str(self.row["id"])


class RequestGroup(NamedTuple):
    """Requests on one prefix."""

    videos: tuple[Any, ...]  # paths or Volumes; none for text alone
    requests: list[Request]

    @property
    def name(self) -> str:
        """The paths of the volumes; "" for text alone, and for volumes in memory."""
        return "\n".join(str(video) for video in self.videos if isinstance(video, str | Path))

    def batches(self, size: int) -> Iterator[list[Request]]:
        """Yield the requests, at most `size` at a time."""
        return (self.requests[start : start + size] for start in range(0, len(self.requests), size))


class Encoded(NamedTuple):
    """What a group shares."""

    prefix: Prefix | None  # None for text alone
    seconds_each: dict[str, float]  # by stage, each request's share


class Reply(NamedTuple):
    """A prediction, and what it says of the visual tokens."""

    prediction: Prediction
    keep_V: np.ndarray  # bool, True for kept ones
    saliency_V: np.ndarray  # float32


@dataclass
class Predictor:
    """A model that answers. `encodings` counts the prefixes that were computed."""

    model: PhotonForConditionalGeneration
    processor: PhotonProcessor
    settings: AnswerSettings = field(default_factory=AnswerSettings)
    encodings: int = 0

    @torch.no_grad()
    def encode(self, group: RequestGroup) -> Encoded:
        """Return what the group shares, computed once. Raises what reading its volumes raises."""
        if not group.videos:
            return Encoded(None, {"read": 0.0, "encode": 0.0})
        with _timed(self.model) as read:
            inputs = self.processor(rows=[group.requests[0].row])
        with _timed(self.model) as encode:
            prefix = self.model.encode_prefix(inputs)
        self.encodings += 1
        count = len(group.requests)
        return Encoded(prefix, {"read": read[0] / count, "encode": encode[0] / count})

    @torch.no_grad()
    def answer(
        self, encoded: Encoded, requests: Sequence[Request], streamer: Any = None, **following: Any
    ) -> list[Reply]:
        """Return a reply to each request of the group. A `streamer` (of transformers) needs a single request.

        `following`: logits processors and stopping criteria that follow `generate`, a row for each request in order.
        """
        replies: dict[str, Reply] = {}
        for scored in (True, False):
            part = [r for r in requests if bool(self.settings.choices and choices_of(r.row)) == scored]
            if part:
                found = self._replies(encoded, part, scored, streamer, following)
                replies |= {reply.prediction.id: reply for reply in found}
        return [replies[request.id] for request in requests]

    def _replies(
        self, encoded: Encoded, requests: Sequence[Request], scored: bool, streamer: Any, following: Mapping[str, Any]
    ) -> Iterator[Reply]:
        with _timed(self.model) as seconds:
            inputs = self._inputs(encoded, requests)
            scores: list[dict[str, float]] = [{} for _ in requests]
            if scored:
                choices = [[str(choice) for choice in choices_of(request.row)] for request in requests]
                ids = [
                    [answer_ids(r, c, self.processor) for c in own] for r, own in zip(requests, choices, strict=True)
                ]
                values, scheduled = score_choices(self.model, inputs, ids)
                scores = [dict(zip(own, each, strict=True)) for own, each in zip(choices, values, strict=True)]
                texts = [max(each, key=each.__getitem__) for each in scores]
            else:
                texts, scheduled = self._generate(inputs, requests, streamer, following)
        seconds_each = {**encoded.seconds_each, "answer": seconds[0] / len(requests)}
        visual_BL = visual_mask(inputs["input_ids"], self.model.config)
        text_tokens_B = (inputs["attention_mask"].bool() & ~visual_BL).sum(1).tolist()
        for b, request in enumerate(requests):
            keep_V, saliency_V, threshold = np.zeros(0, bool), np.zeros(0, np.float32), math.nan
            if scheduled is not None:
                both = (scheduled.keep_BL[b], scheduled.selection.saliency_BL[b])
                keep_V, saliency_V = (x_L[visual_BL[b]].detach().cpu().numpy() for x_L in both)
                threshold = scheduled.selection.threshold_B[b].item()
            prediction = Prediction(
                id=request.id,
                response=texts[b],
                asked=request.digest,
                volume_id=str(request.row.get("volume_id", "")),
                scheduler=str(self.model.config.scheduler),
                visual_tokens=len(keep_V),
                kept_tokens=int(keep_V.sum()),
                text_tokens=text_tokens_B[b],
                threshold=None if math.isnan(threshold) else threshold,
                kept=pack_mask(keep_V),
                choice_scores=scores[b],
                seconds={stage: round(value, 6) for stage, value in seconds_each.items()},
                peak_memory_mib=round(peak_memory_mib(self.model.device), 1),
            )
            yield Reply(prediction, keep_V, saliency_V)

    def _inputs(self, encoded: Encoded, requests: Sequence[Request]) -> dict[str, Any]:
        """Return the model inputs of whole rows, left-padded where the questions begin."""
        if encoded.prefix is not None:
            return encoded.prefix.followed_by([r.suffix_L for r in requests], self.processor.tokenizer.pad_token_id)
        inputs = self.processor(rows=[request.row for request in requests])
        return {name: inputs[name].to(self.model.device) for name in ("input_ids", "attention_mask")}

    def _generate(
        self, inputs: dict[str, Any], requests: Sequence[Request], streamer: Any, following: Mapping[str, Any]
    ) -> tuple[list[str], Scheduled | None]:
        settings = self.settings
        # Nothing is left to the generation config of the model.
        options: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if settings.sample:
            # The seed is made of the run's and the ids: the order of batches has no influence on what is drawn.
            text = "\n".join([str(settings.seed), *(request.id for request in requests)])
            torch.manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7]))
            options = {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
        passes: list[Scheduled | None] = []  # `generate` does not return what was scheduled
        hook = self.model.register_forward_hook(lambda module, args, output: passes.append(output.scheduled))
        try:
            ids_BL = self.model.generate(
                **inputs,
                **options,
                **following,
                max_new_tokens=settings.max_new_tokens,
                pad_token_id=self.processor.tokenizer.pad_token_id,
                streamer=streamer,
                repetition_penalty=1.0,  # that of Qwen's own generation config depends on the padding
            )
        finally:
            hook.remove()
        texts = self.processor.decode(ids_BL[:, inputs["input_ids"].shape[1] :])
        return texts, next((scheduled for scheduled in passes if scheduled is not None), None)


@contextmanager
def _timed(model: PhotonForConditionalGeneration) -> Iterator[list[float]]:
    """Yield a list that holds the seconds of the block after it, work queued on a GPU included."""
    seconds: list[float] = []
    start = time.perf_counter()
    yield seconds
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    seconds.append(time.perf_counter() - start)


def group_rows(rows: Sequence[Row], processor: PhotonProcessor) -> tuple[list[RequestGroup], dict[str, str]]:
    """Return the groups of rows that share a prefix, in an order that theirs does not change, and {id: why in none}."""
    requests: dict[tuple[Any, ...], list[Request]] = defaultdict(list)
    problems: dict[str, str] = {}
    for row in rows:
        try:
            request = request_of(row, processor)
            prefix = prefix_of(request.row)
        except (ValueError, KeyError, TypeError, AttributeError) as error:  # whatever a row that is no row can raise
            reason = f"expected a row of messages and videos, found one that gives {type(error).__name__}: {error}"
            problems[str(row["id"])] = str(error) if type(error) is ValueError else reason
        else:
            requests[prefix].append(request)
    groups = [
        RequestGroup(tuple(found[0].row.get("videos") or ()), sorted(found, key=lambda request: request.id))
        for found in requests.values()
    ]
    return sorted(groups, key=lambda group: (group.name, group.requests[0].id)), problems


def request_of(row: Row, processor: PhotonProcessor) -> Request:
    """Return the row as a request, without its answer. ValueError for one that cannot be asked."""
    question = without_answer(row)
    ids_L = processor.ids(question)
    return Request(question, ids_L[prefix_length(ids_L, processor.config) :].clone(), question_digest(row))


def answer_ids(request: Request, text: str, processor: PhotonProcessor) -> Tensor:
    """Return int64[N]: the ids that the assistant answers `text` with, the end marker included, as training sees them.

    ValueError where the text changes how the prompt itself becomes ids.
    """
    answered = {**request.row, "messages": [*request.row["messages"], {"role": "assistant", "content": text}]}
    ids_L, prompt_L = processor.ids(answered, for_training=True), processor.ids(request.row)
    if not ids_L[: len(prompt_L)].equal(prompt_L):
        expected = "an answer that leaves the prompt's tokens as they are"
        raise ValueError(f"{request.id}: expected {expected}, found {text!r}; remove space at its start")
    end = int((ids_L == processor.config.im_end_token_id).nonzero()[-1]) + 1
    return ids_L[len(prompt_L) : end]


@torch.no_grad()
def score_choices(
    model: PhotonForConditionalGeneration, inputs: Mapping[str, Any], choices: Sequence[Sequence[Tensor]]
) -> tuple[list[list[float]], Scheduled | None]:
    """Return log p(answer | prompt) of each answer of each prompt, the sum over its tokens, and what was scheduled.

    `inputs` are those of B prompts, which run once; `choices` are the answers to each: int64[n] ids, n > 0, the end
    marker included. The probabilities are those of generation: answers see the kept tokens only.
    """
    out = model(**inputs, use_cache=True, logits_to_keep=1)
    row_R = torch.tensor([row for row, answers in enumerate(choices) for _ in answers], device=model.device)
    ids = [ids_N.to(model.device) for answers in choices for ids_N in answers]
    token_RN, mask_RN = (pad_sequence(x, batch_first=True) for x in (ids, [torch.ones_like(ids_N) for ids_N in ids]))
    log_RNC = out.logits[row_R, -1].float().log_softmax(-1)[:, None]
    if token_RN.shape[1] > 1:
        # The other tokens follow on the pruned cache of the prompts, one copy for each answer.
        present_BM = inputs["attention_mask"] if out.scheduled is None else out.scheduled.kept.mask_BM
        out.past_key_values.batch_select_indices(row_R)
        next_B = inputs["input_ids"].shape[1] + out.rope_deltas.to(row_R.device)
        position_RN = next_B[row_R] + torch.arange(token_RN.shape[1] - 1, device=row_R.device)
        later = model(
            input_ids=token_RN[:, :-1],
            attention_mask=torch.cat([present_BM[row_R].long(), mask_RN[:, :-1]], dim=1),
            position_ids=position_RN.expand(3, -1, -1),
            past_key_values=out.past_key_values,
        )
        log_RNC = torch.cat([log_RNC, later.logits.float().log_softmax(-1)], dim=1)
    score_R = (log_RNC.gather(2, token_RN[..., None])[..., 0] * mask_RN).sum(1).cpu()
    return [part.tolist() for part in score_R.split([len(answers) for answers in choices])], out.scheduled


def answer_questions(
    predictor: Predictor,
    questions: Sequence[str],
    volume: Volume,
    volume_id: str,
    seconds: Mapping[str, float],
    streamer: Any = None,
) -> tuple[list[Reply], dict[str, float]]:
    """Return replies to questions about one volume, with ids q1, q2, ..., and the seconds of each stage in all.

    `volume` is int16 HU on the grid that the model reads, and `seconds` is what it took to "read" and "prepare" it.
    With a `streamer` of transformers, which is given their tokens, the questions are answered one by one. UsageError
    for a question that is empty or holds special tokens, and for a volume on another grid.
    """
    about: dict[str, Any] = {"volume_id": volume_id, "videos": [volume]}
    messages = ([{"role": "user", "content": VIDEO_TAG + question}] for question in questions)
    rows = [{"id": f"q{number}", **about, "messages": each} for number, each in enumerate(messages, start=1)]
    try:
        group = RequestGroup((volume,), [request_of(row, predictor.processor) for row in rows])
        encoded = predictor.encode(group)
    except ValueError as error:
        raise UsageError(str(error)) from None
    seconds_each = {stage: value / len(questions) for stage, value in seconds.items()}
    seconds_each["prepare"] += encoded.seconds_each["read"]
    encoded = encoded._replace(seconds_each={**seconds_each, "encode": encoded.seconds_each["encode"]})
    size = predictor.settings.questions_per_batch if streamer is None else 1
    replies = [reply for batch in group.batches(size) for reply in predictor.answer(encoded, batch, streamer)]
    stages = replies[0].prediction.seconds
    return replies, {stage: sum(reply.prediction.seconds[stage] for reply in replies) for stage in stages}


def load_predictor(
    model: str,
    settings: AnswerSettings = AnswerSettings(),
    *,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    **photon: Any,
) -> Predictor:
    """Return the model of a directory or hub id, ready to answer; `photon`: settings of PhotonConfig, None for its own.

    device: auto (a GPU if there is one), cpu, cuda, cuda:1. dtype: auto (bfloat16 on a GPU, else float32), float32, ...
    UsageError for what cannot be loaded.
    """
    place = _device(device)
    if dtype not in DTYPES:
        raise UsageError(f"dtype: expected one of {', '.join(DTYPES)}, found {dtype!r}")
    name = ("bfloat16" if place.type == "cuda" else "float32") if dtype == "auto" else dtype
    options: dict[str, Any] = {key: value for key, value in photon.items() if value is not None}
    options["revision"] = revision
    with loading(model):
        loaded = PhotonForConditionalGeneration.from_pretrained(model, dtype=getattr(torch, name), **options)
        tokenizer = PhotonProcessor.from_pretrained(model, **options).tokenizer
    return Predictor(loaded.eval().to(place), PhotonProcessor(tokenizer, loaded.config), settings)


def model_shape_of(model: str, revision: str | None = None) -> tuple[int, int, int]:
    """Return the shape (z, y, x) of the grid that a model reads, from its configuration alone."""
    with loading(model):
        depth, height, width = PhotonConfig.from_pretrained(model, revision=revision or "main").model_shape_zyx
    return depth, height, width


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    except RuntimeError:
        raise UsageError(f"device: expected auto, cpu, cuda or cuda:N, found {name!r}") from None
    gpus = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise UsageError(f"device: expected one of this machine, found {name!r} where torch sees {gpus} GPUs; try cpu")
    return device


def settings_of(predictor: Predictor) -> dict[str, Any]:
    """Return what predictions depend on besides their rows: settings, dtype, digests of configuration and weights."""
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
        "config": hashlib.sha256(json.dumps(decisive, sort_keys=True, default=str).encode()).hexdigest()[:16],
        "weights": weights.hexdigest()[:16],
    }
