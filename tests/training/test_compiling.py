"""Compiled layers: the losses and gradients of eager ones, in as many graphs for any layers, rows and lengths."""

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_forwards import CURRICULUM, read, trained_on
from test_runs import FSDP, TORCHRUN, command, same_log, trained, with_threads
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
def test_losses_and_gradients_are_those_of_eager_layers_in_as_many_graphs_for_any_layers_and_batches(wide):
    (folder, manifest), graphs = wide, []
    rows = read_train_rows([manifest])
    for layers in (4, 7):
        plain, compiled = (
            PhotonForConditionalGeneration.from_pretrained(folder / f"{layers}" / "s2", **CURRICULUM).train()
            for _ in range(2)
        )
        torch._dynamo.reset()
        counters.clear()
        checkpoint_activations(compiled, TrainConfig())
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
    # The trial, blocks within windows, within slabs, layers of two prefixes, of their questions, of what stays;
    # then layers of one prefix, and of questions on it; and what stays once as padded rows, once as packed ones.
    assert graphs == [6, 8, 9, 9, 6, 9, 9, 9]


@pytest.mark.slow
def test_a_block_that_is_listened_to_is_heard(wide):
    """The `visionzip` scheduler asks the last block what its tokens receive; the first has the same code."""
    folder, manifest = wide
    models = [
        PhotonForConditionalGeneration.from_pretrained(folder / "4" / "s2", scheduler="visionzip", **CURRICULUM).train()
        for _ in range(2)
    ]
    for model in models:
        model.model.visual.fullatt_block_indexes = [0, 1]
    compile_layers(models[1], torch.device("cpu"))
    rows = read_train_rows([manifest])
    (batch,), processor = read_together(folder / "4", rows, FIRST[1], scheduler="visionzip")
    expected, found = (trained_on(model, [batch], 1, DROPS, processor) for model in models)
    assert found[0] == pytest.approx(expected[0], rel=1e-5, abs=1e-6)
    blocks = [name for name in found[1] if ".blocks." in name]
    assert blocks and all((found[1][n] - expected[1][n]).norm() <= 2e-5 * expected[1][n].norm() + 1e-7 for n in blocks)


def read_together(models, rows, groups, **settings):
    batches, processor = read(models, rows, groups, **settings)
    return together(batches, processor), processor


@pytest.fixture
def alike(config, wide):
    """A run whose groups are all of four questions on one volume, which drops tokens from the first step on."""
    folder, manifest = wide
    counts = {"groups_per_step": 2, "questions_per_volume": 4, "max_steps": 3}
    starts = config.photon | {"soft_start": 0, "hard_start": 0, "flip_start": 1}
    return replace(config, model=str(folder / "4" / "s2"), data=(str(manifest),), photon=starts, **counts)


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_run_has_the_same_losses_and_is_judged_by_the_same(alike, tmp_path, lora_rank):
    plain = replace(alike, lora_rank=lora_rank, eval=alike.data)
    compiled = trained(replace(plain, compile=True, output=str(tmp_path / "compiled")))
    same_log(compiled, trained(plain), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True], ids=["DDP", "FSDP2"])
def test_two_processes_have_the_losses_of_one_that_is_not_compiled(alike, tmp_path, shared):
    one = trained(replace(alike, output=str(tmp_path / "one")))
    words = command(replace(alike, compile=True), tmp_path / "run.json", *TORCHRUN)
    if shared:
        words[-6:] = [str(Path(__file__).with_name("as_gpus.py")), str(tmp_path / "run.json")]
    env = with_threads(1) | (FSDP if shared else {})
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    same_log(read_log(Path(alike.output)), one, 1e-6)


def test_where_torch_cannot_compile_a_run_says_so_before_its_first_step(config, without_compiler):
    with pytest.raises(
        UsageError, match=r"expected a compiler that torch can use, found \w+: \w.*; leave compile out$"
    ):
        start(replace(config, compile=True), resume=False)
