"""A model of a directory or the hub, and perhaps an adapter -> a Predictor.

A folder is looked at before anything is loaded, since libraries put defaults in for what is missing, among them those
of a model of 72 billion weights.
"""

from __future__ import annotations

from dataclasses import fields
from math import prod
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import GenerationConfig

from photon_data.errors import UsageError
from photon_data.json_text import from_json
from photon_train.answering.generation import AnswerSettings, compile_decoding
from photon_train.answering.predictor import Predictor
from photon_train.checkpoint import ADAPTER, STATE, check_digests, checkpoints, loading, read_state
from photon_train.configuration_photon import PhotonConfig
from photon_train.modeling_photon import PhotonForConditionalGeneration
from photon_train.processing_photon import PhotonProcessor

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEFAULTS = AnswerSettings()
BATCH = 16  # questions that are answered together, where nothing else is said
MOST_ROWS, MOST_ROWS_CPU = 64, 16  # more do not make a GPU, or a CPU, faster
TEXT_TOKENS = 512  # of a long question
SHARE_OF_MEMORY = 0.7  # of what is free, for rows; the rest is for what was not counted

# What a model folder must hold.
CONFIG = "config.json"
TOKENIZERS = ("tokenizer.json", "vocab.json")  # one of them
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")


def load_predictor(
    model: str,
    settings: AnswerSettings = DEFAULTS,
    *,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    adapter: str | None = None,
    batch: int | None = BATCH,
    compile: bool = False,
    **photon: Any,
) -> Predictor:
    """Return the model of a directory or hub id, ready to answer; `photon`: settings of PhotonConfig, None for its own.

    device: auto (a GPU if there is one), cpu, cuda, cuda:1. dtype: auto (bfloat16 on a GPU, else float32), float32, ...
    adapter: a checkpoint of a LoRA run, whose updates are added to the weights. batch: so many questions are answered
    together; None: as many as there is memory for. compile: `compile_decoding`. UsageError for what cannot be loaded.
    """
    place = _device(device)
    if dtype not in DTYPES:
        raise UsageError(f"dtype: expected one of {', '.join(DTYPES)}, found {dtype!r}")
    name = ("bfloat16" if place.type == "cuda" else "float32") if dtype == "auto" else dtype
    options: dict[str, Any] = {key: value for key, value in photon.items() if value is not None}
    options["revision"] = revision
    _check_model_folder(model)
    with loading(model):
        loaded = PhotonForConditionalGeneration.from_pretrained(model, dtype=getattr(torch, name), **options)
        loaded.generation_config = _ends_of(loaded.generation_config)
        tokenizer = PhotonProcessor.from_pretrained(model, **options).tokenizer
    if adapter:
        with loading(adapter):
            _add_adapter(loaded, Path(adapter))
    ready = loaded.eval().to(place)
    if compile:
        compile_decoding(ready)
    predictor = Predictor(ready, PhotonProcessor(tokenizer, loaded.config), settings)
    predictor.batch = _rows_that_fit(loaded.config, settings, place, loaded.dtype) if batch is None else batch
    return predictor


def _ends_of(config: GenerationConfig) -> GenerationConfig:
    """Return which tokens end an answer, and nothing else of a model's own settings. Raises ValueError without any."""
    ends = config.eos_token_id
    ids = ends if isinstance(ends, list) else [ends]
    if not ids or not all(type(id) is int and id >= 0 for id in ids):
        raise ValueError(f"expected token ids as eos_token_id, found {ends!r:.60}")
    return GenerationConfig(eos_token_id=ends, pad_token_id=config.pad_token_id, bos_token_id=config.bos_token_id)


def _check_model_folder(model: str) -> None:
    """Raise UsageError for a folder that is no model: it says what it is, or what is missing. A hub id passes."""
    folder = Path(model)
    if not folder.is_dir():
        if folder.exists() or folder.is_absolute() or model.count("/") != 1 or model.startswith((".", "~")):
            raise UsageError(f"{model}: expected a model directory or a hub id, found neither; is the path right?")
        return
    if (folder / ADAPTER).is_file() and not (folder / "model.safetensors").is_file():
        how = f"--model BASE --adapter {model}, or merged in its run's folder once the run has ended"
        raise UsageError(f"{model}: expected a model, found {ADAPTER}, which is an update of one; say {how}")
    if (found := checkpoints(folder)) and not any(folder.glob("*.safetensors")):
        raise UsageError(f"{model}: expected a model, found a run; say {found[-1]}")
    if not (folder / CONFIG).is_file():
        raise UsageError(f"{model}: expected {CONFIG}, found none; copy the folder again, whole")
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise UsageError(
            f"{model}: expected a tokenizer ({' or '.join(TOKENIZERS)}), found none; copy the folder again"
        )
    _check_config(folder / CONFIG)


