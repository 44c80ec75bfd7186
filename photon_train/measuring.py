"""Seconds, memory and FLOPs of answering with random weights, for questions that share a volume or not.

Random weights take as long as trained ones. What is kept is not random: the threshold is set so that a volume keeps a
given share of its tokens. Nothing ends an answer before its last token. `bench.py` says what is measured.

Legend: K questions, B rows, L tokens of a padded row, N visual tokens of all rows.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import StoppingCriteria
from transformers.utils import is_flash_attn_2_available

from photon_data.files import Location
from photon_data.records import store_name
from photon_data.store import write_store
from photon_data.volume import Geometry, Prepared, Volume
from photon_train import costs
from photon_train.answering.generation import AnswerSettings, generate
from photon_train.answering.predictor import Predictor
from photon_train.answering.request import RequestGroup, request_of
from photon_train.configuration_photon import PhotonConfig
from photon_train.modeling_photon import PhotonForConditionalGeneration
from photon_train.processing_photon import PhotonProcessor
from photon_train.scheduling import ThresholdHead, ThresholdPredictor, visual_mask
from photon_train.tiny import byte_tokenizer, published_config, tiny_config

SIZES = ("3b", "tiny")
PATCH_SLICES = 14  # along z, of Photon's patches
KEPT = 0.39  # share of the visual tokens that stay
ANSWER = "yes, on the left"  # of training rows
SEED = 0


class Measured(NamedTuple):
    """What was found for K questions. Medians are of the repeats after a warm-up."""

    seconds: float  # the median
    peak_memory_gib: float | None  # allocated on the GPU
    tokens: float  # text and visual ones that were read; generated ones where answers are
    tflops: float  # that were needed
    kept_tokens: float  # of a row's visual tokens, the mean
    visual_tokens: int
    data_wait_share: float | None = None  # of training


class Subject(NamedTuple):
    """A random model on the device, what makes its inputs, and a volume that it reads."""

    model: PhotonForConditionalGeneration
    processor: PhotonProcessor
    store: str
    volumes: dict[str, Tensor]  # as model inputs, on the device


def device() -> torch.device:
    """Return where everything is measured."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtype() -> torch.dtype:
    """Return bfloat16 on a GPU, else float32."""
    return torch.bfloat16 if device().type == "cuda" else torch.float32


def attention() -> str:
    """Return FlashAttention's name where it is installed, else sdpa."""
    return "flash_attention_2" if device().type == "cuda" and is_flash_attn_2_available() else "sdpa"


def tidy() -> None:
    """Free what nothing refers to, and count the peak of memory from here on."""
    gc.collect()
    if device().type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float | None:
    """Return the most memory allocated on the GPU since `tidy`; None on a CPU."""
    return torch.cuda.max_memory_allocated() / 2**30 if device().type == "cuda" else None


# A model, a volume, questions.


def random_subject(size: str, store: str, slices: int = PATCH_SLICES, **settings: Any) -> Subject:
    """Return a random model that reads the store in patches of so many slices; `settings` are PhotonConfig's."""
    model, processor = random_model(size, slices, **settings)
    volumes = {name: value.to(device()) for name, value in processor.volumes([(store, None)]).items()}
    return Subject(model, processor, store, volumes)


def random_model(
    size: str, slices: int = PATCH_SLICES, **settings: Any
) -> tuple[PhotonForConditionalGeneration, PhotonProcessor]:
    """Return a random stage-2 model on the device, and its processor with a tokenizer of bytes.

    Trained, it is at once in the phase that drops tokens, perturbs and flips nothing.
    """
    tokenizer = byte_tokenizer()
    settings = {"soft_start": 0, "hard_start": 0, "flip_start": 10**9, "robustness_probability": 0.0, **settings}
    config = (published_config if size == "3b" else tiny_config)(tokenizer, 2, **settings)
    config.vision_config.temporal_patch_size = slices
    config._attn_implementation = attention()
    torch.manual_seed(SEED)
    with device():
        model = PhotonForConditionalGeneration._from_config(config, dtype=dtype()).eval()
    for module in model.modules():
        if isinstance(module, ThresholdPredictor):
            module.float()  # as a model that is loaded has it
    model.generation_config.eos_token_id = []  # no answer ends early
    return model, PhotonProcessor(tokenizer, model.config)


def _keep_share(model: PhotonForConditionalGeneration, inputs: dict[str, Any], share: float = KEPT) -> None:
    """Set the threshold to the quantile of the rows' saliency above which there is such a share of their tokens."""
    with torch.no_grad():
        scheduled = model(**inputs, logits_to_keep=1).scheduled
    saliency_N = scheduled.selection.saliency_BL[visual_mask(inputs["input_ids"], model.config)]
    theta = float(torch.quantile(saliency_N, 1 - share)) / model.config.threshold_max
    for module in model.modules():
        if isinstance(module, ThresholdHead):
            torch.nn.init.constant_(module.bias, math.log(theta / (1 - theta)))


def write_random_store(folder: Path, model_shape_zyx: Sequence[int], number: int = 0) -> str:
    """Write a store of random voxels, of which only the model grid will be read; return its path."""
    draw, shape = np.random.default_rng(number), tuple(model_shape_zyx)
    stored, model = (
        Volume(draw.integers(-1000, 1000, shape, np.int16), Geometry.axis_aligned(shape, (1, 1, 1), (0, 0, 0)))
        for _ in range(2)
    )
    name = store_name(f"v{number}")
    identity = {"id": f"v{number}", "key": "k", "fingerprint": "f", "recipe": {}, "digest": "d"}
    write_store(Prepared(stored, model, {}), Location(str(folder)), name, identity)
    return str(folder / name)


