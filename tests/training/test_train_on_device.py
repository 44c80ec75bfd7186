"""Training on a device that is not the CPU: every tensor is where the others are, and the run is the same."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from other_device import device
from safetensors.torch import load_file

from photon_train.checkpoint import checkpoints
from photon_train.training.log import read_log
from photon_train.training.loop import run_steps
from photon_train.training.setup import start

pytestmark = pytest.mark.slow
COMPARED = (
    "loss",
    "ce",
    "band",
    "robustness",
    "flip",
    "threshold",
    "keep_ratio",
    "eval_loss",
    "grad_norm/language_model",
)


@pytest.fixture
def config(config, manifest, tmp_path):
    return replace(config, eval=(str(manifest),), output=str(tmp_path / "here"), max_steps=5, eval_every=4)


def train(config, resume=False):
    run = start(config, resume=resume)
    run_steps(run)
    assert {p.device for p in run.model.parameters()} == {run.accelerator.device}
    return read_log(Path(config.output))


def train_there(config, resume=False):
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True)
    PartialState._shared_state["device"] = device()
    return train(config, resume)


def same(rows, others):
    assert len(rows) == len(others) == 5
    for row, other in zip(rows, others, strict=True):
        assert numbers(row) == pytest.approx(numbers(other), rel=1e-3, abs=1e-5)


def numbers(row):
    return {name: row[name] for name in COMPARED if row.get(name) is not None}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"stage": "s1", "photon": {}, "share_prefix": False, "augment": "both"},
        {"lora_rank": 2, "gradient_checkpointing": False, "vision_gradient_checkpointing": False},
    ],
    ids=lambda settings: ", ".join(settings) or "as it is",
)
def test_a_run_on_a_device_is_the_run_on_the_cpu(there, config, models, tmp_path, settings):
    settings = settings | ({"model": str(models / "s1")} if "stage" in settings else {})
    config = replace(config, **settings)
    here = train(config)
    found = there(train_there, replace(config, output=str(tmp_path / "there")))
    same(found, here)
    name = "adapter.safetensors" if config.lora_rank else "model.safetensors"
    ends = [load_file(checkpoints(tmp_path / place)[-1] / name) for place in ("here", "there")]
    assert ends[0].keys() == ends[1].keys()
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-3, atol=1e-4)


def test_a_run_stopped_on_the_cpu_goes_on_on_a_device(there, config, tmp_path):
    run = start(config, resume=False, callback=stop_behind_step_3)
    with pytest.raises(KeyboardInterrupt):
        run_steps(run)
    found = there(train_there, config, True)
    same(found, train(replace(config, output=str(tmp_path / "whole"))))


def stop_behind_step_3(row):
    if row["step"] == 3:
        raise KeyboardInterrupt
