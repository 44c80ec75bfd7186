"""The questions of one volume on one encoding: the same loss and gradients as each with its own."""

import random
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from answers import put

from photon_train import PhotonForConditionalGeneration, PhotonProcessor, scheduling
from photon_train.rows import read_train_rows
from photon_train.scheduling import descriptors
from photon_train.training.batches import MicroBatches
from photon_train.training.config import TrainConfig
from photon_train.training.plan import MicroBatch


@pytest.fixture(params=["s1", "s2"])
def model(request, models):
    return PhotonForConditionalGeneration.from_pretrained(models / request.param).train()


def batch_of(models, rows, indices, model, *, share_prefix=True, perturbed=False, same_calls=False):
    """A batch in which nothing is random, except that all volumes may be perturbed."""
    processor = PhotonProcessor.from_pretrained(models / f"s{model.config.stage}", robustness_probability=1.0)
    config, micro_batch = TrainConfig(stage="s2", share_prefix=share_prefix), MicroBatch(tuple(indices), 0)
    item = MicroBatches(rows, processor, config, training=perturbed, same_calls=same_calls)[micro_batch]
    assert not item.error, item.error
    return item.to("cpu", processor)


def losses(model, batch, **kwargs):
    model.zero_grad()
    out = model(**batch.inputs, **kwargs)
    out.loss.backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("step", [0, 15, 25, None])  # dense, soft, hard, hard without flips
def test_sharing_a_volume_changes_neither_loss_nor_gradients(model, models, manifest, step):
    rows = read_train_rows([manifest])
    indices = [i for i, row in enumerate(rows) if row.id.startswith("a")]
    kwargs = {} if model.config.stage == 1 or step is None else {"step": step, "total_steps": 40}
    model.config.soft_start, model.config.hard_start, model.config.flip_start = 10, 20, 30
    one, shared = (batch_of(models, rows, indices, model, share_prefix=share) for share in (False, True))
    assert "prefix" in shared.inputs and "prefix" not in one.inputs
    assert len(shared.inputs["pixel_values_videos"]) * len(indices) == len(one.inputs["pixel_values_videos"])
    alone, its_gradients = losses(model, one, **kwargs)
    together, gradients = losses(model, shared, **kwargs)
    for part in ("loss", "ce", "band", "robustness", "flip"):
        torch.testing.assert_close(getattr(together, part), getattr(alone, part), rtol=1e-5, atol=1e-6)
    assert gradients.keys() == its_gradients.keys()
    for name, gradient in gradients.items():
        scale = its_gradients[name].norm().item()
        assert (gradient - its_gradients[name]).norm().item() <= 2e-4 * scale + 1e-7, name


@pytest.mark.parametrize("step", [0, 15, 25])  # dense, soft, hard
def test_gradient_checkpointing_on_a_shared_volume_changes_neither_loss_nor_gradients_and_scores_once(
    models, manifest, step, monkeypatch
):
    measured = []
    monkeypatch.setattr(scheduling, "descriptors", lambda *a: measured.append(0) or descriptors(*a))
    model = PhotonForConditionalGeneration.from_pretrained(models / "s2").train()
    model.config.soft_start, model.config.hard_start, model.config.flip_start = 10, 20, 30
    rows = read_train_rows([manifest])
    batch = batch_of(models, rows, [i for i, row in enumerate(rows) if row.id.startswith("a")], model)
    assert "prefix" in batch.inputs
    plain, expected = losses(model, batch, step=step, total_steps=40)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert all(layer.gradient_checkpointing for layer in model.model.language_model.layers)
    measured.clear()
    again, found = losses(model, batch, step=step, total_steps=40)
    assert len(measured) == 1
    for part in ("loss", "ce", "band", "robustness", "flip"):
        torch.testing.assert_close(getattr(again, part), getattr(plain, part), rtol=1e-6, atol=1e-7)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("step", [0, 25])
def test_an_answer_before_the_last_volume_is_learned_shared_or_not(model, models, rows, tmp_path, step):
    videos = [rows[0]["videos"][0], rows[5]["videos"][0]]
    asked = [("user", "<video>Is it well?"), ("assistant", "yes, it is"), ("user", "<video>And now?")]
    told = [{"role": role, "content": text} for role, text in asked]
    early = [
        {"id": answer, "messages": [*told, {"role": "assistant", "content": answer}], "videos": videos}
        for answer in ("no", "worse")
    ]
    found = read_train_rows([put(tmp_path / "early.jsonl", early)])
    kwargs = {} if model.config.stage == 1 else {"step": step, "total_steps": 40}
    model.config.soft_start, model.config.hard_start, model.config.flip_start = 10, 20, 30
    for indices in ([0], [0, 1]):
        one = batch_of(models, found, indices, model, share_prefix=False)
        shared = batch_of(models, found, indices, model, same_calls=True)
        assert "prefix" in shared.inputs
        assert (one.inputs["labels"] >= 0).sum() == (shared.inputs["labels"] >= 0).sum()
        alone, its_gradients = losses(model, one, **kwargs)
        together, gradients = losses(model, shared, **kwargs)
        torch.testing.assert_close(together.loss, alone.loss, rtol=1e-5, atol=1e-6)
        for name, gradient in its_gradients.items():
            assert (gradients[name] - gradient).norm() <= 2e-4 * gradient.norm() + 1e-7, name


