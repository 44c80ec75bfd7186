"""Checkpoints: their published key names, which of the three layouts they have, and what does not fit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.utils.hub import cached_file

from photon_data.errors import UsageError, is_out_of_memory
from photon_train.configuration_photon import PhotonConfig, PhotonVisionConfig

HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "force_download", "subfolder")


@contextmanager
def refusing_model(model: str) -> Iterator[None]:
    """Raise UsageError for whatever libraries raise over the files of a model, which may be somebody else's."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        found = str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"
        raise UsageError(f"{model}: expected a model that can be loaded, found: {found[:2000]}") from None


class Layout(Enum):
    """What a checkpoint was trained as."""

    STOCK = "Qwen2.5-VL"
    STAGE1 = "Photon stage 1"
    STAGE2 = "Photon stage 2"


def register_published_names(class_name: str) -> None:
    """Make transformers read and write the published key names for this class."""
    renamings: list[Any] = [
        WeightRenaming(r"^visual", "model.visual"),
        WeightRenaming(r"^model(?!\.(language_model|visual))", "model.language_model"),
        WeightRenaming(r"visual\.vision_patch_embed", "visual.patch_embed"),
    ]
    register_checkpoint_conversion_mapping(class_name, renamings, overwrite=True)


def hub_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of from_pretrained that say where on the hub to look."""
    return {k: v for k, v in kwargs.items() if k in HUB_OPTIONS and v is not None}


def checkpoint_keys(path_or_id: str, **kwargs: Any) -> set[str]:
    """Return the tensor names of a local or hub checkpoint. Raises ValueError without whole safetensors files."""
    if Path(path_or_id).is_absolute() and not Path(path_or_id).is_dir():
        raise ValueError(f"expected a model directory or a hub id, found neither at {path_or_id}; check the path")
    options = hub_options(kwargs)
    optional = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_gated_repo": True}
    if index := cached_file(path_or_id, "model.safetensors.index.json", **options, **optional):
        return set(json.loads(Path(index).read_text())["weight_map"])
    single = cached_file(path_or_id, "model.safetensors", **options, **optional)
    if single is None:
        raise ValueError(
            f"expected model.safetensors or its index, found none in {path_or_id}; pickled weights (.bin, .pt) can run "
            "code and are not read: convert them to safetensors on a machine you can lose"
        )
    try:
        with safe_open(single, framework="pt") as tensors:
            return set(tensors.keys())
    except SafetensorError as error:
        raise ValueError(f"{single}: expected a complete safetensors file, found {error}; fetch it again") from error


def layout_of(keys: set[str]) -> Layout:
    """Return the layout that the tensor names show. Raises ValueError when they show none."""
    parts = {".atp.": Layout.STAGE2, "visual.vision_patch_embed.": Layout.STAGE1, "visual.patch_embed.": Layout.STOCK}
    for part, layout in parts.items():
        if any(part in key for key in keys):
            return layout
    raise ValueError(
        f"expected a Qwen2.5-VL or Photon checkpoint, found neither patch_embed nor vision_patch_embed "
        f"among {len(keys)} keys, such as {sorted(keys)[:3]}; check the path"
    )


def config_for(path: str, layout: Layout, stage: int | None, settings: dict[str, Any], **kwargs: Any) -> PhotonConfig:
    """Return the configuration to load a checkpoint for `stage` (default: its own; below it: ValueError)."""
    own_stage = 2 if layout is Layout.STAGE2 else 1
    stage = own_stage if stage is None else stage
    if stage < own_stage:
        raise ValueError(
            f"{layout.value} checkpoint: expected stage {own_stage}, found {stage}; for no pruning set scheduler='none'"
        )
    saved, _ = PhotonConfig.get_config_dict(path, **hub_options(kwargs))
    if layout is Layout.STOCK:
        # one channel and cubic patches in place of RGB frames
        rgb, fresh = saved["vision_config"], PhotonVisionConfig()
        cubic = {"in_channels": 1, "in_chans": 1, "temporal_patch_size": rgb.get("patch_size", fresh.patch_size)}
        settings = {"vision_config": {**rgb, **cubic, "tokens_per_second": fresh.tokens_per_second}, **settings}
    if stage == 2 and layout is not Layout.STAGE2:
        settings = {"scheduler": "its", **settings}
    return PhotonConfig.from_dict({**saved, **settings, "stage": stage})


def check_loaded(info: dict[str, Any], layout: Layout, stage: int) -> None:
    """Raise ValueError listing every key that is missing, unexpected or of another shape, save fresh weights."""

    def is_fresh(key: str) -> bool:
        fresh_predictor = stage == 2 and layout is not Layout.STAGE2 and ".atp." in key
        return fresh_predictor or (layout is Layout.STOCK and key == "model.visual.patch_embed.proj.weight")

    problems = [f"missing {key}" for key in sorted(info["missing_keys"]) if not is_fresh(key)]
    problems += [f"unexpected {key}" for key in sorted(info["unexpected_keys"])]
    problems += [
        f"{key}: expected shape {tuple(expected)}, found {tuple(found)}"
        for key, found, expected in sorted(info["mismatched_keys"])
        if not is_fresh(key)
    ]
    if problems:
        listed = "\n  ".join(problems)
        raise ValueError(
            f"expected a complete {layout.value} checkpoint, found {len(problems)} keys that do not fit:\n  {listed}\n"
            "Check that config.json belongs to these weights and that no shard is cut off."
        )
