"""A row does not depend on its batch mates: keep sets exactly, logits and gradients to 1e-5 in float32."""

import itertools
from typing import Any

import pytest
import torch
from batches import batch_of, prompts_of
from golden import Golden, gradients
from torch import Tensor
from torch.testing import assert_close

from photon_train.modeling_photon import PhotonForConditionalGeneration

MIX = ("two_vol", "text_only", "b1", "text_first")
PHASES = {"dense": 0, "soft": 4000, "hard": 8000}


@pytest.fixture(scope="module")
def rows(golden: Golden) -> list[dict[str, Tensor]]:
    """Two volumes, text only, one volume, text before the volume: four lengths."""
    return [golden.batch(name) for name in MIX]


@pytest.fixture
def model(golden: Golden) -> PhotonForConditionalGeneration:
    return golden.model("s2")


def losses_and_gradients(model: PhotonForConditionalGeneration, **inputs: Any):
    model.zero_grad(set_to_none=True)
    out = model(**inputs)
    out.loss.backward()
    return out, gradients(model)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("scheduler", ["its", "none", "random", "uniform", "foreground"])
@torch.no_grad()
def test_logits_and_keep_sets_equal_those_of_the_row_alone(golden: Golden, rows, side: str, scheduler: str) -> None:
    model = golden.model("s2", scheduler=scheduler)
    batch = batch_of(rows, side)
    out = model(**batch)
    for i, row in enumerate(rows):
        alone = model(**row)
        real = batch["attention_mask"][i].bool()
        if out.scheduled is None:
            assert_close(out.logits[i, real], alone.logits[0], rtol=0, atol=1e-5)
            continue
        here = out.scheduled.kept.mask_BM[i]
        assert_close(out.logits[i, here], alone.logits[0], rtol=0, atol=1e-5)
        if alone.scheduled is None:  # text only
            assert out.scheduled.keep_BL[i].equal(real)
        else:
            assert out.scheduled.keep_BL[i, real].equal(alone.scheduled.keep_BL[0])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("phase", PHASES)
def test_gradients_are_those_of_separate_rows(golden: Golden, rows, side: str, phase: str) -> None:
    """Of their mean, each row weighted by its answer tokens. The band is narrow, so that every row has a band loss."""
    model = golden.model("s2", band_low=0.8, band_high=0.8).train()
    inputs = {"step": PHASES[phase]}
    out, found = losses_and_gradients(model, **batch_of(rows, side), **inputs)
    share = torch.tensor([(row["labels"] != -100).sum() for row in rows])
    share = share / share.sum()
    model.zero_grad(set_to_none=True)
    alone = [model(**row, **inputs, loss_scale=float(weight)).loss for weight, row in zip(share, rows, strict=True)]
    loss = (share * torch.stack(alone)).sum()
    loss.backward()
    assert_close(out.loss, loss, rtol=0, atol=1e-5)
    assert (out.band > 0.1) == (phase != "dense")
    for name, expected in gradients(model).items():
        assert (found[name] - expected).norm() <= 1e-5 * max(1.0, float(expected.norm())), name


