"""Masks of what is asked about: where they lie in the visual tokens, and that scores learn to point there."""

import json
import math
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch

from photon_data.errors import UsageError
from photon_train import PhotonForConditionalGeneration, PhotonProcessor
from photon_train.rows import TrainRow, read_train_rows
from photon_train.training.batches import MicroBatches
from photon_train.training.config import TrainConfig
from photon_train.training.grounding import GroundingLoss, grounding_losses, grounding_of, mask_shares
from photon_train.training.plan import MicroBatch
from photon_train.training.setup import start

TOKENS_ZYX = (2, 2, 2)  # of the stores of conftest: 42 x 84 x 84 voxels of 1 mm


def write_mask(folder, name, corner_xyz, size=4):
    """Write a cube of ones; x, y, z are voxels of the store, whose middle is the origin of an LPS world."""
    data = np.zeros((84, 84, 42), np.uint8)
    x, y, z = corner_xyz
    data[x : x + size, y : y + size, z : z + size] = 1
    folder.mkdir(parents=True, exist_ok=True)
    ras_from_index = np.array([[-1, 0, 0, 41.5], [0, -1, 0, 41.5], [0, 0, 1, -20.5], [0, 0, 0, 1]])
    nib.save(nib.Nifti1Image(data, ras_from_index), folder / f"{name}.nii.gz")


def asking(stores, name, *masks):
    return TrainRow(name, (stores["a"],), [], (), "a", masks)


@pytest.fixture
def masks(tmp_path):
    write_mask(tmp_path / "a", "left_front_low", (70, 2, 2))  # x grows to the patient's left
    write_mask(tmp_path / "a", "right_back_high", (2, 70, 30))
    write_mask(tmp_path / "a", "across", (40, 2, 2))  # half on either side of x = 42
    write_mask(tmp_path / "a", "empty", (80, 80, 40), size=0)
    return tmp_path


def test_a_row_is_grounded_in_the_tokens_that_hold_its_masks(stores, masks):
    rows = [
        asking(stores, "left", "left_front_low"),
        asking(stores, "right", "right_back_high"),
        asking(stores, "across", "across"),
        asking(stores, "both", "left_front_low", "across"),
        asking(stores, "nothing there", "empty"),
        asking(stores, "unknown", "spleen"),
        asking(stores, "caption"),
    ]
    progress = []
    found = mask_shares(rows, masks, TOKENS_ZYX, lambda *counts: progress.append(counts))
    assert progress == [(1, 1)]
    # token = (slab * 2 + row) * 2 + column: slabs from the feet, rows from the front, columns from the patient's left
    expected = {
        "left": [1, 0, 0, 0, 0, 0, 0, 0],
        "right": [0, 0, 0, 0, 0, 0, 0, 1],
        "across": [0.5, 0.5, 0, 0, 0, 0, 0, 0],
        "both": [0.75, 0.25, 0, 0, 0, 0, 0, 0],
    }
    assert {id: share.tolist() for id, share in found.items()} == expected


def test_a_folder_without_masks_of_the_rows_is_refused_with_the_remedy(stores, masks, tmp_path):
    with pytest.raises(UsageError, match="grounding=''"):
        mask_shares([asking(stores, "a", "liver")], tmp_path / "elsewhere", TOKENS_ZYX)
    with pytest.raises(UsageError, match="grounding=''"):
        mask_shares([asking(stores, "caption")], masks, TOKENS_ZYX)


def test_a_run_that_finds_no_masks_leaves_nothing_in_its_way(models, manifest, tmp_path):
    given = {
        "model": str(models / "s1"),
        "data": (str(manifest),),
        "output": str(tmp_path / "run"),
        "grounding": str(tmp_path),
    }
    with pytest.raises(UsageError, match="expected masks of some of the volumes"):
        start(TrainConfig(**given, precision="fp32"), resume=False, grounding=grounding_of(str(tmp_path)))
    assert not (tmp_path / "run" / "config.json").exists()


def test_what_moves_the_volume_is_refused_beside_masks_that_stay():
    with pytest.raises(UsageError, match="masks do not move"):
        TrainConfig(grounding="masks", augment="affine")
    assert TrainConfig(grounding="masks", augment="intensity").grounding == "masks"


def test_the_loss_is_the_cross_entropy_of_the_scores_with_the_masks():
    score_BL = torch.tensor([[9.0, 0.0, math.log(3.0), 9.0], [0.0, 1.0, 1.0, 0.0]])
    visual_BL = torch.tensor([[False, True, True, False], [False, True, True, False]])
    grounding_BL = torch.tensor([[0.0, 0.25, 0.75, 0.0], [0.0, 0.0, 0.0, 0.0]])
    found_B = grounding_losses(score_BL, visual_BL, grounding_BL)
    assert found_B.tolist() == pytest.approx([-(0.25 * math.log(1 / 4) + 0.75 * math.log(3 / 4)), 0.0], abs=1e-6)


# What is known of the five questions of volume a.
KNOWN = {"a0": torch.eye(8)[3], "a4": torch.tensor([0, 0.5, 0, 0, 0.5, 0, 0, 0])}


