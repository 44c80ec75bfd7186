"""How likely each of a few given answers is: closed questions scored without generating.

Legend: B questions, R answers of all of them together, N tokens of the longest, L tokens of a padded prompt, M after pruning,
V vocabulary; axis 3 is (t, h, w).

Rows -> groups that share a prefix -> batches: the same batches whatever the order of the rows.

A group is all rows that show the same volumes with the same text before the end of the last one (system message, what stands
before <video>); what follows is their own. Rows without volumes are one group, with nothing shared.

A prefix, once; then answers to questions on it, with what was kept for each.

Legend: V visual tokens of a row, B rows, L tokens of a padded row.

A model directory or hub id -> something that answers, and what tells one such thing from another.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from photon_data.errors import UsageError
from photon_train.answering.prediction import Prediction, pack_mask
from photon_train.configuration_photon import PhotonConfig
from photon_train.flops import peak_memory_mib
from photon_train.modeling_photon import PhotonForConditionalGeneration
from photon_train.prefix import Prefix
from photon_train.processing_photon import PhotonProcessor, prefix_length, visual_mask
from photon_train.rows import Row, asked_of, without_answer
from photon_train.scheduling import Scheduled


class Scored(NamedTuple):
    """Log-probabilities of each question's choices, in their order, and what was scheduled for the questions."""

    scores: list[list[float]]
    scheduled: Scheduled | None


@torch.no_grad()
def score_choices(
    model: PhotonForConditionalGeneration, inputs: Mapping[str, Any], choices: Sequence[Sequence[Tensor]]
) -> Scored:
    """Return log p(answer | question) of each answer, the sum over its tokens, for B prompts with some answers each.

    inputs: of the prompts, as `Prefix.followed_by` or the processor gives them. An answer is int64[n], n > 0, its end marker
    included. The probabilities are those that generation has: answers see the kept tokens only. The prompts run once.
    """
    out = model(**inputs, use_cache=True, logits_to_keep=1)
    row_R = torch.tensor([row for row, answers in enumerate(choices) for _ in answers], device=model.device)
    ids = [ids_N.to(model.device) for answers in choices for ids_N in answers]
    token_RN, here_RN = (pad_sequence(x, batch_first=True) for x in (ids, [torch.ones_like(ids_N) for ids_N in ids]))
    first_RV = out.logits[row_R, -1].float().log_softmax(-1)
    log_RN = torch.cat([first_RV[:, None], _later(model, inputs, out, row_R, token_RN, here_RN)], dim=1)
    score_R = (log_RN.gather(2, token_RN[..., None])[..., 0] * here_RN).sum(1).cpu()
    counts = [len(answers) for answers in choices]
    return Scored([part.tolist() for part in score_R.split(counts)], out.scheduled)


def _later(
    model: PhotonForConditionalGeneration, inputs: Mapping[str, Any], out: Any, row_R: Tensor, token_RN: Tensor, here_RN: Tensor
) -> Tensor:
    """Return float32[R, N - 1, V]: log-probabilities behind each token but the last, on the pruned cache of the prompts."""
    length = inputs["input_ids"].shape[1]
    if token_RN.shape[1] == 1:
        return torch.zeros(len(token_RN), 0, model.config.text_config.vocab_size, device=token_RN.device)
    present_BM = inputs["attention_mask"] if out.scheduled is None else out.scheduled.kept.mask_BM
    out.past_key_values.batch_select_indices(row_R)
    position_RN = (length + out.rope_deltas.to(row_R.device))[row_R] + torch.arange(token_RN.shape[1] - 1, device=row_R.device)
    later = model(
        input_ids=token_RN[:, :-1],
        attention_mask=torch.cat([present_BM[row_R].long(), here_RN[:, :-1]], dim=1),
        position_ids=position_RN.expand(3, -1, -1),
        past_key_values=out.past_key_values,
    )
    log_RNV: Tensor = later.logits.float().log_softmax(-1)
    return log_RNV


WORST_AS_TEXT = (ValueError, KeyError, TypeError, AttributeError)  # what a row that is no row can raise


class Prompt(NamedTuple):
    """A row to answer: its given answer is left out; own_L are the ids int64[L] behind the shared prefix; asked: `asked_of`."""

    row: Row
    own_L: Tensor
    asked: str

    @property
    def id(self) -> str:
        """The row's id."""
        return str(self.row["id"])


class Group(NamedTuple):
    """Prompts on one prefix, by id. `videos` are the row's (paths or Volumes), none for text alone."""

    videos: tuple[Any, ...]
    prompts: list[Prompt]

    @property
    def name(self) -> str:
        """Say which volumes it is about; "" for text alone, or for volumes that are in memory."""
        return "\n".join(str(video) for video in self.videos if isinstance(video, str | Path))

    def batches(self, most: int) -> Iterator[list[Prompt]]:
        """Yield the prompts, at most `most` at a time."""
        for at in range(0, len(self.prompts), most):
            yield self.prompts[at : at + most]


class Grouped(NamedTuple):
    """The groups, in an order of their own, and why a row is in none: {id: reason}."""

    groups: list[Group]
    problems: dict[str, str]


def group_rows(rows: Sequence[Row], processor: PhotonProcessor) -> Grouped:
    """Return the groups of rows (each with an `id` of its own), in an order that does not depend on the rows' order."""
    prompts: dict[tuple[Any, ...], list[Prompt]] = defaultdict(list)
    videos: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    problems: dict[str, str] = {}
    for row in rows:
        try:
            key, prompt = _prompt(row, processor)
        except WORST_AS_TEXT as error:
            problems[str(row["id"])] = _reason(error)
        else:
            prompts[key].append(prompt)
            videos.setdefault(key, tuple(prompt.row.get("videos") or ()))
    groups = [Group(videos[key], sorted(found, key=lambda prompt: prompt.id)) for key, found in prompts.items()]
    return Grouped(sorted(groups, key=lambda group: (group.name, group.prompts[0].id)), problems)