@pytest.mark.parametrize("stage", ["s1", "s2"])
@torch.no_grad()
def test_padding_predicts_nothing_even_where_every_token_is_a_label(golden: Golden, rows, stage: str) -> None:
    model = golden.model(stage)
    learnt = [row | {"labels": row["input_ids"]} for row in rows]
    for side in ("left", "right"):
        out = model(**batch_of(learnt, side))
        alone = [model(**row) for row in learnt]
        counts = torch.tensor([len(single.answer_labels_N) for single in alone])
        expected = sum(n * single.loss for n, single in zip(counts, alone, strict=True)) / counts.sum()
        assert len(out.answer_labels_N) == counts.sum()
        assert_close(out.loss, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_evaluation_always_drops_whatever_the_step(model, rows) -> None:
    late, early = (model(**rows[2], step=step) for step in (10_000, 0))
    assert not early.scheduled.keep_BL.all()
    assert early.scheduled.keep_BL.equal(late.scheduled.keep_BL)
    assert early.loss == late.loss
    assert early.band == 0


def test_a_row_alone_with_labels_gets_exactly_its_own_gradients(model, rows) -> None:
    model.train()
    batch = batch_of(rows, "left")
    batch["labels"][:3] = -100
    _, found = losses_and_gradients(model, **batch, step=8000)
    _, own = losses_and_gradients(model, **rows[3], step=8000)
    for name, g in found.items():
        assert (g - own[name]).norm() <= 1e-5 * max(1.0, float(own[name].norm())), name


def test_perturbed_flipped_and_answering_rows_share_a_batch(model, rows) -> None:
    model.train()
    perturbed = torch.tensor([True, False, False, False])
    flip = torch.tensor([False, True, True, False])  # the text-only row has nothing to flip
    batch = batch_of(rows, "right")
    out = model(**batch, step=9000, perturbed=perturbed, flip=flip)
    counts = [int((row["labels"] != -100).sum()) for row in rows]
    parts = dict.fromkeys(("ce", "robustness", "flip", "band"), 0.0)
    for i, row in enumerate(rows):
        alone = model(**row, step=9000, perturbed=perturbed[i : i + 1], flip=flip[i : i + 1])
        for name in parts:
            parts[name] += alone[name].item() * counts[i] / sum(counts)
    for name, value in parts.items():
        assert out[name].item() == pytest.approx(value, abs=1e-5), name
    assert parts["robustness"] < 0 < parts["flip"] < parts["ce"]
    kept = out.scheduled.keep_BL[2] & (batch["input_ids"][2] == model.config.video_token_id)
    straight = model(**rows[2], step=9000, flip=torch.tensor([False])).scheduled.keep_BL[0]
    is_visual = rows[2]["input_ids"][0] == model.config.video_token_id
    assert kept[: len(is_visual)].equal(is_visual & ~straight)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("stage", ["s1", "s2"])
def test_a_batch_generates_what_its_rows_generate_alone(golden: Golden, stage: str, side: str) -> None:
    model = golden.model(stage)
    rows = [golden.batch(name, "labels") for name in ("b1_prompt", "text_only_prompt", "two_vol", "text_first")]
    settings = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    out = model.generate(**prompts_of(rows, side), **settings)
    for i, row in enumerate(rows):
        alone = model.generate(**row, **settings)
        assert out.sequences[i, -8:].tolist() == alone.sequences[0, -8:].tolist()
        assert_close(torch.stack([x[i] for x in out.logits]), torch.cat(alone.logits), rtol=0, atol=1e-4)


@torch.no_grad()
def test_any_order_and_any_company_keeps_the_same_tokens(model, rows) -> None:
    is_visual = {i: rows[i]["input_ids"][0] == model.config.video_token_id for i in (0, 2, 3)}
    kept: dict[int, set[tuple[bool, ...]]] = {i: set() for i in is_visual}
    for order in itertools.permutations(range(4), 3):
        out = model(**batch_of([rows[i] for i in order], "left"))
        for place, i in enumerate(order):
            if i in kept:
                kept[i].add(tuple(out.scheduled.keep_BL[place, -len(is_visual[i]) :][is_visual[i]].tolist()))
    assert all(len(found) == 1 for found in kept.values())


@torch.no_grad()
def test_eager_attention_gives_what_sdpa_gives(golden: Golden, rows) -> None:
    batch = batch_of(rows, "left")
    sdpa, other = (golden.model("s2", attn_implementation=name)(**batch) for name in ("sdpa", "eager"))
    assert other.scheduled.keep_BL.equal(sdpa.scheduled.keep_BL)
    here = sdpa.scheduled.kept.mask_BM
    assert_close(other.logits[here], sdpa.logits[here], rtol=0, atol=5e-5)


@pytest.mark.parametrize("phase", PHASES)
def test_gradient_checkpointing_changes_nothing(model, rows, phase: str) -> None:
    model.train()
    batch = batch_of(rows, "left") | {"step": PHASES[phase]}
    plain, expected = losses_and_gradients(model, **batch)
    model.gradient_checkpointing_enable()
    out, found = losses_and_gradients(model, **batch)
    assert_close(out.loss, plain.loss, rtol=0, atol=1e-6)
    for name, g in found.items():
        assert_close(g, expected[name], rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_the_reentrant_kind_of_checkpointing_is_refused(model) -> None:
    with pytest.raises(ValueError, match="expected gradient checkpointing without reentry"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
