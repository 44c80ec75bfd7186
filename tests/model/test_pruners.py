"""The schedulers that ITS is compared with: which tokens each keeps, by hand; where they drop, and what stays."""

import math

import pytest
import torch
from golden import Golden
from torch import Tensor
from torch.testing import assert_close

from photon_train.configuration_photon import BEFORE_DECODER, SCHEDULER_NAMES, Phase, PhotonConfig
from photon_train.pruners import (
    SCHEDULERS,
    VolumeContext,
    attention_received,
    column_sums,
    divprune,
    nucleus,
    visionzip,
)
from photon_train.scheduling import SchedulerContext, SchedulingInputs
from photon_train.tiny import byte_tokenizer, tiny_config
from photon_train.vision import PhotonVisionTower


def config(**settings) -> PhotonConfig:
    return tiny_config(byte_tokenizer(), stage=2, **settings)


def volume(tokens: list, received: list | None = None, keys: list | None = None, **settings) -> VolumeContext:
    as_tensor = [None if values is None else torch.tensor(values, dtype=torch.float32) for values in (received, keys)]
    return VolumeContext(torch.tensor(tokens, dtype=torch.float32), *as_tensor, config(**settings))


def indices(keep_V: Tensor) -> list[int]:
    return keep_V.nonzero().flatten().tolist()


def at_angles(*degrees: float) -> list[list[float]]:
    return [[3 * math.cos(math.radians(a)), 3 * math.sin(math.radians(a))] for a in degrees]


def test_divprune_takes_the_loneliest_token_then_always_the_one_farthest_from_those_taken():
    # 200 has its nearest neighbour 100 degrees away; 10 is 170 from it; 100 is 90 from the nearest of both, 90 is 80.
    choice = divprune(volume(at_angles(0, 10, 90, 100, 200), keep_ratio=0.6))
    assert indices(choice.keep_V) == [1, 3, 4]
    assert choice.score_V.tolist() == [0, 2, 0, 1, 3]


def test_divprune_keeps_the_number_it_is_given_even_of_equal_tokens():
    assert indices(divprune(volume([[1, 0]] * 4, keep_ratio=0.5)).keep_V) == [0, 1]


@pytest.mark.parametrize(("mass", "kept"), [(0.3, [0]), (0.7, [0, 2]), (0.71, [0, 2, 3]), (1.0, [0, 1, 2, 3])])
def test_nucleus_keeps_the_fewest_tokens_that_receive_the_mass(mass: float, kept: list[int]):
    assert indices(nucleus(volume([[0]] * 4, received=[4, 1, 3, 2], nucleus_mass=mass)).keep_V) == kept


def test_visionzip_adds_what_it_drops_to_the_target_with_the_most_similar_key():
    """Of 16 tokens 13: 11 dominant ones, and 2 targets at even distances from the other 5, which are 11 to 15."""
    tokens = [[float(i), 1.0] for i in range(16)]
    keys = [[0.0, 0.0]] * 11 + [[1.0, 0.0], [5.0, 0.1], [0.0, 2.0], [0.1, 1.0], [9.0, 9.1]]
    choice = visionzip(volume(tokens, received=list(range(16, 0, -1)), keys=keys, keep_ratio=13 / 16))
    assert indices(choice.keep_V) == [*range(12), 13]
    # 12 goes to 11; 14 and 15 to 13: 11 + 12, and 13 + (14 + 15) / 2
    assert choice.tokens_VD[11].tolist() == [23.0, 2.0]
    assert choice.tokens_VD[13].tolist() == [27.5, 2.0]
    assert choice.tokens_VD[:11].tolist() == tokens[:11]


def test_a_quota_per_slab_keeps_the_best_of_each_slab():
    two_slabs = {"model_shape_zyx": (28, 28, 56), "keep_ratio": 0.5}
    found = [
        indices(visionzip(volume([[0]] * 4, [9, 8, 1, 2], [[1]] * 4, keep_per_slab=per_slab, **two_slabs)).keep_V)
        for per_slab in (False, True)
    ]
    assert found == [[0, 1], [0, 3]]


