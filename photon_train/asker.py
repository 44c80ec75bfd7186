"""A model directory or hub id -> something that answers, and what tells one such thing from another."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import Any

import torch

from photon_data.errors import UsageError
from photon_train.answering import AnswerSettings, Asker
from photon_train.configuration_photon import PhotonConfig
from photon_train.modeling_photon import PhotonForConditionalGeneration
from photon_train.processing_photon import PhotonProcessor

DTYPES = ("auto", "float32", "bfloat16", "float16")
NOT_SETTINGS = ("_name_or_path", "transformers_version")  # of the configuration: the same model under another name


def load_asker(
    model: str,
    settings: AnswerSettings = AnswerSettings(),  # noqa: B008 - frozen
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
