"""Prompts -> answers with the probabilities of their tokens, generated or given.

A row depends on itself alone: what is drawn for it comes from a generator of its own, and a row whose logits are not
finite ends without harm to the others. Keys and values are kept in a cache that grows while prompts are read and
pruned, and then has one length until the answers end.

Legend: B rows, L tokens of a padded row, M tokens of a row after pruning, C tokens of the vocabulary, K key heads,
d head_dim; of scored answers: R answers of all rows together, N tokens of the longest answer.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessor, StoppingCriteria
from transformers.cache_utils import Cache, DynamicLayer
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from photon_train.attention import check_compiler
from photon_train.scheduling import Scheduled

# Nothing is left to the generation config of the model; Qwen's own penalty depends on the padding.
NOTHING_ELSE: dict[str, Any] = {
    **{"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "repetition_penalty": 1.0},
    **{"num_beams": 1, "num_return_sequences": 1, "no_repeat_ngram_size": 0, "min_new_tokens": None, "min_length": 0},
}


@dataclass(frozen=True)
class AnswerSettings:
    """How questions are answered."""

    max_new_tokens: int = 512
    sample: bool = False  # draw from the distribution (temperature, top_p) instead of taking the likeliest token
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    choices: bool = False  # score the row's `choices` where it has some, instead of generating
    samples: int = 1  # drawn answers to each question


class Generated(NamedTuple):
    """What `generate` gives for each row."""

    tokens: list[Tensor]  # int64, up to the end marker, which is one of them if the answer ended
    logprobs: list[list[float]]  # of each of them, as the model gave it; NaN where logits were not finite
    scheduled: Scheduled | None


def generate(
    model: Any,
    inputs: Mapping[str, Any],
    names: Sequence[str],
    settings: AnswerSettings,
    pad_token_id: int,
    streamer: Any = None,
    logits_processor: Sequence[Any] = (),
    stopping_criteria: Sequence[Any] = (),
) -> Generated:
    """Return the answers of a PhotonForConditionalGeneration to the prompts of `inputs`.

    What is drawn for a row depends on the seed, its name and its probabilities. `logits_processor` and
    `stopping_criteria` (of transformers) follow, a row for each prompt; they see the model's own logits.
    """
    watch, drawing = _Watch(pad_token_id), list[Any]()
    record = _Record(watch)
    if settings.sample:
        drawing = [TemperatureLogitsWarper(settings.temperature)] if settings.temperature != 1.0 else []
        drawing += [TopPLogitsWarper(settings.top_p)] if settings.top_p < 1.0 else []
        drawing += [_Draw([f"{settings.seed}\n{name}" for name in names])]
    passes: list[Scheduled | None] = []  # `generate` does not return what was scheduled
    hook = model.register_forward_hook(lambda module, args, output: passes.append(output.scheduled))
    try:
        ids_BL = model.generate(
            **inputs,
            **NOTHING_ELSE,
            logits_processor=[*logits_processor, watch, *drawing],
            stopping_criteria=[*stopping_criteria, record],
            max_new_tokens=settings.max_new_tokens,
            past_key_values=FixedCache(model.config.text_config, settings.max_new_tokens),
            pad_token_id=pad_token_id,
            streamer=streamer,
        )
    finally:
        hook.remove()
    answer_BN = ids_BL[:, inputs["input_ids"].shape[1] :].cpu()
    logprob_BN = torch.stack(record.logprobs, dim=1).cpu()
    ends = torch.as_tensor(model.generation_config.eos_token_id).flatten()
    ended_BN = torch.isin(answer_BN, ends) | logprob_BN.isnan()
    lengths = [int(row.nonzero()[0]) + 1 if row.any() else len(row) for row in ended_BN]
    tokens = [row[:length] for row, length in zip(answer_BN, lengths, strict=True)]
    logprobs = [row[:length].tolist() for row, length in zip(logprob_BN, lengths, strict=True)]
    return Generated(tokens, logprobs, next((scheduled for scheduled in passes if scheduled is not None), None))


@torch.no_grad()
def score_choices(
    model: Any, inputs: Mapping[str, Any], choices: Sequence[Sequence[Tensor]]
) -> tuple[list[list[list[float]]], Scheduled | None]:
    """Return log p of every token of each answer of each prompt, given those before it, and what was scheduled.

    `inputs` are those of B prompts, which run once; `choices` are the answers to each: int64[n] ids, n > 0, the end
    marker included. The probabilities are those of generation: answers see the kept tokens only. NaN where logits are
    not finite.
    """
    out = model(**inputs, use_cache=True, logits_to_keep=1)
    row_R = torch.tensor([row for row, answers in enumerate(choices) for _ in answers], device=model.device)
    ids = [ids_N.to(model.device) for answers in choices for ids_N in answers]
    token_RN, mask_RN = (pad_sequence(x, batch_first=True) for x in (ids, [torch.ones_like(ids_N) for ids_N in ids]))
    log_RN = _log_of(out.logits[:, -1:][row_R], token_RN[:, :1])
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
        log_RN = torch.cat([log_RN, _log_of(later.logits, token_RN[:, 1:])], dim=1)
    found = [row[: len(ids_N)].tolist() for row, ids_N in zip(log_RN.cpu(), ids, strict=True)]
    numbers = iter(found)
    return [[next(numbers) for _ in answers] for answers in choices], out.scheduled


def _log_of(logits_RNC: Tensor, token_RN: Tensor) -> Tensor:
    """Return float32[R, N], log p of the tokens; NaN where a logit of their place is not finite."""
    logits_RNC = logits_RNC.float()
    log_RN = logits_RNC.gather(2, token_RN[..., None])[..., 0] - logits_RNC.logsumexp(2)
    return log_RN.masked_fill(~logits_RNC.isfinite().all(2), math.nan)


class _Watch(LogitsProcessor):
    """Sees the model's own logits of every step. A row in which they are not finite says padding: no text."""

    logits_BC: Tensor
    finite_B: Tensor

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.logits_BC, self.finite_B = scores, scores.isfinite().all(1)
        shown_BC = scores.masked_fill(~self.finite_B[:, None], -torch.inf)
        shown_BC[:, self.pad_token_id].masked_fill_(~self.finite_B, 0.0)
        return shown_BC


