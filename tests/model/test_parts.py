"""Curriculum, schedulers, perturbations and loss parts, by hand."""

import dataclasses
import logging
from pathlib import Path

import pytest
import torch
from golden import Golden
from torch.testing import assert_close
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from photon_train.attention import attend_in_groups, in_groups, rotate, signed
from photon_train.configuration_photon import SCHEDULER_NAMES, Phase, PhotonConfig, phase_at
from photon_train.losses import answer_losses
from photon_train.pruners import SCHEDULERS
from photon_train.scheduling import SchedulerContext, SchedulingInputs, descriptors, gather_of, min_max
from photon_train.tiny import byte_tokenizer, tiny_config
from photon_train.training.batches import Perturbation, draw_perturbation, perturb

KEPT_CHANCES = ("perturb_shuffle_patches", "perturb_shuffle_voxels", "perturb_keep_patches", "perturb_keep_voxels")


def config(**settings) -> PhotonConfig:
    return tiny_config(byte_tokenizer(), stage=2, **settings)


@pytest.mark.parametrize(
    ("step", "phase"),
    [
        (0, Phase.DENSE),
        (3999, Phase.DENSE),
        (4000, Phase.SOFT),
        (8000, Phase.HARD),
        (8999, Phase.HARD),
        (9000, Phase.FLIP),
    ],
)
def test_phases_start_at_the_published_steps(step: int, phase: Phase) -> None:
    assert phase_at(config(), step) is phase


def test_phases_can_start_at_fractions_of_the_run() -> None:
    fractions = config(soft_start=0.25, hard_start=0.5, flip_start=0.75)
    found = [phase_at(fractions, step, total_steps=8) for step in range(8)]
    assert found == [p for p in (Phase.DENSE, Phase.SOFT, Phase.HARD, Phase.FLIP) for _ in range(2)]
    with pytest.raises(ValueError, match="expected total_steps, found None"):
        phase_at(fractions, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scheduler": "best"}, "scheduler: expected one of its, none, .*, found 'best'"),
        ({"its_layer": 8}, "its_layer: expected a layer from 0 to 2, found 8"),
        ({"keep_ratio": 0.0}, "keep_ratio"),
        ({"initial_threshold": 0.95}, "initial_threshold: expected a value between 0 and 0.9"),
        (
            {"hard_start": 8000.0},
            "hard_start: expected an optimizer step .int. or a fraction of the run .*, found 8000.0",
        ),
        ({"use_sliding_window": True}, "use_sliding_window: expected False.*, found True"),
        ({"intensity": "zscore"}, "intensity: expected one of minmax, window"),
    ],
)
def test_contradicting_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"perturb_noise": 0.5}, "sum of perturb_.*: expected 1, found 1.34"),
        ({"perturb_kept_voxels": 10.0}, "perturb_kept_voxels: expected a share from 0 to 1, found 10.0"),
        ({"keep_temperature": 0.0}, "keep_temperature: expected a number above 0"),
        ({"saliency_epsilon": -1e-8}, "saliency_epsilon: expected a number above 0"),
        ({"band_low": 0.9}, "band_low: expected at most band_high = 0.8, found 0.9"),
        ({"sgp_scale_min": 3.0}, "sgp_scale_min: expected from 0 to sgp_scale_max, found 3.0"),
        ({"window_hu": (400.0, -100.0)}, "window_hu: expected two rising HU values"),
    ],
)
def test_numbers_out_of_range_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**settings)


def test_every_setting_survives_config_json(tmp_path: Path) -> None:
    """Whatever the field, so that a new one cannot be forgotten."""
    own = [f for f in dataclasses.fields(PhotonConfig) if f.name in PhotonConfig.__annotations__]
    numbers = {f.name: f.default * 0.97 for f in own if type(f.default) is float}
    chances = {"perturb_noise": 0.02, "perturb_zeros": 0.34, **dict.fromkeys(KEPT_CHANCES, 0.16)}
    others = {"sgp_strict": True, "predictor_width": 5, "its_layer": 2, "scheduler": "random", "hard_start": 0.5}
    changed = {**numbers, **chances, **others, "window_hu": [-900.0, 500.0], "scheduler_seed": 7}
    config(**changed).save_pretrained(tmp_path)
    again = PhotonConfig.from_pretrained(tmp_path)
    assert {name: getattr(again, name) for name in changed} == changed
    assert len(numbers) > 20


def test_a_default_configuration_can_be_printed() -> None:
    assert "keep_temperature" in PhotonConfig().to_json_string(use_diff=False)
    assert "PhotonConfig" in repr(PhotonConfig())


