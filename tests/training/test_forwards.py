"""Groups of several volumes in one forward: losses and gradients are the sums of those of separate groups."""

from functools import partial

import pytest
import torch
from torch.utils.data import DataLoader

from photon_train import PhotonForConditionalGeneration, PhotonProcessor
from photon_train.rows import read_train_rows
from photon_train.training import batches, loop
from photon_train.training.batches import MicroBatches, together
from photon_train.training.config import TrainConfig
from photon_train.training.grounding import GroundingLoss
from photon_train.training.log import read_log
from photon_train.training.loop import run_steps
from photon_train.training.plan import MicroBatch, plan_epoch
from photon_train.training.setup import start

ALONE = (["a2"], ["b0"], ["e0"], ["c1"])  # answers and questions of other lengths
SHARED = (["a0", "a3", "a4"], ["f0", "f2"], ["d1", "d2", "d3"])
CURRICULUM = {"soft_start": 10, "hard_start": 20, "flip_start": 30}
PARTS = ("loss", "ce", "band", "robustness", "flip")


def read(models, rows, groups, stage=2, weights=None, **settings):
    """The batches of groups given by the ids of their rows; the perturbed and flipped ones are drawn."""
    processor = PhotonProcessor.from_pretrained(models / f"s{stage}", **settings)
    number = {row.id: i for i, row in enumerate(rows)}
    weights = weights or [1.0 + 0.5 * i for i in range(len(groups))]
    plan = [MicroBatch(tuple(number[id] for id in ids), i + 1, weights[i]) for i, ids in enumerate(groups)]
    items = MicroBatches(rows, processor, TrainConfig(stage=f"s{stage}"), training=True)
    found = [items[one] for one in plan]
    for batch in found:
        assert not batch.error, batch.error
        as_stored = torch.float32 if "perturbed" in batch.inputs else torch.int16
        assert {volume.dtype for volume in batch.inputs.get("pixel_values_videos", [])} <= {as_stored}
    return found, processor


def trained_on(model, parts, accumulated, step, processor):
    """Weighted sums of the losses, and gradients, as the loop of training makes them."""
    model.zero_grad()
    sums = dict.fromkeys(PARTS, 0.0)
    for batch in parts:
        scale = batch.weight / accumulated
        kwargs = {} if step is None else {"step": step, "total_steps": 40, "loss_scale": scale, "flip": batch.flips}
        out = model(**batch.to("cpu", processor).inputs, **kwargs)
        (out.loss * scale).backward()
        for name in PARTS:
            sums[name] += out[name].item() * batch.weight
    return sums, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected):
    sums, gradients = found
    assert sums == pytest.approx(expected[0], rel=1e-5, abs=1e-6)
    assert gradients.keys() == expected[1].keys()
    for name, gradient in gradients.items():
        assert (gradient - expected[1][name]).norm() <= 2e-4 * expected[1][name].norm() + 1e-7, name


@pytest.mark.parametrize("groups", [ALONE, SHARED], ids=["one question each", "on a prefix"])
@pytest.mark.parametrize("step", [None, 5, 15, 35])  # stage 1; dense, soft, hard with flips
def test_groups_in_one_forward_have_the_losses_and_gradients_of_separate_ones(models, manifest, groups, step):
    stage = 1 if step is None else 2
    rows = read_train_rows([manifest])
    draws = {"robustness_probability": 0.6, "flip_probability": 0.4} if step else {}
    alone, processor = read(models, rows, groups, stage, **draws)
    if step:
        perturbed = ["perturbed" in batch.inputs for batch in alone]
        assert any(perturbed) and not all(perturbed), "some of them"
    model = PhotonForConditionalGeneration.from_pretrained(models / f"s{stage}", **CURRICULUM).train()
    joined = together(alone, processor)
    assert len(joined) == 1 and joined[0].groups == len(groups)
    assert joined[0].ids == [id for ids in groups for id in ids]
    expected = trained_on(model, alone, len(alone), step, processor)
    assert_same(trained_on(model, joined, len(alone), step, processor), expected)
    if step:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        assert_same(trained_on(model, joined, len(alone), step, processor), expected)


@pytest.mark.parametrize("scheduler", ["random", "foreground", "fastv", "divprune", "visionzip", "nucleus"])
def test_other_schedulers_keep_the_same_in_one_forward(models, manifest, scheduler):
    rows = read_train_rows([manifest])
    model = PhotonForConditionalGeneration.from_pretrained(models / "s2", scheduler=scheduler, **CURRICULUM).train()
    for groups in (ALONE, SHARED):
        alone, processor = read(models, rows, groups, scheduler=scheduler)
        joined = together(alone, processor)
        assert len(joined) == (3 if scheduler == "nucleus" and groups is SHARED else 1)
        expected = trained_on(model, alone, len(alone), 25, processor)
        assert_same(trained_on(model, joined, len(alone), 25, processor), expected)