class _Record(StoppingCriteria):
    """Keeps log p of every token that was taken, and ends the rows whose logits are not finite."""

    def __init__(self, watch: _Watch) -> None:
        self.watch, self.logprobs = watch, list[Tensor]()

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        logits_BC = self.watch.logits_BC
        log_B = logits_BC.gather(1, input_ids[:, -1:])[:, 0] - logits_BC.logsumexp(1)
        self.logprobs.append(log_B.masked_fill(~self.watch.finite_B, math.nan))
        return ~self.watch.finite_B


class _Draw(LogitsProcessor):
    """Leaves one token of each row: the one at which the sum of probabilities passes a number drawn for the row."""

    def __init__(self, names: Sequence[str]) -> None:
        seeds = [int.from_bytes(hashlib.sha256(name.encode()).digest()[:7]) for name in names]
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        drawn_B1 = torch.stack([torch.rand(1, generator=generator) for generator in self.generators])
        sum_BC = scores.float().softmax(1).cumsum(1)
        passed_BC = sum_BC > drawn_B1.to(sum_BC.device) * sum_BC[:, -1:]
        token_B1 = passed_BC.int().argmax(1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(1, token_B1, 0.0)


class FixedCache(Cache):
    """Layers with `room` for so many tokens behind the pruned prompts.

    The first decoding step moves keys and values into arrays with room for all that will come. From then on a step
    writes its place in them: nothing is copied, memory does not grow, and all steps have the same shapes.
    """

    def __init__(self, config: Any, room: int) -> None:
        super().__init__(layers=[_FixedLayer(room) for _ in range(config.num_hidden_layers)])


class _FixedLayer(DynamicLayer):
    """One layer: keys and values [B, K, M, d], and from the first decoding step on [B, K, M + room, d]."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.filled: int | None = None  # tokens, once the length is fixed

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return all keys and values; those that are still to come are 0, and for the mask to hide."""
        if not self.is_initialized or (self.filled is None and key_states.shape[-2] > 1):
            return super().update(key_states, value_states, *args, **kwargs)
        assert self.keys is not None and self.values is not None, "the layer is initialized"
        if self.filled is None:
            self.filled = self.keys.shape[-2]
            self.keys, self.values = (_with_room(x_BKMd, self.room) for x_BKMd in (self.keys, self.values))
        end = self.filled + key_states.shape[-2]
        self.keys[:, :, self.filled : end] = key_states
        self.values[:, :, self.filled : end] = value_states
        self.filled = end
        return self.keys, self.values

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        """Tell whether the next single token finds one length: transformers never leaves its mask out then."""
        return self.is_initialized

    def get_seq_length(self) -> int:
        """Return how many tokens are in the layer."""
        return super().get_seq_length() if self.filled is None else self.filled

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys `update` will return, and the place of the first."""
        if self.filled is not None:
            assert self.keys is not None, "the length is fixed"
            return self.keys.shape[-2], 0
        begun = super().get_seq_length()
        return begun + (self.room if begun and query_length == 1 else query_length), 0


def compile_decoding(model: Any) -> None:
    """Have torch compile the decoder's layers for tokens that follow on a FixedCache; UsageError where it cannot.

    A kind of layer is compiled for one row, and for several, when they first come, for any number of layers, lengths
    and rows: a layer is given its part of the cache and does not look at its number.
    """
    check_compiler(model.device)
    for number, layer in enumerate(model.model.language_model.layers):
        layer.forward = partial(_layer, number, layer.forward, torch.compile(layer.forward, dynamic=True))


def _layer(number: int, plain: Any, compiled: Any, h_BLD: Tensor, past_key_values: Any = None, **kwargs: Any) -> Any:
    """Return what a layer returns: compiled, once the length of its cache is fixed."""
    own: Any = past_key_values.layers[number] if isinstance(past_key_values, FixedCache) else None
    if own is None or own.filled is None:
        return plain(h_BLD, past_key_values=past_key_values, **kwargs)
    return compiled(h_BLD, past_key_values=own, **kwargs)


def _with_room(x_BKMd: Tensor, room: int) -> Tensor:
    """Return the tensor with `room` more tokens of 0."""
    return torch.cat([x_BKMd, x_BKMd.new_zeros(*x_BKMd.shape[:2], room, x_BKMd.shape[-1])], dim=2)