def test_random_per_slab_keeps_equally_many_of_each():
    visual_BL = torch.tensor([[0] + [1] * 125, [1] * 125 + [0]]).bool()
    no_B, zeros_BL = torch.zeros(2, dtype=torch.bool), torch.zeros(visual_BL.shape)
    inputs = SchedulingInputs(visual_BL, ~visual_BL, zeros_BL, Phase.HARD, no_B, no_B, torch.ones(2), visual_BL)
    shape = {"model_shape_zyx": (70, 140, 140), "keep_ratio": 0.2}
    for per_slab in (True, False):
        settings = config(scheduler="random", keep_per_slab=per_slab, **shape)
        keep_BL = SCHEDULERS["random"](SchedulerContext(inputs, lambda: None, None, settings)).keep_BL
        per_row = [row[own].reshape(5, 25).sum(1).tolist() for row, own in zip(keep_BL, visual_BL, strict=True)]
        assert per_row[0] == per_row[1]
        assert (per_row[0] == [5] * 5) == per_slab


def test_fastv_keeps_what_the_last_token_of_the_prompt_attends_to():
    """Tokens: (padding,) visual, visual, end of the prompt, answer. The answer would choose otherwise."""
    visual_BL = torch.tensor([[0, 1, 1, 0, 0], [1, 1, 0, 0, 0]]).bool()
    prompt_BL = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()
    q_BHLd = torch.tensor([[0, 0, 0, 1, -1], [0, 0, 0, 0, 1]])[:, None, :, None].float()
    k_BKLd = torch.tensor([[9, 1, 2, 0, 0], [2, 1, 0, 0, 5]])[:, None, :, None].float()
    no_B = torch.zeros(2, dtype=torch.bool)
    zeros_BL = torch.zeros(visual_BL.shape)
    inputs = SchedulingInputs(visual_BL, ~visual_BL, zeros_BL, Phase.HARD, no_B, no_B, torch.ones(2), prompt_BL)
    context = SchedulerContext(inputs, lambda: (q_BHLd, k_BKLd), None, config(scheduler="fastv", keep_ratio=0.5))
    found = SCHEDULERS["fastv"](context)
    assert [indices(row) for row in found.keep_BL] == [[2], [0]]
    e = math.e
    assert_close(found.score_BL[0, 1:3], torch.tensor([e, e**2]) / (e + e**2 + 1))  # padding and answer have no share


def test_a_patch_receives_the_column_sums_of_the_attention():
    zero, three = 0.0, math.log(3)
    q_SHd, k_SHd = torch.ones(2, 1, 1), torch.tensor([zero, three]).view(2, 1, 1)
    assert_close(column_sums(q_SHd, k_SHd), torch.tensor([0.5, 1.5]))


def test_what_tokens_receive_does_not_depend_on_the_order_in_which_the_tower_has_its_patches():
    """With the one block that attends within slabs, windows change nothing but the order of the patches."""
    torch.manual_seed(0)
    settings = tiny_config(byte_tokenizer(), stage=1).vision_config
    settings.depth, settings.fullatt_block_indexes = 1, [0]
    grids = torch.tensor([[2, 10, 6], [1, 4, 4]])
    patches_PX = torch.randn(int(grids.prod(-1).sum()), 14**3)
    found, weights = [], None
    for window in (56, 14 * 64):  # two merged patches a side; all of a slab
        settings.window_size = window
        visual = PhotonVisionTower._from_config(settings).eval()
        weights = weights or visual.state_dict()
        visual.load_state_dict(weights)
        with attention_received(visual, grids) as received, torch.no_grad():
            visual(patches_PX, grid_thw=grids)
        found.append(received[0])
    assert_close(found[0].received_N, found[1].received_N)
    assert_close(found[0].keys_Nd, found[1].keys_Nd)
    for slab_N in found[0].received_N.split([15, 15, 4]):
        assert slab_N.mean().item() == pytest.approx(1, abs=1e-5)
    assert found[0].received_N.std() > 0.01


