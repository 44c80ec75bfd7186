"""Weights in bfloat16 are trained as their float32 copies would be."""

from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from photon_train.checkpoint import OPTIMIZER, checkpoints
from photon_train.training import optimizer
from photon_train.training.config import TrainConfig
from photon_train.training.log import read_log
from photon_train.training.loop import run_steps
from photon_train.training.optimizer import MasterAdamW
from photon_train.training.setup import start

GROUPS = ({"lr": 1e-5, "weight_decay": 0.1}, {"lr": 3e-4, "weight_decay": 0.0})


@pytest.mark.parametrize("at_a_time", [1, 100, 2**28])
def test_rounded_weights_move_as_torchs_adamw_moves_whole_ones(monkeypatch, at_a_time):
    monkeypatch.setattr(optimizer, "AT_A_TIME", at_a_time)
    draw = torch.Generator().manual_seed(0)
    whole = [torch.randn(size, generator=draw).bfloat16().float() for size in ((5, 7), (3,), (40, 2), (1,))]
    rounded = [x.bfloat16() for x in whole[:3]] + [whole[3].clone()]  # and one that is not rounded
    ours = MasterAdamW([{"params": rounded[i::2], **group} for i, group in enumerate(GROUPS)], (0.9, 0.95))
    theirs = torch.optim.AdamW([{"params": whole[i::2], **group} for i, group in enumerate(GROUPS)], betas=(0.9, 0.95))
    for step in range(30):
        for x, y in zip(rounded, whole, strict=True):
            gradient = torch.randn(x.shape, generator=draw).to(x.dtype)
            x.grad, y.grad = (None, None) if step % 3 == 0 and x.numel() == 3 else (gradient, gradient.float())
        ours.step()
        theirs.step()
    for x, y in zip(rounded, whole, strict=True):
        torch.testing.assert_close(ours.state[x].get("master", x), y, rtol=1e-6, atol=1e-7)
        assert x.equal(y.to(x.dtype)) or (x.float() - y).abs().max() <= 2**-8 * y.abs().max()
    assert not rounded[0].float().equal(whole[0])


@pytest.fixture
def config(models, manifest):
    photon = {"soft_start": 1, "hard_start": 2, "flip_start": 3}
    config = TrainConfig(stage="s2", model=str(models / "s2"), data=(str(manifest),), photon=photon, lr_threshold=1e-3)
    config = replace(config, precision="bf16", workers=0, track=(), epochs=2, save_every=2, groups_per_step=2)
    return replace(config, max_steps=4, keep_checkpoints=9)


def test_a_run_in_bfloat16_goes_on_from_its_float32_weights(config, tmp_path):
    runs = [replace(config, output=str(tmp_path / name)) for name in ("whole", "halted")]
    for run in runs:
        run_steps(start(run, resume=False))
    last = checkpoints(tmp_path / "halted")[-1]
    last.rename(tmp_path / "aside")
    run_steps(start(runs[1], resume=True))
    losses = [[row["loss"] for row in read_log(tmp_path / name)] for name in ("whole", "halted")]
    assert losses[0] == losses[1]
    weights, state = load_file(last / "model.safetensors"), load_file(last / OPTIMIZER)
    masters = {name.removesuffix("|master"): x for name, x in state.items() if name.endswith("|master")}
    assert {x.dtype for x in masters.values()} == {torch.float32}
    assert {x.dtype for name, x in weights.items() if ".atp." not in name} == {torch.bfloat16}
    assert {x.dtype for name, x in weights.items() if ".atp." in name} == {torch.float32}
    assert any(not x.equal(x.bfloat16().float()) for x in masters.values())


@pytest.mark.parametrize("lora_rank", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_float32_weights_stay_what_they_are_where_a_run_goes_on_with_copies_of_them_or_without(
    config, tmp_path, lora_rank
):
    """Runs under autocast, and those that FSDP2 shares, have no copies."""
    config = replace(config, lora_rank=lora_rank, output=str(tmp_path / "run"), epochs=9)
    weights: dict[str, torch.Tensor] = {}
    for steps, precision in ((3, "autocast"), (4, "bf16"), (5, "autocast"), (6, "bf16")):
        AcceleratorState._reset_state(reset_partial_state=True)  # it has one precision in a process
        run = start(replace(config, precision=precision, max_steps=steps), resume="auto")
        began_with = whole_weights(run)
        for name, weight in weights.items():
            assert began_with[name].equal(weight), name
        run_steps(run)
        weights = whole_weights(run)
        assert any(not weight.equal(weight.bfloat16().float()) for weight in weights.values())
        assert any(not weight.equal(began_with[name]) for name, weight in weights.items())


def whole_weights(run):
    """The float32 values of the weights that are trained."""
    state = run.optimizer.optimizer.state
    named = [(name, weight) for name, weight in run.model.named_parameters() if weight.requires_grad]
    return {name: state.get(weight, {}).get("master", weight).detach().float().clone() for name, weight in named}