def _prompt(row: Row, processor: PhotonProcessor) -> tuple[tuple[Any, ...], Prompt]:
    asked = without_answer(row)
    ids_L = processor.ids(asked)
    shared = prefix_length(ids_L, processor.config)
    digest = hashlib.sha256(ids_L[:shared].numpy().tobytes()).hexdigest() if shared else ""
    volumes = (video if isinstance(video, str | Path) else id(video) for video in asked.get("videos") or ())
    return (*volumes, digest), Prompt(asked, ids_L[shared:].clone(), asked_of(row))


def answer_ids(prompt: Prompt, text: str, processor: PhotonProcessor) -> Tensor:
    """Return int64[n]: the ids that the assistant says when it answers `text`, with the end marker, as training sees them.

    ValueError where the text changes how the prompt itself becomes ids.
    """
    said = {**prompt.row, "messages": [*prompt.row["messages"], {"role": "assistant", "content": text}]}
    ids_L, asked_L = processor.ids(said, for_training=True), processor.ids(prompt.row)
    if not ids_L[: len(asked_L)].equal(asked_L):
        raise ValueError(f"{prompt.id}: an answer that stands for itself wanted, got {text!r}; remove space at its start")
    end = int((ids_L == processor.config.im_end_token_id).nonzero()[-1]) + 1
    return ids_L[len(asked_L) : end]


def _reason(error: Exception) -> str:
    return str(error) if type(error) is ValueError else f"a row of messages and videos wanted ({type(error).__name__}: {error})"


def seed_of(seed: int, prompts: Sequence[Prompt]) -> int:
    """Return a seed for one batch, from the run's and the ids: sampling does not depend on the order of batches."""
    text = "\n".join([str(seed), *(prompt.id for prompt in prompts)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])


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
        saliency_BL, threshold_B = scheduled.selection.saliency_BL, scheduled.selection.threshold_B
        return [
            _Kept(_numpy(keep_L[visual_L]), _numpy(saliency_L[visual_L]), threshold, text)
            for keep_L, saliency_L, visual_L, threshold, text in zip(
                scheduled.keep_BL, saliency_BL, visual_BL, threshold_B.tolist(), text_B, strict=True
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


DTYPES = ("auto", "float32", "bfloat16", "float16")
NOT_SETTINGS = ("_name_or_path", "transformers_version")  # of the configuration: the same model under another name


def load_asker(
    model: str,
    settings: AnswerSettings = AnswerSettings(),
    *,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    **photon: Any,
) -> Asker:
    """Return the model at a directory or hub id, ready to answer; `photon` are settings of PhotonConfig, None for its own.

    device: auto (a GPU if there is one), cpu, cuda, cuda:1. dtype: auto (bfloat16 on a GPU, else float32), float32, ...
    UsageError for what cannot be loaded.
    """
    place = _device(device)
    if dtype not in DTYPES:
        raise UsageError(f"dtype: one of {', '.join(DTYPES)} wanted, got {dtype!r}")
    name = ("bfloat16" if place.type == "cuda" else "float32") if dtype == "auto" else dtype
    chosen = {key: value for key, value in photon.items() if value is not None}
    try:
        loaded = PhotonForConditionalGeneration.from_pretrained(model, revision=revision, dtype=getattr(torch, name), **chosen)
        tokenizer = PhotonProcessor.from_pretrained(model, revision=revision, **chosen).tokenizer
    except (ValueError, OSError) as error:
        raise UsageError(f"{model}: a model that can be loaded wanted: {error}") from None
    return Asker(loaded.eval().to(place), PhotonProcessor(tokenizer, loaded.config), settings)


def grid_read_by(model: str, revision: str | None = None) -> tuple[int, int, int]:
    """Return the voxels (z, y, x) of the grid that a model reads, from its configuration alone; UsageError as load_asker."""
    try:
        depth, height, width = PhotonConfig.from_pretrained(model, revision=revision or "main").model_shape_zyx
    except (ValueError, OSError) as error:
        raise UsageError(f"{model}: a model that can be loaded wanted: {error}") from None
    return depth, height, width


def _device(name: str) -> torch.device:
    """Return the device of that name; UsageError for one that is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device: auto, cpu, cuda or cuda:N wanted, got {name!r}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device: one that is here wanted, got {name!r} where torch sees {torch.cuda.device_count()} GPUs")
    return device


def settings_of(asker: Asker) -> dict[str, Any]:
    """Return all that predictions depend on besides their rows: settings, dtype, and digests of configuration and weights."""
    config = asker.model.config
    told = {name: value for name, value in config.to_dict().items() if name not in NOT_SETTINGS}
    named = {"scheduler": str(config.scheduler), "keep_ratio": config.keep_ratio, "dtype": str(asker.model.dtype)}
    return {
        **asdict(asker.settings),
        **named,
        "config": _digest(json.dumps(told, sort_keys=True, default=str)),
        "weights": weights_digest(asker.model),
    }


def weights_digest(model: torch.nn.Module) -> str:
    """Return sixteen hex digits of up to 64 evenly spaced values of every tensor: other weights have others."""
    sums = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        flat = value.detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // 64)][:64].float().cpu().numpy()
        sums.update(name.encode() + sample.tobytes())
    return sums.hexdigest()[:16]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
