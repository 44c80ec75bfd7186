"""Many questions on one volume: equal to asking them one by one."""

import pytest
import torch
from golden import Golden, gradients
from torch import Tensor
from torch.testing import assert_close

from photon_train.configuration_photon import SCHEDULER_NAMES

LENGTHS = (9, 3, 17)


@pytest.fixture(scope="module")
def row(golden: Golden) -> dict[str, Tensor]:
    return golden.batch("two_vol", "labels")


def questions(golden: Golden, row: dict[str, Tensor]) -> list[Tensor]:
    """Three questions of other lengths to follow the last volume, each with its end of turn and the next header."""
    ids = row["input_ids"][0]
    rest = ids[int((ids == golden.tokens["vision_end"]).nonzero()[-1]) + 1 :]
    header = rest[: int((rest == golden.tokens["im_end"]).nonzero()[0]) + 1][-1:]
    generator = torch.Generator().manual_seed(5)
    return [torch.cat([torch.randint(20, 300, (n,), generator=generator), header, header * 0 + 7]) for n in LENGTHS]


def whole_row(row: dict[str, Tensor], prefix_length: int, question: Tensor) -> dict[str, Tensor]:
    ids = torch.cat([row["input_ids"][0, :prefix_length], question])[None]
    return {**row, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("scheduler", [*SCHEDULER_NAMES])
@torch.no_grad()
def test_questions_on_a_prefix_keep_and_say_what_they_do_alone(golden: Golden, row, scheduler: str) -> None:
    model = golden.model("s2", scheduler=scheduler)
    prefix = model.encode_prefix(row)
    asked = questions(golden, row)
    out = model(**prefix.followed_by(asked))
    for i, question in enumerate(asked):
        alone = model(**whole_row(row, prefix.length, question))
        length, here = prefix.length + len(question), out.scheduled.kept.mask_BM[i]
        own = torch.ones(length, dtype=torch.bool) if alone.scheduled is None else alone.scheduled.keep_BL[0]
        kept = out.scheduled.keep_BL[i]
        assert torch.cat([kept[: prefix.length], kept[-len(question) :]]).equal(own)
        assert_close(out.logits[i, here], alone.logits[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("scheduler", ["its", "none"])
def test_answers_on_a_prefix_are_the_answers_alone(golden: Golden, row, scheduler: str) -> None:
    model = golden.model("s2", scheduler=scheduler)
    with torch.no_grad():
        prefix = model.encode_prefix(row)
    asked = questions(golden, row)
    how = {"max_new_tokens": 8, "return_dict_in_generate": True, "output_logits": True}
    before = [keys.clone() for keys, _ in prefix.keys_values] + [prefix.h_1PD.clone()]
    out = model.answer(prefix, asked, **how)
    for i, question in enumerate(asked):
        alone = model.generate(**whole_row(row, prefix.length, question), do_sample=False, **how)
        assert out.sequences[i, -8:].tolist() == alone.sequences[0, -8:].tolist()
        assert_close(torch.stack([x[i] for x in out.logits]), torch.cat(alone.logits), rtol=0, atol=1e-4)
    for unchanged, now in zip(before, [*(keys for keys, _ in prefix.keys_values), prefix.h_1PD], strict=True):
        assert unchanged.equal(now)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("step", [0, 4000, 8000])
def test_training_on_a_prefix_has_the_losses_and_gradients_of_separate_rows(
    golden: Golden, row, step: int, checkpointing: bool
) -> None:
    model = golden.model("s2").train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    asked = questions(golden, row)
    shared = model.encode_prefix(row).followed_by(asked)
    labels = torch.full_like(shared["input_ids"], -100)
    labels[:, -2:] = shared["input_ids"][:, -2:]
    out = model(**shared, labels=labels, step=step)
    out.loss.backward()
    found = gradients(model)

    model.zero_grad(set_to_none=True)
    prefix_length = shared["prefix"].length
    losses = []
    for question in asked:
        alone = whole_row(row, prefix_length, question)
        own_labels = torch.full_like(alone["input_ids"], -100)
        own_labels[:, -2:] = alone["input_ids"][:, -2:]
        losses.append(model(**alone, labels=own_labels, step=step, loss_scale=1 / len(asked)).loss)
    loss = torch.stack(losses).mean()
    loss.backward()
    assert_close(out.loss, loss, rtol=0, atol=1e-5)
    for name, expected in gradients(model).items():
        assert (found[name] - expected).norm() <= 1e-4 * max(1.0, float(expected.norm())), name


def test_a_batch_or_a_row_without_volume_is_no_prefix(golden: Golden) -> None:
    model = golden.model("s2")
    with pytest.raises(ValueError, match="expected one row, found 2"):
        model.encode_prefix(golden.batch("b2_left", "labels"))
    with pytest.raises(ValueError, match="expected a row with a whole volume"):
        model.encode_prefix(golden.batch("text_only", "labels"))


def test_an_empty_question_is_refused(golden: Golden, row) -> None:
    with torch.no_grad():
        prefix = golden.model("s2").encode_prefix(row)
    with pytest.raises(ValueError, match="at least one token"):
        prefix.followed_by([torch.tensor([5, 6]), torch.tensor([], dtype=torch.long)])
