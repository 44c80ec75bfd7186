"""Reading a directory of golden numbers: what the authors' implementation computed on small random weights."""

import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from photon_train.configuration_photon import PhotonConfig
from photon_train.modeling_photon import PhotonForConditionalGeneration

MODEL_INPUTS = ("input_ids", "attention_mask", "labels", "video_grid_thw", "second_per_grid_ts", "pixel_values_videos")


class Golden:
    """One directory. Sizes, ids and settings all come from its files."""

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)

    @cached_property
    def tokens(self) -> dict[str, int]:
        """Special token ids by name."""
        return json.loads((self.directory / "manifest.json").read_text())["special_tokens"]

    @cached_property
    def cases(self) -> list[str]:
        """The cases that the directory's manifest lists; without a list, those it has files of."""
        listed = json.loads((self.directory / "manifest.json").read_text()).get("cases")
        return list(listed or (path.parent.name for path in self.directory.glob("*/expected.json")))

    def runs(self, case: str) -> list[str]:
        """The runs of a case; none where the directory does not hold it."""
        if case not in self.cases:
            return []
        meta = self.meta(case)
        return list(meta.get("variants") or meta.get("runs") or meta["inputs"])

    @cached_property
    def volumes(self) -> dict[str, Tensor]:
        """Flattened patches of every volume."""
        return load_file(self.directory / "inputs" / "volumes.safetensors")

    def meta(self, case: str) -> dict[str, Any]:
        """What a case says about itself."""
        return json.loads((self.directory / case / "expected.json").read_text())

    def expected(self, case: str) -> dict[str, Tensor]:
        """The expected tensors of a case."""
        return load_file(self.directory / case / "expected.safetensors")

    def inputs(self, name: str) -> dict[str, Tensor]:
        """All tensors of an input, masks of the reference included."""
        tensors = load_file(self.directory / "inputs" / f"{name}.safetensors")
        keys = json.loads((self.directory / "inputs" / f"{name}.json").read_text()).get("volumes") or []
        if keys:
            tensors["pixel_values_videos"] = torch.cat([self.volumes[volume["key"]] for volume in keys])
        return tensors

    def batch(self, name: str, *without: str) -> dict[str, Tensor]:
        """The tensors of an input that the model takes; it finds the question by itself."""
        return {k: v for k, v in self.inputs(name).items() if k in MODEL_INPUTS and k not in without}

    def settings(self) -> dict[str, Any]:
        """What the published config.json does not say."""
        return {"im_start_token_id": self.tokens["im_start"], "im_end_token_id": self.tokens["im_end"]}

    def config(self, which: str, **settings: Any) -> PhotonConfig:
        """The configuration of s1 or s2."""
        return self.model(which, **settings).config

    def model(self, which: str, **settings: Any) -> PhotonForConditionalGeneration:
        """A new model of s1 or s2 in float32, in eval mode."""
        path = self.directory / "models" / which
        model = PhotonForConditionalGeneration.from_pretrained(path, **{**self.settings(), **settings}).eval()
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = self.tokens["pad"]
        return model


def published_name(name: str) -> str:
    """The key under which the authors store one of our parameters."""
    name = re.sub(r"^model\.language_model\.", "model.", name)
    name = re.sub(r"^model\.visual\.", "visual.", name)
    return name.replace("visual.patch_embed.", "visual.vision_patch_embed.")


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients by published name; 0 where there is none."""
    return {
        published_name(name): torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()
    }