@pytest.fixture(scope="module")
def row(golden: Golden) -> dict[str, Tensor]:
    return golden.batch("two_vol", "labels")


@pytest.mark.parametrize("scheduler", BEFORE_DECODER)
@torch.no_grad()
def test_what_is_kept_before_the_decoder_keeps_its_positions_and_the_first_layer_sees_nothing_else(
    golden: Golden, row, scheduler: str
):
    seen: dict[str, list] = {}
    for name in ("none", scheduler):

        def remember(module, args, kwargs, name=name) -> None:
            seen[name] = [args[0], *kwargs["position_embeddings"]]

        model = golden.model("s2", scheduler=name, keep_ratio=0.4, nucleus_mass=0.4)
        layer = model.model.language_model.layers[0]
        handle = layer.register_forward_pre_hook(remember, with_kwargs=True)
        out = model(**row)
        handle.remove()
    (h_BLD, *rotary), (h_BMD, *kept_rotary) = seen["none"], seen[scheduler]
    kept = out.scheduled.kept.index_BM[0]
    assert h_BMD.shape[1] == len(kept) == int(out.scheduled.keep_BL.sum()) < h_BLD.shape[1]
    for all_L, kept_M in zip(rotary, kept_rotary, strict=True):
        assert kept_M[0].equal(all_L[0, kept])
    if scheduler != "visionzip":
        assert_close(h_BMD[0], h_BLD[0, kept])


@pytest.mark.parametrize("scheduler", [*BEFORE_DECODER, "fastv"])
def test_training_drops_nothing_until_the_hard_phase_and_then_learns_from_what_stays(
    golden: Golden, row, scheduler: str
):
    answer_BL = torch.arange(row["input_ids"].shape[1])[None] >= row["input_ids"].shape[1] - 3
    row = row | {"labels": row["input_ids"].masked_fill(~answer_BL, -100)}
    model = golden.model("s2", scheduler=scheduler, keep_ratio=0.4, nucleus_mass=0.4).train()
    dense = golden.model("s2", scheduler="none").train()(**row, step=0).loss
    for step, is_dense in ((0, True), (4000, True), (8000, False)):
        out = model(**row, step=step)
        assert (abs(out.loss.item() - dense.item()) < 1e-5) == is_dense, step
        assert out.scheduled.kept.mask_BM.sum() == row["input_ids"].numel() or not is_dense
    out.loss.backward()
    assert model.model.visual.patch_embed.proj.weight.grad.abs().sum() > 0
    assert model.model.language_model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_fastv_may_drop_after_a_layer_of_its_own_and_the_checkpoint_keeps_its_names(golden: Golden, row):
    model = golden.model("s2", scheduler="fastv", fastv_layer=0, keep_ratio=0.4)
    lengths: list[int] = []
    for layer in model.model.language_model.layers:
        layer.register_forward_pre_hook(lambda module, args, kwargs: lengths.append(args[0].shape[1]), with_kwargs=True)
    with torch.no_grad():
        model(**row)
    whole, kept = lengths[:2]
    assert kept < whole
    assert lengths == [whole, *[kept] * (len(lengths) - 1)]
    assert f"model.language_model.layers.{model.config.its_layer}.atp.predictor.mlp.2.bias" in model.state_dict()


@pytest.mark.parametrize("scheduler", [name for name in SCHEDULER_NAMES if name not in ("its", "foreground")])
@torch.no_grad()
def test_beams_and_several_answers_have_the_tokens_of_their_own_volume(golden: Golden, row, scheduler: str):
    model = golden.model("s2", scheduler=scheduler, keep_ratio=0.4)
    prompt = {name: value for name, value in row.items() if name != "labels"}
    one = model.generate(**prompt, do_sample=False, max_new_tokens=4)
    several = model.generate(**prompt, do_sample=False, max_new_tokens=4, num_beams=2, num_return_sequences=2)
    assert several.shape[0] == 2 * one.shape[0]
