"""A model of a directory or the hub, and perhaps an adapter -> a Predictor; and what it is, in digests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from photon_data.errors import UsageError
from photon_train.answering.batches import rows_that_fit
from photon_train.answering.generation import AnswerSettings
from photon_train.answering.model_folder import check_model_folder
from photon_train.answering.predictor import Predictor
from photon_train.checkpoint import ADAPTER, STATE, check_digests, loading, read_state
from photon_train.configuration_photon import PhotonConfig
from photon_train.modeling_photon import PhotonForConditionalGeneration
from photon_train.processing_photon import PhotonProcessor

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEFAULTS = AnswerSettings()
BATCH = 16  # questions that are answered together, where nothing else is said


def load_predictor(
    model: str,
    settings: AnswerSettings = DEFAULTS,
    *,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    adapter: str | None = None,
    batch: int | None = BATCH,
    **photon: Any,
) -> Predictor:
    """Return the model of a directory or hub id, ready to answer; `photon`: settings of PhotonConfig, None for its own.

    device: auto (a GPU if there is one), cpu, cuda, cuda:1. dtype: auto (bfloat16 on a GPU, else float32), float32, ...
    adapter: a checkpoint of a LoRA run, whose updates are added to the weights. batch: so many questions are answered
    together; None: as many as there is memory for. UsageError for what cannot be loaded.
    """
    place = _device(device)
    if dtype not in DTYPES:
        raise UsageError(f"dtype: expected one of {', '.join(DTYPES)}, found {dtype!r}")
    name = ("bfloat16" if place.type == "cuda" else "float32") if dtype == "auto" else dtype
    options: dict[str, Any] = {key: value for key, value in photon.items() if value is not None}
    options["revision"] = revision
    check_model_folder(model)
    with loading(model):
        loaded = PhotonForConditionalGeneration.from_pretrained(model, dtype=getattr(torch, name), **options)
        tokenizer = PhotonProcessor.from_pretrained(model, **options).tokenizer
    if adapter:
        with loading(adapter):
            add_adapter(loaded, Path(adapter))
    ready = loaded.eval().to(place)
    predictor = Predictor(ready, PhotonProcessor(tokenizer, loaded.config), settings)
    predictor.batch = rows_that_fit(loaded.config, settings, place, loaded.dtype) if batch is None else batch
    return predictor


def add_adapter(model: PhotonForConditionalGeneration, place: Path) -> None:
    """Add the updates of a checkpoint of a LoRA run to the model's weights: W + alpha / rank * B A.

    What else was trained there takes the place of the model's own. Raises ValueError for a folder without an adapter,
    and for one that does not fit the model.
    """
    file = place / ADAPTER if place.is_dir() else place
    if not (file.name == ADAPTER and file.is_file() and (file.parent / STATE).is_file()):
        raise ValueError(f"expected a checkpoint of a LoRA run, with {ADAPTER} and {STATE}, found none at {place}")
    check_digests(str(file.parent), [ADAPTER, STATE], of_run=True)
    settings = read_state(file.parent)["settings"]
    rank, alpha = settings.get("lora_rank"), settings.get("lora_alpha")
    if not (isinstance(rank, int) and isinstance(alpha, int) and rank > 0):
        raise ValueError(f"{file.parent / STATE}: expected lora_rank and lora_alpha, found {rank!r} and {alpha!r}")
    weights, updates, wholes = dict(model.named_parameters()), dict[str, dict[str, Tensor]](), dict[str, Tensor]()
    try:
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - it is no mapping
                name = key.removeprefix("base_model.model.")
                base, is_update, kind = name.partition(".lora_")
                if is_update:
                    updates.setdefault(f"{base}.weight", {})[kind[0]] = tensors.get_tensor(key)
                else:
                    wholes[name.replace(".base_layer.", ".")] = tensors.get_tensor(key)
    except SafetensorError as error:
        raise ValueError(f"{file}: expected a complete safetensors file, found {error}; copy it again") from None
    if odd := sorted((updates.keys() | wholes.keys()) - weights.keys()):
        raise ValueError(f"{file}: expected weights of this model, found {odd[0]}; name the model it was trained on")
    for name, pair in updates.items():
        is_low_rank = pair.keys() == {"A", "B"} and len(pair["A"]) == pair["B"].shape[-1] == rank
        update = pair["B"].float() @ pair["A"].float() if is_low_rank else torch.zeros(0)
        _check_update(name, update, weights[name], file)
    for name, whole in wholes.items():
        _check_update(name, whole, weights[name], file)
    with torch.no_grad():
        for name, pair in updates.items():  # computed again, one by one: all of them take as much memory as the model
            weights[name].copy_(weights[name].float() + pair["B"].float() @ pair["A"].float() * (alpha / rank))
        for name, whole in wholes.items():
            weights[name].copy_(whole)


def _check_update(name: str, update: Tensor, weight: Tensor, file: Path) -> None:
    if update.shape != weight.shape or not update.isfinite().all():
        found = f"shape {tuple(update.shape)} for {tuple(weight.shape)}, or numbers that are not finite"
        raise ValueError(f"{file}: expected an update of {name}, found {found}; is it of this model?")


def model_shape_of(model: str, revision: str | None = None) -> tuple[int, int, int]:
    """Return the shape (z, y, x) of the grid that a model reads, from its configuration alone."""
    check_model_folder(model)
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
