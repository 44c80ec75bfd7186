"""The model on a device that is not the CPU, and what that device refuses."""

import numpy as np
import other_device
import pytest
import torch
from askable import QUESTIONS, row
from other_device import device

from photon_data.volume import Geometry, Volume
from photon_train import PhotonForConditionalGeneration, PhotonProcessor
from photon_train.tiny import byte_tokenizer, tiny_config

pytestmark = pytest.mark.slow


def waits_of_a_step(vision_layers, layers):
    """Return for which operations a forward and backward of a model of so many layers would wait for a GPU."""
    tokenizer = byte_tokenizer()
    config = tiny_config(
        tokenizer, stage=2, num_hidden_layers=layers, initial_threshold=0.45, model_shape_zyx=(28, 56, 56)
    )
    config.vision_config.depth = vision_layers
    model = PhotonForConditionalGeneration(config).to(device()).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    volume = np.random.default_rng(0).integers(-1000, 1000, (28, 56, 56), np.int16)
    asked = row(
        "q", QUESTIONS[0], Volume(volume, Geometry.axis_aligned(volume.shape, (1, 1, 1), (0, 0, 0))), answer="no"
    )
    inputs = PhotonProcessor(tokenizer, config)(rows=[asked], for_training=True)
    inputs = {name: value.to(device()) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    other_device.waits.clear()
    model(**inputs, step=10**6).loss.backward()
    return list(other_device.waits)


def test_more_layers_do_not_wait_for_the_device_more_often(there):
    shallow, deep = there(waits_of_a_step, 2, 4), there(waits_of_a_step, 5, 7)
    assert shallow
    assert deep == shallow


def refused():
    """Return what of tensors on the CPU and there is refused."""
    here, there = torch.arange(6.0), torch.arange(6.0).to(device())
    order = torch.tensor([1, 0])
    tried = {
        "a sum": lambda: here + there,
        "a scalar of there": lambda: here + there[0],
        "joined": lambda: torch.cat([here, there]),
        "gathered": lambda: there.gather(0, order),
        "indices of there": lambda: here[order.to(device())],
        "values of here": lambda: there.index_put((order.to(device()),), here[:2]),
        "numpy": lambda: there.numpy(),
    }
    allowed = (
        there + 1.0,
        there + here[0],
        there[order],
        there.cpu() + here,
        here.copy_(there),
        there.clone().copy_(here),
    )
    assert [x.device.type for x in allowed] == ["other"] * 3 + ["cpu"] * 2 + ["other"]
    return {name for name, call in tried.items() if _raises(call)} ^ tried.keys()


def _raises(call):
    try:
        call()
    except (RuntimeError, TypeError):
        return True
    return False


def test_what_a_gpu_refuses_is_refused(there):
    assert there(refused) == set()
