"""A prefix, once; then answers to questions on it, with what was kept for each.

Legend: V visual tokens of a row, B rows, L tokens of a padded row.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from photon_train.choices import score_choices
from photon_train.grouping import Group, Prompt, answer_ids, seed_of
from photon_train.layout import visual_mask
from photon_train.memory import peak_memory_mib
from photon_train.modeling_photon import PhotonForConditionalGeneration
from photon_train.predictions import Prediction, pack_mask
from photon_train.prefix import Prefix
from photon_train.processing_photon import PhotonProcessor
from photon_train.scheduling import Scheduled


@dataclass(frozen=True)
class AnswerSettings:
    """How questions are answered.

    sample               draw from the distribution (temperature, top_p) instead of taking the likeliest token
    choices              score the row's `choices` where it has some, instead of generating
    questions_per_batch  questions on one volume that are answered together
    """

    max_new_tokens: int = 512
    sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    choices: bool = False
    questions_per_batch: int = 16


class Reply(NamedTuple):
    """A prediction, and of each visual token whether it was kept (bool[V]) and how salient it is (float32[V])."""

    prediction: Prediction
    keep_V: np.ndarray
    saliency_V: np.ndarray


class Encoded(NamedTuple):
    """What the questions of a group share: the prefix (None for text alone), and the seconds it took."""

    prefix: Prefix | None
    seconds: dict[str, float]


@dataclass
class Asker:
    """A model that answers. `encodings` counts how often a prefix was computed."""

    model: PhotonForConditionalGeneration
    processor: PhotonProcessor
    settings: AnswerSettings = field(default_factory=AnswerSettings)
    encodings: int = 0

    @torch.no_grad()
    def encode(self, group: Group) -> Encoded:
        """Return what the group shares, computed once. Raises what reading its volumes raises."""
        if not group.videos:
            return Encoded(None, {"read": 0.0, "encode": 0.0})
        with _timed(self.model) as read:
            inputs = self.processor(rows=[group.prompts[0].row])
        with _timed(self.model) as encode:
            prefix = self.model.encode_prefix(inputs)
        self.encodings += 1
        return Encoded(prefix, {"read": read[0], "encode": encode[0]})

    @torch.no_grad()
    def answer(self, encoded: Encoded, prompts: Sequence[Prompt], streamer: Any = None) -> list[Reply]:
        """Return a reply for each prompt of the group; `streamer` (of transformers) is given the tokens of a single prompt.

        Seconds to read and encode are left to the caller, who knows how many share them; those to answer are shared here.
        """
        closed = {prompt.id for prompt in prompts if self.settings.choices and prompt.row.get("choices")}
        scored = [prompt for prompt in prompts if prompt.id in closed]
        others = [prompt for prompt in prompts if prompt.id not in closed]
        replies: dict[str, Reply] = {}
        for part, respond in ((scored, self._choose), (others, self._generate)):
            if part:
                with _timed(self.model) as seconds:
                    inputs = self._inputs(encoded, part)
                    responses, scores, scheduled = respond(inputs, part, streamer)
                kept = self._kept(inputs, scheduled)
                for prompt, response, score, what in zip(part, responses, scores, kept, strict=True):
                    replies[prompt.id] = self._reply(prompt, response, score, what, seconds[0] / len(part))
        return [replies[prompt.id] for prompt in prompts]

    def _inputs(self, encoded: Encoded, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """Return model inputs of whole rows, left-padded where the questions begin."""
        padding = self.processor.tokenizer.pad_token_id
        if encoded.prefix is not None:
            return encoded.prefix.followed_by([prompt.own_L for prompt in prompts], padding)
        inputs = self.processor(rows=[prompt.row for prompt in prompts])
        return {name: inputs[name].to(self.model.device) for name in ("input_ids", "attention_mask")}

    def _generate(self, inputs: dict[str, Any], prompts: Sequence[Prompt], streamer: Any) -> _Responses:
        how = self.settings
        if how.sample:
            torch.manual_seed(seed_of(how.seed, prompts))
        with _recorded(self.model) as recorded:
            ids_BL = self.model.generate(
                **inputs,
                max_new_tokens=how.max_new_tokens,
                pad_token_id=self.processor.tokenizer.pad_token_id,
                streamer=streamer,
                repetition_penalty=1.0,  # Qwen's own would also punish what stands in the padding
                **_drawing(how),
            )
        texts = self.processor.decode(ids_BL[:, inputs["input_ids"].shape[1] :])
        return _Responses(texts, [{} for _ in prompts], recorded[0] if recorded else None)

    def _choose(self, inputs: dict[str, Any], prompts: Sequence[Prompt], streamer: Any) -> _Responses:
        texts = [[str(choice) for choice in prompt.row["choices"]] for prompt in prompts]
        ids = [[answer_ids(prompt, text, self.processor) for text in own] for prompt, own in zip(prompts, texts, strict=True)]
        found = score_choices(self.model, inputs, ids)
        scores = [dict(zip(own, score, strict=True)) for own, score in zip(texts, found.scores, strict=True)]
        return _Responses([max(score, key=score.__getitem__) for score in scores], scores, found.scheduled)

    def _kept(self, inputs: dict[str, Any], scheduled: Scheduled | None) -> list[_Kept]:
        """Return what was kept of each row."""
        visual_BL = visual_mask(inputs["input_ids"], self.model.config)
        text_B = (inputs["attention_mask"].bool() & ~visual_BL).sum(1).tolist()
        if scheduled is None:
            return [_Kept(np.zeros(0, bool), np.zeros(0, np.float32), float("nan"), text) for text in text_B]
        return [
            _Kept(_numpy(keep_L[visual_L]), _numpy(saliency_L[visual_L]), threshold, text)
            for keep_L, saliency_L, visual_L, threshold, text in zip(
                scheduled.keep_BL, scheduled.saliency_BL, visual_BL, scheduled.threshold_B.tolist(), text_B, strict=True
            )
        ]

    def _reply(self, prompt: Prompt, response: str, scores: dict[str, float], kept: _Kept, seconds: float) -> Reply:
        row = Prediction(
            id=prompt.id,
            response=response,
            asked=prompt.asked,
            volume_id=str(prompt.row.get("volume_id", "")),
            scheduler=str(self.model.config.scheduler),
            visual_tokens=len(kept.keep_V),
            kept_tokens=int(kept.keep_V.sum()),
            text_tokens=kept.text_tokens,
            threshold=None if np.isnan(kept.threshold) else kept.threshold,
            kept=pack_mask(kept.keep_V),
            choice_scores=scores,
            seconds={"answer": seconds},
            peak_memory_mib=round(peak_memory_mib(self.model.device), 1),
        )
        return Reply(row, kept.keep_V, kept.saliency_V)


def with_seconds(reply: Reply, seconds: Mapping[str, float]) -> Reply:
    """Return the reply with these seconds before its own; a failed one has none."""
    if reply.prediction.error:
        return reply
    merged = {**seconds, **reply.prediction.seconds}
    return reply._replace(prediction=replace(reply.prediction, seconds={name: round(s, 6) for name, s in merged.items()}))


class _Responses(NamedTuple):
    texts: list[str]
    scores: list[dict[str, float]]
    scheduled: Scheduled | None


class _Kept(NamedTuple):
    keep_V: np.ndarray
    saliency_V: np.ndarray
    threshold: float
    text_tokens: int


@contextmanager
def _recorded(model: torch.nn.Module) -> Iterator[list[Scheduled]]:
    """Give a list that what the model schedules is put into: `generate` does not return it."""
    found: list[Scheduled] = []

    def note(module: torch.nn.Module, args: Any, output: Any) -> None:
        if output.scheduled is not None:
            found.append(output.scheduled)

    handle = model.register_forward_hook(note)
    try:
        yield found
    finally:
        handle.remove()


@contextmanager
def _timed(model: PhotonForConditionalGeneration) -> Iterator[list[float]]:
    """Give a list that holds the seconds of the block when it is left, work queued on a GPU included."""
    seconds: list[float] = []
    start = time.perf_counter()
    yield seconds
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    seconds.append(time.perf_counter() - start)


def _drawing(how: AnswerSettings) -> dict[str, Any]:
    """Return generate's options for the likeliest token, or for a drawn one; nothing is left to the model's own defaults."""
    if how.sample:
        return {"do_sample": True, "temperature": how.temperature, "top_p": how.top_p, "top_k": 0}
    return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def _numpy(x: Tensor) -> np.ndarray:
    array: np.ndarray = x.detach().cpu().numpy()
    return array