def test_groups_of_other_shapes_and_what_cannot_be_read_stay_apart(models, manifest):
    rows = read_train_rows([manifest])
    groups = [["a0"], ["text"], ["pair"], ["c0", "c1"], ["b0"], ["d0", "d1"]]
    alone, processor = read(models, rows, groups)
    bad = rows[0]._replace(id="bad", videos=("nowhere.ome.zarr",))
    unread = MicroBatches([bad], processor, TrainConfig(stage="s2"), training=False)[MicroBatch((0,), 9)]
    filler, _ = read(models, rows, [["e0"]], weights=[0.0])
    found = together([*alone, unread, *filler], processor)
    assert [batch.ids for batch in found] == [["a0", "b0"], ["text"], ["pair"], ["c0", "c1", "d0", "d1"], ["bad"]]
    assert [batch.groups for batch in found] == [2, 1, 1, 2, 1]
    assert found[0].weight == alone[0].weight + alone[4].weight
    assert [batch.ids for batch in together(filler, processor)] == [["e0"]], "every process calls the model"


@pytest.mark.slow
def test_a_run_is_the_same_however_many_groups_go_through_the_model_together(trained):
    rows = trained()
    for size in (3, 8):
        for row, other in zip(rows, trained(groups_per_forward=size), strict=True):
            assert other == pytest.approx(row, rel=2e-3, abs=1e-5)


def test_the_same_workers_read_all_epochs_in_their_order(models, manifest, tmp_path, monkeypatch):
    loaders = []

    class Counted(DataLoader):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            loaders.append(self.num_workers)

    monkeypatch.setattr(batches, "DataLoader", Counted)
    counts = {"groups_per_step": 9, "groups_per_forward": 2, "questions_per_volume": 5, "epochs": 3, "workers": 1}
    paths = {"model": str(models / "s1"), "data": (str(manifest),), "output": str(tmp_path)}
    run = start(TrainConfig("s1", **paths, **counts, lr_threshold=0.0, track=()), resume=False)
    seen = []
    for groups, own in loop._steps_left(run):
        assert sum(batch.groups for batch in own) == groups
        seen.append((run.state["epoch"], sorted(id for batch in own for id in batch.ids)))
        run.state["step_in_epoch"] += 1
    assert loaders == [1]
    expected = [
        (epoch, sorted(run.rows[i].id for group in step for i in group.rows))
        for epoch in range(3)
        for step in plan_epoch(run.rows, run.config, epoch)
    ]
    assert seen == expected and len(seen) == 3


@pytest.fixture
def trained(models, manifest, tmp_path):
    rates = dict.fromkeys(("lr_vision", "lr_merger", "lr_language_model", "lr_threshold"), 1e-3)
    draws = {"soft_start": 1, "hard_start": 2, "flip_start": 3, "flip_probability": 0.5, "robustness_probability": 0.3}
    same = partial(TrainConfig, "s2", str(models / "s2"), data=(str(manifest),), eval=(str(manifest),), **rates)
    logged = (*PARTS, "step", "threshold", "keep_ratio", "questions", "volumes", "visual_tokens_kept", "tokens")

    def log_of(**settings):
        output = tmp_path / str(len(settings) and settings["groups_per_forward"])
        counts = {"groups_per_step": 4, "questions_per_volume": 2, "max_steps": 4, "eval_every": 3}
        config = same(output=str(output), **counts, precision="fp32", workers=0, track=(), photon=draws, **settings)
        run_steps(start(config, resume=False))
        evaluated = ("eval_loss", "eval_forced_exact", "eval_keep_ratio", "eval_questions")
        return [{name: row[name] for name in (*logged, *evaluated) if name in row} for row in read_log(output)]

    return log_of


@pytest.mark.parametrize("groups", [ALONE, SHARED], ids=["one question each", "on a prefix"])
@pytest.mark.parametrize("stage", [1, 2])
def test_groups_in_one_forward_have_the_grounding_of_separate_ones(models, manifest, groups, stage):
    """Of stage 2, some volumes are perturbed: nothing is grounded in them. Nothing is known of the last group."""
    alone, processor = read(models, read_train_rows([manifest]), groups, stage, robustness_probability=0.6)
    model = PhotonForConditionalGeneration.from_pretrained(models / f"s{stage}").train()
    known = {id: torch.eye(8)[number] for number, id in enumerate(["a0", "a2", "a4", "b0", "e0", "f2"])}
    grounding_loss = GroundingLoss(model, known)

    def grounded(parts):
        model.zero_grad()
        total = 0.0
        for batch in parts:
            model(**batch.to("cpu", processor).inputs)
            if (loss := grounding_loss(batch)) is not None:
                (loss * batch.weight).backward()
                total += loss.item() * batch.weight
        attention = model.model.language_model.layers[model.config.drop_layer].self_attn
        return total, attention.q_proj.weight.grad.clone(), attention.k_proj.weight.grad.clone()

    expected, joined = grounded(alone), together(alone, processor)
    assert len(joined) == 1 and expected[0] > 0
    for found, one in zip(grounded(joined), expected, strict=True):
        torch.testing.assert_close(found, one, rtol=1e-4, atol=1e-6)
