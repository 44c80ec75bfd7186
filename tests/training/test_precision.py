import pytest
import torch

from photon_train import PhotonForConditionalGeneration, PhotonProcessor
from photon_train.training.dataset import GroupDataset, Reading
from photon_train.training.plan import Group
from photon_train.training.rows import read_train_rows


@pytest.mark.parametrize("share", [False, True])
def test_scores_are_not_rounded_by_autocast(models, manifest, share):
    model = PhotonForConditionalGeneration.from_pretrained(models / "s2").train()
    rows = read_train_rows([manifest])
    group = Group(tuple(i for i, row in enumerate(rows) if row.id.startswith("d")), 0)
    batch = GroupDataset(rows, [group], PhotonProcessor.from_pretrained(models / "s2"), Reading(share_prefix=share))[0]
    assert not batch.error, batch.error
    exact = model(**batch.inputs, step=8500).scheduled
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**batch.inputs, step=8500)
    out.loss.backward()
    cast = out.scheduled
    visual = batch.inputs["input_ids"] == model.config.video_token_id
    scores = cast.score_BL[visual]
    assert scores.dtype == torch.float32
    rounded = scores.to(torch.bfloat16).float()
    assert (rounded != scores).any(), "a score that is a bfloat16 was rounded to one"
    torch.testing.assert_close(scores, exact.score_BL[visual], rtol=0.1, atol=0.1)  # below layer its it did compute in bfloat16
    assert torch.isfinite(out.loss)
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