def test_keep_probability_and_predictor_width_do_what_they_say(golden: Golden) -> None:
    x, visual = golden.batch("b1", "labels"), golden.inputs("b1")["vision_mask"]
    with torch.no_grad():
        scheduled = golden.model("s2", keep_probability=0.7)(**x).scheduled
    assert scheduled.keep_BL[visual].equal(scheduled.selection.probability_BL[visual] > 0.7)
    fresh = golden.model("s1", stage=2, predictor_width=3)
    assert fresh.model.language_model.layers[fresh.config.its_layer].atp.predictor.mlp[0].weight.shape == (3, 12)


def test_stage_1_has_no_threshold_to_schedule_by() -> None:
    with pytest.raises(ValueError, match="stage=2 to add a fresh one"):
        tiny_config(byte_tokenizer(), stage=1, scheduler="its")


def selected(name: str, visual: list[list[int]], share: list[list[float]] | None = None, **settings) -> list[list[int]]:
    """The kept positions of each row."""
    visual_BL = torch.tensor(visual).bool()
    no_B = torch.zeros(len(visual), dtype=torch.bool)
    foreground_BL = torch.tensor(share) if share else torch.zeros(visual_BL.shape)
    inputs = SchedulingInputs(
        visual_BL, ~visual_BL, foreground_BL, Phase.HARD, no_B, no_B, torch.ones(len(no_B)), visual_BL
    )
    context = SchedulerContext(
        inputs, lambda: pytest.fail("no need of q and k"), None, config(scheduler=name, **settings)
    )
    return [row.nonzero().flatten().tolist() for row in SCHEDULERS[name](context).keep_BL]


def test_every_scheduler_has_its_name_in_the_configuration() -> None:
    assert tuple(SCHEDULERS) == SCHEDULER_NAMES


def test_uniform_keeps_every_other_token_of_each_row() -> None:
    visual = [[0, 1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0, 0, 0], [0] * 8]
    assert selected("uniform", visual, keep_ratio=0.5) == [[2, 4, 6], [1, 3], []]


def test_foreground_keeps_the_tokens_with_most_foreground_ties_in_order() -> None:
    visual, share = [[0, 1, 1, 1, 1]], [[0.9, 0.0, 0.5, 0.5, 0.7]]
    assert selected("foreground", visual, share, keep_ratio=0.5) == [[2, 4]]


def test_random_keeps_the_stated_share_and_repeats_by_seed() -> None:
    visual = [[0] * 5 + [1] * 1000, [1] * 500 + [0] * 505]
    first, again = (selected("random", visual, keep_ratio=0.39, scheduler_seed=3) for _ in range(2))
    assert [len(row) for row in first] == [390, 195]
    assert first == again
    assert first != selected("random", visual, keep_ratio=0.39, scheduler_seed=4)


def test_none_keeps_all() -> None:
    assert selected("none", [[0, 1, 1], [1, 0, 0]]) == [[1, 2], [0]]


def test_gather_packs_to_the_right() -> None:
    gather = gather_of(torch.tensor([[1, 1, 0, 1], [0, 1, 0, 0]]).bool())
    x = torch.tensor([[10, 11, 12, 13], [20, 21, 22, 23]])
    assert gather.mask_BM.tolist() == [[True, True, True], [False, False, True]]
    assert gather(x)[gather.mask_BM].tolist() == [10, 11, 13, 21]


def test_gather_packs_to_the_left_where_asked() -> None:
    gather = gather_of(torch.tensor([[1, 1, 0, 1], [0, 1, 0, 0]]).bool(), to_left=True)
    x = torch.tensor([[10, 11, 12, 13], [20, 21, 22, 23]])
    assert gather.mask_BM.tolist() == [[True, True, True], [True, False, False]]
    assert gather(x)[gather.mask_BM].tolist() == [10, 11, 13, 21]
    assert gather.place_BL[0, [0, 1, 3]].tolist() == [0, 1, 2] and gather.place_BL[1, 1] == 0


def test_rotation_turns_pairs_by_their_angle_has_that_gradient_and_rounds_once() -> None:
    angle_L1d = torch.tensor([[[0.3, 1.1] * 2], [[-0.7, 2.0] * 2]], dtype=torch.float64)
    cos, sin = angle_L1d.cos(), signed(angle_L1d.sin())
    x_LHd = torch.arange(1.0, 25.0, dtype=torch.float64).view(2, 3, 4).requires_grad_()
    turned = torch.complex(*x_LHd.chunk(2, -1)) * torch.exp(1j * angle_L1d[..., :2])
    assert_close(rotate(x_LHd, cos, sin), torch.cat([turned.real, turned.imag], -1))
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos, sin), x_LHd)
    assert torch.autograd.gradcheck(lambda x: rotate(x[:, :2], cos, sin), x_LHd)
    rough = x_LHd.detach().bfloat16()
    assert rotate(rough, cos.float(), sin.float()).equal(rotate(rough.float(), cos.float(), sin.float()).bfloat16())