def test_a_perturbed_volume_is_perturbed_alike_shared_or_not(models, manifest):
    model = PhotonForConditionalGeneration.from_pretrained(models / "s2").train()
    rows = read_train_rows([manifest])
    one, shared = (
        batch_of(models, rows, [0, 1, 2], model, share_prefix=share, perturbed=True) for share in (False, True)
    )
    patches = len(shared.inputs["pixel_values_videos"])
    for part in one.inputs["pixel_values_videos"].split(patches):
        assert part.equal(shared.inputs["pixel_values_videos"])
    alone, together = losses(model, one)[0], losses(model, shared)[0]
    assert together.ce == 0 and together.robustness != 0
    torch.testing.assert_close(together.loss, alone.loss, rtol=1e-5, atol=1e-6)


def test_rows_of_every_layout_can_be_trained_on(model, models, manifest):
    rows = read_train_rows([manifest])
    for index, row in enumerate(rows):
        batch = batch_of(models, rows, [index], model)
        out, gradients = losses(model, batch)
        assert torch.isfinite(out.loss) and gradients, row.id
        assert batch.volumes == len(row.videos)


@pytest.mark.parametrize("step", [0, 15, 25])  # dense, soft, hard
def test_processes_that_share_weights_call_the_same_modules_whatever_their_rows_hold(model, models, manifest, step):
    model.config.soft_start, model.config.hard_start, model.config.flip_start = 10, 20, 30
    model.model.language_model.embed_tokens.requires_grad_(model.config.stage == 2)
    rows = read_train_rows([manifest])
    kwargs = {} if model.config.stage == 1 else {"step": step, "total_steps": 40}
    named = {row.id: i for i, row in enumerate(rows)}
    seen = []
    for ids in (["text"], ["b0"], ["pair"], ["other-head"], ["a0", "a1", "a2"]):
        indices = [named[id] for id in ids]
        plain, batch = (batch_of(models, rows, indices, model, same_calls=same) for same in (False, True))
        expected, its_gradients = losses(model, plain, **kwargs)
        with _calls(model) as calls:
            found, gradients = losses(model, batch, **kwargs)
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)
        for name, gradient in its_gradients.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=2e-3, atol=1e-5, msg=name)
        assert all(not gradient.any() for name, gradient in gradients.items() if name not in its_gradients)
        seen.append((calls, gradients.keys()))
    assert all(one == seen[0] for one in seen)


@contextmanager
def _calls(model):
    """Give a list of the modules with weights that are called, and then of those that gradients reach, in order."""
    calls = []

    def note(name, module, args, out):
        calls.append(name)
        out = out[0] if isinstance(out, tuple) else out
        if out.requires_grad:
            out.register_hook(lambda gradient: calls.append(f"gradient of {name}"))

    own = [
        (name, module) for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))
    ]
    hooks = [module.register_forward_hook(partial(note, name)) for name, module in own]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def test_what_is_drawn_for_a_group_depends_on_seed_epoch_and_group_only(models, manifest):
    processor = PhotonProcessor.from_pretrained(models / "s2", robustness_probability=0.5, flip_probability=0.5)
    rows = read_train_rows([manifest])

    def read(epoch, seed=4):
        config = TrainConfig(stage="s2", seed=seed)
        groups = [MicroBatch((i,), i, epoch=epoch) for i in range(12)]
        return [MicroBatches(rows, processor, config, training=True)[one].to("cpu", processor) for one in groups]

    items = read(epoch=1)
    random.seed(99)
    torch.manual_seed(99)
    again = read(epoch=1)
    assert all(
        a.inputs["pixel_values_videos"].equal(b.inputs["pixel_values_videos"])
        for a, b in zip(items, again, strict=True)
    )
    assert all(a.flips.equal(b.flips) for a, b in zip(items, again, strict=True))
    others = [read(epoch=2), read(epoch=1, seed=5)]
    assert all(any(not a.flips.equal(b.flips) for a, b in zip(items, other, strict=True)) for other in others)
    perturbed = sum("perturbed" in item.inputs for item in items + others[0])
    assert 4 <= perturbed <= 20  # 24 draws at one half