def question_rows(store: str, questions: int, count: int, answer: str = "") -> list[dict[str, Any]]:
    """Return rows of K questions, again and again up to `count`.

    A question has about as many bytes, which are our tokens, as one of this length in words has tokens of Qwen's.
    """
    said = [{"role": "assistant", "content": answer}] if answer else []
    asked = [{"role": "user", "content": f"<video>Is nodule {k:3} in the lung?"} for k in range(questions)]
    return [{"id": f"q{n}", "videos": [store], "messages": [asked[n % questions], *said]} for n in range(count)]


def inputs_of(subject: Subject, ids: Sequence[Tensor], *, shares: bool) -> Iterator[dict[str, Any]]:
    """Yield model inputs: of all questions on one prefix, encoded now, or of one after the other with the volume."""
    for some in [ids] if shares else [[one] for one in ids]:
        rows = {"input_ids": some[0][None].to(device()), **subject.volumes}
        if shares:
            prefix = subject.model.encode_prefix(rows)
            yield prefix.followed_by([one[prefix.length :] for one in some])
        else:
            yield {**rows, "attention_mask": torch.ones_like(rows["input_ids"])}


# Answers.


@torch.no_grad()
def measure_answers(
    subject: Subject, what: str, questions: int, *, shares: bool, repeats: int, new_tokens: int
) -> Measured:
    """Return what a prefill takes, decoding behind it, or all from reading the store on ("predict")."""
    rows = question_rows(subject.store, questions, questions)
    ids, config = [subject.processor.ids(row) for row in rows], subject.model.config
    kept, visual = keep_counts(subject, ids)
    tidy()
    calls = {
        "prefill": lambda: _prefill(subject, ids, shares),
        "decode": lambda: _decode(subject, ids, shares, new_tokens),
        "predict": lambda: _predict(subject, rows, shares, new_tokens),
    }
    seconds = _median_of(calls[what], repeats)
    length = statistics.mean(map(len, ids))
    generated = {"prefill": 0, "decode": new_tokens - 1, "predict": new_tokens}[what]
    layers = costs.layers(config, config.text_config.num_hidden_layers, 1, round(length - visual + kept))
    flops = questions * generated * (layers + costs.head(config))
    if what != "decode":
        flops += _prefill_flops(config, ids[0], round(kept), questions, shares=shares)
    tokens = questions * (generated or length)
    return Measured(seconds, peak_gib(), tokens, flops / 1e12, kept, visual)


def keep_counts(subject: Subject, ids: Sequence[Tensor]) -> tuple[float, int]:
    """Set the threshold of ITS for these questions; return how many visual tokens a row keeps, the mean, and has."""
    model = subject.model
    inputs = next(inputs_of(subject, ids, shares=True))
    if model.config.scheduler == "its":
        _keep_share(model, inputs)
    visual_BL = visual_mask(inputs["input_ids"], model.config)
    keep_BL = model(**inputs, logits_to_keep=1).scheduled.keep_BL
    return float((keep_BL & visual_BL).sum(1).float().mean()), int(visual_BL[0].sum())


def _median_of(call: Callable[[], float | None], repeats: int) -> float:
    """Return the median of the seconds that a call takes, or that it returns, after a warm-up."""
    seconds = []
    for _ in range(1 + repeats):
        _synchronize()
        started = time.perf_counter()
        returned = call()
        _synchronize()
        seconds.append(time.perf_counter() - started if returned is None else returned)
    return statistics.median(seconds[1:])


def _prefill(subject: Subject, ids: Sequence[Tensor], shares: bool) -> None:
    for inputs in inputs_of(subject, ids, shares=shares):
        subject.model(**inputs, use_cache=True, logits_to_keep=1)


def _decode(subject: Subject, ids: Sequence[Tensor], shares: bool, new_tokens: int) -> float:
    """Return the seconds from the first token of each answer to its last."""
    seconds, settings = 0.0, AnswerSettings(max_new_tokens=new_tokens)
    for inputs in inputs_of(subject, ids, shares=shares):
        clock, names = _Clock(), [str(row) for row in range(len(inputs["input_ids"]))]
        pad = subject.processor.tokenizer.pad_token_id
        generate(subject.model, inputs, names, settings, pad, stopping_criteria=[clock])
        seconds += clock.times[-1] - clock.times[0]
    return seconds


def _predict(subject: Subject, rows: Sequence[dict[str, Any]], shares: bool, new_tokens: int) -> None:
    """Read the store, encode and answer, as `photon predict` does."""
    predictor = Predictor(subject.model, subject.processor, AnswerSettings(max_new_tokens=new_tokens))
    requests = [request_of(row, subject.processor) for row in rows]
    for some in [requests] if shares else [[one] for one in requests]:
        replies = predictor.answer(predictor.encode(RequestGroup((subject.store,), some)), some)
        assert not any(reply.prediction.error for reply in replies), replies[0].prediction.error


class _Clock(StoppingCriteria):
    """Notes when each token is there; it ends nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        _synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _synchronize() -> None:
    if device().type == "cuda":
        torch.cuda.synchronize()


# FLOPs that answers need.


def _prefill_flops(config: PhotonConfig, ids_L: Tensor, kept: int, questions: int, *, shares: bool) -> int:
    """Return the FLOPs of a prefill of K questions like `ids_L`, under the scheduler of the configuration."""
    visual = int(visual_mask(ids_L, config).sum())
    start = int((ids_L == config.video_token_id).nonzero()[0])
    after = len(ids_L) - start - visual
    prompt, grid = costs.PromptSize(start, visual, after, after - costs.FRAME_AFTER), config.patches_thw
    if shares:
        return costs.on_a_prefix(config, str(config.scheduler), prompt, grid, kept, questions).total()
    return questions * costs.prefill(config, str(config.scheduler), prompt, grid, kept).total()