@pytest.mark.parametrize(("heads", "key_heads"), [(8, 2), (4, 4), (6, 1)])
@pytest.mark.parametrize("queries", [1, 5])
def test_heads_of_one_key_head_attend_as_with_a_copy_of_its_keys_each(heads, key_heads, queries) -> None:
    """As transformers has it, for some queries behind keys, of rows with padding; with gradients."""
    generator = torch.Generator().manual_seed(heads + queries)
    shapes = [(3, heads, queries, 4), (3, key_heads, 9, 4), (3, key_heads, 9, 4)]
    qkv = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    seen = torch.ones(3, 1, queries, 9, dtype=torch.bool).tril(9 - queries)
    seen[1, ..., :3] = False
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = heads // key_heads, True
    expected, _ = sdpa_attention_forward(module, *qkv, mask, dropout=0.0, scaling=0.3)
    weights = torch.randn(expected.shape, generator=generator)
    gradients = torch.autograd.grad((expected * weights).sum(), qkv)
    for given in (mask, in_groups(mask, heads // key_heads)):
        found, _ = attend_in_groups(module, *qkv, given, scaling=0.3)
        assert_close(found, expected)
        assert_close(torch.autograd.grad((found * weights).sum(), qkv), gradients)


def test_descriptors_of_a_row_are_those_torch_computes_on_it_alone() -> None:
    torch.manual_seed(0)
    u, visual = torch.randn(2, 30) * 4, torch.rand(2, 30) > 0.4
    found = descriptors(u.masked_fill(~visual, 0), min_max(u, visual, 1e-8), visual)
    for row in range(2):
        own = u[row, visual[row]]
        rho = (own - own.min()) / (own.max() - own.min())
        log = own.sign() * own.abs().log1p()
        expected = [rho.mean(), rho.std(correction=0), 0, 1, rho.quantile(0.25), rho.quantile(0.5)]
        expected += [own.mean(), own.std(correction=0), own.min(), own.max(), log.mean(), log.max()]
        assert_close(found[row], torch.tensor([float(x) for x in expected]), rtol=1e-5, atol=1e-5)


def test_a_one_token_question_keeps_everything_and_warns(golden: Golden, caplog: pytest.LogCaptureFixture) -> None:
    model, x = golden.model("s2"), golden.batch("b1", "labels")
    question = golden.inputs("b1")["question_mask"]
    for count in (0, 1):
        asked = question & (question.cumsum(1) <= count)
        with caplog.at_level(logging.WARNING, logger="photon_train.scheduling"), torch.no_grad():
            scheduled = model(**x, question_mask=asked).scheduled
        assert scheduled.keep_BL.all()
        assert scheduled.selection.threshold_B.isnan().all()
        assert "no visual token stands out" in caplog.text
        caplog.clear()


def test_losses_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 1.0]]).requires_grad_()
    labels, rows = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 2])
    perturbed, flipped = torch.tensor([True, False, False]), torch.tensor([False, True, False])
    losses = answer_losses(logits, labels, rows, perturbed, flipped, 1e-6)
    p = torch.tensor([2.0]).sigmoid()
    assert_close(losses.robustness, -torch.tensor(2.0).log() / 3)  # minus the entropy of (1/2, 1/2)
    assert_close(losses.flip, -torch.log(1 - p + 1e-6)[0] / 3)
    assert_close(losses.ce, torch.tensor([1.0]).neg().exp().log1p()[0] / 3)  # log(1 + e^-1)


@pytest.mark.parametrize("how", list(Perturbation))
def test_each_perturbation_does_what_it_says(how: Perturbation) -> None:
    patches = torch.arange(1.0, 2001).reshape(20, 100) / 2000
    found = perturb(patches, how, config(), torch.Generator().manual_seed(1))
    again = perturb(patches, how, config(), torch.Generator().manual_seed(1))
    assert found.equal(again)
    assert found.shape == patches.shape
    assert not found.equal(patches)
    rows, columns = (found != 0).any(1), (found != 0).any(0)
    match how:
        case Perturbation.SHUFFLE_PATCHES:
            assert found.sort(0).values.equal(patches)
        case Perturbation.SHUFFLE_VOXELS:
            assert found.flatten().sort().values.equal(patches.flatten())
            assert not found.sort(0).values.equal(patches)
        case Perturbation.KEEP_PATCHES:
            assert rows.sum() == 4
            assert found[rows].equal(patches[rows])
        case Perturbation.KEEP_VOXELS:
            assert columns.sum() == 10
            assert found[:, columns].equal(patches[:, columns])
        case Perturbation.NOISE:
            assert 0 <= found.min() < 0.01 < 0.99 < found.max() < 1
        case Perturbation.ZEROS:
            assert not found.any()


def test_perturbations_are_drawn_by_their_chances() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [draw_perturbation(config(), generator) for _ in range(4000)]
    for how in Perturbation:
        chance = 0.20 if how is Perturbation.ZEROS else 0.16
        assert drawn.count(how) / 4000 == pytest.approx(chance, abs=0.02)