@pytest.fixture
def grounded(models, manifest):
    """Return batches of the five questions of volume a."""
    rows = read_train_rows([manifest])
    micro_batch = MicroBatch(tuple(i for i, row in enumerate(rows) if row.id.startswith("a")), 0)

    def batch(stage, *, share_prefix=True, perturbed=False):
        processor = PhotonProcessor.from_pretrained(models / stage, robustness_probability=1.0, scheduler="its")
        config = TrainConfig(stage="s2", share_prefix=share_prefix)
        item = MicroBatches(rows, processor, config, training=perturbed)[micro_batch]
        assert not item.error, item.error
        return item.to("cpu", processor)

    return batch


@pytest.mark.parametrize(
    ("stage", "settings"), [("s1", {}), ("s2", {}), ("s2", {"scheduler": "fastv", "fastv_layer": 2})]
)
def test_shared_or_not_the_same_scores_are_grounded(models, grounded, stage, settings):
    model = PhotonForConditionalGeneration.from_pretrained(models / stage, **settings).train()
    found = []
    for share in (False, True):
        model.zero_grad()
        batch, grounding_loss = grounded(stage, share_prefix=share), GroundingLoss(model, KNOWN)
        out = model(**batch.inputs, step=0, total_steps=40)
        assert out.loss.item() == pytest.approx((out.ce + out.band + out.robustness + out.flip).item())
        grounding = grounding_loss(batch)
        grounding.backward()
        attention = model.model.language_model.layers[model.config.drop_layer].self_attn
        found.append((grounding.detach(), attention.q_proj.weight.grad.clone(), attention.k_proj.weight.grad.clone()))
    for alone, shared in zip(*found, strict=True):
        assert alone.norm() > 0
        torch.testing.assert_close(shared, alone, rtol=1e-3, atol=1e-6)


def test_scores_learn_to_point_at_the_masks_of_each_question(models, grounded):
    model = PhotonForConditionalGeneration.from_pretrained(models / "s1").train()
    batch, grounding_loss = grounded("s1"), GroundingLoss(model, KNOWN)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(**batch.inputs)
        grounding_loss(batch).backward()
        optimizer.step()
    scheduling = PhotonForConditionalGeneration.from_pretrained(models / "s2").eval()
    scheduling.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        saliency_KL = scheduling(**batch.inputs).scheduled.selection.saliency_BL
    visual_KV = saliency_KL[:, batch.inputs["input_ids"][0] == model.config.video_token_id]
    assert visual_KV[0].argmax() == 3
    assert set(visual_KV[4].topk(2).indices.tolist()) == {1, 4}


def test_nothing_is_grounded_in_a_perturbed_volume_or_in_evaluation(models, grounded):
    model = PhotonForConditionalGeneration.from_pretrained(models / "s2").train()
    batch, perturbed, grounding_loss = grounded("s2"), grounded("s2", perturbed=True), GroundingLoss(model, KNOWN)
    model(**perturbed.inputs)
    assert grounding_loss(perturbed) is None
    model.eval()
    model(**batch.inputs)
    assert grounding_loss(batch) is None
    model.train()
    model(**batch.inputs)
    assert grounding_loss(batch) > 0


def test_rows_of_which_nothing_is_known_have_no_loss(models, grounded):
    model = PhotonForConditionalGeneration.from_pretrained(models / "s1").train()
    batch, grounding_loss = grounded("s1"), GroundingLoss(model, KNOWN)
    for other in (replace(batch, ids=["b"] * 5), replace(batch, error="cannot be read")):
        model(**other.inputs)
        assert grounding_loss(other) is None


def test_a_run_with_grounding_needs_its_loss(models, manifest, tmp_path):
    given = {"model": str(models / "s1"), "data": (str(manifest),), "output": str(tmp_path / "run")}
    with pytest.raises(UsageError, match="found one of them"):
        start(TrainConfig(**given, grounding="masks"), resume=False)
    assert grounding_of("") is None


@pytest.mark.parametrize("stage", ["s1", "s2"])
@pytest.mark.parametrize("share", [False, True])
def test_gradient_checkpointing_changes_no_gradient_of_the_grounding(models, grounded, stage, share):
    found = []
    for checkpointed in (False, True):
        model = PhotonForConditionalGeneration.from_pretrained(models / stage).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        batch, grounding_loss = grounded(stage, share_prefix=share), GroundingLoss(model, KNOWN)
        for _ in range(2):
            out = model(**batch.inputs, step=0, total_steps=40)
            (out.loss + grounding_loss(batch)).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, again = found
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_the_masks_a_row_names_are_read_from_its_manifest(tmp_path, stores):
    messages = [{"role": "user", "content": "<video>?"}, {"role": "assistant", "content": "yes"}]
    row = {"id": "q", "messages": messages, "videos": [stores["a"]], "volume_id": "a"}
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({**row, "extra": {"organ_masks": '["liver", "spleen"]'}}))
    assert read_train_rows([path])[0][-2:] == ("a", ("liver", "spleen"))
    path.write_text(json.dumps({**row, "extra": {"organ_masks": "liver"}}))
    with pytest.raises(UsageError, match="a JSON list of names"):
        read_train_rows([path])