@pytest.mark.parametrize("share", [False, True])
def test_scores_are_not_rounded_by_autocast(models, manifest, share):
    model = PhotonForConditionalGeneration.from_pretrained(models / "s2").train()
    rows = read_train_rows([manifest])
    batch = batch_of(
        models, rows, [i for i, row in enumerate(rows) if row.id.startswith("d")], model, share_prefix=share
    )
    exact = model(**batch.inputs, step=8500).scheduled
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**batch.inputs, step=8500)
    out.loss.backward()
    cast = out.scheduled
    visual = batch.inputs["input_ids"] == model.config.video_token_id
    scores = cast.selection.score_BL[visual]
    assert scores.dtype == torch.float32
    rounded = scores.to(torch.bfloat16).float()
    assert (rounded != scores).any(), "a score that is a bfloat16 was rounded to one"
    # below layer its it did compute in bfloat16
    torch.testing.assert_close(scores, exact.selection.score_BL[visual], rtol=0.1, atol=0.1)
    assert torch.isfinite(out.loss)
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("floor", [3e-3, 1e-9])  # the published one, and one that no row reaches
@pytest.mark.parametrize("scale", [1.0, 0.25, 100.0])
def test_copies_of_a_row_move_the_threshold_as_the_row_does_at_any_loss_scale(models, manifest, floor, scale):
    model = PhotonForConditionalGeneration.from_pretrained(models / "s2", sgp_sigma_floor=floor).train()
    rows = read_train_rows([manifest])
    index = next(i for i, row in enumerate(rows) if row.id == "a2")
    alone = _threshold_gradients(model, batch_of(models, rows, [index], model), 1.0)
    for share in (False, True):
        copies = batch_of(models, rows, [index] * 8, model, share_prefix=share)
        for name, gradient in _threshold_gradients(model, copies, scale).items():
            assert (gradient / scale - alone[name]).norm() <= 1e-3 * alone[name].norm(), name


def test_rows_move_the_threshold_by_their_share_of_the_answer_tokens(models, manifest):
    model = PhotonForConditionalGeneration.from_pretrained(models / "s2").train()
    rows = read_train_rows([manifest])
    indices = [i for i, row in enumerate(rows) if row.id in ("a0", "a2")]  # "yes", "left lower lobe"
    counts = [int((batch_of(models, rows, [i], model).inputs["labels"] >= 0).sum()) for i in indices]
    assert counts[0] != counts[1]
    alone = [_threshold_gradients(model, batch_of(models, rows, [i], model), 1.0) for i in indices]
    for name, gradient in _threshold_gradients(model, batch_of(models, rows, indices, model), 1.0).items():
        expected = sum(n * one[name] for n, one in zip(counts, alone, strict=True)) / sum(counts)
        assert (gradient - expected).norm() <= 1e-3 * expected.norm(), name


def _threshold_gradients(model, batch, scale):
    """Gradients of the predictor in the hard phase, where what is not the band loss is the surrogate's."""
    model.zero_grad()
    (model(**batch.inputs, step=8500, loss_scale=scale).loss * scale).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if ".atp.predictor." in name}


@pytest.mark.parametrize("which", ["a", "text"])  # five questions on a volume; a row of text behind an idle volume
@pytest.mark.parametrize("scheduler", ["visionzip", "nucleus", "fastv"])
def test_sharing_changes_nothing_where_tokens_are_dropped_by_another_scheduler(models, manifest, scheduler, which):
    settings = {"keep_ratio": 0.5, "nucleus_mass": 0.6, "hard_start": 0}
    model = PhotonForConditionalGeneration.from_pretrained(models / "s2", scheduler=scheduler, **settings).train()
    rows = read_train_rows([manifest])
    indices = [i for i, row in enumerate(rows) if row.id.startswith(which)]
    alone, its_gradients = losses(model, batch_of(models, rows, indices, model, share_prefix=False), step=0)
    batch = batch_of(models, rows, indices, model, same_calls=True)
    together, gradients = losses(model, batch, step=0)
    dropped_BL = (batch.inputs["attention_mask"] == 1) & ~together.scheduled.keep_BL
    assert dropped_BL.any() == (which == "a")
    torch.testing.assert_close(together.loss, alone.loss, rtol=1e-5, atol=1e-6)
    for name, gradient in its_gradients.items():
        assert (gradients[name] - gradient).norm().item() <= 2e-4 * gradient.norm().item() + 1e-7, name