def _check_config(path: Path) -> None:
    """Raise UsageError for a configuration without the sizes of a model, or with values of other types than ours."""
    try:
        config = dict(from_json(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise UsageError(f"{path}: expected a JSON object, found: {error}; copy it again") from None
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
    for name in SIZES:
        size = config.get(name, (text or {}).get(name))
        if type(size) is not int or size < 1:
            raise UsageError(f"{path}: expected a whole number above 0 as {name}, found {size!r}; copy it again")
    if not isinstance(config.get("vision_config"), dict):
        raise UsageError(f"{path}: expected an object as vision_config, found {config.get('vision_config')!r:.60}")
    for field in fields(PhotonConfig):
        if field.name in PhotonConfig.__annotations__ and field.name in config:
            _check_type(path, field.name, field.default, config[field.name])


def _check_type(path: Path, name: str, default: Any, value: Any) -> None:
    """Raise UsageError for a value of another kind than the default of its setting."""
    kinds = {
        bool: (bool, "true or false"),
        int: (int | float, "a number"),
        float: (int | float, "a number"),
        str: (str, "a text"),
        tuple: (list, "a list"),
    }
    if type(default) not in kinds:
        return
    kind, words = kinds[type(default)]
    if not isinstance(value, kind) or (isinstance(value, bool) and type(default) is not bool):
        raise UsageError(f"{path}: expected {words} as {name}, found {value!r:.60}; correct it")


def _rows_that_fit(config: PhotonConfig, settings: AnswerSettings, device: torch.device, dtype: torch.dtype) -> int:
    """Return how many questions, a volume for each, are answered together in the memory that is free: a power of two.

    What a row takes is counted as if no token were dropped. Where it is too much after all, batches are halved.
    """
    if device.type == "cuda":
        free_bytes, most = torch.cuda.mem_get_info(device)[0], MOST_ROWS
    else:
        free_bytes, most = psutil.virtual_memory().available, MOST_ROWS_CPU
    fitting = int(SHARE_OF_MEMORY * free_bytes / _bytes_of_row(config, settings, dtype)) // settings.samples
    return 1 << (min(max(fitting, 1), most).bit_length() - 1)


def _bytes_of_row(config: PhotonConfig, settings: AnswerSettings, dtype: torch.dtype) -> int:
    """Return about how many bytes a question on one volume takes at its peak."""
    text, vision = config.text_config, config.vision_config
    patches, tokens = prod(config.patches_thw), prod(config.tokens_thw) + TEXT_TOKENS
    head_dim = text.hidden_size // text.num_attention_heads
    of_cache = 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim * (tokens + settings.max_new_tokens)
    of_layer = tokens * (6 * text.hidden_size + 3 * text.intermediate_size)
    of_tower = patches * (8 * vision.hidden_size + 3 * vision.intermediate_size)
    voxels = prod(config.model_shape_zyx)
    # A row's part of the prefix is there twice. Logits and voxels are float32; the former are copied a few times.
    return dtype.itemsize * (2 * of_cache + max(of_layer, of_tower)) + 4 * (4 * text.vocab_size + 2 * voxels)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    except RuntimeError:
        raise UsageError(f"device: expected auto, cpu, cuda or cuda:N, found {name!r}") from None
    gpus = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise UsageError(f"device: expected one of this machine, found {name!r} where torch sees {gpus} GPUs; try cpu")
    return device


def _add_adapter(model: PhotonForConditionalGeneration, place: Path) -> None:
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
    _check_model_folder(model)
    with loading(model):
        depth, height, width = PhotonConfig.from_pretrained(model, revision=revision or "main").model_shape_zyx
    return depth, height, width
