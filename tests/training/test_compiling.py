"""Compiled layers: the losses and gradients of eager ones, in as many graphs for any layers, rows and lengths."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_forwards import CURRICULUM, read, trained_on
from test_runs import FSDP, TORCHRUN, same_log, trained, with_threads
from torch._dynamo.utils import counters

from photon_data.errors import UsageError
from photon_train import PhotonForConditionalGeneration
from photon_train.rows import read_train_rows
from photon_train.training.batches import together
from photon_train.training.compiling import compile_layers
from photon_train.training.config import TrainConfig
from photon_train.training.log import read_log
from photon_train.training.setup import checkpoint_activations, start

DROPS = 25  # a step of CURRICULUM
FIRST = ([["a0", "a1"], ["b0", "b1"]], [["a0", "a1"]])  # two volumes in one forward, one volume
LATER = ([["c0", "c1", "c2"], ["d0", "d1", "d2"], ["a0", "a1", "a2"]], [["d0", "d1", "d2", "d3"]])


@pytest.mark.slow
@pytest.mark.parametrize("again", [True, False], ids=["checkpointed", "kept"])
def test_losses_and_gradients_are_those_of_eager_layers_in_as_many_graphs_for_any_layers_and_batches(wide, again):
    (folder, manifest), graphs = wide, []
    rows = read_train_rows([manifest])
    for layers in (4, 7):
        plain, compiled = (
            PhotonForConditionalGeneration.from_pretrained(folder / f"{layers}" / "s2", **CURRICULUM).train()
            for _ in range(2)
        )
        torch._dynamo.reset()
        counters.clear()
        settings = TrainConfig(gradient_checkpointing=again, vision_gradient_checkpointing=again)
        checkpoint_activations(compiled, settings)
        compile_layers(compiled, torch.device("cpu"))
        for groups in (*FIRST, *LATER):
            (batch,), processor = read_together(folder / f"{layers}", rows, groups)
            expected, found = (trained_on(m, [batch], batch.groups, DROPS, processor) for m in (plain, compiled))
            assert found[0] == pytest.approx(expected[0], rel=1e-5, abs=1e-6)
            assert found[1].keys() == expected[1].keys()
            for name, gradient in found[1].items():
                assert (gradient - expected[1][name]).norm() <= 2e-5 * expected[1][name].norm() + 1e-7, name
            graphs.append(counters["stats"]["unique_graphs"])
        assert not counters["graph_break"]
    # The trial; blocks within windows and within slabs. Of each, layers of a prefix, of questions, of what stays.
    assert graphs == [6, 8, 8, 8] * 2


def read_together(models, rows, groups):
    batches, processor = read(models, rows, groups)
    return together(batches, processor), processor


@pytest.mark.slow
def test_a_run_has_the_same_losses(config, tmp_path):
    plain = replace(config, max_steps=4, eval=config.data)
    compiled = trained(replace(plain, compile=True, output=str(tmp_path / "compiled")))
    same_log(compiled, trained(plain), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "autocast"])
def test_low_rank_updates_have_the_same_losses(config, tmp_path, precision):
    plain = replace(config, max_steps=3, lora_rank=2, precision=precision)
    compiled = trained(replace(plain, compile=True, output=str(tmp_path / "compiled")))
    same_log(compiled, trained(plain), 1e-5 if precision == "fp32" else 0.02)


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True], ids=["DDP", "FSDP2"])
def test_two_processes_have_the_losses_of_one_that_is_not_compiled(config, tmp_path, shared):
    config = replace(config, max_steps=3)
    one = trained(replace(config, output=str(tmp_path / "one")))
    (tmp_path / "run.json").write_text(json.dumps(replace(config, compile=True).to_json()))
    script = [str(Path(__file__).with_name("as_gpus.py")), str(tmp_path / "run.json")]
    words = ["-m", "photon_cli", "train", "s2", "--config", str(tmp_path / "run.json")]
    command = [sys.executable, "-m", *TORCHRUN[:-1], *(script if shared else words)]
    env = with_threads(1) | (FSDP if shared else {})
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    same_log(read_log(Path(config.output)), one, 1e-5)


def test_where_torch_cannot_compile_a_run_says_so_before_its_first_step(config, without_compiler):
    with pytest.raises(
        UsageError, match=r"expected a compiler that torch can use, found \w+: \w.*; leave compile out$"
    ):
        start(replace(config, compile=True), resume=False)
