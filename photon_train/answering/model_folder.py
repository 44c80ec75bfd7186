"""What a folder must hold to be asked: looked at before anything is loaded, since libraries put defaults in for what is
missing, among them those of a model of 72 billion weights.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from photon_data.errors import UsageError
from photon_data.json_text import from_json
from photon_train.checkpoint import ADAPTER, checkpoints
from photon_train.configuration_photon import PhotonConfig

CONFIG = "config.json"
TOKENIZERS = ("tokenizer.json", "vocab.json")  # one of them
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")


def check_model_folder(model: str) -> None:
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
